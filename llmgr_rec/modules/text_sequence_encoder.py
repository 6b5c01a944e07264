"""A language model that encodes sessions and items as text; all of its weights train.

Its score is added to that of the session encoder. One decoder encodes sessions and items; the output is the hidden
state of the end token of a text. These states are whitened with statistics of the items from before training and then
projected. The projections are initialized to the identity, so the initial score is that of nearest neighbors. In
training, items are encoded with gradient. In ranking, their vectors are rows of the table of text embeddings, which are
computed again after the decoder has changed.

The encoding of a session as the texts of its items, and of items by the same model, is that of Recformer (Li et al.,
Text Is All You Need, arXiv 2305.13731). The causal decoder, which encodes all prefixes of a session in one pass, and
the initial whitening are ours.

Shapes: B sessions, C items, R rows, T columns of a padded batch, X output positions, H hidden width, K columns of
queries and item vectors.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.session_tokens import (
    TokenSequences,
    drop_tokens,
    item_sequences,
    last_clicks,
    last_positions,
    session_sequences,
)
from llmgr_rec.kernels.byte_dropout import ByteDropout
from llmgr_rec.modules.normalize import normalize
from llmgr_rec.modules.prompts import one_pass_nodes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Initial scale of the cosine.
_SCALE = 20.0
# Added to the deviation that a whitened direction is divided by: a share of the largest deviation, and a share of the
# norm of the states, so that rounding errors are not amplified where all texts are equal.
_MIN_DEVIATION, _MIN_NORM = 0.02, 1e-4
# Most padded tokens of one call of the decoder, and the multiple that widths are rounded up to, so that fewer shapes
# occur.
_MAX_TOKENS_PER_CALL, _WIDTH_MULTIPLE = 65_536, 8
# Batches of tokens are made on the CPU.
_CPU = torch.device("cpu")
# Input of a call of the decoder whose states are not used.
_UNUSED_ROW = Jagged(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]))


class TextSequenceEncoder(nn.Module):
    """Scores an item by the cosine of the embeddings of its text and of the session's text.

    Args:
        decoder: The decoder without head; it trains.
        item_tokens: Token ids of each item's text with an end token, one row per item; see `append_token`.
        dim: Number K of columns of queries and item vectors.
        max_clicks: Number of newest clicks of a session that are encoded.
        dropout: Probability of dropping a token, and a whitened column, in training, 0 to 1.

    Raises:
        ValueError: `dim` is larger than the hidden width of the decoder.
    """

    mean_H: Tensor
    map_HK: Tensor
    weight: Tensor

    def __init__(
        self, decoder: "PreTrainedModel", item_tokens: Jagged, dim: int, max_clicks: int, dropout: float
    ) -> None:
        super().__init__()
        hidden = decoder.get_input_embeddings().weight.shape[1]
        if dim > hidden:
            raise ValueError(f"{dim} columns are more than the {hidden} of the decoder")
        self.dim = dim
        self.decoder = decoder
        self.item_tokens = item_tokens
        self.max_clicks = max_clicks
        self.dropout = ByteDropout(dropout)
        self.session_projection, self.item_projection = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for projection in (self.session_projection, self.item_projection):
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))
        self.register_buffer("mean_H", torch.zeros(hidden))
        self.register_buffer("map_HK", torch.eye(hidden)[:, :dim].clone())
        # Weight of its score relative to the session encoder's; 1 in training.
        self.register_buffer("weight", torch.ones(()))
        # From the decoder calls that this rank needs, how many all ranks make: with FSDP each call is collective.
        self.common_calls: Callable[[int], int] = _own_calls

    @torch.no_grad()
    def whiten(self, items: Tensor) -> None:
        """Estimates the whitening (mean and scaled principal directions) from items, with the current decoder.

        Args:
            items: Item indices, int64.
        """
        states_CH = self.encode(item_sequences(self.item_tokens, items))
        self.mean_H.copy_(states_CH.mean(0))
        centered_CH = (states_CH - self.mean_H) / math.sqrt(states_CH.shape[0])
        _, deviations, directions = torch.linalg.svd(centered_CH, full_matrices=False)
        scales = deviations[: self.dim] + _MIN_DEVIATION * deviations[0] + _MIN_NORM * states_CH.norm(dim=1).mean()
        self.map_HK.zero_()
        self.map_HK[:, : scales.numel()] = directions[: self.dim].T / scales

    def forward(self, texts_XK: Tensor, batch: SessionBatch) -> tuple[Tensor, Tensor]:
        """Encodes the sessions and, in training, the candidates; in evaluation, candidates are taken from the table.

        Args:
            texts_XK: Rows of the table of text embeddings: those of the nodes, then those of the candidates.
            batch: The sessions; with `pass_offsets_P1`, all prefixes of a pass are encoded in one pass.

        Returns:
            Queries [B, K], zeros for a session without clicks, and candidate vectors [C, K].
        """
        num_nodes = batch.graph.node_items_N.numel()
        if not self.training:
            return self.queries(batch), texts_XK[num_nodes:]
        queries_BK = self.one_pass_queries(batch) if batch.pass_offsets_P1.numel() else self.queries(batch)
        return queries_BK, self.item_vectors(batch.candidates_C)

    def item_vectors(self, items: Tensor) -> Tensor:
        """Item vectors, encoded with the current decoder, [C, K].

        Args:
            items: Item indices, int64.
        """
        return normalize(self.item_projection(self._encode_whitened(item_sequences(self.item_tokens, items.cpu()))))

    def queries(self, batch: SessionBatch) -> Tensor:
        """Queries of sessions, [B, K]; zeros for a session without clicks."""
        graph = batch.graph
        clicks = Jagged(graph.node_items_N.index_select(0, graph.alias_L), graph.click_offsets_B1).to(_CPU)
        sessions = last_clicks(clicks, self.max_clicks)
        not_empty = torch.nonzero(sessions.lengths).flatten()
        queries_BK = self.log_scale.new_zeros(sessions.num_rows, self.dim)
        texts = session_sequences(self.item_tokens, sessions.select(not_empty))
        encoded_BK = self._as_queries(last_positions(texts))
        return queries_BK.index_copy(0, not_empty.to(encoded_BK.device), encoded_BK)

    def one_pass_queries(self, batch: SessionBatch) -> Tensor:
        """Queries of the prefixes of each pass, from one encoding of its longest prefix, [B, K]."""
        nodes = one_pass_nodes(batch.graph, batch.pass_offsets_P1)
        shown = Jagged(batch.graph.node_items_N.index_select(0, nodes.values), nodes.offsets).to(_CPU)
        return self._as_queries(session_sequences(self.item_tokens, shown))

    def encode(self, texts: TokenSequences) -> Tensor:
        """Hidden states at the output positions, float32 [X, H]; computed in bfloat16 on a GPU.

        Token batches are assembled on the CPU. Each contains rows of similar length, to limit padding.

        Args:
            texts: Token sequences, on the CPU.
        """
        tokens, device = texts.tokens, self.mean_H.device
        row_X = torch.searchsorted(tokens.offsets, texts.positions_X, right=True) - 1
        column_X = texts.positions_X - tokens.offsets[row_X]
        states, positions = [self.mean_H.new_zeros(0, self.mean_H.numel())], [torch.empty(0, dtype=torch.int64)]
        chunks = list(_chunks(tokens.lengths))
        unused_calls = self.common_calls(len(chunks)) - len(chunks)
        for rows in chunks:
            slot_R = torch.full((tokens.num_rows,), -1)
            slot_R[rows] = torch.arange(rows.numel())
            in_chunk = torch.nonzero(slot_R[row_X] >= 0).flatten()
            hidden_BTH = self._hidden(tokens.select(rows))
            states.append(hidden_BTH[slot_R[row_X[in_chunk]].to(device), column_X[in_chunk].to(device)].float())
            positions.append(in_chunk)
        # Their states are not used, but they have to be in the autograd graph: the backward pass is collective, too.
        states += [self._hidden(_UNUSED_ROW)[0, :0].float() for _ in range(unused_calls)]
        return torch.cat(states)[torch.argsort(torch.cat(positions)).to(device)]

    def _as_queries(self, texts: TokenSequences) -> Tensor:
        return normalize(self.session_projection(self._encode_whitened(texts))) * self.log_scale.exp() * self.weight

    def _encode_whitened(self, texts: TokenSequences) -> Tensor:
        if self.training:
            texts = drop_tokens(texts, self.dropout.p)
        whitened_XK: Tensor = self.dropout((self.encode(texts) - self.mean_H) @ self.map_HK)
        return whitened_XK

    def _hidden(self, rows: Jagged) -> Tensor:
        row_S = rows.row_of_value
        # Padding is on the right, where causal attention never attends to it.
        ids_BT = torch.zeros(rows.num_rows, _padded(int(rows.lengths.max())), dtype=torch.int64)
        ids_BT[row_S, torch.arange(row_S.numel()) - rows.offsets[row_S]] = rows.values
        device = self.mean_H.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden_BTH: Tensor = self.decoder(input_ids=ids_BT.to(device), use_cache=False).last_hidden_state
        return hidden_BTH


def _chunks(lengths_R: Tensor) -> Iterator[Tensor]:
    """Row numbers in order of length, in chunks of at most `_MAX_TOKENS_PER_CALL` padded tokens or one row."""
    order = torch.argsort(lengths_R, stable=True)
    lengths, start = lengths_R[order].tolist(), 0
    for stop in range(1, len(lengths) + 1):
        # The next row is the longest of the chunk, to which all are padded.
        if stop == len(lengths) or _padded(lengths[stop]) * (stop + 1 - start) > _MAX_TOKENS_PER_CALL:
            yield order[start:stop]
            start = stop


def _own_calls(calls: int) -> int:
    return calls


def _padded(length: int) -> int:
    return -(-length // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
