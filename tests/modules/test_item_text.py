"""Item text in item vectors: what it adds, what trains of it, and one table for recommender and head."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.config import Config
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.left_out import LeftOutIds
from llmgr_rec.data.pretrained import load_decoder
from llmgr_rec.modules.build import build_llmgr, build_recommender
from llmgr_rec.modules.groups import select_trainable
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.losses import ranking_loss
from llmgr_rec.modules.prompts import CompiledPrompt
from llmgr_rec.modules.recommender import SessionRecommender
from tests.modules.small_llmgr import NUM_ITEMS, catalogue, collator, raw_sessions

WIDTH = 64
UNSEEN = 3


def config(item_text: bool = True) -> Config:
    settings = Config()
    settings.tables.dim = 16
    settings.tables.item_text = item_text
    settings.encoder.dropout = 0.0
    settings.llm.name_or_path = "random-tiny"
    settings.llm.dtype = "float32"
    return settings


def recommender_of(settings: Config) -> SessionRecommender:
    """A recommender whose texts are standardised, as they come from a language model, and an item without an id row."""
    torch.manual_seed(0)
    model = build_recommender(settings, NUM_ITEMS, {"category": 3}, text_width=WIDTH)
    with torch.no_grad():
        if model.item_text is not None:
            model.item_text.text_tables.embedding_bags["item_text"].weight.normal_(std=WIDTH**-0.5)
        model.item_tables.ebc.embedding_bags["item_id"].weight.normal_(std=settings.tables.init_std)
        model.item_tables.ebc.embedding_bags["item_id"].weight[UNSEEN] = 0
    return model


def table(model: SessionRecommender, name: str) -> Tensor:
    assert model.item_text is not None
    bags = (model.item_text.text_tables if name == "item_text" else model.item_tables.ebc).embedding_bags
    return bags[name].weight


def all_items() -> KeyedJaggedTensor:
    return collator(item_text=True).item_features(torch.arange(NUM_ITEMS))


def training_batch(share: float = 0.0) -> SessionBatch:
    counts = catalogue().train_count_V.clone()
    counts[UNSEEN] = 0
    collate = collator(item_text=True, left_out=LeftOutIds(counts, share, 0))
    return collate(raw_sessions([[1, UNSEEN, 3, 2], [7], [5, 5, 6]], [0, UNSEEN, 11]))


def test_the_vector_is_id_row_plus_side_rows_plus_projected_text() -> None:
    model, plain = recommender_of(config()), recommender_of(config(item_text=False))
    assert model.item_text is not None
    rows = model.rows(all_items())
    expected = model.item_tables(all_items()) + table(model, "item_text") @ model.item_text.text_projection.weight.T
    torch.testing.assert_close(rows.vectors_XD, expected)
    torch.testing.assert_close(rows.ids_XD, table(model, "item_id"))
    torch.testing.assert_close(rows.texts_XH, table(model, "item_text"))
    assert plain.rows(all_items()).texts_XH is None
    fresh, without = build_recommender(config(), 5, {}, text_width=WIDTH), build_recommender(config(False), 5, {})
    assert set(fresh.state_dict()) - set(without.state_dict()) == {
        "item_text.text_projection.weight",
        "item_text.text_tables.embedding_bags.item_text.weight",
    }
    for name, value in without.encoder.state_dict().items():
        assert torch.equal(value, fresh.encoder.state_dict()[name]), "the encoder starts as it does without text"


def test_every_way_to_items_and_sessions_reads_the_text() -> None:
    model, batch = recommender_of(config()).eval(), training_batch()
    seen = model(batch)
    torch.testing.assert_close(seen.candidates_CQ, model.item_vectors(all_items()))
    torch.testing.assert_close(seen.queries_BQ, model.queries(batch))
    nodes = batch.graph.node_items_N
    torch.testing.assert_close(seen.rows_ND, model.rows(all_items()).vectors_XD[nodes])


def test_the_text_starts_at_the_length_of_an_id_row() -> None:
    settings = config()
    settings.tables.dim = 64
    model = build_recommender(settings, 400, {}, text_width=576)
    assert model.item_text is not None
    encodings = functional.normalize(torch.randn(400, 576), dim=1)
    root_mean_square = model.item_text.add_to(torch.zeros(400, 64), encodings).square().mean().sqrt().item()
    assert root_mean_square == pytest.approx(settings.tables.init_std, rel=0.05)


def test_an_item_without_an_id_row_is_ranked_by_its_text() -> None:
    model, batch = recommender_of(config()).eval(), training_batch()
    scores = model.queries(batch) @ model.item_vectors(all_items()).T
    with torch.no_grad():
        table(model, "item_text")[UNSEEN] *= -1
        changed = model.queries(batch) @ model.item_vectors(all_items()).T
        table(model, "item_id")[UNSEEN] += 1
    other = model(batch)
    # The middle session does not hold the item: there only its own score changes.
    assert (scores != 0).all()
    assert ((scores - changed)[1].abs() > 1e-6).nonzero().flatten().tolist() == [UNSEEN]
    # In a training batch its bag is empty: whatever stands in the id row says nothing.
    torch.testing.assert_close(other.queries_BQ @ other.candidates_CQ.T, changed)


def test_the_projection_trains_and_rows_that_are_left_out_do_not() -> None:
    model, batch = recommender_of(config()), training_batch(share=0.5)
    assert "item_text.text_projection.weight" in select_trainable(model, ["encoder"])
    trained = select_trainable(model, ["tables", "encoder"])
    assert not any("text_tables" in name for name in trained)
    seen = model(batch)
    loss = ranking_loss(
        seen.queries_BQ, seen.candidates_CQ, batch.target_columns_B, batch.weights_B, batch.global_size, 1
    )
    loss.backward()
    assert model.item_text is not None
    assert model.item_text.text_projection.weight.grad is not None
    assert model.item_text.text_projection.weight.grad.abs().min() > 0
    assert table(model, "item_text").grad is None
    gradient = table(model, "item_id").grad
    assert gradient is not None
    candidates = batch.features["item_id"].lengths()[batch.graph.node_items_N.numel() :]
    assert 0 < candidates.sum() < NUM_ITEMS - 1
    assert torch.equal(gradient.abs().sum(1) > 0, candidates > 0)


def test_the_width_of_the_encodings_must_be_known() -> None:
    with pytest.raises(ValueError, match="width"):
        build_recommender(config(), NUM_ITEMS, {})


def llmgr_of(settings: Config) -> LLMGR:
    prompts = {"behave": CompiledPrompt([4, 5], ["nodes", "graph"])}
    model = build_llmgr(settings, NUM_ITEMS, {"category": 3}, load_decoder("random-tiny", 1, "float32"), prompts)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding_bags" in name:
                columns = parameter.shape[1]
                parameter.copy_(torch.randn(NUM_ITEMS, columns, generator=generator)[: len(parameter)])
        model.recommender.item_tables.ebc.embedding_bags["item_id"].weight[UNSEEN] = 0
    return model.eval()


@pytest.mark.parametrize("head", ["tied", "linear"])
def test_recommender_and_head_share_one_table(head: str) -> None:
    settings = config()
    settings.head.name = head  # type: ignore[assignment]
    model = llmgr_of(settings)
    tables = [name for name, _ in model.named_parameters() if "item_text" in name and "embedding_bags" in name]
    assert tables == ["recommender.item_text.text_tables.embedding_bags.item_text.weight"]
    batch = training_batch()
    scored = model.score(batch)
    torch.testing.assert_close(scored.items_CQ, model.item_vectors(all_items()))
    rows = model.rows(all_items())
    model.cache_catalogue(rows)
    torch.testing.assert_close(model.score(batch).items_CQ, scored.items_CQ)


def test_the_head_reads_what_it_would_read_from_a_table_of_its_own() -> None:
    shared, own = llmgr_of(config()), llmgr_of(config(item_text=False))
    assert own.text_tables is not None
    assert shared.recommender.item_text is not None
    with torch.no_grad():
        table = shared.recommender.item_text.text_tables.embedding_bags["item_text"].weight
        table.copy_(own.text_tables.embedding_bags["item_text"].weight)
        ids = own.recommender.item_tables.ebc.embedding_bags["item_id"].weight
        shared.recommender.item_tables.ebc.embedding_bags["item_id"].weight.copy_(ids)
    # Its own columns stand before the recommender's.
    columns = config().tables.dim
    torch.testing.assert_close(
        shared.item_vectors(all_items())[:, :columns], own.item_vectors(all_items())[:, :columns]
    )
