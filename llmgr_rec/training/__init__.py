"""Training runs: preflight, stages, the training loop, optimizers and selection on validation."""
