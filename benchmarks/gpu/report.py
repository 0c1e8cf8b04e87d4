"""What was measured, as tables and as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu.device import Figures
from gpu.kernels import decoding_table, products_table

RESULTS = Path(__file__).parents[1] / "results"
_HEAD = (
    "contender",
    "ms a step",
    "E",
    "T / C",
    "moved GB",
    "link GB/s",
    "peak GB",
    "reserved",
    "equal",
)


def result_path(device_name: str, ending: str) -> Path:
    """Return where results of a device are kept."""
    plain = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") or "unknown"
    return RESULTS / f"gpu-{plain}.{ending}"


def write_json(path: Path, figures: Figures) -> None:
    """Write results; the file is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)  # noqa: PTH105  the same, and shorter


def show(figures: Figures) -> None:
    """Print the tables of the kernels, and that of each case."""
    for title, head, rows in _kernel_tables(figures):
        print(f"\n{title}")
        _show_table(head, rows)
    for label, case in figures["cases"].items():
        print(f"\n{caption(label, case)}")
        _show_table(_HEAD, list(_rows(case)))


def markdown(figures: Figures) -> str:
    """Write all of it as Markdown."""
    hardware = figures["hardware"]
    about = (
        f"`{' '.join(figures['command'])}`, {figures['date']}, commit {hardware['commit']}, torch "
        f"{hardware['torch']}, {hardware['cpu']}, {hardware['cores']} cores. E = max(C, bytes / "
        "link, disk bytes / disk) / T; C is the resident model's best pass, the link is as fast "
        "as it was measured to be. Other projects' `moved` is the whole model."
    )
    if figures["absent"]:
        about += f" Not installed, and so not compared with: {', '.join(figures['absent'])}."
    lines = [f"# {hardware['device']}", "", about, ""]
    for name, found in figures["links"].items():
        speeds = ", ".join(f"{key} {_number(value)}" for key, value in found.items())
        lines.append(f"- {name}: {speeds}")
    for title, head, rows in _kernel_tables(figures):
        lines += ["", f"## {title}", "", _line(head), _line(["---"] * len(head))]
        lines += [_line(row) for row in rows]
    for label, case in figures["cases"].items():
        lines += ["", f"## {caption(label, case)}", "", _line(_HEAD), _line(["---"] * len(_HEAD))]
        lines += [_line(row) for row in _rows(case)]
    return "\n".join(lines) + "\n"


def _kernel_tables(figures: Figures) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Titles, heads and rows of what was measured of kernels."""
    if "kernels" not in figures:
        return
    found = figures["kernels"]
    memory = f"{found['memory'] / 1e9:.3g} GB/s"
    for title, table in (
        (f"Packed weights to bfloat16; memory reads and writes {memory}", decoding_table(found)),
        ("Products with few rows", products_table(found)),
    ):
        head, *rows = table
        yield title, head, rows


def caption(label: str, case: Figures) -> str:
    """Say what a case is."""
    if "model" not in case:
        return f"{label}: {case.get('failed') or case.get('cut_off')}"
    stopped = f"; {case['stopped']}" if "stopped" in case else ""
    return (
        f"{label}: {case['model']}, {case['model_bytes'] / 1e9:.3g} GB of weights, cap "
        f"{case['cap_bytes'] / 1e9:.3g} GB, {case['activation_bytes'] / 1e9:.3g} GB beside "
        f"weights{stopped}"
    )


def _rows(case: Figures) -> Iterator[list[str]]:
    for name, row in case.get("contenders", {}).items():
        reason = row.get("cut_off") or ("failed: " + row["failed"] if "failed" in row else "")
        if reason:
            yield [name, reason, *[""] * (len(_HEAD) - 2)]
            continue
        peaks = [f"{row[key] / 1e9:.3g}" for key in ("peak_bytes", "peak_reserved_bytes")]
        time = f"{1e3 * row['seconds']:.1f}"
        if "streamed_bytes" not in row:
            yield [name, time, "", "", "", "", *peaks, ""]
            continue
        known = row["C"] is not None
        yield [
            name,
            time,
            f"{row['E']:.2f}" if known else "?",
            f"{row['seconds'] / row['C']:.2f}" if known else "?",
            f"{row['streamed_bytes'] / 1e9:.3g}",
            f"{row['link_bytes_per_second'] / 1e9:.3g}",
            *peaks,
            {True: "yes", False: "NO", None: "?"}[row["bits_equal"]],
        ]


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value / 1e9:.2f} GB/s" if value > 1e5 else f"{value:.3g}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _show_table(head: Sequence[str], rows: list[list[str]]) -> None:
    """Print a table, with rich where it is."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        widths = [min(width, 40) for width in widths]
        for row in [list(head), *rows]:
            cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())
        return
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)
