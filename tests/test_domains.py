"""Several domains in one data set and one model: ids, lists of the session's domain, results by domain."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llmgr_rec import Recommender
from llmgr_rec.arrow_input import to_table
from llmgr_rec.baselines.builders import build_baseline
from llmgr_rec.baselines.in_domains import in_domains
from llmgr_rec.baselines.knn import Baseline
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.domain_balance import DomainBalance
from llmgr_rec.data.domains import ItemDomains
from llmgr_rec.data.extended_items import join_domains, write_extended_items
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.preparation.summary import summary_lines
from llmgr_rec.data.reader import SamplingOrder, SessionReader
from llmgr_rec.data.schema import SPLITS
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.evaluate_run import EvaluationRequest, evaluate_run
from llmgr_rec.evaluation.html import by_domain
from llmgr_rec.evaluation.metrics import target_ranks
from llmgr_rec.evaluation.protocol import ranked_lists, split_reader
from llmgr_rec.evaluation.results import format_domains
from llmgr_rec.experiments.compare import ndcg
from llmgr_rec.experiments.experiment import load_experiment
from llmgr_rec.experiments.trial import TrialRunner
from llmgr_rec.extend import main as extend
from llmgr_rec.fit_input import FitInput
from llmgr_rec.scoring.score_checks import ScoreRequest
from llmgr_rec.scoring.score_run import score_run
from llmgr_rec.serving.side_by_side import baseline_lists
from llmgr_rec.storage.bundle import load_bundle, open_bundle
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import init_tables
from tests.data.files import write_parts
from tests.small_run import NUM_ITEMS, ONE_RANK, config, prepare_small, write_log

DOMAINS = ("paper", "film")
_CLICKS = pa.table({"user_id": ["u"], "item_id": ["i1"], "timestamp": [1]})


@cache
def _folder() -> Path:
    folder = TemporaryDirectory(prefix="llmgr-domains-")
    _folders.append(folder)
    return Path(folder.name)


_folders: list[TemporaryDirectory[str]] = []


@pytest.fixture(scope="module", autouse=True)
def clean_up() -> object:
    yield
    for folder in _folders:
        folder.cleanup()


def settings_of(folder: Path, output: Path, **others: object) -> PrepareSettings:
    """Settings for two logs whose users and items have the same ids."""
    logs = [write_log(folder / name, seed) for seed, name in enumerate(DOMAINS)]
    clicks, items = (
        ",".join(f"{name}={paths[place]}" for name, paths in zip(DOMAINS, logs, strict=True)) for place in (0, 1)
    )
    options = {"interactions": clicks, "items": items, "min_interactions": 0, "threads": 1, **others}
    return PrepareSettings(output=str(output), **options)  # type: ignore[arg-type]


@cache
def dataset() -> Dataset:
    prepare_dataset(settings_of(_folder() / "raw", _folder() / "dataset"))
    return Dataset(_folder() / "dataset")


@cache
def run() -> Path:
    """A run of the data set with an untrained model and no blend."""
    catalog, settings, factory = Catalog.of(dataset()), config(), ModelFactory()
    model = factory.build(factory.spec("sbr", settings, catalog), None, "cpu")
    init_tables(model, 1, 0.5)
    bundle = _folder() / "run" / "export" / "sbr"
    bundle.parent.mkdir(parents=True)
    export_bundle(model, "sbr", settings, catalog, bundle, ONE_RANK, dataset().manifest)
    return _folder() / "run"


def rows_of(of: Dataset, split: str) -> dict[str, tuple[list[str], str]]:
    """Item ids of the clicks and the target of each session."""
    ids = Catalog.of(of).item_ids.to_pylist()
    table = pa.concat_tables(map(pq.read_table, of.parts(split))).to_pylist()
    return {row["session_id"]: ([ids[item] for item in row["items"]], ids[row["target"]]) for row in table}


def test_equal_ids_of_different_domains_do_not_collide(tmp_path: Path) -> None:
    catalog = Catalog.of(dataset())
    assert catalog.domains is not None
    assert catalog.domains.names == DOMAINS
    names = pq.read_table(dataset().items_path, columns=["domain"])["domain"].to_pylist()
    assert names == [item.split(":")[0] for item in catalog.item_ids.to_pylist()]
    assert dataset().manifest.domains == {name: {"items": names.count(name), "sessions": 90} for name in DOMAINS}
    alone = {name: prepare_small(tmp_path / name, seed) for seed, name in enumerate(DOMAINS)}
    for split in SPLITS:
        expected = {
            f"{name}:{session}": ([f"{name}:{item}" for item in items], f"{name}:{target}")
            for name, one in alone.items()
            for session, (items, target) in rows_of(one, split).items()
        }
        assert rows_of(dataset(), split) == expected


def test_a_domain_without_sessions_is_counted(tmp_path: Path) -> None:
    pq.write_table(_CLICKS, tmp_path / "one.parquet")
    pq.write_table(_CLICKS.slice(1), tmp_path / "none.parquet")
    settings = settings_of(tmp_path, tmp_path / "dataset", items=None)
    more = f"{settings.interactions},one={tmp_path}/one.parquet,none={tmp_path}/none.parquet"
    manifest = prepare_dataset(replace(settings, interactions=more, min_interactions=2))
    assert list(manifest.domains) == [*DOMAINS, "one", "none"]
    assert manifest.domains["one"] == manifest.domains["none"] == {"items": 0, "sessions": 0}
    assert "; one 0 items, 0 sessions; none 0 items, 0 sessions" in summary_lines(manifest)[1]


def test_one_log_has_no_domains() -> None:
    one = prepare_small(_folder() / "one")
    assert Catalog.of(one).domains is None
    assert "domain" not in pq.read_schema(one.items_path).names
    assert "domain" not in (one.path / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"items": "papers=F"}, "--items names the domain papers, which --interactions does not, did you mean paper?"),
        ({"items": "items.parquet"}, "--interactions names domains, but --items does not"),
        ({"interactions": "a=F,a=G", "items": None}, "--interactions names the domain a twice"),
        ({"interactions": "a b=F", "items": None}, "the domain 'a b' is not made of letters"),
        ({"interactions": "a:b=F,c=G", "items": None}, "the domain 'a:b' is not made of letters"),
        ({"interactions": "a=F,b:c=G", "items": None}, "the domain 'b:c' is not made of letters"),
        ({"interactions": "all=F", "items": None}, "the domain all would be"),
        ({"interactions": "a=,b=G", "items": None}, "--interactions, domain a: ''; give the path"),
    ],
)
def test_wrong_names_are_refused_before_a_file_is_read(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        prepare_dataset(settings_of(tmp_path, tmp_path / "out", **changed))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_path_with_an_equals_sign_is_no_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interactions, _ = write_log(tmp_path / "dt=1")
    monkeypatch.chdir(tmp_path)
    manifest = prepare_dataset(PrepareSettings("out", f"dt=1/{interactions.name}", min_interactions=0, threads=1))
    assert not manifest.domains


def expected_lists(k: int, within: bool) -> torch.Tensor:
    """The K best items of each test session by a sort of all scores."""
    ranking = load_bundle(run() / "export" / "sbr").ranking()
    domains = Catalog.of(dataset()).domains
    assert domains is not None
    items = ranking.ranker(ONE_RANK).item_vectors
    lists = []
    for batch in split_reader(dataset(), "test", 32, ranking.collate).batches(0):
        with torch.no_grad():
            scores = ranking.queries(batch) @ items.T
        if within:
            scores[domains.of_item_V[batch.targets_B][:, None] != domains.of_item_V] = -torch.inf
        lists.append(scores.argsort(dim=1, descending=True, stable=True)[:, :k])
    return torch.cat(lists)


def test_a_session_gets_items_of_its_domain() -> None:
    ranking = load_bundle(run() / "export" / "sbr").ranking()
    lists = [ids_BK for ids_BK, _, _ in ranked_lists(ranking, dataset(), "test", ONE_RANK, depth=7)]
    assert torch.equal(torch.cat(lists), expected_lists(7, within=True))
    rule = ranking_rule_of_all()
    lists = [ids_BK for ids_BK, _, _ in ranked_lists(ranking, dataset(), "test", ONE_RANK, rule, depth=7)]
    assert torch.equal(torch.cat(lists), expected_lists(7, within=False))


def ranking_rule_of_all() -> object:
    from llmgr_rec.evaluation.exclusion import ranking_rule

    return ranking_rule(dataset().manifest, domains="all")


def test_results_are_by_domain_and_together(tmp_path: Path) -> None:
    names = ["popularity", "item_knn", "sbr"]
    found = {}
    for domains in ("own", "all"):
        output = tmp_path / f"{domains}.json"
        evaluate_run(EvaluationRequest(run(), dataset().path, "test", output, names, domains=domains))  # type: ignore[arg-type]
        found[domains] = json.loads(output.read_text())
    assert (found["own"]["protocol"].split(",")[0], found["own"]["domains"]) == ("items of the session's domain", "own")
    assert (found["all"]["protocol"].split(",")[0], found["all"]["domains"]) == ("full catalog", "all")
    targets = torch.cat([raw.targets_B for raw in split_reader(dataset(), "test", 32, lambda raw: raw).batches(0)])
    domains_V = Catalog.of(dataset()).domains
    assert domains_V is not None
    for domains, content in found.items():
        ranks = target_ranks(expected_lists(20, domains == "own"), targets, 20)
        for place, name in enumerate(DOMAINS):
            of_domain = ranks[domains_V.of_item_V[targets] == place]
            result = content["test"]["sbr"]["by_domain"][name]
            assert result["count"] == len(of_domain) == 90
            assert result["hr@20"] == pytest.approx(float((of_domain < 20).float().mean()))
            low, high = result["intervals"]["ndcg@20"]
            assert low <= result["ndcg@20"] <= high
        for model in names:
            parts = content["test"][model]["by_domain"].values()
            mean = sum(part["ndcg@20"] * part["count"] for part in parts) / content["count"]
            assert content["test"][model]["ndcg@20"] == pytest.approx(mean)
    (table,) = format_domains(found["own"]["test"])[:1]
    assert table.startswith("paper, 90 sessions\n")
    shown = by_domain([Row(model, found["own"]["test"][model]) for model in names])  # type: ignore[list-item]
    value = found["own"]["test"]["sbr"]["by_domain"]["film"]
    assert f"<td>{value['ndcg@20']:.4f} ({value['intervals']['ndcg@20'][0]:.3f}&nbsp;.. " in shown
    assert by_domain([Row("sbr", {})]) == ""  # type: ignore[list-item]
    own, of_all = (content["test"]["popularity"]["by_domain"] for content in found.values())
    assert all(own[name]["hr@20"] > of_all[name]["hr@20"] for name in DOMAINS)


class Row(NamedTuple):
    """What the table by domain needs of a row of the report."""

    label: str
    metrics: dict[str, Any]


class Whole:
    """A baseline that has only `rank`."""

    def __init__(self, baseline: Baseline) -> None:
        self._baseline = baseline

    def rank(self, items_L: np.ndarray, offsets_B1: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self._baseline.rank(items_L, offsets_B1, k)


@pytest.mark.parametrize("name", ["popularity", "item_knn", "session_knn", "text_knn"])
def test_baselines_rank_the_items_of_a_domain_as_in_their_whole_lists(name: str) -> None:
    catalog = Catalog.of(dataset())
    baseline = build_baseline(name, dataset(), catalog)
    # The last session has clicks of both domains, the one before it none.
    clicks = np.array([0, 5, 70, 3, 65]), np.array([0, 2, 3, 3, 5])
    found, scores = in_domains(baseline, catalog.domains).rank(*clicks, 6)
    expected, expected_scores = in_domains(Whole(baseline), catalog.domains).rank(*clicks, 6)
    assert found.tolist() == expected.tolist()
    assert scores == pytest.approx(expected_scores)
    assert [set((row // NUM_ITEMS).tolist()) for row in found[[0, 1, 3]]] == [{0}, {1}, {1}]
    assert in_domains(baseline, None) is baseline


def test_scores_and_recommendations_are_of_the_domain(tmp_path: Path) -> None:
    rec = Recommender.load(run())
    sessions = [["film:i3", "film:i5"], ["paper:i1"], ["film:i3", "paper:i2"], ["film:new"], ["cloth:i1"]]
    lists = rec.recommend(sessions, k=5)["item_ids"].to_pylist()
    assert [{item.split(":")[0] for item in row} for row in lists] == [
        {"film"},
        {"paper"},
        {"paper"},
        {"film"},
        {item.split(":")[0] for item in rec.recommend([[]], k=5)["item_ids"].to_pylist()[0]},
    ]
    (popularity,) = baseline_lists(open_bundle(run()))
    assert [popularity.recommend(session, 5)["item_ids"] for session in sessions[3:]] == lists[3:]
    pq.write_table(pa.table({"session_id": list("abcde"), "items": sessions}), tmp_path / "sessions.parquet")
    request = {"run": run(), "input": tmp_path / "sessions.parquet", "k": 5, "threads": 1}
    score_run(ScoreRequest(output=tmp_path / "own", **request))  # type: ignore[arg-type]
    score_run(ScoreRequest(output=tmp_path / "all", domains="all", **request))  # type: ignore[arg-type]
    scored = pq.read_table(tmp_path / "own")
    assert scored["item_ids"].to_pylist() == lists
    assert scored["scores"].to_pylist()[3] == rec.recommend(sessions, k=5)["scores"].to_pylist()[3]
    of_all = rec.recommend(sessions, k=5, domain="all")["item_ids"].to_pylist()
    assert pq.read_table(tmp_path / "all")["item_ids"].to_pylist() == of_all != lists
    films = rec.recommend(sessions, k=5, domain="film", without=["film:i7"])["item_ids"].to_pylist()
    assert {item.split(":")[0] for row in films for item in row} == {"film"}
    some = rec.recommend(sessions[:2], k=5, among=["film:i7", "paper:i9"])["item_ids"].to_pylist()
    assert some == [["film:i7"], ["paper:i9"]]
    with pytest.raises(UserError, match="there is no domain 'films', did you mean film"):
        rec.recommend(sessions, domain="films")
    for session, row in zip(sessions, lists, strict=True):
        explained = rec.explain(session, k=3).to_dict()
        assert [(item["item_id"], item["rank"]) for item in explained["items"]] == list(
            zip(row[:3], (1, 2, 3), strict=True)
        )


def rows_read(reader: SessionReader[RawSessions], epoch: int, step: int = 0) -> list[list[int]]:
    return [raw.rows_B.tolist() for raw in reader.batches(epoch, step)]


@pytest.mark.parametrize("passes", [0, 3])
def test_balanced_epochs_have_each_domain_as_often_as_wanted_and_resume(tmp_path: Path, passes: int) -> None:
    # Ten times as many sessions of the first domain.
    sessions = [([row % 4, 1, 2], 3) for row in range(400)] + [([5, 6, 7], 4) for _ in range(40)]
    rng = np.random.default_rng(0)
    parts = write_parts(tmp_path, [sessions[row] for row in rng.permutation(len(sessions))], [250], 64)
    domains = ItemDomains(("a", "b"), torch.tensor([0] * 4 + [1] * 4, dtype=torch.int16))
    order = SamplingOrder(50, shuffle=True, augment_prefixes=True, max_prefixes_per_pass=passes, whole_rows=False)

    def reader(power: float | None) -> SessionReader[RawSessions]:
        balance = None if power is None else DomainBalance(domains, power)
        return SessionReader(parts, num_items=8, collate=lambda raw: raw, order=order, balance=balance)

    shares = {}
    for power in (1.0, 0.5, 0.0):
        read = rows_read(reader(power), epoch=1)
        assert sum(map(len, read)) == 3 * len(sessions)
        batches = list(reader(power).batches(1))
        of_b = [(raw.items_L[raw.offsets_B1[:-1]] >= 4).float().mean() for raw in batches]
        shares[power] = float(torch.stack(of_b).mean())
        # Exactly the same rows after a resume, and others in the next epoch.
        before = reader(power)
        stream = before.batches(1)
        next(stream), next(stream)
        state = json.loads(json.dumps(before.state_dict()))
        after = reader(power)
        after.load_state_dict(state)
        assert rows_read(after, after.epoch, after.step) == read[2:] != rows_read(reader(power), 2)[2:]
        with pytest.raises(UserError, match="domain_power was"):
            reader(None).load_state_dict(state)
    weights = {power: 10**power for power in shares}
    assert shares == {power: pytest.approx(1 / (1 + weight), abs=0.03) for power, weight in weights.items()}
    once = [row for batch in rows_read(reader(1.0), 0) for row in batch]
    assert len(set(once)) == len(once)


def test_baselines_of_experiments_rank_within_domains(tmp_path: Path) -> None:
    file = tmp_path / "popularity.yaml"
    file.write_text("variants: {popularity: {model: popularity}}\n")
    experiment = load_experiment(str(file))
    trial = TrialRunner(tmp_path, dataset(), "test").trial(experiment, experiment.variants[0], 0)
    found = evaluate_run(EvaluationRequest(run(), dataset().path, "test", tmp_path / "metrics.json", ["popularity"]))
    assert ndcg(trial.target_ranks_S).mean() == pytest.approx(found["test"]["popularity"]["ndcg@20"], abs=1e-9)


def test_python_takes_tables_by_domain(tmp_path: Path) -> None:
    clicks, items = write_log(tmp_path)
    table = pq.read_table(clicks)
    data = FitInput({"paper": table, "film": clicks}, {"film": items}, tmp_path)
    assert data.options == {
        "interactions": f"paper={tmp_path}/interactions-0.parquet,film={clicks}",
        "items": f"film={items}",
    }
    assert data.in_terms_of_caller(f"{tmp_path}/interactions-0.parquet, row group 0, row 3") == (
        "interactions of paper, row 3"
    )
    assert FitInput(table.to_pydict(), None, tmp_path).options == {"interactions": f"{tmp_path}/interactions.parquet"}
    assert FitInput({"a": table, "b": table}, {"a": items, "b": None}, tmp_path).options["items"] == f"a={items}"
    assert "items" not in FitInput({"a": table}, {"a": None}, tmp_path).options


@pytest.mark.parametrize(
    ("interactions", "items", "message"),
    [
        ({"a": _CLICKS, "b": [["i1", "i2"]]}, None, "domain b are sessions, those of a are clicks with times"),
        ({"a": _CLICKS, "b": None}, None, "interactions of b is NoneType; give"),
        ({"a": _CLICKS, "b": {"item_id": ["i1"]}}, None, "interactions of b need the columns user_id"),
        ({"user_id": [1], "timestamp": [2]}, None, "interactions need the columns user_id .* they have user_id, times"),
        ({"a": _CLICKS}, _CLICKS, "interactions are tables by domain, but items are one table"),
        (_CLICKS, {"a": _CLICKS}, "items are tables by domain, but interactions are one table"),
    ],
)
def test_python_says_which_table_of_a_domain_is_wrong(
    tmp_path: Path, interactions: object, items: object, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        FitInput(interactions, items, tmp_path)


def test_a_catalog_is_extended_by_a_domain(tmp_path: Path) -> None:
    known = Catalog.of(dataset())
    ids = ["film:i3", "cloth:i3", "film:i99"]
    extended = write_extended_items(known, pa.table({"item_id": ids}), "items", tmp_path)
    assert extended.domains == ItemDomains(("film", "cloth"), extended.domains.of_item_V)
    assert extended.domains.of_item_V.tolist() == [0, 1, 0]
    for wrong, message in (("i3", "has no domain; write it as paper:i3"), ("films:i3", "films:, did you mean film?")):
        with pytest.raises(UserError) as caught:
            write_extended_items(known, pa.table({"item_id": [wrong]}), "items", tmp_path)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="items has a Table for film, but must be one table; with several domains"):
        to_table({"film": pa.table({"item_id": ids})}, "items")


def test_extend_takes_the_items_of_each_domain(tmp_path: Path) -> None:
    tables = {
        "film": {"item_id": ["i3", "i99"], "title": ["a", "b"]},
        "cloth": {"item_id": [3.0, 7.0], "brand": ["c", None]},
    }
    for name, table in tables.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    named = ",".join(f"{name}={tmp_path / name}.parquet" for name in tables)
    extend(["--run", str(run()), "--items", named, "--output", str(tmp_path / "named")])
    full = {"item_id": ["film:i3", "film:i99", "cloth:3", "cloth:7"], "title": ["a", "b", None, None]}
    full["brand"] = [None, None, "c", None]
    Recommender.load(run()).extend(full, output=tmp_path / "full")
    Recommender.load(run()).extend(
        {name: pa.table(table) for name, table in tables.items()}, output=tmp_path / "python"
    )
    items = [pq.read_table(tmp_path / name / "export/sbr/items.parquet") for name in ("named", "full", "python")]
    assert items[0]["item_id"].to_pylist() == full["item_id"]
    assert items[0] == items[1] == items[2]
    for wrong, message in (
        (
            f"film={tmp_path}/film.parquet,cloth={tmp_path}/none.parquet",
            "--items, domain cloth: .*none.parquet does not ex",
        ),
        (f"{tmp_path}/none.parquet", "--items: .*none.parquet does not exist; give a Parquet file, or a folder"),
    ):
        with pytest.raises(UserError, match=message):
            extend(["--run", str(run()), "--items", wrong, "--output", str(tmp_path / "wrong")])
    with pytest.raises(UserError, match="names domains, but the run was trained on one log without a name; give its"):
        join_domains({"film": pa.table(tables["film"])}, None, "--items")
    with pytest.raises(UserError, match="--items, domain film has no column item_id"):
        join_domains({"film": pa.table({"id": ["a"]})}, ItemDomains(("film",), torch.zeros(1)), "--items")


def test_the_domain_of_a_session_is_that_of_its_newest_click() -> None:
    domains = ItemDomains(("a", "b"), torch.tensor([0, 0, 1], dtype=torch.int16))
    clicks = Jagged(torch.tensor([0, 2, 2, 1]), torch.tensor([0, 2, 2, 4]))
    assert domains.of_sessions(clicks).tolist() == [1, -1, 0]
    assert domains.of_sessions(Jagged.empty(2)).tolist() == [-1, -1]
