"""Telling a backend on a device when a model's forward passes begin and end.

Prefetching begins before layer 0, and a CPU lane has to know of passes that were broken off. The
embedding is part of a captured step, so what follows from it is replayed; the model's own hooks run
on the host before and after a replay, too, and before who is given embeddings.

Knows of no experts.
"""

from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class PassListener(Protocol):
    """Who is told."""

    def before_pass(self) -> None:
        """A pass is at hand, on the host; never called within a capture."""
        ...

    def begin_pass(self, num_tokens: int) -> None:
        """A pass begins; part of a captured step."""
        ...

    def after_pass(self) -> None:
        """A pass has been given to the device; never called within a capture."""
        ...


def watch_passes(
    model: Any, listener: PassListener, *, from_embedding: bool
) -> list[RemovableHandle]:
    """Tell ``listener`` of the model's passes until the handles are removed.

    Args:
        model: A transformers model.
        listener: Who is told.
        from_embedding: Tell of `begin_pass` and `after_pass`, and not of `before_pass` alone.
    """

    def embed(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        ids_BT = args[0] if args else next(iter(kwargs.values()))
        listener.begin_pass(ids_BT.numel())

    handles = [model.register_forward_pre_hook(lambda *_: listener.before_pass())]
    if from_embedding:
        embedding = model.get_input_embeddings()
        handles += [
            embedding.register_forward_pre_hook(embed, with_kwargs=True),
            model.register_forward_hook(lambda *_: listener.after_pass()),
        ]
    return handles
