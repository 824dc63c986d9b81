"""Collect routing, fit a predictor, judge it on replayed traces, export it.

    python train.py predictor=semantic                    # everything, on the embedded model
    python train.py source=gptoss20b predictor=semantic   # on recorded traces of a real model
    python train.py model=Qwen/Qwen3-30B-A3B source=jsonl source.path=prompts.jsonl
    python train.py stages=[fit,evaluate]                 # only these, on what is there already
    python train.py logger=none                           # without Weights & Biases
    python train.py --cfg job --resolve                   # show the configuration, run nothing

    python train.py --multirun 'predictor=glob(*)'        # every predictor, on one leaderboard
    python train.py --multirun predictor=semantic,finemoe seed=0,1,2

A stage whose result for the same inputs exists is skipped: every result lies in a folder that is
named by the digest of what it was made from. The last line printed is one JSON object.

A multirun goes on when one of its jobs fails; its leaderboard (`conf.leaderboard`) names that job
and the reason. It ends with exit code 1 if no job succeeded, or one failed by an error of ours.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from conf import schema
from conf.build import build, expand_shorthand, plain, set_threads
from data.collect import run as run_collection
from data.collect import store_name
from data.errors import MoecastError
from data.files import digest_json, write_json
from data.machine import commit, hardware, versions
from data.models import load_model
from data.router_inputs import LiveInputs
from data.schema import TraceList, TraceSet
from data.sources import TraceFile
from data.store import CollectSettings, TraceStore
from data.tables import format_table
from predictors.artifact import artifact_digest, load_artifact, read_manifest, save_artifact
from predictors.base import FitReport, Predictor
from predictors.fit.jobs import JOB_FILE, job_record
from predictors.fit.report import summary_rows, write_html, write_plots
from predictors.fit.tracking import Tracker
from predictors.layer_metrics import evaluate_layer_recall, recorded_batches
from predictors.prefetch_budget import experts_per_layer_of
from predictors.registry import PREDICTORS, predictor_class
from predictors.routing import request_digest, traces_of
from runtime.evaluate import (
    JudgeSettings,
    joined,
    judge_policies,
    judge_predictor,
    judged_requests,
)

log = logging.getLogger("train")

_LAYER_TOKENS = 2000  # judged layer by layer: most predictors are asked for each by itself


class Fitted(NamedTuple):
    """A fitted predictor, the folder that keeps it (or None), what names it, and its cost."""

    predictor: Predictor
    folder: Path | None
    digest: str
    fit_s: float | None


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

    def fit(self, traces: TraceSet) -> Fitted:
        """The fitted predictor, read back from its folder if it can be kept in one."""
        predictor: Predictor = build(self.cfg.predictor)
        inputs = {
            "traces": traces.digest,
            "kind": predictor.kind,
            "config": predictor.config(),
            "embedder": predictor.embedder and predictor.embedder.fingerprint,
            "seed": self.cfg.seed,
        }
        if predictor.needs_truth:
            report = predictor.fit(traces)
            return Fitted(predictor, None, digest_json(inputs), report.fit_s)
        folder = self.folders["fitted"] / f"{predictor.kind}-{digest_json(inputs)[:12]}"
        with self.stage("fit", folder / "manifest.json") as must_make:
            if must_make:
                report = self.bound(predictor).fit(traces)
                save_artifact(
                    predictor,
                    folder,
                    spec=traces.spec,
                    parents={"traces": traces.digest, "inputs": digest_json(inputs)},
                    fitted_requests=[
                        request_digest(trace)
                        for split in ("fit", "val")
                        for trace in traces_of(traces, split)
                    ],
                    fit_report=report,
                )
            predictor = self.bound(load_artifact(folder, expect=traces.spec))
            fit_report = read_manifest(folder).fit_report or {}
            return Fitted(predictor, folder, artifact_digest(folder), fit_report.get("fit_s"))

    def evaluate(self, fitted: Fitted, traces: TraceSet) -> dict[str, Any]:
        """What the predictor is worth beside the baselines and the policies that need none."""
        predictor = fitted.predictor
        asked = plain(self.cfg.evaluate)
        baselines = [name for name in asked.pop("baselines") if name != predictor.kind]
        prefetch_experts = experts_per_layer_of(traces.spec, experts=asked.pop("prefetch_experts"))
        settings = JudgeSettings(**asked)
        measured = {
            "traces": traces.digest,
            "settings": asked,
            "policies": [settings.names(with_forecast=spends) for spends in (False, True)],
        }
        inputs = {
            **measured,
            "fitted": fitted.digest,
            "baselines": baselines,
            "prefetch_experts": prefetch_experts,
        }
        folder = self.folders["evaluations"] / f"{predictor.kind}-{digest_json(inputs)[:12]}"
        result = folder / "evaluation.json"
        with self.stage("evaluate", result) as must_make:
            if must_make:
                requests = judged_requests(traces, "test")
                without = self._kept(
                    "policies", measured, lambda: judge_policies(requests, settings)
                )

                def judged(name: str, made_from: Any, make: Callable[[], Predictor]) -> Any:
                    return self._kept(
                        name,
                        {**measured, "predictor": made_from},
                        lambda: self._judge(make(), traces, requests, settings, without),
                    )

                found = {predictor.kind: judged(predictor.kind, fitted.digest, lambda: predictor)}
                for name in baselines:
                    config = {"baseline": PREDICTORS[name]().config()}
                    found[name] = judged(name, config, partial(self._baseline, name, traces))
                evaluation = joined(found, requests, settings, without=without)
                evaluation["cost"][predictor.kind]["fit_s"] = fitted.fit_s
                evaluation["predictor"] = predictor.kind
                evaluation["prefetch_experts"] = prefetch_experts
                evaluation["facts"] = _facts(traces, fitted)
                write_json(result, evaluation)
            kept: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return kept

    def _baseline(self, name: str, traces: TraceSet) -> Predictor:
        predictor = self.bound(PREDICTORS[name]())
        predictor.fit(traces)
        return predictor

    def _judge(
        self,
        predictor: Predictor,
        traces: TraceSet,
        requests: TraceList,
        settings: JudgeSettings,
        without: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        """What `judge_predictor` finds, and how well coming layers are foreseen if it says so."""
        found = judge_predictor(predictor, requests, settings, without=without)
        if "layer" in predictor.moments:
            if predictor.needs_model:
                batches = LiveInputs.of_traces(self.model, traces).batches("test")
            else:
                batches = recorded_batches(traces, "test")
            found["report"]["layer_recall"] = evaluate_layer_recall(
                predictor,
                batches,
                max_tokens=min(settings.max_tokens or _LAYER_TOKENS, _LAYER_TOKENS),
            )
        return found

    def _kept(self, name: str, inputs: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What ``make`` returns: made once for the same inputs, by whichever run comes first."""
        path = self.folders["evaluations"] / f"{name}-{digest_json(inputs)[:12]}.json"
        if not path.exists():
            write_json(path, make())
        return json.loads(path.read_text(encoding="utf-8"))

    def export(self, fitted: Fitted, evaluation: dict[str, Any]) -> Path:
        """The artifact: the fitted predictor together with what was measured of it."""
        predictor = fitted.predictor
        assert fitted.folder is not None, "who needs the truth is not exported"
        metrics = {
            "recall": evaluation["predictors"][predictor.kind],
            "replay": [row for row in evaluation["replay"] if row["predictor"] == predictor.kind],
            "cost": evaluation["cost"][predictor.kind],
        }
        inputs = {"fitted": fitted.digest, "metrics": metrics}
        folder = self.folders["artifacts"] / f"{predictor.kind}-{digest_json(inputs)[:12]}"
        with self.stage("export", folder / "manifest.json") as must_make:
            if must_make:
                manifest = read_manifest(fitted.folder)
                save_artifact(
                    predictor,
                    folder,
                    spec=manifest.spec.spec(),
                    parents={**manifest.parents, "fitted": fitted.digest},
                    fitted_requests=manifest.fitted_requests,
                    fit_report=FitReport(**manifest.fit_report) if manifest.fit_report else None,
                    metrics=metrics,
                )
            return folder


def _facts(traces: TraceSet, fitted: Fitted) -> dict[str, Any]:
    """What a reader must know to trust the numbers, or to repeat them."""
    splits = list(traces.split.values())
    return {
        "model": traces.spec.describe(),
        "requests": {split: splits.count(split) for split in sorted(set(splits))},
        "traces": traces.digest,
        "fitted": fitted.digest,
        "probabilities": traces.probs_kind,
        "processor": hardware()["cpu"],
        "commit": commit(),
        **versions(("torch", "transformers")),
    }


def _metrics(evaluation: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of the fitted predictor under the names that they are tracked by."""
    predictor = evaluation["predictor"]
    report, cost = evaluation["predictors"][predictor], evaluation["cost"][predictor]
    prefetch = report["prefetch"][evaluation["prefetch_experts"] - 1]
    metrics: dict[str, float | None] = {
        **{f"recall/lookahead_{h}": value for h, value in report["recall_by_lookahead"].items()},
        **{f"recall/fetched_{k}": value for k, value in report["recall_by_fetched"].items()},
        "calibration/expected_error": report["reliability"]["expected_calibration_error"],
        "prefetch/coverage": prefetch["coverage"],
        "prefetch/wasted_bytes_per_token": prefetch["wasted_bytes_per_token"],
    }
    for name in ("num_parameters", "us_per_token", "us_per_token_gpu", "fit_s"):
        metrics[f"cost/{name}"] = cost[name]
    for row in evaluation["replay"]:
        if row["predictor"] == predictor:
            suffix = "" if row["policy"] == "forecast" else f"/{row['policy']}"
            metrics[f"hit_ratio/residency_{row['residency']:g}{suffix}"] = row["hit_ratio"]
            metrics[f"gap_closed/residency_{row['residency']:g}{suffix}"] = row["gap_closed"]
    return metrics


def run(cfg: DictConfig, run_dir: Path, tracker: Tracker) -> dict[str, Any]:
    """Run the stages and write the report; returns the JSON summary, with the evaluation."""
    pipeline = Pipeline(cfg)
    asked = set(cfg.stages)
    summary: dict[str, Any] = {"run": str(run_dir)}
    traces = pipeline.collect()
    summary["traces"] = traces.digest
    tracker.describe({"digests": {"traces": traces.digest}})
    if asked & {"fit", "evaluate", "export"}:
        fitted = pipeline.fit(traces)
        summary["predictor"] = fitted.predictor.kind
        tracker.describe({"digests": {"traces": traces.digest, "fitted": fitted.digest}})
    if asked & {"evaluate", "export"}:
        evaluation = pipeline.evaluate(fitted, traces)
        plots = write_plots(evaluation, run_dir)
        report = run_dir / "report.html"
        write_html(evaluation, plots, report)
        metrics = _metrics(evaluation)
        tracker.log(metrics)
        tracker.log_plots(plots)
        summary |= {"report": str(report), "metrics": metrics, "evaluation": evaluation}
    if "export" in asked and fitted.folder is None:
        summary["not_exported"] = (
            f"predictor {fitted.predictor.kind!r} reads the recorded future: it judges traces, and "
            "there is nothing to serve"
        )
        log.warning("export: %s", summary["not_exported"])
    elif "export" in asked:
        artifact = pipeline.export(fitted, evaluation)
        summary["artifact"] = str(artifact)
        tracker.describe(
            {
                "digests": {
                    "traces": traces.digest,
                    "fitted": fitted.digest,
                    "artifact": artifact_digest(artifact),
                }
            }
        )
    tracker.log({f"seconds/{stage}": seconds for stage, seconds in pipeline.seconds.items()})
    return {**summary, "seconds": pipeline.seconds}


def _show(summary: Mapping[str, Any]) -> None:
    """What a single run ends with: a table, where the rest lies, and one line of JSON."""
    if "evaluation" in summary:
        print(f"\n{format_table(*summary_rows(summary['evaluation']))}\n")
        print(f"report:   {summary['report']}")
    if "artifact" in summary:
        print(f"artifact: {summary['artifact']}")
    print(json.dumps({key: value for key, value in summary.items() if key != "evaluation"}))


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Entry point; returns the gap closed at the smallest budget, for sweepers (NaN: failed)."""
    hydra_cfg = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    choices = hydra_cfg.runtime.choices
    in_multirun = hydra_cfg.mode == RunMode.MULTIRUN
    torch.manual_seed(cfg.seed)
    set_threads(cfg.model)
    tracker: Tracker = build(cfg.logger)
    failure: Exception | None = None
    summary: dict[str, Any] = {}
    try:
        name = "-".join(str(choices[group]) for group in ("predictor", "model", "source"))
        facts = {"hardware": hardware(), "versions": versions(), "commit": commit()}
        tracker.start({**plain(cfg), **facts}, run_dir=run_dir, name=name)
        summary = run(cfg, run_dir, tracker)
    except (MoecastError, ValueError, ImportError) as error:
        log.debug("raised here:", exc_info=error)  # hydra.verbose=true shows it
        failure = error
    except Exception as error:
        if not in_multirun:
            raise
        log.exception("an error of ours")
        failure = error
    finally:
        tracker.finish(failed=not summary)
    if in_multirun:
        record = job_record(
            number=hydra_cfg.job.num,
            overrides=list(hydra_cfg.overrides.task),
            predictor=str(choices["predictor"]),
            seed=cfg.seed,
            summary=summary,
            failure=failure,
        )
        write_json(run_dir / JOB_FILE, record)
        if failure is not None:
            log.error("job %d: %s", record["number"], record["reason"])
            return math.nan
    elif failure is not None:
        sys.exit(f"error: {failure}")
    else:
        _show(summary)
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
