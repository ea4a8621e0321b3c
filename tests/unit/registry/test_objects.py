"""Objects: whole or not there, in a folder and behind a URL."""

from __future__ import annotations

import errno
import hashlib
import time
import uuid

import pytest

from samara.errors import RegistryError, ResourceError
from samara.registry.objects import ObjectStore


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path):
    return ObjectStore(
        str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}"
    )


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_what_is_put_is_got_and_kept_once(store, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10_000)
    store.put_file(path, sha(path.read_bytes()))
    assert store.put_bytes(b"x" * 10_000) == sha(path.read_bytes())
    assert list(store.names()) == [sha(path.read_bytes())]
    store.get_file(sha(path.read_bytes()), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    assert store.get_bytes(sha(path.read_bytes())) == path.read_bytes()
    assert store.check(sha(path.read_bytes()), 10_000, full=True) is None
    assert 0 <= store.age_seconds(sha(path.read_bytes()), time.time()) < 60
    assert store.remove(sha(path.read_bytes())) == 10_000
    assert not store.exists(sha(path.read_bytes()))


def test_a_file_that_changes_meanwhile_is_not_stored(store, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"new")
    with pytest.raises(RegistryError, match="changed while it was added; add it again"):
        store.put_file(path, sha(b"old"))
    assert list(store.names()) == []


def test_missing_and_damaged_objects_are_named(store, tmp_path):
    good = store.put_bytes(b"good")
    with pytest.raises(RegistryError, match="is missing from"):
        store.get_bytes("0" * 64)
    with pytest.raises(RegistryError, match="is missing from"):
        store.get_file("0" * 64, tmp_path / "x")
    store._files.pipe_file(store._path(good), b"evil")
    with pytest.raises(RegistryError, match="is damaged"):
        store.get_bytes(good)
    with pytest.raises(RegistryError, match="is damaged"):
        store.get_file(good, tmp_path / "x")
    assert store.check(good, 4, full=False) is None
    assert store.check(good, 4, full=True) == "is damaged"
    assert store.check(good, 5, full=False) == "has 4 bytes, not 5"
    assert store.check("0" * 64, 5, full=False) == "is missing"


def test_a_torn_write_leaves_no_object(tmp_path, monkeypatch):
    store = ObjectStore(str(tmp_path / "store"))

    def no_space(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(ResourceError, match="the disk is full"):
        store.put_bytes(b"data")
    assert list(store.names()) == []


def test_unknown_protocols_are_refused():
    with pytest.raises(RegistryError, match="cannot be opened as a registry"):
        ObjectStore("nonsense://bucket")
