"""Token ids of item texts, kept in the cache of results: with a million items, they take minutes."""

from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.item_tokens import tokenize_items
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.result_cache import CachedResult
from llmgr_rec.storage.pretrained import RANDOM_TINY, load_tokenizer, pretrained_folder

_FILE = "tokens.safetensors"
# Files of a model folder that are not of its tokenizer, and large.
_WEIGHTS = {".safetensors", ".bin", ".gguf", ".pt", ".pth"}


def cached_item_tokens(catalog: Catalog, language_model: str, fields: list[str], max_tokens: int) -> Jagged:
    """Token ids of every item's text, as `tokenize_items` makes them, from the cache or kept there.

    Args:
        catalog: The items.
        language_model: Name of the language model, whose tokenizer is used; see `load_tokenizer`.
        fields: Text columns that are joined.
        max_tokens: Length to which each text is truncated, in tokens.

    Raises:
        UserError: An item has no text, or the tokenizer is not available.
    """
    of_tokenizer = [] if language_model == RANDOM_TINY else _tokenizer_files(pretrained_folder(language_model))
    cached = CachedResult(
        "item tokens",
        {"fields": fields, "max_tokens": max_tokens, "files": [file.name for file in of_tokenizer]},
        [catalog.file, *of_tokenizer],
        ("tokenizers", "transformers", "pyarrow"),
    )
    if file := cached.files().get(_FILE):
        tensors = load_file(file)
        return Jagged(tensors["values"], tensors["offsets"])
    tokens = tokenize_items(catalog, load_tokenizer(language_model), fields, max_tokens)
    with TemporaryDirectory(prefix="llmgr-tokens-") as folder:
        made = Path(folder) / _FILE
        save_file({"values": tokens.values, "offsets": tokens.offsets}, made)
        cached.keep({_FILE: made})
    return tokens


def _tokenizer_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in _WEIGHTS)
