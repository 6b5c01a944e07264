import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cross_encoder_fit
from benchmarks.best_lists import Lists, training_examples, training_sessions, validation_examples
from benchmarks.cross_encoder import added, gains, main, select
from llmgr_rec.config_file import save_config
from llmgr_rec.data.jagged import Jagged
from tests.explanation.explained import export
from tests.small_run import config, small_run


def lists(targets: list[int]) -> Lists:
    """Lists of 40 items with falling scores, the first session with the largest margin."""
    count = len(targets)
    scores_SD = torch.arange(40.0).flip(0).repeat(count, 1)
    scores_SD[0, 0] += 10
    ids_SD = torch.arange(40).repeat(count, 1)
    return Lists(Jagged(torch.arange(count), torch.arange(count + 1)), torch.tensor(targets), ids_SD, scores_SD)


def test_the_selection_takes_the_weight_and_the_threshold_that_rank_best() -> None:
    some = lists([0, 3, 4, 50]).top(20)
    assert some.hits.tolist() == [0, 1, 2]
    # Right for the uncertain sessions, and wrong for the first one.
    scores_SK = torch.zeros(4, 20)
    scores_SK[0, 1], scores_SK[1, 3], scores_SK[2, 4] = 100, 100, 100
    chosen = select(some, scores_SK)
    assert chosen["weight"] == 0.1
    assert chosen["threshold"] == 1.0
    assert chosen["ndcg@20"] == pytest.approx(0.75)
    ranks_S = some.target_ranks(added(some, scores_SK, chosen["weight"], chosen["threshold"]))
    assert ranks_S.tolist() == [0, 0, 0, 20]
    assert select(some, torch.zeros(4, 20))["weight"] == 0


def test_examples_have_the_target_first_and_other_items_of_its_twenty() -> None:
    some = lists([2, 32])
    _, items_SN, scores_SN = validation_examples(some, 8, np.random.default_rng(0))
    assert items_SN[:, 0].tolist() == [2, 32]
    assert all(len({item // 20 for item in row}) == 1 and len(set(row)) == 8 for row in items_SN.tolist())
    assert torch.equal(scores_SN, some.scores_SD.gather(1, items_SN))


def test_examples_of_training_sessions_have_targets_of_others_and_no_equal_ones() -> None:
    some = training_sessions(small_run().dataset)
    assert len(some) == small_run().dataset.manifest.num_examples["train"]
    clicks, items_SN, scores_SN = training_examples(some, 8, np.random.default_rng(0))
    assert clicks is some.clicks
    assert torch.equal(items_SN[:, 0], some.targets_S)
    assert set(items_SN.flatten().tolist()) <= set(some.targets_S.tolist())
    is_target_SN = items_SN == some.targets_S[:, None]
    assert torch.equal(scores_SN.isinf(), is_target_SN & (torch.arange(8) > 0))


def test_gains_at_ten_do_not_count_what_is_behind() -> None:
    ranks_S, other_S = np.array([0] * 20 + [15] * 20), np.array([0] * 20 + [20] * 20)
    found = gains(ranks_S, other_S)
    assert found["ndcg@10"] == [0, 0, 0]
    assert found["ndcg@20"] is not None
    assert found["ndcg@20"][0] > 0.2


@pytest.mark.parametrize("fit_on", ["training", "validation"])
def test_all_initial_weights_have_gains_and_a_second_call_computes_nothing(
    fit_on: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lightgbm", reason="the extra rerank is not installed")
    run, data = tmp_path / "run", small_run().dataset
    export(run / "export" / "sbr", config(), {"item_knn": 1e-3, "text_knn": 1e-3}, "sbr", data.manifest)
    save_config(config(), run / "config.yaml")
    words = ["--run", str(run), "--dataset", str(data.path), "--work", str(tmp_path / "work"), "--threads", "1"]
    words += ["--output", str(tmp_path / "o.json"), "--llm", "random-tiny", "--fit_on", fit_on]
    words += ["--layers", "1", "--epochs", "2", "--depth", "40"]
    main(words)
    first = json.loads((tmp_path / "o.json").read_text())["results"]
    assert set(first) == {"default", "pretrained", "random", "trees", "pretrained over random"}
    for initial in cross_encoder_fit.INITIAL_WEIGHTS:
        assert first[initial]["training"]["tokens_a_session"] > 8
        assert first[initial]["ranking"]["processor_ms_a_session"] > 0
        assert first[initial]["selected"]["gain"]["ndcg@20"][0] >= 0
    monkeypatch.delattr(cross_encoder_fit, "fit")
    monkeypatch.delattr(cross_encoder_fit, "scores_of")
    main(words)
    assert json.loads((tmp_path / "o.json").read_text())["results"] == first
    assert "pretrained: NDCG@20" in capsys.readouterr().out
