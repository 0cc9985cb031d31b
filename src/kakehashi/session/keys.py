"""The session's Ed25519 key, in memory only, by the system's libcrypto."""

from __future__ import annotations

import base64
import ctypes
import functools
import os
import struct

from kakehashi.errors import SessionError

ALGORITHM = "ssh-ed25519"
CERTIFICATE_ALGORITHM = "ssh-ed25519-cert-v01@openssh.com"
_LIBRARIES = ("libcrypto.so.3", "libcrypto.so.1.1")
_EVP_PKEY_ED25519 = 1087
_SEED, _PUBLIC, _SIGNATURE = 32, 32, 64


@functools.cache
def _libcrypto() -> ctypes.CDLL:
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        for function, result, arguments in (
            ("EVP_PKEY_new_raw_private_key", pointer, (ctypes.c_int, pointer, pointer, size)),
            ("EVP_PKEY_get_raw_public_key", ctypes.c_int, (pointer, pointer, pointer)),
            ("EVP_PKEY_free", None, (pointer,)),
            ("EVP_MD_CTX_new", pointer, ()),
            ("EVP_MD_CTX_free", None, (pointer,)),
            ("EVP_DigestSignInit", ctypes.c_int, (pointer, pointer, pointer, pointer, pointer)),
            ("EVP_DigestSign", ctypes.c_int, (pointer, pointer, pointer, pointer, size)),
            ("OPENSSL_cleanse", None, (pointer, size)),
        ):
            entry = getattr(library, function)
            entry.restype = result
            entry.argtypes = arguments
        return library
    raise SessionError(
        f"this node has none of {', '.join(_LIBRARIES)}; install OpenSSL 1.1.1 or newer"
    )


class SigningKey:
    """A key pair that never leaves this process and cannot be copied.

    Parameters
    ----------
    seed : bytes, optional
        The private key, 32 bytes; a new one is made where it is left out.

    Attributes
    ----------
    public : bytes
        The public key, 32 bytes.

    Raises
    ------
    SessionError
        There is no libcrypto, or it has no Ed25519.
    ValueError
        The seed has another length.
    """

    def __init__(self, seed: bytes | None = None) -> None:
        if seed is not None and len(seed) != _SEED:
            raise ValueError(f"a seed has {_SEED} bytes")
        library = _libcrypto()
        buffer = ctypes.create_string_buffer(os.getrandom(_SEED) if seed is None else seed, _SEED)
        try:
            self._key: int | None = library.EVP_PKEY_new_raw_private_key(
                _EVP_PKEY_ED25519, None, buffer, _SEED
            )
        finally:
            library.OPENSSL_cleanse(buffer, _SEED)
        if not self._key:
            raise SessionError("this node's libcrypto makes no Ed25519 keys (FIPS mode?)")
        public = ctypes.create_string_buffer(_PUBLIC)
        length = ctypes.c_size_t(_PUBLIC)
        if library.EVP_PKEY_get_raw_public_key(self._key, public, ctypes.byref(length)) != 1:
            raise SessionError("libcrypto gives no public key")
        self.public = public.raw

    def sign(self, data: bytes) -> bytes:
        """Return the signature over ``data``, 64 bytes.

        Raises
        ------
        SessionError
            The key was wiped before, or libcrypto failed.
        """
        if self._key is None:
            raise SessionError("the session's key is wiped")
        library = _libcrypto()
        context = library.EVP_MD_CTX_new()
        signature = ctypes.create_string_buffer(_SIGNATURE)
        length = ctypes.c_size_t(_SIGNATURE)
        try:
            if (
                library.EVP_DigestSignInit(context, None, None, None, self._key) != 1
                or library.EVP_DigestSign(context, signature, ctypes.byref(length), data, len(data))
                != 1
            ):
                raise SessionError("libcrypto could not sign")
        finally:
            library.EVP_MD_CTX_free(context)
        return signature.raw

    def wipe(self) -> None:
        """Overwrite and free the private part; a second call does nothing."""
        if self._key is not None:
            _libcrypto().EVP_PKEY_free(self._key)
            self._key = None

    def __repr__(self) -> str:
        return "SigningKey(***)"

    def __reduce__(self) -> str:
        raise TypeError("a SigningKey cannot be pickled")


def pack(*parts: bytes) -> bytes:
    """Return SSH strings: each part with its length (4 bytes, big-endian) in front."""
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


class WireError(SessionError):
    """Bytes are not what the SSH wire format says."""


class Reader:
    """Takes SSH values from the front of some bytes.

    Raises
    ------
    WireError
        By each method, where the bytes end too early.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        """Take ``count`` bytes."""
        if count > len(self._data) - self._at:
            raise WireError(f"SSH data ends {count} bytes too early")
        part = self._data[self._at : self._at + count]
        self._at += count
        return part

    def byte(self) -> int:
        """Take one byte."""
        return self.take(1)[0]

    def integer(self) -> int:
        """Take a 32-bit number."""
        return int.from_bytes(self.take(4), "big")

    def string(self) -> bytes:
        """Take a string with its length in front."""
        return self.take(self.integer())

    def rest(self) -> bytes:
        """Take all that is left."""
        return self.take(len(self._data) - self._at)


def public_blob(public: bytes) -> bytes:
    """Return the SSH form of a public key."""
    return pack(ALGORITHM.encode(), public)


def public_line(public: bytes) -> str:
    """Return a public key as one line of text, as in ``authorized_keys``, without comment."""
    return f"{ALGORITHM} {base64.b64encode(public_blob(public)).decode()}"


def certificate_blob(line: str, public: bytes) -> bytes:
    """Return the bytes of a certificate, if it is one for this key.

    Parameters
    ----------
    line : str
        ``ssh-ed25519-cert-v01@openssh.com BASE64``.
    public : bytes
        The public key that it must name.

    Raises
    ------
    SessionError
        It is of another kind, damaged, or for another key.
    """
    kind, _, encoded = line.partition(" ")
    try:
        blob = base64.b64decode(encoded.split(" ")[0], validate=True)
        reader = Reader(blob)
        inner = reader.string()
        reader.string()
        named = reader.string()
    except (ValueError, WireError):
        raise SessionError("the portal sent a damaged certificate") from None
    if kind != CERTIFICATE_ALGORITHM or inner != kind.encode() or named != public:
        raise SessionError("the portal sent a certificate that is not for this session's key")
    return blob
