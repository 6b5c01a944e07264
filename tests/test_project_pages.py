"""The changelog, the citation, the issue forms, the security policy and the version."""

import re
from datetime import date
from pathlib import Path
from typing import Any

import yaml

import llmgr_rec
from tests.test_repository import ROOT, kept_files, metadata

# Section titles of Keep a Changelog, in its order.
SECTIONS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    versions = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    titles = [version.splitlines()[0] for version in versions]
    assert titles[0] == "Unreleased"
    numbers, days = zip(*(title.split(" - ") for title in titles[1:]), strict=True)
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", number) for number in numbers)
    assert [date.fromisoformat(day) for day in days] == sorted(map(date.fromisoformat, days), reverse=True)
    assert numbers[0] == llmgr_rec.__version__
    for version in versions:
        sections = re.findall(r"^### (.+)$", version, re.MULTILINE)
        assert sections == [name for name in SECTIONS if name in sections]
        assert sections


def test_the_version_stands_in_one_place() -> None:
    assert metadata()["dynamic"] == ["version"]
    assert "version" not in metadata()
    literal = re.compile(rf"^\s*(\w*version\w*)\s*[=:]\s*[\"']?{re.escape(llmgr_rec.__version__)}\b", re.M | re.I)
    files = [path for path in kept_files() if path.suffix in {".py", ".toml", ".cff", ".yml", ".yaml", ".cfg", ".json"}]
    found = [(path.relative_to(ROOT), name) for path in files for name in literal.findall(path.read_text())]
    assert found == [(Path("llmgr_rec/__init__.py"), "__version__")]


def test_the_citation_file_is_complete() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["type"] == "software"
    assert citation["license"] == metadata()["license"]
    for work in (citation, *citation["references"]):
        assert work["title"]
        assert all({"name", "family-names"} & set(author) for author in work["authors"])


def form(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    return content


def test_issue_forms_are_forms() -> None:
    for name in ("bug", "feature"):
        content = form(name)
        assert content["name"]
        assert content["description"]
        fields = [field for field in content["body"] if field["type"] != "markdown"]
        assert all(field["type"] in {"textarea", "input", "dropdown", "checkboxes"} for field in fields)
        assert all(field["attributes"]["label"] for field in fields)
        ids = [field["id"] for field in fields]
        assert len(set(ids)) == len(ids)
        assert all(field["attributes"]["options"] for field in fields if field["type"] == "dropdown")


def test_vulnerabilities_are_reported_in_private() -> None:
    assert "private security advisory" in (ROOT / "SECURITY.md").read_text()
    assert "SECURITY.md" in str(form("bug")["body"][0])
