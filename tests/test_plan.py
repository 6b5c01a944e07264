"""The plan command: sizes, remedies and exit codes without data, memory or ranks."""

import re
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from llmgr_rec.config import Config
from llmgr_rec.distributed.sharding import GIB
from llmgr_rec.errors import UserError
from llmgr_rec.plan import main
from llmgr_rec.storage.pretrained import load_decoder
from llmgr_rec.training.memory_plan import FROZEN, CatalogSizes, Ranks, StagePlan, plan_memory

TINY = ["--llm.name_or_path", "random-tiny"]
LLM_TEXT = ["--num_items", "5", "--config", "llm_text", *TINY]


def settings() -> Config:
    """Settings that train the stages sbr, align and behave with a small language model."""
    config = Config()
    config.tables.dim = 64
    config.llm.name_or_path, config.llm.lora_rank = "random-tiny", 2
    config.llm.dtype = config.loss.dtype = "float32"
    config.align.epochs = config.behave.epochs = 1
    return config


def stage_plans(config: Config, sizes: CatalogSizes, world_size: int = 2) -> dict[str, StagePlan]:
    return {plan.spec.stage: plan for plan in plan_memory(config, sizes, Ranks(world_size, world_size, "cpu"))}


def test_a_hundred_million_items_are_planned_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()
    main(["--config", "llm", "--tables.dim", "64", "--num_items", "100000000", "--world_size", "16", *TINY])
    assert time.process_time() - start < 20
    shown = capsys.readouterr().out
    # 1e8 rows of 64 float32 with as much Adagrad state, on 16 ranks.
    assert re.search(r"item_id +100000000 +64 +column_wise +0-15 +2\.980 +adagrad, state 23\.842 GiB", shown)
    assert "pipelined lookups: recommender.item_tables.ebc" in shown
    assert shown.count("fits: at most") == 3


def test_what_does_not_fit_names_a_remedy_that_helps(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--num_items", "100000000", "--tables.dim", "64", *TINY]
    with pytest.raises(UserError, match=r"stage sbr: table item_id.*start (\d+) ranks") as caught:
        main([*arguments, "--world_size", "2"])
    assert "DOES NOT FIT into 8 GiB per rank" in capsys.readouterr().out
    ranks = re.search(r"start (\d+) ranks", str(caught.value))
    assert ranks is not None
    main([*arguments, "--world_size", ranks.group(1)])
    table_wise = [*arguments, "--world_size", "64", "--tables.sharding", "table_wise"]
    with pytest.raises(UserError, match=r"set --tables.sharding column_wise") as alone:
        main(table_wise)
    assert "start" not in str(alone.value), "no number of ranks helps a table that is never sharded"


def test_stages_train_and_keep_what_the_settings_say() -> None:
    config = settings()
    found = stage_plans(config, CatalogSizes(1000, {"category": 30}))
    sbr, align, behave = (found[stage] for stage in ("sbr", "align", "behave"))
    assert [table.footprint.table for table in sbr.tables] == ["item_id", "category"]
    assert [table.footprint.state_bytes for table in sbr.tables] == [4 * 64 * 1000, 4 * 64 * 30]
    assert [table.footprint.table for table in behave.tables] == ["item_id", "category", "item_text"]
    assert all(table.footprint.state_bytes == 0 for table in behave.tables)
    assert [table.bytes_per_rank for table in sbr.tables] == [
        dict.fromkeys(range(2), 4 * 64 * rows) for rows in (1000, 30)
    ]
    assert sbr.parameters.keys() == {"encoder"}
    assert align.parameters.keys() == {"adapter", "head", FROZEN}
    assert behave.parameters.keys() == {"adapter", "head", "lora", FROZEN}
    assert align.parameters[FROZEN] == behave.parameters[FROZEN] + behave.parameters["lora"]
    assert behave.parameters["lora"] == lora_parameters(config)
    assert not any(plan.problem or plan.blocking for plan in found.values())
    # A small frozen catalog is cached, so its text is not looked up while training.
    assert behave.pipelined == ["llmgr.recommender.item_tables.ebc"]
    assert behave.cached_bytes == 4 * 1000 * (64 + 64 + 64)


def lora_parameters(config: Config) -> int:
    from torch import nn

    from llmgr_rec.storage.pretrained import load_decoder

    linear = [
        part for part in load_decoder("random-tiny", config.llm.num_layers).modules() if isinstance(part, nn.Linear)
    ]
    return sum(config.llm.lora_rank * (part.in_features + part.out_features) for part in linear)


def test_a_large_catalog_looks_its_text_up() -> None:
    behave = stage_plans(settings(), CatalogSizes(300_000))["behave"]
    assert behave.pipelined == ["llmgr.recommender.item_tables.ebc", "llmgr.text_tables"]
    assert behave.cached_bytes == 0


@pytest.mark.parametrize("stage", ["behave", "llm_text"])
def test_a_sharded_language_model_takes_its_part_of_memory(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings()
    if stage == "llm_text":
        config.llm_text.epochs, config.text_encoder.dim = 1, 16
        config.align.epochs = config.behave.epochs = 0
    whole = stage_plans(config, CatalogSizes(1000), world_size=4)[stage]
    config.llm.fsdp = True
    alone, sharded = (stage_plans(config, CatalogSizes(1000), world_size=size)[stage] for size in (1, 4))
    decoder = load_decoder("random-tiny", config.llm.num_layers, "float32")
    numbers = sum(parameter.numel() for parameter in decoder.parameters())
    held = 16 * numbers if stage == "llm_text" else 4 * numbers + 16 * whole.parameters["lora"]
    assert alone.dense_bytes == whole.dense_bytes
    assert sharded.parameters == whole.parameters
    assert whole.dense_bytes - sharded.dense_bytes == pytest.approx(0.75 * held, rel=1e-3)
    main(["--config", "llm", "--num_items", "1000", "--world_size", "4", "--llm.fsdp", "true", *TINY])
    # In align and behave: the session recommender has no language model.
    assert capsys.readouterr().out.count("the language model is sharded across 4 ranks") == 2


def test_each_table_wise_table_is_on_one_rank() -> None:
    config = settings()
    config.tables.sharding = "table_wise"
    sbr = stage_plans(config, CatalogSizes(1000, {"category": 900}))["sbr"]
    assert sorted(rank for table in sbr.tables for rank in table.bytes_per_rank) == [0, 1]
    assert sbr.tables[0].bytes_per_rank.popitem()[1] == 2 * 4 * 64 * 1000
    assert sbr.tables[0].footprint.gib == pytest.approx(2 * 4 * 64 * 1000 / GIB)


def test_a_plan_counts_what_is_not_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--num_items", "100000000", "--num_words", "1000", "--world_size", "64"]
    measured = ["--num_interactions", "1000000000", "--examples_per_second", "20000"]
    main([*arguments, *measured])
    shown = capsys.readouterr().out
    # A 64th of the items, 8 bytes for 100 neighbors of two kinds, of which the weighted ones share the indices, and
    # their sum.
    assert re.search(r"in selection neighbors +5\.821 GiB", shown)
    assert re.search(r"in selection smoothing of cold items +1\.607", shown)
    assert re.search(r"always +columns of the catalog +\d", shown)
    # Of 128 columns of 4 bytes, that is 0.745 GiB, as many bytes as the tables.
    assert "item vectors for ranking: 0.745 GiB per rank, computed in blocks" in shown
    assert not re.search(r"in selection item vectors", shown)
    assert "about 7,812,500 steps of 512 examples in 4 epochs; 2 days, 7:33:20 at 20000 examples/s" in shown
    # A 64th of the tables, without the state of their optimizer, on the 32 ranks that have them: 1.49 GiB.
    assert re.search(r"always +mean of the weights +1\.49", shown)
    # 4 columns are the narrowest shard, so that 128 columns are on 32 ranks.
    assert "warning: 32 of 64 ranks hold no table, or less than a tenth" in shown
    assert "start 32 ranks" in shown
    with pytest.raises(
        UserError, match=r"stage sbr needs about \d+\.\d+ GiB on a rank, and --memory_per_rank_gb is 15"
    ):
        main([*arguments, "--memory_per_rank_gb", "15"])
    assert "DOES NOT FIT into 15 GiB" in capsys.readouterr().out
    # Lists of half a million sessions, of 100 items with 15 features, twice.
    main(["--num_items", "1000", "--num_interactions", "10000000", "--blend.reranker", "lambdamart"])
    assert re.search(r"in selection re-ranker +6\.828 GiB", capsys.readouterr().out)
    main(["--num_items", "1000", "--memory_per_rank_gb", "2"])
    shown = capsys.readouterr().out
    assert "fits into 2 GiB" in shown
    assert "warning" not in shown


def test_a_head_with_a_row_an_item_is_planned_without_memory(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", "llm", "--num_items", "100000000", "--world_size", "64", "--head.name", "linear", *TINY])
    assert "head 6,500,000,000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nowhere", "--num_interactions", "5"], "--num_interactions goes with --num_items"),
        ([], "either --dataset DATASET or --num_items N"),
        (["--num_items", "0"], "--num_items is 0"),
        (["--num_items", "5", "--num_words", "-5"], "--num_words is -5; give 0 or more"),
        (["--num_items", "5", "--world_size", "0"], "--world_size is 0"),
        (["--num_items", "5", "--world_size", "6", "--local_world_size", "4"], "--local_world_size 4 does not divide"),
        (["--num_items", "5", "--dataset", "nowhere"], "either --dataset DATASET or --num_items N"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--num_items", "5", "--tables.dim", "30"], "setting tables.dim is 30; give a multiple of 4"),
        (["--num_items", "5", "--tables.lr", "-1"], "setting tables.lr is -1"),
        ([*LLM_TEXT, "--text_encoder.dim", "126"], "setting text_encoder.dim is 126; give a multiple of 4"),
        (
            [*LLM_TEXT, "--text_encoder.dim", "128"],
            "setting text_encoder.dim is 128, but random-tiny has 64 columns; give 64 at most",
        ),
        (["--num_items", "5", "--tables.dimm", "32"], "tables.dim"),
        (["--num_items", "5", "--world_size", "2", "--blend.reranker", "lambdamart"], "which one rank fits, but there"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main([*arguments, *TINY])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_exits_with_2_and_helps_fast() -> None:
    failed = subprocess.run(
        [sys.executable, "-m", "llmgr_rec.plan", "--world_size", "0", "--num_items", "5"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert failed.returncode == 2
    assert failed.stderr == "error: --world_size is 0; give 1 or more\n"


@pytest.mark.parametrize("recipe", ["llm", "llm_text"])
def test_a_plan_takes_no_memory_for_the_items(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A billion items would take 8 GiB of offsets of their texts."""
    zeros = torch.zeros

    def small_zeros(*size: Any, **options: Any) -> torch.Tensor:
        made = zeros(*size, **options)
        assert made.device.type == "meta" or made.numel() < 1_000_000
        return made

    monkeypatch.setattr(torch, "zeros", small_zeros)
    tiny = ["--llm.name_or_path", "random-tiny", "--llm.num_layers", "1", "--text_encoder.dim", "16"]
    with pytest.raises(UserError, match="with 1000000000 rows"):
        main(["--config", recipe, "--num_items", "1000000000", *tiny])
