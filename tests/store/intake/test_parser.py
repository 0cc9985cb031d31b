"""What hospitals send is read by a process that can do nothing else, and can be lost."""

from __future__ import annotations

import json
import os
import pwd
import resource
import signal
import socket
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian

from kakehashi.session.processes import descendants
from kakehashi.store.confine import confine
from kakehashi.store.deidentify import load_key
from kakehashi.store.intake import Parser, child, parser
from kakehashi.store.intake.channel import Message, Silence, hear, say
from kakehashi.store.intake.parser import Unreadable

from ..conftest import files_of
from .conftest import KEY

# Never skipped in CI, which is root.
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")


@pytest.fixture
def open_parser(hospital) -> Iterator[Callable[[str | None], Parser]]:
    made: list[Parser] = []

    def opened(account: str | None = None) -> Parser:
        made.append(Parser(load_key(hospital.root / KEY), account))
        return made[-1]

    yield opened
    for one in made:
        one.close()


def read(one: Parser, path: Path) -> parser.Parsed:
    with path.open("rb") as file:
        return one.object(file.fileno(), "F01")


def threads(pid: int) -> list[dict[str, str]]:
    """What the kernel says of each thread of a process, as walls stand around threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        found.append(dict(line.split(":\t", 1) for line in lines))
        found[-1]["network"] = str((task / "ns/net").readlink())
    return found


def children() -> list[int]:
    return list(descendants(os.getpid()))


def tried_confined(account: str | None, tries: dict[str, Callable[[], object]]) -> dict[str, str]:
    """Confine a process, and say what became of each attempt of it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            confine(account)
            said = {}
            for name, attempt in tries.items():
                try:
                    said[name] = f"possible: {attempt()}"
                except BaseException as error:
                    said[name] = type(error).__name__
            os.write(writing, json.dumps(said).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        told = file.read()
    os.waitpid(pid, 0)
    found: dict[str, str] = json.loads(told)
    return found


def forked(attempt: Callable[[], object]) -> str:
    """Say what an attempt of a process of its own came to: None, or the name of its error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            attempt()
            os.write(writing, b"None")
        except BaseException as error:
            os.write(writing, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        told = file.read()
    os.waitpid(pid, 0)
    return told


def write_beside(folder: str) -> None:
    Path(folder, "written").write_text("x")


@as_root
def test_a_confined_process_cannot_do_anything_but_compute():
    with tempfile.TemporaryDirectory() as folder:
        # Everybody may write here, so that only the walls can be what refuses it.
        Path(folder).chmod(0o777)
        public = Path(folder, "public")
        public.write_text("x")
        public.chmod(0o666)
        us = os.getpid()
        tries: dict[str, Callable[[], object]] = {
            "root again": lambda: os.setuid(0),
            "root's effect again": lambda: os.seteuid(0),
            "a file for everybody": public.read_text,
            "a folder for everybody": lambda: write_beside(folder),
            "who is here": lambda: Path("/etc/passwd").read_text(),
            "the parent's memory": lambda: Path(f"/proc/{us}/maps").read_text(),
            "a signal": lambda: os.kill(us, 0),
            "a network": lambda: socket.socket(socket.AF_INET),
            "a named socket": lambda: socket.socket(socket.AF_UNIX),
            "a process": os.fork,
            "more memory dumped": lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, 1)),
        }
        said = tried_confined("nobody", tries)
        assert said.keys() == tries.keys()
        assert not {name: told for name, told in said.items() if told.startswith("possible")}


def assert_walled(pid: int) -> None:
    """Every thread of a child of root has all walls around it."""
    for status in threads(pid):
        capabilities = {w: int(status[f"Cap{w}"], 16) for w in ("Inh", "Prm", "Eff", "Bnd", "Amb")}
        assert set(capabilities.values()) == {0}, capabilities
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert status["network"] != str(Path("/proc/self/ns/net").readlink())


@as_root
def test_who_is_confined_makes_threads_but_no_process_that_would_outlive_it():
    def thread() -> None:
        confine("nobody", threads=8)
        other = threading.Thread(target=int)
        other.start()
        other.join()

    def process() -> None:
        confine("nobody", threads=8)
        os.fork()

    assert forked(thread) == "None"
    assert forked(process) == "PermissionError"


@as_root
def test_as_root_too_no_thread_of_a_parser_has_a_right(open_parser):
    read(open_parser(None), files_of("ct_chest")[0])
    (pid,) = children()
    assert_walled(pid)


def test_who_has_a_thread_already_is_not_confined_as_it_would_stay_outside():
    release = threading.Event()

    def with_a_thread() -> None:
        other = threading.Thread(target=release.wait, daemon=True)
        other.start()
        confine(None)

    assert forked(lambda: confine(None)) == "None"
    assert forked(with_a_thread) == "StoreError"


@as_root
def test_the_parser_has_an_account_of_its_own_and_nothing_of_ours(open_parser, monkeypatch):
    monkeypatch.setenv("KAKEHASHI_TEST_SECRET", "planted")
    one = open_parser("nobody")
    read(one, files_of("ct_chest")[0])
    (pid,) = children()
    nobody = pwd.getpwnam("nobody")
    for status in threads(pid):
        assert status["Uid"].split() == [str(nobody.pw_uid)] * 4
        assert status["Gid"].split() == [str(nobody.pw_gid)] * 4
        assert status["Groups"].split() == []
    assert_walled(pid)
    open_files = {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
    assert {name.split(":")[0] for name in open_files} == {"/dev/null", "socket"}
    assert len(list(Path(f"/proc/{pid}/fd").iterdir())) == 4
    limits = Path(f"/proc/{pid}/limits").read_text()
    for name in ("core file size", "file size", "processes"):
        line = next(line for line in limits.splitlines() if name in line)
        assert line.split(name)[1].split()[:2] == ["0", "0"]
    space = next(line for line in limits.splitlines() if "address space" in line)
    assert "unlimited" not in space


def test_the_key_and_what_we_know_are_not_in_what_others_can_see_of_the_parser(
    open_parser, hospital, monkeypatch
):
    monkeypatch.setenv("KAKEHASHI_TEST_SECRET", "planted")
    one = open_parser(None)
    read(one, files_of("ct_chest")[0])
    (pid,) = children()
    seen = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    assert b"kakehashi.store.intake.parse" in seen
    assert load_key(hospital.root / KEY).reveal().encode() not in seen
    assert b"planted" not in seen


def test_what_the_parser_gives_is_what_the_deidentification_gives(open_parser, hospital):
    path = files_of("ct_chest")[0]
    one = read(open_parser(None), path)
    outcome = hospital.deidentifier.object(pydicom.dcmread(path), facility="F01")
    target = hospital.root / "one.dcm"
    outcome.write(target)
    assert one.content == target.read_bytes()
    assert one.series == outcome.dataset.SeriesInstanceUID
    assert one.patient == outcome.dataset.PatientID
    assert (one.tier, one.held, one.left, one.report) == (outcome.tier, "", 0, None)


@pytest.fixture
def bomb(tmp_path) -> Path:
    """A small file that is 200 MB of an image when it is inflated."""
    dataset = pydicom.dcmread(files_of("ct_chest")[0])
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5"
    dataset.PixelData = b""
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    bare, path = tmp_path / "bare.dcm", tmp_path / "bomb.dcm"
    dataset.save_as(bare, enforce_file_format=True)
    raw = bare.read_bytes()
    start = 128 + 4 + 12 + pydicom.dcmread(bare).file_meta.FileMetaInformationGroupLength
    plain = zlib.decompress(raw[start:], -zlib.MAX_WBITS)
    assert plain.endswith(b"\0\0\0\0")
    size = 200_000_000
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    plain = plain[:-4] + size.to_bytes(4, "little")
    path.write_bytes(
        raw[:start] + packer.compress(plain) + packer.compress(bytes(size)) + packer.flush()
    )
    assert path.stat().st_size < 300_000
    return path


def test_an_object_that_takes_all_memory_is_held_and_the_others_go_on(hospital, bomb, monkeypatch):
    monkeypatch.setattr(parser, "MEMORY", 64 << 20)
    first, second, *_ = files_of("ct_chest")
    hospital.send([first, bomb, second])
    intake = hospital.intake()
    assert intake.take() == 3
    (reason,) = hospital.reasons()
    assert reason.startswith("its parser ended: more than 6")
    assert reason.endswith(" MB of memory")
    assert intake.progress.taken == 2
    assert hospital.waiting() == 0


def test_an_object_that_takes_too_long_is_held_and_the_others_go_on(hospital, bomb, monkeypatch):
    monkeypatch.setattr(parser, "SECONDS", 0.01)
    monkeypatch.setattr(parser, "MEMORY", 4 << 30)
    hospital.send([bomb])
    intake = hospital.intake()
    intake.take()
    (reason,) = hospital.reasons()
    assert reason.startswith("its parser ended: more than ")
    assert reason.endswith(" s")
    assert children() == []
    monkeypatch.undo()
    hospital.send(files_of("ct_chest")[:2])
    assert intake.take() == 2
    assert intake.progress.taken == 2


def test_a_parser_that_dies_is_replaced_and_its_object_is_tried_again(hospital):
    first, second, *_ = files_of("ct_chest")
    hospital.send([first])
    intake = hospital.intake()
    intake.take()
    (before,) = children()
    # A service manager tells all processes of a service to end; this one is not asked.
    os.kill(before, signal.SIGTERM)
    hospital.send([second])
    intake.take()
    assert children() == [before]
    os.kill(before, signal.SIGKILL)
    hospital.send([files_of("ct_chest")[2]])
    intake.take()
    assert children() != [before]
    assert hospital.reasons() == []
    assert intake.progress.taken == 3


def test_a_parser_that_does_not_start_holds_no_object_back_for_good(hospital, monkeypatch):
    hospital.send(files_of("ct_chest")[:1])
    with monkeypatch.context() as patched:
        patched.setattr(child, "START_S", 0.0)
        with pytest.raises(Exception, match="the parser does not start"):
            hospital.intake().take()
    assert (hospital.waiting(), hospital.reasons()) == (1, [])
    intake = hospital.intake()
    intake.take()
    assert (intake.progress.taken, hospital.waiting()) == (1, 0)


TRUE = {
    "series": "1.2.3",
    "sop": "1.2.3.4",
    "study": "1.2",
    "patient": "K" + "A" * 16,
    "tier": 1,
    "held": "",
    "left": 0,
    "report": None,
}


@pytest.mark.parametrize(
    "lie",
    [
        {},
        {"series": "../../packs/1"},
        {"series": ""},
        {"sop": "1.2/3"},
        {"sop": 5},
        {"study": "1" * 65},
        {"patient": "Yamada^Tarou"},
        {"tier": 0},
        {"tier": True},
        {"left": -1},
        {"held": None},
        {"report": ["a"]},
    ],
)
def test_what_a_parser_says_is_not_believed_because_it_says_so(open_parser, monkeypatch, lie):
    said = (TRUE | lie) if lie else {}
    one = open_parser(None)
    path = files_of("ct_chest")[0]
    monkeypatch.setattr(child.Child, "ask", lambda *_, **__: Message(TRUE, bytearray(b"x")))
    assert read(one, path).series == "1.2.3"
    monkeypatch.setattr(child.Child, "ask", lambda *_, **__: Message(said, bytearray(b"x")))
    with pytest.raises(Unreadable, match="makes no sense"):
        read(one, path)


def test_what_a_parser_refuses_steers_no_terminal_and_what_it_reports_fits_a_database(
    open_parser, monkeypatch
):
    one = open_parser(None)
    path = files_of("ct_chest")[0]
    rude = {"refused": "\x1b[2J" + "a" * 100_000}
    monkeypatch.setattr(child.Child, "ask", lambda *_, **__: Message(rude, bytearray()))
    with pytest.raises(Unreadable) as raised:
        read(one, path)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000
    odd = TRUE | {"report": "a\0b\ud800"}
    monkeypatch.setattr(child.Child, "ask", lambda *_, **__: Message(odd, bytearray()))
    assert read(one, path).report == "ab?"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x01",
        b"\x05\0\0\0" + bytes(8) + b"[1,2]",
        b"\x03\0\0\0" + bytes(8) + b"{]}",
        b"\xff\xff\xff\xff" + bytes(8),
        b"\x02\0\0\0" + b"\xff" * 8 + b"{}",
        b"\xa0\x86\x01\0" + bytes(8) + b"[" * 100_000,
    ],
    ids=["nothing", "a piece", "a list", "no JSON", "long", "long content", "deep"],
)
def test_a_message_that_is_none_ends_the_conversation(raw):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        say(theirs, {"a": 1}, b"content")
        assert hear(ours, longest=7) == Message({"a": 1}, bytearray(b"content"))
        theirs.sendall(raw)
        theirs.close()
        with pytest.raises(Silence):
            hear(ours, longest=7)


def test_a_link_or_a_pipe_in_the_inbox_is_not_followed_and_not_waited_for(hospital, tmp_path):
    sent = files_of("ct_chest")[:3]
    hospital.send(sent)
    link, pipe, _ = (entry.path for entry in hospital.inbox.entries())
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    pipe.unlink()
    os.mkfifo(pipe)
    intake = hospital.intake()
    assert intake.take() == 3
    assert intake.progress.taken == 1
    assert hospital.reasons() == []
