"""LLMGR as a tower.

Shapes: B sessions, C shown items, Q columns of queries and item vectors.
"""

from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from llmgr_rec.config import StageName
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.param_groups import ParamGroup
from llmgr_rec.towers.features import TowerBatch
from llmgr_rec.towers.tower import RecommenderTower


class LLMGRTower(RecommenderTower):
    """LLMGR as a module of a larger TorchRec model; made by `from_bundle`.

    The base weights of the language model never train.

    Args:
        model: The recommender.
        files: The bundle whose settings and catalog it was built from.
        layout: Its item tables.
        click_feature: Key of the clicks.
        item_feature: Key of the shown items; None if none are shown.
        trains: Parameter groups that train.
        text: Texts that its prompts show; None for none.
    """

    stages: ClassVar[tuple[StageName, ...]] = ("align", "behave")
    groups: ClassVar[tuple[ParamGroup, ...]] = ("tables", "encoder", "adapter", "lora", "head")
    default_trains: ClassVar[tuple[ParamGroup, ...]] = ("adapter", "lora", "head")

    def _encode(self, batch: TowerBatch) -> tuple[Tensor, Tensor]:
        model = self.model
        assert isinstance(model, LLMGR)
        of_recommender = {"tables", "encoder"} & set(self.trains)
        with nullcontext() if of_recommender else torch.no_grad():
            output = model.recommender(batch.session)
        with nullcontext() if self.trains else torch.no_grad():
            queries_BQ = model.queries(output, model.encode(output, batch.session, "behave"))
            return queries_BQ, model.items(output, batch.session)
