"""Clients that are silos of several workers: their local steps run data-parallel on Ray Train.

`TorchTrainer.fit` takes half a minute, so it is called once per actor, for the whole run: each worker runs a loop that
fetches calls from a mailbox. `SiloActor` is that mailbox, and to the pool it is an actor like `ClientActor`: a call of
`setup` or `train` goes to all workers, which execute it together (`training.process_group`), and the first worker's
result is returned.

A worker that dies ends the trainer, and with it this actor; the pool replaces it like any other.
"""

import logging
import os
import pickle
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import RayError

from fedray.federation.result_batches import ResultBatcher
from fedray.federation.tasks import ClientResult, ClientTask, WorkerSetup
from fedray.federation.worker import Worker
from fedray.methods.protocol import Initial
from fedray.runtime.client_actor import location
from fedray.runtime.messages import Message, TaskBatch, from_message, resolve_tasks, to_message
from fedray.training.metering import MemoryUse
from fedray.training.process_group import ProcessGroup, ProcessLost

EXTRA_THREADS = 4
"""Threads of the actor beyond one per worker that waits for its next call: for the pool's call, its result, and the
end."""


def start_silo(workers: int, requested: Mapping[str, float]) -> Any:
    """Return a new SiloActor.

    Args:
        requested: Ray resources of each worker by name, including GPU and memory (bytes).
    """
    resources = {name: amount for name, amount in requested.items() if amount}
    return SiloActor.options(  # type: ignore[attr-defined]
        max_concurrency=workers + EXTRA_THREADS
    ).remote(workers, resources)


@ray.remote(num_cpus=0, max_restarts=0)
class SiloActor:
    """Workers that train a client together, as one actor."""

    def __init__(self, workers: int, resources: Mapping[str, float]) -> None:
        self._size = workers
        self._resources = dict(resources)
        self._changed = threading.Condition()
        self._call: tuple[int, Any] | None = None  # number and reference; a message of None ends the workers
        self._result: Future[Any] = Future()
        self._here: set[int] = set()
        self._ended = False
        self._broken: Exception | None = None
        self._one_call = threading.Lock()
        self._shards: dict[Any, Any] = {}
        mailbox = ray.get_runtime_context().current_actor
        threading.Thread(target=self._fit, args=(mailbox,), daemon=True).start()

    def ready(self) -> None:
        """Return once all workers wait for their first call.

        Raises:
            Exception: a worker's own code raised it before that.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._broken or self._ended or len(self._here) == self._size)
            if self._broken is not None:
                raise self._broken
            self._die_if_ended()

    def setup(self, message: Message) -> str:
        """See `ClientActor.setup`."""
        setup: WorkerSetup = from_message(message)
        # An exception ends the worker that raised it.
        self._batcher = ResultBatcher(setup, self._train, survives=False)
        self._together("setup", setup)
        return location()

    def initial(self) -> Initial:
        """See `Worker.initial`."""
        found: Initial = self._together("initial")
        return found

    def memory(self) -> MemoryUse:
        """Return the peak memory of the first worker; the others need as much."""
        found: MemoryUse = self._together("memory")
        return found

    @ray.method(num_returns="streaming")
    def train(self, batch: TaskBatch) -> Iterator[Message]:
        """See `ClientActor.train`; all workers train each client together."""
        for results in self._batcher.serve(resolve_tasks(batch, self._shards), batch.batch_seconds):
            yield to_message(results)

    def close(self) -> None:
        """End the workers, which releases their resources."""
        with self._changed:
            self._post(None)
            self._changed.wait_for(lambda: self._ended)

    def next_call(self, rank: int, last: int) -> tuple[int, Any]:
        """Wait for the call after number `last`; workers call this.

        Returns:
            The call's number, and a reference to (name, arguments) in a list.
        """
        with self._changed:
            self._here.add(rank)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._call is not None and self._call[0] > last)
            assert self._call is not None
            number, call = self._call
            return number, [call]  # in a list, Ray does not resolve the reference

    def cannot_start(self, error: Exception) -> None:
        """Record the exception that a worker's own code raised before its first call; workers call this."""
        with self._changed:
            self._broken = error
            self._changed.notify_all()

    def finish_call(self, result: Any, error: Exception | None) -> None:
        """Set the result of the call, or the exception that it raised; workers call this."""
        if error is not None and not self._result.done():
            self._result.set_exception(error)
        elif not self._result.done():
            self._result.set_result(result)

    def _train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        for task in tasks:
            yield self._together("train", task)

    def _together(self, name: str, *arguments: Any) -> Any:
        with self._one_call:
            with self._changed:
                self._die_if_ended()
                self._result = Future()
                self._post((name, arguments))
            return self._result.result()

    def _die_if_ended(self) -> None:
        if self._ended:
            os._exit(1)  # to the pool this actor has died, and it starts another

    def _post(self, call: tuple[str, tuple[Any, ...]] | None) -> None:
        self._call = ((self._call[0] if self._call else 0) + 1, ray.put(to_message(call)))
        self._changed.notify_all()

    def _fit(self, mailbox: Any) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        gpus = self._resources.get("GPU", 0.0)
        scaling = ScalingConfig(num_workers=self._size, use_gpu=gpus > 0, resources_per_worker=self._resources)
        try:
            with tempfile.TemporaryDirectory(prefix="fedray-silo-") as folder:
                trainer = TorchTrainer(
                    _serve,
                    train_loop_config={"mailbox": mailbox},
                    scaling_config=scaling,
                    run_config=RunConfig(
                        name="silo", storage_path=folder, failure_config=FailureConfig(max_failures=0)
                    ),
                    # nccl does not support two workers on one GPU
                    torch_config=TorchConfig(backend="nccl" if gpus >= 1 else "gloo"),
                )
                trainer.fit()
        except Exception as error:  # whatever the reason, the workers are gone
            logging.getLogger(__name__).warning("a silo's workers ended: %s", error)
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            if self._one_call.locked() and not self._result.done():  # a call waits for workers that are gone
                self._die_if_ended()


def _serve(config: Mapping[str, Any]) -> None:
    """Run a worker's loop: execute one call after another together with the others, until the mailbox ends it."""
    mailbox = config["mailbox"]
    try:
        worker, rank = _start_worker()
    except Exception as error:
        ray.get(mailbox.cannot_start.remote(_portable(error)))
        raise
    number = 0
    while True:
        number, (posted,) = ray.get(mailbox.next_call.remote(rank, number))
        try:
            if (call := from_message(ray.get(posted))) is None:
                return
            name, arguments = call
            result = getattr(worker, name)(*arguments)
        except (ProcessLost, RayError):  # not the client's fault: the trainer ends, and the pool starts another silo
            raise
        except Exception as error:
            ray.get(mailbox.finish_call.remote(None, _portable(error)))
            raise
        if rank == 0:
            ray.get(mailbox.finish_call.remote(result, None))


def _start_worker() -> tuple[Worker, int]:
    """Return this process's worker and its rank among the silo's workers."""
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    if get_device().type == "cuda":
        torch.cuda.set_device(get_device())
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rank = get_context().get_world_rank()
    return Worker(ProcessGroup(rank, get_context().get_world_size())), rank


def _portable(error: Exception) -> Exception:
    """Return the exception, or one with its message if another process could not unpickle it."""
    try:
        pickle.loads(pickle.dumps(error))  # only what this line pickled
    except Exception:  # whatever the exception's own class raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
