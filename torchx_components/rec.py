"""TorchX components: each command as an application for any TorchX scheduler.

If the package is installed they are called by name, from a checkout by file:

    torchx run -s local_cwd llmgr.train --nproc 2 -- --dataset DATASET --output RUN
    torchx run -s kubernetes torchx_components/rec.py:train --nnodes 4 -- --dataset /data/dataset --output /data/run

TorchX 0.7.0 executes this file inside one of its own modules and evaluates the annotations itself. So this file uses
the typing forms of Python 3.8, imports no other module of the package until a component is called, and has no
`from __future__ import annotations`. Helpers have no return annotation, because TorchX takes each function annotated
with AppDef for a component.
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
_REMOTE = re.compile(r"(?:--[\w.]+=)?([A-Za-z][A-Za-z0-9+.-]+://)")


def _refuse(message):  # type: ignore[no-untyped-def]
    """Ends with an error; an exception would print a stack trace, because TorchX shows only its own in one line."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def _check(args):  # type: ignore[no-untyped-def]
    """Refuses arguments that would not arrive as written, or that the container would refuse."""
    for word in args:
        problem, remote = "", _REMOTE.match(word)
        if _REPLACED.search(word):
            problem = "$$ and $( are replaced on the way to the container; give a name without them"
        elif remote:
            problem = _url_problem(word[remote.start(1) :])
        elif "\0" in word:
            problem = "give a name without null characters"
        if problem:
            # A URL may have a key in it.
            shown = f"{remote.group()}..." if remote else word
            _refuse(f"argument {shown!r}: {problem}")


def _url_problem(url):  # type: ignore[no-untyped-def]
    from llmgr_rec.paths import url_problem

    return url_problem(url)


def _overlaid(app, overlay):  # type: ignore[no-untyped-def]
    """Lets the file of an overlay change the pods of an application, and a cluster that refuses it say why."""
    from torchx_components.refused_jobs import explain_refusals

    explain_refusals()
    if overlay:
        from llmgr_rec.errors import UserError
        from torchx_components.pod_overlay import add_overlay

        try:
            add_overlay(app, overlay)
        except UserError as error:
            _refuse(error)
    return app


def _one_process(step, args, overlay=None, ports=None, max_retries=0, **settings):  # type: ignore[no-untyped-def]
    _check(args)
    mounts = settings["mounts"]
    role = specs.Role(
        name=step,
        image=settings["image"],
        entrypoint="python",
        args=["-m", f"llmgr_rec.{step}" if step != "pipeline" else "torchx_components.pipeline", *args],
        env=settings["env"] or {},
        num_replicas=1,
        resource=specs.resource(
            cpu=settings["cpu"], gpu=settings.get("gpu", 0), memMB=settings["mem_mb"], h=settings.get("h")
        ),
        port_map=ports or {},
        max_retries=max_retries,
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return _overlaid(specs.AppDef(f"llmgr-{step}", [role]), overlay)


def _ranks(step, args, nnodes, nproc, overlay, mem_mb, env, **settings):  # type: ignore[no-untyped-def]
    _check(args)
    # Under torchrun, --run is short for an option of its own.
    words = [re.sub(r"^--run(?==|$)", "--run_folder", word) for word in args] if step != "train" else args
    # Newer versions of TorchX rename dist.ddp.
    app = getattr(dist, "torchrun", dist.ddp)(
        *words,
        m=f"llmgr_rec.{step}",
        name=f"llmgr-{step}",
        j=f"{nnodes}x{nproc}",
        memMB=mem_mb,
        env={**RESTART_ENV, **(env or {})},
        **settings,
    )
    return _overlaid(app, overlay)


def prepare(
    *args: str,
    image: str = "llmgr-rec:latest",
    cpu: int = 4,
    mem_mb: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    overlay: Optional[str] = None,
) -> specs.AppDef:
    """Prepares a data set from interaction logs, in one process.

    Args:
        args: arguments for llmgr_rec.prepare (after --)
        image: container image with llmgr_rec
        cpu: number of CPUs
        mem_mb: memory limit in MB; TorchX requests 1024 MB less
        env: environment variables, as A=1,B=2
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
        overlay: YAML file with fields of the pod, such as tolerations (Kubernetes)
    """
    return _one_process("prepare", args, image=image, cpu=cpu, mem_mb=mem_mb, env=env, mounts=mounts, overlay=overlay)


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
    overlay: Optional[str] = None,
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
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
        overlay: YAML file with fields of the pods, such as tolerations (Kubernetes)
        max_retries: maximum number of job restarts after lost pods
        rdzv_port: rendezvous port
    """
    return _ranks(
        "train",
        args,
        nnodes=nnodes,
        nproc=nproc,
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        mem_mb=mem_mb,
        env=env,
        mounts=mounts,
        overlay=overlay,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )


def evaluate(
    *args: str,
    nnodes: int = 1,
    nproc: int = 1,
    image: str = "llmgr-rec:latest",
    h: Optional[str] = None,
    cpu: int = 4,
    gpu: int = 0,
    mem_mb: int = 16384,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    overlay: Optional[str] = None,
    max_retries: int = 3,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Evaluates a run and the baselines, on one rank or several.

    Args:
        args: arguments for llmgr_rec.evaluate (after --)
        nnodes: number of nodes, one pod each
        nproc: ranks per node; use one per GPU
        image: container image with llmgr_rec
        h: named resource of the cluster; overrides cpu, gpu and mem_mb
        cpu: CPUs per node
        gpu: GPUs per node
        mem_mb: memory limit per node in MB; TorchX requests 1024 MB less
        env: environment variables, as A=1,B=2
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
        overlay: YAML file with fields of the pods, such as tolerations (Kubernetes)
        max_retries: maximum number of job restarts after lost pods
        rdzv_port: rendezvous port
    """
    return _ranks(
        "evaluate",
        args,
        nnodes=nnodes,
        nproc=nproc,
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        mem_mb=mem_mb,
        env=env,
        mounts=mounts,
        overlay=overlay,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )


def score(
    *args: str,
    nnodes: int = 1,
    nproc: int = 1,
    image: str = "llmgr-rec:latest",
    h: Optional[str] = None,
    cpu: int = 4,
    gpu: int = 0,
    mem_mb: int = 16384,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    overlay: Optional[str] = None,
    max_retries: int = 3,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Writes top-K lists for a folder of sessions, on one rank or several. An interrupted job continues.

    Args:
        args: arguments for llmgr_rec.score (after --)
        nnodes: number of nodes, one pod each
        nproc: ranks per node; use one per GPU
        image: container image with llmgr_rec
        h: named resource of the cluster; overrides cpu, gpu and mem_mb
        cpu: CPUs per node
        gpu: GPUs per node
        mem_mb: memory limit per node in MB; TorchX requests 1024 MB less
        env: environment variables, as A=1,B=2
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
        overlay: YAML file with fields of the pods, such as tolerations (Kubernetes)
        max_retries: maximum number of job restarts after lost pods
        rdzv_port: rendezvous port
    """
    return _ranks(
        "score",
        args,
        nnodes=nnodes,
        nproc=nproc,
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        mem_mb=mem_mb,
        env=env,
        mounts=mounts,
        overlay=overlay,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )


def report(
    *args: str,
    image: str = "llmgr-rec:latest",
    cpu: int = 2,
    mem_mb: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    overlay: Optional[str] = None,
) -> specs.AppDef:
    """Writes a report of a run as an HTML page.

    Args:
        args: arguments for llmgr_rec.report (after --)
        image: container image with llmgr_rec
        cpu: number of CPUs
        mem_mb: memory limit in MB; TorchX requests 1024 MB less
        env: environment variables, as A=1,B=2
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
        overlay: YAML file with fields of the pod, such as tolerations (Kubernetes)
    """
    return _one_process(
        "report",
        args,
        image=image,
        cpu=cpu,
        mem_mb=mem_mb,
        env=env,
        mounts=mounts,
        overlay=overlay,
    )


def extend(
    *args: str,
    image: str = "llmgr-rec:latest",
    cpu: int = 4,
    mem_mb: int = 16384,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    overlay: Optional[str] = None,
) -> specs.AppDef:
    """Makes a run for the catalog of today, without training, in one process.

    Args:
        args: arguments for llmgr_rec.extend (after --)
        image: container image with llmgr_rec
        cpu: number of CPUs
        mem_mb: memory limit in MB; TorchX requests 1024 MB less
        env: environment variables, as A=1,B=2
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
        overlay: YAML file with fields of the pod, such as tolerations (Kubernetes)
    """
    return _one_process("extend", args, image=image, cpu=cpu, mem_mb=mem_mb, env=env, mounts=mounts, overlay=overlay)


def serve(
    *args: str,
    port: int = 8000,
    image: str = "llmgr-rec:latest",
    h: Optional[str] = None,
    cpu: int = 4,
    gpu: int = 0,
    mem_mb: int = 16384,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    overlay: Optional[str] = None,
    max_retries: int = 3,
) -> specs.AppDef:
    """Serves recommendations over HTTP on all addresses of its pod.

    Args:
        args: arguments for llmgr_rec.serve (after --)
        port: port of the service
        image: container image with llmgr_rec
        h: named resource of the cluster; overrides cpu, gpu and mem_mb
        cpu: number of CPUs
        gpu: number of GPUs
        mem_mb: memory limit in MB; TorchX requests 1024 MB less
        env: environment variables, as A=1,B=2
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
        overlay: YAML file with fields of the pod, such as tolerations (Kubernetes)
        max_retries: maximum number of job restarts after a lost pod
    """
    return _one_process(
        "serve",
        ["--host", "0.0.0.0", "--port", str(port), *args],
        ports={"http": port},
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        mem_mb=mem_mb,
        env=env,
        mounts=mounts,
        overlay=overlay,
        max_retries=max_retries,
    )


def pipeline(
    *args: str,
    image: str = "llmgr-rec:latest",
    h: Optional[str] = None,
    cpu: int = 4,
    gpu: int = 0,
    mem_mb: int = 16384,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    overlay: Optional[str] = None,
) -> specs.AppDef:
    """Runs all steps from logs to report in one container. Finished steps are skipped when it is run again.

    Args:
        args: arguments for torchx_components.pipeline (after --)
        image: container image with llmgr_rec
        h: named resource of the cluster; overrides cpu, gpu and mem_mb
        cpu: number of CPUs
        gpu: number of GPUs
        mem_mb: memory limit in MB; TorchX requests 1024 MB less
        env: environment variables, as A=1,B=2
        mounts: shared storage, as type=volume,src=CLAIM,dst=/data
        overlay: YAML file with fields of the pod, such as tolerations (Kubernetes)
    """
    return _one_process(
        "pipeline",
        args,
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        mem_mb=mem_mb,
        env=env,
        mounts=mounts,
        overlay=overlay,
    )
