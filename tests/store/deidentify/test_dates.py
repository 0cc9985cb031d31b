from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.store.deidentify.dates import (
    age_between,
    age_of,
    shift_date,
    shift_datetime,
    time_of,
)


@given(st.dates(dt.date(1900, 1, 1)), st.dates(dt.date(1900, 1, 1)), st.integers(52, 520))
def test_differences_between_days_and_days_of_the_week_stay(one, two, weeks):
    moved = [dt.date.fromisoformat(shift_date(f"{day:%Y%m%d}", -7 * weeks)) for day in (one, two)]
    assert moved[0] - moved[1] == one - two
    assert moved[0].weekday() == one.weekday()
    assert moved[0] != one


@pytest.mark.parametrize(
    "text", ["", "2024", "20240230", "20241301", "tomorrow", "2024051", "0000-00-00"]
)
def test_what_is_no_date_becomes_empty(text):
    assert shift_date(text, -7) == ""


def test_the_old_form_of_a_date_is_read():
    assert shift_date("2024.05.16", -7) == "20240509"


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("20240516131211.250000+0900", "20240509131211.250000+0900"),
        ("20240516", "20240509"),
        ("2024051613", "2024050913"),
        ("202405", ""),
        ("2024", ""),
        ("20240516 13:12", ""),
        ("20240516Yamada", ""),
    ],
)
def test_a_datetime_keeps_its_time_and_zone(text, moved):
    assert shift_datetime(text, -7) == moved


@pytest.mark.parametrize("text", ["131211.25", "13", "1312", "131211", "13:12:11.5", "235960"])
def test_times_stay(text):
    assert time_of(f"{text} ") == text


@pytest.mark.parametrize("text", ["Yamada", "256011", "13121", "131211.1234567"])
def test_what_is_no_time_goes(text):
    assert time_of(text) == ""


@pytest.mark.parametrize(
    ("age", "left"),
    [
        ("089Y", "089Y"),
        ("090Y", "090Y"),
        ("104Y", "090Y"),
        ("006M", "006M"),
        ("003W", "003W"),
        ("999W", "999W"),
        ("89Y", ""),
        ("abcY", ""),
        ("1100", ""),
    ],
)
def test_ages_over_89_are_90(age, left):
    assert age_of(age) == left


@pytest.mark.parametrize(
    ("birth", "day", "age"),
    [
        ("1960-05-17", "2024-05-16", "063Y"),
        ("1960-05-16", "2024-05-16", "064Y"),
        ("1920-01-01", "2024-05-16", "090Y"),
        ("2023-05-01", "2024-05-16", "012M"),
        ("2024-05-01", "2024-05-16", "015D"),
        ("2025-05-01", "2024-05-16", ""),
    ],
)
def test_an_age_is_made_of_the_date_of_birth(birth, day, age):
    assert age_between(dt.date.fromisoformat(birth), dt.date.fromisoformat(day)) == age
