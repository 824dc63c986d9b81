"""A profile of two tasks over a small MoE, whose use of experts a test can say."""

from typing import Any

import torch
from torch import Tensor

from data.schema import MoESpec
from predictors.task_profile import TaskProfile
from predictors.task_reader import KeywordReader, TaskReader

SPEC = MoESpec(model_id="m", num_experts=4, top_k=1, decoder_layers=(0, 1))
KEYWORDS = {"code": ["def"], "talk": ["hello"]}


def profile_of(
    *,
    spec: MoESpec = SPEC,
    reader: TaskReader | None = None,
    use_GLE: Tensor | None = None,
    agreement_GL: Any = None,
    answer_tokens_G: Any = (10.0, 30.0),
) -> TaskProfile:
    """Code uses experts 0 and 1, talk 2 and 3, in all layers; everybody is sensitive everywhere."""
    if use_GLE is None:
        half = spec.num_experts // 2
        use_GLE = torch.zeros(2, spec.num_layers, spec.num_experts)
        use_GLE[0, :, :half] = torch.linspace(0.75, 0.25, half)
        use_GLE[1, :, half:] = torch.linspace(0.625, 0.375, half)
    if agreement_GL is None:
        agreement_GL = torch.zeros(2, spec.num_layers)
    return TaskProfile(
        spec=spec,
        reader=reader or KeywordReader(keywords=KEYWORDS, fallback="talk"),
        use_GLE=use_GLE,
        agreement_GL=torch.as_tensor(agreement_GL),
        kl_GL=torch.ones(2, spec.num_layers),
        answer_tokens_G=torch.tensor(answer_tokens_G),
        measured={"residency": 0.25},
    )
