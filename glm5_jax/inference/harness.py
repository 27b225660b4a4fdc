"""The model as lm-eval sees it, and lm-eval's tasks.

Import this only where lm-eval is installed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)

from glm5_jax.console import progress
from glm5_jax.errors import InputError
from glm5_jax.inference.evaluate import Scorer, Span, special_prefix
from glm5_jax.inference.generate import Generator
from glm5_jax.inference.generation_config import stop_tokens
from glm5_jax.inference.request import Sampling
from glm5_jax.inference.tokenizer import Tokenizer
from glm5_jax.load import dtype_to_run, load_model, read_model_config
from glm5_jax.mesh import make_mesh
from glm5_jax.model import Glm5
from glm5_jax.sharding import DECODE, Partition, mesh_sizes

_MOST_NEW_TOKENS = 256  # where a task does not say

Pair = tuple[tuple[str, str] | None, list[int], list[int]]  # texts and tokens of lm-eval's pairs


@register_model("glm5")
class Glm5Lm(TemplateLM):
    """Answers lm-eval's requests, with the same prompts and truncation as its `HFLM`.

    Several processes must make the same requests; each gets all answers.
    """

    def __init__(
        self,
        model: Glm5,
        tokenizer: Tokenizer,
        partition: Partition | None = None,
        *,
        stop: frozenset[int] = frozenset(),
        batch_size: int = 8,
        max_length: int | None = None,
    ):
        """Prepares a model for lm-eval.

        Args:
          partition: how the model lies on a mesh; on the first device unless given.
          stop: tokens that end a generated text.
          batch_size: requests answered at a time.
          max_length: the most tokens that are read at once, longer prompts losing their beginning;
            what the model was made for unless given.

        Raises:
          InputError: `max_length` is more than that, or the tokenizer has no end of text.
        """
        super().__init__()
        most = model.config.max_positions
        self.max_length = most if max_length is None else max_length
        if not 2 <= self.max_length <= most:
            raise InputError(f"max_length is {max_length}, expected from 2 to the model's {most}")
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._scorer = Scorer(model, partition, batch_size=batch_size)
        num_tokens, context = tokenizer.num_tokens, self.max_length
        self._generator = Generator(
            model, partition, stop=stop, num_tokens=num_tokens, context=context
        )
        self._prefix = special_prefix(tokenizer)
        self._prefix_text = "".join(tokenizer.token_text(token)[0] for token in self._prefix)
        self._end = tokenizer.end_id()

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "Glm5Lm":
        """Loads the model of the directory `pretrained` onto all devices.

        The other arguments may be `batch_size` and `max_length`; lm-eval's own are ignored where
        they mean nothing here.
        """
        common = additional_config or {}
        given = {key: value for key, value in common.items() if key == "batch_size" and value}
        given |= arg_dict
        directory = Path(given.pop("pretrained"))
        config = read_model_config(directory).config
        sizes = mesh_sizes("auto", jax.device_count(), Glm5(config), DECODE)
        partition = Partition(make_mesh(sizes), DECODE)
        stop = stop_tokens(directory, config.eos_ids)
        model = load_model(directory, dtype_to_run(config.dtype), partition)
        return cls(model, Tokenizer(directory), partition, stop=stop, **given)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "Glm5Lm":
        """The same with arguments as `pretrained=DIR,batch_size=8`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows: the tokenizer's own prefix, or the end of text."""
        return self._prefix[-1] if self._prefix else self._end

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text, after the special ones that the tokenizer puts before it.

        Not after these where a chat template has put them there already.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        prefix = self._prefix if add_special_tokens else []
        return [*prefix, *self._tokenizer.encode(string, special=False)]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation; without a generation prompt its last message begins the
        answer.
        """
        if add_generation_prompt:
            return self._tokenizer.render_chat(chat_history)
        return self._tokenizer.render_chat(chat_history[:-1]) + chat_history[-1]["content"]

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells chat templates apart by: a digest of what this one makes."""
        sample = self._tokenizer.render_chat([{"role": "user", "content": "Hello"}])
        return hashlib.sha256(sample.encode()).hexdigest()[:16]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """The log-probabilities of continuations, and whether greedy decoding chooses them."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        spans = []
        for texts, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise InputError(
                    f"continuation {texts and texts[1]!r:.80} has {len(continuation)} tokens of "
                    f"its own, expected from 1 to {self.max_length}"
                )
            tokens = [*(context or [self.prefix_token_id]), *continuation]
            tokens = tokens[-(self.max_length + 1) :]  # the last is predicted, not read
            spans.append(Span(tokens, len(tokens) - len(continuation)))
        answers = [(0.0, False)] * len(spans)
        with progress("likelihoods", len(spans)) as advance:
            for index, scored in self._scorer(spans):
                answers[index] = (float(scored.logprobs[0].sum()), bool(scored.is_likeliest.all()))
                texts = requests[index][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[index])
                advance(1)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """The log-probabilities of whole texts, read in lm-eval's windows of `max_length`."""
        pairs: list[Pair] = []
        owners = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((None, context, continuation))
                owners.append(number)
        sums = np.zeros(len(requests))
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            sums[owner] += logprob
        for request, logprob in zip(requests, sums.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return sums.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations of texts up to the first stop string.

        Raises:
          InputError: a task wants text that is drawn at random, or more than the model can take.
        """
        by_count: dict[int, list[tuple[int, list[int]]]] = {}
        for number, request in enumerate(requests):
            count, prompt = self._prompt(*request.args)
            by_count.setdefault(count, []).append((number, prompt))
        answers = [""] * len(requests)
        with progress("texts", len(requests)) as advance:
            for count, prompts in by_count.items():
                prompts.sort(key=lambda prompt: -len(prompt[1]))
                for first in range(0, len(prompts), self._batch_size):
                    batch = prompts[first : first + self._batch_size]
                    texts = self._continue([prompt for _, prompt in batch], count)
                    for (number, _), text in zip(batch, texts, strict=True):
                        given = requests[number].args
                        until = normalize_gen_kwargs(given[1])["until"]
                        answers[number] = postprocess_generated_text(text, until, None)
                        self.cache_hook.add_partial("generate_until", given, answers[number])
                    advance(len(batch))
        return answers

    def _prompt(self, context: str, options: dict[str, Any]) -> tuple[int, list[int]]:
        """How many tokens to generate, and the prompt, without its beginning if it is too long."""
        wanted = normalize_gen_kwargs(options, _MOST_NEW_TOKENS)
        if wanted["do_sample"] and wanted["temperature"]:
            raise InputError(
                f"a task sets temperature {wanted['temperature']}, expected greedy decoding: 0"
            )
        count = wanted["max_gen_toks"]
        room = self.max_length - count
        if count < 1 or room < 1:
            raise InputError(
                f"a task wants {count} new tokens, expected from 1 to {self.max_length - 1}"
            )
        return count, (self.tok_encode(context) or [self.prefix_token_id])[-room:]

    def _continue(self, prompts: list[list[int]], count: int) -> list[str]:
        completions = self._generator.complete(prompts, count, Sampling())
        return [
            self._tokenizer.decode(tokens[:-1] if reason == "stop" else tokens)
            for tokens, reason in completions
        ]
