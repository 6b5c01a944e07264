"""Runs the service until it is asked to stop."""

import errno
import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import uvicorn

from llmgr_rec.bounds import shown
from llmgr_rec.errors import UserError
from llmgr_rec.first_and_last_line import print_start, threads_in_use
from llmgr_rec.serving.app import Service, ServiceSettings, make_app
from llmgr_rec.serving.served_models import SessionModel

# Seconds that requests in flight have after SIGTERM. Kubernetes kills 30 s after it.
_GRACE_S = 20
_KEEP_ALIVE_S = 30
_BACKLOG = 2048


def run_service(
    settings: ServiceSettings,
    host: str,
    port: int,
    threads: int,
    load: Callable[[Path], SessionModel],
    started: Callable[[str], None],
) -> None:
    """Listens, loads the models, says the address, and answers until SIGTERM or Ctrl-C.

    Args:
        settings: Settings of the service.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        threads: Threads that rank a batch.
        load: Loads a bundle.
        started: Called with one line that has the address.

    Raises:
        UserError: The address cannot be used, or the models cannot be loaded.
    """
    with listen(host, port) as listener:
        print_start("serve", [settings.run], runs_on=threads_in_use(threads))
        torch.set_num_threads(threads)
        service = Service(settings, load)
        config = uvicorn.Config(
            make_app(service),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="on",
            ws="none",
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
        )
        models = ", ".join(service.models.models)
        address = listener.getsockname()
        name = f"[{address[0]}]" if ":" in address[0] else address[0]
        # Before the address is said: who connects at once waits until the server takes over.
        listener.listen(_BACKLOG)
        num_items = len(service.models.default.model.item_ids)
        started(f"answers with {models} for {num_items:,} items at http://{name}:{address[1]}")
        uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address.

    Args:
        host: IP address, or localhost.
        port: Port; 0 takes a free one.

    Raises:
        UserError: The address cannot be used.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise UserError(f"--host {shown(host)} is no IP address; give 127.0.0.1, or 0.0.0.0 for all") from None
    listener = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(address), port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use; give another --port, or 0 for any free one") from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} may not be used by this user; give a --port above 1023") from None
        raise UserError(
            f"--host {host} is no address of this machine ({os.strerror(error.errno or 0)}); "
            "give 127.0.0.1, or 0.0.0.0 for all"
        ) from None
    return listener
