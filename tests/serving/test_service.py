"""The service answers as `Recommender` does, whatever is ranked together, and says what is wrong in one line."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from llmgr_rec import Recommender
from llmgr_rec.serving import app, request_batching, request_guard
from llmgr_rec.serving.app import Service, ServiceSettings, as_text, make_app
from llmgr_rec.serving.request_guard import LOOPBACK_NAMES
from llmgr_rec.serving.request_types import (
    MAX_BODY_BYTES,
    MAX_CLICKS,
    MAX_K,
    MAX_SESSIONS,
    ErrorAnswer,
    ExplainAnswer,
    HealthAnswer,
    ItemsAnswer,
    ListsAnswer,
    RecommendAnswer,
    SimilarAnswer,
)
from tests.small_run import run_with, small_run


@pytest.fixture(scope="module")
def rec() -> Recommender:
    return Recommender.load(small_run().run / "export" / "sbr")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    run = run_with(tmp_path_factory.mktemp("served") / "run", "sbr")
    return Service(ServiceSettings(run, reload_s=0, hosts=LOOPBACK_NAMES), Recommender.load)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service), base_url="http://localhost:8000") as client:
        yield client


def _assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert {name: left[name] for name in ("item_ids", "titles", "fallback")} == {
            name: right[name] for name in ("item_ids", "titles", "fallback")
        }
        # Rounding depends on the sessions that are ranked together.
        np.testing.assert_allclose(left["scores"], right["scores"], rtol=1e-5, atol=1e-5)


def test_recommends_as_the_recommender_does(client: TestClient, rec: Recommender) -> None:
    sessions = [["i1", "i2", "i1"], ["unknown", "i9"], ["unknown"], []]
    answer = client.post("/recommend", json={"sessions": sessions, "k": 5})
    assert answer.status_code == 200
    _assert_same(answer.json()["lists"], rec.recommend(sessions, k=5).to_pylist())
    assert answer.json()["model"] == "sbr"


def test_requests_that_are_ranked_together_get_their_own_k_and_filters(
    client: TestClient, rec: Recommender, service: Service
) -> None:
    filters: list[dict[str, Any]] = [
        {},
        {"k": 1},
        {"k": 60},
        {"exclude_seen": True},
        {"exclude_seen": False, "k": 7},
        {"among": ["i3", "i4", "i5"]},
        {"without": ["i3", "i4"], "k": 3},
        {"category": "Kind 1"},
        {"category": "no such"},
    ]
    asked = [({"sessions": [[f"i{place}", f"i{place + 7}"]], **filters[place % len(filters)]}) for place in range(36)]
    before = service.metrics.registry.get_sample_value("llmgr_batch_sessions_count", {"model": "sbr"}) or 0
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: client.post("/recommend", json=body), asked))
    for body, answer in zip(asked, answers, strict=True):
        if body.get("category") == "no such":
            assert answer.status_code == 422
            assert answer.json()["error"].startswith("no item has the category 'no such'")
        else:
            arguments = {"k": 10, **body}
            _assert_same(answer.json()["lists"], rec.recommend(arguments.pop("sessions"), **arguments).to_pylist())
    after = service.metrics.registry.get_sample_value("llmgr_batch_sessions_count", {"model": "sbr"})
    assert after is not None
    assert 1 <= after - before < len(asked)


def test_similar_items_are_those_of_the_recommender(client: TestClient, rec: Recommender) -> None:
    answer = client.post("/similar", json={"items": ["i5", "i6"], "k": 4}).json()
    assert answer["lists"] == rec.similar(["i5", "i6"], k=4).to_pylist()


def test_explanations_are_those_of_the_recommender(client: TestClient, rec: Recommender) -> None:
    answer = client.post("/explain", json={"session": ["i5", "no such", "i6"], "items": ["i7"]}).json()
    expected = rec.explain(["i5", "no such", "i6"], items=["i7"]).to_dict()
    assert {name: answer[name] for name in expected} == json.loads(json.dumps(expected))
    assert len(client.post("/explain", json={"session": ["i5"], "k": 2}).json()["items"]) == 2


def test_lists_stand_side_by_side(client: TestClient) -> None:
    answer = client.post("/lists", json={"session": ["i1", "no such"], "k": 3}).json()
    assert [one["name"] for one in answer["lists"]] == ["sbr", "popularity"]
    assert all(len(one["item_ids"]) == len(one["titles"]) == 3 for one in answer["lists"])
    assert [click["title"] for click in answer["session"]] == ["<b>Thing</b> & i1", None]
    assert [click["is_known"] for click in answer["session"]] == [True, False]


def test_items_are_found_by_words_of_their_titles(client: TestClient) -> None:
    found = client.get("/items", params={"q": "THING i41"}).json()["items"]
    assert found == [{"item_id": "i41", "title": "<b>Thing</b> & i41"}]
    assert len(client.get("/items", params={"limit": 7}).json()["items"]) == 7
    assert client.get("/items", params={"q": "no such"}).json()["items"] == []


@pytest.mark.parametrize(
    ("path", "body", "status", "line"),
    [
        ("/recommend", {"session": [["i1"]]}, 422, "sessions is missing; see"),
        ("/recommend", {"sessions": [["i1"]], "excludeseen": True}, 422, "did you mean exclude_seen?"),
        (
            "/recommend",
            {"sessions": [["i1"]], "k": MAX_K + 1},
            422,
            f"k: input should be less than or equal to {MAX_K}",
        ),
        ("/recommend", {"sessions": [["i1"]], "k": 0}, 422, "k: input should be greater than or equal to 1"),
        ("/recommend", {"sessions": [["i1"] * (MAX_CLICKS + 1)]}, 422, f"at most {MAX_CLICKS} items"),
        ("/recommend", {"sessions": [["i1"]] * (MAX_SESSIONS + 1)}, 422, f"at most {MAX_SESSIONS} items"),
        ("/recommend", {"sessions": [[True]]}, 422, "sessions[0][0]: input should be"),
        ("/recommend", {"sessions": [["i1", None]]}, 422, "sessions[0][1]: input should be"),
        ("/recommend", {"sessions": [["i1"]], "model": "sasrec"}, 422, "there is no model 'sasrec'; give one of sbr"),
        ("/recommend", [], 422, "the body is not a JSON object"),
        ("/explain", {"session": ["i1"], "items": ["no such"]}, 422, "not in the catalog"),
        ("/similar", {"items": ["no such"]}, 422, "item 'no such' is not in the catalog"),
        ("/recomend", {}, 404, "there is no /recomend; see /openapi.json"),
    ],
)
def test_a_mistake_is_one_line(client: TestClient, path: str, body: Any, status: int, line: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert line in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"\xff\xfe", 422),
        (b"[" * 100_000, 400),
        (b'{"sessions": [["\\ud800"]]}', 422),
        (b'{"sessions": [["a\\u0000b", "../../etc/passwd", "\'; DROP TABLE items"]]}', 200),
        (b'{"sessions": [[1e999]]}', 422),
        (b'{"sessions": [[' + b"9" * 5000 + b"]]}", 400),
        (b" " * (MAX_BODY_BYTES + 1), 413),
    ],
)
def test_any_body_gets_an_answer(client: TestClient, content: bytes, status: int) -> None:
    answer = client.post("/recommend", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert ("lists" in answer.json()) == (status == 200)


def test_health_metrics_and_openapi_say_what_is_there(client: TestClient, service: Service) -> None:
    (loaded,) = client.get("/health").json()["models"]
    assert (loaded["name"], loaded["stage"]) == ("sbr", "sbr")
    text = client.get("/metrics").text
    assert f'llmgr_model_info{{model="sbr",stage="sbr",version="{loaded["version"]}"}} 1.0' in text
    assert client.get("/no/such").status_code == 404
    text = client.get("/metrics").text
    assert 'llmgr_requests_total{path="/health",status="200"}' in text
    assert 'llmgr_requests_total{path="other",status="404"}' in text
    for name in ("llmgr_request_seconds_bucket", "llmgr_batch_sessions_bucket"):
        assert name in text
    described = client.get("/openapi.json").json()
    assert {"/recommend", "/similar", "/lists", "/items", "/health", "/metrics"} <= set(described["paths"])
    assert described["components"]["schemas"]["RecommendRequest"]["examples"]


def test_answers_have_the_types_that_openapi_shows(client: TestClient) -> None:
    answers = {
        RecommendAnswer: client.post("/recommend", json={"sessions": [["i1"], []]}),
        SimilarAnswer: client.post("/similar", json={"items": ["i1"]}),
        ExplainAnswer: client.post("/explain", json={"session": ["i1", "i2"]}),
        ListsAnswer: client.post("/lists", json={"session": ["i1", "no such"]}),
        ItemsAnswer: client.get("/items"),
        HealthAnswer: client.get("/health"),
        ErrorAnswer: client.post("/similar", json={}),
    }
    for kind, answer in answers.items():
        assert kind.model_validate(answer.json()).model_dump() == answer.json(), kind


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/page.css", "/page.js"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")


def test_only_pages_of_this_machine_may_ask_a_service_on_loopback(client: TestClient) -> None:
    answer = client.get("/health", headers={"host": "attacker.example"})
    assert answer.status_code == 421
    assert "listens on loopback only" in answer.json()["error"]


def test_ids_are_text_or_integers() -> None:
    assert as_text([5, "7", 10**30]) == ["5", "7", "1" + "0" * 30]


def test_a_body_that_does_not_arrive_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_guard, "_BODY_S", 0.01)
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/recommend", "headers": [(b"host", b"localhost")]}
    asyncio.run(make_app(service)({**scope, "query_string": b""}, receive, send))
    assert sent[0]["status"] == 408


def test_more_requests_than_may_wait_are_sent_away(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_batching, "_MAX_WAITING", 0)
    monkeypatch.setattr(app, "_MAX_CALLS", 0)
    for path, body in (("/recommend", {"sessions": [["i1"]]}), ("/similar", {"items": ["i1"]})):
        answer = client.post(path, json=body)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json() == {"error": "too many requests wait; try again after a moment"}
