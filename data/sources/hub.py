"""Prompts from a text column of a Hugging Face dataset, at a pinned revision.

Goes through the hub's file cache, so that what was downloaded once is there offline
(``HF_HUB_OFFLINE=1``). A folder in the layout of a hub dataset works the same.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from data.schema import Prompt
from data.sources.base import PromptSource

logger = logging.getLogger(__name__)


class Hub(PromptSource):
    """The rows of one split.

    Args:
        dataset: A hub id, such as ``HuggingFaceH4/mt_bench_prompts``, or a local folder.
        revision: A commit, tag or branch of the hub id; a commit is reproducible. Must be given
            for a hub id, and says nothing of a folder.
        split: The split's name.
        text_column: The column of the prompts.
        topic_column: The column of their topics, if there is one.
        config: The dataset's configuration, if it has several.
        files: Glob of the files to download and read; None means all that the split needs, after
            downloading the whole repository.
        num_prompts: How many prompts; None means all.

    Raises:
        ValueError: ``revision`` is missing, or ``num_prompts`` is below 1.
    """

    def __init__(
        self,
        *,
        dataset: str,
        revision: str | None = None,
        split: str = "train",
        text_column: str = "text",
        topic_column: str | None = None,
        config: str | None = None,
        files: str | None = None,
        num_prompts: int | None = None,
    ) -> None:
        super().__init__(name=dataset.rstrip("/").rpartition("/")[2], num_prompts=num_prompts)
        if revision is None and not Path(dataset).is_dir():
            raise ValueError(f"revision=null: the hub dataset {dataset!r} needs a commit or a tag")
        self._dataset = dataset
        self._revision = revision
        self._split = split
        self._text_column = text_column
        self._topic_column = topic_column
        self._config = config
        self._files = files

    def read(self) -> Iterator[Prompt]:
        """Yield the rows in order.

        Raises:
            ValueError: The dataset cannot be had, has no such split, configuration or column, or
                a text is not a string.
        """
        import datasets  # heavy, and no part of a serving machine

        folder = self._fetch()
        try:
            rows = datasets.load_dataset(
                str(folder), self._config, data_files=self._files, split=self._split
            )
        except (ValueError, FileNotFoundError) as error:  # datasets names what exists
            raise ValueError(f"dataset {self._dataset}, split {self._split}: {error}") from error
        for column in (self._text_column, self._topic_column):
            if column is not None and column not in rows.column_names:
                raise ValueError(
                    f"dataset {self._dataset} has no column {column!r}; "
                    f"its columns are {rows.column_names}"
                )
        for i, row in enumerate(rows):
            text = row[self._text_column]
            if not isinstance(text, str) or not text.strip():
                where = f"dataset {self._dataset}, row {i}"
                raise ValueError(f"{where}: {self._text_column} is no text: {text!r:.80}")
            topic = str(row[self._topic_column]) if self._topic_column else ""
            yield Prompt(request_id=f"{self.name}-{i}", topic=topic, text=text)

    def _fetch(self) -> Path:
        """The dataset's folder: the user's own, or a snapshot in the hub's cache."""
        if self._revision is None:
            return Path(self._dataset)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            folder = snapshot_download(
                self._dataset,
                repo_type="dataset",
                revision=self._revision,
                allow_patterns=self._files,
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
            raise ValueError(
                f"dataset {self._dataset!r} at revision {self._revision!r}: neither on the hub (or "
                f"it cannot be reached, or HF_HUB_OFFLINE is set) nor in its cache: {error}"
            ) from error
        logger.info("dataset %s at %s is in %s", self._dataset, self._revision, folder)
        return Path(folder)
