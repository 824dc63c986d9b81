import pytest

from predictors.registry import EMBEDDERS, PREDICTORS, embedder_class, predictor_class


def test_every_entry_is_found_by_its_own_kind() -> None:
    assert {kind: cls.kind for kind, cls in PREDICTORS.items()} == {k: k for k in PREDICTORS}
    assert {kind: cls.kind for kind, cls in EMBEDDERS.items()} == {k: k for k in EMBEDDERS}
    assert predictor_class("popularity").kind == "popularity"
    assert embedder_class("sentence").kind == "sentence"


def test_unknown_names_list_what_exists() -> None:
    with pytest.raises(ValueError, match="'lru'; there are .*none, oracle, popularity"):
        predictor_class("lru")
    with pytest.raises(ValueError, match="'word2vec'; there are sentence, token_mean"):
        embedder_class("word2vec")
