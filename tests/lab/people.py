"""The people of lab and demo: accounts at the identity provider and at the sites."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Person:
    """One person: name and groups at the identity provider, local account at a site."""

    name: str
    full_name: str
    groups: tuple[str, ...]
    account: str | None
    shows: str

    @property
    def password(self) -> str:
        """A password for demonstrations; the provider of lab and demo is not a real one."""
        return f"{self.name}-demo"

    def at_provider(self) -> dict[str, object]:
        """Return the person's entry in the provider's accounts file."""
        return {
            "password": self.password,
            "name": self.full_name,
            "email": f"{self.name}@example.ac.jp",
            "groups": list(self.groups),
            "blocked": False,
            "mfa": False,
        }


PEOPLE = (
    Person("tanaka", "田中 花子", ("lung-ct",), "ka0001", "researcher in one project"),
    Person("suzuki", "鈴木 一郎", ("lung-ct", "brain-mr"), "ka0002", "researcher in two projects"),
    Person("sato", "佐藤 美咲", ("sarcoma-review",), "ka0003", "reviewer"),
    Person("yamada", "山田 太郎", ("portal-admins",), "ka0004", "administrator, sees Arrivals"),
    Person("canary", "カナリア", ("canary",), "ka0005", "by whom operators verify a site"),
    Person("kimura", "木村 健", (), None, "no project"),
)
