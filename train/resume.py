"""Where a run goes on."""

import errno
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree

from glm5_jax.config import Config
from glm5_jax.console import notice
from glm5_jax.coordination import require_same, said_by_all
from glm5_jax.errors import InputError
from glm5_jax.processes import is_first
from glm5_jax.sharding import Partition
from train import checkpoint
from train.claim import RUN_NAME
from train.data import Data
from train.loop import Part
from train.metrics import METRICS_NAME, forget_later_steps
from train.state import TrainState, abstract_state

_LONGEST_WAIT = 300  # seconds that processes wait for each other


def meet(run: Path, data: Data, config: Config) -> None:
    """Returns once the run is claimed, and all processes agree on what they see."""
    said_by_all("run is claimed", "", _LONGEST_WAIT)
    saved = checkpoint.saved(run)
    seen = {
        f"{run / RUN_NAME}": "there" if (run / RUN_NAME).exists() else "missing",
        f"the newest checkpoint in {run}": saved[-1].name if saved else "none",
        "the model's config": config,
        f"the digest of {data.directory}": data.digest,
    }
    require_same("run", seen, _LONGEST_WAIT)


def resume(
    run: Path, config: Config, parts: Sequence[Part], partition: Partition, made_as: str
) -> TrainState | None:
    """The state of the newest checkpoint that is whole; None if there is no checkpoint.

    Those that are damaged are named, and put aside once another is found to go on from.

    Args:
      made_as: what the run is, a digest.

    Raises:
      InputError: all are damaged, or one is not of such a run.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoint.saved(run)):
        state, trouble = _try_to_restore(path, config, parts, partition, made_as)
        told = said_by_all(f"restored {path.name}", trouble, _LONGEST_WAIT)
        if state is not None and not any(told):
            for bad, why in damaged.items():
                notice(f"{why}; the one before it is used")
                if is_first():
                    _put_aside(bad)
            notice(f"{run}: goes on from {path.name}")
            if is_first():
                forget_later_steps(run / METRICS_NAME, int(state.step))
            return state
        damaged[path] = next(filter(None, told))
    if damaged:
        raise InputError(next(iter(damaged.values())))
    return None


def _try_to_restore(
    path: Path, config: Config, parts: Sequence[Part], partition: Partition, made_as: str
) -> tuple[TrainState | None, str]:
    """The state of a checkpoint, or what is damaged in it."""
    step = checkpoint.step_of(path)
    for part in parts:
        if part.stage.first < step <= part.stage.end:
            template = abstract_state(config, part.recipe, partition)
            try:
                state = checkpoint.restore(path, config, part.stage, partition, template, made_as)
                return state, ""
            except checkpoint.Misfit:
                raise
            except InputError as error:
                return None, str(error)
            except OSError as error:
                if error.errno != errno.EIO:  # the disk's; others are no damage
                    raise
                return None, f"{path}: {error.strerror}"
    raise InputError(f"{path}: is beyond the {parts[-1].stage.end} steps of the run")


def _put_aside(damaged: Path) -> None:
    """Renames a checkpoint so that it is none; only the last of a step is kept so."""
    aside = damaged.with_name(f"damaged-{damaged.name}")
    if aside.exists():
        rmtree(aside)
    damaged.rename(aside)
