"""Finds the programs of a Kubernetes API server; as a command, ends with 1 if one is missing."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

# Where `make test-k8s` builds them.
BUILT = Path(__file__).parents[2] / "runs" / "kubernetes"
# Variable with the folder where those who test controllers have them (setup-envtest).
ASSETS = "KUBEBUILDER_ASSETS"


@dataclass(frozen=True)
class Programs:
    """Paths of the programs.

    Args:
        etcd: The store.
        api_server: kube-apiserver.
    """

    etcd: Path
    api_server: Path


def find_programs() -> Programs | None:
    """The programs in the folder `KUBEBUILDER_ASSETS`, on the PATH, or built in `BUILT`; None if one is missing."""
    folders = [os.environ.get(ASSETS, ""), os.environ.get("PATH", ""), str(BUILT)]
    path = os.pathsep.join(filter(None, folders))
    etcd, api_server = (shutil.which(name, path=path) for name in ("etcd", "kube-apiserver"))
    return Programs(Path(etcd), Path(api_server)) if etcd and api_server else None


if __name__ == "__main__":
    sys.exit(find_programs() is None)
