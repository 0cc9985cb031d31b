"""``kakehashi store`` as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import DATA

PROJECT = """
[[projects]]
id = "ct"
title = "CT"
purpose = "test"
approval = "1"
expires = 2099-01-01
groups = ["g"]
sites = ["s"]
cohort = { modality = ["CT"] }
"""


@pytest.fixture
def command(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    config = tmp_path / "kakehashi.toml"
    config.write_text(f'[store]\nroot = "{root}"\naddress = "store.example"\n{PROJECT}')
    program = Path(sys.executable).with_name("kakehashi")

    def run(*arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [program, "store", *arguments],
            capture_output=True,
            text=True,
            env={"KAKEHASHI_CONFIG": str(config), "PATH": "/usr/bin:/bin", "COLUMNS": "80"},
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        # Messages are folded to the terminal's width.
        return done.stdout if status == 0 else " ".join((done.stdout + done.stderr).split())

    return run


def test_add_list_show_and_view(command, tmp_path):
    said = command("add", str(DATA / "sts"), str(DATA / "ct_tilted"))
    assert "4 series packed, 0 were there already" in said
    assert "kept     1 x localizer" in said
    assert "0 series packed, 4 were there already" in command(
        "add", str(DATA / "sts"), str(DATA / "ct_tilted")
    )

    rows = json.loads(command("list", "--json"))
    assert sorted(row["modality"] for row in rows) == ["CT", "CT", "MR", "PT"]
    assert len(json.loads(command("list", "--json", "--modality", "CT"))) == 2
    table = command("list")
    for row in rows:
        assert row["series_uid"] in table
    assert "[tilted]" in table
    kept = json.loads(command("list", "--kept", "--json"))
    assert {k["modality"] for k in kept} == {None, "CT", "RTSTRUCT"}
    assert "localizer" in command("list", "--kept")

    uid = next(row["series_uid"] for row in rows if row["modality"] == "PT")
    shown = json.loads(command("show", uid, "--json", "--check"))
    assert shown["series"]["slices"] == 48
    assert shown["damaged_blocks"] == []
    assert shown["geometry"]["spacing_mm"] == pytest.approx([3.27, 5.46875, 5.46875])
    assert len(shown["geometry"]["rescale"]["per_slice"]["slope"]) == 48
    assert [k["modality"] for k in shown["kept"]] == ["RTSTRUCT"]
    text = command("show", uid, "--check")
    assert "affine (LPS, mm)" in text
    assert "all as hashed" in text

    assert "ct: 2 series (cohort version 1), 2 new, 0 gone" in command("view", "--all")
    assert "0 new, 0 gone" in command("view", "ct")
    assert (tmp_path / "root/views/ct/manifest.json").exists()


def test_show_check_finds_a_damaged_block(command, tmp_path):
    command("add", str(DATA / "ct_chest"))
    (row,) = json.loads(command("list", "--json"))
    pack = tmp_path / "root" / row["path"]
    raw = bytearray(pack.read_bytes())
    raw[300_000] ^= 1
    pack.write_bytes(raw)
    assert "damaged: [2]" in command("show", row["series_uid"], "--check", status=1)


def test_errors_are_one_clear_message(command):
    assert "no series '1.2.3'" in command("show", "1.2.3", status=1)
    assert "is not there" in command("add", "/nowhere", status=1)
    assert "no project 'x'" in command("view", "x", status=1)
    assert "name one project" in command("view", status=2)
    assert "cannot be read" in command("list", "--config", "/nowhere.toml", status=1)
