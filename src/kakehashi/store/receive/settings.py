"""Who may send, and how the receiver listens: ``store.receive`` of ``kakehashi.toml``."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text))


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


AeTitle = Annotated[str, Field(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]
Facility = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sender(_Model):
    """A hospital's devices, by what they call themselves and from where they call."""

    facility: Facility = Field(description="The hospital, by the store's name for it.")
    ae_titles: frozenset[AeTitle] = Field(min_length=1, description="Calling AE titles.")
    addresses: tuple[Annotated[str, AfterValidator(_network)], ...] = Field(
        min_length=1, description="Networks (CIDR) from which they call."
    )


class Receive(_Model):
    """The DICOM receiver."""

    bind: str = "0.0.0.0"  # noqa: S104 - nobody but the senders is let in
    port: Annotated[int, Field(ge=1, le=65535)] = 11112
    ae_title: AeTitle = Field(default="KAKEHASHI", description="What senders must call.")
    tls_key: Annotated[Path, AfterValidator(_absolute)] | None = None
    tls_cert: Annotated[Path, AfterValidator(_absolute)] | None = None
    tls_client_ca: Annotated[Path, AfterValidator(_absolute)] | None = Field(
        default=None, description="CA of the senders' certificates; each sender then needs one."
    )
    max_associations: int = Field(default=32, ge=1, le=512)
    idle_s: float = Field(
        default=60,
        gt=0,
        le=3600,
        description="An association that in this time brings neither 256 KiB nor a whole message "
        "is ended.",
    )
    facility_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of max_associations that one hospital may have at once; at least one.",
    )
    max_object_mb: int = Field(
        default=4096, ge=1, description="Largest object; a larger one is refused (A700)."
    )
    reserve_mb: int = Field(
        default=1024,
        ge=0,
        description="What stays free on the disk: with less, objects are refused (A700).",
    )
    quarantine_mb: int = Field(
        default=10240,
        ge=0,
        description="What may lie in quarantine: beyond it, what belongs there is refused (A700).",
    )
    memory_mb: int = Field(
        default=512, ge=64, description="What one association may take beyond the listener's own."
    )
    stop_s: float = Field(
        default=20, gt=0, le=600, description="What running transfers get when the receiver stops."
    )
    quiet_minutes: float = Field(
        default=10,
        gt=0,
        le=24 * 60,
        description="A series without a new object for so long counts as complete, and is packed, "
        "where nobody said how many objects it has.",
    )
    patience_hours: float = Field(
        default=24,
        gt=0,
        le=24 * 30,
        description="So long after its newest object a series of which something is missing is "
        "packed all the same, or kept where it cannot be.",
    )
    senders: tuple[Sender, ...] = Field(
        default=(), description="All who may send; nobody else is answered."
    )

    @property
    def max_of_one_facility(self) -> int:
        """Associations that one hospital may have at once."""
        return max(1, int(self.max_associations * self.facility_share))

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_key is None) != (self.tls_cert is None):
            raise ValueError("tls_key and tls_cert go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_key and tls_cert")
        return self

    @model_validator(mode="after")
    def _one_hospital_for_each_caller(self) -> Self:
        for number, one in enumerate(self.senders):
            for other in self.senders[:number]:
                if one.facility != other.facility and _meet(one, other):
                    raise ValueError(
                        f"senders: {one.facility!r} and {other.facility!r} share an AE title and "
                        "an address; whose an object is could not be told"
                    )
        return self


def _meet(one: Sender, other: Sender) -> bool:
    if not one.ae_titles & other.ae_titles:
        return False
    pairs = (
        (ipaddress.ip_network(a), ipaddress.ip_network(b))
        for a in one.addresses
        for b in other.addresses
    )
    return any(a.version == b.version and a.overlaps(b) for a, b in pairs)
