"""What a worker knows of the world around it: its rank, its device, its store, and omega."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chrysalis_ray.body.turn import Judged, Outcome, Turn
from chrysalis_ray.body.watch import Pulse, birth
from chrysalis_ray.core.errors import BodyError, ChrysalisError


@dataclass
class BodyContext:
    """A worker's side of the conversation with omega. Every rank asks for turn *n* and gets the same answer."""

    omega: Any
    life: int
    rank: int
    world: int

    @classmethod
    def enter(cls, omega_name: str, namespace: str, body: int) -> BodyContext:
        """Say hello. Rank 0 opens a new life of the body of this number; the others hear the life's number from rank 0."""
        import ray
        import ray.train

        train = ray.train.get_context()
        rank, world = train.get_world_rank(), train.get_world_size()
        omega = ray.get_actor(omega_name, namespace=namespace)
        node = ray.get_runtime_context().get_node_id()
        life: list[Any] = [ray.get(omega.hello.remote(world, os.getpid(), node, body))] if rank == 0 else [0]
        if world > 1:
            import torch.distributed

            torch.distributed.broadcast_object_list(life, src=0)
        ray.get(omega.present.remote(life[0], rank, os.getpid(), node, birth(os.getpid())))
        return cls(omega=omega, life=life[0], rank=rank, world=world)

    def pulse(self) -> Pulse:
        """What a worker calls whenever it gets on. Those of a body wait for each other, so that one speaks for all."""
        return Pulse((lambda: self.omega.progress.remote(self.life)) if self.rank == 0 else (lambda: None))

    def next_turn(self, after: int) -> Turn:
        """This body's part of the turn that follows number `after`; waits until there is one."""
        import ray

        return ray.get(self.omega.next_turn.remote(self.life, after))

    def commit(self, turn: Turn, outcomes: list[Outcome], seconds: float) -> None:
        """Rank 0 hands in a train turn. Returns when the cut is on disk."""
        import ray

        if self.rank == 0:
            ray.get(self.omega.commit.remote(self.life, turn.number, outcomes, seconds))

    def judged(self, turn: Turn, scores: Judged) -> None:
        """Rank 0 hands in a judge turn."""
        import ray

        if self.rank == 0:
            ray.get(self.omega.judged.remote(self.life, turn.number, scores))

    def give_up(self, error: ChrysalisError) -> None:
        """Tell omega that no life of this body can do its work. Does nothing if this life is over already."""
        import ray

        # not str(error): an error that omega raised carries its own traceback in there
        reason = f"{error.message} ({error.remedy})" if error.remedy else error.message
        ray.get(self.omega.give_up.remote(self.life, reason))


def visible(path: str) -> Path:
    """`path` as this worker sees it; run directories must lie on storage that every node shares.

    Raises BodyError when the node does not see it.
    """
    folder = Path(path)
    if not folder.exists():
        raise BodyError(
            f"{path} is not visible on node {os.uname().nodename}",
            "put --runs on storage that all nodes share (NFS, EFS, Lustre ...)",
        )
    return folder
