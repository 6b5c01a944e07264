"""Weights that are NaN or infinite are named and not exported."""

from pathlib import Path

import pytest
import torch

from llmgr_rec.errors import UserError
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_export import export_bundle
from tests.small_run import ONE_RANK, config, small_run


@pytest.mark.parametrize(
    ("part", "value"),
    [("item_id.weight", "nan"), ("item_id.weight", "-inf"), ("lora_B", "inf"), ("head.", "nan")],
)
def test_a_model_with_weights_that_are_not_finite_is_not_exported(tmp_path: Path, part: str, value: str) -> None:
    bundle = load_bundle(small_run().run / "export" / "behave")
    name, weight = next((name, weight) for name, weight in bundle.model.named_parameters() if part in name)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[-1] = float(value)
    export = tmp_path / "export" / "behave"
    with pytest.raises(UserError) as caught:
        export_bundle(bundle.model, "behave", config(), bundle.catalog, export, ONE_RANK, step=7)
    assert str(caught.value) == (
        f"stage behave: tensor {name} has values that are not finite after step 7, so nothing is exported; lower "
        "--behave.lr or --tables.lr and start again with another --output"
    )
    assert not list(tmp_path.rglob("*"))
    with torch.no_grad():
        weight.copy_(before)
