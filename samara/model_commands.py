"""Verbs that need no recipe: ``samara convert``, ``average``, ``generate``.

Everything heavy is imported by the verb that needs it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


def convert(
    source: Annotated[
        Path, typer.Argument(help="A model folder, a run folder, or a llama2.c file.")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    to: Annotated[
        Literal["samara", "openelm", "llama", "gguf"], typer.Option(help="What to write.")
    ],
    source_format: Annotated[
        Literal["auto", "samara", "openelm", "llama", "llama2c"],
        typer.Option("--from", help="What the source is."),
    ] = "auto",
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")
    ] = "keep",
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = "5GB",
    license_: Annotated[str | None, typer.Option("--license", help="For the model card.")] = None,
) -> None:
    """Rewrite a model for another runtime; tokenizer, template and model card travel along.

    Example: samara convert runs/openelm-270m openelm-270m-gguf --to gguf
    """
    from samara.model.interchange.convert import convert as convert_model

    result = convert_model(
        source,
        target,
        to=to,
        source_format=source_format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        license=license_,
    )
    typer.echo(
        f"{result.source_format} -> {result.target_format}: {result.num_parameters:,} parameters "
        f"in {result.folder}"
    )
    for note in result.notes:
        typer.echo(f"note: {note}")


def average(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two or more model folders.")],
    out: Annotated[Path, typer.Option(help="The folder to write; must not exist.")],
) -> None:
    """Average the weights of checkpoints of one model, as OpenELM does with its last five.

    Example: samara average step-100 step-200 step-300 --out mean
    """
    from samara.model.interchange.average import average as average_models

    result = average_models(checkpoints, out)
    typer.echo(f"mean of {result.num_models} models in {result.folder}")


def generate(
    model: Annotated[Path, typer.Argument(help="A model folder, or a pretraining run folder.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts to go on from; -: standard input. None: from nothing.",
            metavar="[PROMPT]...",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer the prompts, by the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from this much probability.")
    ] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many tokens; 0: from all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(min=1.0, help="1: none.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    cache: Annotated[
        Literal["dynamic", "static"], typer.Option(help="The key-value cache.")
    ] = "dynamic",
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the decoding step (static cache).")
    ] = False,
    draft: Annotated[
        Path | None, typer.Option(help="A smaller model of the same tokenizer, to guess ahead.")
    ] = None,
    prompt_lookup: Annotated[
        int, typer.Option(min=0, help="Guess so many tokens ahead from the text itself; 0: none.")
    ] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "float32",
    quantize: Annotated[
        Literal["none", "int8"],
        typer.Option(help="int8: the projections' weights, on CPU; fast with bfloat16."),
    ] = "none",
    threads: Annotated[
        int, typer.Option(min=0, help="Threads of the CPU; 0: as torch chooses.")
    ] = 0,
) -> None:
    """Print what a model writes, while it writes it.

    Example: samara generate runs/quickstart/cola "Return the number of" "Raise an error if"
    """
    import torch

    from samara.measure.generation import GenerationSettings, generate_texts
    from samara.measure.language_model_folder import open_language_model
    from samara.model.quantization import weight_bytes
    from samara.model.weight_layout import lay_out_for_decoding

    texts = [_standard_input() if prompt == "-" else prompt for prompt in prompts or [""]]
    if threads:
        torch.set_num_threads(threads)
    saved = open_language_model(
        model, device=device, precision=precision, batch_size=batch_size, quantize=quantize
    )
    lay_out_for_decoding(saved.language_model.model)
    if quantize != "none":
        held = weight_bytes(saved.language_model.model)
        typer.echo(f"weights in memory: {held / 1e6:,.1f} MB ({quantize})", err=True)
    guessing = None
    if draft is not None:
        guessing = open_language_model(
            draft, device=device, precision=precision, quantize=quantize
        ).language_model
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        cache=cache,
        compile=compile_,
        prompt_lookup=prompt_lookup,
    )

    def show(index: int, piece: str) -> None:
        if not piece:  # this text begins
            piece = ("\n\n" if index else "") + ("" if chat else texts[index])
        typer.echo(piece, nl=False)

    generate_texts(saved.language_model, texts, settings, chat=chat, draft=guessing, on_text=show)
    typer.echo()


def _standard_input() -> str:
    return sys.stdin.read().removesuffix("\n")
