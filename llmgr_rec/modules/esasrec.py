"""eSASRec (Tikhonovich et al., arXiv 2508.06450): SASRec with LiGR blocks, trained with a sampled softmax."""

from llmgr_rec.modules.ligr_block import LiGRBlock
from llmgr_rec.modules.sasrec import SASRec


class ESASRec(SASRec):
    """SASRec whose blocks have gated residual connections and SwiGLU.

    The sampled softmax is a setting of the loss, not of the encoder: `loss.full_softmax_max_items` 0.
    """

    block_class = LiGRBlock
