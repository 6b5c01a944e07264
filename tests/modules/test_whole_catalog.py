"""Item vectors from one lookup of each table row against a bag for each item."""

import torch
from torchrec.sparse.jagged_tensor import KeyedTensor

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.collate import CandidateItems, Collator
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.modules.encoders import build_encoder
from llmgr_rec.modules.item_tables import ItemTables
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.tasks import SbrTask
from llmgr_rec.modules.whole_catalog import WholeCatalog
from tests.modules.small_llmgr import catalog, raw_sessions

DIM, NUM_ITEMS = 8, 12
# More words than items, items without words, and words without items.
WORDS = Jagged.from_lengths(torch.tensor([14, 3, 3, 0, 7, 14]), torch.tensor([2, 0, 1, 0, 0, 3] + [0] * 6))
CATEGORIES = Jagged.from_lengths(torch.arange(NUM_ITEMS) % 3, torch.ones(NUM_ITEMS, dtype=torch.int64))
SESSIONS = raw_sessions([[1, 2, 3, 2, 4], [7], [], [5, 5, 6]], [0, 3, 2, 11])


def trained(features: dict[str, Jagged], whole: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients and looked-up rows of a step."""
    items: Catalog = catalog()
    items.features = features
    torch.manual_seed(0)
    sizes = {name: int(feature.values.max()) + 1 for name, feature in features.items()}
    encoder = build_encoder(EncoderConfig(dropout=0.0), DIM)
    model = SessionRecommender(ItemTables(NUM_ITEMS, sizes, DIM), encoder, "cosine", 0.1)
    # A feature that no item has gets empty bags and no table.
    collate = Collator(items, [*features, "brand"], CandidateItems("full"))
    task = SbrTask(model, catalog=WholeCatalog(NUM_ITEMS, features) if whole else None)
    batch = (collate.with_table_rows() if whole else collate)(SESSIONS)
    loss, _ = task(batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in task.named_parameters() if parameter.grad is not None}
    return loss.detach(), gradients, batch.features.values().numel()


def test_loss_and_gradients_are_those_of_a_bag_for_each_item() -> None:
    for features in ({}, {"word": WORDS}, {"category": CATEGORIES, "word": WORDS}):
        plain, whole = trained(features, whole=False), trained(features, whole=True)
        torch.testing.assert_close(whole[:2], plain[:2], rtol=1e-5, atol=1e-6)
        # Each row of each table once, however many items have it.
        assert whole[2] == NUM_ITEMS + sum(int(feature.values.max()) + 1 for feature in features.values())


def test_a_collection_may_order_its_features_in_another_way() -> None:
    whole = WholeCatalog(NUM_ITEMS, {"category": CATEGORIES, "word": WORDS})
    tables = {name: torch.randn(15, DIM) for name in whole.names}
    orders = (whole.names, whole.names[::-1])
    results = [
        whole(KeyedTensor.from_tensor_list(names, [tables[n] for n in names]), torch.tensor([3, 0])) for names in orders
    ]
    torch.testing.assert_close(results[0], results[1])
