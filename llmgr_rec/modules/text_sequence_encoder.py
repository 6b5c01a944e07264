"""A language model that reads sessions as text and says which item's text comes next; all of its weights train.

Its score is added to that of the session encoder. The same decoder reads sessions and items, each at the token that
closes a text. What it makes of both is whitened as the items were before training, so that the cosine starts as nearest
neighbors do, and a projection of each side learns from there. Items are read with gradient while it trains; to rank,
their vectors lie in the table of text encodings, which is filled anew whenever the decoder has changed. To read a
session as the texts of its items, and items by the same model, is Recformer's (Li et al., Text Is All You Need, arXiv
2305.13731); to ask a causal decoder after every click, and to start from its whitened readings, is ours.

Shapes: B sessions, C items, R rows, T columns of a padded batch, X places, H hidden width, K columns of queries and of
items.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.session_tokens import Texts, drop_tokens, item_texts, last_places, newest, session_texts
from llmgr_rec.modules.normalize import normalize
from llmgr_rec.modules.prompts import one_pass_nodes

# Where the factor of the cosine starts to learn.
_SCALE = 20.0
# Added to what a direction is divided by: a share of the largest deviation and, so that texts that are all alike stay
# so, of the states themselves.
_LEAST, _ROUNDING = 0.02, 1e-4
# Most padded tokens of one call of the decoder, and what widths are rounded up to, so that fewer shapes occur.
_TOKENS_AT_ONCE, _STEP = 65_536, 8
# Where texts are laid out.
_CPU = torch.device("cpu")
# What is read where there is nothing left to read.
_IDLE = Jagged(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]))


class TextSequenceEncoder(nn.Module):
    """Scores an item by the cosine of its text's reading with that of the session's last texts.

    Args:
        decoder: The bare decoder; it trains.
        texts: Token ids of every item's text, each closed by one token more; see `closed`.
        dim: Columns K of queries and items.
        clicks: Newest clicks of a session that are read.
        dropout: Share of the tokens, and of the columns made of them, that is left out in training.

    Raises:
        ValueError: There are more columns than the decoder has.
    """

    mean_H: Tensor
    map_HK: Tensor
    weight: Tensor

    def __init__(self, decoder: PreTrainedModel, texts: Jagged, dim: int, clicks: int, dropout: float) -> None:
        super().__init__()
        hidden = decoder.get_input_embeddings().weight.shape[1]
        if dim > hidden:
            raise ValueError(f"{dim} columns are more than the {hidden} of the decoder")
        self.dim = dim
        self.decoder = decoder
        self.texts = texts
        self.clicks = clicks
        self.dropout = nn.Dropout(dropout)
        self.session_projection, self.item_projection = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for projection in (self.session_projection, self.item_projection):
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))
        self.register_buffer("mean_H", torch.zeros(hidden))
        self.register_buffer("map_HK", torch.eye(hidden)[:, :dim].clone())
        # What its score counts beside others; 1 while it trains.
        self.register_buffer("weight", torch.ones(()))
        # From the calls of the decoder that this reader needs, how many it makes: as many as others that share its
        # weights and have to make each call with it.
        self.common_calls: Callable[[int], int] = _alone

    @torch.no_grad()
    def whiten(self, items: Tensor) -> None:
        """Takes mean and principal directions from items as the decoder reads them now.

        Args:
            items: Item indices.
        """
        states_CH = self.read(item_texts(self.texts, items))
        self.mean_H.copy_(states_CH.mean(0))
        centered_CH = (states_CH - self.mean_H) / math.sqrt(states_CH.shape[0])
        _, deviations, directions = torch.linalg.svd(centered_CH, full_matrices=False)
        scales = deviations[: self.dim] + _LEAST * deviations[0] + _ROUNDING * states_CH.norm(dim=1).mean()
        self.map_HK.zero_()
        self.map_HK[:, : scales.numel()] = directions[: self.dim].T / scales

    def forward(self, texts_XK: Tensor, batch: SessionBatch) -> tuple[Tensor, Tensor]:
        """Reads sessions and, while it trains, the batch's candidates; prefixes of a session in one pass.

        Args:
            texts_XK: Vectors of the nodes, then of the candidates, from the table.
            batch: The sessions.

        Returns:
            Queries, [B, K], zeros for a session without clicks; candidates, [C, K].
        """
        num_nodes = batch.graph.node_items_N.numel()
        if not self.training:
            return self.queries(batch), texts_XK[num_nodes:]
        queries_BK = self.prefix_queries(batch) if batch.pass_offsets_P1.numel() else self.queries(batch)
        return queries_BK, self.item_vectors(batch.candidates_C)

    def item_vectors(self, items: Tensor) -> Tensor:
        """The items' side as the decoder reads it now, [C, K].

        Args:
            items: Item indices.
        """
        return normalize(self.item_projection(self._read_whitened(item_texts(self.texts, items.cpu()))))

    def queries(self, batch: SessionBatch) -> Tensor:
        """Queries of sessions after their last click, [B, K]; zeros without one."""
        graph = batch.graph
        clicks = Jagged(graph.node_items_N.index_select(0, graph.alias_L), graph.click_offsets_B1).to(_CPU)
        sessions = newest(clicks, self.clicks)
        found = torch.nonzero(sessions.lengths).flatten()
        queries_BK = self.log_scale.new_zeros(sessions.num_rows, self.dim)
        read_BK = self._as_queries(last_places(session_texts(self.texts, sessions.select(found))))
        return queries_BK.index_copy(0, found.to(read_BK.device), read_BK)

    def prefix_queries(self, batch: SessionBatch) -> Tensor:
        """The same of growing prefixes, each group of which is read once, from the first click that they share."""
        nodes = one_pass_nodes(batch.graph, batch.pass_offsets_P1)
        shown = Jagged(batch.graph.node_items_N.index_select(0, nodes.values), nodes.offsets).to(_CPU)
        return self._as_queries(session_texts(self.texts, shown))

    def read(self, texts: Texts) -> Tensor:
        """States of the decoder at the places, float32 [X, H]; computed in bfloat16 on a GPU.

        Texts are laid out on the CPU, which waits for a GPU's clicks and candidates once a call. Rows of like
        length are read together, so that little padding is computed.
        """
        tokens, device = texts.tokens, self.mean_H.device
        row_X = torch.searchsorted(tokens.offsets, texts.places_X, right=True) - 1
        column_X = texts.places_X - tokens.offsets[row_X]
        found, places = [self.mean_H.new_zeros(0, self.mean_H.numel())], [torch.empty(0, dtype=torch.int64)]
        chunks = list(_chunks(tokens.lengths))
        idle_calls = self.common_calls(len(chunks)) - len(chunks)
        for rows in chunks:
            slot_R = torch.full((tokens.num_rows,), -1)
            slot_R[rows] = torch.arange(rows.numel())
            here = torch.nonzero(slot_R[row_X] >= 0).flatten()
            hidden_BTH = self._hidden(tokens.select(rows))
            found.append(hidden_BTH[slot_R[row_X[here]].to(device), column_X[here].to(device)].float())
            places.append(here)
        # No state of theirs is read, but they stand in the backward pass, where the others need them as well.
        found += [self._hidden(_IDLE)[0, :0].float() for _ in range(idle_calls)]
        return torch.cat(found)[torch.argsort(torch.cat(places)).to(device)]

    def _as_queries(self, texts: Texts) -> Tensor:
        return normalize(self.session_projection(self._read_whitened(texts))) * self.log_scale.exp() * self.weight

    def _read_whitened(self, texts: Texts) -> Tensor:
        if self.training:
            texts = drop_tokens(texts, self.dropout.p)
        whitened_XK: Tensor = self.dropout((self.read(texts) - self.mean_H) @ self.map_HK)
        return whitened_XK

    def _hidden(self, rows: Jagged) -> Tensor:
        row_S = rows.row_of_value
        # Padding stands to the right, where causal attention does not look.
        ids_BT = torch.zeros(rows.num_rows, _padded(int(rows.lengths.max())), dtype=torch.int64)
        ids_BT[row_S, torch.arange(row_S.numel()) - rows.offsets[row_S]] = rows.values
        device = self.mean_H.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden_BTH: Tensor = self.decoder(input_ids=ids_BT.to(device), use_cache=False).last_hidden_state
        return hidden_BTH


def _chunks(lengths_R: Tensor) -> Iterator[Tensor]:
    """Rows in order of length, as many at a time as the tokens allow; at least one."""
    order = torch.argsort(lengths_R, stable=True)
    lengths, start = lengths_R[order].tolist(), 0
    for stop in range(1, len(lengths) + 1):
        # The next row would be the longest, and all are padded to it.
        if stop == len(lengths) or _padded(lengths[stop]) * (stop + 1 - start) > _TOKENS_AT_ONCE:
            yield order[start:stop]
            start = stop


def _alone(calls: int) -> int:
    return calls


def _padded(length: int) -> int:
    return -(-length // _STEP) * _STEP
