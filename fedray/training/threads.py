"""Sets torch's number of threads, the same wherever clients train: float sums depend on the split among threads."""

import torch
from threadpoolctl import threadpool_limits


def set_threads(threads: int) -> None:
    """Make torch and numpy's linear algebra use exactly `threads` threads per operation in this process."""
    torch.set_num_threads(threads)
    threadpool_limits(threads)
