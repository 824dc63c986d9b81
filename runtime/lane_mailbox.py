"""What a GPU and the host's threads share, so that both compute parts of the same experts.

The mailbox lies in page-locked memory, which both sides read and write in place: a kernel writes a
request and its sequence number, threads see the number change, compute and write the answer and the
same number (`runtime.kernels.lane`, `runtime/native/cpu_lane.c`). There is one request at a time.
What only kernels need lies on the device: how much the lane is given, and whether it answers.

Knows no kernels and no threads.

Shape letters: L MoE layers · E experts per layer · K experts per token · T tokens · D hidden ·
N = T * K uses · A entries of an active list, and of jobs at most · X counters.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

COUNTS = ("requests", "neurons", "late", "unanswered", "pauses")
"""Columns of `LaneBooks.counts_X`; late answers are those that the device had to wait for."""
FOR_GOOD = 2**31 - 1  # events of a pause that does not end
_WORDS_PER_LINE = 16  # a flag has a cache line of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class Mailbox:
    """Tensors in host memory; page-locked where a GPU takes part.

    Attributes:
        posted: int32, the sequence number of the latest request, in its first word.
        answered: int32, that of the latest answer.
        request: int32, layer, T and the number of jobs.
        job_expert_A: int32.
        job_first_A: int32, the first neuron that is asked for; the others follow to the last.
        expert_of_use_N: int32.
        hidden_TD: bfloat16.
        answer_ND: float32, sums over the neurons asked for; only uses of a job's expert count.
    """

    posted: Tensor
    answered: Tensor
    request: Tensor
    job_expert_A: Tensor
    job_first_A: Tensor
    expert_of_use_N: Tensor
    hidden_TD: Tensor
    answer_ND: Tensor

    @classmethod
    def empty(
        cls, *, max_tokens: int, top_k: int, num_experts: int, hidden_size: int, pin: bool
    ) -> Self:
        """One that has seen no request."""
        uses = max_tokens * top_k
        jobs = min(num_experts, uses)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=pin)

        return cls(
            posted=zeros(_WORDS_PER_LINE),
            answered=zeros(_WORDS_PER_LINE),
            request=zeros(_WORDS_PER_LINE),
            job_expert_A=zeros(jobs),
            job_first_A=zeros(jobs),
            expert_of_use_N=zeros(uses),
            hidden_TD=zeros(max_tokens, hidden_size, dtype=torch.bfloat16),
            answer_ND=zeros(uses, hidden_size, dtype=torch.float32),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneBooks:
    """Tensors on the device that the lane's kernels keep.

    Attributes:
        split_LE: int32, where the neurons begin that the host computes, for experts of a layer's
            latest event; F = none.
        sequence_1: int32, of the latest request.
        pending_1: int32, jobs of the event at hand.
        failed_1: int32, 1 = the event's answer did not come, and the device must do without.
        pause_1: int32, events until the lane is tried again; `FOR_GOOD` = never.
        cpu_ns_1: float32, what a neuron takes on the host as far as known.
        counts_X: int64, `COUNTS`.
        fill_source_LA: int64, addresses from which to complete slots after a layer's event.
        fill_target_LA: int64, to which.
        fill_bytes_LA: int64, how much; 0 = nothing.
        fill_neurons_L: int64, how much of an expert that is in all.
        fill_begun_1: int64, neurons that were ever to be copied.
        fill_done_1: int64, those of them that have arrived.
    """

    split_LE: Tensor
    sequence_1: Tensor
    pending_1: Tensor
    failed_1: Tensor
    pause_1: Tensor
    cpu_ns_1: Tensor
    counts_X: Tensor
    fill_source_LA: Tensor
    fill_target_LA: Tensor
    fill_bytes_LA: Tensor
    fill_neurons_L: Tensor
    fill_begun_1: Tensor
    fill_done_1: Tensor

    @classmethod
    def empty(
        cls,
        *,
        num_layers: int,
        num_experts: int,
        num_neurons: int,
        max_jobs: int,
        device: torch.device | str,
    ) -> Self:
        """Those of a lane that has done nothing."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            split_LE=zeros(num_layers, num_experts) + num_neurons,
            sequence_1=zeros(1),
            pending_1=zeros(1),
            failed_1=zeros(1),
            pause_1=zeros(1),
            cpu_ns_1=zeros(1, dtype=torch.float32),
            counts_X=zeros(len(COUNTS), dtype=torch.int64),
            fill_source_LA=zeros(num_layers, max_jobs, dtype=torch.int64),
            fill_target_LA=zeros(num_layers, max_jobs, dtype=torch.int64),
            fill_bytes_LA=zeros(num_layers, max_jobs, dtype=torch.int64),
            fill_neurons_L=zeros(num_layers, dtype=torch.int64),
            fill_begun_1=zeros(1, dtype=torch.int64),
            fill_done_1=zeros(1, dtype=torch.int64),
        )
