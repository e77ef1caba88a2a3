"""Weight conversion between PyTorch checkpoints and ours. Torch's names for things live here and
nowhere else."""
