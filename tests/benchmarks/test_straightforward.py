"""The other side of the benchmarks computes the same: else a comparison of speeds would say nothing."""

import json

import pyarrow as pa
import pytest
import torch

from benchmarks import scoring, tuning, utilization
from benchmarks.straightforward import PlainAlignTask, PlainBehaveTask, StraightforwardLLMGR
from llmgr_rec.modules.param_groups import select_trainable
from llmgr_rec.modules.tasks import AlignTask, BehaveTask
from llmgr_rec.storage.pretrained import load_decoder
from tests.modules.small_llmgr import make_batch, make_llmgr
from tests.modules.test_llmgr import cache
from tests.training.small_training import small_dataset

TRAINED = ("adapter", "lora", "head")
ALIGN = {"contrastive_weight": 0.5, "contrastive_temperature": 0.1, "hard_negatives": 1}


@pytest.fixture
def models():
    fast = make_llmgr(with_text=True)
    cache(fast)
    plain = StraightforwardLLMGR.like(fast, load_decoder("random-tiny", dtype="float32"))
    for model in (fast, plain):
        select_trainable(model, TRAINED)
        model.train()
    return fast, plain


@pytest.mark.parametrize("stage", ["align", "behave"])
def test_both_sides_have_the_same_losses_and_gradients(models, stage):
    fast, plain = models
    if stage == "align":
        batches = [make_batch(text="random_node", candidates="none")]
        tasks = AlignTask(fast, **ALIGN), PlainAlignTask(plain, **ALIGN)
    else:
        batches = [make_batch(text="last_items", text_items=2, candidates="none")]
        tasks = BehaveTask(fast), PlainBehaveTask(plain)
    ours, theirs = (tuning.Trainer(task, model, batches) for task, model in zip(tasks, models, strict=True))
    found = tuning.agreement(ours, theirs, steps=3)
    assert found["loss"] < 1e-5
    assert found["gradient"] < 1e-4


def test_a_difference_is_seen(models):
    fast, plain = models
    with torch.no_grad():
        plain.hybrid.nodes.weight.mul_(1.5).add_(0.1)
    ours, theirs = (
        tuning.Trainer(task, model, [make_batch(candidates="none")])
        for task, model in ((BehaveTask(fast), fast), (PlainBehaveTask(plain), plain))
    )
    assert tuning.agreement(ours, theirs, steps=1)["gradient"] > 1e-2


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
    benchmark.main([*SMALL, "--dataset", str(small_dataset()), "--output", str(path), *words])
    return json.loads(path.read_text())["results"]


@pytest.mark.slow
def test_tuning_reports_ratio_and_agreement(tmp_path, capsys):
    results = run(tuning, tmp_path, "--agreement_steps", "2", "--plain_steps", "1")
    assert len(results) == 3
    for result in results.values():
        assert result["ratio"]["median"] > 0
        assert result["agreement"]["loss"] < 1e-4
        assert result["agreement"]["gradient"] < 1e-4
    assert "times the targets a second" in capsys.readouterr().out


@pytest.mark.slow
def test_utilization_reports_shares_of_the_peak(tmp_path):
    results = run(utilization, tmp_path)
    assert 0 < results["shares"]["training"]["median"] < 1
    assert 0 < results["shares"]["scoring"]["median"] < 1
    assert "aten::mm" in results["profiles"]["training"]


@pytest.mark.slow
def test_scoring_gives_the_answers_of_the_other_side(tmp_path):
    results = run(scoring, tmp_path, "--sessions", "50")
    assert results["agreement"]["lists"] == results["agreement"]["same_but_ties"] == 50
    assert results["agreement"]["score"] < 1e-5
