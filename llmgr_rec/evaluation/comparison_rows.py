"""The rows of a report's table: baselines and the models of all runs, with the gains of the recommender over each.

The recommender is the model of the last stage of the first run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.evaluated import Evaluated, Metrics
from llmgr_rec.evaluation.intervals import Gain, count_pairs, paired_gains, unpaired_gain
from llmgr_rec.evaluation.reported_run import ReportedRun
from llmgr_rec.evaluation.results import MODEL_NAMES
from llmgr_rec.evaluation.session_ranks import read_ranks

_HR = "hr@20"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        label: Name of the model and, of several runs, of its run.
        model: Key of the model.
        run: Label of its run; empty for a baseline.
        metrics: Its metrics.
        evaluated: The evaluation that they are of.
        is_result: Whether it is the model of the last stage of its run.
        gains: Gains of the recommender over it by metric; empty for the recommender itself, and where they are not
            known.
        is_paired: Whether these have paired intervals.
    """

    label: str
    model: str
    run: str
    metrics: Metrics
    evaluated: Evaluated
    is_result: bool
    gains: Mapping[str, Gain | None]
    is_paired: bool = True


def common_cutoffs(rows: Sequence[Row]) -> list[int]:
    """Cutoffs that the evaluations of all rows have, in ascending order."""
    return sorted(set.intersection(*(set(row.evaluated.cutoffs) for row in rows)))


def rows_of(runs: Sequence[ReportedRun]) -> list[Row]:
    """The rows of all evaluated runs, baselines first.

    Args:
        runs: Runs that were evaluated on the same sessions.
    """
    found = [(run, run.evaluated) for run in runs if run.evaluated]
    if not found:
        return []
    first = found[0][1]
    rows = [_row(name, "", first, first, len(runs) > 1) for name in first.baselines]
    for run, evaluated in found:
        rows += [_row(name, run.label, evaluated, first, len(runs) > 1) for name in evaluated.trained]
    return rows


def _row(model: str, run: str, evaluated: Evaluated, first: Evaluated, several: bool) -> Row:
    name = MODEL_NAMES.get(model, model)
    gains, is_paired = _gains(first, evaluated, model)
    return Row(
        label=f"{name}, {run}" if run and several else name,
        model=model,
        run=run,
        metrics=evaluated.models[model],
        evaluated=evaluated,
        is_result=model == evaluated.recommender,
        gains=gains,
        is_paired=is_paired,
    )


def _gains(first: Evaluated, other: Evaluated, model: str) -> tuple[Mapping[str, Gain | None], bool]:
    """Gains of the recommender of the first run over a model of any run, and whether their intervals are paired."""
    recommender = first.recommender
    if recommender is None or (first is other and model == recommender):
        return {}, True
    if first is other:
        return first.gains(recommender, model), first.is_paired
    mine_S = read_ranks(first.file, first.content, recommender)
    theirs_S = read_ranks(other.file, other.content, model)
    if mine_S is not None and theirs_S is not None and first.sessions == other.sessions:
        return paired_gains(count_pairs(mine_S, theirs_S)), True
    return {_HR: unpaired_gain(first.hit_rate(recommender), other.hit_rate(model), first.count)}, False


def check_comparable(runs: Sequence[ReportedRun]) -> None:
    """Checks that the runs were evaluated on the same sessions.

    Args:
        runs: The runs.

    Raises:
        UserError: The sessions or the items of two runs differ.
    """
    found = [(run, run.evaluated) for run in runs if run.evaluated]
    for run, other in found[1:]:
        run_1, first = found[0]
        what = ""
        if first.split != other.split:
            what = f"on other splits ({first.split}, {other.split})"
        elif first.content.get("dataset") != other.content.get("dataset") or first.num_items != other.num_items:
            what = f"on data sets with other items ({first.num_items:,}, {other.num_items:,})"
        elif first.count != other.count or (first.sessions and other.sessions and first.sessions != other.sessions):
            what = f"on other {first.split} sessions ({first.count:,}, {other.count:,})"
        if what:
            raise UserError(
                f"{run_1.label} and {run.label} were evaluated {what}, so their figures cannot be compared; evaluate "
                "both on one data set, or write a report of each"
            )


def notes_on(rows: Sequence[Row]) -> list[str]:
    """What limits the comparison: intervals that are not paired, and different rules.

    Args:
        rows: Rows of the table.
    """
    notes = []
    if any(not row.is_paired for row in rows):
        notes.append(
            "Target ranks of single sessions are missing for some rows, so only HR@20 has an interval, which is wider "
            "than a paired one; evaluate again to have them."
        )
    rules = dict.fromkeys(row.evaluated.content.get("protocol", "") for row in rows)
    lengths = dict.fromkeys(row.evaluated.content.get("max_length") for row in rows)
    if len(rules) > 1 or len(lengths) > 1:
        notes.append(
            "The runs were evaluated by different rules (repeats or max_length), so part of a difference may be due to "
            "the rule."
        )
    return notes
