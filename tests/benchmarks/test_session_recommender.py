import json
import sys
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import peer_environment, recbole_side, rectools_side, session_recommender
from benchmarks.commands import prepare_synthetic
from benchmarks.dataset_part import write_part
from benchmarks.peer_environment import RECBOLE, make_environment
from benchmarks.peer_quality import BestEpoch, EvaluatedModels
from benchmarks.peers import PEERS
from benchmarks.ranked_split import RankedSplit
from benchmarks.session_recommender import (
    DEFAULT,
    ROUNDED,
    SAME,
    SAMPLED,
    SIDES,
    check_counts,
    chosen_sides,
    compare,
    rates,
    table,
    train_in_turns,
)
from benchmarks.session_settings import Settings, make_settings
from benchmarks.time_to_quality import passed, stopped_rising, time_to_quality, train_to_quality
from benchmarks.turns_protocol import Epoch, Trainer, TrainerFailed
from llmgr_rec.cli import make_parser, run_cli
from llmgr_rec.config_file import add_config_arguments, parse_with_config
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.evaluate import main as evaluate

ROOT = Path(__file__).parents[2]
SETTINGS = Settings(
    encoder="gcsan",
    one_pass=False,
    sampled=False,
    padding=True,
    prefixes=4.0,
    initial_std=0.02,
    max_length=50,
    dim=64,
    batch_size=512,
    steps=2,
    attention_layers=3,
    attention_heads=4,
    dropout=0.3,
    score="dot",
    lr=1e-3,
    negatives=100,
    rounds=5,
    seed=7,
    threads=2,
)
SASREC = replace(SETTINGS, encoder="sasrec", one_pass=True)
EPOCH = Epoch(examples=100, seconds=2.0, processor_seconds=4.0, loss=3.0, ndcg=0.05, validated=10)
PEER = "the peer"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return Dataset(prepare_synthetic(tmp_path_factory.mktemp("data"), sessions=60, items=40))


def config_of(words):
    parser = make_parser("test", "Reads settings.")
    add_config_arguments(parser)
    return parse_with_config(parser, words)[1]


def rows(folder, split):
    file = folder / recbole_side.NAME / f"{recbole_side.NAME}.{split}.inter"
    header, *lines = file.read_text().splitlines()
    assert header == "session_id:token\titem_id_list:token_seq\titem_id:token"
    return [line.split("\t") for line in lines]


def sessions(dataset, split):
    (part,) = dataset.parts(split)
    columns = pq.read_table(part).to_pydict()
    return list(zip(columns["items"], columns["target"], strict=True))


def test_recbole_gets_every_prefix_of_a_training_row_and_validation_rows_whole(dataset, tmp_path):
    counts = recbole_side.write_files(dataset, tmp_path)
    expected = []
    for items, target in sessions(dataset, "train"):
        clicks = [*items, target]
        expected += [(" ".join(map(str, clicks[:end])), str(clicks[end])) for end in range(1, len(clicks))]
    assert [tuple(row[1:]) for row in rows(tmp_path, "train")] == expected
    whole = [(" ".join(map(str, items)), str(target)) for items, target in sessions(dataset, "valid")]
    assert [tuple(row[1:]) for row in rows(tmp_path, "valid")] == whole
    assert counts == {"train": len(expected), "valid": len(whole)}


def test_recbole_knows_the_whole_catalog(dataset, tmp_path):
    recbole_side.write_files(dataset, tmp_path)
    lines = (tmp_path / recbole_side.NAME / f"{recbole_side.NAME}.item").read_text().splitlines()
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
    assert recbole_side.write_files(part, tmp_path / "atomic")["train"] == part.manifest.num_examples["train"]


def test_all_rows_are_the_data_set_again(dataset, tmp_path):
    part = write_part(dataset, tmp_path / "part", {}, seed=1)
    assert part.manifest.num_examples == dataset.manifest.num_examples
    assert sessions(part, "train") == sessions(dataset, "train")


def test_a_part_too_small_for_a_row_is_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="1 train examples are fewer than the first row drawn has"):
        write_part(dataset, tmp_path / "part", {"train": 1}, seed=0)


def test_rectools_gets_training_sessions_with_their_target_and_the_examples_of_other_splits(dataset, tmp_path):
    counts = rectools_side.write_files(dataset, tmp_path / "rectools")
    with np.load(tmp_path / "rectools" / rectools_side.NAME) as arrays:
        train = np.split(arrays["train_items_L"], arrays["train_offsets_U1"][1:-1])
        clicks = {
            split: np.split(arrays[f"{split}_items_L"], arrays[f"{split}_offsets_B1"][1:-1])
            for split in ("valid", "test")
        }
    assert [session.tolist() for session in train] == [[*items, target] for items, target in sessions(dataset, "train")]
    for split, found in clicks.items():
        assert [session.tolist() for session in found] == [items for items, _ in sessions(dataset, split)]
    examples = dataset.manifest.num_examples
    assert counts == {"train": examples["train"], "valid": examples["valid"]}


def test_lists_of_another_program_are_measured_in_the_order_of_the_split(dataset, tmp_path):
    targets = [target for _, target in sessions(dataset, "valid")]
    lists = np.full((len(targets), 20), -1)
    lists[:, 2] = targets
    lists[0] = -1
    np.save(tmp_path / "lists.npy", lists)
    metrics, ranks = RankedSplit(dataset, "valid").measure(tmp_path / "lists.npy")
    assert ranks.tolist() == [20] + [2] * (len(targets) - 1)
    count = metrics["count"]
    assert count == len(targets)
    assert metrics["ndcg@20"] == pytest.approx((count - 1) / count / np.log2(4))
    np.save(tmp_path / "lists.npy", lists[1:])
    with pytest.raises(ValueError, match=f"has {count - 1} lists, but there are {count} examples"):
        RankedSplit(dataset, "valid").measure(tmp_path / "lists.npy")


def test_the_test_lists_of_the_best_epoch_are_kept(dataset, tmp_path):
    valid, test = ([target for _, target in sessions(dataset, split)] for split in ("valid", "test"))
    best = BestEpoch(dataset, tmp_path / "test.npy")
    for place in (3, 1, 2):
        for name, targets in (("valid", valid), ("test", test)):
            lists = np.full((len(targets), 20), -1)
            lists[:, place] = targets
            np.save(tmp_path / f"{name}.npy", lists)
        assert best.measure(tmp_path / "valid.npy") == (pytest.approx(1 / np.log2(place + 2)), len(valid))
    metrics, ranks = best.test
    assert metrics["hr@5"] == 1
    assert ranks.tolist() == [1] * len(test)


def test_recbole_has_the_same_settings():
    ours = config_of(SETTINGS.same_words())
    theirs = recbole_side.gcsan(SETTINGS, Path("files"))["config"]
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
    srgnn = recbole_side.srgnn(SETTINGS, Path("files"))
    assert srgnn["model"] == "SRGNN"
    assert "n_layers" not in srgnn["config"]
    json.dumps([theirs, srgnn])


def test_rectools_has_the_same_settings():
    ours = config_of(SASREC.same_words())
    theirs = rectools_side.sasrec(SASREC, Path("files"))["model"]
    assert (ours.encoder.name, ours.encoder.one_pass, theirs["loss"]) == ("sasrec", True, "softmax")
    assert ours.tables.dim == theirs["n_factors"]
    assert ours.encoder.attention_layers == theirs["n_blocks"]
    assert ours.encoder.attention_heads == theirs["n_heads"]
    assert ours.encoder.dropout == theirs["dropout_rate"]
    assert ours.encoder.max_clicks == theirs["session_max_len"]
    assert ours.sbr.batch_size == theirs["batch_size"] * SASREC.prefixes
    assert ours.sbr.lr == ours.tables.lr == theirs["lr"]
    assert config_of(SASREC.same_words()).loss.full_softmax_max_items > 1e9
    assert ours.optimizer.average == 0
    sampled = config_of(SASREC.same_words(sampled=True)).loss
    assert (sampled.full_softmax_max_items, sampled.num_negatives) == (0, 100)


def test_rectools_esasrec_has_the_same_settings():
    settings = replace(SASREC, encoder="esasrec", sampled=True, padding=False)
    ours, theirs = config_of(settings.same_words()), rectools_side.esasrec(settings, Path("files"))
    assert (ours.encoder.name, theirs["ligr"], theirs["padding"]) == ("esasrec", True, False)
    assert (ours.loss.full_softmax_max_items, theirs["model"]["loss"]) == (0, "sampled_softmax")
    assert ours.loss.num_negatives == theirs["model"]["n_negatives"] == 100
    assert theirs["model"]["n_factors"] == ours.tables.dim


def test_sides_are_chosen_by_name():
    assert list(chosen_sides("default,same", SETTINGS)) == [SAME, DEFAULT]
    assert SAMPLED in chosen_sides(",".join(SIDES), SASREC)
    assert SAMPLED not in chosen_sides(",".join(SIDES), replace(SASREC, sampled=True))
    with pytest.raises(UserError, match="--sides has smae; give some of same, rounded"):
        chosen_sides("smae", SETTINGS)


def test_a_step_in_one_pass_has_as_many_prefixes():
    in_one_pass = config_of(replace(SETTINGS, steps=1).same_words(one_pass=True))
    assert (in_one_pass.encoder.one_pass, in_one_pass.sbr.batch_size) == (True, 512)
    exact = {encoder: replace(SETTINGS, encoder=encoder).one_pass_is_exact for encoder in ("gcsan", "sasrec")}
    assert exact == {"gcsan": False, "sasrec": True}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_defaults_for_what_is_not_given(dataset, name, tmp_path):
    peer = PEERS[name]
    given = {
        "dim": 64,
        "lr": 1e-3,
        "negatives": None,
        "rounds": 1,
        "seed": 0,
        "threads": 1,
        "steps": 1,
        "dropout": None,
    }
    settings = make_settings(given, **peer.of_settings(dataset, 64))
    assert settings.dropout == (0.0 if peer.encoder == "srgnn" else 0.2)
    assert settings.max_length == dataset.manifest.max_length
    assert settings.negatives == (256 if settings.sampled else 1024)
    config_of(settings.same_words())
    peer.write_settings(tmp_path / "peer.json", settings, dataset, tmp_path / "peer")
    written = json.loads((tmp_path / "peer.json").read_text())
    counts = (dataset.manifest.num_items, dataset.manifest.num_examples["train"])
    assert (written["items"], written["examples"], written["k"]) == (*counts, 20)
    assert make_settings({**given, "dropout": 0.1}, **peer.of_settings(dataset, 64)).dropout == 0.1


def test_our_rate_stays_at_its_peak_over_the_epochs_that_are_trained():
    from llmgr_rec.training.optimizers import LearningRates

    config = config_of(SETTINGS.same_words())
    ours = config.sbr
    group = {"lr": ours.lr}
    optimizer = type("Optimizer", (), {"param_groups": [group]})()
    schedule = LearningRates(optimizer, total_steps=ours.epochs * 100, warmup=config.optimizer.warmup)
    assert schedule.factor(0) == 1
    assert schedule.factor(SETTINGS.rounds * 100) == pytest.approx(1, abs=1e-5)


def test_the_default_recipe_learns_as_it_does_without_a_benchmark():
    by_default, without = config_of(SETTINGS.default_words()), config_of([])
    assert by_default.sbr == without.sbr
    assert by_default.encoder == without.encoder
    assert replace(by_default.tables, knn_smoothing=without.tables.knn_smoothing) == without.tables


FAKE = """
import sys, time
from benchmarks.turns_protocol import Epoch, Replies
replies = Replies()
print("what a library prints")
replies.ready(version="1")
number = 0
while replies.wait():
    number += 1
    if number == 4:
        replies.ended()
        continue
    seconds = float(sys.argv[1]) * number
    replies.done(Epoch(100, seconds, 2 * seconds, loss=1.0, ndcg=0.1 * number, validated=10))
"""


def fake(folder, script, *words, name="fake"):
    return Trainer(name, [sys.executable, "-c", script, *words], folder, {"PYTHONPATH": str(ROOT)})


def test_a_trainer_trains_an_epoch_whenever_it_is_asked_to(tmp_path):
    with fake(tmp_path, FAKE, "2") as trainer:
        assert trainer.facts == {"version": "1"}
        trainer.train()
        trainer.train()
    assert [epoch.ndcg for epoch in trainer.epochs] == [0.1, 0.2]
    assert trainer.seconds == 6
    assert (tmp_path / "fake.log").read_text() == "what a library prints\n"


def test_a_side_whose_training_ends_drops_out(tmp_path):
    with fake(tmp_path, FAKE, "1", name="short") as short:
        train_in_turns([short], rounds=6)
        train_to_quality(short, ndcg=0.9, most_seconds=1000.0)
    assert short.ended
    assert len(short.epochs) == 3


def test_a_side_trains_until_its_quality_stops_rising(tmp_path, caplog):
    caplog.set_level("INFO")
    script = FAKE.replace("0.1 * number", "0.3 if number == 2 else 0.2").replace("number == 4", "number == 9")
    with fake(tmp_path, script, "1", name="one") as one, fake(tmp_path, script, "2", name="two") as two:
        train_in_turns([one, two], rounds=6, patience=2, most_seconds=1e-9)
        assert [len(one.epochs), len(two.epochs)] == [1, 1]
        assert "two: epoch 1, 2.0 s in all, NDCG@20 0.2000" in caplog.text
        # The only name whose messages a command shows.
        assert {record.name.split(".")[0] for record in caplog.records} == {"llmgr_rec"}
        train_in_turns([one, two], rounds=6, patience=2)
    assert [len(one.epochs), len(two.epochs)] == [4, 4]
    assert not stopped_rising(one.epochs, 3)
    assert not stopped_rising(one.epochs, 0)
    assert not stopped_rising([], 1)


def test_only_the_seconds_of_training_count(tmp_path):
    with fake(tmp_path, FAKE, "1", name="fast") as fast, fake(tmp_path, FAKE, "4", name="slow") as slow:
        train_in_turns([fast, slow], rounds=2)
        train_to_quality(fast, ndcg=0.3, most_seconds=slow.seconds)
    result = rates({"fast": fast.epochs, "slow": slow.epochs}, "slow", rounds=2)
    assert result["examples_per_s"]["fast"] == {"median": 75.0, "low": 62.5, "high": 87.5}
    assert result["ratio"] == {"fast": {"median": 4.0, "low": 4.0, "high": 4.0}} == result["processor_time_ratio"]


def test_time_to_quality_ends_at_the_first_epoch_that_is_as_good():
    slow = [replace(EPOCH, seconds=10.0, ndcg=ndcg) for ndcg in (0.1, 0.3, 0.2)]
    fast = [replace(EPOCH, ndcg=ndcg) for ndcg in (0.1, 0.2, 0.31, 0.1)]
    never = [replace(EPOCH, ndcg=0.29)]
    result = time_to_quality({"fast": fast, "never": never, "slow": slow}, "slow")
    assert result["ndcg"] == 0.3
    assert result["sides"]["fast"] == {"epoch": 3, "seconds": 6.0, "processor_seconds": 12.0, "ndcg": 0.31}
    assert result["sides"]["never"] is None
    assert result["sides"]["slow"]["seconds"] == 20.0
    assert passed([], 0.1) is None


WORKER = """
import json, sys, numpy
from benchmarks.turns_protocol import Epoch, Replies
replies, settings = Replies(), json.load(open(sys.argv[1]))
replies.ready(version="1")
sessions = numpy.load(settings["sessions"])
while replies.wait():
    for split, name in (("valid", "rankings"), ("test", "test_rankings")):
        if settings[name]:
            numpy.save(settings[name], numpy.full((len(sessions[split + "_offsets_B1"]) - 1, settings["k"]), 1))
    replies.done(Epoch(settings["examples"], 1e4, 1e4, loss=1.0, rankings=settings["rankings"]))
"""


def test_our_side_trains_in_turns_with_a_peer(dataset, tmp_path, monkeypatch):
    """The peer is a stand-in; the real ones are run by `test_the_peers_in_their_environments`."""
    (tmp_path / "stand_in.py").write_text(WORKER)
    monkeypatch.setattr(peer_environment, "make_environment", lambda *_: Path(sys.executable))
    peer = replace(PEERS["rectools_sasrec"], name=PEER, worker="stand_in")
    evaluate(["--run", str(tmp_path), *metrics_words(dataset, tmp_path)])
    against = str(tmp_path / "metrics.json")
    results = compare(tmp_path, peer, arguments(dataset, max_validation=20, sides="default", against=against))
    assert results["ratio"][DEFAULT]["median"] > 10
    assert results["time_to_quality"]["sides"][PEER]["seconds"] == 1e4
    assert len(results["epochs"][PEER]) == 1
    assert list(results["test"]["metrics"]) == ["popularity", PEER]
    assert results["test"]["metrics"][PEER]["hr@20"] == np.mean(
        [target == 1 for _, target in sessions(dataset, "test")]
    )
    assert results["test"]["gains"]["popularity"].keys() == {"hr@20", "ndcg@20", "mrr@20"}
    assert PEER in table(PEER, 12, results)


def metrics_words(dataset, folder, *others):
    return ["--dataset", str(dataset.path), "--models", "popularity", "--output", str(folder / "metrics.json"), *others]


def test_models_of_other_sessions_or_rankings_are_refused(dataset, tmp_path):
    file = tmp_path / "metrics.json"
    evaluate(["--run", str(tmp_path), *metrics_words(dataset, tmp_path, "--max_length", "3")])
    with pytest.raises(UserError, match=r"ranked with .*, the peer with"):
        EvaluatedModels(file, dataset)
    evaluate(["--run", str(tmp_path), *metrics_words(dataset, tmp_path, "--split", "valid")])
    with pytest.raises(UserError, match="is about other sessions than the test split"):
        EvaluatedModels(file, dataset)
    with pytest.raises(UserError, match="RecBole's GCSAN does not give; leave it out"):
        compare(tmp_path, PEERS["recbole_gcsan"], arguments(dataset, against=str(file)))
    with pytest.raises(UserError, match="leave --max_examples out"):
        compare(tmp_path, PEERS["rectools_sasrec"], arguments(dataset, against=str(file), max_examples=9))


def arguments(dataset, **given):
    names = ("batch_size", "attention_layers", "attention_heads", "dropout", "score", "environment", "padding")
    values = {"dim": 8, "steps": 1, "lr": 1e-3, "negatives": 8, "seed": 0, "rounds": 1, "threads": 1}
    values |= {"sides": ",".join(SIDES), "patience": 0, "most_minutes": 0, "against": None}
    values |= {"max_examples": 0, "max_validation": 0}
    return {**dict.fromkeys(names), **values, "dataset": str(dataset.path), **given}


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_the_peers_in_their_environments(dataset, name, tmp_path, monkeypatch):
    peer = PEERS[name]
    environment = ROOT / "runs" / "benchmarks" / peer.package.name
    if not (environment / "complete.txt").exists():
        pytest.skip(f"{environment} is not there; the benchmark makes it")
    args = arguments(dataset, max_examples=100, max_validation=20, environment=str(environment), sides="same")
    results = compare(tmp_path, peer, args)
    assert results["peer"]["items"] == dataset.manifest.num_items
    assert results["epochs"][peer.name][0]["ndcg"] > 0
    if peer.package.name == "rectools":
        # Draws that depend on the padding would differ: dropout.
        losses = []
        for padding in (True, False):
            folder = tmp_path / str(padding)
            folder.mkdir()
            found = compare(folder, peer, {**args, "dropout": 0.0, "padding": padding})
            losses.append(found["epochs"][peer.name][0]["loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


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
    epochs = {name: [vars(EPOCH), vars(EPOCH)] for name in names}
    epochs[SAME] = [*epochs[SAME], vars(EPOCH)]
    at = {"epoch": 2, "seconds": 12.34, "processor_seconds": 56.78, "ndcg": 0.1}
    text = table(
        PEER,
        15.0,
        {
            "examples": {"train": 1000, "valid": 100},
            "items": 12101,
            "examples_per_s": dict.fromkeys(names, spread),
            "ratio": dict.fromkeys(names[:2], spread),
            "processor_time_ratio": dict.fromkeys(names[:2], spread),
            "epochs": epochs,
            "time_to_quality": {"ndcg": 0.1, "sides": {SAME: at, DEFAULT: None}},
        },
    )
    assert all(name in text for name in names)
    assert "wanted: 15 times" in text
    assert "after epoch 3" in text
    assert "12.3" in text
    assert "not within" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_examples", "-1"], "--max_examples is -1; set it to 0 or more"),
        (["--dim", "0"], "--dim is 0; set it to 1 or more"),
        (["--sides", "smae"], "--sides has smae; give some of same, rounded, one_pass, sampled, default"),
        (["--rounds", "0"], "--rounds is 0; set it to 1 or more"),
    ],
)
def test_a_bad_argument_is_one_line(dataset, monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["session_recommender", "--dataset", str(dataset.path), *words])
    with pytest.raises(SystemExit) as ended:
        run_cli(session_recommender.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_an_environment_that_cannot_be_made_is_one_line(monkeypatch, tmp_path):
    def create(folder, **_):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(peer_environment.venv, "create", create)
    package = replace(RECBOLE, others=("--no-such-option",))
    with pytest.raises(UserError, match=r"^the environment for recbole 1.2.1 cannot be made in .*no such option"):
        make_environment(tmp_path / "environment", package)


def test_a_folder_of_something_else_is_not_cleared(tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(UserError, match="is not empty and is no virtual environment"):
        make_environment(tmp_path, RECBOLE)
    assert (tmp_path / "precious").exists()


def test_an_environment_may_be_a_link_to_a_folder_but_no_file(monkeypatch, tmp_path):
    create = venv.create
    monkeypatch.setattr(peer_environment.venv, "create", lambda folder, **_: create(folder, clear=True))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(UserError, match="No module named pip"):
        make_environment(tmp_path / "link", RECBOLE)
    assert (tmp_path / "folder" / "pyvenv.cfg").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; give another --environment"):
        make_environment(tmp_path / "file", RECBOLE)
