"""What a federation came to: scores of the global model and of each client's own, and its costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from samara.federated.aggregation import Tensor
from samara.federated.client import Trainer
from samara.federated.messages import ClientState
from samara.federated.server import Server
from samara.federated.server_state import Scores
from samara.federated.store import Store

WORST = 0.1
"""Share of the clients that make up the worst decile."""


def client_scores(
    trainer: Trainer, store: Store, tensors: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Score every client's test rows by the global values and by its own.

    Args:
        trainer: With the model.
        store: With what the clients keep.
        tensors: The global values.
    """
    return [
        score_client(trainer, client, store.load_client(client), tensors)
        for client in range(trainer.data.num_clients)
    ]


def score_client(
    trainer: Trainer, client: int, state: ClientState, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Score one client's test rows by the global values and by its own."""
    rows = trainer.data.client(client).test
    shared = trainer.score_values(tensors, rows)
    own = shared
    if state.personal:
        own = trainer.score_values(trainer.local_values(tensors, state), rows)
    return {
        "client": client,
        "test_rows": len(rows),
        "global": {"loss": shared.loss, "accuracy": shared.accuracy},
        "personal": {"loss": own.loss, "accuracy": own.accuracy},
        "personal_layers": list(state.sharing.personal),
    }


def spread(clients: Sequence[Mapping[str, Any]], which: str) -> dict[str, float]:
    """Mean over the clients, and mean over the worst tenth of them: of accuracy, or of loss.

    Empty of none: nodes of a deployment that promises privacy do not say how they score.
    """
    if not clients:
        return {}
    name = "loss" if clients[0][which]["accuracy"] is None else "accuracy"
    values = sorted(entry[which][name] for entry in clients)
    if name == "loss":
        values.reverse()
    worst = values[: max(1, round(WORST * len(values)))]
    return {f"{name}_mean": float(np.mean(values)), f"{name}_worst_decile": float(np.mean(worst))}


def results(
    server: Server,
    trainer: Trainer,
    *,
    best: Scores,
    last: Scores,
    clients: Sequence[Mapping[str, Any]],
    parents: Mapping[str, str],
) -> dict[str, Any]:
    """The content of ``results.json``."""
    state, config = server.state, server.config
    return {
        "schema": 1,
        "task": {"name": config.task.name, "kind": config.task.kind},
        "method": config.method,
        "payload": config.payload,
        "engine": config.engine,
        "rounds": state.round,
        "best_round": state.best_round,
        "validation_loss_best": state.best_loss,
        "test": {
            "best": {"loss": best.loss, "accuracy": best.accuracy},
            "last": {"loss": last.loss, "accuracy": last.accuracy},
        },
        "clients": {
            "number": len(clients),
            "global": spread(clients, "global"),
            "personal": spread(clients, "personal"),
            "each": list(clients),
        },
        "trained_parameters": sum(value.size for value in state.tensors.values()),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "modelled": {
            "seconds": state.totals["modelled_seconds"],
            "client_seconds": state.totals["modelled_client_seconds"],
            "joules": state.totals["modelled_joules"],
            "peak_bytes_full_depth": server.costs.peak_bytes(trainer.num_layers),
            "clock": server.costs.to_dict(),
            "devices": {
                device.name: device.source
                for device in sorted(set(server.devices), key=lambda own: own.name)
            },
        },
        "measured": {
            "cpu_seconds": state.measured_cpu_seconds,
            "strategy_cpu_seconds": state.strategy_cpu_seconds,
            # Of clients that do not say what they spend there is no share.
            "strategy_share_of_cpu_seconds": state.strategy_cpu_seconds / state.measured_cpu_seconds
            if state.measured_cpu_seconds
            else None,
            "bytes_down": state.totals["bytes_down"],
            "bytes_up": state.totals["bytes_up"],
            "setup_bytes_per_client": trainer.payload.setup_bytes,
            "tokens": state.totals["tokens"],
            "flops": state.totals["flops"],
        },
        "best_arms": server.configurator.best_arms(state.round) if server.configurator else {},
        "privacy": server.protection.summary(state.round) if server.protection else {},
        "parents": dict(parents),
    }
