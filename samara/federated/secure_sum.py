"""Secure aggregation: a server that learns a sum of vectors, and none of them.

The protocol of Bonawitz et al. (CCS 2017) for an honest but curious server, on primitives of the
library ``cryptography``. For each pair of clients there is a mask that one adds and the other
subtracts; each client adds one of its own as well. Modulo 2^32 what a client sends is uniform, and
in the sum the pair masks vanish.

    keys      each client makes two X25519 key pairs for the round and sends the public halves
    shares    it splits its masking key and the seed of its own mask among the others, so that any
              ``threshold`` of them can put one together (Shamir 1979), each share sealed for its
              receiver (ChaCha20-Poly1305); the server passes them on
    masked    after training it sends its vector plus the masks
    unmask    of each client that sent a vector the others reveal shares of its own mask's seed; of
              each that was lost, of its masking key, so that the server can take its pair masks off

Of one client nobody reveals both, or the server could unmask its vector; the clients see to that.
Keys live for a round. Pair masks cost a client one key agreement and one stream for each other
client: made for rounds of up to some hundreds.

Flower's own SecAgg+ exists on its former strategies alone (flwr 1.41).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from samara.federated.fixed_point import IntVector
from samara.federated.randomness import Stream, derive

Masked = npt.NDArray[np.uint32]
Answer = dict[str, Any]

MASKED = "masked"
"""The name of the vector in a reply."""
PRIME = 2**521 - 1
"""Of the field of the shares: larger than any secret of 32 bytes."""
SECRET_BYTES, SHARE_BYTES = 32, 66


class Refused(Exception):  # noqa: N818
    """A request that would tell more than the sum, or that does not fit the round."""


# --- Shamir's shares ------------------------------------------------------------------------------


def split_secret(secret: bytes, *, places: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Shares of a secret of 32 bytes: any ``threshold`` of them tell it, fewer tell nothing.

    Args:
        secret: To be split.
        places: Where the polynomial is read, one a holder, different and positive.
        threshold: Shares that it takes.
    """
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    found = {}
    for place in places:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * place + coefficient) % PRIME
        found[place] = value.to_bytes(SHARE_BYTES, "big")
    return found


def join_secret(shares: Mapping[int, bytes]) -> bytes:
    """The secret of so many shares as it takes: the polynomial at 0, by Lagrange's formula.

    Raises:
        Refused: If they are not shares of one secret.
    """
    total = 0
    for place, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        weight = above * pow(below, -1, PRIME)
        total = (total + int.from_bytes(share, "big") * weight) % PRIME
    if total >= 2 ** (8 * SECRET_BYTES):
        raise Refused("the shares do not belong together")
    return total.to_bytes(SECRET_BYTES, "big")


# --- keys and masks -------------------------------------------------------------------------------


def _public(private: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _agree(private: bytes, public: bytes, purpose: str) -> bytes:
    """The key that two clients share, each from its own private and the other's public half."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    own, other = X25519PrivateKey.from_private_bytes(private), X25519PublicKey.from_public_bytes
    return derive(own.exchange(other(public)), purpose)


def _pair_mask(
    private: bytes, public: bytes, *, context: str, one: int, other: int, size: int
) -> Masked:
    """The mask of a pair, the same from both sides."""
    low, high = sorted((one, other))
    key = _agree(private, public, f"{context}/pair-{low}-{high}")
    return Stream(key, "mask").words(size)


def _own_mask(seed: bytes, size: int) -> Masked:
    return Stream(seed, "mask").words(size)


# --- a client -------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Participant:
    """A client's part in one round, as plain data between the stages.

    Attributes:
        client: Its number.
        context: Names run and round: what was sealed for one fits no other.
        mask_key, box_key: Private halves, hexadecimal: for masks, and for sealing shares.
        seed: Of its own mask, hexadecimal.
        threshold: Shares that open a secret.
        keys: Client -> public halves ``mask`` and ``box`` of everybody, itself included.
        inbox: Client -> the share of its two secrets that this one holds, opened.
        masked: Whether it has sent a vector: two under the same masks would tell their difference.
        answered: Whether it has revealed shares; it does so once.
    """

    client: int
    context: str
    mask_key: str
    box_key: str
    seed: str
    threshold: int = 0
    keys: dict[int, dict[str, str]] = field(default_factory=dict)
    inbox: dict[int, dict[str, str]] = field(default_factory=dict)
    masked: bool = False
    answered: bool = False

    @classmethod
    def begin(cls, client: int, context: str) -> Participant:
        """Draw the secrets of a round."""
        one, other, seed = (secrets.token_hex(SECRET_BYTES) for _ in range(3))
        return cls(client=client, context=context, mask_key=one, box_key=other, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """As plain data; it holds secrets, and stays with the client."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Participant:
        """Read what :meth:`to_dict` gave, also by way of JSON."""
        numbered = {k: {int(c): dict(v) for c, v in data[k].items()} for k in ("keys", "inbox")}
        return cls(**{**data, **numbered})

    def public_keys(self) -> dict[str, str]:
        """What the others need of it."""
        own = {"mask": self.mask_key, "box": self.box_key}
        return {name: _public(bytes.fromhex(key)).hex() for name, key in own.items()}

    def share(self, keys: Mapping[int, Mapping[str, str]], threshold: int) -> dict[int, str]:
        """Split the secrets, and seal a share of them for each other client.

        Raises:
            Refused: If the threshold would let a half of the clients open what they like.
        """
        if self.keys:
            raise Refused("has sealed its shares already")
        if keys.get(self.client) != self.public_keys():
            raise Refused("its own keys came back changed")
        if not len(keys) / 2 < threshold <= len(keys):
            raise Refused(f"threshold {threshold} of {len(keys)} clients is no majority of them")
        self.keys = {client: dict(own) for client, own in keys.items()}
        self.threshold = threshold
        places = {client: client + 1 for client in sorted(self.keys)}
        parts = {
            name: split_secret(
                bytes.fromhex(secret), places=list(places.values()), threshold=threshold
            )
            for name, secret in (("seed", self.seed), ("mask_key", self.mask_key))
        }
        own = {name: parts[name][self.client + 1].hex() for name in parts}
        self.inbox[self.client] = own
        return {
            client: self._seal(client, parts["seed"][place] + parts["mask_key"][place])
            for client, place in places.items()
            if client != self.client
        }

    def receive(self, sealed: Mapping[int, str]) -> None:
        """Open the shares of the others; those whose shares came are in the round.

        Raises:
            Refused: If one was not made for this client, or too few came.
        """
        for client in sorted(sealed):
            content = self._open(client, bytes.fromhex(sealed[client]))
            self.inbox[client] = {
                "seed": content[:SHARE_BYTES].hex(),
                "mask_key": content[SHARE_BYTES:].hex(),
            }
        if len(self.inbox) < self.threshold:
            raise Refused(f"{len(self.inbox)} clients are left, {self.threshold} are needed")

    def mask(self, vector: IntVector) -> Masked:
        """The vector plus its masks, modulo 2^32; once a round.

        Raises:
            Refused: If a vector was sent under these masks already.
        """
        if self.masked:
            raise Refused("has sent its vector of this round already")
        self.masked = True
        total = vector.astype(np.uint32) + _own_mask(bytes.fromhex(self.seed), len(vector))
        for other in sorted(self.inbox):
            if other == self.client:
                continue
            mask = _pair_mask(
                bytes.fromhex(self.mask_key),
                bytes.fromhex(self.keys[other]["mask"]),
                context=self.context,
                one=self.client,
                other=other,
                size=len(vector),
            )
            total = total + mask if self.client < other else total - mask
        return total

    def reveal(self, survivors: Iterable[int], dropped: Iterable[int]) -> Answer:
        """Shares of the survivors' own masks and of the lost clients' masking keys.

        Raises:
            Refused: If a client is said to be both, too few survived, or it was asked before: the
                server could take the mask off a single vector.
        """
        left, lost = set(survivors), set(dropped)
        if self.answered:
            raise Refused("has revealed its shares already")
        if left & lost or left | lost != set(self.inbox):
            raise Refused("survivors and lost clients are not the clients of the round")
        if len(left) < self.threshold or self.client not in left:
            raise Refused(f"{len(left)} clients survived, {self.threshold} are needed")
        self.answered = True
        return {
            "seed": {str(client): self.inbox[client]["seed"] for client in sorted(left)},
            "mask_key": {str(client): self.inbox[client]["mask_key"] for client in sorted(lost)},
        }

    def _box(self, sender: int, receiver: int) -> Any:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        other = receiver if sender == self.client else sender
        purpose = f"{self.context}/box-{sender}-{receiver}"
        public = bytes.fromhex(self.keys[other]["box"])
        return ChaCha20Poly1305(_agree(bytes.fromhex(self.box_key), public, purpose))

    def _seal(self, receiver: int, content: bytes) -> str:
        # One message under this key, of this round and direction: the nonce may be 0.
        sealed: bytes = self._box(self.client, receiver).encrypt(bytes(12), content, None)
        return sealed.hex()

    def _open(self, sender: int, sealed: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        if sender not in self.keys or sender == self.client:
            raise Refused(f"client {sender} is not in the round")
        try:
            content: bytes = self._box(sender, self.client).decrypt(bytes(12), sealed, None)
        except InvalidTag:
            raise Refused(f"the share of client {sender} was not made for this one") from None
        return content


# --- the server -----------------------------------------------------------------------------------


def threshold_of(share: float, clients: int) -> int:
    """Clients that have to last: a share of all, rounded up, and more than half."""
    return max(clients // 2 + 1, math.ceil(share * clients - 1e-9))


def unmask(
    masked: Mapping[int, Masked],
    answers: Mapping[int, Answer],
    *,
    keys: Mapping[int, Mapping[str, str]],
    members: Iterable[int],
    threshold: int,
    context: str,
) -> IntVector:
    """Take all masks off the sum of the vectors that came.

    Args:
        masked: Client -> what it sent.
        answers: Client -> what :meth:`Participant.reveal` gave.
        keys: Of all clients.
        members: Clients whose shares were passed on: those that masked against each other.
        threshold: Shares that open a secret.
        context: Of the round.

    Returns:
        The exact sum of the survivors' vectors.

    Raises:
        Refused: If too few answered.
    """
    if len(answers) < threshold:
        raise Refused(f"{len(answers)} clients lasted to the end, {threshold} are needed")
    size = len(next(iter(masked.values())))
    total = np.zeros(size, dtype=np.uint32)
    for client in sorted(masked):
        seed = join_secret(_shares(answers, "seed", client, threshold))
        total = total + masked[client] - _own_mask(seed, size)
    for lost in sorted(set(members) - set(masked)):
        private = join_secret(_shares(answers, "mask_key", lost, threshold))
        for client in sorted(masked):
            public = bytes.fromhex(keys[client]["mask"])
            mask = _pair_mask(private, public, context=context, one=lost, other=client, size=size)
            # What the client added for the lost one, or took off.
            total = total - mask if client < lost else total + mask
    return total.view(np.int32).astype(np.int64)


def _shares(
    answers: Mapping[int, Answer], name: str, owner: int, threshold: int
) -> dict[int, bytes]:
    held = sorted(answers)[:threshold]
    return {client + 1: bytes.fromhex(answers[client][name][str(owner)]) for client in held}
