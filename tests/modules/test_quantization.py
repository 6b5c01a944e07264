"""Session recommenders with tables and linear layers of 8 bits."""

import pytest
import torch
from torch import nn
from torchrec.inference.modules import quantize_embeddings

from llmgr_rec.config import EncoderConfig
from llmgr_rec.modules.encoders import ENCODERS, build_encoder
from llmgr_rec.modules.item_tables import ItemTables
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage.table_io import init_tables
from tests.modules.graphs import NUM_CATEGORIES, NUM_ITEMS, batch_of

DIM = 16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ENCODERS)
def test_scores_stay_close(name: str) -> None:
    torch.manual_seed(0)
    tables = ItemTables(NUM_ITEMS, {"category": NUM_CATEGORIES}, DIM)
    encoder = build_encoder(EncoderConfig(name=name, attention_heads=2), DIM)
    model = SessionRecommender(tables, encoder, "cosine", 1.0).eval()
    init_tables(model, 1, 0.5)
    batch = batch_of([[1, 2, 3, 2, 4], [5], [], [7, 7, 0]], [5, 6, 1, -1])

    def scores(of: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            output = of(batch)
        return output.queries_BQ @ output.candidates_CQ.T

    expected_BC = scores(model)
    of_tables = quantize_embeddings(model, torch.int8, inplace=False)
    assert type(of_tables.item_tables.ebc) is not type(tables.ebc)
    # Cosines, at most 1.
    torch.testing.assert_close(scores(of_tables), expected_BC, rtol=0, atol=0.02)
    of_both = torch.ao.quantization.quantize_dynamic(of_tables, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(scores(of_both), expected_BC, rtol=0, atol=0.05)
    assert not torch.equal(scores(of_both), expected_BC)
