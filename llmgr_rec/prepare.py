"""`python -m llmgr_rec.prepare`: makes a data set from interaction logs and an item file."""

from collections.abc import Sequence

from llmgr_rec.cli import make_parser, parse_args, run_cli
from llmgr_rec.data.preparation.settings import PrepareSettings, check_settings
from llmgr_rec.first_and_last_line import print_result
from llmgr_rec.library_imports import command_imports

# Flags without a value, unlike the boolean options that jsonargparse derives from a dataclass.
_FLAGS = {
    "split_prefix": "Take the predefined split from the prefix of the user or session name, not from a column.",
    "keep_unseen_items": "Keep catalog items without interactions.",
}


def main(argv: Sequence[str]) -> None:
    """Runs the entry point.

    Args:
        argv: Command-line arguments without the program name.

    Raises:
        UserError: An argument or the input is invalid.
    """
    parser = make_parser("llmgr_rec.prepare")
    parser.add_class_arguments(PrepareSettings, skip=set(_FLAGS))
    for name, text in _FLAGS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    settings = PrepareSettings(**parse_args(parser, argv).as_dict())
    check_settings(settings)

    with command_imports():
        from llmgr_rec.data.preparation.pipeline import prepare_dataset
        from llmgr_rec.data.preparation.summary import summary_lines

    first, *others = summary_lines(prepare_dataset(settings))
    print(*others, sep="\n")
    print_result("prepare", first, settings.output)


if __name__ == "__main__":
    run_cli(main)
