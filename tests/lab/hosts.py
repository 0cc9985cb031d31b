"""Hosts on one machine: namespaces with an own root, network, processes and accounts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
}


class LabError(Exception):
    """The lab cannot be brought up; the message says which part and why."""


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition holds, or say what did not happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"after {seconds:g} s still waiting for: {what}")
        time.sleep(0.02)  # the pause of a poll with a deadline


@contextlib.contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Let this process, and those it starts, heed SIGINT, even if it was started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(argv: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the machine itself; a failure carries what it printed."""
    done = subprocess.run(argv, text=True, capture_output=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise LabError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Host:
    """A running host.

    ``pid`` is its first process as the machine sees it: killing that is the host's death.
    """

    name: str
    pid: int
    base: Path
    logs: Path
    own_network: bool = True

    @property
    def alive(self) -> bool:
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False
        return state != "Z"

    def prefix(self, user: str | None = None) -> list[str]:
        """Return the argument list that makes a command run on this host."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--ipc", "--pid"]
        if self.own_network:
            enter.append("--net")
        if user is not None:
            enter += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        return enter

    def popen(
        self,
        argv: Sequence[str],
        *,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        **options: object,
    ) -> subprocess.Popen[bytes]:
        """Start a command on this host."""
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            [*self.prefix(user), *argv], env={**ENVIRONMENT, **(env or {})}, cwd="/", **options
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        check: bool = True,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end."""
        done = subprocess.run(
            [*self.prefix(user), *argv],
            env={**ENVIRONMENT, **(env or {})},
            cwd="/",
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            text=True,
            capture_output=True,
            check=False,
            timeout=timeout,
        )
        if check and done.returncode:
            raise LabError(
                f"{self.name}: {' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def daemon(
        self,
        service: str,
        argv: Sequence[str],
        *,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a long-lived command on this host, with a log file of its own."""
        with self.log(service).open("ab") as log:
            return self.popen(
                argv,
                user=user,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self, service: str) -> Path:
        """Return the log file of a service of this host."""
        return self.logs / f"{self.name}-{service}.log"

    def path(self, inside: str | Path) -> Path:
        """Return a path of this host's root as the machine reaches it."""
        return Path(f"/proc/{self.pid}/root") / str(inside).lstrip("/")

    def write(
        self, inside: str, text: str, *, mode: int = 0o644, owner: tuple[int, int] | None = None
    ) -> None:
        """Write a file on this host."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, mode)
            if owner is not None:
                os.fchown(descriptor, *owner)
            file.write(text)

    def kill(self) -> None:
        """End the host at once, as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        wait_for(f"death of host {self.name}", lambda: not self.alive)


@dataclass(frozen=True)
class HostSpec:
    """What a host is made of."""

    name: str
    hostname: str
    own_network: bool = True
    binds: tuple[tuple[str, str, bool], ...] = ()
    devices: tuple[str, ...] = ()
    fuse: bool = True
    files: Mapping[str, str] = field(default_factory=dict)


def start_host(spec: HostSpec, run_dir: Path) -> Host:
    """Start a host.

    Parameters
    ----------
    spec : HostSpec
    run_dir : Path
        A tmpfs that holds the hosts' upper layers and logs.
    """
    base = run_dir / "hosts" / spec.name
    logs = run_dir / "logs"
    for folder in (base, logs):
        folder.mkdir(parents=True, exist_ok=True)
    argv = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
    if spec.own_network:
        argv.append("--net")
    argv += ["/usr/bin/python3", "-I", str(Path(__file__).with_name("host_init.py"))]
    with (logs / f"{spec.name}-init.log").open("ab") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    document = {
        "base": str(base),
        "hostname": spec.hostname,
        "binds": spec.binds,
        "devices": spec.devices,
        "fuse": spec.fuse,
        "files": dict(spec.files),
    }
    process.stdin.write(json.dumps(document).encode())
    process.stdin.close()
    if process.stdout.readline() != b"ready\n":
        process.kill()
        text = (logs / f"{spec.name}-init.log").read_text()[-2000:]
        raise LabError(f"host {spec.name} did not start:\n{text}")
    process.stdout.close()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return Host(spec.name, int(children[0]), base, logs, spec.own_network)


def add_link(host: Host, device: str, address: str, bridge_host: Host, bridge: str) -> None:
    """Join a host to a bridge that lives on another host."""
    port = f"p-{host.name}-{device}"[:15]
    run(
        ["ip", "link", "add", device, "netns", str(host.pid), "type", "veth",
         "peer", "name", port, "netns", str(bridge_host.pid)]
    )  # fmt: skip
    bridge_host.run(["ip", "link", "set", port, "master", bridge, "up"])
    host.run(["ip", "addr", "add", address, "dev", device])
    host.run(["ip", "link", "set", device, "up"])


def mount_run_dir(run_dir: Path) -> None:
    """Make the folder of a lab a tmpfs of its own."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not os.path.ismount(run_dir):
        run(["mount", "-t", "tmpfs", "-o", "mode=755,size=75%", "tmpfs", str(run_dir)])


def unmount_run_dir(run_dir: Path) -> None:
    """Take the folder of a lab away, with everything in it."""
    if os.path.ismount(run_dir):
        run(["umount", "--lazy", str(run_dir)])
    with contextlib.suppress(FileNotFoundError):
        run_dir.rmdir()


def save(run_dir: Path, hosts: Iterable[Host], facts: Mapping[str, object]) -> None:
    """Write down which hosts run, for later calls."""
    document = {
        "hosts": [
            {"name": host.name, "pid": host.pid, "own_network": host.own_network} for host in hosts
        ],
        "facts": dict(facts),
    }
    part = run_dir / "state.json.part"
    part.write_text(json.dumps(document, indent=2))
    part.rename(run_dir / "state.json")


def load(run_dir: Path) -> tuple[dict[str, Host], dict[str, object]] | None:
    """Read what :func:`save` wrote; None where nothing runs."""
    try:
        document = json.loads((run_dir / "state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    hosts = {
        item["name"]: Host(
            item["name"],
            item["pid"],
            run_dir / "hosts" / item["name"],
            run_dir / "logs",
            item["own_network"],
        )
        for item in document["hosts"]
    }
    return hosts, document["facts"]


def running(run_dir: Path) -> tuple[dict[str, Host], dict[str, object]] | None:
    """Return the hosts and facts of what is wholly up, or None."""
    found = load(run_dir)
    if found is None:
        return None
    hosts, facts = found
    if not facts.get("complete") or not all(host.alive for host in hosts.values()):
        return None
    return found


def stop(run_dir: Path) -> None:
    """Kill every host; nothing of them stays running or mounted."""
    found = load(run_dir)
    if found is not None:
        for host in found[0].values():
            if host.alive:
                host.kill()
    unmount_run_dir(run_dir)


def need_root() -> None:
    """Refuse politely where the lab cannot work."""
    if os.geteuid() != 0:
        sys.exit("the lab and the demo make namespaces and accounts: run this as root")
