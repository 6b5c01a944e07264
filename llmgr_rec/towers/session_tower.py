"""The session recommender as a tower.

Shapes: B sessions, C shown items, Q columns of queries and item vectors.
"""

from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from llmgr_rec.config import StageName
from llmgr_rec.modules.param_groups import ParamGroup
from llmgr_rec.towers.features import TowerBatch
from llmgr_rec.towers.tower import RecommenderTower


class SessionTower(RecommenderTower):
    """A session recommender as a module of a larger TorchRec model; made by `from_bundle`.

    Args:
        model: The recommender.
        files: The bundle whose settings and catalog it was built from.
        layout: Its item tables.
        click_feature: Key of the clicks.
        item_feature: Key of the shown items; None if none are shown.
        trains: Parameter groups that train.
        text: Texts that its prompts show; None for none.
    """

    stages: ClassVar[tuple[StageName, ...]] = ("sbr", "llm_text")
    groups: ClassVar[tuple[ParamGroup, ...]] = ("tables", "encoder", "text_encoder")
    default_trains: ClassVar[tuple[ParamGroup, ...]] = ("tables", "encoder")

    def _encode(self, batch: TowerBatch) -> tuple[Tensor, Tensor]:
        with nullcontext() if self.trains else torch.no_grad():
            output = self.recommender(batch.session)
        return output.queries_BQ, output.candidates_CQ
