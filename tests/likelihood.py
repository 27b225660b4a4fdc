"""A tiny model with a tokenizer of bytes and joined ones, and what it predicts by hand."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.scipy.special import logsumexp

from glm5_jax.collectives import MESH_AXES
from glm5_jax.inference.tokenizer import Tokenizer
from glm5_jax.mesh import make_mesh
from glm5_jax.model import forward, logits
from glm5_jax.places import Places
from glm5_jax.sharding import DECODE, Partition
from tests.tiny import TINY, random_model

# Sizes that eight devices divide, a token for every byte, and few layers, which compile faster.
RAW = TINY | {
    "vocab_size": 320,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "indexer_types": ["full", "shared"],
    "mlp_layer_types": ["dense", "sparse"],
}
END, START = "<|end|>", "<|start|>"
TEXT = "Selection takes eight of these tokens: café, 北京, 👋🏽.\nNo line is like another."
CHAT_TEMPLATE = (
    START + "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_tokenizer(directory, special=()):
    """A tokenizer of bytes and a few joined ones, with special tokens around every text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    joined = [("e", "s"), ("o", "k"), ("ok", "e"), ("Ġ", "t"), ("es", "e")]
    words = [START, END, *alphabet, *("".join(pair) for pair in joined)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, joined))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    if special:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=" ".join(special), special_tokens=[(START, 0), (END, 1)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return Tokenizer(directory)


@functools.cache
def model():
    return random_model(RAW)


def partition(shape):
    devices = jax.devices()[: math.prod(shape)]
    return Partition(make_mesh(dict(zip(MESH_AXES, shape, strict=True)), devices), DECODE)


@jax.jit
def read(model, tokens, places):
    scores_TZ = logits(model, forward(model, tokens, places).hidden_BTD)[0]
    return scores_TZ - logsumexp(scores_TZ, axis=-1, keepdims=True)


def predictions(tokens):
    """The log-probabilities of what comes after each token."""
    padded = jnp.array([tokens + [0] * (128 - len(tokens))])
    places = Places.padded(jnp.arange(128)[None] < len(tokens))
    return np.asarray(read(model(), padded, places)[: len(tokens)])


def by_hand(tokenizer, context, continuation, most=256):
    """The sum of log-probabilities, and whether all tokens are the likeliest, token by token."""
    special = tokenizer.encode("")  # before a text, or nothing
    stripped = context.rstrip(" ")
    whole = tokenizer.encode(context + continuation, special=False)
    count = len(whole) - len(tokenizer.encode(stripped, special=False))
    tokens = [*(special or ([] if stripped else [1])), *whole][-(most + 1) :]
    # One token more than the model reads at most, for the last is not read.
    rows = predictions(tokens[:-1])[-count:]
    given = [row[token] for row, token in zip(rows, tokens[-count:], strict=True)]
    return float(np.sum(given)), bool((rows.argmax(-1) == tokens[-count:]).all())
