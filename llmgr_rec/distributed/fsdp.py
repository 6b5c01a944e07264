"""A language model's decoder cut over the ranks, layer by layer, with FSDP2.

Each rank holds a part of every parameter of the decoder, of its gradient and of its optimizer state. A layer is whole
only while it computes; token embedding and final norm are whole from the first call of a step to the end of its
backward pass. Names of parameters stay as they are.
"""

import warnings
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.modules.language_model import LoraLanguageModel
from llmgr_rec.modules.text_sequence_encoder import TextSequenceEncoder


def fully_shard_decoders(module: nn.Module, world: World) -> None:
    """Cuts the decoders in a module over all ranks, one group of parameters a layer and one for the rest.

    Weights of all ranks are taken to be the same. `requires_grad` has to be set before.

    Args:
        module: Any module; parts of it that are no language model stay as they are.
        world: Ranks; all call together. Alone there is nothing to cut.

    Raises:
        UserError: A decoder's layers cannot be told.
    """
    if world.size == 1:
        return
    # A reading is a view of a hidden state, and nobody changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in list(module.modules()):
        if isinstance(part, LoraLanguageModel):
            _cut(part.base, part, mesh)
            # Prompts are embedded before the language model itself is called.
            register_fsdp_forward_method(part, "embed")
        elif isinstance(part, TextSequenceEncoder):
            _cut(part.decoder, part.decoder, mesh)
            part.common_calls = lambda calls: _most(calls, world)


def decoder_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that `fully_shard_decoders` cuts."""
    for part in module.modules():
        if isinstance(part, LoraLanguageModel):
            yield from part.parameters()
        elif isinstance(part, TextSequenceEncoder):
            yield from part.decoder.parameters()


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of a module is cut over the ranks."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def shard_groups(parameters: Iterable[Tensor]) -> dict[Tensor, list[dist.ProcessGroup]]:
    """The ranks that hold the parts of each parameter that is cut over ranks."""
    return {
        parameter: [parameter.device_mesh.get_group()] for parameter in parameters if isinstance(parameter, DTensor)
    }


def gather_full(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """The same tensors, whole: on rank 0 on the CPU where they were cut; others have nothing of those.

    Args:
        tensors: Cut over the ranks or not, the same names on all ranks.
        world: Ranks; all call together.
    """
    whole = {}
    for name, value in tensors.items():
        if not isinstance(value, DTensor):
            whole[name] = value
            continue
        # One at a time, because this one is whole on every rank.
        full = value.full_tensor()
        if world.rank == 0:
            whole[name] = full.detach().cpu()
    return whole


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """This rank's part of a whole tensor that all ranks have, where the target is cut over ranks; the tensor else."""
    if not isinstance(target, DTensor):
        return value
    local = value.to(target.device)
    return distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)


def _cut(decoder: PreTrainedModel, whole: nn.Module, mesh: DeviceMesh) -> None:
    for layer in _layers(decoder):
        fully_shard(layer, mesh=mesh)
    fully_shard(whole, mesh=mesh)


def _layers(decoder: PreTrainedModel) -> list[nn.Module]:
    names = set(decoder._no_split_modules or ())
    layers = [part for part in decoder.modules() if names & {kind.__name__ for kind in type(part).__mro__}]
    if not layers:
        raise UserError(
            f"setting llm.shard is true, but {type(decoder).__name__} does not tell its layers; set llm.shard to false"
        )
    return layers


def _most(calls: int, world: World) -> int:
    most = torch.tensor(calls, device=world.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
