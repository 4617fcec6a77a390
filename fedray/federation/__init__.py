"""A round without Ray: tasks and results, worker, work queue, participation, failures, update checks, local pool."""
