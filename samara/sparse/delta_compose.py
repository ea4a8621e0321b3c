"""Several deltas over one base as one delta, and any of them taken out again, exactly.

Members are decoded to absolute bits over their common base, so the result of an overlap is a choice
(``last``, ``priority``) or one rounded sum (``sum``), never a rounding of roundings. A composed
delta keeps the base's bits under the union of its members' entries; with them it can be built anew
without any one member, bit for bit what composing the others gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from samara.errors import ConfigError, DeltaError, OutOfOrder, OverlapConflict, WrongBase
from samara.registry.records import License
from samara.sparse.delta import Delta, assemble
from samara.sparse.delta_apply import check_tensor, checked_bits
from samara.sparse.delta_codec import Bits, Indices, Shape
from samara.sparse.delta_data import DeltaData, TensorDelta, hash_bits, values_between
from samara.sparse.delta_records import Composition, Member, Mode, Policy, Provenance
from samara.sparse.tensor_bits import TensorSource, from_float32, to_float32


@dataclass(frozen=True, kw_only=True)
class BaseBits:
    """The base's bits under some entries; a :class:`samara.sparse.tensor_bits.TensorSource`.

    Attributes:
        shapes: Of the tensors, by name.
        dtypes: Theirs.
        indices: int64, ascending flat positions, per tensor.
        bits: The base's bits there.
    """

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    indices: Mapping[str, Indices]
    bits: Mapping[str, Bits]

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self.shapes[name]

    def dtype(self, name: str) -> str:
        """Its type by safetensors' name."""
        return self.dtypes[name]

    def read(self, name: str, indices: Indices) -> Bits:
        """Its bits at flat positions, each of which must be known."""
        found: Bits = self.bits[name][np.searchsorted(self.indices[name], indices)]
        return found


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A composed delta, and what it takes to take a member out.

    Attributes:
        delta: The composed delta, to apply, save or swap in.
        members: What went into it, in the order given.
        priorities: By delta id, where the policy asks for them.
        base: The base's bits under the union of all members.
    """

    delta: Delta
    members: Sequence[DeltaData]
    priorities: Mapping[str, int]
    base: BaseBits

    def without(self, delta_id: str) -> Composed:
        """The composition of all other members; the last one leaves a delta that changes nothing.

        Raises:
            OutOfOrder: If there is no such member.
        """
        rest = [member for member in self.members if member.id != delta_id]
        if len(rest) == len(self.members):
            raise OutOfOrder(f"delta {delta_id[:12]}: is no member of {self.delta.id[:12]}")
        composition = self.delta.record.composition
        assert composition is not None
        return _compose(
            rest,
            self.base,
            policy=composition.policy,
            priorities={name: p for name, p in self.priorities.items() if name != delta_id},
            root=self.delta.record.base.tensors_root,
            parent=self.delta.record.parent,
        )


def compose(
    members: Sequence[DeltaData],
    base: TensorSource,
    *,
    policy: Policy = "error",
    priorities: Mapping[str, int] | None = None,
) -> Composed:
    """Compose deltas of one base into one.

    Args:
        members: Two or more, all made for the same weights; in the order that ``last`` heeds.
        base: Those weights (a model's or a folder's tensors): the members' entries are read.
        policy: What happens where members touch the same entry: ``error`` refuses, ``last`` takes
            the later one, ``priority`` the one of the larger number, ``sum`` adds their changes in
            float32, in the order of the delta ids, and rounds once.
        priorities: Delta id to number, all different; for ``priority``.

    Raises:
        OverlapConflict: If entries overlap and the policy is ``error``.
        OutOfOrder: If the members are not all made for the same weights.
        WrongBase: If ``base`` are other weights.
        ConfigError: If fewer than two are given, one twice, or priorities are missing or equal.
        DeltaError: If one is ``additive``: it has no exact bits.
    """
    _check_members(members)
    numbers = dict(priorities or {})
    _check_priorities(members, policy, numbers)
    return _compose(
        members,
        _base_bits(members, base),
        policy=policy,
        priorities=numbers,
        root=members[0].record.base.tensors_root,
        parent=members[0].record.parent,
    )


def _check_members(members: Sequence[DeltaData]) -> None:
    if len(members) < 2:
        raise ConfigError(f"compose: {len(members)} delta given; give two or more")
    first = members[0].record
    for number, member in enumerate(members):
        record = member.record
        if member.id in {other.id for other in members[:number]}:
            raise ConfigError(f"compose: delta {member.id[:12]} is given twice")
        if record.mode == "additive":
            raise DeltaError(
                f"delta {member.id[:12]}: is additive and has no exact bits; make it anew from "
                "weights of the base's type"
            )
        if record.base.tensors_root != first.base.tensors_root:
            raise WrongBase(
                f"delta {member.id[:12]}: was made for the base {record.base.tensors_root[:12]}, "
                f"{members[0].id[:12]} for {first.base.tensors_root[:12]}; only deltas of one base "
                "compose"
            )
        if record.parent != first.parent:
            raise OutOfOrder(
                f"delta {member.id[:12]}: has another parent than {members[0].id[:12]}; only "
                "deltas that belong on the same weights compose"
            )


def _check_priorities(
    members: Sequence[DeltaData], policy: Policy, priorities: Mapping[str, int]
) -> None:
    if policy != "priority":
        return
    ids = [member.id for member in members]
    missing = [delta_id[:12] for delta_id in ids if delta_id not in priorities]
    if missing:
        raise ConfigError(f"compose: policy priority, and {missing[0]} has none; give it a number")
    if len({priorities[delta_id] for delta_id in ids}) < len(ids):
        raise ConfigError("compose: two priorities are equal; give each delta its own number")


def _base_bits(members: Sequence[DeltaData], base: TensorSource) -> BaseBits:
    """Read the union of all entries, and check that each member was made for these bits."""
    shapes, dtypes, indices, bits = {}, {}, {}, {}
    for name, touching in _by_name(members).items():
        for member, tensor in touching:
            check_tensor(base, tensor, member)
        union = np.unique(np.concatenate([tensor.indices for _, tensor in touching]))
        shapes[name], dtypes[name] = touching[0][1].shape, touching[0][1].dtype
        indices[name], bits[name] = union, base.read(name, union)
    return BaseBits(shapes=shapes, dtypes=dtypes, indices=indices, bits=bits)


def _by_name(
    members: Sequence[DeltaData],
) -> dict[str, list[tuple[DeltaData, TensorDelta]]]:
    found: dict[str, list[tuple[DeltaData, TensorDelta]]] = {}
    for member in members:
        for tensor in member.tensors:
            found.setdefault(tensor.name, []).append((member, tensor))
    return dict(sorted(found.items()))


def _compose(
    members: Sequence[DeltaData],
    base: BaseBits,
    *,
    policy: Policy,
    priorities: Mapping[str, int],
    root: str,
    parent: str | None,
) -> Composed:
    tensors = [
        _merge(touching, base, policy=policy, priorities=priorities)
        for touching in _by_name(members).values()
    ]
    listed = [Member(delta_id=m.id, priority=priorities.get(m.id)) for m in members]
    records = Provenance(
        model_id=members[0].record.base.model_id if members else None,
        license=_strictest([member.record.license for member in members]),
        composition=Composition(policy=policy, members=listed),
    )
    delta = assemble(tensors, root=root, parent=parent, records=records, mode="ulp")
    return Composed(delta=delta, members=tuple(members), priorities=priorities, base=base)


def _merge(
    touching: Sequence[tuple[DeltaData, TensorDelta]],
    base: BaseBits,
    *,
    policy: Policy,
    priorities: Mapping[str, int],
) -> TensorDelta:
    """One tensor of all members."""
    first = touching[0][1]
    name, dtype = first.name, first.dtype
    union, counts = np.unique(
        np.concatenate([tensor.indices for _, tensor in touching]), return_counts=True
    )
    shared = int((counts > 1).sum())
    if shared and policy == "error":
        ids = " and ".join(member.id[:12] for member, _ in touching)
        raise OverlapConflict(
            f"{name}: {shared} entries are changed by more than one of {ids}; say which counts "
            "with the policy last, priority or sum"
        )
    before = base.read(name, union)
    if policy == "priority":
        touching = sorted(touching, key=lambda pair: priorities[pair[0].id])
    if policy == "sum":
        touching = sorted(touching, key=lambda pair: pair[0].id)
    after = before.copy()
    total = torch.zeros(len(union), dtype=torch.float32)
    for member, tensor in touching:
        places = np.searchsorted(union, tensor.indices)
        old = before[places]
        new = checked_bits(old, tensor, member, dtype=dtype)
        after[places] = new
        total[torch.from_numpy(places)] += to_float32(new, dtype) - to_float32(old, dtype)
    if policy == "sum" and shared:
        # Only where members meet: one member's own bits are exact as they are.
        summed = from_float32(to_float32(before, dtype) + total, dtype)
        after = np.where(counts > 1, summed, after)
    mode: Mode = "ulp"
    return TensorDelta(
        name=name,
        shape=first.shape,
        dtype=dtype,
        indices=union,
        values=values_between(before, after, mode),
        sel_pre=hash_bits(before),
        sel_post=hash_bits(after),
        pre_sha256=first.pre_sha256,
    )


def _strictest(licenses: Sequence[License]) -> License:
    """What all of some licence records permit."""
    order = ("forbidden", "internal", "unknown", "allowed")
    redistribution = min(
        (known.redistribution for known in licenses), key=order.index, default=None
    )
    if redistribution is None:
        return License()
    notices = list(dict.fromkeys(known.notice for known in licenses if known.notice))
    bases = list(dict.fromkeys(known.base for known in licenses if known.base))
    return License(
        delta=" AND ".join(dict.fromkeys(known.delta for known in licenses if known.delta)) or None,
        base=bases[0] if len(bases) == 1 else None,
        redistribution=redistribution,
        use="forbidden" if any(known.use == "forbidden" for known in licenses) else "allowed",
        notice="; ".join(notices) or None,
    )


# --- before composing -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How two deltas meet in one tensor.

    Attributes:
        name: Of the tensor.
        first: One delta's id.
        second: The other's.
        shared: Entries that both touch.
        opposed: Of these, how many they move in opposite directions.
        interference: Frobenius norm of dW1^T dW2, of matrices; None for other tensors. Zero means
            that the two changes act on unrelated outputs.
    """

    name: str
    first: str
    second: str
    shared: int
    opposed: int
    interference: float | None


def overlaps(members: Sequence[DeltaData], base: TensorSource) -> list[Overlap]:
    """How each two deltas meet, per tensor that both touch.

    Raises:
        WrongBase: If one of them was not made for ``base``.
    """
    found = []
    for a, b in itertools.combinations(members, 2):
        mine = {tensor.name: tensor for tensor in a.tensors}
        for other in b.tensors:
            if other.name in mine:
                found.append(_overlap(mine[other.name], other, (a, b), base))
    return found


def _overlap(
    first: TensorDelta, second: TensorDelta, owners: tuple[DeltaData, DeltaData], base: TensorSource
) -> Overlap:
    changes = [
        _change(tensor, owner, base) for tensor, owner in zip((first, second), owners, strict=True)
    ]
    _, mine, theirs = np.intersect1d(
        first.indices, second.indices, assume_unique=True, return_indices=True
    )
    opposed = (changes[0][mine].sign() * changes[1][theirs].sign() < 0).sum()
    return Overlap(
        name=first.name,
        first=owners[0].id,
        second=owners[1].id,
        shared=len(mine),
        opposed=int(opposed),
        interference=_interference((first, second), changes) if len(first.shape) == 2 else None,
    )


def _change(tensor: TensorDelta, owner: DeltaData, base: TensorSource) -> torch.Tensor:
    """What a delta adds to each touched entry, float32 (nnz,)."""
    check_tensor(base, tensor, owner)
    before = base.read(tensor.name, tensor.indices)
    after = checked_bits(before, tensor, owner, dtype=tensor.dtype)
    return to_float32(after, tensor.dtype) - to_float32(before, tensor.dtype)


def _interference(
    tensors: tuple[TensorDelta, TensorDelta], changes: Sequence[torch.Tensor]
) -> float:
    """Frobenius norm of dW1^T dW2 over the rows that both touch and the columns of each."""
    cols = tensors[0].shape[1]
    rows = np.intersect1d(tensors[0].indices // cols, tensors[1].indices // cols)
    dense = []
    for tensor, change in zip(tensors, changes, strict=True):
        inside = np.isin(tensor.indices // cols, rows)
        touched = tensor.indices[inside]
        own, places = np.unique(touched % cols, return_inverse=True)
        matrix = torch.zeros(len(rows), len(own))
        row = torch.from_numpy(np.searchsorted(rows, touched // cols))
        matrix[row, torch.from_numpy(places)] = change[torch.from_numpy(inside)]
        dense.append(matrix)
    return float(torch.linalg.matrix_norm(dense[0].T @ dense[1])) if len(rows) else 0.0
