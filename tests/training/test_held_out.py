"""Training does not change the id rows of items that are held out of it."""

import pytest
import torch

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.training.preflight import RunRequest
from llmgr_rec.training.train_run import train_run
from tests.training.small_training import small_config, small_dataset


@pytest.mark.parametrize("full_softmax_max_items", [200_000, 0])
def test_no_step_moves_the_id_row_of_a_held_out_item(tmp_path, full_softmax_max_items):
    raw = small_dataset().parent / "raw"
    prepare_dataset(
        PrepareSettings(
            interactions=str(raw / "interactions.parquet"),
            items=str(raw / "items.parquet"),
            output=str(tmp_path / "dataset"),
            min_interactions=0,
            hold_out_items=0.2,
            threads=1,
        )
    )
    rows = {}
    for epochs in (0, 1):
        config = small_config(tmp_path / "prompts.yaml")
        config.loss.full_softmax_max_items = full_softmax_max_items
        config.loss.num_negatives = 256
        config.sbr.epochs, config.align.epochs, config.behave.epochs = epochs, 0, 0
        train_run(RunRequest(config, tmp_path / "dataset", tmp_path / str(epochs), "sbr", False))
        state = load_bundle(tmp_path / str(epochs) / "export" / "sbr").model.state_dict()
        (rows[epochs],) = [weight for name, weight in state.items() if name.endswith(".item_id.weight")]
    trained_V = Catalog.load(tmp_path / "dataset").train_count_V > 0
    assert 5 < (~trained_V).sum() < 25
    assert torch.equal((rows[0] != rows[1]).any(dim=1), trained_V)
