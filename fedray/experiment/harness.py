"""Models of a finished run in lm-evaluation-harness, and their frozen base model beside them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    result = run if isinstance(run, RunResult) else RunResult.load(run)
    finished, config = FinishedRun(result), result.config
    if config.task != "causal_lm":
        raise ConfigError(f"task: {config.task}: lm-evaluation-harness evaluates language models, task: causal_lm")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name}: expected a number above 0, got {value:g}")
    chosen = _chosen(finished, [None] if method is None else _listed(method), _listed(client), server)
    precision = _precision(finished, chosen)
    for pair in chosen:
        finished.check(*pair, moment)
    names = _listed(tasks)
    manager = load_tasks(names, [str(place) for place in _listed(include_path)], metadata or {})

    from lm_eval import __version__, simple_evaluate

    from fedray.evaluation.harness_model import HarnessModel

    ends = named_tokens(finished.tokenizer, config.evaluation.generation.end_tokens, "evaluation.generation.end_tokens")
    texts = batch_size or config.evaluation.batch_size

    def evaluated(model: PreTrainedModel, plain: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = simple_evaluate(
            HarnessModel(model, finished.tokenizer, texts, ends, config.seed, plain),
            tasks=names,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            task_manager=manager,
        )
        return found

    found = evaluated(finished.base_model(precision, device), plain=True)
    scores = [*scores_of(found, BASE, None, None, None)]
    for entry, one in chosen:
        model = finished.restored(entry, one, moment, device).model  # one adapter in memory at a time
        name, id, when = (
            (f"{entry.key} server", None, "server") if one is None else (f"{entry.key} {one.id}", one.id, moment)
        )
        scores += scores_of(evaluated(model), name, entry.key, id, when)
        del model
    return HarnessResult(
        scores=tuple(scores),
        run=str(result.place),
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


def load_tasks(names: Sequence[str], include: Sequence[str], metadata: Mapping[str, Any]) -> "TaskManager":
    """Return what knows the tasks, after each of them has been loaded once.

    The harness reads thousands of files to know its own tasks, so these are left out where one's own are enough.

    Args:
        include: folders with task files of one's own.

    Raises:
        ConfigError: lm_eval is not installed, there is no such folder or task, or a task cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ConfigError("lm-eval: the package lm_eval is not installed: pip install 'fedray[lm-eval]'") from None
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
        manager.load(list(names))
    except ConfigError:
        raise
    except Exception as error:  # the harness, datasets and tasks' own code each raise their own kinds
        raise ConfigError(f"tasks: {choices(names)} cannot be loaded: {one_line(error)[:500]}") from error
    return manager


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
