"""The page: right figures, nothing unescaped, nothing from elsewhere, and what assistive technology needs."""

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmgr_rec.evaluation.comparison_rows import Row
from llmgr_rec.evaluation.evaluated import Evaluated
from llmgr_rec.evaluation.examples import Example, choose_examples
from llmgr_rec.evaluation.html import ReportContent, render_page
from llmgr_rec.evaluation.intervals import Gain
from llmgr_rec.evaluation.metrics import BUCKET_NAMES, BY_FREQUENCY, BY_LENGTH
from llmgr_rec.evaluation.plots import (
    by_stage,
    plot_buckets,
    plot_gains,
    plot_losses,
    plot_validation,
)
from llmgr_rec.evaluation.results import COLUMNS

EVIL = "<script>alert('$x')</script> & \"co\""
VOID = {"meta", "input", "br"}


def metrics(value: float, count: int = 100) -> dict:
    buckets = {name: {"hr": value, "count": count // 5} for name in BUCKET_NAMES}
    return {**dict.fromkeys(COLUMNS, value), "count": count, BY_FREQUENCY: buckets}


def rows(models: dict[str, dict], gain: Gain | None = None) -> list[Row]:
    evaluated = Evaluated(Path("m.json"), {"test": models, "count": 100, "num_items": 999, "stages": {"sbr": "sbr"}})
    gains = {"hr@20": gain} if gain else {}
    return [
        Row(name, name, "run" if name == "sbr" else "", values, evaluated, name == "sbr", gains)
        for name, values in models.items()
    ]


class Page(HTMLParser):
    """Collects tags and checks that they close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(**settings) -> str:
    content = {
        "name": EVIL,
        "headline": EVIL,
        "further": [EVIL],
        "facts": {EVIL: [EVIL]},
        "runs": [EVIL],
        "notes": [EVIL],
        "settings": {EVIL: EVIL},
    }
    return render_page(ReportContent(**{**content, **settings}))


def plots_of(name: str) -> list:
    lines = [{"stage": name, "step": step, "loss": 9.0 - step / 100} for step in range(1, 90)]
    valid = [{"stage": name, "epoch": 1, "hr@20": 0.1, "ndcg@20": 0.05}]
    values = {**metrics(0.2), BY_LENGTH: {"1": {"hr": 0.5, "count": 50}, "2": {"hr": None, "count": 0}}}
    return [
        *plot_losses(lines),
        plot_validation(name, valid, name),
        plot_buckets({name: ("c-sbr", values), "b": ("c-other", values)}, BY_FREQUENCY),
        plot_buckets({name: ("c-sbr", values)}, BY_LENGTH),
        plot_gains({name: {"hr@20": Gain(0.1, -0.1, 0.2), "ndcg@20": None}, "far": {"hr@20": Gain(9, 8, 10)}}),
    ]


def test_all_text_is_escaped_and_only_the_scripts_of_the_page_run():
    example = Example(EVIL, [EVIL] * 12, EVIL, [EVIL] * 20, 14)
    plots = plots_of(EVIL)
    models = {EVIL: metrics(0.1), "sbr": metrics(0.2)}
    two = {"runs": [EVIL, "b"], "facts": {EVIL: [EVIL, EVIL]}}
    for more in ({}, two):
        text = page(
            examples=[example], examples_note=EVIL, rows=rows(models), quality=plots, training={EVIL: plots}, **more
        )
        assert text.count("<script") == 1
        assert "alert(&#x27;$x&#x27;)" in text
        parsed = Page(text)
        assert parsed.open == []
        assert {"link", "iframe", "img", "object"}.isdisjoint(tag for tag, _ in parsed.tags)
        assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
        (policy,) = [meta["content"] for meta in parsed.of("meta") if "http-equiv" in meta]
        assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert all("<script" not in plot.chart.render() for plot in plots)


def test_tables_and_charts_have_names_for_assistive_technology():
    plots = plots_of("sbr")
    content = {"quality": plots[2:], "training": {"a": plots[:2]}, "examples": [Example("s", ["a"], "b", ["b"], 1)]}
    parsed = Page(page(rows=rows({"sbr": metrics(0.2)}), **content))
    assert all(head.get("scope") in {"col", "row", "colgroup"} for head in parsed.of("th"))
    assert len(parsed.of("svg")) == len(plots)
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in parsed.of("svg"))
    headings = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))
    assert headings.count(1) == 1
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_best_of_each_column_is_bold_and_the_run_is_marked():
    models = {"item_knn": {**metrics(0.08), "mrr@20": 0.3}, "sbr": metrics(0.12)}
    text = page(rows=rows(models, Gain(0.5, 0.25, 0.75)))
    assert text.count("<b>0.1200</b>") == len(COLUMNS) - 1 + 2
    assert text.count("<b>0.3000</b>") == 2
    assert '<th scope="row">sbr <span class="tag">this run</span></th>' in text
    assert '+50&nbsp;%<span class="ends">[25&nbsp;.. 75]</span>' in text
    assert '<span class="ends">0.070&nbsp;.. 0.198</span>' in text


def test_a_hit_below_the_shown_items_is_shown_with_its_rank():
    recommended = [f"thing {place}" for place in range(1, 21)]
    text = page(examples=[Example("s", ["a"] * 11, "thing 14", recommended, 14)])
    assert '<li value="14"><span class="hit">thing 14</span></li>' in text
    assert "thing 11" not in text
    assert "next click at position 14" in text
    assert "3 earlier clicks" in text
    assert '<ol start="4">' in text
    assert 'data-hit="1" data-clicks="11"' in text
    missed = page(examples=[Example("s", ["a"], "x", recommended, 0)])
    assert "not in the top 20" in missed
    assert 'class="hit"' not in missed


def test_long_titles_and_many_sessions_keep_the_page_small():
    examples = [Example(str(number), ["t" * 9999] * 50, "t" * 9999, ["t" * 9999] * 20, 0) for number in range(100)]
    assert len(page(examples=examples)) < 500_000
    lines = [{"stage": "sbr", "step": step, "loss": 5.0} for step in range(100_000)]
    assert sum(len(plot.chart.render()) for plot in plot_losses(lines)) < 20_000


def test_plots_have_their_figures_in_a_table():
    loss, validation, popularity, length, gains = plots_of("sbr")
    assert loss.rows[0] == ["1", "8.9900"]
    assert validation.rows == [["1", "0.1000", "0.0500"]]
    assert popularity.rows[0] == ["0", "20", "20.0 % [8.1 .. 41.6]", "20.0 % [8.1 .. 41.6]"]
    assert length.rows == [["1", "50", "50.0 % [36.6 .. 63.4]"]]
    assert gains.rows == [["sbr", "+10 % [-10 .. 20]"], ["far", "+900 % [800 .. 1000]"]]
    assert "over far" in gains.caption
    assert "far" not in gains.chart.y.labels


def test_nothing_to_plot_gives_nothing():
    assert plot_losses([]) == []
    assert plot_gains({"a": {"hr@20": None}, "b": {}}) is None
    assert plot_buckets({}, BY_LENGTH) is None
    assert plot_buckets({"sbr": ("c-sbr", metrics(0.1))}, BY_LENGTH) is None
    assert by_stage([]) == {}


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-1e-9, 1e9], [3.2, 3.3]])
def test_charts_take_any_values(values):
    lines = [{"stage": "sbr", "step": step, "loss": value} for step, value in enumerate(values)]
    for plot in plot_losses(lines):
        places = re.findall(r"points=\"([^\"]*)\"", plot.chart.render())
        assert all(-1 <= float(number) <= 421 for place in places for number in re.split("[ ,]", place))


def test_examples_are_the_first_hits_and_the_first_misses():
    places = [0, 0, 3, 0, 1, 2, 0]
    examples = (Example(str(number), ["a"], "t", ["t"], place) for number, place in enumerate(places))
    chosen = choose_examples(examples, hits=2, misses=2)
    assert [example.session_id for example in chosen] == ["2", "4", "0", "1"]


def test_facts_of_one_run_are_a_list_and_of_several_a_table():
    assert "<dt>Seed</dt><dd>3</dd>" in page(facts={"Seed": ["3"]})
    text = page(runs=["a", "b"], facts={"Seed": ["3", "4"], "Recipe": ["llm", "llm"]})
    assert '<tr><th scope="row">Seed</th><td>3</td><td>4</td></tr>' in text
    assert "<dt>Recipe</dt><dd>llm</dd>" in text
