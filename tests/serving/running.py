"""A service that runs in a thread of the test."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from llmgr_rec.serving.app import Service, make_app
from llmgr_rec.serving.run_service import listen


@contextmanager
def running(service: Service) -> Iterator[str]:
    """Serves on loopback; yields the address."""
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning", lifespan="on", ws="none"))
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()
