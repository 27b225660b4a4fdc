"""The rows of a batch, on the devices that compute with them."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from glm5_jax.sharding import ROWS, Partition, from_parts
from train.pipeline import Reader


def next_batch(reader: Reader, size: int, partition: Partition) -> tuple[jax.Array, jax.Array]:
    """The tokens and segments of the next rows; each process reads those that its devices need.

    Returns:
      tokens_BT, segment_BT: of the `size` rows of all processes.
    """
    sharding = NamedSharding(partition.mesh, ROWS)
    needed = sharding.addressable_devices_indices_map((size,)).values()
    bounds = [rows.indices(size)[:2] for index in needed for rows in index or ()]
    # One run of rows; where meshes lie so that it is several, what is between them is read too.
    first, end = min(start for start, _ in bounds), max(stop for _, stop in bounds)
    tokens, segments = reader.next(size, slice(first, end))

    def on_devices(part: np.ndarray) -> jax.Array:
        def read(wanted: tuple[slice, ...]) -> np.ndarray:
            rows, columns = wanted
            return part[rows.start - first : rows.stop - first, columns]

        return from_parts((size, part.shape[1]), sharding, read)

    return on_devices(tokens), on_devices(segments)
