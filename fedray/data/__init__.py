"""From a source of examples to one shard of tokenised examples per client."""

from fedray.data.load import load_federated_data
from fedray.data.shards import FederatedData, Shard

__all__ = ["FederatedData", "Shard", "load_federated_data"]
