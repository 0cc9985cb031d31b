"""Work folders: what they take up, limits with and without a wall, snapshots."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kakehashi.cli import upkeep
from kakehashi.config import Config
from kakehashi.errors import StoreError
from kakehashi.store.authority.layout import Layout
from kakehashi.store.quota import enforced, set_limit, snapshot, usage

from .conftest import settings

MB = 1_000_000
# Mounting is root's; `make test` in CI is root and runs these.
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


def files_of_project(root: Path, project: str) -> Path:
    """Where a project's people write."""
    return Layout(root).work(project) / "work"


def store_in(root: Path):
    for project in ("lung", "other"):
        files_of_project(root, project).mkdir(parents=True)
    return Config.model_validate(settings(root)).need_store()


@pytest.fixture
def plain(tmp_path):
    return store_in(tmp_path)


@contextlib.contextmanager
def mounted(tmp_path: Path, make: list[str], *options: str) -> Iterator[Path]:
    """A file system in a file; skips where this machine cannot make or mount it."""
    if shutil.which(make[0]) is None:
        # scripts/install.sh has the programs; other Linux machines may not.
        pytest.skip(f"{make[0]} is not installed")
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([*make, str(image)], check=True, capture_output=True)
    argv = ["mount", "-o", ",".join(["loop", *options]), str(image), str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        # Quotas and file systems are the kernel's to have; nothing stands in for them.
        pytest.skip(f"cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_is_measured_as_the_disk_has_it(plain):
    work = files_of_project(plain.root, "lung")
    empty = usage(plain, "lung")
    assert (empty.files, empty.limit, empty.wall, empty.warning) == (0, None, False, None)
    (work / "a").write_bytes(os.urandom(MB))
    os.link(work / "a", work / "second name")
    (work / "link").symlink_to("/etc")
    with (work / "hole").open("wb") as file:
        file.truncate(10**12)
    (work / "folder").mkdir()
    (work / "folder/b").write_bytes(os.urandom(MB))
    found = usage(plain, "lung")
    said = subprocess.run(
        ["du", "-s", "-B1", Layout(plain.root).work("lung")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.size == int(said.stdout.split()[0])
    assert 2 * MB < found.size < 3 * MB
    assert found.files == 3
    assert usage(plain, "other").files == 0


def test_without_a_wall_a_limit_is_reported_and_called_what_it_is(plain):
    if enforced(plain.root):
        pytest.skip("this file system has walls")
    assert set_limit(plain, "lung", 10 * MB).warning is None
    work = files_of_project(plain.root, "lung")
    (work / "a").write_bytes(os.urandom(9 * MB))
    assert usage(plain, "lung").warning == "near its limit, which nothing enforces"
    (work / "b").write_bytes(os.urandom(2 * MB))
    found = usage(plain, "lung")
    assert found.warning == "over its limit, which nothing enforces"
    assert found.as_json()["wall"] is False
    assert set_limit(plain, "lung", 20 * MB).warning is None
    assert usage(plain, "other").limit is None


def test_the_command_says_whether_a_limit_is_a_wall(plain):
    config = plain.root / "kakehashi.toml"
    config.write_text(f'[store]\nroot = "{plain.root}"\naddress = "store.example"\n')
    app = typer.Typer()
    app.command()(upkeep.quota)

    def run(*arguments: str, status: int = 0) -> str:
        done = CliRunner().invoke(app, [*arguments, "--config", str(config)])
        assert done.exit_code == status, done.output
        return done.output

    assert "lung: 0.000 GB (no limit), 0 files" in run("lung") or enforced(plain.root)
    (files_of_project(plain.root, "lung") / "a").write_bytes(os.urandom(3 * MB))
    said = run("lung", "--limit", "0.002", status=1)
    assert "0.003 GB of 0.002 GB" in said
    assert "over its limit" in said
    if not enforced(plain.root):
        assert "(no wall: only reported)" in said
        (found,) = json.loads(run("lung", "--json", status=1))
        assert (found["wall"], found["limit"]) == (False, 2 * MB)
    run("lung", "--limit", "1")
    assert run() == ""
    run("--limit", "1", status=2)


@pytest.mark.parametrize("name", ["nobody", "../lung", "Lung", ""])
def test_what_is_no_work_folder_is_refused(plain, name):
    for work in (usage, snapshot, lambda store, project: set_limit(store, project, 1)):
        with pytest.raises(StoreError, match="is not there"):
            work(plain, name)


def test_broken_limits_are_a_clear_error(plain):
    set_limit(plain, "lung", MB)
    (plain.root / "work/.quota.json").write_text("{")
    with pytest.raises(StoreError, match="set limits again"):
        usage(plain, "lung")


FORMATS = {
    "ext4": ["mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota"],
    "xfs": ["mkfs.xfs", "-q"],
}


def refusal(path: Path, megabytes: int) -> str | None:
    """Write a file as somebody without root's privilege to pass quotas; return the refusal."""
    # Work accounts have no privilege at all, but could not pass through pytest's folders.
    argv = ["setpriv", "--bounding-set=-sys_resource", "dd", "if=/dev/urandom", f"of={path}"]
    argv += ["bs=1000000", f"count={megabytes}", "conv=fsync", "status=none"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stderr.strip().rpartition(": ")[2] if done.returncode else None


@as_root
@pytest.mark.parametrize("kind", FORMATS)
def test_where_the_file_system_has_quotas_a_limit_is_a_wall(tmp_path, kind):
    with mounted(tmp_path, FORMATS[kind], "prjquota") as folder:
        if not enforced(folder):
            pytest.skip("this kernel has no project quotas for it")
        store = store_in(folder)
        work = files_of_project(folder, "lung")
        (work / "before").write_bytes(os.urandom(4 * MB))
        (work / "link").symlink_to("/etc/passwd")
        found = set_limit(store, "lung", 10 * MB)
        assert found.wall
        set_limit(store, "other", 2 * MB)
        (work / "fits").write_bytes(os.urandom(4 * MB))
        os.sync()
        assert refusal(work / "more", 10) in {os.strerror(n) for n in (errno.EDQUOT, errno.ENOSPC)}
        assert usage(store, "lung").size <= 10 * MB + 64 * 1024
        assert usage(store, "lung").warning == "near its limit"
        # Another project is not touched by it, and a higher limit gives room at once.
        (files_of_project(folder, "other") / "a").write_bytes(os.urandom(MB))
        set_limit(store, "lung", 40 * MB)
        assert refusal(work / "more", 10) is None
        assert usage(store, "lung").warning is None


@as_root
@pytest.mark.parametrize(
    ("make", "subvolume"),
    [(["mkfs.btrfs", "-q"], True), (["mkfs.btrfs", "-q"], False), (["mkfs.xfs", "-q"], False)],
)
def test_a_snapshot_stays_as_it_was(tmp_path, make, subvolume):
    with mounted(tmp_path, make) as folder:
        store = store_in(folder)
        if subvolume:
            shutil.rmtree(Layout(folder).work("lung"))
            argv = ["btrfs", "subvolume", "create", str(Layout(folder).work("lung"))]
            subprocess.run(argv, check=True, capture_output=True)
        file = files_of_project(folder, "lung") / "a"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"before" * MB)
        os.sync()
        used = shutil.disk_usage(folder).used
        kept = snapshot(store, "lung")
        os.sync()
        # What is shared takes up nothing.
        assert shutil.disk_usage(folder).used - used < MB
        file.write_bytes(b"after")
        assert (kept / "work/a").read_bytes() == b"before" * MB
        assert kept.parent == folder / "snapshots/lung"
        assert (folder / "snapshots").stat().st_mode & 0o777 == 0o700
        assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@as_root
def test_without_snapshots_it_says_so_and_leaves_nothing(tmp_path):
    with mounted(tmp_path, ["mkfs.ext4", "-q"]) as folder:
        store = store_in(folder)
        (files_of_project(folder, "lung") / "a").write_bytes(b"x")
        with pytest.raises(StoreError, match="without snapshots"):
            snapshot(store, "lung")
        assert list((folder / "snapshots/lung").iterdir()) == []
