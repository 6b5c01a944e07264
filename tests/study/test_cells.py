"""What runs and cells of a study share, what tells them apart, and that studies may run side by side."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

from llmgr_rec.config import Config
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.prompt_files import load_templates
from llmgr_rec.distributed.bundle import load_bundle
from llmgr_rec.errors import UserError
from llmgr_rec.experiments import main
from llmgr_rec.study import cells
from llmgr_rec.study.recipe import load_study
from tests.small_run import prepare_small, small_run, write_log


def test_runs_share_a_recommender_that_reads_what_they_do(tmp_path, monkeypatch):
    monkeypatch.setattr(cells.Bench, "_train", lambda *_: 0.0)
    monkeypatch.setattr(cells.Bench, "_train_on", lambda *_: 0.0)
    bench = cells.Bench(tmp_path, small_run().dataset, "test")

    def run_of(model, **settings):
        config = Config()
        config.text.epochs = 1
        for name, value in settings.items():
            part, _, setting = name.partition("__")
            setattr(getattr(config, part), setting, value)
        return bench._trained(model, config)[0]

    text_makers = ({"llm__num_layers": 2}, {"llm__name_or_path": "random-tiny"})
    text_makers += ({"prompt__max_text_tokens": 8}, {"prompt__text_fields": ["title"]})
    text_makers += ({"controls__random_llm": True}, {"controls__shuffled_text": True})
    for change in text_makers:
        assert run_of("text", **change) != run_of("text")
        assert run_of("sbr", **change) == run_of("sbr")
    for change in ({"llm__lora_rank": 4}, {"prompt__max_nodes": 4}, {"controls__no_graph": True}):
        assert run_of("text", **change) == run_of("text")
    for change in ({"sbr__one_pass": True}, {"controls__shuffled_words": True}):
        assert run_of("sbr", **change) != run_of("sbr")


def test_rows_drawn_by_another_number_of_clicks_train_nothing_anew(tmp_path):
    config = Config()
    config.tables.dim, config.sbr.epochs = 8, 1
    config.runtime.device, config.runtime.threads_per_rank = "cpu", 1
    bench = cells.Bench(tmp_path, small_run().dataset, "valid")

    def trained(clicks):
        # Another recipe may ask, with other settings of the stages that come later.
        config.llm.dtype = "float32" if clicks else "bfloat16"
        run = bench._trained("sbr", replace(config, tables=replace(config.tables, neighbour_clicks=clicks)))[0]
        model = load_bundle(run / "export" / "sbr").model
        return run, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    plain, before = trained(0.0)
    drawn, after = trained(2.0)
    assert (plain / "metrics.jsonl").is_file()
    assert not (drawn / "metrics.jsonl").exists(), "the recommender was trained again"
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert len(moved) == 1
    assert "item_id" in moved.pop()


def test_settings_that_train_nothing_have_no_part_in_the_name_of_a_run(tmp_path):
    bench = cells.Bench(tmp_path, small_run().dataset, "test")

    def run_of(model="llmgr", **settings):
        config = Config()
        config.text.epochs = settings.pop("text__epochs", 0)
        for name, value in settings.items():
            part, _, setting = name.partition("__")
            setattr(getattr(config, part), setting, value)
        return bench._run(model, config)

    assert run_of(prior__kept=7) == run_of(text__dim=7) == run_of()
    assert run_of("text", text__epochs=1, text__clicks=7) != run_of("text", text__epochs=1)
    # What its score counts is chosen when it is trained.
    assert run_of("text", text__epochs=1, text__score_weight=1.0) == run_of("text", text__epochs=1)
    assert run_of(align__epochs=0) == run_of(align__epochs=0, align__lr=1.0) != run_of()


def test_an_edited_prompt_file_is_another_one(tmp_path):
    bench = cells.Bench(tmp_path, small_run().dataset, "test")
    config = Config()
    texts = {task: template.text for task, template in load_templates(config.prompt.templates).items()}
    config.prompt.templates = str(tmp_path / "prompts.yaml")
    (tmp_path / "prompts.yaml").write_text(json.dumps(texts))
    before = bench._run("llmgr", config)
    assert before == bench._run("llmgr", Config())
    (tmp_path / "prompts.yaml").write_text(json.dumps(texts | {"behave": f"Well: {texts['behave']}"}))
    assert bench._run("llmgr", config) != before


def test_what_was_trained_on_other_texts_or_sessions_of_the_same_items_is_not_taken(tmp_path):
    def prepared(name, **changes):
        interactions, items = write_log(tmp_path / name / "raw")
        if "title" in changes:
            table = pq.read_table(items)
            titles = pa.array([changes.pop("title")] * table.num_rows)
            pq.write_table(table.set_column(table.schema.get_field_index("title"), "title", titles), items)
        settings = {"min_interactions": 0, "threads": 1, "max_length": 50} | changes
        output = str(tmp_path / name / "dataset")
        prepare_dataset(PrepareSettings(interactions=str(interactions), items=str(items), output=output, **settings))
        return Dataset(output)

    plain, again = prepared("plain"), prepared("again")
    titled, cut = prepared("titled", title="Thing"), prepared("cut", max_length=5)
    assert len({data.manifest.catalogue_hash for data in (plain, again, titled, cut)}) == 1
    keys = [cells.Bench(tmp_path, data, "test")._key("x") for data in (plain, again, titled, cut)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_baselines_of_studies_side_by_side_are_written_without_a_clash(tmp_path):
    recipe = tmp_path / "popular.yaml"
    recipe.write_text("variants:\n  Popularity: {model: popularity}\n")
    study = load_study(str(recipe))
    folder, dataset = tmp_path / "out", small_run().dataset
    cell = cells.Bench(folder, dataset, "test").cell(study, study.variants[0], 0)
    (file,) = (folder / "cells").iterdir()
    file.unlink()
    # What another process left half-written under its own number.
    other = file.with_suffix(f".{os.getpid() + 1}.tmp.npz")
    other.write_bytes(b"half")
    again = cells.Bench(folder, dataset, "test").cell(study, study.variants[0], 0)
    assert np.array_equal(cell.places_S, again.places_S)
    assert other.read_bytes() == b"half"


def test_tables_of_both_splits_stand_side_by_side_and_none_is_replaced_by_one_of_other_sessions(tmp_path):
    file = tmp_path / "counts.yaml"
    file.write_text("variants: {popular: {model: popularity}}\n")
    words = ["--recipe", str(file), "--output", str(tmp_path / "out"), "--dataset"]
    main([*words, str(small_run().dataset.path)])
    main([*words, str(small_run().dataset.path), "--split", "valid"])
    tables = [(tmp_path / "out" / f"{name}.md").read_text() for name in ("counts", "counts-valid")]
    assert ["90 test sessions" in table for table in tables] == [True, False]
    other = prepare_small(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"out holds counts of another data set, .*; give another --output"):
        main([*words, str(other.path)])


def test_a_study_takes_over_what_another_one_trains_meanwhile(tmp_path, monkeypatch):
    bench = cells.Bench(tmp_path, small_run().dataset, "test")
    run = tmp_path / "runs" / "sbr-x"
    run.mkdir(parents=True)
    monkeypatch.setattr(cells, "train_run", lambda *_: pytest.fail("trained twice"))
    (tmp_path / "locks").mkdir()
    lock = FileLock(tmp_path / "locks" / run.name)
    with ThreadPoolExecutor(1) as pool, lock:
        found = pool.submit(bench._train, Config(), run)
        time.sleep(0.5)
        assert not found.done()
        (run / "seconds").write_text("3.5")
        lock.release()
        assert found.result(timeout=20) == 3.5


def test_an_untrained_recommender_may_have_its_rare_rows_drawn(tmp_path):
    file = tmp_path / "untrained.yaml"
    file.write_text("variants: {blank: {model: sbr, settings: {sbr.epochs: 0, tables.neighbour_clicks: 2.0}}}\n")
    output = str(tmp_path / "out")
    main(["--recipe", str(file), "--dataset", str(small_run().dataset.path), "--output", output, "--seeds", "0"])
    assert json.loads((tmp_path / "out" / "untrained.json").read_text())["variants"].keys() == {"blank"}
