"""The content of a metrics file as the report reads it, of this version and of earlier ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.exclusion import RankingRule
from llmgr_rec.evaluation.intervals import Gain, K, rate_interval, unpaired_gain
from llmgr_rec.evaluation.metrics import BUCKET_NAMES, BY_FREQUENCY, BY_LENGTH
from llmgr_rec.evaluation.results import CUTOFFS, columns, in_table_order, read_metrics
from llmgr_rec.storage.bundle_index import STAGES_OF_MODEL

Metrics = Mapping[str, Any]
_HR = f"hr@{K}"


@dataclass(frozen=True)
class Evaluated:
    """Results of an evaluation.

    Args:
        file: The metrics file.
        content: Its content.

    Raises:
        UserError: The content is not that of a metrics file.
    """

    file: Path
    content: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            self._check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.file} is damaged ({reason}); evaluate again with --output {self.file}") from None

    @classmethod
    def read(cls, file: Path) -> "Evaluated":
        """Reads a metrics file.

        Args:
            file: The file.

        Raises:
            UserError: The file is absent or damaged, or is not a metrics file.
        """
        return cls(file, read_metrics(file))

    def _check(self) -> None:
        """Reads whatever the report needs."""
        if not isinstance(self.content[self.split], dict):
            raise TypeError(f"{self.split} is no object")
        for metrics in self.models.values():
            if not all(0 <= float(metrics[column]) <= 1 for column in columns(self.cutoffs)):
                raise ValueError("a metric is not between 0 and 1")
            for group in (BY_FREQUENCY, BY_LENGTH):
                for cell in metrics.get(group, {}).values():
                    int(cell["count"]), float(cell["hr"] or 0)
        int(self.num_items), int(self.count), dict(self.blends), dict(self.stages), self.rule
        for name in self.models:
            self.interval(name, _HR)
            if name in self.trained:
                for other in self.models:
                    self.gains(name, other)

    @property
    def cutoffs(self) -> list[int]:
        """Cutoffs of the metrics; files of version 0.2 do not say them."""
        return list(map(int, self.content.get("cutoffs", CUTOFFS)))

    @property
    def split(self) -> str:
        """The split that was evaluated."""
        return str(self.content.get("split", "test"))

    @cached_property
    def models(self) -> Mapping[str, Metrics]:
        """Metrics by model, in the order of the tables."""
        found = self.content[self.split]
        return {name: found[name] for name in in_table_order(found)}

    @property
    def count(self) -> int:
        """Number of sessions."""
        return int(self.content["count"])

    @property
    def num_items(self) -> int:
        """Number of items of the catalog."""
        return int(self.content["num_items"])

    @property
    def blends(self) -> Mapping[str, Mapping[str, float]]:
        """Weight of each nearest-neighbor score by model."""
        # Their name in version 0.1 is priors.
        return self.content.get("blends", self.content.get("priors", {}))

    @property
    def stages(self) -> Mapping[str, str]:
        """Stage that trained each model of the run."""
        return self.content.get("stages", {})

    @property
    def trained(self) -> list[str]:
        """Models of the run, in the order of their stages."""
        names = self.stages or STAGES_OF_MODEL
        return [name for name in self.models if name in names]

    @property
    def baselines(self) -> list[str]:
        """Models that were not trained by the run."""
        return [name for name in self.models if name not in self.trained]

    @property
    def recommender(self) -> str | None:
        """The model of the run's last stage; None if only baselines were evaluated."""
        return self.trained[-1] if self.trained else None

    @property
    def strongest_baseline(self) -> str | None:
        """The baseline with the highest HR@20; None if there is none."""
        return max(self.baselines, key=lambda name: self.models[name][_HR], default=None)

    @property
    def rule(self) -> RankingRule | None:
        """What the rankings showed and excluded; None for files of version 0.2, which do not say it."""
        if "repeats" not in self.content:
            return None
        domains = self.content.get("domains", "own")
        return RankingRule(self.content["repeats"], int(self.content["max_length"]), domains)

    @property
    def sessions(self) -> str:
        """Hash of the sessions that were evaluated; empty for files of version 0.2."""
        return str(self.content.get("sessions", ""))

    @property
    def is_paired(self) -> bool:
        """Whether gains have paired intervals; files of version 0.2 have none."""
        return "gains" in self.content

    def hit_rate(self, model: str) -> float:
        """HR@20 of a model.

        Args:
            model: Its name.
        """
        return float(self.models[model][_HR])

    def interval(self, model: str, metric: str) -> tuple[float, float] | None:
        """95 % interval of a metric of a model; None if the file has none.

        Args:
            model: Its name.
            metric: A metric at 20.
        """
        found = self.content.get("intervals", {}).get(model, {}).get(metric)
        if found is not None:
            low, high = map(float, found)
            return low, high
        return rate_interval(self.hit_rate(model), self.count) if metric == _HR else None

    def gains(self, model: str, other: str) -> dict[str, Gain | None]:
        """Gains of a trained model over another one, by metric; those without an interval are left out.

        Args:
            model: A model of the run.
            other: Another model.
        """
        if not self.is_paired:
            return {_HR: unpaired_gain(self.hit_rate(model), self.hit_rate(other), self.count)}
        found = self.content["gains"][model].get(other, {})
        return {metric: Gain(**gain) if gain else None for metric, gain in found.items()}


def bucket_names(metrics: Metrics, group: str) -> list[str]:
    """Names of the buckets of a group that have sessions.

    Args:
        metrics: Metrics of a model.
        group: `BY_FREQUENCY` or `BY_LENGTH`.
    """
    cells = metrics.get(group, {})
    names = BUCKET_NAMES if group == BY_FREQUENCY else list(cells)
    return [name for name in names if name in cells and cells[name]["count"]]
