"""The section of docs/results.md on decoding on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from markdown_parts import Data, blocks, megabytes, table

HEADER = (
    "size",
    "design",
    "format",
    "layout",
    "mode",
    "threads",
    "weights, MB",
    "prefill tokens/s",
    "ms per token",
    "slowest round",
    "dense / this",
    "float32 / this",
    "error",
    "agreement",
)


def section(files: Sequence[Data]) -> str:
    """One table per file."""
    return (
        "## Decoding on a CPU\n\n"
        "Batch 1, static cache, random weights. Cases take turns and the fastest round counts.\n"
        "One thread is timed by the processor's clock, which waiting does not lengthen (memory\n"
        "traffic of other work does), several by the wall clock. *int8*: the projections, by way\n"
        "of torchao; the rest is bfloat16. *Layout*: the weights as stored, or rearranged as\n"
        "`samara generate` does. *Slowest round* and the two ratios are times: over the fastest\n"
        "round, of the dense model of equal width and all else equal, and of the same design in\n"
        "float32, all else equal. *Error*: root mean square difference of the logits from\n"
        "float32, in standard deviations; *agreement*: positions of the prompt with the same\n"
        "likeliest token.\n\n" + blocks(files, _show)
    )


def _show(data: Data) -> str:
    seconds = {_key(row): row["decode_seconds_per_token"] for row in data["rows"]}
    rows = []
    for row in data["rows"]:
        own = row["decode_seconds_per_token"]
        ratios = [
            seconds.get(_key({**row, "design": "uniform"})),
            seconds.get(_key({**row, "format": "float32"})),
        ]
        rows.append(
            [
                row["size"],
                row["design"],
                row["format"],
                row["layout"],
                row["mode"],
                str(row["threads"]),
                megabytes(row["weights_bytes"]),
                f"{row['prefill_tokens_per_second']:,.0f}",
                f"{own * 1e3:,.2f}",
                f"{row['slowest_round']:.2f}",
                *("–" if other is None else f"{other / own:.2f}" for other in ratios),
                f"{row['error']:.4f}",
                f"{row['agreement']:.2f}",
            ]
        )
    settings = data["settings"]
    loads = [row["load"] for row in data["rows"]]
    caption = (
        f"{settings['prompt_length']} tokens read, {settings['new_tokens']} written, best of "
        f"{settings['repeats']} rounds. The machine was loaded: load average {min(loads):.1f} to "
        f"{max(loads):.1f} on {data['environment']['cpu_count']} cores."
    )
    return f"{caption}\n\n{table(HEADER, rows)}"


def _key(row: Data) -> tuple[object, ...]:
    """What tells one case from another."""
    names = ("size", "design", "format", "layout", "mode", "threads")
    return tuple(row[name] for name in names)
