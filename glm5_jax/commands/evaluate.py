"""`glm5 eval`: perplexity of text, and lm-eval's tasks."""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_jax.commands.arguments import add_model, integer, load, require_same_input
from glm5_jax.console import add_command, progress
from glm5_jax.errors import InputError
from glm5_jax.processes import add_processes, is_first, on_first, one_program
from glm5_jax.strict_json import parse_json

if TYPE_CHECKING:
    from glm5_jax.config import Config
    from glm5_jax.inference.evaluate import Document, Perplexity

_LONGEST_WINDOW = 2048  # unless asked for


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "eval",
        _run,
        "Measure the perplexity of text, or run tasks of lm-eval.\n\n"
        "A text longer than a window is read in several: the first begins it, each further one\n"
        "ends --stride tokens after the one before. Every token is scored once, with all tokens\n"
        "before it or at least window - stride of them. The special tokens that the tokenizer\n"
        "puts before a text are not scored; without any, its first token is not. Bits per byte\n"
        "are those of the scored text in UTF-8, and do not depend on the tokenizer. Seconds\n"
        "include compiling.",
    )
    add_model(command)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, metavar="FILE.txt", help="a text to score")
    what.add_argument(
        "--jsonl", type=Path, metavar="FILE.jsonl", help='texts to score, as "text" in each object'
    )
    what.add_argument(
        "--tasks",
        type=lambda names: names.split(","),
        metavar="TASK,...",
        help="tasks of lm-eval, or YAML files that describe one",
    )
    _add_sizes(command)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    _add_special(command)
    add_processes(command)


def _add_sizes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--window",
        type=integer(1),
        metavar="N",
        help="most tokens read together (default: what the model can take; for texts at most "
        f"{_LONGEST_WINDOW})",
    )
    command.add_argument(
        "--batch-size", type=integer(1), default=8, metavar="N", help="windows read at a time"
    )
    command.add_argument(
        "--limit", type=integer(1), metavar="N", help="only the first N texts, or of each task"
    )


def _add_special(command: argparse.ArgumentParser) -> None:
    texts = command.add_argument_group("texts")
    texts.add_argument(
        "--stride",
        type=integer(1),
        metavar="N",
        help="new tokens of each further window (default: half a window)",
    )
    texts.add_argument(
        "--mtp", type=integer(0), metavar="N", help="depths of multi-token prediction to score too"
    )
    tasks = command.add_argument_group("tasks")
    tasks.add_argument(
        "--num-fewshot",
        type=integer(0),
        metavar="N",
        help="examples before each question (default: what the task says)",
    )
    tasks.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="make questions and examples turns of a conversation",
    )
    tasks.add_argument(
        "--out", type=Path, metavar="FILE.json", help="file to write all of lm-eval's results to"
    )
    tasks.add_argument("--overwrite", action="store_true", help="replace FILE.json if it exists")


def _run(args: argparse.Namespace) -> int:
    of_tasks = ("num_fewshot", "apply_chat_template", "out", "overwrite")
    for name in ("stride", "mtp") if args.tasks else of_tasks:
        if vars(args)[name] is not None and vars(args)[name] is not False:
            kind = "texts" if args.tasks else "tasks"
            raise InputError(f"--{name.replace('_', '-')} is for {kind} only")
    with one_program(args):
        if args.tasks:
            _run_tasks(args)
        else:
            _measure(args)
    return 0


def _measure(args: argparse.Namespace) -> None:
    texts = _texts(args)

    from glm5_jax.inference.evaluate import (
        Scorer,
        check_lengths,
        check_windows,
        encode_document,
        measure,
        special_prefix,
    )
    from glm5_jax.inference.score import check_depth
    from glm5_jax.inference.tokenizer import Tokenizer
    from glm5_jax.load import read_model_config

    config = read_model_config(args.model).config
    depth = args.mtp or 0
    check_depth(depth, config)
    window, stride = _window_and_stride(args, config)
    check_windows(window, stride, depth, config)
    tokenizer = Tokenizer(args.model)
    prefix = special_prefix(tokenizer)
    documents = [encode_document(text, tokenizer, prefix, name) for name, text in texts]
    check_lengths(documents, depth)
    require_same_input(args, config=config, texts=documents)
    model, partition = load(args)
    scorer = Scorer(model, partition, batch_size=args.batch_size, depth=depth)
    started = time.perf_counter()
    total = sum(len(document.tokens) - document.first for document in documents)
    with progress("eval", total) as advance:
        results = measure(scorer, documents, window, stride, advance)
    report = _report(results, documents, time.perf_counter() - started)
    report |= {"window": window, "stride": stride}
    print(json.dumps(report) if args.json else _in_words(report))


def _window_and_stride(args: argparse.Namespace, config: "Config") -> tuple[int, int]:
    window = args.window or min(config.max_positions, _LONGEST_WINDOW)
    return window, args.stride or max(window // 2, 1)


def _texts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The texts to score, each with its name."""
    path = args.text or args.jsonl
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None
    if not content:
        raise InputError(f"{path}: is empty, expected text to score")
    if args.text:
        return [(str(path), content)]
    texts = []
    # Not splitlines: a JSON string may hold characters that Unicode counts as ends of lines.
    lines = content.removesuffix("\n").split("\n")
    for number, line in enumerate(lines[: args.limit], start=1):
        where = f"{path}, line {number}"
        text = parse_json(line, where).get("text")
        if not isinstance(text, str):
            raise InputError(f'{where}: "text" is {text!r:.80}, expected a text')
        texts.append((where, text))
    return texts


def _report(
    results: "list[Perplexity]", documents: "list[Document]", seconds: float
) -> dict[str, Any]:
    num_bytes = sum(document.num_bytes for document in documents)
    following, *ahead = results
    return {
        "nats_per_token": following.nats_per_token,
        "perplexity": following.value,
        "bits_per_byte": following.bits_per_byte(num_bytes),
        "tokens": following.tokens,
        "documents": len(documents),
        "bytes": num_bytes,
        "seconds": seconds,
        "tokens_per_second": following.tokens / seconds,
        "mtp": [
            {
                "depth": depth,
                "nats_per_token": each.nats_per_token,
                "perplexity": each.value,
                "tokens": each.tokens,
            }
            for depth, each in enumerate(ahead, start=1)
        ],
    }


def _in_words(report: dict[str, Any]) -> str:
    def surprise(of: dict[str, Any]) -> str:
        return f"perplexity {of['perplexity']:.4f}, {of['nats_per_token']:.4f} nats per token"

    amounts = f"{report['tokens']} tokens of {report['documents']} texts, {report['bytes']} bytes"
    speed = f"in {report['seconds']:.1f} s: {report['tokens_per_second']:.0f} tokens/s"
    lines = [
        f"{surprise(report)}, {report['bits_per_byte']:.4f} bits per byte",
        *(f"MTP depth {each['depth']}: {surprise(each)}" for each in report["mtp"]),
        f"{amounts}, {speed}",
    ]
    return "\n".join(lines)


def _run_tasks(args: argparse.Namespace) -> None:
    from glm5_jax.atomic import new_file, refuse_existing

    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks need the package lm-eval: pip install 'glm5-jax[eval]'")
    if args.out is not None and is_first() and not args.overwrite:
        refuse_existing(args.out)

    from glm5_jax.inference.generation_config import stop_tokens
    from glm5_jax.inference.harness import Glm5Lm
    from glm5_jax.inference.tasks import check_tasks, run_tasks, tables
    from glm5_jax.inference.tokenizer import Tokenizer
    from glm5_jax.load import read_model_config

    config = read_model_config(args.model).config
    manager = check_tasks(args.tasks)
    tokenizer = Tokenizer(args.model)
    stop = stop_tokens(args.model, config.eos_ids)
    if args.apply_chat_template:  # without a template, fail before the model is loaded
        tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    require_same_input(args, config=config, stop_tokens=sorted(stop))
    model, partition = load(args)
    lm = Glm5Lm(
        model, tokenizer, partition, stop=stop, batch_size=args.batch_size, max_length=args.window
    )
    results = run_tasks(
        lm,
        args.tasks,
        manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
    )
    if args.out is not None:
        with on_first(lambda: new_file(args.out, overwrite=args.overwrite)) as partial:
            if partial is not None:
                partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results["results"]) if args.json else tables(results))
