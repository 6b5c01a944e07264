"""The picture of the session graph: well-formed whatever titles hold, without other hosts, on light and dark pages."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.explanation.records import Click, ClickShare, Edge, ExplainedItem, Explanation, NearItem, Node, Part

SVG = "{http://www.w3.org/2000/svg}"
TITLES = ['<script>alert("1")</script> & more', "a\x00b\u202ec", "x" * 300, None]


def explanation() -> Explanation:
    clicks = [Click(place, f"i{place}", title, "used") for place, title in enumerate(TITLES, start=1)]
    nodes = [Node(click.item_id, click.title, [click.position]) for click in clicks]
    edges = [Edge(0, 1, 2), Edge(1, 0, 1), Edge(1, 3, 1), Edge(3, 3, 1), Edge(3, 2, 1)]
    values = [0.5, -2.0, None, 0.0]
    shares = [ClickShare(c.position, c.item_id, c.title, v, v) for c, v in zip(clicks, values, strict=True)]
    near = [NearItem("i9", TITLES[0], 0.5)]
    item = ExplainedItem(
        "<i>", TITLES[0], 1, 1.5, False, False, 3, None, [Part("encoder", 1.5, 1.0)], shares, near, "t"
    )
    return Explanation("sbr", False, clicks, nodes, edges, [item])


def test_nodes_edges_and_values_are_drawn() -> None:
    root = ElementTree.fromstring(explanation().to_svg())
    assert root.tag == f"{SVG}svg"
    groups = root.findall(f"{SVG}g")
    assert len(groups) == len(TITLES)
    assert len(root.findall(f"{SVG}path")) == 5
    values = [text.text or "" for group in groups for text in group.findall(f"{SVG}text")[1:]]
    assert values == ["+0.50", "-2.00", "", "0.00"]
    colors = [[circle.get("class") for circle in group.findall(f"{SVG}circle")[1:]] for group in groups]
    assert colors == [["up"], ["down"], [], []]
    assert "2x" in [text.text for text in root.findall(f"{SVG}text")]
    assert max(len(text.text or "") for text in root.iter(f"{SVG}text")) < 80


@pytest.mark.parametrize("form", ["to_svg", "to_html", "to_text", "to_json"])
def test_titles_do_no_harm(form: str) -> None:
    content = getattr(explanation(), form)()
    assert "\x00" not in content
    if form in ("to_svg", "to_html"):
        assert "<script" not in content
        assert not re.search(r'(?:src|href|url)\s*[=(]\s*["\']?(?!#)', content), "something is fetched"
        assert "prefers-color-scheme: dark" in content
    content.encode()


def test_a_fallback_has_a_picture() -> None:
    nothing = replace(explanation(), fallback=True, nodes=[], edges=[])
    assert "no click on a known item" in nothing.to_svg()
    assert "<svg" not in nothing.to_html()


def test_an_unknown_item_has_no_picture() -> None:
    for number in (1, -1, "i0"):
        with pytest.raises(UserError, match="give the number of an explained item, 0 to 0, and not its id"):
            explanation().to_svg(number)  # type: ignore[arg-type]
