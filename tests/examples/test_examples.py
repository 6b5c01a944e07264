"""What holds for all examples."""

import ast
from pathlib import Path

import pytest

from tests.examples.run_example import ROOT

# Programs; the parts in own_*.py are tested by tests/test_extensions.py.
EXAMPLES = sorted(
    path for path in (ROOT / "examples").glob("*.py") if path.name != "__init__.py" and not path.name.startswith("own_")
)

TESTS = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_says_how_to_run_it_and_has_a_test(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 150
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None
    # A program that must not import this project is not a module of it.
    assert f"-m examples.{path.stem}" in docstring or f"python {path.name} " in docstring
    assert any(path.stem in test.read_text() for test in TESTS)
