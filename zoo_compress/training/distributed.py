"""The processes that run one recipe together, through timm's set-up for torchrun."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..errors import CompressError


@dataclass(frozen=True)
class Processes:
    """This process and its peers.

    Attributes:
        device: where this process computes.
        world_size: number of processes.
        rank: number of this one; 0 is the one that writes files and prints.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world_size: int = 1
    rank: int = 0

    @property
    def distributed(self) -> bool:
        """Whether there are peers."""
        return self.world_size > 1

    @property
    def primary(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.distributed:
            dist.barrier()

    @contextmanager
    def primary_first(self) -> Iterator[None]:
        """Let the primary go through the body before its peers, for downloads."""
        if not self.primary:
            self.barrier()
        yield
        if self.primary:
            self.barrier()


@contextmanager
def init_processes(device: str | None = None) -> Iterator[Processes]:
    """Join the processes torchrun (or SLURM) started, or stand alone; leave them at the end.

    Args:
        device: `cpu`, `cuda`, …; None takes CUDA where there is one. Processes on CPU talk through gloo.

    Raises:
        CompressError: If this machine has no such device, or it holds no numbers.
    """
    from timm.utils.distributed import init_distributed_device_so

    try:
        state = init_distributed_device_so(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=state["device"]).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CompressError(f"device: expected one of this machine, found {device!r}: {str(error).splitlines()[0]}") from error
    processes = Processes(torch.device(state["device"]), state["world_size"], state["global_rank"])
    try:
        yield processes
    finally:
        if processes.distributed:
            dist.destroy_process_group()
