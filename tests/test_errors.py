"""Every exception survives the way between two processes, and the hints name what a person most likely meant."""

import pickle

import pytest

from fedray import errors
from fedray.errors import ClientFailure, ConfigError, DataError, FedrayError, TrainingError, choices, nearest

CLASSES = [entry for entry in vars(errors).values() if isinstance(entry, type) and issubclass(entry, Exception)]


def test_all_classes_are_covered() -> None:
    assert {FedrayError, ConfigError, DataError, TrainingError, ClientFailure} <= set(CLASSES)
    assert all(issubclass(entry, FedrayError) for entry in CLASSES)


@pytest.mark.parametrize("entry", CLASSES)
def test_pickling_keeps_class_and_message(entry: type[FedrayError]) -> None:
    message = "lora.rank: got 0: must be at least 1\nrounds: missing, ρ ≤ 1"
    copy = pickle.loads(pickle.dumps(entry(message)))
    assert type(copy) is entry
    assert str(copy) == message


def test_data_errors_exit_like_configuration_errors() -> None:
    """The command line maps ConfigError to exit code 2; a wrong column is one, a diverged loss is not."""
    assert issubclass(DataError, ConfigError)
    assert not issubclass(TrainingError, ConfigError)
    assert not issubclass(ClientFailure, ConfigError)


def test_nearest_names_the_closest_or_nothing() -> None:
    assert nearest("rnk", ["alpha", "rank", "targets"]) == " (did you mean 'rank'?)"
    assert nearest("dropuot", ["dropout", "droptout_rate"]) == " (did you mean 'dropout'?)"
    assert nearest("zzz", ["alpha", "rank"]) == ""
    assert nearest("rank", []) == ""


def test_choices_are_cut_after_the_limit() -> None:
    assert choices(["b", "a"]) == "b, a"
    assert choices(range(3), limit=3) == "0, 1, 2"
    assert choices(range(4), limit=3) == "0, 1, 2, ... (4 in all)"
