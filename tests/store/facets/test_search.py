"""Every answer of the index is what going through the rows one by one gives."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kakehashi.errors import StoreError
from kakehashi.store.catalogue import Series
from kakehashi.store.facets import FACETS, Cancel, CancelledError, Index
from kakehashi.store.facets.scan import Scan
from kakehashi.store.query import (
    COLUMNS,
    FALSE,
    TRUE,
    Condition,
    Query,
    any_of,
    matches,
    parse,
    value_of,
)

from .cases import POOLS, queries, selections, table

FEW = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MANY = settings(FEW, max_examples=250)
ROWS = table(7, 40)
SELECTIONS = selections(FACETS)


@pytest.fixture(scope="module")
def index() -> Iterator[Index]:
    """An index of three segments, with some series withdrawn and some replaced."""
    with TemporaryDirectory() as folder:
        made = Index.create(Path(folder) / "index")
        stale = [table(8, 40)[0], *ROWS[3:6]]
        stale = [row for row in stale if row.series_uid in {r.series_uid for r in ROWS}]
        made.add_segment([stale])
        made.add_segment([ROWS[:11], ROWS[11:20]])
        made.add_segment([ROWS[20:], []])
        assert made.segments == 3
        yield made


def under(query: Query, rows: list[Series]) -> list[Series]:
    return [row for row in rows if matches(query, row)]


def seen(row: Series) -> dict[str, Any]:
    """A row as the index gives it."""
    found = {name: value_of(row, name) for name in COLUMNS}
    return found | {"flags": row.flags}


def chosen(given_: dict[str, frozenset[Any]], but: str | None = None) -> Query:
    query = TRUE
    for name, values in given_.items():
        if name != but:
            query &= any_of(name, values)
    return query


def test_the_rows_are_those_given(index):
    assert index.rows == len(ROWS)
    assert sorted(index.select(permission=TRUE)) == sorted(row.series_uid for row in ROWS)


@MANY
@given(queries(), queries(), SELECTIONS)
def test_facets_drill_sideways(index, query, permission, picked):
    found = index.facets(query, permission=permission, selections=picked)
    allowed = under(permission & query, ROWS)
    assert found.total == len(under(chosen(picked), allowed))
    assert set(found.counts) == set(FACETS)
    for name, counts in found.counts.items():
        expected: Counter[Any] = Counter()
        for row in under(chosen(picked, but=name), allowed):
            value = value_of(row, name)
            expected.update(value or (None,) if name == "flags" else (value,))
        assert dict(counts) == dict(expected)
        assert [n for _, n in counts] == sorted((n for _, n in counts), reverse=True)


@FEW
@given(queries(), queries(), SELECTIONS, st.lists(st.sampled_from(FACETS), unique=True))
def test_columns_that_are_not_shown_filter_all_the_same(index, query, permission, picked, columns):
    found = index.facets(query, permission=permission, selections=picked, columns=columns)
    whole = index.facets(query, permission=permission, selections=picked)
    assert found.total == whole.total
    assert found.counts == {name: whole.counts[name] for name in columns}


@MANY
@given(queries(), queries(), SELECTIONS)
def test_counts_and_lists_of_series(index, query, permission, picked):
    expected = under(query & permission & chosen(picked), ROWS)
    asked: dict[str, Any] = {"permission": permission, "selections": picked}
    assert index.count(query, **asked) == len(expected)
    uids = list(index.select(query, **asked))
    assert sorted(uids) == sorted(row.series_uid for row in expected)
    batches = list(index.arrow(query, **asked))
    rows = [row for batch in batches for row in batch.to_pylist()]
    for row in rows:
        row["flags"] = tuple(row["flags"])
    by_uid = {row["series_uid"]: row for row in rows}
    assert by_uid == {row.series_uid: seen(row) for row in expected}
    for batch in batches:
        for name in ("facility", "body_part", "description"):
            column = batch.column(name)
            assert set(column.dictionary.to_pylist()) == set(column.to_pylist()) - {None}


COUNTED = [name for name in FACETS if COLUMNS[name].kind != "flags"]
ORDERS = [name for name, column in COLUMNS.items() if column.kind not in {"identifier", "flags"}]


@MANY
@given(
    queries(),
    queries(),
    SELECTIONS,
    st.sampled_from(ORDERS),
    st.booleans(),
    st.integers(0, 45),
    st.integers(0, 12),
)
def test_pages_are_pieces_of_one_sorted_list(
    index, query, permission, picked, order, descending, offset, limit
):
    expected = under(query & permission & chosen(picked), ROWS)
    known = [row for row in expected if value_of(row, order) is not None]
    known.sort(key=lambda row: value_of(row, order), reverse=descending)
    wanted = [*(value_of(row, order) for row in known), *[None] * (len(expected) - len(known))]
    asked: dict[str, Any] = {"permission": permission, "selections": picked, "order": order}
    asked["descending"] = descending
    whole = index.page(query, **asked, limit=100)
    assert whole.total == len(expected)
    assert [row[order] for row in whole.rows] == wanted
    originals = {row.series_uid: seen(row) for row in expected}
    assert {row["series_uid"]: row for row in whole.rows} == originals
    piece = index.page(query, **asked, offset=offset, limit=limit)
    assert piece.total == whole.total
    assert piece.rows == whole.rows[offset : offset + limit]
    few = index.page(query, **asked, limit=2, columns=("series_uid", "age"))
    assert all(list(row) == ["series_uid", "age"] for row in few.rows)


@FEW
@given(
    queries(),
    queries(),
    SELECTIONS,
    st.sampled_from(["slices", "size", "spacing_z", "thickness", "age", "study_date", "exposure"]),
    st.integers(1, 30),
)
def test_histograms(index, query, permission, picked, column, bins):
    found = index.histogram(column, bins, query, permission=permission, selections=picked)
    rows = under(query & permission & chosen(picked), ROWS)
    values = [value_of(row, column) for row in rows]
    known = [value for value in values if value is not None]
    assert found.unknown == len(values) - len(known)
    assert sum(found.counts) == len(known)
    if not known:
        assert found.edges == found.counts == ()
        return
    assert found.edges[0] == min(known)
    assert found.edges[-1] >= max(known)
    assert len(found.edges) == len(found.counts) + 1
    given_edges = index.histogram(
        column, found.edges, query, permission=permission, selections=picked
    )
    assert given_edges == found
    for low, high, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        last = high == found.edges[-1]
        assert count == sum(low <= value < high or (last and value == high) for value in known)


@FEW
@given(
    queries(),
    queries(),
    SELECTIONS,
    st.lists(st.sampled_from(COUNTED), min_size=1, max_size=3, unique=True),
)
def test_combinations(index, query, permission, picked, columns):
    found = index.combinations(columns, query, permission=permission, selections=picked)
    rows = under(query & permission & chosen(picked), ROWS)
    expected = Counter(tuple(value_of(row, name) for name in columns) for row in rows)
    assert dict(found) == dict(expected)


def test_combinations_of_too_many_cells_are_counted_all_the_same(index, monkeypatch):
    asked = ("vendor", "model", "kernel", "body_part")
    expected = index.combinations(asked, permission=TRUE)
    monkeypatch.setattr("kakehashi.store.facets.search._MAX_CELLS", 1)
    assert index.combinations(asked, permission=TRUE) == expected


@FEW
@given(queries(), queries(), SELECTIONS)
def test_pivot(index, query, permission, picked):
    found = index.pivot("vendor", "facility", query, permission=permission, selections=picked)
    rows = under(query & permission & chosen(picked), ROWS)
    expected = Counter((row.vendor, row.facility) for row in rows)
    cells = {
        (one, two): count
        for one, line in zip(found.rows, found.counts, strict=True)
        for two, count in zip(found.columns, line, strict=True)
        if count
    }
    assert cells == dict(expected)
    assert set(found.rows) == {one for one, _ in expected}


@FEW
@given(queries(), st.sampled_from(POOLS["series_uid"]))
def test_one_series(index, permission, uid):
    rows = under(permission, [row for row in ROWS if row.series_uid == uid])
    assert index.lookup(uid, permission=permission) == (seen(rows[0]) if rows else None)


def test_a_text_is_found_in_any_width_and_case(index):
    count = sum(row.description == "ﾅｼﾞｭｰﾙ" for row in ROWS)
    assert count
    assert index.count(parse("'ナジュール' in description"), permission=TRUE) == count


def test_a_large_segment_is_searched_by_several_threads(tmp_path):
    """More rows than a block and than threads are started for; dates in no order."""
    size = 300_000
    chance = np.random.default_rng(3)

    def column(name: str) -> pa.Array:
        pool = POOLS[name]
        if name == "series_uid":
            return pa.array([f"2.25.{n}" for n in chance.permutation(size)])
        if name == "size":
            pool = list(range(100_000))  # codes of four bytes
        picked = chance.integers(0, len(pool), size)
        if name == "slices":
            pool = list(range(1000))  # codes of two bytes
            picked = chance.integers(0, len(pool), size)
        if name == "flags":
            return pa.array([pool[n] for n in picked], pa.list_(pa.string()))
        return pa.array(pool, from_pandas=False).take(pa.array(picked))

    batch = pa.RecordBatch.from_arrays([column(name) for name in COLUMNS], names=list(COLUMNS))
    index = Index.create(tmp_path / "index")
    index.add_segment([batch.slice(0, 100_000), batch.slice(100_000)])
    gone = [f"2.25.{n}" for n in range(0, size, 3)]
    assert index.withdraw(gone) == len(gone)
    rows = batch.to_pandas()
    rows = rows[~rows.series_uid.isin(set(gone))]
    days = rows.study_date.map(lambda day: day if isinstance(day, dt.date) else dt.date(1, 1, 1))
    mask = (
        (rows.slices >= 500)
        & (days >= dt.date(2020, 3, 1))
        & ((rows["size"] > 50_000) | (rows.sex == "F"))
        & (rows.body_part != "CHEST").where(rows.body_part.notna(), other=False)
    )
    query = parse(
        "slices >= 500 and study_date >= '2020-03-01' and (size > 50000 or sex == 'F') "
        "and body_part != 'CHEST'"
    )
    assert index.count(query, permission=TRUE) == mask.sum()
    picked = {"vendor": frozenset({"GE", None}), "modality": frozenset({"CT", "MR"})}
    vendor = rows.vendor.isin(["GE"]) | rows.vendor.isna()
    modality = rows.modality.isin(["CT", "MR"])
    found = index.facets(query, permission=TRUE, selections=picked)
    assert found.total == (mask & vendor & modality).sum()
    for name, others in {
        "vendor": mask & modality,
        "modality": mask & vendor,
        "kernel": mask & vendor & modality,
        "tier": mask & vendor & modality,
    }.items():
        counts = rows[others][name].value_counts(dropna=False)
        expected = {key if isinstance(key, str | int) else None: n for key, n in counts.items()}
        assert dict(found.counts[name]) == expected
    sizes = index.histogram("size", (0, 1000, 99_999), query, permission=TRUE)
    assert sum(sizes.counts) == mask.sum()
    page = index.page(query, permission=TRUE, order="size", offset=5000, limit=50)
    ordered = sorted(rows[mask]["size"], reverse=True)
    assert [row["size"] for row in page.rows] == ordered[5000:5050]
    assert len(list(index.select(query, permission=TRUE))) == mask.sum()


def test_a_scan_that_is_cancelled_says_so(index):
    cancel = Cancel()
    assert index.count(permission=TRUE, cancel=cancel) == len(ROWS)
    cancel.set()
    for search in (
        lambda: index.facets(permission=TRUE, cancel=cancel),
        lambda: index.count(permission=TRUE, cancel=cancel),
        lambda: index.page(permission=TRUE, cancel=cancel),
        lambda: list(index.select(permission=TRUE, cancel=cancel)),
    ):
        with pytest.raises(CancelledError):
            search()


def test_what_cannot_be_answered_is_refused(index):
    for search, said in (
        (lambda: index.facets(permission=TRUE, columns=["study_uid"]), "no facet"),
        (lambda: index.facets(permission=TRUE, columns=["venodr"]), "did you mean vendor"),
        (lambda: index.page(permission=TRUE, order="flags"), "kind flags"),
        (lambda: index.page(permission=TRUE, columns=["path"]), "not a column"),
        (lambda: index.page(permission=TRUE, offset=-1), "0 or more"),
        (lambda: index.histogram("sex", permission=TRUE), "kind text"),
        (lambda: index.histogram("age", 0, permission=TRUE), "1 to 1000"),
        (lambda: index.histogram("age", (1, 1), permission=TRUE), "grow"),
        (lambda: index.combinations(("flags",), permission=TRUE), "kind flags"),
        (lambda: index.combinations(("size",), permission=TRUE), "no facet"),
        (lambda: index.page(permission=TRUE, order="study_uid"), "kind identifier"),
        (lambda: index.facets(permission=TRUE, selections={"sex": frozenset()}), "no value"),
        (lambda: index.facets(permission=TRUE, selections={"sex": frozenset({1})}), "text"),
        (lambda: index.lookup("2.25.1", permission=TRUE, columns=["x"]), "not a column"),
        (lambda: list(index.arrow(permission=TRUE, columns=["x"])), "not a column"),
    ):
        with pytest.raises(StoreError, match=said):
            search()


def test_programs_that_are_not_sound_are_refused():
    """The scan would read beyond its stack."""
    bits = np.full(8, 255, np.uint8)
    for steps in ([-1], [0, -1], [0, 0], [-3], [0, -7], [0] * 80 + [-1] * 79):
        scan = Scan(10, None)
        scan.add_bit_term(bits)
        scan.add_program(steps)
        with pytest.raises(StoreError):
            scan.cells([])
    with pytest.raises(StoreError, match="too few"):
        Scan(65, None).add_bits(bits)


@settings(FEW, max_examples=1000)
@given(queries(), SELECTIONS, st.sampled_from([FALSE, any_of("facility", {"F99"})]))
def test_nothing_is_seen_without_permission(index, query, picked, permission):
    asked: dict[str, Any] = {"permission": permission, "selections": picked}
    found = index.facets(query, **asked)
    assert found.total == 0
    assert set(found.counts.values()) == {()}
    assert index.count(query, **asked) == 0
    assert index.page(query, **asked).rows == ()
    histogram = index.histogram("age", 5, query, **asked)
    assert (histogram.edges, histogram.counts, histogram.unknown) == ((), (), 0)
    assert index.combinations(("vendor", "model"), query, **asked) == ()
    assert index.pivot("vendor", "facility", query, **asked).rows == ()
    assert list(index.select(query, **asked)) == list(index.arrow(query, **asked)) == []


@settings(FEW, max_examples=300)
@given(queries(), SELECTIONS)
def test_a_permission_is_never_widened(index, query, picked):
    """Values that only others' series have are not even listed, whatever is chosen."""
    own = Condition("facility", "==", ("F01",))
    mine = [row for row in ROWS if row.facility == "F01"]
    found = index.facets(query | TRUE, permission=own, selections=picked)
    assert {value for value, _ in found.counts["facility"]} <= {"F01"}
    for name, counts in found.counts.items():
        there = {flag for row in mine for flag in row.flags or (None,)}
        if name != "flags":
            there = {value_of(row, name) for row in mine}
        assert {value for value, _ in counts} <= there
    for row in index.page(query, permission=own, selections=picked).rows:
        assert row["facility"] == "F01"
    for batch in index.arrow(query, permission=own, selections=picked):
        assert batch.column("facility").dictionary.to_pylist() == ["F01"]
    low, high = (edge(row.slices for row in mine) for edge in (min, max))
    histogram = index.histogram("slices", 3, permission=own)
    assert (histogram.edges[0], histogram.edges[-1]) == (low, high)


def test_the_checks_of_permission_see_a_leak(index, monkeypatch):
    """Where the permission is dropped on the way, the tests above are red."""
    import kakehashi.store.facets.search as search

    whole = search.plan
    monkeypatch.setattr(
        search, "plan", lambda segment, _asked, alive, cancel: whole(segment, TRUE, alive, cancel)
    )
    assert index.facets(permission=any_of("facility", {"F99"})).total == len(ROWS)
    with pytest.raises(AssertionError):
        test_a_permission_is_never_widened.hypothesis.inner_test(index, TRUE, {})
