"""The one tree of exceptions.

A message says what was wrong, what was expected and what to do about it. It never holds a
secret: a value of type :class:`kakehashi.secret.Secret` prints as stars.
"""

from __future__ import annotations


class KakehashiError(Exception):
    """Root of everything that Kakehashi raises on purpose."""


class ConfigError(KakehashiError):
    """A configuration file is missing, unreadable or breaks a rule."""


class StoreError(KakehashiError):
    """The store or its catalogue cannot do what was asked."""


class PackError(StoreError):
    """A series cannot be packed as one grid; the message is the reason that is kept."""


class LinkError(KakehashiError):
    """A read through the link failed."""


class BlockMismatchError(LinkError):
    """Bytes that came over the link are not the bytes that the manifest names."""


class LinkClosedError(LinkError):
    """The link is closed, and no further attempt is made to open it."""


class RefusedError(KakehashiError):
    """The authority (or the hub) refused a request.

    Attributes
    ----------
    code : str
        Short machine-readable reason, e.g. ``"replayed"``, ``"expired"``, ``"no-project"``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class SessionError(KakehashiError):
    """A session cannot be started, or could not be kept."""


class SiteError(KakehashiError):
    """A site's scheduler or transport did not answer, or refused."""


class AuditError(KakehashiError):
    """The audit trail or a receipt does not verify."""
