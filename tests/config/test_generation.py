"""The section `evaluation.generation`: what contradicts itself or does nothing is refused."""

from typing import Any

import pytest
from small_config import SMALLEST, message_of, with_section

from fedray.config import GenerationSection, dump_yaml, load_config, parse_yaml


def test_greedy_unless_told_otherwise() -> None:
    found = load_config(SMALLEST).evaluation.generation
    assert (found.num_beams, found.do_sample, found.repetition_penalty, found.no_repeat_ngram_size) == (1, False, 1, 0)
    assert (found.stop_strings, found.end_tokens) == ((), ())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"do_sample": True, "num_beams": 4}, "do_sample: true and num_beams: 4: beams are searched, not sampled"),
        ({"temperature": 0.7}, "temperature: 0.7 has no effect without do_sample: true"),
        ({"top_p": 0.9, "num_beams": 4}, "top_p: 0.9 has no effect without do_sample: true"),
        ({"top_k": 40}, "top_k: 40 has no effect without do_sample: true"),
        ({"length_penalty": 2.0}, "length_penalty: 2.0 has no effect without num_beams above 1"),
        ({"early_stopping": True, "do_sample": True}, "early_stopping: True has no effect without num_beams above 1"),
    ],
)
def test_contradictions(fields: dict[str, Any], expected: str) -> None:
    assert message_of(with_section("evaluation.generation", fields)).startswith(
        f"configuration: evaluation.generation: {expected}"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_beams", 0),
        ("temperature", 0),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 0),
        ("repetition_penalty", 0),
        ("no_repeat_ngram_size", -1),
        ("early_stopping", "often"),
        ("stop_strings", [""]),
        ("stop_strings", "\n\n"),
        ("end_tokens", [7]),
    ],
)
def test_values_that_mean_nothing(field: str, value: Any) -> None:
    message = message_of(with_section(f"evaluation.generation.{field}", value))
    assert message.startswith(f"configuration: evaluation.generation.{field}")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 4, "length_penalty": 0.6, "early_stopping": "never"},
        {"do_sample": True, "temperature": 0.1, "top_p": 0.75, "top_k": 40, "stop_strings": ["\n\n", "Q:"]},
        {"repetition_penalty": 1.1, "no_repeat_ngram_size": 5, "end_tokens": ["<|eot_id|>"]},
    ],
)
def test_a_configuration_is_written_and_read_again(fields: dict[str, Any]) -> None:
    config = load_config(with_section("evaluation.generation", fields))
    assert config.evaluation.generation == GenerationSection(**fields)
    assert load_config(parse_yaml(dump_yaml(config), "written")) == config
