"""The straightforward implementation computes the same as LLMGR, so that their speeds can be compared."""

import json

import pyarrow as pa
import pytest
import torch

from benchmarks import scoring, tuning, utilization
from benchmarks.language_setup import Setup, make_config
from benchmarks.operator_kinds import ATTENTION, FROZEN, KINDS, LORA, LOSS, operator_costs
from benchmarks.tuning import Comparison, Trainer
from tests.small_run import small_run


def make_setup(separate_loss=True):
    settings = make_config("random-tiny", num_layers=2, templates="default", dtype="float32", batch_size=8)
    settings.tables.dim = 16
    settings.prompt.text_items = 2
    settings.contrast.weight = 0.5
    settings.head.separate_loss = separate_loss
    return Setup.make(settings, small_run().dataset)


def trainers(setup, stage):
    batches = setup.batches(stage, 2)
    ours, plain = Comparison("test", stage).tasks(setup)
    return Trainer(ours, setup.fast, batches), Trainer(plain, setup.plain, batches)


@pytest.mark.parametrize("separate_loss", [True, False])
@pytest.mark.parametrize("stage", ["align", "behave"])
def test_both_sides_have_the_same_losses_and_gradients(stage, separate_loss):
    found = tuning.agreement(*trainers(make_setup(separate_loss), stage), steps=3)
    assert found["loss"] < 1e-5
    assert found["gradient"] < 1e-4


def test_a_difference_is_detected():
    setup = make_setup()
    with torch.no_grad():
        setup.plain.adapter.nodes.weight.add_(0.5)
    assert tuning.agreement(*trainers(setup, "behave"), steps=1)["gradient"] > 1e-2


def table(lists, scores):
    names = [str(number) for number in range(len(lists))]
    return pa.table({"session_id": names, "item_ids": lists, "scores": scores})


def test_outputs_are_compared_list_by_list():
    plain = table([["a", "b"], ["c", "d"], ["e", "f"]], [[2.0, 1.0], [2.0, 2.0 - 1e-6], [2.0, 1.0]])
    ours = table([["a", "b"], ["d", "c"], ["f", "e"]], [[2.0, 1.0], [2.0, 2.0 - 1e-6], [2.0, 1.5]])
    assert scoring.compare(ours, plain) == {"score": 0.25, "lists": 3, "same_lists": 1, "same_but_ties": 2}
    with pytest.raises(ValueError, match="different sessions"):
        scoring.compare(ours.slice(1), plain)


SMALL = ["--llm", "random-tiny", "--num_layers", "2", "--batch_size", "8", "--rounds", "1", "--threads", "1"]


def run(benchmark, tmp_path, *words):
    path = tmp_path / "report.json"
    benchmark.main([*SMALL, "--dataset", str(small_run().dataset.path), "--output", str(path), *words])
    return json.loads(path.read_text())["results"]


@pytest.mark.slow
def test_tuning_reports_ratio_and_agreement(tmp_path, capsys):
    results = run(tuning, tmp_path, "--agreement_steps", "2", "--plain_steps", "1")
    assert len(results) == 3
    for result in results.values():
        assert result["ratio"]["median"] > 0
        assert result["agreement"]["loss"] < 1e-4
        assert result["agreement"]["gradient"] < 1e-4
    assert "times the targets per second" in capsys.readouterr().out


@pytest.mark.slow
def test_utilization_reports_shares_of_the_peak_and_gains(tmp_path, capsys):
    results = run(utilization, tmp_path, "--batches", "1")
    for name in ("training", "scoring"):
        assert results["gain"][name]["median"] > 0
        for dtype in utilization.FORMATS:
            found = results[dtype][name]
            assert 0 < found["share"]["median"] < 1
            assert found["operators_ms"]["mm"] > 0
            # The tiny model's frozen layers are hardly wider than LoRA's rank, and count among its products.
            assert found["ms"][ATTENTION] > 0
            assert found["gflops"][ATTENTION] > 0
    assert "training: bfloat16" in capsys.readouterr().out


def test_operators_are_counted_by_kind():
    setup = make_setup()
    trainer, _ = trainers(setup, "behave")
    found, by_name = operator_costs(lambda: trainer.step(), 1.0, 3 * setup.config.llm.lora_rank, 10**9)
    assert by_name["mm"] > 0
    assert all(found[kind].seconds > 0 for kind in KINDS if kind not in (FROZEN, LOSS))
    # The tiny model's hidden width is smaller than three times the rank.
    assert found[LORA].flops > 0
    assert sum(cost.seconds for cost in found.values()) == pytest.approx(1.0)


@pytest.mark.slow
def test_scoring_gives_the_lists_of_the_straightforward_implementation(tmp_path):
    results = run(scoring, tmp_path, "--sessions", "50")
    assert results["agreement"]["lists"] == results["agreement"]["same_but_ties"] == 50
    assert results["agreement"]["score"] < 1e-5
