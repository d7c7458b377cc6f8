"""The command line: main.py dispatches, and each verb is a module of its own with HELP, configure and run."""
