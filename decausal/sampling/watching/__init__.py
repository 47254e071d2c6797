"""Shows denoising: live in the terminal, or as a recording."""
