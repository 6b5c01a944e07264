"""RecBole's side of the comparison: its own data loader, model and trainer, one epoch at a time.

It runs in the environment of `recbole_environment`, as `python -m benchmarks.recbole_worker SETTINGS.json`. Nothing of
RecBole is changed: `_train_epoch` and `_valid_epoch` are the methods that its `Trainer.fit` alternates.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.turns_protocol import Epoch, Replies


def main(argv: Sequence[str]) -> None:
    """Trains one epoch for each request."""
    replies = Replies()
    settings = json.loads(Path(argv[0]).read_text())
    # RecBole reads the command line itself.
    sys.argv = sys.argv[:1]

    import numpy
    import torch
    from recbole import __version__
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    torch.set_num_threads(settings["threads"])
    config = Config(model=settings["model"], dataset=settings["dataset"], config_dict=settings["config"])
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train_data, valid_data, _ = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, train_data.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.eval_collector.data_collect(train_data)
    replies.ready(
        recbole=__version__,
        torch=torch.__version__,
        numpy=numpy.__version__,
        threads=torch.get_num_threads(),
        items=dataset.item_num - 1,  # the first is padding
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    number = 0
    while replies.wait():
        started = time.perf_counter()
        loss = trainer._train_epoch(train_data, number, show_progress=False)
        seconds = time.perf_counter() - started
        _, metrics = trainer._valid_epoch(valid_data, show_progress=False)
        replies.done(
            Epoch(
                examples=len(train_data.dataset),
                seconds=seconds,
                loss=loss / len(train_data),
                ndcg=float(metrics["ndcg@20"]),
                validated=len(valid_data.dataset),
            )
        )
        number += 1


if __name__ == "__main__":
    main(sys.argv[1:])
