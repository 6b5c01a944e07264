"""Imported once by the server that starts the ranks of tests, so that a rank starts in milliseconds."""

import torch

import llmgr_rec.storage.bundle

# Threads made before the fork would be missing in the ranks.
torch.set_num_threads(1)
__all__ = ["llmgr_rec"]
