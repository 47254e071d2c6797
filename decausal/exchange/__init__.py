"""Exports converted models to engines and the hub, and imports public diffusion checkpoints."""
