"""A language model that reads sessions as text: against readings one by one, and as a part of the recommender."""

import pytest
import torch
from llmgr_rec.modules.build import build_recommender
from torch.nn import functional

from llmgr_rec.config import Config
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.session_tokens import closed, item_texts, last_places, session_texts
from llmgr_rec.modules import text_reader
from llmgr_rec.modules.param_groups import select_trainable
from llmgr_rec.modules.tasks import LLMTextTask
from llmgr_rec.modules.text_sequence_encoder import TextSequenceEncoder
from llmgr_rec.storage.pretrained import load_decoder
from tests.modules.small_llmgr import NUM_ITEMS, collator, raw_sessions

COLUMNS, CLICKS = 8, 3
SESSIONS, TARGETS = [[1, 2, 3, 2], [7], [5, 5, 6], []], [0, 4, 11, 2]


def reader_of(dropout: float = 0.0) -> TextSequenceEncoder:
    """With different texts for all items but one, which has none."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 7, (NUM_ITEMS,), generator=generator)
    lengths[9] = 0
    texts = Jagged.from_lengths(torch.randint(5, 200, (int(lengths.sum()),), generator=generator), lengths)
    torch.manual_seed(0)
    reader = TextSequenceEncoder(load_decoder("random-tiny", 2, "float32"), closed(texts, 3), COLUMNS, CLICKS, dropout)
    reader.whiten(torch.arange(NUM_ITEMS))
    with torch.no_grad():
        reader.session_projection.weight.add_(0.3 * torch.randn(COLUMNS, COLUMNS))
    return reader


def batch() -> SessionBatch:
    return collator()(raw_sessions(SESSIONS, TARGETS))


def plain_query(reader: TextSequenceEncoder, session: list[int]) -> torch.Tensor:
    """One session read by itself."""
    if not session:
        return torch.zeros(COLUMNS)
    shown = session[-CLICKS:]
    tokens = torch.cat([reader.texts.select(torch.tensor([item])).values for item in shown])
    state = reader.decoder(input_ids=tokens.unsqueeze(0)).last_hidden_state[0, -1]
    read = reader.session_projection((state - reader.mean_H) @ reader.map_HK)
    return functional.normalize(read, dim=0) * reader.log_scale.exp()


def test_queries_are_those_of_sessions_read_one_by_one() -> None:
    reader = reader_of().eval()
    expected = torch.stack([plain_query(reader, session) for session in SESSIONS])
    torch.testing.assert_close(reader.queries(batch()), expected, atol=1e-4, rtol=1e-4)


def test_one_pass_reads_each_click_as_if_it_were_the_last() -> None:
    reader = reader_of().eval()
    sessions = Jagged.from_lengths(torch.tensor([3, 8, 10, 11]), torch.tensor([3, 1]))
    prefixes = Jagged.from_lengths(torch.tensor([3, 3, 8, 3, 8, 10, 11]), torch.tensor([1, 2, 3, 1]))
    together = reader.read(session_texts(reader.texts, sessions))
    apart = reader.read(last_places(session_texts(reader.texts, prefixes)))
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_how_many_are_read_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_of().eval()
    whole = reader.item_vectors(torch.arange(NUM_ITEMS))
    monkeypatch.setattr(text_reader, "_TOKENS_AT_ONCE", 24)
    torch.testing.assert_close(reader.item_vectors(torch.arange(NUM_ITEMS)), whole, atol=1e-5, rtol=1e-4)


def test_calls_for_the_sake_of_others_change_nothing() -> None:
    items, found = torch.arange(NUM_ITEMS), []
    for more in (0, 2):
        reader, calls = reader_of().requires_grad_(True), []
        reader.common_calls = lambda own, more=more: own + more  # type: ignore[misc]
        reader.decoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        vectors_CK = reader.item_vectors(items)
        (vectors_CK @ torch.arange(float(COLUMNS))).sum().backward()
        found.append([vectors_CK, *(parameter.grad for parameter in reader.decoder.parameters())])
        assert len(calls) == 1 + more
        assert reader.queries(collator()(raw_sessions([[]], [1]))).tolist() == [[0.0] * COLUMNS]
        assert len(calls) == 1 + 2 * more
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_before_training_readings_of_items_are_white() -> None:
    reader = reader_of()
    states = reader.read(item_texts(reader.texts, torch.arange(NUM_ITEMS))).detach()
    covariance = torch.cov(((states - reader.mean_H) @ reader.map_HK).T, correction=0)
    assert covariance.diagonal().max() == pytest.approx(1, abs=0.05)
    assert covariance.diagonal().min() > 0.5
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-3


def test_texts_that_are_all_alike_tell_nothing() -> None:
    reader = reader_of()
    alike = Jagged(torch.full((NUM_ITEMS,), 3), torch.arange(NUM_ITEMS + 1))
    reader.texts = alike
    reader.whiten(torch.arange(NUM_ITEMS))
    read = reader.read(item_texts(alike, torch.arange(NUM_ITEMS)))
    assert ((read - reader.mean_H) @ reader.map_HK).abs().max() < 1e-2


def test_training_reads_candidates_and_ranking_takes_the_table() -> None:
    settings = Config()
    settings.tables.dim = 16
    reader = reader_of().requires_grad_(True)
    model = build_recommender(settings, NUM_ITEMS, {"category": 3}, text_encoder=reader)
    queries_BK, candidates_CK = model.train().read_texts(batch())
    torch.testing.assert_close(candidates_CK, reader.item_vectors(batch().candidates_C))
    (queries_BK @ candidates_CK.T).sum().backward()
    assert all(parameter.grad is not None for parameter in reader.parameters())
    _, from_table_CK = model.eval().read_texts(batch())
    assert not torch.allclose(from_table_CK, candidates_CK)
    assert model.text_tables is not None
    table_VK = model.text_tables.embedding_bags["item_text"].weight
    assert torch.equal(from_table_CK, table_VK)
    assert not table_VK.requires_grad or table_VK.grad is None
    seen = model(batch())
    features = collator().item_features(torch.arange(NUM_ITEMS))
    torch.testing.assert_close(seen.candidates_CQ, model.item_vectors(features))
    torch.testing.assert_close(seen.queries_BQ[:, -COLUMNS:], reader.queries(batch()))


def test_dropout_blurs_training_alone() -> None:
    reader = reader_of(dropout=0.3)
    items = torch.arange(NUM_ITEMS)
    torch.manual_seed(1)
    first, second = reader.train().item_vectors(items), reader.item_vectors(items)
    assert not torch.allclose(first, second)
    reader.eval()
    assert torch.equal(reader.item_vectors(items), reader.item_vectors(items))


def test_more_columns_than_the_decoder_has_are_refused() -> None:
    with pytest.raises(ValueError, match="more than the 64"):
        TextSequenceEncoder(load_decoder("random-tiny", 1, "float32"), Jagged.empty(1), 65, CLICKS, 0.0)


def test_the_task_trains_the_text_encoder_and_nothing_else() -> None:
    settings = Config()
    settings.tables.dim = 16
    task = LLMTextTask(build_recommender(settings, NUM_ITEMS, {"category": 3}, text_encoder=reader_of()))
    trained = select_trainable(task, ["text_encoder"])
    assert {name.split(".")[1] for name in trained} == {"text_encoder"}
    loss, _ = task.train()(batch())
    loss.backward()
    assert {name for name, parameter in task.named_parameters() if parameter.grad is not None} == set(trained)
    with pytest.raises(ValueError, match="without a text encoder"):
        LLMTextTask(build_recommender(settings, NUM_ITEMS, {"category": 3}))
