"""The portal's own services on hosts of lab or demo: store, identity provider, login server."""

from __future__ import annotations

import datetime as dt
import json
import secrets
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

from tests.lab.certificates import LabCA
from tests.lab.hosts import Host, LabError, wait_for
from tests.lab.people import PEOPLE

SOFTWARE = "/opt/kakehashi"
PYTHON = f"{SOFTWARE}/.venv/bin/python"
CONFIG = "/etc/kakehashi.toml"
SITE_FILE = "/etc/kakehashi-site.json"
STORE = "/srv/kakehashi"  # in the store's own host, a namespace
ANCHOR = "/mnt/anchor"
PATH = f"{SOFTWARE}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

PROJECTS = """
[[projects]]
id = "lung-ct"
title = "Lung CT"
title_ja = "肺CT"
purpose = "Segmentation of lung nodules in chest CT"
approval = "2026-0123"
expires = {expires}
groups = ["lung-ct"]
sites = [{sites}]
cohort = {{ modality = ["CT"]{granted} }}

[[projects]]
id = "brain-mr"
title = "Brain MR"
title_ja = "脳MR"
purpose = "Reconstruction and registration of MR"
approval = "2026-0200"
expires = {expires}
groups = ["brain-mr"]
sites = [{sites}]
cohort = {{ modality = ["MR"] }}

[[projects]]
id = "sarcoma"
title = "Sarcoma PET review"
title_ja = "肉腫PET読影"
purpose = "Review of tumour segmentations in PET and CT"
approval = "2026-0311"
expires = {expires}
groups = ["sarcoma-review"]
sites = [{sites}]
cohort = {{ modality = ["PT"] }}

[[projects]]
id = "canary"
title = "Canary"
title_ja = "カナリア"
purpose = "Synthetic series by which operators verify a site"
approval = "2026-0001"
expires = {expires}
groups = ["canary"]
sites = [{sites}]
cohort = {{ manufacturer = ["Kakehashi"] }}
"""


@dataclass(frozen=True)
class Place:
    """A host with the address at which the others reach it."""

    host: Host
    address: str


@dataclass(frozen=True)
class Portal:
    """Where the portal's services run, and on which ports.

    ``sites`` holds the TOML text of each site's section, without its header; ``witness_keys``
    the public key of each site whose root reports of its nodes; ``senders`` the AE titles of
    each hospital that may send from the store's own machine; ``data_facility`` from whom the
    sample data is, and ``granted`` the facilities that the project lung-ct sees (all without any).
    """

    store: Place
    login: Place
    provider: Place
    sites: Mapping[str, str]
    tls: bool
    port: int = 8000
    hub_port: int = 8081
    proxy_api_port: int = 8001
    sshd_port: int = 22
    authority_port: int = 8470
    catalogue_port: int = 8471
    provider_port: int = 9400
    lease_minutes: float = 15
    data: tuple[str, ...] = (f"{SOFTWARE}/tests/data",)
    senders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    granted: Sequence[str] = ()
    data_facility: str | None = None
    people_file: str = "/var/lib/provider/accounts.json"
    witness_keys: Mapping[str, str] = field(default_factory=dict)
    ca: LabCA = field(default_factory=LabCA)

    @property
    def scheme(self) -> str:
        return "https" if self.tls else "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.login.address}:{self.port}"

    @property
    def goodbye(self) -> str:
        """Return the page that the identity provider sends people to after log-out."""
        return f"{self.url}/hub/kakehashi/logged-out"

    @property
    def issuer(self) -> str:
        return f"{self.scheme}://{self.provider.address}:{self.provider_port}"

    def store_toml(self) -> str:
        """Return the store's configuration."""
        tls = (
            'authority_tls_key = "/etc/kakehashi/authority.key"\n'
            'authority_tls_cert = "/etc/kakehashi/authority.crt"\n'
            if self.tls
            else ""
        )
        expires = dt.datetime.now(dt.UTC).date() + dt.timedelta(days=365)
        sites = ", ".join(json.dumps(name) for name in self.sites)
        return (
            "[store]\n"
            f'root = "{STORE}"\n'
            f'address = "{self.store.address}"\n'
            f"port = {self.sshd_port}\n"
            f'bind = "{self.store.address}"\n'
            f"bind_port = {self.sshd_port}\n"
            f'authority_bind = "{self.store.address}"\n'
            f"authority_port = {self.authority_port}\n"
            f"catalogue_port = {self.catalogue_port}\n"
            f"{tls}"
            f'audit_anchors = ["{ANCHOR}/heads.jsonl"]\n'
            "[store.limits]\n"
            f"lease_minutes = {self.lease_minutes}\n"
            + "".join(
                f"[store.sites.{name}]\n"
                f"addresses = {json.dumps(tomllib.loads(text)['addresses'])}\n"
                + (
                    f'witness_key = "{self.witness_keys[name]}"\n'
                    if name in self.witness_keys
                    else ""
                )
                + ("accept_account_walls = true\n" if 'walls = "account"' in text else "")
                for name, text in self.sites.items()
            )
            + self._receive_toml()
            + PROJECTS.format(expires=expires.isoformat(), sites=sites, granted=self._granted_toml)
        )

    def _receive_toml(self) -> str:
        if not self.senders:
            return ""
        # Nobody waits ten minutes in front of a demo.
        return '[store.receive]\nbind = "127.0.0.1"\nquiet_minutes = 0.2\n' + "".join(
            "[[store.receive.senders]]\n"
            f"facility = {json.dumps(facility)}\n"
            f"ae_titles = {json.dumps(list(titles))}\n"
            'addresses = ["127.0.0.0/8"]\n'
            for facility, titles in self.senders.items()
        )

    @property
    def _granted_toml(self) -> str:
        return f", facility = {json.dumps(list(self.granted))}" if self.granted else ""

    def login_toml(self) -> str:
        """Return the login server's configuration."""
        provider = self.issuer
        back = urlencode({"client_id": "kakehashi", "post_logout_redirect_uri": self.goodbye})
        tls = (
            'tls_key = "/etc/kakehashi/portal.key"\n'
            'tls_cert = "/etc/kakehashi/portal.crt"\n'
            'tls_ca = "/etc/kakehashi/ca.crt"\n'
            if self.tls
            else ""
        )
        ca_file = 'ca_file = "/etc/kakehashi/ca.crt"\n' if self.tls else ""
        sites = "".join(f"\n[sites.{name}]\n{text}" for name, text in self.sites.items())
        return (
            "[portal]\n"
            'title = "Kakehashi"\n'
            f'url = "{self.url}"\n'
            f'bind = "{self.login.address}"\n'
            f"port = {self.port}\n"
            f'hub_bind = "{self.login.address}"\n'
            f"hub_port = {self.hub_port}\n"
            f"proxy_api_port = {self.proxy_api_port}\n"
            'state = "/var/lib/kakehashi/hub"\n'
            f"{tls}"
            "\n[identity]\n"
            f'issuer = "{provider}"\n'
            f'authorize_url = "{provider}/auth"\n'
            f'token_url = "{provider}/token"\n'
            f'userdata_url = "{provider}/me"\n'
            f'logout_url = "{provider}/session/end?{back}"\n'
            'client_id = "kakehashi"\n'
            'client_secret_file = "/etc/kakehashi/client.secret"\n'
            f'callback_url = "{self.url}/hub/oauth_callback"\n'
            'admin_groups = ["portal-admins"]\n'
            f"{ca_file}"
            "\n[authority]\n"
            f'url = "{self.scheme}://{self.store.address}:{self.authority_port}"\n'
            'token_file = "/etc/kakehashi/authority.token"\n'
            f'catalogue_url = "{self.scheme}://{self.store.address}:{self.catalogue_port}"\n'
            f"{ca_file}{sites}"
        )


def configuration(portal: Portal, host: Host) -> str:
    """Return a host's ``kakehashi.toml``: the parts of every role that it has."""
    return (portal.login_toml() if host == portal.login.host else "") + (
        portal.store_toml() if host == portal.store.host else ""
    )


def site_accounts() -> dict[str, str]:
    """Return the map of a site: person to own local account."""
    return {person.name: person.account for person in PEOPLE if person.account is not None}


def add_people(host: Host) -> None:
    """Make the people's local accounts on a host of a site, with equal ids everywhere."""
    for index, person in enumerate(PEOPLE):
        if person.account is None:
            continue
        host.run(["useradd", "--create-home", "--uid", str(4001 + index), "--user-group",
                  "--shell", "/bin/bash", person.account])  # fmt: skip
        host.run(["chmod", "0700", f"/home/{person.account}"])


def start_provider(portal: Portal) -> None:
    """Start the identity provider with the accounts of :data:`PEOPLE`."""
    host = portal.provider.host
    secret = secrets.token_urlsafe(32)
    host.write("/var/lib/provider/client.secret", secret, mode=0o600)
    host.write(
        portal.people_file,
        json.dumps({person.name: person.at_provider() for person in PEOPLE}, ensure_ascii=False),
    )
    leaf = portal.ca.leaf([portal.provider.address]) if portal.tls else None
    if leaf is not None:
        host.write("/var/lib/provider/tls.key", leaf.key, mode=0o600)
        host.write("/var/lib/provider/tls.crt", leaf.certificate)
    settings = {
        "issuer": portal.issuer,
        "listen": {"host": portal.provider.address, "port": portal.provider_port},
        "tls": {"key": "/var/lib/provider/tls.key", "cert": "/var/lib/provider/tls.crt"}
        if leaf
        else None,
        "client": {
            "id": "kakehashi",
            "secretFile": "/var/lib/provider/client.secret",
            "redirectUris": [f"{portal.url}/hub/oauth_callback"],
            "postLogoutUris": [portal.goodbye],
        },
        "accounts": portal.people_file,
    }
    host.write("/var/lib/provider/settings.json", json.dumps(settings))
    portal.login.host.write("/etc/kakehashi/client.secret", secret, mode=0o600)
    process = host.daemon(
        "provider",
        [f"{SOFTWARE}/.venv/bin/node", f"{SOFTWARE}/tests/lab/idp/provider.mjs",
         "/var/lib/provider/settings.json"],
    )  # fmt: skip
    await_line(host, "provider", "ready", process)


def await_line(
    host: Host,
    service: str,
    line: str,
    process: subprocess.Popen[bytes],
    seconds: float = 30,
    since: int = 0,
) -> None:
    """Wait until a service has written a line to its log, or tell how it died.

    ``since`` is the length in bytes of what an earlier run of the service left there.
    """
    log = host.log(service)

    def said() -> bool:
        text = log.read_bytes()[since:].decode(errors="replace")
        if process.poll() is not None:
            raise LabError(f"{service} on {host.name} ended:\n{text[-3000:]}")
        return line in text

    try:
        wait_for(f"{service} on {host.name} to say {line!r}", said, seconds)
    except LabError as error:
        raise LabError(f"{error}\n{log.read_text(errors='replace')[-3000:]}") from None


def start_store(portal: Portal) -> None:
    """Set the store up with the sample data, and start its services."""
    host = portal.store.host
    host.write(CONFIG, configuration(portal, host))
    if portal.tls:
        leaf = portal.ca.leaf([portal.store.address])
        host.write("/etc/kakehashi/authority.key", leaf.key, mode=0o600)
        host.write("/etc/kakehashi/authority.crt", leaf.certificate)
    kakehashi(host, ["store", "init"])
    if portal.tls:
        host.run(["chown", "kakehashi:", "/etc/kakehashi/authority.key"])
    token = kakehashi(host, ["store", "hub-add", "login"]).stdout.strip().splitlines()[-1]
    portal.login.host.write("/etc/kakehashi/authority.token", token + "\n", mode=0o600)
    if portal.data:
        origin = [] if portal.data_facility is None else ["--facility", portal.data_facility]
        kakehashi(host, ["store", "add", *portal.data, *origin])
    kakehashi(host, ["store", "view", "--all"])
    serve_store(host)


def serve_store(host: Host) -> None:
    """Start the store's services; also used to restart them."""
    log = host.log("store")
    since = log.stat().st_size if log.exists() else 0
    process = host.daemon("store", command("store", "serve"))
    await_line(host, "store", "ready", process, since=since)


def command(*arguments: str) -> list[str]:
    """Return the argument list of a command of the store that runs until it is told to stop."""
    return [PYTHON, "-m", "kakehashi.cli", *arguments, "--config", CONFIG]


def kakehashi(host: Host, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run the command line on a host."""
    return host.run(
        [PYTHON, "-m", "kakehashi.cli", *arguments],
        env={"KAKEHASHI_CONFIG": CONFIG, "COLUMNS": "200", "PATH": PATH},
    )


def install_agent(host: Host, site_files: Mapping[str, Mapping[str, object]]) -> None:
    """Let the hub's account on a host call the agent of each site, and nothing else, as root."""
    for path, site_file in site_files.items():
        host.write(path, json.dumps(site_file), mode=0o600)
    rules = (
        f"kakehashi-hub ALL=(root) NOPASSWD: {' '.join(_agent(path))}\n" for path in site_files
    )
    host.write("/etc/sudoers.d/kakehashi", "".join(rules), mode=0o440)


def install_epilog(
    host: Host, site: str, site_file: Mapping[str, object], key: str, portal: Portal
) -> None:
    """Make a node's root a witness for the store."""
    host.write("/etc/kakehashi/witness.key", key, mode=0o600)
    host.write("/etc/kakehashi/ca.crt", portal.ca.certificate)
    witness = {"site": site, "key": "/etc/kakehashi/witness.key", "portal_url": portal.url,
               "portal_ca": "/etc/kakehashi/ca.crt"}  # fmt: skip
    tidy = ["/tmp", "/var/tmp", "/dev/shm"]
    host.write(SITE_FILE, json.dumps({**site_file, "witness": witness, "tidy": tidy}), mode=0o600)


def _agent(site_file: str) -> list[str]:
    return [PYTHON, "-I", "-m", "kakehashi.site.agent", "--site", site_file]


def agent_argv(site_file: str = SITE_FILE) -> list[str]:
    """Return how the hub calls the agent of a site."""
    return ["sudo", "-n", *_agent(site_file)]


def start_login(portal: Portal) -> None:
    """Start the hub with its proxy."""
    host = portal.login.host
    host.run(["useradd", "--system", "--home-dir", "/var/lib/kakehashi", "--shell",
              "/usr/sbin/nologin", "kakehashi-hub"])  # fmt: skip
    host.run(["install", "-d", "-o", "kakehashi-hub", "-g", "kakehashi-hub", "-m", "700",
              "/var/lib/kakehashi", "/var/lib/kakehashi/hub"])  # fmt: skip
    host.write(CONFIG, configuration(portal, host))
    if portal.tls:
        leaf = portal.ca.leaf([portal.login.address])
        host.write("/etc/kakehashi/portal.key", leaf.key, mode=0o600)
        host.write("/etc/kakehashi/portal.crt", leaf.certificate)
        host.write("/etc/kakehashi/ca.crt", portal.ca.certificate)
    for secret in ("portal.key", "client.secret", "authority.token"):
        if host.path(f"/etc/kakehashi/{secret}").exists():
            host.run(["chown", "kakehashi-hub:", f"/etc/kakehashi/{secret}"])
    start_hub(host)


def start_hub(host: Host, *, debug: bool = False) -> None:
    """Start the hub's process itself and wait until it answers; also used to restart it."""
    log = host.log("hub")
    since = log.stat().st_size if log.exists() else 0
    process = host.daemon(
        "hub",
        [PYTHON, "-m", "jupyterhub", "-f", f"{SOFTWARE}/jupyterhub_config.py",
         *(["--debug"] if debug else [])],
        user="kakehashi-hub",
        env={"KAKEHASHI_CONFIG": CONFIG, "PATH": PATH, "HOME": "/var/lib/kakehashi"},
    )  # fmt: skip
    await_line(host, "hub", "JupyterHub is now running", process, 60, since)


def write_ca(portal: Portal, run_dir: Path) -> Path:
    """Write the lab's CA certificate where browsers and tests find it."""
    path = run_dir / "ca.crt"
    path.write_text(portal.ca.certificate)
    return path
