"""The site agent, called as the hub calls it: a process with a request on standard input.

``sbatch``, ``squeue``, ``scancel`` and ``sinfo`` are small programs here that speak the exact
words of Slurm 22.05; the lab has the real ones.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")

ACCOUNT = "games"
TICKET = "t" * 43
SBATCH = """#!/bin/sh
cat >{seen}/script
env >{seen}/environment
id -un >{seen}/account
printf '%s\\n' "$@" >{seen}/arguments
{body}
"""


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        threading.Event().wait(0.02)
    return value


@dataclass
class Site:
    """A folder with a site's file, its software and its scheduler's commands."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "site.json"

    @property
    def seen(self) -> Path:
        return self.folder / "seen"

    @property
    def software(self) -> str:
        return str(self.folder / "software")

    def write(self, **changes: Any) -> None:
        self.file.write_text(
            json.dumps(
                {
                    "scheduler": "slurm",
                    "accounts": [ACCOUNT],
                    "software": self.software,
                    "queues": ["gpu"],
                    "commands": str(self.folder / "bin"),
                    **changes,
                }
            )
        )

    def command(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(SBATCH.format(seen=self.seen, body=body))
        path.chmod(0o755)

    def program(self, text: str) -> None:
        path = Path(self.software, ".venv", "bin", "python")
        path.write_text(text)
        path.chmod(0o755)

    def said(self, name: str) -> str:
        return (self.seen / name).read_text()

    def call(self, request: object, status: int = 0) -> dict[str, Any]:
        data = request if isinstance(request, bytes) else json.dumps(request).encode()
        done = subprocess.run(
            [sys.executable, "-I", "-m", "kakehashi.site.agent", "--site", str(self.file)],
            input=data,
            capture_output=True,
            timeout=60,
            check=False,
            env={"PATH": "/usr/bin:/bin", "HUB_SECRET": "must not be passed on"},
        )
        assert done.returncode == status, (done.stdout, done.stderr)
        assert not done.stderr, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


@pytest.fixture
def site() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="kk-site-"))
    folder.chmod(0o755)
    one = Site(folder)
    for part in ("bin", "seen", "software", "software/.venv", "software/.venv/bin"):
        (folder / part).mkdir()
        (folder / part).chmod(0o755)
    one.seen.chmod(0o1777)
    one.write()
    yield one
    shutil.rmtree(folder)


def submit(site: Site, **changes: Any) -> dict[str, Any]:
    return {
        "verb": "submit",
        "scheduler": "slurm",
        "account": ACCOUNT,
        "job": {
            "name": "kakehashi",
            "queue": "gpu",
            "gpus": 1,
            "gpu_type": "h100",
            "cpus": 2,
            "memory_mb": 2000,
            "minutes": 90,
            "software": site.software,
            "enter": {
                "session": "a" * 32,
                "ticket": TICKET,
                "portal_url": "https://portal.example",
                "portal_ca": None,
                "site": "flow",
                "node": {
                    "software": site.software,
                    "title": "名古屋 $(id) `id`\nKAKEHASHI\n",
                },
                "software": "0.1.0",
            },
            **changes,
        },
    }


def about(verb: str, job: str, **changes: Any) -> dict[str, Any]:
    return {"verb": verb, "scheduler": "slurm", "account": ACCOUNT, "job": job, **changes}


# -- what is asked ----------------------------------------------------------------------------


HOSTILE = [
    {"queue": "gpu\n#SBATCH --uid=0"},
    {"queue": "other"},
    {"queue": ["gpu"]},
    {"queue": "../gpu"},
    {"gpus": "1"},
    {"gpus": True},
    {"gpus": -1},
    {"gpus": 65},
    {"gpus": 1.5},
    {"gpu_type": "h100:1 --uid=0"},
    {"gpu_type": "h100\n"},
    {"gpu_type": ""},
    {"cpus": 0},
    {"memory_mb": 1},
    {"minutes": 0},
    {"minutes": 10**9},
    {"name": "x"},
    {"name": "kakehashi\n#SBATCH --uid=0"},
    {"software": "/tmp/other"},
    {"software": None},
    {"enter": {}},
    {"enter": "x"},
    {"exec_prefix": "id"},
]


@pytest.mark.parametrize("change", HOSTILE)
def test_a_job_that_breaks_a_rule_is_refused_before_anything_runs(
    site: Site, change: dict[str, Any]
) -> None:
    site.command("sbatch", "echo 1")
    request = submit(site, **change)
    answer = site.call(request, status=_status(request, site))
    assert not answer["ok"]
    assert not (site.seen / "script").exists()


def _status(request: dict[str, Any], site: Site) -> int:
    """A field of the wrong form is not understood (2); a name that is not listed is refused."""
    job = request["job"]
    listed = job["queue"] == "other" or job["software"] != site.software
    return 0 if listed else 2


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("session",), "a" * 31),
        (("session",), "A" * 32),
        (("ticket",), "short"),
        (("ticket",), TICKET + "\n"),
        (("ticket",), None),
        (("node",), "x"),
        (("more",), 1),
        (("portal_ca",), "x" * 40_000),
    ],
)
def test_a_document_that_breaks_a_rule_is_refused_and_the_ticket_is_not_repeated(
    site: Site, path: tuple[str], value: object
) -> None:
    request = submit(site)
    request["job"]["enter"][path[0]] = value
    answer = site.call(request, status=2)
    assert answer["error"] == "malformed"
    assert TICKET not in json.dumps(answer)


@pytest.mark.parametrize("software", ["/tmp/other", "", None, ["/tmp/other"]])
def test_the_wrapper_is_given_no_other_software_than_the_sites(
    site: Site, software: object
) -> None:
    site.command("sbatch", "echo 1")
    request = submit(site)
    request["job"]["enter"]["node"]["software"] = software
    answer = site.call(request)
    assert (answer["ok"], answer.get("error")) == (False, "software")
    del request["job"]["enter"]["node"]["software"]
    assert site.call(request)["error"] == "software"
    assert not (site.seen / "script").exists()


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 50_000,
        b"{" + b" " * 70_000 + b"}",
        b'{"verb": ["submit"]}',
        b'{"verb": "run", "argv": ["id"]}',
        b'{"verb": "resources"}',
        b'{"verb": "query", "scheduler": "slurm", "account": "games"}',
    ],
)
def test_what_is_no_request_is_said_to_be_none(site: Site, request_: bytes) -> None:
    assert site.call(request_, status=2)["error"] == "malformed"


@pytest.mark.parametrize(
    "account", ["root", "daemon", "games\n", "", "../games", None, 5, "games;id"]
)
def test_only_accounts_of_the_sites_file_are_used(site: Site, account: object) -> None:
    site.command("squeue", "echo '7|RUNNING|n1|N/A|None'")
    answer = site.call(
        about("query", "7", account=account), status=0 if account in {"root", "daemon"} else 2
    )
    assert not answer["ok"]
    assert not (site.seen / "account").exists()


@needs_root
def test_an_account_with_roots_rights_is_refused_even_if_the_file_lists_it(site: Site) -> None:
    site.write(accounts=["root"])
    answer = site.call(about("query", "7", account="root"))
    assert answer["error"] == "account"
    assert "root's rights" in answer["message"]


@needs_root
@pytest.mark.parametrize("mode", [0o622, 0o646, 0o666])
def test_a_file_that_others_can_write_is_not_believed(site: Site, mode: int) -> None:
    site.file.chmod(mode)
    assert site.call(about("query", "7"), status=2)["error"] == "site-file"
    site.file.chmod(0o600)
    os.chown(site.file, pwd.getpwnam(ACCOUNT).pw_uid, -1)
    assert site.call(about("query", "7"), status=2)["error"] == "site-file"


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": "pbs"},
        {"accounts": "games"},
        {"accounts": ["ga mes"]},
        {"queues": ["gpu\n"]},
        {"software": "relative"},
        {"software": "/opt/x y"},
        {"software": "/opt/$(id)"},
        {"more": 1},
    ],
)
def test_a_site_file_that_breaks_a_rule_is_refused(site: Site, changes: dict[str, Any]) -> None:
    site.write(**changes)
    answer = site.call(about("query", "7"), status=2)
    assert answer["error"] == "site-file"
    assert str(site.file) in answer["message"]


def test_another_scheduler_than_the_sites_is_refused(site: Site) -> None:
    assert site.call(about("query", "7", scheduler="none"))["error"] == "scheduler"


# -- Slurm ------------------------------------------------------------------------------------


@needs_root
def test_a_job_is_submitted_as_the_person_with_a_clean_environment(site: Site) -> None:
    site.command("sbatch", "echo '4711;cluster'")
    assert site.call(submit(site)) == {"ok": True, "job": "4711"}
    assert site.said("account").strip() == ACCOUNT
    assert site.said("arguments").split() == ["--parsable"]
    names = {line.partition("=")[0] for line in site.said("environment").splitlines()}
    assert names <= {"HOME", "LANG", "LOGNAME", "PATH", "PWD", "SHELL", "SHLVL", "TZ", "USER", "_"}
    script = site.said("script").splitlines()
    directives = {line.removeprefix("#SBATCH ") for line in script if line.startswith("#SBATCH")}
    assert {
        "--output=/dev/null",
        "--error=/dev/null",
        "--no-requeue",
        "--partition=gpu",
        "--time=90",
        "--gres=gpu:h100:1",
        "--cpus-per-task=2",
        "--mem=2000",
        "--chdir=/",
    } <= directives
    assert script[-3].startswith("exec ")
    assert script[-1] == "KAKEHASHI"


@needs_root
def test_the_shell_changes_nothing_in_the_document(site: Site) -> None:
    """The script is really run, with a program in the wrapper's place that keeps its input."""
    site.command("sbatch", "echo 1")
    site.program(f"#!/bin/sh\ncat >{site.seen}/document\nprintf '%s\\n' \"$@\" >{site.seen}/argv\n")
    request = submit(site)
    assert site.call(request)["ok"]
    subprocess.run(["sh"], input=site.said("script"), text=True, check=True)
    assert json.loads(site.said("document")) == request["job"]["enter"]
    assert site.said("argv").split() == ["-I", "-m", "kakehashi.session.enter"]
    assert TICKET not in site.said("argv")


@needs_root
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "echo 'sbatch: error: Batch job submission failed: Invalid partition' >&2; exit 1",
            "Invalid",
        ),
        ("echo 'Submitted batch job x'", "no job id"),
        ("exit 0", "no job id"),
    ],
)
def test_what_sbatch_says_comes_back(site: Site, body: str, words: str) -> None:
    site.command("sbatch", body)
    answer = site.call(submit(site))
    assert answer["error"] == "scheduler"
    assert words in answer["message"]


@needs_root
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("7|PENDING|n/a|N/A|Resources", ("pending", [], "Resources", None)),
        (
            "7|PENDING|n/a|2026-11-21T03:04:05|Priority",
            ("pending", [], "Priority", "2026-11-21T03:04:05Z"),
        ),
        (
            "7|CONFIGURING|n1|2026-11-21T03:04:05|None",
            ("pending", [], "None", "2026-11-21T03:04:05Z"),
        ),
        ("7|RUNNING|n1|2026-11-21T03:04:05|None", ("running", ["n1"], "RUNNING", None)),
        ("7|COMPLETING|n1|2026-11-21T03:04:05|None", ("running", ["n1"], "COMPLETING", None)),
        ("7|COMPLETED|n1|2026-11-21T03:04:05|None", ("ended", [], "COMPLETED", None)),
        ("7|CANCELLED|n1|N/A|None", ("ended", [], "CANCELLED", None)),
        ("7|NODE_FAIL|n1|N/A|NodeDown", ("ended", [], "NODE_FAIL (NodeDown)", None)),
        ("7|TIMEOUT|n1|N/A|TimeLimit", ("ended", [], "TIMEOUT (TimeLimit)", None)),
        ("7|PENDING|n/a|N/A|Reason|with bars", ("pending", [], "Reason|with bars", None)),
    ],
)
def test_squeues_words_are_understood(
    site: Site, line: str, expected: tuple[str, list[str], str, str | None]
) -> None:
    site.command("squeue", f"echo '{line}'")
    state, hosts, reason, starts_at = expected
    assert site.call(about("query", "7")) == {
        "ok": True,
        "state": state,
        "hosts": hosts,
        "reason": reason,
        "starts_at": starts_at,
    }
    assert "--jobs=7" in site.said("arguments")


@needs_root
@pytest.mark.parametrize(
    ("body", "state"),
    [
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "ended"),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "unknown"),
        (
            "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1",
            "unknown",
        ),
        ("echo 'squeue: error: Munge decode failed: Expired credential' >&2; exit 1", "unknown"),
        ("exit 0", "unknown"),
        ("exit 1", "unknown"),
        ("kill -9 $$", "unknown"),
        ("echo '7|BRAND_NEW|n1|N/A|None'", "unknown"),
        ("echo '8|COMPLETED|n1|N/A|None'", "unknown"),
        ("echo '7|COMPLETED|n1|N/A|None'; echo '8|RUNNING|n1|N/A|None'", "unknown"),
        ("echo 'garbage'", "unknown"),
        ("head -c 100000 /dev/urandom", "unknown"),
    ],
)
def test_only_the_schedulers_clear_word_is_an_end(site: Site, body: str, state: str) -> None:
    site.command("squeue", body)
    answer = site.call(about("query", "7"))
    assert (answer["ok"], answer["state"]) == (True, state), answer


@needs_root
def test_a_missing_command_is_not_an_end(site: Site) -> None:
    assert site.call(about("query", "7"))["state"] == "unknown"


@pytest.mark.parametrize(
    "job", ["", "7 --user=root", "7\n", "-7", "7,8", "*", "\uff17", "7_1", 7, None]
)
def test_a_job_id_is_a_number(site: Site, job: Any) -> None:
    site.command("scancel", "true")
    for verb in ("query", "cancel"):
        assert site.call(about(verb, job), status=2)["error"] == "malformed"
    assert not (site.seen / "arguments").exists()


@needs_root
def test_cancelling_a_job_that_has_gone_is_no_error(site: Site) -> None:
    site.command("scancel", "true")
    assert site.call(about("cancel", "7")) == {"ok": True}
    assert site.said("arguments").split() == ["7"]
    site.command(
        "scancel",
        "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2; exit 1",
    )
    assert site.call(about("cancel", "7")) == {"ok": True}
    site.command(
        "scancel",
        "echo 'scancel: error: Kill job error on job id 7: Access/permission denied' >&2; exit 1",
    )
    assert "Access/permission denied" in site.call(about("cancel", "7"))["message"]


@needs_root
def test_gpus_are_counted_on_nodes_that_take_jobs(site: Site) -> None:
    rows = [
        ("gpu", "mixed", "gpu:h100:2", "gpu:h100:1(IDX:0)"),
        ("gpu", "idle", "gpu:h100:2", "gpu:h100:0(IDX:N/A)"),
        ("gpu", "drained", "gpu:h100:2", "gpu:h100:0(IDX:N/A)"),
        ("gpu", "down*", "gpu:h100:2", "gpu:h100:0(IDX:N/A)"),
        ("full", "allocated", "gpu:a100:4(S:0-1),lustre:1", "gpu:a100:4(IDX:0-3),lustre:0"),
        ("cpu*", "idle", "(null)", "(null)"),
    ]
    site.command("sinfo", "cat <<'X'\n" + "\n".join(" ".join(row) for row in rows) + "\nX")
    site.command(
        "squeue",
        "printf 'full|2026-11-21T09:00:00\\nfull|2026-11-21T08:00:00\\ngpu|2026-11-21T07:00:00\\n'",
    )
    assert site.call({"verb": "resources", "scheduler": "slurm"}) == {
        "ok": True,
        "queues": [
            {"name": "cpu", "gpus": 0, "free_gpus": 0, "starts_at": None},
            {"name": "full", "gpus": 4, "free_gpus": 0, "starts_at": "2026-11-21T08:00:00Z"},
            {"name": "gpu", "gpus": 4, "free_gpus": 3, "starts_at": None},
        ],
    }
    assert site.said("account").strip() == "nobody"


# -- without a scheduler ----------------------------------------------------------------------


PATIENT = """#!/usr/bin/python3 -I
import os, signal, sys, json, threading
seen = {seen!r}
document = sys.stdin.read()
{prelude}
def write(name, text):
    open(seen + "/" + name + ".part", "w").write(text)
    os.rename(seen + "/" + name + ".part", seen + "/" + name)
write("world", json.dumps({{
    "document": document, "argv": sys.argv[1:], "environment": dict(os.environ),
    "uid": os.getuid(), "session": os.getsid(0), "parent": os.getppid(),
    "descriptors": sorted(os.listdir("/proc/self/fd")), "cwd": os.getcwd(),
    "out": os.readlink("/proc/self/fd/1"), "err": os.readlink("/proc/self/fd/2"),
}}))
while True:
    signal.pause()
"""


@pytest.fixture
def plain(site: Site) -> Iterator[Site]:
    site.write(scheduler="none")
    site.program(PATIENT.format(seen=str(site.seen), prelude=""))
    yield site
    for path in site.seen.glob("pid-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.name.removeprefix("pid-")), signal.SIGKILL)


def start(site: Site) -> tuple[str, int]:
    request = submit(site, gpus=0, gpu_type=None)
    request["scheduler"] = "none"
    answer = site.call(request)
    assert answer["ok"], answer
    pid = int(answer["job"].partition("-")[0])
    (site.seen / f"pid-{pid}").touch()
    until((site.seen / "world").exists)
    return answer["job"], pid


def ask(site: Site, verb: str, job: str) -> dict[str, Any]:
    return site.call(about(verb, job, scheduler="none"))


@needs_root
def test_a_wrapper_is_a_detached_process_of_the_person(plain: Site) -> None:
    job, pid = start(plain)
    world = json.loads(plain.said("world"))
    expected = copy.deepcopy(submit(plain)["job"]["enter"])
    assert json.loads(world["document"]) == expected
    assert world["uid"] == pwd.getpwnam(ACCOUNT).pw_uid
    assert world["argv"] == ["-I", "-m", "kakehashi.session.enter"]
    assert world["environment"]["KAKEHASHI_JOB"] == job
    assert "HUB_SECRET" not in world["environment"]
    assert TICKET not in json.dumps(world["environment"])
    assert (world["out"], world["err"]) == ("/dev/null", "/dev/null")
    assert set(world["descriptors"]) <= {"0", "1", "2", "3"}, "3 is the listing itself"
    assert world["cwd"] == "/"
    assert world["session"] != os.getsid(0)
    assert ask(plain, "query", job) == {
        "ok": True,
        "state": "running",
        "hosts": ["127.0.0.1"],
        "reason": "RUNNING",
        "starts_at": None,
    }
    assert ask(plain, "cancel", job) == {"ok": True}
    assert ask(plain, "query", job)["state"] == "ended"
    assert not Path(f"/proc/{pid}").exists() or _zombie(pid)


def _zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


@needs_root
def test_a_wrapper_that_does_not_leave_is_killed_after_the_grace(plain: Site) -> None:
    plain.program(
        PATIENT.format(
            seen=str(plain.seen), prelude="signal.signal(signal.SIGTERM, lambda *_: None)"
        )
    )
    job, _ = start(plain)
    began = time.monotonic()
    assert ask(plain, "cancel", job) == {"ok": True}
    assert 9 < time.monotonic() - began < 19
    assert ask(plain, "query", job)["state"] == "ended"


@needs_root
def test_another_process_with_the_same_number_is_left_alone(plain: Site) -> None:
    job, pid = start(plain)
    stranger = f"{pid}-{int(job.partition('-')[2]) + 1}"
    assert ask(plain, "query", stranger)["state"] == "ended"
    assert ask(plain, "cancel", stranger) == {"ok": True}
    assert ask(plain, "query", job)["state"] == "running"
    ask(plain, "cancel", job)


@needs_root
def test_a_process_of_another_account_cannot_be_ended(plain: Site) -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        fields = Path(f"/proc/{other.pid}/stat").read_text().rsplit(")", 1)[1].split()
        answer = ask(plain, "cancel", f"{other.pid}-{fields[19]}")
        assert answer["error"] == "scheduler"
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("job", ["1", "0-1", "-1-1", "1-", "1-1\n", "1-1;id", "../1-1"])
def test_a_process_id_has_one_form(site: Site, job: str) -> None:
    site.write(scheduler="none")
    answer = site.call(about("cancel", job, scheduler="none"), status=2)
    assert answer["error"] == "malformed"


@needs_root
def test_a_missing_wrapper_is_said(plain: Site) -> None:
    Path(plain.software, ".venv/bin/python").unlink()
    request = submit(plain)
    request["scheduler"] = "none"
    assert "missing or not executable" in plain.call(request)["message"]


def test_the_agent_needs_the_standard_library_only() -> None:
    program = (
        "import sys; before = set(sys.modules); import kakehashi.site.agent\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(names - set(sys.stdlib_module_names) - {'kakehashi'}))"
    )
    out = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "[]"
