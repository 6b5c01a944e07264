"""One schema for the columns of several Parquet files, whose writers chose different types for the same values."""

from pathlib import Path

import pyarrow as pa

from llmgr_rec.errors import UserError

_FIX = "write it as one type in all files"


class CommonSchema:
    """Types of columns over several files. A column of one type in all files keeps it.

    Args:
        exact: Columns whose integers must not become floats, such as ids.
    """

    def __init__(self, exact: frozenset[str] = frozenset()) -> None:
        self._exact = exact
        self._types: dict[str, pa.DataType] = {}
        # The first file with each type of a column, for messages.
        self._files: dict[str, dict[pa.DataType, Path]] = {}

    def add(self, path: Path, types: dict[str, pa.DataType]) -> None:
        """Adds the columns of a file.

        Raises:
            UserError: A column has values of another kind than in a file before, such as text and numbers.
        """
        for name, found in types.items():
            before = self._types.get(name)
            common = found if before is None else common_type(before, found, name in self._exact)
            if common is None:
                raise UserError(f"{path}: column {name} is {found}, but {self._other(name, found)}; {_FIX}")
            self._types[name] = common
            self._files.setdefault(name, {}).setdefault(found, path)

    def conform(self, table: pa.Table, where: str) -> pa.Table:
        """The columns of a table in the types of all files.

        Args:
            table: Table with the columns.
            where: Its file and row group, for messages.

        Raises:
            UserError: A value does not fit, such as an integer that has no exact float.
        """
        columns = {}
        for name, expected in self._types.items():
            column = table[name]
            try:
                columns[name] = column if column.type == expected else column.cast(expected)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise UserError(
                    f"{where}: column {name} is {column.type}, but {self._other(name, column.type)}, "
                    f"and a value is not exact as {expected} ({str(error).splitlines()[0]}); {_FIX}"
                ) from None
        return pa.table(columns)

    def _other(self, name: str, found: pa.DataType) -> str:
        """Another type of a column, a null type last, and the first file with it."""
        other = min((kind for kind in self._files[name] if kind != found), key=pa.types.is_null)
        return f"{other} in {self._files[name][other]}"


def common_type(first: pa.DataType, second: pa.DataType, exact: bool = False) -> pa.DataType | None:
    """The type that holds the values of two types: text, integers of any width, a null type and another one.

    Args:
        first: A type.
        second: Another type.
        exact: Whether integers must not become floats.

    Returns:
        The type; None if the types hold values of different kinds.
    """
    if first == second:
        return first
    first, second = _plain(first), _plain(second)
    if {_kind(first), _kind(second)} in _UNLIKE or (exact and {_kind(first), _kind(second)} == {"integer", "float"}):
        return None
    schemas = [pa.schema([("", kind)]) for kind in (first, second)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


# Arrow would promote text to bytes, and decimals to floats, which do not have their digits.
_UNLIKE = ({"text", "bytes"}, {"decimal", "float"})


def _kind(found: pa.DataType) -> str:
    kinds = {
        "integer": pa.types.is_integer(found),
        "float": pa.types.is_floating(found),
        "decimal": pa.types.is_decimal(found),
        "text": pa.types.is_string(found) or pa.types.is_large_string(found),
        "bytes": pa.types.is_binary(found) or pa.types.is_large_binary(found) or pa.types.is_fixed_size_binary(found),
    }
    return next((kind for kind, is_kind in kinds.items() if is_kind), "other")


def _plain(found: pa.DataType) -> pa.DataType:
    """A type without the way in which its values are stored: dictionaries, views of text, and lists of a fixed size.

    Views of lists stay what they are, because pyarrow 26 loses the last list when it casts them to lists.
    """
    if pa.types.is_dictionary(found):
        return _plain(found.value_type)
    if pa.types.is_string_view(found):
        return pa.string()
    if pa.types.is_binary_view(found):
        return pa.binary()
    if pa.types.is_large_list(found):
        return pa.large_list(_plain(found.value_type))
    if pa.types.is_list(found) or pa.types.is_fixed_size_list(found):
        return pa.list_(_plain(found.value_type))
    if pa.types.is_struct(found):
        return pa.struct([(field.name, _plain(field.type)) for field in found])
    return found
