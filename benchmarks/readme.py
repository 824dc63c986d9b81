"""Fills the tables of README.md from `benchmarks/results`, so that no number there is typed.

python -m benchmarks.readme          # rewrite the tables
python -m benchmarks.readme check    # fail if one is out of date
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.record import RESULTS, ROOT
from predictors.fit.report import format_table, summary_rows

README = ROOT / "README.md"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _where(result: dict[str, Any]) -> str:
    told = result["circumstances"]
    return f"`{told['command']}` on {told['hardware']}, commit {told['commit'][:10]}."


def _demo(result: dict[str, Any]) -> str:
    table = format_table(*summary_rows(result["evaluation"]))
    return (
        f"```text\n{table}\n```\n\n"
        f"{result['first_s']:.0f} s the first time, {result['second_s']:.0f} s the second, "
        f"installs apart. {_where(result)}"
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"demo": _demo}


def render(text: str) -> str:
    """The README with every table made anew."""

    def fill(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match[2]}.json").read_text())
        return f"{match[1]}{TABLES[match[2]](result)}\n{match[3]}"

    return _TABLE.sub(fill, text)


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if arguments == ["check"]:
        if new != old:
            sys.exit("README.md is out of date: python -m benchmarks.readme")
    else:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
