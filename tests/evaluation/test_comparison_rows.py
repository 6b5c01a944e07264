"""Which rows of the table are of the run, whichever stages it has."""

from pathlib import Path

import pytest

from llmgr_rec.evaluation.comparison_rows import rows_of
from llmgr_rec.evaluation.evaluated import Evaluated
from llmgr_rec.evaluation.explanations import blend_in_words, chosen_in_words
from llmgr_rec.evaluation.reported_run import ReportedRun, labels_of
from tests.evaluation.test_headline import metrics


def evaluated(stages: dict[str, str], **changes: object) -> Evaluated:
    models = {name: metrics(0.1) for name in ("popularity", "item_knn", *stages)}
    return Evaluated(
        Path("m.json"), {"test": models, "count": 1000, "num_items": 500, "stages": stages, "split": "test", **changes}
    )


@pytest.mark.parametrize(
    ("stages", "result"),
    [
        ({"sbr": "sbr"}, "sbr"),
        ({"sbr": "sbr", "llm_text": "llm_text"}, "llm_text"),
        ({"sbr": "sbr", "llmgr": "align"}, "llmgr"),
        ({"llmgr": "behave"}, "llmgr"),
        ({}, None),
    ],
)
def test_the_row_of_the_last_stage_is_the_result(stages: dict[str, str], result: str | None) -> None:
    rows = rows_of([ReportedRun("run", Path("run"), [], [], set(), evaluated(stages))])
    # Without stages, as in version 0.2, models are known by their names.
    assert [row.model for row in rows] == ["popularity", "item_knn", *stages]
    assert [row.model for row in rows if row.is_result] == ([result] if result else [])
    assert {row.model for row in rows if row.run} == set(stages)
    assert all(row.gains for row in rows if result and row.model != result)


def test_the_parts_of_a_blend_are_in_words() -> None:
    assert blend_in_words(evaluated({"sbr": "sbr"}, blends={"sbr": {"item_knn": 2.0, "text_knn": 0.0}})) == [
        "GNN ranks by its own score plus 2 times that of item-kNN (items clicked in the same sessions), and does not "
        "use text-kNN (items that share words), because weight 0 was best. The weights were chosen on validation "
        "sessions by NDCG@20."
    ]
    assert blend_in_words(evaluated({})) == []


def test_a_validation_curve_says_what_stands_in_the_table() -> None:
    lines = [
        {"stage": "behave", "step": 10 * epoch, "split": "valid", "epoch": epoch, "hr@20": 0.2, "ndcg@20": ndcg}
        for epoch, ndcg in enumerate((0.1, 0.15, 0.12), start=1)
    ]
    lines.append({"stage": "behave", "step": 30, "split": "selection", "item_knn": 2.0, "ndcg@20": 0.17})
    kept = (
        "Epoch 2 of 3 was kept, the best by NDCG@20 (0.1500). The curve is the model alone; with the blend and "
        "smoothing selected afterwards it is 0.1700."
    )
    text = chosen_in_words("behave", lines, evaluated({"llmgr": "behave"}), "mine")
    assert text == f"{kept} In the table it is the row LLMGR, mine: HR@20 0.1000, NDCG@20 0.1000 on test sessions."
    assert chosen_in_words("behave", lines, None, "") == f"{kept} The table has no row for it."


def test_labels_name_as_many_folders_as_they_need() -> None:
    assert labels_of([Path("a/run")]) == ["run"]
    assert labels_of([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
