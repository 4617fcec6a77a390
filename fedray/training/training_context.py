"""What local training needs to know besides the client, its examples and the adapter."""

from dataclasses import dataclass, field

import pyarrow as pa

from fedray.config import EvaluationConfig, Metric, TrainConfig
from fedray.evaluation.evaluate import Device
from fedray.evaluation.generation import Decoding, Tokenizer
from fedray.evaluation.metrics import default_metric
from fedray.types import Moment, Task


@dataclass(frozen=True)
class TrainingContext:
    """What all clients of a run share.

    Attributes:
        task: decides loss and metrics.
        train: with the tier's batch_size and accumulation.
        seed: keys every draw.
        pad_token_id: fills up batches.
        evaluation: the configuration's section.
        device: where steps are computed.
        tokenizer: only for metrics that read generated text.
        end_token_ids: tokens that end a generated text.
        common: the common test set; None if there is none.
        common_moments: when a client's model is evaluated on it.
        rounds: of the run; learning rates may fall over them.
    """

    task: Task
    train: TrainConfig
    seed: int
    pad_token_id: int
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: Device = "cpu"
    tokenizer: Tokenizer | None = None
    end_token_ids: tuple[int, ...] = ()
    common: pa.Table | None = None
    common_moments: tuple[Moment, ...] = ()
    rounds: int = 1

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is measured: as configured, else the task's default."""
        return self.evaluation.metrics or (default_metric(self.task),)

    @property
    def decoding(self) -> Decoding | None:
        """How texts are generated; None: there is no tokenizer, because no metric reads them."""
        if self.tokenizer is None:
            return None
        evaluation = self.evaluation
        return Decoding(self.tokenizer, evaluation.max_new_tokens, self.end_token_ids, evaluation.generation, self.seed)
