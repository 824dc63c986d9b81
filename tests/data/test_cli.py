from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data.cli import parse_cli


@dataclass
class Options:
    """Replay a trace."""

    trace: str
    out: Path = Path("out.json")
    slots: list[int] = field(default_factory=lambda: [8])
    policy: list[str] = field(default_factory=lambda: ["lru"])
    budget_bytes: int | None = None
    margin: float = 0.5
    verbose: bool = False

    def __post_init__(self) -> None:
        if min(self.slots) < 1:
            raise ValueError(f"slots={self.slots}: must be at least 1")


def test_values_get_the_types_of_their_fields() -> None:
    options = parse_cli(
        Options,
        ["trace=x.npz", "out=/a/b", "slots=[8,13]", "policy=[lru, belady]", "verbose=true"],
    )
    assert options == Options("x.npz", Path("/a/b"), [8, 13], ["lru", "belady"], verbose=True)


def test_a_single_value_for_a_list_is_a_list_of_one() -> None:
    options = parse_cli(Options, ["trace=x", "slots=13", "policy=lfru"])
    assert (options.slots, options.policy) == ([13], ["lfru"])


@pytest.mark.parametrize("text", ["007", "a: b", "[x", "1e3", "x=y", "true"])
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert parse_cli(Options, [f"trace={text}"]).trace == text


@pytest.mark.parametrize(("text", "expected"), [("null", None), ("4194304000", 4194304000)])
def test_an_optional_value_may_be_null(text: str, expected: int | None) -> None:
    assert parse_cli(Options, ["trace=x", f"budget_bytes={text}"]).budget_bytes == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace=x", "slts=8"], "unknown key 'slts'"),
        (["slots=[8]"], "missing: trace=..."),
        (["trace=x", "slots=banana"], "banana"),
        (["trace=x", "slots=[8"], "slots=[8"),
        (["trace=x", "margin=wide"], "margin=wide"),
        (["trace=x", "verbose"], "key=value"),
        (["trace=x", "--out=y"], "--out"),
        (["trace=x", "trace=y"], "trace is given twice"),
        (["trace=x", "slots=0"], "slots=[0]: must be at least 1"),
    ],
)
def test_bad_arguments_end_with_code_2_the_reason_and_the_keys(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_cli(Options, arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "trace, out, slots, policy, budget_bytes, margin, verbose" in error


def test_help_lists_the_keys_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_cli(Options, ["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "Replay a trace." in out
    assert "trace=str (required)" in out
    assert "slots=list[int] (default [8])" in out
