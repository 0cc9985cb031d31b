"""Rows of a segment as Arrow, with no value in it that is not in the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kakehashi.store.facets.batches import TYPES
from kakehashi.store.query import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kakehashi.store.facets.segment import Segment


def schema_of(columns: Sequence[str]) -> pa.Schema:
    """Return the schema of exported rows."""
    return pa.schema([(name, _type(name)) for name in columns])


def _type(name: str) -> pa.DataType:
    kind = COLUMNS[name].kind
    return pa.dictionary(pa.int32(), pa.large_string()) if kind == "text" else TYPES[kind]


def batch_of(
    segment: Segment, columns: Sequence[str], rows: npt.NDArray[np.uint32]
) -> pa.RecordBatch:
    """Return some rows of a segment."""
    arrays = [_array(segment, name, rows) for name in columns]
    return pa.RecordBatch.from_arrays(arrays, schema=schema_of(columns))


def _array(segment: Segment, name: str, rows: npt.NDArray[np.uint32]) -> Any:
    kind = COLUMNS[name].kind
    if kind == "identifier":
        return pa.array(segment.decode(name, rows), TYPES[kind])
    codes = segment.codes(name)[rows]
    used, places = np.unique(codes, return_inverse=True)
    own = pa.array(segment.dictionary(name).decode(used), TYPES[kind])
    if kind != "text":
        return own.take(pa.array(places))
    # Code 0 is not known: in a dictionary it is no value but a gap.
    gap = int(len(used) > 0 and used[0] == 0)
    indices = pa.array((places - gap).astype(np.int32), mask=codes == 0)
    return pa.DictionaryArray.from_arrays(indices, own[gap:])
