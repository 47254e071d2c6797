"""Measures models: likelihood, right answers to tasks, hidden-state geometry."""
