"""Signatures: weights and record stand under them, and only the right key opens."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from samara.errors import ConfigError, SignatureRefused
from samara.registry.records import Audit, License
from samara.sparse.delta import Delta, make_delta
from samara.sparse.delta_records import Provenance
from samara.sparse.delta_signature import fingerprint, sign, signature_path, verify_signature

ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
PRIVATE, PUBLIC = serialization.PrivateFormat, serialization.PublicFormat
PEM, SSH = serialization.Encoding.PEM, serialization.Encoding.OpenSSH
OPEN = serialization.NoEncryption()


def write_keys(folder: Path, name: str, *, form: str = "pem") -> tuple[Path, Path, Any]:
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = folder / name, folder / f"{name}.pub"
    if form == "pem":
        private.write_bytes(key.private_bytes(PEM, PRIVATE.PKCS8, OPEN))
        public.write_bytes(key.public_key().public_bytes(PEM, PUBLIC.SubjectPublicKeyInfo))
    else:
        private.write_bytes(key.private_bytes(PEM, PRIVATE.OpenSSH, OPEN))
        public.write_bytes(key.public_key().public_bytes(SSH, PUBLIC.OpenSSH))
    return private, public, key


def delta(**records: Any) -> Delta:
    base = {"w": torch.zeros(8, 4)}
    return make_delta(base, {"w": torch.eye(8, 4)}, records=Provenance(created="now", **records))


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Delta, Path, Path]:
    """A delta, its signature, and the public key."""
    made = delta(license=License(redistribution="internal"))
    private, public, _ = write_keys(tmp_path, "key")
    sign(made, private, tmp_path / "x.sig")
    return made, tmp_path / "x.sig", public


@pytest.mark.parametrize("form", ["pem", "ssh"])
def test_the_right_key_opens(tmp_path, form):
    private, public, key = write_keys(tmp_path, "key", form=form)
    made = delta()
    made.save(tmp_path / "x.sdelta")
    path = signature_path(tmp_path / "x.sdelta")
    assert path.name == "x.sdelta.sig"
    said = sign(made, private, path)
    assert said == fingerprint(key.public_key().public_bytes_raw())
    assert verify_signature(Delta.load(tmp_path / "x.sdelta"), path, public) == said


def test_another_key_does_not(signed, tmp_path):
    made, path, _ = signed
    _, other, _ = write_keys(tmp_path, "other")
    with pytest.raises(SignatureRefused, match=r"was made with another key than .*other\.pub"):
        verify_signature(made, path, other)
    # Nor does writing the other's name into the signature.
    content = json.loads(path.read_text())
    key = serialization.load_pem_public_key(other.read_bytes())
    content["public_key"] = base64.b64encode(key.public_bytes_raw()).decode()
    path.write_text(json.dumps(content))
    with pytest.raises(SignatureRefused, match="is damaged or forged"):
        verify_signature(made, path, other)


def test_other_weights_and_another_record_are_refused(signed):
    made, path, public = signed
    base = {"w": torch.zeros(8, 4)}
    other = make_delta(base, {"w": 2 * torch.eye(8, 4)}, records=Provenance(created="now"))
    with pytest.raises(SignatureRefused, match=r"signs delta .*, this is"):
        verify_signature(other, path, public)
    for records in (
        {"license": License(redistribution="allowed")},
        {
            "license": License(redistribution="internal"),
            "audit": [Audit(suite="bias", verdict="pass")],
        },
    ):
        forged = delta(**records)
        assert forged.id == made.id, "the id says nothing about the record"
        with pytest.raises(SignatureRefused, match="is not the one that was signed"):
            verify_signature(forged, path, public)


def test_claims_in_the_signature_file_are_not_believed(signed):
    made, path, public = signed
    forged = delta(license=License(redistribution="allowed"))
    content = json.loads(path.read_text())
    sign_of_forged = path.with_name("forged.sig")
    private, _, _ = write_keys(path.parent, "mine")
    sign(forged, private, sign_of_forged)
    hashes = json.loads(sign_of_forged.read_text())
    content["record_sha256"] = hashes["record_sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(SignatureRefused, match="is damaged or forged"):
        verify_signature(forged, path, public)
    assert made.id == forged.id


@pytest.mark.parametrize("field", ["signature", "public_key", "delta_id", "record_sha256"])
def test_a_changed_signature_file_is_refused(signed, field):
    made, path, public = signed
    content = json.loads(path.read_text())
    first = "A" if content[field][0] != "A" else "B"
    content[field] = first + content[field][1:]
    path.write_text(json.dumps(content))
    if field == "public_key":  # a hint: the key that was given decides
        assert verify_signature(made, path, public)
        return
    with pytest.raises(SignatureRefused):
        verify_signature(made, path, public)


def test_missing_and_broken_files_are_one_clear_line(signed, tmp_path):
    made, path, public = signed
    with pytest.raises(SignatureRefused, match="no such signature; the delta is unsigned"):
        verify_signature(made, tmp_path / "none.sig", public)
    path.write_text('{"schema": 1}')
    with pytest.raises(SignatureRefused, match="is no signature file, or damaged"):
        verify_signature(made, path, public)
    for key, message in ((tmp_path / "none", "cannot be read"), (path, "is no public key in PEM")):
        with pytest.raises(ConfigError, match=message):
            verify_signature(made, path, key)
    with pytest.raises(ConfigError, match="is no private key in PEM or OpenSSH form"):
        sign(made, public, tmp_path / "y.sig")
    locked = tmp_path / "locked"
    lock = serialization.BestAvailableEncryption(b"secret")
    key = ed25519.Ed25519PrivateKey.generate()
    locked.write_bytes(key.private_bytes(PEM, PRIVATE.PKCS8, lock))
    with pytest.raises(ConfigError, match="is locked by a passphrase"):
        sign(made, locked, tmp_path / "y.sig")
    other = tmp_path / "ec"
    ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    curve = ec.generate_private_key(ec.SECP256R1())
    other.write_bytes(curve.private_bytes(PEM, PRIVATE.PKCS8, OPEN))
    with pytest.raises(ConfigError, match="is no Ed25519 key"):
        sign(made, other, tmp_path / "y.sig")


def test_the_commands(tmp_path):
    private, public, _ = write_keys(tmp_path, "key")
    delta().save(tmp_path / "x.sdelta")
    code = (
        "import sys, samara.cli\n"
        "sys.argv = ['samara', 'delta', *sys.argv[1:]]\n"
        "samara.cli.main()\n"
        "assert 'torch' not in sys.modules\n"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    refused = run("verify", "x.sdelta", "--key", str(public))
    assert refused.returncode == 2
    assert "the delta is unsigned" in refused.stderr
    signed = run("sign", "x.sdelta", "--key", str(private))
    assert signed.returncode == 0, signed.stderr
    assert "x.sdelta.sig: signed by SHA256:" in signed.stdout
    verified = run("verify", "x.sdelta", "--key", str(public))
    assert "data and record signed by SHA256:" in verified.stdout
    without = run("verify", "x.sdelta", "--signature", "x.sdelta.sig")
    assert without.returncode == 2
    assert "name it with --key" in without.stderr
