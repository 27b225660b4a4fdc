"""Checkpoints in the published PyTorch layout: their names, files and FP8 blocks."""
