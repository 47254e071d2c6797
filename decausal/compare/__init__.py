"""Compares recipes from one AR model at a matched budget: quality by training tokens, and by tokens per forward."""
