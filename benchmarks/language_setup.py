"""Data and models of the LLMGR benchmarks: sessions, a model with nonzero LoRA weights, and its plain counterpart."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.straightforward import StraightforwardLLMGR
from datagen.synthetic import generate
from llmgr_rec.config import Config, DType, StageName
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.reader import SamplingOrder, SessionReader
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.param_groups import ParamGroup, select_trainable
from llmgr_rec.paths import LocalPath
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.number_format import resolve_dtype
from llmgr_rec.storage.table_io import init_tables
from llmgr_rec.training.text_embeddings import cache_catalog

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# The groups of stage behave. Stage align trains them here, too, so that its backward pass covers the whole model.
TRAINS: tuple[ParamGroup, ...] = ("adapter", "lora", "head")
CPU = torch.device("cpu")


def add_language_arguments(parser: "ArgumentParser") -> None:
    """Adds the arguments that select data, model and number format."""
    add_model_arguments(parser)
    parser.add_argument("--dtype", type=DType, default="float32", help="float32 or bfloat16, of both sides.")


def add_model_arguments(parser: "ArgumentParser") -> None:
    """Adds the arguments that select data and model."""
    parser.add_argument("--dataset", type=LocalPath, help="Folder made by llmgr_rec.prepare; default: one is made.")
    parser.add_argument("--llm", type=LocalPath, default="smollm2", help="Language model, as llm.name_or_path.")
    parser.add_argument(
        "--num_layers", type=int, default=4, help="Number of decoder layers kept, from the first; 0 keeps all."
    )
    parser.add_argument("--templates", type=LocalPath, default="compact", help="Prompts of both sides.")
    parser.add_argument("--batch_size", type=int, default=64, help="Sessions of a batch.")


def open_dataset(folder: str | None, work: str) -> Dataset:
    """The prepared data set, or a synthetic one of the size of Amazon Beauty.

    Args:
        folder: Folder made by llmgr_rec.prepare; None makes a synthetic data set.
        work: Folder for the synthetic data set.
    """
    if folder:
        return Dataset(Path(folder))
    root = Path(work)
    generate(root / "raw", sessions=4000, items=12000, mean_length=9)
    prepare_dataset(
        PrepareSettings(
            interactions=str(root / "raw" / "interactions.parquet"),
            items=str(root / "raw" / "items.parquet"),
            output=str(root / "dataset"),
            min_interactions=0,
            threads=1,
        )
    )
    return Dataset(root / "dataset")


def make_config(llm: str, num_layers: int, templates: str, dtype: DType, batch_size: int) -> Config:
    """Settings of both sides: no dropout, so that losses can be compared step by step."""
    config = Config()
    config.llm.name_or_path, config.llm.num_layers = llm, num_layers
    config.llm.dtype = config.loss.dtype = dtype
    config.llm.lora_dropout = config.encoder.dropout = 0.0
    config.prompt.templates = templates
    config.align.batch_size = config.behave.batch_size = batch_size
    return config


@dataclass
class Setup:
    """Data and the two models, whose weights are the same.

    Args:
        config: Settings.
        dataset: Prepared sessions.
        catalog: Their items.
        fast: The model of llmgr_rec.
        plain: The straightforward implementation.
    """

    config: Config
    dataset: Dataset
    catalog: Catalog
    fast: LLMGR
    plain: StraightforwardLLMGR

    @classmethod
    def make(cls, config: Config, dataset: Dataset) -> "Setup":
        """Fresh models; LoRA matrices and text encodings are nonzero, so that no gradient is zero."""
        torch.manual_seed(config.seed)
        catalog = Catalog.of(dataset)
        factory = ModelFactory()
        spec = factory.spec("behave", config, catalog)
        fast = factory.build(spec, factory.language_parts(spec, catalog, CPU), CPU)
        assert isinstance(fast, LLMGR)
        init_tables(fast, config.seed, config.tables.init_std)
        for name, parameter in fast.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)
        if fast.text_tables is not None:
            nn.init.normal_(fast.text_tables.embedding_bags["item_text"].weight)
        cache_catalog(fast, factory.collator(spec, catalog, "rank"), CPU, resolve_dtype(config.loss.dtype))
        plain = StraightforwardLLMGR.like(fast, factory.decoder(config, CPU))
        for model in (fast, plain):
            select_trainable(model, TRAINS)
            model.train()
        return cls(config, dataset, catalog, fast, plain)

    def batches(self, stage: StageName, count: int, one_pass: bool = False, skip: int = 0) -> list[SessionBatch]:
        """Training batches.

        Args:
            stage: Stage that they are for.
            count: Number of batches.
            one_pass: Whether a batch holds all prefixes of its sessions, encoded in one pass; otherwise each is an
                example.
            skip: Batches skipped at the start.
        """
        factory = ModelFactory()
        spec = factory.spec(stage, self.config, self.catalog)
        reader: SessionReader[SessionBatch] = SessionReader(
            self.dataset.parts("train"),
            num_items=self.catalog.num_items,
            collate=factory.collator(spec, self.catalog, "train"),
            order=SamplingOrder(
                self.config.behave.batch_size,
                shuffle=True,
                augment_prefixes=True,
                max_prefixes_per_pass=(self.fast.max_nodes or sys.maxsize) if one_pass else 0,
            ),
        )
        stream = reader.batches(0, skip)
        return [next(stream) for _ in range(count)]
