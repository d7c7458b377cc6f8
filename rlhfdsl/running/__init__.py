"""Executing a plan: a supervisor, a worker process for each rank of each stage, and the record they leave."""
