"""Certificates and keys of a deployment, by the ``cryptography`` package that Flower brings along.

    tls/ca.crt  tls/ca.key                 the authority; nodes check the server by ca.crt
    tls/server.crt  tls/server.key         the server's, for the names by which nodes reach it
    nodes/client-3  nodes/client-3.pub     a node's key pair; the server registers the public one

A private key is readable by its owner alone, and never leaves the machine that it was made on: make
a node's on the node, and send the public one.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samara.errors import ConfigError
from samara.runs import write_bytes

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.crt", "server.key"
DAYS = 365


def make_certificates(folder: Path, *, hosts: Sequence[str], days: int = DAYS) -> None:
    """Make an authority and a server's certificate signed by it.

    Args:
        folder: Where the four files go.
        hosts: Names and IP addresses by which nodes reach the server.
        days: How long both are valid.

    Raises:
        ConfigError: If the folder holds an authority already, or there is no host.
    """
    _require_cryptography()
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if not hosts:
        raise ConfigError("--host: name the server as nodes reach it, by name or IP address")
    _refuse(folder / CA_KEY, "nodes trust it already; remove the folder to start over")
    names = [_name_of(host) for host in hosts]
    ca_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority = _certificate("Samara federation", ca_key, days=days)
    authority = authority.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    authority = authority.add_extension(_key_usage(signs_certificates=True), True)
    ca = authority.sign(ca_key, _sha256())
    server = _certificate(
        "Samara SuperLink", server_key, days=days, issuer=ca.subject, issuer_key=ca_key.public_key()
    )
    server = server.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    server = server.add_extension(_key_usage(signs_certificates=False), True)
    server = server.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    server = server.add_extension(x509.SubjectAlternativeName(names), False)
    write_bytes(folder / CA_CERTIFICATE, _pem(ca))
    write_bytes(folder / SERVER_CERTIFICATE, _pem(server.sign(ca_key, _sha256())))
    _write_private(folder / SERVER_KEY, server_key, openssh=False)
    _write_private(folder / CA_KEY, ca_key, openssh=False)


def make_node_key(path: Path) -> None:
    """Make a node's key pair: ``path`` and ``path.pub``.

    Raises:
        ConfigError: If there is a key already.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    _refuse(path, "it may be registered; give another path")
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_bytes(path.with_name(f"{path.name}.pub"), public + b"\n")
    _write_private(path, key, openssh=True)


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError(
            "certificates need the package cryptography; pip install 'samara[federated]'"
        ) from None


def _refuse(path: Path, why: str) -> None:
    if path.exists():
        raise ConfigError(f"{path}: holds a private key already, and {why}")


def _name_of(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _sha256() -> Any:
    from cryptography.hazmat.primitives.hashes import SHA256

    return SHA256()


def _certificate(
    name: str,
    key: EllipticCurvePrivateKey,
    *,
    days: int,
    issuer: x509.Name | None = None,
    issuer_key: Any = None,
) -> x509.CertificateBuilder:
    """A certificate to be signed, by its own key unless there is an issuer."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signed_by = key.public_key() if issuer_key is None else issuer_key
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signed_by), False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _write_private(path: Path, key: EllipticCurvePrivateKey, *, openssh: bool) -> None:
    """Write a private key that its owner alone can read, from the first byte on."""
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    form = PrivateFormat.OpenSSH if openssh else PrivateFormat.PKCS8
    data = key.private_bytes(Encoding.PEM, form, NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
