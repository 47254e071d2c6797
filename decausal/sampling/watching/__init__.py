"""Denoising to look at: live in the terminal, or recorded."""
