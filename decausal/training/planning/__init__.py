"""Counts what a run will need before it begins, by running its own code on tensors without numbers."""
