"""Item text for the language stages: encoded once for a run, laid into the sharded text table, cached for the loss.

Shapes: V items of the catalogue, D = d1 columns, H = d2 hidden width of the language model.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmgr_rec.cli import progress
from llmgr_rec.data.collate import Collator
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.decoder_shards import is_cut
from llmgr_rec.distributed.process_group import World, barrier, long_timeout_group
from llmgr_rec.distributed.reduce import sum_over_ranks
from llmgr_rec.distributed.shards import fill_table, held_rows, local_shards, table_parameters, write_rows
from llmgr_rec.evaluation.protocol import evaluation_mode
from llmgr_rec.files import atomic_write
from llmgr_rec.modules.item_tables import ItemRows
from llmgr_rec.modules.item_text import ITEM_TEXT
from llmgr_rec.modules.language_model import encode_item_texts
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender, text_reader_of

# A file holds this many items at least, and there are this many files at most: a file is what an interrupted run does
# not repeat, and what is dealt out to ranks.
_MIN_ROWS = 512
_MAX_FILES = 256
_READ_ITEMS = 4096
_ENCODE_BATCH = 64
_LOOKUP_ITEMS = 8192


class TextEncodings:
    """Text encodings of all items on disk, standardised as they are read.

    Hidden states of a decoder share a large common direction, so raw encodings all look alike to a dot product. They
    are centred on the catalogue's mean and scaled to a root mean square norm of 1. Items without tokens stay at zero.

    Args:
        folder: Where the encodings lie, in files of consecutive items; ranks share it.
        num_items: Size V of the catalogue.
        width: Hidden width H.
    """

    def __init__(self, folder: Path, num_items: int, width: int) -> None:
        self._folder = folder
        self._num_items = num_items
        self.width = width
        self._rows = max(_MIN_ROWS, -(-num_items // _MAX_FILES))
        self._mean_H = torch.zeros(width)
        self._scale = 1.0

    def encode(self, decoder: PreTrainedModel, tokens: Jagged, world: World) -> None:
        """Encodes what is not on disk yet, files dealt out over the ranks, and finds what standardises them.

        Args:
            decoder: The bare pre-trained decoder.
            tokens: Token ids of each item's text.
            world: Ranks; all call together.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = [start for index, start in enumerate(self._starts()) if index % world.size == world.rank]
        bar = progress(len(mine) * self._rows, "item text", "item")
        moments = torch.zeros(self.width + 2, dtype=torch.float64)
        with long_timeout_group(world) as group:
            for start in mine:
                moments += self._moments(self._encode_file(start, decoder, tokens))
                bar.update(self._rows)
            bar.close()
            barrier(world, group)
        sums_H, squares, count = sum_over_ranks(moments, world).split([self.width, 1, 1])
        mean_H = sums_H / count.clamp(min=1)
        variance = (squares / count.clamp(min=1) - mean_H.square().sum()).clamp(min=1e-12)
        self._mean_H, self._scale = mean_H.float(), float(variance.sqrt())
        barrier(world)

    def read(self, rows: range, cols: range) -> Tensor:
        """Standardised encodings of a rectangle, float32 [rows, cols]."""
        pieces = []
        for start in self._starts():
            low, high = max(rows.start, start), min(rows.stop, start + self._rows, self._num_items)
            if low < high:
                with safe_open(self._path(start), framework="pt") as file:
                    values = file.get_slice("encodings")[low - start : high - start, cols.start : cols.stop]
                    has_text = file.get_slice("has_text")[low - start : high - start]
                ready = (values - self._mean_H[cols.start : cols.stop]) / self._scale
                pieces.append(ready * has_text.unsqueeze(1))
        return torch.cat(pieces)

    def _starts(self) -> range:
        return range(0, self._num_items, self._rows)

    def _path(self, start: int) -> Path:
        return self._folder / f"items-{start:09d}.safetensors"

    def _encode_file(self, start: int, decoder: PreTrainedModel, tokens: Jagged) -> Tensor:
        path = self._path(start)
        if path.exists():
            with safe_open(path, framework="pt") as file:
                return file.get_tensor("encodings")
        items = torch.arange(start, min(start + self._rows, self._num_items))
        rows = tokens.select(items)
        encodings = encode_item_texts(decoder, rows, _ENCODE_BATCH)
        # Another run may be encoding the same.
        with atomic_write(path) as partial:
            save_file({"encodings": encodings, "has_text": (rows.lengths > 0).float()}, partial)
        return encodings

    @staticmethod
    def _moments(encodings: Tensor) -> Tensor:
        exact = encodings[encodings.any(dim=1)].double()
        return torch.cat([exact.sum(0), exact.square().sum().view(1), torch.tensor([float(len(exact))])])


def encode_catalogue(
    decoder: PreTrainedModel, tokens: Jagged, world: World, folder: Path, language_model_hash: str
) -> TextEncodings:
    """Text encodings of the catalogue, kept under a name that tells what they were made of.

    Args:
        decoder: The bare pre-trained decoder.
        tokens: Token ids of each item's text.
        world: Ranks; all call together.
        folder: Where encodings are kept; runs may share it.
        language_model_hash: Hash of the decoder's weights.
    """
    recipe = json.dumps([language_model_hash, decoder.config.num_hidden_layers, str(decoder.dtype)])
    digest = hashlib.sha256(recipe.encode())
    digest.update(tokens.values.numpy().tobytes())
    digest.update(tokens.offsets.numpy().tobytes())
    width = decoder.get_input_embeddings().weight.shape[1]
    encodings = TextEncodings(folder / digest.hexdigest()[:16], tokens.num_rows, width)
    encodings.encode(decoder, tokens, world)
    return encodings


def fill_text_table(model: nn.Module, read: Callable[[range, range], Tensor]) -> None:
    """Writes vectors of items into whatever this rank holds of the text table.

    Args:
        model: Sharded or not.
        read: Gives the values of a rectangle of the table, such as `TextEncodings.read`; see `fill_table`.
    """
    for parameter in table_parameters(model):
        if f".{ITEM_TEXT}." in parameter:
            fill_table(model, parameter, read)


@torch.no_grad()
def cache_catalogue(llmgr: LLMGR, collator: Collator, device: torch.device) -> None:
    """Looks every item up once and keeps the result for the loss; see `LLMGR.cache_catalogue`.

    Args:
        llmgr: The model, sharded; all ranks call together.
        collator: Makes the bags of items.
        device: Where the model is.
    """
    vectors, ids, texts = [], [], []
    for items in torch.arange(collator.num_items).split(_LOOKUP_ITEMS):
        features = collator.item_features(items).to(device)
        rows = llmgr.rows(features)
        vectors.append(rows.vectors_XD)
        ids.append(rows.ids_XD)
        if rows.texts_XH is not None:
            texts.append(rows.texts_XH)
    llmgr.cache_catalogue(ItemRows(torch.cat(vectors), torch.cat(ids), torch.cat(texts) if texts else None))


@torch.no_grad()
def renew_texts(model: SessionRecommender | LLMGR, world: World) -> None:
    """Where a language model reads sessions, writes the items as it reads them now into the text table.

    Every rank reads every item of the rows that it holds a part of; all items where the language model is cut over
    ranks, which then read together.

    Args:
        model: Sharded or not; one without such a reader stays as it is.
        world: Ranks; all call together, and wait for the one that reads most.
    """
    reader = text_reader_of(model)
    if reader is None:
        return
    reads_all = is_cut(reader)
    parts = [shard for shard in local_shards(model) if shard.table == ITEM_TEXT]
    with evaluation_mode(reader), long_timeout_group(world) as group:
        for items in torch.arange(reader.texts.num_rows).split(_READ_ITEMS):
            start, stop = int(items[0]), int(items[-1]) + 1
            if reads_all or any(held_rows(part, start, stop) for part in parts):
                vectors_CK = reader.item_vectors(items)
                for part in parts:
                    write_rows(part, start, vectors_CK)
        barrier(world, group)
