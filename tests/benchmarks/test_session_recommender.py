import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import recbole_environment, session_recommender
from benchmarks.commands import prepare_synthetic
from benchmarks.recbole_environment import make_environment
from benchmarks.recbole_files import NAME, write_atomic_files, write_part
from benchmarks.session_recommender import DEFAULT, PEER, ROUNDED, SAME, check_counts, table, train_in_turns
from benchmarks.session_settings import Settings
from benchmarks.turns_protocol import Epoch, Trainer, TrainerFailed
from llmgr_rec.cli import make_parser, run_cli
from llmgr_rec.config_file import add_config_arguments, parse_with_config
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError

ROOT = Path(__file__).parents[2]
SETTINGS = Settings(
    encoder="gcsan",
    dim=64,
    batch_size=512,
    steps=2,
    attention_layers=3,
    attention_heads=4,
    dropout=0.3,
    score="dot",
    lr=1e-3,
    rounds=5,
    seed=7,
    threads=2,
)
EPOCH = Epoch(examples=100, seconds=2.0, loss=3.0, ndcg=0.05, validated=10)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return Dataset(prepare_synthetic(tmp_path_factory.mktemp("data"), sessions=60, items=40))


def config_of(words):
    parser = make_parser("test", "Reads settings.")
    add_config_arguments(parser)
    return parse_with_config(parser, words)[1]


def rows(folder, split):
    header, *lines = (folder / NAME / f"{NAME}.{split}.inter").read_text().splitlines()
    assert header == "session_id:token\titem_id_list:token_seq\titem_id:token"
    return [line.split("\t") for line in lines]


def sessions(dataset, split):
    import pyarrow.parquet as pq

    (part,) = dataset.parts(split)
    columns = pq.read_table(part).to_pydict()
    return list(zip(columns["items"], columns["target"], strict=True))


def test_recbole_gets_every_prefix_of_a_training_row_and_validation_rows_whole(dataset, tmp_path):
    counts = write_atomic_files(dataset, tmp_path)
    expected = []
    for items, target in sessions(dataset, "train"):
        clicks = [*items, target]
        expected += [(" ".join(map(str, clicks[:end])), str(clicks[end])) for end in range(1, len(clicks))]
    assert [tuple(row[1:]) for row in rows(tmp_path, "train")] == expected
    whole = [(" ".join(map(str, items)), str(target)) for items, target in sessions(dataset, "valid")]
    assert [tuple(row[1:]) for row in rows(tmp_path, "valid")] == whole
    assert counts == {"train": len(expected), "valid": len(whole)}


def test_recbole_knows_the_whole_catalog(dataset, tmp_path):
    write_atomic_files(dataset, tmp_path)
    lines = (tmp_path / NAME / f"{NAME}.item").read_text().splitlines()
    assert lines == ["item_id:token", *map(str, range(dataset.manifest.num_items))]


def test_a_part_is_a_data_set_of_whole_rows(dataset, tmp_path):
    part = write_part(dataset, tmp_path / "part", {"train": 100, "valid": 9}, seed=1)
    assert 80 < part.manifest.num_examples["train"] <= 100
    assert part.manifest.num_examples["valid"] == 9
    assert part.manifest.num_examples["test"] == dataset.manifest.num_examples["test"]
    assert part.manifest.num_items == dataset.manifest.num_items
    chosen, whole = sessions(part, "train"), sessions(dataset, "train")
    assert sum(len(items) for items, _ in chosen) == part.manifest.num_examples["train"]
    assert [row for row in whole if row in chosen] == chosen
    assert write_atomic_files(part, tmp_path / "atomic")["train"] == part.manifest.num_examples["train"]


def test_all_rows_are_the_data_set_again(dataset, tmp_path):
    part = write_part(dataset, tmp_path / "part", {}, seed=1)
    assert part.manifest.num_examples == dataset.manifest.num_examples
    assert sessions(part, "train") == sessions(dataset, "train")


def test_a_part_too_small_for_a_row_is_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="1 train examples are fewer than the first row drawn has"):
        write_part(dataset, tmp_path / "part", {"train": 1}, seed=0)


def test_both_sides_have_the_same_settings():
    ours = config_of(SETTINGS.recbole_words())
    theirs = SETTINGS.recbole(Path("files"), max_length=50)["config"]
    assert ours.encoder.name == "gcsan"
    assert (ours.tables.dim, ours.tables.dim) == (theirs["hidden_size"], theirs["embedding_size"])
    assert ours.encoder.steps == theirs["step"] == 2
    assert ours.encoder.attention_layers == theirs["n_layers"] == 3
    assert ours.encoder.attention_heads == theirs["n_heads"] == 4
    assert ours.encoder.score == "dot"
    assert ours.encoder.dropout == theirs["hidden_dropout_prob"] == 0.3
    assert ours.sbr.batch_size == theirs["train_batch_size"] == 512
    assert ours.tables.optimizer == theirs["learner"] == "adam"
    assert ours.sbr.lr == ours.tables.lr == theirs["learning_rate"]
    assert ours.optimizer.weight_decay == theirs["weight_decay"] == 0
    assert ours.seed == theirs["seed"] == 7
    assert theirs["loss_type"] == "CE"
    assert theirs["train_neg_sample_args"] is None
    assert ours.tables.side_features == []
    json.dumps(theirs)


def test_our_rate_stays_at_its_peak_over_the_epochs_that_are_trained():
    from llmgr_rec.training.optimizers import CosineSchedule

    config = config_of(SETTINGS.recbole_words())
    ours = config.sbr
    group = {"lr": ours.lr}
    optimizer = type("Optimizer", (), {"param_groups": [group]})()
    schedule = CosineSchedule(optimizer, total_steps=ours.epochs * 100, warmup=config.optimizer.warmup)
    assert schedule.factor(0) == 1
    assert schedule.factor(SETTINGS.rounds * 100) == pytest.approx(1, abs=1e-5)


def test_srgnn_has_neither_attention_blocks_nor_dropout():
    settings = replace(SETTINGS, encoder="srgnn")
    theirs = settings.recbole(Path("files"), max_length=50)
    assert theirs["model"] == "SRGNN"
    assert "n_layers" not in theirs["config"]
    assert config_of(settings.recbole_words()).encoder.dropout == 0


def test_by_default_the_product_keeps_its_own_optimizer():
    by_default = config_of(SETTINGS.default_words())
    assert by_default.tables.optimizer == config_of([]).tables.optimizer
    assert by_default.sbr.epochs == SETTINGS.rounds


FAKE = """
import sys, time
from benchmarks.turns_protocol import Epoch, Replies
replies = Replies()
print("what a library prints")
replies.ready(version="1")
number = 0
while replies.wait():
    number += 1
    replies.done(Epoch(examples=100, seconds=float(sys.argv[1]) * number, loss=1.0, ndcg=0.1 * number, validated=10))
"""


def fake(folder, script, *words, name="fake"):
    return Trainer(name, [sys.executable, "-c", script, *words], folder, {"PYTHONPATH": str(ROOT)})


def test_a_trainer_trains_an_epoch_whenever_it_is_asked_to(tmp_path):
    with fake(tmp_path, FAKE, "2") as trainer:
        assert trainer.facts == {"version": "1"}
        assert [trainer.train(), trainer.train()] == [100, 100]
    assert [epoch.ndcg for epoch in trainer.epochs] == [0.1, 0.2]
    assert trainer.seconds == 6
    assert (tmp_path / "fake.log").read_text() == "what a library prints\n"


def test_only_the_seconds_of_training_count(tmp_path):
    with fake(tmp_path, FAKE, "1", name="fast") as fast, fake(tmp_path, FAKE, "4", name="slow") as slow:
        rates = train_in_turns([fast, slow], epochs=2)
    assert rates == {"fast": [100.0, 50.0], "slow": [25.0, 12.5]}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import sys; sys.exit('no such model')", "fake exited: no such model"),
        ("print('hello')", "fake sent 'hello', which is no JSON object"),
        ("print('{}'); raise SystemExit", "fake exited: without a message"),
        ("print('{}'); print('{\"loss\": 1}')", "fake sent {'loss': 1}, which is no epoch"),
    ],
)
def test_a_trainer_that_fails_is_one_line(tmp_path, script, message):
    def run():
        with fake(tmp_path, script) as trainer:
            trainer.train()

    with pytest.raises(TrainerFailed) as failed:
        run()
    assert str(failed.value) == message


def test_sides_with_unlike_examples_are_refused(tmp_path):
    with fake(tmp_path, FAKE, "1") as trainer:
        trainer.train()
    check_counts([trainer], {"train": 100, "valid": 10})
    with pytest.raises(RuntimeError, match="fake reported Epoch"):
        check_counts([trainer], {"train": 100, "valid": 11})


def test_table_has_a_row_for_each_side_and_each_epoch():
    spread = {"median": 20.0, "low": 19.0, "high": 21.0}
    names = (SAME, ROUNDED, DEFAULT, PEER)
    text = table(
        "gcsan",
        {
            "examples": {"train": 1000, "valid": 100},
            "items": 12101,
            "examples_per_s": dict.fromkeys(names, spread),
            "ratio": dict.fromkeys(names[:2], spread),
            "epochs": {name: [vars(EPOCH), vars(EPOCH)] for name in names},
        },
    )
    assert all(name in text for name in names)
    assert "at least 15" in text
    assert "after epoch 2" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_examples", "-1"], "--max_examples is -1; set it to 0 or more"),
        (["--dim", "0"], "--dim is 0; set it to 1 or more"),
        (["--rounds", "0"], "--rounds is 0; set it to 1 or more"),
    ],
)
def test_a_bad_argument_is_one_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["session_recommender", "--dataset", "data", *words])
    with pytest.raises(SystemExit) as ended:
        run_cli(session_recommender.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_an_environment_that_cannot_be_made_is_one_line(monkeypatch, tmp_path):
    def create(folder, **_):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(recbole_environment.venv, "create", create)
    monkeypatch.setattr(recbole_environment, "PINS", ("--no-such-option",))
    with pytest.raises(UserError, match=r"^the environment for recbole 1.2.1 cannot be made in .*no such option"):
        make_environment(tmp_path / "environment")


def test_a_folder_of_something_else_is_not_cleared(tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(UserError, match="is not empty and is no virtual environment"):
        make_environment(tmp_path)
    assert (tmp_path / "precious").exists()
