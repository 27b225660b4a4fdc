"""How the positions of a sequence lie in the slots of its pages, and these on the devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glm5_jax.collectives import Axes, num_shards, shard_index


class Slots(NamedTuple):
    """The slots of one sequence that are held here.

    A page has consecutive positions. Shards divide every page, in order, so that each holds an
    equal part of a sequence however short it is. What has no pages is one page.
    """

    page_part: int  # slots of a page that are held here
    num_pages: int  # of a sequence
    axes: Axes = ()  # of the mesh, that divide the pages

    @property
    def held(self) -> int:
        """Number of slots held here, S."""
        return self.page_part * self.num_pages

    @property
    def everywhere(self) -> int:
        """Number of slots here and on other shards: the positions that there is room for."""
        return self.held * num_shards(self.axes)

    @property
    def are_divided(self) -> bool:
        """Whether other shards hold slots too."""
        return num_shards(self.axes) > 1

    def position(self, slot: jax.Array) -> jax.Array:
        """The positions that slots held here are for."""
        page, within = jnp.divmod(slot, self.page_part)
        part = page * num_shards(self.axes) + shard_index(self.axes)
        return part * self.page_part + within

    def slot(self, position: jax.Array) -> jax.Array:
        """The slots of positions; `held` where another shard has them, or there is no room."""
        part, within = jnp.divmod(position, self.page_part)
        page, shard = jnp.divmod(part, num_shards(self.axes))
        is_here = (shard == shard_index(self.axes)) & (page >= 0) & (page < self.num_pages)
        return jnp.where(is_here, page * self.page_part + within, self.held)
