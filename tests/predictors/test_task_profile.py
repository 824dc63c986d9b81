"""A profile's tables go together, and without tasks it is everybody's mean."""

import pytest
import torch

from predictors.task_profile import pooled
from tests.predictors.task_profiles import SPEC, profile_of


def test_a_task_is_sensitive_where_too_little_stays_the_same() -> None:
    profile = profile_of(agreement_GL=[[0.9, 0.5], [0.84, 0.85]])
    assert profile.sensitive_GL(min_agreement=0.85).tolist() == [[False, True], [True, False]]
    assert not profile.sensitive_GL(min_agreement=0.0).any()
    assert profile.sensitive_GL(min_agreement=1.1).all()


def test_tables_of_another_shape_or_without_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"use_GLE of shape \[2, 2, 3\].*\(2, 2, 4\)"):
        profile_of(use_GLE=torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match="agreement_GL"):
        profile_of(agreement_GL=torch.full((2, 2), torch.nan))


def test_without_tasks_every_prompt_is_alike_and_uses_what_all_use() -> None:
    profile = profile_of()
    everybody = pooled(profile)
    assert everybody.tasks == ("any",)
    assert everybody.reader.read("def f") == everybody.reader.read("hello") == 0
    torch.testing.assert_close(everybody.use_GLE[0], profile.use_GLE.mean(dim=0))
    assert everybody.answer_tokens_G.tolist() == [20.0]
    assert everybody.spec == SPEC
