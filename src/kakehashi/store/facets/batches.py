"""Rows of the catalogue as Arrow batches of one schema, wherever they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from kakehashi.errors import StoreError
from kakehashi.store.query import COLUMNS, value_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kakehashi.store.catalogue import Series
    from kakehashi.store.query import Kind

TYPES: dict[Kind, pa.DataType] = {
    "text": pa.large_string(),
    "identifier": pa.large_string(),
    "number": pa.float64(),
    "integer": pa.int64(),
    "date": pa.date32(),
    "boolean": pa.bool_(),
    "flags": pa.list_(pa.string()),
}
"""How each kind of column is given and taken; text may also be a dictionary of it."""


def as_batch(rows: pa.RecordBatch | Sequence[Series]) -> pa.RecordBatch:
    """Return rows as a batch with all of `COLUMNS`, each of its type in `TYPES`.

    Raises
    ------
    StoreError
        A column is missing, or of a type that cannot be turned into the right one.
    """
    if not isinstance(rows, pa.RecordBatch):
        arrays: list[Any] = []
        for column in COLUMNS.values():
            values = [value_of(row, column.name) for row in rows]
            if column.kind == "flags":
                values = [flags or () for flags in values]
            arrays.append(pa.array(values, TYPES[column.kind]))
        return pa.RecordBatch.from_arrays(arrays, names=list(COLUMNS))
    missing = sorted(set(COLUMNS) - set(rows.schema.names))
    if missing:
        raise StoreError(f"the rows have no column {', '.join(missing)}")
    return pa.RecordBatch.from_arrays(
        [_as_type(name, rows.column(name)) for name in COLUMNS], names=list(COLUMNS)
    )


def _as_type(name: str, array: pa.Array) -> pa.Array:
    kind = COLUMNS[name].kind
    try:
        if pa.types.is_dictionary(array.type) and kind == "text":
            return array
        if kind == "date" and not pa.types.is_date(array.type):
            array = pc.utf8_slice_codeunits(array.cast(pa.large_string()), 0, 10)
        return array.cast(TYPES[kind])
    except pa.ArrowException as error:
        raise StoreError(f"the column {name} cannot be taken as {TYPES[kind]}: {error}") from error
