"""Checkpoints: exact resumption, any number of ranks, nothing incomplete or foreign or executable is read."""

import io
import json
import pickle
import shutil
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from llmgr_rec.config import Config, StageConfig, TablesConfig
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.storage.checkpoint import CheckpointManager, Identity
from llmgr_rec.storage.checkpoint_reader import MetadataUnpickler
from llmgr_rec.storage.checkpoint_state import is_stored, model_tensors, optimizer_tensors
from llmgr_rec.training.optimizers import build_optimizer
from tests.distributed.small_model import assemble, batch, shard_list, sharded_model
from tests.json_files import edit_json
from tests.ranks import run_on_ranks

IDENTITY = Identity("sbr", "catalog-a", {"seed": 0, "tables.optimizer": "adagrad"})
SAVE_AT, STEPS = 2, 4
CPU = torch.device("cpu")
CASES = [
    TablesConfig(optimizer="adagrad", sharding="column_wise"),
    TablesConfig(optimizer="adam", sharding="column_wise"),
    TablesConfig(optimizer="adam", sharding="table_wise"),
    TablesConfig(optimizer="rowwise_adagrad", sharding="table_wise"),
    TablesConfig(optimizer="adagrad", sharding="column_wise", dtype="float16"),
]
ROW_WISE = Identity("sbr", "catalog-a", {"tables.optimizer": "rowwise_adagrad"})


def build(world: World, tables: TablesConfig, seed: int = 3) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    model = sharded_model(world, tables, seed)
    return model, build_optimizer(model, StageConfig(lr=0.05), Config(tables=tables))


def train(model: nn.Module, optimizer: KeyedOptimizer, world: World, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(batch(step, world))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def manager(folder: str, world: World, identity: Identity = IDENTITY, keep: int = 2) -> CheckpointManager:
    return CheckpointManager(Path(folder), keep, world, identity)


def write_rank(world: World, folder: str) -> list[tuple[list[float], list[Any], list[Any]]]:
    """Trains and saves each case; returns the losses after the checkpoint, the tables at it and at the end."""
    answers = []
    for number, tables in enumerate(CASES):
        model, optimizer = build(world, tables)
        train(model, optimizer, world, range(SAVE_AT))
        manager(f"{folder}/{number}", world).save(SAVE_AT, model, optimizer, {"position": {"step": SAVE_AT}})
        at_save = shard_list(model)
        answers.append((train(model, optimizer, world, range(SAVE_AT, STEPS)), at_save, shard_list(model)))
    model, optimizer = build(world, TablesConfig(optimizer="rowwise_adagrad", sharding="column_wise"))
    manager(f"{folder}/row_wise", world, ROW_WISE).save(1, model, optimizer)
    own = Path(folder, f"of_rank_{world.rank}")
    with pytest.raises(UserError, match=r"lacks __1_0\.distcp, .* give an --output on storage that all ranks share"):
        manager(str(own), world, ROW_WISE).save(1, model, optimizer)
    assert not list(own.glob("*/COMPLETE"))
    return answers


def read_rank(world: World, folder: str) -> list[tuple[list[float], list[Any], list[Any]]]:
    """Loads each case into a model of other initial weights; returns the same as `write_rank`."""
    answers = []
    for number, tables in enumerate(CASES):
        model, optimizer = build(world, tables, seed=99)
        assert manager(f"{folder}/{number}", world).latest() is not None
        extra = manager(f"{folder}/{number}", world).load(model, optimizer)
        assert extra == {"position": {"step": SAVE_AT}}
        at_save = shard_list(model)
        answers.append((train(model, optimizer, world, range(SAVE_AT, STEPS)), at_save, shard_list(model)))
    model, optimizer = build(world, TablesConfig(optimizer="rowwise_adagrad", sharding="column_wise"))
    if world.size == 1:
        with pytest.raises(UserError, match=r"written by 2 ranks.*row-wise Adagrad"):
            manager(f"{folder}/row_wise", world, ROW_WISE).load(model, optimizer)
        # Weights alone have no such state.
        manager(f"{folder}/row_wise", world, ROW_WISE).load(model, None)
    elif world.size == 2:
        manager(f"{folder}/row_wise", world, ROW_WISE).load(model, optimizer)
    return answers


@pytest.mark.dist
def test_resume_is_exact_at_any_number_of_ranks(tmp_path: Path) -> None:
    written = run_on_ranks(write_rank, 2, str(tmp_path))
    for size in (2, 1, 3):
        read = run_on_ranks(read_rank, size, str(tmp_path))
        for number, tables in enumerate(CASES):
            before = assemble([rank[number][1] for rank in written])
            for name, value in assemble([rank[number][1] for rank in read]).items():
                assert torch.equal(before[name], value), f"{tables} {name} at {size} ranks"
            losses = [mean([rank[number][0] for rank in ranks]) for ranks in (written, read)]
            after = [assemble([rank[number][2] for rank in ranks]) for ranks in (written, read)]
            if size == 2:
                assert losses[0] == losses[1], f"{tables}: the same ranks do not repeat the same losses"
                assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
            else:
                assert losses[0] == pytest.approx(losses[1], abs=1e-5), tables
                for name in after[0]:
                    torch.testing.assert_close(after[0][name], after[1][name], atol=1e-5, rtol=0)


def mean(per_rank: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*per_rank, strict=True)]


class WithLanguageModel(nn.Module):
    """The names that a stage's task has, around a small trained and a larger frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.ModuleDict({"base_layer": nn.Linear(300, 300), "lora_A": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 4)


def save_rank(world: World, folder: str) -> tuple[list[str], list[str], list[str]]:
    """One process for everything about a folder of checkpoints that needs no second rank."""
    keys = list(model_tensors(WithLanguageModel()))
    task = WithLanguageModel()
    manager(f"{folder}/language", world).save(1, task, None)
    model, optimizer = build(world, CASES[0])
    assert not any("item_text" in key for key in optimizer_tensors(optimizer, model)), "a frozen table has state"
    kept = manager(f"{folder}/kept", world, keep=2)
    for step in (3, 7, 5, 6):
        kept.save(step, model, optimizer)
    kept_names = sorted(path.name for path in Path(folder, "kept").iterdir())
    inode = Path(folder, "kept/step-00000006/.metadata").stat().st_ino
    kept.save(6, model, optimizer, {"other": 1})
    assert Path(folder, "kept/step-00000006/.metadata").stat().st_ino == inode, "a complete checkpoint was rewritten"
    assert kept.load(model, optimizer) == {"other": 1}, "only the further state is replaced"
    return keys, kept_names, refusals(world, folder, model, optimizer)


def refusals(world: World, folder: str, model: nn.Module, optimizer: KeyedOptimizer) -> list[str]:
    """Messages of every checkpoint that must not be read, in order."""
    found = []

    def attempt(name: str, identity: Identity = IDENTITY, damage: str = "", content: bytes | None = None) -> None:
        copy = Path(folder, name)
        shutil.copytree(Path(folder, "kept/step-00000006"), copy / "step-00000006")
        if damage:
            target = copy / "step-00000006" / damage
            target.unlink() if content is None else target.write_bytes(content)
        if damage == ".metadata":
            # Who can exchange the index can exchange its checksum, too.
            edit_json(copy / "step-00000006/state.json", lambda state: state["checksums"].clear())
        before = [tensor.clone() for *_, tensor in shard_list(model)]
        path = copy / "step-00000006" if damage == "COMPLETE" else None
        with pytest.raises(UserError) as caught:
            manager(str(copy), world, identity).load(model, optimizer, path)
        assert all(torch.equal(a, b[3]) for a, b in zip(before, shard_list(model), strict=True)), "something was loaded"
        assert "\n" not in str(caught.value)
        found.append(str(caught.value))

    attempt("catalog", Identity("sbr", "catalog-b", IDENTITY.settings))
    attempt("settings", Identity("sbr", "catalog-a", {**IDENTITY.settings, "seed": 1}))
    # The version that wrote the checkpoint did not have a setting: it did what its default does, or did not average.
    attempt("later", Identity("sbr", "catalog-a", {**IDENTITY.settings, "tables.dtype": "float16"}))
    new = {"tables.dtype": "float32", "optimizer.average": 0.0}
    later = Identity("sbr", "catalog-a", {**IDENTITY.settings, **new})
    manager(str(Path(folder, "kept")), world, later).load(model, optimizer)
    attempt("stage", Identity("align", "catalog-a", IDENTITY.settings))
    attempt("factory", Identity("sbr", "catalog-a", IDENTITY.settings, "shuffled_words"))
    attempt("marker", damage="COMPLETE")
    attempt("missing", damage="__0_0.distcp")
    attempt("truncated", damage="__0_0.distcp", content=b"abc")
    attempt("state", damage="state.json", content=b"{")
    index = Path(folder, "kept/step-00000006/.metadata")
    evil = pickle.dumps(Evil(str(Path(folder, "executed"))))
    # The same size as the real index, so that only the unpickler stands in its way.
    attempt("evil", damage=".metadata", content=evil + b"\0" * (index.stat().st_size - len(evil)))
    Path(folder, "half/step-00000009.tmp").mkdir(parents=True)
    # Killed when all was written, before the folder had its name.
    Path(folder, "half/step-00000008.tmp").mkdir()
    Path(folder, "half/step-00000008.tmp/COMPLETE").touch()
    Path(folder, "half/step-00000008").mkdir(parents=True)
    half = manager(str(Path(folder, "half")), world)
    assert half.latest() is None
    half.save(8, model, None)
    assert [path.name for path in Path(folder, "half").iterdir()] == ["step-00000008"]
    assert half.latest() == Path(folder, "half/step-00000008")
    with pytest.raises(UserError) as no_optimizer:
        half.load(model, optimizer)
    found.append(str(no_optimizer.value))
    half.load(model, None)
    return found


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


@pytest.mark.dist
def test_only_complete_and_own_checkpoints_are_read(tmp_path: Path) -> None:
    ((keys, kept, messages),) = run_on_ranks(save_rank, 1, str(tmp_path))
    assert keys == [
        "model.language_model.lora_A.weight",
        "model.language_model.lora_A.bias",
        "model.head.weight",
        "model.head.bias",
    ]
    size = sum(file.stat().st_size for file in (tmp_path / "language/step-00000001").iterdir())
    assert size < 300 * 300, "the base language model is in the checkpoint"
    assert kept == ["step-00000005", "step-00000006"]
    expected = [
        "belongs to another catalog",
        "setting seed is 1, but checkpoint",
        "setting tables.dtype is float16, but checkpoint",
        "is of stage sbr, not of align",
        "was made with no controls, not with shuffled_words",
        "is not complete (it lacks the file COMPLETE)",
        "__0_0.distcp has 0 of",
        "__0_0.distcp has 3 of",
        "state.json is damaged",
        f"evil/step-00000006/.metadata is not the index of a checkpoint (it names {open.__module__}.open); there is no",
        "has no optimizer state",
    ]
    assert len(messages) == len(expected)
    for message, part in zip(messages, expected, strict=True):
        assert part in message
    assert not (tmp_path / "executed").exists()
    state = json.loads((tmp_path / "kept/step-00000006/state.json").read_text())
    assert state["step"] == 6
    assert state["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in state["versions"]["torch"]


@pytest.mark.parametrize("value", [Tensor, print, Path.unlink, torch.load, torch.hub.load])
def test_the_unpickler_refuses_what_is_no_index(value: object, tmp_path: Path) -> None:
    file = tmp_path / "index"
    file.write_bytes(pickle.dumps(value))
    with file.open("rb") as stream, pytest.raises(pickle.UnpicklingError, match="it names"):
        MetadataUnpickler(stream).load()


class Attribute:
    """Is unpickled as an attribute of something, which is how Python 3.11.0 to 3.11.3 pickle an enum member."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self.owner, self.name))


def test_the_unpickler_reads_attributes_of_enums_only(tmp_path: Path) -> None:
    member = MetadataUnpickler(
        io.BytesIO(pickle.dumps(Attribute(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")))
    ).load()
    assert member is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    with pytest.raises(pickle.UnpicklingError, match="it reads an attribute"):
        MetadataUnpickler(io.BytesIO(pickle.dumps(Attribute(PosixPath, "unlink")))).load()


def test_identity_keeps_what_decides_the_result() -> None:
    base = Config()
    same, other = Config(), Config()
    same.runtime.keep_checkpoints = 9
    same.tables.sharding = "table_wise"
    same.behave.lr = 1.0
    other.sbr.lr = 1.0
    assert Identity.of("sbr", "c", base, CPU) == Identity.of("sbr", "c", same, CPU)
    assert Identity.of("sbr", "c", base, CPU) != Identity.of("sbr", "c", other, CPU)


def test_identity_keeps_the_model_factory() -> None:
    plain = Identity.of("sbr", "c", Config(), CPU)
    assert Identity.of("sbr", "c", Config(), CPU, "shuffled_words") != plain
    assert plain.factory == ""


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("llmgr.language_model.decoder.base_model.model.layers.0.mlp.up_proj.base_layer.weight", False),
        ("llmgr.language_model.decoder.base_model.model.embed_tokens.weight", False),
        ("llmgr.language_model.decoder.base_model.model.layers.0.mlp.up_proj.lora_A.default.weight", True),
        ("llmgr.recommender.item_tables.ebc.embedding_bags.item_id.weight", True),
        ("llmgr.head.query.weight", True),
    ],
)
def test_the_base_language_model_is_not_stored(name: str, stored: bool) -> None:
    assert is_stored(name) is stored
