"""RUN/training.json: when, how long and on what machine a run was trained, one entry for each launch."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmgr_rec.distributed.process_group import World
from llmgr_rec.files import atomic_write
from llmgr_rec.remote_path import RemotePath
from llmgr_rec.storage.machine import Machine
from llmgr_rec.storage.run_facts import TRAINING_RECORD, read_launches
from llmgr_rec.versions import own_version


class TrainingRecord:
    """The entry of this launch, written by rank 0 when it starts, after each stage and when it ends.

    Args:
        run: Run folder.
        recipe: Recipe or settings file; empty takes that of the launch before, as a resumed run does.
        dataset: Data set of the run.
        seed: Seed of the run.
        world: Ranks; this does nothing on ranks other than 0.
    """

    def __init__(self, run: Path, recipe: str, dataset: Path, seed: int, world: World) -> None:
        self._file = run / TRAINING_RECORD
        self._enabled = world.rank == 0
        self._started = time.monotonic()
        if not self._enabled:
            return
        self._earlier = read_launches(run)
        recipe = recipe or next((launch["recipe"] for launch in reversed(self._earlier) if launch["recipe"]), "")
        self._launch: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "ended": False,
            "stages": {},
            "recipe": recipe,
            "dataset": str(dataset if isinstance(dataset, RemotePath) else dataset.absolute()),
            "seed": seed,
            "version": own_version(),
            "ranks": world.size,
            "machine": asdict(Machine.of(world.device)),
        }

    def __enter__(self) -> "TrainingRecord":
        self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._enabled:
            # False only for a launch that was killed, whose time is not known.
            self._launch["ended"] = True
            self._write()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage; a stage that fails is not recorded.

        Args:
            name: The stage.
        """
        started = time.monotonic()
        yield
        if self._enabled:
            self._launch["stages"][name] = round(time.monotonic() - started, 1)
            self._write()

    def _write(self) -> None:
        if not self._enabled:
            return
        self._launch["seconds"] = round(time.monotonic() - self._started, 1)
        with atomic_write(self._file) as partial:
            partial.write_text(json.dumps([*self._earlier, self._launch], indent=2) + "\n", encoding="utf-8")
