"""`glm5 score`: logits and log-probabilities of given tokens."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_jax.commands.arguments import add_model, integer, load, require_same_input
from glm5_jax.console import add_command, progress
from glm5_jax.errors import InputError
from glm5_jax.processes import add_processes, is_first, on_first, one_program

if TYPE_CHECKING:
    import numpy as np


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "score",
        _run,
        "Compute the logits and log-probabilities of given tokens.\n\n"
        "The output holds, all in float32, `logits` [B, T, Z], `logprobs` [B, T - 1] of each\n"
        "token given those before it, and with --mtp N `mtp_logits_1` [B, T - 1, Z] to\n"
        "`mtp_logits_N`: row i of depth d predicts token i + 1 + d.",
    )
    add_model(command)
    command.add_argument(
        "--tokens", type=Path, required=True, metavar="FILE.npy", help="token ids, integers [B, T]"
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="FILE.npz", help="file to write"
    )
    command.add_argument(
        "--mtp", type=integer(0), default=0, metavar="N", help="depths of multi-token prediction"
    )
    command.add_argument("--overwrite", action="store_true", help="replace FILE.npz if it exists")
    add_processes(command)


def _run(args: argparse.Namespace) -> int:
    with one_program(args):
        _score(args)
    return 0


def _score(args: argparse.Namespace) -> None:
    from glm5_jax.atomic import new_file, refuse_existing

    if is_first() and not args.overwrite:
        refuse_existing(args.out)
    tokens = _read_tokens(args.tokens)

    import numpy as np

    from glm5_jax.inference.score import check_depth, check_tokens, score
    from glm5_jax.load import read_model_config

    config = read_model_config(args.model).config
    tokens = check_tokens(tokens, config, args.mtp, str(args.tokens))
    check_depth(args.mtp, config)
    require_same_input(args, config=config, tokens=(tokens.shape, tokens.tobytes()))
    with on_first(lambda: new_file(args.out, overwrite=args.overwrite)) as partial:
        model, partition = load(args)
        rows = []
        with progress("score", len(tokens)) as advance:
            for row in score(model, tokens, args.mtp, partition):
                rows.append(row)
                advance(1)
        arrays: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if partial is not None:
            with partial.open("wb") as file:
                np.savez(file, **arrays)
    print(f"{args.out}: {', '.join(f'{name} {list(x.shape)}' for name, x in arrays.items())}")


def _read_tokens(path: Path) -> "np.ndarray":
    import numpy as np

    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # numpy raises whatever a damaged file brings about
        reason = "" if "pickle" in str(error) else f": {error!s:.200}"
        raise InputError(f"{path}: not a .npy file of numbers{reason}") from None
