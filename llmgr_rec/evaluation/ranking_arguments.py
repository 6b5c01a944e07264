"""Options of `evaluate` and `score` that say what a ranking shows and excludes of a session, and by how many threads.

Also the number format of the tables, which all commands that rank sessions have. Imports only what `--help` needs.
"""

from typing import TYPE_CHECKING

from llmgr_rec.config import Domains, TableDType
from llmgr_rec.data.repeats import RepeatsOption

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_ranking_arguments(parser: "ArgumentParser") -> None:
    """Adds --repeats, --max_length and --domains, which say what a ranking shows and excludes, and how it is run."""
    parser.add_argument(
        "--repeats",
        type=RepeatsOption,
        default="auto",
        help="Whether a list may contain the items of the clicks that the model uses; auto takes what prepare decided "
        "for the data of the run.",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        help="Number of newest clicks of a session that are used; default: that of the run's data set.",
    )
    add_table_dtype_argument(parser)
    parser.add_argument(
        "--domains",
        type=Domains,
        default="own",
        help="Items that a list may have, where the data set was prepared from the logs of several domains: those of "
        "the domain of the session, or all.",
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="CPU threads of each rank; default: the setting of the run or OMP_NUM_THREADS where they are given, "
        "otherwise all cores for a language model, and without one as many as the catalog is worth.",
    )


def add_table_dtype_argument(parser: "ArgumentParser") -> None:
    """Adds --table_dtype, the number format of the embedding tables in memory."""
    parser.add_argument(
        "--table_dtype",
        type=TableDType,
        help="Number format of the embedding tables in memory; default: that of the exported model.",
    )
