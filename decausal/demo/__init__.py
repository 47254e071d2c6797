"""The demo: one command turns a real AR model into a diffusion model before your eyes, and writes a report."""
