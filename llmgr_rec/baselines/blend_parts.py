"""A blend in files by range of ranked items, so that each rank writes and reads the similarities of its own items.

A file is one written by `Blend.save`, whose similarity has the columns of its range: NAME-FIRST-END.npz has the items
from FIRST to END - 1, and NAME.npz has all items.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from scipy import sparse

from llmgr_rec.baselines.blend import Blend

T = TypeVar("T")

_SUFFIX = ".npz"


def part_name(name: str, items: range, num_items: int) -> str:
    """Name of the file of some items.

    Args:
        name: Name of the blend.
        items: The items.
        num_items: Number of items of the catalog.
    """
    return f"{name}{_SUFFIX}" if len(items) == num_items else f"{name}-{items.start}-{items.stop}{_SUFFIX}"


def parts_of(name: str, files: Iterable[str], num_items: int) -> dict[range, str]:
    """Files that together have each item once, by their items in order; empty if there are none.

    Args:
        name: Name of the blend.
        files: Names of all files.
        num_items: Number of items of the catalog.
    """
    ends: dict[int, int] = {}
    for file in sorted(files):
        if file == f"{name}{_SUFFIX}":
            return {range(num_items): file}
        if found := re.fullmatch(rf"{re.escape(name)}-(\d+)-(\d+){re.escape(_SUFFIX)}", file):
            first, end = map(int, found.groups())
            # A rank without items has an empty file.
            if first < end:
                ends[first] = end
    parts, first = {}, 0
    while first < num_items:
        if first not in ends:
            return {}
        items = range(first, ends[first])
        parts[items] = part_name(name, items, num_items)
        first = items.stop
    return parts


def parts_with(items: range, parts: Mapping[range, T]) -> dict[range, T]:
    """The files that have some of the items; one file if there are no items.

    Args:
        items: The items.
        parts: Files by their items, in order.
    """
    found = {held: file for held, file in parts.items() if held.start < items.stop and items.start < held.stop}
    return found if len(items) else dict(list(parts.items())[:1])


def load_parts(parts: Mapping[range, Path], items: range) -> Blend:
    """Reads the similarities of some ranked items, in memory for these.

    Args:
        parts: Files by their items, in order.
        items: The items.

    Raises:
        UserError: A file is damaged.
    """
    if list(parts) == [items]:
        return Blend.load(parts[items], num_columns=len(items))
    blends = []
    for held, file in parts_with(items, parts).items():
        start, stop = max(items.start, held.start), min(items.stop, held.stop)
        blends.append(Blend.load(file, range(start - held.start, stop - held.start) if len(items) else range(0)))
    if len(blends) == 1:
        return blends[0]
    similarity = sparse.hstack([blend.similarity_VR for blend in blends], format="csr")
    return replace(blends[0], similarity_VR=sparse.csr_array(similarity))
