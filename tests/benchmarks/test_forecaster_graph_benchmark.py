"""The benchmark of the forecaster in a graph, on a small network: it compares before it times."""

import json

import pytest
import torch

from benchmarks import forecaster_graph as benchmark
from benchmarks.forecaster_graph import Options
from predictors.kernels import later_use


def test_a_small_run_compares_the_kernel_with_torch(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["small=true", "batch_sizes=1,3", "num_nets=2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    cases = result["cases"]
    assert [(case["batch_size"], case["how"]) for case in cases] == [
        *[(1, "kernels"), (1, "torch"), (3, "kernels"), (3, "torch")] * 2
    ]
    assert all(case["max_error"] < benchmark.TOLERANCE for case in cases[::2])


def test_a_kernel_that_says_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*, answers_SE: torch.Tensor, **_: object) -> None:
        answers_SE.zero_()

    monkeypatch.setattr(later_use, "later_use", silent)
    with pytest.raises(SystemExit, match="gpt-oss-20b, 1 rows: the kernel is off by"):
        benchmark.main(["small=true", "batch_sizes=1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shapes": ("none",)}, "none"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"device": "tpu"}, "device=tpu"),
    ],
    ids=str,
)
def test_options_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**arguments)  # type: ignore[arg-type]
