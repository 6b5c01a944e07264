"""The text sequence encoder: against encoding sessions one by one, and as a part of the recommender."""

import pytest
import torch
from torch.nn import functional

from llmgr_rec.config import Config, TablesConfig
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.session_tokens import append_token, item_sequences, last_positions, session_sequences
from llmgr_rec.modules import text_sequence_encoder
from llmgr_rec.modules.model_spec import build_recommender
from llmgr_rec.modules.param_groups import select_trainable
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.tasks import LLMTextTask
from llmgr_rec.modules.text_sequence_encoder import TextSequenceEncoder
from llmgr_rec.modules.text_table import text_tables
from llmgr_rec.storage.pretrained import load_decoder
from tests.modules.small_llmgr import NUM_ITEMS, collator, raw_sessions

COLUMNS, CLICKS = 8, 3
CONFIG = Config(tables=TablesConfig(dim=16))
SESSIONS, TARGETS = [[1, 2, 3, 2], [7], [5, 5, 6], []], [0, 4, 11, 2]


def text_encoder_of(dropout: float = 0.0) -> TextSequenceEncoder:
    """With different texts for all items but one, which has none."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 7, (NUM_ITEMS,), generator=generator)
    lengths[9] = 0
    texts = Jagged.from_lengths(torch.randint(5, 200, (int(lengths.sum()),), generator=generator), lengths)
    torch.manual_seed(0)
    encoder = TextSequenceEncoder(
        load_decoder("random-tiny", 2, "float32"), append_token(texts, 3), COLUMNS, CLICKS, dropout
    )
    encoder.whiten(torch.arange(NUM_ITEMS))
    with torch.no_grad():
        encoder.session_projection.weight.add_(0.3 * torch.randn(COLUMNS, COLUMNS))
    return encoder


def recommender_with(encoder: TextSequenceEncoder, tables_device: str = "cpu") -> SessionRecommender:
    plain = build_recommender(CONFIG, NUM_ITEMS, {"category": 3}, tables_device)
    tables = text_tables(NUM_ITEMS, COLUMNS, torch.device(tables_device))
    return SessionRecommender(plain.item_tables, plain.encoder, plain.score, plain.temperature, tables, encoder)


def batch() -> SessionBatch:
    return collator()(raw_sessions(SESSIONS, TARGETS))


def plain_query(encoder: TextSequenceEncoder, session: list[int]) -> torch.Tensor:
    """One session encoded by itself."""
    if not session:
        return torch.zeros(COLUMNS)
    shown = session[-CLICKS:]
    tokens = torch.cat([encoder.item_tokens.select(torch.tensor([item])).values for item in shown])
    state = encoder.decoder(input_ids=tokens.unsqueeze(0)).last_hidden_state[0, -1]
    projected = encoder.session_projection((state - encoder.mean_H) @ encoder.map_HK)
    return functional.normalize(projected, dim=0) * encoder.log_scale.exp()


def test_queries_are_those_of_sessions_encoded_one_by_one() -> None:
    encoder = text_encoder_of().eval()
    expected = torch.stack([plain_query(encoder, session) for session in SESSIONS])
    torch.testing.assert_close(encoder.queries(batch()), expected, atol=1e-4, rtol=1e-4)


def test_one_pass_encodes_each_click_as_if_it_were_the_last() -> None:
    encoder = text_encoder_of().eval()
    sessions = Jagged.from_lengths(torch.tensor([3, 8, 10, 11]), torch.tensor([3, 1]))
    prefixes = Jagged.from_lengths(torch.tensor([3, 3, 8, 3, 8, 10, 11]), torch.tensor([1, 2, 3, 1]))
    one_pass = encoder.encode(session_sequences(encoder.item_tokens, sessions))
    each = encoder.encode(last_positions(session_sequences(encoder.item_tokens, prefixes)))
    torch.testing.assert_close(one_pass, each, atol=1e-5, rtol=1e-4)


def test_how_many_are_encoded_in_a_call_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = text_encoder_of().eval()
    whole = encoder.item_vectors(torch.arange(NUM_ITEMS))
    monkeypatch.setattr(text_sequence_encoder, "_MAX_TOKENS_PER_CALL", 24)
    torch.testing.assert_close(encoder.item_vectors(torch.arange(NUM_ITEMS)), whole, atol=1e-5, rtol=1e-4)


def test_decoder_calls_for_other_ranks_change_nothing() -> None:
    items, found = torch.arange(NUM_ITEMS), []
    for more in (0, 2):
        encoder, calls = text_encoder_of().requires_grad_(True), []
        encoder.common_calls = lambda own, more=more: own + more  # type: ignore[misc]
        encoder.decoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        vectors_CK = encoder.item_vectors(items)
        (vectors_CK @ torch.arange(float(COLUMNS))).sum().backward()
        found.append([vectors_CK, *(parameter.grad for parameter in encoder.decoder.parameters())])
        assert len(calls) == 1 + more
        assert encoder.queries(collator()(raw_sessions([[]], [1]))).tolist() == [[0.0] * COLUMNS]
        assert len(calls) == 1 + 2 * more
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_before_training_embeddings_of_items_are_white() -> None:
    encoder = text_encoder_of()
    states = encoder.encode(item_sequences(encoder.item_tokens, torch.arange(NUM_ITEMS))).detach()
    covariance = torch.cov(((states - encoder.mean_H) @ encoder.map_HK).T, correction=0)
    assert covariance.diagonal().max() == pytest.approx(1, abs=0.05)
    assert covariance.diagonal().min() > 0.5
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-3


def test_embeddings_of_equal_texts_are_zero() -> None:
    encoder = text_encoder_of()
    equal = Jagged(torch.full((NUM_ITEMS,), 3), torch.arange(NUM_ITEMS + 1))
    encoder.item_tokens = equal
    encoder.whiten(torch.arange(NUM_ITEMS))
    states = encoder.encode(item_sequences(equal, torch.arange(NUM_ITEMS)))
    assert ((states - encoder.mean_H) @ encoder.map_HK).abs().max() < 1e-2


def test_training_encodes_candidates_and_ranking_uses_the_table() -> None:
    encoder = text_encoder_of().requires_grad_(True)
    model = recommender_with(encoder)
    queries_BK, candidates_CK = model.train().encode_texts(batch())
    torch.testing.assert_close(candidates_CK, encoder.item_vectors(batch().candidates_C))
    (queries_BK @ candidates_CK.T).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    _, from_table_CK = model.eval().encode_texts(batch())
    assert not torch.allclose(from_table_CK, candidates_CK)
    assert model.text_tables is not None
    table_VK = model.text_tables.embedding_bags["item_text"].weight
    assert torch.equal(from_table_CK, table_VK)
    assert not table_VK.requires_grad or table_VK.grad is None
    output = model(batch())
    features = collator().item_features(torch.arange(NUM_ITEMS))
    torch.testing.assert_close(output.candidates_CQ, model.item_vectors(features))
    torch.testing.assert_close(output.queries_BQ[:, -COLUMNS:], encoder.queries(batch()))


def test_dropout_acts_in_training_only() -> None:
    encoder = text_encoder_of(dropout=0.3)
    items = torch.arange(NUM_ITEMS)
    torch.manual_seed(1)
    first, second = encoder.train().item_vectors(items), encoder.item_vectors(items)
    assert not torch.allclose(first, second)
    encoder.eval()
    assert torch.equal(encoder.item_vectors(items), encoder.item_vectors(items))


def test_more_columns_than_the_decoder_has_are_refused() -> None:
    with pytest.raises(ValueError, match="more than the 64"):
        TextSequenceEncoder(load_decoder("random-tiny", 1, "float32"), Jagged.empty(1), 65, CLICKS, 0.0)


def test_the_task_trains_the_text_encoder_and_nothing_else() -> None:
    task = LLMTextTask(recommender_with(text_encoder_of()))
    trained = select_trainable(task, ["text_encoder"])
    assert {name.split(".")[1] for name in trained} == {"text_encoder"}
    loss, _ = task.train()(batch())
    loss.backward()
    assert {name for name, parameter in task.named_parameters() if parameter.grad is not None} == set(trained)
    with pytest.raises(ValueError, match="without a text encoder"):
        LLMTextTask(build_recommender(CONFIG, NUM_ITEMS, {"category": 3}))
