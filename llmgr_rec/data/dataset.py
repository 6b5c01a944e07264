"""A prepared data set on disk: its manifest, checked when it is opened, and the part files of its splits."""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llmgr_rec.data.schema import FORMAT_VERSION, ITEMS_NAME, MANIFEST_NAME, SPLITS
from llmgr_rec.errors import UserError

_REMEDY = "make the data set again with python -m llmgr_rec.prepare"


@dataclass(frozen=True)
class FileEntry:
    """One file of a data set.

    Args:
        rows: Rows in the file.
        bytes: Size in bytes.
        sha256: Hexadecimal content hash.
    """

    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared data set holds.

    Args:
        num_items: Items in the catalog.
        num_sessions: Rows of each split.
        num_examples: Targets to predict in each split: rows, or prefixes where the split is prefix-augmented.
        split: Split protocol: leave_one_out, temporal or predefined.
        max_length: Longest `items` list, in clicks.
        min_interactions: Interactions that every kept user and item has; 0 or 1 when nothing was filtered.
        prefix_augmentation: Splits whose rows stand for all their prefixes.
        features: Side features present, each {"num_embeddings": size of its vocabulary}.
        has_text: Whether any item has a title or a description.
        catalog_hash: Hash of the item ids in index order.
        files: Relative path -> rows, bytes and content hash.
        cuts: Last timestamp of the training and of the validation window, in the input's unit (nanoseconds for Arrow
            timestamps); empty but for the temporal split.
        num_clicks: Clicks read and kept after the filters.
        held_out: Items that training never sees: `share` and `seed` of their choice, number of `items`, `clicks` taken
            out of the training sessions, and training `sessions` lost because fewer than two clicks were left; empty
            where none are held out.
        clicks_repeat: Whether any training session holds an item twice, its target included. True where the data set
            was made before this was known.
        format_version: Version of this layout.
    """

    num_items: int
    num_sessions: dict[str, int]
    num_examples: dict[str, int]
    split: str
    max_length: int
    min_interactions: int
    prefix_augmentation: list[str]
    features: dict[str, dict[str, int]]
    has_text: bool
    catalog_hash: str
    files: dict[str, FileEntry]
    cuts: dict[str, int] = field(default_factory=dict)
    num_clicks: dict[str, int] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    clicks_repeat: bool = True
    format_version: int = FORMAT_VERSION

    @property
    def sessions_hash(self) -> str:
        """Hash of the training sessions."""
        train = {name: entry.sha256 for name, entry in self.files.items() if name.startswith("train/")}
        return hashlib.sha256(json.dumps(train, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The manifest as the text of manifest.json, the same for the same content."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Dataset:
    """A prepared data set; opening it checks the manifest against the files.

    Args:
        path: Folder that prepare wrote.

    Raises:
        UserError: The folder is no complete data set.
    """

    path: Path
    manifest: Manifest = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "manifest", load_manifest(self.path))

    @property
    def items_path(self) -> Path:
        """The catalog file."""
        return self.path / ITEMS_NAME

    def parts(self, split: str) -> list[Path]:
        """The part files of a split, in order.

        Args:
            split: train, valid or test.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, not one of {SPLITS}")
        return [self.path / name for name in sorted(self.manifest.files) if name.startswith(f"{split}/")]


def load_manifest(path: str | Path) -> Manifest:
    """Reads and checks the manifest of a data set: version, fields, and that every file is there in full size.

    Args:
        path: Folder that prepare wrote.

    Raises:
        UserError: Something is missing or does not fit, with the remedy.
    """
    folder = Path(path)
    file = folder / MANIFEST_NAME
    if not file.is_file():
        raise UserError(f"{folder} is no prepared data set: it has no {MANIFEST_NAME}; {_REMEDY}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); {_REMEDY}") from None
    manifest = _parse(values, file)
    for name, entry in sorted(manifest.files.items()):
        part = folder / name
        if not part.is_file():
            raise UserError(f"{part} is missing though {MANIFEST_NAME} lists it; {_REMEDY}")
        if part.stat().st_size != entry.bytes:
            raise UserError(
                f"{part} has {part.stat().st_size:,} bytes but {MANIFEST_NAME} says {entry.bytes:,}; {_REMEDY}"
            )
    return manifest


def _parse(values: Any, file: Path) -> Manifest:
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has format_version {version}, this version reads {FORMAT_VERSION}; {_REMEDY}")
    # The name of this field in data sets of version 0.1.
    if "catalogue_hash" in values:
        values["catalog_hash"] = values.pop("catalogue_hash")
    try:
        needed = [entry.name for entry in fields(Manifest) if entry.default is entry.default_factory is MISSING]
        missing = [name for name in needed if name not in values]
        if missing:
            raise KeyError(missing[0])
        known = {entry.name: values[entry.name] for entry in fields(Manifest) if entry.name in values}
        known["files"] = {name: FileEntry(**entry) for name, entry in known["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{file} lacks a field or has an ill-formed one ({error}); {_REMEDY}") from None
    return Manifest(**known)
