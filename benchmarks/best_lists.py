"""The best items of sessions by a trained run, to be ranked again by something else.

Shapes: S sessions, D items of a list, K = 20, N candidates in training.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmgr_rec.baselines.blend import clicks_of
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import RankingModel
from llmgr_rec.evaluation.intervals import K
from llmgr_rec.evaluation.protocol import batches_of_rank, identity, ranked_lists, split_reader

Ranks = NDArray[np.int64]
_READ_ROWS = 8192


@dataclass(frozen=True)
class Lists:
    """The best items of sessions by the trained run.

    Args:
        clicks: Item indices of each session, oldest first.
        targets_S: Item that followed each session.
        ids_SD: Item indices, best first; there is no padding.
        scores_SD: Their scores.
    """

    clicks: Jagged
    targets_S: Tensor
    ids_SD: Tensor
    scores_SD: Tensor

    def __len__(self) -> int:
        return len(self.ids_SD)

    def rows(self, rows: Tensor) -> "Lists":
        """The lists of some sessions."""
        return Lists(self.clicks.select(rows), self.targets_S[rows], self.ids_SD[rows], self.scores_SD[rows])

    def top(self, depth: int) -> "Lists":
        """The beginning of each list."""
        return replace(self, ids_SD=self.ids_SD[:, :depth], scores_SD=self.scores_SD[:, :depth])

    @property
    def is_target_SD(self) -> Tensor:
        """Whether an item is the target."""
        return self.ids_SD == self.targets_S[:, None]

    @property
    def hits(self) -> Tensor:
        """The sessions whose target is in the list; for the others no order of the list changes a metric."""
        return torch.nonzero(self.is_target_SD.any(dim=1)).flatten()

    @property
    def margin_S(self) -> Tensor:
        """Score of the best item less that of the second one."""
        return self.scores_SD[:, 0] - self.scores_SD[:, 1]

    def target_ranks(self, added_SD: Tensor) -> Ranks:
        """Rank of each target by the scores plus others, K where it is not in the list."""
        scores_SD, place_S1 = self.scores_SD + added_SD, self.is_target_SD.int().argmax(dim=1, keepdim=True)
        own_S1, item_S1 = scores_SD.gather(1, place_S1), self.ids_SD.gather(1, place_S1)
        ahead_SD = (scores_SD > own_S1) | ((scores_SD == own_S1) & (self.ids_SD < item_S1))
        return torch.where(self.is_target_SD.any(dim=1), ahead_SD.sum(dim=1), K).numpy()


def best_lists(ranking: RankingModel, dataset: Dataset, split: str, depth: int) -> Lists:
    """The lists of a split.

    Args:
        ranking: The trained run.
        dataset: Its data set.
        split: valid or test.
        depth: Length of the lists.
    """
    found = []
    for ids_BD, scores_BD, batch in ranked_lists(ranking, dataset, split, World.alone(), depth=depth):
        rows_B = torch.nonzero(batch.weights_B > 0).flatten()
        found.append(Lists(clicks_of(batch), batch.targets_B, ids_BD, scores_BD).rows(rows_B))
    parts = ([getattr(lists, name) for lists in found] for name in ("targets_S", "ids_SD", "scores_SD"))
    return Lists(Jagged.stack([lists.clicks for lists in found]), *map(torch.cat, parts))


def training_sessions(dataset: Dataset) -> Lists:
    """The sessions of the training split, with empty lists."""
    raws = list(batches_of_rank(split_reader(dataset, "train", _READ_ROWS, identity), World.alone(), "read"))
    clicks = Jagged.stack([Jagged(raw.items_L, raw.offsets_B1) for raw in raws])
    targets_S = torch.cat([raw.targets_B for raw in raws])
    return Lists(clicks, targets_S, targets_S.new_zeros(len(targets_S), 0), torch.zeros(len(targets_S), 0))


def training_examples(lists: Lists, count: int, random: np.random.Generator) -> tuple[Jagged, Tensor, Tensor]:
    """Examples of training sessions: the other candidates are targets of random other sessions.

    The run was trained on these sessions, so that its lists and scores have seen their targets; there are no scores.

    Args:
        lists: The sessions, see `training_sessions`.
        count: Candidates of a session N.
        random: Source of the choices.

    Returns:
        Clicks, candidates [S, N], the target first, and their scores [S, N]: 0, or -inf for another that is the target.
    """
    sessions = len(lists)
    others_SN = lists.targets_S[torch.from_numpy(random.integers(sessions, size=(sessions, count - 1)))]
    is_target_SN = others_SN == lists.targets_S[:, None]
    scores_SN = torch.zeros(sessions, count)
    scores_SN[:, 1:].masked_fill_(is_target_SN, float("-inf"))
    return lists.clicks, torch.cat([lists.targets_S[:, None], others_SN], dim=1), scores_SN


def validation_examples(lists: Lists, count: int, random: np.random.Generator) -> tuple[Jagged, Tensor, Tensor]:
    """Examples of sessions that the run was not trained on: the others are of the K items around the target, at random.

    Those are the items of places 0 to 19, of 20 to 39, and so on. With others from the top alone, targets that are
    further down would teach that a low score is a good sign.

    Args:
        lists: Lists that have their targets.
        count: Candidates of a session N.
        random: Source of the choices.

    Returns:
        Clicks, candidates [S, N], the target first, and their scores [S, N] by the run.
    """
    target_S1 = lists.is_target_SD.int().argmax(dim=1, keepdim=True)
    place_D = torch.arange(lists.ids_SD.shape[1])
    is_other_SD = (place_D // K == target_S1 // K) & (place_D != target_S1)
    random_SD = torch.from_numpy(random.random(is_other_SD.shape)).masked_fill(~is_other_SD, 2.0)
    places_SN = torch.cat([target_S1, random_SD.argsort(dim=1)[:, : count - 1]], dim=1)
    return lists.clicks, lists.ids_SD.gather(1, places_SN), lists.scores_SD.gather(1, places_SN)
