"""The trainer, its teacher, run directories, and the two functions that train: convert and pretrain."""
