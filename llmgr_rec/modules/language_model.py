"""The decoder with LoRA (Hu et al., arXiv 2106.09685) that encodes prompts, and frozen embeddings of item texts.

Shapes: P tokens of the shared prefix, X tokens of all prompts after it, Z = P + X, C outputs, T tokens of the longest
prompt or of the texts of a batch, B items of it, V items, H = d2 hidden width.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.kernels.fused_lora import fuse_lora
from llmgr_rec.kernels.grouped_query_attention import use_grouped_query_attention
from llmgr_rec.kernels.packed_attention import PackedMask
from llmgr_rec.kernels.prompt_packing import PackedPrompts
from llmgr_rec.kernels.row_padding import row_padding
from llmgr_rec.modules.packed_layer import use_packed_layers


class LoraLanguageModel(nn.Module):
    """A causal decoder without output head, frozen except for LoRA on all its linear layers.

    LoRA weights are float32, because small updates would be lost in bfloat16. With a bfloat16 decoder, autocast casts
    each of them once per step, so that all products run in bfloat16.

    Args:
        decoder: The pre-trained decoder without head; modified in place.
        rank: Rank of the LoRA matrices.
        alpha: Numerator of the LoRA scale alpha / rank.
        dropout: Dropout probability on the LoRA input, 0 to 1.
        recompute: Activation checkpointing: the backward pass recomputes each layer. Stores the activations of one
            layer instead of all, for about a third more computation.

    Attributes:
        packs_prompts: Whether the prompts of a batch are packed into one row with one copy of their common prefix.
            False if the decoder's attention cannot be replaced; then each output has a padded prompt. Both give the
            same result except for dropout, which is drawn once for shared tokens.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        rank: int,
        alpha: float,
        dropout: float,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        decoder.requires_grad_(False)
        self.packs_prompts = use_grouped_query_attention(decoder)
        self._last_token_only = self.packs_prompts and use_packed_layers(decoder)
        linear_layers = [name for name, module in decoder.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
        settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=linear_layers)
        with warnings.catch_warnings():
            # PEFT 0.21 uses a deprecated attribute name of transformers 5.
            warnings.simplefilter("ignore", FutureWarning)
            # PEFT itself detects the transposed weights of GPT-2, and warns of them.
            warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
            self.decoder: PeftModel = get_peft_model(decoder, settings)
        if recompute:
            decoder.activation_checkpointing_enable()
        fuse_lora(self.decoder)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers decoder with its LoRA layers."""
        return self.decoder.base_model.model

    @property
    def token_embedding(self) -> nn.Module:
        """The frozen token embedding."""
        return self.base.get_input_embeddings()

    def leave_out_lora(self) -> None:
        """Freezes LoRA and leaves its products and its dropout out; the result is the same while LoRA adds zero."""
        self.decoder.base_model.disable_adapter_layers()

    def embed(self, tokens_X: Tensor) -> Tensor:
        """Embeddings of tokens, [X, H]."""
        embeddings_XH: Tensor = self.token_embedding(tokens_X)
        return embeddings_XH

    @property
    def hidden_size(self) -> int:
        """Hidden width H."""
        return self.base.config.get_text_config(decoder=True).hidden_size

    def forward(self, embeddings_XH: Tensor, packed: PackedPrompts) -> Tensor:
        """Encodes packed prompts.

        Args:
            embeddings_XH: Input embeddings of the tokens after the prefix.
            packed: Layout of these tokens.

        Returns:
            Hidden state after the final norm at each output token, float32 [C, H].
        """
        with self._precision():
            if self.packs_prompts:
                return self._forward_packed(embeddings_XH, packed).float()
            return self._forward_padded(embeddings_XH, packed).float()

    def _forward_padded(self, embeddings_XH: Tensor, packed: PackedPrompts) -> Tensor:
        """A separate padded prompt for each output, prefix included."""
        prefix_PH = self.token_embedding(packed.prefix_P)
        paths = [packed.path(output) for output in range(packed.output_token_C.numel())]
        prompts = [torch.cat([prefix_PH, embeddings_XH[path]]) for path in paths]
        inputs_CTH = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        last_C = torch.tensor([len(prompt) - 1 for prompt in prompts], device=inputs_CTH.device)
        positions_T = torch.arange(inputs_CTH.shape[1], device=inputs_CTH.device)
        hidden_CTH = self.base(
            inputs_embeds=inputs_CTH,
            attention_mask=(positions_T <= last_C.unsqueeze(1)).long(),
            position_ids=positions_T.unsqueeze(0),
            use_cache=False,
        ).last_hidden_state
        return hidden_CTH[torch.arange(len(prompts), device=last_C.device), last_C]

    def _forward_packed(self, embeddings_XH: Tensor, packed: PackedPrompts) -> Tensor:
        """One row without padding and with one prefix; the last layer computes only the output tokens."""
        prefix, num_outputs = packed.prefix_P.numel(), packed.output_token_C.numel()
        tokens_X = torch.arange(packed.num_tokens, device=embeddings_XH.device)
        padding = self._padding(prefix + packed.num_tokens)
        masks = {"packed_mask": PackedMask.of(packed, tokens_X, padding, padding)}
        if self._last_token_only:
            masks["last_layer_mask"] = PackedMask.of(packed, packed.output_token_C, self._padding(num_outputs), padding)
        prefix_positions_P = torch.arange(prefix, device=tokens_X.device)
        padding_rows = embeddings_XH.new_zeros(padding, embeddings_XH.shape[1])
        hidden_1ZH = self.base(
            inputs_embeds=torch.cat([self.token_embedding(packed.prefix_P), embeddings_XH, padding_rows]).unsqueeze(0),
            position_ids=functional.pad(
                torch.cat([prefix_positions_P, prefix + packed.position_X]), (0, padding)
            ).unsqueeze(0),
            # transformers builds no mask if it is given a 4-dimensional one; packed attention uses the packed masks.
            attention_mask=embeddings_XH.new_zeros(1, 1, 1, 1),
            use_cache=False,
            **masks,
        ).last_hidden_state
        if self._last_token_only:
            return hidden_1ZH.squeeze(0)[:num_outputs]
        return hidden_1ZH.squeeze(0).index_select(0, prefix + packed.output_token_C)

    def _padding(self, rows: int) -> int:
        """Rows to add to the packed row, see `row_padding`."""
        return row_padding(rows, self.base.dtype, self.base.device)

    def _precision(self) -> AbstractContextManager[object]:
        dtype = self.base.dtype
        if dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.base.device.type, dtype=dtype)


def mean_embedding_norm(decoder: PreTrainedModel) -> float:
    """Mean Euclidean norm of the token embeddings, the scale of soft tokens."""
    return float(decoder.get_input_embeddings().weight.detach().float().norm(dim=1).mean())


@torch.no_grad()
def embed_item_texts(
    decoder: PreTrainedModel,
    tokens: Jagged,
    batch_size: int,
) -> Tensor:
    """Text embeddings of items: the model's last hidden states, averaged over the tokens of the text.

    A batch contains items of one length, so that there is no padding, to which an encoder would attend.

    Args:
        decoder: The pre-trained decoder without head, or an encoder.
        tokens: Token ids, one row per item.
        batch_size: Items per batch.

    Returns:
        Embeddings, float32 on the CPU, [V, H]; zeros for items without tokens.
    """
    device = decoder.device
    lengths_V = tokens.lengths
    embeddings_VH = torch.zeros(tokens.num_rows, decoder.get_input_embeddings().weight.shape[1])
    order = torch.argsort(lengths_V, stable=True)
    order = order[lengths_V[order] > 0]
    by_length = order.split(lengths_V[order].unique_consecutive(return_counts=True)[1].tolist()) if len(order) else ()
    for items in (batch for of_length in by_length for batch in of_length.split(batch_size)):
        ids_BT = tokens.select(items).values.view(items.numel(), -1)
        hidden_BTH = decoder(input_ids=ids_BT.to(device), use_cache=False).last_hidden_state
        embeddings_VH[items] = hidden_BTH.float().mean(dim=1).cpu()
    return embeddings_VH
