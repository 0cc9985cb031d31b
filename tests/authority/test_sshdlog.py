"""Whom sshd refuses by itself stands in the audit trail: few words, of ours, in bounded numbers."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import stat
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.audit import Audit
from kakehashi.errors import AuditError
from kakehashi.store.authority import sshdlog, watch
from kakehashi.store.authority.book import Book
from kakehashi.store.authority.ca import Keys, PublicKey
from kakehashi.store.authority.layout import Layout
from kakehashi.store.authority.refusals import LONGEST, Reader, Reason, Refusal
from kakehashi.store.authority.sshdlog import Entry, LogReader, LogWriter, Position
from kakehashi.store.authority.watch import Watch
from tests.authority.real import until
from tests.authority.stranger import Stranger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kakehashi.audit import Record
    from tests.authority.real import Node, RealStore

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes accounts and runs sshd")
HOUR_S = 3600


def refused(store: RealStore) -> list[Record]:
    return store.records(kind="sshd.refused")


def sign(
    store: RealStore,
    session: str,
    node: Node,
    *,
    keys: Path | None = None,
    begins: float = 1000,
    ends: float = 2**40,
    accounts: tuple[str, ...] = (),
    sources: tuple[str, ...] = (),
    known: bool = True,
) -> None:
    """Give a node a certificate that the store did not give, which the book may know."""
    signed = Keys(keys or store.layout.keys).sign_user(
        PublicKey.parse(node.public),
        session=session,
        accounts=accounts or (store.view(), store.work()),
        now=begins,
        expires_at=int(ends),
        sources=sources,
    )
    if known:
        with closing(sqlite3.connect(store.layout.book)) as book, book:
            book.execute(
                "INSERT INTO certificates SELECT ?, id, fingerprint, 0, ? FROM sessions"
                " WHERE id = ?",
                (signed.serial, 2.0**40, session),
            )
    node.take({**node.grant, "certificate": signed.certificate, "serial": signed.serial})


def forged(store: RealStore, session: str, node: Node, tmp_path: Path) -> None:
    Keys.create(tmp_path)
    sign(store, session, node, keys=tmp_path, known=False)


def expired(store: RealStore, session: str, node: Node, tmp_path: Path) -> None:
    del tmp_path
    sign(store, session, node, ends=time.time() - 1)


def early(store: RealStore, session: str, node: Node, tmp_path: Path) -> None:
    del tmp_path
    sign(store, session, node, begins=time.time() + HOUR_S)


def elsewhere(store: RealStore, session: str, node: Node, tmp_path: Path) -> None:
    del tmp_path
    sign(store, session, node, sources=("192.0.2.7/32",))


def other_principal(store: RealStore, session: str, node: Node, tmp_path: Path) -> None:
    del tmp_path
    sign(store, session, node, accounts=("somebody",))


def over_long(store: RealStore, session: str, node: Node, tmp_path: Path) -> None:
    del tmp_path
    sign(store, session, node, known=False)


@needs_root
@pytest.mark.parametrize(
    ("make", "reason", "known"),
    [
        (forged, "authority", False),
        (expired, "expired", True),
        (early, "not-yet-valid", True),
        (elsewhere, "address", True),
        (other_principal, "principal", True),
        (over_long, "lease", False),
    ],
)
def test_a_certificate_that_sshd_refuses_is_recorded(
    store: RealStore,
    tmp_path: Path,
    make: Callable[[RealStore, str, Node, Path], None],
    reason: str,
    known: bool,
) -> None:
    session, node, _ = store.session()
    # The control: who is let in makes no such record.
    assert node.admitted(store.view())
    make(store, session, node, tmp_path)
    assert not node.admitted(store.view())
    key_id = f"{session}:{node.grant['serial']}"
    (record,) = until(
        lambda: [r for r in refused(store) if r.detail.get("key_id", "")[:32] == session],
        what="the record",
    )
    assert record.session == (session if known else None)
    assert {**record.detail, "at": ""} == {
        "at": "",
        "reason": reason,
        "address": "127.0.0.1",
        "account": store.view(),
        "key_id": key_id,
        "serial": node.grant["serial"],
    }


@needs_root
@pytest.mark.parametrize(
    ("options", "command", "reason"),
    [
        ((), (), "shell"),
        ((), ("id",), "command"),
        (("-tt",), (), "terminal"),
        (("-W", "127.0.0.1:22"), (), "forward"),
        (("-N", "-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:22"), (), "reverse-forward"),
        (
            ("-N", "-o", "ExitOnForwardFailure=yes", "-R", "/tmp/x:127.0.0.1:22"),
            (),
            "reverse-forward-socket",
        ),
        (("-s",), ("netconf",), "subsystem"),
    ],
)
def test_what_else_a_session_asks_of_sshd_is_recorded(
    store: RealStore, options: tuple[str, ...], command: tuple[str, ...], reason: str
) -> None:
    session, node, _ = store.session()
    assert node.admitted(store.view())
    assert node.ssh(store.view(), *options, command=command).returncode != 0
    record = until(
        lambda: [r for r in store.records(session, "sshd.refused") if r.detail["reason"] == reason],
        what="the record",
    )[0]
    assert record.detail["account"] == store.view()
    assert record.detail["address"] == "127.0.0.1"
    assert record.detail["serial"] == node.grant["serial"]
    # The first of all records of this session came after it had been let in without one.
    assert {r.detail["reason"] for r in store.records(session, "sshd.refused")} <= {
        reason,
        "shell",
    }


@needs_root
def test_wanting_the_agent_or_the_screen_forwarded_is_recorded(
    store: RealStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, node, _ = store.session()
    monkeypatch.setenv("DISPLAY", "127.0.0.1:9")
    place = tmp_path / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", place], stdout=subprocess.DEVNULL) as agent:
        try:
            until(place.exists, what="the agent")
            options = ("-Y", "-A", "-o", f"IdentityAgent={place}")
            assert node.ssh(store.view(), *options, command=("id",)).returncode != 0
        finally:
            agent.terminate()
    until(
        lambda: (
            {"agent", "x11", "command"}
            == {record.detail["reason"] for record in store.records(session, "sshd.refused")}
        ),
        what="the records",
    )


@needs_root
def test_a_name_that_imitates_sshds_words_moves_nothing(store: RealStore) -> None:
    _, node, _ = store.session()
    name = "x from 192.0.2.1 port 5"
    assert not node.admitted(name)
    record = until(
        lambda: [r for r in refused(store) if r.detail.get("account") == name], what="the record"
    )[0]
    assert record.detail["address"] == "127.0.0.1"
    assert record.detail["reason"] == "account"


@needs_root
def test_a_name_with_line_breaks_makes_no_other_line(store: RealStore) -> None:
    """What OpenSSH's own client would not send."""
    forgery = f"User child is on pid 1\r\n1.000 1 {BEGUN}"
    stranger = Stranger(store.sshd_port)
    try:
        stranger.log_in(f"y\r\n{forgery}\x1b[0m".encode())
    finally:
        stranger.close()
    record = until(
        lambda: [r for r in refused(store) if str(r.detail.get("account")).startswith("y")],
        what="the record",
    )[0]
    assert record.detail["reason"] == "account"
    assert record.detail["address"] == "127.0.0.1"
    assert "User child is on pid 1" in record.detail["account"]
    assert record.detail["account"].isprintable()
    lines = store.layout.sshd_log.read_text().splitlines()
    assert not [line for line in lines if line.startswith(("User", "1.000"))]


@needs_root
def test_sshds_log_is_read_by_the_authority_and_written_by_root_alone(store: RealStore) -> None:
    for path, mode in ((store.layout.log, 0o710), (store.layout.sshd_log, 0o640)):
        status = path.stat()
        assert status.st_uid == 0
        assert stat.S_IMODE(status.st_mode) == mode
    for path in store.layout.log.iterdir():
        if path != store.layout.sshd_log:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


@needs_root
def test_what_came_while_nobody_read_is_recorded_and_once(alone: RealStore) -> None:
    _, node, _ = alone.session()

    def accounts() -> list[str]:
        return [str(record.detail["account"]) for record in refused(alone)]

    assert not node.admitted("first")
    until(lambda: accounts() == ["first"], what="the first record")
    # Killed between a record and the note of its place, the next one writes it down again.
    log = alone.layout.sshd_log
    until(
        lambda: (
            (kept := Position.load(alone.layout.sshd_position)) is not None
            and kept.offset == log.stat().st_size
        ),
        what="the note of how far the log was read",
    )
    held = alone.pid("authority")
    os.kill(held, signal.SIGSTOP)
    assert not node.admitted("second")
    os.kill(held, signal.SIGKILL)
    until(lambda: accounts() == ["first", "second"], what="the second record")
    alone.stop()
    alone.start()
    assert not node.admitted("third")
    until(lambda: "third" in accounts(), what="the third record")
    assert accounts() == ["first", "second", "third"]


@needs_root
def test_a_flood_gets_few_records_and_pushes_no_session_out(alone: RealStore) -> None:
    session, node, _ = alone.session()
    flood = 25
    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(node.admitted, (f"nobody{number}" for number in range(flood))))
    assert node.ssh(alone.view(), command=("id",)).returncode != 0
    until(lambda: alone.records(session, "sshd.refused"), what="the session's record")
    alone.stop()
    strangers = [record for record in refused(alone) if record.session is None]
    summed = sum(record.detail["refused"] for record in alone.records(kind="sshd.suppressed"))
    # Should a minute have passed in between, there were two of them.
    assert watch.EACH <= len(strangers) <= 2 * watch.EACH
    assert len(strangers) + summed == flood


# The reader, by itself

HERE = "198.51.100.7"
BEGUN = f'Connection from {HERE} port 4711 on 192.0.2.22 port 22 rdomain ""'
FINGERPRINT = "SHA256:" + "a" * 43
REQUEST = "session.c:session_input_channel_req():2217"
CHANNEL = "serverloop.c:server_input_channel_open():635 (pid=8):"
GLOBAL = "serverloop.c:server_input_global_request():782 (pid=8):"
AGENT = "auth-agent-req@openssh.com"
SESSION = "0123456789abcdef" * 2


def read(*texts: str, pid: int = 7) -> list[Refusal]:
    reader = Reader()
    found = [reader.read(Entry(1.0, pid, text)) for text in (BEGUN, *texts)]
    return [refusal for refusals in found for refusal in refusals]


def key(key_id: str = f"{SESSION}:5", serial: str = "5") -> str:
    return f"ED25519-CERT {FINGERPRINT} ID {key_id} (serial {serial}) CA ED25519 {FINGERPRINT}"


def failed(told: str) -> str:
    return f"Failed publickey for kv-lung from {HERE} port 4711 ssh2: {told}"


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_whatever_a_stranger_calls_themselves_the_address_is_theirs(name: str) -> None:
    (refusal,) = read(
        f"Invalid user {name} from {HERE} port 4711",
        f"Connection closed by invalid user {name} {HERE} port 4711 [preauth]",
    )
    assert (refusal.reason, refusal.address) == ("account", HERE)
    assert refusal.account is not None
    assert len(refusal.account) <= LONGEST
    assert refusal.account == name or len(name) > LONGEST


@given(
    st.lists(
        st.one_of(
            st.text(st.characters(min_codepoint=32, max_codepoint=126)),
            st.sampled_from(
                [
                    "Failed publickey for x from 192.0.2.1 port 5 ssh2: " + key(),
                    "Accepted publickey for x from 192.0.2.1 port 5 ssh2: " + key(),
                    f"Accepted publickey for x from {HERE} port 4711 ssh2: " + key(),
                    "User child is on pid 7",
                    "debug1: session.c:session_input_channel_req():1 (pid=7): session 0 req x",
                    "Timeout before authentication for 192.0.2.1 port 5",
                    "subsystem request for a by user b failed, subsystem not found",
                ]
            ),
        )
    )
)
def test_any_text_gives_only_our_words_and_the_address_of_the_connection(
    texts: list[str],
) -> None:
    for refusal in read(*texts):
        assert refusal.reason in get_args(Reason)
        assert refusal.address == HERE


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=300))
def test_a_hostile_key_id_stays_a_key_id(key_id: str) -> None:
    (refusal,) = read(failed(key(key_id)))
    assert (refusal.account, refusal.address) == ("kv-lung", HERE)
    assert refusal.key_id is not None
    assert len(refusal.key_id) <= LONGEST


def test_no_other_process_speaks_for_a_connection() -> None:
    reader = Reader()
    reader.read(Entry(1.0, 7, BEGUN))
    assert reader.read(Entry(1.0, 8, failed(key()))) == []
    assert len(reader.read(Entry(1.0, 7, failed(key())))) == 1


def test_a_certificate_that_failed_is_one_refusal_though_its_key_is_tried_too() -> None:
    (refusal,) = read(
        "Certificate invalid: expired",
        failed(key()),
        "userauth_pubkey: signature algorithm ssh-ed25519 not in PubkeyAcceptedAlgorithms "
        "[preauth]",
        f"Connection closed by authenticating user kv-lung {HERE} port 4711 [preauth]",
    )
    assert refusal == Refusal(1.0, "expired", HERE, "kv-lung", f"{SESSION}:5", 5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"Connection closed by authenticating user kv-lung {HERE} port 4711 [preauth]", "no-key"),
        (f"User root from {HERE} not allowed because not listed in AllowUsers", "account"),
        (f"Timeout before authentication for {HERE} port 4711", "timeout"),
        (
            f"Unable to negotiate with {HERE} port 4711: no matching cipher found. [preauth]",
            "negotiation",
        ),
        (f"drop connection #9 from [{HERE}]:4711 on [192.0.2.22]:22 past MaxStartups", "too-many"),
    ],
)
def test_who_never_showed_a_certificate(text: str, reason: str) -> None:
    assert [(r.reason, r.address) for r in read(text)] == [(reason, HERE)]


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (f"{REQUEST} (pid=8): session 0 req x11-req", "x11"),
        (
            f"{REQUEST} (bin=sshd-session): session_input_channel_req: session 0 req {AGENT}",
            "agent",
        ),
        (f"{CHANNEL} ctype direct-streamlocal@openssh.com rchan 0 win 1 max 1", "forward-socket"),
        (f"{CHANNEL} ctype tun@openssh.com rchan 0 win 1 max 1", "tunnel"),
        (f"{GLOBAL} rtype never-heard-of want_reply 1", "request"),
        (f"{REQUEST} (pid=8): session 0 req subsystem", None),
        (f"{GLOBAL} rtype no-more-sessions@openssh.com want_reply 0", None),
        (f"{CHANNEL} ctype session rchan 0 win 1 max 1", None),
    ],
)
def test_who_was_let_in_and_wants_more(told: str, reason: str | None) -> None:
    reader = Reader()
    for text in (
        BEGUN,
        f"Accepted publickey for kv-lung from {HERE} port 4711 ssh2: {key()}",
        "User child is on pid 8",
    ):
        assert reader.read(Entry(1.0, 7, text)) == []
    refusals = reader.read(Entry(1.0, 8, f"debug1: {told}"))
    assert [refusal.reason for refusal in refusals] == ([reason] if reason else [])
    for refusal in refusals:
        assert (refusal.address, refusal.account, refusal.serial) == (HERE, "kv-lung", 5)
        assert refusal.admitted


def test_a_process_may_speak_before_its_parent_says_whose_it_is() -> None:
    reader = Reader()
    for text in (BEGUN, f"Accepted publickey for kv-lung from {HERE} port 4711 ssh2: {key()}"):
        reader.read(Entry(1.0, 7, text))
    told = "debug1: session.c:session_input_channel_req():1 (pid=8): session 0 req "
    for wanted in ("subsystem", "exec", "x11-req"):
        assert reader.read(Entry(1.0, 8, told + wanted)) == []
    refusals = reader.read(Entry(1.0, 7, "User child is on pid 8"))
    assert [refusal.reason for refusal in refusals] == ["command", "x11"]
    assert {refusal.address for refusal in refusals} == {HERE}
    # When it is gone, what has its number then is another's.
    over = f"Disconnected from user kv-lung {HERE} port 4711"
    assert reader.read(Entry(1.0, 8, over)) == []
    assert reader.read(Entry(1.0, 8, told + "exec")) == []


# The log, and who follows it


class Follower:
    """A watch over a log that a test writes."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.layout.authority.mkdir()
        self.layout.log.mkdir()
        self.book = Book.create(self.layout.book)
        self.now = 1_800_000_000.0
        self.audit = Audit(self.layout.audit, lambda: self.now)
        self.restart()

    def restart(self) -> None:
        self.watch = Watch(self.layout, self.book, self.audit, lambda: self.now)

    def say(self, *texts: str, pid: int = 7) -> None:
        with self.layout.sshd_log.open("a") as file:
            file.writelines(f"{self.now:.3f} {pid} {text}\n" for text in texts)

    def knock(self, name: str, address: str = HERE) -> None:
        begun = BEGUN.replace(HERE, address)
        self.say(begun, f"Invalid user {name} from {address} port 4711")

    def found(self, kind: str = "sshd.refused") -> list[Record]:
        self.watch.look()
        return [record for record in self.audit.records() if record.kind == kind]

    def accounts(self) -> list[str]:
        return [str(record.detail["account"]) for record in self.found()]


@pytest.fixture
def follower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Follower:
    # One look reads all, however slow the disk is.
    monkeypatch.setattr(watch, "PATIENCE_S", 60)
    return Follower(tmp_path)


def test_who_stops_in_the_middle_goes_on_there(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PATIENCE_S", 0)
    names = ["a", "b", "c"]
    for name in names:
        follower.knock(name)
    # Each look reads one line of the six.
    found = [follower.accounts() for _ in range(6)]
    assert found == [[], ["a"], ["a"], ["a", "b"], ["a", "b"], names]
    follower.restart()
    follower.knock("d")
    assert [follower.accounts() for _ in range(8)] == [names] * 7 + [[*names, "d"]]


def test_nothing_is_recorded_twice_and_nothing_left_out(follower: Follower) -> None:
    assert follower.accounts() == []
    follower.knock("a")
    assert follower.accounts() == ["a"]
    follower.restart()
    follower.knock("b")
    assert follower.accounts() == ["a", "b"]
    # The file is put aside, twice, and a line is half written meanwhile.
    follower.say(BEGUN)
    with follower.layout.sshd_log.open("a") as file:
        file.write(f"{follower.now:.3f} 7 Invalid user c")
        file.flush()
        assert follower.accounts() == ["a", "b"]
        file.write(f" from {HERE} port 4711\n")
    follower.layout.sshd_log.rename(sshdlog.older(follower.layout.sshd_log))
    follower.knock("d")
    assert follower.accounts() == ["a", "b", "c", "d"]
    follower.layout.sshd_log.rename(sshdlog.older(follower.layout.sshd_log))
    follower.restart()
    follower.knock("e")
    assert follower.accounts() == ["a", "b", "c", "d", "e"]
    assert follower.found("sshd.log-lost") == []


@pytest.mark.parametrize("reading", [True, False])
def test_a_log_that_somebody_shortened_is_said_and_read_on(
    follower: Follower, reading: bool
) -> None:
    follower.knock("a")
    follower.knock("b")
    assert follower.accounts() == ["a", "b"]
    follower.layout.sshd_log.write_text("")
    if not reading:
        follower.restart()
    follower.knock("c")
    assert follower.accounts() == ["a", "b", "c"]
    assert len(follower.found("sshd.log-lost")) == 1


@pytest.mark.parametrize("reading", [True, False])
def test_a_log_that_grew_again_since_is_not_taken_for_the_one_before(
    follower: Follower, reading: bool
) -> None:
    follower.knock("a")
    assert follower.accounts() == ["a"]
    follower.layout.sshd_log.write_text("")
    follower.now += 1
    for name in ("b", "c"):
        follower.knock(name)
    if not reading:
        follower.restart()
    assert follower.accounts() == ["a", "b", "c"]
    assert len(follower.found("sshd.log-lost")) == 1


def test_a_log_that_went_unread_is_said(follower: Follower) -> None:
    follower.knock("a")
    assert follower.accounts() == ["a"]
    for name in ("b", "c"):
        follower.layout.sshd_log.rename(sshdlog.older(follower.layout.sshd_log))
        follower.knock(name)
    follower.restart()
    assert follower.accounts() == ["a", "b", "c"]
    assert len(follower.found("sshd.log-lost")) == 1


def test_a_connection_from_before_a_restart_is_still_known(follower: Follower) -> None:
    follower.say(BEGUN, f"Accepted publickey for kv-lung from {HERE} port 4711 ssh2: {key()}")
    follower.say("User child is on pid 8")
    assert follower.found() == []
    follower.restart()
    told = "debug1: session.c:session_input_channel_req():1 (pid=8): session 0 req exec"
    follower.say(told, pid=8)
    (record,) = follower.found()
    assert (record.detail["reason"], record.detail["address"]) == ("command", HERE)


def test_who_forges_a_certificate_names_no_session(follower: Follower) -> None:
    with closing(sqlite3.connect(follower.layout.book)) as book, book:
        book.execute(
            "INSERT INTO certificates VALUES (5, ?, 'x', 0, 0)",
            (SESSION,),
        )
    follower.say(BEGUN, failed(key()), "Certificate invalid: expired", failed(key()))
    forged_one, genuine = follower.found()
    assert (forged_one.detail["reason"], forged_one.session) == ("authority", None)
    assert forged_one.detail["key_id"] == f"{SESSION}:5"
    assert (genuine.detail["reason"], genuine.session) == ("expired", SESSION)
    # A number that no book could hold, and one that is another's.
    for key_id, serial in ((f"{SESSION}:{2**64 - 1}", str(2**64 - 1)), ("0" * 32 + ":5", "5")):
        follower.say("Certificate invalid: expired", failed(key(key_id, serial)))
    assert [record.session for record in follower.found()][2:] == [None, None]


def test_records_are_bounded_and_the_rest_is_summed_up(follower: Follower) -> None:
    for number in range(30):
        follower.knock(f"a{number}")
    assert len(follower.found()) == watch.EACH
    # Others have their own measure, and all strangers one together; IPv6 counts by network.
    for number in range(30):
        follower.knock(f"b{number}", f"2001:db8::{number:x}")
    assert len(follower.found()) == 2 * watch.EACH
    for number in range(200):
        follower.knock(f"c{number}", f"203.0.113.{number}")
    assert len(follower.found()) == watch.STRANGERS
    # Somebody inside is recorded all the same.
    with closing(sqlite3.connect(follower.layout.book)) as book, book:
        book.execute("INSERT INTO certificates VALUES (5, ?, 'x', 0, 0)", (SESSION,))
    follower.say(BEGUN, f"Accepted publickey for kv-lung from {HERE} port 4711 ssh2: {key()}")
    told = "debug1: session.c:session_input_channel_req():1 (pid=7): session 0 req exec"
    follower.say(*[told] * 30)
    inside = [record for record in follower.found() if record.session == SESSION]
    assert len(inside) == watch.EACH
    assert follower.found("sshd.suppressed") == []
    follower.now += watch.WINDOW_S
    (summary,) = follower.found("sshd.suppressed")
    total = 30 + 30 + 200 + 30
    assert summary.detail["refused"] == total - watch.STRANGERS - watch.EACH
    assert Counter(summary.detail["reasons"]).total() == summary.detail["refused"]
    assert Counter(summary.detail["addresses"]).total() == summary.detail["refused"]
    assert len(summary.detail["addresses"]) <= 21
    # A new minute, a new measure.
    follower.knock("later")
    assert follower.accounts()[-1] == "later"


def test_what_could_not_be_recorded_is_recorded_later(follower: Follower) -> None:
    follower.knock("a")
    assert follower.accounts() == ["a"]
    trail = follower.layout.audit.read_bytes()
    follower.layout.audit.write_bytes(trail[:-2] + b"x\n")
    follower.knock("b")
    with pytest.raises(AuditError):
        follower.watch.look()
    follower.layout.audit.write_bytes(trail)
    assert follower.accounts() == ["a", "b"]


@needs_root
@given(st.lists(st.binary(min_size=1, max_size=1023), min_size=1, max_size=20))
def test_one_message_is_one_line_with_the_writers_number(
    tmp_path_factory: pytest.TempPathFactory, messages: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("log") / "sshd.log"
    # What the last writer did not finish.
    path.write_bytes(b"1.000 1 Invalid us")
    writer = LogWriter(path, os.getgid())
    with writer.sender as sender:
        for message in messages:
            sender.send(message + b"\r\n")
            writer.write()
    found = [entry for entry, _ in LogReader(path).entries()]
    assert [entry.pid for entry in found] == [1, *[os.getpid()] * len(messages)]
    assert all(entry.text.isascii() and entry.text.isprintable() for entry in found if entry.text)


@needs_root
def test_a_line_break_in_a_name_begins_no_message(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "sshd.log", os.getgid())
    forgery = "Connection from 192.0.2.1 port 5 on 192.0.2.22 port 22"
    for text in (BEGUN, f"Invalid user x\r\n{forgery}\n1.000 1 {forgery} from {HERE} port 4711"):
        writer.sender.send(text.encode())
    writer.write()
    writer.sender.close()
    reader = Reader()
    entries = [entry for entry, _ in LogReader(tmp_path / "sshd.log").entries()]
    assert len(entries) == 2
    assert {entry.pid for entry in entries} == {os.getpid()}
    refusals = [refusal for entry in entries for refusal in reader.read(entry)]
    assert [(refusal.reason, refusal.address) for refusal in refusals] == [("account", HERE)]


@needs_root
def test_the_log_is_put_aside_before_it_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sshdlog, "LARGEST", 4000)
    path = tmp_path / "sshd.log"
    writer, reader = LogWriter(path, os.getgid()), LogReader(path)
    texts = []
    for number in range(200):
        writer.sender.send(b"message %d" % number)
        writer.write()
        texts += [entry.text for entry, _ in reader.entries()]
    writer.sender.close()
    assert texts == [f"message {number}" for number in range(200)]
    assert not reader.lost
    for file in (path, sshdlog.older(path)):
        assert file.stat().st_size < 4100
        assert stat.S_IMODE(file.stat().st_mode) == 0o640


@needs_root
def test_where_there_is_no_room_a_torn_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "sshd.log"
    writer = LogWriter(path, os.getgid())

    def say(message: bytes) -> None:
        writer.sender.send(message)
        writer.write()

    say(b"first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 25, hard))
    try:
        say(b"torn " * 10)
        say(b"gone")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    say(b"last")
    writer.sender.close()
    texts = [entry.text for entry, _ in LogReader(path).entries()]
    assert (texts[0], texts[-1]) == ("first", "last")
    assert "gone" not in "".join(texts)
    assert len(texts) == 3
