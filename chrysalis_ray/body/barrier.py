"""When a turn may start, and when the next answer may leave: what makes an asynchronous scheduler decide the same in every run.

Two ways to know that Tune has had its say:

* **by count**: as many variants ask as there are places. It holds for schedulers whose trials go on or end;
* **by rest**: a whole step of Tune went by in which it heard nothing, started nothing and had nothing waiting to start. It
  holds for all of them, and is needed where a scheduler pauses trials and wakes them later; it costs a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass
class Barrier:
    """`slots` variants train at once, of `expected` in all; `by_rest` says which of the two ways is used."""

    slots: int
    expected: int
    by_rest: bool = False
    heard: Mapping[str, str] = field(default_factory=dict)  # variant -> position of the last result that Tune has dealt with
    running: frozenset[str] | None = None  # variants whose trials run; None until Tune has come to rest once

    def rest(self, heard: Mapping[str, str], running: Collection[str]) -> None:
        """Tune rests: it has dealt with these results, and waits for the trials of these variants."""
        self.heard, self.running = dict(heard), frozenset(running)

    def may_start(self, asking: Collection[str], concluded: int, told: Mapping[str, str]) -> bool:
        """Whether everybody asks who will. `told` are the positions of the answers that have left, by variant."""
        if not asking:
            return False
        if self.by_rest:
            return self._has_heard(told) and self.running is not None and self.running <= set(asking)
        return len(asking) >= min(self.slots, self.expected - concluded)

    def is_replaced(self, joined: int, concluded: int) -> bool:
        """Whether the place of a variant that ended was given to the next one, if there is one."""
        return joined - concluded >= min(self.slots, self.expected - concluded)

    def is_decided(self, asks: bool, concluded: bool, joined: int, ended: int, told: Mapping[str, str]) -> bool:
        """Whether Tune has decided on a variant that was answered: it asks again, or it ended.

        That a trial's process went away says nothing: where it died with its node, the next one tells Tune the same again.
        """
        if asks:
            return True
        if self.by_rest:
            return self._has_heard(told)
        return concluded and self.is_replaced(joined, ended)

    def _has_heard(self, told: Mapping[str, str]) -> bool:
        return self.running is not None and all(self.heard.get(name) == position for name, position in told.items())
