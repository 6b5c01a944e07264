"""Hybrid encoding of LLMGR (arXiv 2402.16539): session and item vectors as soft tokens among a prompt's text tokens.

Shapes: C outputs, M soft node tokens, S = C + M soft tokens, X prompt tokens, D = d1 columns, H = d2 hidden width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class ProjectionAdapter(nn.Module):
    """Projects vectors of width d1 to soft tokens of width d2 and inserts them into prompts.

    The paper uses one matrix W_in for nodes and graph. This module uses two: a node vector represents one item and
    comes from another layer than the graph vector, which represents a whole session. Each soft token is rescaled to the
    mean norm of the language model's token embeddings times a learned gain. The decoder's layers are residual, so the
    norm of an input sets its share of the sum, and the decoder was pre-trained on inputs of that norm.

    Args:
        d1: Width of item and session vectors.
        d2: Hidden width of the language model.
        embedding_norm: Mean Euclidean norm of its token embeddings; see `mean_embedding_norm`.
    """

    embedding_norm: Tensor

    def __init__(self, d1: int, d2: int, embedding_norm: float) -> None:
        super().__init__()
        self.nodes = nn.Linear(d1, d2, bias=False)
        self.graph = nn.Linear(d1, d2, bias=False)
        self.log_gain_2 = nn.Parameter(torch.zeros(2))
        # Saved with the weights, so that an exported adapter can be loaded without the language model.
        self.register_buffer("embedding_norm", torch.tensor(float(embedding_norm)))
        for projection in (self.nodes, self.graph):
            nn.init.normal_(projection.weight, std=d1**-0.5)

    def project(self, graph_CD: Tensor, nodes_MD: Tensor) -> Tensor:
        """Computes the soft tokens: graphs first, then nodes.

        Args:
            graph_CD: Session vector of each output.
            nodes_MD: Vectors of the nodes in the prompts.

        Returns:
            Soft tokens, [S, H].
        """
        lengths_2 = self.log_gain_2.exp() * self.embedding_norm
        graph_CH = functional.normalize(self.graph(graph_CD), dim=1) * lengths_2[0]
        nodes_MH = functional.normalize(self.nodes(nodes_MD), dim=1) * lengths_2[1]
        return torch.cat([graph_CH, nodes_MH])

    def forward(self, tokens_XH: Tensor, soft_rows_X: Tensor, graph_CD: Tensor, nodes_MD: Tensor) -> Tensor:
        """Replaces the token embeddings at soft positions by soft tokens.

        Args:
            tokens_XH: Token embeddings of the prompts.
            soft_rows_X: Row of the soft token at each position, int64; -1 keeps the token embedding.
            graph_CD: Session vector of each output.
            nodes_MD: Vectors of the nodes in the prompts.

        Returns:
            Input embeddings of the language model, [X, H], in the dtype of the token embeddings.
        """
        soft_SH = self.project(graph_CD, nodes_MD).to(tokens_XH.dtype)
        soft_XH = soft_SH.index_select(0, soft_rows_X.clamp(min=0))
        return torch.where((soft_rows_X >= 0).unsqueeze(1), soft_XH, tokens_XH)
