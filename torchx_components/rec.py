"""TorchX components: each step of the way as an application for any TorchX scheduler.

Installed, they are called by name; from a checkout, by file:

    torchx run -s local_cwd llmgr.train --nproc 2 -- --dataset DATASET --output RUN
    torchx run -s kubernetes torchx_components/rec.py:train --nnodes 4 -- --dataset /data/dataset --output /data/run

TorchX 0.7.0 runs this file inside one of its own modules and reads the annotations as they stand: hence the old typing
forms, no import of a neighbour and no `from __future__ import annotations`. Helpers have no return annotation, because
whatever is annotated as an AppDef is taken for a component.
"""

from typing import Dict, List, Optional

import torchx.specs as specs
from torchx.components import dist

# A rank that dies is restarted inside its pod. Without the second setting new ranks read the addresses of the old ones
# from the agent's shared store, and two of five restarts fail or hang (measured with torch 2.13).
RESTART_ENV = {"PET_MAX_RESTARTS": "2", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _torchrun(*args, **settings):  # type: ignore[no-untyped-def]
    # Newer TorchX renames dist.ddp.
    return getattr(dist, "torchrun", dist.ddp)(*args, **settings)


def _one_process(step, args, image, cpu, mem_mb, env, mounts):  # type: ignore[no-untyped-def]
    role = specs.Role(
        name=step,
        image=image,
        entrypoint="python",
        args=["-m", f"llmgr_rec.{step}" if step != "pipeline" else "torchx_components.pipeline", *args],
        env=env or {},
        num_replicas=1,
        resource=specs.resource(cpu=cpu, memMB=mem_mb),
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(f"llmgr-{step}", [role])


def prepare(
    *args: str,
    image: str = "llmgr-rec:latest",
    cpu: int = 4,
    mem_mb: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Turns interaction logs into a data set, in one process.

    Args:
        args: arguments for llmgr_rec.prepare (after --)
        image: container image that holds llmgr_rec
        cpu: CPUs
        mem_mb: memory in MB; TorchX asks Kubernetes for 1024 MB less and sets it as the limit
        env: environment variables, as A=1,B=2
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
    """
    return _one_process("prepare", args, image, cpu, mem_mb, env, mounts)


def train(
    *args: str,
    nnodes: int = 1,
    nproc: int = 2,
    image: str = "llmgr-rec:latest",
    h: Optional[str] = None,
    cpu: int = 4,
    gpu: int = 0,
    mem_mb: int = 16384,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 3,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Trains with torchrun: dead ranks restart in place, lost pods restart the job.

    Args:
        args: arguments for llmgr_rec.train (after --)
        nnodes: nodes, one pod each
        nproc: ranks on each node; one for each GPU
        image: container image that holds llmgr_rec
        h: named resource of the cluster, wins over cpu, gpu and mem_mb
        cpu: CPUs of each node
        gpu: GPUs of each node
        mem_mb: memory of each node in MB; TorchX asks Kubernetes for 1024 MB less and sets it as the limit
        env: environment variables, as A=1,B=2
        mounts: shared storage for data and checkpoints, as type=volume,src=CLAIM,dst=/data
        max_retries: restarts of the whole job after a lost pod
        rdzv_port: port on which the nodes find each other
    """
    return _torchrun(
        *args,
        m="llmgr_rec.train",
        name="llmgr-train",
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=mem_mb,
        j=f"{nnodes}x{nproc}",
        env={**RESTART_ENV, **(env or {})},
        mounts=mounts,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )


def evaluate(
    *args: str,
    image: str = "llmgr-rec:latest",
    cpu: int = 4,
    mem_mb: int = 16384,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Measures a run against the baselines, in one process.

    Args:
        args: arguments for llmgr_rec.evaluate (after --)
        image: container image that holds llmgr_rec
        cpu: CPUs
        mem_mb: memory in MB; TorchX asks Kubernetes for 1024 MB less and sets it as the limit
        env: environment variables, as A=1,B=2
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
    """
    return _one_process("evaluate", args, image, cpu, mem_mb, env, mounts)


def score(
    *args: str,
    image: str = "llmgr-rec:latest",
    cpu: int = 4,
    mem_mb: int = 16384,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Scores a folder of sessions into a folder of top-K lists, in one process; run again, it goes on where it stopped.

    Args:
        args: arguments for llmgr_rec.score (after --)
        image: container image that holds llmgr_rec
        cpu: CPUs
        mem_mb: memory in MB; TorchX asks Kubernetes for 1024 MB less and sets it as the limit
        env: environment variables, as A=1,B=2
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
    """
    return _one_process("score", args, image, cpu, mem_mb, env, mounts)


def pipeline(
    *args: str,
    image: str = "llmgr-rec:latest",
    cpu: int = 4,
    mem_mb: int = 16384,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Runs the whole way, from logs to report, in one container; run again, it goes on after the last finished step.

    Args:
        args: arguments for torchx_components.pipeline (after --)
        image: container image that holds llmgr_rec
        cpu: CPUs
        mem_mb: memory in MB; TorchX asks Kubernetes for 1024 MB less and sets it as the limit
        env: environment variables, as A=1,B=2
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
    """
    return _one_process("pipeline", args, image, cpu, mem_mb, env, mounts)
