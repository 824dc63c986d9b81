"""Where a run's configuration, metrics and plots are kept besides its own folder.

The only module that knows of Weights & Biases. Offline is the default; nothing here ever asks for
an account.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A run's notebook: start it, log to it, finish it (always, also after a failure)."""

    def start(self, config: Mapping[str, Any], *, run_dir: Path, name: str) -> None:
        """Open the run; ``config`` is the resolved configuration with hardware and versions."""
        ...

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Add to the configuration what is known only later: the digests of what was made."""
        ...

    def log(self, metrics: Mapping[str, float | None]) -> None:
        """Record metrics named ``group/metric``; None means it could not be measured."""
        ...

    def log_plots(self, paths: Mapping[str, Path]) -> None:
        """Record PNG files under their names."""
        ...

    def finish(self, *, failed: bool = False) -> None:
        """Close the run; a second call does nothing."""
        ...


class NullTracker:
    """Tracks nothing."""

    def start(self, config: Mapping[str, Any], *, run_dir: Path, name: str) -> None:
        """Do nothing."""

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log(self, metrics: Mapping[str, float | None]) -> None:
        """Do nothing."""

    def log_plots(self, paths: Mapping[str, Path]) -> None:
        """Do nothing."""

    def finish(self, *, failed: bool = False) -> None:
        """Do nothing."""


class WandbTracker:
    """Tracks to Weights & Biases.

    Args:
        project: The W&B project.
        offline: Write the run to its folder for a later ``wandb sync`` instead of sending it.

    Raises:
        ModuleNotFoundError: wandb is not installed (at `start`).
    """

    def __init__(self, *, project: str, offline: bool = True) -> None:
        if not project:
            raise ValueError("project='': must be the name of a W&B project")
        self._project = project
        self._offline = offline
        self._run: Any = None

    def start(self, config: Mapping[str, Any], *, run_dir: Path, name: str) -> None:
        """Open a run of its own, also where an earlier one of this process was left open."""
        try:
            import wandb
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "logger=wandb needs the wandb package: pip install 'moecast[wandb]', "
                "or run with logger=none"
            ) from None
        self._run = wandb.init(
            project=self._project,
            name=name,
            config=dict(config),
            dir=run_dir,
            mode="offline" if self._offline else "online",
            # With the default, a second job of a multirun would write into the first one's run.
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        log.info("W&B run %s (%s) in %s", self._run.id, self._run.settings.mode, run_dir)

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Add to the run's configuration; what is there under the same name is replaced."""
        assert self._run is not None, "start comes before describe"
        self._run.config.update(dict(facts), allow_val_change=True)

    def log(self, metrics: Mapping[str, float | None]) -> None:
        """Record the metrics that were measured."""
        assert self._run is not None, "start comes before log"
        self._run.log({name: value for name, value in metrics.items() if value is not None})

    def log_plots(self, paths: Mapping[str, Path]) -> None:
        """Upload PNG files as W&B images."""
        import wandb

        assert self._run is not None, "start comes before log_plots"
        self._run.log({f"plots/{name}": wandb.Image(str(path)) for name, path in paths.items()})

    def finish(self, *, failed: bool = False) -> None:
        """Close the run with exit code 1 if the work failed."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))
            self._run = None
