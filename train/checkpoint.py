"""Checkpoints of a run: native model directories with the rest of the state beside the weights."""

import re
import shutil
from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec

from glm5_jax.atomic import new_directory
from glm5_jax.checkpoint import restore_checkpoint, write_model
from glm5_jax.chunks import layout
from glm5_jax.config import Config
from glm5_jax.errors import InputError
from glm5_jax.load import read_model_config
from glm5_jax.mesh import put
from glm5_jax.model import Glm5
from glm5_jax.params import leaf_path, leaves_by_path
from glm5_jax.processes import is_first, on_first
from glm5_jax.sharding import Partition
from glm5_jax.tree_store import TreeReader, write_tree
from train.optimizer import Params
from train.state import TrainState, assemble

_BESIDE_NAME = "training"
AVERAGE_NAME = "average"  # a native model directory in that of the checkpoint


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return run / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """After how many steps a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def save(run: Path, config: Config, state: TrainState, text_from: Path) -> Path:
    """Saves a state, whose arrays may be numpy's, under the number of its step."""
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
        write_tree(folder(_BESIDE_NAME), arrays, leaves)
    return destination


def _beside(state: TrainState) -> dict[str, object]:
    """What is no model's weight."""
    return {"optimizer": state.optimizer, "watch": state.watch}


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    found = [path for path in run.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=step_of)


def remove_old(run: Path, keep: int, stage_ends: Collection[int]) -> None:
    """Removes all checkpoints but the newest `keep` and those that a stage ended with."""
    for old in saved(run)[:-keep] if is_first() else ():
        if step_of(old) not in stage_ends:
            shutil.rmtree(old)


def weights(directory: Path, config: Config, partition: Partition) -> Params:
    """The weights of a native checkpoint, in float32, to start another run with.

    Raises:
      InputError: it is damaged, or of a model with other weights.
    """
    held = read_model_config(directory).config
    found, wanted = (leaves_by_path(Glm5(each)) for each in (held, config))
    for path in sorted(found.keys() | wanted.keys()):
        shapes = [specs[path].shape if path in specs else None for specs in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{directory}: {path} has the shape {shapes[0]}, expected the config's {shapes[1]}"
            )
    return leaves_by_path(restore_checkpoint(directory, "float32", partition))


def restore(
    directory: Path, config: Config, partition: Partition, template: TrainState
) -> TrainState:
    """Restores a state, whatever mesh it was saved from.

    Args:
      template: the state as `abstract_state` gives it.

    Raises:
      InputError: the checkpoint is damaged, or not one of this config and optimizer.
    """
    params = _restore_weights(directory, config, partition)
    average = {}
    if template.average:
        held = _restore_weights(directory / AVERAGE_NAME, config, partition)
        average = {path: held[path] for path in template.average}
    reader = TreeReader(directory / _BESIDE_NAME)
    beside = _beside(template)
    if leaves_by_path(beside).keys() != reader.leaves.keys():
        raise InputError(f"{reader.directory}: was saved by another optimizer")
    restored = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: reader.restore(leaf_path(keys), leaf.sharding), beside
    )
    step = put(np.array(step_of(directory), np.int32), partition.mesh, PartitionSpec())
    return TrainState(step, params, average=average, **restored)


def _restore_weights(directory: Path, config: Config, partition: Partition) -> Params:
    model = restore_checkpoint(directory, partition=partition)
    if model.config != config:
        raise InputError(f"{directory}: was saved with another config than that of the run")
    return leaves_by_path(model)
