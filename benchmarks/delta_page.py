"""The section of docs/results.md on delta files."""

from __future__ import annotations

from collections.abc import Sequence

from markdown_parts import Data, blocks, table

DENSITY = 0.005


def section(files: Sequence[Data]) -> str:
    """Sizes of real and made changes, and times."""
    real = [data for data in files if "real" in data]
    made = [data for data in files if "sizes" in data]
    parts = ["## Delta files"]
    if real:
        parts.append(
            "### Of real trainings\n\n"
            "Bytes of the whole file by the weights whose bits changed; *record* is the part that\n"
            "does not grow with them: recipe, hashes, scores. A SHiRA adapter is weighed as a\n"
            "delta of the same change, and as peft wrote it.\n\n" + blocks(real, _real)
        )
    if made:
        parts.append(
            "### Of made changes, and times\n\n"
            f"A 4096 × 4096 bfloat16 matrix of N(0, 0.02), {DENSITY:.1%} of it changed by\n"
            "N(0, sigma). Times: linear layers and embedding of Llama-3.2-1B on the CPU.\n\n"
            + blocks(made, _made)
        )
    return "\n\n".join(parts)


def _real(data: Data) -> str:
    rows = [
        [
            f"{row['name']} ({row['method']}, {row['dtype']})",
            "–" if row["trained"] is None else f"{row['trained']:,}",
            f"{row['nnz']:,}",
            f"{row['sigma']:.1e}",
            f"{row['file_bytes']:,}",
            f"{row['record_bytes']:,}",
            f"{row['bytes_per_nonzero']:.2f}",
            f"{(row['index_bytes'] + row['value_bytes']) / row['nnz']:.2f}",
            f"{row['file_bytes'] / row['base_bytes']:.2%}",
            "–" if row["adapter_bytes"] is None else f"{row['adapter_bytes']:,}",
        ]
        for row in data["real"]
    ]
    header = (
        "change",
        "trained",
        "changed",
        "by, RMS",
        "file, B",
        "record, B",
        "B per changed weight",
        "without record",
        "of the base",
        "peft's file, B",
    )
    note = f"\n\n{data['note']}" if data["note"] else ""
    return f"{table(header, rows)}{note}"


def _made(data: Data) -> str:
    sizes = [
        [
            f"{row['sigma']:.0e}",
            row["mode"],
            f"{row['bytes_per_nonzero']:.2f}",
            f"{row['index_bytes_per_nonzero']:.2f}",
            f"{row['value_bytes_per_nonzero']:.2f}",
        ]
        for row in data["sizes"]
        if row["density"] == DENSITY
    ]
    times = data["times"]
    timed = [
        [name, f"{1000 * value['wall']:,.0f}", f"{1000 * value['cpu']:,.0f}"]
        for name, value in times["seconds"].items()
    ]
    header = ("sigma", "values", "B per changed weight", "index", "value")
    said = (
        f"{times['parameters']:,} weights, {times['nnz']:,} of them changed by "
        f"{times['file_bytes']:,} bytes; medians. `identity` hashes all weights, once a model."
    )
    shown = table(("step", "wall, ms", "processor, ms"), timed)
    return f"{table(header, sizes)}\n\n{said}\n\n{shown}" if sizes else f"{said}\n\n{shown}"
