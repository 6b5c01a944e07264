"""What a run was computed on: processor, cores, memory and device."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from llmgr_rec.process_facts import memory_bytes


@dataclass(frozen=True)
class Machine:
    """A machine, without anything that identifies it.

    Args:
        processor: Name of the processor.
        cores: Number of cores that the process may use.
        memory_gib: Memory that the process may use, in GiB.
        device: Name of the GPU, or CPU.
    """

    processor: str
    cores: int
    memory_gib: float
    device: str

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        """This machine.

        Args:
            device: Device of the models.
        """
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return cls(processor_name(), len(os.sched_getaffinity(0)), round(memory_bytes() / 2**30, 1), name)


def processor_name() -> str:
    """Name of the processor; its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())
