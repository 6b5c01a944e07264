"""eSASRec (Tikhonovich et al., arXiv 2508.06450): SASRec with LiGR blocks, trained with a sampled softmax."""

from torch import nn

from llmgr_rec.config import EncoderConfig
from llmgr_rec.modules.ligr_block import LiGRBlock
from llmgr_rec.modules.sasrec import SASRec


class ESASRec(SASRec):
    """SASRec whose blocks have gated residual connections and SwiGLU.

    The sampled softmax is a setting of the loss, not of the encoder: `loss.full_softmax_max_items` 0.
    """

    @staticmethod
    def make_block(config: EncoderConfig, dim: int) -> nn.Module:
        """A LiGR block; see `SASRec.make_block`."""
        return LiGRBlock(dim, config.attention_heads, config.dropout)
