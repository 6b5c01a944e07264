"""Writes the SQL of the steps of prepare, which is DuckDB's, as that of Spark."""

import sqlglot
from sqlglot import exp

# The last 8 bytes of an MD5 hash as a little-endian integer: pairs of hexadecimal digits, the last pair first.
_LAST_BYTES = " || ".join(f"substr(md5({{0}}), {digit}, 2)" for digit in range(31, 16, -2))
# What Spark has for functions of DuckDB that sqlglot does not translate. {0} and {1} are their arguments.
_FUNCTIONS = {
    "isfinite": "(abs({0}) < double('Infinity'))",
    "list_count": "size(array_compact({0}))",
    "list_extract": "element_at({0}, cast({1} as int))",
    "md5_number_lower": f"cast(conv({_LAST_BYTES}, 16, 10) as decimal(20, 0))",
    "unix_date": "unix_date({0})",
    "suffix": "endswith({0}, {1})",
}
_TYPES = {exp.DataType.Type.INT128: "DECIMAL(38, 0)", exp.DataType.Type.UBIGINT: "DECIMAL(20, 0)"}


def spark_sql(query: str) -> str:
    """The query in the SQL of Spark.

    Args:
        query: SQL of DuckDB.
    """
    tree = sqlglot.parse_one(query, read="duckdb")
    for select in list(tree.find_all(exp.Select)):
        _join_generators(select)
    # The innermost first, because an argument may have to be translated, too.
    for node in reversed(list(tree.find_all(exp.Anonymous, exp.DataType))):
        if isinstance(node, exp.DataType):
            if node.this in _TYPES:
                node.replace(exp.DataType.build(_TYPES[node.this], dialect="spark"))
        else:
            form = _FUNCTIONS[node.name.lower()]
            node.replace(exp.var(form.format(*map(_sql, node.expressions))))
    return _sql(tree)


def _join_generators(select: exp.Select) -> None:
    """Makes one function of `unnest(list) AS value, generate_subscripts(list, 1) AS place`."""
    values = [one for one in select.expressions if isinstance(one.this, exp.Explode)]
    if not values:
        return
    (value,) = values
    (place,) = (one for one in select.expressions if one.this.name == "generate_subscripts")
    both = f"posexplode({_sql(value.this.this)}) AS ({_sql(place.args['alias'])}, {_sql(value.args['alias'])})"
    value.replace(exp.var(both))
    place.pop()


def _sql(node: exp.Expression) -> str:
    return node.sql(dialect="spark", identify=True)
