"""Text to train on, small enough for tests."""

from train.__main__ import main


def prepare_data(folder):
    """Writes forty short files to `text` in a folder, and prepares `data` of them."""
    (folder / "text").mkdir()
    for number in range(40):
        text = f"def f{number}(x):\n    return x + {number}\n" * 12
        (folder / "text" / f"{number}.py").write_text(text)
    options = ["--text", str(folder / "text"), "--vocab-size", "300", "--held-out", "0.2"]
    assert main(["prepare", str(folder / "data"), *options]) == 0
