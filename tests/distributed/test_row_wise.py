"""Tables that are sharded by rows, as on GPUs: ranked, smoothed, saved and loaded as by one process."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
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

STRENGTH, DIM = 3.0, 16


@contextmanager
def sharded_by(kind: ShardingType, local_size: int) -> Iterator[None]:
    """Within the block, tables are sharded in a way that TorchRec offers for GPUs only; their lookup works here.

    Args:
        kind: How they are sharded.
        local_size: Ranks of a machine, as far as the sharding knows.
    """
    constraints = ParameterConstraints(
        sharding_types=[kind.value], compute_kernels=[EmbeddingComputeKernel.FUSED.value], min_partition=DIM // 2
    )
    with ExitStack() as stack:
        types = [kind.value]
        stack.enter_context(mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(local_size)}))
        stack.enter_context(mock.patch.object(EmbeddingBagCollectionSharder, "sharding_types", return_value=types))
        stack.enter_context(mock.patch.object(sharding, "_constraints", return_value=constraints))
        stack.enter_context(sharded_bundles())
        yield


def smoothed(
    world: World,
    run: Path,
    dataset: Dataset,
    output: Path,
    kind: ShardingType = ShardingType.ROW_WISE,
    machines: int = 1,
) -> tuple[dict[str, float], list[tuple[int, int, Tensor]]]:
    """Smooths the id rows, saves them in both ways, and returns what ranks by them and this rank's rows."""
    with ExitStack() as stack:
        if world.size > 1:
            world = replace(world, local_size=world.size // machines)
            stack.enter_context(sharded_by(kind, world.local_size))
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
@pytest.mark.parametrize(
    ("kind", "ranks", "machines"),
    [
        (ShardingType.ROW_WISE, 2, 1),
        (ShardingType.TABLE_ROW_WISE, 2, 1),
        pytest.param(ShardingType.TABLE_ROW_WISE, 4, 2, marks=pytest.mark.slow),
        pytest.param(ShardingType.GRID_SHARD, 4, 2, marks=pytest.mark.slow),
    ],
)
def test_tables_that_are_sharded_by_rows_give_the_results_of_one_rank(
    kind: ShardingType, ranks: int, machines: int, tmp_path: Path
) -> None:
    small = small_run()
    metrics, [(_, _, expected_VD)] = smoothed(ONE_RANK, small.run, small.dataset, tmp_path / "one")
    arguments = small.run, small.dataset, tmp_path / "several", kind, machines
    by_rank = run_on_ranks(smoothed, ranks, *arguments)
    found = [row for _, rows in by_rank for row in rows]
    # A table-row-wise table is on the ranks of one machine.
    columns = DIM // 2 if kind == ShardingType.GRID_SHARD else DIM
    assert sorted((row, col) for row, col, _ in found) == [
        (row, col) for row in (0, len(found[0][2])) for col in range(0, DIM, columns)
    ]
    rows_VD = torch.full_like(expected_VD, torch.nan)
    for row, col, part in found:
        rows_VD[row : row + part.shape[0], col : col + part.shape[1]] = part
    torch.testing.assert_close(rows_VD, expected_VD, rtol=1e-6, atol=1e-7)
    assert [one for one, _ in by_rank] == [metrics] * ranks
    assert {path.name for path in (tmp_path / "several/export/sbr").glob("blend*")} == {
        f"{name}-{part}.npz" for name in ("blend", "blend-0", "blend-1") for part in _parts(ranks)
    }


def _parts(ranks: int) -> list[str]:
    ends = [NUM_ITEMS * rank // ranks for rank in range(ranks + 1)]
    return [f"{first}-{end}" for first, end in pairwise(ends)]
