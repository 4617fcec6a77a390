"""A language model on the language part of a model that also reads images or sound, where transformers has none."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedray.models.on_base import OnBase


class LanguageModel(OnBase, GenerationMixin):  # type: ignore[misc]
    """The part for `class_on_base`: an output layer, as these models have it for their language part."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def add_head(self: Any, config: PreTrainedConfig) -> None:
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def can_generate(cls) -> bool:
        """Return True; transformers recognises only classes that derive from its mixin directly."""
        return True

    def get_output_embeddings(self: Any) -> nn.Module:
        head: nn.Module = self.lm_head
        return head

    def forward(
        self: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any
    ) -> CausalLMOutputWithPast:
        """Return the logits [examples, tokens, vocabulary] and the cache of keys and values.

        Args:
            input_ids: [examples, tokens].
            attention_mask: as input_ids, 0 at padding; None: there is none.
            inputs: others of the base model.
        """
        outputs = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        logits = self.lm_head(outputs.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)
