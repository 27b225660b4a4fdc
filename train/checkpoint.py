"""Checkpoints of a run: native model directories with the rest of the state beside the weights."""

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec

from glm5_jax.atomic import new_directory
from glm5_jax.checkpoint import (
    PARAMS_NAME,
    is_native,
    restore_checkpoint,
    scheme_of,
    write_model,
)
from glm5_jax.chunks import layout
from glm5_jax.config import Config
from glm5_jax.errors import InputError
from glm5_jax.load import read_model_config
from glm5_jax.mesh import put
from glm5_jax.model import Glm5
from glm5_jax.params import leaf_path, leaves_by_path
from glm5_jax.processes import is_first, on_first
from glm5_jax.sharding import Partition
from glm5_jax.strict_json import read_json
from glm5_jax.tree_store import TreeReader
from glm5_jax.tree_writer import write_tree
from train.optimizer import Params
from train.stages import Stage
from train.state import TrainState, assemble

_BESIDE_NAME = "training"
_STAGE_NAME = "stage.json"
AVERAGE_NAME = "average"  # a native model directory in that of the checkpoint


Shapes = Mapping[str, tuple[int, ...]]  # of leaves, by path


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return run / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """After how many steps a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step-"))


class Misfit(InputError):
    """A checkpoint is whole, and not one of such a run."""


def save(
    run: Path, config: Config, state: TrainState, stage: Stage, text_from: Path, made_as: str
) -> Path:
    """Saves a state of a stage, whose arrays may be numpy's, under the number of its step.

    Args:
      made_as: what the run is, a digest.
    """
    destination = path_of(run, int(state.step))
    with on_first(lambda: new_directory(destination)) as directory:

        def folder(name: str) -> Path | None:
            return None if directory is None else directory / name

        write_model(directory, assemble(config, state.params), text_from)
        if state.average:
            average = assemble(config, state.params | state.average)
            if (average_folder := folder(AVERAGE_NAME)) is not None:
                average_folder.mkdir()
            write_model(average_folder, average, text_from)
        arrays = leaves_by_path(_beside(state))
        leaves = {leaf: layout(array.shape, array.dtype) for leaf, array in arrays.items()}
        if (file := folder(_STAGE_NAME)) is not None:
            file.write_text(json.dumps(_place(stage) | {"made_as": made_as}))
        write_tree(folder(_BESIDE_NAME), arrays, leaves, beside=[_STAGE_NAME])
    return destination


def _beside(state: TrainState) -> dict[str, object]:
    """What is no model's weight."""
    return {"optimizer": state.optimizer, "watch": state.watch}


def _place(stage: Stage) -> dict[str, int]:
    """What the counts of a state are about."""
    return {"stage": stage.number, "first_step": stage.first}


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    found = [path for path in run.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=step_of)


def remove_old(run: Path, keep: int, stage_ends: Collection[int]) -> None:
    """Removes all checkpoints but the newest `keep` and those that a stage ended with."""
    for old in saved(run)[:-keep] if is_first() else ():
        if step_of(old) not in stage_ends:
            # First it gets the name of what is unfinished, for then it is no checkpoint any more.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial-removed")))


def weights(directory: Path, config: Config, partition: Partition) -> Params:
    """The weights of a native checkpoint, in float32, to start another run with.

    Raises:
      InputError: it is none, damaged, or of a model with other weights.
    """
    if not is_native(directory):
        raise InputError(f"{directory}: is no native checkpoint, expected one")
    _require_weights(directory, config)
    if scheme := scheme_of(directory):
        raise InputError(
            f"{directory}: has weights in {scheme}, expected plain ones: training moves them by "
            "less than a step of those"
        )
    return leaves_by_path(restore_checkpoint(directory, "float32", partition))


def _require_weights(directory: Path, config: Config) -> None:
    TreeReader(directory / PARAMS_NAME)  # says so if the config is damaged
    held = read_model_config(directory).config
    shapes = [
        {path: spec.shape for path, spec in leaves_by_path(Glm5(each)).items()}
        for each in (held, config)
    ]
    _require_same_shapes(directory, "the config's", *shapes)


def _require_same_shapes(directory: Path, whose: str, found: Shapes, wanted: Shapes) -> None:
    for path in sorted(found.keys() | wanted.keys()):
        if found.get(path) != wanted.get(path):
            raise Misfit(
                f"{directory}: {path} has the shape {found.get(path)}, expected {whose} "
                f"{wanted.get(path)}"
            )


def restore(
    directory: Path,
    config: Config,
    stage: Stage,
    partition: Partition,
    template: TrainState,
    made_as: str,
) -> TrainState:
    """Restores a state, whatever mesh it was saved from.

    Args:
      template: the state as `abstract_state` gives it.
      made_as: what the run is now. If it was another, other losses are usual from here on.

    Raises:
      Misfit: the checkpoint is not one of such weights, such an optimizer or that stage.
      InputError: it is damaged.
    """
    reader = TreeReader(directory / _BESIDE_NAME)
    written, wanted = read_json(directory / _STAGE_NAME), _place(stage)
    found = {name: written.get(name) for name in wanted}
    if found != wanted:
        raise Misfit(f"{directory}: is of {found}, expected {wanted}")
    beside = _beside(template)
    _require_same_shapes(
        reader.directory,
        "the optimizer's",
        {path: place.shape for path, place in reader.leaves.items()},
        {path: leaf.shape for path, leaf in leaves_by_path(beside).items()},
    )
    _require_weights(directory, config)
    if template.average and not (directory / AVERAGE_NAME).exists():
        raise Misfit(f"{directory}: has no average of the weights, expected average_decay 0")
    params = leaves_by_path(restore_checkpoint(directory, partition=partition))
    average = {}
    if template.average:
        held = leaves_by_path(restore_checkpoint(directory / AVERAGE_NAME, partition=partition))
        average = {path: held[path] for path in template.average}
    restored = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: reader.restore(leaf_path(keys), leaf.sharding), beside
    )
    if written.get("made_as") != made_as:
        with jax.set_mesh(partition.mesh):
            restored["watch"] = restored["watch"].forgetting()
    step = put(np.array(step_of(directory), np.int32), partition.mesh, PartitionSpec())
    return TrainState(step, params, average=average, **restored)
