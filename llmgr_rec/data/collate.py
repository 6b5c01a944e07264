"""Turns raw sessions into the batch of a model: session graphs, item features, candidates and texts.

Shapes: B sessions, L clicks, N nodes, C candidates, V items in the catalog, X items (nodes and candidates).
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.graph import build_graphs, nodes_of_longest
from llmgr_rec.data.hashing import hash_ints
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.popularity import by_popularity
from llmgr_rec.data.prefixes import following_items

ITEM_ID = "item_id"

CandidateSource = Literal["none", "cached", "full", "sampled"]
# Items whose text a prompt shows.
PromptTextSource = Literal["none", "random_node", "last_items"]
# Subtracted from the score of an item in a loss, so that its softmax is 0 in any floating-point format.
_OUT_OF_SOFTMAX = 1e4


@dataclass(frozen=True)
class CandidateItems:
    """Items that a loss scores against each session, and whose features are collated after those of the nodes.

    Items without training clicks are excluded from the softmax over the candidates: a candidate that is never correct
    would be learned as such.

    Args:
        source: `none`; `cached`: the whole catalog, but without features, because the model has all item vectors;
            `full`: the whole catalog; `sampled`: the targets of the batch and a log-uniform sample of the items by
            popularity. If raw sessions carry the rows of all ranks, all ranks have the same sample.
        num_draws: Draws of a sample. Duplicates are removed.
    """

    source: CandidateSource = "none"
    num_draws: int = 0


@dataclass(frozen=True)
class RandomNodeText:
    """Prompts show the text of one random node of the session, which becomes the target (node-context alignment).

    Args:
        tokens: Token ids of the text of each item, one row per item.
        max_nodes: The node is drawn from this many last clicks, so that a prompt with as many nodes shows it; 0 draws
            from all.
    """

    tokens: Jagged
    max_nodes: int = 0


@dataclass(frozen=True)
class LastItemsText:
    """Prompts show the texts of the last clicks of the session, oldest first.

    Args:
        tokens: Token ids of the text of each item, one row per item.
        num_items: Number of clicks whose texts are shown.
        separator: Token ids between two texts.
    """

    tokens: Jagged
    num_items: int
    separator: Sequence[int] = ()


PromptText = RandomNodeText | LastItemsText


class Collator:
    """Makes the batch of raw sessions. A function of its settings and the sessions only, so any process may run it.

    Args:
        catalog: Items and their side features.
        side_features: Side features that are collated with the item ids. A feature that the catalog lacks gets empty
            bags.
        candidates: Items that a loss scores.
        text: Text shown in prompts; None for no text.
        seed: Seed of the random draws.
        longest_nodes: Whether features have bags of the nodes of the longest prefix of each pass only, instead of those
            of all prefixes.
    """

    def __init__(
        self,
        catalog: Catalog,
        side_features: Sequence[str] = (),
        candidates: CandidateItems = CandidateItems(),
        text: PromptText | None = None,
        seed: int = 0,
        longest_nodes: bool = False,
    ) -> None:
        self.longest_nodes = longest_nodes
        self.num_items = num_items = catalog.num_items
        self.side_features = {name: catalog.features.get(name, Jagged.empty(num_items)) for name in side_features}
        self.candidates = candidates
        self.sampler = (
            LogUniformSampler(catalog.train_count_V, candidates.num_draws, seed)
            if candidates.source == "sampled"
            else None
        )
        self.train_count_V = catalog.train_count_V
        self.unseen_log_q_V = torch.empty(0)
        if candidates.source in ("cached", "full") and (unseen_V := self.train_count_V == 0).any():
            self.unseen_log_q_V = unseen_V.float() * _OUT_OF_SOFTMAX
        self.text = text
        self._separated_tokens = (
            prepend(text.tokens, text.separator) if isinstance(text, LastItemsText) else Jagged.empty(0)
        )
        self.seed = seed
        self._has_features = True
        self._table_rows: KeyedJaggedTensor | None = None

    def without_features(self) -> "Collator":
        """A collator of batches without item features, for a model that has the vectors of all items."""
        other = copy.copy(self)
        other.side_features, other._has_features = {}, False
        return other

    def with_table_rows(self) -> "Collator":
        """A collator whose batches look up each row of the item tables once, for a model with a `WholeCatalog`."""
        other = copy.copy(self)
        sizes = {ITEM_ID: self.num_items}
        for name, feature in self.side_features.items():
            sizes[name] = int(feature.values.max()) + 1 if feature.values.numel() else 0
        row_S = torch.arange(max(sizes.values()))
        other._table_rows = KeyedJaggedTensor(
            keys=list(sizes),
            values=torch.cat([row_S[:size] for size in sizes.values()]),
            lengths=torch.cat([(row_S < size).to(torch.int64) for size in sizes.values()]),
            stride=row_S.numel(),
        )
        return other

    def __call__(self, raw: RawSessions) -> SessionBatch:
        """Makes the batch of this rank's sessions."""
        graph = build_graphs(raw.items_L, raw.offsets_B1, self.num_items)
        text_items_B = self._text_items(raw)
        targets_B = text_items_B if isinstance(self.text, RandomNodeText) else raw.targets_B
        candidates_C, log_q_C = self._candidates(raw, targets_B)
        items_N = graph.node_items_N
        if self.longest_nodes and raw.pass_offsets_P1.numel():
            items_N = items_N[nodes_of_longest(graph, raw.pass_offsets_P1).values]
        items_X = torch.cat([items_N, candidates_C])
        return SessionBatch(
            features=self._table_rows or self.item_features(items_X if self._has_features else items_X[:0]),
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
        if self.candidates.source == "none":
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        if self.candidates.source == "cached":
            return torch.empty(0, dtype=torch.int64), self.unseen_log_q_V
        if self.sampler is None:
            return torch.arange(self.num_items), self.unseen_log_q_V
        candidates_C, log_q_C = self.sampler.sample(self._all_targets(raw, targets_B), raw.epoch, raw.step)
        return candidates_C, log_q_C + (self.train_count_V[candidates_C] == 0) * _OUT_OF_SOFTMAX

    def _all_targets(self, raw: RawSessions, targets_B: Tensor) -> Tensor:
        """Targets of the global batch if its rows are available, else of this rank's slice."""
        if (whole := raw.global_batch) is None:
            return targets_B
        if isinstance(self.text, RandomNodeText):
            return self._text_items(whole)
        if raw.pass_offsets_P1.numel() and not whole.pass_offsets_P1.numel():
            return following_items(Jagged(whole.items_L, whole.offsets_B1), whole.targets_B)
        return whole.targets_B

    def _columns(self, targets_B: Tensor, candidates_C: Tensor) -> Tensor:
        if self.sampler is None:
            return targets_B
        columns_B = torch.from_numpy(np.searchsorted(candidates_C.numpy(), targets_B.numpy()))
        return torch.where(targets_B >= 0, columns_B, -1)

    def item_features(self, items_X: Tensor) -> KeyedJaggedTensor:
        """Features of items: one bag per item for `item_id` and for each side feature.

        Args:
            items_X: Item indices, int64.

        Returns:
            Keys `item_id` and the side features, stride X.
        """
        values, lengths = {ITEM_ID: items_X}, {ITEM_ID: torch.ones_like(items_X)}
        for name, feature in self.side_features.items():
            bags = feature.select(items_X)
            values[name], lengths[name] = bags.values, bags.lengths
        return KeyedJaggedTensor(
            keys=list(values),
            values=_concatenate(list(values.values())),
            lengths=_concatenate(list(lengths.values())),
            stride=items_X.numel(),
        )

    def _text_items(self, raw: RawSessions) -> Tensor:
        """Item whose text is shown, chosen by a hash of (seed, epoch, row), so it does not depend on other rows."""
        if not isinstance(self.text, RandomNodeText):
            return torch.full_like(raw.targets_B, -1)
        ends_B = raw.offsets_B1[1:]
        counts_B = ends_B - raw.offsets_B1[:-1]
        if self.text.max_nodes:
            counts_B = counts_B.clamp(max=self.text.max_nodes)
        noise_B = hash_ints(raw.rows_B.numpy(), self.seed, raw.epoch)
        back_B = torch.from_numpy((noise_B % np.maximum(counts_B.numpy(), 1).astype(np.uint64)).astype(np.int64))
        padded = torch.cat([raw.items_L, torch.full((1,), -1)])
        return padded[torch.where(counts_B > 0, ends_B - 1 - back_B, raw.items_L.numel())]

    def _text(self, raw: RawSessions, text_items_B: Tensor) -> Jagged:
        """Token ids of the text of each session, one row per session."""
        if self.text is None:
            return Jagged.empty(text_items_B.numel())
        if isinstance(self.text, RandomNodeText):
            tokens = self.text.tokens
            starts_B, ends_B = tokens.offsets[text_items_B.clamp(min=0)], tokens.offsets[text_items_B + 1]
            return tokens.gather(starts_B, (ends_B - starts_B).clamp(min=0))
        sessions = Jagged(raw.items_L, raw.offsets_B1)
        return texts_of_last_items(sessions, self.text.num_items, self._separated_tokens, len(self.text.separator))


def texts_of_last_items(sessions: Jagged, num_items: int, tokens: Jagged, separator_width: int) -> Jagged:
    """Token ids of the texts of the last clicks of each session, oldest first, one row per session; on any device.

    Args:
        sessions: Item indices of each session, oldest first.
        num_items: Number of clicks whose texts are shown.
        tokens: Token ids of each item after those of the separator, from `prepend`.
        separator_width: Number of token ids of the separator.
    """
    shown = sessions.lengths.clamp(max=num_items)
    items = sessions.gather(sessions.offsets[1:] - shown, shown)
    starts = tokens.offsets[items.values]
    ends = tokens.offsets[items.values + 1]
    # The first text of a session has no separator.
    starts[items.offsets[:-1][shown > 0]] += separator_width
    texts = tokens.gather(starts, ends - starts)
    return Jagged(texts.values, texts.offsets[items.offsets])


class LogUniformSampler:
    """Log-uniform candidate sampler, with the expected counts for the logQ correction.

    The item of popularity rank r (0 = most training clicks) is drawn with probability
    log((r + 2) / (r + 1)) / log(V + 1), an approximation of Zipf-distributed frequencies.

    Args:
        train_count_V: Number of training clicks of each item.
        num_draws: Draws per step, with replacement.
        seed: Seed of the draws.
    """

    def __init__(self, train_count_V: Tensor, num_draws: int, seed: int) -> None:
        self._counts_V = train_count_V.numpy()
        self._total = max(int(self._counts_V.sum()), 1)
        self.by_rank_V = by_popularity(self._counts_V)
        self._rank_V = np.empty_like(self.by_rank_V)
        self._rank_V[self.by_rank_V] = np.arange(len(self.by_rank_V), dtype=self.by_rank_V.dtype)
        self.num_draws = num_draws
        self.seed = seed

    def sample(self, targets_B: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Draws the candidates of a step.

        Args:
            targets_B: Items that must be among the candidates; -1 is ignored.
            epoch: Epoch.
            step: Global batch of the epoch.

        Returns:
            Distinct candidates in increasing order, int64 [C], and the log of their expected counts, float32 [C]. As
            candidates are distinct, that is the log of the probability to be drawn or to be a target.
        """
        generator = np.random.default_rng([self.seed % (1 << 64), epoch, step])
        num_items = len(self.by_rank_V)
        uniform = generator.random(self.num_draws)
        ranks = np.minimum(np.exp(uniform * math.log(num_items + 1)).astype(np.int64) - 1, num_items - 1)
        targets = targets_B.numpy()
        targets = targets[targets >= 0]
        # numpy.sort is vectorized; numpy.unique hashes first, which takes six times as long.
        drawn = np.sort(np.concatenate([self.by_rank_V[ranks].astype(np.int64), targets]))
        candidates = drawn[np.diff(drawn, prepend=-1) > 0]
        drawn_C = np.log1p(1.0 / (self._rank_V[candidates] + 1.0)) / math.log(num_items + 1)
        # Log probability that neither a draw nor a target is the item.
        target_C = self._counts_V[candidates] / self._total
        log_absent_C = self.num_draws * _log_complement(drawn_C) + len(targets) * _log_complement(target_C)
        log_q_C = np.log(-np.expm1(log_absent_C))
        return torch.from_numpy(candidates), torch.from_numpy(log_q_C.astype(np.float32))


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    # Not torch.cat, which starts threads for large inputs; they would compete with the training threads.
    return torch.from_numpy(np.concatenate([part.numpy() for part in parts]))


def _log_complement(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log1p(-np.minimum(probability, 1.0 - 1e-12))


def prepend(tokens: Jagged, separator: Sequence[int]) -> Jagged:
    """Rows of tokens, each preceded by the separator.

    Args:
        tokens: Token ids of each item.
        separator: Token ids.
    """
    if not separator:
        return tokens
    width = len(separator)
    offsets = tokens.offsets + width * torch.arange(tokens.num_rows + 1)
    values = torch.empty(int(offsets[-1]), dtype=tokens.values.dtype)
    positions = offsets[:-1, None] + torch.arange(width)
    is_separator = torch.zeros(values.numel(), dtype=torch.bool)
    is_separator[positions.flatten()] = True
    values[~is_separator] = tokens.values
    values[positions] = torch.tensor(separator, dtype=values.dtype)
    return Jagged(values, offsets)
