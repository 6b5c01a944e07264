import asyncio

import pytest

from benchmarks.serving import ask, main, make_requests, summary
from llmgr_rec import Recommender
from llmgr_rec.errors import UserError
from llmgr_rec.serving.app import Service, ServiceSettings
from tests.serving.running import running
from tests.small_run import small_run


def test_the_client_counts_answers_and_errors():
    service = Service(ServiceSettings(small_run().run / "export" / "sbr", reload_s=0), Recommender.load)
    with running(service) as address:
        port = int(address.rsplit(":", 1)[1])
        times, errors = asyncio.run(ask(port, make_requests(["i1", "i2", "i3"]), clients=4, seconds=0.2))
        assert len(times) >= 4
        assert errors == 0
        wrong, errors = asyncio.run(ask(port, [b"GET /none HTTP/1.1\r\nHost: localhost\r\n\r\n"], 2, 0.05))
        assert errors == len(wrong) > 0
    values = ("requests", "errors", "requests_per_s", "p50_ms", "p99_ms", "service_cpu_ms", "client_cpu_ms")
    assert "7 errors" in summary(dict.fromkeys(values, 7))


def test_a_bad_argument_is_one_line():
    with pytest.raises(UserError, match="--clients and --seconds must be positive"):
        main(["--run", "run", "--clients", "0"])
