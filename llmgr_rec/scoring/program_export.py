"""Writes a trained session recommender as a program that runs without this package.

Shapes: V items of the catalog, D columns of item vectors, K items of a list.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.knn import Popularity
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.exclusion import ranking_rule
from llmgr_rec.files import atomic_write, require_writable
from llmgr_rec.modules.dynamic_export import export_dynamic
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.session_program import ItemSimilarities, SessionProgram
from llmgr_rec.storage.bundle import Bundle, BundleFiles, load_model

# Items per lookup of item vectors.
_CHUNK = 8192
# Example of clicks and of the first click of each session, for tracing.
_EXAMPLE = ([0, 1, 0, 0, -1, 1, 0], [0, 3, 3, 5, 7])


@dataclass(frozen=True)
class WrittenProgram:
    """Files of an exported program.

    Args:
        program: The program, see `SessionProgram.forward` for its inputs and outputs.
        items: Parquet file of the catalog in the order of item indices: `item_id` and `title`.
        k: Number K of items of a list.
        num_items: Size V of the catalog.
    """

    program: Path
    items: Path
    k: int
    num_items: int


def session_program(files: BundleFiles, k: int) -> SessionProgram:
    """Makes the program of a bundle, with the vectors of all items.

    Args:
        files: An opened bundle of a session recommender.
        k: Number of items of a list; limited to the size of the catalog.

    Raises:
        UserError: The model of the bundle has a language model, which is not exported.
    """
    bundle = load_model(files)
    model = bundle.model
    if not isinstance(model, SessionRecommender) or model.text_encoder is not None:
        raise UserError(
            f"{files.path}: the model of stage {bundle.stage} has a language model, which is not exported; export that "
            "of stage sbr with --stage sbr"
        )
    if bundle.catalog.domains is not None:
        raise UserError(
            f"{files.path}: the model ranks within {len(bundle.catalog.domains.names)} domains, which an exported "
            "program does not; serve it with python -m llmgr_rec.serve"
        )
    if bundle.blend is not None and bundle.blend.trees:
        raise UserError(
            f"{files.path}: the model has a re-ranker, which an exported program does not; serve it with python -m "
            "llmgr_rec.serve, or train with blend.reranker none"
        )
    rule = ranking_rule(files.index)
    no_clicks = (np.zeros(0, np.int64), np.zeros(2, np.int64))
    popular, shares = Popularity(bundle.catalog.train_count_V.numpy()).rank(
        *no_clicks, min(k, bundle.catalog.num_items)
    )
    return SessionProgram(
        encoder=model.encoder,
        as_query=model.as_query,
        vectors_VD=_item_vectors(bundle, model),
        items_VD=bundle.ranking().ranker(World.alone(), keep=True).item_vectors,
        popular_K=torch.from_numpy(popular[0]),
        shares_K=torch.from_numpy(shares[0]).float(),
        max_length=rule.max_length,
        merges_repeats=files.index.consecutive_repeats == "merge",
        excludes_seen=rule.excludes_seen,
        similarities=None if bundle.blend is None else _similarities(bundle.blend),
    ).eval()


def exported_program(program: SessionProgram) -> ExportedProgram:
    """Traces a program for any number of sessions and clicks, 0 included."""
    inputs = tuple(torch.tensor(values) for values in _EXAMPLE)
    return export_dynamic(program, inputs, ({0: Dim("clicks")}, {0: Dim("offsets", min=1)}))


def check_output(output: Path) -> None:
    """Checks that a program can be written, before a model is loaded.

    Args:
        output: File of the program.

    Raises:
        UserError: The name does not end with .pt2, or the folder is not writable.
    """
    if output.suffix != ".pt2" or output.is_dir():
        raise UserError(f"--output {output}: give the name of a file that ends with .pt2")
    require_writable(output.parent)


def write_program(files: BundleFiles, output: Path, k: int) -> WrittenProgram:
    """Writes the program of a bundle, and its catalog beside it.

    Args:
        files: An opened bundle of a session recommender.
        output: File of the program, `NAME.pt2`; the catalog is `NAME.items.parquet`.
        k: Number of items of a list; limited to the size of the catalog.

    Raises:
        UserError: The model has a language model, its encoder cannot be exported, or the files cannot be written.
    """
    program = session_program(files, k)
    try:
        exported = exported_program(program)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{files.path}: encoder {files.config.encoder.name} cannot be exported ({type(error).__name__}: {reason}); "
            "see docs/export.md for what its forward may do"
        ) from error
    items = output.with_suffix(".items.parquet")
    table = pa.table({"item_id": files.catalog.item_ids, "title": pa.array(files.catalog.titles(), pa.string())})
    size = program.popular_K.shape[0]
    about = {"k": size, "stage": files.index.stage, "torch": torch.__version__}
    with atomic_write(output) as draft, atomic_write(items) as items_draft:
        pq.write_table(table.replace_schema_metadata({"llmgr_rec": json.dumps(about)}), items_draft)
        torch.export.save(exported, draft)
    return WrittenProgram(output, items, size, files.catalog.num_items)


@torch.no_grad()
def _item_vectors(bundle: Bundle, model: SessionRecommender) -> Tensor:
    """Vectors of all items that the encoder takes, float32 [V, D]."""
    chunks = torch.arange(bundle.catalog.num_items).split(_CHUNK)
    return torch.cat([model.rows(bundle.collate.item_features(chunk)).vectors_XD.float() for chunk in chunks])


def _similarities(blend: Blend) -> ItemSimilarities:
    similarity_VV = blend.similarity_VR
    return ItemSimilarities(
        offsets_V1=torch.from_numpy(similarity_VV.indptr.astype(np.int64)),
        items_S=torch.from_numpy(similarity_VV.indices.astype(np.int64)),
        values_S=torch.from_numpy(similarity_VV.data.astype(np.float32)),
        decay=blend.decay,
    )
