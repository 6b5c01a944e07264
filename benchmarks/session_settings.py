"""Settings of the session-recommender benchmark, and the arguments of both sides that they stand for."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from benchmarks.recbole_files import NAME, SPLITS
from llmgr_rec.errors import UserError

Encoder = Literal["gcsan", "srgnn"]

_MODELS: dict[Encoder, str] = {"gcsan": "GCSAN", "srgnn": "SRGNN"}
# Multiple of the trained epochs that the cosine schedule spans: the rate then stays at its peak, as RecBole's does.
_UNREACHED = 1000


@dataclass(frozen=True)
class Settings:
    """Settings that both sides share.

    Args:
        encoder: Model.
        dim: Width of item and session vectors, in columns.
        batch_size: Examples of a step.
        steps: Message-passing steps.
        attention_layers: Self-attention blocks (GC-SAN).
        attention_heads: Heads of each block (GC-SAN).
        dropout: Probability of dropping an activation (GC-SAN; RecBole's SRGNN has none).
        score: Score of our side with RecBole's settings. RecBole's own is dot, to which GCSAN's layer norm gives a
            scale that the paper's model, and ours, does not have.
        lr: Learning rate of Adam, for all parameters.
        rounds: Epochs.
        seed: Seed of both sides.
        threads: CPU threads of each side.
    """

    encoder: Encoder
    dim: int
    batch_size: int
    steps: int
    attention_layers: int
    attention_heads: int
    dropout: float
    score: str
    lr: float
    rounds: int
    seed: int
    threads: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("encoder", "score", "seed", "dropout", "lr") and value < 1:
                raise UserError(f"--{name} is {value}; set it to 1 or more")

    @property
    def initial_std(self) -> float:
        """Standard deviation of RecBole's initial item vectors: normal in GCSAN, uniform in SRGNN."""
        return 0.02 if self.encoder == "gcsan" else (3 * self.dim) ** -0.5

    def default_words(self) -> list[str]:
        """Arguments of llmgr_rec: its defaults, at the same width, batch size and layers."""
        return _words(self._shared())

    def recbole_words(self, loss_dtype: str = "float32") -> list[str]:
        """Arguments of llmgr_rec that match RecBole's settings.

        Args:
            loss_dtype: Number format of the query-item products in the loss; RecBole's is float32.
        """
        own = {
            "encoder.dropout": self.dropout if self.encoder == "gcsan" else 0.0,
            "encoder.score": self.score,
            "loss.dtype": loss_dtype,
            # RecBole's models use item ids only.
            "tables.side_features": "[]",
            "tables.optimizer": "adam",
            "tables.lr": self.lr,
            "tables.init_std": self.initial_std,
            "sbr.lr": self.lr,
            # Adam: AdamW without decay, unclipped, at a constant rate.
            "optimizer.weight_decay": 0.0,
            "optimizer.clip_norm": 1e9,
            "optimizer.warmup": 0.0,
            "sbr.epochs": _UNREACHED * self.rounds,
        }
        return _words({**self._shared(), **own})

    def _shared(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "tables.dim": self.dim,
            "encoder.name": self.encoder,
            "encoder.steps": self.steps,
            "encoder.attention_layers": self.attention_layers,
            "encoder.attention_heads": self.attention_heads,
            "sbr.batch_size": self.batch_size,
            "sbr.epochs": self.rounds,
            "sbr.patience": 0,
            "runtime.device": "cpu",
            "runtime.threads_per_rank": self.threads,
            # RecBole writes none within the measured time.
            "runtime.checkpoint_every": _UNREACHED * _UNREACHED,
        }

    def recbole(self, folder: Path, max_length: int) -> dict[str, Any]:
        """Content of the settings file of RecBole's side.

        Args:
            folder: Folder of its files.
            max_length: Most items of a session.
        """
        config = {
            **self._recbole_model(),
            **_recbole_data(folder, max_length),
            "learner": "adam",
            "learning_rate": self.lr,
            "weight_decay": 0.0,
            "train_batch_size": self.batch_size,
            "epochs": self.rounds,
            "seed": self.seed,
            "reproducibility": True,
            "use_gpu": False,
        }
        return {"model": _MODELS[self.encoder], "dataset": NAME, "threads": self.threads, "config": config}

    def _recbole_model(self) -> dict[str, Any]:
        # Without negatives, as the softmax is over the whole catalog.
        both = {"step": self.steps, "loss_type": "CE", "train_neg_sample_args": None, "embedding_size": self.dim}
        if self.encoder == "srgnn":
            return both
        return {
            **both,
            "hidden_size": self.dim,
            "inner_size": 4 * self.dim,
            "n_layers": self.attention_layers,
            "n_heads": self.attention_heads,
            "hidden_dropout_prob": self.dropout,
            "attn_dropout_prob": self.dropout,
            # The loss is the cross-entropy alone; its own default is 5e-5.
            "reg_weight": 0.0,
        }


def make_settings(args: Mapping[str, Any]) -> Settings:
    """Settings from parsed arguments.

    Raises:
        UserError: A number is out of its range.
    """
    threads = args["threads"] or len(os.sched_getaffinity(0))
    return Settings(**{field.name: args[field.name] for field in fields(Settings)} | {"threads": threads})


def _words(settings: Mapping[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def _recbole_data(folder: Path, max_length: int) -> dict[str, Any]:
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
        "metrics": ["NDCG"],
        "topk": [20],
        "valid_metric": "NDCG@20",
        "metric_decimal_place": 8,
        "show_progress": False,
    }
