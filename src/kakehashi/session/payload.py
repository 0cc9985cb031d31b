"""The payload's world: its root, its limits, and the small init process that keeps it.

Runs as process 1 of the payload's own namespaces, forked (never exec'd) from the warden, so
that no program of the same user can trace it. Everything that is not named here is absent.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kakehashi.session import seccomp, syscalls
from kakehashi.session.plan import HOME, HOSTNAME, RUN, STORE, WORK, Plan

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

# One byte, and not none: a handler that core_pattern pipes to is run whatever the limit is,
# except for the value 1, which the kernel keeps for "no dump"; and no core file fits in it.
CORE_LIMIT = 1
LOG_LIMIT = 16 << 20
MESSAGE_LIMIT = 192 * 1024

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
_PERSON = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_IGNORED = (signal.SIGTERM, signal.SIGXCPU, signal.SIGHUP, signal.SIGINT)


def ignore_ending_signals() -> None:
    """Leave the signals that a scheduler sends to every process of a job to the keeper."""
    for kind in _IGNORED:
        signal.signal(kind, signal.SIG_IGN)


def environment(plan: Plan, extra: Mapping[str, str]) -> dict[str, str]:
    """Return the payload's whole environment.

    Parameters
    ----------
    plan : Plan
    extra : mapping
        What the hub gives its server; the wrapper's own names win over it.
    """
    cache = f"{HOME}/.cache"
    own = {
        "HOME": HOME,
        "IPYTHONDIR": f"{HOME}/.ipython",
        "JUPYTER_CONFIG_DIR": f"{HOME}/.jupyter",
        "JUPYTER_DATA_DIR": f"{HOME}/.local/share/jupyter",
        "JUPYTER_RUNTIME_DIR": f"{HOME}/.local/share/jupyter/runtime",
        "LANG": "C.UTF-8",
        "LOGNAME": plan.user,
        "MPLCONFIGDIR": f"{HOME}/.config/matplotlib",
        "NUMBA_CACHE_DIR": f"{cache}/numba",
        "PATH": f"{plan.software}/.venv/bin:/usr/local/bin:/usr/bin:/bin",
        "PIP_CACHE_DIR": f"{cache}/pip",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SHELL": "/bin/sh",
        "TMPDIR": "/tmp",  # noqa: S108 - the payload's private memory
        "TORCH_HOME": f"{cache}/torch",
        "USER": plan.user,
        "XDG_CACHE_HOME": cache,
        "XDG_CONFIG_HOME": f"{HOME}/.config",
        "XDG_DATA_HOME": f"{HOME}/.local/share",
        "XDG_RUNTIME_DIR": f"/run/user/{plan.uid}",
        "XDG_STATE_HOME": f"{HOME}/.local/state",
        "npm_config_cache": f"{cache}/npm",
    }
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
    if "seccomp" not in plan.without:
        syscalls.install_filter(seccomp.build())


class Init:
    """Process 1 of the payload: takes orders from the warden, starts programs, reaps.

    Messages are JSON objects on a sequenced-packet socket. Orders are ``build``, ``probe``
    and ``start``; answers ``built``, ``probe``, ``started`` and ``error``.
    """

    def __init__(self, plan: Plan, base: str, control: socket.socket) -> None:
        self._plan = plan
        self._base = base
        self._control = control

    def run(self) -> NoReturn:
        """Build, confine, and follow orders; the exit status is the server's."""
        try:
            # The warden first learns who this is, then says so; only then may this end answer.
            if not self._control.recv(MESSAGE_LIMIT):
                os._exit(1)
            World(self._plan, self._base).build()
            syscalls.set_dumpable(dumpable="init" in self._plan.without)
            confine(self._plan)
            self._say({"built": True})
            while True:
                data = self._control.recv(MESSAGE_LIMIT)
                if not data:
                    os._exit(1)
                order = json.loads(data)
                if "probe" in order:
                    self._say({"probe": self._probe(order["probe"])})
                else:
                    os._exit(self._serve(order["start"]))
        except BaseException as error:  # the last frame of this process
            with contextlib.suppress(OSError):
                self._say({"error": f"{type(error).__name__}: {error}"})
            os._exit(1)

    def _say(self, message: dict[str, Any]) -> None:
        self._control.send(json.dumps(message).encode())

    def _probe(self, facts: dict[str, Any]) -> Any:
        """Run the probe program under exactly the payload's conditions."""
        here = str(Path(__file__).resolve().parents[2])
        script = (
            "import sys; sys.path.insert(0, sys.argv[1]);"
            "from kakehashi.session.probe import main; main(sys.argv[2])"
        )
        argv = [sys.executable, "-I", "-S", "-c", script, here, json.dumps(facts)]
        reading, writing = os.pipe()
        pid = self._spawn(argv, environment(self._plan, {}), HOME, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            text = stream.read(MESSAGE_LIMIT // 2)
        os.waitpid(pid, 0)
        try:
            return json.loads(text)
        except ValueError:
            lines = text.decode(errors="replace").strip().splitlines() or ["no output"]
            raise RuntimeError(f"the probe did not finish: {lines[-1]}") from None

    def _serve(self, order: dict[str, Any]) -> int:
        person = order["person"]
        if not _PERSON.fullmatch(person):
            raise ValueError(f"the name {person!r} cannot be a folder's name")
        logs = Path(WORK, ".kakehashi", "logs")
        logs.mkdir(parents=True, exist_ok=True)
        home = Path(WORK, person)
        home.mkdir(exist_ok=True)
        log = os.open(
            logs / f"{order['session']}.log",
            os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC,
            0o600,
        )
        reading, writing = os.pipe()
        child = self._spawn(
            order["argv"], environment(self._plan, order["environment"]), str(home), writing
        )
        os.close(writing)
        signal.signal(signal.SIGTERM, _ask_all_to_end)
        self._say({"started": True})
        writer = threading.Thread(target=_write_log, args=(reading, log), daemon=True)
        writer.start()
        while True:
            pid, status = os.wait()
            if pid == child:
                writer.join(timeout=1)
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code

    def _spawn(self, argv: list[str], env: dict[str, str], folder: str, output: int) -> int:
        """Start a program with nothing but its three standard files.

        Raises
        ------
        OSError
            The program could not be started.
        """
        failed, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                for kind in (*_IGNORED, signal.SIGPIPE):
                    signal.signal(kind, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                os.umask(0o077)
                os.chdir(folder)
                nothing = os.open("/dev/null", os.O_RDONLY)
                for source, target in ((nothing, 0), (output, 1), (output, 2)):
                    os.dup2(source, target)
                os.dup2(report, 3, inheritable=False)
                if "descriptors" not in self._plan.without:
                    os.closerange(4, 65536)
                else:
                    os.dup2(self._control.fileno(), 4)
                os.execvpe(argv[0], argv, env)  # noqa: S606 - an argument list, no shell
            except OSError as error:
                os.write(3, f"{argv[0]}: {error.strerror}".encode())
            finally:
                os._exit(127)
        os.close(report)
        with os.fdopen(failed, "rb") as stream:
            problem = stream.read(4096)
        if problem:
            os.waitpid(pid, 0)
            raise OSError(f"cannot start {problem.decode(errors='replace')}")
        return pid


def _ask_all_to_end(*_: object) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGTERM)


def _write_log(source: int, log: int) -> None:
    """Copy the server's output into its log, up to a bound; read on beyond it."""
    left = LOG_LIMIT
    while data := os.read(source, 65536):
        kept = data[:left]
        left -= len(kept)
        # A work folder that does not answer costs the log, not the session.
        with contextlib.suppress(OSError):
            if kept:
                os.write(log, kept)
            if kept and not left:
                os.write(log, b"\n[the log ends here: it has reached its bound]\n")
