"""RecTools' side of the comparison: its own data loader, SASRecModel and Lightning trainer, one epoch at a time.

It runs in the environment of RecTools, as `python -m benchmarks.rectools_worker SETTINGS.json`. The model is trained by
`fit` in one go, which a callback of Lightning pauses between epochs. Nothing of RecTools is changed, except that the
model knows the whole catalog: its own data preparator would rank only the items that occur in training sessions. If
asked to, the worker also leaves out the scores at padding, which RecTools computes and then ignores in its loss.

Shapes: U sessions, L clicks of all of them, B sessions of a batch or examples of a split, S clicks of the longest
session, N targets of a batch, C candidates of a target, D columns, K items of a ranked list.
"""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pytorch_lightning as lightning
import torch
from rectools import Columns, __version__
from rectools.dataset import Dataset
from rectools.dataset.identifiers import IdMap
from rectools.models import SASRecModel
from rectools.models.nn.transformers.lightning import TransformerLightningModule
from rectools.models.nn.transformers.ligr import LiGRLayers
from rectools.models.nn.transformers.sasrec import SASRecDataPreparator

from benchmarks.turns_protocol import Epoch, Replies, Stopwatch


def main(argv: Sequence[str]) -> None:
    """Trains one epoch for each request."""
    replies = Replies()
    settings = json.loads(Path(argv[0]).read_text())
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(settings["threads"])
    lightning.seed_everything(settings["seed"])
    with np.load(settings["sessions"]) as arrays:
        sessions = interactions(arrays["train_items_L"], arrays["train_offsets_U1"])
        examples = {
            settings[name]: Dataset.construct(interactions(arrays[f"{split}_items_L"], arrays[f"{split}_offsets_B1"]))
            for split, name in (("valid", "rankings"), ("test", "test_rankings"))
            if settings[name]
        }
    model = SASRecModel(
        data_preparator_type=WholeCatalog,
        data_preparator_kwargs={"catalog_size": settings["items"]},
        **({"transformer_layers_type": LiGRLayers} if settings["ligr"] else {}),
        **({} if settings["padding"] else {"lightning_module_type": WithoutPadding}),
        **settings["model"],
    )
    pauses = Pauses(model, examples, replies, settings)
    model._trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        callbacks=[pauses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.fit(Dataset.construct(sessions))


def interactions(items_L: Any, offsets_U1: Any) -> pd.DataFrame:
    """Sessions as RecTools takes them, one user each."""
    users_L = np.repeat(np.arange(len(offsets_U1) - 1), np.diff(offsets_U1))
    return pd.DataFrame(
        {
            Columns.User: users_L,
            Columns.Item: items_L,
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(np.arange(len(items_L)), unit="s"),
        }
    )


class WholeCatalog(SASRecDataPreparator):
    """The data preparator of SASRecModel, with all items of the catalog in the item table.

    Args:
        catalog_size: Number of items of the catalog.
    """

    item_id_map: IdMap
    train_dataset: Dataset

    def __init__(self, catalog_size: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.catalog_size = catalog_size

    def process_dataset_train(self, dataset: Dataset) -> None:
        """Prepares the training data, then adds the other items behind those that occur in them."""
        super().process_dataset_train(dataset)
        known: Any = self.item_id_map.external_ids
        others = np.setdiff1d(np.arange(self.catalog_size), known[self.n_item_extra_tokens :].astype(int))
        items = IdMap(np.concatenate([known, others.astype(object)]))
        self.train_dataset = Dataset(self.train_dataset.user_id_map, items, self.train_dataset.interactions)
        self.item_id_map = items


class WithoutPadding(TransformerLightningModule):
    """The training of RecTools without the scores at padding: the same loss, from fewer products."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The mean loss of the targets of a batch."""
        is_target_BS = batch["y"] != 0
        item_embs = self.torch_model.item_model.get_all_embeddings()
        # The loss takes batches of sessions: all targets are one session.
        states_1ND = self.torch_model.encode_sessions(batch, item_embs)[is_target_BS][None]
        targets_1N, weights_1N = batch["y"][is_target_BS][None], batch["yw"][is_target_BS][None]
        candidates_1NC = None
        if self._requires_negatives:
            candidates_1NC = torch.cat([targets_1N[..., None], batch["negatives"][is_target_BS][None]], dim=-1)
        logits = self.torch_model.similarity_module(states_1ND, item_embs, candidates_1NC) / self.logits_t
        loss: torch.Tensor = self.loss_calculator(logits, targets_1N, weights_1N)
        self.log(self.train_loss_name, loss, on_step=False, on_epoch=True)
        return loss


class Pauses(lightning.Callback):
    """Waits for a request before each epoch, and ranks examples after it.

    Args:
        model: The model that is trained.
        examples: Examples to rank, one user each, by the file that gets the lists.
        replies: Sends epochs and waits for requests.
        settings: Contents of the settings file.
    """

    def __init__(
        self, model: SASRecModel, examples: dict[str, Dataset], replies: Replies, settings: dict[str, Any]
    ) -> None:
        self._model = model
        self._examples = examples
        self._replies = replies
        self._settings = settings
        self._started = False
        self._watch = Stopwatch()
        self._losses: list[float] = []

    def __deepcopy__(self, _: Any) -> Self:
        # `fit` trains with a deep copy of the trainer, but there is one pipe to the benchmark.
        return self

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Waits for the request."""
        if not self._started:
            self._started = True
            self._replies.ready(
                rectools=__version__,
                lightning=lightning.__version__,
                torch=torch.__version__,
                numpy=np.__version__,
                threads=torch.get_num_threads(),
                items=self._model.data_preparator.item_id_map.size - 1,  # one is padding
                parameters=sum(parameter.numel() for parameter in module.torch_model.parameters()),
            )
        if not self._replies.wait():
            sys.exit()
        self._watch = Stopwatch()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Sends the results."""
        seconds, processor_seconds = self._watch.read()
        for file, examples in self._examples.items():
            np.save(file, self._rank(examples))
        module.train()
        self._replies.done(
            Epoch(
                examples=self._settings["examples"],
                seconds=seconds,
                processor_seconds=processor_seconds,
                loss=float(trainer.callback_metrics["train_loss"]),
                rankings=self._settings["rankings"],
            )
        )

    def _rank(self, examples: Dataset) -> Any:
        """Items ranked first for each example, by their index in the catalog, [B, K]."""
        users, k = examples.user_id_map.external_ids, self._settings["k"]
        # Until `fit` returns, the model refuses to rank.
        self._model.is_fitted = True
        ranked = self._model.recommend(users, examples, k=k, filter_viewed=self._settings["exclude_seen"])
        ids_BK = np.full((len(users), k), -1)
        ids_BK[ranked[Columns.User].to_numpy(int), ranked[Columns.Rank].to_numpy(int) - 1] = ranked[Columns.Item]
        return ids_BK


if __name__ == "__main__":
    main(sys.argv[1:])
