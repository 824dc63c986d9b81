"""Reading ``key=value`` arguments of the small commands into a typed dataclass.

``train.py`` and ``serve.py`` use Hydra; a command with a handful of keys needs no config tree, only
the same spelling. Knows nothing of any command.
"""

import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def parse_cli(schema: type[T], argv: Sequence[str]) -> T:
    """Build ``schema`` from arguments such as ``trace=x.npz policy=[lru,lfru] slots=13``.

    Keys are the fields of the dataclass; a field without a default is required. Values of ``str``
    and ``Path`` fields are taken as they stand, the others are YAML, so lists are ``[a,b]``; a
    single value for a list field is a list of one. ``__post_init__`` may check further.

    Args:
        schema: A dataclass of fields that OmegaConf knows: bool, int, float, str, Path, enums,
            lists of those, and optionals. Its docstring is what ``--help`` shows.
        argv: The arguments without the program's name: ``sys.argv[1:]``.

    Returns:
        An instance of ``schema``.

    Raises:
        SystemExit: Code 2 after a message on stderr that names the key, its value and what is
            allowed; code 0 after ``--help``.
    """
    if not dataclasses.is_dataclass(schema):
        raise TypeError(f"schema={schema}: must be a dataclass")
    types = typing.get_type_hints(schema)
    if set(argv) & {"-h", "--help", "help"}:
        sys.stdout.write(_usage(schema))
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            _fail(schema, f"{argument!r}: arguments are written key=value")
        if key not in types:
            _fail(schema, f"unknown key {key!r}")
        if key in values:
            _fail(schema, f"{key} is given twice")
        try:
            values[key] = _parse(key, text, types[key])
        except ValueError as error:
            _fail(schema, str(error))
    missing = [
        field.name
        for field in dataclasses.fields(schema)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        _fail(schema, f"missing: {', '.join(f'{key}=...' for key in missing)}")
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), values)
        return typing.cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        key = error.full_key or "arguments"
        _fail(schema, f"{key}={values.get(key)}: {str(error).splitlines()[0]}")
    except ValueError as error:  # the schema's own __post_init__
        _fail(schema, str(error))


def _parse(key: str, text: str, annotation: Any) -> Any:
    """The value of ``key=text``; ValueError if it must be YAML and is not."""
    options = typing.get_args(annotation) or (annotation,)
    is_list = typing.get_origin(annotation) is list
    if text == "null" and type(None) in options:
        return None
    if not is_list and (str in options or Path in options):
        return text  # not YAML: run=007 is no octal number, and a path may hold a colon
    try:
        value = OmegaConf.from_dotlist([f"{key}={text}"])[key]
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{key}={text}: not readable as YAML: {error}") from None
    return [value] if is_list and not OmegaConf.is_list(value) else value


def _usage(schema: type[Any]) -> str:
    lines = [f"{schema.__doc__ or schema.__name__}", "", "keys:"]
    for field in dataclasses.fields(schema):
        annotation = field.type if isinstance(field.type, str) else _name(field.type)
        if field.default is not dataclasses.MISSING:
            default = f"(default {field.default})"
        elif field.default_factory is not dataclasses.MISSING:
            default = f"(default {field.default_factory()})"
        else:
            default = "(required)"
        lines.append(f"  {field.name}={annotation} {default}")
    return "\n".join(lines) + "\n"


def _name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _fail(schema: type[Any], message: str) -> NoReturn:
    keys = ", ".join(field.name for field in dataclasses.fields(schema))
    sys.stderr.write(f"error: {message}\nkeys: {keys} (--help says more)\n")
    raise SystemExit(2)
