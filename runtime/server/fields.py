"""How single parameters of the JSON bodies are read: what they may be, and what is refused.

Each type tells the OpenAPI page exactly what it takes, because clients are generated from that
page. Knows nothing of which endpoint has which parameter.
"""

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StrictBool,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_STOPS = 16  # OpenAI's 4 are too few for the tasks of lm-eval
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_REPETITION_PENALTY = 10.0  # past it, logits overflow and every probability is nan


class Refused:
    """Marks a parameter without implementation: null, and values that change nothing, may stand.

    Args:
        no_ops: Those values.
    """

    def __init__(self, *no_ops: Any) -> None:
        self._no_ops = no_ops

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Check before anything else."""
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The values that are taken."""
        return {"enum": [None, *self._no_ops], "description": "Nothing else is implemented."}

    def _check(self, value: Any) -> Any:
        if value is None or any(_is_same(value, no_op) for no_op in self._no_ops):
            return value
        raise PydanticCustomError(
            "unsupported_parameter",
            "not implemented by this server; leave it out{or_at}",
            {"or_at": "".join(f", or at {no_op!r}" for no_op in self._no_ops)},
        )


def _is_same(value: Any, no_op: Any) -> bool:
    """In Python 0 == False; in JSON it is not."""
    return isinstance(value, bool) == isinstance(no_op, bool) and value == no_op


class _Bounded:
    """Marks a number with bounds, for which null stands as the default, as at OpenAI.

    Args:
        default: What null means.
        ge: The least value.
        le: The greatest value.
    """

    def __init__(self, default: float, *, ge: float, le: float) -> None:
        self.default, self.ge, self.le = default, ge, le

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Null, then type and bounds."""
        return core_schema.no_info_before_validator_function(
            lambda value: self.default if value is None else value, self._number()
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Type and bounds, or null."""
        number = {"type": self._json_type, "minimum": self.ge, "maximum": self.le}
        return {"anyOf": [number, {"type": "null"}]}

    _json_type = "number"

    def _number(self) -> CoreSchema:
        return core_schema.float_schema(strict=True, allow_inf_nan=False, ge=self.ge, le=self.le)


class Number(_Bounded):
    """A finite number."""


class Integer(_Bounded):
    """An integer."""

    _json_type = "integer"

    def _number(self) -> CoreSchema:
        return core_schema.int_schema(strict=True, ge=int(self.ge), le=int(self.le))


def null_is(default: Any) -> BeforeValidator:
    """A null stands for the default, as it does at OpenAI."""
    return BeforeValidator(lambda value: default if value is None else value)


def _or_null(schema: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [schema, {"type": "null"}]})


def valid_text(text: str) -> str:
    """``text``; ValueError for half a surrogate pair, which JSON can spell and is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode: lone surrogate at character {error.start}") from None
    return text


def _text(value: Any) -> Any:
    return valid_text(value) if isinstance(value, str) else value


def _stops(value: Any) -> Any:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"{len(stops)} stop strings: at most {MAX_STOPS} are allowed")
    if "" in stops:
        raise ValueError("a stop string is empty: every one needs at least one character")
    return [valid_text(stop) for stop in stops]


def _prompts(value: Any) -> Any:
    """Four forms become two: texts, or lists of token ids."""
    if isinstance(value, str):
        return [valid_text(value)]
    if isinstance(value, list) and value:
        if all(isinstance(text, str) for text in value):
            return [valid_text(text) for text in value]
        if _are_ids(value):
            return [value]
        if all(isinstance(ids, list) and _are_ids(ids) for ids in value):
            return value
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of such lists, "
        "none of the lists empty"
    )


def _are_ids(values: list[Any]) -> bool:
    return bool(values) and all(type(value) is int for value in values)


def text_of_parts(value: Any, *, kinds: tuple[str, ...] = ("text",)) -> Any:
    """A string, or text parts, which become lines of one string; ValueError for anything else."""
    if isinstance(value, str):
        return valid_text(value)
    if not isinstance(value, list):
        raise ValueError('must be a string or a list of {"type": "text", "text": ...} parts')
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            allowed = " and ".join(map(repr, kinds))
            raise ValueError(f"a part of type {kind!r}: only {allowed} parts are implemented")
        # What the client library dumps of an answer has these two beside the text.
        rest = {key for key, inner in part.items() if inner not in (None, [])}
        if rest - {"type", "text"} or not isinstance(part.get("text"), str):
            raise ValueError("a text part must have the keys type and text, text being a string")
    return valid_text("\n".join(part["text"] for part in value))


def _biases(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 12):
            raise ValueError(f"{key!r} is no token id: keys are ids written in decimal digits")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) <= 100:
            raise ValueError(f"bias {bias!r} of token {key}: must be a number from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


_STRING = {"type": "string"}
_STRINGS = {"type": "array", "items": _STRING}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}

# What integers of a request may be where the model gives no tighter bound.
INT32_MAX = 2**31 - 1

Flag = Annotated[StrictBool, null_is(False), _or_null({"type": "boolean"})]
PositiveInt = Annotated[int, Field(strict=True, ge=1)]
Text = Annotated[str, Field(strict=True), BeforeValidator(_text)]
TokenIds = Annotated[
    list[Annotated[int, Field(strict=True, ge=0, le=INT32_MAX)]], Field(max_length=2**20)
]
Stops = Annotated[
    list[str],
    BeforeValidator(_stops),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1},
                    "maxItems": MAX_STOPS,
                },
                {"type": "null"},
            ]
        }
    ),
]
Prompts = Annotated[
    list[str] | list[list[int]],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _STRING,
                {**_STRINGS, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]
Biases = Annotated[
    dict[int, float],
    BeforeValidator(_biases),
    _or_null(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,11}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]
TEXT_OR_PARTS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        _STRING,
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": _STRING},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
    ]
}
