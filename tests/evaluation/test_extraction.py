"""Extraction rules: all real gold answers are right; texts made by hand are right or wrong as in the published code."""

import json
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from examples import EXAMPLES
from hypothesis import given
from hypothesis import strategies as st
from small_config import SMALLEST, message_of

from fedray.config import dump_yaml, load_config, parse_yaml
from fedray.config.metric import METRICS
from fedray.errors import ConfigError, DataError
from fedray.evaluation.extraction.first_label import TASKS
from fedray.evaluation.extraction_rule import EXTRACTION_RULES, ExtractionRule
from fedray.evaluation.metrics.extracted_match import ExtractedMatch


def match(rule: Any, text: str, reference: str) -> bool:
    """Return whether the metric with this rule counts a text as right."""
    share = ExtractedMatch(rule=rule).compute([text], [reference])
    assert share in (0.0, 1.0)
    return share == 1.0


def gold_answers(folder: Path, name: str, column: str) -> list[str]:
    """Return a column of shared data; a file is a JSON array, or a line of JSON per row."""
    text = (folder / name).read_text(encoding="utf-8")
    rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    return [row[column] for row in rows]


COMMONSENSE = [f"llm_adapters/{task}/test.json" for task in ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")]


@pytest.mark.parametrize("rule", ["first_label", "after_phrase"])
@pytest.mark.parametrize("name", COMMONSENSE)
def test_gold_answers_of_commonsense_tasks_are_right(shared_data: Path, rule: str, name: str) -> None:
    """Both against the whole sentence and against the bare label."""
    sentences, labels = (gold_answers(shared_data, name, column) for column in ("output", "answer"))
    metric = ExtractedMatch(rule=rule)
    assert metric.compute(sentences, sentences) == 1.0
    assert metric.compute(sentences, labels) == 1.0
    found = EXTRACTION_RULES.parse(rule)
    assert [found.expected(sentence) for sentence in sentences] == labels


@pytest.mark.parametrize("rule", ["first_label", "after_phrase"])
@pytest.mark.parametrize("name", COMMONSENSE)
def test_the_next_gold_answer_is_right_where_it_is_the_same(shared_data: Path, rule: str, name: str) -> None:
    sentences, labels = (gold_answers(shared_data, name, column) for column in ("output", "answer"))
    same = [a == b for a, b in pairwise(labels)]
    assert 0 < sum(same) < len(same)
    assert ExtractedMatch(rule=rule).compute(sentences[1:], sentences[:-1]) == pytest.approx(sum(same) / len(same))


@pytest.mark.parametrize("rule", ["gsm8k", "last_number", "answer_is", "maths"])
def test_gold_solutions_of_gsm8k_are_right(shared_data: Path, rule: str) -> None:
    solutions = gold_answers(shared_data, "gsm8k/test.jsonl", "answer")
    metric = ExtractedMatch(rule=rule)
    assert metric.compute(solutions, solutions) == 1.0
    numbers = [solution.rpartition("#### ")[2].replace(",", "") for solution in solutions]
    said = [f"So the total is {number}. The answer is {number}." for number in numbers]
    assert metric.compute(said, solutions) == (0.0 if rule == "gsm8k" else 1.0)


FIRST_LABEL = [
    ("the correct answer is true", "the correct answer is true", True),
    ("true or false? I say false", "true", True),  # the first one counts
    ("true or false? I say false", "false", False),
    ("untrue", "true", True),  # not anchored
    ("True", "true", False),  # case counts
    ("", "true", False),
    ("the correct answer is Answer 2", "answer2", False),
    ("answer12", "answer1", True),  # not anchored at its end either
    ("it is true that answer3 fits", "the correct answer is answer3", True),  # other tasks' labels do not count
    ("it is true that answer3 fits", "true", True),
    ("option2", "option2", True),
    ("ending4 of ending1", "ending4", True),
    ("solution2", "solution1", False),
]


@pytest.mark.parametrize(("text", "reference", "right"), FIRST_LABEL)
def test_the_first_label(text: str, reference: str, right: bool) -> None:
    assert match("first_label", text, reference) is right


def test_labels_of_ones_own() -> None:
    """Of labels that begin at the same place the longest is meant, whatever their order."""
    rule = {"name": "first_label", "labels": ["no", "not sure", "yes"]}
    assert [match(rule, "I am not sure", reference) for reference in ("not sure", "no", "yes")] == [True, False, False]
    assert match(rule, "no", "no")
    assert not match(rule, "a.b", "yes")
    assert match({"name": "first_label", "labels": [".", "+"]}, "a+b.c", "+")  # labels are no patterns


@given(st.sampled_from([label for task in TASKS for label in task]), st.text(alphabet="xyz ., \n", max_size=20))
def test_a_label_is_found_behind_anything_that_has_none(label: str, before: str) -> None:
    assert match("first_label", before + label, label)
    assert match("first_label", before + label + "\n" + label[:-1], f"the correct answer is {label}")


AFTER_PHRASE = [
    ("the correct answer is true", "true", True),
    ("the correct answer is  true \n", "the correct answer is true", True),  # blanks around it do not count
    ("Sure: the correct answer is true", "true", True),
    ("the correct answer is true.", "true", False),
    ("the correct answer is true, the correct answer is true", "true", False),  # all that follows the first phrase
    ("true", "true", False),  # no phrase
    ("The correct answer is true", "true", False),  # the phrase's case counts
    ("the correct answer is", "true", False),
    ("", "true", False),
]


@pytest.mark.parametrize(("text", "reference", "right"), AFTER_PHRASE)
def test_what_follows_the_phrase(text: str, reference: str, right: bool) -> None:
    assert match("after_phrase", text, reference) is right


def test_another_phrase() -> None:
    assert match({"name": "after_phrase", "phrase": "Label: "}, "Label: spam", "spam")
    assert not match({"name": "after_phrase", "phrase": "Label: "}, "the correct answer is spam", "spam")


LAST_NUMBER = [
    ("10 + 8 = 18", "18", True),
    ("10 + 8 = 18", "18.0", True),  # LLM-Adapters' answers are floats
    ("10 + 8 = 18.", "18", True),
    ("18 apples in 3 bags", "18", False),  # the last one counts
    ("$1,018", "1018", True),
    ("1,2", "12", True),  # a list without blanks is one number
    ("-7", "-7", True),
    ("7", "-7", False),
    ("3-4", "-4", True),  # a minus sign right before the digits is the number's
    ("2.5 or .5", "5", True),  # a number begins with a digit
    ("18.0009", "18", True),
    ("18.002", "18", False),
    ("eighteen", "18", False),
    ("", "18", False),
    ("9" * 400, "9" * 400, False),  # ∞ − ∞ is not a number
]


@pytest.mark.parametrize(("text", "reference", "right"), LAST_NUMBER)
def test_the_last_number(text: str, reference: str, right: bool) -> None:
    assert match("last_number", text, reference) is right


def test_a_tolerance_of_ones_own() -> None:
    assert match({"name": "last_number", "tolerance": 0.5}, "18.5", "18")
    assert not match({"name": "last_number", "tolerance": 0}, "18.0009", "18")


@given(st.integers(-(10**9), 10**9), st.integers(0, 999))
def test_numbers_are_read_with_and_without_commas(whole: int, thousandths: int) -> None:
    number = f"{whole}.{thousandths:03d}"
    text = f"2 and 2 make {whole:,}.{thousandths:03d} euros."
    assert EXTRACTION_RULES.parse("last_number").extract(text) == number
    assert match("last_number", text, number)
    assert not match("last_number", text, f"{whole + 1}.{thousandths:03d}")


FIRST_LETTER = [
    ("B", "B", True),
    ("the answer is B", "B", True),
    ("An apple, so the answer is B", "B", False),  # it gives A
    ("An apple", "A", True),
    ("Answer: B", "A", True),  # so does this
    ("Because of C", "B", True),
    ("b", "B", False),
    ("F", "E", False),
    ("", "A", False),
    ("D", "A train runs 20 miles, so the answer is D.", True),  # a reference's last letter that stands alone
    ("A", "A train runs 20 miles, so the answer is D.", False),
    ("E", "(E)", True),
]


@pytest.mark.parametrize(("text", "reference", "right"), FIRST_LETTER)
def test_the_first_letter(text: str, reference: str, right: bool) -> None:
    assert match("first_letter", text, reference) is right


def test_letters_of_ones_own() -> None:
    assert match({"name": "first_letter", "letters": "XY"}, "A or Y", "Y")


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("The 3 options: B", "B", True),
        ("The 3 options: B", "3", True),
        ("Add 1 to 17: 18", "18.0", True),
        ("Add 1 to 17: 18", "A", True),
        ("Both are 18, so B", "18", True),
        ("18", "B", False),
        ("F", "F", None),  # AQuA has no F, and it is no number
    ],
)
def test_maths_is_a_letter_or_a_number(text: str, reference: str, right: bool | None) -> None:
    """As the reference is."""
    if right is None:
        with pytest.raises(DataError, match="the rule maths finds no answer in the reference 'F'"):
            match("maths", text, reference)
    else:
        assert match("maths", text, reference) is right


GSM8K = "She has 9 * 2 = $<<9*2=18>>18.\n#### 18"

ANSWER_IS = [
    ("9 * 2 = 18. The answer is 18.", True),
    ("The answer is $18, as 9 * 2 = 18 and not 20", True),  # the first number after the phrase
    ("the answer is 18. Q: 2 + 2? The answer is 4.", True),  # and after its first occurrence
    ("The Answer Is: 18", True),
    ("So 9 * 2 = 18", True),  # the last one without the phrase
    ("9 * 2 = 18 in 3 hours", False),
    ("18? The answer is eighteen.", False),  # no number after the phrase
    ("The answer is eighteen. The answer is 18.", False),
    ("The answer is 18.00", False),  # compared as texts
    ("The answer is 1,8", True),
    ("", False),
]


@pytest.mark.parametrize(("text", "right"), ANSWER_IS)
def test_the_number_after_the_answer_is(text: str, right: bool) -> None:
    assert match("answer_is", text, GSM8K) is right
    assert match("answer_is", text, "The answer is 18.") is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("#### 18", True),
        ("9 * 2 = 18\n#### 18\n#### 20", True),
        ("#### 20\n#### 18", False),
        ("#### 1,8", True),
        ("####18", False),
        ("#### $18", False),
        ("#### 18.0", False),
        ("18", False),
        ("", False),
    ],
)
def test_the_number_after_four_hashes(text: str, right: bool) -> None:
    assert match("gsm8k", text, GSM8K) is right


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("positive", "positive"),
        ("Positive.", "positive"),
        ("POSITIVE", "neutral"),  # as it stands, or capitalised
        ("not negative but positive", "positive"),  # the option's order
        ("Negative", "negative"),
        ("unnegatived", "negative"),
        ("neutral", "neutral"),
        ("", "neutral"),
        ("neutral\nInput: gains\nAnswer: positive", "neutral"),  # another example
    ],
)
def test_a_keyword_or_the_default(text: str, found: str) -> None:
    assert [match("keyword", text, label) for label in ("positive", "negative", "neutral")] == [
        found == label for label in ("positive", "negative", "neutral")
    ]


def test_keywords_of_ones_own() -> None:
    rule = {"name": "keyword", "words": ["yes", "no"], "default": "maybe"}
    assert match(rule, "Yes, no", "yes")
    assert match(rule, "perhaps", "maybe")


def test_it_is_the_share_of_right_texts() -> None:
    metric = ExtractedMatch(rule="last_number")
    assert metric.compute(["1", "2", "3", ""], ["1", "2", "4", "5"]) == 0.5
    with pytest.raises(ValueError, match="longer"):
        metric.compute(["1"], ["1", "2"])


@pytest.mark.parametrize(
    ("rule", "reference", "shown"),
    [
        ("first_label", "Paris", "Paris"),
        ("after_phrase", "the correct answer is ", "the correct answer is "),
        ("last_number", "seven", "seven"),
        ("first_letter", "Apple", "Apple"),
        ("gsm8k", "18", "18"),
        ("answer_is", "seven", "seven"),
        ("last_number", "a" * 50 + "b" * 50, "a" * 40 + " ... " + "b" * 40),
    ],
)
def test_a_reference_without_an_answer_is_refused(rule: str, reference: str, shown: str) -> None:
    metric = ExtractedMatch(rule=rule)
    with pytest.raises(DataError) as caught:
        metric.check_references(["answer1 #### 1 A", reference] if rule != "after_phrase" else [reference])
    assert str(caught.value) == (
        f"metric extracted_match: the rule {rule} finds no answer in the reference {shown!r}; choose another rule, or "
        "another column as data.answer"
    )


def test_rules_by_name() -> None:
    expected = "after_phrase answer_is first_label first_letter gsm8k keyword last_number maths"
    assert EXTRACTION_RULES.names == tuple(expected.split())
    assert all(EXTRACTION_RULES.find(name)().label == name for name in EXTRACTION_RULES.names)


def test_two_rules_are_two_names_in_tables() -> None:
    labels = [ExtractedMatch(rule=rule).label for rule in ("first_label", "after_phrase")]
    assert labels == ["first_label_match", "after_phrase_match"]


def test_a_rule_is_a_value_of_the_configuration() -> None:
    metric = {"name": "extracted_match", "rule": {"name": "first_label", "labels": ["yes", "no"]}}
    config = load_config(SMALLEST | {"evaluation": {"metric": metric}})
    assert config.evaluation.metrics[0] == METRICS.parse(metric)
    assert load_config(parse_yaml(dump_yaml(config), "text")) == config
    assert pickle.loads(pickle.dumps(config)) == config
    short = load_config(SMALLEST | {"evaluation": {"metric": {"name": "extracted_match", "rule": "gsm8k"}}})
    assert short.evaluation.metrics[0] == ExtractedMatch(rule="gsm8k")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (None, "rule: missing; allowed: after_phrase, answer_is, first_label, "),
        ("last_numbr", "rule: unknown extraction rule 'last_numbr' (did you mean 'last_number'?); allowed: after_"),
        ({"name": "first_label", "labels": [True, False]}, "rule.labels: put labels in quotes, as in "),
        ({"name": "first_label", "labels": ["yes"]}, "rule.labels: expected at least two different labels, got ['yes"),
        ({"name": "first_label", "labels": ["a", "a"]}, "rule.labels: expected at least two different labels, got"),
        (
            {"name": "first_label", "lables": ["a"]},
            "rule.lables: unknown key (did you mean 'labels'?); allowed: labels",
        ),
        (
            {"name": "last_number", "tolerance": -1},
            "rule.tolerance: got -1: Input should be greater than or equal to 0",
        ),
        ({"class": "collections.Counter"}, "rule: collections.Counter must be a class derived from fedray.evaluation."),
    ],
)
def test_mistakes_are_named(rule: Any, message: str) -> None:
    metric = {"name": "extracted_match"} | ({} if rule is None else {"rule": rule})
    found = message_of(SMALLEST | {"evaluation": {"metric": metric}})
    assert found.startswith(f"configuration: evaluation.metrics.0.{message}")


def test_a_rule_needs_its_function() -> None:
    with pytest.raises(TypeError, match="Nothing: has no function `extract`"):
        type("Nothing", (ExtractionRule,), {"__module__": __name__})
    with pytest.raises(ConfigError, match="evaluation.metrics.0.rule"):
        load_config(SMALLEST | {"evaluation": {"metric": {"name": "extracted_match", "rule": 3}}})


def test_a_rule_of_ones_own(own_folder: Path) -> None:
    """That of docs/extending.md; an empty text gives no answer, and as a reference it is refused."""
    (own_folder / "my_extraction.py").write_text(EXAMPLES["my_extraction.py"])
    metric = {"name": "extracted_match", "rule": {"class": "my_extraction.LastLine", "marker": "Answer:"}}
    config = load_config(SMALLEST | {"evaluation": {"metric": metric}})
    assert load_config(parse_yaml(dump_yaml(config), "text")) == pickle.loads(pickle.dumps(config)) == config
    found = METRICS.parse(metric)
    assert found.label == "LastLine_match"
    assert found.compute(["Two and two\nAnswer: 4\n", "4", "", "Answer: 5"], ["4", "Answer: 4", "4", "4"]) == 0.5
    with pytest.raises(DataError, match="the rule LastLine finds no answer in the reference ' '"):
        found.check_references([" "])
