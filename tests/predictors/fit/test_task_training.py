"""Training a sequence model: what is shown to it, and which epoch is kept."""

from typing import Any

import pytest
import torch

from predictors.fit.task import KeepBest, SequenceModule, Windows, train
from predictors.sequence_net import LayerSequence, PromptSequence

CPU = {"accelerator": "cpu", "enable_progress_bar": False}
OPTIONS: dict[str, Any] = {"architecture": "gpt2", "hidden_size": 8, "depth": 1, "dropout": 0.0}


def stream_NLE(num: int) -> torch.Tensor:
    """Request n uses expert n % 4 of both layers."""
    return torch.eye(4)[torch.arange(num) % 4][:, None].expand(-1, 2, -1)


def net(form: str = "A", **options: Any) -> Any:
    popularity_LE = torch.full((2, 4), 0.25)
    if form == "L":
        return LayerSequence(popularity_LE, scale=0.4, **OPTIONS)
    return PromptSequence(popularity_LE, scale=0.4, window=2, **{"start": "counts", **OPTIONS})


def fit(model: Any, fit_NLE: torch.Tensor, val_NLE: torch.Tensor, **options: Any) -> Any:
    settings = {"epochs": 4, "learning_rate": 0.02, "weight_decay": 0.0, **options}
    return train(
        model, fit_NLE, val_NLE, window=2, period=1, batch_size=64, settings=CPU, **settings
    )


@pytest.mark.parametrize("form", ["A", "L"])
def test_a_stream_that_repeats_is_learned_to_the_last_bit(form: str) -> None:
    torch.manual_seed(0)
    model = net(form)
    trained = fit(model, stream_NLE(40), stream_NLE(12), epochs=8)
    assert trained.val_losses[-1] < 0.1 < trained.val_losses[0] < 0.6
    assert trained.num_steps == 8 * 1024 // 64


def test_windows_end_before_their_target() -> None:
    windows = Windows(stream_NLE(9), torch.full((2, 4), 0.25), window=2, period=1)
    assert len(windows) == 9
    for request, (window_MLE, next_LE) in enumerate(windows[n] for n in range(9)):
        assert next_LE[0].argmax() == request % 4
        if request >= 2:
            assert window_MLE[:, 0].argmax(-1).tolist() == [(request - 2) % 4, (request - 1) % 4]
    assert windows[0][0].eq(0.25).all(), "before the first request there is popularity"


def test_a_drawn_age_stays_within_the_period_and_takes_every_value() -> None:
    torch.manual_seed(0)
    stream = torch.linspace(0, 1, 21)[:, None, None].expand(-1, 2, 4)
    windows = Windows(stream, torch.zeros(2, 4), window=1, period=3, random_age=True)
    ages = {10 - round(20 * float(windows[10][0][0, 0, 0])) for _ in range(60)}
    assert ages == {1, 2, 3}
    assert {float(windows[0][0].max()) for _ in range(9)} == {0.0}


def test_the_best_epoch_is_kept_not_the_last() -> None:
    """Validation runs backwards: the better the stream is learned, the worse it gets."""
    model = net()
    trained = fit(model, stream_NLE(40), stream_NLE(12).flip(0), epochs=3)
    best = min(trained.val_losses)
    assert trained.val_losses.index(best) < 2
    with torch.no_grad():
        batch = [
            Windows(stream_NLE(12).flip(0), model.popularity_LE, window=2, period=1)[n]
            for n in range(12)
        ]
        windows, targets = (torch.stack(part) for part in zip(*batch, strict=True))
        module = SequenceModule(model, learning_rate=1.0, weight_decay=0.0)
        assert module.loss((windows, targets), teach=False).item() == pytest.approx(best, rel=1e-5)


def test_without_val_the_last_epoch_is_kept() -> None:
    assert fit(net(), stream_NLE(8), torch.zeros(0, 2, 4), epochs=1).val_losses == []


def test_layers_are_forecast_without_a_look_at_the_request() -> None:
    """A planted difference in a layer changes what is taught of later layers, never a forecast."""
    model = net("L")
    torch.nn.init.normal_(model.head_LED)
    model.eval()
    window = stream_NLE(2)[None]
    one, other = stream_NLE(4)[2:3].clone(), stream_NLE(4)[2:3].clone()
    other[0, 0] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert torch.equal(model(window, one)[:, 0], model(window, other)[:, 0])
    assert not torch.equal(model(window, one)[:, 1], model(window, other)[:, 1])
    assert model(window).shape == (1, 2, 4)
    module = SequenceModule(model, learning_rate=1.0, weight_decay=0.0)
    said = torch.nn.functional.binary_cross_entropy_with_logits(model(window), one)
    assert torch.equal(module.loss((window, one), teach=False), said)


def test_hyper_parameters_are_plain_values() -> None:
    module = SequenceModule(net(), learning_rate=0.1, weight_decay=0.2)
    assert dict(module.hparams) == {"learning_rate": 0.1, "weight_decay": 0.2}
    assert KeepBest().best is None
