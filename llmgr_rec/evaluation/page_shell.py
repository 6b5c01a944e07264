"""The frame of a report page: style, script and the policy that no other script runs and nothing is loaded."""

import base64
import hashlib
from functools import cache
from html import escape
from pathlib import Path

GENERATOR = "llmgr_rec.report"

_FOLDER = Path(__file__).parent


@cache
def chart_style() -> str:
    """CSS of a chart that stands alone in a file."""
    return _read("colors.css") + _read("chart.css")


def page(title: str, body: str) -> str:
    """A complete HTML page.

    Args:
        title: Title of the window; escaped here.
        body: HTML of the main part.
    """
    script = _read("report.js")
    # An injected script would not have this hash.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{GENERATOR}">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>
{chart_style()}{_read("report.css")}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


@cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
