"""Figures and lists that a disk or a person damaged are named, and nothing is made of them."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pytest

from kakehashi.errors import StoreError
from kakehashi.store.receive import Inbox
from kakehashi.store.receive.arrivals import arrivals, expect, listed
from kakehashi.store.receive.figures import day_of

TODAY = day_of(dt.datetime.now(dt.UTC))
DAY = {"objects": 1, "bytes": 1, "again": 0, "quarantined": 0, "studies": {"1.2": "0" * 12}}


def figures(**changes: object) -> str:
    return json.dumps({"until": 0, "facilities": {"east": DAY | changes}})


@pytest.fixture
def inbox(tmp_path) -> Inbox:
    return Inbox(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 60_000,
        "[]",
        "{}",
        "\udcff",
        json.dumps({"until": "x", "facilities": {}}),
        json.dumps({"until": 0, "facilities": []}),
        figures(objects="1"),
        figures(studies=[]),
        figures(studies={"1.2": 1}),
        figures(odd=1),
    ],
    ids=lambda text: text[:40],
)
def test_damaged_figures_are_named(inbox, text):
    path = inbox.folders.figures / f"{TODAY}.json"
    path.write_text(figures())
    assert arrivals(inbox, 1)[0].received == 1
    path.write_text(text, errors="surrogateescape")
    for reads in (arrivals, listed):
        with pytest.raises(StoreError, match=path.name):
            reads(inbox, 1)


@pytest.mark.parametrize("name", ["x.json", "99999-01-01.json"])
def test_a_file_that_is_no_day_is_named(inbox, name):
    (inbox.folders.figures / name).write_text(figures())
    with pytest.raises(StoreError, match=name):
        arrivals(inbox, 1)


@pytest.mark.parametrize("text", ["", "x", "-1", "\udcff"])
def test_a_damaged_count_is_named(inbox, text):
    path = inbox.folders.figures / "counted"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(StoreError, match=str(path)):
        arrivals(inbox, 1)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 60_000, "[]", '{"east": []}', '{"east": {"1.2": "3"}}', "\udcff"],
    ids=lambda text: text[:40],
)
def test_a_damaged_list_is_named(inbox, text):
    folder = inbox.folders.expected
    expect(folder, "east", {TODAY: {"1.2": 3}})
    assert arrivals(inbox, 1)[0].expected == 3
    path: Path = folder / f"{TODAY}.json"
    path.write_text(text, errors="surrogateescape")
    for reads in (arrivals, listed):
        with pytest.raises(StoreError, match=path.name):
            reads(inbox, 1)
    with pytest.raises(StoreError, match=path.name):
        expect(folder, "east", {TODAY: {"1.3": 3}})
