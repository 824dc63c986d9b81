"""The task of a prompt by a linear classifier over its embedding.

Knows nothing of how embeddings are made. Shape letters: G tasks · S embedding · N prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from predictors.embedders.base import Embedder
from predictors.task_reader import TaskReader

_STEPS = 100


class ClassifierReader(TaskReader):
    """Multinomial logistic regression: the task whose row answers the embedding most.

    Ours; eMoE counts keywords. What it costs is the embedding; with one that the server makes
    anyway, nothing.

    Args:
        tasks: G names.
        embedder: What it reads prompts with.
        weights_GS: float32.
        bias_G: float32.

    Raises:
        ValueError: Shapes do not go together.
    """

    kind: ClassVar[str] = "classifier"

    def __init__(
        self, *, tasks: Sequence[str], embedder: Embedder, weights_GS: Tensor, bias_G: Tensor
    ) -> None:
        if weights_GS.shape != (len(tasks), embedder.dim) or bias_G.shape != (len(tasks),):
            raise ValueError(
                f"weights of shape {list(weights_GS.shape)} and bias {list(bias_G.shape)}: must be "
                f"[{len(tasks)}, {embedder.dim}] and [{len(tasks)}]"
            )
        self.tasks = tuple(tasks)
        self.embedder = embedder
        self._weights_GS, self._bias_G = weights_GS, bias_G

    @classmethod
    def fit(
        cls, prompts: Mapping[str, Sequence[str]], *, embedder: Embedder, weight_decay: float = 1e-4
    ) -> Self:
        """Learn from prompts of each task; each task counts alike, however many it has.

        Args:
            prompts: Of each task.
            embedder: What it reads prompts with.
            weight_decay: Times half the squared weights, added to the mean loss.

        Raises:
            ValueError: A task has no prompts, or ``weight_decay`` is negative.
        """
        if weight_decay < 0:
            raise ValueError(f"weight_decay={weight_decay}: must be at least 0")
        if empty := [task for task, texts in prompts.items() if not texts]:
            raise ValueError(f"tasks {empty} have no prompts to learn from")
        inputs_NS = torch.from_numpy(
            embedder.embed([text for texts in prompts.values() for text in texts])
        )
        sizes_G = torch.tensor([len(texts) for texts in prompts.values()])
        targets_N = torch.arange(len(prompts)).repeat_interleave(sizes_G)
        weights_GS = torch.zeros(len(prompts), embedder.dim, requires_grad=True)
        bias_G = torch.zeros(len(prompts), requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights_GS, bias_G], max_iter=_STEPS, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            found = F.cross_entropy(
                inputs_NS @ weights_GS.T + bias_G, targets_N, weight=1.0 / sizes_G
            )
            total = found + 0.5 * weight_decay * weights_GS.square().sum()
            total.backward()  # type: ignore[no-untyped-call]
            return total

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        return cls(
            tasks=tuple(prompts),
            embedder=embedder,
            weights_GS=weights_GS.detach(),
            bias_G=bias_G.detach(),
        )

    def read(self, prompt: str) -> int:
        """As `TaskReader.read`."""
        embedding_S = torch.from_numpy(self.embedder.embed([prompt]))[0]
        return int((self._weights_GS @ embedding_S + self._bias_G).argmax())

    def config(self) -> dict[str, Any]:
        """The tasks; the embedder is told apart."""
        return {"tasks": list(self.tasks)}

    def tensors(self) -> Mapping[str, Tensor]:
        """Weights and bias."""
        return {"weights_GS": self._weights_GS, "bias_G": self._bias_G}
