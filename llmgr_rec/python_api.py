"""`Recommender`: train, load and ask a recommender from Python, with raw item ids and data frames.

Nothing here changes the process: no process group, no environment variable, no number of threads. Training runs in
another process.

Shapes: B sessions, R items that may be recommended, V items of the catalog, K places of a list, Q columns of item
vectors.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from llmgr_rec.arrow_input import is_lists, to_sessions, to_table
from llmgr_rec.baselines.blend import clicks_of
from llmgr_rec.baselines.knn import Popularity
from llmgr_rec.config import DType
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import CatalogRanker
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.exclusion import ranking_rule
from llmgr_rec.files import atomic_folder
from llmgr_rec.kernels.topk import top_k
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.prepare_for_inference import prepare_for_inference
from llmgr_rec.scoring.click_lists import flat_clicks, known_clicks
from llmgr_rec.scoring.ranked_lists import list_columns
from llmgr_rec.storage.bundle import BundleFiles, load_model, open_bundle

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
# Sessions that are encoded at once.
_BATCH = 256


class Recommender:
    """A trained recommender: ranks items for sessions, and finds similar items.

    Made by `fit` or `load`. Its methods may be called from several threads at once, and a process may hold several.

    Args:
        files: The opened bundle of the model.
        run: Folder of the run, for `evaluate`; None if only the bundle is known.
        dataset: Prepared data set of the run, for `evaluate`; None if it is not known.
        dtype: Number format of the language model, if there is one; None uses the setting of the run.
    """

    def __init__(
        self, files: BundleFiles, run: Path | None = None, dataset: Path | None = None, dtype: DType | None = None
    ) -> None:
        bundle = load_model(files, dtype=dtype)
        if isinstance(bundle.model, LLMGR):
            prepare_for_inference(bundle.model.language_model)
        self._path, self._run, self._dataset = files.path, run, dataset
        self._rule = ranking_rule(files.index)
        self._merges_repeats = files.index.consecutive_repeats == "merge"
        self._catalog = bundle.catalog
        self._titles = pa.array(bundle.catalog.titles(), pa.string())
        self._fallback = Popularity(bundle.catalog.train_count_V.numpy())
        self._ranking = bundle.ranking(_BATCH)
        self._ranker = self._ranking.ranker(World.alone())
        self._unit_VQ = torch.nn.functional.normalize(self._ranker.item_vectors, dim=1)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        dataset: str | os.PathLike[str] | None = None,
        dtype: DType | None = None,
        allow_code: Collection[str] = (),
    ) -> "Recommender":
        """Loads a trained recommender.

        Args:
            path: A run, or a bundle: what `save` wrote, or a folder `RUN/export/STAGE`.
            dataset: Prepared data set, for `evaluate`; needed for nothing else.
            dtype: Number format of the language model, if there is one: float32, bfloat16 or auto.
            allow_code: Modules and packages from which the bundle may import its encoder and head.

        Raises:
            UserError: There is no complete bundle, it is damaged, or it would import code that is not allowed.
        """
        folder = Path(path)
        files = open_bundle(folder, allow_code)
        run = folder if files.path != folder.resolve() and files.path != folder else None
        return cls(files, run, None if dataset is None else Path(dataset), dtype)

    @classmethod
    def fit(
        cls,
        interactions: object,
        items: object | None = None,
        *,
        recipe: str = "default",
        settings: Mapping[str, object] | None = None,
        preparation: Mapping[str, object] | None = None,
        output: str | os.PathLike[str] | None = None,
    ) -> "Recommender":
        """Prepares data, trains in another process, and loads the result.

        Args:
            interactions: Clicks with `user_id`, `item_id` and `timestamp`, or one session a row with `session_id` and
                `items`, in any form that `arrow_input.to_table` takes; or lists of item ids, one a session.
            items: Table with `item_id` and, each optional, `title`, `category`, `brand`, `description`. None takes the
                items of the interactions, without text.
            recipe: Recipe, or path of a settings file; see docs/concepts.md.
            settings: Settings of the training by dotted name, such as {"sbr.epochs": 5}.
            preparation: Options of `python -m llmgr_rec.prepare` by name, such as {"min_interactions": 1}.
            output: New folder for the data set and the run. None uses a temporary folder, which is deleted together
                with the recommender; `save` keeps the model.

        Raises:
            UserError: The data, a setting or the training failed; the message is that of the command concerned.
        """
        if output is not None:
            return cls._fit_in(Path(output), interactions, items, recipe, settings or {}, preparation or {})
        folder = Path(tempfile.mkdtemp(prefix="llmgr_rec-"))
        try:
            fitted = cls._fit_in(folder, interactions, items, recipe, settings or {}, preparation or {})
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(fitted, shutil.rmtree, folder, ignore_errors=True)
        return fitted

    @classmethod
    def _fit_in(
        cls,
        folder: Path,
        interactions: object,
        items: object | None,
        recipe: str,
        settings: Mapping[str, object],
        preparation: Mapping[str, object],
    ) -> "Recommender":
        option, clicks = _interactions_table(interactions)
        catalog = _items_of(clicks) if items is None else to_table(items, "items")
        if "title" not in catalog.column_names:
            catalog = catalog.append_column("title", pa.nulls(catalog.num_rows, pa.string()))
        folder.mkdir(parents=True, exist_ok=True)
        dataset, run = folder / "dataset", folder / "run"
        with tempfile.TemporaryDirectory(dir=folder, prefix=".input-") as raw:
            pq.write_table(clicks, f"{raw}/{option}.parquet")
            pq.write_table(catalog, f"{raw}/items.parquet")
            given = {option: f"{raw}/{option}.parquet", "items": f"{raw}/items.parquet", "output": dataset}
            _run_command("prepare", {**preparation, **given})
        _run_command("train", {"config": recipe, "dataset": dataset, "output": run, **settings})
        return cls(open_bundle(run), run, dataset)

    @property
    def item_ids(self) -> pa.Array:
        """Ids of the items of the catalog, string or int64."""
        return self._catalog.item_ids

    @property
    def titles(self) -> pa.Array:
        """Title of each item of `item_ids`; null for an item without one."""
        return self._titles

    def recommend(
        self,
        sessions: object,
        k: int = 10,
        *,
        exclude_seen: bool | None = None,
        among: Collection[Any] | None = None,
        without: Collection[Any] = (),
        category: str | None = None,
    ) -> pa.Table:
        """Ranks items for sessions.

        A session without a known item gets the most popular items, and true in the column `fallback`. Unknown items of
        other sessions are ignored.

        Args:
            sessions: Lists of item ids, oldest click first, one a session; or a table, see `arrow_input.to_sessions`.
            k: Maximum number of items for a session.
            exclude_seen: Whether items of the session are left out; None does as the training data suggest, which is
                the rule of `evaluate` and `score`.
            among: Item ids that may be recommended; None allows all. Ids that are not in the catalog are ignored.
            without: Item ids that are not recommended.
            category: Recommends only items of this category, or of one below it.

        Returns:
            One row a session, in their order: `session_id`, then the lists `item_ids`, `titles` and `scores` (float32),
            best first, and `fallback`. A list is shorter than K if fewer items are allowed. `to_pylist()` gives
            records, `to_pandas()` and `polars.from_arrow` data frames.

        Raises:
            UserError: `k` is not positive, or sessions, ids or the category have a wrong type or are unknown.
        """
        if k < 1:
            raise UserError(f"k is {k}; give 1 or more")
        k = min(k, self._catalog.num_items)
        table = to_sessions(sessions)
        clicks = self._clicks(table["items"])
        allowed_R = self._allowed(among, without, category)
        excludes = self._rule.excludes_seen if exclude_seen is None else exclude_seen
        ranker = self._ranker if allowed_R is None else self._ranker.among(allowed_R)
        is_empty_B = clicks.lengths == 0
        ids_BK, scores_BK = (row_K.repeat(clicks.num_rows, 1) for row_K in self._popular(k, allowed_R))
        for rows in torch.arange(clicks.num_rows).split(_BATCH):
            known = rows[~is_empty_B[rows]]
            if known.numel():
                ids_BK[known], scores_BK[known] = self._ranked(ranker, clicks.select(known), k, excludes)
        ranked = self._lists(ids_BK, scores_BK)
        return pa.table({"session_id": table["session_id"], **ranked, "fallback": pa.array(is_empty_B.numpy())})

    def similar(self, items: Sequence[Any], k: int = 10) -> pa.Table:
        """Finds the items with the most similar vectors.

        Args:
            items: Item ids.
            k: Maximum number of similar items.

        Returns:
            One row for each given item, in their order: `item_id`, then the lists `item_ids`, `titles` and `scores`
            (cosine similarity, float32), best first, without the item itself.

        Raises:
            UserError: `k` is not positive, or an item is not in the catalog.
        """
        if k < 1:
            raise UserError(f"k is {k}; give 1 or more")
        k = min(k, self._catalog.num_items)
        ids = _array(items, "items")
        indices_B = torch.from_numpy(self._catalog.index_of(ids))
        if (indices_B < 0).any():
            unknown = ids[int((indices_B < 0).nonzero()[0])].as_py()
            raise UserError(f"item {unknown!r} is not in the catalog of {self._catalog.num_items:,} items")
        itself = Jagged.from_lengths(indices_B, torch.ones_like(indices_B))
        ids_BK, scores_BK = top_k(self._unit_VQ[indices_B], self._unit_VQ, k, itself)
        return pa.table({"item_id": ids, **self._lists(ids_BK, scores_BK)})

    def evaluate(self, split: str = "test", **options: object) -> dict[str, Any]:
        """Metrics of the trained models and baselines on the data set of the run, in another process.

        Args:
            split: test or valid.
            options: Options of `python -m llmgr_rec.evaluate` by name, such as models="popularity,sbr".

        Returns:
            The content of the metrics file, see docs/data.md.

        Raises:
            UserError: Run and data set are not known, as of a bundle alone, or do not belong together.
        """
        if self._run is None or self._dataset is None:
            raise UserError("evaluate needs run and data set: use Recommender.load(run, dataset=folder)")
        with tempfile.TemporaryDirectory(prefix="llmgr_rec-") as folder:
            file = Path(folder) / "metrics.json"
            given = {"run": self._run, "dataset": self._dataset, "split": split, "output": file}
            _run_command("evaluate", {**options, **given})
            content: dict[str, Any] = json.loads(file.read_text())
        return content

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model as a bundle, a folder that `load` and `python -m llmgr_rec.score --run` take.

        Args:
            path: Folder to create; must not exist or be empty.

        Raises:
            UserError: The folder is not empty or cannot be written.
        """
        folder = Path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder; give another path")
        with atomic_folder(folder.resolve()) as draft:
            shutil.copytree(self._path, draft, dirs_exist_ok=True)

    def _clicks(self, lists: pa.ChunkedArray) -> Jagged:
        """Item indices of the newest known clicks of each session that the model is shown."""
        ids_L, offsets_B1, nulls = flat_clicks(lists)
        if nulls:
            raise UserError(f"sessions hold {nulls:,} null item ids; remove them")
        clicks = Jagged(*map(torch.from_numpy, known_clicks(self._catalog.index_of(ids_L), offsets_B1)))
        if self._merges_repeats:
            clicks = clicks.without_consecutive_repeats()
        return clicks.last(self._rule.max_length)

    def _allowed(self, among: Collection[Any] | None, without: Collection[Any], category: str | None) -> Tensor | None:
        """Item indices that may be recommended, ascending, int64 [R]; None if all may."""
        if among is None and not without and category is None:
            return None
        is_allowed_V = np.ones(self._catalog.num_items, bool)
        if among is not None:
            chosen = self._catalog.index_of(_array(among, "among"))
            is_allowed_V = np.isin(np.arange(len(is_allowed_V)), chosen)
        if without:
            removed = self._catalog.index_of(_array(without, "without"))
            is_allowed_V[removed[removed >= 0]] = False
        if category is not None:
            is_allowed_V &= self._catalog.in_category(category)
        return torch.from_numpy(np.flatnonzero(is_allowed_V))

    @torch.no_grad()
    def _ranked(self, ranker: CatalogRanker, clicks: Jagged, k: int, excludes: bool) -> tuple[Tensor, Tensor]:
        """The K best items of each session of a batch, none of them empty: as `CatalogRanker.rank`."""
        batch = self._ranking.collate(RawSessions.to_rank(clicks))
        blended = None if self._ranking.blend is None else clicks_of(batch)
        return ranker.rank(self._ranking.queries(batch), k, clicks if excludes else None, blended)

    def _popular(self, k: int, allowed_R: Tensor | None) -> tuple[Tensor, Tensor]:
        """The K most popular items that may be recommended, and their shares of all clicks; padded with -1 and -inf."""
        size = self._catalog.num_items if allowed_R is not None else k
        ids, shares = self._fallback.rank(np.zeros(0, np.int64), np.zeros(2, np.int64), size)
        ids_R, shares_R = torch.from_numpy(ids[0]), torch.from_numpy(shares[0]).float()
        if allowed_R is not None:
            is_allowed_R = torch.isin(ids_R, allowed_R)
            ids_R, shares_R = ids_R[is_allowed_R][:k], shares_R[is_allowed_R][:k]
        missing = (0, k - len(ids_R))
        pad = torch.nn.functional.pad
        return pad(ids_R, missing, value=-1), pad(shares_R, missing, value=float("-inf"))

    def _lists(self, ids_BK: Tensor, scores_BK: Tensor) -> dict[str, pa.Array]:
        values = {"item_ids": self._catalog.item_ids, "titles": self._titles}
        return list_columns(values, ids_BK.numpy(), scores_BK.numpy(), is_large=True)


def _interactions_table(interactions: object) -> tuple[str, pa.Table]:
    """Option of prepare and its table: clicks, or sessions."""
    if is_lists(interactions):
        return "sessions", to_sessions(interactions, "interactions")
    table = to_table(interactions, "interactions")
    return ("sessions" if "items" in table.column_names else "interactions"), table


def _items_of(clicks: pa.Table) -> pa.Table:
    """The items of clicks or sessions, in order of their first click."""
    if "items" in clicks.column_names:
        ids = clicks["items"].combine_chunks().flatten()
    elif "item_id" in clicks.column_names:
        ids = clicks["item_id"].combine_chunks()
    else:
        raise UserError(f"interactions have neither item_id nor items; they have {', '.join(clicks.column_names)}")
    return pa.table({"item_id": ids.unique().drop_null()})


def _array(ids: Collection[Any], name: str) -> pa.Array:
    if isinstance(ids, pa.Array | pa.ChunkedArray):
        return ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    if isinstance(ids, str):
        raise UserError(f"{name} is {ids!r}; give a list of item ids")
    try:
        return pa.array(list(ids))
    except (pa.ArrowException, TypeError, OverflowError):
        raise UserError(f"{name}: item ids must all be integers or all text") from None


def _run_command(command: str, options: Mapping[str, object]) -> None:
    """Runs `python -m llmgr_rec.COMMAND` in another process.

    Raises:
        UserError: The command failed; the message is its own.
    """
    words = [
        f"--{name}={json.dumps(value) if isinstance(value, list | bool) else value}" for name, value in options.items()
    ]
    # Of a process that torchrun started, the child is no rank.
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", f"llmgr_rec.{command}", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        message = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        raise UserError(f"{command} failed: {message.removeprefix('error: ')}")
