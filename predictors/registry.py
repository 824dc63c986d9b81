"""Every predictor and embedder by name: what an artifact's `kind` is looked up in.

An artifact is a file from a stranger, so it may name an entry here and nothing else.
"""

from typing import TypeVar

from predictors.base import Predictor
from predictors.blend import Blend
from predictors.eamc import Eamc
from predictors.embedders.base import Embedder
from predictors.embedders.sentence import SentenceEmbedder
from predictors.embedders.token_mean import TokenMeanEmbedder
from predictors.finemoe import FineMoE
from predictors.forecaster import Forecaster
from predictors.gate_mlp import GateMLP
from predictors.markov import Markov
from predictors.none import Silent
from predictors.oracle import Oracle
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from predictors.router_reuse import RouterReuse
from predictors.semantic import Semantic
from predictors.task import Task
from predictors.trajectory import Trajectory

PREDICTORS: dict[str, type[Predictor]] = {
    cls.kind: cls
    for cls in (
        Blend,
        Eamc,
        FineMoE,
        Forecaster,
        GateMLP,
        Markov,
        Oracle,
        Popularity,
        PreviousToken,
        RouterReuse,
        Semantic,
        Silent,
        Task,
        Trajectory,
    )
}
EMBEDDERS: dict[str, type[Embedder]] = {
    cls.kind: cls for cls in (SentenceEmbedder, TokenMeanEmbedder)
}

_Class = TypeVar("_Class")


def predictor_class(kind: str) -> type[Predictor]:
    """The predictor called ``kind``; ValueError lists those that exist."""
    return _look_up(PREDICTORS, kind, "predictor")


def embedder_class(kind: str) -> type[Embedder]:
    """The embedder called ``kind``; ValueError lists those that exist."""
    return _look_up(EMBEDDERS, kind, "embedder")


def _look_up(table: dict[str, type[_Class]], kind: str, what: str) -> type[_Class]:
    if kind not in table:
        raise ValueError(f"unknown {what} {kind!r}; there are {', '.join(sorted(table))}")
    return table[kind]
