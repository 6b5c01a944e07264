"""Export of modules whose sizes, 0 and 1 included, are known only when the program runs."""

from typing import Any

import torch
import torch.fx.experimental._config as shape_config
from torch import nn
from torch.export import ExportedProgram


def export_dynamic(module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any) -> ExportedProgram:
    """`torch.export.export` in which a dynamic size may also be 0 or 1.

    By default, a program that was traced with a batch of several sessions refuses a batch of one, and one without
    clicks.

    Args:
        module: The module; it is exported in its mode, training or evaluation, and without gradients.
        inputs: Example of its inputs.
        dynamic_shapes: As in `torch.export.export`.

    Returns:
        The program. `module()` of it runs, `torch.export.save` writes it.
    """
    with shape_config.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
        return torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes)
