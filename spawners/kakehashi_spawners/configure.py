"""From ``kakehashi.toml`` to JupyterHub's settings, in one place."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kakehashi.config import read_secret
from kakehashi.errors import ConfigError
from kakehashi_spawners import catalogue, endpoints, pages, sites
from kakehashi_spawners.authority import Authority
from kakehashi_spawners.identity import KakehashiAuthenticator
from kakehashi_spawners.portal import Portal, install
from kakehashi_spawners.spawner import KakehashiSpawner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kakehashi.config import Config

NODE_LEAST = 20
PROXY_SCRIPT = "configurable-http-proxy/bin/configurable-http-proxy"
REFRESH_S = 40
TOKEN_S = 30 * 24 * 3600
OPERATOR_SCOPES = ["admin-ui", "list:users", "list:groups", "read:servers", "delete:servers"]
SCOPES = ["openid", "profile", "email", "groups", "offline_access"]
WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - looked for, not bound


def configure(c: Any, config: Config) -> Portal:
    """Set everything that JupyterHub needs.

    Parameters
    ----------
    c : traitlets.config.Config
        JupyterHub's configuration, written to.
    config : Config
        The deployment: ``portal``, ``identity``, ``authority`` and ``sites`` must be there.

    Returns
    -------
    Portal
        What was installed for spawners, endpoints and log-in.

    Raises
    ------
    ConfigError
        A part is missing, or this machine lacks something; the message says what to do.
    """
    portal = Portal(
        config,
        Authority.from_config(config.need_authority()),
        {name: sites.connect(name, site) for name, site in config.sites.items()},
    )
    _check_addresses(portal)
    install(portal)
    endpoints.install([*endpoints.HANDLERS, *catalogue.HANDLERS])
    state = config.need_portal().state
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    _configure_hub(c, portal)
    _configure_proxy(c, portal)
    _configure_identity(c, config)
    c.CryptKeeper.keys = [_key(state / "auth-state.key")]
    pages.configure_pages(c, config)
    return portal


def _configure_hub(c: Any, portal: Portal) -> None:
    settings = portal.settings
    scheme = "https" if settings.tls_cert else "http"
    hub = c.JupyterHub
    hub.bind_url = f"{scheme}://{settings.bind}:{settings.port}{urlsplit(settings.url).path}"
    hub.public_url = settings.url
    hub.hub_bind_url = f"https://{settings.hub_bind}:{settings.hub_port}"
    near = "127.0.0.1" if settings.hub_bind in WILDCARDS else settings.hub_bind
    hub.hub_connect_url = f"https://{near}:{settings.hub_port}"
    hub.trusted_alt_names = _hub_names(portal)
    hub.internal_ssl = True
    hub.internal_certs_location = str(settings.state / "internal-ssl")
    hub.db_url = f"sqlite:///{settings.state / 'jupyterhub.sqlite'}"
    hub.cookie_secret_file = str(settings.state / "cookie-secret")
    hub.cookie_max_age_days = 1
    # A token that was lost or taken must not open its person's sessions for ever.
    hub.token_expires_in_max_seconds = TOKEN_S
    hub.cleanup_servers = False
    hub.allow_named_servers = False
    hub.spawner_class = KakehashiSpawner
    c.Spawner.default_url = "/lab"
    # A hub that ends because some sites failed would take the others with it.
    c.Spawner.consecutive_failure_limit = 0


def _configure_proxy(c: Any, portal: Portal) -> None:
    settings = portal.settings
    if settings.tls_cert:
        c.JupyterHub.ssl_key = str(settings.tls_key)
        c.JupyterHub.ssl_cert = str(settings.tls_cert)
    c.ConfigurableHTTPProxy.command = proxy_command(os.environ)
    c.ConfigurableHTTPProxy.api_url = f"https://127.0.0.1:{settings.proxy_api_port}"
    c.ConfigurableHTTPProxy.pid_file = str(settings.state / "proxy.pid")
    c.ConfigurableHTTPProxy.log_level = "warn"


def _configure_identity(c: Any, config: Config) -> None:
    identity = config.need_identity()
    # Not JupyterHub's administrators: those may enter any session, and make tokens for it.
    c.JupyterHub.load_roles = [
        {
            "name": "portal-operator",
            "description": "Sees who has a session and may end it; enters none",
            "scopes": OPERATOR_SCOPES,
            "groups": sorted(identity.admin_groups),
        }
    ]
    c.JupyterHub.authenticator_class = KakehashiAuthenticator
    mine = c.KakehashiAuthenticator
    mine.issuer = identity.issuer
    mine.authorize_url = identity.authorize_url
    mine.token_url = identity.token_url
    mine.userdata_url = identity.userdata_url
    mine.oauth_callback_url = identity.callback_url
    mine.client_id = identity.client_id
    mine.client_secret = read_secret(identity.client_secret_file).reveal()
    mine.login_service = identity.login_service
    mine.username_claim = identity.username_claim
    mine.username_pattern = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
    mine.scope = SCOPES
    # Without consent some providers give no refresh token, and nobody could ask again.
    mine.extra_authorize_params = {"prompt": "consent"}
    mine.basic_auth = True
    mine.enable_pkce = True
    mine.manage_groups = True
    mine.auth_state_groups_key = f"oauth_user.{identity.groups_claim}"
    mine.operator_groups = set(identity.admin_groups)
    mine.allow_all = False
    mine.allow_existing_users = False
    mine.enable_auth_state = True
    mine.auth_refresh_age = REFRESH_S
    mine.refresh_pre_spawn = True
    if identity.logout_url is not None:
        mine.logout_redirect_url = identity.logout_url
    if identity.require_claim is not None:
        mine.required_claim = identity.require_claim.name
        mine.required_value = identity.require_claim.value
    if identity.ca_file is not None:
        mine.http_request_kwargs = {"ca_certs": str(identity.ca_file)}


def proxy_command(environment: Mapping[str, str]) -> list[str]:
    """Return the argument list that starts configurable-http-proxy.

    Parameters
    ----------
    environment : mapping
        ``KAKEHASHI_PROXY`` may name the ``node_modules`` folder; else it is looked for beside
        the virtual environment.

    Raises
    ------
    ConfigError
        No Node.js of version 20 or later, or no proxy.
    """
    prefix = Path(sys.prefix)
    own = prefix / "bin" / "node"
    node = str(own) if own.exists() else shutil.which("node")
    if node is None:
        raise ConfigError("Node.js is missing; the proxy needs version 20 or later")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=False)
    major = version.stdout.strip().removeprefix("v").partition(".")[0]
    if not major.isdigit() or int(major) < NODE_LEAST:
        raise ConfigError(f"{node} is version {version.stdout.strip()!r}; the proxy needs 20")
    folder = Path(environment.get("KAKEHASHI_PROXY", str(prefix.parent / "node_modules")))
    script = folder / PROXY_SCRIPT
    if not script.is_file():
        raise ConfigError(
            f"{script} is missing; run 'npm ci' in {folder.parent}, or name the node_modules "
            "folder in KAKEHASHI_PROXY"
        )
    return [node, str(script)]


def _check_addresses(portal: Portal) -> None:
    if portal.settings.hub_bind not in WILDCARDS:
        return
    for name, site in portal.config.sites.items():
        if site.hub_address is None:
            raise ConfigError(
                f"sites.{name}.hub_address is missing: portal.hub_bind is every address, so "
                "nodes must be told one of them, as host:port"
            )


def _hub_names(portal: Portal) -> list[str]:
    # Every payload reaches the hub as 127.0.0.1, through its keeper's relay.
    names = ["IP:127.0.0.1", "DNS:localhost"]
    hosts = {portal.hub_address(name).rpartition(":")[0] for name in portal.config.sites}
    hosts.add(portal.settings.hub_bind)
    return names + [_alt_name(host) for host in sorted(hosts) if host]


def _alt_name(host: str) -> str:
    plain = host.strip("[]")
    numeric = plain.replace(".", "").isdigit() or ":" in plain
    return f"{'IP' if numeric else 'DNS'}:{plain}"


def _key(path: Path) -> bytes:
    """Return the key that log-in tokens are kept under, made at first use."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    return bytes.fromhex(read_secret(path).reveal())
