"""What `fedray methods` says about methods follows from their code."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest

from fedray.errors import ConfigError
from fedray.methods.registry import METHODS
from fedray.planning.catalogue import MethodFacts, _documented, _hyperparameters, _parts, catalogue, method_facts
from fedray.results.method_tables import COLUMNS, cells
from fedray.types import Vector

CONTROLS = {"local", "head_only"}
"""Methods that no paper proposes."""


@pytest.fixture(scope="module")
def found() -> dict[str, MethodFacts]:
    return {facts.name: facts for facts in catalogue()}


@pytest.mark.parametrize(
    ("name", "trains", "down", "up", "kept", "personalised", "ranks"),
    [
        ("fedavg", "LoRA, head", "LoRA, head", "LoRA, head", "", False, True),
        ("flora", "LoRA, head", "5 × LoRA, head", "LoRA, head", "", False, True),
        ("fedex_lora", "LoRA, head", "5 × LoRA, head", "LoRA, head", "", False, True),
        ("ifca", "LoRA, head", "2 × LoRA, 2 × head", "LoRA, head", "", True, True),
        ("fed_plora", "LoRA, head", "LoRA, head", "LoRA, head", "", False, True),
        ("rolora", "LoRA, head", "LoRA, head", "A, head", "", False, True),
        ("scaffold", "LoRA, head", "2 × LoRA, 2 × head", "2 × LoRA, 2 × head", "LoRA, head", False, True),
        ("ditto", "LoRA, head", "LoRA, head", "LoRA, head", "LoRA, head", True, True),
        ("fedper", "LoRA, head", "LoRA", "LoRA", "head", True, True),
        ("ffa_lora", "B, head", "B, head", "B, head", "", False, True),
        ("fedsa_lora", "LoRA, head", "A", "A", "B, head", True, True),
        ("fedalt", "LoRA, mixer, head", "LoRA, head", "LoRA, head", "LoRA, mixer", True, True),
        ("fedhft", "LoRA, head", "LoRA, head, memberships", "LoRA, head", "", True, True),
        ("fedreft", "LoReFT, head", "LoReFT, head", "LoReFT, head", "LoReFT", True, None),
        ("head_only", "LoRA, head", "head", "head", "LoRA", True, True),
        ("local", "LoRA, head", "", "", "LoRA, head", True, True),
    ],
)
def test_what_trains_travels_and_stays(
    found: dict[str, MethodFacts],
    name: str,
    trains: str,
    down: str,
    up: str,
    kept: str,
    personalised: bool,
    ranks: bool | None,
) -> None:
    """As the papers describe the methods."""
    facts = found[name]
    assert (facts.trains, facts.down, facts.up, facts.kept) == (trains, down, up, kept)
    assert (facts.personalised, facts.ranks) == (personalised, ranks)


def test_every_method_is_documented(found: dict[str, MethodFacts]) -> None:
    """A sentence, a paper, and what each of its hyperparameters does."""
    assert set(found) == set(METHODS.names)
    for name, facts in found.items():
        assert facts.summary, name
        assert not facts.summary.startswith(f"{METHODS.find(name).__name__}("), f"{name}: has no docstring"
        assert (facts.arxiv is None) == (name in CONTROLS), name
        for field in facts.hyperparameters:
            assert field.documentation, f"{name}.{field.name}"
            assert field.default is not None or field.name not in ("head", "lora", "reft")


@dataclass(frozen=True)
class Base:
    """The base.

    Attributes:
        one, two: a pair that
            is long: and has a colon.
        three: third.
    """

    one: int = 1
    two: float | None = None


@dataclass(frozen=True)
class Derived(Base):
    """The derived class. And more.

    Attributes:
        two: another two.
    """

    three: Literal["a", "b"] = "a"
    four: tuple[float, ...] = (0.5, 1.0)


def test_fields_and_their_documentation() -> None:
    assert _documented(Derived) == {
        "one": "a pair that is long: and has a colon.",
        "two": "another two.",
        "three": "third.",
    }
    fields = [(field.name, field.kind, field.default) for field in _hyperparameters(Derived)]
    assert fields == [
        ("one", "int", "1"),
        ("two", "float | null", "null"),
        ("three", "a | b", "a"),
        ("four", "list", "0.5, 1.0"),
    ]


def test_multiples_of_a_part_are_counted() -> None:
    """Five LoRAs of 10 in one array, one in two, and two heads in two; 13 numbers are nothing that is known."""

    def zeros(size: int) -> Vector:
        return np.zeros(size, np.float32)

    payload = {"stack": zeros(50), "pair": {"A": zeros(6), "B": zeros(4)}, "heads": [zeros(7), zeros(7)]}
    rest = {"both": [zeros(10), zeros(7)], "other": zeros(13), "none": None}
    units = {10: "LoRA", 4: "B", 7: "head"}
    assert _parts(payload, units) == "6 × LoRA, 2 × head"
    assert _parts(rest, units) == "LoRA, head, other"


def test_the_rows_of_the_table() -> None:
    facts = method_facts("local")
    row = dict(zip(COLUMNS, cells(facts), strict=True))
    assert row["down"] == row["up"] == "nothing"
    assert (row["model"], row["unequal ranks"], row["export"]) == ("one per client", "yes", "peft")
    shown = [cells(replace(facts, personalised=False, ranks=ranks))[-3:-1] for ranks in (False, None)]
    assert shown == [("one for all", "no"), ("one for all", "–")]


def test_an_unknown_method_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="unknown method 'fedlat'.*did you mean 'fedalt'.*allowed: .*fedalt, fedavg"):
        method_facts("fedlat")
