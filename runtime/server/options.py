"""What an operator decides about a server: who may ask, and how much.

The defaults suit one person's machine. Knows nothing of how limits are enforced.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request, or all of them together, may take.

    Args:
        max_body_bytes: Size of a request's body; larger ones get a 413.
        max_body_s: Seconds that a body may take to arrive; slower ones get a 408.
        max_prompt_tokens: Tokens of one prompt; None for what the model's context allows.
        max_new_tokens: Tokens of one answer; None for what the model's context allows.
        max_requests: Requests that are answered or wait at the same time; one more gets a 429.
        max_request_s: Seconds that an answer may take, queue included; slower ones get a 408.
            None for no limit.

    Raises:
        ValueError: A limit allows nothing.
    """

    max_body_bytes: int = 2 * 2**20
    max_body_s: float = 30.0
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_requests: int = 256
    max_request_s: float | None = 3600.0

    def __post_init__(self) -> None:
        """Check every field."""
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """How a server behaves.

    Args:
        api_keys: Who has one of them may ask; without any, everybody may.
        open_metrics: Whether ``/metrics`` needs no key, for a scraper that has none.
        limits: What requests may take.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)  # secrets are never logged
    open_metrics: bool = False
    limits: Limits = field(default_factory=Limits)
