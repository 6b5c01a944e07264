"""From settings and files to models and collators: the one place where both come together."""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from llmgr_rec.config import Config, StageName
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.collate import (
    CandidateItems,
    CandidateSource,
    Collator,
    LastItemsText,
    PromptText,
    RandomNodeText,
    TextPlace,
)
from llmgr_rec.data.item_text import shuffle_texts, tokenize_items
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.pretrained import load_decoder, load_tokenizer, weights_hash
from llmgr_rec.data.prompt_files import Task, load_templates
from llmgr_rec.data.random_weights import draw_decoder, drawn_weights_hash
from llmgr_rec.data.session_texts import closed
from llmgr_rec.modules.build import build_llmgr, build_recommender
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.prompts import CompiledPrompt, compile_prompt
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.text_reader import TextReader
from llmgr_rec.stage_config import TrainableGroup

Purpose = Literal[StageName, "rank"]

# Stands between two item texts in a prompt.
_TEXT_SEPARATOR = "; "
# Closes an item's text where sessions are read as text.
_TEXT_END = "\n"


def assemble_recommender(
    config: Config,
    catalogue: Catalogue,
    tables_device: torch.device | str = "cpu",
    reads_sessions: bool = False,
    device: torch.device | None = None,
) -> SessionRecommender:
    """The session recommender for a catalogue; see `build_recommender`.

    Args:
        config: All settings.
        catalogue: Items.
        tables_device: Where tables are made; `meta` leaves the memory to the sharder.
        reads_sessions: Whether a text encoder reads sessions as text beside the session encoder.
        device: Where the text encoder is made; None takes the CPU.
    """
    text_encoder = assemble_reader(config, catalogue, device or torch.device("cpu")) if reads_sessions else None
    return build_recommender(config, catalogue.num_items, catalogue.num_embeddings, tables_device, text_encoder)


def assemble_reader(config: Config, catalogue: Catalogue, device: torch.device) -> TextReader:
    """The reader of sessions as text, not whitened yet; its weights are float32 wherever it computes.

    Raises:
        UserError: Its language model is not to be had, or an item has no text.
    """
    decoder = assemble_decoder(replace(config, llm=replace(config.llm, dtype="float32")), device)
    if config.llm.recompute:
        decoder.activation_checkpointing_enable({"use_reentrant": False})
    end = load_tokenizer(config.llm.name_or_path)(_TEXT_END, add_special_tokens=False)["input_ids"]
    texts = closed(item_tokens(config, catalogue), end[-1])
    return TextReader(decoder, texts, config.text.dim, config.text.clicks, config.text.dropout).to(device)


def assemble_decoder(config: Config, device: torch.device) -> PreTrainedModel:
    """The bare decoder of the settings, on a device: pre-trained, or drawn afresh where that control is on.

    Raises:
        UserError: It is not to be had.
    """
    llm = config.llm
    if config.controls.random_llm:
        return draw_decoder(llm.name_or_path, llm.num_layers, llm.dtype, device, config.seed)
    return load_decoder(llm.name_or_path, llm.num_layers, llm.dtype, device)


def decoder_hash(config: Config) -> str:
    """Hash that tells the weights of `assemble_decoder` from others, whatever layers are kept of them.

    Raises:
        UserError: They are not to be had.
    """
    if config.controls.random_llm:
        return drawn_weights_hash(config.llm.name_or_path, config.seed)
    return weights_hash(config.llm.name_or_path)


def assemble_llmgr(
    config: Config,
    catalogue: Catalogue,
    decoder: PreTrainedModel,
    trainable: Collection[TrainableGroup] = (),
    tables_device: torch.device | str = "cpu",
) -> LLMGR:
    """The whole model for a catalogue; see `build_llmgr`.

    Args:
        config: All settings.
        catalogue: Items.
        decoder: From `assemble_decoder`; LoRA layers are put into it.
        trainable: Parameter groups that train.
        tables_device: Where tables are made; `meta` leaves the memory to the sharder.
    """
    return build_llmgr(
        config,
        catalogue.num_items,
        catalogue.num_embeddings,
        decoder,
        compile_prompts(config),
        trainable,
        tables_device,
    )


def compile_prompts(config: Config) -> dict[Task, CompiledPrompt]:
    """The settings' prompts as token ids.

    Raises:
        UserError: Template file or tokenizer are not usable.
    """
    tokenizer = load_tokenizer(config.llm.name_or_path)
    return {
        task: compile_prompt(template, tokenizer, with_text=task != "behave" or config.prompt.text_items > 0)
        for task, template in load_templates(config.prompt.templates).items()
    }


def item_tokens(config: Config, catalogue: Catalogue) -> Jagged:
    """Token ids of every item's text, or of another one's where that control is on, [V] rows.

    Raises:
        UserError: An item has no text.
    """
    tokenizer = load_tokenizer(config.llm.name_or_path)
    tokens = tokenize_items(catalogue, tokenizer, list(config.prompt.text_fields), config.prompt.max_text_tokens)
    return shuffle_texts(tokens, config.seed) if config.controls.shuffled_text else tokens


def make_collator(
    config: Config, catalogue: Catalogue, purpose: Purpose, language: bool, tokens: Jagged | None = None
) -> Collator:
    """The collator that makes a stage's batches.

    Args:
        config: All settings.
        catalogue: Items.
        purpose: A training stage, or ranking (no candidates: item vectors are made elsewhere).
        language: Whether a language model reads the batch.
        tokens: From `item_tokens`, where they are at hand; made when needed.
    """
    num_draws = config.text.drawn_items if purpose == "text" else config.loss.sampled_items
    return Collator(
        _controlled(config, catalogue),
        config.tables.side_features,
        CandidateItems(_candidate_source(config, catalogue, purpose), num_draws),
        _prompt_text(config, catalogue, text_place(config, purpose, language), tokens),
        config.seed,
    )


def _prompt_text(config: Config, catalogue: Catalogue, place: TextPlace, tokens: Jagged | None) -> PromptText | None:
    if place == "none":
        return None
    tokens = item_tokens(config, catalogue) if tokens is None else tokens
    if place == "random_node":
        return RandomNodeText(tokens, config.prompt.max_nodes)
    separator = load_tokenizer(config.llm.name_or_path)(_TEXT_SEPARATOR, add_special_tokens=False)["input_ids"]
    return LastItemsText(tokens, config.prompt.text_items, separator)


def _controlled(config: Config, catalogue: Catalogue) -> Catalogue:
    """The catalogue, or one in which items have the words of others where that control is on."""
    if not config.controls.shuffled_words or "word" not in catalogue.features:
        return catalogue
    words = shuffle_texts(catalogue.features["word"], config.seed)
    return replace(catalogue, features={**catalogue.features, "word": words})


def text_place(config: Config, purpose: Purpose, language: bool) -> TextPlace:
    """What stands at the text place of a batch's prompts.

    Args:
        config: All settings.
        purpose: A training stage, or ranking.
        language: Whether a language model reads the batch.
    """
    if purpose == "align":
        return "random_node"
    return "last_items" if language and config.prompt.text_items else "none"


def caches_catalogue(config: Config, num_items: int, stage: Purpose) -> bool:
    """Whether a stage keeps all item vectors' inputs at hand: a small catalogue whose tables are frozen."""
    trained = set(getattr(config, stage).trainable)
    return (
        stage in ("align", "behave")
        and not trained & {"tables", "encoder"}
        and num_items <= config.loss.full_softmax_max_items
    )


def _candidate_source(config: Config, catalogue: Catalogue, purpose: Purpose) -> CandidateSource:
    if purpose == "rank":
        return "none"
    if caches_catalogue(config, catalogue.num_items, purpose):
        return "cached"
    # The text encoder reads every candidate.
    most = config.text.drawn_items if purpose == "text" else config.loss.full_softmax_max_items
    return "full" if catalogue.num_items <= most else "sampled"
