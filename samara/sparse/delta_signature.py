"""Signatures of delta files: who stands behind the weights, and behind what the record claims.

A detached file, ``NAME.sdelta.sig``, so that a delta keeps its one spelling. Signed with Ed25519
(RFC 8032) are the delta's id and the SHA-256 of its whole record: the id alone would leave scores,
audits and licence free to be rewritten. The record holds the hash of the data, so every byte of the
file stands under the signature. Keys are PEM or OpenSSH files, as ``ssh-keygen -t ed25519`` makes.
Imports no torch.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from samara.config import Config
from samara.errors import ConfigError, SignatureRefused
from samara.runs import hash_json, write_json
from samara.sparse.delta_data import DeltaData

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SUFFIX = ".sig"
PURPOSE = b"sdelta signature 1\n"
"""Stands before what is signed, so that no signature made for something else fits here."""


class Signature(Config):
    """The content of a signature file."""

    schema_: Literal[1] = Field(alias="schema")
    algorithm: Literal["ed25519"]
    delta_id: str
    record_sha256: str
    public_key: str
    """Base64 of the signer's 32 bytes; says who claims it, and proves nothing by itself."""
    signature: str
    """Base64 of 64 bytes."""


def signature_path(delta: Path) -> Path:
    """Where the signature of a delta file lies if it is not told."""
    return delta.with_name(delta.name + SUFFIX)


def sign(delta: DeltaData, key: Path, out: Path) -> str:
    """Sign a delta; returns the fingerprint of the signer's public key.

    Raises:
        ConfigError: If the key cannot be read, or is of another kind.
    """
    private = _private_key(key)
    public = private.public_key().public_bytes_raw()
    signature = Signature(
        schema=1,
        algorithm="ed25519",
        delta_id=delta.id,
        record_sha256=_record_hash(delta),
        public_key=_text(public),
        signature=_text(private.sign(_message(delta))),
    )
    write_json(out, signature.model_dump(mode="json", by_alias=True))
    return fingerprint(public)


def verify_signature(delta: DeltaData, signature: Path, key: Path) -> str:
    """Check that the owner of a key signed this delta with this record.

    Args:
        delta: The delta, read and checked.
        signature: The signature file.
        key: The signer's public key, from a source that is trusted.

    Returns:
        The key's fingerprint.

    Raises:
        SignatureRefused: If the signature is missing, damaged, of another delta or record, or made
            with another key.
        ConfigError: If the key cannot be read, or is of another kind.
    """
    from cryptography.exceptions import InvalidSignature

    public = _public_key(key)
    found = _read(signature)
    if found.delta_id != delta.id:
        raise SignatureRefused(
            f"{signature}: signs delta {found.delta_id[:12]}, this is {delta.id[:12]}"
        )
    if found.record_sha256 != _record_hash(delta):
        raise SignatureRefused(
            f"{signature}: the record (scores, audits, licence, origin) is not the one that was "
            "signed; fetch delta and signature again"
        )
    own = public.public_bytes_raw()
    try:
        public.verify(base64.b64decode(found.signature, validate=True), _message(delta))
    except (InvalidSignature, binascii.Error):
        is_other = found.public_key != _text(own)
        why = f"was made with another key than {key}" if is_other else "is damaged or forged"
        raise SignatureRefused(f"{signature}: {why}") from None
    return fingerprint(own)


def fingerprint(public: bytes) -> str:
    """A short name of a public key, to be read out and compared."""
    return f"SHA256:{_text(hashlib.sha256(public).digest()).rstrip('=')}"


def _message(delta: DeltaData) -> bytes:
    return PURPOSE + f"{delta.id}\n{_record_hash(delta)}\n".encode()


def _record_hash(delta: DeltaData) -> str:
    """SHA-256 of the canonical record, as the file states it."""
    return hash_json(delta.record.model_dump(mode="json"))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _read(path: Path) -> Signature:
    try:
        return Signature.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise SignatureRefused(f"{path}: no such signature; the delta is unsigned") from None
    except (ValueError, ValidationError):
        raise SignatureRefused(f"{path}: is no signature file, or damaged") from None


# --- keys -----------------------------------------------------------------------------------------


def _private_key(path: Path) -> Ed25519PrivateKey:
    serialization = _serialization()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data = _key_bytes(path)
    is_ssh = b"OPENSSH PRIVATE KEY" in data
    load: Any = serialization.load_ssh_private_key if is_ssh else serialization.load_pem_private_key
    key = _load(path, lambda: load(data, password=None), "private")
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"--key {path}: is no Ed25519 key; make one: ssh-keygen -t ed25519")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    serialization = _serialization()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    data = _key_bytes(path)
    is_ssh = data.startswith(b"ssh-")
    load: Any = serialization.load_ssh_public_key if is_ssh else serialization.load_pem_public_key
    key = _load(path, lambda: load(data), "public")
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"--key {path}: is no Ed25519 key, the only kind that signs deltas")
    return key


def _load(path: Path, load: Any, kind: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load()
    except TypeError:  # a passphrase is needed
        raise ConfigError(
            f"--key {path}: is locked by a passphrase; give one without (ssh-keygen -p -f {path})"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"--key {path}: is no {kind} key in PEM or OpenSSH form") from None


def _key_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--key {path}: cannot be read ({error.strerror})") from None


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise ConfigError(
            "--key: signatures need the package cryptography; pip install 'samara[sign]'"
        ) from None
    return serialization
