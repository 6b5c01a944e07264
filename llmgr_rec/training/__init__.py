"""Stages, the training loop, optimizers and checkpoints."""
