"""The contract `EngineConfig`: an engine's configuration, and what is known of the engine before it is built.

An engine moves the parameters that a client trains. It consists of a class derived from `EngineConfig`, which is the
section `engine` of a tier, and of the engine itself (`fedray.training.engine.Engine`), which `build` makes. All other
code uses this contract and does not know which engine it is. Nothing here, and no file with an `EngineConfig`, imports
torch at module level: a configuration is loaded without it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from fedray.config.option import Option
from fedray.config.registry import Registry
from fedray.config.section import Mistakes
from fedray.config.training import TrainConfig
from fedray.errors import ConfigError, choices, nearest


@dataclass(frozen=True)
class Memory:
    """Bytes in one place.

    Attributes:
        weights: the base model, its task head and buffers.
        adapter: what the method inserts.
        gradients: of what trains, with the engine's buffers for them.
        optimizer: its state, and float32 copies of what it moves.
        activations: what a step (or an evaluation batch) holds at its peak beyond all these.
    """

    weights: int = 0
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def resting(self) -> int:
        """All but the activations."""
        return self.weights + self.adapter + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it."""
        return self.resting + self.activations


@dataclass(frozen=True)
class EngineMemory:
    """What one actor holds with an engine, without activations.

    Attributes:
        device: where steps are computed.
        host: what the engine keeps off the device.
        moves_gradients: whether gradients leave the parameters as they arise. Otherwise they stay until the step, and
            arise while activations are released, so that both share room.
    """

    device: Memory
    host: Memory = Memory()
    moves_gradients: bool = False


class EngineConfig(Option):
    """Base class of every engine's configuration.

    Attributes:
        batches_clients: whether a step is plain torch: gradients of the adapter's parameters, clipped, and the section
            `train`'s optimizer. Clients can then be trained in one step (`clients.fuse`), which computes just that, and
            seconds measured with this engine stand for the reference device.
        holds_quantised: whether the base model's linear layers may be quantised (`precision: nf4`): the engine leaves
            modules' buffers, which hold such weights, where they are.
        groups_processes: whether several processes can train one client (`workers`): the engine then sums gradients
            over its process group before each step.
        prepares_node: whether `prepare_node` does something, so that nodes are prepared before actors start.
    """

    must_define: ClassVar[tuple[str, ...]] = ("build",)
    batches_clients: ClassVar[bool] = False
    holds_quantised: ClassVar[bool] = False
    groups_processes: ClassVar[bool] = False
    prepares_node: ClassVar[bool] = False

    @classmethod
    def registry(cls) -> Registry[Any]:
        return ENGINES

    @property
    def weights_on_host(self) -> bool:
        """Whether the base weights are kept on the host, in a copy of the engine's own, and come to the device as they
        are used. Otherwise they are loaded onto the device, and mapped from the node's file on a CPU."""
        return False

    @property
    def steps_on_host(self) -> bool:
        """Whether the optimizer's step is computed on the host, also for a GPU: an actor then has more threads by
        default (`clients.threads`)."""
        return False

    @property
    def steers(self) -> bool:
        """Whether a method may train parts of what it declares, steer gradients, or take their mean (`parts`,
        `steering`, `mean_gradient` of `Local.train`): the engine moves what `adapter.trainable_groups()` says at its
        `begin`, and calls `steer` before it clips."""
        return False

    def with_absolute_paths(self, folder: Path) -> Self:
        """Return this section with absolute paths; relative ones are below `folder`."""
        return self

    def check(self, train: TrainConfig, where: str) -> None:
        """Check that the engine can do what the section `train` asks for, before anything starts.

        Args:
            train: a method's, with the tier's batch_size and accumulation.
            where: the tier's path in the configuration, for messages.

        Raises:
            ConfigError: it cannot.
        """

    def prepare_node(self, device: str) -> None:
        """Build and load what the engine needs on this node, such as compiled extensions.

        Called once per tier and node before its actors start, and again in every process that builds the engine.

        Args:
            device: cuda or cpu.

        Raises:
            ConfigError: the node lacks what is needed.
        """

    def memory(self, adapter: Any, weights: int, train: TrainConfig) -> EngineMemory:
        """Return what an actor holds with this engine, counted on shapes; `fedray.training.memory` has the parts.

        Args:
            adapter: a `fedray.adapters.adapter.Adapter` on the meta device, with what trains chosen.
            weights: bytes of the model before the adapter was attached.
            train: as for `check`.

        Raises:
            ConfigError: the engine does not say, so that its memory cannot be predicted.
        """
        raise ConfigError(
            f"engine {self.label}: its memory cannot be predicted, since {type(self).__qualname__} does not define "
            "`memory`"
        )

    def build(self, adapter: Any, train: TrainConfig, device: str, process_group: Any) -> Any:
        """Return the engine of one adapter.

        Args:
            adapter: a `fedray.adapters.adapter.Adapter` with its method's first values and trainable groups.
            train: as for `check`.
            device: cuda or cpu.
            process_group: a `fedray.training.process_group.ProcessGroup`, of one process unless `groups_processes`.

        Returns:
            A `fedray.training.engine.Engine`.
        """
        raise NotImplementedError


ENGINES = Registry("engine", "fedray.training.engines", EngineConfig)


def engines_with(ability: str) -> str:
    """Return the names of the built-in engines whose class attribute `ability` is true, for messages."""
    return choices([name for name in ENGINES.names if getattr(ENGINES.find(name), ability)])


def parse_tier_engine(tier: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Return a tier's raw values with its engine as one section.

    In YAML, the fields of a built-in engine stand beside `engine: NAME`; those of a user's own class are written inside
    `engine: {class: module.Class, ...}`.

    Args:
        tier: raw values.
        known: fields of a tier that belong to no engine.

    Raises:
        ValueError: there is no such engine, one of its fields is wrong, or a field of another engine is set.
    """
    own = {name: value for name, value in tier.items() if name in known}
    raw = tier.get("engine", "torch")
    beside = {name: value for name, value in tier.items() if name not in known and name != "engine"}
    if isinstance(raw, EngineConfig) and not beside:
        return {**own, "engine": raw}
    section = _section_of(raw)
    unknown: dict[str, Any] = {}
    for name in beside:
        owners = [entry for entry in ENGINES.names if name in ENGINES.find(entry).model_fields]
        if not owners and (hint := nearest(name, _own_fields(section))):
            raise Mistakes([f"{name}: unknown key{hint}"])
        if not owners:
            unknown[name] = beside[name]  # refused by the tier, which knows its own fields
        elif section.get("name") in owners:
            section[name] = beside[name]
        elif not _is_default(ENGINES.find(owners[0]), name, beside[name]):
            label = section.get("name") or section.get("class")
            raise ValueError(f"{name}: needs engine: {choices(owners)}, got engine: {label}")
    try:
        engine = ENGINES.parse(section)
    except Mistakes as error:
        lines = [line if re.split("[.:]", line)[0] in beside else f"engine.{line}" for line in error.lines]
        raise Mistakes(lines) from None
    except ValueError as error:
        raise Mistakes([f"engine: got {raw!r}: {error}"]) from None
    for name in raw if isinstance(raw, Mapping) else ():
        owners = [entry for entry in ENGINES.names if name in ENGINES.find(entry).model_fields]
        if owners and name not in type(engine).model_fields:
            raise ValueError(f"engine.{name}: needs engine: {choices(owners)}, got engine: {engine.label}")
    return {**own, **unknown, "engine": engine}


def _section_of(raw: Any) -> dict[str, Any]:
    """Return an engine's fields, with `name` or `class`.

    Raises:
        Mistakes: the value describes no engine.
    """
    if isinstance(raw, EngineConfig):
        raw = raw.model_dump()
    if isinstance(raw, str):
        return {"name": raw}
    if isinstance(raw, Mapping) and (raw.get("name") or raw.get("class")):
        return dict(raw)
    raise Mistakes([f"engine: got {raw!r}: expected {choices(ENGINES.names)}, or a mapping with `class`"])


def _own_fields(section: Mapping[str, Any]) -> set[str]:
    """Return the fields that a built-in engine adds; none for another name or a class."""
    name = section.get("name")
    return set(ENGINES.find(name).model_fields) if name in ENGINES.names else set()


def _is_default(engine: type[EngineConfig], name: str, value: Any) -> bool:
    """Return whether a field's value is what the engine has without it.

    Raises:
        Mistakes: the value does not fit the field.
    """
    given = ENGINES.parse({"name": engine.name, name: value})
    return bool(getattr(given, name) == getattr(ENGINES.parse(engine.name), name))
