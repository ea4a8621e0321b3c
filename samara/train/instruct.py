"""Verb ``instruct``: a model and conversations in, a model that answers out.

The loop, its checkpoints and results are those of :mod:`samara.train.pretrain`; only the rows
differ. The run folder also gets

    tokenizer/    the model's own, with a chat template
    data.json     what became of the conversations
"""

from __future__ import annotations

import shutil

from samara.data.chat_corpus import ChatCorpus
from samara.data.chat_template import save_with_chat_template
from samara.data.tokenizer import TextTokenizer
from samara.errors import ConfigError, DataError
from samara.runs import RunFolder, write_json
from samara.train.config import InstructConfig
from samara.train.origin import Origin, origin_of
from samara.train.parallel import join_processes
from samara.train.pretrain import carry_out


def instruct(config: InstructConfig, run: RunFolder) -> None:
    """Tune a model in ``run``; where the folder holds checkpoints, go on from the newest.

    Raises:
        ConfigError: If the settings do not fit the model, or the model has no tokenizer that fits.
        DataError: If a file or record is missing or malformed, or a split is empty.
        ResourceError, CheckpointError, NonFiniteLossError, Stopped: As :func:`carry_out`.
    """
    with join_processes(config.training.device, config.training.parallel) as place:
        origin = origin_of(config.init_from, sequence_length=config.data.sequence_length)
        corpus = ChatCorpus(config.data, _chat_tokenizer(origin, run))
        write_json(run.path / "data.json", {"schema": 1, "hash": corpus.hash, **corpus.statistics})
        carry_out(config, run, corpus, origin, place)


def _chat_tokenizer(origin: Origin, run: RunFolder) -> TextTokenizer:
    """The model's tokenizer with a chat template, in the run folder."""
    assert origin.folder is not None
    folder = run.path / "tokenizer"
    if folder.exists():  # of an interrupted run, perhaps not whole
        shutil.rmtree(folder)
    try:
        tokenizer = save_with_chat_template(origin.folder, folder)
    except DataError as error:
        raise ConfigError(f"init_from: {error}") from error
    if tokenizer.vocab_size > (origin.design.vocab_size or 0):
        raise ConfigError(
            f"init_from: the tokenizer of {origin.folder} has {tokenizer.vocab_size} entries, the "
            f"model's embedding {origin.design.vocab_size}; they do not belong together"
        )
    return tokenizer
