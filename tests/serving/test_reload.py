"""New models are loaded while requests are answered, of which none is dropped; a service that stops finishes them."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pyarrow as pa
import torch
from fastapi.testclient import TestClient

from llmgr_rec import Recommender
from llmgr_rec.serving.app import Service, ServiceSettings, make_app
from llmgr_rec.serving.served_models import SessionModel
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import init_tables
from tests.serving.running import running
from tests.small_run import ONE_RANK, config, run_with, small_run

SESSIONS = [["i1", "i2"], ["i7"], ["i3", "i9", "i4"]]


def export_other(folder: Path) -> None:
    """A bundle of the same catalog with other weights."""
    catalog, factory, cpu = small_run().catalog, ModelFactory(), torch.device("cpu")
    spec = factory.spec("sbr", config(), catalog)
    model = factory.build(spec, factory.language_parts(spec, catalog, cpu), cpu)
    init_tables(model, 2, 0.5)
    export_bundle(model, "sbr", config(), catalog, folder, ONE_RANK)


def replace_bundle(run: Path, new: Path) -> None:
    """Puts a bundle in the place of that of the run, as an export does."""
    (run / "export" / "sbr").rename(run / "old")
    new.rename(run / "export" / "sbr")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_new_bundle_answers_and_no_request_is_dropped(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", "sbr")
    export_other(tmp_path / "new")
    expected = [Recommender.load(path).recommend(SESSIONS, k=4).to_pylist() for path in (run, tmp_path / "new")]
    service = Service(ServiceSettings(run, reload_s=0.02), Recommender.load)
    versions = [service.models.default.version]
    answers: list[Any] = []
    stop = threading.Event()

    def ask(client: TestClient) -> None:
        while not stop.is_set():
            answers.append(client.post("/recommend", json={"sessions": SESSIONS, "k": 4}))

    with TestClient(make_app(service)) as client:
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(answers) > 20)
        replace_bundle(run, tmp_path / "new")
        wait_for(lambda: service.models.default.version != versions[0])
        asked = len(answers)
        wait_for(lambda: len(answers) > asked + 20)
        stop.set()
        for thread in threads:
            thread.join(timeout=60)
        versions.append(service.models.default.version)
        metrics = client.get("/metrics").text
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["version"] for answer in answers} == set(versions)
    for answer in answers:
        rows = expected[versions.index(answer.json()["version"])]
        assert [row["item_ids"] for row in answer.json()["lists"]] == [row["item_ids"] for row in rows]
        for found, row in zip(answer.json()["lists"], rows, strict=True):
            np.testing.assert_allclose(found["scores"], row["scores"], rtol=1e-4, atol=1e-4)
    assert 'llmgr_reloads_total{result="loaded"} 1.0' in metrics
    assert versions[0] not in metrics


def test_a_damaged_bundle_is_refused_once_and_the_models_before_stay(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", "sbr")
    service = Service(ServiceSettings(run, reload_s=0.01), Recommender.load)
    before = service.models
    export_other(tmp_path / "new")
    weights = next((tmp_path / "new" / "tables").iterdir())
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")

    def refused() -> float | None:
        return service.metrics.registry.get_sample_value("llmgr_reloads_total", {"result": "refused"})

    with TestClient(make_app(service)) as client:
        shutil.move(run / "export" / "sbr", run / "old")
        assert client.post("/recommend", json={"sessions": SESSIONS}).status_code == 200
        shutil.move(tmp_path / "new", run / "export" / "sbr")
        wait_for(lambda: refused() is not None)
        time.sleep(0.1)
        assert client.post("/recommend", json={"sessions": SESSIONS}).status_code == 200
    assert refused() == 1
    assert service.models is before


class SlowModel:
    """Ranks after a moment."""

    def __init__(self, model: SessionModel) -> None:
        self._model = model
        self.asked = threading.Event()

    def recommend(self, sessions: Any, k: int = 10, **filters: Any) -> pa.Table:
        self.asked.set()
        time.sleep(0.3)
        return self._model.recommend(sessions, k, **filters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def test_a_request_in_flight_is_finished_when_the_service_stops() -> None:
    made: list[SlowModel] = []

    def load(bundle: Path) -> SessionModel:
        made.append(SlowModel(Recommender.load(bundle)))
        return made[-1]

    service = Service(ServiceSettings(small_run().run / "export" / "sbr", reload_s=0), load)
    made[0].asked.clear()
    answers: list[Any] = []

    def ask(address: str) -> None:
        body = json.dumps({"sessions": [["i1"]], "k": 2}).encode()
        request = Request(f"{address}/recommend", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            answers.append(json.load(answer))

    with running(service) as address:
        thread = threading.Thread(target=ask, args=(address,))
        thread.start()
        assert made[0].asked.wait(60)
    thread.join(timeout=60)
    assert [len(answer["lists"][0]["item_ids"]) for answer in answers] == [2]
