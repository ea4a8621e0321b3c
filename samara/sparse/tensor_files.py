"""A checkpoint folder's tensors where they lie in its safetensors files: read, hashed, patched.

Reads only headers and the entries asked for, so that a delta of a few million entries costs a few
million entries, whatever the size of the model. Types are safetensors' own (``BF16``), so a
checkpoint may hold tensors of any type.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samara.errors import CheckpointError, ShapeMismatch, TiedTensorDuplicate
from samara.model.interchange.hf_folder import weight_files
from samara.runs import hash_json, model_folder, read_json, write_json
from samara.sparse.delta_codec import Bits, Indices, Shape
from samara.sparse.delta_data import WORDS
from samara.sparse.tensor_bits import TensorDigest, tensors_root

_CHUNK = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies: in which file, from which byte, how many."""

    path: Path
    start: int
    size: int
    dtype: str
    shape: Shape


@dataclass(frozen=True, kw_only=True)
class FileEntries:
    """Entries of a stored tensor; :class:`samara.sparse.tensor_bits.Entries` on disk."""

    place: Place
    indices: Indices

    def read(self) -> Bits:
        """The bits now."""
        found: Bits = np.array(self._map("r")[self.indices])
        return found

    def write(self, bits: Bits) -> None:
        """Set the bits, and have them on the disk when this returns."""
        mapped = self._map("r+")
        mapped[self.indices] = bits
        mapped.flush()

    def _map(self, mode: str) -> np.memmap[Any, Any]:
        word = WORDS[self.place.dtype]
        mapped: np.memmap[Any, Any] = np.memmap(
            self.place.path,
            dtype=word,
            mode=mode,  # type: ignore[call-overload] # a literal in both callers
            offset=self.place.start,
            shape=(self.place.size // word.itemsize,),
        )
        return mapped


class CheckpointFiles:
    """The tensors of a model folder; a :class:`samara.sparse.tensor_bits.TensorSource`.

    Args:
        folder: A model folder, or the run folder that made it.

    Raises:
        CheckpointError: If it holds no whole safetensors checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        if not Path(folder).is_dir():
            raise CheckpointError(f"{folder}: no such folder; give a folder with a model")
        self.folder = model_folder(Path(folder))
        self.places: dict[str, Place] = {}
        for path, names in weight_files(self.folder).items():
            found = read_header(path)
            for name in names:
                if name not in found:
                    raise CheckpointError(f"{path}: does not hold {name}, which its index names")
            self.places |= found

    def __getitem__(self, name: str) -> Place:
        if name not in self.places:
            raise ShapeMismatch(f"{name}: {self.folder} has no such tensor; it holds another model")
        return self.places[name]

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self[name].shape

    def dtype(self, name: str) -> str:
        """Its type by safetensors' name."""
        return self[name].dtype

    def entries(self, name: str, indices: Indices) -> FileEntries:
        """Entries to read or write."""
        return FileEntries(place=self[name], indices=indices)

    def read(self, name: str, indices: Indices) -> Bits:
        """Its bits at flat positions."""
        return self.entries(name, indices).read()

    def digests(self, *, cached: bool = True) -> dict[str, TensorDigest]:
        """Content hashes of all tensors, a tied one once.

        Args:
            cached: Read only the files that changed since the last time.
        """
        found = cached_digests(self.folder, self.places) if cached else hash_places(self.places)
        duplicates = self._tied_duplicates(found)
        return {name: digest for name, digest in found.items() if name not in duplicates}

    def root(self, *, cached: bool = True) -> str:
        """Identity of the weights as they are now."""
        return tensors_root(self.digests(cached=cached))

    def check_not_tied(self, names: Sequence[str]) -> None:
        """Refuse to change one of two stored copies of a tied tensor.

        Raises:
            TiedTensorDuplicate: If one of ``names`` is stored twice.
        """
        for alias, name in self._tied_duplicates(cached_digests(self.folder, self.places)).items():
            if alias in names or name in names:
                raise TiedTensorDuplicate(
                    f"{self.folder}: stores {name} a second time as {alias}, though config.json "
                    "ties them; save the model again, so that it is stored once"
                )

    def _tied_duplicates(self, found: Mapping[str, TensorDigest]) -> dict[str, str]:
        """Copies of tied tensors that the files hold needlessly, to the name they stand under."""
        config = self.folder / "config.json"
        head = "lm_head.weight"
        if head not in found or not config.exists():
            return {}
        if read_json(config).get("tie_word_embeddings") is not True:
            return {}
        same = (name for name, digest in found.items() if name != head and digest == found[head])
        name = next(same, None)
        return {head: name} if name else {}


def read_header(path: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file lies.

    Raises:
        CheckpointError: If the file is damaged or cut short.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = {
            name: Place(
                path=path,
                start=8 + length + int(entry["data_offsets"][0]),
                size=int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); fetch it again") from None
    for name, place in places.items():
        word = WORDS.get(place.dtype)
        wrong_size = word and place.size != math.prod(place.shape) * word.itemsize
        if wrong_size or place.start + place.size > size:
            raise CheckpointError(f"{path}: damaged or cut short at {name}; fetch it again")
    return places


# --- hashes -----------------------------------------------------------------------------------


def cached_digests(folder: Path, places: Mapping[str, Place]) -> dict[str, TensorDigest]:
    """Content hashes of stored tensors.

    A file whose size, time of change and inode are those of the last time is not read again: a
    convenience, no proof (``samara delta verify --full`` reads everything).
    """
    cache = _cache_path(folder)
    known = read_json(cache) if cache.exists() else {}
    found: dict[str, dict[str, Any]] = {}
    for path in sorted({place.path for place in places.values()}):
        stamp = _stamp(path)
        entry = known.get(path.name, {})
        if entry.get("stamp") != stamp:
            own = {name: place for name, place in places.items() if place.path == path}
            hashes = {name: asdict(digest) for name, digest in hash_places(own).items()}
            entry = {"stamp": stamp, "tensors": hashes}
        found[path.name] = entry
    if found != known:
        write_json(cache, found)
    return {
        name: TensorDigest(dtype=d["dtype"], shape=tuple(d["shape"]), sha256=d["sha256"])
        for entry in found.values()
        for name, d in entry["tensors"].items()
    }


def hash_places(places: Mapping[str, Place]) -> dict[str, TensorDigest]:
    """Read stored tensors and hash them, on several threads."""

    def digest(place: Place) -> TensorDigest:
        sha = hashlib.sha256()
        with place.path.open("rb") as file:
            file.seek(place.start)
            left = place.size
            while left:
                chunk = file.read(min(left, _CHUNK))
                sha.update(chunk)
                left -= len(chunk)
        return TensorDigest(dtype=place.dtype, shape=place.shape, sha256=sha.hexdigest())

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(places, threads.map(digest, places.values()), strict=True))


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _cache_path(folder: Path) -> Path:
    root = Path(os.environ.get("SAMARA_CACHE", "~/.cache/samara")).expanduser()
    return root / "digests" / f"{hash_json(str(folder.resolve()))}.json"
