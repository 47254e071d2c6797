"""Scores texts as continuations of others, as benchmarks with several choices need."""
