"""`python -m llmgr_rec.serve`: recommendations over HTTP, and a page to try them.

    python -m llmgr_rec.serve --run RUN
    python -m llmgr_rec.serve --run RUN --host 0.0.0.0 --port 80

Open http://127.0.0.1:8000, or send JSON: docs/serving.md. New models of the run are loaded while it runs.
"""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmgr_rec.bounds import Bounds, check_options
from llmgr_rec.cli import add_code_argument, add_run_argument, make_parser, parse_args, run_cli
from llmgr_rec.comma_separated import split_list
from llmgr_rec.config import DType
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.ranking_arguments import add_table_dtype_argument
from llmgr_rec.first_and_last_line import print_result
from llmgr_rec.library_imports import command_imports
from llmgr_rec.remote_path import as_path

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_BOUNDS = {
    "port": Bounds(at_least=0, at_most=65535),
    "wait_ms": Bounds(at_least=0, at_most=1000),
    "reload_s": Bounds(at_least=0, at_most=86400),
    "threads": Bounds(at_least=1, at_most=1024),
    "index": Bounds(above=0, at_most=1),
}


def main(argv: Sequence[str]) -> None:
    """Parses arguments, loads the models, and answers requests until SIGTERM or Ctrl-C.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: Packages of the service are not installed, the address is in use, or the run has no complete model.
    """
    arguments = parse_args(_parser(), argv)
    check_options({name: getattr(arguments, name) for name in (*_BOUNDS, "host")}, _BOUNDS)
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"the service needs {', '.join(missing)}; install it: pip install 'llmgr-rec[serve]'")

    with command_imports():
        from llmgr_rec import Recommender, __version__
        from llmgr_rec.serving.app import ServiceSettings
        from llmgr_rec.serving.request_guard import LOOPBACK_NAMES
        from llmgr_rec.serving.run_service import run_service

    code = split_list(arguments.allow_code)
    settings = ServiceSettings(
        run=as_path(arguments.run),
        version=__version__,
        wait_ms=arguments.wait_ms,
        reload_s=arguments.reload_s,
        hosts=LOOPBACK_NAMES if arguments.host in _LOOPBACK else None,
        allow_code=code,
    )
    run_service(
        settings,
        arguments.host,
        arguments.port,
        arguments.threads,
        lambda bundle: Recommender.load(
            bundle,
            dtype=arguments.llm_dtype,
            table_dtype=arguments.table_dtype,
            index=arguments.index,
            allow_code=code,
        ),
        lambda line: print_result("serve", line),
    )


def _parser() -> "ArgumentParser":
    parser = make_parser("llmgr_rec.serve")
    add_run_argument(parser)
    parser.add_argument(
        "--host",
        type=str,
        default="127.0.0.1",
        help="IP address to listen on. 0.0.0.0 is reachable from other machines; there are no passwords.",
    )
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on; 0 takes a free one.")
    parser.add_argument(
        "--wait_ms",
        type=float,
        default=3.0,
        help="Time that a request waits for others that are ranked with it, in milliseconds.",
    )
    parser.add_argument(
        "--reload_s",
        type=float,
        default=5.0,
        help="Time between two looks for new models in the run, in seconds; 0 never looks.",
    )
    parser.add_argument("--threads", type=int, default=1, help="Threads that rank a batch. More help a language model.")
    parser.add_argument("--llm_dtype", type=DType, help="Dtype of the language model; default: the setting of the run.")
    add_table_dtype_argument(parser)
    parser.add_argument(
        "--index",
        type=float,
        help="Rank single sessions approximately by an index in memory, which finds at least this share of their best "
        "20 items, such as 0.99; default: rank exactly. Needs the extra index.",
    )
    add_code_argument(parser)
    return parser


if __name__ == "__main__":
    run_cli(main)
