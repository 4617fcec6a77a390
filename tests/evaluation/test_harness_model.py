"""fedray's models in lm-evaluation-harness: the base model as the harness itself reads it, and adapters whose edits end
with the context of each request."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from words import word_tokenizer

from fedray.adapters.kinds.lora import LoraKind
from fedray.adapters.kinds.reft import ReftKind
from fedray.adapters.lora import attach_lora
from fedray.adapters.reft import attach_reft
from fedray.config import GenerationSection, LoraSection, ReftSection
from fedray.errors import ConfigError
from fedray.evaluation.evaluate import evaluating
from fedray.evaluation.generation import Decoding, continue_prompts
from fedray.evaluation.losses import score
from fedray.models.tokenizer import byte_tokenizer

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from fedray.evaluation.harness_model import HarnessModel

PAIRS = [
    ("a b c d e f g h", " i j"),
    ("a b c d e f g h", " k j"),
    ("a b c d e f g h i", " j"),
    ("q", " r"),
    ("q", " s"),
    ("x y z x y", " a b c d e"),
    ("", "k l m"),
]
"""Contexts and options. The first and third are the same text, cut at different places."""

KINDS = ("lora", "reft", "mixer", "mixed_reft")


def tiny(vocabulary=30, layers=2):
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def adapted(kind):
    """Return a model with an adapter that has random values, and the adapter."""
    model = tiny()
    reft = ReftSection(rank=2, positions="f3+l2")
    if kind == "lora":
        adapter = attach_lora(model, LoraSection(rank=2, targets=("q_proj", "v_proj")))
    elif kind == "reft":
        adapter = attach_reft(model, reft)
    else:
        section = {"lora": LoraSection(rank=2, targets=("q_proj", "v_proj"))} if kind == "mixer" else {"reft": reft}
        adapter = (LoraKind if kind == "mixer" else ReftKind)(**section).attach_mixed(model, "adaptive")
    rng = np.random.default_rng(5)
    for name in adapter.names:
        adapter.load(name, rng.normal(0, 0.7, adapter.layout(name).size).astype(np.float32))
    model.eval()
    return model, adapter


def requests(kind, pairs):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(pairs)]


def likelihoods(model, pairs=PAIRS, batch_size=4):
    return HarnessModel(model, word_tokenizer(), batch_size).loglikelihood(requests("loglikelihood", pairs), True)


def test_the_base_model_has_the_harness_s_own_numbers():
    """Log-likelihoods of options and of whole texts, and greedy texts, against the harness's own class for
    transformers' models; the long text is read in windows. Without its cache of logits, which in lm_eval 0.4.13 gives
    an option the logits of a longer one if context and option are the same text together."""
    model, tokenizer = tiny(), word_tokenizer()
    own = HarnessModel(model, tokenizer, 3)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, logits_cache=False)
    asked = requests("loglikelihood", PAIRS)
    ours, theirs = own.loglikelihood(asked, True), stock.loglikelihood(asked, True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-5)
    texts = requests("loglikelihood_rolling", [("a b c",), (" ".join("abcdefghij" * 9),)])
    assert own.max_length == stock.max_length == 64
    assert own.loglikelihood_rolling(texts, True) == pytest.approx(stock.loglikelihood_rolling(texts, True), rel=1e-5)
    long = requests("loglikelihood", [(" ".join("abcdefghij" * 9), " k l")])
    assert own.loglikelihood(long, True)[0][0] == pytest.approx(stock.loglikelihood(long, True)[0][0], rel=1e-5)
    how = {"until": ["k"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}
    prompts = requests("generate_until", [(context, how) for context, _ in PAIRS if context])
    assert own.generate_until(prompts, True) == stock.generate_until(prompts, True)


def test_interventions_edit_the_context_and_never_the_option():
    """LoReFT, f3+l2, by its formula, h + Rᵀ(W h + b − R h): the blocks of a plain model are edited at the first three
    and the last two tokens of the context, whatever option follows."""
    model, adapter = adapted("reft")
    views = adapter.layout("reft").views(adapter.read("reft"))
    plain, tokenizer = tiny(), word_tokenizer()

    def by_hand(context, option):
        front, whole = tokenizer(context).input_ids, tokenizer(context + option).input_ids
        length = len(front)
        first = min(3, length)
        places = {"prefix": range(first), "suffix": range(max(first, length - 2), length)}

        def edit(index):
            def hook(_, args, output):
                hidden = output.clone()
                for where, rows in places.items():
                    r, w, b = (torch.from_numpy(views[f"model.layers.{index}.{where}.{part}"]) for part in "RWb")
                    for row in rows:
                        h = output[0, row]
                        hidden[0, row] = h + r.T @ (w @ h + b - r @ h)
                return hidden

            return hook

        handles = [block.register_forward_hook(edit(index)) for index, block in enumerate(plain.model.layers)]
        with torch.no_grad():
            found = plain(torch.tensor([whole])).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        return sum(float(found[place - 1, whole[place]]) for place in range(length, len(whole)))

    pairs = [pair for pair in PAIRS if pair[0]]
    expected = [by_hand(*pair) for pair in pairs]
    assert [value for value, _ in likelihoods(model, pairs)] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_and_alone_and_fedray_s_own_losses_agree(kind):
    """A request's score depends neither on the others nor on the batch, and is the loss that fedray measures on the
    same tokens. A context that ends one token later has another score where positions of the prompt are edited."""
    model, _ = adapted(kind)
    together = [value for value, _ in likelihoods(model)]
    assert [likelihoods(model, [pair], 1)[0][0] for pair in PAIRS] == pytest.approx(together, rel=1e-4)
    tokenizer = word_tokenizer()
    for (context, option), found in zip(PAIRS[:-1], together[:-1], strict=True):
        front, whole = tokenizer(context).input_ids, tokenizer(context + option).input_ids
        labels = [-100] * len(front) + whole[len(front) :]
        batch = {"input_ids": torch.tensor([whole]), "labels": torch.tensor([labels])}
        with evaluating(model):
            assert found == pytest.approx(-float(score(model, batch, "causal_lm").losses.sum()), rel=1e-4)
    first, _, later = together[:3]
    part = likelihoods(model, [("a b c d e f g h", " i")])[0][0]
    assert (abs(first - part - later) > 1e-3) == ("reft" in kind)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_generated_after_the_whole_context(kind):
    """Batches are padded on the left, and texts are those that fedray generates one by one."""
    model, _ = adapted(kind)
    tokenizer = word_tokenizer()
    contexts = ["a b c d e f g h", "q", "x y z x y", "k l"]
    beams = {"until": [], "max_new_tokens": 5, "num_beams": 2}
    for how, section in (({"until": ["p"], "max_gen_toks": 5}, {"stop_strings": ("p",)}), (beams, {"num_beams": 2})):
        found = HarnessModel(model, tokenizer, 4).generate_until(
            requests("generate_until", [(text, how) for text in contexts]), True
        )
        decoding = Decoding(tokenizer, 5, (2,), GenerationSection(**section))
        for text, context in zip(found, contexts, strict=True):
            table = pa.table({"input_ids": [tokenizer(context).input_ids]})
            with evaluating(model):
                assert [text] == continue_prompts(model, table, decoding, 1, 0, "cpu")


def test_sampled_texts_do_not_depend_on_the_batch():
    model, _ = adapted("lora")
    how = {"until": [], "do_sample": True, "temperature": 1.5, "top_k": 20, "max_gen_toks": 6}
    asked = requests("generate_until", [(context, how) for context, _ in PAIRS if context])
    alone, together = (
        HarnessModel(model, word_tokenizer(), size, seed=3).generate_until(asked, True) for size in (1, 4)
    )
    assert alone == together
    assert len(set(together)) > 1


def test_a_tokenizer_that_ends_texts_does_not_end_contexts():
    """The byte tokenizer makes `bos text eos` of a text; an option follows the text, not its end."""
    model = HarnessModel(tiny(259), byte_tokenizer(), 2)
    assert model._encode_pair("ab", " cd") == ([257, *b"ab"], [*b" cd"])
    assert model.tok_encode("<bos>ab", add_special_tokens=False) == list(b"<bos>ab")


def test_what_cannot_be_done_is_said():
    model = HarnessModel(tiny(), word_tokenizer(), 2)
    for how, message in (
        ({"until": [], "max_gen_toks": 64}, "max_gen_toks: 64, but the model reads at most 64 tokens"),
        ({"until": [], "typical_p": 0.5}, "generation_kwargs: typical_p: unknown key.*allowed: do_sample"),
        ({"until": [], "do_sample": True, "temperature": 0.0}, "generation_kwargs: temperature: got 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.generate_until(requests("generate_until", [("a b", how)]), True)
    with pytest.raises(ConfigError, match="an option has 0 tokens, expected 1 to 64"):
        model.loglikelihood(requests("loglikelihood", [("a b", "")]), True)
