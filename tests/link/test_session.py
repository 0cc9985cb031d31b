"""The session file and the lease file, as the wrapper writes them."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from kakehashi.errors import SessionError
from kakehashi.link import Session

GOOD: dict[str, Any] = {
    "session": "ab" * 16,
    "person": "hanako",
    "project": "lung",
    "site": "slurm",
    "ends_at": "2031-01-31T12:00:00Z",
    "manifest": {"path": "/manifest.json", "sha256": "0" * 64},
    "view": "/store",
    "work": "/work",
    "socket": "/run/kakehashi/store.sock",
    "work_socket": "/run/kakehashi/work.sock",
    "software": "0.1.0",
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "session.json"
    path.write_text(json.dumps(GOOD | changes), encoding="utf-8")
    return path


def test_reads_what_the_contract_names(tmp_path: Path) -> None:
    session = Session.current(write(tmp_path))
    assert session.session == "ab" * 16
    assert (session.person, session.project, session.site) == ("hanako", "lung", "slurm")
    assert session.ends_at == dt.datetime(2031, 1, 31, 12, tzinfo=dt.UTC)
    assert session.manifest.path == "/manifest.json"
    assert session.manifest.sha256 == "0" * 64
    assert session.socket == Path("/run/kakehashi/store.sock")
    assert (session.view, session.work) == (Path("/store"), Path("/work"))
    assert session.work_socket == Path("/run/kakehashi/work.sock")
    assert session.replicas == ()


def test_further_endpoints_of_the_store_may_be_listed(tmp_path: Path) -> None:
    session = Session.current(write(tmp_path, replicas=["/run/kakehashi/second.sock"]))
    assert session.replicas == (Path("/run/kakehashi/second.sock"),)
    for wrong in ("/run/kakehashi/second.sock", [1], None):
        with pytest.raises(SessionError, match="replicas must be a list of strings"):
            Session.current(write(tmp_path, replicas=wrong))


def test_a_node_without_mounts_has_its_sockets_elsewhere(tmp_path: Path) -> None:
    session = Session.current(
        write(tmp_path, view=None, work=None, work_socket="/dev/shm/kakehashi-1/run/work.sock")
    )
    assert (session.view, session.work) == (None, None)
    assert session.work_socket == Path("/dev/shm/kakehashi-1/run/work.sock")


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAKEHASHI_SESSION", str(write(tmp_path, person="taro")))
    assert Session.current().person == "taro"
    (tmp_path / "other").mkdir()
    assert Session.current(write(tmp_path / "other")).person == "hanako"
    monkeypatch.setenv("KAKEHASHI_SESSION", "/nowhere/session.json")
    with pytest.raises(SessionError, match=r"/nowhere/session\.json"):
        Session.current()


def test_a_file_without_a_work_socket_is_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "session.json"
    path.write_text(json.dumps({k: v for k, v in GOOD.items() if k != "work_socket"}))
    with pytest.raises(SessionError, match="work_socket must be a string"):
        Session.current(path)


def test_outside_of_a_session_the_message_says_so(tmp_path: Path) -> None:
    missing = tmp_path / "session.json"
    with pytest.raises(SessionError, match="only available inside a Kakehashi session: no"):
        Session.current(missing)


@pytest.mark.parametrize(
    "changes",
    [
        {"person": 3},
        {"person": None},
        {"view": 3},
        {"socket": None},
        {"work_socket": ["/a"]},
        {"work_socket": None},
        {"ends_at": "tomorrow"},
        {"ends_at": "2031-01-31T12:00:00"},
        {"manifest": "x"},
        {"manifest": {"path": "/m", "sha256": "xyz"}},
        {"manifest": {"path": "/m"}},
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(SessionError, match=r"session\.json"):
        Session.current(path)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "session.json"
    path.write_bytes(raw)
    with pytest.raises(SessionError, match=r"session\.json"):
        Session.current(path)


def test_the_lease_is_read_anew_at_each_call(tmp_path: Path) -> None:
    session = Session.current(write(tmp_path))
    lease = {
        "expires_at": "2031-01-31T11:00:00Z",
        "ends_at": "2031-01-31T12:00:00Z",
        "state": "live",
        "message": "",
    }
    (tmp_path / "lease.json").write_text(json.dumps(lease), encoding="utf-8")
    assert session.lease().state == "live"
    changed = lease | {"state": "offline", "message": "ハブに届きません"}
    (tmp_path / "lease.json").write_text(json.dumps(changed), encoding="utf-8")
    now = session.lease()
    assert (now.state, now.message) == ("offline", "ハブに届きません")
    assert now.expires_at == dt.datetime(2031, 1, 31, 11, tzinfo=dt.UTC)


def test_an_unknown_state_or_a_missing_lease_is_refused(tmp_path: Path) -> None:
    session = Session.current(write(tmp_path))
    with pytest.raises(SessionError, match=r"lease\.json"):
        session.lease()
    (tmp_path / "lease.json").write_text(
        json.dumps(
            {
                "expires_at": "2031-01-31T11:00:00Z",
                "ends_at": "2031-01-31T12:00:00Z",
                "state": "dead",
                "message": "",
            }
        ),
        encoding="utf-8",
    )
    with pytest.raises(SessionError, match="state is 'dead'"):
        session.lease()
