"""Passages of the running Python's own standard library: real text and code on every machine.

Needs no network and no file of ours; what it yields differs between Python versions, and its
digest says so.
"""

import ast
import os
import sysconfig
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

from data.schema import Prompt
from data.sources.base import PromptSource

# Tests, other people's packages, tables, an editor, and what not every Python 3.11 or 3.12 has.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3",
        "msilib", "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo",
    }
)  # fmt: skip
_MAX_FILES_PER_TOPIC = 6  # parsing all of the largest packages would take seconds for nothing
_MIN_CHARS = 120


class Stdlib(PromptSource):
    """Docstrings of modules, and functions and classes with their comments; topic = module.

    A passage starts where its docstring, function or class starts and ends at a line's end, so it
    can be understood (and continued) alone. Passages do not overlap.

    Args:
        num_prompts: How many passages; None means all, several thousand.
        max_chars: A passage's greatest length; longer ones are cut.

    Raises:
        ValueError: ``num_prompts`` or ``max_chars`` is too small.
    """

    def __init__(self, *, num_prompts: int | None = 240, max_chars: int = 600) -> None:
        super().__init__(name="stdlib", num_prompts=num_prompts)
        if max_chars < _MIN_CHARS:
            raise ValueError(f"max_chars={max_chars}: must be at least {_MIN_CHARS}")
        self._max_chars = max_chars

    def read(self) -> Iterator[Prompt]:
        """Yield the passages, file by file in the order of their paths."""
        root = Path(sysconfig.get_path("stdlib"))
        for topic, files in groupby(_python_files(root), key=lambda file: file[0]):
            for _, path in islice(files, _MAX_FILES_PER_TOPIC):
                module = ".".join(path.relative_to(root).with_suffix("").parts)
                for line, text in _passages(path.read_text(encoding="utf-8"), self._max_chars):
                    yield Prompt(request_id=f"{module}:{line}", topic=topic, text=text)


def _python_files(root: Path) -> list[tuple[str, Path]]:
    """Topic and path of each file of the public modules below ``root``, sorted."""
    files = []
    for folder, subfolders, names in os.walk(root):
        # Pruned here rather than filtered below: site-packages can be large.
        subfolders[:] = [
            name for name in subfolders if name not in _SKIPPED_FOLDERS and name.isidentifier()
        ]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    topics = [file.relative_to(root).parts[0].removesuffix(".py") for file in files]
    return sorted(
        (topic, file) for topic, file in zip(topics, files, strict=True) if topic[0] != "_"
    )


def _passages(source: str, max_chars: int) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of each passage of one file."""
    tree = ast.parse(source)
    if docstring := ast.get_docstring(tree):
        if len(text := _cut(docstring.splitlines(), max_chars)) >= _MIN_CHARS:
            yield 1, text
    lines = source.splitlines()
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    nodes = [
        node
        for body in (tree.body, *(parent.body for parent in classes))
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    covered = 0  # lines of the file up to here stand in a passage
    for node in sorted(nodes, key=lambda node: node.lineno):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        if first <= covered:
            continue
        # Not textwrap.dedent: a string in the body may have lines that start further left.
        margin = " " * node.col_offset
        text = _cut(
            [line.removeprefix(margin) for line in lines[first - 1 : node.end_lineno]], max_chars
        )
        if len(text) >= _MIN_CHARS:
            covered = first + text.count("\n")
            yield first, text


def _cut(lines: list[str], max_chars: int) -> str:
    """As many whole lines as fit, joined, without blank lines at the ends."""
    length = 0
    for count, line in enumerate(lines):
        length += len(line) + 1
        if length - 1 > max_chars:
            lines = lines[:count]
            break
    return "\n".join(lines).strip("\n")
