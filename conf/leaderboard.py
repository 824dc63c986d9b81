"""Ends a multirun in one leaderboard: the Hydra callback that ``conf/hydra/default.yaml`` names.

Hydra builds it for every command; it loads what draws only at the end of a multirun of train.py.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

log = logging.getLogger(__name__)


class LeaderboardCallback(Callback):
    """Joins what the jobs left in their folders into one table and one page."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table, write the page, and end with one line of JSON.

        Raises:
            SystemExit: Code 1 where no job succeeded, where one failed by an error of the program,
                or where the page could not be made. (Hydra would turn any other exception into a
                warning.)
        """
        from predictors.fit.board_page import write_leaderboard

        try:
            board = write_leaderboard(Path(config.hydra.sweep.dir))
        except Exception:
            log.exception("the leaderboard could not be made")
            sys.exit(1)
        if board is None:  # another command's jobs
            return
        sys.stdout.write(f"\n{board.text}\n\nleaderboard: {board.page}\n")
        sys.stdout.write(json.dumps(board.summary) + "\n")
        sys.stdout.flush()
        if not board.num_succeeded or board.num_ours:
            sys.exit(1)
