"""Whether settings are for a model, on a mesh: what a run and a plan of it ask before all else."""

import math
from collections.abc import Mapping, Sequence

from glm5_jax.collectives import BATCH
from glm5_jax.config import Config
from glm5_jax.errors import InputError
from glm5_jax.model import Glm5
from glm5_jax.sharding import TRAIN, require_divisible
from train.settings import Settings
from train.stages import batch_sizes


def common_batch(stages: Sequence[Settings]) -> int:
    """A number of rows that divides every batch of a run: the mesh has to divide it."""
    return math.gcd(*(settings.smallest_batch for settings in stages))


def require_fit(config: Config, settings: Settings, mesh: Mapping[str, int]) -> None:
    """Refuses settings that are not for a model of the config, on a mesh of such sizes.

    Raises:
      InputError: it says which setting, and what would do.
    """
    for size in batch_sizes(settings):
        require_divisible(Glm5(config), TRAIN, mesh, size)
        rows = size // math.prod(mesh[axis] for axis in BATCH)
        if rows % settings.microbatches:
            raise InputError(
                f"microbatches is {settings.microbatches}, expected a divisor of the {rows} rows "
                "that each device has of a batch"
            )
    if settings.mtp_depth > 0 and config.num_mtp_layers == 0:
        raise InputError(
            f"mtp_depth is {settings.mtp_depth}, expected 0: the config's "
            "num_nextn_predict_layers is 0"
        )
    if settings.length > config.max_positions:
        raise InputError(
            f"length is {settings.length}, expected at most the config's max_position_embeddings "
            f"{config.max_positions}"
        )
