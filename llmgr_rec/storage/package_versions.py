"""Versions of packages, which checkpoints and bundles record."""

from importlib.metadata import PackageNotFoundError, version

_RECORDED_PACKAGES = (
    "llmgr-rec",
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "transformers",
    "peft",
    "safetensors",
)


def installed_versions() -> dict[str, str]:
    """Versions of the installed packages that determine the content of checkpoints and bundles, by package name."""
    versions = {}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def own_version() -> str:
    """Version of this package; empty if it is not installed."""
    return installed_versions().get(_RECORDED_PACKAGES[0], "")
