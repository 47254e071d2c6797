"""Rewrites texts where the model doubts them, or where they are marked."""
