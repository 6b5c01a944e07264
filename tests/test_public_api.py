"""What `import llmgr_rec` promises: a fixed list of documented names, and no cost until one is used."""

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from docstring_parser import parse as parse_docstring

import llmgr_rec
from tests.test_documentation import HEAVY

ROOT = Path(__file__).parents[1]
# Whoever changes this list changes what other people's code may rely on.
PUBLIC = [
    "Bundle",
    "CandidateItems",
    "Catalog",
    "CatalogRanker",
    "Collator",
    "Config",
    "DataShard",
    "Dataset",
    "EncodedSessions",
    "EncoderConfig",
    "Explanation",
    "ItemTables",
    "Jagged",
    "LLMGR",
    "LLMGRTower",
    "ModelFactory",
    "ModelSpec",
    "PrepareSettings",
    "RankingModel",
    "RawSessions",
    "Recommender",
    "RecommenderOutput",
    "SamplingOrder",
    "SessionBatch",
    "SessionEncoder",
    "SessionGraph",
    "SessionReader",
    "SessionRecommender",
    "SessionTower",
    "TablesConfig",
    "UserError",
    "World",
    "build_encoder",
    "build_graphs",
    "build_recommender",
    "export_bundle",
    "init_distributed",
    "init_tables",
    "load_bundle",
    "load_config",
    "prepare_dataset",
    "ranking_loss",
    "shard",
    "shutdown",
]


def test_the_list_is_the_one_that_was_promised() -> None:
    assert llmgr_rec.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(llmgr_rec))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_the_thing_itself_and_documented(name: str) -> None:
    found = getattr(llmgr_rec, name)
    home = importlib.import_module(f"llmgr_rec.{llmgr_rec._MODULES[name]}")
    assert found is getattr(home, name)
    assert found.__module__ == home.__name__, "the table names where a thing is defined, not where it is passed on"
    docstring = parse_docstring(inspect.getdoc(found) or "")
    assert docstring.short_description
    described = {parameter.arg_name for parameter in docstring.params} | documented_settings(found)
    if inspect.isclass(found) and not inspect.isabstract(found):
        described |= {parameter.arg_name for parameter in parse_docstring(found.__init__.__doc__ or "").params}
    assert set(parameters(found)) <= described


def documented_settings(found: object) -> set[str]:
    """Fields of a settings class whose help text stands with the field."""
    if not dataclasses.is_dataclass(found):
        return set()
    infos = {item.name: item.metadata.get("setting", item.metadata.get("group")) for item in dataclasses.fields(found)}
    return {name for name, info in infos.items() if info is not None and info[0]}


def parameters(found: object) -> list[str]:
    """Names of what a caller passes; exceptions take what all exceptions take."""
    if inspect.isclass(found) and (issubclass(found, Exception) or inspect.isabstract(found)):
        return []
    return list(inspect.signature(found).parameters)  # type: ignore[arg-type]


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(llmgr_rec.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {}
    for line in block.body:
        assert isinstance(line, ast.ImportFrom)
        (alias,) = line.names
        assert alias.name == alias.asname, "only `X as X` is a re-export"
        seen[alias.name] = line.module
    assert seen == {name: f"llmgr_rec.{module}" for name, module in llmgr_rec._MODULES.items()}


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="module 'llmgr_rec' has no attribute 'SesionEncoder'"):
        _ = llmgr_rec.SesionEncoder  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="SesionEncoder"):
        exec("from llmgr_rec import SesionEncoder")


def test_importing_costs_nothing_and_light_names_stay_light() -> None:
    code = f"""
import sys
import llmgr_rec
assert not {HEAVY} & set(sys.modules), "on import"
from llmgr_rec import Config, UserError
assert not {HEAVY} & set(sys.modules), "with settings"
assert "SessionRecommender" in dir(llmgr_rec)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
