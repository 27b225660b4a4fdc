"""What pictures of a run are made of: colours, lines by step, legends."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from train.history import Column, History


class Theme(NamedTuple):
    """Colours that suit a page."""

    page: str
    text: str
    quiet: str
    first: str  # of the main line
    wrong: str
    ahead: tuple[str, ...]  # of the depths of MTP
    layers: tuple[float, float]  # the part of viridis that stands out from the page

    @property
    def settings(self) -> Any:
        """Of matplotlib."""
        quiet = ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
        return dict.fromkeys(quiet, self.quiet) | {
            "figure.facecolor": self.page,
            "axes.facecolor": self.page,
            "savefig.facecolor": self.page,
            "text.color": self.text,
            "axes.labelcolor": self.text,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.6,
            "font.size": 10.0,
            "savefig.dpi": 144.0,
        }


# The pages are those of report.html. Depths beyond the last colour begin again.
LIGHT = Theme(
    "#ffffff",
    "#1b1f24",
    "#59636e",
    "#2563eb",
    "#b3261e",
    ("#e08e0b", "#d4541d", "#a3195b"),
    (0.0, 0.88),
)
DARK = Theme(
    "#16181c",
    "#e6e6e6",
    "#9aa4b0",
    "#6ea8fe",
    "#ff8a80",
    ("#f6c453", "#f08a4b", "#e0559a"),
    (0.25, 1.0),
)


def trend(axes: Axes, value: Column, color: str) -> Column:
    """Draws a number by step, faint as it is and clear as it tends; returns the latter."""
    raw, tends = value.extremes(), value.smooth().thin()
    axes.plot(raw.steps_N, raw.values_N, color=color, linewidth=0.6, alpha=0.3)
    axes.plot(tends.steps_N, tends.values_N, color=color, linewidth=1.6)
    return tends


def points(axes: Axes, value: Column, color: str) -> None:
    """Draws what is known of few steps."""
    thin = value.thin()
    axes.plot(thin.steps_N, thin.values_N, "o-", color=color, markersize=3.5, linewidth=0.9)


def layer_lines(axes: Axes, lines: list[Column], history: History, theme: Theme) -> None:
    """Draws a line for each layer, from the first colour to the last, and MTP's in another."""
    colors = _layer_colors(len(lines), history, theme)
    many = len(lines) > 16
    for color, line in zip([*colors, theme.text], lines, strict=False):
        thin = line.thin()
        marker = "o" if len(thin.steps_N) <= 60 and not many else ""
        width = 0.6 if many else 1.1
        axes.plot(
            thin.steps_N, thin.values_N, color=color, linewidth=width, marker=marker, markersize=3
        )


def layer_legend(
    figure: Figure, axes: Axes, num_lines: int, history: History, theme: Theme
) -> None:
    """Says which colour is which layer's."""
    colors = _layer_colors(num_lines, history, theme)
    norm = BoundaryNorm(np.arange(len(colors) + 1) - 0.5, len(colors))
    mapped = ScalarMappable(norm, ListedColormap(colors))
    bar = figure.colorbar(mapped, ax=axes, label="layer", pad=0.015, aspect=30)
    bar.set_ticks(MaxNLocator(min(10, len(colors)), integer=True).tick_values(0, len(colors) - 1))
    bar.ax.set_ylim(-0.5, len(colors) - 0.5)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    if num_lines > len(colors):
        key(axes, theme.text, "MTP layer")
        axes.legend(loc="best", handlelength=1.4)


def _layer_colors(num_lines: int, history: History, theme: Theme) -> list[Any]:
    num_layers = min(num_lines, history.num_layers or num_lines)
    return list(colormaps["viridis"](np.linspace(*theme.layers, num_layers)))


def heat(figure: Figure, axes: Axes, ratios_LE: np.ndarray, theme: Theme) -> None:
    """Draws the loads of experts, as multiples of an even share."""
    norm = LogNorm(0.25, 4)
    image = axes.imshow(
        np.clip(ratios_LE, 0.25, 4),
        norm=norm,
        cmap=LinearSegmentedColormap.from_list("loads", [theme.ahead[1], theme.page, theme.first]),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_xlabel("expert")
    axes.set_ylabel("layer with experts")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(12, integer=True))
    axes.grid(False)
    bar = figure.colorbar(
        image, ax=axes, label="times an even share", extend="both", pad=0.015, aspect=20
    )
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.minorticks_off()
    bar.outline.set_visible(False)


def logarithmic(axes: Axes) -> None:
    """Makes the upright axis logarithmic, with ticks in plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def limit(axes: Axes, shown: Sequence[Column], bottom: float | None = None) -> None:
    """Leaves room for what tends to be, and none for a single step far off."""
    values = np.concatenate([value.values_N for value in shown] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    if len(values):
        low, high = values.min() if bottom is None else bottom, values.max()
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low if bottom is not None else low - room, high + room)


def finish(
    axes: Axes, history: History, theme: Theme, *, named: bool = True, is_last: bool = True
) -> None:
    """Shows steps along the bottom, and where stages begin if there are several."""
    first, last = history.records[0]["step"], history.records[-1]["step"]
    room = 0.01 * (last - first) or 0.5
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if is_last:
        axes.set_xlabel("step")
    if len(history.spans) == 1:
        return
    for number, span in enumerate(history.spans):
        begins = span.records[0]["step"]
        if number:
            axes.axvline(begins, color=theme.quiet, linewidth=0.9, linestyle=(0, (4, 3)))
        if named:
            axes.annotate(
                span.stage or "",
                (begins, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(3, 2),
                textcoords="offset points",
                color=theme.quiet,
                fontsize=9,
            )


def mark_skipped(axes: Axes, history: History, theme: Theme) -> None:
    """Marks the steps whose update was skipped, along the bottom."""
    steps = [record["step"] for record in history.records if record.get("skipped")]
    if steps:
        axes.plot(
            steps,
            [0.02] * len(steps),
            "x",
            transform=axes.get_xaxis_transform(),
            color=theme.wrong,
            markersize=6,
            label=f"{len(steps)} updates skipped",
        )


def key(axes: Axes, color: str, label: str, *, marker: str = "") -> None:
    """Adds a line to the legend."""
    width = 0.0 if marker else 1.6
    axes.plot([], [], color=color, label=label, marker=marker, linewidth=width, markersize=4)


def legend(axes: Axes) -> None:
    """Shows the legend beside the lines, which it thus never hides."""
    axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), handlelength=1.4)
