"""The demo: one command, a real AR model turned into a diffusion model before your eyes, and a report."""
