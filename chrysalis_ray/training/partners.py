"""Processes of one worker that share the rows of one variant's steps, where there are fewer variants than processes.

The last survivors of a population would leave cores idle. So a variant that has them to itself is trained as a body of several
workers trains it: every partner has a copy of its weights and moments, computes its part of each step's rows, gets the sum of
all gradients, and moves its copy alike. They meet once a step, in shared memory; a byte through a socket says that a part lies
there.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import combinations

import torch
from torch import Tensor, nn

from chrysalis_ray.training.limbs import Missed, shared_zeros

HERE, FAILED = b".", b"!"


class Meeting:
    """Where up to `people` processes meet and what they exchange there: two rows of P numbers each, one for every second sum.

    Made before the processes part. Each then calls `enter` with its number.
    """

    def __init__(self, people: int, row_size: int, dtype: torch.dtype) -> None:
        self.gradients_2WP = shared_zeros((2, people, row_size), dtype)
        self.losses_2W = shared_zeros((2, people), torch.float64)
        self._pairs = {pair: socket.socketpair() for pair in combinations(range(people), 2)}
        self.me: int | None = None
        self.peers: dict[int, socket.socket] = {}

    def files(self, me: int) -> list[int]:
        """The files that process `me` needs open."""
        return [
            end.fileno()
            for numbers, pair in self._pairs.items()
            for number, end in zip(numbers, pair, strict=True)
            if number == me
        ]

    def enter(self, me: int) -> None:
        """Be process `me` from now on. Ends that belong to others must be closed here: whoever dies is to be missed."""
        self.me = me
        for numbers, pair in self._pairs.items():
            for number, end, other in zip(numbers, pair, reversed(numbers), strict=True):
                if number == me:
                    self.peers[other] = end
                elif me == 0:
                    end.close()
                else:
                    end.detach()  # a limb has closed all files but its own
        self._pairs = {}

    def close(self) -> None:
        """Nobody meets here any more."""
        for end in [*self.peers.values(), *(end for pair in self._pairs.values() for end in pair)]:
            end.close()

    def wait_for(self, others: Sequence[int]) -> None:
        """Return when all these have come as far. Raises Missed if one of them failed or is gone."""
        for other in others:
            with suppress(OSError):  # it is gone, as the next line will see
                self.peers[other].sendall(HERE)
        for other in others:
            try:
                said = self.peers[other].recv(1)
            except OSError:
                said = b""
            if said != HERE:
                raise Missed(f"process {other} of this worker failed or is gone, and process {self.me} needs its part")

    @contextmanager
    def candid(self, others: Sequence[int]) -> Iterator[None]:
        """What fails inside is told to these others, who would wait."""
        try:
            yield
        except BaseException:
            for other in others:
                with suppress(OSError):  # it is gone itself
                    self.peers[other].sendall(FAILED)
            raise


class Partners:
    """An engine whose workers are the processes `group` of this worker; this one is its `rank`-th."""

    copyable, in_order = True, False

    def __init__(self, meeting: Meeting, group: Sequence[int]) -> None:
        assert meeting.me is not None
        self.device = torch.device("cpu")
        self.rank, self.world = list(group).index(meeting.me), len(group)
        self.parts: tuple[int, ...] = (self.rank,)
        self.whole = self.world
        self.others = [number for number in group if number != meeting.me]
        self._meeting, self._group = meeting, list(group)
        self._turn = 0

    def prepare(self, trunk: nn.Module) -> nn.Module:
        return trunk

    def gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def reduce(self, rows: Tensor) -> None:
        """Sum the gradients [1, P] of all partners, first to last, in place."""
        self._sum(rows[0], self._meeting.gradients_2WP)

    def total(self, parts_V: Tensor) -> Tensor:
        """The sum of the losses [1, 1] of all partners, as [1]."""
        self._sum(parts_V[0, 0], self._meeting.losses_2W)
        return parts_V[0]

    def _sum(self, own: Tensor, shared_2W: Tensor) -> None:
        """Who comes to a sum has read the one before it, so that two places in turn are enough."""
        self._turn = 1 - self._turn
        shared_W = shared_2W[self._turn]
        shared_W[self._meeting.me] = own
        self._meeting.wait_for(self.others)
        first, *later = self._group
        own.copy_(shared_W[first])
        for number in later:
            own += shared_W[number]


def groups(live: int, processes: int, most: int) -> list[list[int]]:
    """Who trains each of `live` variants: the process that has it first, then its partners, at most `most` in all.

    Every variant gets as many: with three variants on four processes nobody gets a partner.
    """
    size = min(processes // live, most)
    return [[leader, *range(live + leader * (size - 1), live + (leader + 1) * (size - 1))] for leader in range(live)]
