"""The one trainer, its teacher, run directories, and the two things that train: convert and pretrain."""
