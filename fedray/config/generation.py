"""The section `evaluation.generation`: how a language model's texts are decoded."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedray.config.section import PositiveInt, Section

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": None}
"""Fields that only sampling reads, and the values with which they do nothing."""
SEARCHING = {"length_penalty": 1.0, "early_stopping": False}
"""The same of beam search."""


class GenerationSection(Section):
    """Greedy by default. The fields have the names and meanings of transformers' `GenerationConfig`; what the model's
    own generation_config says does not count."""

    num_beams: PositiveInt = 1
    """Beam search with this many beams; 1: none."""
    length_penalty: float = 1.0
    """With beams: a text's score is its log-probability / tokens^length_penalty; above 0 favours long texts."""
    early_stopping: bool | Literal["never"] = False
    """With beams: true ends the search with the first `num_beams` complete texts, `never` only when no better text is
    possible, false when one is unlikely."""
    do_sample: bool = False
    """Draw each token instead of taking the most likely one. The draws of an example are keyed by seed, round, client,
    split and row."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """When sampling: logits are divided by it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """When sampling: only the most likely tokens that together have this probability."""
    top_k: PositiveInt | None = None
    """When sampling: only this many most likely tokens; null: all (transformers: 50)."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 makes tokens of the prompt and of the text so far less likely (Keskar et al., arXiv 1909.05858)."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """No sequence of this many tokens, the prompt's included, occurs twice; 0: any may."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Generation ends with any of these texts, and the generated text is cut before it."""
    end_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tokens of the vocabulary that end a text, besides the tokenizer's end token and that of the chat template's
    turns; for example "<|eot_id|>"."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                f"do_sample: true and num_beams: {self.num_beams}: beams are searched, not sampled; choose one of them"
            )
        for needed, fields, active in (
            ("do_sample: true", SAMPLING, self.do_sample),
            ("num_beams above 1", SEARCHING, self.num_beams > 1),
        ):
            given = [name for name, default in fields.items() if getattr(self, name) != default]
            if given and not active:
                raise ValueError(f"{given[0]}: {getattr(self, given[0])} has no effect without {needed}")
        return self
