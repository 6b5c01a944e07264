"""`python -m torchx_components.configure`: writes .torchxconfig, the defaults of `torchx run`, into the current folder.

    python -m torchx_components.configure
    python -m torchx_components.configure --image REGISTRY/llmgr-rec:TAG --queue ml

TorchX reads the file from the folder it is called in, and from the home folder. Without it, TorchX builds an image of
the current folder for every run on Kubernetes, which needs a Docker daemon.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmgr_rec.cli import make_parser, parse_args, run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write, storage_errors
from llmgr_rec.first_and_last_line import print_result
from llmgr_rec.paths import LocalPath

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

COMPONENTS = ("prepare", "train", "evaluate", "score", "report", "extend", "serve", "pipeline")

_HEAD = """\
# Defaults of `torchx run` in this folder, by python -m torchx_components.configure. With them
#     torchx run --dryrun -s kubernetes dist.ddp llmgr_rec.train
# renders a Volcano job that trains on a cluster, and
#     torchx run -s local_cwd dist.ddp llmgr_rec.train
# trains on this machine with two ranks. Options on the command line take precedence.

[cli:run]
# Empty: use the prebuilt image. By default TorchX builds an image of this folder, which needs a Docker daemon.
workspace =

[component:dist.ddp]
# The word llmgr_rec.train on the command line becomes the first argument of the trainer, which skips it.
m = llmgr_rec.train
j = 1x2
cpu = 4
# Limit in MB. TorchX requests 1024 MB less, so its default of 1024 would request nothing and be killed at 1 GB.
memMB = 16384
# A lost pod restarts the whole job. A dead rank is restarted inside its pod, with a new store.
max_retries = 3
env = PET_MAX_RESTARTS=2,TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
"""


def render(image: str, mounts: str, overlay: str, schedulers: Mapping[str, Mapping[str, str]]) -> str:
    """The content of .torchxconfig.

    Args:
        image: Container image with this package.
        mounts: Shared storage, as TorchX writes it; empty for none.
        overlay: YAML file with fields of the pods; empty for none.
        schedulers: Options by scheduler; empty values are left out.
    """
    shared = {"image": image, "mounts": mounts}
    parts = [_HEAD + _lines(shared)]
    parts += [_section(f"component:llmgr.{name}", {**shared, "overlay": overlay}) for name in COMPONENTS]
    parts += [_section(name, options) for name, options in schedulers.items()]
    return "\n".join(part for part in parts if part)


def _section(name: str, options: Mapping[str, str]) -> str:
    lines = _lines(options)
    return f"[{name}]\n{lines}" if lines else ""


def _lines(options: Mapping[str, str]) -> str:
    # TorchX replaces %(name)s in values.
    return "".join(f"{name} = {value.replace('%', '%%')}\n" for name, value in options.items() if value)


def _parser() -> "ArgumentParser":
    parser = make_parser(
        "torchx_components.configure",
        "Writes .torchxconfig, the defaults of torchx run in the current folder.",
        "--image REGISTRY/llmgr-rec:TAG --queue ml --mounts type=volume,src=CLAIM,dst=/data",
    )
    parser.add_argument("--image", type=str, default="llmgr-rec:latest", help="Container image with llmgr_rec.")
    parser.add_argument("--queue", type=str, default="default", help="Queue of Volcano.")
    parser.add_argument("--namespace", type=str, default="default", help="Namespace of the cluster.")
    parser.add_argument("--service_account", type=str, default="", help="Service account of the pods.")
    parser.add_argument(
        "--mounts",
        type=str,
        default="",
        help="Shared storage, as type=volume,src=CLAIM,dst=/data; for every component.",
    )
    parser.add_argument(
        "--overlay", type=LocalPath, help="YAML file with fields of the pods, for every component llmgr.NAME."
    )
    parser.add_argument("--partition", type=str, default="", help="Partition of Slurm.")
    parser.add_argument("--time", type=str, default="", help="Time limit of a Slurm job, as 1-12:00:00.")
    parser.add_argument("--output", type=LocalPath, default=".torchxconfig", help="File to write.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the file if it exists.")
    return parser


def main(argv: Sequence[str]) -> None:
    """Parses arguments and writes the file.

    Args:
        argv: Arguments of the command.

    Raises:
        UserError: The file exists, or a value has a line break.
    """
    arguments = parse_args(_parser(), argv)
    output = Path(arguments.output)
    if output.exists() and not arguments.overwrite:
        raise UserError(f"{output} exists; edit it, or give --overwrite to replace it")
    for name, value in arguments.as_dict().items():
        if isinstance(value, str) and any(not character.isprintable() for character in value):
            raise UserError(f"--{name} is {value!r}; give it without line breaks and control characters")
    schedulers = {
        "kubernetes": {name: getattr(arguments, name) for name in ("queue", "namespace", "service_account")},
        "slurm": {name: getattr(arguments, name) for name in ("partition", "time")},
    }
    overlay = str(Path(arguments.overlay).resolve()) if arguments.overlay else ""
    with storage_errors(output), atomic_write(output) as partial:
        partial.write_text(render(arguments.image, arguments.mounts, overlay, schedulers))
    print_result("configure", "defaults of torchx run in this folder", output)


if __name__ == "__main__":
    run_cli(main)
