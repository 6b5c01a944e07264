"""Hybrid encoding: graph vectors become soft tokens that stand among the text tokens of a prompt.

Shapes: C readings, M soft node tokens, S = C + M soft tokens, X prompt tokens, D = d1 columns, H = d2 hidden width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class ProjectionAdapter(nn.Module):
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

    def project(self, graph_CD: Tensor, nodes_MD: Tensor) -> Tensor:
        """Makes the soft tokens: graphs first, then nodes.

        Args:
            graph_CD: One vector a reading.
            nodes_MD: Vectors of the shown nodes.

        Returns:
            Soft tokens, [S, H].
        """
        lengths_2 = self.log_gain_2.exp() * self.embedding_norm
        graph_CH = functional.normalize(self.graph(graph_CD), dim=1) * lengths_2[0]
        nodes_MH = functional.normalize(self.nodes(nodes_MD), dim=1) * lengths_2[1]
        return torch.cat([graph_CH, nodes_MH])

    def forward(self, tokens_XH: Tensor, soft_rows_X: Tensor, graph_CD: Tensor, nodes_MD: Tensor) -> Tensor:
        """Puts soft tokens at their places.

        Args:
            tokens_XH: Token embeddings of the prompts.
            soft_rows_X: Row of the soft tokens that stands at a place, -1 where the token embedding stays.
            graph_CD: One vector a reading.
            nodes_MD: Vectors of the shown nodes.

        Returns:
            Input embeddings in the type of the token embeddings, [X, H].
        """
        soft_SH = self.project(graph_CD, nodes_MD).to(tokens_XH.dtype)
        soft_XH = soft_SH.index_select(0, soft_rows_X.clamp(min=0))
        return torch.where((soft_rows_X >= 0).unsqueeze(1), soft_XH, tokens_XH)
