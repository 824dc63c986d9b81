"""Every option of every config group composes, and its target accepts its keys."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from conf import build, schema

CONF = Path(build.__file__).parent
ROOTS = ("train", "serve", "collect")
# Hydra's own group is selected by its own rules.
OPTIONS = sorted(
    (path.parent.relative_to(CONF).as_posix(), path.stem)
    for path in CONF.glob("*/*.yaml")
    if path.parent.name != "hydra"
)


def compose_root(root: str, *overrides: str) -> DictConfig:
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        return compose(root, overrides=list(overrides))


def groups_of(root: str) -> set[str]:
    defaults = OmegaConf.load(CONF / f"{root}.yaml").defaults
    return {str(next(iter(entry))) for entry in defaults if not isinstance(entry, str)}


def targets(node: Any) -> list[dict[str, Any]]:
    """Every mapping with a `_target_` below a node."""
    if isinstance(node, list):
        return [found for item in node for found in targets(item)]
    if not isinstance(node, dict):
        return []
    below = [found for item in node.values() for found in targets(item)]
    return [*below, node] if "_target_" in node else below


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_composes_and_its_target_accepts_its_keys(group: str, option: str) -> None:
    roots = [root for root in ROOTS if group in groups_of(root)]
    assert roots, f"conf/{group} belongs to no root configuration"
    for root in roots:
        cfg = compose_root(root, f"{group}={option}")
        for node in targets(OmegaConf.to_container(cfg, resolve=False)):
            keys = {key: value for key, value in node.items() if not key.startswith("_")}
            inspect.signature(get_object(node["_target_"])).bind_partial(**keys)


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF))
)
def test_file_starts_by_saying_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_misspelt_key_fails() -> None:
    with pytest.raises(ConfigCompositionException, match="sed"):
        compose_root("train", "sed=3")


def test_wrong_type_fails() -> None:
    with pytest.raises(ConfigCompositionException, match="banana"):
        compose_root("train", "seed=banana")


def test_unknown_option_lists_what_exists() -> None:
    with pytest.raises(MissingConfigException, match=r"semantix[\s\S]*semantic"):
        compose_root("train", "predictor=semantix")


def test_path_in_place_of_an_option_means_the_general_option() -> None:
    assert build.expand_shorthand(["model=org/name", "seed=1"]) == [
        "model=pretrained",
        'model.id="org/name"',
        "seed=1",
    ]
    assert build.expand_shorthand(["model=tiny_moe"]) == ["model=tiny_moe"]
    assert build.expand_shorthand(["model=typo"]) == ["model=typo"]
    assert build.expand_shorthand(["--check", "--help"]) == ["check=true", "--help"]
    cfg = compose_root("train", *build.expand_shorthand(["model=a b/c=d"]))
    assert cfg.model.id == "a b/c=d"


def test_outputs_stay_in_the_project_wherever_the_command_is_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(compose_root("train").paths.root) == CONF.parent / "outputs"


def test_a_constructor_speaks_for_itself() -> None:
    """Hydra wraps what a constructor raises, and buries the message that was written for users."""
    cfg = compose_root("train", "predictor=popularity", "predictor.gamma=2")
    with pytest.raises(ValueError, match=r"^gamma=2: must be in \[0, 1\)$"):
        build.build(cfg.predictor)
