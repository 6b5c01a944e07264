"""Towers in one process: their scores, the features that they take, what they load and refuse, and what they save."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn, optim
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec import LLMGRTower, ModelFactory, Recommender, SessionTower, UserError, build_recommender, export_bundle
from llmgr_rec.baselines.blend import Blend
from llmgr_rec.checksums import file_checksum
from llmgr_rec.config import Config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.modules.param_groups import param_group
from llmgr_rec.storage.bundle import load_weights
from llmgr_rec.storage.bundle_index import read_index
from llmgr_rec.storage.table_io import init_tables
from tests.json_files import edit_json
from tests.small_run import NUM_ITEMS, ONE_RANK, config, prepare_small, small_run
from tests.towers.team_tables import bag_collection, bag_configs, fused_collection, sequence_collection

CPU, META = torch.device("cpu"), torch.device("meta")
# Clicks and shown items of each session: repeats, unknown items (-1), no click, nothing shown.
CLICKS = [[3, 5, 3, 3, 59], [], [7, -1, 0, 1, 2], [-1], [4, 4]]
SHOWN = [[4, 5, 6], [-1], [9, -1, 3], [8], []]


def features(clicks: list[list[int]], shown: list[list[int]]) -> KeyedJaggedTensor:
    rows = [*clicks, *shown]
    values = torch.tensor(list(itertools.chain(*rows)), dtype=torch.int64)
    return KeyedJaggedTensor(["clicks", "items"], values, lengths=torch.tensor([len(row) for row in rows]))


def sbr() -> Path:
    return small_run().run / "export" / "sbr"


def tower_of(stage: str, path: Path | None = None, **options: Any) -> Any:
    kind = SessionTower if stage == "sbr" else LLMGRTower
    return kind.from_bundle(path or small_run().run / "export" / stage, **options).eval()


def bundle_with(
    folder: Path, change: Callable[[Config], None] = lambda _: None, catalog: Catalog | None = None
) -> Path:
    """A bundle of an untrained recommender with other settings."""
    settings, items = config(), catalog or small_run().catalog
    change(settings)
    model = build_recommender(settings, items.num_items, items.num_embeddings)
    init_tables(model, 2, 0.5)
    export_bundle(model, "sbr", settings, items, folder / "export" / "sbr", ONE_RANK)
    return folder / "export" / "sbr"


@torch.no_grad()
@pytest.mark.parametrize("stage", ["sbr", "behave"])
@pytest.mark.parametrize("rule", [{}, {"consecutive_repeats": "merge", "max_length": 2}])
def test_the_score_is_the_one_that_ranks(stage: str, rule: dict[str, Any], tmp_path: Path) -> None:
    bundle = tmp_path / stage
    shutil.copytree(small_run().run / "export" / stage, bundle)
    edit_json(bundle / "bundle.json", lambda content: content.update(rule))
    recommender = Recommender.load(bundle)
    ids = recommender.item_ids
    raw = [[ids[item].as_py() if item >= 0 else "unknown" for item in row] for row in CLICKS]
    ranked = recommender.recommend(raw, k=NUM_ITEMS).to_pylist()
    tower = tower_of(stage, bundle)
    answer = tower(features(CLICKS, SHOWN))
    rows = [(session, item) for session, shown in enumerate(SHOWN) for item in shown]
    assert answer["score"].shape == (len(rows), 1)
    compared = 0
    for (session, item), score in zip(rows, answer["score"].flatten().tolist(), strict=True):
        if item < 0:
            assert score == 0
        elif not ranked[session]["fallback"]:
            scores = dict(zip(ranked[session]["item_ids"], ranked[session]["scores"], strict=True))
            assert score == pytest.approx(scores[ids[item].as_py()], abs=1e-4)
            compared += 1
    assert compared == 5
    dot_C = (answer["session"] * answer["item"]).sum(1)
    torch.testing.assert_close(dot_C, answer["score"].flatten())
    assert {name: answer[name].shape[1] for name in tower.dims} == tower.dims


def test_raw_ids_are_mapped_to_item_indices() -> None:
    tower = tower_of("sbr")
    ids = small_run().catalog.item_ids
    assert tower.index_of([ids[3].as_py(), "unknown", ids[0].as_py()]).tolist() == [3, -1, 0]
    assert tower.num_items == NUM_ITEMS


@torch.no_grad()
@pytest.mark.parametrize("stage", ["sbr", "behave"])
def test_a_session_is_encoded_once_for_all_that_it_shows(stage: str) -> None:
    """And the same rows come out where each shown item names its session, or brings a copy of it."""
    tower = tower_of(stage)
    encoded: list[int] = []
    tower.recommender.encoder.register_forward_hook(lambda _m, inputs, _o: encoded.append(inputs[1].num_sessions))
    shown = [[*range(20)], [], [*range(20, 50)], [1], [2]]
    together = tower(features(CLICKS, shown)).values()
    session_of_item = torch.tensor([session for session, items in enumerate(shown) for _ in items])
    items = KeyedJaggedTensor(
        ["items"], torch.tensor([item for items in shown for item in items]), lengths=torch.ones(52, dtype=torch.int64)
    )
    clicks = features(CLICKS, [[] for _ in CLICKS])
    backwards = KeyedJaggedTensor(["items"], items.values().flip(0), lengths=items.lengths())
    named = tower(clicks, items, session_of_item).values()
    reversed_ = tower(clicks, backwards, session_of_item.flip(0)).values()
    copies = [CLICKS[session] for session in session_of_item]
    apart = tower(features(copies, [[item] for item in items.values().tolist()])).values()
    torch.testing.assert_close(named, together)
    torch.testing.assert_close(reversed_.flip(0), together)
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)
    assert encoded == [5, 5, 5, 52]


@torch.no_grad()
def test_a_data_loader_may_make_the_features() -> None:
    tower, kjt = tower_of("sbr"), features(CLICKS, SHOWN)
    batch = tower.features(kjt).to(CPU)
    torch.testing.assert_close(tower.match(batch).values(), tower(kjt).values())


@torch.no_grad()
def test_prompts_show_the_texts_that_scoring_shows(tmp_path: Path) -> None:
    settings, catalog, factory = config(), small_run().catalog, ModelFactory()
    settings.prompt.text_items = 2
    spec = factory.spec("behave", settings, catalog)
    model = factory.build(spec, factory.language_parts(spec, catalog, CPU), CPU)
    init_tables(model, 1, 0.5)
    bundle = tmp_path / "export" / "behave"
    export_bundle(model, "behave", settings, catalog, bundle, ONE_RANK)
    recommender, tower = Recommender.load(bundle), tower_of("behave", bundle)
    ids = catalog.item_ids
    raw = [[ids[item].as_py() for item in row] for row in ([3, 5, 7], [9])]
    ranked = recommender.recommend(raw, k=NUM_ITEMS).to_pylist()
    scores = [dict(zip(row["item_ids"], row["scores"], strict=True)) for row in ranked]
    found = tower(features([[3, 5, 7], [9]], [[1, 2], [4]]))["score"].flatten().tolist()
    expected = [scores[0][ids[1].as_py()], scores[0][ids[2].as_py()], scores[1][ids[4].as_py()]]
    assert found == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_without_shown_items_there_is_a_row_for_each_session() -> None:
    tower = tower_of("sbr", item_feature=None)
    answer = tower(features(CLICKS, [[] for _ in CLICKS]))
    assert answer.keys() == ["session"]
    assert answer.values().shape == (len(CLICKS), tower.dims["session"])
    whole = tower_of("sbr")(features(CLICKS, [[1] for _ in CLICKS]))
    torch.testing.assert_close(answer["session"], whole["session"])


@torch.no_grad()
@pytest.mark.parametrize("stage", ["sbr", "behave"])
@pytest.mark.parametrize("training", [True, False])
def test_no_session_and_no_item_give_no_row(stage: str, training: bool) -> None:
    tower = tower_of(stage).train(training)
    nothing = KeyedJaggedTensor(["clicks", "items"], torch.tensor([]).long(), lengths=torch.tensor([]).long(), stride=0)
    assert tower(nothing).values().shape == (0, sum(tower.dims.values()))
    assert tower(features([[], [-1]], [[], []])).values().shape[0] == 0


@torch.no_grad()
@pytest.mark.parametrize("collection", [bag_collection, sequence_collection, fused_collection])
@pytest.mark.parametrize("stage", ["sbr", "behave"])
def test_tables_of_another_team_give_the_same_rows(collection: Callable[..., nn.Module], stage: str) -> None:
    trains = ["tables"] if stage == "behave" else None
    given = collection(CPU)
    tower = tower_of(stage, item_tables=given, trains=trains)
    assert tower.item_tables is given
    expected = tower_of(stage)(features(CLICKS, SHOWN)).values()
    torch.testing.assert_close(tower(features(CLICKS, SHOWN)).values(), expected, atol=1e-5, rtol=1e-5)


def single_table(**options: Any) -> EmbeddingBagCollection:
    given = {"name": "t", "feature_names": ["clicks"], "num_embeddings": NUM_ITEMS, "embedding_dim": 16, **options}
    return EmbeddingBagCollection(tables=[EmbeddingBagConfig(**given)], device=CPU)


def optimized() -> nn.Module:
    given = bag_collection(CPU)
    apply_optimizer_in_backward(optim.Adagrad, given.parameters(), {"lr": 0.1})
    return given


def summed_categories() -> nn.Module:
    item, category = bag_configs("t")
    return EmbeddingBagCollection(tables=[item, dataclasses.replace(category, pooling=item.pooling)], device=CPU)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (lambda: nn.EmbeddingBag(NUM_ITEMS, 16), {}, "item_tables is a EmbeddingBag; give an EmbeddingBagCollection"),
        (lambda: single_table(feature_names=["user"]), {}, "has the table t of user, which is not one of the tower's"),
        (single_table, {}, "has no table with the feature category.*rows and 16 columns"),
        (lambda: single_table(num_embeddings=7), {}, "has 7 rows and 16 columns, but item_id of the bundle has 60"),
        (lambda: single_table(feature_names=["clicks", "item_id"]), {}, "looks up items by clicks, item_id"),
        (summed_categories, {}, "set pooling=PoolingType.MEAN"),
        (optimized, {"trains": []}, "bag_item of item_tables has an optimizer, but trains lacks tables"),
        (lambda: fused_collection(CPU), {"trains": ["encoder"]}, "FusedEmbeddingBagCollection, which trains"),
        (lambda: None, {"trains": ["encodr"]}, "trains names encodr, did you mean encoder?"),
    ],
)
def test_tables_and_groups_that_do_not_fit_are_refused(
    given: Callable[[], nn.Module | None], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        SessionTower.from_bundle(sbr(), item_tables=given(), **options)


def test_features_that_do_not_fit_are_refused() -> None:
    tower = tower_of("sbr")
    clicks = features([[1], [2]], [[3], [4]])
    items = KeyedJaggedTensor(["items"], torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1]))
    calls: dict[str, Callable[[], Any]] = {
        "no key clicks; they have items": lambda: tower(items),
        "feature items has item index 60, but the catalog has 60 items": lambda: tower(features([[1]], [[60]])),
        "3 rows of shown items and 2 sessions; give session_of_item": lambda: tower(clicks, items),
        "has shape \\[1\\], but 3 items are shown": lambda: tower(clicks, items, torch.tensor([0])),
        "feature clicks is torch.float32, but must be integers": lambda: tower(
            KeyedJaggedTensor(["clicks", "items"], torch.tensor([]), lengths=torch.tensor([]))
        ),
        "session_of_item is torch.float32": lambda: tower(clicks, items, torch.tensor([0.0, 1.0, 1.0])),
        "item_ids is 7; give a list": lambda: tower.index_of(7),  # type: ignore[arg-type]
        "item_ids: item ids must all be": lambda: tower.index_of([7, "7"]),
        "sessions from 0 to 1": lambda: tower(clicks, items, torch.tensor([0, 1, 2])),
    }
    for message, call in calls.items():
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize("trains", [(), ("lora",), ("adapter", "head"), LLMGRTower.groups])
def test_only_the_named_groups_get_gradients(trains: tuple[str, ...]) -> None:
    tower = tower_of("behave", trains=trains).train()
    answer = tower(features(CLICKS, SHOWN))
    assert answer.values().requires_grad == bool(trains)
    if trains:
        answer.values().square().sum().backward()
    found = {
        param_group(name) for name, part in tower.named_parameters() if part.requires_grad and part.grad is not None
    }
    # The optimizer of a frozen table has taken its gradient.
    assert found == set(trains)
    groups = tower.parameter_groups()
    assert list(groups) == list(LLMGRTower.groups)
    assert all(groups.values())


def test_a_frozen_part_runs_without_dropout() -> None:
    tower = tower_of("sbr", trains=[]).train()
    torch.testing.assert_close(tower(features(CLICKS, SHOWN)).values(), tower(features(CLICKS, SHOWN)).values())
    tower = tower_of("sbr").train()
    assert not torch.equal(tower(features(CLICKS, SHOWN)).values(), tower(features(CLICKS, SHOWN)).values())


def steps_2(settings: Config) -> None:
    settings.encoder.steps = 2


def without_categories(settings: Config) -> None:
    settings.tables.side_features = []


@pytest.mark.parametrize(
    ("change", "settings", "missing", "unexpected"),
    [
        (steps_2, ["encoder.steps is 1 in the tower and 2 in the bundle"], [], []),
        (
            without_categories,
            ["tables.side_features is ['category', 'brand', 'word'] in the tower and [] in the bundle"],
            ["table category"],
            [],
        ),
    ],
)
def test_a_bundle_of_other_settings_is_refused_or_its_differences_are_named(
    change: Callable[[Config], None], settings: list[str], missing: list[str], unexpected: list[str], tmp_path: Path
) -> None:
    other, tower = bundle_with(tmp_path, change), tower_of("sbr")
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    with pytest.raises(UserError, match="does not fit the tower") as refused:
        tower.load(other)
    assert settings[0] in str(refused.value)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    found = tower.load(other, strict=False)
    assert (found.settings, found.vocabularies) == (settings, [])
    assert (found.missing, found.unexpected) == (missing, unexpected)
    backwards = SessionTower.from_bundle(other).load(sbr(), strict=False)
    assert (backwards.missing, backwards.unexpected) == (unexpected, missing)
    assert not any(tower.load(sbr()))


def test_a_bundle_of_another_catalog_is_refused(tmp_path: Path) -> None:
    other = Catalog.load(prepare_small(tmp_path / "other", first_item=NUM_ITEMS).path)
    with pytest.raises(UserError, match="vocabularies: item ids \\(60 items in the tower, 60 in the bundle\\)"):
        tower_of("sbr").load(bundle_with(tmp_path / "items", catalog=other))
    shuffled = small_run().catalog
    shuffled.features["category"].values[:] = shuffled.features["category"].values.flip(0)
    moved = bundle_with(tmp_path / "categories", catalog=shuffled)
    rewrite_categories(moved, shuffled)
    with pytest.raises(UserError, match="vocabularies: category;"):
        tower_of("sbr").load(moved)


def rewrite_categories(bundle: Path, catalog: Catalog) -> None:
    file = bundle / "items.parquet"
    table = pq.read_table(file)
    column = table.column_names.index("category_ids")
    lists = [rows.tolist() for rows in catalog.features["category"].values.split(1)]
    pq.write_table(table.set_column(column, "category_ids", pa.array(lists, table.schema.field(column).type)), file)
    edit_json(
        bundle / "bundle.json",
        lambda content: (
            content["files"].update({"items.parquet": file.stat().st_size}),
            content["checksums"].update({"items.parquet": file_checksum(file)}),
        ),
    )


def test_a_bundle_of_another_model_and_meta_tables_are_refused() -> None:
    behave = small_run().run / "export" / "behave"
    with pytest.raises(UserError, match="bundle of stage behave, which SessionTower does not take; use LLMGRTower"):
        SessionTower.from_bundle(behave)
    with pytest.raises(UserError, match="bundle of stage sbr, which LLMGRTower does not take; use SessionTower"):
        tower_of("behave").load(sbr())
    with torch.device("meta"):
        tower = SessionTower.from_bundle(sbr(), device="meta")
    for call in (lambda: tower.load(sbr()), lambda: tower.initialize(0)):
        with pytest.raises(UserError, match=r"table item_id is on the meta device.*shard the model first"):
            call()
    with pytest.raises(UserError, match="have not been loaded; call its load"):
        tower(features(CLICKS, SHOWN))


def test_load_weights_refuses_what_it_would_leave_random(tmp_path: Path) -> None:
    settings, items = config(), small_run().catalog

    def build(device: str, features: list[str]) -> nn.Module:
        sizes = {name: items.num_embeddings[name] for name in features}
        return build_recommender(settings, items.num_items, sizes, device)

    two = nn.ModuleDict({"first": build("cpu", ["category"]), "second": build("cpu", ["category"])})
    cases: dict[str, nn.Module] = {
        "contains 2 recommenders \\(first, second\\); give one of them": two,
        "is on the meta device": build("meta", ["category"]),
        "has the table category, which the model lacks": build("cpu", []),
    }
    for message, model in cases.items():
        with pytest.raises(UserError, match=message):
            load_weights(model, sbr())
    assert load_weights(two["first"], sbr()) == []


def ranking(path: Path) -> list[Any]:
    ids = small_run().catalog.item_ids
    raw = [[ids[item].as_py() for item in row if item >= 0] for row in CLICKS]
    return Recommender.load(path).recommend(raw, k=10).to_pylist()


def test_a_saved_tower_ranks_as_the_bundle_it_came_from_with_blend_and_rules(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(sbr(), run / "export" / "sbr")
    model = tower_of("sbr").model
    values = sparse.random_array((NUM_ITEMS, NUM_ITEMS), density=0.2, rng=np.random.default_rng(0), dtype=np.float32)
    blend = Blend({"item_knn": 1.0}, sparse.csr_array(values * 100), 0.8)
    index = dataclasses.replace(
        read_index(sbr()), repeats="exclude", max_length=3, consecutive_repeats="merge", sessions_hash="trained"
    )
    export_bundle(model, "sbr", config(), small_run().catalog, tmp_path / "a/export/sbr", ONE_RANK, index, blend)
    tower = tower_of("sbr", tmp_path / "a")
    tower.save(tmp_path / "b")
    saved = read_index(tmp_path / "b/export/sbr")
    assert (saved.repeats, saved.max_length, saved.consecutive_repeats) == ("exclude", 3, "merge")
    assert saved.sessions_hash == "trained"
    assert ranking(tmp_path / "b") == ranking(tmp_path / "a") != ranking(sbr())
    assert json.loads((tmp_path / "b/export/sbr/bundle.json").read_text())["stage"] == "sbr"
    with pytest.raises(UserError, match="already contains an exported model"):
        tower.save(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match="is gone, from which the tower was made"):
        tower.save(tmp_path / "c")


def test_a_state_dict_of_the_model_around_it_counts_as_loaded() -> None:
    tower, fresh = tower_of("sbr"), SessionTower.from_bundle(sbr(), device="meta")
    fresh.to_empty(device="cpu")
    around, source = nn.ModuleDict({"tower": fresh}), nn.ModuleDict({"tower": tower})
    buffers: dict[str, Tensor] = dict(tower.features.named_buffers())
    for name, buffer in fresh.features.named_buffers():
        buffer.copy_(buffers[name])
    around.load_state_dict(source.state_dict())
    fresh.eval()
    torch.testing.assert_close(fresh(features(CLICKS, SHOWN)).values(), tower(features(CLICKS, SHOWN)).values())
