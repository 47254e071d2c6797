"""Sampling from a converted model: which positions to unmask, generate, infill."""
