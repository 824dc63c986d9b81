import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import layer_recall
from benchmarks.options import parse_options

ROOT = Path(__file__).resolve().parent.parent.parent
# What a machine with a GPU and torch need not have.
ABSENT = ["hydra", "omegaconf", "pydantic", "datasets", "wandb", "faiss"]
SMALL = (
    "seeds=1 steps=2 width=8 seq_len=32 test_windows=1 val_windows=1 batch_tokens=128 device=cpu"
)


def test_it_runs_with_torch_and_lightning_alone(tmp_path: Path) -> None:
    """And the last line holds what the table shows."""
    for domain in ("one", "two"):
        lines = [
            json.dumps({"id": f"{domain}{n}", "text": f"{domain} has a document {n}. " * 60})
            for n in range(12)
        ]
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(lines))
    arguments = [f"corpora={tmp_path}", "held_out_fraction=0.3", "threads=1", *SMALL.split()]
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
        f"from benchmarks.layer_recall import main\nmain({arguments})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout.splitlines()[-1])
    for h, gain in values["gain_points"].items():
        base = values["router_reuse"]["by_lookahead"][h]
        assert gain["mean"] == pytest.approx(100 * (values["recall"][h]["mean"] - base))
    assert len(values["gate_mlp"]) == 1
    assert f"{100 * values['recall']['1']['mean']:.1f}" in result.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("widht=3", "expected key=value with a key of"),
        ("width=banana", "width=banana: expected int"),
        ("compare_losses=yes", "compare_losses=yes: expected true or false"),
    ],
)
def test_bad_arguments_are_named(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options(layer_recall.Options, [argument])
