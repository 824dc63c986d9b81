"""The embedded model: a small trained mixture of experts that ships with the package.

Knows where the checkpoint lies, nothing else: importing this package loads no torch.
"""

from pathlib import Path

TINY_MOE_DIR: Path = Path(__file__).parent / "model"
"""Directory of the checkpoint and its tokenizer, as `from_pretrained` takes it."""

__all__ = ["TINY_MOE_DIR"]
