"""A trained run for another catalog, without training: known items keep their vectors, new ones get vectors from text.

Shapes: V items of the new catalog.
"""

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import sparse

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.embedding_knn import EmbeddingKNN
from llmgr_rec.baselines.knn import ItemNeighbors
from llmgr_rec.baselines.text_knn import TEXT_FIELDS, TextKNN
from llmgr_rec.config import EMBEDDING_KNN, Config
from llmgr_rec.config_file import load_config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.extended_items import join_domains, write_extended_items
from llmgr_rec.data.prompt_templates import load_templates
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.modules.model_spec import ModelSpec
from llmgr_rec.storage.bundle import BundleFiles, check_language_model, copy_weights, load_blend, load_blend_terms
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.bundle_index import CONFIG, verified_file
from llmgr_rec.storage.catalog_mapping import CatalogMapping
from llmgr_rec.storage.derived_run import derived_run, open_bundles
from llmgr_rec.storage.embedding_model import EmbeddingModel
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.new_text_rows import new_text_rows, write_text_rows

_TEXT_KNN = "text_knn"
# Weight of text neighbors for clicks where nobody has clicked before: they decide, and the model orders what they leave
# equal. What it has learned elsewhere ranked such items far worse (docs/results/domains.md).
_WEIGHT_WITHOUT_CLICKS = 128.0


def extend_run(
    run: Path,
    items: pa.Table | Mapping[str, pa.Table],
    name: str,
    output: Path,
    allow_code: Collection[str] = (),
) -> CatalogMapping:
    """Writes a run that ranks another catalog: the models of all complete stages of a run, and its settings.

    The output gets its name when it is complete.

    Args:
        run: A run, or a bundle.
        items: The whole new catalog, see `write_extended_items`; or that of each domain, with the ids of its log. Items
            that only the run knows are left out.
        name: Name of the items, for messages.
        output: Folder to create; must not exist or be empty.
        allow_code: Modules and packages from which the bundles may import encoder and head.

    Returns:
        From which items of the run those of the new catalog start.

    Raises:
        UserError: The run has no complete model, an item is not usable, or the output cannot be written.
    """
    bundles = open_bundles(run, allow_code=allow_code)
    with derived_run(run, output, bundles) as draft, tempfile.TemporaryDirectory(dir=draft) as folder:
        known = bundles[0].catalog
        table = items if isinstance(items, pa.Table) else join_domains(items, known.domains, name)
        catalog = write_extended_items(known, table, name, Path(folder))
        mapping = CatalogMapping.between(known, catalog)
        for files in bundles:
            _extend_bundle(files, catalog, name, mapping, draft / "export" / files.index.stage)
    return mapping


def _extend_bundle(files: BundleFiles, catalog: Catalog, name: str, mapping: CatalogMapping, folder: Path) -> None:
    factory, index, config = ModelFactory(), files.index, files.config
    if index.factory:
        raise UserError(
            f"bundle {files.path} was made by an experiment with controls {index.factory}; train a run without controls"
        )
    if index.catalog_hash != mapping.earlier_hash:
        raise UserError(f"{files.path} and the stages before it have other items; train the run again")
    if index.language_model:
        check_language_model(index, factory.decoder_hash(config), files.path)
    spec = factory.spec(index.stage, config, catalog)
    _check_texts(spec, catalog, name)
    language = factory.language_parts(spec, catalog, torch.device("cpu"))
    # Before the model is built, which adds LoRA layers to the decoder.
    texts = new_text_rows(files, spec, language, catalog, mapping) if language and spec.head_has_text else None
    model = factory.build(spec, language, "cpu").requires_grad_(False)
    if missing := copy_weights(model, files.path, index, mapping=mapping):
        raise UserError(f"bundle {files.path} is damaged: it lacks {missing[0]}; export it again")
    write_text_rows(model.eval(), texts, mapping.new_items)
    export_bundle(
        model,
        index.stage,
        _own_settings(files),
        catalog,
        folder,
        World.alone(),
        # The sessions of a data set of the new catalog are not those of the training.
        replace(index, sessions_hash=""),
        _extend_blend(files, catalog, mapping),
        factory,
    )


def _check_texts(spec: ModelSpec, catalog: Catalog, name: str) -> None:
    if not spec.needs_item_text:
        return
    fields: list[str] = list(spec.config.prompt.text_fields)
    missing = [row for row, text in enumerate(catalog.texts(fields, required=False)) if not text]
    if missing:
        raise UserError(
            f"{name}: {len(missing):,} items have no text in {', '.join(fields)}, the first is item_id "
            f"{catalog.item_ids[missing[0]].as_py()!r}; stage {spec.stage} of the run needs a text of every item"
        )


def _own_settings(files: BundleFiles) -> Config:
    """The settings of a bundle with the templates by their name; by their path in the bundle if they have none here."""
    named = load_config(verified_file(files.path, files.index, CONFIG))
    try:
        same = load_templates(named.prompt.templates) == load_templates(files.config.prompt.templates)
    except UserError:
        same = False
    return named if same else files.config


def _extend_blend(files: BundleFiles, catalog: Catalog, mapping: CatalogMapping) -> Blend | None:
    """The blend for the new catalog: neighbors by text from its texts; those by clicks as they are, of known items.

    Where nobody has clicked, text neighbors decide, unless the run has a language model, which reads texts, too.
    """
    blend = load_blend(files)
    if blend is None:
        return None
    used = [name for name, weight in blend.weights.items() if weight]
    terms = load_blend_terms(files) or (blend,)
    if len(used) > 1 and len(terms) < len(used):
        raise UserError(
            f"bundle {files.path} was written by an earlier version, which did not store the parts of a blend; train "
            "the run again"
        )
    by_texts = {name: nearest for name in used if (nearest := _by_texts(name, files.config, catalog))}
    factor_V = np.ones(catalog.num_items, np.float32)
    if by_texts and not files.index.language_model:
        text_weight = sum(blend.weights[name] for name in by_texts)
        factor_V[_without_clicks(catalog)] = max(_WEIGHT_WITHOUT_CLICKS / text_weight, 1)
    extended = []
    for name, term in zip(used, terms, strict=False):
        if name in by_texts:
            similarity = by_texts[name].similarity_VV.astype(np.float32) * np.float32(blend.weights[name])
            similarity.data *= np.repeat(factor_V, np.diff(similarity.indptr))
        else:
            similarity = _among_known(term.similarity_VR, mapping)
        extended.append(Blend({name: blend.weights[name]}, sparse.csr_array(similarity), term.decay))
    total = sparse.csr_array((catalog.num_items, catalog.num_items), dtype=np.float32)
    for term in extended:
        total = total + term.similarity_VR
    terms = tuple(extended) if len(extended) > 1 else ()
    return Blend(blend.weights, sparse.csr_array(total), blend.decay, terms, blend.trees)


def _without_clicks(catalog: Catalog) -> NDArray[np.bool_]:
    """Whether the domain of each item, or the whole catalog of one log, has no training clicks; bool [V]."""
    is_clicked_V = catalog.train_count_V.numpy() > 0
    domain_V = np.zeros(len(is_clicked_V), np.int64) if catalog.domains is None else catalog.domains.of_item_V.numpy()
    return ~np.isin(domain_V, domain_V[is_clicked_V])


def _by_texts(name: str, config: Config, catalog: Catalog) -> ItemNeighbors | None:
    """Neighbors by the texts of a catalog; None for a baseline that does not rank by texts."""
    k_neighbors, encoder = config.blend.k_neighbors, EmbeddingModel.of(config)
    if name == _TEXT_KNN:
        return TextKNN(catalog.texts(list(TEXT_FIELDS), required=False), k_neighbors=k_neighbors)
    if name == EMBEDDING_KNN and encoder is not None:
        return EmbeddingKNN(encoder.embeddings(catalog), k_neighbors=k_neighbors)
    return None


def _among_known(similarity_VV: sparse.csr_array, mapping: CatalogMapping) -> sparse.csr_array:
    """Similarities of the items of a run, at the places of the new catalog; none of new items."""
    known_V = mapping.known_V.numpy()
    place = np.full(similarity_VV.shape[0], -1, np.int64)
    place[known_V[known_V >= 0]] = np.flatnonzero(known_V >= 0)
    entries = similarity_VV.tocoo()
    rows, columns = place[entries.row], place[entries.col]
    is_kept = (rows >= 0) & (columns >= 0)
    shape = (len(known_V), len(known_V))
    return sparse.coo_array((entries.data[is_kept], (rows[is_kept], columns[is_kept])), shape=shape).tocsr()
