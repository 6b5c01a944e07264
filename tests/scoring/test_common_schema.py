"""A message about types that do not go together names another type, also where that is null."""

from pathlib import Path

import pyarrow as pa
import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.scoring.common_schema import CommonSchema


def test_a_value_that_cannot_be_cast_is_one_line_where_the_other_files_have_nulls_only() -> None:
    # Arrow cannot cast dictionaries of lists to lists.
    column = pa.DictionaryArray.from_arrays(pa.array([0]), pa.array([[1]]))
    schema = CommonSchema()
    schema.add(Path("a"), {"x": column.type})
    schema.add(Path("b"), {"x": pa.null()})
    with pytest.raises(UserError, match=r"^a, row group 0: column x is dictionary.*, but null in b, and .*cast"):
        schema.conform(pa.table({"x": column}), "a, row group 0")
    schema.add(Path("c"), {"x": pa.list_(pa.int8())})
    with pytest.raises(UserError, match=r"but list<item: int8> in c, and"):
        schema.conform(pa.table({"x": column}), "a, row group 0")
