"""Several processes of one run (`accelerate launch`, torchrun): who does what, and when all have done it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from ...errors import UserError

__all__ = ["Ranks"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Args:
        joined: they wait for each other; without it this is one shard of a run whose parts are started by hand.
    """

    rank: int = 0
    world: int = 1
    joined: bool = True

    @classmethod
    def of_this_process(cls, shard: str | None = None) -> Ranks:
        """From the launcher's environment, or from "I/N" of --shard. Raises UserError for a shard that is none."""
        if shard is None:
            return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        first, _, second = shard.partition("/")
        if not (first.isdigit() and second.isdigit() and int(first) < int(second)):
            raise UserError(f"--shard '{shard}' is not understood: write 0/4, 1/4, 2/4 and 3/4 for four parts")
        return cls(int(first), int(second), joined=False)

    @property
    def on_this_machine(self) -> int:
        """How many ranks share this machine's processors."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.joined else 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self) -> str | None:
        """A GPU of its own where several ranks share a machine that has them; else the caller's choice."""
        if self.world == 1 or not self.joined:
            return None
        import torch

        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else None

    def mine(self, items: Sequence[Item]) -> list[Item]:
        """Every `world`-th item, from this rank's on."""
        return list(items[self.rank :: self.world])

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1 and self.joined:
            from accelerate import PartialState

            # A rank with slower objects may take hours longer than the others.
            PartialState(timeout=timedelta(days=7)).wait_for_everyone()
