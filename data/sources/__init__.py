"""Where prompts come from, and recorded traces that need no prompts.

A `PromptSource` has ``name``, ``digest`` and ``prompts()``, and a model must be run on those. A
`TraceFile` has ``name``, ``digest`` and ``load()``, which returns a `TraceSet`.
"""

from collections.abc import Mapping

from data.sources.base import PromptSource
from data.sources.hub import Hub
from data.sources.jsonl import Jsonl
from data.sources.shared_prompts import SharedPrompts
from data.sources.stdlib import Stdlib
from data.sources.task_prompts import TaskPrompts
from data.sources.trace import TraceFile

SOURCES: Mapping[str, type[PromptSource] | type[TraceFile]] = {
    "stdlib": Stdlib,
    "jsonl": Jsonl,
    "hub": Hub,
    "shared_prompts": SharedPrompts,
    "task_prompts": TaskPrompts,
    "trace": TraceFile,
}

__all__ = [
    "SOURCES",
    "Hub",
    "Jsonl",
    "PromptSource",
    "SharedPrompts",
    "Stdlib",
    "TaskPrompts",
    "TraceFile",
]
