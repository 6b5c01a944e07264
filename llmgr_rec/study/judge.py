"""Where the target of each session stands, for models, baselines and blends of both.

Shapes: S sessions of a split, B sessions of a batch, V items, K places of a list, W sets of
weights of blended baselines, X such sets at each weight of a language model that reads sessions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmgr_rec.baselines.blend import clicks_of
from llmgr_rec.baselines.knn import Baseline, Neighbors
from llmgr_rec.config import Config
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.assembly import make_collator
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import BEHIND_ALL, CatalogueRanker
from llmgr_rec.evaluation.clicked import leaves_out_clicked, ranked_by
from llmgr_rec.evaluation.prior import places_by_weights
from llmgr_rec.evaluation.protocol import as_it_is, asked_of_rank, split_reader
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender

Places = NDArray[np.int32]
_READ_ROWS = 2048
# Deepest place that a baseline's list is asked for.
DEPTH = 100


@torch.no_grad()
def judge_model(
    model: SessionRecommender | LLMGR,
    dataset: Dataset,
    split: str,
    config: Config,
    catalogue: Catalogue,
    neighbours: Sequence[Neighbors] = (),
    weights: Sequence[Sequence[float]] = ((),),
    reader_weights: Sequence[float] = (1.0,),
) -> Places:
    """Places of the targets over the whole catalogue, from 0: how many items stand before each.

    What a session has clicked is left out where the data set's training sessions repeat no click.

    Args:
        model: In eval mode, on one rank; where it is, all is computed.
        dataset: Prepared sessions.
        split: train, valid or test.
        config: All settings.
        catalogue: The data set's items.
        neighbours: Baselines whose scores are added to the model's.
        weights: Factors of those scores, one for each baseline; each such set gives places of its own.
        reader_weights: The same for what a language model adds that reads sessions as text, and that counts 1 now.

    Returns:
        Places, [X, S], sessions in the order of the split; the sets of weights at the first of the reader's, then at
        the next.
    """
    collate = make_collator(config, catalogue, "rank", language=isinstance(model, LLMGR))
    world = World.alone(next(model.parameters()).device)
    ranker = CatalogueRanker(model, collate, world)
    found = []
    for asked in asked_of_rank(model, collate, dataset, split, config, world, f"judge {split}"):
        clicks = clicks_of(asked.batch)
        clicked = clicks.values.cpu().numpy(), clicks.offsets.cpu().numpy()
        added = [near.scores(*clicked).astype(np.float32) for near in neighbours]
        places_XB = places_by_weights(ranker, model, asked, added, weights, reader_weights)
        found.append(places_XB[:, asked.batch.weights_B.cpu() > 0])
    return torch.cat(found, dim=1).int().numpy()


def judge_baseline(baseline: Baseline, dataset: Dataset, split: str) -> Places:
    """The same for a baseline without training, [1, S]; a target that is not among the first `DEPTH` stands there."""
    reader = split_reader(dataset, split, _READ_ROWS, as_it_is)
    found = []
    for raw in reader.batches(0):
        ids_BK = ranked_by(baseline, raw, DEPTH, leaves_out_clicked(dataset))
        hits_BK = ids_BK == raw.targets_B.numpy()[:, None]
        places_B = np.where(hits_BK.any(1), hits_BK.argmax(1), DEPTH)
        found.append(places_B[raw.weights_B.numpy() > 0])
    return np.concatenate(found)[None].astype(np.int32)


def targets_of(dataset: Dataset, split: str) -> NDArray[np.int64]:
    """Target of each session of a split, in the order of places, [S]."""
    batches = split_reader(dataset, split, _READ_ROWS, as_it_is).batches(0)
    return np.concatenate([raw.targets_B.numpy()[raw.weights_B.numpy() > 0] for raw in batches])


def places(scores_BV: Tensor, targets_B: Tensor) -> Tensor:
    """How many items stand before each target: those of a higher score, and those of the same and a lower index, [B].

    A target that is left out itself stands at `BEHIND_ALL`.

    Args:
        scores_BV: Scores of all items; -inf for those left out.
        targets_B: The item that was clicked next.
    """
    own_B1 = scores_BV.gather(1, targets_B.clamp(min=0).unsqueeze(1))
    earlier_BV = torch.arange(scores_BV.shape[1], device=scores_BV.device) < targets_B.unsqueeze(1)
    before_BV = (scores_BV > own_B1) | ((scores_BV == own_B1) & earlier_BV)
    return torch.where(own_B1.squeeze(1).isneginf(), BEHIND_ALL, before_BV.sum(dim=1))
