"""Every method of the registry with its defaults, and where one departs from what tests/methods/test_every_method.py
expects of all of them."""

from collections.abc import Mapping
from typing import Any

import pytest

from fedray.methods.registry import METHODS
from fedray.planning.catalogue import minimal_entry

TRAINING: Mapping[str, Mapping[str, Any]] = {"fed_sb": {"init": "random"}}
"""Settings with which a method trains in every round; by default Fed-SB's first round sends gradients instead, see
tests/methods/test_fed_sb.py."""

LOSSLESS: Mapping[str, Mapping[str, Any]] = {"fedhft": {"downlink_rank": 16}}
"""Settings with which a method sends down all that its server has; by default FedHFT truncates its sum to rank r."""

SAME: Mapping[str, str] = {"fedit": "fedavg", "fed_plora": "fedavg"}
"""Methods that are another one with their defaults, if clients have equally many examples and whole ranks."""

ONE_BY_ONE: Mapping[str, str] = {}
"""Methods whose clients are not trained in one step, and why."""

ONE_RANK: Mapping[str, str] = {}
"""Methods that refuse tiers of another rank, and why."""

NOT_ONE_CLIENTS_OWN: Mapping[str, str] = {
    "ditto": "the personal model, which is evaluated after training, never becomes the common one",
    "feddpa": "`aggregated` is the global LoRA alone, and an evaluation after training mixes in the local one",
    "fdlora": "an evaluation after training is of a fusion, and the server moves with momentum",
    "fedbabu": "what is fine-tuned for an evaluation is not kept",
}
"""Methods that do not give a federation's only client its own model back, and why."""

UNEQUAL_THOUGH_EQUAL: Mapping[str, str] = {
    "fedalt": "every client draws its own A, and its Rest-of-World LoRA adds a second branch",
    "flora": "every client draws its own A",
    "ifca": "equal clients begin in different clusters",
}
"""Methods under which several equal clients do not train as one alone would, and why."""


def entry(name: str, **changes: Any) -> dict[str, Any]:
    """Return a method's entry in a configuration: its defaults, and values for what has none."""
    return {**minimal_entry(name), **TRAINING.get(name, {}), **changes}


def every_method(*exceptions: Mapping[str, str]) -> list[Any]:
    """Return one parameter per method; a method among the exceptions must fail the test, with the reason."""
    reasons = {name: reason for found in exceptions for name, reason in found.items()}
    marks = {name: pytest.mark.xfail(reason=reason, strict=True) for name, reason in reasons.items()}
    return [pytest.param(name, id=name, marks=[marks[name]] if name in marks else []) for name in METHODS.names]
