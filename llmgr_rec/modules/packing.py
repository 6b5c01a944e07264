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
    """Some tokens of a row set out by prompts, padded to the longest: then attention is a batched product.

    Args:
        tokens_Y: The tokens.
        row_BW: Which of them (0 .. Y - 1) stands at each place, 0 at padding.
        filled_BW: Whether one stands there.
        place_Y: Place b * W + w of each token.
    """

    tokens_Y: Tensor
    row_BW: Tensor
    filled_BW: Tensor
    place_Y: Tensor

    @classmethod
    def of(cls, packed: PackedPrompts, tokens_Y: Tensor) -> "PromptGrid":
        """Sets out tokens, in their order within each prompt.

        Args:
            packed: The row.
            tokens_Y: Token numbers after the prefix, each once.
        """
        prompt_Y = packed.prompt_X[tokens_Y]
        order_Y = torch.argsort(prompt_Y, stable=True)
        counts_B = torch.bincount(prompt_Y, minlength=packed.num_prompts)
        starts_B = counts_B.cumsum(0) - counts_B
        width = int(counts_B.max())
        rank_Y = torch.arange(tokens_Y.numel(), device=tokens_Y.device)
        place_Y = torch.empty_like(order_Y)
        place_Y[order_Y] = prompt_Y[order_Y] * width + rank_Y - starts_B[prompt_Y[order_Y]]
        row_BW = tokens_Y.new_zeros(packed.num_prompts * width)
        filled_BW = torch.zeros_like(row_BW, dtype=torch.bool)
        row_BW[place_Y] = rank_Y
        filled_BW[place_Y] = True
        shape = (packed.num_prompts, width)
        return cls(tokens_Y, row_BW.view(shape), filled_BW.view(shape), place_Y)

    def set_out(self, vectors_YF: Tensor) -> Tensor:
        """Vectors of the tokens at their places, [B, W, F]; at padding, those of the first token."""
        return vectors_YF.index_select(0, self.row_BW.flatten()).unflatten(0, self.row_BW.shape)

    def gather(self, vectors_BWF: Tensor) -> Tensor:
        """The reverse: vectors of the tokens in their order, [Y, F]."""
        return vectors_BWF.flatten(0, 1).index_select(0, self.place_Y)


def visible_places(packed: PackedPrompts, queries: PromptGrid, keys: PromptGrid) -> Tensor:
    """What each query's place sees among the keys' places of its prompt, booleans [B, Q, K].

    Padding among the keys is not seen. Padding among the queries sees the whole prompt: nobody reads its result, but a
    softmax over nothing would be no number, and its gradient none either.
    """
    query_BQ1 = queries.tokens_Y[queries.row_BW].unsqueeze(2)
    key_B1K = keys.tokens_Y[keys.row_BW].unsqueeze(1)
    seen_BQK = packed.sees(query_BQ1, key_B1K) | ~queries.filled_BW.unsqueeze(2)
    return seen_BQK & keys.filled_BW.unsqueeze(1)
