"""A row on flwr's simulation, with flwr's FedAvg.

python with_flwr.py WORKLOAD WORKERS RESULT
"""

import sys
from collections.abc import Iterable
from hashlib import sha256
from json import loads
from typing import Any

import flwr_app
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from local_work import local_work
from workloads import Timeline, Workload


class Timed(FedAvg):
    def __init__(self, timeline: Timeline, **options: Any):
        super().__init__(**options)
        self.timeline = timeline
        self.updates: list[int] = []

    def configure_train(self, *arguments: Any, **named: Any) -> Iterable[Message]:
        self.timeline.begin()
        return super().configure_train(*arguments, **named)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        came = list(replies)
        self.updates.append(sum(not reply.has_error() for reply in came))
        result = super().aggregate_train(server_round, came)
        self.timeline.end_round()
        return result


def main(text: str, workers: str, result: str) -> None:
    workload, timeline, server = Workload(**loads(text)), Timeline(result), ServerApp()

    @server.main()
    def train(grid: Grid, context: Context) -> None:
        strategy = Timed(
            timeline,
            fraction_train=1e-9,  # min_train_nodes decides
            fraction_evaluate=0.0,
            min_train_nodes=workload.per_round,
            min_available_nodes=workload.clients,
        )
        first, config = ArrayRecord([local_work(text).initial()]), ConfigRecord({"workload": text})
        ended = strategy.start(grid, first, num_rounds=workload.rounds, train_config=config)
        (vector,) = ended.arrays.to_numpy_ndarrays()
        digest = sha256(vector.tobytes()).hexdigest()
        timeline.write(value=float(vector[0]), numbers=vector.size, updates=strategy.updates, sha256=digest)

    backend = {
        "init_args": {"address": "local", "num_cpus": int(workers), "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server, flwr_app.app, workload.clients, backend_config=backend)


if __name__ == "__main__":
    main(*sys.argv[1:])
