"""All of `fedray.data` in one function: from a configuration to one shard of tokenised examples per client."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fedray.config import Config, DataConfig, RawRows
from fedray.config.partition import IntArray
from fedray.data.checks import data_notes
from fedray.data.examples import Examples, assemble
from fedray.data.formats.instructions import Instructions, find_instructions
from fedray.data.holdout import classes_of, split_holdout
from fedray.data.partition import Partition, partition
from fedray.data.shards import CHOICES, GROUP, FederatedData, Shard
from fedray.data.sources.files import Files
from fedray.data.subsample import subsample
from fedray.data.tokens.chat import ChatTemplate, find_chat_template
from fedray.data.tokens.choices import tokenise_choices
from fedray.data.tokens.tokenise import tokenise
from fedray.errors import DataError
from fedray.models.checkpoints.classes import class_order
from fedray.models.tokenizer import end_token_id, num_tokens
from fedray.randomness import keyed_rng
from fedray.types import COMMON, SPLITS, ClientId, Role, Split

OF_ONE_SOURCE = {"source", "class_", "max_examples", "max_test_examples", "max_validation_examples", "max_per_class"}
"""Fields of the section `data` that name the source, or limit all of its examples together."""


def load_federated_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> FederatedData:
    """Load, subsample, partition and tokenise the configured examples.

    Raises:
        DataError: the data does not hold what the configuration says; the message says where and what to change.
    """
    read = _read(config, tokenizer)
    examples = subsample(read.source, config.data, config.seed)
    if config.task == "classification":
        examples = replace(examples, label_names=class_order(config.model, examples.label_names))
    roles = examples.field("split")
    assigned, common = (np.flatnonzero(chosen) for chosen in (roles != COMMON, roles == COMMON))
    of_clients = examples.take(assigned) if len(common) else examples
    owned = partition(of_clients, config.partition, config.clients.count, config.seed)
    rows = {client: {split: assigned[own] for split, own in splits.items()} for client, splits in owned.items()}
    return _federated(config, tokenizer, read, examples, rows, common)


def load_newcomer(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    client: ClientId,
    files: Mapping[Role, str],
    label_names: Sequence[str],
) -> FederatedData:
    """Load and tokenise the examples of one more client, as those of a run's clients were.

    Args:
        config: the run's; its section `data` names the columns, and its section `partition` what is held out for
            validation and test where no file is named for them.
        client: the client's id.
        files: of the kinds that the source `files` reads, by what their rows serve as.
        label_names: the run's classes; empty unless the task is classification.

    Raises:
        DataError: a file cannot be read, lacks a column, or holds a class that the run does not have; or no training
            examples remain.
    """
    shared = {name: getattr(config.data, name) for name in DataConfig.model_fields.keys() - OF_ONE_SOURCE}
    config = config.model_copy(
        update={"data": Files(source="files", files={str(role): file for role, file in files.items()}, **shared)}
    )
    read = _read(config, tokenizer, label_names)
    examples, roles = read.source, read.source.field("split")
    ordered = np.argsort(examples.digests, kind="stable")
    parts: dict[Split, IntArray] = {split: ordered[roles[ordered] == split] for split in SPLITS}
    rng = keyed_rng(config.seed, "carve", client)
    own = {**parts, **split_holdout(parts["train"], classes_of(examples), config.partition, parts, rng)}
    if not len(own["train"]):
        raise DataError(
            f"{files['train']}: {len(parts['train'])} examples leave none for training besides those held out for "
            "validation and test; name more, or a file with test examples"
        )
    return _federated(config, tokenizer, read, examples, {client: own}, np.zeros(0, np.int64))


@dataclass(frozen=True)
class _Read:
    """What a source holds.

    Attributes:
        raw: its rows as they came.
        source: its rows, checked.
        instructions: how instruction data is written, by the path of a section.
        template: renders conversations.
    """

    raw: Sequence[RawRows]
    source: Examples
    instructions: Mapping[str, Instructions]
    template: ChatTemplate | None


def _read(config: Config, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str] = ()) -> _Read:
    """Read and check all rows of the configured source; see `assemble` for the names of the classes."""
    _check_choices(config)
    raw = list(config.data.load(config.task, config.seed, config.clients.count))
    template = find_chat_template(config.data, tokenizer) if config.task == "causal_lm" else None
    instructions = find_instructions(raw, config.data, template is not None) if config.task == "causal_lm" else {}
    source = assemble(raw, config.data, config.task, instructions, label_names)
    if config.data.chat_template is not None and not source.conversations:
        raise DataError(
            "data.chat_template: the data are prompts and answers as texts, which no chat template changes; leave it "
            "out, or write the data as conversations, for example with data.format: messages"
        )
    return _Read(raw, source, instructions, template)


def _federated(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    read: _Read,
    examples: Examples,
    rows: Partition,
    common: IntArray,
) -> FederatedData:
    """Tokenise examples and return them by client.

    Args:
        examples: of the source, those that are kept.
        rows: of each client and split.
        common: rows of the common test set.
    """
    tokens = tokenise(examples, tokenizer, config.data, read.template)
    choices, notes = _choices(config, examples, rows, common, tokenizer)
    grouped = {split for split in SPLITS[1:] if any(_several(examples, splits[split]) for splits in rows.values())}
    by_group = {split: examples if split in grouped else None for split in SPLITS}
    shards = {
        client: Shard(
            client,
            {
                split: _rows(tokens.table, own, by_group[split], choices if split != "train" else None)
                for split, own in splits.items()
            },
        )
        for client, splits in rows.items()
    }
    return FederatedData(
        task=config.task,
        shards=shards,
        label_names=examples.label_names,
        pad_token_id=int(tokenizer.pad_token_id),
        vocab_size=num_tokens(tokenizer),
        latent_group=_latent_groups(examples, config.data.group_column, rows),
        fingerprint=_fingerprint(examples, rows, common),
        common=_rows(tokens.table, common, examples if _several(examples, common) else None, choices)
        if len(common)
        else None,
        end_token_ids=_end_token_ids(examples, tokenizer, read.template),
        notes=(
            *chain.from_iterable(
                layout.notes(
                    {name for part in read.raw if config.data.path_of(part.task) == path for name in part.columns}
                )
                for path, layout in read.instructions.items()
            ),
            *data_notes(read.source, examples, rows, common, config.data),
            *tokens.notes,
            *notes,
        ),
        parts=_part_sizes(examples, rows, common) if len(config.data.sections_by_path) > 1 else {},
        client_parts=_client_parts(examples, rows) if len(config.data.sections_by_path) > 1 else {},
    )


def _part_sizes(examples: Examples, rows: Partition, common: IntArray) -> dict[str, dict[Role, int]]:
    """Return how many examples of every task the clients hold, and the common test set, by task and role."""
    tasks = examples.field("task")
    held: dict[Role, IntArray] = {split: np.concatenate([own[split] for own in rows.values()]) for split in SPLITS}
    held[COMMON] = common
    return {
        str(name): {role: int((tasks[of_role] == name).sum()) for role, of_role in held.items()}
        for name in np.unique(tasks)
    }


def _client_parts(examples: Examples, rows: Partition) -> dict[ClientId, dict[Split, dict[str, int]]]:
    """Return how many examples of every task a client holds, by client, split and task."""
    names, tasks = np.unique(examples.field("task"), return_inverse=True)
    return {
        client: {
            split: dict(zip(map(str, names), np.bincount(tasks[own], minlength=len(names)).tolist(), strict=True))
            for split, own in splits.items()
        }
        for client, splits in rows.items()
    }


def _end_token_ids(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None
) -> tuple[int, ...]:
    """Return the tokens that end an answer: that of a text and, in conversations, that of the assistant's turn."""
    if examples.task != "causal_lm":
        return ()
    ids = [end_token_id(tokenizer)]
    if examples.conversations and template is not None and template.end_token is not None:
        ids.append(int(tokenizer.convert_tokens_to_ids(template.end_token)))
    return tuple(dict.fromkeys(ids))


def _check_choices(config: Config) -> None:
    """Check that the data has options if a metric ranks them, and that no part of it lacks them then.

    Raises:
        DataError: it has none, or the task has none.
    """
    with_options = {path: section.choices is not None for path, section in config.data.sections_by_path.items()}
    lacking = [path for path, has in with_options.items() if not has]
    for path in lacking:
        if config.data.sections_by_path[path].choice_labels is not None:
            raise DataError(f"{path}.choice_labels: there are no options; set {path}.choices, or leave it out")
    metrics = [metric.label for metric in config.evaluation.metrics if metric.reads == "likelihoods"]
    if any(with_options.values()) and config.task != "causal_lm":
        path = next(path for path, has in with_options.items() if has)
        raise DataError(
            f"{path}.choices: the task {config.task!r} has no options; leave it out, or set task: causal_lm"
        )
    if lacking and metrics:
        raise DataError(
            f"{lacking[0]}.choices: evaluation.metrics: {metrics[0]!r} ranks an example's options, but none are named; "
            "expected the name of a column, or a list of templates"
        )
    if lacking and len(lacking) < len(with_options):
        raise DataError(f"{lacking[0]}.choices: other parts of the data have options; expected some in all or in none")


def _choices(
    config: Config, examples: Examples, rows: Partition, common: IntArray, tokenizer: PreTrainedTokenizerBase
) -> tuple[pa.Array | None, tuple[str, ...]]:
    """Return the options of every example (list<CHOICE>; nothing for training examples), and notes; None if no metric
    ranks them."""
    if not any(metric.reads == "likelihoods" for metric in config.evaluation.metrics):
        return None, ()
    measured = np.concatenate([common, *(own[split] for own in rows.values() for split in SPLITS[1:])])
    found, notes = tokenise_choices(examples.take(measured), tokenizer, config.data)
    place = np.zeros(len(examples), dtype=np.int64)
    place[measured] = np.arange(len(measured))
    known = np.isin(np.arange(len(examples)), measured)
    return found.take(pa.array(place, mask=~known)), notes


def _rows(tokens: pa.Table, rows: IntArray, grouped: Examples | None, choices: pa.Array | None = None) -> pa.Table:
    """Return these rows as a table of its own, without the buffers of the others.

    Args:
        grouped: gives the rows' groups, if the table has them.
        choices: every example's options, if the table has them.
    """
    table = tokens.take(rows).combine_chunks().replace_schema_metadata(None)
    if choices is not None:
        table = table.append_column(CHOICES, choices.take(pa.array(rows)))
    return table if grouped is None else table.append_column(GROUP, pa.array(grouped.groups[rows], pa.string()))


def _several(examples: Examples, rows: IntArray) -> bool:
    """Return whether the rows are of several groups."""
    return len(np.unique(examples.groups[rows])) > 1


def _latent_groups(examples: Examples, column: str | None, rows: Partition) -> dict[ClientId, int]:
    """Return each client's planted group; none at all if a client holds examples of several."""
    if column is None:
        return {}
    values = examples.values(column)
    groups = {client: np.unique(values[splits["train"]]) for client, splits in rows.items()}
    return {k: int(g[0]) for k, g in groups.items()} if all(len(g) == 1 for g in groups.values()) else {}


def _fingerprint(examples: Examples, rows: Partition, common: IntArray) -> str:
    digest = hashlib.sha256(examples.task.encode())
    for client, splits in rows.items():
        for split in SPLITS:
            digest.update(f"\x1f{client}\x1f{split}\x1f".encode())
            digest.update(examples.digests[splits[split]].tobytes())
    digest.update(examples.digests[common].tobytes())
    if "choices" in examples.table.column_names:
        digest.update(repr(examples.table["choices"].to_pylist()).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
