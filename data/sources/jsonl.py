"""Prompts from a JSON-lines file: the way to bring one's own.

One object a line, plain or compressed (``.gz``; ``.zst`` with the zstandard package):

    {"text": "..."}                           or "prompt"
    {"messages": [{"role", "content"}, ...]}  the dialogue up to the user's last message
    {"turns": ["...", ...]}                   the first: the others answer what is not there
    and, in each case, optionally "id" and "topic"
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from data.errors import DamagedFileError, MalformedInputError
from data.schema import Prompt
from data.sources.base import PromptSource


class Jsonl(PromptSource):
    """Every line is a prompt.

    Args:
        path: The file.
        num_prompts: How many prompts; None means all.

    Raises:
        ValueError: There is no such file, or ``num_prompts`` is below 1.
    """

    def __init__(self, *, path: str, num_prompts: int | None = None) -> None:
        self._path = Path(path).expanduser()
        if not self._path.is_file():
            raise ValueError(f"path={path!r}: there is no such file")
        super().__init__(name=self._path.name.split(".")[0], num_prompts=num_prompts)

    def read(self) -> Iterator[Prompt]:
        """Yield the prompts in the file's order; see `read_jsonl` for the errors."""
        return read_jsonl(self._path)


def read_jsonl(path: Path) -> Iterator[Prompt]:
    """Yield a prompt for each line that is not blank.

    Raises:
        MalformedInputError: A line is not an object with a text; it names file and line.
        DamagedFileError: A compressed file is cut off or altered.
    """
    stem = path.name.split(".")[0]
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _prompt(json.loads(line), default_id=f"{stem}-{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedFileError(path, str(error)) from error
    except ValueError as error:
        raise MalformedInputError(path, number, str(error)) from error


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(path))
    if magic == b"\x28\xb5\x2f\xfd":
        try:
            import zstandard
        except ImportError:
            raise ModuleNotFoundError(f"{path}: reading zstd needs the zstandard package") from None
        return io.BufferedReader(zstandard.open(path))
    return path.open("rb")


def _prompt(values: Any, *, default_id: str) -> Prompt:
    """ValueError, without the line, if this is no prompt."""
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if "text" in values or "prompt" in values:
        text = values.get("text", values.get("prompt"))
    elif "messages" in values:
        text = _dialogue(values["messages"])
    elif "turns" in values:
        turns = values["turns"]
        text = turns[0] if isinstance(turns, list) and turns else None
    else:
        raise ValueError(f"needs text, prompt, messages or turns, but has {sorted(values)}")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its text must be a string that is not empty")
    return Prompt(
        request_id=str(values.get("id", default_id)), topic=str(values.get("topic", "")), text=text
    )


def _dialogue(messages: Any) -> str:
    """One message as it is, several with their roles; what follows the last user's is left out."""
    if not isinstance(messages, list) or not all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise ValueError("messages must be a list of {role, content}, both strings")
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ValueError("messages has none of the user's")
    messages = messages[: users[-1] + 1]
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
