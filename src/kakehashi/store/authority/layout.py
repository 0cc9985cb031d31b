"""Where the authority's files lie, and what its accounts are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kakehashi.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from kakehashi.config import StoreHost

LONGEST_ACCOUNT = 32
"""Characters that Linux's account tools allow in a name."""


@dataclass(frozen=True)
class Layout:
    """Paths under the store's root."""

    root: Path

    @property
    def authority(self) -> Path:
        """The authority's own folder, closed to everyone else."""
        return self.root / "authority"

    @property
    def book(self) -> Path:
        """The book of sessions, leases and connections (SQLite)."""
        return self.authority / "book.sqlite"

    @property
    def audit(self) -> Path:
        """The audit trail."""
        return self.authority / "audit.jsonl"

    @property
    def receipts(self) -> Path:
        """The receipts, one JSON file a session."""
        return self.authority / "receipts"

    @property
    def hubs(self) -> Path:
        """SHA-256 of each hub's credential, one file a hub."""
        return self.authority / "hubs"

    @property
    def keys(self) -> Path:
        """The certificate authorities' keys and the key that signs receipts."""
        return self.authority / "keys"

    @property
    def host_certificate(self) -> Path:
        """What sshd shows to nodes; the authority signs it anew when a key is replaced."""
        return self.keys / "host_key-cert.pub"

    @property
    def sshd(self) -> Path:
        """The configuration and host key of the store's sshd."""
        return self.root / "sshd"

    @property
    def principals(self) -> Path:
        """The program that sshd asks at each authentication."""
        return self.root / "libexec" / "principals"

    @property
    def receive(self) -> Path:
        """What hospitals sent, as it came: identifiable."""
        return self.root / "receive"

    @property
    def service(self) -> Path:
        """The catalogue service's own records: cohorts, and the texts of reports."""
        return self.root / "service"

    @property
    def run(self) -> Path:
        """What concerns the running processes only."""
        return self.root / "run"

    @property
    def log(self) -> Path:
        """Log files of sshd, the authority and the guard."""
        return self.root / "log"

    @property
    def sshd_log(self) -> Path:
        """What sshd says; the authority reads it too."""
        return self.log / "sshd.log"

    @property
    def sshd_position(self) -> Path:
        """How far the authority has read sshd's log."""
        return self.authority / "sshd-log.json"

    @property
    def arrivals(self) -> Path:
        """Summary of what hospitals sent; the intake writes it, everybody may read it."""
        return self.root / "arrivals.json"

    def view(self, project: str) -> Path:
        """Chroot of a project's view account."""
        return self.root / "views" / project

    def work(self, project: str) -> Path:
        """Chroot of a project's work account."""
        return self.root / "work" / project


@dataclass(frozen=True)
class Names:
    """The Unix accounts and groups of a store, all with one prefix."""

    prefix: str

    @property
    def authority(self) -> str:
        """Account of the authority and the guard."""
        # Two stores on one machine have two prefixes, and neither may read the other's keys.
        return "kakehashi" if self.prefix == "k" else f"{self.prefix}authority"

    @property
    def receiver(self) -> str:
        """Account that receives from hospitals; what they send is its alone."""
        return "kakehashi-receive" if self.prefix == "k" else f"{self.prefix}receive"

    @property
    def intake(self) -> str:
        """Account that looks into what hospitals sent, and owns nothing."""
        return "kakehashi-intake" if self.prefix == "k" else f"{self.prefix}intake"

    @property
    def view_group(self) -> str:
        """Group of all view accounts; packs are readable by it."""
        return f"{self.prefix}view"

    @property
    def work_group(self) -> str:
        """Group of all work accounts."""
        return f"{self.prefix}work"

    def view(self, project: str) -> str:
        """View account of a project."""
        return self._account("v", project)

    def work(self, project: str) -> str:
        """Work account of a project."""
        return self._account("w", project)

    def _account(self, letter: str, project: str) -> str:
        name = f"{self.prefix}{letter}-{project}"
        if len(name) > LONGEST_ACCOUNT:
            raise ConfigError(
                f"project {project!r}: its account would be {name!r}, {len(name)} characters; "
                f"Linux allows {LONGEST_ACCOUNT}. Shorten the project's id or "
                "store.account_prefix"
            )
        return name


def names(store: StoreHost) -> Names:
    """Return the account names of a configured store."""
    return Names(store.account_prefix)
