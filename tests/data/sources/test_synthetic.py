"""Generated examples: their groups, classes and words."""

from collections import Counter
from typing import Any

import pytest

from fedray.data.examples import Examples, assemble
from fedray.data.sources.synthetic import COMMON, GROUP, Synthetic
from fedray.errors import DataError
from fedray.types import Task


def synthetic(clients: int | None = 6, task: Task = "classification", **settings: Any) -> Examples:
    data = Synthetic.model_validate({"examples_per_client": 40} | settings)
    return assemble(data.load(task, 1, clients), data, task)


def rules(examples: Examples) -> dict[int, dict[str, str]]:
    """Return the label of every topic, per group; every (group, topic) must have one."""
    found: dict[int, dict[str, str]] = {}
    rows = zip(map(int, examples.values(GROUP)), examples.values("topic"), examples.field("label"), strict=True)
    for group, topic, label in rows:
        assert found.setdefault(group, {}).setdefault(str(topic), str(label)) == label
    return found


def test_groups_disagree_on_exactly_the_conflicting_classes() -> None:
    first, second, third = rules(synthetic(groups=3, classes=8, conflict=0.5)).values()
    for one, other in ((first, second), (second, third), (first, third)):
        assert sum(one[topic] != other[topic] for topic in one) == 4
    assert sorted(first.values()) == sorted(second.values())


def test_without_conflict_all_groups_have_the_same_rule() -> None:
    first, second = rules(synthetic(groups=2, conflict=0)).values()
    assert first == second


def test_clients_are_divided_evenly_among_groups_and_classes() -> None:
    examples = synthetic(clients=7, groups=2, classes=4)
    client_groups = {str(f): int(g) for f, g in zip(examples.field("file"), examples.values(GROUP), strict=True)}
    assert sorted(Counter(client_groups.values()).values()) == [3, 4]
    assert set(Counter(zip(examples.field("file"), examples.values("topic"), strict=True)).values()) == {10}


def test_topics_share_no_words_also_when_made_up() -> None:
    """Twelve topics are English; the words of the thirteenth and fourteenth are made of three syllables."""
    examples = synthetic(classes=14)
    words: dict[str, set[str]] = {}
    for topic, text in zip(examples.values("topic"), examples.field("text"), strict=True):
        words.setdefault(str(topic), set()).update(set(str(text).split()) - set(COMMON.split()))
    own = Counter(word for topic in words.values() for word in topic)
    assert len(words) == 14
    assert set(own.values()) == {1}
    assert min(map(len, words.values())) >= 10


def test_more_groups_than_conflicting_classes_and_unknown_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="data.groups: 3 groups .* got 2"):
        synthetic(groups=3, classes=4, conflict=0.5)
    with pytest.raises(DataError, match=r"clients\.count"):
        synthetic(clients=None)


def test_generated_text_serves_causal_models() -> None:
    examples = synthetic(2, "causal_lm")
    assert set(examples.table["answer"].to_pylist()) == {"animals", "music", "food", "sport"}
    assert examples.table["prompt"].to_pylist() == examples.values("text").tolist()
