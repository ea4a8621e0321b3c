"""Sections of docs/results.md about sparse training: its speed and memory, and its scores."""

from __future__ import annotations

from collections.abc import Sequence

from markdown_parts import Data, blocks, error, interval, megabytes, table

HEADER = (
    "method",
    "trained, M",
    "tokens/s",
    "middle half",
    "× full",
    "FLOP bound",
    "× LoRA",
    "peak, MB",
    "formula, MB",
    "error",
    "moments, MB",
)


def core(files: Sequence[Data]) -> str:
    """Tokens per second and memory per method, beside full fine-tuning and LoRA."""
    return (
        "## Sparse training: speed and memory\n\n"
        "Random weights and tokens through the real loop; all methods with the same compilation,\n"
        "checkpointing and a fused optimizer, the adapters and ours with as many trained numbers.\n"
        "*FLOP bound*: the products of full fine-tuning's pass over those of the method's, the\n"
        "most that it can gain at equal use of the hardware. *Formula*: weights + state +\n"
        "activations that forward left + workspace; none for compiled layers, which recompute as\n"
        "they like.\n\n" + blocks(files, _tables)
    )


def _tables(data: Data) -> str:
    groups: dict[tuple[str, ...], list[Data]] = {}
    for row in data["rows"]:
        key = (row["shape"], f"{row['batch']} × {row['length']}", row["variant"].replace("_", ", "))
        groups.setdefault(key, []).append(row)
    return "\n\n".join(_table(key, rows) for key, rows in groups.items())


def _table(key: Sequence[str], rows: Sequence[Data]) -> str:
    shape, tokens, variant = key
    well = {row["method"]: row for row in rows if not row["failed"]}
    density = f"{rows[0]['density']:.2%}"
    lines = [
        f"Shape {shape}, {tokens} tokens, {variant}, {density} of the linear weights.",
        table(HEADER, [_line(row, well.get("full"), well.get("lora")) for row in well.values()]),
    ]
    lines += [f"Failed: {row['method']}: {row['failed']}." for row in rows if row["failed"]]
    return "\n\n".join(lines)


def _line(row: Data, full: Data | None, lora: Data | None) -> list[str]:
    def relative(key: str, other: Data | None, *, inverse: bool = False) -> str:
        if other is None:
            return "–"
        ratio = row[key] / other[key]
        return f"{1 / ratio if inverse else ratio:.2f}"

    predicted, (low, high) = row["predicted_bytes"], row["quartiles"]
    return [
        row["method"].replace("_", "-"),
        f"{row['trained'] / 1e6:,.2f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{low:,.0f}–{high:,.0f}",
        relative("tokens_per_second", full),
        relative("flops_per_step", full, inverse=True),
        relative("tokens_per_second", lora),
        megabytes(row["peak_bytes"]),
        megabytes(predicted),
        "–" if predicted is None else error(predicted, row["peak_bytes"]),
        f"{row['moments_bytes'] / 1e6:,.1f}",
    ]


def scores(files: Sequence[Data]) -> str:
    """Presets of the score family at an equal number of weights."""
    return (
        "## Sparse training: which score\n\n"
        "Every score with the same budget, targets, rows and sweep of learning rates; the best\n"
        "rate by held-out loss at the first seed, then all seeds. *Against random*: accuracy,\n"
        "paired by row, with a 95 % interval over rows and seeds.\n\n" + blocks(files, _scores)
    )


def _scores(data: Data) -> str:
    lines = [
        [
            f"{row['density']:.2%}, {row['score']}",
            f"{row['trained']:,}",
            f"{row['lr']:g}{' (edge)' if row['is_at_edge'] else ''}",
            f"{sum(row['validation_losses']) / len(row['validation_losses']):.4f}",
            f"{min(row['validation_losses']):.4f}–{max(row['validation_losses']):.4f}",
            interval(row["accuracy"], 3),
            "–" if row["against_random"] is None else interval(row["against_random"], 3),
            f"{row['selection_seconds']:.1f}",
        ]
        for row in data["rows"]
        if row["kind"] == "summary"
    ]
    seeds, steps = len(data["settings"]["seeds"]), data["settings"]["finetune"]["training"]
    caption = f"{steps['max_steps']} steps of {steps['batch_size']} rows, {seeds} seeds."
    header = (
        "score",
        "trained",
        "rate",
        "held-out loss",
        "over seeds",
        "accuracy",
        "against random",
        "selection, s",
    )
    return f"{caption}\n\n{table(header, lines)}"
