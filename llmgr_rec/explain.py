"""`python -m llmgr_rec.explain`: says why a session gets its recommendations.

    python -m llmgr_rec.explain --run RUN --items pen,ink,paper
    python -m llmgr_rec.explain --run RUN --input SESSIONS.parquet --session 17 --output explanation.html

docs/explaining.md says what the numbers mean.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmgr_rec.bounds import Bounds, check_options
from llmgr_rec.cli import add_code_argument, add_run_argument, make_parser, parse_args, run_cli
from llmgr_rec.comma_separated import split_list
from llmgr_rec.errors import UserError
from llmgr_rec.first_and_last_line import print_result, print_start
from llmgr_rec.library_imports import command_imports
from llmgr_rec.paths import StoragePath
from llmgr_rec.remote_path import as_path

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from llmgr_rec.explanation.records import Explanation

_FORMATS = (".txt", ".json", ".svg", ".html")


def main(argv: Sequence[str]) -> None:
    """Parses arguments, explains one session, and prints or writes the explanation.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: There is no such run, session or item, or the output has an unknown suffix.
    """
    arguments = parse_args(_parser(), argv)
    check_options({"k": arguments.k}, {"k": Bounds(at_least=1, at_most=100)})
    output = as_path(arguments.output) if arguments.output else None
    if output and output.suffix not in _FORMATS:
        raise UserError(f"--output {output} ends in {output.suffix or 'no suffix'}; give one of {', '.join(_FORMATS)}")
    # By its name as a key: Namespace has a method items.
    session = _session(arguments["items"], arguments.input, arguments.session)
    chosen = None if arguments.explain_items is None else _ids(arguments.explain_items, "explain_items")

    with command_imports():
        from llmgr_rec import Recommender
        from llmgr_rec.files import atomic_write

    recommender = Recommender.load(arguments.run, allow_code=split_list(arguments.allow_code))
    print_start("explain", [arguments.run, arguments.input], output)
    explanation = recommender.explain(session, arguments.k, items=chosen)
    if output is None:
        print(explanation.to_text(), end="")
        return
    with atomic_write(output) as partial:
        partial.write_text(_rendered(explanation, output.suffix), encoding="utf-8")
    print_result("explain", f"explained items: {len(explanation.items)}", output)


def _parser() -> "ArgumentParser":
    parser = make_parser("llmgr_rec.explain")
    add_run_argument(parser)
    parser.add_argument(
        "--items",
        type=str,
        help="Item ids of the session, oldest first, comma-separated; or as a JSON list, which ids with commas need: "
        '["a,b", "c"].',
    )
    parser.add_argument(
        "--input", type=StoragePath, help="Parquet file or folder with sessions, as llmgr_rec.score takes it."
    )
    parser.add_argument("--session", type=str, help="The session_id of the session of --input.")
    parser.add_argument("--k", type=int, default=5, help="Number of recommended items to explain.")
    parser.add_argument(
        "--explain_items", type=str, help="Items to explain instead of the recommended ones, given as in --items."
    )
    parser.add_argument(
        "--output",
        type=StoragePath,
        help="File to write, in the format of its suffix: .txt, .json, .html, or .svg with the session graph for the "
        "first item; default: text on standard output.",
    )
    add_code_argument(parser)
    return parser


def _session(items: str | None, file: str | None, session_id: str | None) -> list[Any]:
    """Item ids of the session that the options name."""
    if (items is None) == (file is None) or (file is None) != (session_id is None):
        raise UserError("give either --items, or --input and --session")
    if items is not None:
        return _ids(items, "items")

    import pyarrow as pa
    import pyarrow.compute as pc

    from llmgr_rec.arrow_input import to_sessions

    table = to_sessions(file, "--input")
    found = table.filter(pc.equal(table["session_id"].cast(pa.string()), session_id))
    if found.num_rows != 1:
        how_many = f"{found.num_rows:,} sessions" if found.num_rows else "no session"
        example = f"; its first is {table['session_id'][0].as_py()}" if table.num_rows else ""
        raise UserError(f"{file} has {how_many} with session_id {session_id}{example}")
    ids: list[Any] = found["items"][0].as_py()
    return ids


def _ids(text: str, option: str) -> list[Any]:
    """Item ids of an option: a JSON list, or comma-separated text."""
    if not text.lstrip().startswith("["):
        return split_list(text)
    try:
        ids = json.loads(text)
    except ValueError as error:
        raise UserError(f'--{option} is no JSON list ({error}); write it as in --{option} \'["a", "b"]\'') from None
    return list(ids)


def _rendered(explanation: "Explanation", suffix: str) -> str:
    formats = {
        ".txt": explanation.to_text,
        ".json": explanation.to_json,
        ".svg": explanation.to_svg,
        ".html": explanation.to_html,
    }
    return formats[suffix]()


if __name__ == "__main__":
    run_cli(main)
