"""Certificates for the connection between the proxy or hub and a person's server.

JupyterHub makes these before a job is queued, under a name that depends on the person only, and
leaves the private key in a file. Here one is made at enrolment, when the host is known, is good
for that session's time, and its key is never written at the hub.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kakehashi.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes

SKEW = dt.timedelta(minutes=5)


@dataclass(frozen=True)
class Issuer:
    """A certificate authority of the hub's internal TLS: PEM files of certificate and key."""

    certificate: Path
    key: Path

    def issue(self, session: str, hosts: Iterable[str], until: dt.datetime) -> tuple[Secret, str]:
        """Make a key pair for one session's server.

        Parameters
        ----------
        session : str
            Goes into the subject.
        hosts : iterable of str
            Names or addresses that the server is reached by; ``127.0.0.1`` and ``localhost``
            are added.
        until : datetime
            End of validity, with time zone.

        Returns
        -------
        (Secret, str)
            Private key and certificate, PEM. The certificate serves both as server and, towards
            the hub, as client.
        """
        issuer = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        issuer_key: CertificateIssuerPrivateKeyTypes = serialization.load_pem_private_key(  # type: ignore[assignment]
            self.key.read_bytes(), password=None
        )
        key = ec.generate_private_key(ec.SECP256R1())
        names = dict.fromkeys(["127.0.0.1", "localhost", *hosts])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"s-{session}")]))
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(dt.datetime.now(dt.UTC) - SKEW)
            .not_valid_after(until + SKEW)
            .add_extension(
                x509.SubjectAlternativeName([_name(name) for name in names]), critical=False
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .sign(issuer_key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        public = certificate.public_bytes(serialization.Encoding.PEM)
        return Secret(private.decode("ascii")), public.decode("ascii")


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
