"""Carries forecasts from a thread of the host to the device, and nobody waits for anybody.

The thread copies a forecast to one of two buffers on the device and then says which one is whole
(`ForecastInbox.post`); who runs the model takes over what is whole, device to device, in the order
of its own stream (`ForecastInbox.take`). A forward pass finds the old forecast or the new one,
never a mixture.

Shape letters: L MoE layers · E experts per layer.
"""

import threading
from typing import Any

import torch
from torch import Tensor

from predictors.base import Forecast


class ForecastInbox:
    """The latest forecast on a device.

    Args:
        num_layers: L.
        num_experts: E.
        device: Where it is read.

    Attributes:
        forecast: float32, static tensors on the device: what was taken last.
        known_tokens: Tokens of each request that the taken forecast has seen; None before the first
            was taken.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        shape = (2, num_layers, num_experts)
        on_gpu = device.type == "cuda"

        def zeros() -> Tensor:
            return torch.zeros(shape, device=device)

        self._taken_2LE = zeros()
        self.forecast = Forecast(self._taken_2LE[0], self._taken_2LE[1])
        self.known_tokens: int | None = None
        self._staged_2LE = torch.zeros(shape, pin_memory=on_gpu)
        self._buffers = (zeros(), zeros())
        self._posted: tuple[int, int] | None = None  # which buffer is whole, and what it knows
        self._last_posted = 1
        self._lock = threading.Lock()  # held for as long as a launch takes
        self._stream: Any = None
        self._read: tuple[Any, ...] = ()
        if on_gpu:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            make_event: Any = torch.cuda.Event
            self._read = (make_event(), make_event())
            torch.cuda.synchronize(device)  # the zeros are there before another stream writes

    @torch.no_grad()
    def post(self, forecast: Forecast, known_tokens: int) -> None:
        """Say what is newest, from one thread of the host, which alone waits for the copy.

        Args:
            forecast: float32 [L, E].
            known_tokens: Tokens of each request that it has seen.
        """
        place = 1 - self._last_posted
        for staged_LE, said_LE in zip(self._staged_2LE, forecast, strict=True):
            staged_LE.copy_(said_LE)
        if self._stream is None:
            self._buffers[place].copy_(self._staged_2LE)
        else:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._read[place])
                self._buffers[place].copy_(self._staged_2LE, non_blocking=True)
            self._stream.synchronize()
        with self._lock:
            self._posted, self._last_posted = (place, known_tokens), place

    @torch.no_grad()
    def take(self) -> bool:
        """Take over what is newest, if it was not taken yet; False where there is nothing new."""
        with self._lock:
            if self._posted is None:
                return False
            (place, self.known_tokens), self._posted = self._posted, None
            self._taken_2LE.copy_(self._buffers[place])
            if self._stream is not None:
                self._read[place].record()
        return True
