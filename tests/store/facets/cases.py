"""Random small tables and random queries that have something to do with them."""

from __future__ import annotations

import datetime as dt
import random
from typing import Any

from hypothesis import strategies as st

from kakehashi.store.catalogue import Series
from kakehashi.store.query import COLUMNS, FALSE, TRUE, Condition, Query

POOLS: dict[str, list[Any]] = {
    "series_uid": [f"2.25.{n * 7919}" for n in range(40)] + ["1.2.3", "2.25.007", f"2.25.{2**128}"],
    "study_uid": [f"2.25.{2**127 + n}" for n in range(8)] + ["1.2.840.1", "2.25.x"],
    "patient_id": ["", "患者-1", "p2", "p3", "2.25.12"],
    "facility": ["F01", "F02", "F03", ""],
    "tier": [1, 2, 3],
    "modality": ["CT", "MR", "PT"],
    "body_part": [None, "CHEST", "ABDOMEN", "胸部"],
    "manufacturer": [None, "キヤノン", "GE MEDICAL SYSTEMS"],
    "vendor": [None, "CANON", "GE", "SIEMENS"],
    "model": [None, "Aquilion ONE", "Revolution"],
    "kernel": [None, "FC51", "fc51", "Br40d\\3"],
    "description": [
        None,
        "",
        "胸部 造影 5mm",
        "ﾅｼﾞｭｰﾙ",
        "Straße",
        "Lung 1.0 結節",
        "LUNG \uff12\u00d7",
    ],
    "study_date": [None, *(dt.date(2020, 1, 1) + dt.timedelta(40 * n) for n in range(9))],
    "rows": [256, 512],
    "columns": [256, 512],
    "slices": [1, 31, 32, 300, 2**40],
    "volumes": [1, 2],
    "usable_3d": [True, False],
    "spacing_z": [-1.0, 0.0, -0.0, 0.1 + 0.2, 5.0],
    "spacing_y": [0.5, 0.7],
    "spacing_x": [0.5, 0.7],
    "thickness": [None, float("nan"), 0.5, 1.25, 5.0],
    "orientation": ["axial", "oblique"],
    "kvp": [None, 80.0, 120.0],
    "exposure": [None, 1e-300, 81.5, 1e300],
    "contrast": [True, False],
    "sex": [None, "M", "F"],
    "age": [None, 0.0, 61.0, 1 / 12],
    "transfer_syntax": ["1.2.840.10008.1.2.1"],
    "flags": [(), (), ("tilted",), ("lossy", "tilted"), ("tilted", "lossy"), ("uneven-spacing",)],
    "size": [0, 2**62, 1000],
    "added_at": ["2026-01-01T00:00:00Z", "2026-02-03T23:59:59Z"],
}
ABSENT: dict[str, Any] = {"text": "?", "identifier": "1.9", "number": 3.25, "integer": 33}
WORDS = ["", "胸部", "ナジュール", "strasse", "lung", "LUNG", "結節", "2\u00d7", "5", "e", "absent"]


def table(seed: int, size: int) -> list[Series]:
    """Rows whose identifiers differ."""
    chance = random.Random(seed)
    uids = chance.sample(POOLS["series_uid"], min(size, len(POOLS["series_uid"])))
    return [
        Series(
            **{name: chance.choice(POOLS[name]) for name in COLUMNS if name != "series_uid"},
            series_uid=uid,
            path="p",
            blocks="b",
        )
        for uid in uids
    ]


def values(name: str) -> list[Any]:
    """Literals for a column, some of which no row has."""
    kind = COLUMNS[name].kind
    found = [value for value in POOLS[name] if value == value]
    if kind == "date":
        known = [dt.date.fromisoformat(str(value)[:10]) for value in found if value is not None]
        return [*known, dt.date(2020, 2, 1), dt.date(1, 1, 1)]
    if kind == "flags":
        return ["tilted", "lossy", "absent"]
    known = [value for value in found if value is not None]
    return [*known, ABSENT[kind]] if kind in ABSENT else known


@st.composite
def conditions(draw: st.DrawFn) -> Condition:
    name = draw(st.sampled_from(list(COLUMNS)))
    kind = COLUMNS[name].kind
    pool = values(name)
    if kind == "flags":
        if draw(st.booleans()):
            return Condition(name, draw(st.sampled_from(["==", "!="])), (None,))
        return Condition(name, "contains", (draw(st.sampled_from(pool)),))
    ops = ["==", "!=", "in", "not in"]
    if kind in {"text", "number", "integer", "date"}:
        ops += ["<", "<=", ">", ">="]
    if kind == "text":
        ops += ["contains", "contains"]
    op = draw(st.sampled_from(ops))
    if op == "contains":
        return Condition(name, op, (draw(st.sampled_from(WORDS)),))
    if op in {"in", "not in"}:
        chosen = draw(st.lists(st.sampled_from([None, *pool]), min_size=1, max_size=4))
        return Condition(name, op, tuple(chosen))
    if op in {"==", "!="} and draw(st.integers(0, 4)) == 0:
        return Condition(name, op, (None,))
    return Condition(name, op, (draw(st.sampled_from(pool)),))


def queries() -> st.SearchStrategy[Query]:
    return st.recursive(
        st.one_of(conditions(), conditions(), conditions(), st.sampled_from([TRUE, FALSE])),
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
        ),
        max_leaves=6,
    )


@st.composite
def selections(draw: st.DrawFn, facets: tuple[str, ...]) -> dict[str, frozenset[Any]]:
    names = draw(st.lists(st.sampled_from(facets), max_size=3, unique=True))
    return {
        name: frozenset(
            draw(st.lists(st.sampled_from([None, *values(name)]), min_size=1, max_size=3))
        )
        for name in names
    }
