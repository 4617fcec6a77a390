"""Models of a finished run in lm-evaluation-harness, and their frozen base model beside them."""

import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fedray.config import MethodConfig, Precision
from fedray.errors import ConfigError, choices, nearest, one_line
from fedray.experiment.restore import FinishedRun
from fedray.models.tokenizer import named_tokens
from fedray.results.harness import BASE, HarnessResult, scores_of
from fedray.results.run_result import RunResult
from fedray.storage.paths import StoragePath
from fedray.types import Client, ClientId, Moment

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)


def lm_eval(
    run: RunResult | StoragePath | str | Path,
    tasks: str | Sequence[str],
    *,
    method: str | Sequence[str] | None = None,
    client: ClientId | Sequence[ClientId] = (),
    server: bool = False,
    moment: Moment = "personalised",
    include_path: str | Path | Sequence[str | Path] = (),
    metadata: Mapping[str, Any] | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
) -> HarnessResult:
    """Evaluate models of a finished run on tasks of lm-evaluation-harness, with the frozen base model beside them.

    Any adapter and any method: the model is restored in memory (`fedray.experiment.restore`), and adapters that edit
    positions of the prompt know where each request's context ends (`fedray.evaluation.harness_model`).

    Args:
        run: the result of a run, or its folder.
        tasks: names of tasks, groups or tags.
        method: one or several; default the run's only one.
        client: one or several, whose models are evaluated.
        server: whether the server's own model is evaluated, too; without a client it is.
        moment: of the clients' models, after their last local training or before it.
        include_path: folders with task files of one's own.
        metadata: passed on to the tasks, as `--metadata` of the harness.
        num_fewshot: examples in the prompt; default what each task says.
        limit: evaluate this many examples of each task, or this share below 1. Such numbers are not reportable.
        batch_size: texts in a pass; default the run's `evaluation.batch_size`.
        device: cuda or cpu; default as of `restore`.

    Raises:
        ConfigError: lm_eval is not installed, a task cannot be loaded, the run has no such method or client, or its
            models are not language models.
        StateError: the run has not finished, or its files are missing or damaged.
    """
    finished = FinishedRun(run)
    config = finished.config
    if config.task != "causal_lm":
        raise ConfigError(f"task: {config.task}: lm-evaluation-harness evaluates language models, task: causal_lm")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name}: expected a number above 0, got {value:g}")
    chosen = _chosen(finished, [None] if method is None else _listed(method), _listed(client), server)
    precision = _precision(finished, chosen)
    for pair in chosen:
        finished.check(*pair, moment)
    loaded = load_tasks(_listed(tasks), [str(place) for place in _listed(include_path)], metadata or {}, num_fewshot)

    from lm_eval import __version__
    from lm_eval.evaluator import evaluate

    from fedray.evaluation.harness_model import HarnessModel

    ends = named_tokens(finished.tokenizer, config.evaluation.generation.end_tokens, "evaluation.generation.end_tokens")
    texts = batch_size or config.evaluation.batch_size

    def evaluated(model: PreTrainedModel, plain: bool = False) -> dict[str, Any]:
        lm = HarnessModel(model, finished.tokenizer, texts, ends, config.seed, plain)
        with _harness_seeds(loaded["tasks"].values()):
            found: dict[str, Any] = evaluate(lm, loaded, limit=limit, log_samples=False)
        return found

    found = evaluated(finished.base_model(precision, device), plain=True)
    scores = [*scores_of(found, BASE, None, None, None)]
    for entry, one in chosen:
        model = finished.restored(entry, one, moment, device).model  # one adapter in memory at a time
        who = (f"{entry.key} {'server' if one is None else one.id}", entry.key, None if one is None else one.id)
        scores += scores_of(evaluated(model), *who, "server" if one is None else moment)
        del model
    return HarnessResult(
        scores=tuple(scores),
        run=str(finished.place),
        versions=found["versions"],
        num_fewshot=found["n-shot"],
        limit=limit,
        configs=found["configs"],
        harness=__version__,
    )


def _chosen(
    finished: FinishedRun, methods: Sequence[str | None], clients: Sequence[ClientId], server: bool
) -> list[tuple[MethodConfig, Client | None]]:
    """Return whose models are evaluated: methods, and clients or None for the server."""
    chosen: list[tuple[MethodConfig, Client | None]] = []
    for entry in map(finished.entry, methods):
        if server or not clients:
            chosen.append((entry, None))
        chosen += [(entry, finished.client(entry, id)) for id in clients]
    return chosen


def _precision(finished: FinishedRun, chosen: Iterable[tuple[MethodConfig, Client | None]]) -> Precision:
    """Return the number type of the chosen models' base model.

    Raises:
        ConfigError: there are several, so that no base model is that of all.
    """
    found = {finished.precision((client or finished.holder(entry)).tier) for entry, client in chosen}
    if len(found) > 1:
        raise ConfigError(
            f"client: the chosen models compute in {choices(sorted(found))}, and their base models differ; evaluate "
            "those of one tier at a time"
        )
    return found.pop()


def load_tasks(
    names: Sequence[str], include: Sequence[str], metadata: Mapping[str, Any], num_fewshot: int | None = None
) -> dict[str, Any]:
    """Return the loaded tasks and groups by name, as the keys `tasks` and `groups`.

    The harness reads thousands of files to know its own tasks, so these are left out where one's own are enough.

    Args:
        include: folders with task files of one's own.
        metadata: passed on to the tasks.
        num_fewshot: examples in the prompt of tasks whose own number is not 0; None: what each task says.

    Raises:
        ConfigError: lm_eval is not installed, there is no such folder or task, or a task cannot be loaded.
    """
    try:
        import_module("lm_eval")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ConfigError("lm-eval: the package lm_eval is not installed: pip install 'fedray[lm-eval]'") from None
    from lm_eval.tasks import TaskManager

    if not names:
        raise ConfigError("tasks: expected the name of at least one task")
    for place in include:
        if not Path(place).is_dir():
            raise ConfigError(f"include_path: {place} is not a folder")
    about = {"include_path": list(include) or None, "metadata": dict(metadata)}
    manager = TaskManager(include_defaults=False, **about) if include else None
    if manager is None or not _knows(manager, names):
        manager = TaskManager(**about)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(
            f"tasks: no task {unknown[0]!r}{nearest(unknown[0], manager.all_tasks)}; `lm-eval ls tasks` lists those of "
            "lm-evaluation-harness, and include_path adds folders with others"
        )
    try:
        with _harness_seeds():
            loaded: dict[str, Any] = manager.load(list(names))
    except ConfigError:
        raise
    except Exception as error:  # the harness, datasets and tasks' own code each raise their own kinds
        raise ConfigError(f"tasks: {choices(names)} cannot be loaded: {one_line(error)[:500]}") from error
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own == 0:
            log.warning("num_fewshot: %d does not change %s, whose file says 0", num_fewshot, name)
        elif num_fewshot is not None or own is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return loaded


@contextmanager
def _harness_seeds(tasks: Iterable[Any] = ()) -> Iterator[None]:
    """Seed what tasks draw from as the harness does, so that every model gets the same prompts; afterwards the global
    generators are as before."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        for task in tasks:
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _knows(manager: "TaskManager", names: Sequence[str]) -> bool:
    """Return whether all tasks are known, and those that groups among them consist of."""
    for name in names:
        if (entry := manager.task_index.get(name)) is None:
            return False
        members = (entry.cfg or {}).get("task") if "group" in (entry.cfg or {}) else None
        parts = [part if isinstance(part, str) else part.get("task", name) for part in members or ()]
        if not _knows(manager, [part for part in parts if part != name]):
            return False
    return True


def _listed(value: Any) -> list[Any]:
    """Return one value, or several, as a list."""
    return [value] if isinstance(value, str | Path) else list(value)
