"""Verb ``federate``: a model and the data of many clients in, one adapter out.

The run folder gets

    checkpoints/  clients/    the server after its newest rounds, and what each client keeps
    metrics.jsonl             one line a round: scores, costs, and every client's part
    clock.json                what a batch costs, measured once for the run or as given
    sharing.json              who keeps which layers, and which layers were shared when
    adapter/                  of the best round, for peft (head_only: head.safetensors; payload
                              sparse: delta.safetensors; full: model)
    results.json              test scores, per client too; what was measured and what is modelled
    lineage.json              what it was made from, and the compute spent
"""

from __future__ import annotations

from samara.federated.config import FederateConfig
from samara.federated.driver import Driver, InProcessDriver
from samara.federated.job import Job
from samara.runs import RunFolder


def federate(config: FederateConfig, run: RunFolder) -> None:
    """Fine-tune over clients in ``run``; where the folder holds checkpoints, go on from the newest.

    Raises:
        ConfigError: If settings, task, model and devices do not fit each other.
        DataError: If a file or row is missing or malformed, or there are too few rows.
        CheckpointError: If the model, or what there is to go on from, is damaged or another.
        ResourceError: If memory or disk do not suffice.
        Stopped: If a signal stopped it, its state saved.
    """
    if config.engine == "flower":
        from samara.federated.flower import require_flower

        require_flower()
    if config.engine == "superlink":
        from samara.federated.superlink import require_session

        require_session()
    job = Job(config, run)
    engine: type[Driver] = InProcessDriver
    if config.engine == "flower":
        from samara.federated.flower import FlowerDriver

        engine = FlowerDriver
    if config.engine == "superlink":
        from samara.federated.superlink import SuperLinkDriver

        engine = SuperLinkDriver
    driver = engine(job.server, job.trainer, job.store, run)
    driver.resume()
    driver.run()
    job.finish(driver.score_clients())
