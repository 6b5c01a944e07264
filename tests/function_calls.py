"""Counts calls of functions of the package, the same on any machine: a loop over rows shows in them."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import llmgr_rec

_PACKAGE = str(Path(llmgr_rec.__file__).parent)


def calls_of(work: Callable[[], object]) -> Counter[str]:
    """Number of calls of each function of `llmgr_rec` in this thread, generators by their steps.

    Args:
        work: What is run.
    """
    calls: Counter[str] = Counter()

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(_PACKAGE):
            calls[f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_code.co_qualname}"] += 1

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls
