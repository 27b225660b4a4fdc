"""Checkpoints of a run: native model directories with the optimizer's state beside the weights."""

import re
import shutil
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

_OPTIMIZER_NAME = "optimizer"


def save(run: Path, config: Config, state: TrainState, text_from: Path, keep: int) -> Path:
    """Saves a state under its step number, and removes all but the newest `keep` checkpoints."""
    destination = run / f"step-{int(state.step):06d}"
    with on_first(lambda: new_directory(destination)) as directory:
        write_model(directory, assemble(config, state.params), text_from)
        arrays = leaves_by_path(state.optimizer)
        leaves = {leaf: layout(array.shape, array.dtype) for leaf, array in arrays.items()}
        tree = None if directory is None else directory / _OPTIMIZER_NAME
        write_tree(tree, arrays, leaves)
    if is_first():
        for old in saved(run)[:-keep]:
            shutil.rmtree(old)
    return destination


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted(path for path in run.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))


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
    model = restore_checkpoint(directory, partition=partition)
    if model.config != config:
        raise InputError(f"{directory}: was saved with another config than that of the run")
    reader = TreeReader(directory / _OPTIMIZER_NAME)
    expected = leaves_by_path(template.optimizer)
    if expected.keys() != reader.leaves.keys():
        raise InputError(f"{reader.directory}: was saved by another optimizer")
    optimizer = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: reader.restore(leaf_path(keys), leaf.sharding), template.optimizer
    )
    number = np.array(int(directory.name.removeprefix("step-")), np.int32)
    step = put(number, partition.mesh, PartitionSpec())
    return TrainState(step, leaves_by_path(model), optimizer)
