import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import text_encodings
from llmgr_rec.cli import run_cli
from llmgr_rec.distributed.ranking import BEHIND_ALL
from llmgr_rec.evaluation.protocol import as_it_is, split_reader
from tests.small_run import small_run, without_repeats


def test_every_way_to_encode_has_its_line(tmp_path, capsys):
    output = tmp_path / "out.json"
    words = ["--dataset", str(small_run().dataset.path), "--llm", "random-tiny", "--layers", "1,2", "--threads", "1"]
    text_encodings.main([*words, "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    ways = [f"{kind}, layer {layer}, {way}" for kind in ("pre-trained", "random") for layer in (1, 2) for way in WAYS]
    assert list(results) == ["item_knn", "text_knn", *ways]
    assert all(0 <= values["ndcg@20"] <= values["hr@20"] <= 1 for values in results.values())
    assert all(way in capsys.readouterr().out for way in ways[:1])


WAYS = (text_encodings.CENTRED, text_encodings.WHITENED)


@pytest.mark.parametrize("data", [lambda: small_run().dataset, without_repeats], ids=["repeats", "none"])
def test_places_are_those_of_a_plain_loop(data):
    dataset = data()
    encodings_VH = torch.randn(dataset.manifest.num_items, 6, generator=torch.Generator().manual_seed(0))
    units = (encodings_VH / encodings_VH.norm(dim=1, keepdim=True)).double()
    expected = []
    for raw in split_reader(dataset, text_encodings.SPLIT, 16, as_it_is).batches(0):
        ends = raw.offsets_B1.tolist()
        for row, target in enumerate(raw.targets_B.tolist()):
            clicks = raw.items_L[ends[row] : ends[row + 1]].tolist()
            scores = torch.zeros(len(units), dtype=torch.float64)
            for back, item in enumerate(reversed(clicks)):
                near = units @ units[item]
                near[item] = 0
                scores += text_encodings.DECAY**back * near
            if not dataset.manifest.clicks_repeat:
                scores[clicks] = -torch.inf
            expected.append(int((scores > scores[target]).sum()) if scores[target] > -torch.inf else BEHIND_ALL)
    np.testing.assert_allclose(text_encodings.rank(encodings_VH, dataset), expected, atol=1)


def test_a_bad_argument_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["text_encodings", "--dataset", str(small_run().dataset.path), "--layers", "0"])
    with pytest.raises(SystemExit) as stopped:
        run_cli(text_encodings.main)
    assert stopped.value.code == 2
    assert "--layers is 0; give numbers from 1" in capsys.readouterr().err
