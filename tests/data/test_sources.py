import gzip
import inspect
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from data.errors import DamagedFileError, MalformedInputError
from data.schema import Prompt
from data.sources import SOURCES, Hub, Jsonl, PromptSource, SharedPrompts, Stdlib, TraceFile
from data.sources.base import spread

ROOT = Path(__file__).resolve().parents[2]
REVISION = "a" * 40


class Listed(PromptSource):
    def __init__(self, prompts: list[Prompt], num_prompts: int | None = None) -> None:
        super().__init__(name="listed", num_prompts=num_prompts)
        self.listed = prompts

    def read(self) -> Iterator[Prompt]:
        return iter(self.listed)


def prompts(**num_of_topic: int) -> list[Prompt]:
    return [
        Prompt(request_id=f"{topic}{i}", topic=topic, text=f"text {i} of {topic}")
        for topic, num in num_of_topic.items()
        for i in range(num)
    ]


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def texts(path: Path) -> list[str]:
    """Sorted, as a source shuffles."""
    return sorted(prompt.text for prompt in Jsonl(path=str(path)).prompts())


# --- choosing ---


def test_any_beginning_is_spread_over_the_topics() -> None:
    ordered = spread(prompts(a=100, b=5, c=5))
    assert Counter(prompt.topic for prompt in ordered[:15]) == {"a": 5, "b": 5, "c": 5}
    assert len(ordered) == 110


def test_the_choice_depends_on_neither_order_nor_count() -> None:
    everything = prompts(a=10, b=20)
    chosen = list(Listed(everything, 7).prompts())
    assert chosen == list(Listed(everything[::-1], 7).prompts())
    assert chosen == list(Listed(everything, 12).prompts())[:7]


def test_the_digest_names_what_is_yielded() -> None:
    everything = prompts(a=10)
    assert Listed(everything).digest == Listed(everything[::-1]).digest
    assert Listed(everything, 5).digest != Listed(everything).digest
    changed = [Prompt(request_id="a0", topic="a", text="other"), *everything[1:]]
    assert Listed(changed).digest != Listed(everything).digest


def test_too_few_prompts_are_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    assert len(list(Listed(prompts(a=3), 5).prompts())) == 3
    assert "3 prompts, fewer than num_prompts=5" in caplog.text


def test_a_source_refuses_what_cannot_be_collected() -> None:
    with pytest.raises(ValueError, match="num_prompts=0"):
        Listed(prompts(a=3), 0)
    with pytest.raises(ValueError, match="no prompts"):
        Listed([]).prompts()
    with pytest.raises(ValueError, match="share an id"):
        Listed(prompts(a=1) * 2).prompts()


# --- stdlib ---


@pytest.fixture(scope="module")
def passages() -> list[Prompt]:
    return list(Stdlib(num_prompts=None, max_chars=500).prompts())


def test_the_standard_library_has_many_passages_of_many_modules(passages: list[Prompt]) -> None:
    per_topic = Counter(prompt.topic for prompt in passages)
    assert len([topic for topic, num in per_topic.items() if num >= 5]) > 80
    assert {"json", "asyncio", "heapq"} <= set(per_topic)
    assert not {"test", "idlelib", "site-packages", "encodings"} & set(per_topic)
    assert all(120 <= len(prompt.text) <= 500 for prompt in passages)


def test_passages_start_where_something_starts(passages: list[Prompt]) -> None:
    def is_start(prompt: Prompt) -> bool:
        return prompt.request_id.endswith(":1") or prompt.text.startswith(
            ("def ", "class ", "async def ", "@", "#")
        )

    assert all(is_start(prompt) for prompt in passages)


def test_passages_do_not_overlap(passages: list[Prompt]) -> None:
    covered: dict[str, int] = {}
    places = [(*prompt.request_id.split(":"), prompt.text.count("\n")) for prompt in passages]
    for module, line, num_newlines in sorted(places, key=lambda place: (place[0], int(place[1]))):
        if line != "1":  # a module's docstring starts anywhere after line 1
            assert int(line) > covered.get(module, 0)
            covered[module] = int(line) + num_newlines


def test_the_default_takes_few_of_each_module() -> None:
    chosen = list(Stdlib().prompts())
    assert len(chosen) == 240
    assert max(Counter(prompt.topic for prompt in chosen).values()) <= 3


def test_passages_too_short_to_be_any_are_refused() -> None:
    with pytest.raises(ValueError, match="max_chars=10"):
        Stdlib(max_chars=10)


# --- jsonl ---


def test_each_way_to_write_a_prompt_is_read(tmp_path: Path) -> None:
    dialogue = [
        {"role": "user", "content": "Find a bus."},
        {"role": "assistant", "content": "To where?"},
        {"role": "user", "content": "Anaheim."},
        {"role": "assistant", "content": "Done."},
    ]
    path = write_lines(
        tmp_path / "mine.jsonl",
        {"text": "A"},
        {"prompt": "B", "id": 7, "topic": "bus"},
        {"turns": ["C", "and then?"]},
        {"messages": dialogue},
        {"messages": dialogue[:2], "turns": ["ignored"]},
    )
    found = {prompt.request_id: prompt for prompt in Jsonl(path=str(path)).prompts()}
    assert found["mine-1"].text == "A"
    assert (found["7"].text, found["7"].topic) == ("B", "bus")
    assert found["mine-3"].text == "C"
    assert found["mine-4"].text == "user: Find a bus.\n\nassistant: To where?\n\nuser: Anaheim."
    assert found["mine-5"].text == "Find a bus."


def test_compression_is_told_by_the_content(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "a.jsonl", {"text": "äöü"}, {"text": "b"})
    packed = tmp_path / "b.jsonl"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert texts(plain) == texts(packed) == ["b", "äöü"]


def test_zstd_is_read_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(pa.compress(b'{"text": "a"}\n{"text": "b"}\n', "zstd", asbytes=True))
    assert texts(path) == ["a", "b"]
    path.write_bytes(path.read_bytes()[:4] + b"\xff" * 20)
    with pytest.raises(DamagedFileError, match=r"c\.jsonl"):
        Jsonl(path=str(path)).prompts()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "x"', "delimiter"),
        (b"[1]", "not a JSON object"),
        (b'{"question": "x"}', r"needs text, .*\['question'\]"),
        (b'{"text": 3}', "must be a string"),
        (b'{"text": " "}', "not empty"),
        (b'{"turns": []}', "must be a string"),
        (b'{"messages": [{"role": "user"}]}', "role, content"),
        (b'{"messages": [{"role": "system", "content": "x"}]}', "none of the user's"),
        (b'{"text": "\xff"}', "utf-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(MalformedInputError, match=rf"mine.jsonl, line 3: .*{why}") as caught:
        Jsonl(path=str(path)).prompts()
    assert (caught.value.path, caught.value.line) == (path, 3)


def test_a_cut_off_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(DamagedFileError, match="mine.jsonl.gz"):
        Jsonl(path=str(path)).prompts()


def test_a_missing_file_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        Jsonl(path=str(tmp_path / "none.jsonl"))


# --- hub ---


def dataset_folder(folder: Path) -> Path:
    """A dataset as the hub lays it out: a card, and files named after their split."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    write_lines(
        folder / "data" / "train.jsonl",
        *({"question": f"Why {i}?", "subject": f"s{i % 3}"} for i in range(9)),
    )
    write_lines(folder / "data" / "test.jsonl", {"question": "Held out?", "subject": "s0"})
    return folder


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds one dataset, and no way to the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "datasets--someone--questions"
    dataset_folder(repo / "snapshots" / REVISION)
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text(REVISION)
    return tmp_path


def test_a_folder_in_hub_layout_is_read(offline_hub: Path) -> None:
    source = Hub(
        dataset=str(dataset_folder(offline_hub / "mine")),
        text_column="question",
        topic_column="subject",
        num_prompts=3,
    )
    chosen = list(source.prompts())
    assert {prompt.topic for prompt in chosen} == {"s0", "s1", "s2"}
    assert all(prompt.request_id.startswith("mine-") for prompt in chosen)


@pytest.mark.parametrize("revision", [REVISION, "v1"])
def test_a_pinned_revision_is_read_from_the_cache_offline(offline_hub: Path, revision: str) -> None:
    source = Hub(
        dataset="someone/questions", revision=revision, split="test", text_column="question"
    )
    assert [prompt.text for prompt in source.prompts()] == ["Held out?"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dataset": "someone/else"}, "neither on the hub"),
        ({"revision": "b" * 40}, "neither on the hub"),
        ({"dataset": "not/an/id"}, "neither on the hub"),
        ({"split": "validation"}, "validation"),
        ({"text_column": "txt"}, r"no column 'txt'.*\['question', 'subject'\]"),
        ({"topic_column": "topic"}, "no column 'topic'"),
    ],
)
def test_what_the_hub_lacks_is_named(offline_hub: Path, changes: dict[str, str], why: str) -> None:
    arguments = {"dataset": "someone/questions", "revision": REVISION, "text_column": "question"}
    with pytest.raises(ValueError, match=why):
        Hub(**(arguments | changes)).prompts()


def test_a_hub_dataset_needs_a_revision() -> None:
    with pytest.raises(ValueError, match="needs a commit or a tag"):
        Hub(dataset="someone/questions")


# --- shared prompts ---


@pytest.mark.parametrize(
    ("name", "num", "topics"),
    [("mt_bench", 80, 8), ("mmlu", 12566, 43), ("sgd", 4000, 60), ("humaneval", 164, 1)],
)
def test_shared_prompts_have_the_published_counts(
    shared_data: Path, name: str, num: int, topics: int
) -> None:
    found = list(SharedPrompts(name=name).prompts())
    assert (len(found), len({prompt.topic for prompt in found})) == (num, topics)


@pytest.fixture
def prompt_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("alpha", "beta_one", "beta_two"):
        folder = tmp_path / "prompts" / name
        folder.mkdir(parents=True)
        write_lines(folder / f"{name}.jsonl", {"text": name})
    monkeypatch.setenv("MOECAST_DATA", str(tmp_path))
    return tmp_path


def test_a_set_is_found_by_the_beginning_of_its_name(prompt_folder: Path) -> None:
    assert SharedPrompts(name="al").name == "alpha"


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_an_unknown_or_ambiguous_set_is_refused_and_the_sets_are_listed(
    prompt_folder: Path, name: str
) -> None:
    with pytest.raises(ValueError, match=r"\['alpha', 'beta_one', 'beta_two'\]"):
        SharedPrompts(name=name)


# --- recorded traces ---


@pytest.fixture
def two_domains(tmp_path: Path) -> Path:
    path = tmp_path / "two.npz"
    experts = np.array([[[0, 1]]] * 20, np.uint8)
    np.savez(path, experts=experts, seq_offsets=np.arange(0, 21, 2))
    (tmp_path / "two.info.json").write_text('{"model": "m", "num_experts": 4}')
    write_lines(
        tmp_path / "two.seqs.jsonl",
        *({"id": str(i), "category": "law" if i % 2 else "intent"} for i in range(10)),
    )
    return path


def test_a_trace_file_keeps_the_split_of_the_trace(two_domains: Path) -> None:
    source = TraceFile(path=str(two_domains))
    assert Counter(source.load().split.values()) == {"fit": 7, "val": 1, "test": 2}
    assert source.digest == source.load().digest


def test_a_whole_topic_can_be_held_out(two_domains: Path) -> None:
    plain, held_out = (
        TraceFile(path=str(two_domains), test_topics=topics) for topics in ([], ["law"])
    )
    split = held_out.load().split
    assert {name for name in split if split[name] == "test"} == {"1", "3", "5", "7", "9"}
    assert held_out.digest != plain.digest


def test_another_seed_draws_another_split_and_has_another_digest(two_domains: Path) -> None:
    sources = [TraceFile(path=str(two_domains), split_seed=seed) for seed in range(6)]
    assert len({source.digest for source in sources}) == 6
    splits = [source.load().split for source in sources]
    assert all(Counter(split.values()) == {"fit": 7, "val": 1, "test": 2} for split in splits)
    assert len({tuple(split.items()) for split in splits}) > 1
    again = TraceFile(path=str(two_domains), split_seed=3)
    assert (again.load().split, again.digest) == (splits[3], sources[3].digest)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="split_seed=-1"):
        TraceFile(path="gptoss20b", split_seed=-1)


# --- configuration ---


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "source").glob("*.yaml")), ids=str)
def test_each_option_names_a_source_that_takes_its_keys(path: Path) -> None:
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    target = get_class(values.pop("_target_"))
    assert target in SOURCES.values()
    inspect.signature(target).bind(**values)
    assert path.read_text().startswith("# ")
