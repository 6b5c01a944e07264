"""A run as the report reads it: its training records, its evaluation, and facts about both in words."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmgr_rec.config import STAGES, settings
from llmgr_rec.config_file import load_config, recipe_names
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.evaluated import Evaluated
from llmgr_rec.evaluation.results import MODEL_NAMES
from llmgr_rec.storage.bundle_index import bundle_hash, is_complete
from llmgr_rec.storage.run_facts import read_launches

# Settings that say where a run is computed and not what it is.
_NOT_OF_A_RECIPE = ("runtime.", "seed")
_SHOWN_CHANGES = 4


@dataclass(frozen=True)
class ReportedRun:
    """A run and its evaluation.

    Args:
        label: Name of the run in the report; no two runs have the same.
        path: Run folder.
        records: Lines of metrics.jsonl, without incomplete ones.
        launches: Launches of its training, see `read_launches`.
        bundle_hashes: Hashes of its bundles.
        evaluated: Its evaluation; None if it was not evaluated.
    """

    label: str
    path: Path
    records: Sequence[Mapping[str, Any]]
    launches: Sequence[Mapping[str, Any]]
    bundle_hashes: Collection[str]
    evaluated: Evaluated | None

    @classmethod
    def read(cls, path: Path, label: str, metrics: Path | None) -> "ReportedRun":
        """Reads a run.

        Args:
            path: Run folder written by train.
            label: Name of the run.
            metrics: Metrics file; None takes RUN/metrics.json if it exists.

        Raises:
            UserError: The folder is not a run, or the metrics are absent, damaged or of another run.
        """
        records = _read_records(path)
        exports = [path / "export" / stage for stage in STAGES]
        hashes = {bundle_hash(export) for export in exports if is_complete(export)}
        file = metrics or path / "metrics.json"
        evaluated = Evaluated.read(file) if metrics is not None or file.is_file() else None
        if evaluated is not None:
            _check_bundles(evaluated, hashes, path)
        return cls(label, path, records, read_launches(path), hashes, evaluated)

    @property
    def settings(self) -> str:
        """Text of config.yaml; empty without one."""
        file = self.path / "config.yaml"
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

    def facts(self) -> dict[str, str]:
        """Recipe, date, duration, machine, seed and version; what an earlier version did not record is left out."""
        facts = {"Recipe": self._recipe()}
        if self.launches:
            last = self.launches[-1]
            facts["Trained"] = f"{last['started'][:16].replace('T', ' ')} UTC, in {self._duration()}"
            facts["Machine"] = "; then ".join(dict.fromkeys(map(_machine, self.launches)))
        seed = self.launches[-1]["seed"] if self.launches else self._config_value("seed")
        if seed is not None:
            facts["Seed"] = str(seed)
        if versions := [launch["version"] for launch in self.launches if launch["version"]]:
            facts["Version"] = "llmgr_rec " + ", ".join(dict.fromkeys(versions))
        return facts

    def _duration(self) -> str:
        """Time of all launches; a killed one is only known up to the end of its last stage."""
        text = duration(sum(launch["seconds"] for launch in self.launches))
        killed = sum(not launch["ended"] for launch in self.launches)
        if killed:
            text = f"at least {text} ({killed} of {len(self.launches)} launches killed, or still running)"
        elif len(self.launches) > 1:
            text += f" (in {len(self.launches)} launches)"
        return text

    def _recipe(self) -> str:
        """The recipe and the settings that differ from it."""
        ours = self._values()
        name = self.launches[-1]["recipe"] if self.launches else ""
        if not ours:
            return name or "unknown"
        if not name:
            # A run of version 0.2 does not say it, but its settings may be those of a recipe.
            equal = (recipe for recipe in recipe_names() if _values_of(recipe) == ours)
            return next(equal, "own settings")
        if name not in recipe_names():
            return name
        recipe = _values_of(name)
        changes = [f"{key} {_short(value)}" for key, value in ours.items() if recipe.get(key) != value]
        if not changes:
            return name
        shown = ", ".join(changes[:_SHOWN_CHANGES])
        more = f" and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
        return f"{name}, with {shown}{more}"

    def _values(self) -> dict[str, Any]:
        """Settings of the run by dotted name; empty if this version cannot read them."""
        try:
            return _values_of(self.path / "config.yaml")
        except UserError:
            return {}

    def _config_value(self, name: str) -> Any:
        try:
            return asdict(load_config(self.path / "config.yaml")).get(name)
        except UserError:
            return None


def labels_of(runs: Sequence[Path]) -> list[str]:
    """Names of runs: of their folders, with as many folders above them as make them different.

    Args:
        runs: Run folders.
    """
    parts = [run.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(names[-count:]) for names in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return labels


def duration(seconds: float) -> str:
    """A duration in words: seconds, minutes, or hours and minutes."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _machine(launch: Mapping[str, Any]) -> str:
    machine, ranks = launch["machine"], launch["ranks"]
    cores, device = machine["cores"], machine["device"]
    return (
        f"{machine['processor']}, {cores} core{'s' if cores != 1 else ''}, {machine['memory_gib']:.0f} GiB, "
        f"{'no GPU' if device == 'CPU' else device}, {ranks} rank{'s' if ranks != 1 else ''}"
    )


def _values_of(file: str | Path) -> dict[str, Any]:
    """Settings of a recipe or file by dotted name, without those that say where a run is computed."""
    values = {item.name: item.value for item in settings(load_config(file))}
    return {name: value for name, value in values.items() if not name.startswith(_NOT_OF_A_RECIPE)}


def _short(value: object) -> str:
    text = f"{value}"
    return text if len(text) <= 40 else f"{text[:39]}…"


def _read_records(run: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl, without an incomplete last line of a killed run."""
    file = run / "metrics.jsonl"
    if not run.is_dir() or not ((run / "config.yaml").is_file() or file.is_file()):
        raise UserError(f"--run {run} is not a run folder; give the --output folder of llmgr_rec.train")
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and _is_record(record):
            records.append(record)
    return records


def _is_record(record: Mapping[str, Any]) -> bool:
    numbers = ["step"]
    if record.get("split") == "valid":
        numbers += ["epoch", "hr@20", "ndcg@20"]
    elif "loss" in record:
        numbers.append("loss")
    return "stage" in record and all(isinstance(record.get(name), int | float) for name in numbers)


def _check_bundles(evaluated: Evaluated, hashes: Collection[str], run: Path) -> None:
    """Checks that the metrics are those of models of the run."""
    for model, found in evaluated.content.get("bundles", {}).items():
        if found not in hashes:
            raise UserError(
                f"{evaluated.file} has metrics of {MODEL_NAMES.get(model, model)} that do not belong to a model in "
                f"{run}; evaluate that run (python -m llmgr_rec.evaluate), or give its --metrics"
            )
