"""The documentation site: its links, its reference, and that it needs no other host."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import llmgr_rec
from llmgr_rec.config import Config
from llmgr_rec.config_file import settings

ROOT = Path(__file__).parents[1]
# Whatever a browser loads by itself, unlike links that a reader follows.
LOADED = re.compile(r"<(?:script|link|img|iframe|source|object)\b[^>]*?(?:src|href|data)=[\"']?(?:https?:)?//[^>]*>")
LOADED_BY_STYLE = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//")


def test_links_to_the_repository_lead_to_pages_of_the_site() -> None:
    hooks = importlib.import_module("docs.site_build.hooks")
    for page, link, expected in (
        ("index.md", "docs/data.md#repeats", "data.md#repeats"),
        ("index.md", "docs/data-flow.svg", "data-flow.svg"),
        ("index.md", "examples", "examples.md"),
        ("running.md", "../BUILD.md#gpu", "project/build.md#gpu"),
        ("results/choices.md", "../data.md", "../data.md"),
        ("extending/encoder.md", "../../examples/own_encoder.py", "../source/examples/own_encoder.py.md"),
        ("project/build.md", "README.md", "../index.md"),
        ("source/examples/quickstart.ipynb.md", "../docs/python.md", "../../python.md"),
        ("data.md", "#repeats", "#repeats"),
        ("data.md", "https://volcano.sh", "https://volcano.sh"),
    ):
        assert hooks.with_site_links(f"see [this]({link}).", page) == f"see [this]({expected})."


def test_the_reference_has_every_setting_command_and_public_name() -> None:
    reference = importlib.import_module("docs.site_build.reference_pages")
    pages = reference.reference_pages()
    assert all(f"| `{one.name}` |" in pages["reference/settings.md"] for one in settings(Config()))
    assert all(
        re.search(rf"(::: llmgr_rec\.|### ){name}$", pages["reference/python.md"], re.M) for name in llmgr_rec.__all__
    )
    assert {"llmgr_rec", "llmgr_rec.train", "llmgr_rec.score", "llmgr_rec.experiments", "datagen.csv"} <= set(
        reference.commands()
    )
    for name in reference.commands():
        assert re.search(
            rf"^## {re.escape(name)}\n\n```text\n(example|usage): ", pages["reference/commands.md"], re.M
        ), name


@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "site").rglob("*") if path.suffix in {".html", ".css"}]
    assert len(files) > 30
    for path in files:
        text = path.read_text()
        assert not LOADED.findall(text), path
        assert not LOADED_BY_STYLE.findall(text), path


class Loader(yaml.SafeLoader):
    """Reads the tag for a Python object as its name."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(set(listed)) == len(listed)
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= set(listed), "name the page in nav of mkdocs.yml"


def test_the_site_is_set_up_to_load_nothing_from_other_hosts() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=Loader)
    assert config["theme"]["font"] is False
    assert not [value for value in [*config.get("extra_css", []), *config.get("extra_javascript", [])] if "//" in value]
