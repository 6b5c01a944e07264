"""Hybrid encoding: graph vectors become soft tokens that stand among the text tokens of a prompt.

Shapes: B sessions, M soft node tokens, S = B + M soft tokens, T prompt tokens, D = d1 columns, H = d2 hidden width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class HybridEncoding(nn.Module):
    """Projection adapter d1 -> d2 and the insertion of its results.

    The paper writes one W_in for nodes and graph. Here each has its own: a node carries one item and the graph vector
    a whole session, read from another layer, and one matrix would force the same reading on both. Each soft token is
    rescaled to the mean norm of the language model's token embeddings times a learned gain: a pre-trained decoder adds
    its layers' outputs to what it is given, so tokens far longer or shorter than it knows drown them or drown in them.

    Args:
        d1: Width of item and session vectors.
        d2: Hidden width of the language model.
        embedding_norm: Mean Euclidean norm of its token embeddings.
    """

    embedding_norm: Tensor

    def __init__(self, d1: int, d2: int, embedding_norm: float) -> None:
        super().__init__()
        self.nodes = nn.Linear(d1, d2, bias=False)
        self.graph = nn.Linear(d1, d2, bias=False)
        self.log_gain_2 = nn.Parameter(torch.zeros(2))
        # Kept with the weights, so that an exported adapter does not depend on the language model for it.
        self.register_buffer("embedding_norm", torch.tensor(float(embedding_norm)))
        for projection in (self.nodes, self.graph):
            nn.init.normal_(projection.weight, std=d1**-0.5)

    def project(self, graph_BD: Tensor, nodes_MD: Tensor) -> Tensor:
        """Makes the soft tokens: graphs first, then nodes.

        Args:
            graph_BD: One vector a session.
            nodes_MD: Vectors of the shown nodes.

        Returns:
            Soft tokens, [S, H].
        """
        lengths_2 = self.log_gain_2.exp() * self.embedding_norm
        graph_BH = functional.normalize(self.graph(graph_BD), dim=1) * lengths_2[0]
        nodes_MH = functional.normalize(self.nodes(nodes_MD), dim=1) * lengths_2[1]
        return torch.cat([graph_BH, nodes_MH])

    def forward(self, tokens_BTH: Tensor, soft_rows_BT: Tensor, graph_BD: Tensor, nodes_MD: Tensor) -> Tensor:
        """Puts soft tokens at their places.

        Args:
            tokens_BTH: Token embeddings of the prompts.
            soft_rows_BT: Row of the soft tokens that stands at a place, -1 where the token embedding stays.
            graph_BD: One vector a session.
            nodes_MD: Vectors of the shown nodes.

        Returns:
            Input embeddings in the type of the token embeddings, [B, T, H].
        """
        soft_SH = self.project(graph_BD, nodes_MD).to(tokens_BTH.dtype)
        flat_rows = soft_rows_BT.flatten()
        places = (flat_rows >= 0).nonzero().squeeze(1)
        soft = soft_SH.index_select(0, flat_rows.index_select(0, places))
        return tokens_BTH.flatten(0, 1).index_copy(0, places, soft).view_as(tokens_BTH)
