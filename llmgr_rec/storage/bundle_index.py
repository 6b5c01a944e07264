"""The index of an exported model: what a bundle holds, whether it is complete, which one answers.

RUN/export/<stage>/ holds bundle.json (this index, written last), config.yaml, prompts.yaml, items.parquet (the
catalog), recommender.safetensors, llmgr.safetensors (adapter and head), lora/ (PEFT), blend.npz (nearest-neighbor
similarities, where it has a blend) and tables/<table>-r<row>-c<column>.safetensors.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmgr_rec.config import STAGES, StageName
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError

FORMAT_VERSION = 2
INDEX, CONFIG, PROMPTS = "bundle.json", "config.yaml", "prompts.yaml"
RECOMMENDER, LANGUAGE, LORA = "recommender.safetensors", "llmgr.safetensors", "lora"
BLEND = "blend.npz"
TENSOR = "weight"
_HASH_BYTES = 1 << 22

# Stages whose export answers as each model, the furthest first.
STAGES_OF_MODEL: dict[str, tuple[StageName, ...]] = {
    "sbr": ("sbr",),
    "llm_text": ("llm_text",),
    "llmgr": ("behave", "align"),
}


@dataclass(frozen=True)
class Piece:
    """A rectangle of a table in a file of its own.

    Args:
        file: Path in the bundle.
        row: First row.
        col: First column.
        rows: Rows.
        cols: Columns.
        sha256: Hash of the values' bytes.
    """

    file: str
    row: int
    col: int
    rows: int
    cols: int
    sha256: str


@dataclass(frozen=True)
class BundleIndex:
    """What a bundle says of itself.

    Args:
        stage: Stage that it is the result of.
        catalog_hash: Hash of its items.
        num_items: Items of the catalog.
        dims: Widths d1 and, after a language stage, d2.
        language_model: Name and weights_hash of the base language model; empty before the language stages.
        tables: Rows and columns of each table.
        pieces: Pieces of each table; together they cover it once.
        files: Size in bytes of every other file, by path in the bundle.
        versions: Versions of the packages that wrote it.
        clicks_repeat: Whether its training sessions hold an item twice; True where it was made before this was known.
        features_hash: Hash of its items with their side features; empty where it was made before this was known.
        sessions_hash: Hash of the sessions that it was trained on; empty where they are not known.
        factory: Name of the model factory that built it; empty for the default one.
    """

    stage: StageName
    catalog_hash: str
    num_items: int
    dims: dict[str, int]
    language_model: dict[str, str]
    tables: dict[str, tuple[int, int]]
    pieces: dict[str, list[Piece]]
    files: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    clicks_repeat: bool = True
    features_hash: str = ""
    sessions_hash: str = ""
    factory: str = ""

    def to_json(self) -> str:
        """The index as it stands in bundle.json."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a complete bundle: its index is written last and the folder named after that."""
    return not folder.name.endswith(".tmp") and (folder / INDEX).is_file()


def find_bundle(export: Path, model: str) -> Path | None:
    """The furthest complete bundle of a model, None where it has not been trained.

    Args:
        export: RUN/export.
        model: One of `STAGES_OF_MODEL`.
    """
    return next((export / stage for stage in STAGES_OF_MODEL[model] if is_complete(export / stage)), None)


def answering_bundle(export: Path) -> Path | None:
    """The bundle that answers where no model is named, None where nothing has been trained that would.

    Args:
        export: RUN/export.
    """
    return next((export / stage for stage in reversed(STAGES) if is_complete(export / stage)), None)


def answers_as(bundle: Path) -> str:
    """Which of `STAGES_OF_MODEL` a bundle of a run answers as."""
    return next(model for model, stages in STAGES_OF_MODEL.items() if bundle.name in stages)


def latest_bundle(export: Path) -> Path:
    """The complete bundle of the furthest stage, from which the next one goes on.

    Args:
        export: RUN/export.

    Raises:
        UserError: There is none.
    """
    if bundle := answering_bundle(export):
        return bundle
    raise UserError(
        f"{export} holds no exported model; train first: python -m llmgr_rec.train --output {export.parent}"
    )


def resolve_bundle(path: Path) -> Path:
    """The bundle that a path means: a bundle itself, or the one that answers of a run or of its export folder.

    Raises:
        UserError: The path holds no complete bundle.
    """
    if is_complete(path):
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a run folder made by python -m llmgr_rec.train")
    export = path / "export" if (path / "export").is_dir() else path
    return latest_bundle(export)


def read_index(folder: Path) -> BundleIndex:
    """Reads and checks a bundle's index.

    Args:
        folder: A bundle.

    Raises:
        UserError: The bundle is not complete, damaged, or of another format version.
    """
    file = folder / INDEX
    if not is_complete(folder):
        raise UserError(f"{folder} is not a complete bundle (no {INDEX}); export it again by training its stage")
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {version}, this version of llmgr_rec reads {FORMAT_VERSION}; train the "
                "stage again, or use the version that wrote the bundle"
            )
        content["tables"] = {name: (rows, cols) for name, (rows, cols) in content["tables"].items()}
        content["pieces"] = {name: [Piece(**piece) for piece in pieces] for name, pieces in content["pieces"].items()}
        index = BundleIndex(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}); export the bundle again by training its stage") from None
    _check_files(folder, index)
    return index


def check_trained_on(folder: Path, dataset: Dataset) -> None:
    """Compares a bundle's items and training sessions with a data set's.

    Raises:
        UserError: Items differ, so that an index means another one; or sessions do, so that what it is tested on may be
            what it has learned.
    """
    theirs, ours = read_index(folder), dataset.manifest
    if theirs.catalog_hash != ours.catalog_hash:
        raise UserError(
            f"{folder} was trained on another catalog ({theirs.num_items} items, {theirs.catalog_hash[:12]}) than "
            f"{dataset.path} holds ({ours.num_items} items, {ours.catalog_hash[:12]}); give the data set of the run"
        )
    if theirs.sessions_hash not in ("", ours.sessions_hash):
        raise UserError(
            f"{folder} was trained on other sessions than those in {dataset.path / 'train'}; "
            "give the data set of the run"
        )


def bundle_hash(folder: Path, index: BundleIndex | None = None) -> str:
    """Hash of what a bundle holds: its files' names and bytes, tables by the hashes that the index keeps of them.

    Args:
        folder: A bundle.
        index: Its index, where it has been read already.
    """
    digest = hashlib.sha256()
    for name in sorted([*(index or read_index(folder)).files, INDEX]):
        digest.update(f"{name}\0{(folder / name).stat().st_size}\0".encode())
        with (folder / name).open("rb") as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _check_files(folder: Path, index: BundleIndex) -> None:
    for name, size in index.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise UserError(f"bundle {folder} is damaged: {name} has {found} of {size} bytes; copy or export it again")
    for name, (rows, cols) in index.tables.items():
        covered = sum(piece.rows * piece.cols for piece in index.pieces[name])
        missing = [piece.file for piece in index.pieces[name] if not (folder / piece.file).is_file()]
        if missing or covered != rows * cols:
            lost = missing[0] if missing else f"{rows * cols - covered} values of table {name}"
            raise UserError(f"bundle {folder} is damaged: {lost} is missing; copy or export it again")
