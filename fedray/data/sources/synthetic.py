"""`synthetic`: generated texts with planted groups of clients, for checking that clustering finds what is there.

A text is a handful of its topic's words among words that every topic uses. In group 0 class c is topic c. In group g
the labels of a share `conflict` of the topics are shifted cyclically by g among themselves, so that between any two
groups every one of those topics has two different labels: no single model can serve both groups.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedray.config import DataConfig, RawRows
from fedray.config.section import PositiveInt
from fedray.data.client_names import numbered
from fedray.errors import DataError
from fedray.randomness import keyed_rng
from fedray.types import Task

GROUP = "latent_group"
TOPIC_WORDS = 6
COMMON_WORDS = 4

COMMON = "about after again around because before every many much never often other people really some thing"
TOPICS = {
    "animals": "bird cat cow deer dog fish fox goat horse lion mouse rabbit sheep tiger wolf",
    "music": "band bass choir concert dance drum guitar melody opera piano rhythm singer song tune violin",
    "food": "apple bread butter cheese dinner egg fruit honey lunch meat pepper rice salt soup sugar",
    "sport": "athlete ball champion coach football game goal league match player race referee score team tennis",
    "weather": "cloud cold flood fog frost heat ice lightning rain snow storm sun temperature thunder wind",
    "money": "account bank bill budget cash coin credit debt dollar interest loan market price profit tax",
    "travel": "airport beach boat bridge bus hotel journey luggage map passport road station ticket train visit",
    "medicine": "blood bone cure disease doctor fever health heart hospital illness nurse pain patient pill surgery",
    "school": "book chalk class exam grade homework lesson library math paper pencil pupil student teacher university",
    "space": "astronaut comet earth galaxy gravity jupiter mars meteor moon orbit planet rocket satellite star sky",
    "home": "bed carpet chair curtain door floor garden kitchen lamp mirror roof sofa table wall window",
    "war": "army attack battle bomb captain castle defeat enemy fight general navy peace soldier sword victory",
}


class Synthetic(DataConfig):
    """Planted clients of equal size; groups have equally many clients, up to one."""

    group_column: ClassVar[str | None] = GROUP

    groups: PositiveInt = 2
    """Number of latent groups of clients."""
    classes: Annotated[int, Field(ge=2)] = 4
    """Number of classes."""
    examples_per_client: PositiveInt = 60
    """Examples per client, test and validation included."""
    conflict: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of classes whose labels are permuted differently in every latent group (0: no groups at all)."""

    def load(self, task: Task, seed: int, num_clients: int | None) -> list[RawRows]:
        """Return `examples_per_client` rows per client.

        Columns: text and prompt (the same), label and answer (the same, a topic's name), topic, latent_group.

        Raises:
            DataError: no number of clients, or more groups than the conflicting classes can tell apart.
        """
        if num_clients is None:
            raise DataError("clients.count: the source `synthetic` plants clients; say how many")
        names, words = _topics(self.classes, seed)
        labels = _labels(self, seed)
        groups = keyed_rng(seed, "latent groups").permutation(num_clients) % self.groups
        return [
            _client(name, int(group), names, words, labels[group], self, seed)
            for name, group in zip(numbered(num_clients), groups, strict=True)
        ]


def _client(
    name: str, group: int, names: list[str], words: list[list[str]], labels: Sequence[int], data: Synthetic, seed: int
) -> RawRows:
    rng = keyed_rng(seed, "synthetic client", name)
    size = data.examples_per_client
    # Every class equally often, up to one: skew between clients is the groups' alone.
    topics = rng.permutation(np.arange(size) % data.classes)
    texts = [_text(words[topic], rng) for topic in topics]
    classes = [names[labels[topic]] for topic in topics]
    columns = {
        data.text: texts,
        data.label: classes,
        "prompt": texts,
        "answer": classes,
        "topic": [names[topic] for topic in topics],
        GROUP: [group] * size,
    }
    return RawRows("synthetic", columns, "train", name, "synthetic")


def _text(words: list[str], rng: np.random.Generator) -> str:
    picked = [*rng.choice(words, TOPIC_WORDS), *rng.choice(COMMON.split(), COMMON_WORDS)]
    return " ".join(picked[i] for i in rng.permutation(len(picked)))


def _labels(data: Synthetic, seed: int) -> list[list[int]]:
    """Return the class of every topic, per group: [groups][topics]."""
    conflicting = round(data.conflict * data.classes)
    if data.groups > 1 and 0 < conflicting < data.groups:
        raise DataError(
            f"data.groups: {data.groups} groups need at least as many conflicting classes, got {conflicting} "
            f"(conflict {data.conflict:g} of {data.classes} classes); raise data.conflict or data.classes, "
            "or set data.conflict to 0"
        )
    moved = keyed_rng(seed, "conflicting classes").permutation(data.classes)[:conflicting]
    permutations = []
    for group in range(data.groups):
        labels = np.arange(data.classes)
        labels[moved] = np.roll(moved, -group)
        permutations.append([int(label) for label in labels])
    return permutations


def _topics(classes: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Return names and words of the topics; beyond the English ones, words are made up of syllables."""
    topics = {name: words.split() for name, words in list(TOPICS.items())[:classes]}
    rng = keyed_rng(seed, "made-up words")
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    for number in range(len(topics), classes):
        topics[f"topic {number}"] = ["".join(rng.choice(syllables, 3)) for _ in range(15)]
    return list(topics), list(topics.values())


ENTRY = Synthetic
