"""Arguments of the commands that generate text: how tokens are drawn, and what the engine has."""

import argparse
from typing import TYPE_CHECKING

from glm5_jax.commands.arguments import integer, load, non_negative
from glm5_jax.errors import InputError
from glm5_jax.inference.request import LARGEST_SEED, Sampling

if TYPE_CHECKING:
    from glm5_jax.config import Config
    from glm5_jax.inference.engine import Engine

_USUAL = Sampling()
_USUAL_DRAFT = 3  # tokens, if the model can draft


def number(text: str) -> float:
    """The type of an argument that is a number; what it may be is checked where it is used."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected a number") from None


def add_sampling(command: argparse.ArgumentParser, temperature: float | None = 0.0) -> None:
    """Adds the arguments that `sampling_of` reads.

    Args:
      temperature: the default; None leaves it, and `--top-p`, to the model's directory.
    """
    group = command.add_argument_group("drawing tokens")
    said = "" if temperature is not None else " (default: what the model comes with, else 1)"
    group.add_argument(
        "--temperature",
        type=non_negative,
        default=temperature,
        metavar="X",
        help=f"0 takes the likeliest token{said}",
    )
    group.add_argument(
        "--top-k", type=integer(0), metavar="N", help="draw from the N likeliest tokens only"
    )
    group.add_argument(
        "--top-p",
        type=number,
        metavar="P",
        help="draw from the likeliest that together have this probability only",
    )
    group.add_argument(
        "--min-p", type=number, metavar="P", help="leave out what is less likely than P * the best"
    )
    group.add_argument(
        "--repetition-penalty",
        type=number,
        metavar="X",
        help="above 1: repeat prompt and text less",
    )
    group.add_argument(
        "--presence-penalty", type=number, metavar="X", help="-2 to 2; above 0: repeat text less"
    )
    group.add_argument(
        "--frequency-penalty", type=number, metavar="X", help="the same for every time"
    )
    group.add_argument(
        "--seed", type=integer(0, LARGEST_SEED), metavar="S", help="of what is drawn (default: 0)"
    )


def sampling_of(args: argparse.Namespace, usual: Sampling = _USUAL) -> Sampling:
    """How tokens are to be drawn: as the arguments say, and else as usual.

    Raises:
      InputError: a value is none that there can be.
    """
    names = (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
    )
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return Sampling(**{name: getattr(usual, name) for name in names} | given)


def add_engine(command: argparse.ArgumentParser, slots: int = 8) -> None:
    """Adds the arguments that `make_engine` reads.

    Args:
      slots: the default.
    """
    group = command.add_argument_group("engine")
    group.add_argument(
        "--slots", type=integer(1), default=slots, metavar="N", help="texts continued at a time"
    )
    group.add_argument(
        "--context",
        type=integer(1),
        metavar="N",
        help="most tokens of a prompt and its continuation (default: what there is room for)",
    )
    group.add_argument(
        "--cache-tokens",
        type=integer(1),
        metavar="N",
        help="tokens that there is room for in all (default: 4096 for every slot, and the context)",
    )
    group.add_argument(
        "--draft-tokens",
        type=integer(0, 16),
        metavar="N",
        help="drafted at a time by the MTP layer; changes the speed, and the text by rounding at "
        f"most (default: {_USUAL_DRAFT} if there is such a layer, else 0)",
    )


def check_engine(args: argparse.Namespace, config: "Config") -> None:
    """Raises `InputError` if an argument asks for what the model does not have."""
    if args.context is not None and args.context > config.max_positions:
        raise InputError(
            f"--context is {args.context}, expected at most the model's {config.max_positions}"
        )
    if args.draft_tokens and not config.num_mtp_layers:
        raise InputError(
            f"--draft-tokens is {args.draft_tokens}, but the model has no MTP layer: expected 0"
        )


def make_engine(
    args: argparse.Namespace, num_tokens: int | None, context: int | None = None
) -> "Engine":
    """Loads the model that the arguments name, and makes an engine of it.

    Args:
      num_tokens: ids from here on are not generated; those that pad the vocabulary if None.
      context: the default.

    Raises:
      InputError: the model cannot be loaded, or does not have what is asked for.
    """
    from glm5_jax.inference.engine import Engine
    from glm5_jax.load import read_model_config

    check_engine(args, read_model_config(args.model).config)
    model, partition = load(args)
    config, drafts = model.config, args.draft_tokens  # transformers saves no MTP layer
    if drafts is None:
        drafts = _USUAL_DRAFT if config.num_mtp_layers else 0
    return Engine(
        model,
        partition,
        slots=args.slots,
        context=args.context or context,
        num_tokens=None if num_tokens is None else min(num_tokens, config.vocab_size),
        cache_tokens=args.cache_tokens,
        draft_tokens=drafts,
    )
