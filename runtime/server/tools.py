"""Tool calls: whether the chat template knows them, and finding them in what the model says.

One form of call is read, the one of Hermes and Qwen templates:

    <tool_call>
    {"name": ..., "arguments": {...}}
    </tool_call>

A template without tools, or with calls of another form, is told apart by `tool_obstacle`, and the
request is refused: a model that is not shown its tools, or whose calls stay text, gives another
answer than the one asked for. What looks like a call and is not valid stays text.
"""

import json
import uuid
from typing import Any

from jinja2 import Environment, TemplateError, meta

from runtime.server.objects import FunctionCall, ToolCall
from runtime.server.text import overlap

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def tool_obstacle(tokenizer: Any) -> str | None:
    """Why tools cannot be used with this chat template; None if they can."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several templates under names
        template = template.get("tool_use") or template.get("default")
    if not isinstance(template, str):
        return "the model has no chat template"
    try:
        names = meta.find_undeclared_variables(Environment().parse(template))
    except TemplateError:  # a dialect of its own; the text alone must tell
        names = {"tools"} if "tools" in template else set()
    if "tools" not in names:
        return "the model's chat template has no tools"
    if _OPEN not in template or "<function=" in template:
        return "the model's chat template writes tool calls in a form that this server cannot read"
    return None


class ToolCallReader:
    """Separates the text of one answer, which arrives in pieces, from the tool calls in it.

    White space between text and calls belongs to neither.

    Args:
        reads: Whether to look for calls at all; if not, text passes as it is.
    """

    def __init__(self, *, reads: bool) -> None:
        self._reads = reads
        self._held = ""
        self._in_call = False
        self._after_call = False  # nothing but white space since the last call
        self.num_calls = 0

    def push(self, piece: str) -> tuple[str, list[ToolCall]]:
        """Take the next piece; return the text that is certain to be text, and complete calls."""
        if not self._reads:
            return piece, []
        self._held += piece
        text = ""
        calls: list[ToolCall] = []
        while True:
            if self._in_call:
                inside, found, rest = self._held.partition(_CLOSE)
                if not found:
                    return text, calls
                call = self._call(inside)
                if call is None:
                    text += _OPEN + inside + _CLOSE
                else:
                    calls.append(call)
                self._held, self._in_call, self._after_call = rest, False, call is not None
                continue
            before, found, rest = self._held.partition(_OPEN)
            if found:
                text += before.strip() if self._after_call else before.rstrip()
                self._held, self._in_call = rest, True
                continue
            return text + self._certain(), calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return what was held back: the call that it might have begun never came."""
        rest = (_OPEN if self._in_call else "") + self._held
        self._held, self._in_call = "", False
        return (rest.strip() if self._after_call else rest), []

    def _certain(self) -> str:
        """Take from what is held that which no call can follow directly."""
        if self._after_call:
            self._held = self._held.lstrip()
        certain = self._held[: len(self._held) - overlap(self._held, _OPEN)].rstrip()
        self._held = self._held[len(certain) :]
        self._after_call = self._after_call and not certain
        return certain

    def _call(self, inside: str) -> ToolCall | None:
        try:
            said = json.loads(inside)
        except (ValueError, RecursionError):
            return None
        if not isinstance(said, dict) or not isinstance(said.get("name"), str):
            return None
        arguments = said.get("arguments", said.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self.num_calls += 1
        return ToolCall(
            index=self.num_calls - 1,
            id=f"call_{uuid.uuid4().hex}",
            function=FunctionCall(name=said["name"], arguments=arguments),
        )
