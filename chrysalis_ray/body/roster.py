"""The bodies of a run as omega knows them: which life each is in, and what it still has to do of the turn at work.

A turn is dealt to the bodies as a pure function of what is in it, so that a run that is resumed packs the same variants
together. It is over when every body has handed in its part. A body that comes back to life finds the part it had not handed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from chrysalis_ray.body.turn import Turn
from chrysalis_ray.core.errors import BodyError


def parts_of(turn: Turn, bodies: int) -> dict[int, Turn]:
    """What each body does of a turn, by its number: neighbours together, as evenly as it goes. Everybody hears a dissolve.

    No part is larger than 1 / bodies of the turn, rounded up; a body without a part stays out of the turn. Candidates that are
    compared with each other are judged side by side, by the first body.
    """
    if turn.kind == "dissolve":
        return dict.fromkeys(range(bodies), turn)
    parts = {}
    judges = 1 if any(candidate.compare for candidate in turn.candidates) else bodies
    for body in range(bodies):
        work, candidates = _share(turn.work, body, bodies), _share(turn.candidates, body, judges)
        if work or candidates:
            parts[body] = replace(turn, work=work, candidates=candidates)
    return parts


def _share(items: tuple[Any, ...], body: int, bodies: int) -> tuple[Any, ...]:
    return items[body * len(items) // bodies : (body + 1) * len(items) // bodies]


@dataclass
class Life:
    """One life of one body, from the hello of its first worker on."""

    body: int
    number: int = 0
    workers: dict[int, tuple[int, str, str]] = field(default_factory=dict)  # rank -> (process, node, its birth)


class Roster:
    """Who is alive, and the turn at work. Lives are numbered through, over all bodies: a number says which body it is of."""

    def __init__(self, bodies: int) -> None:
        self.lives = [Life(body) for body in range(bodies)]
        self.in_vain = [0] * bodies  # lives in a row that handed in nothing
        self.born = 0
        self.turn: Turn | None = None
        self.parts: dict[int, Turn] = {}  # body -> what it has not handed in yet
        self.results: dict[int, Any] = {}

    # lives

    def begin(self, body: int) -> int:
        """A new life of a body; everything older of it is stale from now on. Returns its number.

        Raises BodyError for a body that this run does not have.
        """
        if not 0 <= body < len(self.lives):
            raise BodyError(f"a body numbered {body} said hello; this run has {len(self.lives)}")
        self.born += 1
        self.in_vain[body] += 1
        self.lives[body] = Life(body, self.born)
        return self.born

    def is_current(self, life: int) -> bool:
        return any(other.number == life for other in self.lives)

    def life(self, number: int) -> Life:
        """The life of this number. Raises BodyError if it is over."""
        for life in self.lives:
            if life.number == number:
                return life
        now = ", ".join(str(life.number) for life in self.lives)
        raise BodyError(f"this worker belongs to life {number} of its body; the living are in life {now}")

    def busy(self) -> list[Life]:
        """The lives that have something of the turn at work to do. One whose workers have not said where they are is not
        counted: it is about to begin."""
        return [life for life in self.lives if life.body in self.parts and life.workers]

    # the turn at work

    def publish(self, turn: Turn) -> None:
        """Deal a turn out."""
        self.turn, self.parts, self.results = turn, parts_of(turn, len(self.lives)), {}

    def part(self, number: int, after: int) -> Turn | None:
        """What the body in life `number` has to do after turn `after`, None if nothing yet.

        Raises BodyError for a stale life.
        """
        part = self.parts.get(self.life(number).body)
        return part if part is not None and part.number > after else None

    def hand_in(self, number: int, turn: int, result: Any) -> bool:
        """Take a body's result; says whether the turn is over now. Raises BodyError for a stale life or another turn."""
        body = self.life(number).body
        part = self.parts.get(body)
        if part is None or part.number != turn:
            raise BodyError(f"turn {turn} is over: nothing of it is left for life {number}")
        del self.parts[body]
        self.results[body] = result
        self.in_vain[body] = 0
        return not self.parts

    def collected(self) -> list[Any]:
        """The results of the turn that is over, in the order of the bodies, which is that of its variants or candidates."""
        self.turn = None
        return [self.results[body] for body in sorted(self.results)]
