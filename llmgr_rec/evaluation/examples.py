"""Example sessions of a report: titles of the clicks, the target and the recommendations."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from llmgr_rec.baselines.blend import clicks_of
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.reader import SamplingOrder, SessionReader
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.exclusion import RankingRule, rule_of_bundles, seen_items
from llmgr_rec.index_files import from_json, read_json
from llmgr_rec.scoring.input import MANIFEST_NAME
from llmgr_rec.scoring.output import SUCCESS_NAME
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_index import read_index

LIST_LENGTH = 20

# Number of first sessions of the split among which hits and misses are searched.
_SEARCHED_SESSIONS = 256


@dataclass(frozen=True)
class Example:
    """One session. Items are titles, or ids if an item has no title.

    Args:
        session_id: Id of the session.
        clicks: Clicked items, oldest first.
        target: The next clicked item.
        recommended: Recommended items, best first.
        position: Position of the target in `recommended`, from 1; 0 if it is not in the list.
    """

    session_id: str
    clicks: list[str]
    target: str
    recommended: list[str]
    position: int


def choose_examples(examples: Iterator[Example], hits: int, misses: int) -> list[Example]:
    """The first hits and the first misses in the order of the split.

    Args:
        examples: Sessions in the order of the split.
        hits: Number of sessions whose target is in the list.
        misses: Number of sessions whose target is not in the list.
    """
    hit_examples: list[Example] = []
    missed_examples: list[Example] = []
    for example in examples:
        chosen, count = (hit_examples, hits) if example.position else (missed_examples, misses)
        if len(chosen) < count:
            chosen.append(example)
        if len(hit_examples) == hits and len(missed_examples) == misses:
            break
    return hit_examples + missed_examples


def ranked_examples(
    bundle: Path, dataset: Dataset, split: str, allow_code: Sequence[str] = (), rule: RankingRule | None = None
) -> Iterator[Example]:
    """Ranks the catalog for the first sessions of a split.

    Args:
        bundle: Bundle of the model.
        dataset: Prepared sessions of the model's catalog.
        split: train, valid or test.
        allow_code: As in `load_bundle`.
        rule: What a ranking shows and excludes of a session; None takes what the bundle records.
    """
    loaded = load_bundle(bundle, allow_code=allow_code)
    titles = _titles(loaded.catalog)
    rule = rule or rule_of_bundles({bundle.name: read_index(bundle)}, dataset.manifest)
    size = min(_SEARCHED_SESSIONS, loaded.config.runtime.eval_batch_size)
    ranking = loaded.ranking(size)
    if rule.domains == "all":
        ranking = replace(ranking, domains=None)
    ranker = ranking.ranker(World.alone())
    # Whole sessions, even if the split is evaluated on each of their prefixes.
    reader = SessionReader(
        dataset.parts(split),
        num_items=loaded.catalog.num_items,
        collate=lambda raw: ranking.collate(raw.newest(rule.max_length)),
        order=SamplingOrder(size),
    )
    rows = _rows(dataset, split)
    for batch in islice(reader.batches(0), -(-_SEARCHED_SESSIONS // size)):
        exclude = seen_items(batch) if rule.excludes_seen else None
        with torch.no_grad():
            ids_BK, _ = ranker.rank(ranking.queries(batch), LIST_LENGTH, exclude, clicks_of(batch))
        for ids_K, (session_id, clicks, target) in zip(ids_BK.tolist(), rows, strict=False):
            yield _example(session_id, clicks, target, [item for item in ids_K if item >= 0], titles)


def scored_examples(scores: Path, dataset: Dataset, split: str, bundle_hashes: Collection[str]) -> Iterator[Example]:
    """Recommendations of a scoring job for the first sessions of a split.

    Args:
        scores: Output folder of llmgr_rec.score.
        dataset: Prepared sessions.
        split: train, valid or test.
        bundle_hashes: Hashes of the bundles of the run; the scores must be of one of them.

    Raises:
        UserError: The folder is not a complete scoring output, or it belongs to other sessions or another run.
    """
    if not (scores / SUCCESS_NAME).is_file():
        raise UserError(f"--scores {scores} is not a complete output of llmgr_rec.score (no _SUCCESS); score again")
    manifest = scores / MANIFEST_NAME
    try:
        model = from_json(dict[str, str], read_json(manifest).get("model"), "model")
    except (OSError, ValueError) as error:
        raise UserError(f"{manifest} is damaged ({error}); score again") from None
    if "catalog" not in model:
        raise UserError(f"--scores {scores} were written by another version of llmgr_rec; score again")
    if model["catalog"] != dataset.manifest.catalog_hash:
        raise UserError(f"--scores {scores} belong to another catalog than {dataset.path}; give the model's data set")
    if model.get("sha256") not in bundle_hashes:
        raise UserError(f"--scores {scores} belong to another run; score with the model of this run")
    catalog = Catalog.of(dataset)
    titles = _titles(catalog)
    sessions = {row[0]: row[1:] for row in islice(_rows(dataset, split), _SEARCHED_SESSIONS)}
    session_ids = pa.array(list(sessions), pa.string())
    count = 0
    for part in sorted(scores.glob("part-*.parquet")):
        table = pq.read_table(part, columns=["session_id", "item_ids"])
        table = table.filter(pc.is_in(table["session_id"].cast(pa.string()), value_set=session_ids))
        for session_id, item_ids in zip(
            table["session_id"].cast(pa.string()).to_pylist(), table["item_ids"].to_pylist(), strict=True
        ):
            count += 1
            items = catalog.index_of(pa.array(item_ids[:LIST_LENGTH], catalog.item_ids.type)).tolist()
            yield _example(session_id, *sessions[session_id], items, titles)
        if count >= len(sessions):
            break
    if not count:
        raise UserError(f"--scores {scores} and the {split} sessions of {dataset.path} have no session in common")


def _example(session_id: str, clicks: list[int], target: int, items: list[int], titles: list[str]) -> Example:
    return Example(
        session_id=session_id,
        clicks=[titles[item] for item in clicks],
        target=titles[target],
        recommended=[titles[item] for item in items],
        position=items.index(target) + 1 if target in items else 0,
    )


def _titles(catalog: Catalog) -> list[str]:
    ids = catalog.item_ids.to_pylist()
    return [title or f"item {item_id}" for title, item_id in zip(catalog.titles(), ids, strict=True)]


def _rows(dataset: Dataset, split: str) -> Iterator[tuple[str, list[int], int]]:
    for part in dataset.parts(split):
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(batch_size=_SEARCHED_SESSIONS, columns=["session_id", "items", "target"]):
                for row in batch.to_pylist():
                    yield row["session_id"], row["items"], row["target"]
