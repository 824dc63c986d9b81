"""What is known of each task before serving: who uses which experts, and what tolerates what.

Source: eMoE §3.2.1 (tasks), §3.4 (the frequencies f_i and sensitivities s of Eq. 2). Measured by
`runtime.profile_tasks`, kept by `predictors.task_profile_file`, read by `runtime.resident_planner`.

Knows nothing of files, nor of how any of it is measured.

Shape letters: G tasks · L MoE layers · E experts per layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from data.schema import MoESpec
from predictors.task_reader import KeywordReader, TaskReader


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskProfile:
    """The tables of G tasks, and who reads a prompt's task.

    Attributes:
        spec: The model's MoE.
        reader: Names the tasks.
        use_GLE: float32, the share of a task's tokens that use each expert (f_i of Eq. 2).
        agreement_GL: float32, how much of a task's answers stays the same where that layer alone
            is restricted to random experts (`runtime.profile_tasks`), in [0, 1].
        kl_GL: float32, how far its next-token distributions then are, in nats.
        answer_tokens_G: float32, mean length of an answer (W_o of Eq. 2).
        measured: How; plain values.

    Raises:
        ValueError: A table's shape is not that of the spec and the tasks, or a value is no number.
    """

    spec: MoESpec
    reader: TaskReader
    use_GLE: Tensor
    agreement_GL: Tensor
    kl_GL: Tensor
    answer_tokens_G: Tensor
    measured: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Check every table."""
        num_tasks, num_layers = len(self.reader.tasks), self.spec.num_layers
        shapes = {
            "use_GLE": (num_tasks, num_layers, self.spec.num_experts),
            "agreement_GL": (num_tasks, num_layers),
            "kl_GL": (num_tasks, num_layers),
            "answer_tokens_G": (num_tasks,),
        }
        for name, shape in shapes.items():
            table: Tensor = getattr(self, name)
            if table.shape != shape or table.isnan().any():
                raise ValueError(f"{name} of shape {list(table.shape)}: must be numbers, {shape}")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names, in the order of the tables' rows."""
        return self.reader.tasks

    def sensitive_GL(self, *, min_agreement: float) -> Tensor:
        """bool, s of Eq. 2: whether restricting the layer costs the task more than is allowed.

        Args:
            min_agreement: What must stay the same, in [0, 1]; the paper's example is 0.85. 0 makes
                every layer insensitive but those without any agreement, above 1 all sensitive.
        """
        return self.agreement_GL < min_agreement


def pooled(profile: TaskProfile) -> TaskProfile:
    """The same without tasks: one, of which every prompt is, and which uses what all use.

    Args:
        profile: Whose tasks count alike.
    """
    return TaskProfile(
        spec=profile.spec,
        reader=KeywordReader(keywords={"any": ()}, fallback="any"),
        use_GLE=profile.use_GLE.mean(dim=0, keepdim=True),
        agreement_GL=profile.agreement_GL.mean(dim=0, keepdim=True),
        kl_GL=profile.kl_GL.mean(dim=0, keepdim=True),
        answer_tokens_G=profile.answer_tokens_G.mean(dim=0, keepdim=True),
        measured=profile.measured,
    )
