"""The sections of a report as HTML. All text from data and settings is escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape as escape_markup

from llmgr_rec.evaluation.comparison_rows import Row, common_cutoffs
from llmgr_rec.evaluation.examples import Example
from llmgr_rec.evaluation.explanations import BEYOND_ACCURACY_MEANINGS, METRIC_MEANINGS, MODEL_MEANINGS
from llmgr_rec.evaluation.headline import interval, signed
from llmgr_rec.evaluation.intervals import VALUES_P, K
from llmgr_rec.evaluation.metrics import LENGTH_BOUNDS, LENGTH_NAMES
from llmgr_rec.evaluation.page_shell import page
from llmgr_rec.evaluation.plots import Plot
from llmgr_rec.evaluation.results import BEYOND_ACCURACY, BEYOND_ACCURACY_NAMES, BY_DOMAIN, best_by_column, columns

_SHOWN_CLICKS = 8
_SHOWN_ITEMS = 10
# Longer titles are cut, so that the page stays small whatever the catalog has.
_LONGEST_TITLE = 160
_LONGEST_SETTINGS = 100_000
# Sessions that are open at first.
_OPEN = 2


@dataclass
class ReportContent:
    """Content of the page.

    Args:
        name: Name of the run, or of the runs.
        headline: The conclusion, the heading of the page.
        further: Further conclusions, below it.
        facts: Names and values; for several runs, the values of each.
        runs: Labels of the runs.
        rows: Rows of the table of results; empty if no run has been evaluated.
        notes: Sentences below the table.
        quality: Plots of ranking quality.
        training: Plots of the training, by label of the run.
        examples: Example sessions.
        examples_note: Model and selection of the example sessions.
        settings: Text of config.yaml by label of the run.
    """

    name: str
    headline: str
    further: Sequence[str] = ()
    facts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    runs: Sequence[str] = ()
    rows: Sequence[Row] = ()
    notes: Sequence[str] = ()
    quality: Sequence[Plot] = ()
    training: Mapping[str, Sequence[Plot]] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    examples_note: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


def escape(text: str) -> str:
    """Text as HTML, in which a number and its unit, and the ends of an interval, stay on one line."""
    return escape_markup(text).replace(" %", "&nbsp;%").replace(" ..", "&nbsp;..")


def render_page(content: ReportContent) -> str:
    """The page as HTML."""
    sections = [("quality", "Ranking quality", _quality(content))]
    if any(content.training.values()):
        sections.append(("training", "Training", _training(content)))
    if content.examples:
        sections.append(("sessions", "Sessions", _sessions(content)))
    if any(content.settings.values()):
        sections.append(("settings", "Settings", _settings(content)))
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    kicker = f"{'Runs' if len(content.runs) > 1 else 'Run'} {escape(content.name)}"
    further = "".join(f'<p class="lead">{escape(text)}</p>' for text in content.further)
    body = [
        f'<header><p class="kicker">{kicker}</p><h1>{escape(content.headline)}</h1>{further}'
        f'{_facts(content)}<nav aria-label="Sections">{links}</nav></header>'
    ]
    body += [
        f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>\n{text}</section>'
        for name, title, text in sections
    ]
    return page(content.name, "\n".join(body))


def _facts(content: ReportContent) -> str:
    """A list of what all runs have in common, then a table of what they do not."""
    shared = {name: values[0] for name, values in content.facts.items() if len(set(values)) == 1}
    rows = [[name, *values] for name, values in content.facts.items() if name not in shared]
    table = _table("What differs between the runs", ["", *content.runs], rows, "text") if rows else ""
    return _definitions(shared, "facts", grouped=True) + table


def _definitions(values: Mapping[str, str], style: str, grouped: bool = False) -> str:
    opening, closing = ("<div>", "</div>") if grouped else ("", "")
    items = "".join(
        f"{opening}<dt>{escape(name)}</dt><dd>{escape(value)}</dd>{closing}" for name, value in values.items()
    )
    return f'<dl class="{style}">{items}</dl>'


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """A table whose first column names its rows."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    kind = f' class="{style}"' if style else ""
    return _scroll(
        f"<table{kind}><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
        caption,
    )


def _scroll(table: str, name: str) -> str:
    """A table that scrolls by itself where it is wider than the screen, also by keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{table}</div>'


def _quality(content: ReportContent) -> str:
    if not content.rows:
        return (
            "<p>The run has not been evaluated. To add its metrics, run <code>python -m llmgr_rec.evaluate</code> and "
            "create the report again.</p>"
        )
    figures = "".join(map(_figure, content.quality))
    notes = "".join(f"<p>{escape(note)}</p>" for note in content.notes)
    return (
        f"{_results(content)}\n{_definitions(METRIC_MEANINGS, 'means')}\n{notes}\n"
        f'<div class="plots">{figures}</div>\n<h3>All cutoffs and models</h3>{_cutoffs(content.rows)}'
        f"{by_domain(content.rows)}{_beyond_accuracy(content.rows)}"
        f"<details><summary>What the models are</summary>{_models(content.rows)}</details>"
    )


def _results(content: ReportContent) -> str:
    """The table of results at 20, with intervals and the gains of the recommender."""
    best = {metric: max(round(row.metrics[metric], 4) for row in content.rows) for metric in VALUES_P}
    has_gains = any(gain for row in content.rows for gain in row.gains.values())
    head = "".join(f'<th scope="col">{metric.upper()}</th>' for metric in VALUES_P)
    if has_gains:
        head += f'<th scope="col">Gain in HR@{K}</th>'
    body = []
    for row in content.rows:
        cells = "".join(_value(row, metric, best[metric]) for metric in VALUES_P)
        if has_gains:
            gain = row.gains.get(f"hr@{K}")
            cells += (
                f'<td>{escape(signed(gain))}<span class="ends">{escape(interval(gain))}</span></td>'
                if gain
                else "<td></td>"
            )
        ours = ' class="ours"' if row.is_result else ""
        body.append(f'<tr{ours}><th scope="row">{escape(row.label)}{_tag(row, content)}</th>{cells}</tr>')
    first = content.rows[0].evaluated
    caption = (
        f"{first.count:,} {first.split} sessions rank {first.num_items:,} items. 95 % intervals below the values; the "
        "best value of a column in bold."
    )
    if has_gains:
        caption += " The last column has the gain of the recommender over each other model."
    table = (
        f'<table aria-describedby="about-results"><thead><tr><th scope="col">Model</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )
    return f'<p class="soft" id="about-results">{escape(caption)}</p>{_scroll(table, "Results")}'


def _tag(row: Row, content: ReportContent) -> str:
    if row.is_result:
        several = len(content.runs) > 1
        first = row is next(found for found in content.rows if found.is_result)
        text = "the recommender" if first else "other run"
        return f' <span class="tag">{text if several else "this run"}</span>'
    if row.run:
        return ' <span class="tag">earlier stage</span>'
    return ""


def _value(row: Row, metric: str, best: float) -> str:
    value = round(row.metrics[metric], 4)
    text = f"<b>{value:.4f}</b>" if value == best else f"{value:.4f}"
    ends = row.evaluated.interval(row.model, metric)
    below = f'<span class="ends">{ends[0]:.3f}&nbsp;.. {ends[1]:.3f}</span>' if ends else ""
    return f"<td>{text}{below}</td>"


def _cutoffs(rows: Sequence[Row]) -> str:
    cutoffs = common_cutoffs(rows)
    shown = columns(cutoffs)
    best = best_by_column({str(number): row.metrics for number, row in enumerate(rows)}, shown)
    body = []
    for row in rows:
        cells = []
        for column in shown:
            value = round(row.metrics[column], 4)
            cells.append(f"<td>{f'<b>{value:.4f}</b>' if value == best[column] else f'{value:.4f}'}</td>")
        ours = ' class="ours"' if row.is_result else ""
        body.append(f'<tr{ours}><th scope="row">{escape(row.label)}</th>{"".join(cells)}</tr>')
    groups = "".join(f'<th scope="colgroup" colspan="{len(cutoffs)}">{name}</th>' for name in ("HR", "NDCG", "MRR"))
    heads = "".join(f'<th scope="col">@{column.split("@")[1]}</th>' for column in shown)
    return _scroll(
        f'<table><thead><tr><td></td>{groups}</tr><tr><th scope="col">Model</th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>",
        "Results at all cutoffs",
    )


def by_domain(rows: Sequence[Row]) -> str:
    """A table of NDCG@20 by the domain of the session, with intervals; empty for a data set of one log.

    Args:
        rows: The evaluated models.
    """
    found = [(row.label, row.metrics[BY_DOMAIN]) for row in rows if BY_DOMAIN in row.metrics]
    if not found:
        return ""
    metric = f"ndcg@{K}"
    names = list(dict.fromkeys(name for _, domains in found for name in domains))
    cells = []
    for label, domains in found:
        ends = {name: one["intervals"][metric] for name, one in domains.items()}
        shown = [f"{domains[name][metric]:.4f} ({ends[name][0]:.3f} .. {ends[name][1]:.3f})" for name in names]
        cells.append([label, *shown])
    counts = next(domains for _, domains in found)
    heads = ["Model", *(f"{name}, {counts[name]['count']:,} sessions" for name in names)]
    return f"<h3>By domain</h3>{_table(f'{metric.upper()} and its 95 % interval', heads, cells)}"


def _beyond_accuracy(rows: Sequence[Row]) -> str:
    """What else is known of the first 20 items of the lists; empty for evaluations of earlier versions."""
    found = [(row, row.metrics[BEYOND_ACCURACY]) for row in rows if BEYOND_ACCURACY in row.metrics]
    shown = [name for name in BEYOND_ACCURACY_NAMES if any(values.get(name) is not None for _, values in found)]
    if not shown:
        return ""
    cells = [
        [row.label, *("" if values.get(name) is None else f"{values[name]:.4f}" for name in shown)]
        for row, values in found
    ]
    names = ["Model", *(BEYOND_ACCURACY_NAMES[name] for name in shown)]
    means = {BEYOND_ACCURACY_NAMES[name]: BEYOND_ACCURACY_MEANINGS[name] for name in shown}
    return f"<h3>Beyond accuracy</h3>{_table(f'The first {K} items of all lists', names, cells)}" + (
        f"<details><summary>What these are</summary>{_definitions(means, 'means')}</details>"
    )


def _models(rows: Sequence[Row]) -> str:
    means = {row.label: MODEL_MEANINGS[row.model] for row in rows if row.model in MODEL_MEANINGS}
    return _definitions(means, "means")


def _figure(plot: Plot) -> str:
    table = _table(plot.chart.title, plot.columns, plot.rows)
    return (
        f"<figure><figcaption>{escape(plot.caption)}</figcaption>{plot.chart.render()}"
        f"<details><summary>Figures</summary>{table}</details></figure>"
    )


def _training(content: ReportContent) -> str:
    parts = []
    for label, plots in content.training.items():
        if plots:
            heading = f"<h3>{escape(label)}</h3>" if len(content.runs) > 1 else ""
            parts.append(f'{heading}<div class="plots">{"".join(map(_figure, plots))}</div>')
    return "\n".join(parts)


def _sessions(content: ReportContent) -> str:
    bounds = [0, *LENGTH_BOUNDS, 10**9]
    lengths = "".join(
        f'<option value="{low + 1}-{high}">{name}</option>'
        for name, low, high in zip(LENGTH_NAMES, bounds, bounds[1:], strict=False)
    )
    form = (
        '<form class="filter" hidden role="search" aria-label="Filter sessions">'
        '<label>Title of a click or recommendation<input name="words" type="search" autocomplete="off"></label>'
        '<label>Next click<select name="outcome"><option value="">all</option><option value="1">in the list</option>'
        '<option value="0">not in the list</option></select></label>'
        f'<label>Clicks<select name="clicks"><option value="0-{10**9}">all</option>{lengths}</select></label></form>'
        '<p class="soft" id="shown" role="status"></p>'
    )
    sessions = "\n".join(_session(example, number < _OPEN) for number, example in enumerate(content.examples))
    return f"<p>{escape(content.examples_note)}</p>\n{form}\n{sessions}"


def _session(example: Example, is_open: bool) -> str:
    outcome = (
        f'<span class="found">next click at position {example.position}</span>'
        if example.position
        else f'<span class="what">next click not in the top {len(example.recommended)}</span>'
    )
    count = len(example.clicks)
    earlier = count - _SHOWN_CLICKS
    shown = example.clicks[-_SHOWN_CLICKS:]
    start = count - len(shown) + 1
    before = f'<p class="soft">{earlier} earlier clicks</p>' if earlier > 0 else ""
    clicks = "".join(f"<li>{_title(title)}</li>" for title in shown)
    # A hit below the shown items is added to them.
    positions = [*range(1, min(_SHOWN_ITEMS, len(example.recommended)) + 1)]
    if example.position > _SHOWN_ITEMS:
        positions.append(example.position)
    items = "".join(_item(position, example) for position in positions)
    return (
        f'<details class="session" data-hit="{int(example.position > 0)}" data-clicks="{count}"'
        f"{' open' if is_open else ''}><summary>Session {_title(example.session_id)} "
        f'<span class="what">· {count} click{"s" if count != 1 else ""} ·</span> {outcome}</summary>'
        f'<div class="columns"><div><h3>Clicks, oldest first</h3>{before}<ol start="{start}">{clicks}</ol>'
        f'<h3>Next click</h3><p class="target">{_title(example.target)}</p></div>'
        f"<div><h3>Recommendations</h3><ol>{items}</ol></div></div></details>"
    )


def _item(position: int, example: Example) -> str:
    title = _title(example.recommended[position - 1])
    if position == example.position:
        title = f'<span class="hit">{title}</span>'
    return f'<li value="{position}">{title}</li>'


def _title(title: str) -> str:
    return escape(title if len(title) <= _LONGEST_TITLE else f"{title[: _LONGEST_TITLE - 1]}…")


def _settings(content: ReportContent) -> str:
    parts = []
    for label, text in content.settings.items():
        whose = f" of {escape(label)}" if len(content.runs) > 1 else ""
        shown = text if len(text) <= _LONGEST_SETTINGS else f"{text[:_LONGEST_SETTINGS]}\n…"
        parts.append(
            f"<details><summary>All settings{whose} (config.yaml)</summary><pre>{escape_markup(shown)}</pre></details>"
        )
    return "\n".join(parts)
