"""The fields of the spawn page."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi_spawners.pages import refused_field, render_form

QUEUE = {
    "name": "gpu",
    "title": None,
    "gpu_type": "V100",
    "max_gpus": 4,
    "max_hours": 8.0,
    "cpus": 10,
    "memory_mb": 65536,
    "free_gpus": 2,
    "starts_at": None,
}
CHOICES: dict[str, Any] = {
    "projects": [
        {
            "id": "lung",
            "title": "Lung",
            "title_ja": "肺",
            "purpose": "Nodules",
            "expires": "2027-03-31",
            "sites": ["flow"],
            "series": 3,
        }
    ],
    "sites": {
        "flow": {"title": "Flow", "title_ja": "不老", "walls": "namespaces", "queues": [QUEUE]}
    },
}
HOSTILE = "</script><script>alert(1)</script>\u2028<!--"


class Reader(HTMLParser):
    """What a browser would make of the form."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.embedded = ""
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.embedded += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


def controls(reader: Reader) -> dict[str, list[dict[str, str | None]]]:
    found: dict[str, list[dict[str, str | None]]] = {}
    for tag, attributes in reader.tags:
        if tag == "input":
            found.setdefault(str(attributes["name"]), []).append(attributes)
    return found


def test_it_posts_exactly_the_fields_of_the_contract() -> None:
    assert set(controls(read(render_form(CHOICES, "en", None)))) == {
        "project",
        "site",
        "queue",
        "gpus",
        "hours",
    }


def test_the_language_decides_the_titles() -> None:
    assert "不老" in render_form(CHOICES, "ja", None)
    english = render_form(CHOICES, "en", None)
    assert "Place to compute" in english
    assert re.search(r'choice-name">Flow<', english)


@pytest.mark.parametrize("place", ["title", "purpose", "site", "queue"])
def test_a_title_cannot_break_out(place: str) -> None:
    choices = copy.deepcopy(CHOICES)
    if place == "site":
        choices["sites"]["flow"]["title"] = HOSTILE
    elif place == "queue":
        choices["sites"]["flow"]["queues"][0]["title"] = HOSTILE
    else:
        choices["projects"][0][place] = HOSTILE
    reader = read(render_form(choices, "en", None))
    assert [tag for tag, _ in reader.tags].count("script") == 1
    embedded = json.loads(reader.embedded)
    assert HOSTILE in json.dumps(embedded, ensure_ascii=False)


@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_stands_in_titles_the_form_keeps_its_shape(title: str, purpose: str) -> None:
    choices = copy.deepcopy(CHOICES)
    choices["projects"][0].update(title=title or "x", purpose=purpose)
    expected = [tag for tag, _ in read(render_form(CHOICES, "en", None)).tags]
    assert [tag for tag, _ in read(render_form(choices, "en", None)).tags] == expected


def test_defaults_are_one_gpu_and_two_hours_within_the_limits() -> None:
    fields = controls(read(render_form(CHOICES, "en", None)))
    assert fields["gpus"][0]["value"] == "1"
    assert fields["hours"][0]["value"] == "2"
    assert fields["hours"][0]["max"] == "8"
    small = copy.deepcopy(CHOICES)
    small["sites"]["flow"]["queues"][0].update(max_gpus=0, max_hours=0.5)
    fields = controls(read(render_form(small, "en", None)))
    assert fields["gpus"][0]["value"] == "0"
    assert "readonly" in fields["gpus"][0]
    assert fields["hours"][0]["value"] == "0.5"


def test_a_project_without_a_place_is_not_offered() -> None:
    choices = copy.deepcopy(CHOICES)
    choices["projects"].append({**choices["projects"][0], "id": "brain", "sites": []})
    choices["projects"].append({**choices["projects"][0], "id": "bone", "sites": ["gone"]})
    values = [one["value"] for one in controls(read(render_form(choices, "en", None)))["project"]]
    assert values == ["lung"]


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"projects": [], "sites": {}}, "no project that is open"),
        ({**CHOICES, "sites": {}}, "own account"),
        ({"projects": [{**CHOICES["projects"][0], "sites": []}], "sites": {}}, "own account"),
    ],
)
def test_where_nothing_can_be_started_it_says_why(choices: dict[str, Any], words: str) -> None:
    html = render_form(choices, "en", None)
    assert words in html
    assert "data-empty" in html
    assert controls(read(html)) == {}


def test_a_refusal_stands_at_its_field() -> None:
    html = render_form(CHOICES, "ja", "gpus: at most 2 here")
    assert re.search(r'id="trouble-gpus" data-refused>ここでは 2 までです。</p>', html)
    html = render_form(CHOICES, "en", "the store <b>is</b> gone")
    assert "data-refused-form" in html
    assert "<b>" not in html


@pytest.mark.parametrize(
    ("message", "field", "text"),
    [
        ("gpus: at most 2 here", "gpus", "At most 2 here."),
        ("HTTP 400: Bad Request (hours: at most 8 here)", "hours", "At most 8 here."),
        ("project: you have no project 'x'", "project", "not, or no longer, open to you"),
        ("queue: something new", "queue", "something new"),
        ("(options): there is an unknown field", None, "(options): there is an unknown field"),
        ("nodes: too many", None, "nodes: too many"),
    ],
)
def test_refusals(message: str, field: str | None, text: str) -> None:
    refusal = refused_field(message)
    assert refusal is not None
    assert refusal["field"] == field
    assert text in str(refusal["text"])


def test_no_refusal() -> None:
    assert refused_field(None) is None
    assert refused_field("") is None
