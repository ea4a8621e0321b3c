"""Random numbers that nobody can foresee, and that a run which goes on draws again.

A promise of differential privacy holds against who does not know the noise and who was drawn. So
both come from a key of 256 bits from the system's secure source, drawn once and kept on the disk of
whom it belongs to, readable by its owner alone:

    RUN/privacy/server.key            draws of clients, and noise on their sum
    RUN/privacy/client-00000012.key   draws of a client's rows, and noise in its training
    RUN/privacy/client-00000012.json  what its rows' budget was charged for

They outlast the removal of what a client keeps: a client that starts anew has the budget it had.

A stream is ChaCha20 (RFC 8439) under a key derived from that one by HKDF (RFC 5869) and a text that
names the purpose. The text of a noise also names *what it is added to*: the same sum gets the same
noise, so that a round which is done again after a crash releases nothing new; another sum, in the
same round of the same folder, gets noise of its own.

With ``randomness: reproducible`` the keys follow from the recipe's seed, which everybody can read.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samara.errors import CheckpointError, ConfigError
from samara.federated.accounting import Budget, Entry
from samara.federated.privacy_config import PrivacyConfig
from samara.runs import read_json, sync_folder, write_json

FOLDER = "privacy"
KEY_BYTES = 32


class Stream:
    """Random numbers of one key and purpose, in the order in which they are asked for."""

    def __init__(self, key: bytes, purpose: str) -> None:
        """Start.

        Args:
            key: Secret, 32 bytes.
            purpose: Two purposes share no numbers.
        """
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        # The key is used for this one stream: counter and nonce start at 0.
        cipher = Cipher(algorithms.ChaCha20(derive(key, purpose), bytes(16)), mode=None)
        self._encryptor = cipher.encryptor()

    def words(self, count: int) -> npt.NDArray[np.uint32]:
        """Whole numbers in [0, 2^32), all equally likely."""
        return np.frombuffer(self._encryptor.update(bytes(4 * count)), dtype="<u4")

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Numbers in (0, 1], all multiples of 2^-53."""
        raw = np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")
        return ((raw >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> npt.NDArray[np.float64]:
        """Numbers of the standard normal distribution (Box and Muller 1958).

        None is beyond 8.6: the part of the distribution that is missing weighs under 2^-52.
        """
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log(self.uniform(half)))
        angle = 2 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def derive(key: bytes, purpose: str) -> bytes:
    """A key of its own for a purpose."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = f"samara/federated/{purpose}".encode()
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(key)


class Secrets:
    """The keys of one run, and what its clients were charged for.

    Args:
        run: Its folder.
        privacy: Whether keys are secret.
        seed: Of the recipe; used by ``reproducible``.
    """

    def __init__(self, run: Path, privacy: PrivacyConfig, *, seed: int) -> None:
        self._folder, self._seed = run / FOLDER, seed
        self._is_secret = privacy.randomness == "secret"

    def server(self) -> bytes:
        """The server's key."""
        return self._key("server")

    def client(self, client: int) -> bytes:
        """A client's key."""
        return self._key(_name(client))

    def _key(self, owner: str) -> bytes:
        if not self._is_secret:
            return hashlib.sha256(f"reproducible/{self._seed}/{owner}".encode()).digest()
        path = self._folder / f"{owner}.key"
        if not path.exists():
            _write_new(path, secrets.token_bytes(KEY_BYTES))
        key = path.read_bytes()
        if len(key) != KEY_BYTES:
            raise CheckpointError(
                f"{path}: holds {len(key)} bytes, a key has {KEY_BYTES}; give another run folder: "
                "without the key the run cannot go on"
            )
        return key

    # --- what a client was charged for ------------------------------------------------------------

    def charged(self, client: int) -> list[Entry]:
        """What a client's budget was charged for, one entry a training."""
        return [(own["noise"], own["rate"], own["steps"]) for own in self._charges(client)]

    def charge(self, client: int, key: bytes, budget: Budget) -> bool:
        """Charge a client's budget, on disk, before anything is done; once for one training.

        Args:
            client: Its number.
            key: Of the training.
            budget: Of the client.

        Returns:
            Whether the training stays within the budget; if not, nothing is charged.
        """
        charges = self._charges(client)
        mark = hashlib.sha256(key).hexdigest()[:32]
        if any(own["training"] == mark for own in charges):
            return True
        if not budget.allows(1, past=self.charged(client)):
            return False
        noise, rate, steps = budget.entry(1)
        entry = {"training": mark, "noise": noise, "rate": rate, "steps": steps}
        write_json(self._folder / f"{_name(client)}.json", [*charges, entry])
        return True

    def _charges(self, client: int) -> list[dict[str, Any]]:
        path = self._folder / f"{_name(client)}.json"
        return list(read_json(path)) if path.exists() else []


def _name(client: int) -> str:
    return f"client-{client:08d}"


def _write_new(path: Path, data: bytes) -> None:
    """Write a file that its owner alone may read, whole or not at all; leave one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)  # of two at the same time, the first
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    sync_folder(path.parent)


def require_packages(privacy: PrivacyConfig) -> None:
    """Check that what the settings need is installed.

    Raises:
        ConfigError: If it is not.
    """
    try:
        if privacy.is_on:
            import cryptography  # noqa: F401
        if privacy.client or privacy.records:
            import opacus  # noqa: F401
    except ImportError:
        raise ConfigError(
            "privacy: needs the packages opacus and cryptography; pip install 'samara[privacy]', "
            "or leave it out"
        ) from None
