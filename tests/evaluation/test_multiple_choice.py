"""Multiple choice by likelihood: numbers derived by hand, an independent sum, batches, ties, and interventions."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from letters import table

from fedray.adapters.reft import attach_reft
from fedray.config import ReftSection
from fedray.config.metric import METRICS
from fedray.data.shards import CHOICE, CHOICES
from fedray.evaluation.evaluate import evaluate
from fedray.evaluation.metrics.multiple_choice import MultipleChoice

PLAIN, CHARACTERS, BYTES = (MultipleChoice(normalise=name) for name in ("none", "characters", "bytes"))


def with_options(examples):
    """Return a table of (prompt, {text: tokens}, right text)."""
    texts = [prompt + options[right] for prompt, options, right in examples]
    rows = [
        [
            {"input_ids": prompt + tokens, "start": len(prompt), "text": text, "right": text == right}
            for text, tokens in options.items()
        ]
        for prompt, options, right in examples
    ]
    return table(texts, [len(prompt) for prompt, _, _ in examples]).append_column(
        CHOICES, pa.array(rows, pa.list_(CHOICE))
    )


def measured(model, rows, metrics=(PLAIN, CHARACTERS, BYTES), size=4, **settings):
    found = evaluate(model, rows, "causal_lm", metrics, size, 0, "cpu", **settings)
    return found.examples if settings.get("each") else found.metrics


def test_by_hand(lookup):
    """After token 3, 4 has probability 1/4 and 5 has 1/2; after 5, 6 has 1/2; after 6, 7 has 1/4, the rest is even.

    Options after 3: "yes" = 4 has ln 1/4 = -1.386, and 5 6 7 has ln 1/16 = -2.773. Plain: "yes". Per character, "yes"
    has -1.386 / 3 = -0.462; "oh no" has -2.773 / 5 = -0.555, "certainly not" has -2.773 / 13 = -0.213. "ééééé" has 5
    characters (-0.555) and 10 bytes (-0.277).
    """
    logits = torch.full((12, 12), math.log(1e-9))
    for token, following in {3: {4: 1, 5: 2, 8: 1}, 5: {6: 1, 8: 1}, 6: {7: 1, 8: 3}}.items():
        for other, weight in following.items():
            logits[token, other] = math.log(weight)
    model = lookup(logits)
    rows = with_options(
        [
            ([9, 3], {"yes": [4], "oh no": [5, 6, 7]}, "yes"),
            ([3], {"yes": [4], "certainly not": [5, 6, 7]}, "yes"),
            ([3], {"yes": [4], "ééééé": [5, 6, 7]}, "yes"),
        ]
    )
    each = measured(model, rows, each=True)
    assert each["multiple_choice"] == [1.0, 1.0, 1.0]
    assert each["multiple_choice_characters"] == [1.0, 0.0, 1.0]
    assert each["multiple_choice_bytes"] == [1.0, 0.0, 0.0]
    assert measured(model, rows) == {
        "multiple_choice": 1.0,
        "multiple_choice_characters": pytest.approx(2 / 3),
        "multiple_choice_bytes": pytest.approx(1 / 3),
    }


def test_the_first_of_equal_options_is_taken():
    own = [np.array([-2.0, -1.0, -1.0])]
    assert PLAIN.compute(own, [["a", "b", "c"]], [1]) == 1.0
    assert PLAIN.compute(own, [["a", "b", "c"]], [2]) == 0.0
    assert CHARACTERS.compute([np.array([-2.0, -1.0])], [["aa", "b"]], [0]) == 1.0


class Sums(MultipleChoice):
    """Keeps what it was given."""

    name = "sums"

    def compute(self, likelihoods, options, right):
        self.__dict__.setdefault("seen", []).append([own.tolist() for own in likelihoods])
        return 0.0


def random_rows(seed=0, count=9):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt = rng.integers(3, 40, rng.integers(1, 7)).tolist()
        texts = [f"option {i}" for i in range(rng.integers(2, 5))]
        options = {text: rng.integers(3, 40, rng.integers(1, 6)).tolist() for text in texts}
        made.append((prompt, options, texts[int(rng.integers(len(texts)))]))
    return made


def likelihoods(model, rows, size=4):
    metric = Sums()
    evaluate(model, rows, "causal_lm", [metric], size, 0, "cpu")
    return metric.__dict__["seen"][0]


def independent(model, examples):
    """Return the log-likelihoods of options, each read alone, from the whole text's log-softmax."""
    found = []
    for prompt, options, _ in examples:
        own = []
        for tokens in options.values():
            ids = prompt + tokens
            with torch.no_grad():
                logs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
            own.append(sum(float(logs[at - 1, ids[at]]) for at in range(len(prompt), len(ids))))
        found.append(own)
    return found


def test_likelihoods_are_sums_over_the_options_tokens(llama):
    examples = random_rows()
    for ours, theirs in zip(likelihoods(llama, with_options(examples)), independent(llama, examples), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_likelihoods_do_not_depend_on_batches_or_order(llama):
    rows = with_options(random_rows(1))
    one = likelihoods(llama, rows, 1)
    for size in (3, 64):
        for ours, theirs in zip(likelihoods(llama, rows, size), one, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    turned = likelihoods(llama, rows.take(np.arange(9)[::-1]), 4)
    for ours, theirs in zip(turned[::-1], one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    # A slice of a larger table is as the rows alone.
    for ours, theirs in zip(likelihoods(llama, rows.slice(2, 3)), one[2:5], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_interventions_are_placed_by_the_prompt(llama):
    """With f1+l1, the prompt's last token is edited whatever follows: the first token of an option is as likely as
    where the option is this token alone, and the option is no last token itself."""
    adapter = attach_reft(llama, ReftSection(rank=2, positions="f1+l1", dropout=0.0), seed=3)
    values = np.random.default_rng(0).normal(0, 0.5, adapter.layout("reft").size).astype(np.float32)
    adapter.load("reft", adapter.read("reft") + values)
    prompt, tokens = [5, 6, 7, 8], [9, 10, 11]
    rows = with_options([(prompt, {str(n): tokens[:n] for n in (1, 2, 3)}, "1")])
    ((one, two, three),) = likelihoods(adapter.model, rows)
    # The same conditional likelihoods from examples of their own, each with the same prompt.
    metric = METRICS.parse("perplexity")
    for n, sum_ in enumerate([one, two, three], start=1):
        found = evaluate(adapter.model, table([prompt + tokens[:n]], [4]), "causal_lm", [metric], 1, 0, "cpu")
        assert -found.loss * n == pytest.approx(sum_, rel=1e-5)
    unedited = likelihoods(adapter.model, with_options([(prompt + tokens[:2], {"a": [11], "b": [12]}, "a")]))
    assert three - two != pytest.approx(unedited[0][0], rel=1e-3), "another prompt has its edit elsewhere"


def test_without_options_or_unless_asked_it_is_nan(llama):
    rows = with_options(random_rows())
    assert math.isnan(measured(llama, rows.drop_columns([CHOICES]), [PLAIN])["multiple_choice"])
    assert math.isnan(measured(llama, rows, [PLAIN], generating=False)["multiple_choice"])


def test_groups_have_their_own_shares(lookup):
    """Token 4 is always likelier than 5: right in the first two examples, wrong in the third."""
    logits = torch.zeros(12, 12)
    logits[:, 4] = 1.0
    options = {"four": [4], "five": [5]}
    rows = with_options([([3], options, "four"), ([3], options, "four"), ([3], options, "five")])
    rows = rows.append_column("group", pa.array(["x", "y", "y"]))
    found = evaluate(lookup(logits), rows, "causal_lm", [PLAIN], 2, 0, "cpu")
    assert found.metric == pytest.approx(2 / 3)
    assert {name: one.metric for name, one in found.groups.items()} == {"x": 1.0, "y": 0.5}
