"""Which models are refused where they are loaded, and what is remembered about the others.

The toys are models of a hub's own code: a language model that reads the next token, one that averages over padding, and
so on; each is one line away from a model that passes.
"""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
import torch
from families import tiny_config, tiny_family
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, GPT2LMHeadModel, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from fedray.config import ModelConfig
from fedray.errors import ConfigError
from fedray.evaluation.generation import Decoding, generate
from fedray.models import backbone, checks
from fedray.models.architecture import architecture
from fedray.models.backbone import load_backbone
from fedray.models.checks import check_beams, check_model, reads_left_padding
from fedray.types import Task


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, width: int = 8, vocab_size: int = 50, **fields: Any):
        self.width, self.vocab_size = width, vocab_size
        super().__init__(**{"pad_token_id": 0, **fields})


class Toy(PreTrainedModel):
    """A token's state is its embedding plus a small part of the earlier ones', `read` says of which."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.output = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        states = self.embed(input_ids)
        return SimpleNamespace(logits=self.output(states + 0.01 * self.read(states, attention_mask[:, :, None])))

    def read(self, states: Tensor, mask: Tensor) -> Tensor:
        """The mean of the tokens so far."""
        return (states * mask).cumsum(1) / mask.cumsum(1).clamp(min=1)


class ReadsNext(Toy):
    def read(self, states: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([(states * mask)[:, 1:], torch.zeros_like(states[:, :1])], 1)


class ReadsAll(Toy):
    def read(self, states: Tensor, mask: Tensor) -> Tensor:
        return ((states * mask).sum(1) / mask.sum(1))[:, None].expand_as(states)


class ReadsNeighbours(Toy):
    """Every text reads the first text of its batch."""

    def read(self, states: Tensor, mask: Tensor) -> Tensor:
        return states[:1].expand_as(states).cumsum(1)


class ReadsWidth(Toy):
    """Reads how long the batch is, as position embeddings that count from the end do."""

    def read(self, states: Tensor, mask: Tensor) -> Tensor:
        return torch.full_like(states, float(states.shape[1]))


class DrawsInTraining(Toy):
    """Chooses at random in training, as the routers of some mixtures of experts do."""

    def read(self, states: Tensor, mask: Tensor) -> Tensor:
        return states * (1 + torch.rand(())) if self.training else states


class Normalised(Toy):
    """Normalises over the batch, in training only."""

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.norm = nn.BatchNorm1d(config.width)

    def read(self, states: Tensor, mask: Tensor) -> Tensor:
        return cast(Tensor, self.norm(super().read(states, mask).mT).mT)


class CannotGenerate(ReadsNext, GenerationMixin):
    """Reads the next token, and its generation fails, as ProphetNet's does."""

    def prepare_inputs_for_generation(self, *_: Any, **__: Any) -> dict[str, Any]:
        raise RuntimeError("position_ids are incorrect")


class PredictsTwo(Toy):
    """Predicts the next two tokens after each token, as ProphetNet does."""

    def forward(self, **inputs: Any) -> Any:
        logits = super().forward(**inputs).logits
        return SimpleNamespace(logits=torch.stack([logits, logits], dim=1))


class ToyClassifier(Toy):
    """Reads the mean of a text's tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        mask = attention_mask[:, :, None]
        return SimpleNamespace(logits=self.output(self.pooled(self.embed(input_ids), mask)))

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        return (states * mask).sum(1) / mask.sum(1)


class AveragesPadding(ToyClassifier):
    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        return states.mean(1)


class ReadsLastColumn(ToyClassifier):
    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        return (states * mask).sum(1) / mask.sum(1) + 0.01 * states[:, -1]


class Centred(ToyClassifier):
    """Subtracts the mean over the batch, as a normalisation over the batch does."""

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        pooled = super().pooled(states, mask)
        return pooled - 0.1 * pooled.mean(0)


class NeedsGpu(Toy):
    def forward(self, **_: Any) -> Any:
        raise RuntimeError("FlashAttention only supports CUDA")


def made(kind: type[Toy], spread: float = 1.0, **fields: Any) -> Toy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(ToyConfig(**fields))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=spread)
    return model


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """As `architecture` and `load_backbone` make them."""
    for name, value in model.config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(model.config, name, 0.0)
    with torch.random.fork_rng(devices=[]):
        quiet = type(model)(model.config)
    quiet.load_state_dict(model.state_dict())
    return quiet


LATER = "reads the tokens after the one that it predicts"
PADDING = "reads padding"
OTHERS = "reads the other texts of a batch"


@pytest.mark.parametrize("spread", [1.0, 0.02])
@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        (Toy, "causal_lm", None),
        (ReadsNext, "causal_lm", LATER),
        (ReadsAll, "causal_lm", LATER),
        (ReadsNeighbours, "causal_lm", OTHERS),
        (ReadsWidth, "causal_lm", PADDING),
        (CannotGenerate, "causal_lm", LATER),
        (Normalised, "causal_lm", OTHERS),
        (PredictsTwo, "causal_lm", "one distribution per token"),
        (DrawsInTraining, "causal_lm", "draws random numbers of its own in training"),
        (ToyClassifier, "classification", None),
        (AveragesPadding, "classification", PADDING),
        (ReadsLastColumn, "classification", PADDING),
        (Centred, "regression", OTHERS),
        (ReadsAll, "classification", None),  # a classifier may read both ways
    ],
)
def test_toys(kind: type[Toy], task: Task, message: str | None, spread: float) -> None:
    """Whatever the size of the weights, and the global generator stays where it is."""
    before = torch.get_rng_state()
    model = made(kind, spread)
    if kind is ReadsAll and task == "classification":
        model.forward = lambda input_ids, attention_mask: SimpleNamespace(  # type: ignore[method-assign]
            logits=Toy.forward(model, input_ids, attention_mask).logits[:, 0]
        )
    if message is None:
        assert check_model("toy", model, task, None) is False
    else:
        with pytest.raises(ConfigError, match=message):
            check_model("toy", model, task, None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype) -> None:
    """A small model is checked as a float32 copy and stays as it is."""
    model = made(Toy, 0.02).to(dtype)
    check_model("toy", model, "causal_lm", None)
    assert model.dtype == dtype
    with pytest.raises(ConfigError, match=LATER):
        check_model("toy", made(ReadsNext, 0.02).to(dtype), "causal_lm", None)


def test_large_models_of_half_types_are_checked_in_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SMALL", 0)
    for family in ("gpt2", "llama", "bert"):
        model = without_dropout(tiny_family(family, "causal_lm", spread=0.2, is_decoder=True)).to(torch.bfloat16)
        check_model(family, model, "causal_lm", None)
    with pytest.raises(ConfigError, match=LATER):
        check_model("bert", tiny_family("bert", "causal_lm", spread=0.2).to(torch.bfloat16), "causal_lm", None)
    with pytest.raises(ConfigError, match=PADDING):
        check_model("xlnet", tiny_family("xlnet", "classification", spread=0.2).bfloat16(), "classification", None)


@pytest.mark.parametrize("fields", [{"pad_token_id": None}, {"vocab_size": 1}])
def test_what_cannot_be_checked_is_said(fields: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    check_model("toy", made(ReadsNext, **fields), "causal_lm", None)
    assert "too small to be checked" in caplog.text


def test_a_model_that_does_not_run_here_is_not_refused(caplog: pytest.LogCaptureFixture) -> None:
    check_model("toy", made(NeedsGpu), "causal_lm", None)
    assert "cannot be checked for reading later tokens or padding" in caplog.text
    assert "FlashAttention only supports CUDA" in caplog.text


def saved(folder: Path, family: str, task: Task, **fields: Any) -> ModelConfig:
    tiny_family(family, task, **fields).save_pretrained(folder)
    return ModelConfig(path=str(folder))


def load(model: ModelConfig, task: Task, cache: Path) -> Any:
    arch = architecture(model, task, 3, None, 256)
    return load_backbone(model, arch, task, 0, "cpu", cache)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "camembert", "xlm-roberta", "bert-generation"])
def test_encoders_read_forwards_as_language_models(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The same logits as transformers' own with `is_decoder`; a later token changes none of them."""
    model = load(saved(tmp_path / "model", family, "causal_lm"), "causal_lm", tmp_path / "cache")
    ids = torch.tensor([[257, 5, 6, 7, 8], [257, 5, 6, 9, 10]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(logits[0, :3], logits[1, :3])
    assert not torch.equal(logits[0, 3], logits[1, 3])
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "model", is_decoder=True, pad_token_id=256).eval()
    assert torch.equal(own(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, logits)
    assert ("trained to read both ways" in caplog.text) == (family != "bert-generation")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_decoders_are_not_warned_of(tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedray"):
        model = load(saved(tmp_path / "model", family, "causal_lm"), "causal_lm", tmp_path / "cache")
    assert not [record for record in caplog.records if record.name.startswith("fedray")]
    assert not reads_left_padding(model)


def test_a_model_that_leaks_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    """XLM reads both ways unless its configuration says otherwise, as the message says."""
    model = saved(tmp_path / "model", "xlm", "causal_lm", spread=0.2)
    with pytest.raises(ConfigError, match=f"{LATER}.*model.config"):
        load(model, "causal_lm", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    load(model.model_copy(update={"config": {"causal": True}}), "causal_lm", tmp_path / "cache")


def test_a_head_that_reads_padding_is_refused_and_pooling_helps(tmp_path: Path) -> None:
    """XLNet's own head reads the last column."""
    model = saved(tmp_path / "model", "xlnet", "classification", spread=0.2)
    with pytest.raises(ConfigError, match=r"reads padding.*model\.pooling to last or mean"):
        load(model, "classification", tmp_path / "cache")
    for pooling in ("last", "mean"):
        load(model.model_copy(update={"pooling": pooling}), "classification", tmp_path / "cache")


def test_a_base_that_reads_padding_is_refused_for_good(tmp_path: Path) -> None:
    """FNet mixes all columns."""
    model = saved(tmp_path / "model", "fnet", "classification", spread=0.2)
    with pytest.raises(ConfigError, match=r"reads padding.*model\.pooling"):
        load(model, "classification", tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"choose another model$"):
        load(model.model_copy(update={"pooling": "mean"}), "classification", tmp_path / "cache")


def test_the_check_is_made_once_per_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it found is in the node's file: BART's decoder counts positions from the first column, also of padding."""
    model, calls = saved(tmp_path / "model", "bart", "causal_lm", spread=0.2), []

    def counted(*args: Any) -> bool:
        calls.append(args)
        return check_model(*args)

    monkeypatch.setattr(backbone, "check_model", counted)
    for _ in range(2):
        assert reads_left_padding(load(model, "causal_lm", tmp_path / "cache"))
    assert len(calls) == 1


def test_code_of_the_hubs_own_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with code in it, as trust_remote_code loads it."""
    (tmp_path / "model").mkdir()
    code = (
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class LeakyConfig(GPT2Config):\n    model_type = 'leaky'\n"
        "class Leaky(GPT2LMHeadModel):\n    config_class = LeakyConfig\n"
        "    def forward(self, **inputs):\n        output = super().forward(**inputs)\n"
        "        output.logits = output.logits + 0.1 * output.logits.flip(1)\n        return output\n"
    )
    (tmp_path / "model" / "leaky.py").write_text(code)
    GPT2LMHeadModel(tiny_config("gpt2")).save_pretrained(tmp_path / "model")
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    fields |= {
        "model_type": "leaky",
        "architectures": ["Leaky"],
        "auto_map": {"AutoConfig": "leaky.LeakyConfig", "AutoModelForCausalLM": "leaky.Leaky"},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ConfigError, match=LATER):
        load(ModelConfig(path=str(tmp_path / "model"), trust_remote_code=True), "causal_lm", tmp_path / "cache")


@pytest.mark.parametrize("family", ["bart", "recurrent_gemma"])
def test_generation_of_a_model_that_reads_left_padding(tmp_path: Path, family: str) -> None:
    """One prompt at a time: as each prompt alone, whatever the batch size. RecurrentGemma's convolution reads what the
    mask hides; of its own padding token it reads zeros, of the tokenizer's it may not."""
    model = load(saved(tmp_path / "model", family, "causal_lm", spread=0.2), "causal_lm", tmp_path / "cache")
    assert reads_left_padding(model)
    ids = [[257, 5, 6, 7, 8, 9, 10], [257, 11, 12], [257, 13, 14, 15]]
    table = pa.table({"input_ids": ids, "labels": [[-100] * (len(row) - 1) + row[-1:] for row in ids]})
    tokenizer: Any = SimpleNamespace(eos_token_id=258, decode=lambda tokens, **_: str(tokens))
    decoding = Decoding(tokenizer, 4, (258,))
    expected = [generate(model, table.slice(row, 1), decoding, 1, 12, "cpu") for row in range(3)]
    assert generate(model, table, decoding, 3, 12, "cpu") == [text for (text,) in expected]


@pytest.mark.parametrize(
    ("family", "reason"), [("rwkv", "Rwkv.*cannot be reordered"), ("minimax", "its cache keeps what other beams have")]
)
def test_a_model_whose_cache_cannot_follow_beams(family: str, reason: str) -> None:
    """RWKV's state is a list of tensors, which transformers refuses to reorder; of MiniMax's cache it reorders the keys
    and values, and not the states of linear attention."""
    model = tiny_family(family, "causal_lm", spread=0.3)
    for held in (model, model.bfloat16()):
        with pytest.raises(ConfigError, match=f"^evaluation.generation.num_beams: 4, but .* with beams: {reason}"):
            check_beams(held, 4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "bart", "recurrent_gemma"])
def test_models_that_can_search_with_beams(family: str) -> None:
    check_beams(tiny_family(family, "causal_lm", spread=0.3), 4)
    check_beams(tiny_family(family, "causal_lm").bfloat16(), 4)


FAMILIES: list[tuple[str, Task]] = [
    *(
        (family, "causal_lm")
        for family in ("gpt2", "llama", "mistral", "gemma2", "qwen3", "phi3", "mamba", "opt", "bloom")
    ),
    *((family, "causal_lm") for family in ("mixtral", "falcon", "gpt_neo", "bloom")),
    *((family, "classification") for family in ("bert", "roberta", "distilbert", "deberta-v2", "albert", "modernbert")),
    *((family, "classification") for family in ("gpt2", "llama", "mpnet", "t5", "bart")),
]


@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_families_that_pass(family: str, task: Task) -> None:
    """With the weights that the family draws itself, and with larger ones."""
    for spread in (None, 0.2):
        model = without_dropout(tiny_family(family, task, spread=spread))
        assert check_model(family, model, task, None) is False
