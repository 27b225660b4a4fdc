"""What is measured: a model, and what it is to do."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes  # noqa: F401 - names bfloat16 to numpy
import numpy as np
from safetensors.numpy import save_file

from glm5_jax.config import Config
from glm5_jax.config_json import parse_config
from glm5_jax.presets import load_preset
from glm5_jax.published.names import published_tensors

WEIGHTS = Path("build/benchmarks")
# Positions whose outputs are compared: the last ones of a prompt; after a context, the tokens that
# are decoded, each alone.
NUM_LAST, NUM_DECODED = 64, 8


class Work(NamedTuple):
    """One row of a table."""

    # prefill: read `length` tokens, and keep them in a cache; decode: one more token after
    # `length`; gradient: that of the loss of the next token.
    kind: Literal["prefill", "decode", "gradient"]
    preset: str
    dtype: str
    batch: int
    length: int
    prompt: int = 0  # which of those at random

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Work":
        """What a row of results is of."""
        return cls(**{field: row[field] for field in cls._fields if field in row})

    def tokens(self) -> np.ndarray:
        """What is read, BT, at random; of decoding, tokens each of which may be the next."""
        decodes = self.kind == "decode"
        length = max(1, NUM_DECODED // self.batch) if decodes else self.length
        vocabulary = load_preset(self.preset).config.vocab_size
        chance = np.random.default_rng(self.prompt)
        return chance.integers(1, vocabulary, (self.batch, length), np.int32)

    @property
    def trains(self) -> bool:
        """Whether it is a part of training, which allocates much in each step."""
        return self.kind == "gradient"

    @property
    def num_tokens(self) -> int:
        """How many tokens are read in one run."""
        return self.batch * (1 if self.kind == "decode" else self.length)


def remembered(work: Work, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows BSA and index keys BSJ that a layer's cache has to begin with, of unit size."""
    config = load_preset(work.preset).config
    rng = np.random.default_rng([1, layer])
    shape = (work.batch, work.length)
    rows = rng.standard_normal((*shape, config.mla.row_dim), np.float32)
    return rows, rng.standard_normal((*shape, config.indexer.head_dim), np.float32)


def checkpoint(preset: str, folder: Path = WEIGHTS) -> Path:
    """A published checkpoint of the preset's sizes with random weights, made if it is not there.

    It is what transformers computes: latent norms have its epsilon, which is not what the published
    config says, and there is no MTP layer.
    """
    directory = folder / preset
    raw = load_preset(preset).raw | {"mla_norm_eps": 1e-6, "num_nextn_predict_layers": 0}
    text = json.dumps(raw)
    if not directory.exists() or (directory / "config.json").read_text() != text:
        shutil.rmtree(directory, ignore_errors=True)
        making = directory.with_suffix(".making")
        making.mkdir(parents=True, exist_ok=True)
        (making / "config.json").write_text(text)
        weights = _weights(parse_config(raw).config)
        save_file(weights, making / "model.safetensors", {"format": "pt"})
        making.rename(directory)
    return directory


def _weights(config: Config) -> dict[str, np.ndarray]:
    """Matrices of the size that training begins with, and everything else not quite as it does."""
    rng, weights = np.random.default_rng(0), {}
    for name, shape, *_ in published_tensors(config):
        values = rng.standard_normal(shape, np.float32)
        is_norm = name.endswith("norm.weight")
        weights[name] = 1 + 0.1 * values if is_norm else config.init_std * values
    return weights
