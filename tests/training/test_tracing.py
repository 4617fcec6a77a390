"""What a traced step says against torch's own profile of a real one, and against figures by hand."""

from types import SimpleNamespace

import pytest
import torch
from allocations import most_allocated
from letters import Letters
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedray.adapters.full import attach_full
from fedray.adapters.lora import attach_lora
from fedray.adapters.reft import attach_reft
from fedray.config import GenerationSection, LoraSection, ModelConfig, ReftSection
from fedray.evaluation.generation import Decoding, generate_batch
from fedray.evaluation.losses import score
from fedray.models.architecture import architecture
from fedray.models.backbone import checkpoint_activations
from fedray.models.build import build
from fedray.training.batch_shapes import BatchShape
from fedray.training.tracing import Traced, _labels, trace_evaluation, trace_generation, trace_step

EXAMPLES, TOKENS = 8, 128
SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2000}


def bert():
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=1024, **no_dropout))


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=688, num_key_value_heads=2))


def pooled():
    """A sentence encoder's classifier: the mean of the tokens, scaled to a fixed length."""
    config = {"model_type": "bert", **SIZES, "intermediate_size": 1024}
    section = ModelConfig(path="random", tokenizer="bytes", config=config, pooling="mean")
    arch = architecture(section, "classification", 2, None, 0)
    arch.fedray = {**arch.fedray, "normalised": True}
    return build(arch, "classification")


def lora(model):
    attach_lora(model, LoraSection(rank=8, dropout=0.1))


def reft(model):
    attach_reft(model, ReftSection(rank=4, positions="f1+l1"))


def relative(model):
    attach_reft(model, ReftSection(rank=4, positions="f1+l1", rotation="relative"))


def checkpointed(model):
    checkpoint_activations(model)
    lora(model)


def built(make, attach, device):
    with torch.device(device):
        model = make()
    model.requires_grad_(False)
    attach(model)
    return model


def shaped(task, padded=False, answer=TOKENS - 1):
    """A batch in which every answer has `answer` tokens."""
    return BatchShape(EXAMPLES, TOKENS, EXAMPLES * answer if task == "causal_lm" else EXAMPLES, padded)


def profiled(model, task, training, shape):
    """The peak of what torch's profiler saw allocated in a step, beyond what lived before it."""
    batch = {name: torch.ones(EXAMPLES, TOKENS, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["attention_mask"][0, TOKENS - shape.padded :] = 0
    batch["labels"] = torch.ones(EXAMPLES, dtype=torch.long)
    if task == "causal_lm":
        batch["labels"] = torch.ones(EXAMPLES, TOKENS, dtype=torch.long)
        batch["labels"][:, : TOKENS - shape.units // EXAMPLES] = -100
    model.train(training)

    def step():
        with torch.set_grad_enabled(training):
            loss = score(model, batch, task).losses.sum()
            if training:
                loss.backward()

    return peak(step, model)


def peak(step, model):
    step()  # whatever is made once
    model.zero_grad()
    return most_allocated(step)


@pytest.mark.parametrize("make", [bert, llama, pooled])
@pytest.mark.parametrize("attach", [lora, attach_full, checkpointed, reft, relative])
def test_a_traced_step_is_a_real_one_within_a_tenth(make, attach):
    task = "causal_lm" if make is llama else "classification"
    shape = shaped(task, padded=attach in (lora, reft))
    traced = trace_step(built(make, attach, "meta"), task, shape)
    measured = profiled(built(make, attach, "cpu"), task, True, shape)
    assert measured > 20e6
    assert abs(traced.peak / measured - 1) < 0.1, (traced, measured)


@pytest.mark.parametrize("make", [bert, llama, pooled])
@pytest.mark.parametrize("padded", [False, True])
def test_an_evaluation_is_a_real_one_within_a_tenth(make, padded):
    task = "causal_lm" if make is llama else "classification"
    shape = shaped(task, padded, answer=5)
    traced = trace_evaluation(built(make, lora, "meta"), task, shape)
    measured = profiled(built(make, lora, "cpu"), task, False, shape)
    assert traced.activations == traced.peak
    assert abs(traced.peak / measured - 1) < 0.1, (traced, measured)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 4}, {"do_sample": True, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2}],
    ids=["greedy", "beams", "sampled"],
)
def test_generation_is_a_real_one_within_a_tenth(options):
    """Prompts of 8 tokens and 12 more: the last step is the largest."""
    section = GenerationSection(**options)
    traced = trace_generation(built(llama, lora, "meta"), section, BatchShape(EXAMPLES, 8, 0), 12)
    model, decoding = built(llama, lora, "cpu").eval(), Decoding(Letters(), 12, (), section)
    batch = {name: torch.ones(EXAMPLES, 8, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    draws = decoding.draws((), range(EXAMPLES))
    with torch.no_grad():
        measured = peak(lambda: generate_batch(model, batch, decoding, 0, draws), model)
    assert abs(traced.peak / measured - 1) < 0.1, (traced, measured)


@pytest.mark.parametrize("beams", [1, 4])
def test_the_cache_of_generation(beams):
    """Keys and values of 4 layers with 2 heads of 64 numbers: 4,096 bytes for every token of every beam. Of one layer's
    keys the old and the new cache exist at once, 512 bytes, and each head of queries has a score."""

    def traced(new_tokens):
        section = GenerationSection(num_beams=beams)
        return trace_generation(built(llama, lora, "meta"), section, BatchShape(EXAMPLES, 8, 0), new_tokens).peak

    per_token = (traced(3000) - traced(1000)) / 2000 / EXAMPLES / beams
    assert 4096 + 512 <= per_token < 4096 + 3 * 512


class Doubled(nn.Module):
    """[examples, tokens] of whole numbers to logits [examples, 2]; every size can be followed by hand."""

    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.out = nn.Linear(width, 2, bias=False)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.out(self.embedding(input_ids).exp()[:, 0]))


def test_by_hand():
    """Batch: two times [4, 8] and [4] whole numbers, 544 bytes. Width 100: embedded and its exponential, 4·8·100·4 =
    12,800 each; only the exponential is kept for the backward pass, where its gradient and the embedding's gradient
    come beside it: of [4, 8, 100], from the slice (1), through exp (2); then the weight's gradient, [10, 100] · 4 =
    4,000. Peak: exponential, 1 and 2: 38,400, and the head's gradient (800)."""
    with torch.device("meta"):
        model = Doubled(100)
    traced = trace_step(model, "classification", BatchShape(4, 8, 4))
    assert 38_400 + 544 + 800 <= traced.peak <= 38_400 + 544 + 800 + 2_000
    assert traced.peak - traced.activations == 800


def test_gradients_are_no_activations():
    """A frozen embedding leaves the head's gradient, 2 · 100 · 4 = 800 bytes, and no large activation behind it."""
    with torch.device("meta"):
        model = Doubled(100)
    model.embedding.requires_grad_(False)
    traced = trace_step(model, "classification", BatchShape(4, 8, 4))
    assert traced.activations >= 2 * 12_800  # embedded and its exponential, side by side
    assert traced.activations < 2 * 12_800 + 544 + 1_000


def test_only_tokens_that_are_edited_take_memory():
    """f1+l1 of 128 tokens edit two, `all` edits all of them, in float32 beside the stream."""

    def traced(positions):
        model = built(bert, lambda model: attach_reft(model, ReftSection(rank=4, positions=positions)), "meta")
        return trace_step(model, "classification", shaped("classification")).peak

    stream = EXAMPLES * TOKENS * 256 * 4
    assert traced("all") - traced("f1+l1") > 4 * stream


def test_only_tokens_with_a_loss_have_logits():
    """At once, there are the log-softmax and the gradients of both it and the logits in training; the logits and their
    log-softmax in an evaluation. One more answer token of 8 examples is 8 · 2000 numbers of each."""

    def traced(trace, units):
        return trace(built(llama, lora, "meta"), "causal_lm", BatchShape(EXAMPLES, TOKENS, units)).peak

    numbers = 4 * 2000 * EXAMPLES
    for trace, copies in ((trace_evaluation, 2), (trace_step, 3)):
        more = (traced(trace, 127 * EXAMPLES) - traced(trace, 117 * EXAMPLES)) / 10
        assert copies * numbers <= more < (copies + 0.2) * numbers


@pytest.mark.parametrize(("examples", "units"), [(3, 7), (4, 0), (2, 14), (5, 3)])
def test_labels_add_up_to_the_units(examples, units):
    """7 of 3 examples are 2 + 2 + 3, the last tokens of each."""
    labels = _labels(BatchShape(examples, 8, units))
    answers = (labels != -100).sum(1)
    assert answers.sum() == units
    assert answers.max() - answers.min() <= 1
    assert all((row[8 - count :] == 1).all() for row, count in zip(labels, answers.tolist(), strict=True))


def test_nothing_is_allocated():
    """A layer of 40 GB of weights, and a step of terabytes."""
    with torch.device("meta"):
        model = Doubled(10**9)
    traced = trace_step(model, "classification", BatchShape(100, 8, 100))
    assert isinstance(traced, Traced)
    assert traced.peak > 3 * 4 * 100 * 8 * 10**9
