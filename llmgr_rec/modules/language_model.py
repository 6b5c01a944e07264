"""The LoRA-tuned decoder that reads prompts, and its frozen reading of item texts.

Shapes: B prompts, P tokens of the shared prefix, T tokens of the longest prompt after it, V items, H = d2 hidden width.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.modules.grouped_attention import use_grouped_attention
from llmgr_rec.modules.lora_layers import fuse_lora


class LoraLanguageModel(nn.Module):
    """A causal decoder without output head, frozen but for LoRA on all its linear layers.

    LoRA weights are kept in float32, whose resolution small updates need; with a bfloat16 base they are rounded on use
    (autocast rounds each once a step), so that every product runs in bfloat16.

    Args:
        decoder: The bare pre-trained decoder; it is changed in place.
        rank: Rank of the LoRA matrices.
        alpha: Numerator of the LoRA scale alpha / rank.
        dropout: Dropout on the LoRA input, 0 to 1.
        share_prefix: Encode the prompts' common prefix once for the batch. Both ways agree, but for dropout: a shared
            prefix draws its dropout once.
    """

    def __init__(
        self, decoder: PreTrainedModel, rank: int, alpha: float, dropout: float, share_prefix: bool = True
    ) -> None:
        super().__init__()
        decoder.requires_grad_(False)
        use_grouped_attention(decoder)
        linear_layers = [name for name, module in decoder.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
        settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=linear_layers)
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 for an attribute by its former name.
            warnings.simplefilter("ignore", FutureWarning)
            # It finds out by itself that GPT-2 stores its weights transposed.
            warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
            self.decoder: PeftModel = get_peft_model(decoder, settings)
        self.share_prefix = share_prefix
        fuse_lora(self.decoder)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers decoder, with LoRA layers in it."""
        return self.decoder.base_model.model

    @property
    def token_embedding(self) -> nn.Module:
        """The frozen token embedding."""
        return self.base.get_input_embeddings()

    @property
    def hidden_size(self) -> int:
        """Hidden width H."""
        return self.base.config.get_text_config(decoder=True).hidden_size

    def forward(self, embeddings_BTH: Tensor, lengths_B: Tensor, prefix_P: Tensor) -> Tensor:
        """Reads prompts: the hidden state of each prompt's last token.

        Args:
            embeddings_BTH: Input embeddings after the prefix, padded on the right.
            lengths_B: Tokens of each prompt after the prefix, at least 1.
            prefix_P: Token ids that all prompts start with.

        Returns:
            Hidden states after the final norm, float32 [B, H].
        """
        with self._precision():
            if self.share_prefix and prefix_P.numel():
                hidden_BTH = self._read_after_prefix(embeddings_BTH, prefix_P)
                last_B = lengths_B - 1
            else:
                hidden_BTH = self._read_whole(embeddings_BTH, lengths_B, prefix_P)
                last_B = prefix_P.numel() + lengths_B - 1
        rows_B = torch.arange(last_B.numel(), device=last_B.device)
        return hidden_BTH[rows_B, last_B].float()

    def _read_whole(self, embeddings_BTH: Tensor, lengths_B: Tensor, prefix_P: Tensor) -> Tensor:
        """The plain reference: every prompt with its own copy of the prefix and an explicit padding mask."""
        prefix_BPH = self.token_embedding(prefix_P).unsqueeze(0).expand(embeddings_BTH.shape[0], -1, -1)
        inputs = torch.cat([prefix_BPH, embeddings_BTH], dim=1)
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        mask = positions < (lengths_B + prefix_P.numel()).unsqueeze(1)
        return self.base(
            inputs_embeds=inputs, attention_mask=mask.long(), position_ids=positions.unsqueeze(0), use_cache=False
        ).last_hidden_state

    def _read_after_prefix(self, embeddings_BTH: Tensor, prefix_P: Tensor) -> Tensor:
        """Keys and values of the prefix are computed once and stand before each prompt's own.

        Padding needs no mask: it is to the right of everything that is read, where causal attention does not look.
        """
        batch, width = embeddings_BTH.shape[:2]
        cache = DynamicCache()
        self.base(inputs_embeds=self.token_embedding(prefix_P).unsqueeze(0), past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys = layer.keys.expand(batch, -1, -1, -1)
            layer.values = layer.values.expand(batch, -1, -1, -1)
        past = prefix_P.numel()
        positions = torch.arange(past, past + width, device=embeddings_BTH.device)
        visible = torch.arange(past + width, device=embeddings_BTH.device) <= positions.unsqueeze(1)
        return self.base(
            inputs_embeds=embeddings_BTH,
            attention_mask=visible[None, None],
            position_ids=positions.unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def _precision(self) -> AbstractContextManager[object]:
        dtype = self.base.dtype
        if dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.base.device.type, dtype=dtype)


def mean_embedding_norm(decoder: PreTrainedModel) -> float:
    """Mean Euclidean norm of the token embeddings, to which soft tokens are scaled."""
    return float(decoder.get_input_embeddings().weight.detach().float().norm(dim=1).mean())


@torch.no_grad()
def encode_item_texts(
    decoder: PreTrainedModel,
    tokens: Jagged,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Text encodings of items: the decoder's hidden states, averaged over the text's tokens.

    Items are read in order of length, so hardly any padding is computed.

    Args:
        decoder: The bare pre-trained decoder.
        tokens: Token ids, one row an item.
        batch_size: Items read at a time.
        progress: Called with the number of items done after each batch.

    Returns:
        Encodings, float32 on the CPU, [V, H]; zeros for items without tokens. See `standardise_encodings`.
    """
    device = decoder.device
    lengths_V = tokens.lengths
    encodings_VH = torch.zeros(tokens.num_rows, decoder.get_input_embeddings().weight.shape[1])
    order = torch.argsort(lengths_V, stable=True)
    order = order[lengths_V[order] > 0]
    for items in order.split(batch_size):
        batch = tokens.select(items)
        row_S = batch.row_of_value
        column_S = torch.arange(row_S.numel()) - batch.offsets[:-1][row_S]
        ids = torch.zeros(items.numel(), int(batch.lengths.max()), dtype=torch.int64)
        ids[row_S, column_S] = batch.values
        hidden = decoder(input_ids=ids.to(device), use_cache=False).last_hidden_state.float().cpu()
        # Padding stands to the right, where causal attention does not look: it only has to be left out of the mean.
        sums = torch.zeros(items.numel(), hidden.shape[2]).index_add_(0, row_S, hidden[row_S, column_S])
        encodings_VH[items] = sums / batch.lengths.unsqueeze(1)
        if progress is not None:
            progress(items.numel())
    return encodings_VH


def standardise_encodings(encodings_VH: Tensor) -> Tensor:
    """Centres text encodings on the catalogue's mean and scales them to a root mean square norm of 1.

    Hidden states of a decoder are anisotropic: they share a large common direction, so raw ones all look alike to a dot
    product and the differences that tell items apart are lost. Items without text (zeros) stay at the mean, zero.

    Args:
        encodings_VH: Encodings as `encode_item_texts` gives them.

    Returns:
        Encodings of the same shape.
    """
    has_text_V = encodings_VH.any(dim=1)
    if not has_text_V.any():
        return encodings_VH
    centred_VH = (encodings_VH - encodings_VH[has_text_V].mean(dim=0)) * has_text_V.unsqueeze(1)
    scale = centred_VH[has_text_V].square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
    return centred_VH / scale
