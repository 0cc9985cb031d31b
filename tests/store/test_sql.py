"""What the catalogue gives for a query is what the query means, on SQLite and PostgreSQL."""

from __future__ import annotations

import dataclasses
import datetime as dt

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given
from hypothesis import settings as trying
from hypothesis import strategies as st

from kakehashi.store import sql
from kakehashi.store.query import FALSE, TRUE, And, Condition, Not, Or, Query, matches, parse

from .conftest import StoreUnderTest
from .test_catalogue import ROW

TEXTS = ["CT", "MR", "ct", "", "胸部", "CHEST 1", "ab'c", "\uff38", None]
NUMBERS = [0.0, 0.5, 1.25, 512.0, None]
DAYS = [dt.date(2020, 2, 29), dt.date(2024, 1, 1), None]


def conditions() -> st.SearchStrategy[Query]:
    def column(name, values, *ops):
        some = st.sampled_from(values)
        one = st.tuples(st.sampled_from(ops), st.tuples(some))
        many = st.tuples(st.sampled_from(["in", "not in"]), st.tuples(some, some))

        def condition(pair):
            op, chosen = pair
            if None in chosen and op not in {"==", "!=", "in", "not in"}:
                op = "=="
            return Condition(name, op, chosen)

        return st.one_of(one, many).map(condition)

    orders = ("==", "!=", "<", "<=", ">", ">=")
    return st.one_of(
        column("body_part", TEXTS, *orders, "contains"),
        column("kernel", TEXTS, *orders, "contains"),
        column("thickness", NUMBERS, *orders),
        column("study_date", DAYS, *orders),
        column("contrast", [True, False], "==", "!="),
        column("tier", [1, 2, 3], *orders),
        st.just(parse("'tilted' in flags")),
        st.just(parse("added_at >= '2026-01-01'")),
    )


def queries() -> st.SearchStrategy[Query]:
    return st.recursive(
        st.one_of(conditions(), st.sampled_from([TRUE, FALSE])),
        lambda inner: st.one_of(
            inner.map(Not),
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: And(tuple(parts))),
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: Or(tuple(parts))),
        ),
        max_leaves=6,
    )


def rows() -> list:
    made = []
    for number in range(60):
        made.append(
            dataclasses.replace(
                ROW,
                series_uid=f"1.2.{number}",
                body_part=TEXTS[number % len(TEXTS)],
                kernel=TEXTS[number * 5 % len(TEXTS)],
                thickness=NUMBERS[number % len(NUMBERS)],
                study_date=DAYS[number % len(DAYS)],
                contrast=number % 2 == 0,
                tier=1 + number % 3,
                flags=("tilted",) if number % 4 == 0 else (),
                added_at=f"202{5 + number % 2}-01-01T00:00:00Z",
            )
        )
    return made


@trying(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(query=queries())
def test_the_catalogue_gives_what_a_query_means(catalogue, query):
    if not catalogue.list_series():
        for row in rows():
            catalogue.add_series(row)
    expected = sorted(row.series_uid for row in rows() if matches(query, row))
    assert [row.series_uid for row in catalogue.select(query)] == expected


def test_the_database_does_the_work_where_it_can(catalogue, monkeypatch):
    for row in rows():
        catalogue.add_series(row)
    looked_at = []
    monkeypatch.setattr(
        "kakehashi.store.catalogue.matches", lambda query, row: looked_at.append(row) or True
    )
    catalogue.select(parse("tier == 1 and body_part == 'CT' and 'x' in kernel"))
    assert 0 < len(looked_at) < 10


def test_a_translation_that_leaves_rows_out_is_found(catalogue, monkeypatch):
    for row in rows():
        catalogue.add_series(row)
    query = parse("not thickness == 0.5")
    right = [row.series_uid for row in catalogue.select(query)]
    monkeypatch.setattr(sa.func, "coalesce", lambda inner, _: inner, raising=False)
    assert len([row.series_uid for row in catalogue.select(query)]) < len(right)
    assert sql.narrowing(query, ROW_TABLE) is not None


ROW_TABLE = sa.Table("t", sa.MetaData(), sa.Column("thickness", sa.Double))


def test_who_withdrew_is_in_no_cohort_from_then_on(store: StoreUnderTest):
    store.catalogue.add_series(ROW)
    other = dataclasses.replace(ROW, series_uid="1.9", patient_id="other")
    store.catalogue.add_series(other)
    assert len(store.catalogue.select(TRUE)) == 2
    for _ in range(2):
        store.catalogue.withdraw(ROW.patient_id, "manager", "asked to")
    assert store.catalogue.select(TRUE) == [other]
    assert store.catalogue.withdrawn() == {ROW.patient_id}
    assert store.catalogue.of_patient(ROW.patient_id) == ([ROW], [])


pytestmark = pytest.mark.filterwarnings("error")
