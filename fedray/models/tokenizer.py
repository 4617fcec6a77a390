"""Tokenizers: the model's own, another one, or one token per byte."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedray.config import ModelConfig
from fedray.errors import ConfigError, nearest
from fedray.models.paths import gguf_options, resolve_path

BYTES = "bytes"


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the configured tokenizer; it always has a padding token (its own, else eos, else sep).

    Raises:
        ConfigError: it cannot be found, read or reached, or has no token that could serve as padding.
    """
    name = model.tokenizer or model.path
    tokenizer = byte_tokenizer() if name == BYTES else _pretrained(name, model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end_token_id(tokenizer))
    return tokenizer


def num_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many rows of embeddings the tokenizer's tokens need."""
    return int(max(len(tokenizer), 1 + max(tokenizer.get_vocab().values())))


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a text: eos, else sep.

    Raises:
        ConfigError: it has neither.
    """
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        f"model.tokenizer: {tokenizer.name_or_path!r} has neither an eos nor a sep token; add one to its "
        "tokenizer_config.json, or name another tokenizer"
    )


def named_tokens(tokenizer: PreTrainedTokenizerBase, names: Sequence[str], field: str) -> tuple[int, ...]:
    """Return the ids of tokens that a configuration names.

    Args:
        field: the configuration's, for messages.

    Raises:
        ConfigError: the vocabulary has no such token.
    """
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name not in vocabulary:
            raise ConfigError(
                f"{field}: {name!r} is not a token of {tokenizer.name_or_path or 'the tokenizer'!r}"
                f"{nearest(name, vocabulary)}; for a text of several tokens use evaluation.generation.stop_strings"
            )
    return tuple(int(vocabulary[name]) for name in names)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token b is the UTF-8 byte b (0 to 255); 256 is pad, 257 bos and cls, 258 eos and sep.

    One text becomes `bos text eos`, a pair `bos first eos second eos`. Every text decodes to itself.
    """
    letters = _byte_letters()
    backend = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B <eos>",
        special_tokens=[("<bos>", 257), ("<eos>", 258)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        cls_token="<bos>",
        sep_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
        # A text that spells "<pad>" is five bytes, not padding.
        split_special_tokens=True,
    )


def _byte_letters() -> list[str]:
    """Return the printable letter that GPT-2's byte-level alphabet gives each byte, in the order of the bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _pretrained(name: str, model: ModelConfig) -> PreTrainedTokenizerBase:
    where = "model.tokenizer" if model.tokenizer else "model.path"
    folder = resolve_path(name)
    revision = {"revision": model.revision} if model.revision and not model.tokenizer else {}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=model.trust_remote_code, **revision, **gguf_options(name)
        )
    except Exception as error:  # transformers, huggingface_hub and tokenizers each raise their own kinds
        raise ConfigError(f"{where}: no tokenizer could be loaded from {name!r}: {_reason(error)}") from error
    return tokenizer


def _reason(error: Exception) -> str:
    """Return the first line of a loader's error, and what to do about it."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if "trust_remote_code" in text:
        return f"{first} (model.trust_remote_code: true runs its code; only for authors you know)"
    return (
        f"{first} Without a connection to the hub, name a local folder or `package:NAME`, or set HF_HOME to a folder "
        "into which it was downloaded before (with HF_HUB_OFFLINE=1 nothing waits for the network)"
    )
