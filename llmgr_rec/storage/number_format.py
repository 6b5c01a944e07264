"""Number format of matrix products: `auto` is the faster one, found by timing a small product once per processor.

That a processor has instructions for bfloat16 does not say that they are faster: among those with AVX512-BF16, some
multiply bfloat16 twice as fast as float32 and others only half as fast.
"""

import json
import logging
import os
import platform
import time
from functools import cache
from pathlib import Path

import torch

from llmgr_rec.cache import cache_folder

logger = logging.getLogger(__name__)

# Rows, inner size and columns of the timed product, of the order of a layer of a small language model.
_PRODUCT = (512, 576, 1536)
_FORMATS = (torch.float32, torch.bfloat16)
_ROUNDS = 5
# Below this gain, bfloat16 is not worth its rounding, and a repeated measurement could decide otherwise.
_LEAST_GAIN = 1.25


def resolve_dtype(dtype: str, device: str | torch.device = "cpu") -> torch.dtype:
    """Resolves the name of a number format.

    Args:
        dtype: float32, bfloat16 or auto. auto is bfloat16 on GPUs with support for it, and on CPUs that have
            instructions for it and multiply it at least 1.25 times as fast as float32. The result of that measurement
            is kept in the cache folder by processor and version of torch, so all later processes agree with the first.
        device: Device of the weights.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _has_bfloat16() and _gain_of_bfloat16() >= _LEAST_GAIN else torch.float32


def _has_bfloat16() -> bool:
    # Other CPUs emulate bfloat16, which is much slower and would take long to time.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def _gain_of_bfloat16() -> float:
    """Speed of a product in bfloat16 relative to float32 on this processor, from the cache or measured."""
    file = cache_folder() / "number_formats" / f"{_processor()}.json"
    if (gain := _read(file)) is not None:
        return gain
    gain = measure_gain_of_bfloat16()
    logger.info("auto: bfloat16 products take %.2f times as long as float32 here, kept in %s", 1 / gain, file)
    return _publish(file, gain)


def measure_gain_of_bfloat16() -> float:
    """Time of a product in float32 relative to bfloat16; the two take turns, and the fastest of each counts."""
    rows, inner, columns = _PRODUCT
    sides = [(torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)) for dtype in _FORMATS]
    fastest = [float("inf")] * len(sides)
    with torch.no_grad():
        # The first round packs weights and starts threads.
        for _ in range(1 + _ROUNDS):
            for place, (input_BI, weight_OI) in enumerate(sides):
                started = time.perf_counter()
                torch.nn.functional.linear(input_BI, weight_OI)
                fastest[place] = min(fastest[place], time.perf_counter() - started)
    return fastest[0] / fastest[1]


def _processor() -> str:
    """Name of the processor and version of torch, as a file name."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split("\t", 1) for line in lines if line.startswith(("model name", "cpu family", "model\t")))
        name = " ".join(value.strip(": \t") for value in fields.values()) or name
    except OSError:
        pass
    return "".join(letter if letter.isalnum() else "-" for letter in f"{name} torch {torch.__version__}")


def _read(file: Path) -> float | None:
    try:
        return float(json.loads(file.read_text())["gain_of_bfloat16"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _publish(file: Path, gain: float) -> float:
    """Keeps a measurement unless another process was first, and returns the one that is kept."""
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({"gain_of_bfloat16": gain}))
        try:
            os.link(draft, file)
        except FileExistsError:
            if (kept := _read(file)) is not None:
                return kept
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        logger.info("%s cannot be written (%s); every process measures", file, error.strerror)
    return gain
