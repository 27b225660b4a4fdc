"""From the fields of a body to what the engine is asked."""

import secrets
from collections.abc import Sequence

from glm5_jax.errors import InputError
from glm5_jax.inference.request import LARGEST_SEED, Request, Sampling
from glm5_jax.server.errors import ApiError
from glm5_jax.server.protocol import Body
from glm5_jax.server.service import Service


def check_number(service: Service, body: Body, prompts: int) -> None:
    """Raises `ApiError` if there are too many choices; comes before all that takes time."""
    if body.n > service.limits.choices:
        raise _wrong("n", f"n is {body.n}, expected at most {service.limits.choices}")
    service.worker.check_room(prompts * body.n)


def engine_requests(
    service: Service,
    body: Body,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | None,
    usual: int | None,
    alternatives: int | None,
) -> list[Request]:
    """What the engine is asked for: the choices of the first prompt, then those of the next.

    Args:
      max_tokens: of each, as the client wants it.
      usual: the same where the client does not say; all that there is room for unless given.

    Raises:
      ApiError: a value is wrong, or there is not so much room.
    """
    requests = []
    for prompt in prompts:
        room = _room(service, prompt, max_tokens or 1)
        length = max_tokens or min(usual or room, room)
        # Choices of one seed differ by their numbers.
        sampling = _sampling(service, body)
        for number in range(body.n):
            requests.append(
                Request(
                    prompt=tuple(prompt),
                    max_new_tokens=length,
                    sampling=sampling,
                    number=number,
                    stop=service.stop,
                    alternatives=alternatives,
                )
            )
    return requests


def _room(service: Service, prompt: Sequence[int], wanted: int) -> int:
    context, most = service.worker.context, service.limits.prompt_tokens
    if most is not None and len(prompt) > most:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens, expected at most {most}",
            code="context_length_exceeded",
        )
    if len(prompt) + wanted > context:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens and with {wanted} new ones needs a context of "
            f"{len(prompt) + wanted}, expected at most {context}",
            code="context_length_exceeded",
        )
    return context - len(prompt)


def _sampling(service: Service, body: Body) -> Sampling:
    usual, seed = service.defaults, body.seed
    bias = {int(token): value for token, value in body.logit_bias.items()}
    try:
        return Sampling(
            temperature=usual.temperature if body.temperature is None else body.temperature,
            top_k=body.top_k,
            top_p=usual.top_p if body.top_p is None else body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=bias,
            seed=secrets.randbelow(LARGEST_SEED + 1) if seed is None else seed & LARGEST_SEED,
        )
    except InputError as error:
        raise _wrong(str(error).partition(" ")[0], str(error)) from None


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, message, code="invalid_value", param=param)
