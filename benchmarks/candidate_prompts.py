"""A cross-encoder: a decoder with LoRA that reads a session once and scores several candidates after it.

All candidates of a session follow its clicks in one packed prompt. A candidate attends to the prefix, to all clicks and
to itself, and its positions go on from the end of the clicks. So its score is that of a separate prompt "prefix,
clicks, candidate", while the clicks are encoded once:

    row        prefix | clicks of session 1 | clicks of session 2 | candidates of 1 | candidates of 2

Shapes: P tokens of the prefix, B sessions, C candidates of all sessions, X tokens after the prefix, H hidden width.
"""

import torch
from torch import Tensor, nn

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.session_tokens import session_sequences
from llmgr_rec.kernels.prompt_packing import PackedPrompts
from llmgr_rec.modules.language_model import LoraLanguageModel


def pack_candidates(prefix_P: Tensor, contexts: Jagged, candidates: Jagged, context_C: Tensor) -> PackedPrompts:
    """Packs contexts, each with several candidates after it.

    Args:
        prefix_P: Token ids that every prompt begins with; may be empty.
        contexts: Token ids of each context.
        candidates: Token ids of each candidate, one row or more for each context; none empty.
        context_C: Context of each candidate.

    Returns:
        The tokens, with an output at the last token of each candidate.
    """
    context_X = torch.cat([contexts.row_of_value, context_C[candidates.row_of_value]])
    is_candidate_X = torch.arange(context_X.numel(), device=context_X.device) >= contexts.values.numel()
    length_X = contexts.lengths[context_X]
    place_X = torch.cat([_place_in_row(contexts), _place_in_row(candidates)])
    no_candidate = torch.full_like(contexts.values, -1)
    return PackedPrompts(
        prefix_P=prefix_P,
        token_ids_X=torch.cat([contexts.values, candidates.values]),
        soft_rows_X=torch.full_like(context_X, -1),
        prompt_X=context_X,
        suffix_X=torch.cat([no_candidate, candidates.row_of_value]),
        position_X=torch.where(is_candidate_X, length_X + place_X, place_X),
        context_X=torch.where(is_candidate_X, length_X, place_X + 1),
        output_token_C=contexts.values.numel() + candidates.offsets[1:] - 1,
        num_prompts=contexts.num_rows,
    )


class CrossEncoder(nn.Module):
    """Scores a candidate by a linear function of the hidden state at the end of its text.

    Args:
        language_model: The decoder with LoRA.
        item_tokens: Token ids of each item's text with an end token, one row per item, on the device of the decoder;
            see `append_token`.
        prefix_P: Token ids that every prompt begins with, on the same device.
        max_clicks: Number of newest clicks of a session that are shown.
    """

    mean_H: Tensor
    std_H: Tensor

    def __init__(
        self, language_model: LoraLanguageModel, item_tokens: Jagged, prefix_P: Tensor, max_clicks: int
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.head = nn.Linear(language_model.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("mean_H", torch.zeros(language_model.hidden_size))
        self.register_buffer("std_H", torch.ones(language_model.hidden_size))
        self._item_tokens, self._prefix_P, self._max_clicks = item_tokens, prefix_P, max_clicks

    def forward(self, packed: PackedPrompts) -> Tensor:
        """Scores of candidates, float32 [C].

        Args:
            packed: Their prompts, see `pack`.
        """
        return self.head((self.states(packed) - self.mean_H) / self.std_H).squeeze(1)

    @torch.no_grad()
    def standardize(self, packed: PackedPrompts) -> None:
        """Centers and scales each column of the states that the head reads, by those of some candidates.

        A few columns of a decoder are a hundred times as large as the others.

        Args:
            packed: Prompts of the candidates.
        """
        states_CH = self.states(packed)
        self.mean_H.copy_(states_CH.mean(dim=0))
        self.std_H.copy_(states_CH.std(dim=0) + 1e-4)

    def states(self, packed: PackedPrompts) -> Tensor:
        """Hidden state at the end of each candidate, float32 [C, H].

        Args:
            packed: Prompts of the candidates.
        """
        states_CH: Tensor = self.language_model(self.language_model.embed(packed.token_ids_X), packed)
        return states_CH

    def pack(self, clicks: Jagged, items_BK: Tensor) -> PackedPrompts:
        """The packed prompts of candidates, C = B * K in the order of `items_BK`.

        Args:
            clicks: Item indices of each session, oldest first.
            items_BK: Item indices of the candidates of each session.
        """
        device = self._prefix_P.device
        contexts = session_sequences(self._item_tokens, clicks.last(self._max_clicks).to(device)).tokens
        session_C = torch.arange(len(items_BK), device=device).repeat_interleave(items_BK.shape[1])
        candidates = self._item_tokens.select(items_BK.flatten().to(device))
        return pack_candidates(self._prefix_P, contexts, candidates, session_C)


def _place_in_row(rows: Jagged) -> Tensor:
    return torch.arange(rows.values.numel(), device=rows.values.device) - rows.offsets[rows.row_of_value]
