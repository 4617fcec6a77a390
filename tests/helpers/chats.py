"""Chat templates in the shapes of well-known models, and small tokenizers with their tokens.

The templates are written for these tests: they have the structure that makes each family special, not its wording.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedray.models.tokenizer import byte_tokenizer

LLAMA_3 = (
    "{{ bos_token }}{% for turn in messages %}<|start_header_id|>{{ turn.role }}<|end_header_id|>\n\n"
    "{{ turn.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""The template itself writes the token that begins a text; contents are trimmed."""

QWEN_2_5 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A system turn appears if there is none."""

QWEN_3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for turn in messages %}{% if turn.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for turn in messages %}{% if turn.role == 'assistant' %}"
    "{% set thought, answer = '', turn.content %}"
    "{% if '</think>' in answer %}{% set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set answer = answer.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + answer + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n' + answer + '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The last answer always has a thought, empty if need be; earlier answers lose theirs."""

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for turn in messages %}"
    "{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if turn.role == 'assistant' else turn.role }}\n"
    "{{ turn.content | trim }}<end_of_turn>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}"
)
"""Another name for the assistant, no system turn, roles alternate."""

MISTRAL = (
    "{% set system = '' %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}"
    "{% endif %}{{ bos_token }}{% for turn in turns %}{% if turn.role == 'user' %}"
    "[INST] {% if loop.index0 >= turns | length - 2 %}{{ system }}{% endif %}{{ turn.content }}[/INST]"
    "{% else %}{{ ' ' + turn.content + eos_token }}{% endif %}{% endfor %}"
)
"""No generation prompt; the system turn moves into the last user turn; end-of-text ends the assistant's turns."""

TOKENS = {
    LLAMA_3: ("<|begin_of_text|>", "<|end_of_text|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    QWEN_2_5: (None, "<|endoftext|>", ("<|im_start|>", "<|im_end|>")),
    QWEN_3: (None, "<|endoftext|>", ("<|im_start|>", "<|im_end|>", "<think>", "</think>")),
    GEMMA: ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    MISTRAL: ("<s>", "</s>", ("[INST]", "[/INST]")),
}
"""The tokens that begin and end a text, and the others, by template."""

WORDS = ("good", " good", " world", "the", " the", " answer", "is", " is", "yes", ".\n\n")
"""Texts that are one token of the small tokenizers with merges."""


def byte_level(added: Sequence[str] = (), bos: str | None = None, eos: str = "<eos>") -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte, and further tokens. It begins every text with `bos`."""
    backend = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    return _complete(backend, added, bos, eos, split_special_tokens=False)


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte and the tokens that a template of `TOKENS` writes."""
    bos, eos, added = TOKENS[template]
    tokenizer = byte_level(added, bos, eos)
    tokenizer.chat_template = template
    return tokenizer


def merged_bytes(trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer as GPT-2's, in which the `WORDS` are tokens.

    Args:
        trim_offsets: whether its offsets leave out blanks, as RoBERTa's do.
    """
    letters = [token for token in byte_tokenizer().get_vocab() if len(token) == 1]
    words = [word.replace(" ", "Ġ").replace("\n", "Ċ") for word in WORDS]
    vocabulary, merges = _merged(sorted(letters), words)
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = _complete(backend, (), None, "<eos>")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer as Llama 2's: blanks become `▁`, one stands before the text, and unknown letters are
    bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [word.replace(" ", "▁") for word in WORDS]
    vocabulary, merges = _merged([*pieces, *sorted(set("".join(words)))], words)
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _complete(backend, (), "<s>", "</s>")


def unigram() -> PreTrainedTokenizerFast:
    """Return a unigram tokenizer as T5's and XLNet's: Metaspace, and a normalizer that changes letters."""
    words = [word.replace(" ", "▁") for word in WORDS]
    letters = sorted(set("".join(words)) | {"f", "i", "x"})
    vocabulary = [("<unk>", 0.0), *((word, -1.0) for word in words), *((letter, -9.0) for letter in letters)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _complete(backend, (), None, "</s>")


def word_piece() -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer as BERT's: no token has a blank."""
    words = sorted({"[UNK]", "go", "##ods", ".", "here", *(word.strip() for word in WORDS)} - {""})
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _complete(backend, (), None, "[SEP]")


def shown(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], labels: Sequence[int]) -> str:
    """Return tokens as text, with those that have a loss between ⟦ and ⟧."""
    text, start = "", 0
    for i in range(1, len(labels) + 1):
        if i == len(labels) or (labels[i] == -100) != (labels[start] == -100):
            piece = tokenizer.decode(input_ids[start:i], clean_up_tokenization_spaces=False)
            text += piece if labels[start] == -100 else f"⟦{piece}⟧"
            start = i
    assert all(label in (-100, token) for token, label in zip(input_ids, labels, strict=True))
    return text


def _merged(letters: Sequence[str], words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a BPE that makes each word one token: letter by letter from its start, or of a
    first letter and an earlier word."""
    merges: list[tuple[str, str]] = []
    for i, word in enumerate(words):
        whole = word[1:] in words[:i]
        merges += [(word[0], word[1:])] if whole else [(word[:end], word[end]) for end in range(1, len(word))]
    tokens = dict.fromkeys([*letters, *(first + second for first, second in merges)])
    return {token: i for i, token in enumerate(tokens)}, list(dict.fromkeys(merges))


def _complete(
    backend: Tokenizer, added: Sequence[str], bos: str | None, eos: str, **settings: bool
) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([token for token in (bos, eos, *added) if token])
    backend.post_processor = None
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos, **settings)
