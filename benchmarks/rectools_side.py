"""Data and settings of RecTools' side of the comparison: sessions as arrays, and the settings that its worker reads.

Shapes: U training sessions, B validation or test examples, L clicks of all of them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.session_settings import Settings
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.protocol import split_reader

NAME = "sessions.npz"
_READ_ROWS = 8192


def write_files(dataset: Dataset, folder: Path) -> dict[str, int]:
    """Writes training sessions with all their clicks, validation and test examples, as arrays of item indices.

    Args:
        dataset: The data set.
        folder: Folder to make.

    Returns:
        Examples of each split. SASRecModel predicts each click of a training session but the first.

    Raises:
        UserError: Only the last click of a training session is an example.
    """
    if "train" not in dataset.manifest.prefix_augmentation:
        raise UserError(
            f"{dataset.path} has no prefix augmentation, but RecTools trains on every click; "
            "prepare it with --prefix_augmentation train"
        )
    folder.mkdir(parents=True)
    sessions = [
        [*items, target]
        for part in dataset.parts("train")
        for items, target in zip(*pq.read_table(part, columns=["items", "target"]).to_pydict().values(), strict=True)
    ]
    valid, test = _examples(dataset, "valid"), _examples(dataset, "test")
    np.savez(
        folder / NAME,
        train_items_L=np.concatenate(sessions).astype(np.int64),
        train_offsets_U1=_offsets(sessions),
        valid_items_L=np.concatenate(valid),
        valid_offsets_B1=_offsets(valid),
        test_items_L=np.concatenate(test),
        test_offsets_B1=_offsets(test),
    )
    return {"train": sum(map(len, sessions)) - len(sessions), "valid": len(valid)}


def _examples(dataset: Dataset, split: str) -> list[Any]:
    """Clicks of each example of a split without its target."""
    reader = split_reader(dataset, split, _READ_ROWS, lambda raw: raw)
    return [
        session.numpy() for raw in reader.batches(0) for session in raw.items_L.split(raw.offsets_B1.diff().tolist())
    ]


def _offsets(sessions: list[Any]) -> Any:
    return np.cumsum([0, *map(len, sessions)])


def sasrec(settings: Settings, folder: Path) -> dict[str, Any]:
    """Settings file of the worker for SASRecModel."""
    model = {
        "n_factors": settings.dim,
        "n_blocks": settings.attention_layers,
        "n_heads": settings.attention_heads,
        "dropout_rate": settings.dropout,
        "session_max_len": settings.max_length,
        "batch_size": settings.batch_size,
        "loss": "softmax",
        "lr": settings.lr,
        "recommend_torch_device": "cpu",
    }
    return {
        "model": model,
        "ligr": False,
        "padding": settings.padding,
        "sessions": str(folder / NAME),
        "seed": settings.seed,
    }


def esasrec(settings: Settings, folder: Path) -> dict[str, Any]:
    """Settings file of the worker for eSASRec: SASRecModel with LiGR blocks and the sampled softmax.

    Padding is masked in the attention, as in the configurations of the paper (arXiv 2508.06450).
    """
    of_sasrec = sasrec(settings, folder)
    sampled = {"loss": "sampled_softmax", "n_negatives": settings.negatives, "use_key_padding_mask": True}
    return {**of_sasrec, "ligr": True, "model": {**of_sasrec["model"], **sampled}}
