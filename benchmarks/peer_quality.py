"""Quality of a peer at its best epoch: NDCG@20 on validation examples, and test lists beside evaluated models.

Shapes: S test sessions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.ranked_split import RankedSplit
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.comparison import gains_between
from llmgr_rec.evaluation.evaluated import Evaluated
from llmgr_rec.evaluation.exclusion import ranking_rule
from llmgr_rec.evaluation.rank_collector import TargetRanks
from llmgr_rec.evaluation.results import COLUMNS
from llmgr_rec.evaluation.session_ranks import read_ranks

SPLIT = "test"


class EvaluatedModels:
    """Models whose target ranks on the test sessions `llmgr_rec.evaluate` has stored.

    Args:
        file: Its metrics file.
        dataset: The data set that the peer trains on.

    Raises:
        UserError: The file is no metrics file, has no target ranks, or is about other sessions or rankings.
    """

    def __init__(self, file: Path, dataset: Dataset) -> None:
        evaluated = Evaluated.read(file)
        if evaluated.sessions != dataset.manifest.split_hash(SPLIT):
            raise UserError(f"{file} is about other sessions than the test split of {dataset.path}; evaluate on that")
        rule = ranking_rule(dataset.manifest)
        if evaluated.rule != rule:
            raise UserError(f"{file} ranked with {evaluated.rule}, the peer with {rule}; evaluate without --repeats")
        self.metrics = evaluated.models
        ranks = {name: read_ranks(file, evaluated.content, name) for name in evaluated.models}
        self.ranks = {name: ranks_S for name, ranks_S in ranks.items() if ranks_S is not None}
        if len(self.ranks) < len(ranks):
            raise UserError(f"{file} has no target ranks beside it; evaluate again with --output {file}")

    def beside(self, peer: str, metrics: Mapping[str, Any], ranks_S: TargetRanks) -> dict[str, Any]:
        """Metrics of all models and of the peer, and the gains of the models over the peer, with intervals.

        Args:
            peer: Name of the peer.
            metrics: Its metrics.
            ranks_S: Its target ranks.
        """
        everyone = {**self.metrics, peer: metrics}
        return {
            "metrics": {name: {column: found[column] for column in COLUMNS} for name, found in everyone.items()},
            "gains": {name: gains_between(mine_S, ranks_S) for name, mine_S in self.ranks.items()},
        }


class BestEpoch:
    """Measures the lists of each epoch, and keeps what the best one gives on test sessions.

    Args:
        dataset: The data set.
        test_lists: File that gets the lists of the test sessions after each epoch; None without.
    """

    def __init__(self, dataset: Dataset, test_lists: Path | None) -> None:
        self._valid = RankedSplit(dataset, "valid")
        self._test_lists = test_lists
        self._test = RankedSplit(dataset, SPLIT) if test_lists else None
        self._ndcg = -1.0
        self.test: tuple[dict[str, Any], TargetRanks] | None = None

    def measure(self, file: Path) -> tuple[float, int]:
        """NDCG@20 and the number of validation examples.

        Args:
            file: Lists of the validation examples, see `RankedSplit.measure`.
        """
        metrics, _ = self._valid.measure(file)
        if metrics["ndcg@20"] > self._ndcg:
            self._ndcg = metrics["ndcg@20"]
            if self._test is not None and self._test_lists is not None:
                self.test = self._test.measure(self._test_lists)
        return metrics["ndcg@20"], metrics["count"]
