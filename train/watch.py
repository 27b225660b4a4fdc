"""What the steps of a stage were like, to tell one that would do harm from one to learn from."""

import dataclasses

import jax
import jax.numpy as jnp

# Steps that means and deviations are about, and how many there must be to judge another by them.
_REMEMBERED, _ENOUGH = 128, 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watch:
    """Counts of a stage's steps, and what is remembered of those that were taken.

    It is a part of the state that checkpoints hold, so that a run that goes on judges the same.
    """

    taken: jax.Array  # steps from which something was learnt
    remembered: jax.Array  # the last of them that means and variances are about
    skipped: jax.Array  # steps without effect
    in_a_row: jax.Array  # skipped since the last step that was taken
    mean_2: jax.Array  # of the loss, and of the norm of the gradients
    variance_2: jax.Array

    @classmethod
    def new(cls) -> "Watch":
        """Before the first step of a stage."""
        none, zero_2 = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.float32)
        return cls(none, none, none, none, zero_2, zero_2)

    def is_usual(self, loss: jax.Array, gradient_norm: jax.Array, deviations: float) -> jax.Array:
        """Whether both are finite and neither is that many standard deviations above its mean.

        Args:
          deviations: 0 for no limit but infinity. Falls are never unusual, nor is anything among
            the first steps.
        """
        seen_2 = jnp.stack([loss, gradient_norm]).astype(jnp.float32)
        usual_2 = jnp.isfinite(seen_2)
        if deviations:
            limit_2 = self.mean_2 + deviations * jnp.sqrt(self.variance_2)
            usual_2 &= (seen_2 <= limit_2) | (self.remembered < _ENOUGH)
        return jnp.all(usual_2)

    def forgetting(self) -> "Watch":
        """With the counts, and no idea of what is usual."""
        return dataclasses.replace(
            self,
            remembered=jnp.zeros_like(self.remembered),
            mean_2=jnp.zeros_like(self.mean_2),
            variance_2=jnp.zeros_like(self.variance_2),
        )

    def after(self, loss: jax.Array, gradient_norm: jax.Array, is_taken: jax.Array) -> "Watch":
        """With one more step, from which something was learnt or not."""
        seen_2 = jnp.stack([loss, gradient_norm]).astype(jnp.float32)
        # All steps weigh the same until there are too many; then the older, the less.
        remembered = jnp.minimum(self.remembered + 1, _REMEMBERED)
        weight = 1 / remembered.astype(jnp.float32)
        beyond_2 = seen_2 - self.mean_2
        taken = Watch(
            taken=self.taken + 1,
            remembered=remembered,
            skipped=self.skipped,
            in_a_row=jnp.zeros_like(self.in_a_row),
            mean_2=self.mean_2 + weight * beyond_2,
            variance_2=(1 - weight) * (self.variance_2 + weight * jnp.square(beyond_2)),
        )
        left = dataclasses.replace(self, skipped=self.skipped + 1, in_a_row=self.in_a_row + 1)
        return jax.tree.map(lambda one, other: jnp.where(is_taken, one, other), taken, left)
