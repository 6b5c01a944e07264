"""The page: right figures, nothing unescaped, nothing from elsewhere."""

import re
from html.parser import HTMLParser

from llmgr_rec.evaluation.examples import Example, choose_examples
from llmgr_rec.evaluation.html import ReportContent, render_page
from llmgr_rec.evaluation.metrics import BUCKET_NAMES, BY_FREQUENCY
from llmgr_rec.evaluation.plots import plot_frequency, plot_losses, plot_validation
from llmgr_rec.evaluation.results import COLUMNS

EVIL = "<script>alert('$x')</script> & \"co\""


def metrics(value: float, count: int = 100) -> dict:
    buckets = {name: {"hr": value, "count": 20} for name in BUCKET_NAMES}
    return {**dict.fromkeys(COLUMNS, value), "count": count, BY_FREQUENCY: buckets}


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
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(**settings) -> str:
    content = {"title": EVIL, "facts": {EVIL: EVIL}, "models": {}, "split": "test", "plots": {}, "settings": EVIL}
    return render_page(ReportContent(**{**content, **settings}))


def test_all_text_is_escaped_and_all_tags_close():
    example = Example(EVIL, [EVIL] * 12, EVIL, [EVIL] * 20, 14)
    text = page(examples=[example], examples_note=EVIL, models={EVIL: metrics(0.1), "sbr": metrics(0.2)})
    assert "<script" not in text
    assert "alert(&#x27;$x&#x27;)" in text
    parsed = Page(text)
    assert parsed.open == []
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in parsed.tags)


def test_the_best_of_each_column_is_bold_and_gains_are_right():
    text = page(models={"sbr": metrics(0.1), "llmgr": metrics(0.12), "item_knn": {**metrics(0.08), "mrr@20": 0.3}})
    assert text.count("<b>0.1200</b>") == len(COLUMNS) - 1
    assert text.count("<b>0.3000</b>") == 1
    assert "LLMGR compared with GNN: HR@20 +20.0%, NDCG@20 +20.0%, MRR@20 +20.0%." in text
    assert "against Item-kNN" not in text
    assert "Standard error of the best HR@20: 0.0325" in text


def test_a_hit_below_the_shown_items_is_shown_with_its_rank():
    recommended = [f"thing {place}" for place in range(1, 21)]
    text = page(examples=[Example("s", ["a"] * 11, "thing 14", recommended, 14)])
    assert '<li value="14"><span class="hit">thing 14</span></li>' in text
    assert "thing 11" not in text
    assert "next click at position 14" in text
    assert "3 earlier clicks" in text
    assert '<ol start="4">' in text
    missed = page(examples=[Example("s", ["a"], "x", recommended, 0)])
    assert "not in the top 20" in missed
    assert 'class="hit"' not in missed


def test_plots_are_inside_the_page(tmp_path):
    records = [{"stage": "sbr", "step": step, "loss": 9.0 - step / 100} for step in range(1, 90)]
    records += [{"stage": "sbr", "step": 90, "split": "valid", "epoch": 1, "hr@20": 0.1, "ndcg@20": 0.05}]
    files = [tmp_path / f"{name}.png" for name in ("a", "b", "c")]
    assert plot_losses(records, files[0])
    assert plot_validation(records, files[1])
    assert plot_frequency({"sbr": metrics(0.1)}, files[2])
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    text = page(models={"sbr": metrics(0.1)}, plots={"quality": [("x", files[2])], "training": [("y", files[0])]})
    sources = re.findall(r'src="([^"]*)', text)
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://", text)


def test_nothing_to_plot_writes_nothing(tmp_path):
    assert not plot_losses([], tmp_path / "a.png")
    assert not plot_validation([{"stage": "sbr", "step": 1, "loss": 2.0}], tmp_path / "a.png")
    assert not plot_frequency({}, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_examples_are_the_first_hits_and_the_first_misses():
    places = [0, 0, 3, 0, 1, 2, 0]
    examples = (Example(str(number), ["a"], "t", ["t"], place) for number, place in enumerate(places))
    chosen = choose_examples(examples, hits=2, misses=2)
    assert [example.session_id for example in chosen] == ["2", "4", "0", "1"]
