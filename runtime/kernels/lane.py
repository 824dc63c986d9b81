"""The device's side of the CPU lane: share an event's missing neurons with the host, and wait.

`post_request` runs after the cache step. From what is missing, two rates and a latency it decides
how many neurons the host takes, so that link and host are done at the same time, and writes a
request into the mailbox. The expert kernel leaves those neurons out. `await_answer` waits for the
host's sums; if they do not come, which is a matter of looks and not of faith, the lane is off for
good and the expert kernel computes what is missing. No event can hang.

The host's rate is corrected as it goes: an answer that had to be waited for counts against it, one
that was there in time for it. Where the host is no longer worth asking, the lane pauses.

Shape letters: as in `runtime.lane_mailbox`, with F expert FFN inner size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from runtime.device_cache import CHUNK_NEURONS, Active
from runtime.expert_layout import ExpertLayout
from runtime.kernels.copy import copy_records
from runtime.lane_mailbox import FOR_GOOD, LaneBooks, Mailbox

ALL, OURS, LEFT_OUT = range(3)
"""Neurons that an expert kernel computes: all; those not asked of the host; chunks in which there
are such, if it does not answer."""
_BLOCK = 1024  # numbers that are sent at once
_FILL_PROGRAMS = 8  # few, so that what an event waits for goes first on the link


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneRates:
    """What decides the host's share.

    Args:
        link_ns: What a neuron takes over the link.
        cpu_ns: What it takes on the host, to begin with (`LaneBooks.cpu_ns_1`).
        latency_ns: From a request to its answer, if there were nothing to compute.
        slowest: At so many times ``link_ns`` the host is not worth asking: the lane pauses.
        pause_events: For so many events.
        most_filling: Slots are not completed (`fill_slots`) while so many neurons are on their way
            already, so that copies nobody waits for do not hold up others.
        max_looks: At an answer that does not come, of about a microsecond each.
    """

    link_ns: float
    cpu_ns: float
    latency_ns: float = 15_000.0
    slowest: float = 8.0
    pause_events: int = 10_000
    most_filling: int = 0
    max_looks: int = 200_000


class LaneEvent(NamedTuple):
    """The lane as one layer's event meets it."""

    layer: int
    books: LaneBooks
    mailbox: Mailbox
    rates: LaneRates


@triton.jit
def end_of_neurons(split_E, failed_1, expert, chunk_end, F, NEURONS: tl.constexpr):
    """Before which neuron a chunk's computing ends; at its beginning or before if all is done.

    A chunk with neurons on both sides is done again as a whole where the host fails to answer, so
    that the sums are those of an event without it, to the bit.
    """
    stop = F
    if NEURONS == 1:
        stop = tl.load(split_E + expert)
    if NEURONS == 2:
        left_out = (tl.load(failed_1) == 1) & (chunk_end > tl.load(split_E + expert))
        stop = tl.where(left_out, F, 0)
    return stop


@triton.jit
def _post(
    hidden_TD,
    ids_N,
    num_active_1,
    expert_A,
    slot_A,
    present_A,
    home_E,
    present_E,
    split_E,
    sequence_1,
    pending_1,
    pause_1,
    cpu_ns_1,
    counts_X,
    fill_source_A,
    fill_target_A,
    fill_bytes_A,
    fill_neurons_1,
    fill_begun_1,
    fill_done_1,
    posted,
    request,
    job_expert_A,
    job_first_A,
    expert_of_use_N,
    sent_TD,
    layer,
    num_tokens,
    num_ids,
    num_entries,
    D,
    F,
    slot_neurons,
    neuron_bytes,
    record_bytes,
    link_ns,
    latency_ns,
    most_filling,
    A_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    FILL: tl.constexpr,
    NEVER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    a = tl.arange(0, A_BLOCK)
    inside = a < tl.load(num_active_1)
    expert = tl.load(expert_A + a, mask=inside, other=0)
    slot = tl.load(slot_A + a, mask=inside, other=0)
    present = tl.load(present_A + a, mask=inside, other=0)
    missing = tl.where(inside, F - present, 0)
    total = tl.sum(missing, 0).to(tl.float32)
    pause = tl.load(pause_1)

    # (total - given) * link = latency + given * cpu, and every expert gives the same share.
    cpu_ns = tl.load(cpu_ns_1)
    share = (total * link_ns - latency_ns) / (tl.maximum(total, 1.0) * (link_ns + cpu_ns))
    share = tl.where(pause > 0, 0.0, tl.maximum(share, 0.0))
    given = (missing.to(tl.float32) * share).to(tl.int32)
    split = tl.minimum((F - given + CHUNK - 1) // CHUNK * CHUNK, F)
    job = (inside & (split < F)).to(tl.int32)
    num_jobs = tl.sum(job, 0)
    tl.store(split_E + expert, split, mask=inside)
    tl.store(pending_1, num_jobs)
    tl.store(pause_1, tl.where((pause > 0) & (pause < NEVER), pause - 1, pause))

    kept = ((job == 1) & (slot != 0)).to(tl.int32)
    if FILL:
        size = (F - split) * kept
        begun = tl.load(fill_begun_1)
        on_their_way = begun - tl.load(fill_done_1, volatile=True)
        filled = kept * (on_their_way + tl.cumsum(size, 0) <= most_filling).to(tl.int32)
        num_filled = tl.sum(size * filled, 0).to(tl.int64)
        tl.store(fill_neurons_1, num_filled)
        tl.store(fill_begun_1, begun + num_filled)
        home = tl.load(home_E + expert, mask=inside, other=0)
        offset = split.to(tl.int64) * neuron_bytes
        row = a < num_entries
        tl.store(fill_source_A + a, home + offset, mask=row)
        tl.store(fill_target_A + a, slot + offset, mask=row)
        tl.store(fill_bytes_A + a, tl.where(filled == 1, record_bytes - offset, 0), mask=row)
        kept = kept - filled
    tl.store(present_E + expert, tl.minimum(split, slot_neurons), mask=kept == 1)

    if num_jobs > 0:
        place = tl.cumsum(job, 0) - 1
        tl.store(job_expert_A + place, expert, mask=job == 1)
        tl.store(job_first_A + place, split, mask=job == 1)
        tl.store(request, layer)
        tl.store(request + 1, num_tokens)
        tl.store(request + 2, num_jobs)
        for start in range(0, num_ids, BLOCK):
            n = start + tl.arange(0, BLOCK)
            ids = tl.load(ids_N + n, mask=n < num_ids, other=0)
            tl.store(expert_of_use_N + n, ids.to(tl.int32), mask=n < num_ids)
        for start in range(0, num_tokens * D, BLOCK):
            n = start + tl.arange(0, BLOCK)
            sent = n < num_tokens * D
            x = tl.load(hidden_TD + n, mask=sent, other=0.0)
            tl.store(sent_TD + n, x.to(sent_TD.dtype.element_ty), mask=sent)
        sequence = tl.load(sequence_1) + 1
        tl.store(sequence_1, sequence)
        tl.store(counts_X + 0, tl.load(counts_X + 0) + 1)
        neurons = tl.sum(tl.where(job == 1, F - split, 0), 0)
        tl.store(counts_X + 1, tl.load(counts_X + 1) + neurons)
        tl.debug_barrier()  # all of the request is written before its number is
        tl.atomic_xchg(posted, sequence, sem="release", scope="sys")


@triton.jit
def _await(
    answered,
    sequence_1,
    pending_1,
    failed_1,
    pause_1,
    cpu_ns_1,
    counts_X,
    max_looks,
    fastest_ns,
    start_ns,
    slowest_ns,
    pause_events,
    NEVER: tl.constexpr,
):
    failed = 0
    if tl.load(pending_1) > 0:
        sequence = tl.load(sequence_1)
        looks = 0
        seen = tl.load(answered, volatile=True)
        while (seen != sequence) & (looks < max_looks):
            seen = tl.load(answered, volatile=True)
            looks += 1
        cpu_ns = tl.load(cpu_ns_1) * tl.where(looks > 0, 1.03, 0.98)
        cpu_ns = tl.maximum(cpu_ns, fastest_ns)
        if looks > 0:
            tl.store(counts_X + 2, tl.load(counts_X + 2) + 1)
        if seen != sequence:
            failed = 1
            tl.store(pause_1, NEVER)
            tl.store(counts_X + 3, tl.load(counts_X + 3) + 1)
        elif cpu_ns > slowest_ns:
            tl.store(pause_1, pause_events)
            tl.store(counts_X + 4, tl.load(counts_X + 4) + 1)
            cpu_ns = start_ns + 0.0 * cpu_ns  # then it is tried as it was at first
        tl.store(cpu_ns_1, cpu_ns)
    tl.store(failed_1, failed)


def post_request(
    lane: LaneEvent,
    *,
    hidden_TD: Tensor,
    topk_expert_ids_TK: Tensor,
    active: Active,
    home_address_E: Tensor,
    present_E: Tensor,
    slot_neurons: int,
    layout: ExpertLayout,
    fill: bool,
) -> None:
    """Decide what the host computes of a layer's event, and ask it to.

    Args:
        lane: Whom to ask.
        hidden_TD: Contiguous, as `expert_step` gets it.
        topk_expert_ids_TK: int64, contiguous.
        active: The event's experts.
        home_address_E: int64, every expert's record.
        present_E: int32, the cache's own: corrected to what a slot will hold after the event.
        slot_neurons: How many neurons a slot holds.
        layout: Of the records.
        fill: `fill_slots` follows, so that slots count as whole; for those of whole experts.
    """
    (T, D), (_, K) = hidden_TD.shape, topk_expert_ids_TK.shape
    layer, books, mailbox, rates = lane
    num_entries = len(active.expert_A)
    _post[(1,)](
        hidden_TD,
        topk_expert_ids_TK,
        active.num_1,
        active.expert_A,
        active.slot_address_A,
        active.present_A,
        home_address_E,
        present_E,
        books.split_LE[layer],
        books.sequence_1,
        books.pending_1,
        books.pause_1,
        books.cpu_ns_1,
        books.counts_X,
        books.fill_source_LA[layer],
        books.fill_target_LA[layer],
        books.fill_bytes_LA[layer],
        books.fill_neurons_L[layer:],
        books.fill_begun_1,
        books.fill_done_1,
        mailbox.posted,
        mailbox.request,
        mailbox.job_expert_A,
        mailbox.job_first_A,
        mailbox.expert_of_use_N,
        mailbox.hidden_TD,
        layer,
        T,
        T * K,
        num_entries,
        D,
        layout.expert_intermediate_size,
        slot_neurons,
        layout.num_rows * D * layout.dtype.itemsize,
        layout.record_bytes,
        rates.link_ns,
        rates.latency_ns,
        rates.most_filling,
        A_BLOCK=triton.next_power_of_2(num_entries),
        CHUNK=CHUNK_NEURONS,
        FILL=fill,
        NEVER=FOR_GOOD,
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit
def _filled(neurons_1, done_1):
    tl.store(done_1, tl.load(done_1) + tl.load(neurons_1))


def fill_slots(lane: LaneEvent, *, num_uses: int) -> None:
    """Copy what the host computes of a layer's event into the slots; on any stream.

    Args:
        lane: Of the event.
        num_uses: T * K; no more experts can have been missed.
    """
    layer, books, _, _ = lane
    copy_records(
        books.fill_source_LA[layer, :num_uses],
        books.fill_target_LA[layer, :num_uses],
        books.fill_bytes_LA[layer, :num_uses],
        programs_per_record=_FILL_PROGRAMS,
    )
    _filled[(1,)](books.fill_neurons_L[layer:], books.fill_done_1, num_warps=1)


def await_answer(lane: LaneEvent) -> None:
    """Wait until the host has answered the event's request, if there is one; never for long."""
    _, books, mailbox, rates = lane
    _await[(1,)](
        mailbox.answered,
        books.sequence_1,
        books.pending_1,
        books.failed_1,
        books.pause_1,
        books.cpu_ns_1,
        books.counts_X,
        rates.max_looks,
        rates.cpu_ns / rates.slowest,
        rates.cpu_ns,
        max(rates.link_ns * rates.slowest, rates.cpu_ns * 1.5),
        rates.pause_events,
        NEVER=FOR_GOOD,
        num_warps=1,
    )
