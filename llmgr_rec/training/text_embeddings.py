"""Text embeddings of the items: computed once per run, written to the sharded text table, cached for the loss.

Shapes: V items of the catalog, C items, D = d1 columns, H = d2 hidden width of the language model, K columns of the
text sequence encoder.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmgr_rec.checksums import Checksum
from llmgr_rec.cli import progress
from llmgr_rec.data.collate import Collator
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.collectives import sum_over_ranks
from llmgr_rec.distributed.fsdp import is_sharded
from llmgr_rec.distributed.process_group import World, barrier, long_timeout_group, run_on_rank0
from llmgr_rec.evaluation.protocol import evaluation_mode
from llmgr_rec.files import atomic_write
from llmgr_rec.modules.item_tables import ItemRows
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender, text_encoder_of
from llmgr_rec.modules.text_table import ITEM_TEXT
from llmgr_rec.result_cache import CachedResult, files_below
from llmgr_rec.storage.machine import processor_name
from llmgr_rec.storage.table_io import fill_table, local_rows, local_shards, table_parameters, write_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A file contains at least this many items, and there are at most this many files. A file is the unit of work of a rank;
# a resumed run does not repeat complete files.
_MIN_ROWS = 512
_MAX_FILES = 256
_ENCODE_ITEMS = 4096
_BATCH_SIZE = 64
_LOOKUP_ITEMS = 8192
# Name of the checksum of the tensors in the metadata of a file.
_CHECKSUM = "checksum"

logger = logging.getLogger(__name__)


class TextEmbeddings:
    """Text embeddings of all items on disk; `read` standardizes them.

    Hidden states of a decoder have a large common component, so dot products of raw embeddings hardly differ. They are
    centered on the mean of the catalog and scaled to a root mean square norm of 1. Items without tokens stay zeros.

    Args:
        folder: Folder of the embeddings, in files of consecutive items; shared by the ranks.
        num_items: Size V of the catalog.
        width: Hidden width H, in columns.
    """

    def __init__(self, folder: Path, num_items: int, width: int) -> None:
        self._folder = folder
        self._num_items = num_items
        self.width = width
        self._rows = max(_MIN_ROWS, -(-num_items // _MAX_FILES))
        self._mean_H = torch.zeros(width)
        self._scale = 1.0

    def compute(self, decoder: "PreTrainedModel", tokens: Jagged, world: World) -> None:
        """Computes the files that are missing, distributed over the ranks, and then mean and scale of the catalog.

        Args:
            decoder: The pre-trained decoder without head.
            tokens: Token ids of each item's text, one row per item.
            world: Ranks; all call together.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        starts = [start for index, start in enumerate(self._starts()) if index % world.size == world.rank]
        missing = sum(not self._path(start).exists() for start in self._starts())
        if missing and world.rank == 0:
            logger.info("encoding the texts of %d items", min(missing * self._rows, self._num_items))
        began = time.monotonic()
        bar = progress(len(starts) * self._rows, "item text", "item")
        moments = torch.zeros(self.width + 2, dtype=torch.float64)
        with long_timeout_group(world) as group:
            for start in starts:
                moments += self._moments(self._embed_file(start, decoder, tokens))
                bar.update(self._rows)
            bar.close()
            barrier(world, group)
        if missing and world.rank == 0:
            logger.info("encoded the texts in %.0f s", time.monotonic() - began)
        sums_H, squares, count = sum_over_ranks(moments, world).split([self.width, 1, 1])
        mean_H = sums_H / count.clamp(min=1)
        variance = (squares / count.clamp(min=1) - mean_H.square().sum()).clamp(min=1e-12)
        self._mean_H, self._scale = mean_H.float(), float(variance.sqrt())
        barrier(world)

    def read(self, rows: range, cols: range) -> Tensor:
        """Standardized embeddings of some rows and columns, float32 [rows, cols].

        Args:
            rows: Items.
            cols: Columns.
        """
        pieces = []
        columns = slice(cols.start, cols.stop)
        for start in self._starts():
            low, high = max(rows.start, start), min(rows.stop, start + self._rows, self._num_items)
            if low < high:
                with safe_open(self._path(start), framework="pt") as file:
                    centered = file.get_slice("embeddings")[low - start : high - start, columns] - self._mean_H[columns]
                    has_text = file.get_slice("has_text")[low - start : high - start]
                pieces.append(centered / self._scale * has_text.unsqueeze(1))
        return torch.cat(pieces)

    def _starts(self) -> range:
        return range(0, self._num_items, self._rows)

    def _path(self, start: int) -> Path:
        return self._folder / f"items-{start:09d}.safetensors"

    def _embed_file(self, start: int, decoder: "PreTrainedModel", tokens: Jagged) -> Tensor:
        from llmgr_rec.modules.language_model import embed_item_texts

        path = self._path(start)
        stored = self._stored(path)
        if stored is not None:
            return stored
        items = torch.arange(start, min(start + self._rows, self._num_items))
        rows = tokens.select(items)
        embeddings = embed_item_texts(decoder, rows, _BATCH_SIZE)
        # Atomic, because another run may compute the same file.
        tensors = {"embeddings": embeddings, "has_text": (rows.lengths > 0).float()}
        with atomic_write(path) as partial:
            save_file(tensors, partial, metadata={_CHECKSUM: _checksum(tensors)})
        return embeddings

    @staticmethod
    def _stored(path: Path) -> Tensor | None:
        """The embeddings of a complete file; None if it is absent or damaged."""
        if not path.exists():
            return None
        tensors: dict[str, Tensor] = {}
        recorded = None
        with suppress(SafetensorError), safe_open(path, framework="pt") as file:
            recorded = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in ("embeddings", "has_text")}
        # Files of earlier versions have no checksum.
        if tensors and recorded in (None, _checksum(tensors)):
            return tensors["embeddings"]
        logger.warning("%s is damaged; computing it again", path)
        return None

    @staticmethod
    def _moments(embeddings: Tensor) -> Tensor:
        exact = embeddings[embeddings.any(dim=1)].double()
        return torch.cat([exact.sum(0), exact.square().sum().view(1), torch.tensor([float(len(exact))])])


def _checksum(tensors: dict[str, Tensor]) -> str:
    checksum = Checksum()
    for name in sorted(tensors):
        checksum.update(tensors[name].contiguous().numpy())
    return checksum.text()


def embed_catalog(
    decoder: "PreTrainedModel", tokens: Jagged, world: World, folder: Path, weights_hash: str
) -> TextEmbeddings:
    """Text embeddings of the catalog, in a folder named by a hash of their inputs.

    Rank 0 takes them from the cache of results, where an earlier run may have left them, or leaves them there.

    Args:
        decoder: The pre-trained decoder without head.
        tokens: Token ids of each item's text, one row per item.
        world: Ranks; all call together.
        folder: Parent folder, which runs may share.
        weights_hash: Hash of the decoder's weights.
    """
    inputs = json.dumps([weights_hash, decoder.config.num_hidden_layers, str(decoder.dtype)])
    digest = hashlib.sha256(inputs.encode())
    digest.update(tokens.values.numpy().tobytes())
    digest.update(tokens.offsets.numpy().tobytes())
    width = decoder.get_input_embeddings().weight.shape[1]
    own = folder / digest.hexdigest()[:16]
    # Other processors round differently.
    made_by = {"device": decoder.device.type, "processor": processor_name()}
    packages = ("torch", "transformers")
    cached = CachedResult("text embeddings", {"digest": digest.hexdigest(), **made_by}, packages=packages)
    with long_timeout_group(world) as group:
        # A run that is resumed has some of its own.
        run_on_rank0(world, lambda: own.exists() or cached.take(own), group)
    embeddings = TextEmbeddings(own, tokens.num_rows, width)
    embeddings.compute(decoder, tokens, world)
    if world.rank == 0:
        cached.keep(files_below(own))
    return embeddings


def fill_text_table(model: nn.Module, read: Callable[[range, range], Tensor]) -> None:
    """Writes text embeddings to this rank's shards of the text table.

    Args:
        model: The model, sharded or not; modified in place.
        read: Returns the values of some rows and columns, such as `TextEmbeddings.read`; see `fill_table`.
    """
    for parameter in table_parameters(model):
        if f".{ITEM_TEXT}." in parameter:
            fill_table(model, parameter, read)


@torch.no_grad()
def cache_catalog(
    llmgr: LLMGR, collator: Collator, device: torch.device, text_dtype: torch.dtype = torch.float32
) -> None:
    """Looks up all items and caches their rows for the loss; see `LLMGR.cache_catalog`.

    Args:
        llmgr: The model, sharded; all ranks call together.
        collator: Makes the bags of items.
        device: Device of the model.
        text_dtype: Dtype of the text embeddings, see `LLMGR.cache_catalog`.
    """
    vectors, ids, texts = [], [], []
    for items in torch.arange(collator.num_items).split(_LOOKUP_ITEMS):
        rows = llmgr.rows(collator.item_features(items).to(device))
        vectors.append(rows.vectors_XD)
        ids.append(rows.ids_XD)
        if rows.texts_XH is not None:
            texts.append(rows.texts_XH)
    rows = ItemRows(torch.cat(vectors), torch.cat(ids), torch.cat(texts) if texts else None)
    llmgr.cache_catalog(rows, text_dtype)


@torch.no_grad()
def refresh_item_vectors(model: SessionRecommender | LLMGR, world: World) -> None:
    """Encodes all items with the current weights of the text sequence encoder and writes them to its table.

    Each rank encodes the items of its shards. If the language model is sharded across ranks, all of them encode all
    items together.

    Args:
        model: The model, sharded or not; unchanged if it has no text sequence encoder.
        world: Ranks; all call together, with a timeout of days.
    """
    encoder = text_encoder_of(model)
    if encoder is None:
        return
    encodes_all = is_sharded(encoder)
    shards = [shard for shard in local_shards(model) if shard.table == ITEM_TEXT]
    num_items = encoder.item_tokens.num_rows
    bar = progress(num_items, "item text", "item")
    with evaluation_mode(encoder), long_timeout_group(world) as group:
        for items in torch.arange(num_items).split(_ENCODE_ITEMS):
            start, stop = int(items[0]), int(items[-1]) + 1
            if encodes_all or any(local_rows(shard, start, stop) for shard in shards):
                vectors_CK = encoder.item_vectors(items)
                for shard in shards:
                    write_rows(shard, start, vectors_CK)
            bar.update(items.numel())
        bar.close()
        barrier(world, group)
