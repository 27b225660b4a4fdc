"""Text to train on, small enough for tests."""

from train.__main__ import main
from train.corpus import Document
from train.encode import prepare


def prepare_data(folder):
    """Writes forty short files to `text` in a folder, and prepares `data` of them."""
    (folder / "text").mkdir()
    for number in range(40):
        text = f"def f{number}(x):\n    return x + {number}\n" * 12
        (folder / "text" / f"{number}.py").write_text(text)
    options = ["--text", str(folder / "text"), "--vocab-size", "300", "--held-out", "0.2"]
    assert main(["prepare", str(folder / "data"), *options]) == 0


def documents(texts):
    """Of which every fifth is held out."""
    return [Document(f"d{n}", text, held_out=n % 5 == 0) for n, text in enumerate(texts)]


def prepare_texts(folder, sources, tokenizer_from=None, **options):
    """Prepares the texts of named sources as data with a vocabulary of 300."""
    given = {name: iter(documents(texts)) for name, texts in sources.items()}
    return prepare(given, folder, 300, tokenizer_from, **options)
