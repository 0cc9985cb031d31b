"""No patient is in two parts, strata keep their shares, the same data give the same parts."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kakehashi.cohort import CatalogueError, Split, split_rows

PATIENTS = st.lists(
    st.tuples(
        st.sampled_from(["F01", "F02", "施設"]),
        st.sampled_from(["F", "M", None]),
        st.integers(min_value=1, max_value=4),
    ),
    max_size=60,
)
NEW = st.tuples(st.sampled_from(["F01", "F02"]), st.just("F"), st.just(1))
SHARES = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20)).filter(any)


def rows_of(patients, prefix: str = "p") -> list[dict[str, object]]:
    return [
        {
            "series_uid": f"{prefix}{number}.{one}",
            "patient_id": f"{prefix}{number}",
            "study_date": f"2024-01-{1 + one:02d}",
            "facility": facility,
            "sex": sex,
        }
        for number, (facility, sex, count) in enumerate(patients)
        for one in range(count)
    ]


def split(rows, shares=(0.7, 0.15, 0.15), seed=0, stratify=("facility", "sex")) -> Split:
    return split_rows(rows, *shares, stratify=stratify, seed=seed)


def parts(found: Split) -> list[tuple[str, ...]]:
    return [found.train, found.val, found.test]


def part_of(rows, found: Split) -> dict[str, int]:
    """Return the part of each patient; a patient in two of them is an error."""
    patient = {row["series_uid"]: row["patient_id"] for row in rows}
    where: dict[str, int] = {}
    for number, part in enumerate(parts(found)):
        for uid in part:
            assert where.setdefault(patient[uid], number) == number, "a patient is in two parts"
    return where


def fractions(shares: tuple[int, int, int]) -> tuple[float, float, float]:
    train, val = shares[0] / sum(shares), shares[1] / sum(shares)
    return train, val, shares[2] / sum(shares)


@given(PATIENTS, SHARES, st.integers())
@settings(max_examples=200, deadline=None)
def test_every_series_is_in_one_part_and_every_patient_too(patients, shares, seed):
    rows = rows_of(patients)
    found = split(rows, fractions(shares), seed)
    assert sorted(sum(parts(found), ())) == sorted(row["series_uid"] for row in rows)
    part_of(rows, found)
    for part, share in zip(parts(found), shares, strict=True):
        assert list(part) == sorted(part)
        assert share or not part  # a share of nothing gets nobody


@given(PATIENTS, SHARES, st.integers())
@settings(max_examples=200, deadline=None)
def test_each_stratum_has_its_shares_to_within_one_patient(patients, shares, seed):
    rows = rows_of(patients)
    where = part_of(rows, split(rows, fractions(shares), seed))
    strata = defaultdict(list)
    for number, (facility, sex, _) in enumerate(patients):
        strata[facility, sex].append(where[f"p{number}"])
    for members in strata.values():
        for number, share in enumerate(fractions(shares)):
            assert abs(members.count(number) - share * len(members)) < 1 + 1e-5


@given(PATIENTS, st.integers(), st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_order_of_the_rows_makes_no_difference(patients, seed, draw):
    rows = rows_of(patients)
    mixed = list(rows)
    draw.shuffle(mixed)
    assert split(mixed, seed=seed) == split(rows, seed=seed)


@given(PATIENTS, st.integers())
@settings(max_examples=100, deadline=None)
def test_later_series_of_known_patients_move_nobody(patients, seed):
    rows = rows_of(patients)
    later = [
        {**row, "series_uid": f"{row['series_uid']}.later", "study_date": "2025-01-01", "sex": "O"}
        for row in rows
    ]
    before = part_of(rows, split(rows, seed=seed))
    assert part_of(rows + later, split(rows + later, seed=seed)) == before


@given(PATIENTS, NEW, st.integers())
@settings(max_examples=200, deadline=None)
def test_a_new_patient_moves_at_most_one_other_across_each_cut(patients, new, seed):
    rows = rows_of(patients)
    more = rows + rows_of([new], "new")
    before = part_of(rows, split(rows, seed=seed))
    after = part_of(more, split(more, seed=seed))
    moved = [one for one in before if before[one] != after[one]]
    assert len(moved) <= 2
    for one in moved:
        number = int(one[1:])
        assert patients[number][:2] == new[:2]  # and nobody of another stratum


def test_another_seed_is_another_split_and_shares_hold_over_small_strata():
    draw = random.Random(1)
    patients = [(f"F{draw.randrange(200)}", "F", 1) for _ in range(2000)]
    rows = rows_of(patients)
    found = split(rows)
    assert found != split(rows, seed=1)
    for part, share in zip(parts(found), (0.7, 0.15, 0.15), strict=True):
        assert abs(len(part) / len(rows) - share) < 0.02


def test_those_without_an_id_count_as_one_patient():
    rows = [
        {"series_uid": str(n), "patient_id": patient, "study_date": None}
        for n, patient in enumerate(["", None, ""])
    ]
    found = split(rows, (0.4, 0.3, 0.3), stratify=())
    assert sorted(map(len, parts(found))) == [0, 0, 3]


@pytest.mark.parametrize("shares", [(0.7, 0.2, 0.2), (1.1, -0.1, 0.0), (0, 0, 0)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(CatalogueError, match="add up to 1"):
        split([], shares)
