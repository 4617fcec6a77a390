"""DeepSpeed as an engine: parameters, gradients and Adam's moments may be kept off the device (ZeRO-Offload).

One DeepSpeed engine is built per adapter, in 1 to 3 s, and serves all virtual clients: `begin` copies the values that
were loaded into DeepSpeed's float32 masters and sets moments and steps to zero. Every process is a distributed group of
its own.

The frozen base is float32 or bfloat16, the adapter float32, and DeepSpeed's own mixed precision stays off: it would
cast the adapter too. In stages 0 and 2 the base weights stay where they are, on a CPU in the node's shared file. Stage
3 copies every parameter into memory of its own (`ds_tensor`), one after another: each actor has its private base.

Only this file imports deepspeed, and only when an engine is built: the import takes seconds. Internals that are used
without a public interface are marked as DeepSpeed's; setup.cfg keeps its version below the next minor one.
"""

import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import distributed, nn

from fedray.adapters.adapter import Adapter, TrainableGroup
from fedray.config import TrainConfig
from fedray.errors import ConfigError, reason
from fedray.training.engine import Steer
from fedray.training.engines.deepspeed import OffloadConfig, engine_config, zero_stage
from fedray.training.optimizer import build_optimizer, decay_for_sgd, weight_decays
from fedray.training.process_group import SINGLE_PROCESS
from fedray.training.schedule import Schedule
from fedray.training.zero_sizes import fill_in_sizes

BUILD_PATIENCE_S = 900
"""How long another program's build of an extension is waited for; one takes 1 to 3 minutes."""


class DeepSpeedEngine:
    """Trains with ZeRO stage 0, 2 (`offload.optimizer: cpu`) or 3 (`offload.params`).

    A parameter without gradient in a step is left alone in stage 0, as by torch; in stages 2 and 3 its gradient is
    zero, and its moments decay. Stage 3: values exist only inside the model's forward passes and within
    `Adapter.read`, `load` and the like; models are evaluated under torch.no_grad, never under torch.inference_mode.

    Args:
        adapter: with what is to train already chosen; the engine holds its parameters from now on.
        train: of this tier.
        offload: what is kept off the device.
        raw: the user's own DeepSpeed configuration; see `engine_config`.
        device: cuda or cpu.

    Raises:
        ConfigError: `raw` contradicts other settings, this machine lacks what the offload needs, or something other
            than float32 is to train.
    """

    def __init__(
        self,
        adapter: Adapter,
        train: TrainConfig,
        offload: OffloadConfig,
        raw: Mapping[str, Any],
        device: str | torch.device,
    ) -> None:
        config = engine_config(train, offload, raw)
        _check_types(adapter)
        _join_world(torch.device(device))
        compile_extensions(offload, device)
        import deepspeed

        self.adapter = adapter
        self.process_group = SINGLE_PROCESS
        self.stage = zero_stage(offload)
        self._train = train
        self._schedule: Schedule | None = None
        self._steer: Steer | None = None
        self._steps = self._micro_batches = 0
        self._skipped = self._finalized = False
        self._groups, self._num_trainable = adapter.trainable_groups(), adapter.num_trainable()
        fill_in_sizes(config.setdefault("zero_optimization", {}), adapter)
        if self.stage == 3:
            # DeepSpeed would first move the whole model to the device; this way its parameters pass one by one.
            dtype = next(adapter.model.parameters()).dtype
            # Where float16 is not supported, DeepSpeed takes any type that it is given for bfloat16; none is float32.
            given = None if dtype == torch.float32 else dtype
            deepspeed.zero.Init(module=adapter.model, config_dict_or_path=config, dtype=given, **_placement(config))
            adapter.model.to(torch.device(device))  # the buffers
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=adapter.model, optimizer=_optimizer(self._groups, train, self.stage), config=config
        )
        self._optimizer: torch.optim.Optimizer = self._engine.basic_optimizer
        if self.stage == 0:
            self._engine.enable_backward_allreduce = False  # there is nobody to reduce with
        adapter.bind(self._gathering)

    def begin(self, schedule: Schedule, steer: Steer | None = None) -> None:
        """Masters := the adapter's values; moments, steps and gradients := zero. Without building anything anew.

        In stage 0 a parameter that rests has no gradient, so the optimizer and the clipping pass it over.

        Raises:
            ConfigError: parts of what the engine was made for, or steering, in stage 2 or 3.
            ValueError: the schedule is of another `train` than the engine was made for.
        """
        if schedule.train != self._train:
            raise ValueError("the engine was made for other settings of `train`; make a new one")
        if self.stage > 0 and (steer is not None or self.adapter.num_trainable() < self._num_trainable):
            raise ConfigError(
                f"engine: deepspeed in ZeRO stage {self.stage} trains all that the method's attach() declares, and no "
                "gradients can be changed; use offload: none, or engine: torch"
            )
        self._steer = steer
        self._schedule, self._steps, self._micro_batches, self._skipped = schedule, 0, 0, False
        self._engine.optimizer.zero_grad()
        if self.stage > 0:
            self._zero.refresh_fp32_params()
            self._zero.micro_step_id = -1 if self.stage == 2 else 0  # DeepSpeed's: a failed round may have left another
        for state in self._optimizer.state.values():  # empty before the first step of all
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    value.zero_()
                elif isinstance(value, int | float):
                    state[name] = 0
        self._clear_offloaded_gradients()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        if not loss.requires_grad:  # interventions that edit no token of these prompts
            return
        # A step's only micro-batch goes straight into the masters' gradients; several are added up first.
        self._finalized = last and self._micro_batches == 0
        self._engine.set_gradient_accumulation_boundary(self._finalized)
        self._micro_batches += 1
        if self.stage > 0:
            # What DeepSpeed's own forward does around the model's; the loop calls the model itself.
            self._zero.clear_backward_seen_flag()
            loss.register_hook(self._enter_backward)  # type: ignore[no-untyped-call]
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        if self._schedule is None:
            raise RuntimeError("begin() comes first")
        rates = self._schedule.rates(self._groups, self._steps)
        for group, lr in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
            decay_for_sgd(group)
        self._steps += 1
        if self._micro_batches == 0:
            return
        if self.stage > 0 and not self._finalized:
            self._zero.finalize_gradient_accumulation_boundary()
        self._engine.set_gradient_accumulation_boundary(True)
        if self._steer is not None:
            self._steer()
        self._engine.step()
        self._skipped |= not self._engine.was_step_applied()
        self._clear_offloaded_gradients()
        self._micro_batches = 0

    def finite(self) -> bool:
        """Return whether every trained value is finite; ZeRO skips a step whose gradient is not, which counts here."""
        largest = torch._foreach_norm(self._masters(), float("inf"))
        return not self._skipped and bool(torch.stack(largest).isfinite().all())

    def close(self) -> None:
        """Release the model. After stage 3 it cannot be used any more: its parameters stay partitioned."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        self._engine.destroy()
        while self.adapter.model in FWD_MODULE_STACK:  # DeepSpeed's: would keep the model alive for ever
            FWD_MODULE_STACK.remove(self.adapter.model)
        if self.stage == 3:
            # Once it has trained, DeepSpeed's hooks keep the model alive: at least its weights are given back.
            parameters: list[Any] = list(self.adapter.model.parameters())
            for parameter in parameters:
                parameter.data = parameter.data.new_empty(0)
                parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)
            self._zero.fp16_partitioned_groups_flat.clear()
            self._zero.param_groups_fp16_flat_cpu_memory.clear()
        self._optimizer.state.clear()
        self.adapter.bind(None)

    def _enter_backward(self, _: torch.Tensor) -> None:
        self._engine._backward_prologue()

    def _gathering(self, parameters: Sequence[nn.Parameter], writing: bool) -> AbstractContextManager[Any]:
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            list(parameters), modifier_rank=0 if writing else None
        )
        return gathered

    def _masters(self) -> list[torch.Tensor]:
        """Return what the optimizer moves, flat tensors in stages 2 and 3 (DeepSpeed's)."""
        if self.stage == 0:
            return [parameter for group in self._groups for parameter in group.parameters]
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        masters: list[torch.Tensor] = getattr(self._zero, name)
        return masters

    def _clear_offloaded_gradients(self) -> None:
        """DeepSpeed overwrites these buffers where a parameter has a gradient, and keeps the last step's where one has
        none: an intervention on positions that a batch does not have."""
        if self.stage == 0:
            return
        buffers = [master.grad for master in self._masters() if master.grad is not None]
        if self.stage == 2:
            buffers += self._zero.accumulated_grads_in_cpu.values()
        else:
            buffers.append(self._zero.grad_partitions_flat_buffer)
        torch._foreach_zero_(buffers)


def _check_types(adapter: Adapter) -> None:
    for name, parameter in adapter.model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(
                f"engine: deepspeed trains float32 parameters, but {name} is {str(parameter.dtype).partition('.')[2]}; "
                "use a head that is not trained, precision: float32, or engine: torch"
            )


def compile_extensions(offload: OffloadConfig, device: str | torch.device) -> None:
    """Build what the offload and the device need, once per node, and load it into this process.

    A file lock lets one process of the node build at a time. torch's own lock file is left behind by a build that was
    killed, and would then be waited for without end: one of ours is removed, of another program's is reported.

    Raises:
        ConfigError: a library or a compiler is missing, or another program's build does not end.
    """
    _choose_accelerator(torch.device(device))
    import deepspeed
    from deepspeed.ops import op_builder

    builders: list[Any] = [op_builder.CPUAdamBuilder()] if zero_stage(offload) > 0 else []
    if torch.device(device).type == "cpu" and deepspeed.ops.__compatible_ops__.get("deepspeed_shm_comm"):
        # DeepSpeed loads this with its communication, also in a world of one.
        builders.append(deepspeed.get_accelerator().create_op_builder("ShareMemCommBuilder"))
    if offload.params == "nvme":
        builders.append(op_builder.AsyncIOBuilder())
        if not builders[-1].is_compatible(verbose=False):
            raise ConfigError(
                "offload.params: nvme needs DeepSpeed's async_io, which needs the library libaio with its headers "
                "(Debian and Ubuntu: apt install libaio-dev) on every node of the tier; install it, or use params: cpu"
            )
        check_offload_folder(offload)
    for builder in builders:
        try:
            _load(builder)
        except OSError as error:
            raise ConfigError(
                f"offload: the folder of DeepSpeed's extension {builder.name} cannot be written: {error}; name another "
                "one in TORCH_EXTENSIONS_DIR on every node of the tier"
            ) from None


def check_offload_folder(offload: OffloadConfig) -> None:
    """Check that the folder of `params: nvme` can be written on this node; create it if it does not exist.

    Raises:
        ConfigError: it cannot.
    """
    assert offload.path is not None
    folder = Path(offload.path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"offload.path: {folder} cannot be written: {reason(error)}; name another folder") from None


def _load(builder: Any) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(builder.name, verbose=False))
    ours, theirs = folder / "fedray.building", folder / "lock"
    with FileLock(folder / "fedray.lock"), _ninja_on_path():
        if ours.exists():  # this process holds the file lock, so the process that was building is dead
            theirs.unlink(missing_ok=True)
        _await_other_build(theirs)
        ours.touch()
        try:
            builder.load(verbose=False)
        except Exception as error:  # compilers, linkers and torch each have their own kinds
            raise ConfigError(
                f"offload: DeepSpeed's extension {builder.name} cannot be built in {folder}: {error}. It needs g++ and "
                "ninja; install them on every node of the tier, or use offload: none"
            ) from error
        finally:
            ours.unlink(missing_ok=True)


def _await_other_build(lock: Path) -> None:
    started = time.monotonic()
    while lock.exists():
        if time.monotonic() - started > BUILD_PATIENCE_S:
            raise ConfigError(
                f"offload: {lock} has been there for {BUILD_PATIENCE_S} s, so a build of the extension seems to have "
                "been killed; delete that file and start again"
            )
        time.sleep(0.2)


class _ninja_on_path(nullcontext[None]):
    """Puts python's folder into PATH: torch calls `ninja`, which pip installs there in a virtual environment."""

    def __enter__(self) -> None:
        if shutil.which("ninja") is None:
            os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])


def _join_world(device: torch.device) -> None:
    """Make this process the only one of its world, once. The store is its own memory: no port that others may take.

    Raises:
        RuntimeError: the process belongs to a larger world.
    """
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    if not distributed.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        store = distributed.HashStore()  # type: ignore[attr-defined]  # documented, but not in __all__
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if distributed.get_world_size() != 1:
        raise RuntimeError("engine: deepspeed needs a process of its own; this one trains together with others")


def _choose_accelerator(device: torch.device) -> None:
    """Tell DeepSpeed which device it works on; it asks once per process.

    Raises:
        RuntimeError: it was set up for another kind of device.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed's affair, at every step of stage 3.
    warnings.filterwarnings("ignore", ".*torch.distributed.* is deprecated", FutureWarning)
    found = deepspeed.get_accelerator().device_name()
    if found != device.type:
        raise RuntimeError(f"DeepSpeed was set up for {found} in this process; {device.type} needs another process")


def _placement(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where stage 3 keeps parameters between their uses."""
    offload = config["zero_optimization"]["offload_param"]
    return {"remote_device": offload["device"], "pin_memory": offload.get("pin_memory", True)}


def _optimizer(groups: Sequence[TrainableGroup], train: TrainConfig, stage: int) -> torch.optim.Optimizer:
    if stage == 0:
        return build_optimizer(groups, train)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    options = [
        {"params": list(group.parameters), "weight_decay": decay}
        for group, decay in zip(groups, weight_decays(groups, train), strict=True)
    ]
    made: torch.optim.Optimizer = DeepSpeedCPUAdam(
        options, lr=train.lr, betas=train.betas, eps=train.eps, adamw_mode=True
    )
    return made
