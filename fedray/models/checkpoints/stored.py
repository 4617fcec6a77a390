"""The configuration that a checkpoint has: of a folder, a hub id or a GGUF file, and of the language part of a model
that also reads images or sound."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from fedray.config import ModelConfig
from fedray.errors import ConfigError
from fedray.models.checkpoints.files import stored_file
from fedray.models.load_options import LoadOptions
from fedray.models.paths import find_package, gguf_options, remedy, resolve_path

ADAPTER = "adapter_config.json"
OF_THE_WHOLE = (
    *("architectures", "id2label", "label2id", "problem_type", "tie_word_embeddings"),
    *("_name_or_path", "_commit_hash"),
)
"""Fields in which the configuration of the whole model counts for its language part."""
PEFT_CLASSES = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_CLS": "AutoPeftModelForSequenceClassification"}

PLAIN_TYPES = {"F64", "F32", "F16", "BF16"}
"""Types in GGUF files that are not quantised."""

log = logging.getLogger(__name__)


def stored_configuration(model: ModelConfig) -> PreTrainedConfig:
    """Return the checkpoint's configuration; of a model with several parts, that of the part which reads text.

    Raises:
        ConfigError: there is none, or it cannot be read or reached.
    """
    if gguf_options(model.path):
        _require_gguf(model)
    else:
        _refuse_adapter(model)
    try:
        whole: PreTrainedConfig = AutoConfig.from_pretrained(
            resolve_path(model.path),
            revision=model.revision or "main",
            trust_remote_code=model.trust_remote_code,
            **gguf_options(model.path),
        )
    except ConfigError:
        raise
    except Exception as error:  # transformers, huggingface_hub and json each raise their own kinds
        raise ConfigError(f"model.path: no configuration could be read from {model.path!r}: {remedy(error)}") from error
    text = text_part(whole)
    LoadOptions(part_of="" if text is None else whole.model_type).store(text or whole)
    if text is None:
        return whole
    for name in OF_THE_WHOLE:
        if hasattr(whole, name):
            setattr(text, name, getattr(whole, name))
    return text


def text_part(whole: PreTrainedConfig) -> PreTrainedConfig | None:
    """Return the configuration of the language part of a model that also reads images or sound; None: it is none."""
    text = getattr(whole, "text_config", None)
    return text if isinstance(text, PreTrainedConfig) else None


def warn_of_adapter(model: ModelConfig) -> None:
    """Say that a peft adapter in the checkpoint's folder is not used."""
    if stored_file(model, ADAPTER) is not None:
        log.warning(
            "%s holds a peft adapter besides the model; only the model is used. To train on from the adapter, merge it "
            "into the model first (peft: merge_and_unload)",
            model.path,
        )


def warn_of_quantisation(model: ModelConfig) -> None:
    """Say in which types a GGUF file holds its weights, and what becomes of them."""
    from gguf import GGUFReader

    file = Path(resolve_path(model.path)) / gguf_options(model.path)["gguf_file"]
    kinds = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors)
    if set(kinds) <= PLAIN_TYPES:
        return
    listed = ", ".join(f"{kind} ({count} tensors)" for kind, count in kinds.most_common())
    log.warning(
        "%s holds weights of the types %s; they are dequantised to %s, and differ from the original model's by as much "
        "as they were rounded",
        model.path,
        listed,
        model.dtype,
    )


def _require_gguf(model: ModelConfig) -> None:
    if find_package("gguf") is None:
        raise ConfigError(
            f"model.path: {model.path!r} needs the package gguf; install the extra (`pip install 'fedray[gguf]'`), or "
            "name a model in transformers' format"
        )


def _refuse_adapter(model: ModelConfig) -> None:
    """Say what to do with a folder that holds an adapter and no model: its base is another model."""
    file = stored_file(model, ADAPTER)
    if file is None or stored_file(model, "config.json") is not None:
        return
    fields: dict[str, Any] = json.loads(file.read_text("utf-8"))
    base = fields.get("base_model_name_or_path") or "BASE"
    peft_class = PEFT_CLASSES.get(str(fields.get("task_type")), "AutoPeftModel")
    raise ConfigError(
        f"model.path: {model.path!r} holds no model but a peft adapter ({fields.get('peft_type')}) of the model "
        f"{base!r}; name that model to start without the adapter, or merge the two once and name the merged folder: "
        f"peft.{peft_class}.from_pretrained({model.path!r}).merge_and_unload().save_pretrained('MERGED'); "
        f"transformers.AutoTokenizer.from_pretrained({base!r}).save_pretrained('MERGED')"
    )
