"""A run that is made from the bundles of another one, without training."""

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmgr_rec.config import STAGES, StageName
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_folder, is_free, require_writable
from llmgr_rec.storage.bundle import BundleFiles, open_bundle
from llmgr_rec.storage.bundle_index import CONFIG, INDEX, PROMPTS, is_complete, resolve_bundle
from llmgr_rec.storage.run_facts import TRAINING_RECORD


def open_bundles(run: Path, stage: StageName | None = None, allow_code: Collection[str] = ()) -> list[BundleFiles]:
    """Opens the complete bundles of a run, in the order of their stages; a bundle itself, if it is one.

    Args:
        run: A run, or a bundle.
        stage: The only stage whose bundle is opened; None opens all.
        allow_code: Modules and packages from which the bundles may import encoder and head.

    Raises:
        UserError: There is no complete bundle.
    """
    last = resolve_bundle(run)
    if last == run:
        return [open_bundle(run, allow_code)]
    stages = STAGES if stage is None else (stage,)
    paths = [last.parent / name for name in stages if is_complete(last.parent / name)]
    if not paths:
        raise UserError(f"{run} has no complete export of stage {stage}; train it first (llmgr_rec.train --resume)")
    return [open_bundle(path, allow_code) for path in paths]


@contextmanager
def derived_run(run: Path, output: Path, bundles: Sequence[BundleFiles]) -> Iterator[Path]:
    """Yields a folder for bundles, `export/STAGE` each, which becomes the new run with the settings of the first one.

    The output gets its name when it is complete.

    Args:
        run: The run, or bundle, from which the new one is made.
        output: Folder to create; must not exist or be empty.
        bundles: Its bundles, from `open_bundles`.

    Raises:
        UserError: The output is not empty or cannot be written.
    """
    marker = f"export/{bundles[-1].index.stage}/{INDEX}"
    require_writable(output)
    if not is_free(output, marker):
        raise UserError(f"--output {output} is not empty; give a folder that does not exist")
    with atomic_folder(output.resolve(), marker) as draft:
        yield draft
        settings = run if (run / CONFIG).is_file() else bundles[-1].path
        for file in (CONFIG, PROMPTS, TRAINING_RECORD):
            if (settings / file).is_file():
                shutil.copyfile(settings / file, draft / file)
