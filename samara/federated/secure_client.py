"""The client's side of privacy: what leaves it beside its values, and its part in a secure sum.

Losses, accuracies, examples, importance, which layers are its own: where ``privacy`` promises
anything, a reply holds none of them. What is left the server knows already, from the seed (active
layers) or from the recipe (tokens and FLOPs, which are those of full batches).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from samara.federated.aggregation import Tensor
from samara.federated.client import Trainer
from samara.federated.fixed_point import IntVector, group_names, make_grid
from samara.federated.messages import Reply, lost
from samara.federated.secure_sum import MASKED, Answer, Participant, Refused
from samara.federated.sharing import SharingState

Memory = dict[str, Any]
"""What a client remembers from one stage to the next, as plain data."""


def protect(
    trainer: Trainer,
    reply: Reply,
    previous: Mapping[str, Tensor],
    memory: Memory | None,
) -> Reply:
    """A reply as it leaves the client.

    Args:
        trainer: Of the client.
        reply: Of its training.
        previous: The server's values.
        memory: Of the stages before, of a secure sum; takes note that the masks are used.
    """
    config = trainer.config
    if not config.privacy.is_on:
        return reply
    if reply.verdict == "ok" and config.privacy.secure_sum is not None:
        assert memory is not None, "the stages before made it"
        participant = Participant.from_dict(memory)
        try:
            masked: Any = participant.mask(summand(trainer, reply, previous))
        except Refused as error:
            return lost(reply, error)
        memory.update(participant.to_dict())
        reply = replace(reply, tensors={MASKED: masked})
    epsilon = None
    if config.privacy.records is not None and config.privacy.secure_sum is None:
        assert trainer.secrets is not None
        charged = trainer.secrets.charged(reply.client)
        epsilon = trainer.record_budget(reply.client).spent(0, past=charged)
    tokens = config.local.batch_size * config.data.sequence_length
    flops = [trainer.flops.fixed + k * trainer.flops.per_layer for k in reply.active_layers]
    return replace(
        reply,
        num_examples=1,
        loss_before=0.0,
        loss_after=0.0,
        accuracy_before=None,
        accuracy_after=None,
        sharing=SharingState(),
        personal_hash=None,
        tokens=tokens * len(reply.active_layers),
        flops=tokens * sum(flops),
        cpu_seconds=0.0,
        epsilon=epsilon,
    )


def summand(trainer: Trainer, reply: Reply, previous: Mapping[str, Tensor]) -> IntVector:
    """A client's vector in the sum.

    With ``privacy.client``: its clipped change. Without: its change times its weight; per group
    its weight, 0 of a group that it keeps; per layer its importance, and 1 if it has any. So the
    mean of each layer is over who shared it, and nobody learns who that was.
    """
    config, layout = trainer.config, trainer.layout
    grid = make_grid(config, trainer.data.num_clients)
    change = grid.change(reply.tensors, previous, layout)
    if config.privacy.client is not None:
        return grid.encode(change)
    assert config.privacy.secure_sum is not None
    most = config.privacy.secure_sum.max_examples
    weight = min(reply.num_examples, most) / most
    sent = {layout.groups[name] for name in reply.tensors}
    weights = [weight if group in sent else 0.0 for group in group_names(layout)]
    importance = reply.sharing.importance
    seen = [*importance, 1.0] if importance else [0.0] * (layout.num_layers + 1)
    return np.concatenate([grid.encode(weight * change), grid.encode_shares([*weights, *seen])])


def secure_stage(stage: str, payload: Mapping[str, Any], memory: Memory | None) -> tuple[Any, Any]:
    """Carry out a stage of the secure sum that is not training.

    Args:
        stage: ``keys``, ``shares``, ``inbox`` or ``unmask``.
        payload: Of the server.
        memory: Of the stages before.

    Returns:
        The answer, and what to remember. A request that would tell too much is answered by
        ``refused`` and the reason.
    """
    try:
        if stage == "keys":
            begun = Participant.begin(payload["client"], payload["context"])
            return {"keys": begun.public_keys()}, begun.to_dict()
        if memory is None:
            raise Refused("knows nothing of this round")
        participant = Participant.from_dict(memory)
        answer: Answer = {}
        if stage == "shares":
            keys = {int(client): own for client, own in payload["keys"].items()}
            answer["sealed"] = participant.share(keys, payload["threshold"])
        elif stage == "inbox":
            participant.receive({int(c): own for c, own in payload["sealed"].items()})
        else:
            answer["revealed"] = participant.reveal(payload["survivors"], payload["dropped"])
            return answer, None
    except Refused as error:
        return {"refused": str(error)}, memory
    return answer, participant.to_dict()
