"""Forms of a trained recommender: time for one session by the Python API and exported, and NDCG@20 of 8-bit weights.

```sh
python -m benchmarks.inference_forms --run RUN --threads 1 --rounds 20
python -m benchmarks.inference_forms --run RUN --threads 1 --dataset DATASET
```
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Side, Spread, benchmark_parser, set_threads, take_turns, write_report
from llmgr_rec.cli import add_run_argument, parse_args, run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.paths import LocalPath

if TYPE_CHECKING:
    from llmgr_rec.distributed.ranking import RankingModel
    from llmgr_rec.storage.bundle import BundleFiles

_CLICKS = 5
_K = 20
_CALLS = 10
_BATCH = 256


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("inference_forms", "Measures forms of a trained recommender.", "--run run")
    add_run_argument(parser)
    parser.add_argument("--dataset", type=LocalPath, help="Data set of the run: measures NDCG@20 instead of time.")
    args = parse_args(parser, argv).as_dict()
    if args["rounds"] < 1:
        raise UserError(f"--rounds is {args['rounds']}; set it to 1 or more")
    set_threads(args["threads"])

    from llmgr_rec.storage.bundle import open_bundle

    files = open_bundle(args["run"])
    results: dict[str, Any]
    if args["dataset"]:
        results = ndcg_of_bits(files, Path(args["dataset"]))
        print(", ".join(f"{name} {value:.4f}" for name, value in results.items()))
    else:
        spreads = milliseconds(files, args["rounds"])
        print(f"CPU ms for one session of {_CLICKS} clicks, {files.catalog.num_items:,} items:")
        print(", ".join(f"{name} {spread}" for name, spread in spreads.items()))
        results = {name: asdict(spread) for name, spread in spreads.items()}
    write_report(args["output"], args, results)


def milliseconds(files: "BundleFiles", rounds: int) -> dict[str, Spread]:
    """CPU milliseconds to rank the catalog for one session."""
    import torch

    from llmgr_rec import Recommender
    from llmgr_rec.scoring.program_export import write_program

    rec = Recommender.load(files.path)
    ids = rec.item_ids.to_pylist()[:_CLICKS]
    inputs = (torch.arange(len(ids)), torch.tensor([0, len(ids)]))

    def side(name: str, call: Callable[[], object]) -> Side:
        def work() -> float:
            with torch.no_grad():
                for _ in range(_CALLS):
                    call()
            return _CALLS

        return Side(name, work)

    with tempfile.TemporaryDirectory(prefix="llmgr-export-") as folder:
        program = torch.export.load(write_program(files, Path(folder) / "model.pt2", _K).program).module()
    sides = [side("recommend", lambda: rec.recommend([ids], _K)), side("exported", lambda: program(*inputs))]
    rates = take_turns(sides, rounds, clock=time.process_time)
    return {name: Spread.of([1000 / rate for rate in values]) for name, values in rates.items()}


def ndcg_of_bits(files: "BundleFiles", dataset: Path) -> dict[str, float]:
    """NDCG@20 on the test split with the trained weights, and with tables and linear layers of 8 bits."""
    import torch
    from torch import nn
    from torchrec.inference.modules import quantize_embeddings

    from llmgr_rec.storage.bundle import load_model

    ranking = load_model(files).ranking(_BATCH)
    tables = quantize_embeddings(ranking.model, torch.int8, inplace=False)
    both = torch.ao.quantization.quantize_dynamic(tables, {nn.Linear}, dtype=torch.qint8)
    models = {"float32": ranking.model, "tables of 8 bits": tables, "linear layers of 8 bits, too": both}
    return {name: _ndcg(replace(ranking, model=model), files, dataset) for name, model in models.items()}


def _ndcg(ranking: "RankingModel", files: "BundleFiles", dataset: Path) -> float:
    import torch

    from llmgr_rec.baselines.blend import clicks_of
    from llmgr_rec.data.dataset import Dataset
    from llmgr_rec.data.reader import SamplingOrder, SessionReader
    from llmgr_rec.distributed.process_group import World
    from llmgr_rec.evaluation.exclusion import ranking_rule, seen_items

    rule, ranker, gains = ranking_rule(files.index), ranking.ranker(World.alone()), []
    reader = SessionReader(
        Dataset(dataset).parts("test"),
        num_items=files.catalog.num_items,
        collate=ranking.collate,
        order=SamplingOrder(_BATCH),
    )
    with torch.no_grad():
        for batch in reader.batches(0):
            exclude = seen_items(batch) if rule.excludes_seen else None
            ids_BK, _ = ranker.rank(ranking.queries(batch), _K, exclude, clicks_of(batch))
            is_target_BK = ids_BK == batch.targets_B.unsqueeze(1)
            gains.append((is_target_BK / torch.arange(2, _K + 2).log2()).sum(1))
    return float(torch.cat(gains).mean())


if __name__ == "__main__":
    run_cli(main)
