"""Models that read whole rows: one denoising step, rows denoised together, rows that come and go."""
