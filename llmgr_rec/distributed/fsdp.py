"""Shards the decoder of a language model across ranks, layer by layer, with FSDP2 (`torch.distributed.fsdp`).

Each rank has a shard of every decoder parameter, of its gradient and of its optimizer state. FSDP2 gathers the full
parameters of a layer for the time of its forward and backward pass. Those of the token embedding and the final norm
stay gathered from the first call of a step to the end of its backward pass. Parameter names do not change.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.text_sequence_encoder import TextSequenceEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fully_shard_decoders(module: nn.Module, world: World) -> None:
    """Shards all decoders in a module across the ranks: one FSDP parameter group per layer and one for the rest.

    The weights must be equal on all ranks, and `requires_grad` must already be set. Does nothing in a single process.

    Args:
        module: Any module. Modules outside of language models do not change.
        world: This process and the world size. All ranks must call this.

    Raises:
        UserError: A decoder does not declare which of its modules are layers.
    """
    if world.size == 1:
        return
    # The view is a slice of a hidden state, which is never changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in list(module.modules()):
        if isinstance(part, LLMGR):
            _shard_decoder(part.language_model.base, part.language_model, mesh)
            # Prompts are embedded before the forward of the language model.
            register_fsdp_forward_method(part.language_model, "embed")
        elif isinstance(part, TextSequenceEncoder):
            _shard_decoder(part.decoder, part.decoder, mesh)
            part.common_calls = lambda calls: _max_over_ranks(calls, world)


def decoder_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that `fully_shard_decoders` shards."""
    for part in module.modules():
        if isinstance(part, LLMGR):
            yield from part.language_model.parameters()
        elif isinstance(part, TextSequenceEncoder):
            yield from part.decoder.parameters()


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of a module is a DTensor, that is, sharded by FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def shard_groups(parameters: Iterable[Tensor]) -> dict[Tensor, list[dist.ProcessGroup]]:
    """Process group of each sharded parameter."""
    return {
        parameter: [parameter.device_mesh.get_group()] for parameter in parameters if isinstance(parameter, DTensor)
    }


def gather_full(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Gathers sharded tensors on rank 0.

    Args:
        tensors: Tensors, sharded or not; the names must be the same on all ranks.
        world: This process and the world size. All ranks must call this.

    Returns:
        On rank 0, the full tensors by name, gathered ones on the CPU. On other ranks, only those that are not sharded.
    """
    full = {}
    for name, value in tensors.items():
        if not isinstance(value, DTensor):
            full[name] = value
            continue
        # One tensor at a time, because every rank allocates it in full.
        gathered = value.full_tensor()
        if world.rank == 0:
            full[name] = gathered.detach().cpu()
    return full


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """Shards a tensor like a target.

    Args:
        value: Full tensor, equal on all ranks.
        target: Tensor whose sharding is used.

    Returns:
        A DTensor with the placements of the target; `value` itself if the target is not sharded.
    """
    if not isinstance(target, DTensor):
        return value
    local = value.to(target.device)
    return distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)


def _shard_decoder(decoder: "PreTrainedModel", root: nn.Module, mesh: DeviceMesh) -> None:
    for layer in _layers(decoder):
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)


def _layers(decoder: "PreTrainedModel") -> list[nn.Module]:
    names = set(decoder._no_split_modules or ())
    layers = [part for part in decoder.modules() if names & {kind.__name__ for kind in type(part).__mro__}]
    if not layers:
        raise UserError(
            f"setting llm.fsdp is true, but {type(decoder).__name__} does not declare its layers (_no_split_modules); "
            "set llm.fsdp to false"
        )
    return layers


def _max_over_ranks(value: int, world: World) -> int:
    maximum = torch.tensor(value, device=world.device)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return int(maximum)
