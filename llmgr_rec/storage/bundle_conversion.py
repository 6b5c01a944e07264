"""Writes bundles again with their tables in another number format; nothing but a block of a table is in memory."""

import hashlib
import os
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from llmgr_rec.checksums import file_checksum
from llmgr_rec.config import StageName, TableDType
from llmgr_rec.modules.quantized_tables import row_bytes
from llmgr_rec.storage.bundle import BundleFiles, TableReader
from llmgr_rec.storage.bundle_export import set_default_modes
from llmgr_rec.storage.bundle_index import INDEX, TENSOR, TableFile, verified_file
from llmgr_rec.storage.derived_run import derived_run, open_bundles

# Maximum bytes of a table file, and of the rows that are encoded at once.
_MAX_FILE_BYTES = 1 << 28


def convert_run(
    run: Path, output: Path, dtype: TableDType, stage: StageName | None = None, allow_code: Collection[str] = ()
) -> int:
    """Writes a run of the same models with tables in another number format, without checkpoints.

    Args:
        run: A run, or a bundle.
        output: Folder to create; must not exist or be empty.
        dtype: Number format of the tables.
        stage: The only stage whose model is written; None writes those of all complete stages.
        allow_code: Modules and packages from which the bundles may import encoder and head.

    Returns:
        Bytes of the tables that were written.

    Raises:
        UserError: The run has no complete model, a value does not fit into the number format, or the output cannot be
            written.
    """
    bundles = open_bundles(run, stage, allow_code)
    written: dict[str, Path] = {}
    with derived_run(run, output, bundles) as draft:
        for files in bundles:
            convert_bundle(files, draft / "export" / files.index.stage, dtype, written)
        return sum(path.stat().st_size for path in written.values())


def convert_bundle(files: BundleFiles, folder: Path, dtype: TableDType, written: dict[str, Path]) -> None:
    """Writes a bundle with tables in another number format.

    Args:
        files: The opened bundle.
        folder: Folder to create.
        dtype: Number format of the tables.
        written: Table files of other bundles by their content, which become hard links; extended by this function.

    Raises:
        UserError: The bundle is damaged, or a value does not fit into the number format.
    """
    (folder / "tables").mkdir(parents=True)
    tables = {table: _convert_table(files, table, folder, dtype, written) for table in files.index.tables}
    for name in files.index.files:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(verified_file(files.path, files.index, name), folder / name)
    index = replace(files.index, table_files=tables, table_dtype=dtype)
    (folder / INDEX).write_text(index.to_json())
    set_default_modes(folder)


def _convert_table(
    files: BundleFiles, table: str, folder: Path, dtype: TableDType, written: dict[str, Path]
) -> list[TableFile]:
    index, (num_rows, columns) = files.index, files.index.tables[table]
    reader = TableReader(files.path, index.table_files[table], index.table_dtype)
    # In memory, a row is float32 before it is encoded.
    block = max(1, _MAX_FILE_BYTES // row_bytes(columns, "float32"))
    parts = []
    for row in range(0, num_rows, block):
        rows = range(row, min(row + block, num_rows))
        values = reader.encoded(rows, columns, dtype).contiguous()
        digest = hashlib.sha256(values.numpy().data).hexdigest()
        path = folder / "tables" / f"{table}-r{row}-c0.safetensors"
        key = f"{path.name}/{tuple(values.shape)}/{digest}"
        if key in written:
            os.link(written[key], path)
        else:
            save_file({TENSOR: values}, path)
            written[key] = path
        name = str(path.relative_to(folder))
        parts.append(TableFile(name, row, 0, len(rows), columns, digest, file_checksum(path)))
    return parts
