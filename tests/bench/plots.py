"""Draws measured points and the straight lines through them, as SVG that stays the same while the figures do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from figures import Line

_COLOURS = ("#0b62a4", "#c8553d")
_MARKERS = ("o", "s")


@dataclass(frozen=True)
class Series:
    """Points of one kind."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]

    @property
    def line(self) -> Line:
        return Line.through(self.xs, self.ys)


def draw(path: str, label: str, panels: Mapping[str, Sequence[Series]]) -> None:
    """Write ``panels``, by title and side by side, to ``path``; all of them over the same ``label``."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "reaper", "font.size": 9})
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(4.4 * len(panels), 3.2), layout="constrained", squeeze=False
    )
    for axes, (title, series) in zip(all_axes[0], panels.items(), strict=True):
        for one, colour, marker in zip(series, _COLOURS, _MARKERS, strict=False):
            line = one.line
            ends = [min(one.xs), max(one.xs)]
            axes.plot(ends, [line.at(x) for x in ends], color=colour, linewidth=1)
            axes.plot(
                one.xs,
                one.ys,
                marker,
                color=colour,
                markersize=4,
                label=f"{one.name}: {line.intercept:.3g} {'-' if line.slope < 0 else '+'} {abs(line.slope):.2g} x,"
                f" R² {line.r_squared:.2f}",
            )
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, alpha=0.6)
        axes.legend(frameon=False, loc="upper left", fontsize=8)
        axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
    figure.savefig(path, facecolor="white", metadata={"Date": None} if path.endswith(".svg") else None)
    pyplot.close(figure)
