"""Prompts end to end in one row of tokens, without padding, and what each token sees.

All prompts of a batch start with the same prefix, which stands in the row once. After it each prompt has a trunk, and
where several readings share a trunk (the growing prefixes of one session), each reading has a branch: tokens of its own
that hang at a place of the trunk. A token sees the prefix, the trunk up to where its branch hangs, and its branch up to
itself. So a reading is that of a plain prompt: prefix, trunk up to there, branch.

Shapes: P tokens of the prefix, X tokens after it, B prompts, C readings.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmgr_rec.data.jagged import Jagged


@dataclass
class PackedPrompts:
    """The tokens of a batch and their places. All but the prefix count from its end.

    Args:
        prefix_P: Token ids that every prompt starts with; may be empty.
        token_ids_X: Token ids; 0 at soft places.
        soft_rows_X: Row of the soft matrix that stands here, -1 at ordinary tokens.
        prompt_X: Prompt of each token.
        branch_X: Reading whose branch a token belongs to, -1 on a trunk.
        depth_X: Tokens before it on its own path.
        trunk_X: Tokens of the trunk that it sees, itself included.
        read_C: Token at whose hidden state each reading is taken.
        num_prompts: Number of prompts B.
    """

    prefix_P: Tensor
    token_ids_X: Tensor
    soft_rows_X: Tensor
    prompt_X: Tensor
    branch_X: Tensor
    depth_X: Tensor
    trunk_X: Tensor
    read_C: Tensor
    num_prompts: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch after the prefix."""
        return self.token_ids_X.numel()

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether tokens see others of the row, the prefix aside: the definition of the packing.

        Args:
            query: Token numbers, 0 .. X - 1.
            key: Token numbers; both shapes are broadcast against each other.

        Returns:
            Booleans in the broadcast shape.
        """
        on_trunk = (self.branch_X[key] < 0) & (self.depth_X[key] < self.trunk_X[query])
        on_branch = (self.branch_X[key] == self.branch_X[query]) & (self.depth_X[key] <= self.depth_X[query])
        return (self.prompt_X[key] == self.prompt_X[query]) & (on_trunk | on_branch & (self.branch_X[key] >= 0))

    def path(self, reading: int) -> Tensor:
        """Tokens of one reading's plain prompt after the prefix, in order."""
        tokens_X = torch.arange(self.num_tokens, device=self.token_ids_X.device)
        seen = tokens_X[self.sees(self.read_C[reading], tokens_X)]
        return seen[torch.argsort(self.depth_X[seen])]


@dataclass
class PromptGrid:
    """Rows of a matrix set out by prompts, padded to the longest: then attention is a batched product.

    Args:
        row_BW: Row that stands at each place, some other one at padding.
        filled_BW: Whether one stands there.
    """

    row_BW: Tensor
    filled_BW: Tensor

    @classmethod
    def of(cls, prompts: Jagged) -> "PromptGrid":
        """Sets out prompts, the numbers of each one's rows; not all of them empty."""
        lengths_B1 = prompts.lengths.unsqueeze(1)
        columns_W = torch.arange(int(lengths_B1.max()), device=lengths_B1.device)
        filled_BW = columns_W < lengths_B1
        places_BW = torch.where(filled_BW, prompts.offsets[:-1].unsqueeze(1) + columns_W, 0)
        return cls(prompts.values[places_BW], filled_BW)

    def set_out(self, vectors_XF: Tensor) -> Tensor:
        """Rows at their places, [B, W, F]."""
        return vectors_XF.index_select(0, self.row_BW.flatten()).unflatten(0, self.row_BW.shape)


def rows_by_prompt(packed: PackedPrompts, tokens_Y: Tensor) -> Jagged:
    """Which of some tokens (0 .. Y - 1) belong to each prompt, in their order.

    Args:
        packed: All tokens.
        tokens_Y: Token numbers after the prefix.
    """
    prompt_Y = packed.prompt_X[tokens_Y]
    counts_B = torch.bincount(prompt_Y, minlength=packed.num_prompts)
    return Jagged.from_lengths(torch.argsort(prompt_Y, stable=True), counts_B)
