"""YAML files that people write: what is damaged, hostile or ambiguous is refused in one line with its place."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmgr_rec.config_file import load_config
from llmgr_rec.data.prompt_templates import load_templates
from llmgr_rec.errors import UserError
from llmgr_rec.experiments.experiment import load_experiment
from llmgr_rec.yaml_file import read_yaml

# Each level names the one before ten times: 10^9 values in 9 lines.
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9)
)
BROKEN = {
    "twice": (b"seed: 1\nseed: 2\n", "line 2: seed is given twice; remove one"),
    "twice below": (b"tables:\n  dim: 8\n  lr: 1\n  dim: 16\n", "line 4: dim is given twice; remove one"),
    "bomb": (BOMB.encode(), "more than 100,000 values, counting what aliases repeat"),
    "endless": (b"seed: &a [*a]\n", "line 1: an alias contains itself"),
    "merged twice": (b"a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}\n", "line 2: x is given twice"),
    "tab": (b"tables:\n\tdim: 8\n", "is not valid YAML: .* cannot start any token"),
    "latin-1": (b"a: 1\ntitle: caf\xe9\n", "line 2: the text is not UTF-8"),
    "utf-16": ("seed: 1\n".encode("utf-16"), "line 1: the text is not UTF-8"),
    "null character": (b"seed: \0\n", "is not valid YAML: .*special characters"),
    "deep": (b"seed: " + b"[" * 500 + b"]" * 500, "is nested too deeply"),
    "code": (b"seed: !!python/object/apply:os.system [id]\n", "is not valid YAML: could not determine a constructor"),
    "several documents": (b"seed: 1\n---\nseed: 2\n", "is not valid YAML: expected a single document"),
    "key is a list": (b"? [a]\n: 3\n", "line 1: a key is a list"),
    "date": (b"seed: 2020-99-99\n", "is not valid YAML: month must be in"),
    "large": (b"# " + b"x" * (1 << 20), "has more than 1,048,576 bytes"),
}

READERS: list[Callable[[Path], object]] = [
    read_yaml,
    load_config,
    lambda path: load_templates(str(path)),
    lambda path: load_experiment(str(path)),
]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    for read in READERS:
        with pytest.raises(UserError, match=message) as error:
            read(file)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(str(file))


def test_aliases_merges_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfbase: &base {x: 1, y: 2}\nown: {<<: *base, y: 3}\nempty:\n")
    assert read_yaml(file) == {"base": {"x": 1, "y": 2}, "own": {"x": 1, "y": 3}, "empty": None}
    file.write_text("")
    assert read_yaml(file) is None
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tables:\n", "section tables is empty; give settings under it, or remove it"),
        ("seed: 1\nruntime: ~\n", "section runtime is empty"),
        ("tables: 3\n", "section tables is 3; give settings"),
        ("tables: []\n", r"section tables is \[\]; give settings"),
        ("", "has no settings; give a YAML file of settings, or one of default"),
        ("# nothing\n", "has no settings"),
        ("- seed\n", "has no settings"),
        ("tables:\n  dim:\n", "setting tables.dim is None; give a value, or leave the setting out"),
        ("seed: null\n", "setting seed is None; give a value"),
    ],
)
def test_an_emptied_section_or_setting_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "c.yaml")
