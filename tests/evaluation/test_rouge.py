"""ROUGE as papers report it: numbers derived by hand, an independent formula, and what the option `stem` changes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.config.metric import METRICS
from fedray.evaluation.metrics.rouge_l import RougeL as AnyScript

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(kind: str, generated: str, reference: str, stem: bool = True) -> float:
    return METRICS.parse({"name": kind, "stem": stem}).compute([generated], [reference])


@pytest.mark.parametrize(
    ("generated", "reference", "expected"),
    [
        # Common words: police, the, gunman of 4 and 4, in the same order; the pair (the, gunman) of 3.
        ("police ended the gunman", "police killed the gunman", (3 / 4, 1 / 3, 3 / 4)),
        # All 4 words in another order; the pairs (the, gunman) and (police, killed); 2 in the same order.
        ("the gunman police killed", "police killed the gunman", (1.0, 2 / 3, 1 / 2)),
        # a twice in both: P = 2/2, R = 2/3; the pair (a, a) once: P = 1/1, R = 1/2.
        ("a a", "a a b", (4 / 5, 2 / 3, 4 / 5)),
        # a counts as often as both texts have it: P = 1/3, R = 1/1.
        ("a a a", "a", (1 / 2, 0.0, 1 / 2)),
        # Case and punctuation do not count.
        ("The CAT, sat!", "the cat sat", (1.0, 1.0, 1.0)),
        ("nothing", "else", (0.0, 0.0, 0.0)),
        ("", "something", (0.0, 0.0, 0.0)),
        ("something", "", (0.0, 0.0, 0.0)),
        ("", "", (0.0, 0.0, 0.0)),
        ("?", "!", (0.0, 0.0, 0.0)),
        # Words are runs of ASCII letters and digits: na ve, and na vet.
        ("naïve", "naïveté", (1 / 2, 0.0, 1 / 2)),
        ("мир", "мир", (0.0, 0.0, 0.0)),
    ],
)
def test_by_hand(generated: str, reference: str, expected: tuple[float, float, float]) -> None:
    for kind, value in zip(KINDS, (*expected, expected[2]), strict=True):
        for stem in (False, True):
            assert rouge(kind, generated, reference, stem) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("generated", "reference", "stemmed"),
    [
        ("dogs running", "dog runs", 1.0),  # Porter: dog, run
        ("gas", "ga", 0.0),  # Porter would make it ga, but three letters stay
        ("happily", "happy", 0.0),  # happili and happi
        ("relational", "relate", 1.0),  # relat
    ],
)
def test_stems(generated: str, reference: str, stemmed: float) -> None:
    assert rouge("rouge1", generated, reference) == stemmed
    assert rouge("rouge1", generated, reference, stem=False) == 0.0


def test_lsum_unites_the_lines() -> None:
    """Lin (2004), section 3.2: of w1 w2 w3 w4 w5 the lines have (w1 w2) and (w1 w3 w5), united w1 w2 w3 w5: R = 4/5 and
    P = 4/10. The lines as one text have the same subsequence; in the other order they have only w1 w3 w5."""
    lines = ["w1 w2 w6 w7 w8", "w1 w3 w8 w9 w5"]
    expected = 2 * (4 / 5) * (4 / 10) / (4 / 5 + 4 / 10)
    for order in (lines, lines[::-1]):
        assert rouge("rougeLsum", "\n".join(order), "w1 w2 w3 w4 w5") == pytest.approx(expected, abs=1e-12)
    assert rouge("rougeL", "\n".join(lines), "w1 w2 w3 w4 w5") == pytest.approx(expected, abs=1e-12)
    assert rouge("rougeL", "\n".join(lines[::-1]), "w1 w2 w3 w4 w5") == pytest.approx(2 * 3 / 15, abs=1e-12)


texts = st.lists(st.sampled_from(["a", "b", "cc", "Dd"]), max_size=8).map(" ".join)


@given(texts, texts)
def test_unstemmed_kinds_by_independent_formulas(generated: str, reference: str) -> None:
    """ROUGE-N by multisets of n-grams; ROUGE-L by fedray's own `rouge_l`, which agrees on ASCII words."""
    for n, kind in ((1, "rouge1"), (2, "rouge2")):
        words = [text.lower().split() for text in (generated, reference)]
        a, b = (Counter(tuple(part[i : i + n]) for i in range(len(part) - n + 1)) for part in words)
        total = a.total() + b.total()
        expected = 2 * (a & b).total() / total if total else 0.0
        assert rouge(kind, generated, reference, stem=False) == pytest.approx(expected, abs=1e-12)
    expected = AnyScript().compute([generated], [reference])
    for kind in ("rougeL", "rougeLsum"):
        assert rouge(kind, generated, reference, stem=False) == pytest.approx(expected, abs=1e-12)
        assert rouge(kind, generated, reference) == pytest.approx(expected, abs=1e-12), "too short to be stemmed"


def test_it_is_the_mean_over_examples() -> None:
    assert METRICS.parse("rouge1").compute(["a", "b"], ["a", "c"]) == 0.5
    with pytest.raises(ValueError, match="longer"):
        METRICS.parse("rouge1").compute(["a"], ["a", "b"])


def test_tables_say_what_is_not_stemmed() -> None:
    assert [METRICS.parse(kind).label for kind in KINDS] == list(KINDS)
    assert METRICS.parse({"name": "rougeL", "stem": False}).label == "rougeL_unstemmed"


def test_it_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        rouge("rouge1", "a", "a")
    assert not caplog.records
