"""The report as one self-contained HTML page, without scripts, links or external resources."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from llmgr_rec.evaluation.examples import Example
from llmgr_rec.evaluation.results import COLUMNS, CUTOFFS, MODEL_NAMES, best_by_column, in_table_order

GENERATOR = "llmgr_rec.report"

_SHOWN_CLICKS = 8
_SHOWN_ITEMS = 10

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="$generator">
<title>$title</title>
<style>
:root { --ink: #1d2730; --soft: #5b6773; --line: #dfe4e9; --wash: #f5f7f9; --mark: #d2552d; --good: #2f7d4f; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 "Inter", "Segoe UI", "Helvetica Neue", Arial,
  "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 3.2rem 0 .6rem; letter-spacing: -0.005em; }
p { margin: .4rem 0 1rem; max-width: 46rem; }
.soft { color: var(--soft); font-size: .92rem; }
.facts { display: flex; flex-wrap: wrap; gap: .3rem 2.2rem; margin: 1.4rem 0 0; padding: 0; }
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .5rem .55rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; } thead th { color: var(--soft); font-size: .84rem; }
thead tr:first-child th { border-bottom: 1px solid var(--line); text-align: center; color: var(--ink); }
th[scope=row], thead th:first-child { text-align: left; }
tbody tr { border-top: 1px solid var(--line); } tbody tr.ours { background: #fdf4f0; }
td.group, th.group { padding-left: 1.4rem; }
td b { color: var(--ink); font-weight: 700; } td { color: #44505b; }
figure { margin: 1rem 0 0; } figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .3rem; }
.session { border: 1px solid var(--line); border-radius: 8px; margin: 1.1rem 0; overflow: hidden; break-inside: avoid; }
.session header { background: var(--wash); padding: .55rem 1rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem;
  justify-content: space-between; font-size: .92rem; overflow-wrap: anywhere; }
.session .columns { display: grid; grid-template-columns: 1fr 1fr; gap: 1.4rem; padding: .8rem 1rem 1rem; }
.session h3 { font-size: .84rem; color: var(--soft); font-weight: 600; margin: .2rem 0 .3rem; }
.session ol + h3 { margin-top: .9rem; }
.session .soft { margin: 0 0 .2rem; }
.session ol { margin: 0; padding-left: 1.7rem; font-size: .92rem; overflow-wrap: anywhere; }
.session li { padding: .1rem 0; } .session li::marker { color: var(--soft); font-variant-numeric: tabular-nums; }
.target { font-size: .92rem; margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.hit { background: #e4f3ea; border-radius: 4px; padding: .05rem .35rem; margin-left: -.35rem; font-weight: 600; }
.found { color: var(--good); font-weight: 600; } .missed { color: var(--soft); }
pre { background: var(--wash); border-radius: 8px; padding: 1rem; overflow-x: auto; font-size: .84rem;
  line-height: 1.45; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 44rem) { .session .columns { grid-template-columns: 1fr; } main { padding-top: 2rem; } }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


@dataclass
class ReportContent:
    """Content of the page.

    Args:
        title: Heading.
        headline: The conclusion, below the heading.
        facts: Names and values below the heading.
        models: Metrics by model; empty if the run has not been evaluated.
        split: Split on which they were computed.
        plots: Caption and PNG file of each plot, by section (quality, training).
        examples: Example sessions.
        examples_note: Model and selection of the example sessions.
        settings: Text of config.yaml.
    """

    title: str
    facts: Mapping[str, str]
    models: Mapping[str, Mapping[str, Any]]
    split: str
    plots: Mapping[str, Sequence[tuple[str, Path]]]
    examples: Sequence[Example] = field(default_factory=list)
    examples_note: str = ""
    settings: str = ""
    headline: str = ""


def render_page(content: ReportContent) -> str:
    """The page as HTML; all text from data and settings is escaped."""
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in content.facts.items()
    )
    body = [f'<h1>{escape(content.title)}</h1>\n<p>{escape(content.headline)}</p>\n<dl class="facts">{facts}</dl>']
    body.append(_quality(content))
    if content.plots.get("training"):
        body += ["<h2>Training</h2>", *(_figure(*plot) for plot in content.plots["training"])]
    if content.examples:
        body.append(f"<h2>Sessions</h2>\n<p>{escape(content.examples_note)}</p>")
        body += [_session(example) for example in content.examples]
    if content.settings:
        body.append(
            "<h2>Settings</h2>\n<details><summary>All settings of the run (config.yaml)</summary>"
            f"<pre>{escape(content.settings)}</pre></details>"
        )
    return _PAGE.substitute(generator=GENERATOR, title=escape(content.title), body="\n".join(body))


def _quality(content: ReportContent) -> str:
    if not content.models:
        return (
            "<h2>Ranking quality</h2>\n<p>The run has not been evaluated. To add its metrics, run "
            "<code>python -m llmgr_rec.evaluate</code> and create the report again.</p>"
        )
    figures = "".join(_figure(*plot) for plot in content.plots.get("quality", []))
    return (
        f"<h2>Ranking quality</h2>\n{_comparison(content)}\n{_table(content.models)}\n{_error_note(content)}\n{figures}"
    )


def _comparison(content: ReportContent) -> str:
    """Relative differences of LLMGR to the session recommender and to the best other model."""
    models = content.models
    others = {name: metrics for name, metrics in models.items() if name != "llmgr"}
    if "llmgr" not in models or not others:
        return ""
    ours = models["llmgr"]
    best_other = max(others, key=lambda name: others[name]["ndcg@20"])
    parts = [_gain(ours, others[name], name) for name in dict.fromkeys(["sbr", best_other]) if name in others]
    return f"<p>{' '.join(parts)}</p>"


def _gain(ours: Mapping[str, float], theirs: Mapping[str, float], name: str) -> str:
    changes = [
        f"{metric.upper()}@20 {ours[f'{metric}@20'] / theirs[f'{metric}@20'] - 1:+.1%}"
        for metric in ("hr", "ndcg", "mrr")
        if theirs[f"{metric}@20"]
    ]
    return f"LLMGR compared with {escape(MODEL_NAMES.get(name, name))}: {', '.join(changes)}." if changes else ""


def _table(models: Mapping[str, Mapping[str, Any]]) -> str:
    best = best_by_column(models)
    rows = []
    for name in in_table_order(models):
        cells = []
        for column in COLUMNS:
            value = round(models[name][column], 4)
            text = f"<b>{value:.4f}</b>" if value == best[column] else f"{value:.4f}"
            cells.append(f"<td{_group(column)}>{text}</td>")
        ours = ' class="ours"' if name == "llmgr" else ""
        rows.append(f'<tr{ours}><th scope="row">{escape(MODEL_NAMES.get(name, name))}</th>{"".join(cells)}</tr>')
    groups = "".join(f'<th colspan="{len(CUTOFFS)}">{name}</th>' for name in ("HR", "NDCG", "MRR"))
    cutoffs = "".join(f"<th{_group(column)}>@{column.split('@')[1]}</th>" for column in COLUMNS)
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{groups}</tr><tr><th>Model</th>{cutoffs}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _group(column: str) -> str:
    return ' class="group"' if column.endswith(f"@{CUTOFFS[0]}") else ""


def _error_note(content: ReportContent) -> str:
    top = max(content.models.values(), key=lambda metrics: metrics["hr@20"])
    rate, count = top["hr@20"], top["count"]
    error = (rate * (1 - rate) / count) ** 0.5 if count else 0.0
    return (
        f'<p class="soft">Best value of each column in bold. {count:,} {escape(content.split)} sessions; each '
        f"ranks the whole catalog, ties by lower item index. Standard error of the best HR@20: {error:.4f}. "
        "Differences below about twice that may be due to chance.</p>"
    )


def _figure(caption: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _session(example: Example) -> str:
    outcome = (
        f'<span class="found">next click at position {example.position}</span>'
        if example.position
        else f'<span class="missed">next click not in the top {len(example.recommended)}</span>'
    )
    earlier = len(example.clicks) - _SHOWN_CLICKS
    shown = example.clicks[-_SHOWN_CLICKS:]
    start = len(example.clicks) - len(shown) + 1
    before = f'<p class="soft">{earlier} earlier clicks</p>' if earlier > 0 else ""
    clicks = "".join(f"<li>{escape(title)}</li>" for title in shown)
    # A hit below the shown items is added to them.
    positions = [*range(1, min(_SHOWN_ITEMS, len(example.recommended)) + 1)]
    if example.position > _SHOWN_ITEMS:
        positions.append(example.position)
    items = "".join(_item(position, example) for position in positions)
    return (
        f'<article class="session"><header><span>Session {escape(example.session_id)}</span>{outcome}</header>'
        f'<div class="columns"><section><h3>Clicks, oldest first</h3>{before}<ol start="{start}">{clicks}</ol>'
        f'<h3>Next click</h3><p class="target">{escape(example.target)}</p></section>'
        f"<section><h3>Recommendations</h3><ol>{items}</ol></section></div></article>"
    )


def _item(position: int, example: Example) -> str:
    title = escape(example.recommended[position - 1])
    if position == example.position:
        title = f'<span class="hit">{title}</span>'
    return f'<li value="{position}">{title}</li>'
