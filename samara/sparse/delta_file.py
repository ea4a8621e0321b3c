"""Delta files (``.sdelta``): a safetensors container that has exactly one spelling.

The header's ``__metadata__`` holds one key, ``sdelta``: the record as canonical JSON, with
``record_sha256`` over itself. Each tensor has ``NAME.idx`` and ``NAME.val`` (and ``NAME.orig``
where an overwrite delta keeps the base's bits), bytes that :mod:`samara.sparse.delta_codec` reads.
Header and padding follow from the record and the sizes alone and are compared byte for byte, and
the data has a SHA-256 in the record: no byte can change, vanish or be added unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from samara.errors import CorruptDelta
from samara.runs import hash_json, write_bytes
from samara.sparse.delta_codec import (
    CodedIndices,
    CodedValues,
    decode_indices,
    decode_values,
    encode_indices,
    encode_values,
)
from samara.sparse.delta_data import FLOAT_BITS, WORDS, DeltaData, TensorDelta, delta_id
from samara.sparse.delta_records import Record, TensorRecord, ValueCodec

METADATA_KEY = "sdelta"
VALUE_CODECS: Mapping[str, ValueCodec] = {
    "ulp": "ulp_steps",
    "xor": "xor_bits",
    "overwrite": "abs_bits",
    "additive": "f32",
}
_MAX_HEADER = 100_000_000


# --- writing ----------------------------------------------------------------------------------


def delta_bytes(delta: DeltaData) -> bytes:
    """A delta as the content of a file; equal deltas give equal bytes."""
    records: list[TensorRecord] = []
    parts: dict[str, bytes] = {}
    for tensor in delta.tensors:
        tensor_record, data = _encode(tensor, VALUE_CODECS[delta.mode])
        records.append(tensor_record)
        parts |= data
    payload = b"".join(parts.values())
    record = delta.record.model_copy(
        update={"tensors": records, "payload_sha256": hashlib.sha256(payload).hexdigest()}
    )
    header = _header(record, {name: len(data) for name, data in parts.items()})
    return struct.pack("<Q", len(header)) + header + payload


def write_delta(delta: DeltaData, path: Path) -> None:
    """Write a delta file, whole or not at all.

    Raises:
        ResourceError: If the disk is full.
    """
    write_bytes(Path(path), delta_bytes(delta))


def _encode(tensor: TensorDelta, codec: ValueCodec) -> tuple[TensorRecord, dict[str, bytes]]:
    indices = encode_indices(tensor.indices, tensor.shape)
    values = encode_values(tensor.values)
    parts = {f"{tensor.name}.idx": indices.data, f"{tensor.name}.val": values.data}
    if tensor.original is not None:
        # Stored with the compression of the values: one field says how to read both.
        original = encode_values(tensor.original, comp=values.comp)
        parts[f"{tensor.name}.orig"] = original.data
    record = TensorRecord(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        nnz=tensor.nnz,
        idx_codec=indices.codec,
        idx_params=indices.params,
        val_codec=codec,
        comp=values.comp,
        sel_pre_xxh128=tensor.sel_pre,
        sel_post_xxh128=tensor.sel_post,
        tensor_pre_sha256=tensor.pre_sha256,
        tensor_post_sha256=tensor.post_sha256,
    )
    return record, parts


def _header(record: Record, sizes: Mapping[str, int]) -> bytes:
    """The safetensors header of a record and its parts, in the order they lie in the file."""
    content = record.model_dump(mode="json")
    text = _canonical({**content, "record_sha256": hash_json(content)})
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    offset = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return data + b" " * (-len(data) % 8)


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


# --- reading ----------------------------------------------------------------------------------


def read_delta(path: Path) -> DeltaData:
    """Read a delta file, and check all of it.

    Raises:
        CorruptDelta: If it is missing, cut short, changed, or of a version this one does not read.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorruptDelta(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return parse_delta(content)
    except CorruptDelta as error:
        raise CorruptDelta(f"{path}: {error}") from None


def read_record(path: Path) -> Record:
    """The record of a delta file, which is checked as a whole."""
    return read_delta(path).record


def parse_delta(content: bytes) -> DeltaData:
    """Read the content of a delta file, and check all of it.

    Raises:
        CorruptDelta: If anything about it is not as written.
    """
    header, payload = _split(content)
    record, sizes = _read_header(header)
    if hashlib.sha256(payload).hexdigest() != record.payload_sha256:
        raise CorruptDelta("the data is cut short or changed; fetch the file again")
    tensors, offset = [], 0
    parts = {}
    for name, size in sizes.items():
        parts[name] = payload[offset : offset + size]
        offset += size
    for tensor in record.tensors:
        tensors.append(_decode(tensor, parts, record))
    delta = DeltaData(record=record, tensors=tuple(tensors))
    expected = delta_id(
        mode=record.mode,
        tensors_root=record.base.tensors_root,
        parent=record.parent,
        tensors=delta.tensors,
    )
    if expected != record.delta_id:
        raise CorruptDelta(f"its data is that of delta {expected[:12]}, not {record.delta_id[:12]}")
    return delta


def _split(content: bytes) -> tuple[bytes, bytes]:
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else _MAX_HEADER + 1
    if length > min(_MAX_HEADER, len(content) - 8):
        raise CorruptDelta("is no delta file, or cut short")
    return content[8 : 8 + length], content[8 + length :]


def _read_header(header: bytes) -> tuple[Record, dict[str, int]]:
    try:
        outer = json.loads(header.decode("utf-8"))
        content = json.loads(outer.pop("__metadata__")[METADATA_KEY])
        stated = content.pop("record_sha256")
        sizes = {name: int(part["shape"][0]) for name, part in outer.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise CorruptDelta("is no delta file, or its header is damaged") from None
    version = content.get("format_version")
    if hash_json(content) != stated:
        raise CorruptDelta("its record is changed; fetch the file again")
    if version != 1:
        raise CorruptDelta(f"is of format version {version!r}; this version of Samara reads 1")
    try:
        record = Record.model_validate(content)
    except ValidationError as error:
        raise CorruptDelta(f"its record is not valid: {error.errors()[0]['msg']}") from None
    names = [tensor.name for tensor in record.tensors]
    if names != sorted(set(names)) or list(sizes) != _part_names(record, sizes):
        raise CorruptDelta("its header does not list the tensors of its record")
    if min(sizes.values(), default=0) < 0 or _header(record, sizes) != header:
        raise CorruptDelta("its header is not spelled as written; fetch the file again")
    return record, sizes


def _part_names(record: Record, sizes: Mapping[str, int]) -> list[str]:
    names = []
    for tensor in record.tensors:
        names += [f"{tensor.name}.idx", f"{tensor.name}.val"]
        if record.mode == "overwrite" and f"{tensor.name}.orig" in sizes:
            names.append(f"{tensor.name}.orig")
    return names


def _decode(tensor: TensorRecord, parts: Mapping[str, bytes], record: Record) -> TensorDelta:
    if tensor.val_codec != VALUE_CODECS[record.mode]:
        raise CorruptDelta(f"{tensor.name}: {tensor.val_codec} values in a {record.mode} delta")
    word = FLOAT_BITS if record.mode == "additive" else WORDS[tensor.dtype]
    coded = CodedIndices(
        codec=tensor.idx_codec, params=tensor.idx_params, data=parts[f"{tensor.name}.idx"]
    )
    try:
        if min(tensor.shape, default=0) < 0 or math.prod(tensor.shape) >= 2**62:
            raise CorruptDelta(f"shape {list(tensor.shape)}")
        indices = decode_indices(coded, nnz=tensor.nnz, shape=tensor.shape)
        values, original = (
            decode_values(
                CodedValues(comp=tensor.comp, data=parts[name]), nnz=tensor.nnz, dtype=word
            )
            if (name := f"{tensor.name}.{part}") in parts
            else None
            for part in ("val", "orig")
        )
    except CorruptDelta as error:
        raise CorruptDelta(f"{tensor.name}: {error}") from None
    assert values is not None  # the header was compared with the record
    return TensorDelta(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        indices=indices,
        values=values,
        original=original,
        sel_pre=tensor.sel_pre_xxh128,
        sel_post=tensor.sel_post_xxh128,
        pre_sha256=tensor.tensor_pre_sha256,
        post_sha256=tensor.tensor_post_sha256,
    )
