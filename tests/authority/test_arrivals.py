"""The summary of what hospitals sent: its file, and the call that hands it to hubs."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
import traceback
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kakehashi.errors import RefusedError, StoreError
from kakehashi.store.arrivals_summary import LONGEST_REASON, Arrivals, public_reason
from tests.authority.desk import Desk
from tests.authority.real import Hub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.authority.real import RealStore

# Accounts and sshd are root's; CI is root and runs these.
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")

DAY = {
    "day": "2026-11-20",
    "expected": 12000,
    "received": 11800,
    "missing": 200,
    "studies_missing": 3,
    "quarantined": 3,
    "bytes": 6200000000,
}
WITHOUT_LIST = {**DAY, "day": "2026-11-19", "expected": None} | dict.fromkeys(
    ("missing", "studies_missing")
)
HELD: dict[str, Any] = {
    "facility": "F01",
    "reason": "held back: burned-in text",
    "held_back": True,
    "count": 5,
    "oldest": "2026-11-18",
}
SUMMARY: dict[str, Any] = {
    "kakehashi_arrivals": 1,
    "written_at": "2026-11-20T03:00:00Z",
    "facilities": [{"facility": "F01", "days": [DAY, WITHOUT_LIST]}],
    "quarantine": [HELD],
    "waiting": {"objects": 120, "series": 4},
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**SUMMARY, **changes}


def of_days(*days: dict[str, Any]) -> dict[str, Any]:
    return changed(facilities=[{"facility": "F01", "days": list(days)}])


# ---- The call


@pytest.fixture
def served(store: RealStore) -> Iterator[RealStore]:
    yield store
    store.layout.arrivals.unlink(missing_ok=True)


@needs_root
def test_a_hub_gets_what_the_intake_wrote(served: RealStore) -> None:
    served.hub.call("GET", "/v1/arrivals").refused(404, "not-found")
    Arrivals.model_validate(SUMMARY).write(served.layout.arrivals)
    assert served.hub.call("GET", "/v1/arrivals").ok() == SUMMARY
    assert served.hub.call("POST", "/v1/arrivals", {}).status == 405


@needs_root
def test_only_hubs_get_it(served: RealStore) -> None:
    Arrivals.model_validate(SUMMARY).write(served.layout.arrivals)
    for token in ("", "x", served.hub.token + "x"):
        Hub(served.http_port, token).call("GET", "/v1/arrivals").refused(401, "credential")
    assert served.hub.call("GET", "/v1/arrivals").status == 200


@needs_root
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        json.dumps(changed(patient="YAMADA^TARO")),
        json.dumps(of_days({**DAY, "received": "YAMADA^TARO"})),
    ],
)
def test_a_damaged_file_is_not_handed_on_nor_written_into_a_log(
    served: RealStore, text: str
) -> None:
    served.layout.arrivals.write_text(text)
    served.hub.call("GET", "/v1/arrivals").refused(500, "internal")
    assert "arrivals.json is damaged" in served.logs()
    assert "YAMADA" not in served.logs()


@needs_root
def test_a_file_that_the_authority_may_not_read_is_an_error(served: RealStore) -> None:
    Arrivals.model_validate(SUMMARY).write(served.layout.arrivals)
    served.layout.arrivals.chmod(0o600)
    served.hub.call("GET", "/v1/arrivals").refused(500, "internal")
    assert "arrivals.json: cannot be read" in served.logs()


def test_what_a_reason_quotes_does_not_leave_the_store(tmp_path: Path) -> None:
    """Also where whoever wrote the file did not think of it."""
    desk = Desk(tmp_path)
    with pytest.raises(RefusedError) as none_yet:
        desk.authority.arrivals()
    assert none_yet.value.code == "not-found"
    quarantine = [
        {**HELD, "reason": "cannot be read: ValueError: 'YAMADA^TARO' is no number"},
        {**HELD, "reason": "a sequence\nof 山田太郎 is damaged " + "x " * 500},
    ]
    desk.layout.arrivals.write_text(json.dumps(changed(quarantine=quarantine)))
    reasons = [one["reason"] for one in desk.authority.arrivals()["quarantine"]]
    assert reasons[0] == "cannot be read: ValueError"
    assert reasons[1].startswith("a sequence of … is damaged x x")
    assert len(reasons[1]) <= LONGEST_REASON


# ---- Its file


def test_a_file_is_whole_and_for_everybody_to_read(tmp_path: Path) -> None:
    path = tmp_path / "arrivals.json"
    assert Arrivals.load(path) is None
    first = Arrivals.model_validate(SUMMARY)
    old = os.umask(0o077)
    try:
        first.write(path)
        second = Arrivals.model_validate(changed(quarantine=[]))
        second.write(path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644
    assert Arrivals.load(path) == second != first
    assert [one.name for one in tmp_path.iterdir()] == ["arrivals.json"]


def test_what_cannot_be_written_or_read_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere/arrivals\.json: cannot be written"):
        Arrivals.model_validate(SUMMARY).write(tmp_path / "nowhere" / "arrivals.json")
    with pytest.raises(StoreError, match="cannot be read"):
        Arrivals.load(tmp_path)


@pytest.mark.parametrize(
    "document",
    [
        changed(kakehashi_arrivals=2),
        changed(written_at="2026-11-20T03:00:00"),
        changed(more=1),
        changed(facilities=[{"facility": "F01", "days": []}] * 2),
        changed(facilities=[{"facility": "F\n01", "days": []}]),
        changed(quarantine=[{**HELD, "count": -1}]),
        changed(quarantine=[{**HELD, "patient": "x"}]),
        of_days(DAY, DAY),
        of_days({**DAY, "missing": None}),
        of_days({**DAY, "expected": None}),
        of_days({**DAY, "expected": 199}),
        of_days({**DAY, "received": -1}),
        of_days({**DAY, "day": "yesterday"}),
    ],
)
def test_what_breaks_a_rule_is_no_summary(document: dict[str, Any], tmp_path: Path) -> None:
    Arrivals.model_validate(SUMMARY)
    with pytest.raises(ValidationError):
        Arrivals.model_validate(document)
    path = tmp_path / "arrivals.json"
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"arrivals\.json is damaged"):
        Arrivals.load(path)


def test_the_error_about_a_damaged_one_quotes_no_value_of_it() -> None:
    text = json.dumps(of_days({**DAY, "received": "YAMADA^TARO"}))
    with pytest.raises(StoreError, match=r"facilities\.0\.days\.0\.received") as raised:
        Arrivals.parse(text)
    assert "YAMADA" not in "".join(traceback.format_exception(raised.value))


counts = st.integers(0, 2**63)
lists = st.none() | st.tuples(counts, counts, counts).map(sorted)


@st.composite
def summaries(draw: st.DrawFn) -> Arrivals:
    def a_day(date: dt.date) -> dict[str, Any]:
        listed = draw(lists) or [None] * 3
        names = ("studies_missing", "missing", "expected", "received", "quarantined", "bytes")
        return {
            "day": date,
            **dict(zip(names, [*listed, *draw(st.tuples(*[counts] * 3))], strict=True)),
        }

    facilities = draw(
        st.sets(st.text(st.characters(exclude_categories=["C"]), min_size=1), max_size=3)
    )
    dates = st.sets(st.dates(), max_size=3)
    held = st.fixed_dictionaries(
        {
            "facility": st.just("F01"),
            "reason": st.text(),
            "held_back": st.booleans(),
            "count": counts,
            "oldest": st.dates(),
        }
    )
    return Arrivals.model_validate(
        {
            "written_at": draw(st.datetimes(timezones=st.just(dt.UTC))),
            "facilities": [
                {"facility": name[:64], "days": [a_day(date) for date in draw(dates)]}
                for name in facilities
            ],
            "quarantine": draw(st.lists(held, max_size=3)),
            "waiting": {"objects": draw(counts), "series": draw(counts)},
        }
    )


@given(summary=summaries())
def test_what_was_written_is_read_again(summary: Arrivals) -> None:
    again = Arrivals.parse(summary.model_dump_json())
    assert again == summary
    assert Arrivals.parse(json.dumps(summary.model_dump(mode="json"))) == summary


# ---- Reasons


@pytest.mark.parametrize(
    ("reason", "public"),
    [
        ("held back: burned-in text", "held back: burned-in text"),
        (
            "held back: BurnedInAnnotation is YES: text in the pixels may name the patient",
            "held back: BurnedInAnnotation is YES: text in the pixels may name the patient",
        ),
        ("held back: 3 identifier(s) remained", "held back: 3 identifier(s) remained"),
        (
            "held back: X-Ray 3D Angiographic Image Storage: text is burned into such images",
            "held back: X-Ray 3D Angiographic Image Storage: text is burned into such images",
        ),
        ("cannot be read: KeyError: YAMADA TARO", "cannot be read: KeyError"),
        ("cannot be read: no such file /srv/YAMADA", "cannot be read: …"),
        (
            "the data set's SOPInstanceUID is 1.2.840.1, that of the sender's command 1.2.840.2",
            "the data set's SOPInstanceUID is … that of the sender's command …",
        ),
        (
            "held back: a colour image (YAMADA (TARO)): by custom",
            "held back: a colour image … by custom",
        ),
        ("a colour image (YAMADA", "a colour image …"),
        ("no number: 'YAMADA TARO'", "no number: …"),
        ('no number: "YAMADA TARO', "no number: …"),
        ("no number: YAMADA^TARO^^^", "no number: …"),
        ("no number: 山田", "no number: …"),
        ("born 1960-01-01", "born …"),
        ("\x1b[2J\n\n", "[2J"),
        ("", "…"),
    ],
)
def test_reasons_without_what_they_quote(reason: str, public: str) -> None:
    assert public_reason(reason) == public


@given(reason=st.text(max_size=3000))
def test_a_reason_is_one_printable_line(reason: str) -> None:
    public = public_reason(reason)
    assert 0 < len(public) <= LONGEST_REASON
    assert public.isprintable()
    assert "^" not in public
    assert all(character == "…" or character.isascii() for character in public)


# ---- Where it is used


def test_neither_hub_nor_authority_gets_numpy_with_it() -> None:
    code = (
        "import sys, kakehashi.store.arrivals_summary;"
        "print([name for name in ('numpy', 'pydicom', 'sqlalchemy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
