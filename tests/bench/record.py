"""Puts the figures of one whole run into the page that shows them."""

from __future__ import annotations

import os
from collections.abc import Iterable

from figures import Row, shown

BEGIN = "<!-- figures: written by make bench BENCH_ARGS=--record -->"
END = "<!-- end of figures -->"


def as_markdown(host: str, rows: Iterable[Row], skipped: dict[str, str]) -> str:
    lines = [
        f"One run on: {host}.",
        "",
        "| what | ours | theirs | ratio | to reach | reached |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs = f"{shown(row.theirs, row.unit)} ({row.peer})" if row.theirs is not None else ""
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        lines.append(
            f"| {row.name} | {shown(row.ours, row.unit)} | {theirs} | {ratio} | {row.bound} | {row.verdict} |"
        )
    lines += ["", "What stands behind them:", ""]
    lines += [f"- {row.name}: {row.note}" for row in rows if row.note]
    lines += [f"- {name}: not measured, {reason}" for name, reason in skipped.items()]
    return "\n".join(lines)


def put_between_marks(page: str, text: str) -> None:
    """Replace what stands between the two marks of ``page``; ValueError where it lacks them."""
    with open(page, encoding="utf-8") as file:
        before, begin, rest = file.read().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the lines {BEGIN!r} and {END!r}")
    temporary = f"{page}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(f"{before}{BEGIN}\n{text}\n{END}{after}")
    os.replace(temporary, page)
