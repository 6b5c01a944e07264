"""Sequence packing: the prompts of a batch as one row of tokens, without padding and without repeated tokens.

All prompts of a batch begin with the same instruction, the prefix, which is in the row once. The tokens after it are
either separate prompts, each with one output at its last token; or, in one pass over all prefixes of a session, a
context with one output for each of its tokens. Output i of a context attends to the context up to token i and to a
suffix of its own, the tokens that end its prompt:

    row         prefix | contexts | suffixes
    positions   every path (prefix, context up to token i, suffix i) counts from 0 without gaps

So each output is exactly that of a separate prompt "prefix, context up to token i, suffix i", while the prefix is
encoded once a batch and the context once a session.

A session of three clicks with the context tokens 11 12 13 and the suffixes (21), (22) and (23):

    token X      0   1   2   3   4   5      attends to token    0  1  2  3  4  5
    token id    11  12  13  21  22  23      context  0          x
    suffix      -1  -1  -1   0   1   2               1          x  x
    position     0   1   2   1   2   3               2          x  x  x
    context      1   2   3   1   2   3      suffix   3          x        x
                                                     4          x  x        x
                                                     5          x  x  x        x

>>> context = Jagged(torch.tensor([11, 12, 13]), torch.tensor([0, 3]))
>>> suffixes = Jagged(torch.tensor([21, 22, 23]), torch.tensor([0, 1, 2, 3]))
>>> packed = PackedPrompts.in_one_pass(torch.tensor([1, 2]), context, suffixes)
>>> packed.suffix_X.tolist(), packed.position_X.tolist(), packed.context_X.tolist()
([-1, -1, -1, 0, 1, 2], [0, 1, 2, 1, 2, 3], [1, 2, 3, 1, 2, 3])
>>> tokens_X = torch.arange(packed.num_tokens)
>>> [tokens_X[packed.attends(query, tokens_X)].tolist() for query in tokens_X]
[[0], [0, 1], [0, 1, 2], [0, 3], [0, 1, 4], [0, 1, 2, 5]]

The second output is read at token 4; its separate prompt is 1 2 | 11 12 22:

>>> packed.output_token_C.tolist(), packed.token_ids_X[packed.path(1)].tolist()
([3, 4, 5], [11, 12, 22])

Shapes: P tokens of the prefix, X tokens after it, S of them in suffixes, B prompts or contexts, C outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmgr_rec.data.jagged import Jagged


@dataclass
class PackedPrompts:
    """The tokens of a batch and which of them attend to which. Token numbers count from the end of the prefix.

    Args:
        prefix_P: Token ids that every prompt begins with; may be empty.
        token_ids_X: Token ids; 0 at soft tokens.
        soft_rows_X: Row of the soft token matrix, -1 at ordinary tokens.
        prompt_X: Prompt of each token.
        suffix_X: Output whose suffix a token belongs to, -1 in contexts and in separate prompts.
        position_X: Tokens before it on its path, those of the prefix not counted.
        context_X: Number of tokens of its context that it attends to, itself included if it is one of them.
        output_token_C: Token at whose hidden state each output is read.
        num_prompts: Number of prompts B.
    """

    prefix_P: Tensor
    token_ids_X: Tensor
    soft_rows_X: Tensor
    prompt_X: Tensor
    suffix_X: Tensor
    position_X: Tensor
    context_X: Tensor
    output_token_C: Tensor
    num_prompts: int

    @classmethod
    def separate(cls, prefix_P: Tensor, prompts: Jagged) -> "PackedPrompts":
        """Packs separate prompts: each is a context of its own, read at its last token.

        Args:
            prefix_P: Token ids that every prompt begins with.
            prompts: Tokens after the prefix, one row a prompt: a token id, or -1 - s for row s of the soft tokens.
        """
        prompt_X, position_X = prompts.row_of_value, _index_in_row(prompts)
        return cls(
            prefix_P=prefix_P,
            token_ids_X=_token_ids(prompts.values),
            soft_rows_X=_soft_rows(prompts.values),
            prompt_X=prompt_X,
            suffix_X=torch.full_like(prompt_X, -1),
            position_X=position_X,
            context_X=position_X + 1,
            output_token_C=prompts.offsets[1:] - 1,
            num_prompts=prompts.num_rows,
        )

    @classmethod
    def in_one_pass(cls, prefix_P: Tensor, contexts: Jagged, suffixes: Jagged) -> "PackedPrompts":
        """Packs contexts with an output for each of their tokens.

        Args:
            prefix_P: Token ids that every prompt begins with.
            contexts: Tokens of each context, as in `separate`.
            suffixes: Tokens of each output's suffix, one row for each context token; may be empty.
        """
        num_outputs = contexts.values.numel()
        prompt_C, length_C = contexts.row_of_value, _index_in_row(contexts) + 1
        output_S = suffixes.row_of_value
        values_X = torch.cat([contexts.values, suffixes.values])
        return cls(
            prefix_P=prefix_P,
            token_ids_X=_token_ids(values_X),
            soft_rows_X=_soft_rows(values_X),
            prompt_X=torch.cat([prompt_C, prompt_C[output_S]]),
            suffix_X=torch.cat([torch.full_like(prompt_C, -1), output_S]),
            position_X=torch.cat([length_C - 1, length_C[output_S] + _index_in_row(suffixes)]),
            context_X=torch.cat([length_C, length_C[output_S]]),
            output_token_C=torch.where(
                suffixes.lengths > 0,
                num_outputs + suffixes.offsets[1:] - 1,
                torch.arange(num_outputs, device=values_X.device),
            ),
            num_prompts=contexts.num_rows,
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens X after the prefix."""
        return self.token_ids_X.numel()

    def attends(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a token attends to another one; all of them attend to the prefix as well.

        Args:
            query: Token numbers, 0 .. X - 1.
            key: Token numbers; the two shapes are broadcast.

        Returns:
            Booleans in the broadcast shape.
        """
        to_context = (self.suffix_X[key] < 0) & (self.position_X[key] < self.context_X[query])
        same_suffix = (self.suffix_X[key] == self.suffix_X[query]) & (self.suffix_X[key] >= 0)
        to_suffix = same_suffix & (self.position_X[key] <= self.position_X[query])
        return (self.prompt_X[key] == self.prompt_X[query]) & (to_context | to_suffix)

    def path(self, output: int) -> Tensor:
        """Token numbers of one output's separate prompt after the prefix, in order."""
        tokens_X = torch.arange(self.num_tokens, device=self.token_ids_X.device)
        on_path = tokens_X[self.attends(self.output_token_C[output], tokens_X)]
        return on_path[torch.argsort(self.position_X[on_path])]

    def by_prompt(self, tokens_Y: Tensor) -> Jagged:
        """Groups some tokens by prompt.

        Args:
            tokens_Y: Token numbers.

        Returns:
            Indices into `tokens_Y`, one row a prompt, in their order.
        """
        prompt_Y = self.prompt_X[tokens_Y]
        counts_B = torch.bincount(prompt_Y, minlength=self.num_prompts)
        return Jagged.from_lengths(torch.argsort(prompt_Y, stable=True), counts_B)


def _token_ids(values: Tensor) -> Tensor:
    return values.clamp(min=0)


def _soft_rows(values: Tensor) -> Tensor:
    return (-1 - values).clamp(min=-1)


def _index_in_row(rows: Jagged) -> Tensor:
    """Index of each value in its row."""
    return torch.arange(rows.values.numel(), device=rows.values.device) - rows.offsets[rows.row_of_value]
