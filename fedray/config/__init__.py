"""The configuration of an experiment: YAML (or a dict) into frozen, fully checked models.

What can be checked from the text alone is checked here; what needs the data or the model is checked by
`fedray.experiment.prepare`, also before any actor starts.

Uses: no other package.
"""

from fedray.config.checkpoint import CheckpointConfig
from fedray.config.clients import ClientsConfig, Precision, Quantised, TierConfig
from fedray.config.data import DataConfig, RawRows
from fedray.config.engine import EngineConfig, EngineMemory, Memory
from fedray.config.experiment import CallbackConfig, Config, Head, MethodConfig, MethodSections
from fedray.config.generation import GenerationSection
from fedray.config.load import dump_yaml, load_config, load_sweep, to_mapping, values_by_path
from fedray.config.metric import Metric
from fedray.config.model import ModelConfig, Pooling
from fedray.config.overrides import parse_overrides
from fedray.config.partition import NaturalClients, PartitionConfig, Shares
from fedray.config.section import Section, absolute, describe
from fedray.config.sweep import SweepConfig
from fedray.config.tracker import TrackedRun, Tracker, TrackerRun
from fedray.config.training import EvaluationConfig, LoraSection, ReftSection, TrainConfig, warmup_length
from fedray.config.yaml import parse_yaml

__all__ = [
    "CallbackConfig",
    "CheckpointConfig",
    "ClientsConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EngineMemory",
    "EvaluationConfig",
    "GenerationSection",
    "Head",
    "LoraSection",
    "Memory",
    "MethodConfig",
    "MethodSections",
    "Metric",
    "ModelConfig",
    "NaturalClients",
    "PartitionConfig",
    "Pooling",
    "Precision",
    "Quantised",
    "RawRows",
    "ReftSection",
    "Section",
    "Shares",
    "SweepConfig",
    "TierConfig",
    "TrackedRun",
    "Tracker",
    "TrackerRun",
    "TrainConfig",
    "absolute",
    "describe",
    "dump_yaml",
    "load_config",
    "load_sweep",
    "parse_overrides",
    "parse_yaml",
    "to_mapping",
    "values_by_path",
    "warmup_length",
]
