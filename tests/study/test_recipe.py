"""Experiments as files, and what is said of mistakes in them."""

import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.recipes import load_config
from llmgr_rec.study.recipe import Variant, load_study, study_names


@pytest.mark.parametrize("name", study_names())
def test_every_shipped_experiment_loads(name):
    study = load_study(name)
    assert study.reference in {variant.name for variant in study.variants}


def test_settings_of_a_variant_lie_over_those_of_the_study(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text(
        "settings: {sbr.epochs: 3, tables.dim: 32, behave.one_pass: true, prompt.templates: compact}\n"
        "variants:\n  a: {model: sbr}\n  b: {settings: {sbr.epochs: 4}}\n"
    )
    study = load_study(str(file))
    first, second = (study.settings_of(variant, seed=7) for variant in study.variants)
    assert (first.sbr.epochs, second.sbr.epochs, second.tables.dim, second.seed) == (3, 4, 32, 7)
    assert (first.align.epochs, first.behave.epochs) == (0, 0)
    assert (second.align.epochs, second.behave.epochs) == (1, 1)
    assert second.behave.one_pass
    assert study.reference == "a"


def test_the_neighbours_of_the_recipe_that_a_study_starts_from_are_left_out(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text("config: strong\nvariants: {a: {model: sbr}}\n")
    study = load_study(str(file))
    assert load_config("strong").prior.neighbours
    assert not study.settings_of(study.variants[0], seed=0).prior.neighbours


def test_a_variant_is_compared_with_the_one_it_names_or_with_the_reference(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text("reference: b\nvariants: {a: {model: sbr}, b: {model: sbr}, c: {against: a}}\n")
    study = load_study(str(file))
    assert [study.against(name) for name in ("a", "b", "c")] == ["b", "b", "a"]


def test_each_backbone_of_the_experiment_on_their_quality_stands_alone_and_below_an_llmgr_compared_with_it():
    study = load_study("backbone_quality")
    by_name = {variant.name: variant for variant in study.variants}
    pairs = [(variant, by_name[variant.against]) for variant in study.variants if variant.model == "llmgr"]
    assert 2 * len(pairs) == len(by_name)
    kinds, epochs = set(), set()
    for llmgr, alone in pairs:
        assert alone.model == "sbr"
        with_llm, without = (study.settings_of(variant, seed=0) for variant in (llmgr, alone))
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
        ("title: x\n", "names no variants"),
        ("variants: {a: {modle: sbr}}\n", "variant a: unknown key modle, did you mean model?"),
        ("variants: {a: {model: sbb}}\n", "variant a: sbb is not known, did you mean sbr?"),
        ("variants: {a: {model: sbr, blend: item_knm}}\n", "item_knm is not known, did you mean item_knn?"),
        ("variants: {a: {model: sbr, blend: [item_knn, text_knm]}}\n", "text_knm is not known, did you mean text_knn?"),
        ("variants: {a: {model: popularity, blend: item_knn}}\n", "blend is for models that are trained"),
        ("variants: {a: {settings: {sbr.epoch: 3}}}\n", "variant a: .*sbr.epoch"),
        ("variants: {a: {settings: {sbr.epochs: -3}}}\n", "variant a: setting sbr.epochs is -3"),
        ("settings: {align.epochs: 0, behave.epochs: 0}\nvariants: {a: {}}\n", "variant a: align.epochs and behave"),
        (
            "variants: {a: {model: sbr, grid: {tables.dim: 8}}}\n",
            "variant a: grid needs a list of values for tables.dim",
        ),
        ("variants: {a: {model: sbr, grid: {tables.dim: [8, -8]}}}\n", "variant a: setting tables.dim is -8"),
        (
            "variants: {a: {model: item_knn, grid: {tables.dim: [8]}}}\n",
            "variant a: grid is for models that are trained",
        ),
        ("reference: b\nvariants: {a: {}}\n", "reference b is none of its variants"),
        (
            "variants: {aaa: {}, b: {against: aab}}\n",
            "variant b: against aab is none of its variants, did you mean aaa?",
        ),
        ("variants: {aa: {}, b: {against: zz}}\n", "against zz is none of its variants; known: aa, b"),
        ("variants: {a: {}, b: {against: b}}\n", "variant b: it has no gain against itself"),
        ("variants:\n  a: {model: sbr}\n  a: {model: item_knn}\n", "a stands twice"),
        (
            "variants: {a: {model: item_knn, settings: {sbr.epochs: 3}}}\n",
            "variant a: settings are for models that are",
        ),
        (
            "settings: {prior.neighbours: [item_knn]}\nvariants: {a: {}}\n",
            "variant a: an experiment adds neighbours by itself; leave prior.neighbours out",
        ),
        ("variants: [\n", "is no YAML"),
        ("settings: [tables.lr]\nvariants: {a: {}}\n", r": settings is \['tables.lr'\], not names with values"),
        ("variants: {a: 3}\n", "variant a is 3, not names with values"),
        ("variants: {a: {model: sbr, grid: [1]}}\n", r"variant a grid is \[1\], not names with values"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, message):
    file = tmp_path / "e.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_study(str(file))


def test_sections_may_be_left_empty(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text("settings:\nvariants:\n  a:\n  b:\n    model: sbr\n    settings:\n    grid:\n")
    study = load_study(str(file))
    assert [dict(values) for values in (study.settings, study.variants[1].settings, study.variants[1].grid)] == [{}] * 3


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(UserError, match=r"no experiment or YAML file named backbone, did you mean backbones\?"):
        load_study("backbone")
