"""Puts the tables of benchmarks/results into the README, between the marks that name them."""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"(<!-- (benchmarks/results/[\w.]+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The text with every table as it stands in its file."""

    def fill(block: re.Match[str]) -> str:
        begin, path, end = block.groups()
        return f"{begin}{(ROOT / path).read_text()}{end}"

    return _BLOCK.sub(fill, text)


def main(arguments: list[str] | None = None) -> int:
    """Writes the README, if anything changed."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    path = ROOT / "README.md"
    text = path.read_text()
    if (filled := with_tables(text)) != text:
        path.write_text(filled)
        print(f"{path.name} is brought up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
