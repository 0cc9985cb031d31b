"""What a store says of its arrivals: ten hospitals, each with a fault of its own."""

from __future__ import annotations

import datetime as dt
from typing import Any

NAMES = [
    "F01",
    "F02",
    "F03",
    "F04",
    "F05",
    "F06",
    "F07",
    "F08",
    "F09",
    "第十病院 <b>with a long name</b>",
]
TODAY = dt.date(2026, 11, 20)


def ago(days: int) -> str:
    return (TODAY - dt.timedelta(days=days)).isoformat()


def day(back: int, received: int, expected: int | None = None, missing: int = 0) -> dict[str, Any]:
    listed = expected is not None
    return {
        "day": ago(back),
        "expected": expected,
        "received": received,
        "missing": missing if listed else None,
        "studies_missing": -(-missing // 300) if listed else None,
        "quarantined": 0,
        "bytes": received * 525_000,
    }


def ordinary(number: int) -> list[dict[str, Any]]:
    counts = [(back, 9000 + 1371 * number - 211 * (back * number % 13)) for back in range(14)]
    return [
        day(back, count, count)
        for back, count in counts
        if dt.date.fromisoformat(ago(back)).weekday() < 5
    ]


def replaced(days: list[dict[str, Any]], one: dict[str, Any]) -> list[dict[str, Any]]:
    return [one, *(other for other in days if other["day"] != one["day"])]


def summary(written_at: dt.datetime | None = None) -> dict[str, Any]:
    days = [ordinary(number) for number in range(10)]
    days[1] = replaced(days[1], day(0, 11_800, 12_000, 200))
    days[2] = replaced(days[2], day(1, 0, 8_412, 8_412))
    days[3] = [day(back, 4_100 + back) for back in range(10)]
    days[4] = replaced(days[4], day(3, 7_000))
    days[5] = replaced(days[5], day(2, 1_284_000, 1_284_001, 1))
    days[6] = []
    for number, back, quarantined in ((0, 2, 5), (1, 2, 1_412), (2, 9, 3), (8, 9, 17)):
        next(one for one in days[number] if one["day"] == ago(back))["quarantined"] = quarantined
    when = written_at or dt.datetime.now(dt.UTC)
    held = {"held_back": True, "oldest": ago(2)}
    stopped = {"held_back": False, "oldest": ago(9)}
    return {
        "kakehashi_arrivals": 1,
        "written_at": when.isoformat(),
        "facilities": [
            {"facility": name, "days": list_} for name, list_ in zip(NAMES, days, strict=True)
        ],
        "quarantine": [
            {"facility": "F01", "reason": "held back: burned-in text", "count": 5, **held},
            {
                "facility": "F02",
                "reason": "held back: a secondary capture: text in the pixels may name the patient",
                "count": 1_412,
                **held,
            },
            {"facility": "F03", "reason": "cannot be read: InvalidDicomError", "count": 3}
            | stopped,
            {
                "facility": "F09",
                "reason": "the data set has no valid SOPInstanceUID <script>alert(1)</script>",
                "count": 17,
                **stopped,
            },
        ],
        "waiting": {"objects": 120, "series": 4},
    }


def nothing() -> dict[str, Any]:
    return {
        "kakehashi_arrivals": 1,
        "written_at": dt.datetime.now(dt.UTC).isoformat(),
        "facilities": [],
        "quarantine": [],
        "waiting": {"objects": 0, "series": 0},
    }
