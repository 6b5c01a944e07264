"""Small real training runs for the tests: a prepared synthetic data set, quick settings, stages run on given ranks."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datagen.synthetic import generate
from llmgr_rec.config import STAGES, Config, trained_stages
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.distributed.process_group import World
from llmgr_rec.stop_signals import StopSignals
from llmgr_rec.storage.bundle_index import is_complete
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.training.metrics_logger import MetricsLogger
from llmgr_rec.training.stages import RunContext, run_stage

PROMPTS = """\
behave: "Next? {nodes} {graph} ="
align: "Which? {text} {nodes} ="
structure_graph: "G {graph} ="
structure_nodes: "N {nodes} ="
"""
BATCH = 32
# Fields of a metrics line that tell of time and not of what was computed.
_TIMES = ("time", "examples_per_s", "data_wait", "memory_mb", "seconds_left")


def prepare(folder: Path, **synthetic: Any) -> Path:
    """Generates and prepares a data set."""
    generate(folder / "raw", **synthetic)
    prepare_dataset(
        PrepareSettings(
            interactions=str(folder / "raw" / "interactions.parquet"),
            items=str(folder / "raw" / "items.parquet"),
            output=str(folder / "dataset"),
            min_interactions=0,
            threads=1,
        )
    )
    return folder / "dataset"


@cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="llmgr-small-training-")


@cache
def small_dataset() -> Path:
    """371 training examples of 120 sessions over 64 items: 12 batches, the last of them short. Not to be written to."""
    return prepare(Path(_folder().name), sessions=120, items=64, mean_length=6)


def small_config(prompts: Path) -> Config:
    """Settings under which any two ways to compute the same should agree: no dropout, float32, nothing to select.

    They train the stages sbr, align and behave for an epoch each, behave with a prompt for each prefix.

    Args:
        prompts: Where a template file is written, if it is not there yet.
    """
    if not prompts.exists():
        prompts.write_text(PROMPTS)
    config = Config()
    config.tables.dim = 16
    config.tables.lr = 0.05
    config.tables.knn_smoothing = [0.0]
    config.encoder.dropout = 0.0
    config.llm.name_or_path = "random-tiny"
    config.llm.num_layers = 1
    config.llm.dtype = config.loss.dtype = "float32"
    config.llm.lora_rank = 2
    config.llm.lora_dropout = 0.0
    config.prompt.templates = str(prompts)
    config.prompt.max_nodes = 6
    config.prompt.max_text_tokens = 4
    config.prompt.one_pass = False
    config.head.separate_loss = False
    for stage in STAGES:
        config.stage(stage).epochs = 0 if stage == "llm_text" else 1
        config.stage(stage).batch_size = BATCH
    config.sbr.lr = 1e-3
    config.blend.neighbors = []
    config.runtime.device = "cpu"
    config.runtime.threads_per_rank = 1
    config.runtime.log_every = 1
    config.runtime.eval_batch_size = 64
    return config


def train(
    world: World,
    config: Config,
    run: Path,
    dataset: Path,
    resume: bool = False,
    signals: StopSignals | None = None,
) -> None:
    """Trains what is missing in a run folder, as `train_run` does, but in a process group that stands already."""
    metrics = MetricsLogger(run, enabled=world.rank == 0)
    context = RunContext(
        config=config,
        dataset=Dataset(dataset),
        catalog=Catalog.load(dataset),
        run=run,
        world=world,
        metrics=metrics,
        resume=resume,
        factory=ModelFactory(),
        text_embeddings=run / "text_embeddings",
        signals=signals or StopSignals(config.runtime.grace_s),
        stages=[stage for stage in trained_stages(config) if not is_complete(run / "export" / stage)],
    )
    for stage in context.stages:
        run_stage(stage, context)
    metrics.close()


def records(run: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """What metrics.jsonl says of each step (split "") and each validation (split "valid"), each at most once."""
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        key = (record.pop("stage"), record.pop("step"), record.pop("split", ""))
        assert key not in found, f"{key} is in metrics.jsonl twice"
        found[key] = {name: value for name, value in record.items() if name not in _TIMES}
    return found


def numbers(run: Path) -> dict[str, float]:
    """All numbers of metrics.jsonl by a name that tells where each belongs."""
    found = {}
    for (stage, step, split), record in records(run).items():
        for name, value in record.items():
            if isinstance(value, int | float):
                found["/".join(map(str, (stage, split or "train", step, name)))] = float(value)
    return found
