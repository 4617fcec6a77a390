"""The client side of a row on flwr: every process imports this module once, and the module keeps the model."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from local_work import local_work

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    (received,) = message.content["arrays"].to_numpy_ndarrays()
    config = message.content["config"]
    work = local_work(str(config["workload"]))
    server_round = int(config["server-round"]) - 1
    work.workload.kill_once(server_round)
    update = work.train(int(context.node_config["partition-id"]), server_round, received)
    if size := work.workload.state:
        private = context.state.get("private")
        values = np.zeros(size, np.float32) if private is None else private.to_numpy_ndarrays()[0]
        context.state["private"] = ArrayRecord([values + np.float32(1)])
    metrics = MetricRecord({"num-examples": work.workload.examples})
    return Message(RecordDict({"arrays": ArrayRecord([update]), "metrics": metrics}), reply_to=message)
