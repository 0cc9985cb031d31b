"""The authority's decisions alone: no network, no sshd, no root, and a clock of our own."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kakehashi import __version__
from kakehashi.audit import Audit, Record
from kakehashi.config import Config
from kakehashi.store.authority.authority import Authority
from kakehashi.store.authority.book import Book
from kakehashi.store.authority.ca import Keys, public_line
from kakehashi.store.authority.layout import Layout
from kakehashi.store.authority.models import GrantRequest, SessionRequest

if TYPE_CHECKING:
    from pathlib import Path

ANYWHERE = ["0.0.0.0/0", "::/0"]
START = 1_800_000_000.0
"""2027-01-15T08:00:00Z."""


class Desk:
    def __init__(self, root: Path, **limits: float) -> None:
        self.now = START
        self.layout = Layout(root)
        for folder in (self.layout.keys, self.layout.receipts, self.layout.hubs):
            folder.mkdir(parents=True)
        Keys.create(self.layout.keys)
        Book.create(self.layout.book).close()
        self.key = Ed25519PrivateKey.generate()
        self.root_key = Ed25519PrivateKey.generate()
        self.configure(limits=limits)
        for project in ("lung", "brain", "brief"):
            self.layout.view(project).mkdir(parents=True)
            manifest = {"files": [{"path": "a"}, {"path": "b"}]}
            (self.layout.view(project) / "manifest.json").write_text(json.dumps(manifest))

    def configure(self, **changes: Any) -> None:
        """Start the authority anew, with a changed configuration."""
        self.config = Config.model_validate(
            {
                "store": {
                    "root": self.layout.root,
                    "address": "store.test",
                    "account_prefix": "k",
                    "audit_anchors": [self.layout.root / "anchor"],
                    "limits": changes.get("limits", {}),
                    "sites": changes.get("sites", {}),
                },
                "projects": changes.get(
                    "projects",
                    [
                        project("lung", "2099-01-01", ("here", "scanned")),
                        project("brain", "2099-01-01"),
                        project("brief", "2027-01-15"),
                        project("old", "2027-01-14"),
                    ],
                ),
            }
        )
        self.authority = Authority(self.config, self._clock)

    def with_epilog(self) -> None:
        """Have a site ``scanned`` whose root is a witness."""
        key = public_line(self.root_key.public_key())
        self.configure(
            sites={
                "here": {"addresses": ANYWHERE},
                "scanned": {"addresses": ANYWHERE, "witness_key": key},
            }
        )

    def _clock(self) -> float:
        return self.now

    def create(self, hub: str = "hub", **changes: Any) -> dict[str, Any]:
        body = {
            "person": "alice",
            "groups": ["g-lung", "g-brief", "g-old"],
            "project": "lung",
            "site": "here",
            "kind": "interactive",
            "hours": 1,
            "software": __version__,
        }
        request = SessionRequest.model_validate_json(json.dumps({**body, **changes}))
        return self.authority.create(hub, request)

    def grant(self, created: dict[str, Any], hub: str = "hub", **changes: Any) -> dict[str, Any]:
        body = {
            "session": created["session"],
            "ticket": created["ticket"],
            "public_key": public_line(self.key.public_key()),
            "host": "node1",
            "address": "192.0.2.1",
            "job": "7",
            "walls": "namespaces",
            "software": __version__,
        }
        request = GrantRequest.model_validate_json(json.dumps({**body, **changes}))
        return self.authority.grant(hub, request)

    def granted(self, **changes: Any) -> str:
        created = self.create(**changes)
        self.grant(created)
        return str(created["session"])

    def signed(
        self, message: dict[str, Any] | str, key: Ed25519PrivateKey | None = None
    ) -> tuple[str, str]:
        text = message if isinstance(message, str) else json.dumps(message)
        return text, base64.b64encode((key or self.key).sign(text.encode())).decode()

    def renew(self, session: str, counter: int, hub: str = "hub") -> dict[str, Any]:
        return self.authority.renew(
            hub, session, *self.signed({"renew": session, "counter": counter})
        )

    def witness(
        self, message: dict[str, Any], key: Ed25519PrivateKey | None = None, site: str = "scanned"
    ) -> dict[str, Any]:
        return self.authority.witness("hub", site, *self.signed(message, key or self.root_key))

    def records(self, session: str | None = None) -> list[Record]:
        found = Audit(self.layout.audit).records()
        return [record for record in found if session in {None, record.session}]

    def kinds(self, session: str | None = None) -> list[str]:
        return [record.kind for record in self.records(session)]


def project(name: str, expires: str, sites: tuple[str, ...] = ("here",)) -> dict[str, Any]:
    return {
        "id": name,
        "title": name.title(),
        "purpose": "A test",
        "approval": "2026-1",
        "expires": expires,
        "groups": [f"g-{name}"],
        "sites": list(sites),
    }
