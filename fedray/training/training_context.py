"""What local training needs to know besides the client, its examples and the adapter."""

from dataclasses import dataclass, field

from fedray.config import EvaluationConfig, TrainConfig
from fedray.evaluation.evaluate import Device, Tokenizer
from fedray.evaluation.metrics import Metric, default_metric
from fedray.types import Task


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
        tokenizer: only for metrics of generated text (exact_match, rouge_l).
    """

    task: Task
    train: TrainConfig
    seed: int
    pad_token_id: int
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: Device = "cpu"
    tokenizer: Tokenizer | None = None

    @property
    def metric(self) -> Metric:
        """What is measured: as configured, else the task's default."""
        return self.evaluation.metric or default_metric(self.task)
