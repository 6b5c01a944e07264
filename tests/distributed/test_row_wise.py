"""Tables that are sharded by rows, as on GPUs: ranked, smoothed, saved and loaded as by one process."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import ShardingType

from llmgr_rec.baselines.knn_smoothing import K_NEIGHBORS
from llmgr_rec.config import BlendConfig
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed import sharding
from llmgr_rec.distributed.process_group import World
from llmgr_rec.evaluation.protocol import evaluate_model
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage import checkpoint_state
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.checkpoint import CheckpointManager, Identity
from llmgr_rec.storage.table_io import local_shards
from llmgr_rec.training import id_row_smoothing
from llmgr_rec.training.neighbors import neighbor_scores
from llmgr_rec.training.selection import select_on_validation
from tests.ranks import run_on_ranks
from tests.sharded_bundles import sharded_bundles
from tests.small_run import NUM_ITEMS, ONE_RANK, small_run

STRENGTH = 3.0


@contextmanager
def row_wise() -> Iterator[None]:
    """Within the block, tables are sharded by rows, which TorchRec offers for GPUs only; their lookup works here."""
    constraints = ParameterConstraints(
        sharding_types=[ShardingType.ROW_WISE.value], compute_kernels=[EmbeddingComputeKernel.FUSED.value]
    )
    with ExitStack() as stack:
        types = [ShardingType.ROW_WISE.value]
        stack.enter_context(mock.patch.object(EmbeddingBagCollectionSharder, "sharding_types", return_value=types))
        stack.enter_context(mock.patch.object(sharding, "_constraints", return_value=constraints))
        stack.enter_context(sharded_bundles())
        yield


def smoothed(
    world: World, run: Path, dataset: Dataset, output: Path
) -> tuple[dict[str, float], list[tuple[int, int, Tensor]]]:
    """Smooths the id rows, saves them in both ways, and returns what ranks by them and this rank's rows."""
    with ExitStack() as stack:
        if world.size > 1:
            stack.enter_context(row_wise())
        stack.enter_context(mock.patch.object(id_row_smoothing, "_BLOCK_BYTES", 7 * 4 * 4 * K_NEIGHBORS))
        stack.enter_context(mock.patch.object(id_row_smoothing, "STRIP_BYTES", 0))
        stack.enter_context(mock.patch.object(checkpoint_state, "BLOCK_VALUES", 100))
        bundle = load_bundle(run / "export/sbr", world)
        model, catalog = bundle.model, bundle.catalog
        assert isinstance(model, SessionRecommender)
        (by_words,) = neighbor_scores(["text_knn"], 20, dataset, catalog, world)
        smoothing = id_row_smoothing.KnnSmoothing(model, by_words.similarity_VR, catalog.train_count_V, world)
        for strength in (1.0, 0.0, STRENGTH):
            smoothing.apply(strength)
        config = replace(bundle.config, blend=BlendConfig(["item_knn", "text_knn"], 20, [2.0, 4.0]))
        selection = select_on_validation("behave", bundle.ranking(), config, dataset, catalog, world)
        export_bundle(model, "sbr", config, catalog, output / "export/sbr", world, blend=selection.blend)
        identity = Identity.of("sbr", catalog.features_hash, config, world.device, "")
        checkpoints = CheckpointManager(output / "checkpoints", 1, world, identity)
        checkpoints.save(1, model, None)
        smoothing.apply(0.0)
        checkpoints.load(model, None)
        again = load_bundle(output / "export/sbr", world)
        metrics = evaluate_model(again.ranking(), dataset, "test", world, catalog.train_count_V)
        rows = [(one.row_offset, one.col_offset, one.tensor) for one in local_shards(model) if one.table == "item_id"]
        return metrics, rows


@pytest.mark.dist
def test_tables_that_are_sharded_by_rows_give_the_results_of_one_rank(tmp_path: Path) -> None:
    small = small_run()
    metrics, [(_, _, expected_VD)] = smoothed(ONE_RANK, small.run, small.dataset, tmp_path / "one")
    by_rank = run_on_ranks(smoothed, 2, small.run, small.dataset, tmp_path / "two")
    found = [row for _, rows in by_rank for row in rows]
    assert [(row, col) for row, col, _ in found] == [(0, 0), (len(found[0][2]), 0)]
    assert len(found[0][2]) < NUM_ITEMS
    torch.testing.assert_close(torch.cat([rows for *_, rows in found]), expected_VD, rtol=1e-6, atol=1e-7)
    assert [one for one, _ in by_rank] == [metrics, metrics]
    assert {path.name for path in (tmp_path / "two/export/sbr").glob("blend*")} == {
        f"{name}-{half}.npz" for name in ("blend", "blend-0", "blend-1") for half in _halves()
    }


def _halves() -> list[str]:
    return [f"0-{NUM_ITEMS // 2}", f"{NUM_ITEMS // 2}-{NUM_ITEMS}"]
