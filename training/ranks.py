"""Which of the processes that a launcher started this one is, for work that needs no exchange between them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..errors import UserError

__all__ = ["Ranks"]

# torchrun and accelerate; then MPI's launchers.
NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True)
class Ranks:
    """Rank of `world`, and number among the processes of this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Ranks:
        """From the environment; the only one where no launcher says otherwise. Raises UserError for nonsense."""
        for rank, world, local in NAMES:
            if rank not in os.environ:
                continue
            values = [os.environ.get(name, default) for name, default in ((rank, "0"), (world, "1"), (local, "0"))]
            try:
                ranks = cls(*map(int, values))
            except ValueError:
                raise UserError(f"{rank}, {world} and {local} must be numbers, they are {values}") from None
            if not 0 <= ranks.rank < ranks.world:
                raise UserError(f"{rank} is {ranks.rank} where {world} is {ranks.world}: give both, or neither")
            return ranks
        return cls()

    def device(self, cpu: bool = False) -> torch.device:
        """This process's GPU, or the CPU."""
        if cpu or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local % torch.cuda.device_count())
