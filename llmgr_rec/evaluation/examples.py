"""A few sessions with titles, for people to look at: what was clicked, what came next, what was recommended."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
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
from llmgr_rec.evaluation.exclusion import excludes_seen, seen_items
from llmgr_rec.storage.bundle import load_bundle

PLACES = 20

# Sessions that are looked through for hits and misses, from the start of the split.
_LOOKED_AT = 256


@dataclass(frozen=True)
class Example:
    """One session; items are titles, or ids where there is none.

    Args:
        session_id: Name of the session.
        clicks: Oldest first.
        target: The next click.
        recommended: Best first.
        place: Place of the target among them, from 1; 0 where it is not.
    """

    session_id: str
    clicks: list[str]
    target: str
    recommended: list[str]
    place: int


def choose_examples(examples: Iterator[Example], hits: int, misses: int) -> list[Example]:
    """The first hits and the first misses, in the order of the split: nothing is picked by hand."""
    found: list[Example] = []
    missed: list[Example] = []
    for example in examples:
        kept, wanted = (found, hits) if example.place else (missed, misses)
        if len(kept) < wanted:
            kept.append(example)
        if len(found) == hits and len(missed) == misses:
            break
    return found + missed


def ranked_examples(bundle: Path, dataset: Dataset, split: str, allow_code: Sequence[str] = ()) -> Iterator[Example]:
    """Ranks the first sessions of a split with a model, by the rule that it is judged by.

    Args:
        bundle: The model.
        dataset: Prepared sessions of the model's catalog.
        split: Which sessions.
        allow_code: As in `load_bundle`.
    """
    loaded = load_bundle(bundle, allow_code=allow_code)
    titles = _titles(loaded.catalog)
    size = min(_LOOKED_AT, loaded.config.runtime.eval_batch_size)
    ranking = loaded.ranking(size)
    ranker = ranking.ranker(World.alone())
    # Whole sessions, also of a split whose sessions are judged by each of their prefixes.
    reader = SessionReader(
        dataset.parts(split), num_items=loaded.catalog.num_items, collate=ranking.collate, order=SamplingOrder(size)
    )
    rows = _rows(dataset, split)
    for batch in islice(reader.batches(0), -(-_LOOKED_AT // size)):
        exclude = seen_items(batch) if excludes_seen(dataset) else None
        with torch.no_grad():
            ids_BK, _ = ranker.rank(ranking.queries(batch), PLACES, exclude, clicks_of(batch))
        for ids_K, (session_id, clicks, target) in zip(ids_BK.tolist(), rows, strict=False):
            yield _example(session_id, clicks, target, [item for item in ids_K if item >= 0], titles)


def scored_examples(scores: Path, dataset: Dataset, split: str, known: Collection[str]) -> Iterator[Example]:
    """Looks up what a scoring job recommended to sessions of a split.

    Args:
        scores: Output folder of llmgr_rec.score.
        dataset: Prepared sessions.
        split: Which sessions.
        known: Hashes of the models of which one has to have made it.

    Raises:
        UserError: The folder is no complete scoring output, or of other sessions or another run.
    """
    if not (scores / "_SUCCESS").is_file():
        raise UserError(f"--scores {scores} is no complete output of llmgr_rec.score (no _SUCCESS); score again")
    job = json.loads((scores / "_manifest.json").read_text(encoding="utf-8"))
    if job["model"]["catalog"] != dataset.manifest.catalog_hash:
        raise UserError(f"--scores {scores} are of another catalog than {dataset.path}; give the model's data set")
    if job["model"]["sha256"] not in known:
        raise UserError(f"--scores {scores} were made by a model of another run; score with this one")
    catalog = Catalog.load(dataset.path)
    titles = _titles(catalog)
    known = {session_id: (clicks, target) for session_id, clicks, target in islice(_rows(dataset, split), _LOOKED_AT)}
    wanted = pa.array(list(known), pa.string())
    seen = 0
    for part in sorted(scores.glob("part-*.parquet")):
        table = pq.read_table(part, columns=["session_id", "item_ids"])
        table = table.filter(pc.is_in(table["session_id"].cast(pa.string()), value_set=wanted))
        for session_id, item_ids in zip(
            table["session_id"].cast(pa.string()).to_pylist(), table["item_ids"].to_pylist(), strict=True
        ):
            seen += 1
            items = catalog.index_of(pa.array(item_ids[:PLACES], catalog.item_ids.type)).tolist()
            yield _example(session_id, *known[session_id], items, titles)
        if seen >= len(known):
            break
    if not seen:
        raise UserError(f"--scores {scores} and the {split} sessions of {dataset.path} have no session in common")


def _example(session_id: str, clicks: list[int], target: int, items: list[int], titles: list[str]) -> Example:
    return Example(
        session_id=session_id,
        clicks=[titles[item] for item in clicks],
        target=titles[target],
        recommended=[titles[item] for item in items],
        place=items.index(target) + 1 if target in items else 0,
    )


def _titles(catalog: Catalog) -> list[str]:
    ids = catalog.item_ids.to_pylist()
    return [title or f"item {item_id}" for title, item_id in zip(catalog.titles(), ids, strict=True)]


def _rows(dataset: Dataset, split: str) -> Iterator[tuple[str, list[int], int]]:
    for part in dataset.parts(split):
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(batch_size=_LOOKED_AT, columns=["session_id", "items", "target"]):
                for row in batch.to_pylist():
                    yield row["session_id"], row["items"], row["target"]
