"""Run folders: what a verb reads and writes, so that nothing is lost, guessed, or half-written.

A run folder holds

    recipe.yaml        the resolved recipe; running it again gives the same result
    environment.json   versions, commit, machine
    lineage.json       hashes of what it was made from, and compute spent, ancestors included
    metrics.jsonl      one line per logged step
    status.json        running | stopped | failed | finished, and where it stands
    …                  what the verb makes (checkpoints/, model/, results.json, report.html)

Files appear complete or not at all: written under a temporary name, flushed to disk, renamed.
Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from samara.config import dump_yaml, load_yaml
from samara.errors import CheckpointError, ConfigError, ResourceError

State = Literal["running", "stopped", "failed", "finished"]

PACKAGES = ("samara", "torch", "transformers", "tokenizers", "safetensors", "numpy")


# --- files ------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that ``path`` is always the old content or the whole new one.

    Raises:
        ResourceError: If the disk is full; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are for their owner alone
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise disk_error(path, error) from error
    sync_folder(path.parent)


def disk_error(path: Path, error: OSError) -> Exception:
    """Turn "no space left" into an error for the user; leave every other one as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return ResourceError(
            f"{path}: the disk is full ({free / 1e6:.0f} MB free); nothing written before is lost, "
            "free some space and run the same command again"
        )
    return error


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write JSON; a number that is not finite becomes ``null``, since JSON has none."""
    write_text(path, json.dumps(_finite(data), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: If the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes ``path`` on success and vanishes on failure.

    An existing ``path`` is replaced only after the new one is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield staging
        for item in sorted(staging.rglob("*")):
            if item.is_file():
                _sync_file(item)
        staging.chmod(0o755)
        old = path.with_name(f".{path.name}.old")
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(staging, path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


# --- hashes -----------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(data: Any) -> str:
    """SHA-256 of plain data in canonical JSON, in hex: equal data, equal hash."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def hash_files(files: Mapping[str, Path]) -> str:
    """SHA-256 over named files: the names and each file's content, in the order of the names."""
    return hash_json({name: hash_file(files[name]) for name in sorted(files)})


def hash_weights(folder: Path) -> str:
    """Hash of a model folder's weights: its safetensors files by name and content."""
    return hash_files({file.name: file for file in folder.glob("*.safetensors")})


def model_folder(path: Path) -> Path:
    """A model folder given by its own path or by that of the run that made it."""
    inner = path / "model"
    return inner if (inner / "config.json").exists() else path


# --- what a run records -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Compute spent: target tokens seen, floating-point operations, seconds, joules (estimated)."""

    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    joules: float = 0.0

    def __add__(self, other: Compute) -> Compute:
        return Compute(
            tokens=self.tokens + other.tokens,
            flops=self.flops + other.flops,
            seconds=self.seconds + other.seconds,
            joules=self.joules + other.joules,
        )


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """What a run was made from.

    ``parents`` maps a role (``data``, ``init_from``) to a content hash; ``spent`` is this run's own
    compute, ``inherited`` that of the checkpoints it started from.
    """

    parents: dict[str, str] = field(default_factory=dict)
    spent: Compute = field(default_factory=Compute)
    inherited: Compute = field(default_factory=Compute)

    @property
    def total(self) -> Compute:
        """Own compute and that of all ancestors."""
        return self.spent + self.inherited


class RunFolder:
    """One run's folder. Opening it makes nothing but the folder itself."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Record the resolved recipe and the environment; call once, before the work.

        Raises:
            ConfigError: If the folder already holds a run of another recipe.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.recipe_path.exists():
            changed = differences(load_yaml(self.recipe_path), recipe)
            if changed:
                raise ConfigError(
                    f"{self.path}: holds a run of another recipe ({'; '.join(changed[:3])}); "
                    "give another folder with --out, or remove this one"
                )
        else:
            write_text(self.recipe_path, dump_yaml(dict(recipe)))
        write_json(self.path / "environment.json", environment())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            CheckpointError: If another process is writing to it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.path}: another process is writing to this run folder; wait for it"
                ) from None
            yield

    def set_status(self, state: State, **details: Any) -> None:
        """Record where the run stands."""
        write_json(self.path / "status.json", {"state": state, **details})

    def status(self) -> dict[str, Any]:
        """The recorded status; ``{}`` before the first one."""
        path = self.path / "status.json"
        return dict(read_json(path)) if path.exists() else {}

    def write_lineage(self, lineage: Lineage) -> None:
        """Record what the run was made from."""
        data = {**asdict(lineage), "total": asdict(lineage.total)}
        write_json(self.path / "lineage.json", data)

    def lineage(self) -> Lineage:
        """The recorded lineage; empty where there is none (a model from elsewhere)."""
        path = self.path / "lineage.json"
        if not path.exists():
            return Lineage()
        data = read_json(path)
        return Lineage(
            parents=data["parents"],
            spent=Compute(**data["spent"]),
            inherited=Compute(**data["inherited"]),
        )

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        line = json.dumps(_finite(record), ensure_ascii=False)
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise disk_error(self.metrics_path, error) from error

    def metrics(self) -> list[dict[str, Any]]:
        """All records of ``metrics.jsonl``; a last line cut off by a crash is left out."""
        if not self.metrics_path.exists():
            return []
        records = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def truncate_metrics(self, step: int) -> None:
        """Drop the records after ``step``: a resumed run writes them again."""
        kept = [record for record in self.metrics() if record.get("step", 0) <= step]
        lines = [json.dumps(record, ensure_ascii=False) for record in kept]
        write_text(self.metrics_path, "".join(line + "\n" for line in lines))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Say where two recipes differ: one ``path: old -> new`` per key."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: list[str] = []
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{path}.{key}" if path else str(key)
            found += differences(old.get(key), new.get(key), inner)
        return found
    plain_old, plain_new = _finite(old), _finite(new)
    return [] if plain_old == plain_new else [f"{path}: {_short(plain_old)} -> {_short(plain_new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# --- environment ------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions, commit and machine, for the record of a run."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": _total_memory(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree that runs, with ``-dirty`` if it has changes; else None."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
