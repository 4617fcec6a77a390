"""What lm-evaluation-harness found for models of a run and for their frozen base model, as a table and as files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from fedray.errors import ConfigError, choices, reason
from fedray.results.report import plain_table
from fedray.types import ClientId

BASE = "base"
"""What the frozen base model without an adapter is called."""

SUFFIXES = (".json", ".csv")
"""Files that results are written to."""


@dataclass(frozen=True)
class HarnessScore:
    """One number.

    Attributes:
        model: what tables call the model: the method and the client or `server`, or `base`.
        method, client: whose model it is; None for the base model, and for the client of the server's model.
        moment: `personalised`, `aggregated` or `server`; None for the base model.
        task: of the harness, or a group of tasks.
        filter: how the harness takes the answer from a text; `none` where it does not.
        stderr: standard error over the task's examples; None where the harness has none.
        examples: number of examples; of a group, of all its tasks.
        higher_is_better: None if the task does not say.
    """

    model: str
    method: str | None
    client: ClientId | None
    moment: str | None
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    examples: int
    higher_is_better: bool | None


@dataclass(frozen=True)
class HarnessResult:
    """The scores of the base model and of the models of a run.

    Attributes:
        scores: model by model, the base model first.
        run: the run's folder.
        versions: of each task.
        num_fewshot: examples in the prompt, by task.
        limit: examples per task, or their share; None: all. Numbers with a limit are for smoke tests.
        configs: each task's configuration, as the harness reports it.
        harness: version of lm_eval.
    """

    scores: tuple[HarnessScore, ...]
    run: str
    versions: Mapping[str, Any]
    num_fewshot: Mapping[str, Any]
    limit: float | None
    configs: Mapping[str, Any]
    harness: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers must know."""
        base = f"{BASE}: the frozen base model without an adapter, on the same prompts"
        if self.limit is None:
            return (base,)
        return (
            base,
            f"limit: {self.limit:g}: only a part of each task was evaluated; these numbers are not reportable",
        )

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per score, with `difference`, the value minus the base model's."""
        frame = pd.DataFrame([asdict(score) for score in self.scores])
        keys = ["task", "metric", "filter"]
        base = frame[frame["model"] == BASE].set_index(keys)["value"]
        frame["difference"] = frame["value"] - base.reindex(pd.MultiIndex.from_frame(frame[keys])).to_numpy()
        return frame

    def table(self) -> RenderableType:
        """Return the table for a console: task by task, the base model's row above those of the run."""
        table = plain_table(
            f"lm-evaluation-harness {self.harness}", ("task", "metric", "model"), ("value", "stderr", "vs base")
        )
        frame = self.to_pandas()
        for _, rows in frame.groupby(["task", "metric", "filter"], sort=False):
            task, metric, chosen = rows.iloc[0][["task", "metric", "filter"]]
            name = metric if chosen == "none" else f"{metric}, {chosen}"
            for number, row in enumerate(rows.to_dict("records")):
                first = (escape(task), escape(name)) if number == 0 else ("", "")
                stderr = "-" if pd.isna(row["stderr"]) else f"{row['stderr']:.4f}"
                difference = "" if row["model"] == BASE else f"{row['difference']:+.4f}"
                table.add_row(*first, escape(row["model"]), f"{row['value']:.4f}", stderr, difference)
        return Group(table, *(Text(note) for note in self.notes))

    def write(self, file: str | Path) -> None:
        """Write everything to a file: .json, or .csv with the rows of `to_pandas`.

        Raises:
            ConfigError: the file has another suffix, or cannot be written.
        """
        place = check_output(file)
        try:
            if place.suffix == ".csv":
                self.to_pandas().to_csv(place, index=False)
            else:
                content = {**asdict(self), "notes": self.notes}
                place.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {place}: cannot be written: {reason(error)}") from None


def check_output(file: str | Path) -> Path:
    """Return the path of a file that results can be written to.

    Raises:
        ConfigError: the suffix says no known format, or the folder does not exist.
    """
    place = Path(file)
    if place.suffix not in SUFFIXES:
        raise ConfigError(f"--output {place}: expected a file that ends in {choices(SUFFIXES)}")
    if not place.parent.is_dir():
        raise ConfigError(f"--output {place}: the folder {place.parent} does not exist")
    return place


def scores_of(
    found: Mapping[str, Any], model: str, method: str | None, client: ClientId | None, moment: str | None
) -> Sequence[HarnessScore]:
    """Return the scores of one model from what `lm_eval.evaluator.evaluate` returned."""
    better = found.get("higher_is_better", {})
    scores = []
    for task, values in {**found["results"], **found.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            scores.append(
                HarnessScore(
                    model=model,
                    method=method,
                    client=client,
                    moment=moment,
                    task=task,
                    metric=metric,
                    filter=chosen,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    examples=int(values.get("sample_len", 0)),
                    higher_is_better=better.get(task, {}).get(metric),
                )
            )
    return scores
