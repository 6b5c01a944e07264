"""Counts of the clicks that rows use, against the rows that are written."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from llmgr_rec.data.preparation.rows import Block, RowBuilder
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.preparation.summary import summary_lines
from llmgr_rec.data.schema import SPLITS
from tests.data.prepare_inputs import Click, prepare


class Rows:
    """Stands in for a part writer, and keeps the rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[list[int], int]] = []

    def write(self, columns: list[pa.Array]) -> None:
        self.rows += zip(columns[1].to_pylist(), columns[2].to_pylist(), strict=True)


def naive_use(writers: dict[str, Rows], lengths: list[int], held_out: set[int], augmented: list[str]) -> dict[str, int]:
    """Uses counted from the written rows. Every click has an item of its own, so that items name clicks."""
    use: dict[str, set[int]] = {"inputs": set()}
    for split, writer in writers.items():
        use["inputs"] |= {item for items, _ in writer.rows for item in items}
        use[f"{split}_targets"] = {target for _, target in writer.rows}
        if split in augmented:
            use[f"{split}_targets"] |= {item for items, _ in writer.rows for item in items[1:]}
    use["targets"] = set().union(*(use[f"{split}_targets"] for split in SPLITS))
    use["only_inputs"] = use["inputs"] - use["targets"]
    use["unused"] = set(range(sum(lengths))) - use["inputs"] - use["targets"]
    use["held_out"] = use["unused"] & held_out
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    use["alone"] = {start for start, length in zip(starts, lengths, strict=True) if length == 1} - held_out
    use["too_old"] = use["unused"] - use["held_out"] - use["alone"]
    return {name: len(items) for name, items in use.items()}


@given(
    phases=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6),
    held_out=st.sets(st.integers(0, 20)),
    options=st.fixed_dictionaries(
        {
            "max_length": st.integers(1, 5),
            "split": st.sampled_from(["leave_one_out", "temporal"]),
            "long_sessions": st.sampled_from(["newest", "split"]),
            "prefix_augmentation": st.sampled_from(["train", "none"]),
        }
    ),
)
def test_the_use_of_clicks_equals_the_rows(
    phases: list[list[int]], held_out: set[int], options: dict[str, Any]
) -> None:
    lengths = [len(of_user) for of_user in phases]
    settings = PrepareSettings("items", "output", "clicks", hold_out_items=0.5 if held_out else 0.0, **options)
    builder = RowBuilder(settings, np.isin(np.arange(sum(lengths)), list(held_out)))
    block = Block(
        pa.array([f"u{user}" for user in range(len(lengths))]),
        np.cumsum([0, *lengths]),
        np.arange(sum(lengths)),
        np.concatenate([sorted(of_user) for of_user in phases]),
    )
    writers = {split: Rows() for split in SPLITS}
    builder.write(block, writers)  # type: ignore[arg-type]
    use = builder.click_use.counts
    assert use == naive_use(writers, lengths, held_out, settings.augmented_splits)
    assert use["targets"] + use["only_inputs"] + use["unused"] == sum(lengths)
    assert use["too_old"] + use["alone"] + use["held_out"] == use["unused"]


def test_the_summary_names_the_option_that_uses_the_other_clicks(tmp_path: Path) -> None:
    clicks: list[Click] = [("u", f"i{n}", n) for n in range(12)] + [("v", "i0", 0)]

    def described(name: str, **options: Any) -> str:
        result = prepare(tmp_path, clicks, max_length=3, output=str(tmp_path / name), **options)
        (line,) = (line for line in summary_lines(result.dataset.manifest) if line.startswith("of "))
        return line

    assert described("newest", long_sessions="newest") == (
        "of 13 clicks, 5 are targets (train 3, valid 1, test 1), 1 only inputs, 7 neither; "
        "6 older than the newest 3 of their session, which --long_sessions split or a larger --max_length would use; "
        "1 the only click of their session"
    )
    assert described("split", long_sessions="split") == (
        "of 13 clicks, 11 are targets (train 9, valid 1, test 1), 1 only inputs, 1 neither; "
        "1 the only click of their session"
    )
    assert "--long_sessions split with --prefix_augmentation train or a larger" in described(
        "none", long_sessions="split", prefix_augmentation="none"
    )
