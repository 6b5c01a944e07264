"""Conversions that were made before from the same files with the same options."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from datagen.output import output_folder
from llmgr_rec.result_cache import CachedResult, files_below, recorded_messages


class _NotCached(Exception):
    """The output has to be made."""


def convert_once(
    output: str | Path, sources: Sequence[Path], options: Mapping[str, Any], convert: Callable[[], None]
) -> None:
    """Converts files, or takes the output of an earlier conversion of the same files with the same options.

    Args:
        output: Output folder.
        sources: Files to convert.
        options: What the output depends on besides, as JSON values.
        convert: Writes the output folder.

    Raises:
        UserError: `output` is not empty, or the conversion fails.
    """
    packages, code = ("duckdb", "pyarrow"), [Path(__file__).parent]
    # Compression goes by the name of a file.
    inputs = {"names": [path.name for path in sources], **options}
    cached = CachedResult("converted files", inputs, sources, packages, code, [str(path) for path in sources])
    with suppress(_NotCached), output_folder(output) as draft:
        if not cached.take(draft):
            raise _NotCached
        return
    with recorded_messages("datagen") as messages:
        convert()
    cached.keep(files_below(Path(output)), messages)
