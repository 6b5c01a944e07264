"""Models from settings: one place that knows which setting goes into which constructor."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from llmgr_rec.config import Config, StageName
from llmgr_rec.data.prompt_files import Task
from llmgr_rec.modules.encoders import build_encoder, encoder_class
from llmgr_rec.modules.heads import build_head, head_class
from llmgr_rec.modules.hybrid import HybridEncoding
from llmgr_rec.modules.item_tables import ItemTables
from llmgr_rec.modules.item_text import text_tables
from llmgr_rec.modules.language_model import LoraLanguageModel, mean_embedding_norm
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.prompts import CompiledPrompt
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.tasks import AlignTask, BehaveTask, SbrTask, TextTask
from llmgr_rec.modules.text_reader import TextReader
from llmgr_rec.stage_config import TrainableGroup


def build_recommender(
    config: Config,
    num_items: int,
    num_embeddings: Mapping[str, int],
    tables_device: torch.device | str = "cpu",
    text_encoder: TextReader | None = None,
) -> SessionRecommender:
    """The session recommender with fresh weights that depend on the settings and their seed only.

    Args:
        config: All settings.
        num_items: Items of the catalogue.
        num_embeddings: Size of the vocabulary of each side feature that the catalogue has.
        tables_device: Where the item tables are made; `meta` leaves the memory to the sharder.
        text_encoder: Encodes sessions as text beside the session encoder; None leaves the recommender without one.

    Raises:
        UserError: Settings that do not go together.
    """
    with _seeded(config.seed):
        dim, device = config.tables.dim, torch.device(tables_device)
        wanted: list[str] = [name for name in config.tables.side_features if name in num_embeddings]
        sizes = {name: num_embeddings[name] for name in wanted}
        # First, because tables draw random numbers where they are not on meta.
        encoder = build_encoder(config.encoder, dim)
        text = text_tables(num_items, text_encoder.dim, device) if text_encoder else None
        return SessionRecommender(
            ItemTables(num_items, sizes, dim, device),
            encoder,
            config.encoder.score,
            config.encoder.temperature,
            text,
            text_encoder,
        )


def build_llmgr(
    config: Config,
    num_items: int,
    num_embeddings: Mapping[str, int],
    decoder: PreTrainedModel,
    prompts: Mapping[Task, CompiledPrompt],
    trainable: Collection[TrainableGroup] = (),
    tables_device: torch.device | str = "cpu",
    embedding_norm: float | None = None,
) -> LLMGR:
    """The whole model with fresh weights of its own beside the pre-trained decoder.

    Args:
        config: All settings.
        num_items: Items of the catalogue.
        num_embeddings: Size of the vocabulary of each side feature that the catalogue has.
        decoder: The pre-trained decoder; LoRA layers are put into it.
        prompts: A compiled prompt for each task that is used.
        trainable: Parameter groups that train.
        tables_device: Where item tables and text encodings are made; `meta` leaves the memory to the sharder.
        embedding_norm: Mean norm of the decoder's token embeddings; None computes it.

    Raises:
        UserError: Settings that do not go together.
    """
    recommender = build_recommender(config, num_items, num_embeddings, tables_device)
    norm = mean_embedding_norm(decoder) if embedding_norm is None else embedding_norm
    with _seeded(config.seed):
        llm = config.llm
        language_model = LoraLanguageModel(decoder, llm.lora_rank, llm.lora_alpha, llm.lora_dropout, llm.recompute)
        d1, d2 = config.tables.dim, language_model.hidden_size
        head = build_head(config.head, d1, d2, num_items)
        return LLMGR(
            recommender,
            HybridEncoding(d1, d2, norm, config.controls.no_graph, config.controls.no_nodes),
            language_model,
            head,
            prompts,
            text_tables(num_items, d2, torch.device(tables_device)) if reads_item_text(config) else None,
            config.prompt.node_source,
            config.prompt.node_order,
            config.prompt.max_nodes,
            trainable,
        )


def build_task(
    stage: StageName,
    model: SessionRecommender | LLMGR,
    config: Config,
    world_size: int = 1,
    loss_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """What a stage trains: its model with the loss around it.

    Args:
        stage: Stage.
        model: A recommender for the stages sbr and text, LLMGR for the others.
        config: All settings.
        world_size: Number of ranks, over which gradients are averaged.
        loss_dtype: Number format of the products with the items in a recommender's loss, see `ranking_loss`.

    Raises:
        ValueError: The stage does not train such a model.
    """
    if isinstance(model, SessionRecommender):
        if stage == "sbr":
            return SbrTask(model, world_size, loss_dtype, config.sbr.one_pass)
        if stage == "text":
            return TextTask(model, world_size, loss_dtype)
    elif stage == "align":
        align, weight = config.align, contrast_weight(config)
        return AlignTask(model, weight, align.contrastive_temperature, align.hard_negatives, world_size=world_size)
    elif stage == "behave":
        return BehaveTask(model, world_size, config.behave.one_pass)
    raise ValueError(f"stage {stage} does not train a {type(model).__name__}")


def contrast_weight(config: Config) -> float:
    """Weight of the structure-aware loss in stage align; 0 where a control leaves nothing to contrast."""
    told = not (config.controls.no_graph or config.controls.no_nodes)
    return config.align.contrastive_weight if told else 0.0


def check_parts(config: Config) -> None:
    """Refuses encoders and heads that are not there or cannot be built, before anything is built.

    Raises:
        UserError: A name or a setting of them is wrong.
    """
    encoder_class(config.encoder.name).check(config.encoder, config.tables.dim)
    head_class(config.head.name).check(config.head)


def reads_item_text(config: Config) -> bool:
    """Whether the head compares with text encodings of the items."""
    return head_class(config.head.name).reads_text(config.head)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Fresh weights are equal on all ranks and do not depend on what was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
