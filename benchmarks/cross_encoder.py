"""A language model that ranks the best items of recipe default again, reading their titles after those of the session.

    python -m llmgr_rec.train --dataset runs/beauty/dataset --output runs/beauty/default
    python -m benchmarks.cross_encoder --run runs/beauty/default --dataset runs/beauty/dataset --work runs/beauty/cross

The candidates of a session are the 20 best items of a trained run. A decoder with LoRA and a linear head learns by a
listwise softmax which item was clicked next. Its score times a weight is added to the run's where the margin between
the run's two best items is below a threshold; both are selected on validation sessions. Test sessions are ranked once.
Controls are random weights in place of pre-trained ones, and trees (`blend.reranker lambdamart`).

`--fit_on training` takes training sessions, and the next items of other sessions as candidates. `--fit_on validation`
takes 70 % of the validation sessions, on which the run was not trained, with candidates from the run's lists and the
run's score in the softmax; the other 30 % are for the selection.

What is in the work folder is not computed again, so that the command can be repeated until it is complete.

Shapes: S sessions, K candidates of a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.best_lists import Lists, Ranks, best_lists, training_sessions
from benchmarks.blending import timed_ranks
from benchmarks.cross_encoder_fit import INITIAL_WEIGHTS, Training, Work
from benchmarks.harness import benchmark_parser, set_threads, write_report
from llmgr_rec.baselines.reranker import Reranker
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.intervals import VALUES_P, K, count_pairs, count_ranks, paired_gains
from llmgr_rec.paths import LocalPath
from llmgr_rec.storage.bundle import load_blend_terms, load_model, open_bundle
from llmgr_rec.training.reranker_fit import with_trees

_WORLD = World.alone()
_NDCG = f"ndcg@{K}"
_FITTED_SHARE = 0.7
_WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
# Shares of the sessions, the least certain ones first, of which one sets the threshold.
_SHARES = (0.25, 0.5, 0.75, 1.0)


def added(lists: Lists, scores_SK: Tensor, weight: float, threshold: float) -> Tensor:
    """What is added to the scores of lists, [S, K].

    Args:
        lists: Lists of K items.
        scores_SK: Scores of their items by the cross-encoder.
        weight: Their factor.
        threshold: Margin above which nothing is added.
    """
    return weight * scores_SK * (lists.margin_S <= threshold)[:, None]


def select(lists: Lists, scores_SK: Tensor) -> dict[str, float]:
    """Weight, and threshold of the margin, with the best NDCG@20 of a grid; of equal ones the smallest weight.

    Args:
        lists: Lists of K items.
        scores_SK: Scores of their items by the cross-encoder.
    """
    thresholds = [float(lists.margin_S.quantile(share)) for share in _SHARES]
    grid = [(weight, threshold) for weight in _WEIGHTS for threshold in thresholds]
    values = [_ndcg(lists.target_ranks(added(lists, scores_SK, *point))) for point in grid]
    weight, threshold = grid[int(np.argmax(values))]
    return {"weight": weight, "threshold": threshold, _NDCG: max(values)}


def _ndcg(ranks_S: Ranks) -> float:
    counts_P = count_ranks(ranks_S)
    return float(counts_P @ VALUES_P[_NDCG] / counts_P.sum())


def gains(ranks_S: Ranks, other_S: Ranks) -> dict[str, list[float] | None]:
    """Relative gains in NDCG@20 and NDCG@10 with their paired 95 % intervals; None where there are too few hits."""
    # A rank that counts as "not in the list" from 10 on makes NDCG@10 of NDCG@20.
    pairs = {_NDCG: (ranks_S, other_S), "ndcg@10": tuple(np.where(r < 10, r, K) for r in (ranks_S, other_S))}
    found = {name: paired_gains(count_pairs(*pair))[_NDCG] for name, pair in pairs.items()}
    return {name: None if gain is None else [gain.mean, gain.low, gain.high] for name, gain in found.items()}


@dataclass(frozen=True)
class Parts:
    """Lists of a run: where the cross-encoder is fitted, where weight and threshold are selected, and of the test.

    Args:
        fitted: Lists with the target among their items, or training sessions.
        selected: Lists of K items.
        test: Lists of K items.
        trees_S: Target ranks of the test sessions by the run with trees; None if cross-validation does not keep these.
    """

    fitted: Lists
    selected: Lists
    test: Lists
    trees_S: Ranks | None

    @classmethod
    def of(cls, run: str, dataset: Dataset, catalog: Catalog, depth: int, most: int, fit_on: str, seed: int) -> "Parts":
        """The lists of a run.

        Args:
            run: Folder of the run.
            dataset: Its data set.
            catalog: The items.
            depth: Length of the fitted lists.
            most: Most sessions of the selection and of the test each; 0 takes all.
            fit_on: `training` or `validation` sessions.
            seed: Seed of the random choices.

        Raises:
            UserError: The run has no blend, LightGBM is not installed, or a part has no target among the best items.
        """
        files = open_bundle(run)
        bundle = load_model(files)
        if bundle.blend is None:
            raise UserError(f"{run} has no blend, whose scores the trees need; train it with blend.neighbors")
        blend = replace(bundle.blend, terms=load_blend_terms(files), trees="")
        ranking = replace(bundle.ranking(), blend=blend, reranker=None)
        reranker = Reranker.of(with_trees(blend, ranking, dataset, catalog, _WORLD), catalog.train_count_V)
        valid, test = (best_lists(ranking, dataset, split, depth) for split in ("valid", "test"))
        random = np.random.default_rng(seed)
        fitted_share = _FITTED_SHARE if fit_on == "validation" else 0.0
        fitted, selected = np.split(random.permutation(len(valid)), [int(fitted_share * len(valid))])
        of_test = random.permutation(len(test))[: most or None]
        fit_rows, rows, test_rows = (
            torch.from_numpy(np.sort(part)) for part in (fitted, selected[: most or None], of_test)
        )
        lists = valid.rows(fit_rows)
        lists = lists.rows(lists.hits) if fit_on == "validation" else training_sessions(dataset)
        trees_S = None if reranker is None else timed_ranks(replace(ranking, reranker=reranker), dataset)[0][test_rows]
        parts = cls(lists, valid.rows(rows).top(K), test.rows(test_rows).top(K), trees_S)
        if not (len(lists) and len(parts.selected.hits) and len(parts.test.hits)):
            raise UserError(f"{run} finds too few targets in its lists; train it longer, or take more sessions")
        return parts


def compare(work: Work, parts: Parts) -> dict[str, Any]:
    """Results of each of `INITIAL_WEIGHTS` on the test sessions, and the gain of pre-trained over random weights."""
    test, ranks, results = parts.test, {}, {}
    before_S = test.target_ranks(torch.zeros_like(test.scores_SD))
    for initial in INITIAL_WEIGHTS:
        model, cost = work.fitted(initial, parts.fitted)
        full = {}
        for name, lists in (("selection", parts.selected), ("test", test)):
            scores_SK, cost_of_session = work.scores(initial, name, model, lists.rows(lists.hits))
            full[name] = torch.zeros_like(lists.scores_SD).index_copy(0, lists.hits, scores_SK)
        chosen, selected = select(parts.selected, full["selection"]), parts.selected
        point = (chosen["weight"], chosen["threshold"])
        selected_S = selected.target_ranks(added(selected, full["selection"], *point))
        gain = gains(selected_S, selected.target_ranks(torch.zeros_like(selected.scores_SD)))
        ranks[initial] = test.target_ranks(added(test, full["test"], *point))
        results[initial] = {
            "training": cost,
            "ranking": cost_of_session,
            "selected": {**chosen, "gain": gain},
            "ranked_again": float((test.margin_S <= chosen["threshold"]).float().mean()) if chosen["weight"] else 0.0,
            _NDCG: _ndcg(ranks[initial]),
            "gain": gains(ranks[initial], before_S),
        }
        print(_line(initial, results[initial]), flush=True)
    if parts.trees_S is not None:
        results["trees"] = {_NDCG: _ndcg(parts.trees_S), "gain": gains(parts.trees_S, before_S)}
        print(_line("trees", results["trees"]), flush=True)
    return {
        "default": {_NDCG: _ndcg(before_S), "sessions": len(test)},
        **results,
        "pretrained over random": gains(*(ranks[initial] for initial in INITIAL_WEIGHTS)),
    }


def _line(name: str, result: dict[str, Any]) -> str:
    gain = result["gain"][_NDCG]
    shown = "" if gain is None else " {:+.1f} % [{:.1f} .. {:.1f}]".format(*(100 * value for value in gain))
    return f"{name}: NDCG@{K} {result[_NDCG]:.4f}{shown}"


def main(argv: Sequence[str]) -> None:
    """Prints and writes NDCG@20 on test sessions, gains over the run, and what they cost."""
    parser = benchmark_parser(
        "cross_encoder", "Ranks the best items of a run again with an LLM.", "--run RUN --dataset DATASET --work WORK"
    )
    parser.add_argument("--run", type=LocalPath, required=True, help="Run of recipe default.")
    parser.add_argument("--dataset", type=LocalPath, required=True, help="Its data set.")
    parser.add_argument("--work", type=LocalPath, required=True, help="Folder of fitted weights and scores.")
    parser.add_argument("--llm", type=str, default="smollm2", help="Decoder, as llm.name_or_path.")
    parser.add_argument("--layers", type=int, default=4, help="Its first layers that are used; 0 uses all.")
    parser.add_argument("--epochs", type=int, default=1, help="Passes over the fitted sessions.")
    parser.add_argument("--sessions", type=int, default=3000, help="Most sessions of a pass.")
    parser.add_argument(
        "--ranked_sessions", type=int, default=0, help="Sessions to select on and to test; 0 takes all."
    )
    parser.add_argument(
        "--fit_on", type=Literal["training", "validation"], default="training", help="Sessions to fit on."
    )
    parser.add_argument("--depth", type=int, default=100, help="Items of a list in training, the target among them.")
    parser.add_argument("--candidates", type=int, default=8, help="Candidates of a session in training.")
    parser.add_argument("--batch", type=int, default=16, help="Sessions of a step.")
    parser.add_argument("--lr", type=float, default=5e-4, help="Largest learning rate.")
    parser.add_argument("--tokens", type=int, default=12, help="Most tokens of a title.")
    parser.add_argument("--clicks", type=int, default=4, help="Newest clicks that are shown.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of all random numbers.")
    parser.add_argument("--device", type=str, default="cpu", help="Device of the decoder, cpu or cuda.")
    args = parse_args(parser, argv).as_dict()
    set_threads(args["threads"])
    dataset = Dataset(Path(args["dataset"]))
    catalog = Catalog.of(dataset)
    if not K <= args["depth"] <= catalog.num_items:
        raise UserError(
            f"--depth is {args['depth']}; lists have {K} items or more, and the catalog {catalog.num_items}"
        )
    if args["device"] != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device is {args['device']}, but torch finds no GPU; give cpu")
    training = Training(**{name: args[name] for name in Training.__dataclass_fields__})
    parts = Parts.of(
        args["run"], dataset, catalog, args["depth"], args["ranked_sessions"], args["fit_on"], args["seed"]
    )
    results = compare(Work(Path(args["work"]), training, catalog, (parts.fitted, parts.selected, parts.test)), parts)
    write_report(args["output"], args, results)


if __name__ == "__main__":
    run_cli(main)
