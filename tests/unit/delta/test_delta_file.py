"""Delta files: what is written is read back, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from samara.errors import CorruptDelta, DeltaError, ShapeMismatch, TiedTensorDuplicate
from samara.registry.records import License
from samara.runs import hash_json
from samara.sparse.delta import Delta, SelectedEntries, delta_from_entries, make_delta
from samara.sparse.delta_file import delta_bytes, parse_delta, read_delta
from samara.sparse.delta_records import Provenance, Selector, Train
from samara.sparse.tensor_bits import digests

GOLDEN = Path(__file__).parent / "data" / "golden-v1.sdelta"
RECORDS = Provenance(
    model_id="org/any",
    revision_commit="0" * 40,
    created="2026-01-01T00:00:00+00:00",
    selector=Selector(score="random", density=0.1, seed=3),
    train=Train(data_sha256="1" * 64, recipe={"lr": 3e-4}),
    license=License(delta="apache-2.0", redistribution="allowed"),
)


@pytest.mark.parametrize("mode", ["ulp", "xor", "overwrite", "additive"])
def test_a_file_gives_back_the_delta(base, tuned, tmp_path, mode):
    delta = make_delta(base, tuned, mode=mode, records=RECORDS)
    delta.save(tmp_path / "x.sdelta")
    found = Delta.load(tmp_path / "x.sdelta")
    assert found.id == delta.id
    assert found.record == delta.record
    for mine, theirs in zip(delta.tensors, found.tensors, strict=True):
        for field in dataclasses.fields(mine):
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            assert (a == b).all() if hasattr(a, "all") else a == b
    assert delta_bytes(found) == (tmp_path / "x.sdelta").read_bytes()


def test_the_file_is_a_safetensors_file(base, tuned, tmp_path):
    make_delta(base, tuned).save(tmp_path / "x.sdelta")
    with safe_open(tmp_path / "x.sdelta", framework="np") as file:
        assert sorted(file.keys()) == [f"{n}.{part}" for n in "abc" for part in ("idx", "val")]
        assert list(file.metadata()) == ["sdelta"]
        record = json.loads(file.metadata()["sdelta"])
    assert record.pop("record_sha256") == hash_json(record)


def test_the_id_is_what_the_delta_does(base, tuned, copies):
    delta = make_delta(base, tuned, records=RECORDS)
    assert make_delta(base, tuned).id == delta.id  # the record does not matter
    assert make_delta(base, tuned, mode="xor").id != delta.id
    assert make_delta(base, tuned, parent=delta).id != delta.id
    other = copies(tuned)
    other["b"][0, 0] += 1
    assert make_delta(base, other).id != delta.id


def test_every_flipped_byte_and_every_cut_is_refused(base, tuned):
    content = delta_bytes(make_delta({"b": base["b"]}, {"b": tuned["b"]}, records=RECORDS))
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        with pytest.raises(CorruptDelta):
            parse_delta(bytes(flipped))
    for length in range(0, len(content), 7):
        with pytest.raises(CorruptDelta):
            parse_delta(content[:length])
    with pytest.raises(CorruptDelta, match="cut short or changed"):
        parse_delta(content + b"\x00")


def _with_record(content: bytes, change) -> bytes:
    """The file with its record changed and its hash made to fit, as a forger would."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    record = json.loads(header["__metadata__"]["sdelta"])
    del record["record_sha256"]
    change(record)
    record["record_sha256"] = hash_json(record)
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    header["__metadata__"]["sdelta"] = text
    new = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    new += b" " * (-len(new) % 8)
    return len(new).to_bytes(8, "little") + new + content[8 + size :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format_version=2), "format version 2; this version of Samara reads 1"),
        (lambda r: r.update(surprise=1), "its record is not valid"),
        (lambda r: r.update(parent="f" * 64), "its data is that of delta"),
        (lambda r: r["base"].update(tensors_root="f" * 64), "its data is that of delta"),
        (lambda r: r["tensors"][0].update(dtype="BF16"), "its data is that of delta|values take"),
        (lambda r: r["tensors"][0].update(nnz=3), "b: positions|b: values"),
        (lambda r: r["tensors"][0].update(shape=[-16, -8]), "b: shape"),
        (lambda r: r["tensors"][0].update(shape=[2]), "b: 12 entries do not fit"),
        (lambda r: r["tensors"][0].update(name="z"), "does not list the tensors"),
        (lambda r: r["tensors"][0].update(val_codec="xor_bits"), "xor_bits values in a ulp delta"),
        (lambda r: r.update(payload_sha256="0" * 64), "the data is cut short or changed"),
    ],
)
def test_a_record_that_does_not_fit_the_data_is_refused(base, tuned, change, message):
    content = delta_bytes(make_delta({"b": base["b"]}, {"b": tuned["b"]}))
    with pytest.raises(CorruptDelta, match=message):
        parse_delta(_with_record(content, change))


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(CorruptDelta, match=r"none\.sdelta: cannot be read"):
        read_delta(tmp_path / "none.sdelta")
    (tmp_path / "x.sdelta").write_text("hello, this is no delta")
    with pytest.raises(CorruptDelta, match=r"x\.sdelta: is no delta file"):
        read_delta(tmp_path / "x.sdelta")


def test_files_of_the_first_format_stay_readable():
    """Written once by this module: its bytes and what they decode to are version 1."""
    delta = read_delta(GOLDEN)
    assert delta.id == "f967630e80e69c9ecffab9836cdccfc2e91221a12c364f0adae3a2777352960c"
    assert [(t.name, t.dtype, t.nnz) for t in delta.tensors] == [
        ("a", "BF16", 96),
        ("b", "F32", 12),
        ("c", "F16", 3),
    ]
    assert delta.record.train == RECORDS.train
    assert delta_bytes(delta) == GOLDEN.read_bytes()


# --- making -------------------------------------------------------------------------------------


def test_unchanged_entries_are_left_out(base):
    entries = {
        "b": SelectedEntries(
            indices=torch.tensor([1, 5, 9]),
            original=base["b"].view(-1)[[1, 5, 9]],
            new=base["b"].view(-1)[[1, 5, 9]] + torch.tensor([0.0, 1.0, 0.0]),
        )
    }
    delta = delta_from_entries(entries, base=digests(base))
    assert [list(tensor.indices) for tensor in delta.tensors] == [[5]]


def test_entries_and_dense_weights_give_one_delta(base, tuned):
    dense = make_delta(base, tuned)
    entries = {
        tensor.name: SelectedEntries(
            indices=torch.from_numpy(tensor.indices),
            original=base[tensor.name].view(-1)[tensor.indices],
            new=tuned[tensor.name].view(-1)[tensor.indices],
        )
        for tensor in dense.tensors
    }
    delta = delta_from_entries(entries, base=digests(base), tuned=digests(tuned))
    assert delta.record.tensors == dense.record.tensors
    assert delta.id == dense.id


def test_changes_outside_the_support_are_refused(base, tuned):
    support = {t.name: torch.from_numpy(t.indices) for t in make_delta(base, tuned).tensors}
    assert make_delta(base, tuned, support=support).nnz > 0
    support["b"] = support["b"][1:]
    with pytest.raises(DeltaError, match="b: 1 weights outside the support changed"):
        make_delta(base, tuned, support=support)


@pytest.mark.parametrize(
    ("indices", "count", "message"),
    [
        ([5, 1], 2, "must ascend"),
        ([1, 1], 2, "must ascend"),
        ([1, 128], 2, "it has 128 entries"),
        ([1, 2], 3, "give as many of each"),
    ],
)
def test_positions_that_are_no_support_are_refused(base, indices, count, message):
    entries = SelectedEntries(
        indices=torch.tensor(indices), original=torch.zeros(count), new=torch.ones(count)
    )
    with pytest.raises(DeltaError, match=f"b: .*{message}"):
        delta_from_entries({"b": entries}, base=digests(base))


def test_other_types_and_unknown_names_are_refused(base):
    half = torch.zeros(1, dtype=torch.float16)
    entries = SelectedEntries(indices=torch.tensor([0]), original=half, new=half + 1)
    with pytest.raises(ShapeMismatch, match="b: values are F16, the base stores F32"):
        delta_from_entries({"b": entries}, base=digests(base))
    with pytest.raises(ShapeMismatch, match="x: the base has no such tensor"):
        delta_from_entries({"x": entries}, base=digests(base))
    with pytest.raises(ShapeMismatch, match="x: the base has no such tensor"):
        make_delta(base, {**base, "x": half})
    with pytest.raises(ShapeMismatch, match="x: the base has no such tensor"):
        make_delta(base, base, support={"x": torch.tensor([0])})


def test_integer_tensors_must_not_change():
    base = {"ids": torch.arange(4), "w": torch.zeros(4)}
    assert make_delta(base, {**base, "w": torch.ones(4)}).nnz == 4
    with pytest.raises(ShapeMismatch, match="ids: is I64 and changed"):
        make_delta(base, {**base, "ids": torch.arange(4) + 1})


def test_a_tied_tensor_is_changed_once():
    weight = torch.zeros(4, 4)
    base = {"embed": weight, "head": weight}
    changed = weight + 1
    delta = make_delta(base, {"embed": changed, "head": changed})
    assert [tensor.name for tensor in delta.tensors] == ["embed"]
    with pytest.raises(TiedTensorDuplicate, match="head: is the same tensor as embed"):
        make_delta(base, {"embed": changed, "head": weight + 2})
    support = {"embed": torch.arange(16), "head": torch.arange(16)}
    with pytest.raises(TiedTensorDuplicate, match="head: is the same tensor as embed"):
        make_delta(base, {"embed": changed, "head": changed}, support=support)


def test_a_delta_of_a_delta_names_its_parent_and_the_bare_base(base, tuned, copies):
    first = make_delta(base, tuned)
    again = copies(tuned)
    again["d"] += 1
    second = make_delta(tuned, again, parent=first)
    assert second.record.parent == first.id
    assert second.record.base.tensors_root == first.record.base.tensors_root
