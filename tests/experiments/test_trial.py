"""What the runs and trials of experiments share, what tells them apart, and that experiments may run in parallel."""

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
from llmgr_rec.config_file import save_config
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.prompt_templates import load_templates
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.evaluate_run import EvaluationRequest, evaluate_run
from llmgr_rec.experiments import runs
from llmgr_rec.experiments.__main__ import main
from llmgr_rec.experiments.compare import ndcg
from llmgr_rec.experiments.experiment import load_experiment
from llmgr_rec.experiments.runs import SharedRuns
from llmgr_rec.experiments.trial import TrialRunner
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.training.preflight import RunRequest
from llmgr_rec.training.train_run import train_run
from tests.small_run import prepare_small, small_run, write_log


def run_of(folder, model, controls=(), **settings):
    """Name of the run in which a model is trained under some settings, such as llm__num_layers=2."""
    config = Config()
    config.tables.knn_smoothing = [0.0]
    config.llm_text.epochs = int(model == "llm_text")
    config.align.epochs = config.behave.epochs = int(model == "llmgr")
    for name, value in settings.items():
        part, _, setting = name.partition("__")
        setattr(getattr(config, part), setting, value)
    return SharedRuns(folder, small_run().dataset).run_folder(model, config, controls).name


def test_a_run_is_named_by_what_its_model_reads(tmp_path):
    def changes(model, **settings):
        return run_of(tmp_path, model, **settings) != run_of(tmp_path, model)

    text_settings = ({"llm__num_layers": 2}, {"llm__name_or_path": "random-tiny"})
    text_settings += (
        {"prompt__max_text_tokens": 8},
        {"prompt__text_fields": ["title"]},
        {"text_encoder__max_clicks": 7},
    )
    for change in text_settings:
        assert changes("llm_text", **change)
        assert not changes("sbr", **change)
    for change in ({"llm__lora_rank": 4}, {"prompt__max_nodes": 4}):
        assert changes("llmgr", **change)
        assert not changes("llm_text", **change)
    for model, controls in (("llm_text", ["random_llm"]), ("llm_text", ["shuffled_text"]), ("sbr", ["shuffled_words"])):
        assert changes(model, controls=controls)
        assert changes("llmgr", controls=controls)
        assert changes("sbr", controls=controls) == (model == "sbr")
    assert changes("llmgr", controls=["no_graph"])
    assert not changes("llm_text", controls=["no_graph"])
    assert changes("sbr", encoder__one_pass=True)
    assert changes("llmgr", align__epochs=0)
    assert not changes("llmgr", text_encoder__max_clicks=7)
    assert run_of(tmp_path, "llmgr", align__epochs=0, align__lr=1.0) == run_of(tmp_path, "llmgr", align__epochs=0)


def test_what_is_selected_after_training_is_no_part_of_the_name_of_a_run(tmp_path):
    blend = {"blend__neighbors": ["item_knn"], "blend__weights": [2.0], "blend__k_neighbors": 7}
    for model in ("sbr", "llm_text", "llmgr"):
        plain = run_of(tmp_path, model)
        assert run_of(tmp_path, model, **blend) == plain
        assert run_of(tmp_path, model, text_encoder__score_weight=[1.0]) == plain
    assert run_of(tmp_path, "sbr", tables__knn_smoothing=[2.0]) == run_of(tmp_path, "sbr")


def test_later_stages_go_on_from_the_recommender_as_it_was_smoothed(tmp_path):
    for model in ("llm_text", "llmgr"):
        names = [
            run_of(tmp_path, model, tables__knn_smoothing=strengths) for strengths in ([0.0], [1.0], [2.0], [0.0, 2.0])
        ]
        # Of several strengths the one is selected that is best with the neighbors.
        blended = {"blend__neighbors": ["item_knn"]}
        names += [run_of(tmp_path, model, tables__knn_smoothing=[0.0, 2.0], **blended)]
        assert len({*names}) == 5
        assert run_of(tmp_path, model, tables__knn_smoothing=[2.0], **blended) == names[2]


def test_a_later_stage_with_another_smoothing_strength_trains_no_recommender_anew(tmp_path, monkeypatch):
    config = Config()
    config.tables.dim, config.sbr.epochs = 8, 1
    config.llm.name_or_path, config.llm.num_layers, config.llm.lora_rank = "random-tiny", 1, 2
    config.align.epochs, config.behave.epochs, config.behave.max_steps = 0, 1, 1
    config.runtime.device, config.runtime.threads_per_rank = "cpu", 1
    trained = []
    train = runs.train_run
    monkeypatch.setattr(runs, "train_run", lambda request: trained.append(request.output.name) or train(request))
    shared = SharedRuns(tmp_path, small_run().dataset)
    plain = load_bundle(shared.trained("sbr", config).folder / "export" / "sbr").model.state_dict()
    config = replace(config, tables=replace(config.tables, knn_smoothing=[2.0]))
    full = shared.trained("llmgr", config).folder
    assert [name.split("-")[0] for name in trained] == ["sbr", "smoothed", "llmgr"]
    assert not (tmp_path / "runs" / trained[1] / "metrics.jsonl").exists(), "the recommender was trained again"
    smoothed = load_bundle(full / "export" / "sbr").model.state_dict()
    (moved,) = (name for name, tensor in plain.items() if not torch.equal(smoothed[name], tensor))
    assert "item_id" in moved
    assert (full / "export" / "behave").is_dir()


def test_an_edited_prompt_file_is_another_one(tmp_path):
    texts = {task: template.text for task, template in load_templates(Config().prompt.templates).items()}
    file = tmp_path / "prompts.yaml"
    file.write_text(json.dumps(texts))
    before = run_of(tmp_path, "llmgr", prompt__templates=str(file))
    assert before == run_of(tmp_path, "llmgr")
    file.write_text(json.dumps(texts | {"behave": f"Well: {texts['behave']}"}))
    assert run_of(tmp_path, "llmgr", prompt__templates=str(file)) != before


def test_a_trial_has_the_figures_of_a_run_with_its_settings(tmp_path):
    settings = "tables.dim: 8, tables.dtype: float16, sbr.epochs: 2, runtime.device: cpu, runtime.threads_per_rank: 1"
    selected = "blend.neighbors: [item_knn, text_knn], tables.knn_smoothing: [0.0, 2.0]"
    file = tmp_path / "blend.yaml"
    file.write_text(f"settings: {{{settings}}}\nvariants: {{blend: {{model: sbr, settings: {{{selected}}}}}}}\n")
    experiment, dataset = load_experiment(str(file)), small_run().dataset
    (variant,) = experiment.variants
    trial = TrialRunner(tmp_path / "out", dataset, "test").trial(experiment, variant, 3)
    run = tmp_path / "run"
    train_run(RunRequest(experiment.config_of(variant, 3), dataset.path, run, "all", resume=False))
    found = evaluate_run(EvaluationRequest(run, dataset.path, "test", tmp_path / "metrics.json", ["sbr"]))
    assert ndcg(trial.target_ranks_S).mean() == pytest.approx(found["test"]["sbr"]["ndcg@20"], abs=1e-9)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (record,) = (line for line in records if line.get("split") == "selection")
    assert trial.valid_ndcg == pytest.approx(record["ndcg@20"], abs=1e-9)
    assert trial.selected == {name: record[name] for name in ("item_knn", "text_knn", "knn_smoothing")}


def test_a_trial_has_the_text_encoder_of_its_variant(tmp_path):
    settings = "tables.dim: 8, sbr.epochs: 1, runtime.device: cpu, runtime.threads_per_rank: 1"
    encoder = "blend.neighbors: [], blend.embedding_model: llm, blend.weights: [4.0], llm.name_or_path: random-tiny"
    variants = ", ".join(
        f"{layers}: {{model: sbr, settings: {{{encoder}, llm.num_layers: {layers}}}}}" for layers in (1, 2)
    )
    file = tmp_path / "layers.yaml"
    file.write_text(f"settings: {{{settings}}}\nvariants: {{{variants}}}\n")
    experiment, runner = load_experiment(str(file)), TrialRunner(tmp_path / "out", small_run().dataset, "test")
    ranks = [runner.trial(experiment, variant, 0).target_ranks_S.tolist() for variant in experiment.variants]
    assert len({runner.recommender_of(experiment, variant, 0) for variant in experiment.variants}) == 1
    assert ranks[0] != ranks[1]


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
    assert len({data.manifest.catalog_hash for data in (plain, again, titled, cut)}) == 1
    keys = [SharedRuns(tmp_path, data).key("x") for data in (plain, again, titled, cut)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_baselines_of_experiments_in_parallel_are_written_without_a_clash(tmp_path):
    (tmp_path / "popular.yaml").write_text("variants:\n  Popularity: {model: popularity}\n")
    experiment = load_experiment(str(tmp_path / "popular.yaml"))
    folder, dataset = tmp_path / "out", small_run().dataset
    trial = TrialRunner(folder, dataset, "test").trial(experiment, experiment.variants[0], 0)
    (file,) = (folder / "trials").iterdir()
    file.unlink()
    # What another process left half-written under its own number.
    other = file.with_suffix(f".{os.getpid() + 1}.tmp.npz")
    other.write_bytes(b"half")
    again = TrialRunner(folder, dataset, "test").trial(experiment, experiment.variants[0], 0)
    assert np.array_equal(trial.target_ranks_S, again.target_ranks_S)
    assert other.read_bytes() == b"half"


def test_tables_of_both_splits_stand_side_by_side_and_none_is_replaced_by_one_of_other_sessions(tmp_path):
    file = tmp_path / "counts.yaml"
    file.write_text("variants: {popular: {model: popularity}}\n")
    words = ["--experiment", str(file), "--output", str(tmp_path / "out"), "--dataset"]
    main([*words, str(small_run().dataset.path)])
    main([*words, str(small_run().dataset.path), "--split", "valid"])
    tables = [(tmp_path / "out" / f"{name}.md").read_text() for name in ("counts", "counts-valid")]
    assert ["90 test sessions" in table for table in tables] == [True, False]
    other = prepare_small(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"out has counts of another data set, .*; give another --output"):
        main([*words, str(other.path)])


def test_an_experiment_waits_for_a_run_that_another_one_trains(tmp_path, monkeypatch):
    shared = SharedRuns(tmp_path, small_run().dataset)
    run = tmp_path / "runs" / "sbr-x"
    run.mkdir(parents=True)
    monkeypatch.setattr(runs, "train_run", lambda *_: pytest.fail("trained twice"))
    (tmp_path / "locks").mkdir()
    lock = FileLock(tmp_path / "locks" / run.name)
    with ThreadPoolExecutor(1) as pool, lock:
        found = pool.submit(shared._train, run, Config(), ModelFactory())
        time.sleep(0.5)
        assert not found.done()
        (run / "seconds").write_text("3.5")
        lock.release()
        assert found.result(timeout=20).seconds == 3.5


def test_an_untrained_recommender_may_be_smoothed(tmp_path):
    file = tmp_path / "untrained.yaml"
    file.write_text("variants: {blank: {model: sbr, settings: {sbr.epochs: 0, tables.knn_smoothing: [2.0]}}}\n")
    output = str(tmp_path / "out")
    main(["--experiment", str(file), "--dataset", str(small_run().dataset.path), "--output", output, "--seeds", "0"])
    assert json.loads((tmp_path / "out" / "untrained.json").read_text())["variants"].keys() == {"blank"}


def test_settings_of_a_started_run_that_were_cut_are_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train_run", lambda *_: pytest.fail("another variant was trained"))
    shared = SharedRuns(tmp_path, small_run().dataset)
    config = Config()
    config.sbr.lr = 0.007
    run = shared.run_folder("sbr", config)
    run.mkdir(parents=True)
    save_config(config, run / "config.yaml")
    text = (run / "config.yaml").read_text()
    # A shorter file is valid: what it lacks has default values.
    (run / "config.yaml").write_text(text[: text.index("sbr:")])
    with pytest.raises(UserError, match=rf"{run}/config\.yaml has other settings than .*; delete {run} to train again"):
        shared._train(run, config, ModelFactory())
    (run / "seconds").write_text("")
    with pytest.raises(UserError, match=rf"{run}/seconds is damaged"):
        shared._train(run, config, ModelFactory())
