"""Where tests run Triton kernels: compiled on a GPU, by the interpreter on the CPU without one."""

import os

import torch

INTERPRETED = not torch.cuda.is_available()
KERNEL_DEVICE = "cpu" if INTERPRETED else "cuda"


def set_up_triton() -> None:
    """Say so before anything imports triton, which reads it once."""
    if INTERPRETED:
        os.environ["TRITON_INTERPRET"] = "1"
