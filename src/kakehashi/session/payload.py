"""The payload's world: its root, its environment and its limits.

With namespaces everything that is not named here is absent; without them, out of reach.
"""

from __future__ import annotations

import glob
import os
import re
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from kakehashi.session import landlock, libraries, seccomp, syscalls
from kakehashi.session.plan import HOME, HOSTNAME, RUN, STORE, WORK, Places, Plan

if TYPE_CHECKING:
    from collections.abc import Mapping

# One byte, and not none: a handler that core_pattern pipes to is run whatever the limit is,
# except for the value 1, which the kernel keeps for "no dump"; and no core file fits in it.
CORE_LIMIT = 1

_TOP = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = (
    "OpenCL",
    "alternatives",
    "bash.bashrc",
    "ca-certificates.conf",
    "crypto-policies",
    "debian_version",
    "fonts",
    "glvnd",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "locale.conf",
    "localtime",
    "magic",
    "mime.types",
    "os-release",
    "pki/ca-trust",
    "pki/tls/certs",
    "pki/tls/cert.pem",
    "profile",
    "protocols",
    "redhat-release",
    "services",
    "shells",
    "ssl/cert.pem",
    "ssl/certs",
    "ssl/openssl.cnf",
    "terminfo",
    "timezone",
    "vulkan",
)
# Made for the payload where it has a root of its own.
_ETC_WITHOUT_NAMESPACES = (
    "group",
    "host.conf",
    "hostname",
    "hosts",
    "nsswitch.conf",
    "passwd",
    "resolv.conf",
)
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# A mask is an empty folder or the null device, laid over what would tell of the node or
# act on it; /proc/sys stays readable, since programs ask it for limits.
_PROC_READ_ONLY = ("bus", "driver", "fs", "irq", "sys", "sysrq-trigger", "tty")
_PROC_MASKED = (
    "acpi",
    "asound",
    "kcore",
    "key-users",
    "keys",
    "kmsg",
    "kpagecgroup",
    "kpagecount",
    "kpageflags",
    "latency_stats",
    "sched_debug",
    "schedstat",
    "scsi",
    "timer_list",
    "vmallocinfo",
)
_SYS = ("devices/system/cpu", "devices/system/node")
_SHARED = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID
_SEALED = _SHARED | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGXCPU, signal.SIGHUP, signal.SIGINT)


def ignore_ending_signals() -> None:
    """Leave the signals that a scheduler sends to every process of a job to the keeper."""
    for kind in ENDING_SIGNALS:
        signal.signal(kind, signal.SIG_IGN)


def environment(plan: Plan, extra: Mapping[str, str]) -> dict[str, str]:
    """Return the payload's whole environment.

    Parameters
    ----------
    plan : Plan
    extra : mapping
        What the hub gives its server; the wrapper's own names win over it.
    """
    places = Places.of(plan)
    home, cache = places.home, f"{places.home}/.cache"
    own = {
        "HOME": home,
        "IPYTHONDIR": f"{home}/.ipython",
        "JUPYTER_CONFIG_DIR": f"{home}/.jupyter",
        "JUPYTER_DATA_DIR": f"{home}/.local/share/jupyter",
        "JUPYTER_RUNTIME_DIR": f"{places.runtime}/jupyter",
        "LANG": "C.UTF-8",
        "LOGNAME": plan.user,
        "MPLCONFIGDIR": f"{home}/.config/matplotlib",
        "NUMBA_CACHE_DIR": f"{cache}/numba",
        "PATH": f"{plan.software}/.venv/bin:/usr/local/bin:/usr/bin:/bin",
        "PIP_CACHE_DIR": f"{cache}/pip",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SHELL": "/bin/sh",
        "TMPDIR": places.temporary,
        "TORCH_HOME": f"{cache}/torch",
        "USER": plan.user,
        "XDG_CACHE_HOME": cache,
        "XDG_CONFIG_HOME": f"{home}/.config",
        "XDG_DATA_HOME": f"{home}/.local/share",
        "XDG_RUNTIME_DIR": places.runtime,
        "XDG_STATE_HOME": f"{home}/.local/state",
        "npm_config_cache": f"{cache}/npm",
    }
    library = libraries.find(plan.software, libraries.SHM)
    if places.shared is not None and library is not None:
        own |= {"LD_PRELOAD": str(library), "KAKEHASHI_SHM": places.shared}
    if plan.folder is not None:
        own["KAKEHASHI_SESSION"] = f"{places.run}/session.json"
    given = {name: value for name, value in extra.items() if _NAME.fullmatch(name)}
    passed = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ}
    return given | passed | own


class World:
    """Builds the payload's root below a folder that is already private to the warden.

    Parameters
    ----------
    plan : Plan
    base : str
        The warden's folder, with ``root``, ``scratch``, ``run``, ``points/store`` and
        ``points/work`` in it.
    """

    def __init__(self, plan: Plan, base: str) -> None:
        self._plan = plan
        self._base = base
        self._root = f"{base}/root"
        self._read_only = "read-only" not in plan.without

    def build(self) -> None:
        """Assemble the root and enter it.

        Raises
        ------
        OSError
            The kernel refused a step, or a path of the allow list is not there.
        """
        if "network" not in self._plan.without:
            syscalls.raise_loopback()
        syscalls.mount(
            "tmpfs",
            self._root,
            "tmpfs",
            syscalls.MS_NOSUID | syscalls.MS_NODEV,
            "mode=0755,size=16m",
        )
        self._programs()
        self._settings()
        self._scratch()
        self._devices()
        self._proc()
        self._sys()
        for path in sorted({self._plan.software, *self._plan.read_only}):
            if not self._is_there(path):
                self._bind(path, self._root + path)
        self._bind(f"{self._base}/run", self._root + RUN, _SEALED)
        for source, place in (("store", STORE), ("work", WORK)):
            # Not looked at: nobody serves these mounts yet, and a look would wait for it.
            Path(self._root + place).mkdir()
            self._attach(f"{self._base}/points/{source}", self._root + place)
        Path(self._root, "mnt").mkdir()
        if self._read_only:
            syscalls.mount_attributes(self._root, _SHARED, recursive=False)
        syscalls.mount_attributes(self._root, 0, propagation=syscalls.MS_PRIVATE)
        syscalls.swap_root(self._root)
        syscalls.set_hostname(HOSTNAME)

    def _is_there(self, path: str) -> bool:
        """Tell whether a path of the node shows already through a folder bound before."""
        return any(path.startswith(f"/{top}/") for top in ("usr", *_TOP))

    def _bind(self, source: str, target: str, attributes: int = _SHARED) -> None:
        self._link(source, target)
        if self._read_only:
            syscalls.mount_attributes(target, attributes)

    def _link(self, source: str, target: str) -> None:
        place = Path(target)
        if Path(source).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        self._attach(source, target)

    def _attach(self, source: str, target: str) -> None:
        syscalls.mount(source, target, None, syscalls.MS_BIND | syscalls.MS_REC)

    def _programs(self) -> None:
        self._bind("/usr", f"{self._root}/usr")
        for name in _TOP:
            here = Path("/", name)
            if here.is_symlink():
                Path(self._root, name).symlink_to(here.readlink())
            elif here.is_dir():
                self._bind(str(here), f"{self._root}/{name}")

    def _settings(self) -> None:
        plan = self._plan
        etc = Path(self._root, "etc")
        etc.mkdir()
        texts = {
            "passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\n"
            f"{plan.user}:x:{plan.uid}:{plan.gid}::{HOME}:/bin/sh\n"
            "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
            "group": f"root:x:0:\n{plan.user}:x:{plan.gid}:\nnogroup:x:65534:\n",
            "hosts": f"127.0.0.1 localhost {HOSTNAME}\n::1 localhost\n",
            "hostname": f"{HOSTNAME}\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\nservices: files\n",
            "resolv.conf": "",
        }
        for name, text in texts.items():
            (etc / name).write_text(text, encoding="utf-8")
        for name in _ETC:
            if Path("/etc", name).exists():
                self._bind(f"/etc/{name}", f"{etc}/{name}")

    def _scratch(self) -> None:
        """Lay one bounded tmpfs under all the temporary folders."""
        scratch = f"{self._base}/scratch"
        syscalls.mount(
            "tmpfs",
            scratch,
            "tmpfs",
            syscalls.MS_NOSUID | syscalls.MS_NODEV,
            f"mode=0755,size={self._plan.scratch_mb}m",
        )
        for name, mode in (
            ("tmp", 0o1777),
            ("var/tmp", 0o1777),
            ("dev/shm", 0o1777),
            (HOME[1:], 0o700),
            (f"run/user/{self._plan.uid}", 0o700),
        ):
            folder = Path(scratch, name)
            folder.mkdir(parents=True)
            folder.chmod(mode)
            if not name.startswith("dev/"):
                self._link(str(folder), f"{self._root}/{name}")

    def _devices(self) -> None:
        dev = f"{self._root}/dev"
        Path(dev).mkdir()
        syscalls.mount(
            "tmpfs",
            dev,
            "tmpfs",
            syscalls.MS_NOSUID | syscalls.MS_NOEXEC,
            "mode=0755,size=1m",
        )
        matched = {path for pattern in self._plan.devices for path in glob.glob(pattern)}  # noqa: PTH207 - absolute patterns
        for path in sorted({f"/dev/{name}" for name in _DEVICES} | matched):
            # Read-only concerns the inode (mode, owner, times), not the device behind it.
            self._bind(path, self._root + path)
        for name in ("pts", "shm"):
            Path(dev, name).mkdir()
        syscalls.mount(
            "devpts",
            f"{dev}/pts",
            "devpts",
            syscalls.MS_NOSUID | syscalls.MS_NOEXEC,
            "newinstance,ptmxmode=0666,mode=0600",
        )
        Path(dev, "ptmx").symlink_to("pts/ptmx")
        Path(dev, "fd").symlink_to("/proc/self/fd")
        for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
            Path(dev, name).symlink_to(f"/proc/self/fd/{descriptor}")
        self._link(f"{self._base}/scratch/dev/shm", f"{dev}/shm")
        if self._read_only:
            syscalls.mount_attributes(dev, _SHARED, recursive=False)

    def _proc(self) -> None:
        proc = f"{self._root}/proc"
        Path(proc).mkdir()
        syscalls.mount(
            "proc",
            proc,
            "proc",
            syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC,
        )
        if "namespaces" not in self._plan.without:
            # Counts for this user namespace and those below; needs the capabilities of now.
            Path(proc, "sys/user/max_user_namespaces").write_text("0", encoding="ascii")
        if not self._read_only:
            return
        for name in _PROC_READ_ONLY:
            if Path(proc, name).exists():
                self._bind(f"{proc}/{name}", f"{proc}/{name}", _SEALED)
        empty = f"{self._base}/empty"
        for name in _PROC_MASKED:
            place = Path(proc, name)
            if place.exists():
                self._bind(empty if place.is_dir() else "/dev/null", str(place))

    def _sys(self) -> None:
        Path(self._root, "sys").mkdir()
        if self._plan.devices:
            # GPU libraries find their devices and links by /sys.
            self._bind("/sys", f"{self._root}/sys", _SEALED)
            return
        for name in _SYS:
            if Path("/sys", name).is_dir():
                self._bind(f"/sys/{name}", f"{self._root}/sys/{name}", _SEALED)


def limit_core_dumps() -> None:
    """Set the limit that stops core dumps, or the lower one that this process came with."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    limit = CORE_LIMIT if most == resource.RLIM_INFINITY else min(CORE_LIMIT, most)
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def confine(plan: Plan) -> None:
    """Give up, for this process and all that come from it, what a payload must not have."""
    if "core" not in plan.without:
        limit_core_dumps()
    syscalls.new_session_keyring()
    if "capabilities" not in plan.without:
        syscalls.drop_capabilities()
        syscalls.no_new_privileges()
    if plan.folder is not None and "landlock" not in plan.without:
        landlock.restrict(reach(plan))
    if "seccomp" not in plan.without:
        syscalls.install_filter(seccomp.build(namespaces=plan.folder is None))


def reach(plan: Plan) -> landlock.Rules:
    """Return what a payload without namespaces may reach on its node."""
    places = Places.of(plan)
    etc = (*_ETC, *_ETC_WITHOUT_NAMESPACES)
    system = ("/sys",) if plan.devices else tuple(f"/sys/{name}" for name in _SYS)
    devices = {path for pattern in plan.devices for path in glob.glob(pattern)}  # noqa: PTH207 - absolute patterns
    own = (places.home, places.temporary, places.runtime, places.shared)
    return landlock.Rules(
        read=(
            "/usr",
            "/proc",
            *(f"/{name}" for name in _TOP),
            *(f"/etc/{name}" for name in etc),
            *system,
            places.run,
            plan.software,
            *plan.read_only,
        ),
        write=tuple(path for path in own if path is not None),
        devices=(*(f"/dev/{name}" for name in (*_DEVICES, "ptmx", "pts")), *sorted(devices)),
        bind=(plan.server_port,),
        connect=(plan.server_port, plan.hub_port),
    )
