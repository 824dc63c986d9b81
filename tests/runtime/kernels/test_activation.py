"""Activations are taken from what a family's module computes, not from its name."""

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from runtime.kernels.activation import Activation


def test_families_are_recognised_by_their_numbers() -> None:
    small = {"hidden_size": 16, "intermediate_size": 16}
    gpt_oss = GptOssExperts(GptOssConfig(**small, num_local_experts=2))
    activation = Activation.of(gpt_oss)
    assert activation.kind == "clamped"
    assert activation.limit == pytest.approx(float(gpt_oss.limit))
    assert Activation.of(MixtralExperts(MixtralConfig(**small, num_local_experts=2))).kind == "silu"
    config = Qwen3MoeConfig(
        hidden_size=16, moe_intermediate_size=16, num_experts=2, hidden_act="gelu_pytorch_tanh"
    )
    assert Activation.of(Qwen3MoeExperts(config)).kind == "gelu_tanh"


class Strange(nn.Module):
    """Experts that square what they are given."""

    has_gate, is_concatenated = True, True

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate.square() * up


class ClampedSilu(nn.Module):
    """SiLU experts whose gate and up are cut off somewhere."""

    has_gate, is_concatenated = True, True

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.cut_off = limit

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        up = up.clamp(-self.cut_off, self.cut_off)
        return nn.functional.silu(gate.clamp(max=self.cut_off)) * up


@pytest.mark.parametrize("limit", [3.0, 10.0, 16.0, 200.0])
def test_a_clamp_is_seen_wherever_it_begins(limit: float) -> None:
    with pytest.raises(ValueError, match="activation of ClampedSilu"):
        Activation.of(ClampedSilu(limit))
    assert Activation.of(ClampedSilu(1e6)).kind == "silu", "nothing real is as large"


def test_an_unknown_activation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="activation of Strange is none of silu"):
        Activation.of(Strange())
