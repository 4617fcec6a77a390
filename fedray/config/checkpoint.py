"""The section `checkpoint`: what a run can be continued from."""

from typing import Annotated

from pydantic import Field

from fedray.config.section import PositiveInt, Section


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=0)] = 1
    """Rounds from one checkpoint to the next; 0: none, and nothing is flushed to the disk: a run that ends early cannot
    be continued."""
    keep: PositiveInt = 2
    """How many of the last ones are kept while a method runs; of a finished one the last."""
    best: bool = True
    """Keep the one of the round with the best mean of the personalised metric on validation examples, too; it needs
    measured rounds (`evaluation.every`) and validation examples."""
