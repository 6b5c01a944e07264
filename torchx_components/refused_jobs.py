"""What a cluster says when it refuses a job, in one line; TorchX prints a stack trace."""

import json
import sys
from typing import Any

import torchx.schedulers.kubernetes_scheduler as scheduler

_submit = scheduler.KubernetesScheduler.schedule


def explain_refusals() -> None:
    """Makes TorchX end with one line, and exit code 2, where a cluster refuses a job or does not answer."""
    scheduler.KubernetesScheduler.schedule = _schedule


def _schedule(self: scheduler.KubernetesScheduler, job: Any) -> str:
    """In place of the method of TorchX."""
    from kubernetes.client import rest

    try:
        return _submit(self, job)
    except rest.ApiException as error:
        problem = f"the cluster refuses the job: {_reason(error)}"
    except rest.urllib3.exceptions.HTTPError as error:
        problem = f"the cluster does not answer: {error}; is the current context of kubectl the right one?"
    sys.stderr.write(f"error: {' '.join(problem.split())}\n")
    sys.exit(2)


def _reason(error: Any) -> str:
    """The message of the server; without one, its status."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        missing = "; is Volcano installed in the cluster?" if error.status == 404 else ""
        return f"{error.status} {error.reason}{missing}"
