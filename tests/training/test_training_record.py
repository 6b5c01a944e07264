"""The record of a run's training over several launches."""

import json

import pytest

from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.remote_path import as_path
from llmgr_rec.storage.run_facts import dataset_of_run, read_launches
from llmgr_rec.training.training_record import TrainingRecord

ONE_RANK = World.alone()


def test_each_launch_has_an_entry(tmp_path):
    def stopped_in_align():
        with TrainingRecord(tmp_path, "llm", tmp_path / "dataset", 3, ONE_RANK) as record:
            with record.stage("sbr"):
                pass
            with record.stage("align"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_in_align()
    assert dataset_of_run(tmp_path) == (tmp_path / "dataset")
    # Resumed with the settings of the run, and killed.
    killed = TrainingRecord(tmp_path, "", as_path("memory://shop/dataset"), 3, ONE_RANK)
    killed.__enter__()
    first, second = read_launches(tmp_path)
    assert (first["recipe"], first["seed"], first["ended"], list(first["stages"])) == ("llm", 3, True, ["sbr"])
    assert (second["recipe"], second["ended"], second["stages"]) == ("llm", False, {})
    assert second["machine"]["cores"] > 0
    assert second["machine"]["memory_gib"] > 0
    assert second["machine"]["processor"]
    assert second["machine"]["device"] == "CPU"
    assert str(dataset_of_run(tmp_path)) == "memory://shop/dataset"
    assert read_launches(tmp_path / "other") == []
    assert dataset_of_run(tmp_path / "other") is None


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"started": 5}]', json.dumps([{"started": "x", "seconds": "y"}])])
def test_a_damaged_record_is_one_line(tmp_path, text):
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(UserError, match=r"training\.json is damaged; delete it"):
        read_launches(tmp_path)
