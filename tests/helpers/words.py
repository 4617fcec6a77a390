"""A tokenizer that begins every text with bos and adds nothing at its end, as Llama's does: one token per word."""

from string import ascii_lowercase

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = tuple(ascii_lowercase)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: 0 is pad, 1 bos, 2 eos, 3 unknown, and the words follow."""
    names = ("<pad>", "<s>", "</s>", "<unk>", *WORDS)
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
