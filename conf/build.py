"""From a composed configuration to objects: the only caller of Hydra's ``instantiate``.

Everything below this package takes plain Python values and knows nothing of Hydra.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

CONF_DIR = Path(__file__).resolve().parent
# Options as other programs have them, and what they are here: Hydra takes no flags of ours.
_FLAGS = {"--check": "check=true"}
# What `model=` and `source=` mean when their value is no option of the group: the option to take,
# and its key that receives the value.
_SHORTHAND = {"model": ("pretrained", "id"), "source": ("trace", "path")}

OmegaConf.register_new_resolver("project_root", lambda: str(CONF_DIR.parent), replace=True)


def build(node: DictConfig) -> Any:
    """Instantiate a configuration node with plain lists and dicts in place of Hydra's own types.

    Raises:
        Exception: What the constructor raised, without Hydra's wrapping: its message is for users.
    """
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise (error.__cause__ or error) from None


def plain(node: DictConfig) -> dict[str, Any]:
    """A configuration node as resolved plain values: what is logged, digested and saved."""
    values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def set_threads(model: DictConfig) -> None:
    """Give torch the number of threads that the ``model`` group asks for, if it asks."""
    if model.num_threads is not None:
        torch.set_num_threads(model.num_threads)


def expand_shorthand(arguments: Sequence[str]) -> list[str]:
    """Let ``model=`` and ``source=`` take a path or hub id where Hydra takes only option names.

    ``model=Qwen/Qwen3-30B-A3B`` becomes ``model=pretrained model.id="Qwen/Qwen3-30B-A3B"``, and
    ``source=outputs/traces/mine`` becomes ``source=trace source.path="..."``. A value without a
    slash that names no existing file is left alone: if it is no option either, Hydra lists those.
    The flag ``--check`` becomes ``check=true``.
    """
    expanded: list[str] = []
    for argument in arguments:
        if argument in _FLAGS:
            expanded.append(_FLAGS[argument])
            continue
        group, _, value = argument.partition("=")
        is_option = (CONF_DIR / group / f"{value}.yaml").is_file()
        if group in _SHORTHAND and not is_option and ("/" in value or Path(value).exists()):
            option, key = _SHORTHAND[group]
            quoted = value.strip("\"'").replace('"', '\\"')
            expanded += [f"{group}={option}", f'{group}.{key}="{quoted}"']
        else:
            expanded.append(argument)
    return expanded
