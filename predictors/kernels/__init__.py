"""Triton kernels of predictors that run inside a captured CUDA graph.

What each computes is written down in torch beside its caller, and tests compare the two, on the CPU
by Triton's interpreter (``TRITON_INTERPRET=1``). Importing them needs Triton; nothing else in
`predictors` does.
"""
