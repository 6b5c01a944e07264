"""Our side of the comparison: stage sbr as `llmgr_rec.train` runs it, paused between epochs.

It is started as `python -m benchmarks.session_trainer`, with the arguments of `llmgr_rec.train --stage sbr`.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from benchmarks.turns_protocol import Epoch, Replies, Stopwatch
from llmgr_rec.cli import make_parser, run_cli
from llmgr_rec.config_file import add_config_arguments, parse_with_config
from llmgr_rec.distributed.process_group import process_group
from llmgr_rec.paths import LocalPath
from llmgr_rec.stop_signals import StopSignals
from llmgr_rec.training.metrics_logger import MetricsLogger
from llmgr_rec.training.preflight import RunRequest, check_run
from llmgr_rec.training.stages import RunContext, run_stage

STAGE: Final = "sbr"


class EnoughEpochs(Exception):
    """The benchmark has ended the training."""


class PausingLogger(MetricsLogger):
    """A metrics logger that pauses training after each validation, until the benchmark asks for the next epoch.

    Args:
        run: Run folder.
        replies: Sends epochs and waits for requests.
        examples: Training examples of an epoch.
    """

    def __init__(self, run: Path, replies: Replies, examples: int) -> None:
        super().__init__(run, enabled=True)
        self._replies = replies
        self._examples = examples
        self._loss_sum = 0.0
        self._step = self._first_step = 0
        self._watch = Stopwatch()
        self._read = (0.0, 0.0)

    def rewind(self, stage: str, step: int, validated: bool = True) -> None:
        """Called right before the first step: waits for the first request."""
        super().rewind(stage, step, validated)
        self._replies.ready()
        self._pause()

    def _pause(self) -> None:
        if not self._replies.wait():
            raise EnoughEpochs
        self._loss_sum, self._first_step = 0.0, self._step
        self._watch = Stopwatch()

    def write(self, stage: str, step: int, **values: Any) -> None:
        """Adds a record; that of a validation ends the epoch."""
        super().write(stage, step, **values)
        if values.get("split") != "valid":
            self._loss_sum += (step - self._step) * float(values["loss"])
            self._step, self._read = step, self._watch.read()
            return
        # The checkpoint between the last step and the validation counts toward no epoch.
        seconds, processor_seconds = self._read
        self._replies.done(
            Epoch(
                examples=self._examples,
                seconds=seconds,
                processor_seconds=processor_seconds,
                loss=self._loss_sum / (self._step - self._first_step),
                ndcg=values["ndcg@20"],
                validated=values["count"],
            )
        )
        self._pause()


def main(argv: Sequence[str]) -> None:
    """Trains one epoch for each request."""
    replies = Replies()
    parser = make_parser(
        "benchmarks.session_trainer", "Trains stage sbr, pausing between epochs.", "--dataset dataset --output run"
    )
    parser.add_argument("--dataset", type=LocalPath, required=True, help="Prepared data set.")
    parser.add_argument("--output", type=LocalPath, required=True, help="Run folder.")
    add_config_arguments(parser)
    arguments, config = parse_with_config(parser, argv)
    request = RunRequest(config, Path(arguments.dataset), Path(arguments.output), STAGE, resume=False)
    checked = check_run(request)
    with process_group(config.runtime) as world:
        request.output.mkdir(parents=True)
        metrics = PausingLogger(request.output, replies, checked.dataset.manifest.num_examples["train"])
        with suppress(EnoughEpochs):
            run_stage(STAGE, RunContext.of(request, checked, world, metrics, StopSignals(config.runtime.grace_s)))
            replies.ended()
        metrics.close()


if __name__ == "__main__":
    run_cli(main)
