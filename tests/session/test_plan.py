"""The document that starts a session is checked field by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.errors import SessionError
from kakehashi.session.plan import Document, Plan, check_shared_path

TICKET = "T" * 43
NODE: dict[str, Any] = {
    "software": "/opt/kakehashi",
    "read_only": ["/opt/apps"],
    "devices": ["/dev/nvidia*"],
    "scratch_mb": 128,
    "allow_unencrypted_swap": False,
    "allow_sshfs_view": False,
    "walls": "namespaces",
    "allow_no_landlock": False,
}
DOCUMENT: dict[str, Any] = {
    "session": "0" * 32,
    "ticket": TICKET,
    "portal_url": "https://portal.example/",
    "portal_ca": None,
    "site": "flow",
    "node": NODE,
    "software": "0.1.0",
}


def test_a_good_document_is_read_and_hides_its_ticket() -> None:
    document = Document.parse(json.dumps(DOCUMENT))
    assert document.ticket.reveal() == TICKET
    assert TICKET not in repr(document)
    assert document.portal_url == "https://portal.example"
    assert document.node.read_only == ("/opt/apps",)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("session", "0" * 31, "session"),
        ("session", 7, "session"),
        ("ticket", "short", "ticket"),
        ("portal_url", "http://portal.example", "portal_url"),
        ("portal_url", "ftp://127.0.0.1", "portal_url"),
        ("portal_ca", 1, "portal_ca"),
        ("site", "../x", "site"),
        ("software", "0.1\n", "software"),
        ("node", [], "node"),
        ("node", NODE | {"more": 1}, "more"),
        ("node", NODE | {"scratch_mb": 63}, "scratch_mb"),
        ("node", NODE | {"scratch_mb": True}, "scratch_mb"),
        ("node", NODE | {"software": "opt"}, "software"),
        ("node", NODE | {"devices": ["/etc/shadow"]}, "devices"),
        ("node", NODE | {"devices": ["/dev/../etc/shadow"]}, "devices"),
        ("node", NODE | {"read_only": "/opt"}, "read_only"),
        ("node", NODE | {"allow_sshfs_view": 1}, "allow_sshfs_view"),
        ("node", NODE | {"walls": "none"}, "walls"),
        ("node", NODE | {"allow_no_landlock": 1}, "allow_no_landlock"),
    ],
)
def test_a_bad_field_is_named(field: str, value: object, named: str) -> None:
    with pytest.raises(SessionError, match=named) as caught:
        Document.parse(json.dumps(DOCUMENT | {field: value}))
    assert TICKET not in str(caught.value)


@pytest.mark.parametrize("field", sorted(DOCUMENT))
def test_a_missing_field_is_named(field: str) -> None:
    rest = {name: value for name, value in DOCUMENT.items() if name != field}
    with pytest.raises(SessionError, match=field):
        Document.parse(json.dumps(rest))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(sorted(DOCUMENT)), inner),
    )
)
def test_any_json_is_read_or_refused(value: object) -> None:
    with pytest.raises(SessionError):
        Document.parse(json.dumps(value))


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(SessionError):
        Document.parse(text)


COVERING = ("/", "/tmp", "/home", "/home/session", "/run", "/dev", "/usr", "/etc", "/var")
WITHIN = ("/home/session/x", "/run/kakehashi/x", "/dev/shm", "/proc/1", "/work/site", "/store/x")
ODD = ("/opt/../etc", "/opt/./x", "opt")


@pytest.mark.parametrize("path", [*COVERING, *WITHIN, *ODD])
def test_places_of_the_payload_are_not_covered_or_opened(path: str) -> None:
    with pytest.raises(SessionError, match="cannot be shown"):
        check_shared_path(path)


@pytest.mark.parametrize("path", ["/opt", "/srv/apps", "/home/alice/env", "/tmp/x", "/usr/local"])
def test_other_places_may_be_shown(path: str) -> None:
    check_shared_path(path)


@given(st.frozensets(st.sampled_from(["seccomp", "network"])), st.booleans())
def test_a_plan_survives_its_way_to_the_warden(without: frozenset[str], stand_ins: bool) -> None:
    plan = Plan(
        1000,
        1000,
        "a",
        "/opt/k",
        ("/x",),
        ("/dev/n*",),
        64,
        stand_ins,
        without=without,
        folder="/f",
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
