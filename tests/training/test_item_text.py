"""Stages of a run whose item vectors read text: on one rank and on two, resumed, and from the bundle alone."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from llmgr_rec.config import Config
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.pretrained import load_decoder
from llmgr_rec.distributed import bundle as bundles
from llmgr_rec.distributed.assembly import assemble_recommender, item_tokens, make_collator
from llmgr_rec.distributed.bundle import load_bundle
from llmgr_rec.distributed.bundle_export import dense_tensors
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.sharding import shard
from llmgr_rec.distributed.shards import init_tables, local_shards
from llmgr_rec.evaluation.protocol import evaluate_model, split_reader
from llmgr_rec.modules.language_model import encode_item_texts
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.tasks import SbrTask
from llmgr_rec.modules.whitening import whiten_encodings
from llmgr_rec.scoring.run import ScoreRequest, score_run
from tests.ranks import run_on_ranks
from tests.training.exported import Exported
from tests.training.small_training import numbers, prepare, records, small_config, train
from tests.training.test_stages import Watched, moved

pytestmark = pytest.mark.dist

SHARDINGS = ("table_wise", "column_wise")
PROJECTION = "item_text.text_projection.weight"
STAGES = ("sbr", "align", "behave")


def whole(folder: Path) -> Config:
    """The whole catalogue is scored; texts are read by more layers than prompts."""
    config = small_config(folder / "prompts.yaml")
    config.tables = replace(config.tables, item_text=True, id_dropout=0.3)
    config.llm.text_layer = 2
    config.llm.text_whitening = True
    # As many as tell all items apart.
    config.prompt.max_text_tokens = 24
    # Whole batches, so that each rank's part is whole contrastive groups.
    config.align.max_steps = config.behave.max_steps = 3
    config.runtime.checkpoint_every, config.runtime.keep_checkpoints = 2, 10
    return config


def sampled(folder: Path) -> Config:
    """A sample is scored, so that no stage caches the catalogue, and stage 2 trains what it can."""
    config = whole(folder)
    config.loss = replace(config.loss, full_softmax_max_items=10, sampled_items=40)
    config.tables.id_dropout = 0.0
    config.behave.trainable = ["tables", "encoder", "adapter", "lora", "head"]
    return config


CASES = {"whole": whole, "sampled": sampled}


def train_case(world: World, folder: str, case: str, shardings: tuple[str, ...]) -> Watched:
    watched = Watched()
    watched.start()
    for sharding in shardings:
        config = CASES[case](Path(folder))
        config.tables.sharding = sharding  # type: ignore[assignment]
        watched.case = sharding
        run = Path(folder, f"{case}-{world.size}-{sharding}")
        if world.rank == 0:
            run.mkdir()
        train(world, config, run, Path(folder, "dataset"))
    return watched


def resume_case(world: World, folder: str, run: str) -> None:
    config = whole(Path(folder))
    config.align.epochs = config.behave.epochs = 0
    train(world, config, Path(run), Path(folder, "dataset"), resume=True)


def evaluate_case(world: World, folder: str, run: str) -> list[float]:
    found = []
    for stage in STAGES:
        bundle = load_bundle(Path(run, "export", stage), world)
        metrics = evaluate_model(bundle.model, Dataset(Path(folder, "dataset")), "valid", bundle.config, world)
        found.append(metrics["ndcg@20"])
    return found


@dataclass
class Trained:
    folder: Path
    watched: list[Watched]

    def run(self, case: str = "whole", size: int = 1, sharding: str = "column_wise") -> Path:
        return self.folder / f"{case}-{size}-{sharding}"

    def exported(self, stage: str, **which: str | int) -> Exported:
        return Exported.read(self.run(**which) / "export" / stage)  # type: ignore[arg-type]

    @property
    def dataset(self) -> Dataset:
        return Dataset(self.folder / "dataset")

    @property
    def unseen_V(self) -> torch.Tensor:
        return Catalogue.load(self.dataset.path).train_count_V == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("item-text")
    prepare(folder, sessions=150, items=200, mean_length=4)
    small_config(folder / "prompts.yaml")
    watched = run_on_ranks(train_case, 1, str(folder), "whole", ("column_wise",))
    watched += run_on_ranks(train_case, 2, str(folder), "whole", SHARDINGS)
    watched += run_on_ranks(train_case, 1, str(folder), "sampled", ("column_wise",))
    trained = Trained(folder, watched)
    assert 5 < trained.unseen_V.sum() < len(trained.unseen_V) / 2
    return trained


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_ranks_compute_what_one_does(trained: Trained, sharding: str) -> None:
    one, two = numbers(trained.run()), numbers(trained.run(size=2, sharding=sharding))
    assert one.keys() == two.keys()
    assert {name.split("/")[0] for name in one} == set(STAGES)
    worst = max(one, key=lambda name: abs(one[name] - two[name]))
    assert two[worst] == pytest.approx(one[worst], abs=1e-5), worst


def test_both_lookups_are_pipelined(trained: Trained) -> None:
    for watched in trained.watched:
        for counts in watched.pipelined.values():
            # Stages sbr, align and behave, an epoch each; their catalogue may be cached, but nodes are looked up.
            assert counts == [2, 2, 2]


@pytest.mark.parametrize(
    ("case", "size", "sharding"),
    [
        ("whole", 1, "column_wise"),
        ("whole", 2, "table_wise"),
        ("whole", 2, "column_wise"),
        ("sampled", 1, "column_wise"),
    ],
)
def test_the_text_table_holds_the_encodings_and_never_moves(
    trained: Trained, case: str, size: int, sharding: str
) -> None:
    config, catalogue = CASES[case](trained.folder), Catalogue.load(trained.dataset.path)
    decoder = load_decoder("random-tiny", config.llm.text_layer, "float32")
    expected = whiten_encodings(encode_item_texts(decoder, item_tokens(config, catalogue), 8))
    sbr, align, behave = (trained.exported(stage, case=case, size=size, sharding=sharding) for stage in STAGES)
    torch.testing.assert_close(sbr.tables["item_text"], expected, atol=1e-5, rtol=1e-5)
    for later in (align, behave):
        assert torch.equal(sbr.tables["item_text"], later.tables["item_text"])
    run = trained.run(case, size, sharding)
    assert len(list((run / "item_text").iterdir())) == 1, "texts are encoded once for a run"
    for piece in (run / "export/sbr/tables").glob("item_text-*"):
        assert piece.stat().st_ino == (run / "export/behave/tables" / piece.name).stat().st_ino


@pytest.mark.parametrize("case", CASES)
def test_the_projection_trains_with_the_encoder(trained: Trained, case: str) -> None:
    config, catalogue = CASES[case](trained.folder), Catalogue.load(trained.dataset.path)
    start = dense_tensors(assemble_recommender(config, catalogue, text_width=64))
    sbr, align, behave = (trained.exported(stage, case=case) for stage in STAGES)
    assert moved(start, sbr.recommender) == set(start)
    assert PROJECTION in start
    assert moved(sbr.recommender, align.recommender) == set()
    assert moved(align.recommender, behave.recommender) == (set(start) if case == "sampled" else set())


@pytest.mark.parametrize(("case", "size"), [("whole", 1), ("whole", 2), ("sampled", 1)])
def test_id_rows_of_items_without_clicks_say_nothing(trained: Trained, case: str, size: int) -> None:
    for stage in STAGES:
        rows_VD = trained.exported(stage, case=case, size=size).tables["item_id"]
        assert torch.equal(rows_VD.abs().sum(1) == 0, trained.unseen_V)
    if case == "sampled":
        sbr, behave = (trained.exported(stage, case=case).tables["item_id"] for stage in ("sbr", "behave"))
        assert not torch.equal(sbr, behave), "stage 2 was to train the tables"


def test_a_resumed_stage_computes_what_an_uninterrupted_one_does(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run(), run)
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "checkpoints/sbr/best")
    steps = run / "checkpoints/sbr/steps"
    assert len(list(steps.iterdir())) > 2
    for checkpoint in steps.iterdir():
        if checkpoint.name > "step-00000002":
            shutil.rmtree(checkpoint)
    run_on_ranks(resume_case, 1, str(trained.folder), str(run))
    found, expected = records(run), records(trained.run())
    in_sbr = [key for key in expected if key[0] == "sbr"]
    assert [key for key in found if key[0] == "sbr"] == in_sbr
    for key in in_sbr:
        assert found[key] == expected[key], key
    again, first = Exported.read(run / "export/sbr"), trained.exported("sbr")
    assert moved(again.tables, first.tables) == moved(again.recommender, first.recommender) == set()


def test_the_bundle_of_sbr_needs_no_language_model(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("assemble_decoder", "decoder_hash"):
        monkeypatch.setattr(bundles, name, lambda *_: pytest.fail("asked for the language model"))
    monkeypatch.setattr("llmgr_rec.distributed.assembly.load_decoder", lambda *_: pytest.fail("loaded it"))
    bundle = load_bundle(trained.run() / "export/sbr")
    assert isinstance(bundle.model, SessionRecommender)
    one = World.alone()
    metrics = evaluate_model(bundle.model, trained.dataset, "valid", bundle.config, one)
    ((_, validated),) = [(key, value) for key, value in records(trained.run()).items() if key[::2] == ("sbr", "valid")]
    assert metrics["ndcg@20"] == pytest.approx(validated["ndcg@20"], abs=1e-6)
    totals = score_run(ScoreRequest(trained.run(), trained.dataset.path / "test", tmp_path / "scores", stage="sbr"))
    assert totals.rows_out == trained.dataset.manifest.num_sessions["test"]


def train_all_tables(world: World, folder: str) -> bool:
    """Trains a recommender as a part of another's model, who lets every table train; whether its texts moved."""
    config, catalogue = whole(Path(folder)), Catalogue.load(Path(folder, "dataset"))
    task = SbrTask(assemble_recommender(config, catalogue, "meta", text_width=64), world.size)
    model = shard(task, config.tables, world, lambda table: True)
    init_tables(model, 0, 0.1)
    before = {piece.table: piece.tensor.clone() for piece in local_shards(model)}
    reader = split_reader(Dataset(Path(folder, "dataset")), "train", 32, make_collator(config, catalogue, "sbr", False))
    loss, _ = model(reader.collated(0, 0))
    loss.backward()
    after = {piece.table: piece.tensor for piece in local_shards(model)}
    return moved(before, after) == {"item_id", "category", "brand", "word"}


def test_texts_stay_as_they_are_though_every_table_may_train(trained: Trained) -> None:
    assert run_on_ranks(train_all_tables, 1, str(trained.folder)) == [True]


@torch.no_grad()
def test_items_without_clicks_are_ranked_by_their_text(trained: Trained) -> None:
    bundle = load_bundle(trained.run() / "export/sbr")
    model, collate = bundle.model, make_collator(bundle.config, bundle.catalogue, "rank", language=False)
    assert isinstance(model, SessionRecommender)
    assert model.item_text is not None
    features = collate.item_features(torch.arange(collate.num_items))
    unseen = trained.unseen_V.nonzero().flatten()
    before = model.item_vectors(features)
    assert len({tuple(vector) for vector in before[unseen].tolist()}) == len(unseen)
    table = model.item_text.text_tables.embedding_bags["item_text"].weight
    table[unseen[0]] = table[unseen[1]] + 1
    changed_V = (model.item_vectors(features) != before).any(1)
    assert changed_V.nonzero().flatten().tolist() == [int(unseen[0])]


def test_sharded_bundles_of_all_stages_rank_as_on_one_rank(trained: Trained) -> None:
    run = str(trained.run(size=2))
    (one,) = run_on_ranks(evaluate_case, 1, str(trained.folder), run)
    for other in run_on_ranks(evaluate_case, 2, str(trained.folder), run):
        assert other == pytest.approx(one, abs=1e-6)
