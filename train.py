"""Collect routing, fit a predictor, judge it on replayed traces, export it.

    python train.py predictor=semantic                    # everything, on the embedded model
    python train.py source=gptoss20b predictor=semantic   # on recorded traces of a real model
    python train.py model=Qwen/Qwen3-30B-A3B source=jsonl source.path=prompts.jsonl
    python train.py stages=[fit,evaluate]                 # only these, on what is there already
    python train.py logger=none                           # without Weights & Biases
    python train.py --cfg job --resolve                   # show the configuration, run nothing

A stage whose result for the same inputs exists is skipped: every result lies in a folder that is
named by the digest of what it was made from. The last line printed is one JSON object.
"""

import json
import logging
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf import schema
from conf.build import build, expand_shorthand, plain, set_threads
from data.collect import run as run_collection
from data.collect import store_name
from data.errors import MoecastError
from data.files import digest_json, write_json
from data.models import load_model
from data.router_inputs import LiveInputs
from data.schema import TraceSet
from data.sources import TraceFile
from data.store import CollectSettings, TraceStore
from predictors.artifact import artifact_digest, load_artifact, read_manifest, save_artifact
from predictors.base import FitReport, Predictor
from predictors.fit.report import format_table, summary_rows, write_html, write_plots
from predictors.fit.tracking import Tracker
from predictors.layer_metrics import evaluate_layer_recall
from predictors.registry import PREDICTORS, predictor_class
from runtime.evaluate import judge

log = logging.getLogger("train")


class Pipeline:
    """The stages of one run: where each result lies, and what has to be made.

    Args:
        cfg: The composed configuration.

    Raises:
        ValueError: An unknown stage or baseline.
    """

    def __init__(self, cfg: DictConfig) -> None:
        if not cfg.stages or not set(cfg.stages) <= set(schema.STAGES):
            raise ValueError(f"stages={list(cfg.stages)}: must be some of {list(schema.STAGES)}")
        for name in cfg.evaluate.baselines:
            predictor_class(name)
        self.cfg = cfg
        self.folders = {name: Path(path) for name, path in plain(cfg.paths).items()}
        self.seconds: dict[str, float] = {}
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The model itself, loaded when it is first asked for, on a GPU if there is one."""
        if self._model is None:
            what = self.cfg.model
            self._model, _ = load_model(what.id, dtype=what.dtype, revision=what.revision)
            self._model = self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        return self._model

    def bound(self, predictor: Predictor) -> Predictor:
        """The same predictor, holding the model if it reads that."""
        if predictor.needs_model:
            predictor.bind(self.model)
        return predictor

    @contextmanager
    def stage(self, name: str, result: Path) -> Iterator[bool]:
        """Run a stage's body with True if ``result``, the file written last, is still to be made.

        Raises:
            MoecastError: It is, but the stage is not among `stages`.
        """
        must_make = not result.exists()
        if must_make and name not in self.cfg.stages:
            raise MoecastError(
                f"stages={list(self.cfg.stages)}: stage {name!r} has not been run for these "
                f"inputs ({result.parent} does not exist); add it to stages"
            )
        start_s = time.perf_counter()
        yield must_make
        self.seconds[name] = time.perf_counter() - start_s
        log.info(
            "%s: %s, %s",
            name,
            f"{self.seconds[name]:.1f} s" if must_make else "done before",
            result.parent,
        )

    def collect(self) -> TraceSet:
        """The traces: recorded ones are read, others collected."""
        source = build(self.cfg.source)
        if isinstance(source, TraceFile):
            return source.load()
        what = {
            "model": self.cfg.model.id,
            "dtype": self.cfg.model.dtype,
            "revision": self.cfg.model.revision,
            "source": source,
            "settings": CollectSettings(**plain(self.cfg.collect), seed=self.cfg.seed),
        }
        folder = self.folders["traces"] / store_name(**what)
        with self.stage("collect", folder / "manifest.json") as must_make:
            return run_collection(**what, out=folder) if must_make else TraceStore.open(folder)

    def fit(self, traces: TraceSet) -> tuple[Predictor, Path]:
        """The fitted predictor, and the folder that it was read back from."""
        predictor: Predictor = build(self.cfg.predictor)
        inputs = {
            "traces": traces.digest,
            "kind": predictor.kind,
            "config": predictor.config(),
            "embedder": predictor.embedder and predictor.embedder.fingerprint,
            "seed": self.cfg.seed,
        }
        folder = self.folders["fitted"] / f"{predictor.kind}-{digest_json(inputs)[:12]}"
        with self.stage("fit", folder / "manifest.json") as must_make:
            if must_make:
                report = self.bound(predictor).fit(traces)
                save_artifact(
                    predictor,
                    folder,
                    spec=traces.spec,
                    parents={"traces": traces.digest, "inputs": digest_json(inputs)},
                    fit_report=report,
                )
            return self.bound(load_artifact(folder, expect=traces.spec)), folder

    def evaluate(self, predictor: Predictor, fitted: Path, traces: TraceSet) -> dict[str, Any]:
        """What the predictor is worth beside the baselines."""
        settings = plain(self.cfg.evaluate)
        baselines = [name for name in settings.pop("baselines") if name != predictor.kind]
        inputs = {
            "traces": traces.digest,
            "fitted": artifact_digest(fitted),
            "baselines": baselines,
            "settings": settings,
        }
        folder = self.folders["evaluations"] / f"{predictor.kind}-{digest_json(inputs)[:12]}"
        result = folder / "evaluation.json"
        with self.stage("evaluate", result) as must_make:
            if must_make:
                torch.set_num_threads(1)  # a cache's tensors are too small to share
                contenders = {predictor.kind: predictor}
                for name in baselines:
                    contenders[name] = self.bound(PREDICTORS[name]())
                    contenders[name].fit(traces)
                judged = judge(contenders, traces, **settings)
                for name, contender in contenders.items():
                    if "layer" in contender.moments:
                        judged["predictors"][name]["layer_recall"] = evaluate_layer_recall(
                            contender,
                            LiveInputs.of_traces(self.model, traces).batches("test"),
                            max_tokens=settings["max_tokens"],
                        )
                write_json(
                    result,
                    {
                        **judged,
                        "predictor": predictor.kind,
                        "facts": _facts(traces, predictor, fitted),
                    },
                )
            evaluation: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return evaluation

    def export(self, predictor: Predictor, fitted: Path, evaluation: dict[str, Any]) -> Path:
        """The artifact: the fitted predictor together with what was measured of it."""
        metrics = {
            "recall": evaluation["predictors"][predictor.kind],
            "replay": [row for row in evaluation["replay"] if row["predictor"] == predictor.kind],
        }
        inputs = {"fitted": artifact_digest(fitted), "metrics": metrics}
        folder = self.folders["artifacts"] / f"{predictor.kind}-{digest_json(inputs)[:12]}"
        with self.stage("export", folder / "manifest.json") as must_make:
            if must_make:
                manifest = read_manifest(fitted)
                save_artifact(
                    predictor,
                    folder,
                    spec=manifest.spec.spec(),
                    parents={**manifest.parents, "fitted": artifact_digest(fitted)},
                    fit_report=FitReport(**manifest.fit_report) if manifest.fit_report else None,
                    metrics=metrics,
                )
            return folder


def _facts(traces: TraceSet, predictor: Predictor, fitted: Path) -> dict[str, Any]:
    """What a reader must know to trust the numbers, or to repeat them."""
    splits = list(traces.split.values())
    return {
        "model": traces.spec.describe(),
        "requests": {split: splits.count(split) for split in sorted(set(splits))},
        "traces": traces.digest,
        "fitted": artifact_digest(fitted),
        "config": predictor.config(),
        "embedder": predictor.embedder and predictor.embedder.config(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    """The numbers of the fitted predictor under the names that they are tracked by."""
    predictor = evaluation["predictor"]
    recall = evaluation["predictors"][predictor]["recall_by_lookahead"]
    metrics = {f"recall/lookahead_{ahead}": value for ahead, value in recall.items()}
    for row in evaluation["replay"]:
        if row["predictor"] == predictor:
            metrics[f"hit_ratio/residency_{row['residency']:g}"] = row["hit_ratio"]
            metrics[f"gap_closed/residency_{row['residency']:g}"] = row["gap_closed"]
    return metrics


def run(cfg: DictConfig, run_dir: Path, tracker: Tracker) -> dict[str, Any]:
    """Run the stages and write the report; returns the JSON summary."""
    pipeline = Pipeline(cfg)
    asked = set(cfg.stages)
    summary: dict[str, Any] = {"run": str(run_dir)}
    traces = pipeline.collect()
    summary["traces"] = traces.digest
    if asked & {"fit", "evaluate", "export"}:
        predictor, fitted = pipeline.fit(traces)
        summary["predictor"] = predictor.kind
    if asked & {"evaluate", "export"}:
        evaluation = pipeline.evaluate(predictor, fitted, traces)
        plots = write_plots(evaluation, run_dir)
        report = run_dir / "report.html"
        write_html(evaluation, plots, report)
        metrics = _metrics(evaluation)
        tracker.log(metrics)
        tracker.log_plots(plots)
        summary |= {"report": str(report), "metrics": metrics}
        print(f"\n{format_table(*summary_rows(evaluation))}\n")
        print(f"report:   {report}")
    if "export" in asked:
        summary["artifact"] = str(pipeline.export(predictor, fitted, evaluation))
        print(f"artifact: {summary['artifact']}")
    tracker.log({f"seconds/{stage}": seconds for stage, seconds in pipeline.seconds.items()})
    return {**summary, "seconds": pipeline.seconds}


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Entry point; returns the gap closed at the smallest budget, for sweepers."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    torch.manual_seed(cfg.seed)
    set_threads(cfg.model)
    tracker: Tracker = build(cfg.logger)
    failed = True
    try:
        choices = HydraConfig.get().runtime.choices
        name = "-".join(str(choices[group]) for group in ("predictor", "model", "source"))
        tracker.start(plain(cfg), run_dir=run_dir, name=name)
        summary = run(cfg, run_dir, tracker)
        failed = False
    except (MoecastError, ValueError) as error:
        log.debug("raised here:", exc_info=error)  # hydra.verbose=true shows it
        sys.exit(f"error: {error}")
    finally:
        tracker.finish(failed=failed)
    print(json.dumps(summary))
    gaps = [
        value
        for name, value in summary.get("metrics", {}).items()
        if name.startswith("gap_closed/")
    ]
    return gaps[0] if gaps else None


if __name__ == "__main__":
    schema.register()
    sys.argv[1:] = expand_shorthand(sys.argv[1:])
    main()
