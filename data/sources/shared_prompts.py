"""The public prompt sets in the folder MOECAST_DATA, by name."""

from collections.abc import Iterator
from pathlib import Path

from data.importers.catalog import data_dir
from data.schema import Prompt
from data.sources.base import PromptSource
from data.sources.jsonl import read_jsonl


class SharedPrompts(PromptSource):
    """One of the sets: ``mt_bench``, ``mmlu``, ``sgd``, ``xquad``, ``humaneval`` and others.

    Args:
        name: The beginning of the name of one file below ``prompts/``.
        num_prompts: How many prompts; None means all.

    Raises:
        ValueError: No set, or more than one, has such a name (the message lists them), or the
            folder is not there.
    """

    def __init__(self, *, name: str, num_prompts: int | None = None) -> None:
        files = _prompt_files()
        matches = [name] if name in files else [stem for stem in files if stem.startswith(name)]
        if len(matches) != 1:
            raise ValueError(f"name={name!r}: must begin the name of one set of {sorted(files)}")
        self._path = files[matches[0]]
        super().__init__(name=matches[0], num_prompts=num_prompts)

    def read(self) -> Iterator[Prompt]:
        """Yield the prompts in the file's order."""
        return read_jsonl(self._path)


def _prompt_files() -> dict[str, Path]:
    files = sorted((data_dir() / "prompts").glob("*/*.jsonl*"))
    return {file.name.split(".")[0]: file for file in files}
