"""Training a byte-level BPE tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path

from glm5_jax.errors import InputError

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError:
    raise InputError("text needs the package tokenizers: pip install 'glm5-jax[train]'") from None

END_OF_TEXT = "<|endoftext|>"  # token 0: ends every document, and pads

# Of a model that has read texts and no conversations: a chat is a text that it goes on with.
_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer that can encode any text and decodes it exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes the tokenizer in the files that published models come with."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(_TEMPLATE)
