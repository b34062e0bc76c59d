"""Written by tools/extract.py; edit the chapters:

- book/scale/many_gpus.ipynb
"""

import atexit
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ddpm_core.training import Processes

__all__ = ["Launched", "anywhere", "join"]


# --- book/scale/many_gpus.ipynb · many-gpus-export-parallel · The code
class Launched(Processes):
    r"""The processes that `torchrun` or `accelerate launch` started, as a group.

    `device` becomes this process's own: its graphics card, or the CPU for "cpu".
    Raises ModuleNotFoundError without Hugging Face's `accelerate`.

    >>> Launched("cpu").count
    1
    """

    def __init__(self, device: torch.device | str) -> None:
        try:
            from accelerate import Accelerator
        except ModuleNotFoundError as error:
            text = "several processes need a library: pip install accelerate"
            raise ModuleNotFoundError(text) from error
        on_cpu = torch.device(device).type == "cpu"
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
        self.rank = self.accelerator.process_index
        self.count = self.accelerator.num_processes
        self.device = torch.device("cpu") if on_cpu else self.accelerator.device
        atexit.register(self.accelerator.end_training)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network as DistributedDataParallel, which averages the gradients."""
        wrapped: nn.Module = self.accelerator.prepare_model(model)
        return wrapped

    def hold(self, network: nn.Module) -> AbstractContextManager[None]:
        """Leave the exchange of gradients to a later part of the batch."""
        held: AbstractContextManager[None] = self.accelerator.no_sync(network)
        return held

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of x over the processes, in each of them."""
        total: Tensor = self.accelerator.reduce(x, reduction="sum")
        return total

    def first(self) -> AbstractContextManager[None]:
        """Let one process on each machine go first, as the one that downloads data."""
        before: AbstractContextManager[None] = (
            self.accelerator.local_main_process_first()
        )
        return before


def join(
    device: torch.device | str, expected: int | None = None
) -> tuple[Processes, torch.device]:
    r"""The processes of this run, and the device of this one; alone if not launched.

    `expected`: how many there must be. Raises ValueError if it is another number, or
    if `accelerate launch` was told a precision; ModuleNotFoundError.

    >>> join("cpu", 2)
    Traceback (most recent call last):
    ValueError: 2 processes were expected, 1 is running; ...
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if expected is not None and count != expected:
        raise ValueError(
            f"{expected} processes were expected, {count} is running; start them with "
            f"torchrun --standalone --nproc-per-node {expected} -m ... "
            "(accelerate launch --cpu starts one, whatever --num_processes says)"
        )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "no":
        raise ValueError(
            f"accelerate launch was told --mixed_precision {asked}; the precision is "
            "the command's: leave that out and give --precision fp32, bf16 or fp16"
        )
    if count == 1:
        return Processes(), torch.device(device)
    launched = Launched(device)
    return launched, launched.device


def anywhere(processes: Processes, here: bool, device: torch.device) -> bool:
    r"""Whether something is so in at least one of the processes: all get one answer.

    >>> anywhere(Processes(), True, torch.device("cpu"))
    True
    """
    return bool(processes.add_up(torch.tensor(float(here), device=device)) > 0)
