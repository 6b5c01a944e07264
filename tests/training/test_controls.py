"""Training with something taken away or broken on purpose."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmgr_rec.config import Config, ControlsConfig
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.assembly import assemble_decoder, decoder_hash, item_tokens
from llmgr_rec.distributed.bundle import load_bundle
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.protocol import evaluate_model
from llmgr_rec.training import checks
from llmgr_rec.training.language import encode_catalogue
from tests.ranks import run_on_ranks
from tests.training.small_training import numbers, records, small_config, small_dataset, train

ONE_RANK = World.alone()
STEPS = 4


def broken(folder: Path, *controls: str) -> Config:
    config = small_config(folder / "prompts.yaml")
    config.sbr.max_steps = config.align.max_steps = config.behave.max_steps = STEPS
    for control in controls:
        setattr(config.controls, control, True)
    return config


def train_rank(world: World, folder: str, dataset: str) -> None:
    """Trains all stages with all controls at once."""
    run = Path(folder, f"run-{world.size}")
    if world.rank == 0:
        run.mkdir()
    config = broken(Path(folder), "random_llm", "shuffled_text", "no_graph", "no_nodes")
    train(world, config, run, Path(dataset))


@pytest.mark.dist
def test_two_ranks_train_as_one_and_the_bundle_ranks_as_it_was_validated(tmp_path: Path) -> None:
    dataset = small_dataset()
    broken(tmp_path)
    for ranks in (1, 2):
        run_on_ranks(train_rank, ranks, str(tmp_path), str(dataset))
    one, two = numbers(tmp_path / "run-1"), numbers(tmp_path / "run-2")
    assert one.keys() == two.keys()
    worst = max(one, key=lambda name: abs(one[name] - two[name]))
    assert two[worst] == pytest.approx(one[worst], abs=1e-5), worst
    # No contrast between tokens that say nothing.
    align = [record for (stage, _, split), record in records(tmp_path / "run-1").items() if stage == "align"]
    assert align
    assert not any("structure" in record for record in align)
    bundle = load_bundle(tmp_path / "run-2")
    found = evaluate_model(bundle.model, Dataset(dataset), "valid", bundle.config, ONE_RANK)
    said = records(tmp_path / "run-2")["behave", STEPS, "valid"]
    assert found["ndcg@20"] == pytest.approx(said["ndcg@20"], abs=1e-5)


def test_who_leaves_nothing_to_contrast_needs_no_second_session() -> None:
    config = Config()
    config.runtime.device, config.align.batch_size = "cpu", 1
    with pytest.raises(UserError, match=r"fewer than two sessions to contrast; give 2 or more"):
        checks._check_contrast(config)
    for control in ("no_graph", "no_nodes"):
        checks._check_contrast(replace(config, controls=ControlsConfig(**{control: True})))


def test_text_encodings_of_different_controls_lie_in_different_folders(tmp_path: Path) -> None:
    catalogue = Catalogue.load(small_dataset())
    found = {}
    for controls in ((), ("random_llm",), ("shuffled_text",), ("random_llm", "shuffled_text"), ("no_graph",)):
        config = broken(tmp_path, *controls)
        tokens = item_tokens(config, catalogue)
        decoder = assemble_decoder(config, ONE_RANK.device)
        encodings = encode_catalogue(decoder, tokens, ONE_RANK, tmp_path / "item_text", decoder_hash(config))
        found[controls] = encodings.read(range(catalogue.num_items), range(64))
    assert len(list((tmp_path / "item_text").iterdir())) == 4
    assert torch.equal(found["no_graph",], found[()])
    names = [(), ("random_llm",), ("shuffled_text",), ("random_llm", "shuffled_text")]
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            assert not torch.allclose(found[first], found[second], atol=1e-2), (first, second)
