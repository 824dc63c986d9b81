"""Who may ask: API keys, where they come from, and when a server must have one.

Keys are compared in constant time and appear in no message, log or ``repr``.
"""

import ipaddress
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from starlette.datastructures import Headers

from runtime.server.errors import APIError

KEY_VARIABLE = "MOECAST_API_KEY"


def load_api_keys(file: Path | str | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of a file, one a line, and the one of the environment.

    Args:
        file: Empty lines and lines that begin with ``#`` are no keys. None for no file.
        environment: Where ``MOECAST_API_KEY`` may stand.

    Raises:
        ValueError: The file cannot be read or has no key, or a key is none that a header can hold.
    """
    keys = []
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"serve.api_key_file={file}: cannot be read ({type(error).__name__}); "
                "give a text file with one key a line"
            ) from None
        keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
        if not keys:
            raise ValueError(f"serve.api_key_file={file}: holds no key; write one key a line")
    if key := environment.get(KEY_VARIABLE, "").strip():
        keys.append(key)
    for number, key in enumerate(keys, start=1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"API key number {number} has a character that a header cannot hold: use letters, "
                "digits and punctuation of ASCII, without spaces"
            )
    return tuple(keys)


def check_exposure(host: str, api_keys: Sequence[str]) -> None:
    """Refuse to be reachable by other machines without a key.

    Raises:
        ValueError: ``host`` is no loopback address, and there is no key.
    """
    if not api_keys and not is_loopback(host):
        raise ValueError(
            f"serve.host={host} can be reached by other machines, and there is no API key: set "
            f"{KEY_VARIABLE}, or serve.api_key_file to a file with one key a line, or keep "
            "serve.host=127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Lets requests pass that show a key.

    Args:
        api_keys: Any of them will do; without any, every request passes.
        open_paths: Paths that need no key.
    """

    def __init__(self, api_keys: Sequence[str], *, open_paths: Sequence[str]) -> None:
        self._keys = [key.encode() for key in api_keys]
        self._open_paths = frozenset(open_paths)

    def refusal(self, path: str, headers: Headers) -> APIError | None:
        """What the request gets instead of an answer; None if it may pass."""
        if not self._keys or path in self._open_paths:
            return None
        shown = headers.get("authorization")
        if shown is None:
            return _unauthorized(
                "no API key: send the header 'Authorization: Bearer KEY'", "missing_api_key"
            )
        scheme, _, key = shown.partition(" ")
        given = key.strip().encode()
        # All keys are compared, so that the time does not tell which one was nearly right.
        matches = [secrets.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            return _unauthorized("the API key is wrong", "invalid_api_key")
        return None


def _unauthorized(message: str, code: str) -> APIError:
    return APIError(
        message,
        status=401,
        type="authentication_error",
        code=code,
        headers={"WWW-Authenticate": "Bearer"},
    )
