"""Rows of new items in the table of text embeddings of a trained model; those of known items stay as they are.

Shapes: N new items, S known items of a sample, H columns of the table.
"""

import torch
from torch import Tensor

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.model_spec import LanguageParts, ModelSpec
from llmgr_rec.modules.recommender import SessionRecommender, text_encoder_of
from llmgr_rec.modules.text_table import ITEM_TEXT
from llmgr_rec.storage.bundle import BundleFiles, TableReader
from llmgr_rec.storage.catalog_mapping import CatalogMapping
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import local_shards

# Known items that are encoded again, and items of a batch.
_SAMPLE = 64
_BATCH_SIZE = 64
_ENCODE_ITEMS = 4096


def new_text_rows(
    files: BundleFiles, spec: ModelSpec, language: LanguageParts, catalog: Catalog, mapping: CatalogMapping
) -> Tensor:
    """Text embeddings of the new items by the base language model, standardized as those of the known items.

    The table has embeddings after a shift and a scale that are the same for all items of the training, and that the
    bundle does not store. They are found from the known items of a sample, which are encoded again.

    Args:
        files: The bundle of the trained model.
        spec: Spec of the model for the new catalog.
        language: Its language model, before LoRA layers are added.
        catalog: The new catalog.
        mapping: From the catalog of the bundle to the new one.

    Returns:
        Rows, float32 [N, H].
    """
    factory = ModelFactory()
    new_NH = _embed(language, factory.item_tokens(spec.config, catalog).select(mapping.new_items))
    sample = mapping.trained[:_SAMPLE]
    plain_SH = _embed(language, factory.item_tokens(spec.config, files.catalog).select(sample)).double()
    table = TableReader(files.path, files.index.table_files[ITEM_TEXT], files.index.table_dtype)
    rows_SH = table.take(sample, range(new_NH.shape[1])).double()
    plain_mean_H, mean_H = plain_SH.mean(dim=0), rows_SH.mean(dim=0)
    centered_SH = rows_SH - mean_H
    scale = ((plain_SH - plain_mean_H) * centered_SH).sum() / centered_SH.square().sum().clamp(min=1e-12)
    return ((new_NH.double() - plain_mean_H) / scale.clamp(min=1e-12) + mean_H).float()


def _embed(language: LanguageParts, tokens: Jagged) -> Tensor:
    from llmgr_rec.modules.language_model import embed_item_texts

    return embed_item_texts(language.decoder, tokens, _BATCH_SIZE)


@torch.no_grad()
def write_text_rows(model: SessionRecommender | LLMGR, rows_NH: Tensor | None, items_N: Tensor) -> None:
    """Writes the rows of new items into the table of text embeddings, if the model has one.

    Args:
        model: The model, in eval mode; modified in place.
        rows_NH: From `new_text_rows`; None if a text sequence encoder encodes the items, or if there is no table.
        items_N: Indices of the new items.
    """
    encoder = text_encoder_of(model)
    for shard in (one for one in local_shards(model) if one.table == ITEM_TEXT):
        for places in torch.arange(len(items_N)).split(_ENCODE_ITEMS) if len(items_N) else ():
            items = items_N[places]
            if encoder is not None:
                shard.tensor[items] = encoder.item_vectors(items).to(shard.tensor)
            elif rows_NH is not None:
                shard.tensor[items] = rows_NH[places].to(shard.tensor)
