"""Handing models on: converted models to engines and to the hub, and public diffusion checkpoints to decausal."""
