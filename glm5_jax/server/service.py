"""What all requests are answered with."""

import asyncio
import dataclasses

from glm5_jax.errors import InputError
from glm5_jax.inference.request import Sampling
from glm5_jax.inference.tokenizer import Tokenizer
from glm5_jax.server.errors import ApiError
from glm5_jax.server.limits import Limits
from glm5_jax.server.metrics import Metrics
from glm5_jax.server.worker import Worker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """A model that is served."""

    worker: Worker
    metrics: Metrics
    tokenizer: Tokenizer
    name: str  # by which clients ask for the model
    stop: frozenset[int]  # tokens that end a text
    defaults: Sampling  # of its temperature and top_p
    limits: Limits = Limits()
    key: str | None = None  # that clients must show
    hosts: frozenset[str] | None = None  # that clients may know the server by; any unless given

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text; long ones take a while, in which others are served."""
        try:
            return await asyncio.to_thread(self.tokenizer.encode, text, special=special)
        except InputError as error:
            raise ApiError(400, str(error), code="invalid_value") from None
