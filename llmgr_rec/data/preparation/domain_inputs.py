"""The value of an input option: one path, or a path for each of several domains, `beauty=F,films=G`.

Imports no third-party package, as the settings.
"""

import re

from llmgr_rec.config import ALL_DOMAINS
from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.paths import storage_path
from llmgr_rec.remote_path import as_path

# A path with a = in its first name, such as dt=2026-11-01, is none if it exists. Names that are not allowed are found,
# too, so that they are refused as names and not as missing files.
_NAMED = re.compile(r"[^/=]+=")
_BETWEEN = re.compile(r",(?=[^/=,]+=)")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def paths_by_domain(value: str, option: str) -> dict[str, str]:
    """Path of the log of each domain; a single path, which names no domain, has the key "".

    Args:
        value: Value of the option.
        option: Name of the option, for messages.

    Raises:
        UserError: A name occurs twice or is not made of letters, digits, _, . and -, or a path is not one.
    """
    if not _NAMED.match(value) or as_path(value).exists():
        return {"": value}
    paths: dict[str, str] = {}
    for part in _BETWEEN.split(value):
        name, _, path = part.partition("=")
        if not _NAME.fullmatch(name):
            raise UserError(f"--{option}: the domain {name!r} is not made of letters, digits, _, . and -; rename it")
        if name == ALL_DOMAINS:
            raise UserError(f"--{option}: the domain {name} would be taken for all domains; rename it")
        if name in paths:
            raise UserError(f"--{option} names the domain {name} twice; give each domain one file or folder")
        try:
            paths[name] = storage_path(path)
        except ValueError as error:
            raise UserError(f"--{option}, domain {name}: {error}") from None
    return paths


def check_domains(clicks: str, items: str | None, option: str) -> None:
    """Checks that the item files are those of domains that have clicks.

    Args:
        clicks: Value of the option of the clicks.
        items: Value of --items.
        option: Name of the option of the clicks.

    Raises:
        UserError: Only one of the options names domains, or --items names one that has no clicks.
    """
    known = paths_by_domain(clicks, option)
    if items is None:
        return
    named = paths_by_domain(items, "items")
    if ("" in known) != ("" in named):
        with_names, without = (option, "items") if "" in named else ("items", option)
        raise UserError(
            f"--{with_names} names domains, but --{without} does not; write --{without} NAME=PATH,NAME=PATH"
        )
    if unknown := [name for name in named if name not in known]:
        raise UserError(
            f"--items names the domain {unknown[0]}, which --{option} does not{did_you_mean(unknown[0], known)}"
        )
