"""One spelling for each JSON value, so that a hash or signature over it means one thing."""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Any

from kakehashi.errors import AuditError

if TYPE_CHECKING:
    from collections.abc import Mapping


def canonical(value: Mapping[str, Any]) -> bytes:
    """Return the canonical JSON of an object: sorted keys, no spaces, UTF-8, one line.

    Raises
    ------
    AuditError
        The object holds something that JSON cannot say (NaN, bytes, a lone surrogate).
    """
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise AuditError(
            f"this cannot be recorded: {type(error).__name__}; only JSON values with valid "
            "Unicode text can stand in the audit trail"
        ) from error


def utc(seconds: float) -> str:
    """Return a time (seconds since 1970) in ISO 8601, UTC, whole milliseconds, with ``Z``."""
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    if moment.microsecond < 1000:
        return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
