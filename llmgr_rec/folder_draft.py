"""A folder that several ranks write and that readers see when it is complete."""

import shutil
from pathlib import Path

from llmgr_rec.files import INCOMPLETE, draft_of, publish_folder, remove_folder, upload_files, upload_marker
from llmgr_rec.remote_path import RemotePath


class FolderDraft:
    """Draft of a folder. Rank 0 begins and publishes it, every rank writes files to `path` and then calls `upload`.

    On shared storage all ranks write to FOLDER.tmp, which gets its final name at the end. For remote storage each
    process writes to a folder of its machine and uploads its files, and the marker comes last.

    Args:
        folder: The final folder.
        marker: File that all readers require, which rank 0 writes to `path` before it publishes.
    """

    def __init__(self, folder: Path, marker: str) -> None:
        self._folder = folder
        self._marker = marker
        self._uploaded: set[str] = set()
        self.is_remote = isinstance(folder, RemotePath)
        self.path = draft_of(folder) if isinstance(folder, RemotePath) else folder.with_name(f"{folder.name}.tmp")

    def begin(self) -> None:
        """Deletes what an unfinished draft has left, and makes the folder that is written to. Rank 0 calls this."""
        for leftover in {self._folder, self.path}:
            if leftover.exists():
                remove_folder(leftover)
        self.path.mkdir(parents=True)

    def join(self) -> None:
        """Makes the folder that this process writes to, if each has one of its own. Every rank calls this."""
        if self.is_remote:
            self.path.mkdir(parents=True, exist_ok=True)

    def upload(self) -> None:
        """Uploads what this process has written, if the folder is remote. Every rank calls this."""
        if isinstance(self._folder, RemotePath):
            upload_files(self.path, self._folder, self._marker, self._uploaded)
            self._uploaded |= {str(path.relative_to(self.path)) for path in self.path.rglob("*")}

    def sizes(self) -> dict[str, int]:
        """Bytes of the files of all ranks so far, by name, without those in folders below."""
        shared = self._folder if self.is_remote else self.path
        files = sorted(path for path in shared.iterdir() if path.name != INCOMPLETE)
        return {file.name: file.stat().st_size for file in files}

    def publish(self) -> None:
        """Completes the folder, when all ranks have uploaded. Rank 0 calls this.

        Raises:
            UserError: The final path exists.
        """
        if isinstance(self._folder, RemotePath):
            self.upload()
            upload_marker(self.path, self._folder, self._marker)
        else:
            publish_folder(self.path, self._folder)

    def discard(self) -> None:
        """Deletes the folder that is written to: after a failure, and after `publish` if it is of this process."""
        shutil.rmtree(self.path, ignore_errors=True)
