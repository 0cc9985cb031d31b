"""What hubs may ask, checked before anything else looks at it."""

from __future__ import annotations

import ipaddress
import json
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from kakehashi.config import ProjectId
from kakehashi.secret import Secret

MAX_BODY = 256 * 1024
"""Bytes that a request may have at most."""


def _printable(text: str) -> str:
    # Control characters could forge lines of logs and tables; surrogates cannot be written.
    if any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in text):
        raise ValueError("must not hold control characters")
    return text


def _lines(text: str) -> str:
    _printable(text.replace("\n", " ").replace("\t", " "))
    return text


def _address(text: str) -> str:
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return str(address)


def _secret(value: object) -> Secret:
    if not isinstance(value, str) or len(value) > 128:
        raise ValueError("must be a string of at most 128 characters")
    return Secret(value)


def _small(value: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(value)) > 8192:
        raise ValueError("must not have more than 8192 characters of JSON")
    _check_texts(value)
    return value


def _check_texts(value: object) -> None:
    if isinstance(value, str):
        _lines(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _printable(key)
            _check_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_texts(inner)


SessionId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Person = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]
Line = Annotated[str, Field(max_length=255), AfterValidator(_printable)]
Text = Annotated[str, Field(max_length=2000), AfterValidator(_lines)]
Groups = Annotated[frozenset[Line], Field(max_length=1000)]
Detail = Annotated[dict[str, Any], AfterValidator(_small)]
Ticket = Annotated[Secret, PlainValidator(_secret)]
Message = Annotated[str, Field(max_length=128 * 1024)]
Signature = Annotated[str, Field(max_length=128)]


class _Request(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True
    )


class ProjectsRequest(_Request):
    """``POST /v1/projects``."""

    groups: Groups


class SessionRequest(_Request):
    """``POST /v1/sessions``."""

    person: Person
    groups: Groups
    project: ProjectId
    site: Line
    kind: Literal["interactive"]
    hours: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    software: Line


class GrantRequest(_Request):
    """``POST /v1/grants``."""

    session: SessionId
    ticket: Ticket
    public_key: Annotated[str, Field(max_length=512)]
    host: Line
    address: Annotated[str, AfterValidator(_address)] | None
    job: Line
    walls: Literal["namespaces", "account"]
    software: Line


class LeaseRequest(_Request):
    """``POST /v1/leases``."""

    session: SessionId
    message: Message
    signature: Signature


class Item(_Request):
    """One thing that a witness looked for."""

    item: Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]
    result: Literal["gone", "left", "seen", "unknown"]
    detail: Text = ""


Items = Annotated[tuple[Item, ...], Field(min_length=1, max_length=64, strict=False)]


class WrapperReport(_Request):
    """``POST /v1/sessions/ID/report``, by the node's wrapper."""

    witness: Literal["wrapper"]
    message: Message
    signature: Signature


class WitnessRequest(_Request):
    """``POST /v1/witness``, by a site's root."""

    site: Line
    message: Message
    signature: Signature


class SiteMessage(_Request):
    """What a site's root signs after it has looked at a node, or to ask where to look.

    ``job`` and ``items`` go with ``site`` only.
    """

    witness: Literal["site", "pending"]
    site: Line
    host: Line
    job: Line | None = None
    items: Items | None = None


class StatesRequest(_Request):
    """``POST /v1/sessions/states``."""

    sessions: Annotated[frozenset[SessionId], Field(max_length=10_000)]


class EndingRequest(_Request):
    """``POST /v1/sessions/ID/ending``."""

    reason: Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_printable)]
    grace_s: Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)]


class EndRequest(_Request):
    """``POST /v1/sessions/ID/end``."""

    reason: Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_printable)]
    scheduler: Detail | None = None


class RevokeRequest(_Request):
    """``POST /v1/sessions/ID/revoke``."""

    by: Person
    reason: Line


class AuditRequest(_Request):
    """``POST /v1/audit``."""

    kind: Annotated[str, Field(pattern="^[a-z][a-z0-9-]*([.][a-z0-9-]+)*$", max_length=64)]
    person: Person | None = None
    detail: Detail = {}


class RenewMessage(_Request):
    """What the node signs to renew its lease."""

    renew: SessionId
    counter: Annotated[int, Field(ge=1, lt=2**63)]


class ReportMessage(_Request):
    """What the node signs to report."""

    report: SessionId
    items: Items
