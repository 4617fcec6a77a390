"""A weight of the second branch per example: how similar the example is to a client's own (FedDPA, arXiv 2403.19211).

    α(x) = λ · mean over i of cos(h(x), h(x_i)) = v · h(x)/‖h(x)‖,      v = λ · mean over i of h(x_i)/‖h(x_i)‖

h(x) [d] is the last hidden state of the prompt's last token, as the model computes it with its second branch alone
(α = 1). So a client's examples x_i are one vector v, which a method loads into the group "gate". In evaluation a hook
computes h and α(x) before the model's own pass: twice the time, for every way of evaluating. A decoding step keeps the
α of its prompt.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedray.adapters.context import ForwardContext
from fedray.adapters.draws import draw_zeros
from fedray.adapters.group import Entry, Group
from fedray.adapters.layout import Slot
from fedray.adapters.mixers import zero_linear
from fedray.errors import ConfigError

READ = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
"""What the base model reads of a pass; not the cache, which the model's own pass fills."""


def attach_similarity(model: nn.Module, context: ForwardContext) -> Group:
    """Compute α(x) before every evaluation pass of the model; return the group "gate", v [1, d].

    Raises:
        ConfigError: the model has an encoder and a decoder, so that a text has no single last hidden state.
    """
    config: Any = model.config
    if config.is_encoder_decoder:
        raise ConfigError(
            "similarity to a client's examples needs one last hidden state per text, and an encoder-decoder model has "
            "two; choose an encoder or a decoder, or another method"
        )
    text = config.get_text_config()
    width = getattr(text, "word_embed_proj_dim", text.hidden_size)  # OPT's last hidden state has the embeddings' width
    gate = zero_linear(1, width, next(model.parameters()).device)
    model.add_module("lora_gate", gate)
    kept: Tensor | None = None

    @torch.no_grad()
    def weigh(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal kept
        batch = context.batch
        if model.training or batch is None:
            return
        if not batch.decoding:
            batch.alpha = torch.ones(batch.shape[0], device=batch.device)
            states = last_states(model, context, context.inputs(args, kwargs))
            kept = gate(functional.normalize(states, dim=-1)).squeeze(-1)
        batch.alpha = kept

    model.register_forward_pre_hook(weigh, with_kwargs=True)
    entry = Entry(Slot("lora_gate", "v", tuple(gate.weight.shape)), cast(nn.Parameter, gate.weight))
    return Group("gate", [entry], draw_zeros)


def last_states(model: nn.Module, context: ForwardContext, inputs: Mapping[str, Any]) -> Tensor:
    """Return h of every example of the context's batch, float32 [examples, d].

    Args:
        inputs: the batch's, as the model reads them.
    """
    base: Any = model.base_model
    assert context.batch is not None
    states: Tensor = base(**{name: inputs[name] for name in READ if inputs.get(name) is not None}).last_hidden_state
    places = context.batch.last_of_prompt
    return states[torch.arange(len(places), device=places.device), places].float()
