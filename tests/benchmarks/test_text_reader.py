import json
import sys
from functools import cache

import numpy as np
import pytest
import torch

from benchmarks import text_reader
from benchmarks.session_texts import (
    closed,
    drop_tokens,
    item_texts,
    last_places,
    newest,
    session_texts,
    windows,
)
from llmgr_rec.cli import run_cli
from llmgr_rec.data.jagged import Jagged
from tests.small_run import prepare_small, small_run

ARGS = {
    "llm": "random-tiny",
    "layers": 2,
    "random": False,
    "epochs": 3,
    "batch_size": 30,
    "lr": 1e-3,
    "clicks": 4,
    "dim": 32,
    "drawn_items": 8,
    "dropped_tokens": 0.1,
    "seed": 0,
}


def jagged(rows):
    return Jagged.from_lengths(
        torch.tensor([value for row in rows for value in row]), torch.tensor([len(row) for row in rows])
    )


def rows_of(tokens):
    return [tokens.narrow(row, row + 1).values.tolist() for row in range(tokens.num_rows)]


@cache
def texts():
    return text_reader.catalogue_texts(small_run().catalogue, "random-tiny", 24)


@cache
def reader():
    return text_reader.make_reader(ARGS, texts()).eval()


TEXTS = jagged([[5, 6, 9], [9], [7, 9]])
CLICKS = jagged([[2, 0], [1, 1, 2]])


def test_texts_are_closed_and_stand_one_after_the_other():
    assert rows_of(closed(jagged([[5, 6], [], [7]]), 9)) == rows_of(TEXTS)
    read = session_texts(TEXTS, CLICKS)
    assert rows_of(read.tokens) == [[7, 9, 5, 6, 9], [9, 9, 7, 9]]
    assert read.places_X.tolist() == [1, 4, 5, 6, 8]
    assert last_places(read).places_X.tolist() == [4, 8]
    assert item_texts(TEXTS, torch.tensor([2, 0])).places_X.tolist() == [1, 4]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_token_that_is_read_is_dropped(share):
    read = session_texts(TEXTS, CLICKS)
    left = drop_tokens(read, share, torch.Generator().manual_seed(0))
    assert left.tokens.values[left.places_X].tolist() == [9] * 5
    assert left.tokens.num_rows == 2
    if share == 0:
        assert rows_of(left.tokens) == rows_of(read.tokens)
    if share == 1:
        assert rows_of(left.tokens) == [[9, 9], [9, 9, 9]]


def test_windows_are_runs_of_clicks_and_the_newest_are_the_last():
    sessions = jagged([[1, 2], [3, 4, 5, 6, 7]])
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(rows_of(windows(sessions, 3, generator))[1]) for _ in range(50)}
    assert drawn == {(3, 4, 5), (4, 5, 6), (5, 6, 7)}
    assert rows_of(windows(sessions, 3, generator))[0] == [1, 2]
    assert rows_of(newest(sessions, 3)) == [[1, 2], [5, 6, 7]]


def test_one_pass_reads_each_click_as_if_it_were_the_last():
    sessions = jagged([[3, 8, 20], [11], [40, 3]])
    together = reader().read(session_texts(texts(), sessions))
    prefixes = jagged([[3], [3, 8], [3, 8, 20], [11], [40], [40, 3]])
    apart = reader().read(last_places(session_texts(texts(), prefixes)))
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_how_many_are_read_at_once_changes_nothing(monkeypatch):
    whole = reader().read(item_texts(texts(), torch.arange(60)))
    monkeypatch.setattr(reader(), "tokens_at_once", 96)
    torch.testing.assert_close(reader().read(item_texts(texts(), torch.arange(60))), whole, atol=1e-5, rtol=1e-4)


def test_before_training_the_items_readings_are_white():
    states = reader().read(item_texts(texts(), torch.arange(60)))
    covariance = torch.cov(((states - reader().mean_H) @ reader().map_HD).T.detach(), correction=0)
    on, off = covariance.diagonal(), covariance - covariance.diagonal().diag()
    assert on.min() >= 0
    assert on.max() == pytest.approx((1 / 1.02) ** 2, rel=1e-3)
    assert on.topk(4).values.min() > 0.5
    assert off.abs().max() < 1e-3


def test_training_lowers_the_loss():
    trained = text_reader.make_reader(ARGS, texts())
    sessions = text_reader.training_sessions(small_run().dataset)
    first = text_reader.train(trained, texts(), sessions, {**ARGS, "epochs": 1, "lr": 0.0})
    assert text_reader.train(trained, texts(), sessions, {**ARGS, "epochs": 3}) < first - 0.1


def test_scores_are_cosines_of_a_plain_loop():
    scores = text_reader.ReaderScores(reader(), texts(), 2)
    items, offsets = np.array([3, 8, 20, 11]), np.array([0, 3, 4])
    found = scores.scores(items, offsets).toarray()
    with torch.no_grad():
        whitened = [
            (reader().read(last_places(session_texts(texts(), jagged([row])))) - reader().mean_H) @ reader().map_HD
            for row in ([8, 20], [11])
        ]
        for row, states in enumerate(whitened):
            query = reader().session_projection(states)[0]
            for item in (0, 8, 59):
                own = (reader().read(item_texts(texts(), torch.tensor([item]))) - reader().mean_H) @ reader().map_HD
                vector = reader().item_projection(own)[0]
                cosine = torch.nn.functional.cosine_similarity(query, vector, dim=0)
                assert found[row, item] == pytest.approx(float(cosine * reader().log_scale.exp()), abs=1e-3)
    best, _ = scores.rank(items, offsets, 5)
    np.testing.assert_array_equal(best, np.argsort(-found, axis=1, kind="stable")[:, :5])


@pytest.mark.parametrize("kind", ["pre-trained", "random"])
def test_a_reader_is_judged_alone_and_beside_a_run(tmp_path, capsys, kind):
    words = ["--dataset", str(small_run().dataset.path), "--run", str(small_run().run), "--llm", "random-tiny"]
    words += ["--layers", "1", "--epochs", "1", "--threads", "1", "--random", str(kind == "random").lower()]
    text_reader.main([*words, "--output", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(results["test"]) == [text_reader.RUN, text_reader.ALONE, text_reader.BOTH]
    assert results["weight"] in text_reader.WEIGHTS
    assert results["test"][text_reader.RUN]["hr@20"]["gain"]["mean"] == 0
    for metrics in results["test"].values():
        assert 0 <= metrics["ndcg@20"]["mean"] <= metrics["hr@20"]["mean"] <= 1
    assert "run + reader" in capsys.readouterr().out


def test_a_run_on_other_items_is_one_line(tmp_path, monkeypatch, capsys):
    other = prepare_small(tmp_path, first_item=7)
    monkeypatch.setattr(sys, "argv", ["text_reader", "--dataset", str(other.path), "--run", str(small_run().run)])
    with pytest.raises(SystemExit) as stopped:
        run_cli(text_reader.main)
    assert stopped.value.code == 2
    assert "was trained on another catalogue" in capsys.readouterr().err
