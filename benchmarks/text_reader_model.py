"""A language model that reads sessions as text and says which item's text comes next: all of its weights train.

The same decoder reads sessions and items, each at the token that closes a text. What it makes of both is whitened as
the items were before training, so that the cosine starts as nearest neighbours do, and a projection of each side learns
from there.

Shapes: B rows, T columns of a padded batch, X places, V items, H hidden width, D columns of queries and items.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.session_texts import Texts
from llmgr_rec.modules.normalise import normalise

_SCALE = 20.0
# Directions of less deviation than this share of the largest are taken to have it.
_LEAST = 0.02
# Rows are padded to a multiple of it, so that fewer shapes occur.
_STEP = 8


class TextReader(nn.Module):
    """Scores an item by the cosine of its text's reading with the session's.

    Args:
        decoder: The bare decoder; it trains.
        dim: Columns D of queries and items, H at most.
        dropout: Probability of dropping a whitened activation, 0 to 1.
        tokens_at_once: Most padded tokens of one call of the decoder; more calls keep their activations, too.
    """

    mean_H: Tensor
    map_HD: Tensor

    def __init__(self, decoder: PreTrainedModel, dim: int, dropout: float = 0.1, tokens_at_once: int = 65_536) -> None:
        super().__init__()
        hidden = decoder.get_input_embeddings().weight.shape[1]
        self.decoder = decoder.requires_grad_(True)
        self.tokens_at_once = tokens_at_once
        self.dropout = nn.Dropout(dropout)
        dim = min(dim, hidden)
        self.session_projection, self.item_projection = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for projection in (self.session_projection, self.item_projection):
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))
        self.register_buffer("mean_H", torch.zeros(hidden))
        self.register_buffer("map_HD", torch.eye(hidden)[:, :dim])

    @torch.no_grad()
    def whiten(self, states_VH: Tensor) -> None:
        """Takes mean and principal directions from the items as the decoder reads them now.

        Args:
            states_VH: From `read`, one row an item.
        """
        self.mean_H.copy_(states_VH.mean(0))
        centred_VH = (states_VH - self.mean_H) / math.sqrt(states_VH.shape[0])
        _, deviations, directions = torch.linalg.svd(centred_VH, full_matrices=False)
        dim = self.map_HD.shape[1]
        scales = deviations[:dim] + _LEAST * deviations[0]
        self.map_HD.zero_()
        self.map_HD[:, : scales.numel()] = directions[:dim].T / scales

    def queries(self, texts: Texts) -> Tensor:
        """Queries of sessions, one a place, [X, D]; scores are queries @ items.T."""
        return normalise(self.session_projection(self._whitened(self.read(texts)))) * self.log_scale.exp()

    def items(self, texts: Texts) -> Tensor:
        """The items' side, [X, D]."""
        return normalise(self.item_projection(self._whitened(self.read(texts))))

    def read(self, texts: Texts) -> Tensor:
        """States of the decoder at the places, float32 [X, H]; in bfloat16 on a GPU, but for the weights.

        Rows of like length are read together, so that little padding is computed.
        """
        tokens, device = texts.tokens, self.mean_H.device
        row_X = torch.searchsorted(tokens.offsets, texts.places_X, right=True) - 1
        column_X = texts.places_X - tokens.offsets[row_X]
        found, places = [], []
        for rows in self._chunks(tokens.lengths):
            slot_R = torch.full((tokens.num_rows,), -1)
            slot_R[rows] = torch.arange(rows.numel())
            here = torch.nonzero(slot_R[row_X] >= 0).flatten()
            hidden_BTH = self._hidden(texts, rows)
            found.append(hidden_BTH[slot_R[row_X[here]].to(device), column_X[here].to(device)].float())
            places.append(here)
        return torch.cat(found)[torch.argsort(torch.cat(places)).to(device)]

    def _chunks(self, lengths_R: Tensor) -> Iterator[Tensor]:
        """Rows in order of length, as many at a time as the tokens allow; at least one."""
        order = torch.argsort(lengths_R, stable=True)
        lengths, start = lengths_R[order].tolist(), 0
        for stop in range(1, len(lengths) + 1):
            # The next row would be the longest, and all are padded to it.
            if stop == len(lengths) or _padded(lengths[stop]) * (stop + 1 - start) > self.tokens_at_once:
                yield order[start:stop]
                start = stop

    def _hidden(self, texts: Texts, rows: Tensor) -> Tensor:
        batch = texts.tokens.select(rows)
        row_S = batch.row_of_value
        width = _padded(int(batch.lengths.max()))
        # Padding stands to the right, where causal attention does not look.
        ids_BT = torch.zeros(rows.numel(), width, dtype=torch.int64)
        ids_BT[row_S, torch.arange(row_S.numel()) - batch.offsets[row_S]] = batch.values
        device = self.mean_H.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return self.decoder(input_ids=ids_BT.to(device), use_cache=False).last_hidden_state

    def _whitened(self, states_XH: Tensor) -> Tensor:
        whitened_XD: Tensor = self.dropout((states_XH - self.mean_H) @ self.map_HD)
        return whitened_XD


def _padded(length: int) -> int:
    return -(-length // _STEP) * _STEP
