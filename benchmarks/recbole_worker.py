"""RecBole's side of the comparison: its own data loader, model and trainer, one epoch at a time.

It runs in the environment of RecBole, as `python -m benchmarks.recbole_worker SETTINGS.json`. Nothing of RecBole is
changed: `_train_epoch` is the method that its `Trainer.fit` calls.

Shapes: B validation examples, L clicks, V items with the padding item 0, K items of a ranked list.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.turns_protocol import Epoch, Replies, Stopwatch


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
        watch = Stopwatch()
        loss = trainer._train_epoch(train_data, number, show_progress=False)
        seconds, processor_seconds = watch.read()
        numpy.save(settings["rankings"], rank(model, valid_data, dataset, settings["k"], settings["exclude_seen"]))
        replies.done(
            Epoch(
                examples=len(train_data.dataset),
                seconds=seconds,
                processor_seconds=processor_seconds,
                loss=loss / len(train_data),
                rankings=settings["rankings"],
            )
        )
        number += 1


def rank(model: Any, valid_data: Any, dataset: Any, k: int, exclude_seen: bool) -> Any:
    """Items ranked first for each validation example, by their index in the catalog, [B, K]."""
    import numpy
    import torch

    # Tokens are numbers: of items their index, of validation examples their row.
    index_V = numpy.array([-1, *map(int, dataset.field2id_token["item_id"][1:])])
    ids_BK = numpy.full((len(valid_data.dataset), k), -1)
    model.eval()
    with torch.no_grad():
        for examples, *_ in valid_data:
            scores_BV = model.full_sort_predict(examples).view(len(examples), -1)
            scores_BV[:, 0] = -torch.inf
            if exclude_seen:
                scores_BV.scatter_(1, examples["item_id_list"], -torch.inf)
            best = scores_BV.topk(k)
            ranked_BK = index_V[best.indices.masked_fill(best.values.isinf(), 0).numpy()]
            rows_B = dataset.id2token("session_id", examples["session_id"]).astype(int)
            ids_BK[rows_B] = ranked_BK
    return ids_BK


if __name__ == "__main__":
    main(sys.argv[1:])
