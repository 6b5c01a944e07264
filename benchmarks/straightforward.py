"""LLMGR implemented as public LLM recommenders are: what the benchmarks of tuning and scoring compare with.

Each session has a prompt of its own, with the instruction in it. A loop over the batch concatenates its pieces, prompts
are padded to the longest, and transformers and PEFT encode them without changes. A prompt has one target, the scores of
the whole catalog are one matrix, and the loss is torch's cross-entropy.

Shapes: B sessions, T tokens of the longest prompt, V items, D = d1 columns, H = d2 hidden width.
"""

import warnings
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.prompt_templates import Task
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.prompts import CompiledPrompt
from llmgr_rec.modules.recommender import RecommenderOutput
from llmgr_rec.modules.tasks import AlignTask, BehaveTask, LossAndParts


class PlainLanguageModel(nn.Module):
    """A decoder with PEFT's LoRA on padded batches.

    Args:
        decoder: The bare pre-trained decoder.
        like: PEFT settings, and the names and values of the LoRA weights, of the model to compare with.
    """

    def __init__(self, decoder: PreTrainedModel, like: Any) -> None:
        super().__init__()
        theirs = like.peft_config["default"]
        settings = LoraConfig(
            r=theirs.r,
            lora_alpha=theirs.lora_alpha,
            lora_dropout=theirs.lora_dropout,
            target_modules=theirs.target_modules,
        )
        decoder.requires_grad_(False)
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 for an attribute by its former name.
            warnings.simplefilter("ignore", FutureWarning)
            self.decoder = get_peft_model(decoder, settings)
        self.decoder.load_state_dict(like.state_dict())

    @property
    def base(self) -> PreTrainedModel:
        """The transformers decoder."""
        return self.decoder.base_model.model

    @property
    def token_embedding(self) -> nn.Module:
        """The frozen token embedding."""
        return self.base.get_input_embeddings()

    @property
    def hidden_size(self) -> int:
        """Hidden width H."""
        return self.base.config.hidden_size

    def forward(self, inputs_BTH: Tensor, lengths_B: Tensor) -> Tensor:
        """Hidden state of each prompt's last token, float32 [B, H]."""
        mask_BT = torch.arange(inputs_BTH.shape[1]) < lengths_B.unsqueeze(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.base.dtype == torch.bfloat16):
            hidden_BTH = self.base(
                inputs_embeds=inputs_BTH, attention_mask=mask_BT.long(), use_cache=False
            ).last_hidden_state
        return hidden_BTH[torch.arange(lengths_B.numel()), lengths_B - 1].float()


class StraightforwardLLMGR(LLMGR):
    """LLMGR whose prompts are concatenated in a loop and padded."""

    def encode_nodes(
        self, output: RecommenderOutput, nodes: Jagged, text: Jagged, task: Task, pass_offsets_P1: Tensor | None = None
    ) -> Tensor:
        """Hidden states, float32 [B, H]; `pass_offsets_P1` is ignored, because each session has its own prompt."""
        prompt: Any = self.prompts[task]
        vectors_ND = output.rows_ND if self.node_source == "table" else output.states_ND
        embed = self.language_model.token_embedding
        prompts = []
        for session in range(nodes.num_rows):
            shown = nodes.values[nodes.offsets[session] : nodes.offsets[session + 1]]
            soft_SH = self.adapter.project(output.sessions_BD[session : session + 1], vectors_ND[shown])
            pieces = [self._piece(prompt, segment, soft_SH, text, session) for segment in prompt.segments]
            pieces.insert(0, embed(prompt.prefix_P))
            prompts.append(torch.cat([piece.to(pieces[0].dtype) for piece in pieces]))
        lengths_B = torch.tensor([len(tokens) for tokens in prompts])
        return self.language_model(nn.utils.rnn.pad_sequence(prompts, batch_first=True), lengths_B)

    def _piece(self, prompt: CompiledPrompt, segment: str, soft_SH: Tensor, text: Jagged, session: int) -> Tensor:
        if segment == "graph":
            return soft_SH[:1]
        if segment == "nodes":
            return soft_SH[1:]
        if segment == "text":
            return self.language_model.token_embedding(text.values[text.offsets[session] : text.offsets[session + 1]])
        return self.language_model.token_embedding(prompt.get_buffer(segment))

    @classmethod
    def like(cls, model: LLMGR, decoder: PreTrainedModel) -> "StraightforwardLLMGR":
        """A copy of a model, with the same weights.

        Args:
            model: The model.
            decoder: A fresh copy of its bare decoder.
        """
        copy = cls.__new__(cls)
        nn.Module.__init__(copy)
        for name in ("node_source", "node_order", "max_nodes", "recommender", "text_tables"):
            setattr(copy, name, getattr(model, name))
        # Copies of what trains; tables and encoder are frozen and can be shared.
        for name in ("adapter", "head", "prompts"):
            setattr(copy, name, deepcopy(getattr(model, name)))
        for name in ("item_rows_VD", "rows_VD", "text_VH"):
            copy.register_buffer(name, getattr(model, name), persistent=False)
        copy.language_model = PlainLanguageModel(  # type: ignore[assignment]
            decoder, model.language_model.decoder
        )
        return copy


class PlainBehaveTask(BehaveTask):
    """Stage 2 with one matrix of scores."""

    def forward(self, batch: SessionBatch) -> LossAndParts:
        """Loss of a batch, and its parts without gradient."""
        output = self.llmgr.look_up(batch)
        loss = _cross_entropy(self.llmgr, output, self.llmgr.encode(output, batch, "behave"), batch)
        return loss, {"loss": loss.detach()}


class PlainAlignTask(AlignTask):
    """Stage 1 with one matrix of scores."""

    def forward(self, batch: SessionBatch) -> LossAndParts:
        """Loss of a batch, and its parts without gradient."""
        output = self.llmgr.look_up(batch)
        context = _cross_entropy(self.llmgr, output, self.llmgr.encode(output, batch, "align"), batch)
        loss = context + self.contrastive_weight * self._structure(output, batch)
        return loss, {"loss": loss.detach()}


def _cross_entropy(llmgr: LLMGR, output: RecommenderOutput, hidden_BH: Tensor, batch: SessionBatch) -> Tensor:
    trained = slice(llmgr.head.head_columns if llmgr.head.separate_loss else None)
    scores_BV = llmgr.queries(output, hidden_BH)[:, trained] @ llmgr.items(output, batch)[:, trained].T
    if batch.log_q_C.numel():
        # Items without training clicks have no part in the softmax.
        scores_BV = scores_BV - batch.log_q_C
    return functional.cross_entropy(scores_BV, batch.targets_B)
