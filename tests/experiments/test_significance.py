"""Paired tests and their correction for several comparisons."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmgr_rec.experiments.run_experiment import compare_metric
from llmgr_rec.experiments.significance import holm, paired_p_value


def test_holm_adjusts_like_the_example_of_r():
    # p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") in R.
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04, 0.001]) == pytest.approx([0.04, 0.002])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_adjusted_p_values_keep_the_order_and_are_between_those_of_no_and_of_bonferronis_correction(p_values):
    adjusted = holm(p_values)
    for value, other in zip(p_values, adjusted, strict=True):
        assert value <= other <= min(1.0, len(p_values) * value) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


def test_without_a_difference_few_of_many_comparisons_are_significant():
    rng = np.random.default_rng(0)
    values = rng.random((200, 2, 300))
    found = [paired_p_value(one_S, other_S) for one_S, other_S in values]
    assert 2 <= sum(p < 0.05 for p in found) <= 20
    assert paired_p_value(values[0, 0], values[0, 0]) == 1.0
    assert paired_p_value(values[0, 0] + 0.1, values[0, 0] + rng.normal(0, 0.01, 300)) < 1e-9


def test_all_comparisons_of_a_metric_are_corrected_together_and_only_these():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 60, 400)
    better = np.where(rng.random(400) < 0.1, 0, reference)
    ranks = {"reference": [reference], "same": [reference], "better": [better, reference], "best": [better]}
    found = compare_metric("hr@5", ranks, dict.fromkeys(ranks, "reference") | {"best": "better"})
    assert found["reference"]["p"] is found["reference"]["p_holm"] is None
    assert found["same"]["p"] == 1.0
    assert found["same"]["gain"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    expected = holm([found[name]["p"] for name in ("same", "better", "best")])
    assert [found[name]["p_holm"] for name in ("same", "better", "best")] == expected
    assert found["better"]["p"] < 0.01
    assert found["better"]["seeds"] == [float((better < 5).mean()), float((reference < 5).mean())]
    assert found["better"]["mean"] == pytest.approx(np.mean(found["better"]["seeds"]))
    assert found["better"]["sd"] > 0
    assert found["best"]["sd"] is None
    assert all(content["low"] < content["mean"] < content["high"] for content in found.values())
