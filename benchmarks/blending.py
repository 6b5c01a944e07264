"""Ways to blend the scores of a trained run: selected weights, weights that depend on the session, and trees.

The learned weight of each neighbor score is its selected weight times a softplus of a linear function of features of
the session: number of clicks, training clicks of the last one, highest score of the model and of each neighbor score.
They are fitted by the listwise softmax over the 100 best items of the blend. All are fitted on the validation sessions
of the run and evaluated once on its test sessions.

Shapes: S sessions, D items of a list, N neighbor scores, F features of a session, B sessions of a batch.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import log_softmax, softplus

from benchmarks.harness import benchmark_parser, set_threads, write_report
from llmgr_rec.baselines.blend import Blend, clicks_of
from llmgr_rec.baselines.reranker import DEPTH, Reranker
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import RankingModel
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.intervals import VALUES_P, K, count_pairs, count_ranks, paired_gains
from llmgr_rec.evaluation.protocol import ranked_lists
from llmgr_rec.paths import LocalPath
from llmgr_rec.storage.bundle import load_blend_terms, load_model, open_bundle
from llmgr_rec.training.reranker_fit import with_trees

_STEPS = 150
_PENALTY = 1e-3
_WORLD = World.alone()
_NDCG = f"ndcg@{K}"
# softplus of it is 1.
_ONE = float(np.log(np.e - 1))


@dataclass(frozen=True)
class Lists:
    """The best items of each session by the blend.

    Args:
        ids_SD: Item indices, -1 at padding.
        model_SD: Scores of the model.
        terms_NSD: Neighbor scores times their selected weights.
        features_SF: Features of the sessions.
        target_S: Place of the target; -1 where it is not in the list.
    """

    ids_SD: Tensor
    model_SD: Tensor
    terms_NSD: Tensor
    features_SF: Tensor
    target_S: Tensor

    def rows(self, rows: Tensor) -> "Lists":
        """The lists of some sessions."""
        return Lists(
            self.ids_SD[rows], self.model_SD[rows], self.terms_NSD[:, rows], self.features_SF[rows], self.target_S[rows]
        )

    def scores(self, factors_SN: Tensor) -> Tensor:
        """Scores where each neighbor score of a session is multiplied by a factor, [S, D]."""
        scores_SD = self.model_SD + torch.einsum("sn,nsd->sd", factors_SN, self.terms_NSD)
        return scores_SD.masked_fill(self.ids_SD < 0, -1e9)

    def target_ranks(self, factors_SN: Tensor) -> NDArray[np.int64]:
        """Rank of each target, `DEPTH` where it is not in the list."""
        scores_SD, place_S1 = self.scores(factors_SN), self.target_S.clamp(min=0)[:, None]
        own_S1, item_S1 = scores_SD.gather(1, place_S1), self.ids_SD.gather(1, place_S1)
        ahead_SD = (scores_SD > own_S1) | ((scores_SD == own_S1) & (self.ids_SD < item_S1))
        return torch.where(self.target_S >= 0, ahead_SD.sum(dim=1), DEPTH).numpy()


def best_lists(
    ranking: RankingModel, terms: tuple[Blend, ...], dataset: Dataset, split: str, counts_V: Tensor
) -> Lists:
    """The lists of a split.

    Args:
        ranking: The model with its blend, without trees.
        terms: The summands of the blend.
        dataset: Prepared sessions.
        split: valid or test.
        counts_V: Training clicks of each item.
    """

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for ids_BD, scores_BD, batch in ranked_lists(ranking, dataset, split, _WORLD, depth=DEPTH):
            rows_B = torch.nonzero(batch.weights_B > 0).flatten()
            ids_BD, clicks = ids_BD[rows_B], clicks_of(batch).select(rows_B)
            items_BD = ids_BD.clamp(min=0).numpy()
            terms_BND = torch.stack(
                [torch.from_numpy(np.take_along_axis(term.scores(clicks).toarray(), items_BD, 1)) for term in terms], 1
            )
            model_BD = torch.where(ids_BD >= 0, scores_BD[rows_B], -30.0) - terms_BND.sum(dim=1)
            last_B = clicks.values[clicks.offsets[1:] - 1]
            of_session = [clicks.lengths.float().log(), counts_V[last_B].float().log1p(), model_BD.amax(dim=1)]
            features_BF = torch.stack([*of_session, *terms_BND.amax(dim=2).clamp(min=1e-3).log().unbind(1)], 1)
            is_target_BD = ids_BD == batch.targets_B[rows_B][:, None]
            target_B = torch.where(is_target_BD.any(dim=1), is_target_BD.int().argmax(dim=1), -1)
            yield ids_BD, model_BD, terms_BND, features_BF, target_B

    ids, model, terms_SND, features, target = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    return Lists(ids, model, terms_SND.transpose(0, 1), features, target)


def learned_factors(valid: Lists, test: Lists, by_session: bool) -> Tensor:
    """Factors of the neighbor scores of the test sessions, [S, N], as learned from the validation sessions.

    Args:
        valid: Lists of the validation sessions.
        test: Lists of the test sessions.
        by_session: Whether they depend on the features of a session.
    """
    known = torch.nonzero(valid.target_S >= 0).flatten()
    fitted = valid.rows(known)
    mean_F, std_F = valid.features_SF.mean(dim=0), valid.features_SF.std(dim=0) + 1e-6

    def inputs(lists: Lists) -> Tensor:
        features_SF = ((lists.features_SF - mean_F) / std_F).clamp(-4, 4) * float(by_session)
        return torch.cat([torch.ones(len(features_SF), 1), features_SF], dim=1)

    inputs_SF, size = inputs(fitted), (valid.features_SF.shape[1] + 1, len(valid.terms_NSD))
    weights_FN = torch.zeros(size)
    weights_FN[0] = _ONE
    weights_FN.requires_grad_()
    log_scale = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([weights_FN, log_scale], 0.05)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        scores_SD = fitted.scores(softplus(inputs_SF @ weights_FN)) * log_scale.exp()
        loss = -log_softmax(scores_SD, dim=1).gather(1, fitted.target_S[:, None]).mean()
        (loss + _PENALTY * weights_FN[1:].square().sum()).backward()
        optimizer.step()
    return softplus(inputs(test) @ weights_FN.detach())


def timed_ranks(ranking: RankingModel, dataset: Dataset) -> tuple[NDArray[np.int64], float]:
    """Ranks of the test targets, `DEPTH` where they are not in the list, and processor time in ms a session."""
    started = time.process_time()
    lists = ranked_lists(ranking, dataset, "test", _WORLD, depth=DEPTH)
    is_target_SD = torch.cat([(ids_BD == batch.targets_B[:, None])[batch.weights_B > 0] for ids_BD, _, batch in lists])
    ranks_S = torch.where(is_target_SD.any(dim=1), is_target_SD.int().argmax(dim=1), DEPTH).numpy()
    return ranks_S, 1000 * (time.process_time() - started) / len(ranks_S)


def main(argv: Sequence[str]) -> None:
    """Prints and writes NDCG@20 on test sessions and the gain over the selected weights."""
    parser = benchmark_parser("blending", "Compares ways to blend the scores of a run.", "--run RUN --dataset DATASET")
    parser.add_argument("--run", type=LocalPath, required=True, help="Run with a blend.")
    parser.add_argument("--dataset", type=LocalPath, required=True, help="Its data set.")
    args = parse_args(parser, argv).as_dict()
    set_threads(args["threads"])
    files, dataset = open_bundle(args["run"]), Dataset(Path(args["dataset"]))
    catalog, bundle = Catalog.of(dataset), load_model(files)
    if bundle.blend is None:
        raise UserError(f"{args['run']} has no blend; train it with blend.neighbors")
    blend = replace(bundle.blend, terms=load_blend_terms(files), trees="")
    ranking = replace(bundle.ranking(), blend=blend, reranker=None)
    terms = blend.terms or (blend,)
    valid, test = (best_lists(ranking, terms, dataset, split, catalog.train_count_V) for split in ("valid", "test"))
    selected_S, cost = timed_ranks(ranking, dataset)
    ranks, costs = {"selected weights": selected_S}, {"selected weights": cost}
    for name, by_session in {"learned weights": False, "learned weights by session": True}.items():
        ranks[name] = test.target_ranks(learned_factors(valid, test, by_session))
    trees = Reranker.of(with_trees(blend, ranking, dataset, catalog, _WORLD), catalog.train_count_V)
    if trees is not None:
        ranks["trees"], costs["trees"] = timed_ranks(replace(ranking, reranker=trees), dataset)
    results = {}
    for name, ranks_S in ranks.items():
        counts_P, gain = count_ranks(ranks_S), paired_gains(count_pairs(ranks_S, selected_S))[_NDCG]
        results[name] = {_NDCG: counts_P @ VALUES_P[_NDCG] / counts_P.sum(), "gain": asdict(gain) if gain else None}
        shown = f" {100 * gain.mean:+.1f} % [{100 * gain.low:.1f} .. {100 * gain.high:.1f}]" if gain else ""
        print(f"{name}: NDCG@{K} {results[name][_NDCG]:.4f}{shown}", flush=True)
    print(", ".join(f"{name} {cost:.2f}" for name, cost in costs.items()), "ms of processor time a session")
    write_report(args["output"], args, {"ways": results, "processor_ms": costs})


if __name__ == "__main__":
    run_cli(main)
