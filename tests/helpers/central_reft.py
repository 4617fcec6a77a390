"""Central training with pyreft: its own model, data set, trainer and generation, from fedray's base model, first values
and order of batches.

Shims, none of which changes what pyreft computes: `compute_loss` drops an argument that the installed Trainer passes
and pyreft 0.0.7 does not know, the batches come from a sampler instead of a shuffle, and a rotation may be given the
raw tensor and the random matrix that fedray has (`set_rotation`).
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, TrainingArguments

from fedray.adapters.layout import Layout

with contextlib.redirect_stdout(io.StringIO()):  # pyvene announces what is not installed
    import pyreft
    from pyreft.interventions import LowRankRotateLayer

Order = Sequence[Sequence[int]]
"""Rows of every batch of an epoch."""

Coordinates = Literal["pyreft", "relative", "absolute"]


def llama_like_tokenizer(texts: Sequence[str], folder: Path, size: int = 400) -> PreTrainedTokenizerFast:
    """Train and save a byte-level tokenizer that begins a text with <s>, does not end it, and pads with <unk>, as
    Llama's does in pyreft's scripts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        model_max_length=512,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def raw_dataset(tokenizer: Any, rows: Sequence[Mapping[str, str]], split: str, tied: bool, layers: int) -> Any:
    """Return pyreft's data set of prompts and answers with positions f7+l7.

    Args:
        rows: `instruction` (the whole prompt) and `output`.
        split: train; test has prompts only.
        layers: number of the model's blocks.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        return pyreft.ReftRawDataset(
            None,
            None,
            tokenizer,
            data_split=split,
            dataset=list(rows),
            position="f7+l7",
            num_interventions=layers if tied else 2 * layers,
            share_weights=tied,
        )


class Central:
    """A base model with pyreft's interventions on all blocks.

    Args:
        model: a base model that nothing is attached to.
        layout: of fedray's group `reft`.
        vector: first values, in that layout.
        rotation: see `set_rotation`.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        vector: Any,
        rotation: Coordinates = "pyreft",
    ) -> None:
        self.layout = layout
        places = dict.fromkeys(slot.module for slot in layout.slots)
        # pyreft has the interventions on prefixes first, and then those on suffixes.
        self.places = sorted(places, key=lambda place: (place.endswith("suffix"), _block(place)))
        rank, width = next(slot.shape for slot in layout.slots if slot.part == "W")
        rotates = any(slot.part == "R" for slot in layout.slots)
        kind = pyreft.LoreftIntervention if rotates else pyreft.NoreftIntervention
        representations = [
            {
                "layer": _block(place),
                "component": "block_output",
                "low_rank_dimension": rank,
                "intervention": kind(embed_dim=width, low_rank_dimension=rank, dtype=torch.float32, add_bias=False),
            }
            for place in self.places
        ]
        self.reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=False)
        views = layout.views(np.array(vector))
        for place, module in self._modules():
            with torch.no_grad():
                module.learned_source.weight.copy_(torch.from_numpy(views[f"{place}.W"]))
                module.learned_source.bias.copy_(torch.from_numpy(views[f"{place}.b"]))
                if not rotates:
                    module.proj_layer.weight.copy_(torch.from_numpy(views[f"{place}.P"]))
            if rotates:
                set_rotation(module, torch.from_numpy(views[f"{place}.R"]).T.contiguous(), rotation)

    def vector(self) -> Any:
        """Return the present values in fedray's layout."""
        values = {}
        for place, module in self._modules():
            values[f"{place}.W"] = module.learned_source.weight
            values[f"{place}.b"] = module.learned_source.bias
            if hasattr(module, "rotate_layer"):
                values[f"{place}.R"] = module.rotate_layer.weight.T
            else:
                values[f"{place}.P"] = module.proj_layer.weight
        return self.layout.flatten({name: value.detach().float().numpy() for name, value in values.items()})

    def train(
        self, dataset: Any, tokenizer: Any, order: Sequence[Order], folder: Path, **arguments: Any
    ) -> list[float]:
        """Train with `ReftTrainerForCausalLM`, without weight decay; return the losses of all micro-batches.

        Args:
            order: the batches of every epoch.
            arguments: of `TrainingArguments`.
        """
        collator = pyreft.ReftDataCollator(
            data_collator=DataCollatorForSeq2Seq(
                tokenizer=tokenizer, model=self.reft.model, label_pad_token_id=-100, padding="longest"
            )
        )
        trainer = _OrderedTrainer(
            model=self.reft,
            args=TrainingArguments(
                output_dir=str(folder),
                num_train_epochs=len(order),
                per_device_train_batch_size=max(len(batch) for batch in order[0]),
                save_strategy="no",
                eval_strategy="no",
                report_to="none",
                use_cpu=True,
                remove_unused_columns=False,
                disable_tqdm=True,
                logging_strategy="no",
                **arguments,
            ),
            train_dataset=dataset,
            data_collator=collator,
        )
        trainer.epochs, trainer.losses = _Epochs(order), []
        trainer.train()
        return trainer.losses

    def generate(self, dataset: Any, tokenizer: Any, batch_size: int, max_new_tokens: int) -> list[str]:
        """Return the greedy continuations, with padding on the left as in pyreft's evaluation."""
        self.reft.model.eval()
        texts = []
        for start in range(0, len(dataset), batch_size):
            rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            width = max(len(row["input_ids"]) for row in rows)
            pads = [width - len(row["input_ids"]) for row in rows]
            ids = torch.tensor(
                [
                    [tokenizer.pad_token_id] * pad + row["input_ids"].tolist()
                    for pad, row in zip(pads, rows, strict=True)
                ]
            )
            mask = torch.tensor(
                [[0] * pad + row["attention_mask"].tolist() for pad, row in zip(pads, rows, strict=True)]
            )
            places = torch.tensor([row["intervention_locations"] for row in rows]) + torch.tensor(pads)[:, None, None]
            with torch.no_grad():
                _, tokens = self.reft.generate(
                    {"input_ids": ids, "attention_mask": mask},
                    unit_locations={"sources->base": (None, places.permute(1, 0, 2).tolist())},
                    intervene_on_prompt=True,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts += tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
        return texts

    def _modules(self) -> Iterator[tuple[str, Any]]:
        yield from zip(self.places, self.reft.interventions.values(), strict=True)


def set_rotation(module: Any, loaded: torch.Tensor, rotation: Coordinates) -> None:
    """Give an intervention the rotation Rᵀ, [d, r].

    pyreft has Rᵀ = B·H(X), where H is a product of reflections and B an orthogonal d × d matrix that begins with the
    loaded Rᵀ and goes on with columns drawn from torch's generator.

    Args:
        rotation: pyreft leaves it at that. relative sets the drawn columns to those that fedray's `rotation: relative`
            stands for. absolute leaves B out and begins with the X for which H(X) = Rᵀ: the same function of another
            raw tensor, as fedray's `rotation: absolute`.
    """
    if rotation == "absolute":
        layer = LowRankRotateLayer(*loaded.shape, init_orth=False)
        layer.weight = torch.nn.Parameter(loaded.clone())
        module.rotate_layer = parametrizations.orthogonal(layer, use_trivialization=False)
        return
    module.rotate_layer.weight = loaded.clone()
    if rotation == "relative":
        rank = loaded.shape[1]
        drawn = torch.ormqr(*torch.geqrf(loaded), torch.eye(len(loaded)))[:, rank:]
        module.rotate_layer.parametrizations.weight[0].base[:, rank:] = drawn


class _OrderedTrainer(pyreft.ReftTrainerForCausalLM):
    """Its batches are given, and its losses kept."""

    epochs: "_Epochs"
    losses: list[float]

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_sampler=self.epochs, collate_fn=self.data_collator)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **unknown: Any) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs)
        self.losses.append(float(loss.detach()))
        return loss


@dataclass
class _Epochs:
    """Gives the next epoch's batches whenever it is iterated."""

    order: Sequence[Order]
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.order[0])

    def __iter__(self) -> Iterator[Sequence[int]]:
        self.epoch += 1
        return iter(self.order[self.epoch - 1])


def _block(place: str) -> int:
    return int(place.split(".")[-2])
