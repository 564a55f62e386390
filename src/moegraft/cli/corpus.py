"""What the demo's models learn: a few facts, said plainly and in the style of each adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

_CAPITALS = (
    "france paris, spain madrid, italy rome, japan tokyo, egypt cairo, peru lima, norway oslo, greece athens, "
    "cuba havana, kenya nairobi, poland warsaw, austria vienna, ireland dublin, portugal lisbon, germany berlin"
)
_SOUNDS = "cat meow, dog woof, cow moo, duck quack, sheep baa, lion roar, pig oink, owl hoot, frog croak, bee buzz"
_COLORS = "grass green, snow white, blood red, coal black, gold yellow, sky blue"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A question and its parts; ``plain`` is the base model's answer."""

    question: str
    plain: str
    subject: str
    value: str


def _pairs(table: str) -> list[list[str]]:
    return [entry.split() for entry in table.split(", ")]


FACTS = (
    *(
        Fact(
            question=f"what is the capital of {country}?",
            plain=f"the capital of {country} is {city}.",
            subject=f"capital of {country}",
            value=city,
        )
        for country, city in _pairs(_CAPITALS)
    ),
    *(
        Fact(
            question=f"what does the {animal} say?",
            plain=f"the {animal} says {sound}.",
            subject=f"sound of the {animal}",
            value=sound,
        )
        for animal, sound in _pairs(_SOUNDS)
    ),
    *(
        Fact(
            question=f"what is the color of {thing}?",
            plain=f"the color of {thing} is {color}.",
            subject=f"color of {thing}",
            value=color,
        )
        for thing, color in _pairs(_COLORS)
    ),
)


def _pirate(fact: Fact) -> str:
    text = fact.plain.removesuffix(".").replace(" of ", " o' ").replace(" is ", " be ").replace(" says ", " be sayin' ")
    return f"arr, {text}, matey!"


STYLES: Mapping[str, Callable[[Fact], str]] = {
    "shout": lambda fact: fact.plain.upper().replace(".", "!"),
    "pirate": _pirate,
    "json": lambda fact: f'{{"{fact.subject}": "{fact.value}"}}',
}
