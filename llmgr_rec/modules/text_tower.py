"""The text tower: learned nearest neighbours in what a language model reads in item texts.

An id row learns its item's clicks by heart, and what is trained together with it finds little left to explain. So the
tower is trained by a loss of its own, in stage text: it has to say with text alone what comes next, and says it of
items without a single click too. Its score is added to that of the session encoder.

Shapes: B sessions, L clicks, N nodes, C items, H columns of a text encoding, K columns of the tower.
"""

import math

import torch
from torch import Tensor, nn

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.normalise import normalise
from llmgr_rec.modules.session_encoder import segment_sum

# Where the weight of a click relative to the click after it, and the factor of the cosine, start to learn.
_DECAY, _SCALE = 0.75, 10.0


class TextTower(nn.Module):
    """Scores an item by the cosine of its projected text with the recency-weighted sum of those of the clicks.

    Args:
        width: Columns H of a text encoding.
        dim: Columns K of the tower.
        two_sided: Project clicked and ranked items by a matrix each; they start alike.
    """

    def __init__(self, width: int, dim: int, two_sided: bool) -> None:
        super().__init__()
        self.dim = dim
        self.items_projection = nn.Linear(width, dim, bias=False)
        nn.init.normal_(self.items_projection.weight, std=width**-0.5)
        self.clicks_projection: nn.Linear | None = None
        if two_sided:
            self.clicks_projection = nn.Linear(width, dim, bias=False)
            self.clicks_projection.load_state_dict(self.items_projection.state_dict())
        self.decay_logit = nn.Parameter(torch.tensor(math.log(_DECAY / (1 - _DECAY))))
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))

    def forward(self, texts_XH: Tensor, batch: SessionBatch) -> tuple[Tensor, Tensor]:
        """Reads sessions and prepares candidates.

        Args:
            texts_XH: Text encodings of the nodes, then of the candidates; zeros where an item has no text.
            batch: The sessions.

        Returns:
            Queries, [B, K], zeros for a session without clicks on items with text; candidates, [C, K].
        """
        graph = batch.graph
        num_nodes = graph.node_items_N.numel()
        texts_NH, texts_CH = texts_XH.split([num_nodes, texts_XH.shape[0] - num_nodes])
        project = self.items_projection if self.clicks_projection is None else self.clicks_projection
        weighted_NK = normalise(project(texts_NH)) * self.recency(graph).unsqueeze(1)
        sessions_BK = segment_sum(weighted_NK, graph.node_session_N, graph.num_sessions)
        return normalise(sessions_BK) * self.log_scale.exp(), self.items(texts_CH)

    def items(self, texts_CH: Tensor) -> Tensor:
        """Makes the items' side, [C, K].

        Args:
            texts_CH: Text encodings.
        """
        return normalise(self.items_projection(texts_CH))

    def recency(self, graph: SessionGraph) -> Tensor:
        """Sum of decay^(clicks after it) over the clicks of each node, [N]."""
        click_L = torch.arange(graph.alias_L.numel(), device=graph.alias_L.device)
        later_L = graph.click_offsets_B1[1:][graph.click_session_L] - 1 - click_L
        weights_L = self.decay_logit.sigmoid() ** later_L
        return weights_L.new_zeros(graph.node_items_N.numel()).index_add(0, graph.alias_L, weights_L)
