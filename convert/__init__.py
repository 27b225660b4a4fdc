"""Conversion between published PyTorch checkpoints and native ones."""
