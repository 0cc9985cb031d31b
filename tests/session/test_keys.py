"""The key made by libcrypto, held against an independent implementation and real ssh-keygen."""

from __future__ import annotations

import base64
import pickle
import subprocess
from typing import TYPE_CHECKING

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.errors import SessionError
from kakehashi.session import keys

if TYPE_CHECKING:
    from pathlib import Path

KEY = keys.SigningKey()


@given(st.binary(max_size=4096))
def test_signatures_verify_elsewhere(data: bytes) -> None:
    public = Ed25519PublicKey.from_public_bytes(KEY.public)
    signature = KEY.sign(data)
    public.verify(signature, data)
    with pytest.raises(InvalidSignature):
        public.verify(signature, data + b"x")


def test_the_public_line_is_read_elsewhere() -> None:
    public = load_ssh_public_key(keys.public_line(KEY.public).encode())
    assert isinstance(public, Ed25519PublicKey)
    assert public.public_bytes_raw() == KEY.public


def test_a_wiped_key_signs_no_more() -> None:
    key = keys.SigningKey()
    key.wipe()
    key.wipe()
    with pytest.raises(SessionError, match="wiped"):
        key.sign(b"anything")


def test_a_key_is_not_shown_and_not_copied() -> None:
    assert repr(KEY) == "SigningKey(***)"
    with pytest.raises(TypeError):
        pickle.dumps(KEY)


@given(st.lists(st.binary(max_size=64), max_size=6))
def test_packed_strings_come_back(parts: list[bytes]) -> None:
    reader = keys.Reader(keys.pack(*parts))
    assert [reader.string() for _ in parts] == parts
    assert reader.rest() == b""


@given(st.binary(max_size=64))
def test_short_data_is_an_error_never_a_fact(data: bytes) -> None:
    reader = keys.Reader(data)
    try:
        part = reader.string()
    except keys.WireError:
        return
    assert len(part) == int.from_bytes(data[:4], "big")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("ca")
    make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "ca")]
    subprocess.run(make, check=True)
    (folder / "id.pub").write_text(keys.public_line(KEY.public) + "\n")
    sign = ["ssh-keygen", "-q", "-s", "ca", "-I", "x", "-n", "someone", "id.pub"]
    subprocess.run(sign, check=True, cwd=folder)
    return (folder / "id-cert.pub").read_text().strip()


def test_a_certificate_for_this_key_is_taken(certificate: str) -> None:
    blob = keys.certificate_blob(certificate, KEY.public)
    assert base64.b64decode(certificate.split()[1]) == blob


def test_a_certificate_for_another_key_is_refused(certificate: str) -> None:
    with pytest.raises(SessionError, match="not for this session's key"):
        keys.certificate_blob(certificate, keys.SigningKey().public)


@given(st.data())
def test_a_damaged_certificate_is_refused(certificate: str, data: st.DataObject) -> None:
    encoded = certificate.split()[1]
    end = data.draw(st.integers(0, 60))
    with pytest.raises(SessionError):
        keys.certificate_blob(f"{keys.CERTIFICATE_ALGORITHM} {encoded[:end]}", KEY.public)
