"""Checkpoints inside a stage: folders that are whole or not there (`store`), and what is in them (`keeper`)."""
