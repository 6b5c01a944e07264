"""Controls: variants of a model with one part disabled or randomized, to measure the contribution of the part.

A control changes what the model factory builds; training, selection and evaluation are unchanged.

- `random_llm`: the language model has random weights; architecture and tokenizer are unchanged.
- `shuffled_text`: the language model encodes for each item the text of another item. Side features and text-kNN use the
  correct text.
- `shuffled_words`: the item tables use for each item the words of another item. Other uses of item text are correct.
- `no_graph`: the soft token at {graph} is the same learned vector for all sessions. A residual head still adds the
  session recommender's score.
- `no_nodes`: the soft tokens at {nodes} are the same learned vector for all items, so a prompt only shows the number of
  clicks.

With `no_graph` or `no_nodes`, set `contrast.weight` to 0, because equal tokens cannot be contrasted.
"""

import functools
import hashlib
from collections.abc import Collection

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
from llmgr_rec.storage.number_format import resolve_dtype
from llmgr_rec.storage.pretrained import decoder_config

CONTROLS = ("random_llm", "shuffled_text", "shuffled_words", "no_graph", "no_nodes")
# Controls that change the models without prompts; all of them change LLMGR.
_CONTROLS_OF_MODEL = {"sbr": {"shuffled_words"}, "llm_text": {"shuffled_words", "shuffled_text", "random_llm"}}
# Makes the random weights independent of other random numbers of the same seed, such as those of the adapter.
_SALT = 0x52616E64
# Number of weights per tensor that are hashed.
_SAMPLE = 64


def effective_controls(model: str, controls: Collection[str]) -> list[str]:
    """The controls that change a model, sorted.

    Args:
        model: One of `STAGES_OF_MODEL`.
        controls: Some of `CONTROLS`.
    """
    return sorted({*controls} & {*_CONTROLS_OF_MODEL.get(model, CONTROLS)})


def factory_of(model: str, controls: Collection[str]) -> ModelFactory:
    """The factory of a model with controls; a plain `ModelFactory` if none of them changes the model.

    Args:
        model: One of `STAGES_OF_MODEL`.
        controls: Some of `CONTROLS`.
    """
    effective = effective_controls(model, controls)
    return ControlledFactory(effective) if effective else ModelFactory()


class ControlledFactory(ModelFactory):
    """Builds models with parts disabled or randomized.

    Args:
        controls: Some of `CONTROLS`.
    """

    def __init__(self, controls: Collection[str]) -> None:
        self.controls = frozenset(controls)

    @property
    def name(self) -> str:
        """Names of the controls."""
        return ", ".join(sorted(self.controls))

    def build(
        self, spec: ModelSpec, language: LanguageParts | None, tables_device: torch.device | str
    ) -> SessionRecommender | LLMGR:
        """The model, with constant soft tokens under `no_graph` and `no_nodes`."""
        model = super().build(spec, language, tables_device)
        if isinstance(model, LLMGR) and self.controls & {"no_graph", "no_nodes"}:
            model.adapter = ConstantTokens(model.adapter, "no_graph" in self.controls, "no_nodes" in self.controls)
        return model

    def decoder(self, config: Config, device: torch.device) -> PreTrainedModel:
        """The decoder without head, with random weights under `random_llm`."""
        if "random_llm" not in self.controls:
            return super().decoder(config, device)
        llm = config.llm
        return draw_decoder(llm.name_or_path, llm.num_layers, llm.dtype, device, config.seed)

    def decoder_hash(self, config: Config) -> str:
        """Hash that identifies the weights of `decoder`."""
        if "random_llm" not in self.controls:
            return super().decoder_hash(config)
        return drawn_weights_hash(config.llm.name_or_path, config.seed)

    def item_tokens(self, config: Config, catalog: Catalog) -> Jagged:
        """Token ids of each item's text, shuffled between items under `shuffled_text`; one row per item."""
        tokens = super().item_tokens(config, catalog)
        return shuffle_texts(tokens, config.seed) if "shuffled_text" in self.controls else tokens

    def collator(
        self, spec: ModelSpec, catalog: Catalog, purpose: Purpose, item_tokens: Jagged | None = None
    ) -> Collator:
        """The collator of a model, with words shuffled between items under `shuffled_words`."""
        if "shuffled_words" in self.controls and "word" in catalog.features:
            words = shuffle_texts(catalog.features["word"], spec.config.seed)
            features = {**catalog.features, "word": words}
            catalog = Catalog(catalog.file, catalog.item_ids, catalog.train_count_V, features, catalog.domains)
        return super().collator(spec, catalog, purpose, item_tokens)


class ConstantTokens(ProjectionAdapter):
    """A projection adapter with constant graph or node tokens: the learned projection of a vector of ones.

    Number and names of its parameters are those of the adapter that it replaces.

    Args:
        adapter: Adapter whose parameters it takes.
        graph: Whether graph tokens are constant.
        nodes: Whether node tokens are constant.
    """

    def __init__(self, adapter: ProjectionAdapter, graph: bool, nodes: bool) -> None:
        nn.Module.__init__(self)
        self.nodes, self.graph, self.log_gain_2 = adapter.nodes, adapter.graph, adapter.log_gain_2
        self.register_buffer("embedding_norm", adapter.embedding_norm)
        self._constant_graph, self._constant_nodes = graph, nodes

    def project(self, graph_CD: Tensor, nodes_MD: Tensor) -> Tensor:
        """Computes the soft tokens; see `ProjectionAdapter.project`."""
        if self._constant_graph:
            graph_CD = torch.ones_like(graph_CD)
        if self._constant_nodes:
            nodes_MD = torch.ones_like(nodes_MD)
        return super().project(graph_CD, nodes_MD)


def shuffle_texts(tokens: Jagged, seed: int) -> Jagged:
    """Permutes the texts of the items that have one, in one random cycle, so that no item keeps its text.

    Items without text stay without text. A single text stays in place.

    Args:
        tokens: Token or word ids, one row per item.
        seed: Seed of the permutation.
    """
    with_text = torch.nonzero(tokens.lengths).flatten()
    order = with_text[torch.from_numpy(np.random.default_rng(seed).permutation(len(with_text)))]
    source_V = torch.arange(tokens.num_rows)
    source_V[order] = order.roll(1)
    return tokens.select(source_V)


def draw_decoder(
    name: str, num_layers: int = 0, dtype: str = "auto", device: str | torch.device = "cpu", seed: int = 0
) -> PreTrainedModel:
    """`load_decoder` with random weights from the initialization of the architecture.

    The weights are drawn in float32 on the CPU and then cast, so they do not depend on dtype and device. This needs the
    memory of float32 weights.

    Args:
        name: Local folder, hub id, `smollm2` or `random-tiny`.
        num_layers: Number of layers; 0 takes that of the pre-trained decoder.
        dtype: float32, bfloat16 or auto, see `resolve_dtype`.
        device: Device of the decoder.
        seed: Seed of the weights; the same on all ranks.

    Raises:
        UserError: The folder or wheel is absent, or the decoder has fewer layers.
    """
    weight_dtype = resolve_dtype(dtype, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence([seed, _SALT]).generate_state(1)[0]))
        decoder: PreTrainedModel = AutoModel.from_config(
            decoder_config(name, num_layers),
            dtype=torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=False,
        )
    # Not the buffers: a pre-trained decoder has the frequencies of rotary positions in float32, too.
    for parameter in decoder.parameters():
        parameter.data = parameter.data.to(weight_dtype)
    return decoder.to(device).eval().requires_grad_(False)


@functools.lru_cache(maxsize=8)
def drawn_weights_hash(name: str, seed: int) -> str:
    """sha256 that identifies the weights of `draw_decoder`, for any number of layers.

    It covers names, shapes, and sign and exponent of some weights of a decoder of one layer, so it depends on seed,
    architecture, initialization and random generator. Mantissas are excluded, because their last bits differ between
    processors.

    Args:
        name: Local folder, hub id, `smollm2` or `random-tiny`.
        seed: Seed of the weights.
    """
    digest = hashlib.sha256(b"drawn")
    for key, tensor in draw_decoder(name, 1, "float32", seed=seed).state_dict().items():
        mantissa, exponent = torch.frexp(tensor.flatten()[:_SAMPLE])
        digest.update(f"{key} {list(tensor.shape)}".encode())
        digest.update(torch.stack([exponent, mantissa.sign().int()]).numpy().tobytes())
    return digest.hexdigest()
