"""Reads YAML files that people write: in UTF-8, every key once, and no more values than the file shows."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr_rec.errors import UserError

if TYPE_CHECKING:
    import yaml

_LARGEST_FILE = 1 << 20
# Aliases repeat what they stand for, so that a short file can have billions of values.
_MOST_VALUES = 100_000
_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(file: Path) -> Any:
    """Reads a YAML file.

    Args:
        file: The file.

    Returns:
        Its content: mappings, lists, numbers, texts, None.

    Raises:
        UserError: The file cannot be read, is not UTF-8 or not YAML, gives a key twice, or has too many values.
    """
    import yaml

    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); give a YAML file") from None
    if len(content) > _LARGEST_FILE:
        raise UserError(f"{file} has more than {_LARGEST_FILE:,} bytes; give a YAML file that was written by hand")
    try:
        loader = yaml.SafeLoader(content.decode("utf-8-sig"))
        root = loader.get_single_node()
        if root is None:
            return None
        _check_node(root, file)
        return loader.construct_document(root)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: the text is not UTF-8; save the file in UTF-8") from None
    except RecursionError:
        raise UserError(f"{file} is nested too deeply; write it with fewer levels") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None


def _check_node(root: "yaml.Node", file: Path) -> None:
    """Checks that no key is given twice, and that aliases neither contain themselves nor make the content huge."""
    sizes: dict[int, int] = {}
    unfinished: set[int] = set()

    def size(node: "yaml.Node") -> int:
        where = f"{file}, line {node.start_mark.line + 1}"
        if id(node) in unfinished:
            raise UserError(f"{where}: an alias contains itself; write out what it stands for")
        if id(node) not in sizes:
            unfinished.add(id(node))
            sizes[id(node)] = 1 + sum(map(size, _children(node, file)))
            unfinished.remove(id(node))
        if sizes[id(node)] > _MOST_VALUES:
            raise UserError(f"{where}: more than {_MOST_VALUES:,} values, counting what aliases repeat; use fewer")
        return sizes[id(node)]

    size(root)


def _children(node: "yaml.Node", file: Path) -> "list[yaml.Node]":
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    keys: set[str] = set()
    for key, _ in node.value:
        where = f"{file}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{where}: a key is a list or a mapping; give a name")
        if key.tag != _MERGE and key.value in keys:
            raise UserError(f"{where}: {key.value} is given twice; remove one")
        keys.add(key.value)
    return [value for _, value in node.value]
