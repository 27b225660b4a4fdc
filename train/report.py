"""A page of pictures and a few lines of how a run went."""

import html
import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm5_jax.atomic import new_file
from glm5_jax.errors import InputError
from glm5_jax.strict_json import read_json
from train.claim import RUN_NAME
from train.history import Column, History, column, columns
from train.metrics import METRICS_NAME, read_metrics

REPORT_NAME = "report"
PAGE_NAME = "index.html"


def report(run: Path) -> str:
    """Draws a run into the folder `report` in it; returns the lines that sum it up.

    Raises:
      InputError: the run has no metrics yet, or they are damaged.
    """
    records = read_metrics(run / METRICS_NAME)
    if not records:
        raise InputError(f"{run / METRICS_NAME}: holds no step yet")
    origin = read_json(run / RUN_NAME) if (run / RUN_NAME).exists() else {}
    history = History(records, _num_layers(origin))
    facts = _facts(history)
    page = run / REPORT_NAME / PAGE_NAME
    pictures = _draw(history, page.parent)
    template = string.Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    with new_file(page, overwrite=True) as partial:
        text = template.substitute(
            title=html.escape(f"Training run {run.resolve().name}"),
            numbers=_table(facts),
            pictures=pictures,
            origin=_origin(origin),
        )
        partial.write_text(text, encoding="utf-8")
    lines = [*facts.items(), ("page", str(page))]
    width = 1 + max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}} {value}" for label, value in lines)


def _num_layers(origin: Mapping[str, Any]) -> int | None:
    config = origin.get("config")
    found = config.get("num_hidden_layers") if isinstance(config, dict) else None
    return found if isinstance(found, int) else None


def _facts(history: History) -> dict[str, str]:
    """What the run came to, by label."""
    records = history.records
    facts = {"steps": f"{records[-1]['step']:,}"}
    if len(history.spans) > 1:
        stages = [(span.stage, span.records[-1]["step"]) for span in history.spans]
        facts["stages"] = ", ".join(f"{stage} to step {step:,}" for stage, step in stages)
    if skipped := sum(record.get("skipped") is True for record in records):
        facts["updates skipped"] = f"{skipped:,}"
    if "tokens" in records[-1]:
        facts["tokens"] = f"{records[-1]['tokens']:,}"
    facts["loss"] = f"{_course(column(records, 'loss'))} nats per token"
    for depth, value in enumerate(columns(records, "mtp_losses"), start=1):
        facts[f"MTP loss, depth {depth}"] = _course(value)
    if taught := [record for record in records if record.get("index_losses")]:
        facts["indexer divergence"] = _course(column(taught, "index_loss"))
    evaluated = [record for record in records if "held_out_loss" in record]
    if evaluated:
        facts |= _evaluated(evaluated[-1])
    speed = np.median(column(records, "tokens_per_second").values_N)
    facts["speed"] = f"{speed:,.0f} tokens/s"
    each = column(records, "tokens_per_second_per_device")
    if len(each.steps_N) and (each_speed := np.median(each.values_N)) != speed:
        facts["speed"] += f", {each_speed:,.0f} per device"
    if len(share := column(records, "mfu").values_N):
        facts["speed"] += f", MFU {np.median(share):.1%}"
    return facts


def _evaluated(record: Mapping[str, Any]) -> dict[str, str]:
    """The last evaluation."""
    loss, bits = record["held_out_loss"], record["bits_per_byte"]
    facts = {"held-out loss": f"{loss:.3f}, {bits:.3f} bits per byte of text"}
    for depth, value in enumerate(record.get("held_out_mtp_losses", []), start=1):
        facts[f"held-out MTP, depth {depth}"] = f"{value:.3f}"
    if shares := record.get("mtp_acceptance"):
        facts["drafts accepted"] = ", ".join(f"{share:.1%}" for share in shares)
    if shares := record.get("index_recall"):
        mean, least = np.mean(shares), min(shares)
        facts["indexer recall"] = f"{mean:.1%} in the mean of layers, {least:.1%} at least"
    return facts


def _course(value: Column) -> str:
    known_N = value.values_N[np.isfinite(value.values_N)]
    return f"{known_N[0]:.3f} -> {known_N[-1]:.3f}" if len(known_N) else "unknown"


def _draw(history: History, folder: Path) -> str:
    """Draws all pictures for light and for dark pages; returns what shows them."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise InputError(
            "pictures need the package matplotlib: pip install 'glm5-jax[train]'"
        ) from None
    from train.plots import PICTURES, pictures
    from train.strokes import DARK, LIGHT

    shown = {}
    for theme, suffix in ((DARK, "-dark"), (LIGHT, "")):
        missing = {draw.__name__ for draw in PICTURES}
        with rc_context(theme.settings):
            for name, picture in pictures(history, theme):
                missing.remove(name)
                with new_file(folder / f"{name}{suffix}.png", overwrite=True) as partial:
                    picture.figure.savefig(partial, format="png")
                width, height = picture.figure.get_size_inches() * picture.figure.dpi
                shown[name] = (
                    f"<h2>{html.escape(picture.title)}</h2>\n<figure><picture>"
                    f'<source srcset="{name}-dark.png" media="(prefers-color-scheme: dark)">'
                    f'<img src="{name}.png" alt="{html.escape(picture.alt)}" '
                    f'width="{width:.0f}" height="{height:.0f}"></picture></figure>'
                )
        for name in missing:  # drawn when the run was another
            (folder / f"{name}{suffix}.png").unlink(missing_ok=True)
    return "\n".join(shown.values())


def _origin(origin: Mapping[str, Any]) -> str:
    """What `run.json` says, a table for each of its parts and for each stage."""
    parts, named = [], dict(origin)
    if isinstance(stages := origin.get("stages"), list):
        del named["stages"]
        named = {f"stage {number}": each for number, each in enumerate(stages, start=1)} | named
    for name, values in named.items():
        values = values if isinstance(values, dict) else {name: values}
        rows = {key: json.dumps(value) for key, value in values.items()}
        parts.append(
            f"<details><summary>{html.escape(name)}</summary>\n<table>\n{_table(rows)}\n</table>"
            "</details>"
        )
    return "\n".join(parts) or f"<p>There is no {RUN_NAME}.</p>"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(
        f'<tr><th scope="row">{html.escape(label)}</th><td>{html.escape(value)}</td></tr>'
        for label, value in rows.items()
    )
