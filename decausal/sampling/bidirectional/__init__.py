"""Models that read whole rows: a denoising step, and an engine whose rows come and go."""
