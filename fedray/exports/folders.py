"""Writes the folders that peft, pyreft, transformers and the loader open."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedray.adapters.adapter import Adapter
from fedray.adapters.heads import head_modules
from fedray.adapters.libraries import silent
from fedray.adapters.mixers import Router, TokenMixer
from fedray.adapters.portable import SingleLora
from fedray.adapters.reft import SUBTRACTING, Place
from fedray.exports import loader
from fedray.exports.base import Base, named_head
from fedray.models.load_options import LoadOptions
from fedray.types import Task

LOADER = "load.py"
CLASSES: Mapping[Task, str] = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
}
"""transformers' classes by task."""
TASKS: Mapping[Task, str] = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal_lm": "CAUSAL_LM"}
"""peft's names of the tasks."""
KINDS = {
    "LoreftIntervention": "loreft",
    "DireftIntervention": "direft",
    "NoreftIntervention": "noreft",
    "NodireftIntervention": "nodireft",
}
"""pyreft's classes by kind. Of the files of all but the first it cannot make the intervention again."""


def write_peft(folder: Path, model: PreTrainedModel, lora: SingleLora, base: Base, task: Task) -> None:
    """Write a folder for `PeftModel.from_pretrained`.

    Args:
        model: without its adapter.
    """
    import peft

    kept = [*head_modules(model), *dict.fromkeys(name.rpartition(".")[0] for name in base.absent)]
    transposed = any(isinstance(model.get_submodule(path), Conv1D) for path in lora.factors)
    peft.LoraConfig(
        task_type=TASKS[task],
        base_model_name_or_path=base.where or str(folder / "base"),
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated as int, used as a number
        target_modules=list(lora.factors),
        modules_to_save=kept or None,
        fan_in_fan_out=transposed,
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{path}.lora_{part}.weight": torch.from_numpy(np.ascontiguousarray(getattr(factors, part)))
        for path, factors in lora.factors.items()
        for part in ("A", "B")
    }
    for name, tensor in _beside(model, base).items():
        tensors[f"base_model.model.{name}"] = tensor
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def pyreft_opens(adapter: Adapter, model: PreTrainedModel) -> bool:
    """Return whether `ReftModel.load` can open the adapter's interventions on this model."""
    with silent():  # pyvene announces what is not installed
        from pyvene.models.intervenable_modelcard import type_to_module_mapping

    known = all(KINDS[type(place.own).__name__] == "loreft" for place in adapter.places.values())
    return known and type(model) in type_to_module_mapping


def write_pyreft(folder: Path, adapter: Adapter, model: PreTrainedModel, base: Base) -> None:
    """Write a folder for `ReftModel.load`: first the interventions of the prefix, or of both ends, block by block,
    then those of the suffix.

    Args:
        model: without its adapter.
    """
    with silent():  # pyvene announces what is not installed
        import pyreft

    places = sorted(adapter.places.items(), key=lambda item: where_of(item[0]))
    representations = [
        {
            "layer": block_of(name),
            "component": "block_output",
            "low_rank_dimension": place.own.learned_source.out_features,  # type: ignore[union-attr]
            "intervention": place.own,
        }
        for name, place in places
    ]
    with silent():  # and that the folder exists
        pyreft.ReftModel(pyreft.ReftConfig(representations=representations), model).save(str(folder))
    if beside := _beside(model, base):
        torch.save(beside, folder / "pytorch_model.bin")


def write_loader(
    folder: Path, adapter: Adapter | SingleLora | None, model: PreTrainedModel, base: Base, task: Task
) -> None:
    """Write a folder with a loader of its own.

    Args:
        adapter: None: all that was trained is in the weights.
        model: without its adapter.
    """
    options = LoadOptions.of(model.config)
    settings: dict[str, Any] = {
        "class": CLASSES[task] if base.stock else "AutoModel",
        "base": base.where,
        "dtype": str(model.dtype).removeprefix("torch."),
        "options": {"ignore_mismatched_sizes": True} if base.stock and task != "causal_lm" else {},
        "prefix": model.base_model_prefix,
        "pooling": None if base.stock else {"kind": options.pooling, "normalised": options.normalised},
        "heads": list(head_modules(model)),
        "lora": None,
        "reft": None,
    }
    if not base.stock and "add_pooling_layer" in signature(type(model.base_model).__init__).parameters:
        settings["options"] = {"add_pooling_layer": False}
    beside = _beside(model, base)
    settings["parameters"] = list(beside)
    tensors = {f"parameter.{name}": tensor for name, tensor in beside.items()}
    if isinstance(adapter, SingleLora):
        settings["lora"] = {"layers": list(adapter.factors), "scale": adapter.scale, "mixer": "none"}
        for path, factors in adapter.factors.items():
            tensors |= {f"lora.{path}.{part}": _tensor(getattr(factors, part)) for part in ("A", "B")}
    elif adapter is not None:
        groups = [name for name in adapter.names if name not in ("head", "gate")]
        held = adapter.tensors()
        tensors |= {name: _tensor(value) for name, value in held.items() if name.partition(".")[0] in groups}
        if "gate" in adapter.names:
            tensors["gate"] = _tensor(held["gate.lora_gate.v"])
        if adapter.targets:
            settings["lora"] = _mixture(adapter)
        else:
            settings["reft"] = _interventions(adapter)
    save_file(tensors, folder / "fedray.safetensors")
    (folder / "fedray.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    shutil.copyfile(str(loader.__file__), folder / LOADER)


def where_of(name: str) -> str:
    """Return the kind of position of an intervention: prefix, suffix or tied, in alphabetical order."""
    return name.rpartition(".")[2]


def block_of(name: str) -> int:
    """Return the number of an intervention's block."""
    return int(name.rsplit(".", 2)[-2])


def _mixture(adapter: Adapter) -> dict[str, Any]:
    layer = next(iter(adapter.targets.values()))
    names = {TokenMixer: "token", Router: "router"}
    mixer = names.get(type(layer.mixing), "similarity")
    return {"layers": list(adapter.targets), "scale": layer.scale, "mixer": mixer}


def _interventions(adapter: Adapter) -> dict[str, Any]:
    place: Place = next(iter(adapter.places.values()))
    mixing = place.mixing
    return {
        "places": list(adapter.places),
        "subtracts": KINDS[type(place.own).__name__] in SUBTRACTING,
        "positions": asdict(place.positions),
        "weights": mixing.weights() if mixing is not None and mixing.constant else None,
    }


def _beside(model: PreTrainedModel, base: Base) -> dict[str, Tensor]:
    """Return what the folder holds besides the adapter: the task head, and what the base's checkpoint lacks."""
    found = dict(named_head(model))
    found |= {name: model.get_parameter(name).detach() for name in base.absent}
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(value))
