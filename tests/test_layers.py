"""The import direction data <- predictors <- runtime <- entry points, enforced."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "data": {"data"},
    "predictors": {"data", "predictors"},
    "runtime": {"data", "predictors", "runtime"},
}
OURS = {*ALLOWED, "conf", "benchmarks", "train", "serve"}
TRAIN_ONLY = {
    "lightning",
    "pytorch_lightning",
    "datasets",
    "wandb",
    "matplotlib",
    "pandas",
    "sklearn",
}
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def is_main_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imported_roots(path: Path) -> set[str]:
    """Top-level names that a module imports; its `__main__` block is an entry point and exempt."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not is_main_block(node)]
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.split(".")[0])
    return roots


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert imported_roots(path) & OURS <= ALLOWED[package]


@pytest.mark.parametrize(
    "module", ["runtime.engine", "runtime.server.app", "runtime.simulate", "serve"]
)
def test_serving_never_loads_what_only_training_needs(module: str) -> None:
    """Not even through a third module: a serving machine installs without these packages.

    transformers imports some of them where they are installed, so they are hidden, as they would
    be on a machine that has only the `serve` extra.
    """
    code = f"import sys\nsys.modules.update(dict.fromkeys({sorted(TRAIN_ONLY)}))\nimport {module}\n"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
