"""An explanation as one HTML page without scripts, links and other files."""

from html import escape
from string import Template

from llmgr_rec.explanation.explanation_text import PART_LABELS, percent, shown_name
from llmgr_rec.explanation.records import ExplainedItem, Explanation
from llmgr_rec.explanation.session_graph_svg import session_graph_svg

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Explanation of recommendations</title>
<style>
:root { color-scheme: light dark; --ink: #1d2730; --soft: #5b6773; --line: #dfe4e9; --paper: #fff; --bar: #1f6fb5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8edf2; --soft: #a3afba; --line: #35404a; --paper: #14191e;
  --bar: #6db3f2; } }
body { margin: 0; color: var(--ink); background: var(--paper); font: 16px/1.55 "Inter", "Segoe UI", "Helvetica Neue",
  Arial, "DejaVu Sans", sans-serif; }
main { max-width: 44rem; margin: 0 auto; padding: 2rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.4rem; border-top: 1px solid var(--line);
  padding-top: 1.2rem; }
.soft { color: var(--soft); font-size: .92rem; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th { text-align: left; font-weight: 500; } td { text-align: right; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .4rem; } td { white-space: nowrap; }
td.bar { width: 30%; } td.bar div { background: var(--bar); height: .7rem; border-radius: 2px; }
svg { width: 100%; height: auto; margin-top: .8rem; }
</style>
</head>
<body>
<main>
<h1>Explanation of recommendations</h1>
<ol>
$clicks
</ol>
<p class="soft">$note</p>
$items
</main>
</body>
</html>
""")


def explanation_page(explanation: Explanation) -> str:
    """The page.

    Args:
        explanation: The explanation.
    """
    clicks = "\n".join(
        f"<li>{escape(shown_name(click.item_id, click.title))}"
        f"{'' if click.state == 'used' else f' <span class=soft>({click.state})</span>'}</li>"
        for click in explanation.clicks
    )
    items = "\n".join(_item(explanation, number) for number in range(len(explanation.items)))
    return _PAGE.substitute(clicks=clicks, note=escape(explanation.note), items=items)


def _item(explanation: Explanation, number: int) -> str:
    item = explanation.items[number]
    rank = f"{item.rank}. " if item.rank else ""
    near = ", ".join(escape(shown_name(other.item_id, other.title)) for other in item.nearest)
    return (
        f"<section>\n<h2>{rank}{escape(shown_name(item.item_id, item.title))}</h2>\n<p>{escape(item.text)}</p>\n"
        f"{_parts(item)}\n{session_graph_svg(explanation, number) if explanation.nodes else ''}"
        f'<p class="soft">Nearest items: {near}</p>\n</section>'
    )


def _parts(item: ExplainedItem) -> str:
    rows = "\n".join(
        f"<tr><th>{escape(PART_LABELS.get(part.name, part.name))}</th><td>{part.value:+.2f}</td>"
        f'<td>{percent(part.share)}</td><td class="bar"><div style="width:{100 * part.share:.1f}%"></div></td></tr>'
        for part in item.parts
    )
    return f"<table>\n{rows}\n<tr><th>score</th><td>{item.score:+.2f}</td><td></td><td></td></tr>\n</table>"
