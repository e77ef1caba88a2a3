"""Weight conversion between PyTorch checkpoints and ours. Torch's names appear only here."""
