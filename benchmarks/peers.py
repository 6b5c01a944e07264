"""The peers that training of session recommenders is compared with."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import recbole_side, rectools_side
from benchmarks.peer_environment import RECBOLE, RECTOOLS, PeerPackage
from benchmarks.session_settings import Settings
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.evaluation.results import K


@dataclass(frozen=True)
class Peer:
    """A model of another library.

    Args:
        name: Name in the results.
        package: What its environment contains.
        worker: Module that trains it, in that environment.
        write_files: Writes a data set in the form that the worker reads, and returns the number of examples by split.
        model_settings: What the worker reads beside what all workers do.
        least_ratio: How many times as fast our side should be; None where nothing is wanted.
        encoder: Name of our encoder.
        one_pass: Whether it trains on all prefixes of a session in one pass.
        defaults: Settings where no argument says otherwise.
        initial_std: Standard deviation of its initial item vectors by the number of items and their width.
        sampled: Whether it trains by a sampled softmax.
        ranks_test: Whether the worker also ranks the test examples.
    """

    name: str
    package: PeerPackage
    worker: str
    write_files: Callable[[Dataset, Path], dict[str, int]]
    model_settings: Callable[[Settings, Path], dict[str, Any]]
    least_ratio: float | None
    encoder: str
    one_pass: bool
    defaults: dict[str, Any]
    initial_std: Callable[[int, int], float]
    sampled: bool = False
    ranks_test: bool = False

    def of_settings(self, dataset: Dataset, dim: int) -> dict[str, Any]:
        """The settings that the peer and the data set give."""
        manifest = dataset.manifest
        return {
            **self.defaults,
            "encoder": self.encoder,
            "one_pass": self.one_pass,
            "sampled": self.sampled,
            "prefixes": manifest.num_examples["train"] / manifest.num_sessions["train"],
            "initial_std": self.initial_std(manifest.num_items, dim),
            "max_length": manifest.max_length,
        }

    def write_settings(
        self, file: Path, settings: Settings, dataset: Dataset, data: Path, test_lists: Path | None = None
    ) -> None:
        """Writes the settings file of the worker.

        Args:
            file: The file; lists of the validation examples are written beside it.
            settings: Shared settings.
            dataset: The data set.
            data: Folder of `write_files`.
            test_lists: File for the lists of the test examples; None leaves them out.
        """
        of_all = {
            "threads": settings.threads,
            "items": dataset.manifest.num_items,
            "examples": dataset.manifest.num_examples["train"],
            "k": K,
            "exclude_seen": dataset.manifest.repeats == "exclude",
            "rankings": str(file.with_name("rankings.npy")),
            "test_rankings": str(test_lists or ""),
        }
        file.write_text(json.dumps({**self.model_settings(settings, data), **of_all}))


_OF_ALL: dict[str, Any] = {"negatives": 1024, "padding": True}
_RECTOOLS: dict[str, Any] = {**_OF_ALL, "batch_size": 128, "dropout": 0.2, "score": "dot"}
_RECBOLE: dict[str, Any] = {
    **_OF_ALL,
    "batch_size": 512,
    "attention_layers": 1,
    "attention_heads": 1,
    "score": "cosine",
}


def _xavier_std(items: int, dim: int) -> float:
    """Standard deviation of Xavier's normal distribution; the table has a row of padding."""
    return (2 / (items + 1 + dim)) ** 0.5


_SASREC = Peer(
    name="RecTools' SASRecModel",
    package=RECTOOLS,
    worker="benchmarks.rectools_worker",
    write_files=rectools_side.write_files,
    model_settings=rectools_side.sasrec,
    least_ratio=12.0,
    encoder="sasrec",
    one_pass=True,
    defaults={**_RECTOOLS, "attention_layers": 2, "attention_heads": 2},
    initial_std=_xavier_std,
    ranks_test=True,
)

PEERS = {
    "rectools_sasrec": _SASREC,
    "rectools_esasrec": replace(
        _SASREC,
        name="RecTools' eSASRec",
        model_settings=rectools_side.esasrec,
        least_ratio=None,
        encoder="esasrec",
        # Selected by its authors for Amazon Beauty, Sports and Toys.
        defaults={**_RECTOOLS, "attention_layers": 1, "attention_heads": 1, "negatives": 256},
        sampled=True,
    ),
    "recbole_gcsan": Peer(
        name="RecBole's GCSAN",
        package=RECBOLE,
        worker="benchmarks.recbole_worker",
        write_files=recbole_side.write_files,
        model_settings=recbole_side.gcsan,
        least_ratio=15.0,
        encoder="gcsan",
        one_pass=False,
        defaults={**_RECBOLE, "dropout": 0.2},
        initial_std=lambda items, dim: 0.02,
    ),
    "recbole_srgnn": Peer(
        name="RecBole's SRGNN",
        package=RECBOLE,
        worker="benchmarks.recbole_worker",
        write_files=recbole_side.write_files,
        model_settings=recbole_side.srgnn,
        least_ratio=10.0,
        encoder="srgnn",
        one_pass=False,
        defaults={**_RECBOLE, "dropout": 0.0},
        # Uniform within 1 / sqrt(dim).
        initial_std=lambda items, dim: (3 * dim) ** -0.5,
    ),
}
