"""Trained recommenders as modules of larger TorchRec models."""
