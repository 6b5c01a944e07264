"""Settings of the session-recommender benchmark, and the arguments of our side that they stand for."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from llmgr_rec.errors import UserError

# Multiple of the trained epochs that the cosine schedule spans: the rate then stays at its peak, as the peers' does.
_UNREACHED = 1000


@dataclass(frozen=True)
class Settings:
    """Settings that all sides share.

    Args:
        encoder: Name of our encoder.
        one_pass: Whether the peer trains on all prefixes of a session in one pass; `batch_size` then counts sessions.
        sampled: Whether the peer trains by a sampled softmax.
        padding: Whether RecTools computes scores at padding, which its loss ignores.
        prefixes: Mean number of prefixes of a session.
        initial_std: Standard deviation of the initial item vectors.
        max_length: Most clicks of a session.
        dim: Width of item and session vectors, in columns.
        batch_size: Examples of a step.
        steps: Message-passing steps (GC-SAN, SR-GNN).
        attention_layers: Self-attention blocks (GC-SAN, SASRec).
        attention_heads: Heads of each block.
        dropout: Probability of dropping an activation.
        score: Score of our side. That of the peers is dot, to which RecBole's GCSAN adds a layer norm, whose scale the
            paper's model, and ours, does not have.
        lr: Learning rate of Adam, for all parameters.
        negatives: Negatives of the sampled softmax.
        rounds: Epochs, or the most of them.
        seed: Seed of all sides.
        threads: CPU threads of each side.
    """

    encoder: str
    one_pass: bool
    sampled: bool
    padding: bool
    prefixes: float
    initial_std: float
    max_length: int
    dim: int
    batch_size: int
    steps: int
    attention_layers: int
    attention_heads: int
    dropout: float
    score: str
    lr: float
    negatives: int
    rounds: int
    seed: int
    threads: int

    @property
    def one_pass_is_exact(self) -> bool:
        """Whether our encoder gives the same vectors in one pass."""
        return self.encoder in ("sasrec", "esasrec") or self.steps == 1

    def same_words(self, loss_dtype: str = "float32", one_pass: bool = False, sampled: bool = False) -> list[str]:
        """Arguments of llmgr_rec that match the peer's settings.

        Args:
            loss_dtype: Number format of the query-item products in the loss; the peers' is float32.
            one_pass: Whether to encode all prefixes of a session in one pass, as the peer does if `one_pass` is set. A
                step has as many prefixes as before.
            sampled: Whether to train by the sampled softmax in place of the softmax over all items.
        """
        prefixes = round(self.batch_size * self.prefixes) if self.one_pass else self.batch_size
        same = {
            "tables.dim": self.dim,
            "encoder.name": self.encoder,
            "encoder.one_pass": str(one_pass or self.one_pass).lower(),
            "encoder.max_clicks": self.max_length,
            "encoder.steps": self.steps,
            "encoder.attention_layers": self.attention_layers,
            "encoder.attention_heads": self.attention_heads,
            "encoder.dropout": self.dropout,
            "encoder.score": self.score,
            "loss.dtype": loss_dtype,
            "sbr.batch_size": prefixes,
            "sbr.epochs": _UNREACHED * self.rounds,
            "sbr.patience": 0,
            "sbr.lr": self.lr,
            # The peers' models use item ids only.
            "tables.side_features": "[]",
            "tables.optimizer": "adam",
            "tables.lr": self.lr,
            "tables.init_std": self.initial_std,
            # Adam: AdamW without decay, unclipped, at a constant rate.
            "optimizer.weight_decay": 0.0,
            "optimizer.clip_norm": 1e9,
            "optimizer.warmup": 0.0,
            "optimizer.average": 0.0,
            # A full softmax is one up to more items than any catalog has.
            "loss.full_softmax_max_items": 0 if sampled or self.sampled else 1 << 31,
            "loss.num_negatives": self.negatives,
        }
        return _words({**same, **self._of_all()})

    def default_words(self) -> list[str]:
        """Arguments of llmgr_rec: the recipe `default`."""
        return _words(self._of_all())

    def _of_all(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "runtime.device": "cpu",
            "runtime.threads_per_rank": self.threads,
            # The peers write no checkpoint within the measured time.
            "runtime.checkpoint_minutes": 0,
            # What is chosen after training is not part of the comparison.
            "tables.knn_smoothing": "[0.0]",
            "blend.neighbors": "[]",
        }


def make_settings(args: Mapping[str, Any], **of_peer: Any) -> Settings:
    """Settings from parsed arguments.

    Args:
        args: Parsed arguments.
        **of_peer: Settings that are no arguments, and defaults of those that are None.

    Raises:
        UserError: A number is out of its range.
    """
    given = {name: value for name, value in args.items() if value is not None}
    values = {**of_peer, **given, "threads": args["threads"] or len(os.sched_getaffinity(0))}
    settings = Settings(**{field.name: values[field.name] for field in fields(Settings)})
    for name, value in asdict(settings).items():
        if isinstance(value, int) and name != "seed" and not isinstance(value, bool) and value < 1:
            raise UserError(f"--{name} is {value}; set it to 1 or more")
    return settings


def _words(settings: Mapping[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]
