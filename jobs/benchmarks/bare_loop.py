"""A row as a plain loop without any framework: the lower bound that the hardware sets.

    python bare_loop.py WORKLOAD PROCESSES RESULT

With more than one process, a pool distributes the clients, and payloads and states are in shared memory.
"""

import sys
from json import loads
from typing import Any

import numpy as np
import torch
from local_work import LocalWork
from torch import Tensor, multiprocessing
from workloads import Timeline, Workload, cohort


class Process:
    """The data of one process in the pool. server: [d]. updates: [cohort, d]. states: [clients, state]."""

    work: LocalWork
    server: Tensor
    updates: Tensor
    states: Tensor


def start(workload: Workload, server: Tensor, updates: Tensor, states: Tensor, ready: Any) -> None:
    Process.work = LocalWork(workload)
    Process.server, Process.updates, Process.states = server, updates, states
    ready.wait()


def train(place: tuple[int, int, int]) -> None:
    server_round, position, client = place
    Process.updates.numpy()[position] = Process.work.train(client, server_round, Process.server.numpy())
    Process.states[client] += 1


def main(text: str, count: str, result: str) -> None:
    workload, processes, timeline = Workload(**loads(text)), int(count), Timeline(result)
    spawn = multiprocessing.get_context("spawn")
    first, ready = LocalWork(workload).initial(), spawn.Barrier(1 if processes == 1 else processes + 1)
    server = torch.from_numpy(first.copy()).share_memory_()
    updates = torch.zeros(workload.per_round, len(first)).share_memory_()
    shared = (workload, server, updates, torch.zeros(workload.clients, workload.state).share_memory_(), ready)
    pool = spawn.Pool(processes, start, shared) if processes > 1 else None
    if pool is None:
        start(*shared)
    else:
        ready.wait()
    share = max(1, workload.per_round // (8 * processes))
    for server_round in range(workload.rounds):
        timeline.begin()
        places = [(server_round, *place) for place in enumerate(cohort(workload, server_round))]
        if pool is None:
            for place in places:
                train(place)
        else:
            pool.map(train, places, share)
        np.mean(updates.numpy(), axis=0, out=server.numpy())
        timeline.end_round()
    timeline.write(value=float(server[0]), numbers=len(server))


if __name__ == "__main__":
    main(*sys.argv[1:])
