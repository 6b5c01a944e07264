"""What stands before every route: limits of the body and of the host name, headers of the answer, counts and times."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from llmgr_rec.serving.json_answers import error_answer
from llmgr_rec.serving.service_metrics import ServiceMetrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Seconds in which the body of a request has to arrive.
_BODY_S = 20.0
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HEADERS = [
    # The page loads nothing from elsewhere, runs no script in its text, and is shown in no other page.
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class RequestGuard:
    """ASGI middleware of the service.

    Args:
        app: The routes.
        metrics: Counts requests and their times.
        paths: Paths by which they are counted; any other is counted as "other".
        max_body_bytes: Largest body.
        hosts: Names that the header Host may have, which keeps pages of other sites from a service on loopback by a
            name of theirs that resolves to it; None allows all.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: ServiceMetrics,
        paths: Collection[str],
        max_body_bytes: int,
        hosts: Collection[str] | None,
    ) -> None:
        self._app = app
        self._metrics, self._paths = metrics, frozenset(paths)
        self._max_body_bytes, self._hosts = max_body_bytes, hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            await self._answer(scope, receive, send_with_headers)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and _name_of(host) not in self._hosts:
            line = (
                f"the service listens on loopback only, not as {host[:100]!r}; use localhost, or start it with --host"
            )
            await error_answer(421, line)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        try:
            async with asyncio.timeout(_BODY_S):
                is_too_long = length.isdigit() and int(length) > self._max_body_bytes
                body = None if is_too_long else await self._body(receive)
        except TimeoutError:
            await error_answer(408, f"the body took longer than {_BODY_S:g} s; send it at once")(scope, receive, send)
            return
        if body is None:
            line = f"the body is too large; send {self._max_body_bytes:,} bytes at most"
            await error_answer(413, line)(scope, receive, send)
            return
        await self._app(scope, _again(body, receive), send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The body of a request; None if it is too large."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Receives a body that has been received, then what follows it."""
    is_sent = False

    async def receive_again() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _name_of(host: str) -> str:
    """A host name without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
