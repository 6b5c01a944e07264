"""`Recommender`: train, load and ask a recommender from Python, with raw item ids and data frames.

Nothing here changes the process: no process group, no environment variable, no number of threads. Training runs in
another process.

Shapes: B sessions, R items that may be recommended, K places of a list.
"""

import functools
import json
import operator
import os
import re
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import torch

from llmgr_rec.arrow_input import to_ids, to_sessions, to_table
from llmgr_rec.command_process import own_and_given, run_command
from llmgr_rec.config import DType, TableDType
from llmgr_rec.config_file import load_config
from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.explanation.explainer import Explainer
from llmgr_rec.explanation.records import Explanation
from llmgr_rec.files import atomic_folder, copy_folder, is_free
from llmgr_rec.fit_input import FitInput, by_domain
from llmgr_rec.kernels.item_index import check_recall
from llmgr_rec.registry import modules_of
from llmgr_rec.remote_path import as_path
from llmgr_rec.scoring.output import OUTPUT_COLUMNS
from llmgr_rec.scoring.ranked_lists import RankedLists, long_rows, rows_of_short_offsets
from llmgr_rec.scoring.session_ranker import SessionRanker
from llmgr_rec.storage.bundle import BundleFiles, code_names, open_bundle
from llmgr_rec.storage.bundle_index import INDEX, resolve_bundle
from llmgr_rec.storage.extended_run import extend_run

# Folders in the output of `fit`.
_DATASET, _RUN = "dataset", "run"
# Options of the commands that other arguments of `fit` set.
_SET_BY_FIT = ("interactions", "sessions", "items", "output", "config", "dataset")
Layout = Literal["lists", "long"]
Progress: TypeAlias = Callable[[str], object] | None
# Sessions that `recommend_arrow` ranks at once, which bounds its memory beside its result.
_ARROW_ROWS = 16384
# Recommenders of `load_once` by bundle, with the file and the time of the bundle's index.
_loaded: dict[Path, tuple[tuple[int, int], "Recommender"]] = {}
_loading = threading.Lock()


class Recommender:
    """A trained recommender: ranks items for sessions, and finds similar items.

    Made by `fit` or `load`. Its methods may be called from several threads at once, and a process may hold several.

    Args:
        files: The opened bundle of the model.
        run: Folder of the run, for `evaluate`; None if only the bundle is known.
        dataset: Prepared data set of the run, for `evaluate`; None if it is not known.
        dtype: Number format of the language model, if there is one; None uses the setting of the run.
        index: See `load`.
        table_dtype: See `load`.

    Attributes:
        ranker: Ranks item indices; for the modules of this package, and no part of the public API.
    """

    def __init__(
        self,
        files: BundleFiles,
        run: Path | None = None,
        dataset: Path | None = None,
        dtype: DType | None = None,
        index: float | None = None,
        table_dtype: TableDType | None = None,
    ) -> None:
        if index is not None:
            check_recall(index, "index")
        _check_choice("dtype", dtype, get_args(DType))
        _check_choice("table_dtype", table_dtype, get_args(TableDType))
        self._files, self._run, self._dataset = files, run, dataset
        self.ranker = SessionRanker(files, dtype, index, table_dtype)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        dataset: str | os.PathLike[str] | None = None,
        dtype: DType | None = None,
        index: float | None = None,
        table_dtype: TableDType | None = None,
        allow_code: Collection[str] = (),
    ) -> "Recommender":
        """Loads a trained recommender.

        Args:
            path: What `save` wrote, the `output` of `fit`, a run, or a bundle in one (`RUN/export/STAGE`).
            dataset: Prepared data set, for `evaluate`; needed for nothing else. None takes that of the `output` of
                `fit`, if `path` is one.
            dtype: Number format of the language model, if there is one: float32, bfloat16 or auto.
            index: Share of the best 20 items that an approximate index must find, such as 0.99; None ranks exactly. For
                catalogs of about a million items or more, with the extra `index`; see docs/serving.md.
            table_dtype: Number format of the embedding tables in memory: float32, float16, int8 or int4; None takes
                that of the exported model. See docs/export.md.
            allow_code: Modules and packages from which the bundle may import its encoder and head.

        Raises:
            UserError: There is no complete bundle, it is damaged, it would import code that is not allowed, or an index
                is wanted and faiss is not installed.
        """
        folder = _run_folder(as_path(path))
        if folder != as_path(path) and dataset is None:
            dataset = as_path(path) / _DATASET
        files = open_bundle(folder, allow_code)
        run = folder if files.path != folder.resolve() and files.path != folder else None
        return cls(files, run, None if dataset is None else as_path(dataset), dtype, index, table_dtype)

    @classmethod
    def load_once(cls, path: str | os.PathLike[str]) -> "Recommender":
        """As `load`, but once a process: for functions that an engine calls for each part of its data.

        A process that already holds the recommender of `path` returns it, unless another bundle is there by now.

        Args:
            path: As for `load`.

        Raises:
            UserError: As from `load`.
        """
        bundle = resolve_bundle(_run_folder(as_path(path))).resolve()
        with _loading:
            status = (bundle / INDEX).stat()
            version, (loaded, found) = (status.st_ino, status.st_mtime_ns), _loaded.get(bundle, (None, None))
            if found is None or loaded != version:
                found = cls.load(path)
                _loaded[bundle] = version, found
        return found

    @classmethod
    def fit(
        cls,
        interactions: object,
        items: object | None = None,
        recipe: str = "default",
        *,
        settings: Mapping[str, object] | None = None,
        preparation: Mapping[str, object] | None = None,
        output: str | os.PathLike[str] | None = None,
        verbose: bool | None = None,
    ) -> "Recommender":
        """Prepares data, trains in another process, and loads the result.

        Args:
            interactions: Clicks with `user_id` or `session_id`, `item_id` and `timestamp`, or one session a row with
                `session_id` and `items`, in any form that `arrow_input.to_table` takes; or lists of item ids, one a
                session. Clicks without `timestamp` are in their order. For one model of several domains, a mapping
                of their names to these; see docs/domains.md.
            items: Table with `item_id` and, each optional, `title`, `category`, `brand`, `description`; or those of the
                domains by name. None takes the items of the interactions, without text.
            recipe: Recipe, or path of a settings file; see docs/concepts.md.
            settings: Settings of the training by dotted name, such as {"sbr.epochs": 5}.
            preparation: Options of `python -m llmgr_rec.prepare` by name, such as {"min_interactions": 1}.
            output: New folder for the data set and the run. None uses a temporary folder, which is deleted together
                with the recommender; `save` keeps the model.
            verbose: Whether the progress is written to stderr. None does so on a terminal and in a notebook.

        Raises:
            UserError: The data, a setting or the training failed; the message is that of the command concerned.
        """
        arguments = (interactions, items, recipe, settings or {}, preparation or {}, _progress(verbose))
        if output is not None:
            return cls._fit_in(_new_folder(as_path(output)), *arguments)
        folder = Path(tempfile.mkdtemp(prefix="llmgr_rec-"))
        try:
            fitted = cls._fit_in(folder, *arguments)
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
        progress: Progress,
    ) -> "Recommender":
        dataset, run = folder / _DATASET, folder / _RUN
        with tempfile.TemporaryDirectory(prefix="llmgr_rec-") as written:
            data = FitInput(interactions, items, Path(written))
            options = own_and_given({**data.options, "output": dataset}, preparation, "preparation")
            try:
                run_command("prepare", options, progress)
            except UserError as error:
                raise _naming_argument(data.in_terms_of_caller(str(error)), "preparation") from None
        options = own_and_given({"config": recipe, "dataset": dataset, "output": run}, settings, "settings")
        try:
            run_command("train", options, progress)
        except UserError as error:
            raise _naming_argument(str(error), "settings") from None
        # The caller has named the code of these settings.
        code = modules_of(code_names(load_config(run / "config.yaml")).values())
        return cls(open_bundle(run, code), run, dataset)

    def __repr__(self) -> str:
        bundle = self.ranker.bundle
        return f"<Recommender of stage {bundle.stage} with {bundle.catalog.num_items:,} items from {self._files.path}>"

    @property
    def index_recall(self) -> float | None:
        """Share of the best 20 items that the index finds for sample sessions; None if all items are ranked exactly."""
        return self.ranker.index_recall

    @property
    def item_ids(self) -> pa.Array:
        """Ids of the items of the catalog, string or int64."""
        return self.ranker.catalog.item_ids

    @property
    def titles(self) -> pa.Array:
        """Title of each item of `item_ids`; null for an item without one."""
        return self.ranker.titles

    def recommend(
        self,
        sessions: object,
        k: int = 10,
        *,
        exclude_seen: bool | None = None,
        among: Collection[Any] | None = None,
        without: Collection[Any] = (),
        category: str | None = None,
        domain: str | None = None,
        layout: Layout = "lists",
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
            domain: For a model of several domains: recommends items of this one, or of `all`. None recommends items of
                the domain of each session, which is that of its newest click; see docs/domains.md.
            layout: lists gives one row a session, long one row a recommended item.

        Returns:
            One row a session, in their order: `session_id`, then the lists `item_ids`, `titles` and `scores` (float32),
            best first, and `fallback`. A list is shorter than K if fewer items are allowed. With layout long, one row
            an item: `session_id`, `rank` (from 1), `item_id`, `title`, `score`, `fallback`. `to_pylist()` gives
            records, `to_pandas()` and `polars.from_arrow` data frames.

        Raises:
            UserError: `k` is not positive, or sessions, ids, category or domain have a wrong type or are unknown.
        """
        length = self._list_length(k)
        if layout not in get_args(Layout):
            raise UserError(f"layout is {layout!r}; give lists or long")
        table = to_sessions(sessions)
        clicks = self.ranker.clicks(table["items"])
        allowed_R = self.ranker.allowed_items(among, without, category, domain)
        flag = _checked_flag(exclude_seen)
        excludes_seen = self.ranker.rule.excludes_seen if flag is None else flag
        domain_B = self.ranker.domains(table["items"])
        ranked = self.ranker.lists(*self.ranker.rank(clicks, length, excludes_seen, allowed_R, domain, domain_B))
        is_empty_B = (clicks.lengths == 0).numpy()
        lists = pa.table({"session_id": table["session_id"], **ranked, "fallback": pa.array(is_empty_B)})
        return long_rows(lists) if layout == "long" else lists

    def recommend_arrow(
        self,
        sessions: pa.Table | pa.RecordBatch,
        k: int = 20,
        *,
        columns: Sequence[str] = ("session_id",),
        titles: bool = False,
    ) -> pa.Table:
        """Ranks items for a table of sessions, with the rows and columns that `python -m llmgr_rec.score` writes.

        Meant for engines that pass Arrow data to functions, such as `mapInArrow` of Spark and `map_batches` of Ray
        Data; see docs/spark.md.

        Args:
            sessions: Columns `session_id`, and `items`: lists of raw item ids, oldest click first. May have no rows.
            k: Maximum number of items for a session.
            columns: Columns of the sessions that the result has too.
            titles: Whether the result has the titles of the items.

        Returns:
            One row a session, in their order: `session_id`, then the lists `item_ids`, `titles` if asked for, and
            `scores` (float32), best first; `fallback`, true for a session without a known item, which gets the most
            popular ones; and the other `columns`. Lists have 32-bit offsets, as Spark needs them.

        Raises:
            UserError: `k` is not positive, a column is missing or has the name of one of the result, an id has a wrong
                type, or there is a null.
        """
        length = self._list_length(k)
        table = to_table(sessions, "sessions")
        copied = _copied_columns(table, columns)
        clicks = to_sessions(table)["items"]
        values = {"item_ids": self.item_ids, **({"titles": self.titles} if titles else {})}
        rows = min(_ARROW_ROWS, rows_of_short_offsets(values, length))
        lists = RankedLists(values, rows, length)
        parts = []
        # One slice for no sessions, which has the types of the result.
        for first in range(0, max(table.num_rows, 1), rows):
            some = clicks.slice(first, rows)
            part = self.ranker.clicks(some)
            domain_B = self.ranker.domains(some)
            ids_BK, scores_BK = self.ranker.rank(part, length, self.ranker.rule.excludes_seen, domain_B=domain_B)
            ranked = lists.columns(ids_BK.numpy(), scores_BK.numpy())
            of_sessions = copied.slice(first, rows)
            fallback = pa.array((part.lengths == 0).numpy())
            parts.append(
                pa.table(
                    {
                        "session_id": of_sessions["session_id"],
                        **ranked,
                        "fallback": fallback,
                        **{name: of_sessions[name] for name in copied.column_names[1:]},
                    }
                )
            )
        return pa.concat_tables(parts)

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
        length, catalog = self._list_length(k), self.ranker.catalog
        ids = to_ids(items, "items")
        indices_B = torch.from_numpy(catalog.index_of(ids))
        if (indices_B < 0).any():
            unknown = ids[int((indices_B < 0).nonzero()[0])].as_py()
            raise UserError(f"item {unknown!r} is not in the catalog of {catalog.num_items:,} items")
        return pa.table({"item_id": ids, **self.ranker.lists(*self.ranker.similar(indices_B, length))})

    def explain(
        self,
        session: Sequence[Any],
        k: int = 5,
        *,
        items: Sequence[Any] | None = None,
        exclude_seen: bool | None = None,
    ) -> Explanation:
        """Explains recommendations for one session; see docs/explaining.md.

        Args:
            session: Item ids, oldest click first.
            k: Number of recommended items to explain, if no items are given.
            items: Item ids to explain instead, recommended or not.
            exclude_seen: As in `recommend`.

        Raises:
            UserError: An id has a wrong type, an item is not in the catalog, or `k` is out of range.
        """
        wanted = None if items is None else to_ids(items, "items")
        return self._explainer.explain(to_ids(session, "session"), k, wanted, _checked_flag(exclude_seen))

    @functools.cached_property
    def _explainer(self) -> Explainer:
        return Explainer(self._files, self.ranker)

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
            # This recommender runs the same code.
            code = modules_of(code_names(self._files.config).values())
            allowed = {"allow_code": ",".join(code)} if code else {}
            run_command("evaluate", own_and_given(given, {**allowed, **options}, "evaluate"))
            content: dict[str, Any] = json.loads(file.read_text())
        return content

    def extend(self, items: object, *, output: str | os.PathLike[str] | None = None) -> "Recommender":
        """A recommender of another catalog, without training: new items are ranked by their texts.

        Items that the given ones lack are gone: they are not recommended any more, and ignored as clicks. See
        docs/every-day.md.

        Args:
            items: The whole current catalog, in any form that `arrow_input.to_table` takes: `item_id` and, each
                optional, `title`, `category`, `brand`, `description`. A text that is null or whose column is missing is
                that of this recommender. With several domains, a mapping of their names to items, as for `fit`, or one
                table with full ids.
            output: New folder for the run, from which training can go on (`python -m llmgr_rec.train --init_from`).
                None uses a temporary folder, which is deleted together with the new recommender.

        Raises:
            UserError: An id is null, a duplicate or of a wrong type, a text is missing that the model needs, or the
                folder is not empty.
        """
        tables = {
            name: to_table(one, f"items of {name}" if name else "items") for name, one in by_domain(items).items()
        }
        table = tables.get("", tables)
        # This recommender runs the same code.
        code = modules_of(code_names(self._files.config).values())
        source = self._run or self._files.path
        if output is not None:
            extend_run(source, table, "items", as_path(output), code)
            return Recommender(open_bundle(as_path(output), code), as_path(output))
        parent = Path(tempfile.mkdtemp(prefix="llmgr_rec-"))
        try:
            extend_run(source, table, "items", parent / _RUN, code)
            extended = Recommender(open_bundle(parent / _RUN, code), parent / _RUN)
        except BaseException:
            shutil.rmtree(parent, ignore_errors=True)
            raise
        weakref.finalize(extended, shutil.rmtree, parent, ignore_errors=True)
        return extended

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model as a bundle, a folder that `load` and `python -m llmgr_rec.score --run` take.

        Args:
            path: Folder to create; must not exist or be empty.

        Raises:
            UserError: The folder is not empty or cannot be written.
        """
        folder = _new_folder(as_path(path))
        with atomic_folder(folder.resolve(), INDEX) as draft:
            copy_folder(self._files.path, draft)

    def _list_length(self, k: int) -> int:
        try:
            length = operator.index(k)
        except TypeError:
            length = 0
        if length < 1:
            raise UserError(f"k is {k!r}; give an integer of 1 or more")
        return min(length, self.ranker.catalog.num_items)


def _run_folder(path: Path) -> Path:
    """The run in the output of `fit`; any other path as it is."""
    return path / _RUN if (path / _RUN).is_dir() else path


def _new_folder(folder: Path) -> Path:
    if not is_free(folder, INDEX):
        remedy = f", or use Recommender.load({str(folder)!r})" if (folder / _RUN).is_dir() else ""
        raise UserError(f"{folder} exists and is not an empty folder; give another path{remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder} ({error.strerror}); give another path") from None
    return folder


def _copied_columns(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """The columns of the sessions that the result of `recommend_arrow` has too, `session_id` first."""
    if isinstance(columns, str):
        raise UserError(f"columns is {columns!r}; give a list of names: [{columns!r}]")
    names = list(dict.fromkeys(["session_id", *columns]))
    for name in ("items", *names):
        if table.column_names.count(name) != 1:
            what = "no column" if name not in table.column_names else "more than one column"
            raise UserError(f"sessions has {what} {name}{did_you_mean(name, table.column_names)}")
        if name in OUTPUT_COLUMNS:
            raise UserError(f"sessions: column {name} has the name of a column of the result; rename it")
    if nulls := table["session_id"].null_count:
        raise UserError(f"sessions: column session_id has {nulls:,} nulls; give every row an id")
    return table.select(names)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value is not None and value not in choices:
        raise UserError(f"{name} is {value!r}; give one of {', '.join(choices)}")


def _checked_flag(exclude_seen: bool | None) -> bool | None:
    # A text such as "no" would be true.
    if exclude_seen is not None and not isinstance(exclude_seen, bool | np.bool_):
        raise UserError(f"exclude_seen is {exclude_seen!r}; give True, False or None")
    return exclude_seen


def _progress(verbose: bool | None) -> Progress:
    """What `fit` does with the lines of its commands: writes them to stderr, which a notebook shows, or nothing."""
    if verbose is None:
        verbose = "ipykernel" in sys.modules or sys.stderr.isatty()
    return _write_line if verbose else None


def _write_line(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _naming_argument(message: str, argument: str) -> UserError:
    """An error of a command, with the way in which `fit` takes the option that the message names."""
    option = re.search(r"--(?!help\b)([a-z][\w.]*)", message)
    if option is None or option[1] in _SET_BY_FIT or "unknown option" in message:
        return UserError(message)
    return UserError(f"{message} (in fit: {argument}={{{option[1]!r}: ...}})")
