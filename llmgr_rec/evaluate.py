"""`python -m llmgr_rec.evaluate`: ranks the whole catalog for every test session, beside popularity and item-kNN.

python -m llmgr_rec.evaluate --run RUN --dataset DATASET --output metrics.json
torchrun --nproc_per_node 2 -m -- llmgr_rec.evaluate --run RUN --dataset DATASET --output metrics.json
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llmgr_rec.cli import (
    add_code_argument,
    add_run_argument,
    is_rank0,
    make_parser,
    parse_args,
    run_cli,
    split_code,
)
from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.evaluation.results import MODEL_NAMES
from llmgr_rec.registry import is_import_path

MODELS = tuple(MODEL_NAMES)


def main(argv: Sequence[str]) -> None:
    """Parses arguments, checks what can be wrong, evaluates, writes the metrics file and prints the table.

    Raises:
        UserError: Something in arguments, run or data set is wrong. It is raised on every rank before any rank
            waits for another.
    """
    parser = make_parser("llmgr_rec.evaluate", "Evaluates a run and the baselines over the full catalog.")
    add_run_argument(parser)
    parser.add_argument("--dataset", type=str, required=True, help="Folder made by llmgr_rec.prepare.")
    parser.add_argument("--split", type=Literal["test", "valid"], default="test", help="Sessions to judge by.")
    parser.add_argument("--output", type=str, required=True, help="Metrics file (JSON) to write.")
    parser.add_argument(
        "--models",
        type=str,
        help=f"What to evaluate, of {','.join(MODELS)} and import paths of baselines, such as my_package.knn:Recent; "
        "default popularity, item_knn and all that the run has trained.",
    )
    add_code_argument(parser)
    parser.add_argument("--batch_size", type=int, help="Sessions of a batch; default the run's setting.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], help="Default the run's setting.")
    arguments = parse_args(parser, argv)

    from llmgr_rec.evaluation.evaluate_run import EvaluationRequest, evaluate_run
    from llmgr_rec.evaluation.results import blend_notes, format_table

    content = evaluate_run(
        EvaluationRequest(
            run=Path(arguments.run),
            dataset=Path(arguments.dataset),
            split=arguments.split,
            output=Path(arguments.output),
            models=split_names(arguments.models, "--models", MODELS) if arguments.models else None,
            batch_size=arguments.batch_size,
            device=arguments.device,
            allow_code=split_code(arguments.allow_code),
        )
    )
    if is_rank0():
        print(format_table(content[arguments.split]))
        for note in blend_notes(content["blends"]):
            print(note)
        print(
            f"{content['count']:,} {arguments.split} sessions, {content['num_items']:,} items; {content['protocol']}; "
            f"wrote {arguments.output}"
        )


def split_names(text: str, option: str, known: Sequence[str]) -> list[str]:
    """Names of a comma-separated option, import paths among them.

    Raises:
        UserError: A name is not known.
    """
    names = [name.strip() for name in text.strip("[]").split(",") if name.strip()]
    for name in names:
        if name not in known and not is_import_path(name):
            raise UserError(f"{option} names {name}, which is not known{did_you_mean(name, known)}")
    if not names:
        raise UserError(f"{option} is empty; name some of {', '.join(known)}")
    return names


if __name__ == "__main__":
    run_cli(main)
