"""Sharded checkpoints of a stage, written with torch.distributed.checkpoint and readable at any number of ranks.

FOLDER/step-00000123/ contains the tensors, state.json and the marker file COMPLETE. Ranks write to
step-00000123.tmp, which rank 0 renames when all of them are done.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.optim.keyed import KeyedOptimizer

from llmgr_rec.checksums import damage, file_checksum
from llmgr_rec.config import Config, StageName
from llmgr_rec.distributed.process_group import World, run_on_all_ranks, run_on_rank0
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write, remove_folder, storage_errors, write_and_fsync
from llmgr_rec.folder_draft import FolderDraft
from llmgr_rec.former_settings import of_this_version
from llmgr_rec.index_files import from_json, read_json, seal, unseal
from llmgr_rec.paths import check_inside
from llmgr_rec.storage.checkpoint_reader import CheckpointReader, DamagedCheckpointError
from llmgr_rec.storage.checkpoint_state import (
    StateTensors,
    column_widths,
    equalize_steps,
    in_blocks,
    model_tensors,
    optimizer_tensors,
)
from llmgr_rec.storage.checkpoint_writer import CheckpointWriter, TensorChecksums, merge
from llmgr_rec.storage.fingerprint import fingerprint, values_before_settings
from llmgr_rec.versions import installed_versions

logger = logging.getLogger(__name__)

FORMAT = 5
_STATE, _COMPLETE, _INDEX = "state.json", "COMPLETE", ".metadata"
_FOLDER, _PARTIAL = re.compile(r"step-(\d{8})"), re.compile(r"step-(\d{8})\.tmp")


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to. A checkpoint of another identity cannot be loaded.

    Args:
        stage: Stage name.
        catalog: `Catalog.features_hash` of the items.
        settings: Config fingerprint: value of each setting that determines the weights, by dotted name.
        factory: Name of the model factory; empty for the default factory.
    """

    stage: str
    catalog: str
    settings: Mapping[str, Any]
    factory: str = ""

    @classmethod
    def of(cls, stage: StageName, catalog: str, config: Config, device: torch.device, factory: str = "") -> "Identity":
        """Identity of a stage: stage, catalog, config fingerprint and model factory.

        Args:
            stage: Stage name.
            catalog: `Catalog.features_hash` of the items.
            config: All settings.
            device: Device of the stage, which determines the number format of `auto`.
            factory: Name of the model factory.
        """
        return cls(stage, catalog, fingerprint(stage, config, device), factory)


@dataclass(frozen=True)
class _State:
    """Content of state.json.

    Args:
        format: Version of the format of checkpoints.
        step: Number of completed training steps.
        identity: Identity of the checkpoint.
        world_size: Number of ranks that wrote it.
        has_optimizer: Whether it has the state of the optimizer.
        column_widths: `checkpoint_state.column_widths` of the model.
        versions: Versions of the installed packages.
        extra: Further state.
        files: Size in bytes of each other file.
        checksums: Checksums of files; empty in checkpoints of earlier versions.
        tensor_checksums: Checksums of the tensors; None in checkpoints of earlier versions.
    """

    format: int
    step: int
    identity: Identity
    world_size: int
    has_optimizer: bool
    column_widths: dict[str, list[int]]
    versions: dict[str, str]
    extra: dict[str, Any]
    files: dict[str, int]
    checksums: dict[str, str] = field(default_factory=dict)
    tensor_checksums: TensorChecksums | None = None

    def to_json(self) -> str:
        """The text of state.json."""
        return json.dumps(seal(json.loads(json.dumps(asdict(self)))), indent=1)


class CheckpointManager:
    """Writes and reads the checkpoints of a folder. All methods are collectives: all ranks must call them.

    Args:
        folder: Folder of the checkpoints, on storage that all ranks share.
        keep: Number of complete checkpoints that are kept, at least 1.
        world: This process and the world size.
        identity: Identity of the checkpoints.
    """

    def __init__(self, folder: Path, keep: int, world: World, identity: Identity) -> None:
        self._folder = folder
        self._keep = max(keep, 1)
        self._world = world
        self._identity = identity

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None if there is none."""
        return run_on_rank0(self._world, lambda: next(iter(self._complete()), None))

    def check(self) -> None:
        """Checks the newest complete checkpoint, if there is one, without loading it.

        Raises:
            UserError: It is damaged or belongs to another catalog, stage or settings.
        """
        run_on_rank0(self._world, lambda: [self._read_state(path) for path in self._complete()[:1]])

    def save(
        self, step: int, model: nn.Module, optimizer: KeyedOptimizer | None, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Writes a checkpoint and removes old ones.

        Of a complete checkpoint of the same step only the further state is replaced, because the rest is the same.
        Checkpoints of later steps are removed: they were written by a run that was then resumed from an earlier
        checkpoint.

        Args:
            step: Number of completed training steps.
            model: The sharded model. The base language model is not saved.
            optimizer: The optimizer; None saves no optimizer state.
            extra: Further state, which must be serializable as JSON.

        Raises:
            UserError: The storage is full, fails, or is not shared by all ranks. The checkpoints before are complete.
        """
        final = self._folder / f"step-{step:08d}"
        draft = FolderDraft(final, _COMPLETE)
        if not run_on_rank0(self._world, lambda: self._prepare(final, draft)):
            run_on_rank0(self._world, lambda: self._replace_extra(final, extra))
            return
        tensors = model_tensors(model)
        if optimizer is not None:
            tensors |= equalize_steps(optimizer_tensors(optimizer, model))
        checksums = self._write_tensors(in_blocks(tensors), draft)
        state = _State(
            format=FORMAT,
            step=step,
            identity=self._identity,
            world_size=self._world.size,
            has_optimizer=optimizer is not None,
            column_widths=column_widths(tensors),
            versions=installed_versions(),
            extra=dict(extra or {}),
            files={},
            tensor_checksums=checksums,
        )
        run_on_rank0(self._world, lambda: self._complete_folder(draft, final, state))
        if draft.is_remote:
            draft.discard()

    def load(self, model: nn.Module, optimizer: KeyedOptimizer | None, path: Path | None = None) -> dict[str, Any]:
        """Loads a checkpoint into a model and its optimizer; it may be written at another number of ranks.

        Args:
            model: The sharded model.
            optimizer: The optimizer, whose state must exist already; None loads no optimizer state.
            path: The checkpoint; None loads the newest complete one.

        Returns:
            The extra state given to `save`.

        Raises:
            UserError: The checkpoint is incomplete or damaged, or belongs to another catalog, stage or settings; raised
                on every rank before anything is loaded.
        """
        tensors = model_tensors(model)
        states = {} if optimizer is None else optimizer_tensors(optimizer, model)
        trains_tables = any(isinstance(value, ShardedTensor) for value in states.values())
        widths = column_widths(tensors) if trains_tables else None
        chosen, state = run_on_rank0(self._world, lambda: self._check(path, optimizer is not None, widths))
        tensors |= states
        try:
            dcp.load(in_blocks(tensors), storage_reader=CheckpointReader(chosen, state.tensor_checksums))
        except CheckpointException as error:
            known = _cause(error)
            if isinstance(known, DamagedCheckpointError):
                remedy = run_on_rank0(self._world, lambda: self._remedy(chosen))
                raise UserError(f"{known}; {remedy}") from error
            if isinstance(known, UserError):
                raise known from error
            raise UserError(
                f"{chosen} does not fit this model ({' '.join(str(known).split())[:200]}); "
                "use the settings of the run that wrote it"
            ) from error
        if optimizer is not None:
            # Fused Adam stores its step count in the kernel, not in its state tensors.
            optimizer.set_optimizer_step(state.step)
        return state.extra

    def _write_tensors(self, tensors: StateTensors, draft: FolderDraft) -> TensorChecksums:
        """Writes the tensors of all ranks; returns their checksums, complete only on rank 0."""
        draft.join()
        writer = CheckpointWriter(draft.path)
        try:
            dcp.save(tensors, storage_writer=writer)
        except CheckpointException as error:
            if self._world.rank == 0:
                draft.discard()
            known = _cause(error)
            if isinstance(known, UserError):
                raise known from error
            raise
        if draft.is_remote:
            run_on_all_ranks(self._world, draft.upload)
        checksums = [writer.checksums] * self._world.size
        if self._world.size > 1:
            # Also a barrier: all ranks have written their files when it returns.
            dist.all_gather_object(checksums, writer.checksums)
        return merge(checksums)

    def _complete(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if _FOLDER.fullmatch(path.name)]
        return sorted((path for path in found if (path / _COMPLETE).is_file()), reverse=True)

    def _prepare(self, final: Path, draft: FolderDraft) -> bool:
        if (final / _COMPLETE).is_file():
            return False
        with storage_errors(draft.path):
            # A run that was killed may have left them at any step. The lock of the run keeps other processes out.
            # A complete folder that it had not renamed is removed as well: this step is written again.
            for leftover in self._folder.iterdir() if self._folder.is_dir() else ():
                is_step = _FOLDER.fullmatch(leftover.name) and not (leftover / _COMPLETE).is_file()
                if is_step or _PARTIAL.fullmatch(leftover.name):
                    remove_folder(leftover)
            draft.begin()
        return True

    @staticmethod
    def _replace_extra(final: Path, extra: Mapping[str, Any] | None) -> None:
        before = _read_whole_state(final)
        if (state := replace(before, extra=dict(extra or {}))).to_json() != before.to_json():
            with atomic_write(final / _STATE) as partial:
                partial.write_text(state.to_json())

    def _complete_folder(self, draft: FolderDraft, final: Path, state: _State) -> None:
        partial, files = draft.path, draft.sizes()
        written = {
            str(entry.relative_path) for entry in CheckpointReader(partial).read_metadata().storage_data.values()
        }
        if missing := sorted(written - files.keys()):
            raise UserError(
                f"checkpoint {partial} lacks {missing[0]}, which another rank wrote elsewhere; "
                "give an --output on storage that all ranks share"
            )
        state = replace(state, files=files, checksums={_INDEX: file_checksum(partial / _INDEX)})
        try:
            with storage_errors(partial):
                write_and_fsync(partial / _STATE, state.to_json())
                write_and_fsync(partial / _COMPLETE, "")
                draft.publish()
        except UserError:
            draft.discard()
            raise
        complete = self._complete()
        later = [path for path in complete if path.name > final.name]
        old = [path for path in complete if path.name <= final.name][self._keep :]
        for path in later + old:
            remove_folder(path, _COMPLETE)

    def _check(
        self, path: Path | None, needs_optimizer: bool, widths: Mapping[str, list[int]] | None
    ) -> tuple[Path, _State]:
        chosen = path or next(iter(self._complete()), None)
        if chosen is None:
            raise UserError(f"{self._folder} has no complete checkpoint; start the stage again without --resume")
        if not (chosen / _COMPLETE).is_file():
            raise UserError(
                f"checkpoint {chosen} is not complete (it lacks the file {_COMPLETE}); "
                "remove it to resume from the one before"
            )
        state = self._read_state(chosen)
        if widths is not None:
            self._check_widths(chosen, state, widths)
        if needs_optimizer and not state.has_optimizer:
            raise UserError(
                f"checkpoint {chosen} has no optimizer state, so training cannot resume from it; "
                "remove it to resume from the one before"
            )
        return chosen, state

    def _read_state(self, chosen: Path) -> _State:
        """Reads state.json of a complete checkpoint, and checks the files and the identity."""
        try:
            state = _read_whole_state(chosen)
        except DamagedCheckpointError as error:
            raise UserError(f"{error}; {self._remedy(chosen)}") from None
        self._check_identity(chosen, state.identity)
        return state

    def _remedy(self, damaged: Path) -> str:
        """What to do about a damaged checkpoint: which older one is whole."""
        older = [path for path in self._complete() if path.name < damaged.name]
        whole = next((path for path in older if _is_whole(path)), None)
        if whole is None:
            return "there is no older checkpoint that is whole, so train the stage again in another --output"
        remove = [damaged, *(path for path in older if path.name > whole.name)]
        return f"remove {' and '.join(map(str, remove))} to resume from {whole.name}, which is whole"

    def _check_identity(self, path: Path, identity: Identity) -> None:
        if identity.catalog != self._identity.catalog:
            raise UserError(
                f"checkpoint {path} belongs to another catalog (other items, words, brands or categories: "
                f"{identity.catalog[:12]} instead of {self._identity.catalog[:12]}); "
                "give the data set it was trained on, or another --output"
            )
        if identity.stage != self._identity.stage:
            raise UserError(
                f"checkpoint {path} is of stage {identity.stage}, not of {self._identity.stage}; give another --output"
            )
        if (made_with := identity.factory) != self._identity.factory:
            raise UserError(
                f"checkpoint {path} was made with {made_with or 'no'} controls, not with "
                f"{self._identity.factory or 'none'}; give another --output"
            )
        now = json.loads(json.dumps(dict(self._identity.settings)))
        # The version which wrote the checkpoint may not have had a setting.
        known = {name: value for name, value in values_before_settings().items() if name in now}
        before = known | of_this_version(identity.settings)
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"setting {name} is {now.get(name, 'off')}, but checkpoint {path} was made with "
                    f"{before.get(name, 'off')}; give the same settings to resume, or another --output"
                )

    def _check_widths(self, path: Path, state: _State, widths: Mapping[str, list[int]]) -> None:
        """Row-wise Adagrad has one state value per row of each column shard, which cannot be loaded at other widths."""
        row_wise = state.identity.settings.get("tables.optimizer") == "rowwise_adagrad"
        if row_wise and state.column_widths != widths:
            raise UserError(
                f"checkpoint {path} was written by {state.world_size} ranks with other column shards, and row-wise "
                "Adagrad has a state for each; resume with the same --tables.sharding and number of ranks, "
                "or train with --tables.optimizer adagrad"
            )


def step_of(checkpoint: Path) -> int:
    """Number of training steps after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def _read_whole_state(path: Path) -> _State:
    """Reads state.json and checks it, the sizes of the files, and the index. Tensors are verified when they are read.

    Raises:
        DamagedCheckpointError: A file is missing or damaged.
        UserError: Another version wrote the checkpoint.
    """
    file = path / _STATE
    try:
        content = read_json(file)
        if (number := content.get("format")) != FORMAT:
            raise UserError(
                f"checkpoint {path} has format {number}, this version reads {FORMAT}; "
                "resume with the version that wrote it, or give another --output"
            )
        state = from_json(_State, unseal(content))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{file} is damaged ({error})") from None
    check_inside(path, [*state.files, *state.checksums], file)
    for name, size in state.files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise DamagedCheckpointError(f"checkpoint {path} is not complete: {name} has {found or 0} of {size} bytes")
    for name, recorded in state.checksums.items():
        if (checksum := file_checksum(path / name)) != recorded:
            raise DamagedCheckpointError(damage(path / name, checksum, recorded))
    # torch would log the stack trace of a damaged index, and raise another error.
    CheckpointReader(path).read_metadata()
    return state


def _is_whole(path: Path) -> bool:
    """Whether no file of a checkpoint is damaged; reads all of it."""
    try:
        CheckpointReader(path, _read_whole_state(path).tensor_checksums).verify()
    except UserError:
        return False
    return True


def _cause(error: CheckpointException) -> BaseException:
    """The failure of a rank; one that the user can fix, if there is one."""
    causes = [cause[0] if isinstance(cause, tuple) else cause for cause in error.failures.values()]
    if interrupted := [cause for cause in causes if isinstance(cause, KeyboardInterrupt)]:
        raise interrupted[0]
    return next((cause for cause in causes if isinstance(cause, UserError)), causes[0])
