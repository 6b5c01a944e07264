"""A prepared data set on disk: the manifest, which is checked on opening, and the part files of each split.

A file is compared with its recorded checksum before a process reads it for the first time.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from llmgr_rec.checksums import verify_file
from llmgr_rec.data.repeats import LARGEST_MAX_LENGTH, ConsecutiveRepeats, RepeatCounts, Repeats, RepeatsOption
from llmgr_rec.data.schema import FORMAT_VERSION, ITEMS_NAME, MANIFEST_NAME, SPLITS
from llmgr_rec.errors import UserError
from llmgr_rec.index_files import from_json, read_json, seal, unseal
from llmgr_rec.paths import check_inside
from llmgr_rec.remote_path import as_path

_REMEDY = "prepare the data set again with python -m llmgr_rec.prepare"


@dataclass(frozen=True)
class FileEntry:
    """One file of a data set.

    Args:
        rows: Rows in the file.
        bytes: Size in bytes.
        sha256: Hexadecimal content hash.
        checksum: Checksum of the content that is faster to verify; empty in data sets of earlier versions.
    """

    rows: int
    bytes: int
    sha256: str
    checksum: str = ""


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json, the description of a prepared data set.

    Args:
        num_items: Items in the catalog.
        num_sessions: Rows of each split.
        num_examples: Targets to predict in each split: its rows, or all their prefixes if it is prefix-augmented.
        split: Split protocol: leave_one_out, temporal or predefined.
        max_length: Longest `items` list, in clicks.
        min_interactions: Minimum number of interactions of each user and item; 0 or 1 for no filter.
        prefix_augmentation: Prefix-augmented splits: each row gives one example per click.
        features: Side features present, each {"num_embeddings": vocabulary size}.
        has_text: Whether any item has a title or a description.
        catalog_hash: Hash of the item ids in index order.
        files: Rows, bytes and content hash of each file, by path relative to the data set.
        cuts: Last timestamp of the training window and of the validation window, in the input's unit (nanoseconds for
            Arrow timestamps); empty for other splits than the temporal one.
        num_clicks: Number of clicks before and after the filters: `read` and `kept`; and of those, `duplicates` and
            `consecutive_repeats`, that `prepare` found.
        filtered: Numbers of `clicks`, and of the `sessions` and `items` that have any, `before` and `after` the k-core
            filter; and of the `items` of the `item_file`, with or without clicks. Empty in former versions.
        held_out: Items held out of training: their `share` and sampling `seed`, the number of `items`, the number of
            `clicks` removed from training sessions, and the number of training `sessions` dropped because fewer than
            two clicks were left. Empty if no items are held out.
        duplicates: Whether rows that are equal in user, item and time were dropped.
        consecutive_repeats: Whether clicks in a row on the same item were merged into the first.
        repeats: Whether rankings may contain items that the session has clicked.
        repeats_option: What `prepare` was given: auto, allow or exclude.
        repeat_counts: Repeats by split; empty if they were not measured, as in data sets of version 0.2.
        long_sessions: How training sessions longer than max_length became rows: newest or split.
        click_use: Number of clicks that are targets, inputs or unused, and why; see `preparation.click_use.ClickUse`.
        inputs: Which files of each input folder were read and which were skipped, by option of prepare.
        session_gap: Sessions cut from the users' logs: the inactivity `gap`, the `unit` of the timestamps, and the
            numbers of `users`, `sessions` and `clicks` before the filters. Empty if the input was not cut.
        domains: Numbers of `items` and of `sessions` (or users) by domain; empty and not written for a single log.
        word_rule: `words.WORD_RULE` by which titles were split into the word feature.
        format_version: Version of the data set format.
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
    filtered: dict[str, dict[str, int]] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    duplicates: Literal["drop", "keep"] = "keep"
    consecutive_repeats: ConsecutiveRepeats = "keep"
    repeats: Repeats = "allow"
    repeats_option: RepeatsOption = "auto"
    repeat_counts: dict[str, RepeatCounts] = field(default_factory=dict)
    long_sessions: str = "newest"
    click_use: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    session_gap: dict[str, Any] = field(default_factory=dict)
    domains: dict[str, dict[str, int]] = field(default_factory=dict)
    word_rule: int = 1
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not 1 <= self.max_length <= LARGEST_MAX_LENGTH:
            raise ValueError(f"max_length is {self.max_length}, not a number of clicks")

    @property
    def sessions_hash(self) -> str:
        """Hash over the content hashes of the training part files."""
        return self.split_hash("train")

    def split_hash(self, split: str) -> str:
        """Hash over the content hashes of the part files of a split, and over whether it has prefixes.

        Args:
            split: train, valid or test.
        """
        files: dict[str, Any] = {
            name: entry.sha256 for name, entry in self.files.items() if name.startswith(f"{split}/")
        }
        # Training sessions are recorded in bundles without it.
        if split != "train" and split in self.prefix_augmentation:
            files["prefix_augmentation"] = True
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json; equal manifests give equal text."""
        values = asdict(self)
        if not self.domains:
            del values["domains"]
        return json.dumps(seal(values), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Dataset:
    """A prepared data set. Opening it compares the manifest with the files.

    Args:
        path: Folder written by `prepare`.

    Raises:
        UserError: The folder is not a complete data set.
    """

    path: Path
    manifest: Manifest = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", as_path(self.path))
        object.__setattr__(self, "manifest", load_manifest(self.path))

    @property
    def items_path(self) -> Path:
        """The catalog file; `Catalog.of` verifies and reads it."""
        return self.path / ITEMS_NAME

    def parts(self, split: str) -> list[Path]:
        """The part files of a split, in order.

        Args:
            split: train, valid or test.

        Raises:
            ValueError: There is no such split.
            UserError: A part is damaged.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, not one of {SPLITS}")
        return [self.verified(name) for name in sorted(self.manifest.files) if name.startswith(f"{split}/")]

    def verified(self, name: str) -> Path:
        """The path of a file, whose content is the one that was recorded.

        Args:
            name: Path relative to the data set.

        Raises:
            UserError: The file is damaged.
        """
        entry = self.manifest.files.get(name)
        if entry is not None:
            verify_file(self.path / name, entry.checksum or entry.sha256, _REMEDY)
        return self.path / name


def load_manifest(path: str | Path) -> Manifest:
    """Reads the manifest of a data set and checks its version, its fields, and the existence and size of each file.

    Args:
        path: Folder written by `prepare`.

    Raises:
        UserError: The manifest is missing or invalid, or a file is missing or has another size.
    """
    folder = as_path(path)
    file = folder / MANIFEST_NAME
    if not file.is_file():
        raise UserError(f"{folder} is not a prepared data set: it has no {MANIFEST_NAME}; {_REMEDY}")
    try:
        values = read_json(file)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON ({error}); {_REMEDY}") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); {_REMEDY}") from None
    manifest = _parse(values, file)
    check_inside(folder, manifest.files, file)
    for name, entry in sorted(manifest.files.items()):
        part = folder / name
        if not part.is_file():
            raise UserError(f"{part} is missing though {MANIFEST_NAME} lists it; {_REMEDY}")
        if part.stat().st_size != entry.bytes:
            raise UserError(
                f"{part} has {part.stat().st_size:,} bytes but {MANIFEST_NAME} says {entry.bytes:,}; {_REMEDY}"
            )
    return manifest


def _parse(values: dict[str, Any], file: Path) -> Manifest:
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has format_version {version}, this version reads {FORMAT_VERSION}; {_REMEDY}")
    try:
        values = unseal(values)
        # Name of the field in data sets of version 0.1.
        if "catalogue_hash" in values:
            values["catalog_hash"] = values.pop("catalogue_hash")
        # Version 0.2 recorded whether any training session repeats a click.
        if not values.get("clicks_repeat", True):
            values.setdefault("repeats", "exclude")
        known = {entry.name for entry in fields(Manifest)}
        manifest = from_json(Manifest, {name: value for name, value in values.items() if name in known})
    except ValueError as error:
        raise UserError(f"{file} has a missing or invalid field ({error}); {_REMEDY}") from None
    return manifest
