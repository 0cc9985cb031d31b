"""What a compute node must have before a session may start on it."""

from __future__ import annotations

import os
import platform
import pwd
import re
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kakehashi.errors import KakehashiError
from kakehashi.session import channels, keys, landlock, libraries, syscalls, warden
from kakehashi.session.plan import MEMORY, Node, Plan, check_shared_path, private_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KERNEL = (5, 12)
# RHEL 8's; seccomp filters and the orphans' adoption are all that is asked for.
KERNEL_WITHOUT_NAMESPACES = (4, 18)
SSHFS = (3, 7)
_WEAKER = 'accept weaker walls by walls = "account" in the site\'s configuration'
_LIBRARY_FOLDERS = ("/lib64", "/usr/lib64", "/usr/lib/*-linux-gnu", "/usr/lib", "/lib")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes
    ----------
    check : str
        Its name.
    ok : bool
        Whether a session may start as far as this goes.
    message : str
        What was seen; where it is not well, what is missing and what to do.
    """

    check: str
    ok: bool
    message: str

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return {"check": self.check, "ok": self.ok, "message": self.message}


def core_pattern() -> str:
    """Return the node's ``core_pattern``."""
    return _read("/proc/sys/kernel/core_pattern") or "?"


def swap_areas() -> tuple[list[str], list[str]]:
    """Return the swap areas that would write memory to a disk in clear, and all areas."""
    lines = (_read("/proc/swaps") or "").splitlines()[1:]
    areas = [line.split()[0].replace("\\040", " ") for line in lines if line.split()]
    return [area for area in areas if not _is_safe_swap(area)], areas


def _is_safe_swap(area: str) -> bool:
    device = Path(area).resolve()
    if device.name.startswith("zram"):
        # zram is memory, unless it is told to write idle pages back to a disk.
        return _read(f"/sys/block/{device.name}/backing_dev") in {None, "none"}
    try:
        status = device.stat()
    except OSError:
        return False
    is_device = device.is_block_device()
    number = status.st_rdev if is_device else status.st_dev
    mapped = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/dm/uuid"
    return (_read(mapped) or "").startswith("CRYPT-")


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def quick(node: Node) -> list[Check]:
    """Look at what the node has, without trying it.

    Parameters
    ----------
    node : Node
        The site's rules for its nodes.
    """
    looks: dict[str, Callable[[Node], str]] = {
        "account": _account,
        "processor": _processor,
        "kernel": _kernel,
        "user namespaces": _user_namespaces,
        "fuse": _fuse,
        "swap": _swap,
        "core dumps": _core,
        "seccomp": _seccomp,
        "ssh": _ssh,
        "sshfs": _sshfs,
        "view": _view,
        "libcrypto": _crypto,
        "nodump": _nodump,
        "software": _software,
    }
    if node.walls == "account":
        for name in ("user namespaces", "fuse", "sshfs", "view"):
            del looks[name]
        looks |= {"landlock": _landlock, "memory": _memory, "shared memory": _shared_memory}
    return [_look(name, look, node) for name, look in looks.items()]


class _MissingError(Exception):
    """A check's answer is no; the text says what is missing and what to do."""


def _look(name: str, look: Callable[[Node], str], node: Node) -> Check:
    try:
        return Check(name, ok=True, message=look(node))
    except (_MissingError, OSError, KakehashiError) as error:
        return Check(name, ok=False, message=str(error))


def _account(_: Node) -> str:
    uid = os.getuid()
    if uid == 0 or os.geteuid() != uid:
        raise _MissingError("sessions never run as root; start it as the person's own account")
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        raise _MissingError(f"uid {uid} has no account on this node; ssh needs one") from None


def _processor(_: Node) -> str:
    syscalls.number("mount")
    return platform.machine()


def _kernel(node: Node) -> str:
    release = platform.release()
    found = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if node.walls == "account":
        least, purpose = KERNEL_WITHOUT_NAMESPACES, "system call filters"
    else:
        least, purpose = KERNEL, "read-only binds"
    if found < least:
        raise _MissingError(
            f"kernel {release}: {least[0]}.{least[1]} or newer is needed for {purpose}"
        )
    return release


def _landlock(node: Node) -> str:
    version = landlock.abi()
    gaps = ", ".join(landlock.missing(version))
    if version < landlock.NETWORK_ABI and not node.allow_no_landlock:
        raise _MissingError(
            f"the kernel cannot confine programs of an account in: {gaps} (Landlock "
            f"{landlock.NETWORK_ABI}, Linux 6.7, or newer, switched on by lsm=); accept that by "
            "allow_no_landlock in the site's configuration, or use a node with user namespaces"
        )
    return f"version {version}" + (f"; not confined here: {gaps}" if gaps else "")


def _memory(_: Node) -> str:
    lines = (_read("/proc/self/mountinfo") or "").splitlines()
    kinds = [line.partition(" - ") for line in lines if line.split()[4] == MEMORY]
    if not kinds or kinds[-1][2].split()[0] != "tmpfs":
        raise _MissingError(f"{MEMORY} is not a memory file system (tmpfs); mount one there")
    if "noexec" in kinds[-1][0].split()[5].split(","):
        raise _MissingError(f"{MEMORY} is mounted noexec, and ssh is run sealed from there")
    if not os.access(MEMORY, os.W_OK | os.X_OK):
        raise _MissingError(f"{MEMORY} cannot be written by this account; it must have mode 1777")
    return f"{MEMORY} is memory; not limited but by the job's own memory"


def _shared_memory(node: Node) -> str:
    return str(_library(node, libraries.SHM))


def _user_namespaces(_: Node) -> str:
    for path, bad, cure in (
        ("/proc/sys/user/max_user_namespaces", "0", "user.max_user_namespaces=15000"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
            (
                "kernel.apparmor_restrict_unprivileged_userns=0 (or an AppArmor profile for the "
                "installed Python that allows userns)"
            ),
        ),
    ):
        if _read(path) == bad:
            raise _MissingError(
                f"unprivileged user namespaces are off; set sysctl {cure}, or {_WEAKER}"
            )
    return "allowed"


def _fuse(_: Node) -> str:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise _MissingError(
            f"/dev/fuse is missing; load the kernel module fuse, or {_WEAKER}"
        ) from None
    except OSError as error:
        raise _MissingError(
            f"/dev/fuse cannot be opened ({error.strerror}); it must have mode 0666; or {_WEAKER}"
        ) from None
    return "/dev/fuse opens"


def _swap(node: Node) -> str:
    plain, areas = swap_areas()
    if plain and not node.allow_unencrypted_swap:
        raise _MissingError(
            f"memory may be written in clear to {', '.join(plain)}; switch swap off, encrypt it "
            "(dm-crypt), or accept it by allow_unencrypted_swap in the site's configuration"
        )
    if plain:
        return f"not encrypted, allowed by the site: {', '.join(plain)}"
    return f"encrypted or in memory: {', '.join(areas)}" if areas else "none"


def _core(_: Node) -> str:
    pattern = core_pattern()
    if pattern.startswith("@"):
        raise _MissingError(
            f"kernel.core_pattern is {pattern!r}, a socket that no limit keeps dumps from; set a "
            "file name or a pipe"
        )
    return f"pattern {pattern!r}; off in the session by limit and filter"


def _seccomp(_: Node) -> str:
    actions = (_read("/proc/sys/kernel/seccomp/actions_avail") or "").split()
    if not {"errno", "kill_process"} <= set(actions):
        raise _MissingError("the kernel was built without seccomp filters")
    return "filters available"


def _ssh(_: Node) -> str:
    return str(_program("ssh", "openssh-client"))


def _program(name: str, package: str) -> Path:
    program = channels.find_program(name)
    if program is None:
        raise _MissingError(f"{name} is not in {channels.PROGRAM_PATH}; install {package}")
    if not channels.is_native(program):
        raise _MissingError(
            f"{program} is a script; the session needs the program itself, to run it unreadable"
        )
    return program


def _sshfs(_: Node) -> str:
    program = _program("sshfs", "sshfs")
    done = subprocess.run(
        [str(program), "--version"], capture_output=True, text=True, timeout=10, check=False
    )
    match = re.search(r"SSHFS version (\d+)\.(\d+)", done.stdout)
    if match is None or (int(match[1]), int(match[2])) < SSHFS:
        raise _MissingError(
            f"{program}: version {SSHFS[0]}.{SSHFS[1]} or newer is needed, it says "
            f"{done.stdout.strip().splitlines()[:1]}"
        )
    return match[0]


def has_view(node: Node) -> bool:
    """Tell whether the node can run the verified view: Python binding and library are there."""
    return _has_module(node, "mfusepy") and any(
        True for folder in _LIBRARY_FOLDERS for _ in _glob(folder, "libfuse3.so.*")
    )


def _has_module(node: Node, name: str) -> bool:
    own = [*_glob(f"{node.software}/.venv/lib/python3*", "site-packages")]
    folders = own or [Path(folder) for folder in sys.path]
    # A .pth file may add a folder; each line of it is one.
    for folder in [*folders]:
        for link in folder.glob("*.pth"):
            lines = link.read_text(encoding="utf-8", errors="replace").splitlines()
            folders += [Path(line) for line in lines if line.startswith("/")]
    return any((folder / f"{name}.py").exists() or (folder / name).exists() for folder in folders)


def _glob(folder: str, pattern: str) -> Iterator[Path]:
    return Path("/").glob(f"{folder.lstrip('/')}/{pattern}")


def _view(node: Node) -> str:
    if has_view(node):
        return "verified view"
    if node.allow_sshfs_view:
        return "by sshfs, unverified, allowed by the site"
    raise _MissingError(
        "the verified view cannot run: it needs libfuse3.so and the Python package mfusepy in "
        f"{node.software}/.venv; install them, or accept sshfs by allow_sshfs_view"
    )


def _crypto(_: Node) -> str:
    key = keys.SigningKey()
    key.sign(b"check")
    key.wipe()
    return "makes and uses Ed25519 keys"


def _nodump(node: Node) -> str:
    return str(_library(node, libraries.NODUMP))


def _library(node: Node, name: str) -> Path:
    library = libraries.find(node.software, name)
    if library is None:
        raise _MissingError(
            f"{name} is not built; run: python -m kakehashi.session.build_libraries "
            f"{node.software}/libexec"
        )
    if {" ", ":"} & set(str(library)):
        raise _MissingError(f"{library}: the loader takes no path with a blank or a colon in it")
    return library


def _software(node: Node) -> str:
    for path in (node.software, *node.read_only):
        if not os.access(path, os.R_OK):
            raise _MissingError(f"{path} is not there, or not readable for this account")
        if _is_way_out(path):
            raise _MissingError(_way_out(path))
    return node.software


def _is_way_out(path: str) -> bool:
    """Tell whether this account can make a pipe or a socket there.

    The payload reaches both through a read-only mount, and out of its network: whoever listens
    outside gets what it writes.
    """
    return os.access(path, os.W_OK)


def _way_out(path: str) -> str:
    return (
        f"{path} is shown to the payload and can be written by this account, which could leave a "
        "pipe or a socket there to carry data out; let it belong to another account, or show a "
        "folder that does"
    )


def _sharing(node: Node) -> str:
    """Go through all that is shown to the payload, for which a session's start has no time."""
    seen = 0
    for path in (node.software, *node.read_only):
        for folder, _, _ in os.walk(path):
            seen += 1
            if _is_way_out(folder):
                raise _MissingError(_way_out(folder))
            with os.scandir(folder) as entries:
                for entry in entries:
                    known = entry.is_dir(follow_symlinks=False) or entry.is_file(
                        follow_symlinks=False
                    )
                    if not known and not entry.is_symlink() and _is_way_out(entry.path):
                        raise _MissingError(
                            f"{entry.path} is a pipe, a socket or a device, and shown to the "
                            "payload, which could carry data out by it; remove it"
                        )
    return f"{seen} folders, none of which this account can write"


def plan_for(node: Node, *, stand_ins: bool, session: str, job: str = "") -> Plan:
    """Return the payload's world for a node's rules and this process's account.

    Parameters
    ----------
    node : Node
    stand_ins : bool
        There is no store.
    session, job : str
        The session's identifier, and the scheduler's for its job.
    """
    # The wrapper's own code must be there for the probe, wherever it lies.
    wanted = {*node.read_only, str(Path(__file__).resolve().parents[2]), sys.prefix}
    extra = tuple(
        path
        for path in sorted(wanted)
        if not any(_within(path, top) for top in ("/usr", node.software, *(wanted - {path})))
    )
    for path in extra:
        check_shared_path(path)
    return Plan(
        uid=os.getuid(),
        gid=os.getgid(),
        user=pwd.getpwuid(os.getuid()).pw_name,
        software=node.software,
        read_only=extra,
        devices=node.devices,
        scratch_mb=node.scratch_mb,
        stand_ins=stand_ins,
        folder=private_folder(session) if node.walls == "account" else None,
        job=job,
    )


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def facts_for(plan: Plan) -> dict[str, Any]:
    """Return what the probe has to know of a plan to judge what it finds."""
    return {
        "devices": list(plan.devices),
        "scratch_mb": plan.scratch_mb,
        "uid": plan.uid,
        "read_only": [plan.software, *plan.read_only],
        "landlock": landlock.abi(),
    }


def from_probe(results: list[dict[str, Any]]) -> list[Check]:
    """Return the probe's answers as checks."""
    return [Check(str(one["check"]), bool(one["ok"]), str(one["message"])) for one in results]


def try_world(plan: Plan) -> list[Check]:
    """Build a payload's world without a session, probe it from inside, and take it down.

    Parameters
    ----------
    plan : Plan
        With stand-ins, since there is no store.
    """
    handle = warden.start()
    try:
        handle.build(plan)
        return from_probe(handle.probe(facts_for(plan)))
    except KakehashiError as error:
        return [Check("payload", ok=False, message=str(error))]
    finally:
        handle.control.close()
        end(handle.pid)


def end(pid: int, patience_s: float = 5.0) -> None:
    """Wait for a child that has been told to go, and kill it where it does not."""
    deadline = time.monotonic() + patience_s
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        time.sleep(0.002)


def node_checks(node: Node) -> list[Check]:
    """Run every check: what the node has, then the probe inside a real payload's world."""
    checks = [*quick(node), _look("shown folders", _sharing, node)]
    if all(check.ok for check in checks):
        # A name of its own, so that a session that starts meanwhile is not in the way.
        checks += try_world(plan_for(node, stand_ins=True, session=secrets.token_hex(16)))
    return checks


def without(plan: Plan, protection: str) -> Plan:
    """Return a plan that leaves one protection out, to see its check turn red."""
    return replace(plan, without=plan.without | {protection})
