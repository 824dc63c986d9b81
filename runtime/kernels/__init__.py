"""Triton kernels: what a decode step does on the GPU beside the model's own layers.

Each has a torch reference that tests compare it with, on the CPU by Triton's interpreter
(``TRITON_INTERPRET=1``). Only they and `predictors.kernels` import triton.
"""
