"""Content-addressed objects: ``objects/<sha256>`` in a local folder or behind any fsspec URL.

An object is written under a temporary name, read back where that is cheap, and only then moved to
its address, so what stands at an address is whole; what a killed writer leaves has a temporary
name and is swept up by ``gc``.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from samara.errors import RegistryError
from samara.runs import disk_error, hash_file

_CHUNK = 1 << 22


class ObjectStore:
    """A folder of objects.

    Args:
        location: A local folder, or a URL that fsspec opens (``s3://…``, ``gs://…``,
            ``memory://…``); made if it is not there.

    Raises:
        RegistryError: If the URL's protocol is unknown or its package is not installed.
    """

    def __init__(self, location: str) -> None:
        try:
            self._files, root = fsspec.core.url_to_fs(location)
        except (ValueError, ImportError) as error:
            raise RegistryError(f"{location}: cannot be opened as a registry ({error})") from None
        self._root = f"{root.rstrip('/')}/objects"
        self._files.makedirs(self._root, exist_ok=True)

    def put_file(self, path: Path, sha256: str) -> None:
        """Store a file under the hash it was found to have.

        Raises:
            RegistryError: If it changed since.
            ResourceError: If the disk is full.
        """
        with path.open("rb") as source:
            self._put(source, sha256, str(path))

    def put_bytes(self, data: bytes) -> str:
        """Store bytes and return their hash."""
        sha256 = hashlib.sha256(data).hexdigest()
        self._put(io.BytesIO(data), sha256, "object")
        return sha256

    def _put(self, source: BinaryIO, sha256: str, name: str) -> None:
        if self.exists(sha256):
            return
        staging = f"{self._root}/.{sha256}.{uuid.uuid4().hex}.tmp"
        digest = hashlib.sha256()
        try:
            with self._files.open(staging, "wb") as target:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
                if isinstance(self._files, LocalFileSystem):
                    target.flush()
                    os.fsync(target.fileno())
            if digest.hexdigest() != sha256:
                raise RegistryError(f"{name}: changed while it was added; add it again")
            self._files.mv(staging, self._path(sha256))
        except OSError as error:
            raise disk_error(Path(self._root), error) from error
        finally:
            if self._files.exists(staging):
                self._files.rm_file(staging)

    def get_bytes(self, sha256: str) -> bytes:
        """Read an object and check its hash.

        Raises:
            RegistryError: If it is missing or damaged.
        """
        try:
            data: bytes = self._files.cat_file(self._path(sha256))
        except FileNotFoundError:
            raise RegistryError(f"object {sha256[:12]}: is missing from {self._root}") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RegistryError(f"object {sha256[:12]}: is damaged; restore it from a copy")
        return data

    def get_file(self, sha256: str, path: Path) -> None:
        """Copy an object to a file and check its hash.

        Raises:
            RegistryError: If it is missing or damaged; the file is not whole then.
        """
        try:
            self._files.get_file(self._path(sha256), str(path))
        except FileNotFoundError:
            raise RegistryError(f"object {sha256[:12]}: is missing from {self._root}") from None
        if hash_file(path) != sha256:
            raise RegistryError(f"object {sha256[:12]}: is damaged; restore it from a copy")

    def check(self, sha256: str, num_bytes: int, *, full: bool) -> str | None:
        """Say what is wrong with an object, or None.

        Args:
            sha256: Its hash.
            num_bytes: Its size.
            full: Read and hash it, too.
        """
        if not self.exists(sha256):
            return "is missing"
        size = self._files.info(self._path(sha256))["size"]
        if size != num_bytes:
            return f"has {size} bytes, not {num_bytes}"
        if full and self._hash(sha256) != sha256:
            return "is damaged"
        return None

    def _hash(self, sha256: str) -> str:
        digest = hashlib.sha256()
        with self._files.open(self._path(sha256), "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def exists(self, sha256: str) -> bool:
        """Whether there is an object at an address."""
        found: bool = self._files.exists(self._path(sha256))
        return found

    def names(self) -> Iterator[str]:
        """Every object's hash, and the names of unfinished ones."""
        self._files.invalidate_cache()
        for entry in self._files.ls(self._root, detail=False):
            yield str(entry).rstrip("/").rsplit("/", 1)[-1]

    def age_seconds(self, name: str, now: float) -> float:
        """Seconds since a name was written; 0 where the store does not say."""
        info: dict[str, Any] = self._files.info(f"{self._root}/{name}")
        stamps = (info.get(key) for key in ("mtime", "created", "LastModified"))
        stamp = next((stamp for stamp in stamps if stamp is not None), now)
        # Local files give seconds, most other stores a date.
        return now - (stamp.timestamp() if isinstance(stamp, datetime.datetime) else stamp)

    def remove(self, name: str) -> int:
        """Remove an object, or an unfinished one; returns its size."""
        path = f"{self._root}/{name}"
        size = int(self._files.info(path)["size"])
        self._files.rm_file(path)
        return size

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256}"
