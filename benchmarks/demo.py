"""The main job on this machine: text, a small pretrained GLM-5, conversion, the same numbers, text.

Every step is one of the commands a user would type, printed before it runs. Files are left in
build/demo.
"""

import json
import shutil
import time
from pathlib import Path

import numpy as np

from benchmarks.arguments import parser, run
from benchmarks.commands import NAMES, run_command
from benchmarks.output import describe_machine
from glm5_jax.commands.arguments import integer
from glm5_jax.errors import InputError
from train.data import Data

_MARK = "made-by-the-demo"  # a file in a folder that may be made anew
PROMPTS = (
    "import os\nimport sys\n\ndef main(",
    "class Error(Exception):\n    ",
    "    def __init__(self, ",
    "for name in ",
)


class Demo:
    """Runs commands one by one and remembers how long each took."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seconds: dict[str, float] = {}

    def run(self, module: str, *arguments: object) -> str:
        """Runs a command; returns what it printed, having shown it."""
        began = time.perf_counter()
        printed = run_command(module, *arguments)
        self.seconds[f"{NAMES[module]} {arguments[0]}"] = time.perf_counter() - began
        return printed


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    command_line = parser(__doc__)
    command_line.add_argument("--folder", type=Path, default=Path("build/demo"))
    command_line.add_argument("--steps", type=integer(1), default=500, help="of training")
    command_line.add_argument("--max-bytes", type=integer(1), default=8_000_000, help="of text")
    args = command_line.parse_args(arguments)
    if args.folder.exists():
        if not (args.folder / _MARK).exists():
            raise InputError(f"{args.folder}: is not of a demo, expected a new folder")
        shutil.rmtree(args.folder)
    args.folder.mkdir(parents=True)
    (args.folder / _MARK).touch()
    began = time.perf_counter()
    demo = Demo(args.folder)
    trained = _train(demo, args.steps, args.max_bytes)
    equal = _convert(demo, trained)
    texts = _generate(demo, demo.folder / "native")
    summary = demo.run("train", "report", demo.folder / "run")
    seconds = time.perf_counter() - began
    lines = [
        "",
        "=" * 78,
        "A GLM-5 with dense and MoE layers, a sparse-attention indexer, a shared selection and a",
        f"multi-token prediction layer, trained, converted and run in {seconds:.0f} s:",
        "",
        *summary.splitlines(),
        *equal,
        "",
        "Continuations of the converted model, temperature 0.7:",
        *texts,
    ]
    print("\n".join(lines))
    report = {
        "command": "make demo",
        "machine": describe_machine(),
        "seconds": {"in all": round(seconds, 1)}
        | {command: round(spent, 1) for command, spent in demo.seconds.items()},
        "summary": [*summary.splitlines(), *equal],
        "texts": texts,
    }
    path = args.folder / "demo.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, args.results / "demo.json")
        shutil.copyfile(args.folder / "run" / "report" / "losses.png", args.results / "demo.png")
    return 0


def _train(demo: Demo, steps: int, max_bytes: int) -> Path:
    """Tokenizes the standard library and trains on it; returns the last checkpoint."""
    data, run = demo.folder / "data", demo.folder / "run"
    demo.run("train", "prepare", data, "--max-bytes", max_bytes, "--vocab-size", 2048)
    demo.run("train", "run", data, run, "--file", "demo", "--steps", steps)
    return run / f"step-{steps:06d}"


def _convert(demo: Demo, trained: Path) -> list[str]:
    """To the published layout and back; returns what shows that nothing has changed."""
    published, native = demo.folder / "published", demo.folder / "native"
    demo.run("convert", "to-hf", trained, published)
    demo.run("convert", "from-hf", published, native)
    difference = demo.run("convert", "diff", trained, native).strip()

    tokens = demo.folder / "tokens.npy"
    held_out = Data(demo.folder / "data").tokens("held_out")
    np.save(tokens, held_out.read(0, 2 * 256).reshape(2, 256))
    scores = {}
    for model in (published, native):
        out = demo.folder / f"{model.name}.npz"
        demo.run(
            "glm5_jax", "score", "--model", model, "--tokens", tokens, "--out", out, "--mtp", 1
        )
        with np.load(out) as file:
            scores[model.name] = dict(file)
    gaps = {
        name: float(np.abs(scores["published"][name] - scores["native"][name]).max())
        for name in ("logits", "mtp_logits_1")
    }
    return [
        f"converted and back   {difference}",
        f"logits               published and native differ by {gaps['logits']:.3g} at most, "
        f"MTP logits by {gaps['mtp_logits_1']:.3g}",
    ]


def _generate(demo: Demo, model: Path) -> list[str]:
    """Continues a few prompts of code."""
    prompts = demo.folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    options = ("--max-new-tokens", 60, "--temperature", 0.7, "--json")
    printed = demo.run("glm5_jax", "generate", "--model", model, "--prompts", prompts, *options)
    records = [json.loads(line) for line in printed.splitlines()]
    return [
        f"--- {prompt!r}\n{prompt}{record['text']}"
        for prompt, record in zip(PROMPTS, records, strict=True)
    ]


if __name__ == "__main__":
    run(main)
