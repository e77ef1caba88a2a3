"""Kernels written by hand, a file each."""
