"""``kakehashi.toml``: what is read, and what is refused in which words."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi import config
from kakehashi.errors import ConfigError
from kakehashi.secret import Secret

ROOT = Path(__file__).resolve().parents[1]

GOOD = """
[store]
address = "store.example.ac.jp"

[[projects]]
id = "lung-ct"
title = "Lung CT"
purpose = "Segmentation"
approval = "2026-1"
expires = 2030-01-01
groups = ["lung-ct"]
sites = ["slurm"]

[sites.slurm]
title = "Cluster"
scheduler = "slurm"
agent = ["sudo", "-n", "/opt/agent"]
addresses = ["10.0.0.0/24"]
accounts = { tanaka = "t0001", suzuki = "t0002" }
[[sites.slurm.queues]]
name = "gpu"
max_gpus = 2
"""


SITE = "[store.sites.slurm]\naddresses = ['10.0.0.0/24']\n"


def load(tmp_path: Path, text: str) -> config.Config:
    path = tmp_path / "kakehashi.toml"
    path.write_text(text)
    return config.load(path)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert str(tmp_path / "kakehashi.toml") in message
    return message


def test_a_good_file_is_read_and_cannot_be_changed(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD)
    assert loaded.need_store().limits.lease_minutes == 15
    assert loaded.sites["slurm"].accounts["tanaka"] == "t0001"
    with pytest.raises(ValueError, match="frozen"):
        loaded.sites["slurm"].title = "other"  # type: ignore[misc]


def test_the_example_deployment_is_good() -> None:
    loaded = config.load(ROOT / "kakehashi.toml")
    assert loaded.need_portal().url.startswith("https://")
    assert loaded.sites
    assert loaded.projects


@pytest.mark.parametrize(
    ("old", "new", "key", "rule"),
    [
        ('address = "store', 'adress = "x"\naddress = "store', "store.adress", "unknown key"),
        ('address = "store.example.ac.jp"', "", "store.address", "required"),
        ('id = "lung-ct"', 'id = "Lung CT"', "projects.0.id", "pattern"),
        ('id = "lung-ct"', 'id = "../x"', "projects.0.id", "pattern"),
        ("2030-01-01", '"soon"', "projects.0.expires", "date"),
        ('groups = ["lung-ct"]', "groups = []", "projects.0.groups", "at least 1"),
        ('suzuki = "t0002"', 'suzuki = "t0001"', "sites.slurm", "share the account"),
        ('suzuki = "t0002"', 'suzuki = "root"', "sites.slurm", "root"),
        ('"10.0.0.0/24"', '"10.0.0.1/24"', "sites.slurm.addresses.0", "host bits"),
        ('scheduler = "slurm"', 'scheduler = "pbs"', "sites.slurm.scheduler", "slurm"),
        ("max_gpus = 2", "max_gpus = -1", "sites.slurm.queues.0.max_gpus", "greater"),
        ('name = "gpu"', 'name = "gpu --wrap"', "sites.slurm.queues.0.name", "pattern"),
        ("[[projects]]", "[store.limits]\nlease_minutes = 16\n[[projects]]",
         "store.limits.lease_minutes", "15"),
        ("expires = 2030-01-01", "starts = 2030-01-02\nexpires = 2030-01-01",
         "projects.0", "after expires"),
        ("[[projects]]", "[store.sites.slurm]\naddresses = []\n[[projects]]",
         "store.sites.slurm.addresses", "at least 1"),
        ("[[projects]]", SITE + "witness_key = 'ssh-rsa AAAA'\n[[projects]]",
         "store.sites.slurm.witness_key", "pattern"),
        ("[[projects]]", SITE + "witness_key = 'ssh-ed25519 " + "A" * 68 + "'\n[[projects]]",
         "store.sites.slurm.witness_key", "pattern"),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_refused_with_its_key(
    tmp_path: Path, old: str, new: str, key: str, rule: str
) -> None:
    assert old in GOOD
    message = refusal(tmp_path, GOOD.replace(old, new, 1))
    assert key in message
    assert rule in message


def test_a_project_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    project = GOOD[GOOD.index("[[projects]]") : GOOD.index("[sites.slurm]")]
    assert "twice" in refusal(tmp_path, GOOD.replace("[sites.slurm]", project + "[sites.slurm]", 1))


def test_a_store_needs_of_a_site_only_where_it_is_and_who_vouches_for_it(tmp_path: Path) -> None:
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "b" * 43
    site = f'[store.sites.slurm]\naddresses = ["10.0.0.0/24"]\nwitness_key = "{key}"\n'
    found = load(tmp_path, f'[store]\naddress = "store"\n{site}').need_store().sites["slurm"]
    assert (found.addresses, found.witness_key) == (("10.0.0.0/24",), key)


@pytest.mark.parametrize("url", ["http://portal.example.ac.jp", "ftp://x", "portal", "https://"])
def test_an_address_without_encryption_is_refused(tmp_path: Path, url: str) -> None:
    assert "https" in refusal(tmp_path, f'[portal]\nurl = "{url}"\n')


def test_what_is_no_toml_or_not_there_is_refused(tmp_path: Path) -> None:
    assert "TOML" in refusal(tmp_path, "[store\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "nothing.toml")


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    loaded = load(tmp_path, "")
    for name in ("portal", "identity", "authority", "store"):
        with pytest.raises(ConfigError, match=rf"\[{name}\]"):
            getattr(loaded, f"need_{name}")()


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / "kakehashi.toml"
    path.write_bytes(raw)
    try:
        config.load(path)
    except ConfigError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("swordfish\n")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        config.read_secret(path)
    path.chmod(0o600)
    assert config.read_secret(path).reveal() == "swordfish"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        config.read_secret(path)


def test_a_secret_shows_stars_wherever_it_is_printed() -> None:
    secret = Secret("swordfish")
    shown = [str(secret), repr(secret), f"{secret}", f"{secret:>12}", repr({"a": [secret]})]
    assert not any("swordfish" in text for text in shown)
    assert all("***" in text for text in shown)
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    assert secret == Secret("swordfish")
    assert secret != Secret("other")


def test_a_known_error_is_one_line_and_exit_status_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kakehashi.cli", "store", "list", "--config",
         str(tmp_path / "nothing.toml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "nothing.toml" in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, kakehashi; print([m for m in ('numpy', 'torch', 'zarr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
