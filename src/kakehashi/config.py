"""``kakehashi.toml``: one file, read once, into frozen models.

Each host reads the parts that concern it: the login server ``portal``, ``identity``,
``authority`` and ``sites``; the store ``store`` and ``projects``. An unknown key or an
impossible value is refused with the file, the key and the rule.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from kakehashi.errors import ConfigError, StoreError
from kakehashi.secret import Secret
from kakehashi.store.query import parse
from kakehashi.store.receive.settings import Receive

APPROVED = "projects"
"""Folder below the store's root with a file for each project that was approved there."""

PROJECT_ID = re.compile(r"[a-z][a-z0-9-]{0,27}")
ACCOUNT = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
SITE_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
QUEUE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _cidr(text: str) -> str:
    return str(ipaddress.ip_network(text))


def _https_or_loopback(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return url.rstrip("/")
    if parts.scheme == "http" and parts.hostname in {"127.0.0.1", "localhost", "::1"}:
        return url.rstrip("/")
    raise ValueError("must be an https:// address (http:// only for the loopback address)")


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Cidr = Annotated[str, AfterValidator(_cidr)]
Url = Annotated[str, AfterValidator(_https_or_loopback)]
Port = Annotated[int, Field(ge=1, le=65535)]
ProjectId = Annotated[str, Field(pattern=f"^{PROJECT_ID.pattern}$")]
Account = Annotated[str, Field(pattern=f"^{ACCOUNT.pattern}$")]
SiteName = Annotated[str, Field(pattern=f"^{SITE_NAME.pattern}$")]


_Part = TypeVar("_Part")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Portal(_Model):
    """The login server as people see it."""

    title: str = "Kakehashi"
    url: Url = Field(description="Public address of the portal, as browsers and nodes reach it.")
    bind: str = Field(default="127.0.0.1", description="Address that the proxy listens on.")
    port: Port = 8000
    hub_bind: str = Field(default="127.0.0.1", description="Address of the hub's own interface.")
    hub_port: Port = 8081
    proxy_api_port: Port = 8001
    state: AbsolutePath = Path("/var/lib/kakehashi/hub")
    tls_key: AbsolutePath | None = None
    tls_cert: AbsolutePath | None = None
    tls_ca: AbsolutePath | None = Field(
        default=None, description="CA that nodes use to check the portal's certificate."
    )

    @model_validator(mode="after")
    def _tls_where_https(self) -> Self:
        if (self.tls_key is None) != (self.tls_cert is None):
            raise ValueError("tls_key and tls_cert go together")
        return self


class RequiredClaim(_Model):
    """A claim that the identity provider must have set, e.g. ``amr`` containing ``mfa``."""

    name: str
    value: str


class Identity(_Model):
    """The OpenID Connect provider."""

    issuer: Url
    authorize_url: Url
    token_url: Url
    userdata_url: Url
    client_id: str
    client_secret_file: AbsolutePath
    callback_url: Url
    logout_url: Url | None = None
    login_service: str = "Platform account"
    username_claim: str = "preferred_username"
    groups_claim: str = "groups"
    admin_groups: frozenset[str] = Field(
        default=frozenset(),
        description="Groups that operate the portal: they see and end sessions, and enter none.",
    )
    require_claim: RequiredClaim | None = None
    ca_file: AbsolutePath | None = None


class AuthorityEndpoint(_Model):
    """How the hub reaches the store's authority."""

    url: Url
    token_file: AbsolutePath
    ca_file: AbsolutePath | None = None
    catalogue_url: Url | None = Field(
        default=None, description="The store's catalogue service, for sessions; none without it."
    )
    timeout_s: float = Field(default=10, gt=0, le=120)


class Limits(_Model):
    """What the store grants at most, whatever a hub asks for."""

    lease_minutes: float = Field(default=15, gt=0, le=15)
    ticket_minutes: float = Field(default=24 * 60, gt=0, le=7 * 24 * 60)
    session_hours: float = Field(default=24 * 7, gt=0, le=24 * 31)
    sessions_per_person: int = Field(default=4, ge=1, le=64)


class StoreSite(_Model):
    """What the store itself knows of a site, so that it need not take a hub's word for it."""

    addresses: tuple[Cidr, ...] = Field(
        min_length=1, description="Source addresses from which the site's nodes reach the store."
    )
    witness_key: str | None = Field(
        default=None,
        pattern=r"^ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI[A-Za-z0-9+/]{43}$",
        description="Public key of the site's root, whose epilog scans nodes; none without one.",
    )
    accept_account_walls: bool = Field(
        default=False,
        description="Let sessions in whose node has no namespaces for them (the weaker promise).",
    )


class StoreHost(_Model):
    """The store: files, catalogue, sshd, authority, audit."""

    root: AbsolutePath = Path("/srv/kakehashi")
    address: str = Field(description="Name or address of the store's sshd, as nodes reach it.")
    port: Port = 22
    further_addresses: tuple[str, ...] = Field(
        default=(),
        max_length=8,
        description="Further names or addresses of the same sshd, at the same port, as nodes reach "
        "it over other lines: channels are spread over all of them.",
    )
    bind: str = "0.0.0.0"  # noqa: S104 - the store's sshd serves the sites
    bind_port: Port = 22
    authority_bind: str = "127.0.0.1"
    authority_port: Port = 8470
    catalogue_port: Port | None = Field(
        default=None,
        description="Port of the catalogue service, on the authority's address and with its "
        "certificate; without one there is none.",
    )
    authority_tls_key: AbsolutePath | None = None
    authority_tls_cert: AbsolutePath | None = None
    database: str | None = Field(
        default=None, description="SQLAlchemy URL of the records; SQLite under root by default."
    )
    account_prefix: str = Field(default="k", pattern="^[a-z][a-z0-9]{0,7}$")
    audit_anchors: tuple[AbsolutePath, ...] = Field(
        default=(), description="Files on other machines' storage that get the audit head."
    )
    limits: Limits = Limits()
    receive: Receive = Receive()
    sites: dict[SiteName, StoreSite] = Field(
        default={}, description="Sites, as the store itself holds hubs to them."
    )


class CohortQuery(_Model):
    """Which series a project sees; empty means any. Conditions are joined by and."""

    facility: frozenset[str] = frozenset()
    modality: frozenset[str] = frozenset()
    body_part: frozenset[str] = frozenset()
    manufacturer: frozenset[str] = frozenset()
    series: frozenset[str] = Field(default=frozenset(), description="SeriesInstanceUIDs.")
    query: str | None = Field(
        default=None, description="A further condition, in the catalogue's query language."
    )

    @field_validator("query")
    @classmethod
    def _understood(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                parse(text)
            except StoreError as error:
                raise ValueError(str(error)) from None
        return text


class Project(_Model):
    """Purpose, approval, expiry, people and what they may see and use."""

    id: ProjectId
    title: str
    title_ja: str | None = None
    purpose: str
    approval: str = Field(description="Number of the ethics committee's approval.")
    starts: dt.date | None = Field(default=None, description="First day (UTC) of its grants.")
    expires: dt.date
    groups: frozenset[str] = Field(min_length=1)
    sites: frozenset[str] = Field(min_length=1)
    cohort: CohortQuery = CohortQuery()
    tier: int = Field(
        default=1,
        ge=1,
        le=3,
        description="Up to which tier it may see series: 1 shows least of the person.",
    )
    requested_by: str | None = None
    approved_by: str | None = None

    @model_validator(mode="after")
    def _starts_before_it_expires(self) -> Self:
        if self.starts is not None and self.starts > self.expires:
            raise ValueError(f"starts ({self.starts}) lies after expires ({self.expires})")
        return self


class Queue(_Model):
    """One partition or resource group of a site, as offered on the spawn page."""

    name: str = Field(pattern=f"^{QUEUE_NAME.pattern}$")
    title: str | None = None
    gpu_type: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,32}$")
    max_gpus: int = Field(default=0, ge=0, le=64)
    max_hours: float = Field(default=8, gt=0, le=24 * 31)
    cpus: int = Field(default=1, ge=1, le=1024)
    memory_mb: int = Field(default=2048, ge=256)


class Node(_Model):
    """What a compute node of a site must have and what the payload may see of it."""

    software: AbsolutePath = Field(
        default=Path("/opt/kakehashi"), description="Where Kakehashi is installed on the nodes."
    )
    read_only: tuple[AbsolutePath, ...] = Field(
        default=(), description="Further paths of the node that the payload may read."
    )
    devices: tuple[str, ...] = Field(
        default=(), description="Globs of device files that the payload gets, e.g. /dev/nvidia*."
    )
    scratch_mb: int = Field(default=4096, ge=64)
    allow_unencrypted_swap: bool = False
    allow_sshfs_view: bool = Field(
        default=False, description="Fall back to sshfs for the read-only view without FUSE view."
    )
    walls: Literal["namespaces", "account"] = Field(
        default="namespaces",
        description="What stands between a payload and its node. 'account' is the weaker fallback "
        "for nodes without user namespaces or FUSE: Landlock, no mounts, short leases.",
    )
    allow_no_landlock: bool = Field(
        default=False,
        description="With walls = 'account': accept nodes whose kernel cannot confine programs.",
    )


class Site(_Model):
    """A place to compute."""

    title: str
    title_ja: str | None = None
    scheduler: Literal["slurm", "none"]
    transport: Literal["local"] = "local"
    agent: tuple[str, ...] = Field(
        min_length=1, description="Argument list that starts the site's agent."
    )
    addresses: tuple[Cidr, ...] = Field(
        min_length=1, description="Source addresses from which the site's nodes reach the hub."
    )
    accounts: dict[str, Account] = Field(
        description="Person (name at the identity provider) to own local account."
    )
    queues: tuple[Queue, ...] = Field(min_length=1)
    node: Node = Node()
    portal_url: Url | None = Field(
        default=None, description="The portal as this site's nodes reach it, if not portal.url."
    )
    hub_address: str | None = Field(
        default=None, description="Hub's own interface as the nodes reach it, host:port."
    )
    node_name_is_address: bool = Field(
        default=False, description="The hub reaches a node by the name the scheduler gives."
    )
    queue_timeout_hours: float = Field(
        default=24, gt=0, le=24 * 7, description="How long a request may wait in the queue."
    )
    start_timeout_s: int = Field(
        default=300, ge=10, description="From the job's start to a session on its node."
    )
    offline_max_hours: float = Field(default=24, gt=0, le=24 * 7)

    @model_validator(mode="after")
    def _no_shared_accounts(self) -> Self:
        owner: dict[str, str] = {}
        for person, account in sorted(self.accounts.items()):
            if account == "root":
                raise ValueError("accounts: nobody may compute as root")
            if account in owner:
                raise ValueError(
                    f"accounts: {owner[account]!r} and {person!r} share the account "
                    f"{account!r}; each person needs an own one"
                )
            owner[account] = person
        return self


class Config(_Model):
    """All of ``kakehashi.toml``."""

    portal: Portal | None = None
    identity: Identity | None = None
    authority: AuthorityEndpoint | None = None
    store: StoreHost | None = None
    sites: dict[SiteName, Site] = {}
    projects: tuple[Project, ...] = ()

    @model_validator(mode="after")
    def _unique_projects(self) -> Self:
        seen: set[str] = set()
        for project in self.projects:
            if project.id in seen:
                raise ValueError(f"projects: the id {project.id!r} stands there twice")
            seen.add(project.id)
        return self

    def need_portal(self) -> Portal:
        """Return the part ``[portal]`` or say that it is missing."""
        return _need(self.portal, "portal")

    def need_identity(self) -> Identity:
        """Return the part ``[identity]`` or say that it is missing."""
        return _need(self.identity, "identity")

    def need_authority(self) -> AuthorityEndpoint:
        """Return the part ``[authority]`` or say that it is missing."""
        return _need(self.authority, "authority")

    def need_store(self) -> StoreHost:
        """Return the part ``[store]`` or say that it is missing."""
        return _need(self.store, "store")


def _need(part: _Part | None, name: str) -> _Part:
    if part is None:
        raise ConfigError(f"the configuration has no [{name}] section, and this command needs it")
    return part


def load(path: Path) -> Config:
    """Read and check a configuration file.

    Parameters
    ----------
    path : Path
        The TOML file.

    Returns
    -------
    Config

    Raises
    ------
    ConfigError
        The file cannot be read, is not TOML, or breaks a rule; the message names the file,
        each key and the rule.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from error
    try:
        config = Config.model_validate(data)
        approved = _approved(config)
        if not approved:
            return config
        return Config.model_validate(data | {"projects": [*config.projects, *approved]})
    except ValidationError as error:
        raise ConfigError(explain(path, error)) from None


def _approved(config: Config) -> list[Project]:
    """Read the projects that were approved at the store, and lie there."""
    projects = []
    folder = config.store.root / APPROVED if config.store else None
    for path in sorted(folder.glob("*.json")) if folder else ():
        try:
            project = Project.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            raise ConfigError(explain(path, error)) from None
        if path.stem != project.id:
            raise ConfigError(f"{path}: holds the project {project.id!r}; rename one of the two")
        projects.append(project)
    return projects


def explain(path: Path | str, error: ValidationError) -> str:
    """Say what is wrong with a file or text: each key, and the rule that it breaks."""
    lines = [f"{path}: {error.error_count()} problem(s)"]
    for problem in error.errors(include_url=False, include_input=False):
        key = ".".join(str(part) for part in problem["loc"]) or "(file)"
        rule = (
            "unknown key; remove it or correct its spelling"
            if problem["type"] == "extra_forbidden"
            else problem["msg"].removeprefix("Value error, ")
        )
        lines.append(f"  {key}: {rule}")
    return "\n".join(lines)


def read_secret(path: Path) -> Secret:
    """Read a secret from a file that only its owner can read.

    Raises
    ------
    ConfigError
        The file is missing, empty, or open to group or others.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if mode & 0o077:
        raise ConfigError(f"{path}: others can read this secret (mode {mode & 0o777:o}); chmod 600")
    if not text:
        raise ConfigError(f"{path}: is empty; it must hold the secret")
    return Secret(text)
