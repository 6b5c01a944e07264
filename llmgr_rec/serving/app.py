"""The routes of the service."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response

from llmgr_rec.errors import UserError
from llmgr_rec.serving.json_answers import error_answer, invalid_request, json_answer
from llmgr_rec.serving.model_reload import ModelWatch
from llmgr_rec.serving.request_batching import Ask, BusyError, Filters, RequestBatcher, Row
from llmgr_rec.serving.request_guard import RequestGuard
from llmgr_rec.serving.request_types import (
    ERRORS,
    MAX_BODY_BYTES,
    ExplainAnswer,
    ExplainRequest,
    HealthAnswer,
    ItemId,
    ItemsAnswer,
    ListsAnswer,
    ListsRequest,
    RecommendAnswer,
    RecommendRequest,
    SimilarAnswer,
    SimilarRequest,
)
from llmgr_rec.serving.served_models import ServedModel, ServedModels, SessionModel, load_models
from llmgr_rec.serving.service_metrics import ServiceMetrics

T = TypeVar("T")

_PAGE = Path(__file__).parent / "page"
# Calls that are not batched: threads for them, and how many may wait.
_THREADS = 2
_MAX_CALLS = 200
_FIELDS = {
    "/explain": list(ExplainRequest.model_fields),
    "/recommend": list(RecommendRequest.model_fields),
    "/similar": list(SimilarRequest.model_fields),
    "/lists": list(ListsRequest.model_fields),
}


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of a service.

    Args:
        run: A run, or a bundle.
        version: Version of this package.
        wait_ms: Time that a request waits for others that are ranked with it.
        reload_s: Time between two looks for new models; 0 never looks.
        hosts: Names that the header Host may have; None allows all.
        allow_code: Packages from which the bundles may import.
    """

    run: Path
    version: str = "unknown"
    wait_ms: float = 3.0
    reload_s: float = 5.0
    hosts: frozenset[str] | None = None
    allow_code: Sequence[str] = ()


class Service:
    """What the routes share.

    Args:
        settings: Settings of the service.
        load: Loads a bundle.

    Raises:
        UserError: The models cannot be loaded.
    """

    def __init__(self, settings: ServiceSettings, load: Callable[[Path], SessionModel]) -> None:
        self.metrics = ServiceMetrics()
        self.settings = settings
        self.watch = ModelWatch(
            settings.run, lambda: load_models(settings.run, load, settings.allow_code), self.metrics
        )
        self._batchers: dict[str, RequestBatcher] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="call")
        self._calls = 0

    @property
    def models(self) -> ServedModels:
        """The models that answer now."""
        return self.watch.models

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Looks for new models while the service runs."""
        task = asyncio.create_task(self.watch.follow(self.settings.reload_s)) if self.settings.reload_s else None
        try:
            yield
        finally:
            if task:
                task.cancel()
            for batcher in self._batchers.values():
                batcher.close()
            self._threads.shutdown()

    async def rank(self, served: ServedModel, sessions: Sequence[Sequence[str]], k: int, filters: Filters) -> list[Row]:
        """Ranks sessions among those of other requests; see `RequestBatcher.recommend`."""
        if served.name not in self._batchers:
            observe = self.metrics.batch_sessions.labels(served.name).observe
            self._batchers[served.name] = RequestBatcher(self.settings.wait_ms / 1000, observe)
        return await self._batchers[served.name].recommend(Ask(served.model, sessions, k, filters))

    async def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Runs work that is not batched in a thread.

        Raises:
            BusyError: Too many calls wait.
        """
        if self._calls >= _MAX_CALLS:
            raise BusyError
        self._calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        finally:
            self._calls -= 1


def make_app(service: Service) -> FastAPI:
    """The service as an ASGI application.

    Args:
        service: What the routes share.
    """
    app = FastAPI(
        title="llmgr_rec",
        version=service.settings.version,
        description="Recommendations for sessions of clicks.",
        # Their pages load scripts from other hosts.
        docs_url=None,
        redoc_url=None,
        lifespan=service.running,
    )
    _add_routes(app, service)
    _add_page(app)
    _add_errors(app)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(
        RequestGuard, metrics=service.metrics, paths=paths, max_body_bytes=MAX_BODY_BYTES, hosts=service.settings.hosts
    )
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/recommend", response_model=RecommendAnswer, responses=ERRORS, summary="Ranks items for sessions")
    async def recommend(request: RecommendRequest) -> Response:
        models = service.models
        served = models.named(request.model)
        filters = Filters(
            request.exclude_seen,
            None if request.among is None else tuple(as_text(request.among)),
            tuple(as_text(request.without)),
            request.category,
            request.domain,
        )
        sessions = [as_text(session) for session in request.sessions]
        rows = await service.rank(served, sessions, request.k, filters)
        return json_answer({"model": served.name, "version": served.version, "lists": rows})

    @app.post("/similar", response_model=SimilarAnswer, responses=ERRORS, summary="Finds items with similar vectors")
    async def similar(request: SimilarRequest) -> Response:
        models = service.models
        served = models.named(request.model)
        items = as_text(request.items)
        table = await service.call(served.model.similar, items, request.k)
        return json_answer({"model": served.name, "version": served.version, "lists": table.to_pylist()})

    @app.post(
        "/explain", response_model=ExplainAnswer, responses=ERRORS, summary="Says what the scores of items rest on"
    )
    async def explain(request: ExplainRequest) -> Response:
        models = service.models
        served = models.named(request.model)
        session = as_text(request.session)
        items = None if request.items is None else as_text(request.items)
        explained = await service.call(
            lambda: served.model.explain(session, request.k, items=items, exclude_seen=request.exclude_seen)
        )
        return json_answer({"model": served.name, "version": served.version, **explained.to_dict()})

    @app.post("/lists", response_model=ListsAnswer, responses=ERRORS, summary="Ranks with all models and baselines")
    async def lists(request: ListsRequest) -> Response:
        return json_answer(await _side_by_side(service, request))

    @app.get("/items", response_model=ItemsAnswer, responses=ERRORS, summary="Finds items by words of their titles")
    async def items(
        q: Annotated[str, Query(max_length=200)] = "", limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> Response:
        return json_answer({"items": await service.call(service.models.items.find, q, limit)})

    @app.get("/health", response_model=HealthAnswer, summary="Says which models are loaded")
    async def health() -> Response:
        models = service.models
        loaded = [
            {"name": one.name, "title": one.title, "stage": one.stage, "version": one.version}
            for one in models.models.values()
        ]
        num_items = len(models.default.model.item_ids)
        return json_answer({"status": "ok", "num_items": num_items, "default": models.default.name, "models": loaded})

    @app.get("/metrics", summary="Counts and times for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def as_text(ids: Sequence[ItemId]) -> list[str]:
    """Item ids as text, which `Recommender` takes for catalogs of both kinds of ids."""
    return [str(item) for item in ids]


async def _side_by_side(service: Service, request: ListsRequest) -> dict[str, Any]:
    models = service.models
    session = as_text(request.session)
    of_models = [service.rank(served, [session], request.k, Filters()) for served in models.models.values()]
    of_baselines = [service.call(one.recommend, session, request.k) for one in models.baselines]
    clicked, baselines, rows = await asyncio.gather(
        service.call(models.items.titles_of, session), asyncio.gather(*of_baselines), asyncio.gather(*of_models)
    )
    lists = [
        {"name": one.name, "title": one.title, **found, "scores": None, "explains": False}
        for one, found in zip(models.baselines, baselines, strict=True)
    ]
    lists += [
        {"name": served.name, "title": served.title, **row, "explains": True}
        for served, (row,) in zip(models.models.values(), rows, strict=True)
    ]
    # A phone shows the first list: that of the last stage. Popularity is the last.
    return {"session": clicked, "lists": lists[::-1]}


def _add_page(app: FastAPI) -> None:
    for file in _PAGE.iterdir():
        path = "/" if file.name == "index.html" else f"/{file.name}"
        app.add_api_route(path, _sends(file), include_in_schema=False, response_model=None)


def _sends(file: Path) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return FileResponse(file, headers={"cache-control": "no-cache"})

    return send


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(UserError)
    async def refused(_: Request, error: Exception) -> Response:
        return error_answer(422, str(error))

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: Exception) -> Response:
        return error_answer(503, "too many requests wait; try again after a moment", {"retry-after": "1"})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_answer(422, invalid_request(list(error.errors()), _FIELDS, request.url.path))

    @app.exception_handler(400)
    async def unreadable(_: Request, error: Exception) -> Response:
        return error_answer(400, "the body cannot be read as JSON; see /openapi.json for an example")

    @app.exception_handler(404)
    async def absent(request: Request, error: Exception) -> Response:
        return error_answer(404, f"there is no {request.url.path[:100]}; see /openapi.json for the paths")

    @app.exception_handler(405)
    async def other_method(request: Request, error: Exception) -> Response:
        return error_answer(405, f"{request.url.path} does not take {request.method}; see /openapi.json for its method")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return error_answer(500, "the service failed; its log says why")
