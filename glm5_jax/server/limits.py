"""What clients may ask for at most."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a request, and of requests together."""

    queue: int = 64  # continuations that wait for a slot
    body_bytes: int = 16 * 2**20
    prompt_tokens: int | None = None  # the engine's context unless given
    messages: int = 1024
    choices: int = 16  # continuations of a prompt
    seconds: float = 600  # until an answer is complete
    drain_seconds: float = 30  # the same, after the signal to end
