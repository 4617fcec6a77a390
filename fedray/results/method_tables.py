"""Tables of the built-in methods, for the console and for docs/methods.md."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from fedray.adapters.portable import Form
from fedray.planning.catalogue import COHORT, MethodFacts

COLUMNS = ("method", "what it is", "trains", "down", "up", "keeps", "model", "unequal ranks", "export")
"""Columns of the table of methods."""

CAPTION = (
    f"What one client trains, receives, sends and keeps in its second round, of a cohort of {COHORT}. LoRA is both of "
    "its factors, A and B; under unequal ranks, – is a method without LoRA; export is what opens its exported model."
)

OPENERS: Mapping[Form, str] = {
    "lora": "peft",
    "folded": "peft, as one LoRA",
    "reft": "pyreft",
    "full": "transformers",
    "mixture": "load.py",
}
"""What opens an exported model (`fedray export`), by the form of its adapter."""


def cells(facts: MethodFacts) -> tuple[str, ...]:
    """Return a method's row of `COLUMNS`."""
    return (
        facts.name,
        facts.summary,
        facts.trains,
        facts.down or "nothing",
        facts.up or "nothing",
        facts.kept or "nothing",
        "one per client" if facts.personalised else "one for all",
        {True: "yes", False: "no", None: "–"}[facts.ranks],
        OPENERS[facts.export],
    )


def methods_table(catalogue: Sequence[MethodFacts]) -> Table:
    """Return a table with one row per method."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=CAPTION, caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, no_wrap=column == "method")
    for facts in catalogue:
        table.add_row(*map(escape, cells(facts)))
    return table


def hyperparameter_table(facts: MethodFacts) -> Table:
    """Return a table of a method's hyperparameters, and of the sections of the configuration that it reads."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("hyperparameter", "values", "default", "what it does"):
        table.add_column(column, no_wrap=column == "hyperparameter")
    for field in facts.hyperparameters:
        default = "required" if field.default is None else field.default
        table.add_row(*map(escape, (field.name, field.kind, default, field.documentation)))
    return table
