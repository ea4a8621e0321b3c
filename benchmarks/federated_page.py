"""The federated benchmark for people: what ``benchmarks/results.py`` shows of a file of figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from federated_cases import SITUATIONS
from federated_findings import Bounds, Summary, goals, summaries
from markdown_parts import Data, blocks, megabytes, table

DASH = "–"


def section(files: Sequence[Data]) -> str:
    """The section of docs/results.md."""
    return (
        "## Fine-tuning over many clients\n\n"
        "Each method at the best of equally many learning rates, on the same clients. *Modelled*:\n"
        "by the virtual clock, which scales what a batch costs (measured once, below) by device;\n"
        "bytes are counted, the peak of memory and seconds under *measured* are measured here.\n"
        "The target is the final validation score of FedLoRA less one point (of a loss: one\n"
        "percent more), reached and kept over three evaluations; a run that never does is shown\n"
        "as censored. Means with 95 % intervals over seeds; costs to the target are medians.\n\n"
        + blocks(files, show)
    )


def show(data: Data) -> str:
    """All tables of one file."""
    parts = [f"**{title}**\n\n{text}" for title, text in tables(data)]
    return "\n\n".join(parts)


def tables(data: Data) -> Iterator[tuple[str, str]]:
    """Title and Markdown of each table."""
    rows = data["rows"]
    aims = goals(rows)
    if aims:
        marks = {True: "met", False: "missed", None: DASH}
        cells = [[aim.name, aim.wanted, aim.found, marks[aim.is_met]] for aim in aims]
        yield "What was aimed at", table(("DropPEFT", "aim", "found", ""), cells)
    for situation, arms in summaries(rows).items():
        yield f"{situation}: cost to the target", _costs(arms)
        yield f"{situation}: scores", _scores(arms)
        yield f"{situation}: whole runs", _totals(arms)
    choices = [row for row in rows if row["kind"] == "run" and row["arm"] == "DropPEFT"]
    if choices:
        yield "Rates that the configurator gave out in the second half of the runs", _arms(choices)
    memory = [row for row in rows if row["kind"] == "memory"]
    if memory:
        yield "Peak of memory of one client's training (measured)", _memory(memory)
    clocks = [row for row in rows if row["kind"] == "clock"]
    if clocks:
        yield "What a batch costs, before devices (measured)", _clocks(clocks)


def _costs(arms: Sequence[Summary]) -> str:
    def cells(own: Summary) -> list[str]:
        reached = f"{own.reached} of {own.seeds}"
        return [
            own.arm,
            reached if own.reached == own.seeds else f"{reached}, censored",
            _number(own.seconds, 3600, 2),
            _ratio(own.against_reference),
            _ratio(own.against_best),
            _number(own.bytes, 1e6, 0),
            _number(own.joules, 1e3, 1),
        ]

    header = (
        "method",
        "seeds that reach it",
        "hours (modelled)",
        "faster than FedLoRA",
        "than the best that drops nothing",
        "MB sent and received",
        "kJ (modelled)",
    )
    return table(header, [cells(own) for own in arms])


def _scores(arms: Sequence[Summary]) -> str:
    is_loss = SITUATIONS[arms[0].situation][0] == "text"
    shown = _loss if is_loss else _points
    cells = [
        [
            own.arm,
            f"{own.lr:g}",
            shown(own.final),
            shown(own.at_equal_time),
            shown(own.final_difference, sign="+"),
            shown(own.clients),
            shown(own.worst_decile),
            shown(own.worst_decile_difference, sign="+"),
        ]
        for own in arms
    ]
    header = (
        "method",
        "rate",
        "validation loss, nats" if is_loss else "validation accuracy, %",
        "when FedLoRA ends",
        "against FedLoRA",
        "clients, mean",
        "worst decile",
        "against FedLoRA",
    )
    return table(header, cells)


def _totals(arms: Sequence[Summary]) -> str:
    cells = [
        [
            own.arm,
            _number(own.total_seconds, 3600, 2),
            _number(own.cpu_seconds, 1, 0),
            _number(own.total_bytes, 1e6, 0),
            _number(own.total_joules, 1e3, 1),
            " / ".join(megabytes(peak) for peak in own.peak_bytes),
            megabytes(own.measured_peak_bytes),
            f"{own.strategy_share:.1%}",
        ]
        for own in arms
    ]
    header = (
        "method",
        "hours (modelled)",
        "CPU s (measured)",
        "MB sent and received",
        "kJ (modelled)",
        "peak, MB: mean / largest (modelled)",
        "allocator's peak, MB (measured)",
        "strategy / clients (measured)",
    )
    return table(header, cells)


def _arms(rows: Sequence[Data]) -> str:
    """Situation and device class -> share of each rate."""
    counts: dict[tuple[str, str], dict[float, int]] = {}
    for row in rows:
        for device, own in row["arms"].items():
            total = counts.setdefault((row["situation"], device), {})
            for rate, count in own.items():
                total[float(rate)] = total.get(float(rate), 0) + count
    rates = sorted({rate for own in counts.values() for rate in own})
    cells = [
        [f"{where}, {device}", *(f"{own.get(rate, 0) / sum(own.values()):.0%}" for rate in rates)]
        for (where, device), own in sorted(counts.items())
    ]
    return table(("clients on", *(f"{rate:g}" for rate in rates)), cells)


def _memory(rows: Sequence[Data]) -> str:
    whole = next((row for row in rows if row["arm"] == "all layers"), None)
    cells = []
    for row in rows:
        above = row["peak_bytes_above_loaded"]
        saved = 1 - above / whole["peak_bytes_above_loaded"] if whole else None
        cells.append(
            [
                row["arm"],
                f"{row['active_layers']} of {row['num_layers']}",
                megabytes(row["peak_bytes"]),
                megabytes(above),
                DASH if saved is None else f"{saved:.0%}",
            ]
        )
    header = ("training", "layers run", "with the model, MB", "above the loaded model, MB", "less")
    return table(header, cells)


def _clocks(rows: Sequence[Data]) -> str:
    cells = [
        [
            f"{row['situation']}, {row['arm']}",
            f"{row['clock']['seconds_fixed']:.3f}",
            f"{row['clock']['seconds_per_layer']:.4f}",
            megabytes(row["clock"]["bytes_fixed"]),
            megabytes(row["clock"]["bytes_per_layer"]),
            DASH if row["r_squared"] is None else f"{row['r_squared']:.4f}",
        ]
        for row in rows
    ]
    header = ("kind", "s, fixed", "s a layer", "MB, fixed", "MB a layer", "R² of the seconds")
    return table(header, cells)


# --- cells ----------------------------------------------------------------------------------------


def _number(value: float | None, unit: float, digits: int) -> str:
    return DASH if value is None else f"{value / unit:,.{digits}f}"


def _ratio(bounds: Bounds | None) -> str:
    return DASH if bounds is None else f"{_range(bounds, 1.0, 2, '')}x"


def _points(bounds: Bounds | None, sign: str = "") -> str:
    return DASH if bounds is None else _range(bounds, 100.0, 1, sign)


def _loss(bounds: Bounds | None, sign: str = "") -> str:
    """Scores of a loss carry the sign of a gain; here it is a loss again."""
    return DASH if bounds is None else _range(bounds, -1.0, 3, sign)


def _range(bounds: Bounds, scale: float, digits: int, sign: str) -> str:
    text = f"{scale * bounds.value:{sign}.{digits}f}"
    if bounds.low is None or bounds.high is None:
        return text
    ends = sorted((scale * bounds.low, scale * bounds.high))
    return f"{text} [{ends[0]:{sign}.{digits}f}, {ends[1]:{sign}.{digits}f}]"
