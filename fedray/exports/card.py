"""The model card of an exported folder, README.md: what the model is, how it is opened, and how to make it again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal

from fedray.config import dump_yaml
from fedray.experiment.restore import Restored
from fedray.exports.base import Base
from fedray.exports.folders import CLASSES, LOADER

Opener = Literal["peft", "pyreft", "transformers", "load.py"]
"""What opens an exported folder."""


@dataclass(frozen=True)
class Origin:
    """Where an exported model comes from.

    Attributes:
        summary: what the model is, in a sentence.
        scores: what was measured with it, by what that is.
        facts: further facts, by name.
        commands: what makes it again.
    """

    summary: str
    scores: Mapping[str, float | None]
    facts: Mapping[str, object] = field(default_factory=dict)
    commands: Sequence[str] = ()


def model_card(restored: Restored, origin: Origin, opener: Opener, base: Base, code: str, notes: Sequence[str]) -> str:
    """Return the text of README.md.

    Args:
        code: opens the folder, from within it.
        notes: what a user should know of the form, a sentence each.
    """
    config, entry = restored.config, restored.entry
    tags = ["fedray", "federated-learning", *(["lora"] if opener == "peft" else [])]
    library = {"peft": "peft", "pyreft": "pyreft"}.get(opener, "transformers")
    where = base.where or ("drawn at random" if config.model.path == "random" else config.model.path)
    front = [
        "---",
        *([f"base_model: {where}"] if base.where else []),
        f"library_name: {library}",
        f"tags: [{', '.join(tags)}]",
        "# license: yours to choose; mind those of the base model and of the data",
        "---",
    ]
    facts = {
        "method": f"`{entry.key}` ({entry.name or entry.class_})",
        "rounds": config.rounds,
        "task": config.task,
        "base model": f"`{where}`" + (f", revision {config.model.revision}" if config.model.revision else ""),
        "data": f"`{config.data.source or config.data.class_}`, assigned to clients by `{config.partition.name}`",
        "classes": ", ".join(restored.label_names),
        "seed": config.seed,
        **origin.facts,
    }
    versions = ", ".join(f"{name} {version(name)}" for name in ("fedray", "torch", "transformers", "peft"))
    scores = [
        f"| {name} | {'undefined' if value is None else format(value, '.4g')} |"
        for name, value in origin.scores.items()
    ]
    return "\n".join(
        [
            *front,
            f"# {config.name}: {entry.key}{'' if restored.client is None else f', client {restored.client.id}'}",
            "",
            origin.summary,
            "",
            "## Open it",
            "",
            "```python",
            code,
            "```",
            "",
            *(line for note in notes for line in (note, "")),
            "## What it is",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items() if value != ""),
            "",
            "## Scores",
            "",
            "| | |",
            "|---|---|",
            *scores,
            "",
            "## Make it again",
            "",
            "```sh",
            *origin.commands,
            "```",
            "",
            f"with {versions}, and this `config.yaml`; its paths are those of the machine that trained:",
            "",
            "```yaml",
            dump_yaml(config.model_copy(update={"method": (entry,)})).rstrip(),
            "```",
            "",
        ]
    )


def opening_code(restored: Restored, opener: Opener, base: Base) -> str:
    """Return the Python code that opens the folder, from within it."""
    config = restored.config
    if opener == "load.py":
        return "\n".join(
            [
                "from transformers import AutoTokenizer",
                "",
                f"from {LOADER.removesuffix('.py')} import load",
                "",
                'model = load(".")',
                'tokenizer = AutoTokenizer.from_pretrained("base")',
            ]
        )
    cls = CLASSES[config.task]
    if opener == "transformers":
        return "\n".join(
            [
                f"from transformers import {cls}, AutoTokenizer",
                "",
                f'model = {cls}.from_pretrained(".").eval()',
                'tokenizer = AutoTokenizer.from_pretrained(".")',
            ]
        )
    mismatched = "" if config.task == "causal_lm" else ", ignore_mismatched_sizes=True"
    # pyreft's interventions are float32, and compute in the base model's type.
    dtype = "float32" if opener == "pyreft" else str(restored.model.dtype).removeprefix("torch.")
    remote = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    revision = f", revision={json.dumps(config.model.revision)}" if config.model.revision and base.where else ""
    weights = json.dumps(base.where or "base")
    lines = [
        *(["import torch", "from pyreft import ReftModel"] if opener == "pyreft" else ["from peft import PeftModel"]),
        f"from transformers import AutoConfig, {cls}, AutoTokenizer",
        "",
        f'config = AutoConfig.from_pretrained("base"{remote})',
        f"base = {cls}.from_pretrained(",
        f'    {weights}, config=config, dtype="{dtype}"{mismatched}{revision}{remote}',
        ")",
    ]
    if opener == "peft":
        lines.append('model = PeftModel.from_pretrained(base, ".").eval()')
    else:
        whole = ", include_model=True" if base.absent or config.task != "causal_lm" else ""
        lines += [
            f'model = ReftModel.load(".", base{whole})',
            "for key, intervention in model.interventions.items():  # pyreft makes W and b in bfloat16",
            '    intervention.float().load_state_dict(torch.load(f"intkey_{key}.bin", weights_only=True))',
            "model.model.eval()",
        ]
    return "\n".join([*lines, 'tokenizer = AutoTokenizer.from_pretrained("base")'])


def reft_code(restored: Restored) -> str:
    """Return the Python code that calls a ReftModel with one text, whose tokens pyreft must be told."""
    place = next(iter(restored.adapter.places.values()))
    where, layers = place.positions, len({name.rpartition(".")[0] for name in restored.adapter.places})
    first, last = f"list(range({where.prefix}))", f"list(range(n - {where.suffix}, n))"
    if where.everything:
        parts = ["list(range(n))"]
    elif where.tied:
        parts = [" + ".join(part for part, number in ((first, where.prefix), (last, where.suffix)) if number)]
    else:
        parts = [part for part, number in ((first, where.prefix), (last, where.suffix)) if number]
    locations = " + ".join(f"[[{part}]] * {layers}" for part in parts)
    return "\n".join(
        [
            'inputs = tokenizer("A text.", return_tensors="pt")',
            'n = inputs["input_ids"].shape[1]',
            f"places = {locations}",
            'inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}',
            'logits = model(inputs, unit_locations={"sources->base": (None, places)})[1].logits',
        ]
    )
