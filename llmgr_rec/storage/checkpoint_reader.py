"""Reads sharded checkpoints from untrusted sources: no code of the checkpoint is executed, and damage is found.

`torch.distributed.checkpoint` stores its index in `.metadata`, a pickle. The unpickler of this module resolves only the
data classes of such an index. The index may describe only tensors, because other values would be unpickled in full.
"""

import pickle
from enum import Enum
from pathlib import Path, PosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from llmgr_rec.checksums import Checksum
from llmgr_rec.errors import UserError
from llmgr_rec.storage.checkpoint_writer import TensorChecksums
from llmgr_rec.versions import PICKLED_MODULES

_BLOCK_BYTES = 1 << 20

_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
}


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles the index of a checkpoint; all global names but those of an index are rejected."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolves a global name of the pickle.

        Raises:
            UnpicklingError: The name is not part of a checkpoint index.
        """
        module = PICKLED_MODULES.get(module, module)
        if (module, name) == ("builtins", "getattr"):
            # Python 3.11.0 to 3.11.3 pickle an enum member so.
            return _enum_member
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _enum_member(kind: Any, name: str) -> Enum:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError("it reads an attribute")
    return kind[name]


class DamagedCheckpointError(UserError):
    """A file of a checkpoint has another content than was written."""


class CheckpointReader(FileSystemReader):
    """Storage reader that reads the index with `MetadataUnpickler`; torch reads the tensors with weights_only=True.

    Each tensor is hashed immediately before it is read, so that it is read from storage once.

    Args:
        path: Checkpoint folder.
        checksums: Recorded checksums of the tensors; None for checkpoints of earlier versions, which have none.
    """

    def __init__(self, path: Path, checksums: TensorChecksums | None = None) -> None:
        super().__init__(path)
        self._folder = path
        self._checksums = checksums

    def verify(self) -> None:
        """Compares all tensors with their checksums.

        Raises:
            DamagedCheckpointError: The index or a tensor is damaged.
        """
        for entry in (self.read_metadata().storage_data or {}).values():
            with (self._folder / entry.relative_path).open("rb") as file:
                self._verify_tensor(file, entry)

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        self._verify_tensor(file, sinfo)
        return super()._slice_file(file, sinfo)

    def _verify_tensor(self, file: IO[bytes], entry: _StorageInfo) -> None:
        if self._checksums is None:
            return
        checksum, left = Checksum(), entry.length
        file.seek(entry.offset)
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            checksum.update(block)
            left -= len(block)
        recorded = self._checksums.get(entry.relative_path, {}).get(str(entry.offset), "none")
        if checksum.text() != recorded:
            raise DamagedCheckpointError(
                f"checkpoint file {self._folder / entry.relative_path} is damaged: the checksum of its {entry.length} "
                f"bytes from {entry.offset} is {checksum.text()}, recorded was {recorded}"
            )

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads the index.

        Raises:
            DamagedCheckpointError: The file is not a checkpoint index, or names other classes or files outside of the
                folder.
        """
        file = self._folder / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _load(stream)
        except Exception as error:
            # A damaged pickle calls the allowed classes with any arguments, which may raise anything.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DamagedCheckpointError(f"{file} is not the index of a checkpoint ({reason})") from None
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _load(stream: IO[bytes]) -> Metadata:
    metadata = MetadataUnpickler(stream).load()
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it contains a {type(metadata).__name__}")
    for entry in (metadata.storage_data or {}).values():
        if PosixPath(entry.relative_path).name != entry.relative_path:
            raise ValueError(f"it names the file {entry.relative_path}")
    return metadata
