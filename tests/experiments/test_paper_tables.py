"""Tables of an experiment for papers."""

import csv
import io

from llmgr_rec.experiments.experiment import Experiment
from llmgr_rec.experiments.paper_tables import csv_table, latex_table
from tests.experiments.test_tables import results_of

EXPERIMENT = Experiment("Words & graphs", "a", "quickstart", {}, ())


def results():
    found = results_of({"21+": (0.9, 10.0)})
    found["variants"]["a"]["hr@20"] = found["variants"]["a"]["hr@20"] | {"mean": 0.2}
    found["variants"]["c_1 ~ 5%"] = found["variants"]["b"] | {"hr@20": found["variants"]["b"]["hr@20"] | {"mean": 0.1}}
    return found


def test_the_csv_table_has_every_figure_once():
    rows = list(csv.DictReader(io.StringIO(csv_table(results()))))
    assert [(row["variant"], row["metric"]) for row in rows[:4]] == [
        ("a", "hr@20"),
        ("a", "ndcg@20"),
        ("a", "mrr@20"),
        ("b", "hr@20"),
    ]
    assert len(rows) == 9
    assert rows[3] == {
        "variant": "b",
        "metric": "hr@20",
        "mean": "0.25",
        "low": "0.24",
        "high": "0.27",
        "sd": "0.01",
        "seeds": "2",
        "against": "a",
        "gain": "0.1",
        "gain_low": "0.05",
        "gain_high": "0.2",
        "p": "0.004",
        "p_holm": "0.012",
        "training_minutes": "1.5",
    }
    assert {rows[0][key] for key in ("sd", "against", "gain", "gain_low", "gain_high", "p", "p_holm")} == {""}


def test_the_latex_table_marks_the_best_and_what_is_significant():
    lines = latex_table(EXPERIMENT, results()).splitlines()
    assert r"Variant & HR@20 & NDCG@20 & MRR@20 \\" in lines
    rows = {line.split(" & ")[0]: line.split(" & ")[1] for line in lines if line.count(" & ") == 3}
    assert rows["b"] == r"\textbf{0.2500}$^\dagger$ {\scriptsize$\pm$0.0150}"
    assert rows["a"] == r"\underline{0.2000} {\scriptsize$\pm$0.0150}"
    assert rows[r"c\_1 \textasciitilde{} 5\%"] == r"0.1000$^\dagger$ {\scriptsize$\pm$0.0150}"
    caption = next(line for line in lines if line.startswith(r"\caption"))
    assert r"Words \& graphs. 1,200 test sessions" in caption
    assert "differs from a with" in caption
    assert sum(line.count("{") - line.count("}") for line in lines) == 0
