"""Several processes that train one client together, for real: torch's gloo between processes that start clean."""

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch import distributed

from fedray.training.process_group import ProcessGroup

SECONDS = 120
"""How long a team may take."""

CLEAN = multiprocessing.get_context("forkserver")
"""Processes are forked from a server that has imported everything and started no thread. A fork of the tests' own
process inherits locks that other tests' threads hold, and may wait for them for ever."""
CLEAN.set_forkserver_preload(["cloudpickle", "pytest", "transformers", "fedray.adapters.lora", __name__])


def together(size: int, work: Callable[[ProcessGroup], Any], path: Path) -> list[Any]:
    """Run `work` in `size` processes at a time; return what each returned, or raise what one raised.

    `work` and the modules of tests that it uses travel as code, since only helpers can be imported.
    """
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "tests"]:
        cloudpickle.register_pickle_by_value(module)
    code = cloudpickle.dumps(work)
    ends = [CLEAN.Pipe(duplex=False) for _ in range(size)]
    processes = [
        CLEAN.Process(target=_member, args=(code, rank, size, path, sender), daemon=True)
        for rank, (_, sender) in enumerate(ends)
    ]
    try:
        for process, (_, sender) in zip(processes, ends, strict=True):
            process.start()
            sender.close()
        found = []
        for rank, (receiver, _) in enumerate(ends):
            assert receiver.poll(SECONDS), f"process {rank} says nothing"
            found.append(receiver.recv())
    finally:  # none may outlive its test: Python would wait for it at its own end
        for process in processes:
            process.kill()
            process.join()
    for _, error in found:
        if error is not None:
            raise error
    return [result for result, _ in found]


def _member(code: bytes, rank: int, size: int, path: Path, sender: Any) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(path), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        sender.send((cloudpickle.loads(code)(ProcessGroup(rank, size)), None))
    except Exception as error:
        sender.send((None, error))
