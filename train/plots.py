"""Pictures of how a run went."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from train.history import Column, History, column, columns
from train.strokes import (
    Theme,
    finish,
    heat,
    key,
    layer_legend,
    layer_lines,
    legend,
    limit,
    logarithmic,
    mark_skipped,
    points,
    trend,
)

_WIDTH = 9.0  # inches


class Picture(NamedTuple):
    """A drawing, and what it shows in words."""

    title: str
    alt: str
    figure: Figure


def losses(history: History, theme: Theme) -> Picture:
    """Of the next token, of those further ahead, and on held-out text."""
    figure = Figure(figsize=(_WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    shown = []
    for span in history.spans:
        ahead = columns(span.records, "mtp_losses")
        shown += [trend(axes, value, _ahead(theme, d)) for d, value in enumerate(ahead)]
        shown.append(trend(axes, column(span.records, "loss"), theme.first))
    held_out = column(history.records, "held_out_loss")
    held_out_ahead = columns(history.records, "held_out_mtp_losses")
    for depth, value in enumerate(held_out_ahead):
        points(axes, value, _ahead(theme, depth))
    points(axes, held_out, theme.text)
    num_depths = max(len(record["mtp_losses"]) for record in history.records)
    key(axes, theme.first, "next token")
    for depth in range(num_depths):
        key(axes, _ahead(theme, depth), f"MTP, depth {depth + 1}")
    if len(held_out.steps_N):
        key(axes, theme.text, "on held-out text", marker="o")
    limit(axes, [*shown, held_out, *held_out_ahead])
    axes.set_ylabel("nats per token")
    finish(axes, history, theme)
    mark_skipped(axes, history, theme)
    legend(axes)
    alt = f"Loss of the next token {_course(column(history.records, 'loss'))} nats"
    if len(held_out.steps_N):
        alt += f", on held-out text {_course(held_out)}"
    return Picture("Loss", alt + ".", figure)


def learning(history: History, theme: Theme) -> Picture | None:
    """The learning rate and the norm of the gradients."""
    rate, norm = (column(history.records, name) for name in ("learning_rate", "gradient_norm"))
    if not len(rate.steps_N) or not len(norm.steps_N):
        return None
    figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    thin = rate.thin()
    above.plot(thin.steps_N, thin.values_N, color=theme.first, linewidth=1.6)
    above.set_ylabel("learning rate")
    above.set_ylim(bottom=0)
    for span in history.spans:
        trend(below, _positive(column(span.records, "gradient_norm")), theme.first)
    logarithmic(below)
    below.set_ylabel("norm of the gradients")
    finish(above, history, theme, named=True, is_last=False)
    finish(below, history, theme, named=False)
    alt = f"Learning rate {_course(rate, '.2g')}; norm of the gradients {_course(norm, '.3g')}."
    return Picture("Learning rate and gradients", alt, figure)


def indexers(history: History, theme: Theme) -> Picture | None:
    """How far each layer's indexer is from the attention paid."""
    figure = Figure(figsize=(_WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    by_span = [columns(span.records, "index_losses") for span in history.spans]
    num_lines = max(map(len, by_span))
    if not num_lines:
        return None
    for lines in by_span:
        layer_lines(axes, [_positive(line.smooth()) for line in lines], history, theme)
    logarithmic(axes)
    axes.set_ylabel("nats per query")
    finish(axes, history, theme)
    layer_legend(figure, axes, num_lines, history, theme)
    taught = [record for record in history.records if record.get("index_losses")]
    alt = (
        f"Divergence of {num_lines} layers' indexers from attention, "
        f"the mean {_course(column(taught, 'index_loss'))} nats."
    )
    return Picture("Indexers: divergence from the attention paid", alt, figure)


def recall(history: History, theme: Theme) -> Picture | None:
    """How much of the attention the tokens get that each layer's indexer selects."""
    lines = columns(history.records, "index_recall")
    if not lines:
        return None
    figure = Figure(figsize=(_WIDTH, 4.0), layout="constrained")
    axes = figure.subplots()
    layer_lines(axes, lines, history, theme)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_ylabel("of all attention")
    finish(axes, history, theme)
    layer_legend(figure, axes, len(lines), history, theme)
    last = [line.values_N[-1] for line in lines]
    alt = (
        f"Share of the attention that selected tokens get, by {len(lines)} layers' indexers; "
        f"last {min(last):.0%} to {max(last):.0%}."
    )
    return Picture("Indexers: attention to the tokens that they select", alt, figure)


def acceptance(history: History, theme: Theme) -> Picture | None:
    """How often what MTP drafts is accepted."""
    lines = columns(history.records, "mtp_acceptance")
    if not lines:
        return None
    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    for depth, line in enumerate(lines):
        color = _ahead(theme, depth)
        points(axes, line, color)
        key(axes, color, f"depth {depth + 1}")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_ylabel("drafts accepted")
    finish(axes, history, theme)
    legend(axes)
    last = ", ".join(f"{line.values_N[-1]:.0%} at depth {d + 1}" for d, line in enumerate(lines))
    return Picture("MTP: drafts accepted on held-out text", f"Drafts accepted: {last}.", figure)


def experts(history: History, theme: Theme) -> Picture | None:
    """How evenly tokens choose experts, at the last evaluation and over time."""
    imbalance = column(history.records, "imbalance")
    loads = [record["expert_loads"] for record in history.records if record.get("expert_loads")]
    if not loads and not len(imbalance.steps_N):
        return None
    height = 0.0 if not loads else 1.4 + min(4.0, 0.3 * len(loads[-1]))
    figure = Figure(figsize=(_WIDTH, 2.2 + height), layout="constrained")
    rows = [height, 2.2] if loads else [2.2]
    panels = figure.subplots(len(rows), 1, height_ratios=rows, squeeze=False)[:, 0]
    alt = ""
    if loads:
        ratios = np.array(loads[-1], np.float64) * len(loads[-1][0])
        heat(figure, panels[0], ratios, theme)
        alt = (
            f"Loads of {ratios.shape[1]} experts in {ratios.shape[0]} layers, "
            f"{ratios.min():.2f} to {ratios.max():.2f} of an even share. "
        )
    for span in history.spans:
        trend(panels[-1], column(span.records, "imbalance"), theme.first)
    panels[-1].set_ylabel("largest load\nover the mean")
    finish(panels[-1], history, theme)
    alt += f"Largest load of an expert over the mean {_course(imbalance)}."
    return Picture("Experts: loads", alt, figure)


def speed(history: History, theme: Theme) -> Picture:
    """Tokens a second, and the share of the devices' arithmetic that they take."""
    tokens, share = (column(history.records, name) for name in ("tokens_per_second", "mfu"))
    has_share = len(share.steps_N) > 0
    figure = Figure(figsize=(_WIDTH, 4.2 if has_share else 2.6), layout="constrained")
    panels = figure.subplots(1 + has_share, 1, sharex=True, squeeze=False)[:, 0]
    for axes, value in zip(panels, (tokens, share), strict=False):
        limit(axes, [trend(axes, value, theme.first)], bottom=0)
        finish(axes, history, theme, named=axes is panels[0], is_last=axes is panels[-1])
    panels[0].set_ylabel("tokens a second")
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    alt = f"Median of {np.median(tokens.values_N):,.0f} tokens a second"
    if has_share:
        panels[1].set_ylabel("MFU")
        panels[1].yaxis.set_major_formatter("{x:.0%}")
        alt += f", MFU of {np.median(share.values_N):.0%}"
    return Picture("Speed", alt + ".", figure)


PICTURES = (losses, learning, indexers, recall, acceptance, experts, speed)


def pictures(history: History, theme: Theme) -> Iterator[tuple[str, Picture]]:
    """All that can be drawn, by name. Within `matplotlib.rc_context(theme.settings)`."""
    for draw in PICTURES:
        picture = draw(history, theme)
        if picture is not None:
            yield draw.__name__, picture


def _ahead(theme: Theme, depth: int) -> str:
    return theme.ahead[depth % len(theme.ahead)]


def _positive(value: Column) -> Column:
    """Without what a logarithmic axis cannot show."""
    return Column(value.steps_N, np.where(value.values_N > 0, value.values_N, np.nan))


def _course(value: Column, form: str = ".3f") -> str:
    """The first and last of a number, in words."""
    known_N = value.values_N[np.isfinite(value.values_N)]
    if not len(known_N):
        return "unknown"
    return f"from {known_N[0]:{form}} to {known_N[-1]:{form}}"
