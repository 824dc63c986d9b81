from collections import Counter

import pytest

from data.splits import split_by_topic


def requests(topics: int, per_topic: int) -> dict[str, str]:
    return {f"r{t}.{i}": f"topic{t}" for t in range(topics) for i in range(per_topic)}


def test_whole_topics_are_split_where_there_are_enough() -> None:
    topics_of = requests(topics=20, per_topic=5)
    split = split_by_topic(topics_of)
    assert Counter(split.values()) == {"fit": 70, "val": 10, "test": 20}
    for topic in set(topics_of.values()):
        assert len({split[name] for name, of in topics_of.items() if of == topic}) == 1


def test_few_topics_are_split_by_request_in_the_same_proportion() -> None:
    topics_of = requests(topics=2, per_topic=50)
    split = split_by_topic(topics_of)
    for topic in ("topic0", "topic1"):
        counts = Counter(split[name] for name, of in topics_of.items() if of == topic)
        assert counts == {"fit": 35, "val": 5, "test": 10}


def test_the_order_of_requests_does_not_matter() -> None:
    for topics_of in (requests(20, 3), requests(3, 7)):
        backwards = dict(reversed(topics_of.items()))
        assert split_by_topic(topics_of) == split_by_topic(backwards)
        assert list(split_by_topic(backwards)) == list(backwards)


def test_the_split_is_the_same_on_every_machine() -> None:
    split = split_by_topic(requests(topics=10, per_topic=1))
    assert [name for name, part in split.items() if part != "fit"] == ["r0.0", "r1.0", "r7.0"]


def test_another_seed_gives_another_split() -> None:
    topics_of = requests(topics=50, per_topic=1)
    assert split_by_topic(topics_of) != split_by_topic(topics_of, seed=1)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, {}),
        (1, {"test": 1}),
        (2, {"fit": 1, "test": 1}),
        (3, {"fit": 1, "val": 1, "test": 1}),
        (4, {"fit": 2, "val": 1, "test": 1}),
        (10, {"fit": 7, "val": 1, "test": 2}),
    ],
)
def test_no_split_stays_empty_where_there_are_enough_requests(
    count: int, expected: dict[str, int]
) -> None:
    assert Counter(split_by_topic(requests(1, count)).values()) == expected


def test_held_out_topics_are_all_that_is_tested_on() -> None:
    topics_of = requests(topics=2, per_topic=16)
    split = split_by_topic(topics_of, test_topics=["topic1"])
    assert {name for name in split if split[name] == "test"} == {
        name for name, topic in topics_of.items() if topic == "topic1"
    }
    assert Counter(split.values()) == {"fit": 14, "val": 2, "test": 16}


def test_a_fraction_of_zero_gets_nothing() -> None:
    split = split_by_topic(requests(1, 10), fractions=(0.5, 0, 0.5))
    assert Counter(split.values()) == {"fit": 5, "test": 5}


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.5, -0.5, 0.0), (0.5, 0.5)])
def test_impossible_fractions_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="fractions"):
        split_by_topic(requests(1, 3), fractions=fractions)


def test_an_unknown_test_topic_is_refused_and_the_topics_are_listed() -> None:
    with pytest.raises(ValueError, match=r"'law'.*topic0"):
        split_by_topic(requests(2, 3), test_topics=["law"])
