"""What holds for all examples."""

import ast
from pathlib import Path

import pytest

from tests.examples.run_example import ROOT

# Programs; the parts in own_*.py are tested by tests/test_extensions.py.
EXAMPLES = sorted(
    path for path in (ROOT / "examples").glob("*.py") if path.name != "__init__.py" and not path.name.startswith("own_")
)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_says_how_to_run_it_and_has_a_test(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 160
    assert f"\n    python -m examples.{path.stem}" in text or f"-m examples.{path.stem} " in text
    assert ast.get_docstring(ast.parse(text))
    assert (ROOT / "tests" / "examples" / f"test_{path.stem}.py").is_file()
