"""Experiments as files, and the messages about mistakes in them."""

import pytest

from llmgr_rec.config_file import load_config
from llmgr_rec.errors import UserError
from llmgr_rec.experiments.experiment import Variant, experiment_names, load_experiment


@pytest.mark.parametrize("name", experiment_names())
def test_every_shipped_experiment_loads(name):
    experiment = load_experiment(name)
    assert experiment.reference in {variant.name for variant in experiment.variants}


def test_settings_of_a_variant_override_those_of_the_experiment(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text(
        "settings: {sbr.epochs: 3, tables.dim: 32, prompt.one_pass: true, prompt.templates: compact}\n"
        "variants:\n  a: {model: sbr}\n  b: {settings: {sbr.epochs: 4}}\n"
    )
    experiment = load_experiment(str(file))
    first, second = (experiment.config_of(variant, seed=7) for variant in experiment.variants)
    assert (first.sbr.epochs, second.sbr.epochs, second.tables.dim, second.seed) == (3, 4, 32, 7)
    assert (first.align.epochs, first.behave.epochs) == (0, 0)
    assert (second.align.epochs, second.behave.epochs) == (1, 1)
    assert second.prompt.one_pass
    assert experiment.reference == "a"


def test_a_variant_is_blended_as_its_settings_say(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text(
        "config: default\nvariants:\n  a: {model: sbr}\n  b: {model: sbr, settings: {blend.neighbors: []}}\n"
        "  c: {model: sbr, settings: {blend.neighbors: [item_knn], blend.weights: [2.0]}}\n"
    )
    experiment = load_experiment(str(file))
    inherited, alone, given = (experiment.config_of(variant, seed=0).blend for variant in experiment.variants)
    assert inherited == load_config("default").blend
    assert inherited.neighbors == ["item_knn", "text_knn"]
    assert alone.neighbors == []
    assert (given.neighbors, given.weights) == (["item_knn"], [2.0])


def test_a_variant_is_compared_with_the_one_it_names_or_with_the_reference(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text("reference: b\nvariants: {a: {model: sbr}, b: {model: sbr}, c: {against: a}}\n")
    experiment = load_experiment(str(file))
    assert [experiment.against(name) for name in ("a", "b", "c")] == ["b", "b", "a"]


def test_each_backbone_of_the_experiment_on_their_quality_stands_alone_and_below_an_llmgr_compared_with_it():
    experiment = load_experiment("backbone_quality")
    by_name = {variant.name: variant for variant in experiment.variants}
    pairs = [(variant, by_name[variant.against]) for variant in experiment.variants if variant.model == "llmgr"]
    assert 2 * len(pairs) == len(by_name)
    kinds, epochs = set(), set()
    for llmgr, alone in pairs:
        assert alone.model == "sbr"
        with_llm, without = (experiment.config_of(variant, seed=0) for variant in (llmgr, alone))
        assert (with_llm.encoder, with_llm.sbr) == (without.encoder, without.sbr)
        kinds.add(without.encoder.name)
        epochs.add(without.sbr.epochs)
    assert kinds == {"gcsan", "srgnn", "gru4rec", "stamp", "sasrec"}
    assert {0, 1} < epochs


def test_a_grid_has_a_point_for_each_combination():
    variant = Variant(
        "a", "sbr", {"sbr.epochs": 2, "tables.dim": 4}, grid={"tables.dim": [8, 16], "sbr.lr": [0.1, 0.2]}
    )
    points = variant.points()
    assert [point.settings for point in points] == [
        {"sbr.epochs": 2, "tables.dim": dim, "sbr.lr": lr} for dim in (8, 16) for lr in (0.1, 0.2)
    ]
    assert not any(point.grid for point in points)
    assert Variant("b", "sbr", {"sbr.epochs": 2}).points() == [Variant("b", "sbr", {"sbr.epochs": 2})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x\n", "has no variants"),
        ("variants: {a: {modle: sbr}}\n", "variant a: unknown key modle, did you mean model?"),
        ("variants: {a: {model: sbb}}\n", "variant a: sbb is not known, did you mean sbr?"),
        ("variants: {a: {settings: {sbr.epoch: 3}}}\n", "variant a: .*sbr.epoch"),
        ("variants: {a: {settings: {sbr.epochs: -3}}}\n", "variant a: setting sbr.epochs is -3"),
        (
            "settings: {align.epochs: 0, behave.epochs: 0}\nvariants: {a: {}}\n",
            "variant a: model llmgr has no stage to train",
        ),
        (
            "variants: {a: {model: sbr, grid: {tables.dim: 8}}}\n",
            "variant a: grid needs a list of values for tables.dim",
        ),
        ("variants: {a: {model: sbr, grid: {tables.dim: [8, -8]}}}\n", "variant a: setting tables.dim is -8"),
        (
            "variants: {a: {model: item_knn, grid: {tables.dim: [8]}}}\n",
            "variant a: grid is for models that are trained",
        ),
        ("reference: b\nvariants: {a: {}}\n", "reference b is not one of its variants"),
        (
            "variants: {aaa: {}, b: {against: aab}}\n",
            "variant b: against aab is not one of its variants, did you mean aaa?",
        ),
        ("variants: {aa: {}, b: {against: zz}}\n", "against zz is not one of its variants; known: aa, b"),
        ("variants: {a: {}, b: {against: b}}\n", "variant b: against is the variant itself"),
        ("variants:\n  a: {model: sbr}\n  a: {model: item_knn}\n", "a is given twice"),
        (
            "variants: {a: {model: item_knn, settings: {sbr.epochs: 3}}}\n",
            "variant a: settings are for models that are",
        ),
        ("variants: {a: {settings: {blend.neighbors: [item_knm]}}}\n", "variant a: .*item_knm"),
        ("variants: {a: {model: sbr, blend: item_knn}}\n", "variant a: unknown key blend"),
        ("variants: {a: {controls: [random_lm]}}\n", "control random_lm is not known, did you mean random_llm"),
        ("variants: {a: {controls: random_llm}}\n", "variant a: controls is 'random_llm', not a list"),
        ("variants: {a: {model: item_knn, controls: [random_llm]}}\n", "variant a: controls are for models that are"),
        ("variants: [\n", "is not valid YAML"),
        ("settings: [tables.lr]\nvariants: {a: {}}\n", r": settings is \['tables.lr'\], not a mapping"),
        ("variants: {a: 3}\n", "variant a is 3, not a mapping"),
        ("variants: {a: {model: sbr, grid: [1]}}\n", r"variant a grid is \[1\], not a mapping"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, message):
    file = tmp_path / "e.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_experiment(str(file))


def test_sections_may_be_left_empty(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text("settings:\nvariants:\n  a:\n  b:\n    model: sbr\n    settings:\n    grid:\n")
    experiment = load_experiment(str(file))
    assert [
        dict(values) for values in (experiment.settings, experiment.variants[1].settings, experiment.variants[1].grid)
    ] == [{}] * 3


def test_an_unknown_name_is_reported_with_the_nearest():
    with pytest.raises(UserError, match=r"no experiment or YAML file named backbone, did you mean backbones\?"):
        load_experiment("backbone")
