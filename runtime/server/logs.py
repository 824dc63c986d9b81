"""Log lines as JSON, one object a line, for programs that collect them."""

import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
FORMATS = ("text", "json")


class JsonFormatter(logging.Formatter):
    """Writes a record as JSON: time, level, logger, message, and every extra field by its name.

    What was given as ``extra`` (request_id, status, seconds) can then be searched for without
    taking the message apart.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _OWN},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def use_format(name: str, handlers: Iterable[logging.Handler]) -> None:
    """Let log handlers write as ``serve.log`` asks.

    Args:
        name: "text" leaves them as they are; "json" see `JsonFormatter`.
        handlers: Usually those of the root logger.

    Raises:
        ValueError: There is no such format.
    """
    if name not in FORMATS:
        raise ValueError(f"serve.log={name}: must be one of {', '.join(FORMATS)}")
    if name == "json":
        for handler in handlers:
            handler.setFormatter(JsonFormatter())
