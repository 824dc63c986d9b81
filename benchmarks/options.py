"""Reading ``key=value`` words where the packages of the configuration tree are not installed.

For benchmarks that run on a machine with torch, triton and transformers only; elsewhere
`data.cli.parse_cli` reads the same spelling. Knows nothing of any benchmark.
"""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def parse_options(schema: type[T], arguments: Sequence[str]) -> T:
    """Build the dataclass ``schema``, whose fields all have defaults, from ``key=value`` words.

    Args:
        schema: Fields are str, int, float, bool, or a homogeneous ``tuple[X, ...]`` of those, which
            is written with commas.
        arguments: The arguments without the program's name.

    Raises:
        ValueError: A word without ``=``, an unknown key, a key twice or a value of the wrong type.
    """
    kinds = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or key not in kinds:
            raise ValueError(f"{argument!r}: expected key=value with a key of {sorted(kinds)}")
        if key in values:
            raise ValueError(f"{key} is given twice")
        kind = kinds[key]
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            words = [word for word in text.strip("[]").split(",") if word]
            values[key] = tuple(_read(key, word, item) for word in words)
        else:
            values[key] = _read(key, text, kind)
    return schema(**values)


def as_json(options: Any) -> dict[str, Any]:
    """The options as plain values, without where the result is kept."""
    return {key: value for key, value in dataclasses.asdict(options).items() if key != "out"}


def _read(key: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{key}={text}: expected true or false")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key}={text}: expected {kind.__name__}") from None
