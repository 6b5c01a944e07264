"""Gated recurrent units: torch's own while running eagerly, plain operators for `torch.compile` and `torch.export`.

Dynamo does not trace `nn.GRU`, and the traced form of `torch.gru_cell` excludes batches of one row.

Shapes: R rows, T time steps, F input columns, D columns of the state, G = 3 * D columns of the gates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# Weights [G, F] and [G, D] of input and state, and their biases [G].
Weights = Sequence[Tensor]


def gru_cell(inputs_RF: Tensor, states_RD: Tensor, weights: Weights) -> Tensor:
    """One step, as `torch.gru_cell`: the new states, [R, D].

    Args:
        inputs_RF: Inputs of the step.
        states_RD: States before the step.
        weights: Weights and biases of the gates reset, update and new.
    """
    weight_input, weight_state, bias_input, bias_state = weights
    if not torch.compiler.is_compiling():
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
