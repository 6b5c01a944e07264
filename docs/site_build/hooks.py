"""Hooks of the documentation site: pages that do not stand in docs/, and links that work on GitHub and in the site.

The pages in docs/ link to files of the repository by relative paths, as GitHub shows them. In the site, README.md and
other pages of the root are at the places in `PAGES`, and each example is a page with its source.
"""

import ast
import posixpath
import re
import sys
from pathlib import Path

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
_FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root, the examples and the reference."""
    pages = {page: (ROOT / name).read_text() for page, name in _SOURCES.items()}
    for page, content in {**pages, **example_pages(), **reference_pages()}.items():
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
        markdown: Text of the page.
        page: Path of the page in the site's sources.
    """
    source = posixpath.dirname(_SOURCES.get(page, f"docs/{page}"))

    def replaced(link: re.Match[str]) -> str:
        path, anchor = link.groups()
        if ":" in path:
            return link.group()
        wanted = site_path(posixpath.normpath(posixpath.join(source, path)))
        return f"]({posixpath.relpath(wanted, posixpath.dirname(page) or '.')}{anchor or ''})"

    return _LINK.sub(replaced, markdown)


def site_path(name: str) -> str:
    """Path in the site's sources of a file of the repository.

    Args:
        name: Path from the root of the repository.

    Raises:
        ValueError: The site does not have the file.
    """
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if name == "examples":
        return "examples/index.md"
    if name.startswith("examples/"):
        return f"examples/{Path(name).stem}.md"
    raise ValueError(f"a page links to {name}, which the site does not have; add it to PAGES in {__file__}")


def example_pages() -> dict[str, str]:
    """A page with the source of each example, and a list of them, by path in the site's sources."""
    pages, rows = {}, []
    for path in sorted((ROOT / "examples").iterdir()):
        if path.suffix not in {".py", ".yaml"} or path.name == "__init__.py":
            continue
        text = path.read_text()
        language = "python" if path.suffix == ".py" else "yaml"
        title = _title(text, path)
        pages[f"examples/{path.stem}.md"] = f"# {path.name}\n\n```{language}\n{text}```\n"
        rows.append(f"| [`{path.name}`]({path.stem}.md) | {title} |")
    head = "# Examples\n\nShort programs and parts in the folder `examples`. Tests run all of them.\n"
    return {**pages, "examples/index.md": "\n".join([head, "| file | content |", "|---|---|", *rows, ""])}


def _title(text: str, path: Path) -> str:
    """First sentence of a file."""
    if path.suffix == ".py":
        first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    else:
        first = text.partition("\n")[0].removeprefix("# ")
    return first.partition(": docs/")[0].rstrip(".") + "."
