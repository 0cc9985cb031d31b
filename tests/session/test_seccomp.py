"""The filter's program, run by an interpreter of its own, for both kinds of machine."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.session import seccomp, syscalls

ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED, KILLED = "allowed", "killed"
MACHINES = pytest.mark.parametrize("machine", syscalls.MACHINES)


def judge(machine: str, nr: int, *arguments: int, architecture: int | None = None) -> str | int:
    """Run the filter as the kernel does, and return what it says."""
    arch = ARCHITECTURE[machine] if architecture is None else architecture
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", nr & 0xFFFFFFFF, arch, 0, *padded)
    code = list(struct.iter_unpack("HBBI", seccomp.build(machine)))
    assert len(code) < 4096
    at, value = 0, 0
    while True:
        kind, yes, no, operand = code[at]
        at += 1
        if kind == 0x20:
            value = int.from_bytes(data[operand : operand + 4], "little")
        elif kind == 0x06:
            verdicts: dict[int, str] = {0x7FFF0000: ALLOWED, 0x80000000: KILLED}
            return verdicts.get(operand) or int(operand) & 0xFFFF
        else:
            hit = {
                0x15: value == operand,
                0x35: value >= operand,
                0x45: bool(value & operand),
            }[kind]
            at += yes if hit else no


def nr(machine: str, name: str) -> int:
    found = syscalls.number(name, machine)
    assert found is not None
    return found


@MACHINES
@pytest.mark.parametrize("name", seccomp.REFUSED)
def test_what_is_refused(machine: str, name: str) -> None:
    if syscalls.number(name, machine) is not None:
        assert judge(machine, nr(machine, name)) == errno.EPERM


@MACHINES
@pytest.mark.parametrize("name", seccomp.ABSENT)
def test_what_is_absent(machine: str, name: str) -> None:
    assert judge(machine, nr(machine, name)) == errno.ENOSYS


@MACHINES
@given(flags=st.integers(0, 2**32 - 1))
def test_clone_makes_threads_and_processes_but_no_namespaces(machine: str, flags: int) -> None:
    spaces = (
        syscalls.CLONE_NEWNS
        | syscalls.CLONE_NEWCGROUP
        | syscalls.CLONE_NEWUTS
        | syscalls.CLONE_NEWIPC
        | syscalls.CLONE_NEWUSER
        | syscalls.CLONE_NEWPID
        | syscalls.CLONE_NEWNET
    )
    wanted = errno.EPERM if flags & spaces else ALLOWED
    assert judge(machine, nr(machine, "clone"), flags) == wanted


@MACHINES
@given(family=st.integers(0, 60), protocol=st.integers(0, 30))
def test_sockets_of_few_families(machine: str, family: int, protocol: int) -> None:
    allowed = family in {1, 2, 10} or (family, protocol) == (16, 0)
    wanted = ALLOWED if allowed else errno.EAFNOSUPPORT
    assert judge(machine, nr(machine, "socket"), family, 1, protocol) == wanted
    pair = judge(machine, nr(machine, "socketpair"), family, 1, protocol)
    assert pair == (ALLOWED if family == 1 else errno.EAFNOSUPPORT)


@MACHINES
@given(resource=st.integers(0, 15), new=st.sampled_from([0, 1, 0x7FFF12345678, 1 << 32]))
def test_the_core_limit_stays(machine: str, resource: int, new: int) -> None:
    wanted = errno.EPERM if resource == 4 and new else ALLOWED
    assert judge(machine, nr(machine, "prlimit64"), 0, resource, new, 0) == wanted
    wanted = errno.EPERM if resource == 4 else ALLOWED
    assert judge(machine, nr(machine, "setrlimit"), resource, 1) == wanted


@MACHINES
def test_ordinary_calls_pass(machine: str) -> None:
    names = (*seccomp.REFUSED, *seccomp.ABSENT, *seccomp._JUDGED)
    refused = {syscalls.number(name, machine) for name in names}
    assert all(judge(machine, one) == ALLOWED for one in range(450) if one not in refused)


@MACHINES
def test_other_machines_calls_are_fatal(machine: str) -> None:
    assert judge(machine, 0, architecture=0x40000003) == KILLED


def test_the_x32_table_is_closed() -> None:
    assert judge("x86_64", 0x40000000 | 165) == errno.ENOSYS


def test_a_machine_without_a_table_is_an_error() -> None:
    with pytest.raises(OSError, match="riscv64"):
        seccomp.build("riscv64")
