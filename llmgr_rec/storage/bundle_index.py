"""The index of a bundle (an exported model): its content, its completeness, and which bundle of a run is the default.

Files of a bundle RUN/export/<stage>/:

    bundle.json                                   the index, written last
    config.yaml, prompts.yaml, items.parquet      settings, prompt templates, catalog
    recommender.safetensors                       session recommender without its tables
    tables/<table>-r<row>-c<column>.safetensors   blocks of the embedding tables
    llmgr.safetensors, lora/                      adapter and head, PEFT adapter; only with a language model
    blend.npz                                     nearest-neighbor similarities, trees of a re-ranker; only with a blend
    blend-<number>.npz                            their part of each baseline; only with several, and for explanations
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmgr_rec.checksums import damage, verify_file
from llmgr_rec.config import STAGES, Config, StageName, TableDType
from llmgr_rec.config_file import load_config
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.repeats import LARGEST_MAX_LENGTH, ConsecutiveRepeats, Repeats
from llmgr_rec.errors import UserError
from llmgr_rec.files import is_interrupted
from llmgr_rec.index_files import from_json, read_json, seal, unseal
from llmgr_rec.paths import check_inside

FORMAT_VERSION = 2
INDEX, CONFIG, PROMPTS = "bundle.json", "config.yaml", "prompts.yaml"
RECOMMENDER, LANGUAGE, LORA = "recommender.safetensors", "llmgr.safetensors", "lora"
# Names of the blend and of its terms without the items of a file; see `baselines.blend_parts`.
BLEND, BLEND_TERM = "blend", "blend-{}"
TENSOR = "weight"
_HASH_BYTES = 1 << 22
_REMEDY = "copy or export it again"

# Stages that train each model of the results, the last one first.
STAGES_OF_MODEL: dict[str, tuple[StageName, ...]] = {
    "sbr": ("sbr",),
    "llm_text": ("llm_text",),
    "llmgr": ("behave", "align"),
}


@dataclass(frozen=True)
class TableFile:
    """File of one block of an embedding table.

    Args:
        file: Path relative to the bundle.
        row: First row of the block in the table.
        col: First column of the block in the table.
        rows: Number of rows.
        cols: Number of columns.
        sha256: Hash of the bytes of the values.
        checksum: Checksum of the file; empty in bundles of earlier versions.
    """

    file: str
    row: int
    col: int
    rows: int
    cols: int
    sha256: str
    checksum: str = ""


@dataclass(frozen=True)
class BundleIndex:
    """Content of bundle.json.

    Args:
        stage: Stage that trained the model.
        catalog_hash: `Catalog.hash` of the items.
        num_items: Number of items of the catalog.
        dims: Width d1 of the item tables and, with a language model, its width d2.
        language_model: `name` and `weights_hash` of the base language model; empty without one.
        tables: Rows and columns of each table.
        table_files: Files of each table, which cover it without overlap.
        files: Size in bytes of every other file, by path relative to the bundle.
        versions: Versions of the installed packages at export.
        repeats: Whether rankings may contain items that the session has clicked; allowed if unknown.
        max_length: Maximum length of a history in the training data, in clicks; 0 if unknown.
        consecutive_repeats: Whether clicks in a row on the same item were merged in the training data.
        features_hash: `Catalog.features_hash` of the items; empty if unknown.
        sessions_hash: `Manifest.sessions_hash` of the training data; empty if unknown.
        factory: Name of the model factory that built the model; empty for the default factory.
        checksums: Checksum of each file of `files`; empty in bundles of earlier versions.
        table_dtype: Number format of the values of the tables in their files, see `quantized_tables.encode_rows`.
    """

    stage: StageName
    catalog_hash: str
    num_items: int
    dims: dict[str, int]
    language_model: dict[str, str]
    tables: dict[str, tuple[int, int]]
    table_files: dict[str, list[TableFile]]
    files: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    repeats: Repeats = "allow"
    max_length: int = 0
    consecutive_repeats: ConsecutiveRepeats = "keep"
    features_hash: str = ""
    sessions_hash: str = ""
    factory: str = ""
    checksums: dict[str, str] = field(default_factory=dict)
    table_dtype: TableDType = "float32"

    def __post_init__(self) -> None:
        if not 0 <= self.max_length <= LARGEST_MAX_LENGTH:
            raise ValueError(f"max_length is {self.max_length}, not a number of clicks")

    def to_json(self) -> str:
        """The text of bundle.json."""
        content = json.loads(json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}))
        return json.dumps(seal(content), indent=1)


def is_complete(folder: Path) -> bool:
    """Whether a folder is a complete bundle. The index is written last, and then the folder gets its final name."""
    # A remote run is uploaded file by file.
    if is_interrupted(folder.parent.parent):
        return False
    return not folder.name.endswith(".tmp") and (folder / INDEX).is_file()


def find_bundle(export: Path, model: str) -> Path | None:
    """The complete bundle of the last stage of a model; None if there is none.

    Args:
        export: RUN/export.
        model: One of `STAGES_OF_MODEL`.
    """
    return next((export / stage for stage in STAGES_OF_MODEL[model] if is_complete(export / stage)), None)


def default_bundle(export: Path) -> Path | None:
    """The bundle that is used if no stage is named: the complete one of the last stage. None if there is none.

    Args:
        export: RUN/export.
    """
    return next((export / stage for stage in reversed(STAGES) if is_complete(export / stage)), None)


def model_of_stage(stage: str) -> str:
    """The model of `STAGES_OF_MODEL` that a stage trains."""
    return next(model for model, stages in STAGES_OF_MODEL.items() if stage in stages)


def model_of_bundle(bundle: Path) -> str:
    """The model of `STAGES_OF_MODEL` that a bundle of a run belongs to."""
    return model_of_stage(bundle.name)


def latest_bundle(export: Path) -> Path:
    """The complete bundle of the last stage, from which the next stage starts.

    Args:
        export: RUN/export.

    Raises:
        UserError: There is no complete bundle.
    """
    if bundle := default_bundle(export):
        return bundle
    raise UserError(f"{export} has no exported model; train first: python -m llmgr_rec.train --output {export.parent}")


def resolve_bundle(path: Path) -> Path:
    """Finds the bundle of a path.

    Args:
        path: A bundle, a run, or the export folder of a run; for the latter two, the default bundle is returned.

    Raises:
        UserError: The path does not exist, or there is no complete bundle.
    """
    if is_complete(path):
        return path
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; give a run folder made by python -m llmgr_rec.train")
    if (path / "export").is_dir():
        return latest_bundle(path / "export")
    if bundle := default_bundle(path):
        return bundle
    # The output of `Recommender.fit` has the run in this folder.
    run = path / "run" if (path / "run").is_dir() else "a run folder made by python -m llmgr_rec.train"
    raise UserError(f"{path} has no exported model; give {run}")


def read_index(folder: Path) -> BundleIndex:
    """Reads and checks a bundle's index.

    Args:
        folder: A bundle.

    Raises:
        UserError: The bundle is incomplete, damaged, or of another format version.
    """
    file = folder / INDEX
    if not is_complete(folder):
        raise UserError(f"{folder} is not a complete bundle (no {INDEX}); export it again by training its stage")
    try:
        content = read_json(file)
        if (version := content.get("format_version")) != FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {version}, this version of llmgr_rec reads {FORMAT_VERSION}; train the "
                "stage again, or use the version that wrote the bundle"
            )
        content = unseal(content)
        del content["format_version"]
        # Version 0.2 recorded whether any training session repeats a click.
        if not content.pop("clicks_repeat", True):
            content.setdefault("repeats", "exclude")
        index = from_json(BundleIndex, content)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); export the bundle again by training its stage") from None
    _check_files(folder, index)
    return index


def verified_file(folder: Path, index: BundleIndex, name: str) -> Path:
    """The path of a file of a bundle, whose content is the one that was exported.

    Args:
        folder: A bundle.
        index: Its index.
        name: Path of the file relative to the bundle, one of `BundleIndex.files`.

    Raises:
        UserError: The file is damaged.
    """
    if recorded := index.checksums.get(name):
        verify_file(folder / name, recorded, _REMEDY)
    return folder / name


def verified_table_file(folder: Path, part: TableFile) -> Path:
    """The path of a file of a table, whose content is the one that was exported.

    Args:
        folder: A bundle.
        part: The file.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / part.file
    if part.checksum:
        verify_file(path, part.checksum, _REMEDY)
    elif (found := _values_hash(path)) != part.sha256:
        raise UserError(f"{damage(path, found, part.sha256)}; {_REMEDY}")
    return path


def _values_hash(path: Path) -> str:
    """Hash of the bytes of the values of a table file, which follow a header of safetensors and its length."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_config(folder: Path) -> Config:
    """The settings of a bundle.

    Args:
        folder: A bundle.

    Raises:
        UserError: The bundle is incomplete or damaged.
    """
    return load_config(verified_file(folder, read_index(folder), CONFIG))


def check_trained_on(folder: Path, dataset: Dataset) -> None:
    """Checks that a bundle was trained on a data set.

    Args:
        folder: A bundle.
        dataset: The data set.

    Raises:
        UserError: The items differ, so that item indices have other meanings; or the training sessions differ, so that
            the model may have been trained on test sessions.
    """
    index, manifest = read_index(folder), dataset.manifest
    if index.catalog_hash != manifest.catalog_hash:
        raise UserError(
            f"{folder} was trained on another catalog ({index.num_items} items, {index.catalog_hash[:12]}) than that "
            f"of {dataset.path} ({manifest.num_items} items, {manifest.catalog_hash[:12]}); "
            "give the data set of the run"
        )
    if index.sessions_hash not in ("", manifest.sessions_hash):
        raise UserError(
            f"{folder} was trained on other sessions than those in {dataset.path / 'train'}; "
            "give the data set of the run"
        )


def bundle_hash(folder: Path, index: BundleIndex | None = None) -> str:
    """Hash of a bundle's content: names and bytes of its files. Tables enter by their hashes in the index.

    Args:
        folder: A bundle.
        index: The index, if it has already been read.

    Returns:
        Hexadecimal sha256.
    """
    digest = hashlib.sha256()
    for name in sorted([*(index or read_index(folder)).files, INDEX]):
        digest.update(f"{name}\0{(folder / name).stat().st_size}\0".encode())
        with (folder / name).open("rb") as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _check_files(folder: Path, index: BundleIndex) -> None:
    pieces = [part.file for parts in index.table_files.values() for part in parts]
    present = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    check_inside(folder, [*index.files, *pieces, *present], folder / INDEX)
    for name, size in index.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise UserError(f"bundle {folder} is damaged: {name} has {found} of {size} bytes; {_REMEDY}")
    for name, (rows, cols) in index.tables.items():
        parts = index.table_files.get(name, [])
        covered = sum(part.rows * part.cols for part in parts)
        missing = [part.file for part in parts if not (folder / part.file).is_file()]
        if missing or covered != rows * cols:
            what = missing[0] if missing else f"{rows * cols - covered} values of table {name}"
            raise UserError(f"bundle {folder} is damaged: {what} is missing; {_REMEDY}")
