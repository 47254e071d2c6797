"""What a run will need, counted before it begins, by its own code on tensors without numbers."""
