"""Hooks of the documentation site: pages that do not stand in docs/, and links that work on GitHub and in the site.

The pages in docs/ link to files of the repository by relative paths, as GitHub shows them. In the site, README.md and
other pages of the root are at the places in `PAGES`, and each example is a page with its source.
"""

import ast
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    # The reference is that of this checkout.
    sys.path.insert(0, str(ROOT))
from docs.site_build.reference_pages import reference_pages  # noqa: E402

# Page of the site for each page of the repository's root.
PAGES = {
    "README.md": "index.md",
    "BUILD.md": "project/build.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security-policy.md",
}
_SOURCES = {page: name for name, page in PAGES.items()}
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".ipynb": "json"}
_FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root, the reference, the list of examples, and the source files that a page links to."""
    pages = {page: (ROOT / name).read_text() for page, name in _SOURCES.items()}
    pages |= {"examples.md": examples_page(), **reference_pages()}
    texts = {file.src_uri: Path(file.abs_src_path).read_text() for file in files.documentation_pages()} | pages
    linked = {name for page, text in texts.items() for name in _linked_files(text, page)}
    pages |= {site_path(name): _source_page(name) for name in sorted(linked) if site_path(name).startswith("source/")}
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to pages of the site."""
    return "".join(
        part if part.startswith("```") else with_site_links(part, page.file.src_uri) for part in _FENCED.split(markdown)
    )


def with_site_links(markdown: str, page: str) -> str:
    """A page with its links to files of the repository as links to pages of the site.

    Args:
        markdown: Text of the page, without code.
        page: Path of the page in the site's sources.
    """

    def replaced(link: re.Match[str]) -> str:
        path, anchor = link.groups()
        if ":" in path:
            return link.group()
        target = site_path(_repository_path(path, page))
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{anchor or ''})"

    return _LINK.sub(replaced, markdown)


def site_path(name: str) -> str:
    """Path in the site's sources of a file of the repository.

    Args:
        name: Path from the root of the repository.
    """
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return "examples.md" if name == "examples" else f"source/{name}.md"


def examples_page() -> str:
    """A list of the examples."""
    rows = ["# Examples", "", "Short programs and parts in the folder `examples`. Tests run all of them.", ""]
    rows += ["| file | content |", "|---|---|"]
    paths = sorted((ROOT / "examples").iterdir())
    titles = {path.name: _title(path) for path in paths if path.suffix in _LANGUAGES and path.name != "__init__.py"}
    return "\n".join([*rows, *(f"| [`{name}`](../examples/{name}) | {title} |" for name, title in titles.items()), ""])


def _linked_files(text: str, page: str) -> list[str]:
    paths = [path for path, _ in _LINK.findall(_FENCED.sub("", text)) if ":" not in path]
    return [_repository_path(path, page) for path in paths]


def _repository_path(path: str, page: str) -> str:
    """Path from the root of the repository of what a page links to."""
    source = page.removeprefix("source/") if page.startswith("source/") else _SOURCES.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def _source_page(name: str) -> str:
    text = (ROOT / name).read_text()
    if name.endswith(".ipynb"):
        cells = nbformat.reads(text, as_version=4).cells
        parts = [f"```python\n{cell.source}\n```" if cell.cell_type == "code" else cell.source for cell in cells]
        return "\n\n".join(parts) + "\n"
    return f"# {name}\n\n```{_LANGUAGES.get(Path(name).suffix, 'text')}\n{text}```\n"


def _title(path: Path) -> str:
    """First sentence of a file."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".ipynb":
        text = nbformat.reads(text, as_version=4).cells[0].source
    return text.lstrip("# ").partition("\n")[0].partition(": docs/")[0].rstrip(".") + "."
