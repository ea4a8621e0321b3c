"""The section of docs/results.md on training with several processes."""

from __future__ import annotations

from collections.abc import Sequence

from markdown_parts import Data, blocks, error, table


def section(files: Sequence[Data]) -> str:
    """Bytes, speed and efficiency by design, engine and number of processes."""
    return (
        "## Training on several processes\n\n"
        "The same global batches from the same weights. *Sent* is what a process sends in one\n"
        "step, counted where collectives are dispatched; *formula* is that of\n"
        "[scaling](scaling.md). Efficiency: tokens per second and process, against the fewest\n"
        "processes of the same row; none on a CPU, whose cores the processes share: there only\n"
        "the bytes and the losses say anything.\n\n" + blocks(files, _table)
    )


def _table(data: Data) -> str:
    on_cpu = data["settings"]["device"] == "cpu"
    rows = []
    first: dict[tuple[str, str], Data] = {}
    for row in data["rows"]:
        base = first.setdefault((row["design"], row["parallel"]), row)
        per_process = row["tokens_per_second"] / row["processes"]
        base_per_process = base["tokens_per_second"] / base["processes"]
        predicted = row["predicted_bytes"]
        rows.append(
            [
                f"{row['design']}, {row['parallel']}",
                str(row["processes"]),
                f"{row['parameters'] / 1e6:,.2f}",
                f"{row['bytes_per_step'] / 1e6:,.2f}",
                error(predicted, row["bytes_per_step"]) if predicted else "–",
                f"{row['tokens_per_second']:,.0f}",
                "–" if on_cpu else f"{per_process / base_per_process:.0%}",
                f"{row['loss']:.5f}",
            ]
        )
    settings = data["settings"]
    caption = (
        f"Width {settings['hidden_size']}, {settings['layers']} layers, {settings['precision']}; "
        f"{settings['batch']} rows of {settings['length']} tokens a step, micro-batches of "
        f"{settings['micro_batch']}."
    )
    header = (
        "design, engine",
        "processes",
        "parameters, M",
        "sent, MB",
        "formula",
        "tokens/s",
        "efficiency",
        "last loss",
    )
    return f"{caption}\n\n{table(header, rows)}"
