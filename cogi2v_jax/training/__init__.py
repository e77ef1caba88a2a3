"""Training: clips and their latents on disk, losses, the state, the loop."""
