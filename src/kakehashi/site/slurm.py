"""Slurm, through the commands that every installation has: sbatch, squeue, scancel, sinfo.

No accounting database is needed. Written for and tried with Slurm 22.05.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kakehashi.site.job import Job, JobState, QueueState, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

JOB_ID = re.compile(r"[0-9]{1,18}")
COMMAND_TIMEOUT_S = 20.0
# The wrapper hears of the time limit one minute ahead: time to leave in order.
WARNING_S = 60
DELIMITER = "KAKEHASHI"
UNKNOWN_JOB = "Invalid job id specified"

PENDING = frozenset(
    {
        "CONFIGURING",
        "PENDING",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "RESV_DEL_HOLD",
        "SPECIAL_EXIT",
    }
)
# A completing job has processes that are just being ended, so it has not ended.
RUNNING = frozenset(
    {"COMPLETING", "RESIZING", "RUNNING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
)
ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
GRES = re.compile(r"gpu(?::[A-Za-z0-9_-]+)?:(\d+)")
USABLE = frozenset({"idle", "mixed", "allocated", "completing", "reserved", "planned"})
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


def render(job: Job, software: str) -> str:
    """Write the job script of a session.

    Parameters
    ----------
    job : Job
        Checked by :func:`kakehashi.site.job.check_job`: names match their patterns and the
        document is one line of ASCII JSON.
    software : str
        The site's installation; a path without blanks or quotes.

    Returns
    -------
    str
        The script. Its here-document is quoted, so that the shell expands nothing in it, and
        a line of JSON begins with ``{`` and so can never be the delimiter.
    """
    directives = [
        "--job-name=kakehashi",
        "--output=/dev/null",
        "--error=/dev/null",
        "--chdir=/",
        "--no-requeue",
        # Everything of an environment that the agent has cleaned.
        "--export=ALL",
        "--nodes=1",
        "--ntasks=1",
        f"--partition={job.queue}",
        f"--time={job.minutes}",
        f"--cpus-per-task={job.cpus}",
        f"--mem={job.memory_mb}",
        f"--signal=B:TERM@{WARNING_S}",
    ]
    if job.gpus:
        kind = f"{job.gpu_type}:" if job.gpu_type else ""
        directives.append(f"--gres=gpu:{kind}{job.gpus}")
    lines = [
        "#!/bin/sh",
        *(f"#SBATCH {directive}" for directive in directives),
        # exec: signals of the scheduler then reach the wrapper itself.
        f"exec {software}/.venv/bin/python -I -m kakehashi.session.enter <<'{DELIMITER}'",
        job.document,
        DELIMITER,
        "",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Slurm:
    """Slurm's commands, run with a fixed environment.

    Attributes
    ----------
    software : str
        The site's installation of Kakehashi on the nodes.
    commands : str
        Folder of Slurm's commands.
    environment : mapping
        The whole environment of those commands. ``TZ=UTC`` is added, since Slurm writes times
        without a zone.
    """

    software: str
    commands: str
    environment: Mapping[str, str]

    def submit(self, job: Job) -> str:
        """Queue a job and return its id."""
        done = self._run(["sbatch", "--parsable"], render(job, self.software))
        if done.returncode != 0:
            raise RequestError("scheduler", f"sbatch refused: {_say(done.stderr)}")
        job_id = done.stdout.strip().partition(";")[0]
        if not JOB_ID.fullmatch(job_id):
            raise RequestError("scheduler", f"sbatch printed no job id: {_say(done.stdout)}")
        return job_id

    def query(self, job_id: str) -> JobState:
        """Say what Slurm knows of a job."""
        selection = f"--jobs={_id(job_id)}"
        try:
            done = self._run(
                ["squeue", "--noheader", "--states=all", selection, "--format=%i|%T|%B|%S|%r"]
            )
        except RequestError as error:
            return JobState("unknown", reason=str(error))
        if done.returncode != 0:
            if UNKNOWN_JOB in done.stderr:
                return JobState("ended", reason="no longer known to the scheduler")
            return JobState("unknown", reason=_say(done.stderr))
        return parse_state(job_id, done.stdout)

    def cancel(self, job_id: str) -> None:
        """End a job: SIGTERM to its processes, and SIGKILL after Slurm's ``KillWait``."""
        done = self._run(["scancel", _id(job_id)])
        if done.returncode != 0 and UNKNOWN_JOB not in done.stderr:
            raise RequestError("scheduler", f"scancel failed: {_say(done.stderr)}")

    def resources(self) -> tuple[QueueState, ...]:
        """Count the GPUs of each partition."""
        columns = "PartitionName:128,StateLong:64,Gres:512,GresUsed:512"
        nodes = self._run(["sinfo", "--noheader", "--Node", f"--Format={columns}"])
        if nodes.returncode != 0:
            raise RequestError("scheduler", f"sinfo failed: {_say(nodes.stderr)}")
        ends = self._run(["squeue", "--noheader", "--states=running", "--format=%P|%e"])
        return parse_resources(nodes.stdout, ends.stdout if ends.returncode == 0 else "")

    def _run(
        self, command: Sequence[str], stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        name, *arguments = command
        try:
            return subprocess.run(
                [str(Path(self.commands) / name), *arguments],
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                text=True,
                errors="replace",
                env={**self.environment, "TZ": "UTC"},
                cwd="/",
                timeout=COMMAND_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RequestError(
                "scheduler", f"{name} gave no answer within {COMMAND_TIMEOUT_S:.0f} s"
            ) from None
        except OSError as error:
            raise RequestError(
                "scheduler", f"{name} cannot be run in {self.commands} ({error.strerror})"
            ) from error


def parse_state(job_id: str, output: str) -> JobState:
    """Read squeue's line for a job; whatever is not understood is ``unknown``.

    Parameters
    ----------
    job_id : str
        The job that was asked for.
    output : str
        Lines of ``%i|%T|%B|%S|%r``, times in UTC.
    """
    lines = [line for line in output.splitlines() if line.strip()]
    fields = lines[0].strip().split("|", 4) if lines else []
    if len(lines) != 1 or len(fields) != 5 or fields[0] != job_id:
        return JobState("unknown", reason="the scheduler's answer is not understood")
    _, state, host, start, reason = fields
    if state in PENDING:
        return JobState("pending", reason=reason, starts_at=_time(start))
    if state in RUNNING:
        hosts = () if host in {"", "n/a", "(null)"} else (host,)
        return JobState("running", hosts=hosts, reason=state)
    if state in ENDED:
        return JobState("ended", reason=state if reason in {"", "None"} else f"{state} ({reason})")
    return JobState("unknown", reason=f"state {state[:40]!r} is not known")


def parse_resources(nodes: str, ends: str) -> tuple[QueueState, ...]:
    """Add up sinfo's lines, one per partition and node.

    Parameters
    ----------
    nodes : str
        Lines of partition, state, generic resources, and those in use.
    ends : str
        squeue's lines ``PARTITION|END`` of running jobs, UTC.
    """
    first_end: dict[str, str] = {}
    for line in ends.splitlines():
        name, _, text = line.strip().partition("|")
        end = _time(text)
        if end is not None:
            first_end[name] = min(end, first_end.get(name, end))
    counts: dict[str, tuple[int, int]] = {}
    for line in nodes.splitlines():
        fields = line.split()
        if len(fields) != 4:
            continue
        name, state, has, used = fields
        name = name.rstrip("*")
        total, free = counts.get(name, (0, 0))
        # A state may carry flags such as * (no answer) or ~ (powered down).
        if state in USABLE:
            gpus = _gpus(has)
            total, free = total + gpus, free + max(0, gpus - _gpus(used))
        counts[name] = (total, free)
    return tuple(
        QueueState(name, total, free, None if free or not total else first_end.get(name))
        for name, (total, free) in sorted(counts.items())
    )


def _gpus(text: str) -> int:
    # The index list of GresUsed, (IDX:0-1), holds commas and numbers that are not counts.
    return sum(int(count) for count in GRES.findall(re.sub(r"\([^)]*\)", "", text)))


def _id(job_id: str) -> str:
    if not JOB_ID.fullmatch(job_id):
        raise RequestError("malformed", "job: a Slurm job id is a number")
    return job_id


def _time(text: str) -> str | None:
    return f"{text}Z" if STAMP.fullmatch(text) else None


def _say(text: str) -> str:
    """Shorten what a command said to one printable line."""
    line = " ".join(text.split())
    return "".join(char for char in line if char.isprintable())[:300] or "(it said nothing)"
