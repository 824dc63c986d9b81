"""Three numbers are fitted to what steps took, and none is below what a step can cost."""

import pytest

from runtime.scheduler import StepCosts
from runtime.server.step_costs import TimedStep, fit

COSTS = StepCosts(fixed_s=1.0, sequence_s=0.5, prompt_token_s=0.25, step_tokens=4)


def test_a_fit_finds_the_costs_that_made_the_steps() -> None:
    steps = [
        TimedStep(b, p, COSTS.step_s(num_sequences=b, num_prompt_tokens=p))
        for b in (1, 4)
        for p in (0, 9)
    ]
    costs, error = fit(steps, step_tokens=4)
    assert costs.fixed_s == pytest.approx(1.0)
    assert costs.sequence_s == pytest.approx(0.5)
    assert costs.prompt_token_s == pytest.approx(0.25)
    assert costs.step_tokens == 4
    assert error == pytest.approx(0.0, abs=1e-9)


def test_no_cost_is_negative_where_noise_would_have_it_so() -> None:
    """A batch of 4 that was faster than one of 1: more sequences cost nothing, not less than it."""
    steps = [TimedStep(1, 0, 1.1), TimedStep(4, 0, 0.9), TimedStep(1, 10, 2.0)]
    costs, error = fit(steps, step_tokens=4)
    assert costs.sequence_s == 0.0
    assert costs.fixed_s == pytest.approx(0.99, abs=0.02)
    assert costs.prompt_token_s == pytest.approx(0.1, abs=0.01)
    assert 0.05 < error < 0.2
