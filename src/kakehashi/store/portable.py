"""Tables of one database as lines of JSON, and from these into another database.

What a table is, is described too, so that a table that this software does not make itself is
taken along as well: it is found by reflection and made anew where it is missing.
"""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import json
import math
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_BATCH = 1000
_TYPES: dict[str, type[sa.types.TypeEngine[Any]]] = {
    kind.__name__: kind
    for kind in (
        sa.String,
        sa.Text,
        sa.SmallInteger,
        sa.Integer,
        sa.BigInteger,
        sa.Float,
        sa.Double,
        sa.Numeric,
        sa.Boolean,
        sa.Date,
        sa.DateTime,
        sa.JSON,
        sa.LargeBinary,
    )
}
_DECODE: dict[str, Callable[[Any], Any]] = {
    # Also of what JSON has no number for: "nan", "inf".
    "Float": float,
    "Double": float,
    "Numeric": decimal.Decimal,
    "Date": dt.date.fromisoformat,
    "DateTime": dt.datetime.fromisoformat,
    "LargeBinary": base64.b64decode,
}


def reflect(connection: sa.Connection) -> sa.MetaData:
    """Return all tables of a database that hold something of their own.

    SQLite's full-text indexes are left out: they are made from other tables, by triggers.
    """
    hidden: set[str] = set()
    if connection.dialect.name == "sqlite":
        listed = connection.exec_driver_sql("PRAGMA table_list").mappings()
        hidden = {row["name"] for row in listed if row["type"] != "table"}
    metadata = sa.MetaData()
    # Names that SQLAlchemy leaves out by itself, like sqlite_master, are never asked for.
    metadata.reflect(connection, only=lambda name, _: name not in hidden)
    return metadata


def describe(table: sa.Table) -> dict[str, Any]:
    """Describe a table in terms that every database has.

    Raises
    ------
    StoreError
        A column is of a type that not every database has.
    """
    return {
        "name": table.name,
        "columns": [_column(column) for column in _own(table)],
        "primary_key": [column.name for column in table.primary_key.columns],
        "foreign_keys": [
            {
                "columns": [element.parent.name for element in key.elements],
                "table": key.referred_table.name,
                "referred": [element.column.name for element in key.elements],
            }
            for key in sorted(table.foreign_key_constraints, key=lambda one: list(one.column_keys))
        ],
        "indexes": [
            {
                "name": index.name,
                "columns": [column.name for column in index.columns],
                "unique": bool(index.unique),
            }
            for index in sorted(table.indexes, key=lambda one: str(one.name))
            # Others are over expressions, and there only for speed.
            if len(index.columns) == len(index.expressions)
        ],
        "unique": sorted(
            [column.name for column in one.columns]
            for one in table.constraints
            if isinstance(one, sa.UniqueConstraint)
        ),
    }


def _own(table: sa.Table) -> list[sa.Column[Any]]:
    """Return the columns that are not computed from others."""
    return [column for column in table.columns if column.computed is None]


def _column(column: sa.Column[Any]) -> dict[str, Any]:
    kind = _kind(column)
    return {
        "name": column.name,
        "type": kind,
        "length": getattr(column.type, "length", None) if kind == "String" else None,
        "nullable": bool(column.nullable),
    }


def _kind(column: sa.Column[Any]) -> str:
    try:
        name = type(column.type.as_generic()).__name__
    except NotImplementedError:
        name = type(column.type).__name__
    if name not in _TYPES:
        raise StoreError(
            f"the column {column.table.name}.{column.name} is of type {column.type!r}, which "
            f"cannot be taken to another database; expected one of {', '.join(_TYPES)}"
        )
    return name


def make_missing(descriptions: Iterable[dict[str, Any]], connection: sa.Connection) -> None:
    """Make the tables that a database lacks, as they were described."""
    metadata = reflect(connection)
    there = set(metadata.tables)
    for one in descriptions:
        if one["name"] in there:
            continue
        columns = [
            sa.Column(
                column["name"],
                sa.String(column["length"]) if column["length"] else _TYPES[column["type"]](),
                nullable=column["nullable"],
                primary_key=column["name"] in one["primary_key"],
            )
            for column in one["columns"]
        ]
        constraints = [sa.UniqueConstraint(*names) for names in one["unique"]]
        keys = [
            sa.ForeignKeyConstraint(
                key["columns"], [f"{key['table']}.{name}" for name in key["referred"]]
            )
            for key in one["foreign_keys"]
        ]
        table = sa.Table(one["name"], metadata, *columns, *constraints, *keys)
        for index in one["indexes"]:
            named = [table.c[name] for name in index["columns"]]
            sa.Index(index["name"], *named, unique=index["unique"])
    metadata.create_all(connection, [t for t in metadata.sorted_tables if t.name not in there])


def lines(table: sa.Table, connection: sa.Connection) -> Iterator[bytes]:
    """Yield the rows of a table, in the order of its key, each as a line: an array of values."""
    columns = _own(table)
    query = sa.select(*columns).order_by(*table.primary_key.columns)
    for row in connection.execute(query, execution_options={"yield_per": _BATCH}):
        values = [_encode(value) for value in row]
        yield json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _encode(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return repr(value)
        case dt.date() | dt.datetime():
            return value.isoformat()
        case bytes() | memoryview():
            return base64.b64encode(value).decode()
        case decimal.Decimal():
            return str(value)
        case _:
            return value


def insert(
    description: dict[str, Any],
    rows: Iterable[list[Any]],
    table: sa.Table,
    connection: sa.Connection,
) -> int:
    """Write rows into a table; return how many.

    Raises
    ------
    StoreError
        The table lacks a column.
    """
    columns = description["columns"]
    missing = [column["name"] for column in columns if column["name"] not in table.c]
    if missing:
        raise StoreError(
            f"the table {table.name!r} has no column {', '.join(missing)}: the backup was made "
            "by newer software; install that first"
        )
    readers = []
    for column in columns:
        target = table.c[column["name"]]
        null = None
        if isinstance(target.type, sa.JSON):
            # Else None would become JSON's null where it was no value at all.
            target.type = sa.JSON(none_as_null=True)
            null = None if target.nullable else sa.JSON.NULL
        readers.append((column["name"], _DECODE.get(column["type"]), null))
    count = 0
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(
            {
                name: null if value is None else decode(value) if decode else value
                for (name, decode, null), value in zip(readers, row, strict=True)
            }
        )
        if len(batch) == _BATCH:
            connection.execute(sa.insert(table), batch)
            count += len(batch)
            batch = []
    if batch:
        connection.execute(sa.insert(table), batch)
    return count + len(batch)


def go_on_counting(table: sa.Table, connection: sa.Connection) -> None:
    """Let numbers that the database gives begin after those that were written."""
    if connection.dialect.name != "postgresql":
        return  # SQLite looks at the largest that is there
    for column in table.primary_key.columns:
        if not isinstance(column.type, sa.Integer):
            continue
        quoted = connection.dialect.identifier_preparer.quote(table.name)
        sequence = connection.scalar(sa.select(sa.func.pg_get_serial_sequence(quoted, column.name)))
        largest = connection.scalar(sa.select(sa.func.max(column)))
        if sequence is not None and largest is not None:
            connection.execute(sa.select(sa.func.setval(sequence, largest)))
