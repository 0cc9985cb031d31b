"""A project is asked for by one person and approved by another, and ends; all is recorded."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from kakehashi.audit import Audit
from kakehashi.cli import projects as commands
from kakehashi.cli.projects import tell_the_store
from kakehashi.config import Config, load
from kakehashi.errors import AuditError, ConfigError, StoreError
from kakehashi.store import view
from kakehashi.store.authority.layout import Layout as AuthorityLayout
from kakehashi.store.layout import Layout
from kakehashi.store.projects import Projects

if TYPE_CHECKING:
    from click.testing import Result

WANTED = {
    "id": "nodules",
    "title": "Nodules",
    "title_ja": "結節",
    "purpose": "肺結節の検出",
    "approval": "pending",
    "expires": "2099-01-01",
    "groups": ["lung-study"],
    "sites": ["flow"],
    "tier": 2,
    "cohort": {"facility": ["F01"], "modality": ["CT"]},
}
LAST = dt.date(2098, 3, 31)


class Desk:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / "kakehashi.toml"
        self.file.write_text(
            f"""
            [store]
            root = "{root}"
            address = "store.example"

            [[projects]]
            id = "fixed"
            title = "In the file"
            purpose = "p"
            approval = "1"
            expires = 2099-01-01
            groups = ["g"]
            sites = ["flow"]
            """
        )
        self.audit = Audit(root / "audit.jsonl")

    @property
    def config(self) -> Config:
        return load(self.file)

    @property
    def projects(self) -> Projects:
        return Projects(self.config, self.audit)

    def active(self) -> set[str]:
        return {project.id for project in self.config.projects}

    def records(self) -> list[tuple[str, str, str]]:
        lines = [json.loads(line) for line in self.audit.path.read_text().splitlines()]
        return [(line["kind"], line["person"], line["detail"]["project"]) for line in lines]


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path)


def test_a_request_gives_nothing_until_somebody_else_approves_it(desk):
    desk.projects.request(WANTED, "tanaka")
    assert desk.active() == {"fixed"}
    for same in ("tanaka", " Tanaka "):
        with pytest.raises(StoreError, match="somebody else"):
            desk.projects.approve("nodules", same, "2026-1", LAST)
    assert desk.active() == {"fixed"}
    desk.projects.approve("nodules", "suzuki", "2026-0412", LAST)
    (found,) = (project for project in desk.config.projects if project.id == "nodules")
    assert found.model_dump(mode="json") == {
        **found.model_dump(mode="json"),
        **{key: value for key, value in WANTED.items() if key not in {"cohort"}},
        "approval": "2026-0412",
        "expires": "2098-03-31",
        "requested_by": "tanaka",
        "approved_by": "suzuki",
    }
    assert found.cohort.facility == {"F01"}
    assert desk.records() == [
        ("project.requested", "tanaka", "nodules"),
        ("project.approved", "suzuki", "nodules"),
    ]


def test_nobody_writes_his_own_approval_into_a_request(desk):
    asked = desk.projects.request(WANTED | {"approved_by": "suzuki", "requested_by": "x"}, "tanaka")
    assert (asked.project.approved_by, asked.project.requested_by) == (None, "tanaka")
    assert desk.active() == {"fixed"}


def test_an_ended_project_is_gone_for_good_and_its_history_stays(desk):
    desk.projects.request(WANTED, "tanaka")
    desk.projects.approve("nodules", "suzuki", "2026-1", LAST)
    desk.projects.end("nodules", "suzuki", "study over")
    assert desk.active() == {"fixed"}
    (ended, fixed) = sorted(desk.projects.list(), key=lambda one: one.state, reverse=True)
    assert (ended.state, fixed.state) == ("ended", "configured")
    assert [(step["step"], step["by"]) for step in ended.history] == [
        ("requested", "tanaka"),
        ("approved", "suzuki"),
        ("ended", "suzuki"),
    ]
    for call in (
        lambda: desk.projects.approve("nodules", "suzuki", "2026-2", LAST),
        lambda: desk.projects.request(WANTED, "tanaka"),
    ):
        with pytest.raises(StoreError, match="nodules"):
            call()
    recorded = desk.records()
    assert desk.projects.end("nodules", "tanaka", "again") == ended
    assert desk.records() == recorded


def test_an_approval_is_renewed_with_a_new_number_and_day(desk):
    desk.projects.request(WANTED, "tanaka")
    desk.projects.approve("nodules", "suzuki", "2026-1", LAST)
    desk.projects.approve("nodules", "sato", "2027-9", LAST.replace(year=2099))
    (found,) = (project for project in desk.config.projects if project.id == "nodules")
    assert (found.approval, found.approved_by) == ("2027-9", "sato")


def test_a_declined_request_can_be_made_again(desk):
    desk.projects.request(WANTED, "tanaka")
    desk.projects.decline("nodules", "suzuki", "purpose too wide")
    with pytest.raises(StoreError, match="declined"):
        desk.projects.approve("nodules", "suzuki", "2026-1", LAST)
    desk.projects.request(WANTED | {"purpose": "narrow"}, "tanaka")
    desk.projects.approve("nodules", "suzuki", "2026-1", LAST)
    assert "nodules" in desk.active()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"id": "../evil"}, "id"),
        ({"id": "fixed"}, "already"),
        ({"groups": []}, "groups"),
        ({"tier": 4}, "tier"),
        ({"expires": "soon"}, "expires"),
        ({"colour": "red"}, "unknown key"),
        ({"cohort": {"modalty": ["CT"]}}, "unknown key"),
    ],
)
def test_a_request_that_breaks_a_rule_is_refused_and_leaves_nothing(desk, change, word):
    with pytest.raises(StoreError, match=word):
        desk.projects.request(WANTED | change, "tanaka")
    assert [one.project.id for one in desk.projects.list()] == ["fixed"]
    assert not desk.audit.path.exists()


def test_what_is_configured_is_not_ended_here(desk):
    with pytest.raises(StoreError, match="configuration"):
        desk.projects.end("fixed", "suzuki", "no")


def test_nothing_is_done_that_cannot_be_recorded(desk):
    desk.projects.request(WANTED, "tanaka")
    desk.audit.path.write_text("this is no trail\n")
    with pytest.raises(AuditError):
        desk.projects.approve("nodules", "suzuki", "2026-1", LAST)
    assert desk.active() == {"fixed"}
    assert desk.projects.list()[1].state == "requested"


def test_a_damaged_approval_stops_the_configuration_and_is_named(desk):
    desk.projects.request(WANTED, "tanaka")
    desk.projects.approve("nodules", "suzuki", "2026-1", LAST)
    path = desk.root / "projects" / "nodules.json"
    whole = path.read_text()
    path.write_text(whole.replace('"tier": 2', '"tier": 9'))
    with pytest.raises(ConfigError, match=r"nodules.json[\s\S]*tier"):
        load(desk.file)
    path.rename(path.with_name("other.json"))
    (desk.root / "projects" / "other.json").write_text(whole)
    with pytest.raises(ConfigError, match="rename"):
        load(desk.file)


def test_an_approval_that_the_store_could_not_read_is_refused_before_it_is_written(desk):
    """Somebody wrote the same project into the file meanwhile."""
    desk.projects.request(WANTED, "tanaka")
    text = desk.file.read_text()
    desk.file.write_text(text + text[text.index("[[projects]]") :].replace("fixed", "nodules"))
    before = desk.records()
    with pytest.raises(StoreError, match="stands there twice"):
        desk.projects.approve("nodules", "suzuki", "2026-1", LAST)
    assert desk.active() == {"fixed", "nodules"}  # it can still be read
    assert desk.records() == before
    desk.file.write_text(text)
    desk.projects.approve("nodules", "suzuki", "2026-1", LAST)
    desk.projects.approve("nodules", "suzuki", "2026-2", LAST)  # anew, in its own place
    assert desk.active() == {"fixed", "nodules"}


STORE = """
import fcntl, json, os, signal, sys
run, takes = sys.argv[1:]
pid = 10
def write():
    with open(f"{run}/services.json.part", "w") as file:
        json.dump({"supervisor": 1, "authority": pid}, file)
    os.rename(f"{run}/services.json.part", f"{run}/services.json")
def read_anew(*_):
    global pid
    pid += takes == "takes"
    write()
    os.write(1, b"heard\\n")  # a print could be under way
signal.signal(signal.SIGHUP, read_anew)
lock = open(f"{run}/serve.lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
write()
with open(f"{run}/serve.pid", "w") as file:
    file.write(str(os.getpid()))
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def running(desk):
    """Start what a running store does when it is told to read its configuration anew."""
    run = AuthorityLayout(desk.root).run
    run.mkdir(parents=True)
    started: list[subprocess.Popen[str]] = []

    def start(takes: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-I", "-c", STORE, str(run), takes]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_it_is_said_whether_the_running_store_has_taken_a_change_over(desk, running):
    assert "does not run" in tell_the_store(desk.config)
    store = running("takes")
    assert "has taken it over" in tell_the_store(desk.config)
    store.kill()
    store.wait()
    assert "does not run" in tell_the_store(desk.config)


def test_a_running_store_that_keeps_what_it_had_is_no_success(desk, running):
    store = running("keeps")
    with pytest.raises(StoreError, match="has not taken it over"):
        tell_the_store(desk.config, patience_s=0)
    assert store.stdout.readline() == "heard\n"


def test_what_got_the_pid_of_a_store_that_was_killed_is_sent_nothing(desk, running):
    store = running("takes")
    store.kill()
    store.wait()
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as stranger:
        (AuthorityLayout(desk.root).run / "serve.pid").write_text(f"{stranger.pid}\n")
        assert "does not run" in tell_the_store(desk.config, patience_s=0)
        stranger.stdin.close()
        assert stranger.wait() == 0  # SIGHUP would have ended it


class Ending:
    """`project end` of an approved project with a view; what it has done, in order."""

    def __init__(self, desk, monkeypatch) -> None:
        self.desk = desk
        self.view = Layout(desk.root).view("nodules")
        self.view.mkdir(parents=True)
        self.done: list[str] = []
        self.stops_at: str | None = None
        desk.projects.request(WANTED, "tanaka")
        desk.projects.approve("nodules", "suzuki", "2026-1", LAST)
        monkeypatch.setattr(commands, "TAKEN_OVER_S", 0)
        monkeypatch.setattr(commands, "StoreTrail", lambda _config: desk.audit)
        monkeypatch.setattr(commands, "end_sessions", self._end_sessions)
        monkeypatch.setattr(view, "remove_view", self._remove_view)

    def _end_sessions(self, _config, project, *_) -> list[str]:
        self._step("sessions")
        assert project == "nodules"
        return []

    def _remove_view(self, config, project, whole=view.remove_view) -> int:
        self._step("view")
        return whole(config, project)

    def _step(self, name: str) -> None:
        if self.stops_at == name:
            raise KeyboardInterrupt
        self.done.append(name)

    def run(self) -> Result:
        file = str(self.desk.file)
        command = ["end", "nodules", "--by", "suzuki", "--reason", "over", "--config", file]
        return CliRunner().invoke(commands.app, command)


@pytest.fixture
def ending(desk, monkeypatch) -> Ending:
    return Ending(desk, monkeypatch)


def test_a_project_ends_also_if_the_running_store_does_not_hear_it(ending, running):
    store = running("keeps")
    done = ending.run()
    assert isinstance(done.exception, StoreError)
    assert "has not taken it over" in str(done.exception)
    assert store.stdout.readline() == "heard\n"
    assert ending.done[:2] == ["sessions", "view"]
    assert not ending.view.exists()
    assert ending.desk.active() == {"fixed"}


def test_nobody_has_a_view_or_a_session_while_the_running_store_is_waited_for(
    ending, running, monkeypatch
):
    running("keeps")
    monkeypatch.setattr(commands, "TAKEN_OVER_S", 60)
    waited: list[tuple[list[str], bool]] = []

    def sleep(_seconds: float) -> None:
        waited.append(([*ending.done], ending.view.exists()))
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.time, "sleep", sleep)
    done = ending.run()
    assert waited == [(["sessions", "view"], False)]
    assert "waiting up to 60 s" in done.output


def test_who_got_a_session_before_the_store_took_the_end_over_loses_it_too(
    ending, running, monkeypatch
):
    monkeypatch.setattr(commands, "TAKEN_OVER_S", 30)
    running("takes")
    assert ending.run().exit_code == 0
    assert ending.done == ["sessions", "view", "sessions"]


@pytest.mark.parametrize("step", ["sessions", "view"])
def test_an_end_that_was_cut_off_is_repeated(ending, step):
    ending.stops_at = step
    assert ending.run().exit_code != 0
    assert ending.view.exists()
    recorded = ending.desk.records()
    ending.stops_at = None
    done = ending.run()
    assert done.exit_code == 0, done.output
    assert "does not run" in done.output
    assert not ending.view.exists()
    assert "sessions" in ending.done
    assert ending.desk.records() == recorded
