"""The CPU lane: processor cores compute a part of what is missing while the link carries the rest.

A core's threads are native (`runtime/native/cpu_lane.c`), compiled when the first lane starts by
the C compiler that Triton needs anyway. `CpuLane` starts and stops them, measures what they give,
and holds the mailbox through which kernels ask them (`runtime.lane_mailbox`,
`runtime.kernels.lane`). While requests follow each other, the threads keep their cores busy
looking for the next one; without any they soon sleep in between.

Knows nothing of caches and policies.

Shape letters: L MoE layers · E experts per layer · D hidden · F expert FFN inner size.
"""

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from runtime.expert_layout import ExpertLayout
from runtime.kernels.activation import KINDS, Activation
from runtime.lane_mailbox import COUNTS, LaneBooks, Mailbox

logger = logging.getLogger(__name__)

GROUP_COLUMNS = 32  # D must be a multiple of it
_SOURCE = Path(__file__).parent / "native" / "cpu_lane.c"
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
_MAX_THREADS = 15  # more cores than that read memory no faster
_TRIALS = 7
_PATIENCE_S = 5.0  # of the host with its own threads


class LaneUnavailableError(RuntimeError):
    """There can be no CPU lane here; the message says why."""


class _Config(ctypes.Structure):
    """`Config` of the native source, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("hidden_size", "num_neurons", "num_rows")),
        *((name, ctypes.c_int64) for name in ("has_bias", "num_experts", "top_k")),
        *((name, ctypes.c_int64) for name in ("max_tokens", "max_jobs", "num_threads")),
        *((name, ctypes.c_void_p) for name in ("core_of_thread", "home", "kind", "alpha")),
        *((name, ctypes.c_void_p) for name in ("limit", "posted", "answered", "request")),
        *((name, ctypes.c_void_p) for name in ("job_expert", "job_first", "expert_of_use")),
        *((name, ctypes.c_void_p) for name in ("hidden", "answer")),
    ]


class CpuLane:
    """Threads that answer requests for parts of experts.

    Args:
        layout: Of the records; bfloat16, D a multiple of 32.
        home_address_LE: int64 on the host: where each expert's record lies.
        activations: Of each layer's experts.
        top_k: K.
        max_tokens: The most tokens of a request.
        device: Whose kernels ask.
        num_threads: By default one per core that this process may use but one, 15 at most.

    Attributes:
        mailbox: Where requests and answers go.
        books: What kernels know of the lane.
        num_threads: How many there are.

    Raises:
        LaneUnavailableError: No C compiler, or experts that the lane cannot compute.
        ValueError: ``num_threads`` is below 1.
    """

    def __init__(
        self,
        *,
        layout: ExpertLayout,
        home_address_LE: Tensor,
        activations: Sequence[Activation],
        top_k: int,
        max_tokens: int,
        device: torch.device,
        num_threads: int | None = None,
    ) -> None:
        if layout.dtype != torch.bfloat16 or layout.hidden_size % GROUP_COLUMNS:
            raise LaneUnavailableError(
                f"it computes bfloat16 experts with a hidden size in steps of {GROUP_COLUMNS}, not "
                f"{str(layout.dtype).removeprefix('torch.')} ones of {layout.hidden_size}"
            )
        cores = sorted(os.sched_getaffinity(0))
        if num_threads is None:
            num_threads = max(1, min(len(cores) - 1, _MAX_THREADS))
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads}: must be at least 1")
        self.num_threads = num_threads
        self._layout, (L, E) = layout, home_address_LE.shape
        is_gpu = device.type == "cuda"
        self.mailbox = Mailbox.empty(
            max_tokens=max_tokens,
            top_k=top_k,
            num_experts=E,
            hidden_size=layout.hidden_size,
            pin=is_gpu,
        )
        max_jobs = len(self.mailbox.job_expert_A)
        F = layout.expert_intermediate_size
        self.books = LaneBooks.empty(
            num_layers=L, num_experts=E, num_neurons=F, max_jobs=max_jobs, device=device
        )
        # The first core stays free for the thread that launches the model, if there are enough.
        free = cores[1:] if len(cores) > self.num_threads else []
        of_thread = [free[i] if free else -1 for i in range(self.num_threads)]
        tensors = {
            "core_of_thread": torch.tensor(of_thread, dtype=torch.int32),
            "home": home_address_LE.contiguous(),
            "kind": torch.tensor([KINDS.index(a.kind) for a in activations], dtype=torch.int32),
            "alpha": torch.tensor([a.alpha for a in activations], dtype=torch.float32),
            "limit": torch.tensor([a.limit for a in activations], dtype=torch.float32),
            "posted": self.mailbox.posted,
            "answered": self.mailbox.answered,
            "request": self.mailbox.request,
            "job_expert": self.mailbox.job_expert_A,
            "job_first": self.mailbox.job_first_A,
            "expert_of_use": self.mailbox.expert_of_use_N,
            "hidden": self.mailbox.hidden_TD,
            "answer": self.mailbox.answer_ND,
        }
        library = _compiled()
        self._config = _Config(
            hidden_size=layout.hidden_size,
            num_neurons=F,
            num_rows=layout.num_rows,
            has_bias=layout.has_bias,
            num_experts=E,
            top_k=top_k,
            max_tokens=max_tokens,
            max_jobs=max_jobs,
            num_threads=self.num_threads,
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
        handle = library.cpu_lane_start(ctypes.byref(self._config))
        if not handle:
            raise LaneUnavailableError(f"{self.num_threads} threads could not be started")
        # Threads read the tensors as long as they run: also where nobody has closed the lane.
        self._stop = weakref.finalize(self, _stop, library, handle, tensors)
        self._told: set[str] = set()

    def ask(self, layer: int, jobs: Sequence[tuple[int, int]], ids_TK: Tensor) -> None:
        """Let the host be the one that asks, and wait for the answer.

        Args:
            layer: Of the experts.
            jobs: Experts, and the first neuron of each that is wanted.
            ids_TK: Which token uses which; the hidden states are those in the mailbox.

        Raises:
            LaneUnavailableError: No answer.
        """
        self._write(layer, jobs, ids_TK)
        self._send()

    def measure_neuron_s(self) -> float:
        """Seconds of a neuron, of requests for half an expert each; median of some."""
        F, E = self._layout.expert_intermediate_size, self._config.num_experts
        spent_s = []
        for trial in range(_TRIALS + 1):
            expert = trial % E
            self._write(0, [(expert, F // 2)], torch.full((1, self._config.top_k), expert))
            started_s = time.perf_counter()
            self._send()
            if trial:  # the first wakes the threads up
                spent_s.append(time.perf_counter() - started_s)
        return median(spent_s) / (F - F // 2)

    def _write(self, layer: int, jobs: Sequence[tuple[int, int]], ids_TK: Tensor) -> None:
        box, num_uses = self.mailbox, ids_TK.numel()
        box.expert_of_use_N[:num_uses] = ids_TK.flatten()
        box.request[:3] = torch.tensor([layer, len(ids_TK), len(jobs)])
        box.job_expert_A[: len(jobs)] = torch.tensor([expert for expert, _ in jobs])
        box.job_first_A[: len(jobs)] = torch.tensor([first for _, first in jobs])
        self.books.sequence_1.fill_(int(box.posted[0]) + 1)  # kernels count on from there

    def _send(self) -> None:
        posted, answered = self.mailbox.posted.numpy(), self.mailbox.answered.numpy()
        number = int(posted[0]) + 1
        posted[0] = number
        deadline_s = time.perf_counter() + _PATIENCE_S
        while answered[0] != number:
            if time.perf_counter() > deadline_s:
                raise LaneUnavailableError(f"its threads do not answer within {_PATIENCE_S} s")

    def counts(self) -> dict[str, int]:
        """`COUNTS` as they are now; waits for the device, and says what has gone wrong since."""
        counts = dict(zip(COUNTS, self.books.counts_X.tolist(), strict=True))
        for name, what in (
            ("unanswered", "a request was not answered in time: it stays off, the GPU computes"),
            ("pauses", "the processor has fallen behind the link: it pauses"),
        ):
            if counts[name] and name not in self._told:
                self._told.add(name)
                logger.warning("CPU lane: %s (%d of %d)", what, counts[name], counts["requests"])
        return counts

    @property
    def is_on(self) -> bool:
        """Whether kernels ask it now; waits for the device."""
        return self._stop.alive and not int(self.books.pause_1)

    def close(self) -> None:
        """Stop the threads; a request that comes later is not answered."""
        self._stop()


def _stop(library: Any, handle: int, tensors: dict[str, Tensor]) -> None:
    library.cpu_lane_stop(handle)
    tensors.clear()


def _compiled() -> Any:
    """The native library, for the processor at hand.

    Raises:
        LaneUnavailableError: There is no C compiler, or it refuses.
    """
    said = f"none of {', '.join(_COMPILERS)} is installed"
    folder = Path(tempfile.mkdtemp(prefix="moecast-"))
    try:
        for compiler in filter(shutil.which, (os.environ.get("CC", ""), *_COMPILERS)):
            library = folder / "cpu_lane.so"
            command = [compiler, *_FLAGS, "-o", str(library), str(_SOURCE), "-lm"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                loaded = ctypes.CDLL(str(library))
                loaded.cpu_lane_start.restype = ctypes.c_void_p
                loaded.cpu_lane_start.argtypes = [ctypes.POINTER(_Config)]
                loaded.cpu_lane_stop.restype = None
                loaded.cpu_lane_stop.argtypes = [ctypes.c_void_p]
                return loaded
            said = f"{compiler} cannot compile it: {result.stderr.strip()[-500:]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise LaneUnavailableError(said)
