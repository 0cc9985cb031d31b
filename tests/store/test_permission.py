"""Which rows a project may see: the one place that says so."""

from __future__ import annotations

import dataclasses
import datetime as dt

import pytest

from kakehashi.config import CohortQuery, Project
from kakehashi.store.permission import permission
from kakehashi.store.query import FALSE, matches

from .test_catalogue import ROW

TODAY = dt.date(2026, 11, 22)


def project(**fields: object) -> Project:
    return Project.model_validate(
        {
            "id": "lung",
            "title": "t",
            "purpose": "p",
            "approval": "1",
            "expires": "2026-12-31",
            "groups": ["g"],
            "sites": ["s"],
            **fields,
        }
    )


def sees(granted: Project, row: object = ROW, today: dt.date = TODAY) -> bool:
    return matches(permission(granted, today), row)


def test_a_project_without_conditions_sees_its_tier_and_below():
    for tier in (1, 2, 3):
        for own in (1, 2, 3):
            row = dataclasses.replace(ROW, tier=own)
            assert sees(project(tier=tier), row) == (own <= tier)
    assert not sees(project())  # ROW is of tier 2, and 1 is what a project gets unasked


@pytest.mark.parametrize(
    ("column", "right", "wrong"),
    [
        ("facility", "F01", "F02"),
        ("modality", "CT", "MR"),
        ("body_part", "胸部", "HEAD"),
        ("manufacturer", "キヤノン", "CANON"),
        ("series", "1.2.3", "1.2.30"),
    ],
)
def test_each_condition_counts(column, right, wrong):
    assert sees(project(tier=2, cohort={column: [right, "another"]}))
    assert not sees(project(tier=2, cohort={column: [wrong]}))


def test_conditions_are_joined_by_and():
    both = {"facility": ["F01"], "modality": ["CT"]}
    assert sees(project(tier=2, cohort=both))
    for column in both:
        assert not sees(project(tier=2, cohort=both | {column: ["x"]}))


def test_a_row_without_a_value_is_not_granted_by_it():
    assert not sees(
        project(tier=2, cohort={"body_part": ["CHEST"]}), dataclasses.replace(ROW, body_part=None)
    )


def test_the_projects_own_query_narrows_and_never_widens():
    for query, expected in (
        ("slices >= 300", True),
        ("slices > 300", False),
        ("True", True),
        ("tier == 3 or True", True),
    ):
        assert sees(project(tier=2, cohort={"query": query})) == expected
    assert not sees(project(tier=1, cohort={"query": "tier == 2 or True"}))
    assert not sees(project(tier=2, cohort={"facility": ["F02"], "query": "facility == 'F01'"}))


def test_a_query_that_is_none_opens_nothing():
    with pytest.raises(ValueError, match="not a column"):
        permission(project(cohort={"query": "hospital == 'A'"}), TODAY)


def test_first_and_last_day_belong_to_a_project_and_no_other():
    one = project(tier=3, starts="2026-11-01", expires="2026-11-30")
    for day, expected in (
        (dt.date(2026, 10, 31), False),
        (dt.date(2026, 11, 1), True),
        (dt.date(2026, 11, 30), True),
        (dt.date(2026, 12, 1), False),
    ):
        assert (permission(one, day) != FALSE) == expected
        assert sees(one, today=day) == expected


def test_nothing_of_the_configuration_is_forgotten_here():
    """A new condition of `CohortQuery` must be looked at by `permission`, or opens all."""
    assert set(CohortQuery.model_fields) == {
        "facility",
        "modality",
        "body_part",
        "manufacturer",
        "series",
        "query",
    }
