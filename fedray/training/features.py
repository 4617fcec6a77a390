"""The model's features of examples: the last hidden state of each one's last prompt token."""

import numpy as np
import pyarrow as pa
import torch

from fedray.adapters.adapter import Adapter
from fedray.adapters.similarity import last_states
from fedray.data.batches import batches
from fedray.evaluation.evaluate import evaluating
from fedray.models.labels import labelled
from fedray.training.training_context import TrainingContext
from fedray.types import Vector


def features(adapter: Adapter, table: pa.Table, training_context: TrainingContext) -> Vector:
    """Return what the model makes of every example with the adapter as it is loaded now, float32 [examples, d].

    The branches have the weights that are loaded, also where evaluation computes an α for every example
    (`fedray.adapters.similarity`).
    """
    found = []
    with evaluating(adapter.model):
        for batch in batches(
            table,
            training_context.evaluation.batch_size,
            training_context.pad_token_id,
            None,
            training_context.device,
        ):
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            with labelled(batch["labels"]):
                adapter.context.enter(adapter.model, (), inputs)
            found.append(last_states(adapter.model, adapter.context, inputs))
    return np.asarray(torch.cat(found).cpu().numpy())
