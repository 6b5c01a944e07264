"""Summary of a preparation: what was read, dropped and written, in lines for the terminal."""

from collections.abc import Callable

from llmgr_rec.data.dataset import Manifest
from llmgr_rec.data.preparation.duplicates import MANY_DUPLICATES
from llmgr_rec.data.repeats import MIN_SHARE_TO_ALLOW, RepeatCounts
from llmgr_rec.data.schema import SPLITS


def summary_lines(manifest: Manifest) -> list[str]:
    """The summary of a data set; its first line has the sizes."""
    return [
        _sizes(manifest),
        *_domains(manifest),
        *_session_cuts(manifest),
        *_deduplication(manifest),
        *_filters(manifest),
        _click_use(manifest),
        _repeats(manifest),
        *(f"{option}: {files}" for option, files in manifest.inputs.items()),
    ]


def _sizes(manifest: Manifest) -> str:
    rows = ", ".join(f"{split} {manifest.num_sessions[split]:,} rows" for split in SPLITS)
    examples = ", ".join(f"{split} {manifest.num_examples[split]:,}" for split in manifest.prefix_augmentation)
    note = f" (with their prefixes: {examples} examples)" if examples else ""
    clicks = f"{manifest.num_clicks['kept']:,} of {manifest.num_clicks['read']:,} clicks kept"
    counts = manifest.held_out
    held_out = (
        f", {counts['items']:,} items held out of training (without {counts['clicks']:,} clicks, "
        f"{counts['sessions']:,} sessions)"
        if counts
        else ""
    )
    return f"{clicks}, {manifest.num_items:,} items, {rows}{note}, split {manifest.split}{held_out}"


def _domains(manifest: Manifest) -> list[str]:
    counts = (f"{name} {one['items']:,} items, {one['sessions']:,} sessions" for name, one in manifest.domains.items())
    return [f"domains: {'; '.join(counts)}"] if manifest.domains else []


def _session_cuts(manifest: Manifest) -> list[str]:
    if not (cut := manifest.session_gap):
        return []
    return [
        f"sessions cut at gaps above {cut['gap']}: users {cut['users']:,}, sessions {cut['sessions']:,}, clicks "
        f"per session {cut['clicks'] / cut['sessions']:.1f}, before filters (timestamps in {cut['unit']})"
    ]


def _deduplication(manifest: Manifest) -> list[str]:
    lines = []
    if duplicates := manifest.num_clicks["duplicates"]:
        share = duplicates / manifest.num_clicks["read"]
        what = "dropped" if manifest.duplicates == "drop" else "kept"
        line = f"{duplicates:,} rows ({share:.1%}) equal to another one in user, item and time: {what}"
        if share > MANY_DUPLICATES and what == "dropped":
            line += "; if times are coarser than clicks, keep them (--duplicates keep)"
        lines.append(line)
    if merged := manifest.num_clicks["consecutive_repeats"]:
        lines.append(f"{merged:,} clicks on the item clicked just before: merged")
    return lines


def _filters(manifest: Manifest) -> list[str]:
    """What the filters and the item file left out; each line has the option that decides it."""
    if not manifest.filtered:
        return []
    lines = []
    before, after = manifest.filtered["before"], manifest.filtered["after"]
    dropped_duplicates = manifest.num_clicks["duplicates"] if manifest.duplicates == "drop" else 0
    if missing := manifest.num_clicks["read"] - dropped_duplicates - before["clicks"]:
        lines.append(f"{missing:,} clicks on items that the item file lacks: dropped (--missing_items)")
    clicks = before["clicks"] - manifest.num_clicks["consecutive_repeats"] - after["clicks"]
    if clicks:
        parts = [f"{before[name] - after[name]:,} of {before[name]:,} {name}" for name in ("sessions", "items")]
        lines.append(
            f"sessions and items with too few clicks: {' and '.join(parts)} dropped, with {clicks:,} clicks "
            "(--min_interactions, --min_session_length)"
        )
    if unclicked := manifest.filtered["item_file"]["items"] - before["items"]:
        kept = manifest.num_items > after["items"]
        outcome = "kept" if kept else "left out (--keep_unseen_items keeps them)"
        lines.append(f"{unclicked:,} items of the item file have no click: {outcome}")
    return lines


def _click_use(manifest: Manifest) -> str:
    """How many clicks are targets, inputs or unused, why, and which options would use them."""
    use = manifest.click_use
    targets = ", ".join(f"{split} {use[f'{split}_targets']:,}" for split in SPLITS)
    augmentation = "" if manifest.prefix_augmentation else " with --prefix_augmentation train"
    splits = manifest.long_sessions == "split" and not augmentation
    option = "" if splits else f"--long_sessions split{augmentation} or "
    reasons = {
        "too_old": f"older than the newest {manifest.max_length} of their session, which {option}a larger --max_length "
        "would use",
        "alone": "the only click of their session",
        "held_out": "on items held out of training",
    }
    counts = (
        f"of {manifest.num_clicks['kept']:,} clicks, {use['targets']:,} are targets ({targets}), "
        f"{use['only_inputs']:,} only inputs, {use['unused']:,} neither"
    )
    return "; ".join([counts, *(f"{use[name]:,} {reason}" for name, reason in reasons.items() if use[name])])


def _repeats(manifest: Manifest) -> str:
    counts = manifest.repeat_counts
    verb = {"allow": "allowed in", "exclude": "excluded from"}[manifest.repeats]
    if manifest.repeats_option != "auto":
        why = f"--repeats {manifest.repeats_option}"
    else:
        relation = "at least" if manifest.repeats == "allow" else "less than"
        why = f"{relation} {MIN_SHARE_TO_ALLOW:.0%} of the targets of a split are repeats"
    return (
        f"repeats (items the session has clicked before): clicks {_shares(counts, lambda found: found.click_share)}; "
        f"targets {_shares(counts, lambda found: found.target_share)}; {verb} rankings ({why})"
    )


def _shares(counts: dict[str, RepeatCounts], share: Callable[[RepeatCounts], float]) -> str:
    return ", ".join(f"{split} {share(counts[split]):.1%}" for split in SPLITS if split in counts)
