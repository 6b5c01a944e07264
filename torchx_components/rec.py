"""TorchX components: each step as an application for any TorchX scheduler.

If the package is installed they are called by name, from a checkout by file:

    torchx run -s local_cwd llmgr.train --nproc 2 -- --dataset DATASET --output RUN
    torchx run -s kubernetes torchx_components/rec.py:train --nnodes 4 -- --dataset /data/dataset --output /data/run

TorchX 0.7.0 executes this file inside one of its own modules and evaluates the annotations itself. So this file uses
the typing forms of Python 3.8, imports no other module of the package, and has no `from __future__ import annotations`.
Helpers have no return annotation, because TorchX takes each function annotated with AppDef for a component.
"""

import re
import sys
from typing import Dict, List, Optional

import torchx.specs as specs
from torchx.components import dist

# Dead ranks are restarted inside the pod. Without the second variable, new ranks read the addresses of dead ranks from
# the store of the agent, and two of five restarts failed or hung (torch 2.13).
RESTART_ENV = {"PET_MAX_RESTARTS": "2", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

# What TorchX or Kubernetes replaces: TorchX makes $ of $$, and Kubernetes also replaces $(NAME).
_REPLACED = re.compile(r"\$[$(]")
_REMOTE = re.compile(r"(?:--[\w.]+=)?[A-Za-z][A-Za-z0-9+.-]+://")


def _check(args):  # type: ignore[no-untyped-def]
    """Refuses arguments that would not arrive as written, or that the container would refuse."""
    for word in args:
        problem = ""
        if _REPLACED.search(word):
            problem = "$$ and $( are replaced on the way to the container; give a name without them"
        elif _REMOTE.match(word):
            problem = "remote storage is not supported yet; mount it (--mounts), and give the path in the container"
        elif "\0" in word:
            problem = "give a name without null characters"
        if problem:
            # An exception would print a stack trace, because TorchX shows only its own in one line.
            sys.stderr.write(f"error: argument {word!r}: {problem}\n")
            sys.exit(2)


def _torchrun(*args, **settings):  # type: ignore[no-untyped-def]
    _check(args)
    # Newer versions of TorchX rename dist.ddp.
    return getattr(dist, "torchrun", dist.ddp)(*args, **settings)


def _one_process(step, args, image, cpu, mem_mb, env, mounts):  # type: ignore[no-untyped-def]
    _check(args)
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
    """Prepares a data set from interaction logs, in one process.

    Args:
        args: arguments for llmgr_rec.prepare (after --)
        image: container image with llmgr_rec
        cpu: number of CPUs
        mem_mb: memory limit in MB; TorchX requests 1024 MB less
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
    """Trains with torchrun. Dead ranks are restarted in their pod, lost pods restart the job.

    Args:
        args: arguments for llmgr_rec.train (after --)
        nnodes: number of nodes, one pod each
        nproc: ranks per node; use one per GPU
        image: container image with llmgr_rec
        h: named resource of the cluster; overrides cpu, gpu and mem_mb
        cpu: CPUs per node
        gpu: GPUs per node
        mem_mb: memory limit per node in MB; TorchX requests 1024 MB less
        env: environment variables, as A=1,B=2
        mounts: shared storage for data and checkpoints, as type=volume,src=CLAIM,dst=/data
        max_retries: maximum number of job restarts after lost pods
        rdzv_port: rendezvous port
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
    """Evaluates a run and the baselines, in one process.

    Args:
        args: arguments for llmgr_rec.evaluate (after --)
        image: container image with llmgr_rec
        cpu: number of CPUs
        mem_mb: memory limit in MB; TorchX requests 1024 MB less
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
    """Writes top-K lists for a folder of sessions, in one process. An interrupted job continues when it is run again.

    Args:
        args: arguments for llmgr_rec.score (after --)
        image: container image with llmgr_rec
        cpu: number of CPUs
        mem_mb: memory limit in MB; TorchX requests 1024 MB less
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
    """Runs all steps from logs to report in one container. Finished steps are skipped when it is run again.

    Args:
        args: arguments for torchx_components.pipeline (after --)
        image: container image with llmgr_rec
        cpu: number of CPUs
        mem_mb: memory limit in MB; TorchX requests 1024 MB less
        env: environment variables, as A=1,B=2
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
    """
    return _one_process("pipeline", args, image, cpu, mem_mb, env, mounts)
