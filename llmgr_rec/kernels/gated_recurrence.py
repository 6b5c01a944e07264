"""Gated recurrent units: torch's own while running eagerly, plain operators for `torch.compile` and `torch.export`.

Dynamo does not trace `nn.GRU`, and the traced form of `torch.gru_cell` excludes batches of one row.

A cell may compute its products in bfloat16, with a written gradient: all else is float32.

Shapes: R rows, P >= R rows of a product, T time steps, F input columns, D columns of the state, G = 3 * D columns of
the gates, X = 4 * D.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Weights [G, F] and [G, D] of input and state, and their biases [G].
Weights = Sequence[Tensor]


# A CPU compiles a product in bfloat16 for each number of rows and keeps it. The number is rounded up to a multiple of
# this: with 256, training takes 16 MiB more, in the same time.
_ROW_STEP = 1024


def gru_cell(
    inputs_RF: Tensor, states_RD: Tensor, weights: Weights, product_dtype: torch.dtype = torch.float32
) -> Tensor:
    """One step, as `torch.gru_cell`: the new states, [R, D].

    Args:
        inputs_RF: Inputs of the step.
        states_RD: States before the step.
        weights: Weights and biases of the gates reset, update and new.
        product_dtype: Number format of the factors of the products, where states are float32.
    """
    weight_input, weight_state, bias_input, bias_state = weights
    if not torch.compiler.is_compiling():
        if product_dtype == torch.bfloat16 and states_RD.dtype == torch.float32:
            new_RD: Tensor = _CellOfRoundedProducts.apply(inputs_RF, states_RD, *weights)
            return new_RD
        return torch.gru_cell(inputs_RF, states_RD, weight_input, weight_state, bias_input, bias_state)
    return _step(functional.linear(inputs_RF, weight_input, bias_input), states_RD, weight_state, bias_state)


def gru(inputs_RTF: Tensor, weights: Weights, max_steps: int) -> Tensor:
    """All steps from a state of zeros, as `nn.GRU` with `batch_first`: the state after each step, [R, T, D].

    Args:
        inputs_RTF: Inputs of the steps.
        weights: As in `gru_cell`.
        max_steps: Largest number of steps T. A compiled program always computes so many.
    """
    weight_input, weight_state, bias_input, bias_state = weights
    states_RD = inputs_RTF.new_zeros(inputs_RTF.shape[0], weight_state.shape[1])
    if not torch.compiler.is_compiling():
        return torch.gru(inputs_RTF, states_RD.unsqueeze(0), list(weights), True, 1, 0.0, False, False, True)[0]
    num_steps = inputs_RTF.shape[1]
    # No state depends on later steps, so those beyond the last one may repeat it.
    step_T = torch.arange(max_steps, device=inputs_RTF.device).clamp(max=num_steps - 1)
    gates_RTG = functional.linear(inputs_RTF, weight_input, bias_input).index_select(1, step_T)
    states = []
    for gates_RG in gates_RTG.unbind(1):
        states_RD = _step(gates_RG, states_RD, weight_state, bias_state)
        states.append(states_RD)
    # Not a slice, which is contiguous for some lengths only, and a compiler would specialize on them.
    return torch.stack(states, dim=1).index_select(1, torch.arange(num_steps, device=inputs_RTF.device))


def _step(gates_RG: Tensor, states_RD: Tensor, weight_state: Tensor, bias_state: Tensor) -> Tensor:
    reset_RD, update_RD, new_RD = gates_RG.chunk(3, dim=1)
    of_state = functional.linear(states_RD, weight_state, bias_state).chunk(3, dim=1)
    kept_RD = torch.sigmoid(update_RD + of_state[1])
    new_RD = torch.tanh(new_RD + torch.sigmoid(reset_RD + of_state[0]) * of_state[2])
    return new_RD + kept_RD * (states_RD - new_RD)


class _CellOfRoundedProducts(torch.autograd.Function):
    """`gru_cell` with products of bfloat16."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs_RF: Tensor,
        states_RD: Tensor,
        weight_input: Tensor,
        weight_state: Tensor,
        bias_input: Tensor,
        bias_state: Tensor,
    ) -> Tensor:
        rows, dim = states_RD.shape
        inputs_PF, states_PD = _rounded(inputs_RF), _rounded(states_RD)
        weight_input, weight_state = weight_input.bfloat16(), weight_state.bfloat16()
        gates_RG = torch.mm(inputs_PF, weight_input.T)[:rows].float()
        of_state_RG = torch.mm(states_PD, weight_state.T)[:rows].float()
        gates_RG[:, : 2 * dim].add_(of_state_RG[:, : 2 * dim]).add_((bias_input + bias_state)[: 2 * dim]).sigmoid_()
        reset_RD, kept_RD, new_RD = gates_RG.split(dim, dim=1)
        # A copy, which does not keep the rest.
        of_state_RD = of_state_RG[:, 2 * dim :] + bias_state[2 * dim :]
        new_RD.add_(bias_input[2 * dim :]).addcmul_(reset_RD, of_state_RD)
        # The hyperbolic tangent, of which torch's own takes several times as long on a CPU.
        new_RD.mul_(2).sigmoid_().mul_(2).sub_(1)
        ctx.save_for_backward(inputs_PF, states_PD, states_RD, weight_input, weight_state, gates_RG, of_state_RD)
        return torch.lerp(new_RD, states_RD, kept_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, ...]:
        inputs_PF, states_PD, states_RD, weight_input, weight_state, gates_RG, of_state_RD = ctx.saved_tensors
        rows, dim = states_RD.shape
        reset_RD, kept_RD, new_RD = gates_RG.split(dim, dim=1)
        grad_new_RD = torch.addcmul(grad_RD, grad_RD, kept_RD, value=-1)
        grad_new_RD.addcmul_(grad_new_RD * new_RD, new_RD, value=-1)
        # Of the gates as the input adds to them and, last, of what the state adds to the new state.
        grads_RX = grad_RD.new_empty(rows, 4 * dim)
        grads_RX[:, :dim] = torch.ops.aten.sigmoid_backward(grad_new_RD * of_state_RD, reset_RD)
        grads_RX[:, dim : 2 * dim] = torch.ops.aten.sigmoid_backward((states_RD - new_RD).mul_(grad_RD), kept_RD)
        grads_RX[:, 2 * dim : 3 * dim] = grad_new_RD
        torch.mul(grad_new_RD, reset_RD, out=grads_RX[:, 3 * dim :])
        sums_X = grads_RX.sum(dim=0)
        input_PG, state_PG = _rounded(grads_RX[:, : 3 * dim]), states_PD.new_zeros(len(states_PD), 3 * dim)
        state_PG[:, : 2 * dim] = input_PG[:, : 2 * dim]
        state_PG[:rows, 2 * dim :] = grads_RX[:, 3 * dim :]
        return (
            torch.mm(input_PG, weight_input)[:rows].float(),
            torch.mm(state_PG, weight_state)[:rows].float().addcmul_(grad_RD, kept_RD),
            torch.mm(input_PG.T, inputs_PF).float(),
            torch.mm(state_PG.T, states_PD).float(),
            sums_X[: 3 * dim],
            torch.cat([sums_X[: 2 * dim], sums_X[3 * dim :]]),
        )


def _rounded(values_RX: Tensor) -> Tensor:
    """Values in bfloat16, with rows of zeros up to a multiple of `_ROW_STEP`."""
    num_rows = values_RX.shape[0]
    rounded_PX = values_RX.new_empty(-(-num_rows // _ROW_STEP) * _ROW_STEP, values_RX.shape[1], dtype=torch.bfloat16)
    rounded_PX[:num_rows] = values_RX
    rounded_PX[num_rows:] = 0
    return rounded_PX
