"""A tokenizer of letters, a metric that every letter changes, and tables of tokens written out."""

import zlib

import pyarrow as pa

from fedray.config import Metric


class Letters:
    """Token 3 is a, 4 is b, and so on; 2 ends a text."""

    def decode(self, token_ids, *, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(chr(ord("a") + token - 3) for token in token_ids if token > 2)


class Fingerprint(Metric):
    """A number in [0, 1) that tells texts apart."""

    tasks = ("causal_lm",)
    reads = "texts"

    def compute(self, generated, references):
        return zlib.crc32(repr(list(generated)).encode()) / 2**32


def table(texts, prompt_lengths, **columns):
    labels = [[-100] * cut + text[cut:] for cut, text in zip(prompt_lengths, texts, strict=True)]
    lists = pa.list_(pa.int32())
    return pa.table({"input_ids": pa.array(texts, lists), "labels": pa.array(labels, lists), **columns})
