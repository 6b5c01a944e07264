"""Turns raw sessions into the batch that the model takes: graphs, bags of features, candidates, text.

Shapes: B sessions, L clicks, N nodes, C candidates, V items in the catalogue.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.graph import build_graphs
from llmgr_rec.data.hashing import hash_ints
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.prefixes import following_items

ITEM_ID = "item_id"

Candidates = Literal["none", "cached", "full", "sampled"]
# Taken from the score of an item in a loss: its softmax is then 0 in any number format.
_OUT_OF_SOFTMAX = 1e4
TextPlace = Literal["none", "random_node", "last_items"]


class Collator:
    """Makes batches; a function of its settings and the raw sessions alone, so any process may run it.

    Args:
        catalogue: The items.
        side_features: Side features that get a bag beside the item id; the bags of a feature that the catalogue lacks
            are empty.
        candidates: Items whose vectors are looked up together with the nodes': none, none because the model has
            all cached, the whole catalogue, or a sample (the targets of the batch and log-uniform draws over items by
            falling popularity). Where raw sessions come with those of all ranks, every rank has the same sample. Items
            that no training session holds have no part in a softmax over them: as candidates that are never right they
            would be learned as such.
        sampled_items: Draws of the sample; repeated ones count once.
        text: What stands at the text place: nothing, the text of one node of the session, which then is the target
            (node-context alignment), or the texts of the last clicks, oldest first.
        text_items: Clicks whose texts are shown with `last_items`.
        text_tokens: Token ids of each item's text, one row an item; needed unless `text` is none.
        text_separator: Token ids between two texts with `last_items`.
        max_nodes: With `random_node`, the node is drawn from this many last clicks, so that a prompt with so many nodes
            shows it; 0 draws from all.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        side_features: Sequence[str] = (),
        candidates: Candidates = "none",
        sampled_items: int = 0,
        text: TextPlace = "none",
        text_items: int = 0,
        text_tokens: Jagged | None = None,
        text_separator: Sequence[int] = (),
        max_nodes: int = 0,
        seed: int = 0,
    ) -> None:
        if text != "none" and text_tokens is None:
            raise ValueError(f"text is {text} but there are no text tokens")
        self.num_items = num_items = catalogue.num_items
        self.side_features = {name: catalogue.features.get(name, Jagged.empty(num_items)) for name in side_features}
        self.candidates = candidates
        self.sampler = (
            LogUniformSampler(catalogue.train_count_V, sampled_items, seed) if candidates == "sampled" else None
        )
        self.train_count_V = catalogue.train_count_V
        self.unseen_log_q_V = torch.empty(0)
        if candidates in ("cached", "full") and (unseen_V := self.train_count_V == 0).any():
            self.unseen_log_q_V = unseen_V.float() * _OUT_OF_SOFTMAX
        self.text = text
        self.text_items = text_items
        self.text_tokens = text_tokens or Jagged.empty(num_items)
        self.separated_tokens = _prepend(self.text_tokens, text_separator)
        self.separator_length = len(text_separator)
        self.max_nodes = max_nodes
        self.seed = seed

    def __call__(self, raw: RawSessions) -> SessionBatch:
        """Makes the batch of this rank's sessions."""
        graph = build_graphs(raw.items_L, raw.offsets_B1, self.num_items)
        text_items_B = self._text_items(raw)
        targets_B = text_items_B if self.text == "random_node" else raw.targets_B
        candidates_C, log_q_C = self._candidates(raw, targets_B)
        items_X = torch.cat([graph.node_items_N, candidates_C])
        return SessionBatch(
            features=self.item_features(items_X),
            graph=graph,
            targets_B=targets_B,
            target_columns_B=self._columns(targets_B, candidates_C),
            weights_B=raw.weights_B,
            rows_B=raw.rows_B,
            candidates_C=candidates_C,
            log_q_C=log_q_C,
            text_tokens=self._text(raw, text_items_B),
            text_items_B=text_items_B,
            global_size=raw.global_size,
            step=raw.step,
            epoch=raw.epoch,
            num_items=self.num_items,
            pass_offsets_P1=raw.pass_offsets_P1,
        )

    def _candidates(self, raw: RawSessions, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        if self.candidates == "none":
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        if self.candidates == "cached":
            return torch.empty(0, dtype=torch.int64), self.unseen_log_q_V
        if self.sampler is None:
            return torch.arange(self.num_items), self.unseen_log_q_V
        candidates_C, log_q_C = self.sampler.sample(self._all_targets(raw, targets_B), raw.epoch, raw.step)
        return candidates_C, log_q_C + (self.train_count_V[candidates_C] == 0) * _OUT_OF_SOFTMAX

    def _all_targets(self, raw: RawSessions, targets_B: Tensor) -> Tensor:
        """Targets of the whole global batch, where its rows are at hand; of this rank's else."""
        if raw.whole is None:
            return targets_B
        if self.text == "random_node":
            return self._text_items(raw.whole)
        if raw.pass_offsets_P1.numel():
            return following_items(Jagged(raw.whole.items_L, raw.whole.offsets_B1), raw.whole.targets_B)
        return raw.whole.targets_B

    def _columns(self, targets_B: Tensor, candidates_C: Tensor) -> Tensor:
        if self.sampler is None:
            return targets_B
        columns_B = torch.from_numpy(np.searchsorted(candidates_C.numpy(), targets_B.numpy()))
        return torch.where(targets_B >= 0, columns_B, -1)

    def item_features(self, items_X: Tensor) -> KeyedJaggedTensor:
        """The bags of a list of items, [X] of them, under `item_id` and each side feature.

        Args:
            items_X: Item indices, int64.
        """
        values, lengths = {ITEM_ID: items_X}, {ITEM_ID: torch.ones_like(items_X)}
        for name, feature in self.side_features.items():
            bags = feature.select(items_X)
            values[name], lengths[name] = bags.values, bags.lengths
        return KeyedJaggedTensor(
            keys=list(values),
            values=_joined(list(values.values())),
            lengths=_joined(list(lengths.values())),
            stride=items_X.numel(),
        )

    def _text_items(self, raw: RawSessions) -> Tensor:
        """Item whose text is shown, chosen by hash of (seed, epoch, row), so that no other row has a part in it."""
        if self.text != "random_node":
            return torch.full_like(raw.targets_B, -1)
        ends_B = raw.offsets_B1[1:]
        counts_B = ends_B - raw.offsets_B1[:-1]
        if self.max_nodes:
            counts_B = counts_B.clamp(max=self.max_nodes)
        noise_B = hash_ints(raw.rows_B.numpy(), self.seed, raw.epoch)
        back_B = torch.from_numpy((noise_B % np.maximum(counts_B.numpy(), 1).astype(np.uint64)).astype(np.int64))
        padded = torch.cat([raw.items_L, torch.full((1,), -1)])
        return padded[torch.where(counts_B > 0, ends_B - 1 - back_B, raw.items_L.numel())]

    def _text(self, raw: RawSessions, text_items_B: Tensor) -> Jagged:
        num_sessions = text_items_B.numel()
        if self.text == "none":
            return Jagged.empty(num_sessions)
        if self.text == "random_node":
            starts_B = self.text_tokens.offsets[text_items_B.clamp(min=0)]
            ends_B = self.text_tokens.offsets[text_items_B + 1]
            return self.text_tokens.gather(starts_B, (ends_B - starts_B).clamp(min=0))
        sessions = Jagged(raw.items_L, raw.offsets_B1)
        shown = sessions.lengths.clamp(max=self.text_items)
        items = sessions.gather(raw.offsets_B1[1:] - shown, shown)
        tokens = self.separated_tokens
        starts = tokens.offsets[items.values]
        ends = tokens.offsets[items.values + 1]
        # The first text of a session goes without its separator.
        starts[items.offsets[:-1][shown > 0]] += self.separator_length
        texts = tokens.gather(starts, ends - starts)
        return Jagged(texts.values, texts.offsets[items.offsets])


class LogUniformSampler:
    """Draws candidate items of which popular ones are likelier, and knows how likely each was.

    The item of popularity rank r (0 = most training occurrences) is drawn with probability
    log((r + 2) / (r + 1)) / log(V + 1), the usual guess at Zipf-distributed frequencies.

    Args:
        train_count_V: Occurrences of each item in training sessions.
        num_draws: Draws of a step, with replacement.
        seed: Seed of the draws.
    """

    def __init__(self, train_count_V: Tensor, num_draws: int, seed: int) -> None:
        self._counts_V = train_count_V.numpy()
        self._total = max(int(self._counts_V.sum()), 1)
        # Every rank and every reading process holds them, for catalogues of 10^8 items.
        number = np.int32 if len(self._counts_V) < 1 << 31 else np.int64
        self.by_rank_V = np.argsort(-self._counts_V, kind="stable").astype(number)
        self._rank_V = np.empty_like(self.by_rank_V)
        self._rank_V[self.by_rank_V] = np.arange(len(self.by_rank_V), dtype=number)
        self.num_draws = num_draws
        self.seed = seed

    def sample(self, targets_B: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Draws the candidates of a step.

        Args:
            targets_B: Items that must be among the candidates; -1 is ignored.
            epoch: Number of the epoch.
            step: Number of the global batch.

        Returns:
            Candidates in rising order without repetition, int64 [C], and the log of their expected count, float32 [C]:
            as each stands once at most, that is the log of the chance to be drawn or to be a target.
        """
        generator = np.random.default_rng([self.seed % (1 << 64), epoch, step])
        num_items = len(self.by_rank_V)
        uniform = generator.random(self.num_draws)
        ranks = np.minimum(np.exp(uniform * math.log(num_items + 1)).astype(np.int64) - 1, num_items - 1)
        targets = targets_B.numpy()
        targets = targets[targets >= 0]
        # Numpy sorts with vector instructions; its own `unique` hashes first, which takes six times as long.
        drawn = np.sort(np.concatenate([self.by_rank_V[ranks].astype(np.int64), targets]))
        candidates = drawn[np.diff(drawn, prepend=-1) > 0]
        drawn_C = np.log1p(1.0 / (self._rank_V[candidates] + 1.0)) / math.log(num_items + 1)
        # Log of the chance that no draw, and no target, is the item.
        target_C = self._counts_V[candidates] / self._total
        log_absent_C = self.num_draws * _log_complement(drawn_C) + len(targets) * _log_complement(target_C)
        log_q_C = np.log(-np.expm1(log_absent_C))
        return torch.from_numpy(candidates), torch.from_numpy(log_q_C.astype(np.float32))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    # Torch's own starts threads for large parts, which disturb those of the training beside it.
    return torch.from_numpy(np.concatenate([part.numpy() for part in parts]))


def _log_complement(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log1p(-np.minimum(probability, 1.0 - 1e-12))


def _prepend(tokens: Jagged, separator: Sequence[int]) -> Jagged:
    """Rows of tokens, each with the separator in front."""
    if not separator:
        return tokens
    width = len(separator)
    offsets = tokens.offsets + width * torch.arange(tokens.num_rows + 1)
    values = torch.empty(int(offsets[-1]), dtype=tokens.values.dtype)
    heads = offsets[:-1, None] + torch.arange(width)
    is_head = torch.zeros(values.numel(), dtype=torch.bool)
    is_head[heads.flatten()] = True
    values[~is_head] = tokens.values
    values[heads] = torch.tensor(separator, dtype=values.dtype)
    return Jagged(values, offsets)
