"""Objects of images: an index of them, and the samples that they make."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from samjax.data.sources import Objects


@runtime_checkable
class Marked(Protocol):
    """What tells an object from others: its id is its own among those of its image."""

    @property
    def id(self) -> int | str:
        """The object's id."""

    @property
    def category(self) -> int | str | None:
        """The id of its category, where it has one."""

    @property
    def is_crowd(self) -> bool:
        """Whether it stands for many objects."""


class Object(NamedTuple):
    """An object of which nothing else is known before its image is read."""

    id: int | str
    category: int | str | None
    is_crowd: bool = False


# The objects of images in turn, as flat lists, which are quick to parse: how many each image has,
# and ids, categories, and the places of crowds, of all of them.
Index = dict[str, list[Any]]


def empty_index() -> Index:
    """That of no image."""
    return {"counts": [], "ids": [], "categories": [], "crowds": []}


def add_image(index: Index, objects: Sequence[Marked]) -> None:
    """Adds the objects of one more image."""
    index["counts"].append(len(objects))
    for one in objects:
        if one.is_crowd:
            index["crowds"].append(len(index["ids"]))
        index["ids"].append(one.id)
        index["categories"].append(one.category)


def objects_of(index: Index) -> list[list[Object]]:
    """The objects of each image."""
    crowds = [False] * len(index["ids"])
    for position in index["crowds"]:
        crowds[position] = True
    every = map(Object._make, zip(index["ids"], index["categories"], crowds, strict=True))
    return [list(itertools.islice(every, count)) for count in index["counts"]]


T = TypeVar("T", bound=Marked)


@dataclasses.dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """One sample: an image by its position, and those of its objects whose union is the mask."""

    name: str
    image: int
    objects: tuple[T, ...]


def choose(
    images: Iterable[tuple[str, Iterable[T]]],
    objects: Objects,
    kept: Collection[int | str] | None,
) -> list[Choice[T]]:
    """The samples of images, in order; an image is its name and what is marked in it.

    `kept` are the categories that count, None for all. Together, each image is a sample, and
    crowds belong to its mask. With `objects` each, a sample is `image#id`, and crowds are left out,
    since they are many objects.
    """
    choices: list[Choice[T]] = []
    for position, (name, marked) in enumerate(images):
        chosen = [one for one in marked if kept is None or one.category in kept]
        if objects == "together":
            choices.append(Choice(name, position, tuple(chosen)))
        else:
            choices += [
                Choice(f"{name}#{one.id}", position, (one,)) for one in chosen if not one.is_crowd
            ]
    return choices
