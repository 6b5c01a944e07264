"""Rows added to matrices so that products of bfloat16 on a CPU have few shapes.

Torch compiles such a product anew for each number of rows, a quarter of a millisecond or more each, and keeps it.
"""

import torch

# Least number of rows to which those of a product are rounded up.
_LEAST_STEP = 16


def row_padding(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows to add to a matrix; a power of two is divided into 16 steps, so that they are less than a sixteenth.

    Args:
        rows: Number of rows.
        dtype: Number format of the products; only for bfloat16 are rows added,
        device: and only on a CPU.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return 0
    return -rows % max(_LEAST_STEP, 1 << max(rows.bit_length() - 5, 0))
