"""Builds models and collators from settings and files. Training, planning and bundle loading use a `ModelFactory`."""

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import torch

from llmgr_rec.config import Config, StageName
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.collate import CandidateItems, Collator, LastItemsText, PromptText, RandomNodeText
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.prompt_templates import Task, load_templates
from llmgr_rec.data.session_tokens import append_token
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.model_spec import LanguageParts, ModelSpec, Purpose
from llmgr_rec.modules.prompts import CompiledPrompt, compile_prompt
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage.cached_tokens import cached_item_tokens
from llmgr_rec.storage.model_folder import one_line_errors
from llmgr_rec.storage.number_format import resolve_dtype
from llmgr_rec.storage.pretrained import (
    RANDOM_TINY,
    decoder_config,
    load_decoder,
    load_tokenizer,
    pretrained_folder,
    weights_hash,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Separates item texts in a prompt.
_TEXT_SEPARATOR = "; "
# Ends each item text in the sequences of the text sequence encoder.
_TEXT_END = "\n"


class ModelFactory:
    """Builds the model of a stage with its language model, prompts and collators. Experiments override parts of it."""

    @property
    def name(self) -> str:
        """Name of a subclass, stored in bundles. A bundle can only be loaded by a factory of the same name."""
        return ""

    def spec(self, stage: StageName, config: Config, catalog: Catalog) -> ModelSpec:
        """Spec of the model of a stage, for a catalog."""
        return ModelSpec(stage, config, catalog.num_items, catalog.num_embeddings)

    def build(
        self, spec: ModelSpec, language: LanguageParts | None, tables_device: torch.device | str
    ) -> SessionRecommender | LLMGR:
        """Builds the model with initial weights; see `ModelSpec.build`."""
        return spec.build(language, tables_device)

    def language_parts(self, spec: ModelSpec, catalog: Catalog, device: torch.device) -> LanguageParts | None:
        """Loads the parts of a language model that the model needs; None if it has no language model.

        Args:
            spec: Spec of the model.
            catalog: The items.
            device: Device of the decoder.

        Raises:
            UserError: Weights, tokenizer or templates are not available, or an item has no text.
        """
        config = spec.config
        if not spec.has_language_model:
            return None
        if spec.encodes_prompts:
            decoder = self.decoder(config, device)
            return LanguageParts(decoder, self.prompts(config), Jagged.empty(spec.num_items))
        # All of its weights train, so they are float32; on a GPU, autocast still computes in bfloat16.
        decoder = self.decoder(replace(config, llm=replace(config.llm, dtype="float32")), device)
        end = load_tokenizer(config.llm.name_or_path)(_TEXT_END, add_special_tokens=False)["input_ids"]
        return LanguageParts(decoder, {}, append_token(self.item_tokens(config, catalog), end[-1]))

    def decoder(self, config: Config, device: torch.device) -> "PreTrainedModel":
        """Loads the pre-trained decoder without output head.

        Raises:
            UserError: It is not available.
        """
        llm = config.llm
        return load_decoder(llm.name_or_path, llm.num_layers, llm.dtype, device)

    def decoder_hash(self, config: Config) -> str:
        """Hash of the weights of all decoder layers, independent of `llm.num_layers`.

        Raises:
            UserError: They are not available.
        """
        return weights_hash(config.llm.name_or_path)

    def prompts(self, config: Config) -> dict[Task, CompiledPrompt]:
        """Compiles the prompt of each task to token ids.

        Raises:
            UserError: The template file or the tokenizer is not available.
        """
        tokenizer = load_tokenizer(config.llm.name_or_path)
        return {
            task: compile_prompt(template, tokenizer, with_text=task != "behave" or config.prompt.text_items > 0)
            for task, template in load_templates(config.prompt.templates).items()
        }

    def item_tokens(self, config: Config, catalog: Catalog) -> Jagged:
        """Token ids of the text of each item, V rows.

        Raises:
            UserError: An item has no text.
        """
        prompt = config.prompt
        return cached_item_tokens(catalog, config.llm.name_or_path, list(prompt.text_fields), prompt.max_text_tokens)

    def collator(
        self, spec: ModelSpec, catalog: Catalog, purpose: Purpose, item_tokens: Jagged | None = None
    ) -> Collator:
        """Builds the collator for the batches of a model.

        Args:
            spec: Spec of the model.
            catalog: The items.
            purpose: `train`, or `rank` for batches without candidates.
            item_tokens: Result of `item_tokens`, if available; None computes it when needed.

        Raises:
            UserError: The prompts show item text and an item has none.
        """
        return Collator(
            catalog,
            spec.config.tables.side_features,
            CandidateItems(spec.candidates(purpose), spec.num_negatives),
            self._prompt_text(spec, catalog, purpose, item_tokens),
            spec.config.seed,
            longest_nodes=spec.stage == "sbr",
        )

    def _prompt_text(
        self, spec: ModelSpec, catalog: Catalog, purpose: Purpose, item_tokens: Jagged | None
    ) -> PromptText | None:
        config, source = spec.config, spec.prompt_text_source(purpose)
        if source == "none":
            return None
        tokens = self.item_tokens(config, catalog) if item_tokens is None else item_tokens
        if source == "random_node":
            return RandomNodeText(tokens, config.prompt.max_nodes)
        separator = load_tokenizer(config.llm.name_or_path)(_TEXT_SEPARATOR, add_special_tokens=False)["input_ids"]
        return LastItemsText(tokens, config.prompt.text_items, separator)


def meta_language_parts(spec: ModelSpec) -> LanguageParts | None:
    """`ModelFactory.language_parts` on the meta device, without weights and texts, for planning.

    Raises:
        UserError: The configuration of the language model is not available.
    """
    llm = spec.config.llm
    if not spec.has_language_model:
        return None
    dtype = "float32" if spec.encodes_text else llm.dtype
    if llm.name_or_path == RANDOM_TINY:
        decoder = load_decoder(RANDOM_TINY, llm.num_layers, dtype).to("meta")
    else:
        settings = decoder_config(llm.name_or_path, llm.num_layers)
        folder = pretrained_folder(llm.name_or_path)
        from transformers import AutoModel

        fix = "give the folder of a model that transformers knows"
        with one_line_errors(folder, "configuration (config.json)", fix), torch.device("meta"):
            # The configuration of the folder may name another attention implementation, to be downloaded.
            decoder = AutoModel.from_config(settings, attn_implementation="sdpa", trust_remote_code=False)
        decoder = decoder.to(resolve_dtype(dtype))
    prompts = {task: CompiledPrompt([0], ["nodes", "graph"]) for task in get_args(Task)}
    with torch.device("meta"):
        texts = Jagged.empty(spec.num_items)
    return LanguageParts(decoder, prompts, texts, embedding_norm=1.0)
