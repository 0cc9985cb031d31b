"""The example deployment, and what the login server says where something is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from traitlets.config import Config as Traitlets

from kakehashi.config import Config, load
from kakehashi.errors import ConfigError
from kakehashi_spawners.configure import configure, proxy_command
from kakehashi_spawners.server import hub_port
from tests.spawners.standins import REPOSITORY, TOML


def deployment(folder: Path, **changes: str) -> Config:
    for name in ("client-secret", "authority-token"):
        (folder / name).write_text("secret")
        (folder / name).chmod(0o600)
    text = TOML.format(
        port=8000,
        hub_port=8081,
        api_port=8001,
        folder=folder,
        authority="http://127.0.0.1:1",
        python="/usr/bin/python3",
        addresses="127.0.0.0/8",
        software="/opt/kakehashi",
        provider="http://127.0.0.1:1",
        claim="",
    )
    for old, new in changes.items():
        text = text.replace(f"{old} = ", f"{new}\n{old} = ", 1)
    (folder / "kakehashi.toml").write_text(text)
    return load(folder / "kakehashi.toml")


def test_the_commented_example_is_a_valid_deployment() -> None:
    config = load(REPOSITORY / "kakehashi.toml")
    assert set(config.sites) == {"flow", "workstation"}
    assert config.need_identity().require_claim is not None


def test_the_hubs_configuration_file_stays_short() -> None:
    assert len((REPOSITORY / "jupyterhub_config.py").read_text().splitlines()) < 120


def test_everything_is_set_and_nobody_is_let_in_by_default(tmp_path: Path) -> None:
    c = Traitlets()
    configure(c, deployment(tmp_path))
    assert c.JupyterHub.internal_ssl is True
    assert c.JupyterHub.cleanup_servers is False
    assert c.KakehashiAuthenticator.allow_all is False
    assert c.KakehashiAuthenticator.enable_pkce is True
    assert 0 < c.KakehashiAuthenticator.auth_refresh_age <= 45
    assert (tmp_path / "state" / "auth-state.key").stat().st_mode & 0o077 == 0
    first = c.CryptKeeper["keys"]
    again = Traitlets()
    configure(again, deployment(tmp_path))
    assert again.CryptKeeper["keys"] == first, "log-ins outlive a restart"


def test_nodes_must_be_told_where_the_hub_is(tmp_path: Path) -> None:
    config = deployment(tmp_path, hub_port='hub_bind = "0.0.0.0"')
    with pytest.raises(ConfigError, match=r"sites\.here\.hub_address is missing"):
        configure(Traitlets(), config)


def test_a_missing_proxy_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run 'npm ci'"):
        proxy_command({"KAKEHASHI_PROXY": str(tmp_path)})


def test_the_payloads_two_ports_never_meet() -> None:
    for port in (1024, 8081, 65535):
        assert hub_port(port, port) != port
        assert 1024 <= hub_port(port, port) <= 65535
    assert hub_port(8081, 40000) == 8081


def test_the_portal_holds_no_secret_in_what_can_be_printed(tmp_path: Path) -> None:
    portal = configure(Traitlets(), deployment(tmp_path))
    shown = repr(vars(portal)) + repr(vars(portal.authority)) + json.dumps(str(portal.config))
    assert "authority-token" in shown, "the control: its file's name is there"
    assert "'secret'" not in shown
