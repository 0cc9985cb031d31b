"""What a node has is judged from what the kernel says."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kakehashi.session import build_libraries, channels, check, landlock, libraries
from kakehashi.session.plan import Node

if TYPE_CHECKING:
    from pathlib import Path

ACCOUNT = Node(
    "/opt/kakehashi",
    (),
    (),
    64,
    allow_unencrypted_swap=True,
    allow_sshfs_view=False,
    walls="account",
)
NODE = Node("/opt/kakehashi", (), (), 64, allow_unencrypted_swap=False, allow_sshfs_view=False)
HEAD = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


def kernel_says(monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """Lay words into the kernel's mouth: no test may switch a machine's swap on."""
    texts = {path.replace("__", "/"): text for path, text in files.items()}
    real = check._read

    def read(path: str) -> str | None:
        return texts.get(path.lstrip("/"), real(path))

    monkeypatch.setattr(check, "_read", read)


def results(node: Node = NODE) -> dict[str, check.Check]:
    return {one.check: one for one in check.quick(node)}


def test_swap_on_a_plain_disk_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_says(monkeypatch, proc__swaps=HEAD + "/dev/null partition 1 0 -2\n")
    assert not results()["swap"].ok
    assert "/dev/null" in results()["swap"].message
    lenient = Node("/opt/kakehashi", (), (), 64, allow_unencrypted_swap=True, allow_sshfs_view=True)
    assert results(lenient)["swap"].ok


def test_swap_in_memory_or_encrypted_is_fine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    area = tmp_path / "swapfile"
    area.write_text("")
    number = area.stat().st_dev
    uuid = f"sys/dev/block/{os.major(number)}:{os.minor(number)}/dm/uuid"
    swaps = HEAD + f"/dev/zram0 partition 1 0 100\n{area} file 1 0 -2\n"
    files = {"proc/swaps": swaps, "sys/block/zram0/backing_dev": "none"}
    kernel_says(monkeypatch, **{k.replace("/", "__"): v for k, v in files.items()})
    assert check.swap_areas() == ([str(area)], ["/dev/zram0", str(area)])
    files[uuid] = "CRYPT-PLAIN-swap"
    kernel_says(monkeypatch, **{k.replace("/", "__"): v for k, v in files.items()})
    assert check.swap_areas()[0] == []


def test_zram_with_a_disk_behind_it_is_not_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    swaps = HEAD + "/dev/zram0 partition 1 0 100\n"
    kernel_says(monkeypatch, proc__swaps=swaps, sys__block__zram0__backing_dev="/dev/sda3")
    assert check.swap_areas()[0] == ["/dev/zram0"]


@pytest.mark.parametrize(
    ("path", "text", "named"),
    [
        ("proc__sys__user__max_user_namespaces", "0", "user namespaces"),
        ("proc__sys__kernel__unprivileged_userns_clone", "0", "user namespaces"),
        ("proc__sys__kernel__apparmor_restrict_unprivileged_userns", "1", "user namespaces"),
        ("proc__sys__kernel__seccomp__actions_avail", "", "seccomp"),
        ("proc__sys__kernel__core_pattern", "@/run/coredump.socket", "core dumps"),
    ],
)
def test_a_kernel_setting_in_the_way_is_named(
    monkeypatch: pytest.MonkeyPatch, path: str, text: str, named: str
) -> None:
    kernel_says(monkeypatch, **{path: text})
    assert not results()[named].ok


def test_a_pipe_as_core_pattern_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_says(monkeypatch, proc__sys__kernel__core_pattern="|/usr/lib/systemd/systemd-coredump")
    assert results()["core dumps"].ok


def test_what_is_not_installed_is_named_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(channels, "PROGRAM_PATH", str(tmp_path))
    (tmp_path / "ssh").write_text("#!/bin/sh\n")
    (tmp_path / "ssh").chmod(0o755)
    found = results()
    assert "script" in found["ssh"].message
    assert "install sshfs" in found["sshfs"].message
    assert "build_libraries" in found["nodump"].message
    assert "/opt/kakehashi" in found["software"].message


def test_the_libraries_are_built_and_found(tmp_path: Path) -> None:
    assert libraries.find(str(tmp_path), libraries.NODUMP) is None
    built = build_libraries.build(tmp_path / "libexec")
    assert [library.name for library in built] == list(libraries.LIBRARIES)
    for library in built:
        assert libraries.find(str(tmp_path), library.name) == library
        assert channels.is_native(library)
    assert not list((tmp_path / "libexec").glob("*.part"))


@pytest.mark.parametrize(
    ("version", "lenient", "ok", "words"),
    [
        (0, False, False, "files, TCP ports, signals"),
        (3, False, False, "TCP ports, signals"),
        (4, False, True, "not confined here: signals"),
        (7, False, True, "version 7"),
        (0, True, True, "not confined here: files"),
    ],
)
def test_weaker_walls_need_landlock_unless_the_site_does_without(
    monkeypatch: pytest.MonkeyPatch, version: int, lenient: bool, ok: bool, words: str
) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: version)
    node = replace(ACCOUNT, allow_no_landlock=lenient)
    looks = {one.check: one for one in check.quick(node)}
    assert looks["landlock"].ok is ok
    assert words in looks["landlock"].message
    assert not looks.keys() & {"user namespaces", "fuse", "sshfs", "view"}
