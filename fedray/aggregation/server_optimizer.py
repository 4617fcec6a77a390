"""What a server optimizer is, and how a method names one: `adam`, or `{name: adam, lr: 0.01}` (Reddi et al., ICLR 2021,
arXiv 2003.00295, algorithm 1).

The server treats Δ = mean_k θ_k − θ, what the cohort's mean would add to its own values θ, as a gradient of opposite
sign, and moves θ along it by rules of its own. The built-in optimizers are the modules of
`fedray.aggregation.server_optimizers`. The smallest one:

    from fedray.aggregation.server_optimizer import ServerOptimizer

    class Halfway(ServerOptimizer):
        def step(self, state, values, mean):
            return (values + mean) / 2, state
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator

from fedray.config.option import Option
from fedray.config.registry import Registry
from fedray.types import Vector

State = Mapping[str, Vector]
"""What a server optimizer carries from round to round, by name, each [d], such as moments."""


class ServerOptimizer(Option):
    """Moves the server's values towards the mean of the clients'. Fields of a subclass are its options."""

    must_define: ClassVar[tuple[str, ...]] = ("step",)

    @classmethod
    def registry(cls) -> Registry[Any]:
        return SERVER_OPTIMIZERS

    def init(self, size: int) -> State:
        """Return the state before the first round, for `size` values."""
        return {}

    def step(self, state: State, values: Vector, mean: Vector) -> tuple[Vector, State]:
        """Return the server's next values [d] and the next state.

        Args:
            state: of the round before.
            values: θ, the server's, which the cohort started from [d].
            mean: of the clients' values [d].
        """
        raise NotImplementedError


SERVER_OPTIMIZERS = Registry("server optimizer", "fedray.aggregation.server_optimizers", ServerOptimizer)


def _parsed(value: Any) -> Any:
    found = SERVER_OPTIMIZERS.parse(value)
    if not isinstance(found, ServerOptimizer):
        raise ValueError(
            f"expected the name of a {SERVER_OPTIMIZERS.kind}, or a mapping with its `name`, got {value!r}"
        )
    return found


ServerOptimizerOption = Annotated[ServerOptimizer, BeforeValidator(_parsed)]
"""The type of a method's field that names a server optimizer."""


def step_where_held(
    optimizer: ServerOptimizer, state: State, values: Vector, mean: Vector, held: npt.NDArray[np.bool_] | None = None
) -> tuple[Vector, State]:
    """Return the server's next values [d] and state, where some client held a value; elsewhere both stay.

    Args:
        optimizer: whose step is taken.
        state: of the round before.
        values: the server's [d].
        mean: of the clients that hold a value [d]; anything where none does.
        held: which values some client holds [d]; None: all.
    """
    moved, next_state = optimizer.step(state, values, mean)
    if held is None or held.all():
        return moved, next_state
    return np.where(held, moved, values), {name: np.where(held, next_state[name], old) for name, old in state.items()}
