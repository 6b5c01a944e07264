"""Imported once by the server that starts the ranks of tests, so that a rank starts in milliseconds.

A module that is missing here is imported again by every rank that needs it; the libraries of language models alone take
two seconds of each.
"""

import jsonargparse
import peft
import pyarrow.dataset
import torch
import torch.utils.tensorboard
from transformers import LlamaModel, MistralModel

import llmgr_rec.modules.language_model
import llmgr_rec.scoring.score_run
import llmgr_rec.training.stages
import tests.training.small_training

# Threads made before the fork would be missing in the ranks.
torch.set_num_threads(1)
__all__ = ["LlamaModel", "MistralModel", "jsonargparse", "llmgr_rec", "peft", "pyarrow", "tests"]
