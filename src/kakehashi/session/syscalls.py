"""The system calls that the standard library has no name for, through the C library.

Every function raises :class:`OSError` with the call's name where the kernel refuses.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import socket
import struct

# <linux/sched.h>
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# <linux/mount.h>
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MNT_DETACH = 2
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8

_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_KEYCTL_JOIN_SESSION_KEYRING = 1
_SIOCSIFFLAGS = 0x8914
_IFF_UP_RUNNING = 0x41

# Numbers of x86_64 and of aarch64 (the generic table); None where the call does not exist.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bind": (49, 200),
    "bpf": (321, 280),
    "chmod": (90, None),
    "chown": (92, None),
    "chroot": (161, 51),
    "clone": (56, 220),
    "clone3": (435, 435),
    "connect": (42, 203),
    "delete_module": (176, 106),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fanotify_init": (300, 262),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "fcntl": (72, 25),
    "finit_module": (313, 273),
    "fork": (57, None),
    "fsconfig": (431, 431),
    "fsetxattr": (190, 7),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "futimesat": (261, None),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "ioperm": (173, None),
    "iopl": (172, None),
    "ioprio_set": (251, 30),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "lchown": (94, None),
    "link": (86, None),
    "linkat": (265, 37),
    "lookup_dcookie": (212, 18),
    "lsetxattr": (189, 6),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "perf_event_open": (298, 241),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "semget": (64, 190),
    "sendmmsg": (307, 269),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "setrlimit": (160, 164),
    "setxattr": (188, 5),
    "setxattrat": (463, 463),
    "shmget": (29, 194),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "syslog": (103, 116),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "truncate": (76, 45),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "utime": (132, None),
    "utimensat": (280, 88),
    "utimes": (235, None),
    "vfork": (58, None),
    "vhangup": (153, 58),
}
MACHINES = ("x86_64", "aarch64")

_libc = ctypes.CDLL(None, use_errno=True)


def number(name: str, machine: str | None = None) -> int | None:
    """Return a system call's number on a machine (this one by default), None if it has none.

    Raises
    ------
    OSError
        The machine is neither x86_64 nor aarch64.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise OSError(
            f"this node's processor is {machine!r}; sessions run on x86_64 and aarch64 only"
        )
    return NUMBERS[name][MACHINES.index(machine)]


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, *arguments: int) -> int:
    padded = (*arguments, 0, 0, 0, 0)[:4]
    return int(_libc.prctl(option, *(ctypes.c_ulong(value) for value in padded)))


def call(name: str, *arguments: object) -> int:
    """Make a system call by its name in :data:`NUMBERS`."""
    nr = number(name)
    if nr is None:
        raise OSError(f"{name}: does not exist on this machine")
    return _checked(int(_libc.syscall(ctypes.c_long(nr), *arguments)), name)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that made it ends.

    Where the parent ends before this call, nobody is told; a forked child uses
    :func:`fork_bound`, which closes that gap.
    """
    _checked(_prctl(_PR_SET_PDEATHSIG, 9), "prctl(PR_SET_PDEATHSIG)")


def outlive_parent() -> None:
    """Take :func:`die_with_parent` back."""
    _checked(_prctl(_PR_SET_PDEATHSIG, 0), "prctl(PR_SET_PDEATHSIG)")


def fork_bound() -> int:
    """Fork a child that the kernel kills when this process ends, however early that is.

    A parent outside the child's pid namespace has no number there, so a pipe of which only
    the parent holds the writing end tells whether it still lives. The parent keeps that end
    open for good.

    Returns
    -------
    int
        As :func:`os.fork`.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(reading)
        return pid
    os.close(writing)
    die_with_parent()
    watch = select.poll()
    watch.register(reading, select.POLLIN)
    if watch.poll(0):
        os._exit(1)
    os.close(reading)
    return 0


def set_dumpable(*, dumpable: bool) -> None:
    """Say whether processes of the same user may read and trace this one."""
    _checked(_prctl(_PR_SET_DUMPABLE, int(dumpable)), "prctl(PR_SET_DUMPABLE)")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    _checked(_prctl(_PR_SET_CHILD_SUBREAPER, 1), "prctl(PR_SET_CHILD_SUBREAPER)")


def unshare(flags: int) -> None:
    """Enter new namespaces."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, kind: int) -> None:
    """Move the calling thread into the namespace behind ``fd``."""
    _checked(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")


def map_user(uid: int, gid: int) -> None:
    """Map one user and one group onto themselves in a user namespace just entered."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _path(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def mount(
    source: str | None, target: str, kind: str | None, flags: int = 0, options: str | None = None
) -> None:
    """Call ``mount(2)``."""
    _checked(
        _libc.mount(
            _path(source), _path(target), _path(kind), ctypes.c_ulong(flags), _path(options)
        ),
        f"mount on {target}",
    )


def unmount(target: str) -> None:
    """Detach a mount and everything below it from the tree."""
    _checked(_libc.umount2(_path(target), ctypes.c_int(MNT_DETACH)), f"umount of {target}")


def mount_attributes(
    path: str, attributes: int, *, propagation: int = 0, recursive: bool = True
) -> None:
    """Set attributes (read-only, ...) and propagation of a mount, and of those below it."""
    packed = struct.pack("QQQQ", attributes, 0, propagation, 0)
    call(
        "mount_setattr",
        ctypes.c_int(_AT_FDCWD),
        _path(path),
        ctypes.c_uint(_AT_RECURSIVE if recursive else 0),
        packed,
        ctypes.c_size_t(len(packed)),
    )


def swap_root(new_root: str) -> None:
    """Make ``new_root`` the root, and detach the old one."""
    os.chdir(new_root)
    call("pivot_root", b".", b".")
    unmount(".")
    os.chdir("/")


def set_hostname(name: str) -> None:
    """Set the host name in this UTS namespace."""
    data = name.encode()
    _checked(_libc.sethostname(data, ctypes.c_size_t(len(data))), "sethostname")


def raise_loopback() -> None:
    """Bring up ``lo`` in this network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP_RUNNING))


def new_session_keyring() -> None:
    """Leave the session keyring that was inherited."""
    call("keyctl", ctypes.c_int(_KEYCTL_JOIN_SESSION_KEYRING), None)


def drop_bounding_set() -> bool:
    """Have no program file give a capability to this thread again.

    Returns
    -------
    bool
        False where this thread may not say so: it has no CAP_SETPCAP (any more).
    """
    for capability in range(64):
        try:
            _checked(_prctl(_PR_CAPBSET_DROP, capability), "prctl(PR_CAPBSET_DROP)")
        except PermissionError:
            return False
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # the kernel has no more of them
    return True


def drop_capabilities() -> None:
    """Give up every capability of this thread for good.

    Also those that a program file could give back, where it may (:func:`drop_bounding_set`);
    elsewhere :func:`no_new_privileges` is what holds them off.
    """
    drop_bounding_set()
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, struct.pack("6I", 0, 0, 0, 0, 0, 0)), "capset")


def no_new_privileges() -> None:
    """Make set-uid bits and file capabilities count for nothing from here on."""
    _checked(_prctl(_PR_SET_NO_NEW_PRIVS, 1), "prctl(PR_SET_NO_NEW_PRIVS)")


def install_filter(program: bytes) -> None:
    """Install a seccomp filter, given as packed ``struct sock_filter``."""
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    _checked(
        _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), header, 0, 0),
        "prctl(PR_SET_SECCOMP)",
    )
