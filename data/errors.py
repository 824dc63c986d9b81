"""Every exception that a user of moecast can cause.

    MoecastError
    ├── NotAMoEError            the model has no routed experts that we can see
    ├── ModelNotFoundError      neither a local folder nor a reachable hub id
    ├── SpecMismatchError       an artifact or trace made for another model (also a ValueError)
    ├── DamagedFileError        a file whose content is not what its manifest promised
    ├── MalformedInputError     a line of a user's file that cannot be read (also a ValueError)
    └── OutputExistsError       an output folder that holds the result of other inputs

Wrong argument values raise plain ``ValueError`` or ``TypeError``. Every message names the thing,
its value and what is allowed.
"""

from pathlib import Path


class MoecastError(Exception):
    """Base of all errors below, so that entry points can print them without a traceback."""


class NotAMoEError(MoecastError):
    """The model routes no tokens through transformers' ``ExpertsInterface``."""


class ModelNotFoundError(MoecastError):
    """A model id that is neither a local folder nor available from the hub (or its cache)."""


class SpecMismatchError(MoecastError, ValueError):
    """Two sides that must describe the same model do not; the message shows both."""


class DamagedFileError(MoecastError):
    """A file is truncated, altered or unreadable.

    Attributes:
        path: The damaged file.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged: {why}")
        self.path = path


class MalformedInputError(MoecastError, ValueError):
    """A user's file has a line that cannot be read.

    Attributes:
        path: The file.
        line: The line number, counted from 1.
    """

    def __init__(self, path: Path, line: int, why: str) -> None:
        super().__init__(f"{path}, line {line}: {why}")
        self.path = path
        self.line = line


class OutputExistsError(MoecastError):
    """An output folder already holds the result of other inputs; nothing was overwritten.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} exists already: {why}")
        self.path = path
