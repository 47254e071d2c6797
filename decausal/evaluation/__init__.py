"""Measuring models: likelihood, hidden-state geometry."""
