"""What keeping weights in few bits does to a trained model: bytes, errors, and what it predicts.

`python -m benchmarks.quantization --results benchmarks/results`.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import arguments
from benchmarks.commands import add_model, prepare_for, run_command
from benchmarks.output import own_command, write_results
from convert.quantize import quantize
from glm5_jax.checkpoint import PARAMS_NAME, is_native
from glm5_jax.inference.score import score
from glm5_jax.load import load_model
from glm5_jax.quantization import SCHEMES
from train.data import Data

_ROWS, _LENGTH = 32, 256


class Predictions(NamedTuple):
    """Of a model, about the same text."""

    log_probs: np.ndarray  # [rows, T, Z], of the next token
    logits: np.ndarray

    def nats_from(self, other: "Predictions") -> float:
        """The mean divergence per token of other predictions from these, in nats."""
        difference = self.log_probs - other.log_probs
        return float((np.exp(self.log_probs) * difference).sum(-1).mean())

    def loss(self, tokens: np.ndarray) -> float:
        """Nats per token."""
        chosen = np.take_along_axis(self.log_probs[:, :-1], tokens[:, 1:, None], -1)
        return float(-chosen.mean())


def predictions(directory: Path, tokens: np.ndarray) -> Predictions:
    """What a model predicts after each token, computed in float32."""
    model = load_model(directory, "float32")
    logits = np.stack([row["logits"] for row in score(model, tokens)]).astype(np.float64)
    peak = logits.max(-1, keepdims=True)
    log_total = peak + np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    return Predictions(logits - log_total, logits)


def held_out_text(data: Path) -> np.ndarray:
    """Pieces of code that the model was not trained on, [rows, T]."""
    tokens = Data(data).tokens("held_out")
    starts = np.linspace(0, len(tokens) - _LENGTH, _ROWS).astype(int)
    return np.array([tokens.read(start, start + _LENGTH) for start in starts])


def measure(native: Path, tokens: np.ndarray, work: Path) -> tuple[list[dict[str, Any]], Any]:
    """Each scheme, and the errors of each kind of tensor by scheme."""
    plain = predictions(native, tokens)
    rows = [_row("plain", native, plain, plain, tokens)]
    errors: dict[str, dict[str, list[float]]] = {}
    for scheme in SCHEMES:
        made = quantize(native, work / scheme, scheme)
        assert made is not None
        for name, error in made.errors.items():
            kind = re.sub(r"\d+", "*", name)
            errors.setdefault(kind, {}).setdefault(scheme, []).append(error)
        found = predictions(work / scheme, tokens)
        rows.append(_row(scheme, work / scheme, plain, found, tokens))
        # The same weights, multiplied out before the model sees them.
        back = work / f"{scheme}-out"
        run_command("convert", "to-hf", work / scheme, back, "--dtype", "float32")
        expected = predictions(back, tokens).logits
        gap = np.abs(found.logits - expected).max() / np.abs(expected).max()
        rows[-1]["from multiplied out"] = float(gap)
    return rows, errors


def _row(
    scheme: str, directory: Path, plain: Predictions, found: Predictions, tokens: np.ndarray
) -> dict[str, Any]:
    stored = (path for path in (directory / PARAMS_NAME).rglob("*") if path.is_file())
    same = (plain.logits.argmax(-1) == found.logits.argmax(-1)).mean()
    return {
        "weights": scheme,
        "bytes": sum(path.stat().st_size for path in stored),
        "nats from plain": plain.nats_from(found),
        "same first choice": float(same),
        "loss": found.loss(tokens),
        "from multiplied out": 0.0,
    }


def _lines(rows: list[dict[str, Any]], errors: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    yield "| weights | bytes | KL from plain, nats per token | same first choice | loss |"
    yield "|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['weights']} | {row['bytes']:,} | {row['nats from plain']:.2g} "
            f"| {row['same first choice']:.2%} | {row['loss']:.4f} |"
        )
    yield ""
    yield "Relative error (root mean square) of tensors, mean and largest:"
    yield ""
    yield f"| tensors | {' | '.join(SCHEMES)} |"
    yield "|---|" + "---|" * len(SCHEMES)
    for kind, found in errors.items():
        cells = (
            f"{np.mean(found[scheme]):.2%}, {max(found[scheme]):.2%}"
            if scheme in found
            else "plain"
            for scheme in SCHEMES
        )
        yield f"| `{kind}` | {' | '.join(cells)} |"
    yield ""
    largest = max(row["from multiplied out"] for row in rows)
    yield (
        "Logits are those of the same weights multiplied out beforehand, to "
        f"{largest:.1e} of the largest."
    )


def main() -> int:
    """Measures, prints and writes."""
    command_line = arguments.parser(__doc__)
    add_model(command_line)
    args = command_line.parse_args()
    prepare_for(args.model, args.data)
    tokens = held_out_text(args.data)
    with tempfile.TemporaryDirectory() as folder:
        native = args.model
        if not is_native(native):
            native = Path(folder, "native")
            run_command("convert", "from-hf", args.model, native)
        rows, errors = measure(native, tokens, Path(folder))
    lines = list(_lines(rows, errors))
    print("\n".join(lines))
    if args.results is not None:
        command = own_command("quantization")
        write_results(args.results, "quantization", command, rows, lines)
    return 0


if __name__ == "__main__":
    arguments.run(main)
