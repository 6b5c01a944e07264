"""Data and settings of RecBole's side of the comparison: atomic files, and the configuration that its worker reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from benchmarks.session_settings import Settings
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.evaluation.protocol import split_reader

NAME = "sessions"
SPLITS = ("train", "valid")
_HEADER = "session_id:token\titem_id_list:token_seq\titem_id:token\n"
_READ_ROWS = 8192


def write_files(dataset: Dataset, folder: Path) -> dict[str, int]:
    """Writes training and validation examples as RecBole's atomic files, and the whole catalog beside them.

    They are the examples of llmgr_rec's own reader. Items are named by their index, and examples by their number.

    Args:
        dataset: The data set.
        folder: Folder to make, `FOLDER/sessions` holds the files.

    Returns:
        Examples of each split.
    """
    place = folder / NAME
    place.mkdir(parents=True)
    # Without this file RecBole would rank only the items that occur in examples.
    names = "".join(f"{item}\n" for item in range(dataset.manifest.num_items))
    (place / f"{NAME}.item").write_text("item_id:token\n" + names)
    counts = {}
    for split in SPLITS:
        with (place / f"{NAME}.{split}.inter").open("w") as file:
            file.write(_HEADER)
            reader = split_reader(dataset, split, _READ_ROWS, _writes(file))
            counts[split] = sum(reader.batches(0))
    return counts


def _writes(file: TextIO) -> Callable[[RawSessions], int]:
    def write(raw: RawSessions) -> int:
        items, ends = list(map(str, raw.items_L.tolist())), raw.offsets_B1.tolist()
        rows = zip(raw.rows_B.tolist(), ends[:-1], ends[1:], raw.targets_B.tolist(), strict=True)
        file.writelines(f"{row}\t{' '.join(items[start:end])}\t{target}\n" for row, start, end, target in rows)
        return raw.targets_B.numel()

    return write


def gcsan(settings: Settings, folder: Path) -> dict[str, Any]:
    """Settings file of the worker for GCSAN."""
    attention = {
        "hidden_size": settings.dim,
        "inner_size": 4 * settings.dim,
        "n_layers": settings.attention_layers,
        "n_heads": settings.attention_heads,
        "hidden_dropout_prob": settings.dropout,
        "attn_dropout_prob": settings.dropout,
        # The loss is the cross-entropy alone; its own default is 5e-5.
        "reg_weight": 0.0,
    }
    return _worker_settings("GCSAN", attention, settings, folder)


def srgnn(settings: Settings, folder: Path) -> dict[str, Any]:
    """Settings file of the worker for SRGNN, which has neither attention blocks nor dropout."""
    return _worker_settings("SRGNN", {}, settings, folder)


def _worker_settings(model: str, of_model: dict[str, Any], settings: Settings, folder: Path) -> dict[str, Any]:
    config = {
        **of_model,
        "step": settings.steps,
        "embedding_size": settings.dim,
        "loss_type": "CE",
        # Without negatives, as the softmax is over the whole catalog.
        "train_neg_sample_args": None,
        "learner": "adam",
        "learning_rate": settings.lr,
        "weight_decay": 0.0,
        "train_batch_size": settings.batch_size,
        "epochs": settings.rounds,
        "seed": settings.seed,
        "reproducibility": True,
        "use_gpu": False,
        **_data(folder, settings.max_length),
    }
    return {"model": model, "dataset": NAME, "config": config}


def _data(folder: Path, max_length: int) -> dict[str, Any]:
    return {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        # It requires three files; the test examples are not used.
        "benchmark_filename": [*SPLITS, SPLITS[-1]],
        "alias_of_item_id": ["item_id_list"],
        "USER_ID_FIELD": "session_id",
        "ITEM_ID_FIELD": "item_id",
        "load_col": {"inter": ["session_id", "item_id_list", "item_id"], "item": ["item_id"]},
        "MAX_ITEM_LIST_LENGTH": max_length,
        "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "group_by": "user", "order": "TO", "mode": "full"},
        "eval_batch_size": 1024,
        "show_progress": False,
    }
