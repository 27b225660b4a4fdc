"""Puts the tables of benchmarks/results into the README, between the marks that name them."""

import re
from pathlib import Path

from benchmarks.arguments import run
from glm5_jax.console import Parser

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(
    r"(<!-- (benchmarks/results/[\w./]+\.md)( without details)? -->\n).*?(<!-- end -->)", re.DOTALL
)


def with_tables(text: str) -> str:
    """The text with every file of results that it names, without details up to the first table."""

    def fill(block: re.Match[str]) -> str:
        begin, path, without_details, end = block.groups()
        lines = (ROOT / path).read_text()
        if without_details:
            *some, how = lines.split("\n\n")
            last = next(number for number, part in enumerate(some) if part.startswith("|"))
            lines = "\n\n".join([*some[: last + 1], how])
        return f"{begin}{lines}{end}"

    return _BLOCK.sub(fill, text)


def main(arguments: list[str] | None = None) -> int:
    """Writes the README, if anything changed."""
    Parser(description=__doc__).parse_args(arguments)
    path = ROOT / "README.md"
    text = path.read_text()
    if (filled := with_tables(text)) != text:
        path.write_text(filled)
        print(f"{path.name} is brought up to date")
    return 0


if __name__ == "__main__":
    run(main)
