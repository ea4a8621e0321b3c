"""The documentation already on the machine: pydoc's topics and docstrings, read with ``ast``.

Nothing is imported or run: a source file is parsed and its docstrings are taken. What belongs to
the machine rather than to a release is left out (editable installs, loose files), so the same
interpreter with the same packages gives the same documents in the same order.
"""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import inspect
import json
import platform
import re
import site
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samara.data.config import InterpreterDocs
from samara.data.docstrings import has_summary, prose_of
from samara.data.documents import Document
from samara.data.local_files import make_document
from samara.errors import DataError, did_you_mean

STANDARD_LIBRARY = "python"
"""The package name of the standard library and of pydoc's topics."""

UNWANTED = frozenset(
    {"test", "tests", "testing", "_test", "_tests", "idle_test", "conftest"}
    | {"_vendor", "_vendored", "vendor", "vendored", "_vendored_packages", "extern", "externals"}
    | {"third_party", "_third_party", "thirdparty"}
)
"""Folders and modules of tests (they describe no interface) and of other packages' copies (their
text belongs to the package it came from)."""


@dataclass(frozen=True, kw_only=True)
class _Package:
    """An installed distribution; ``distribution`` is None for the standard library."""

    name: str
    version: str
    distribution: importlib.metadata.Distribution | None


def read_documentation(source: InterpreterDocs, *, skipped: Counter[str]) -> Iterator[Document]:
    """Read pydoc's topics, the standard library, then each package, in the order of their names.

    Args:
        source: The settings.
        skipped: Counts packages that do not list their files, files that do not parse, and
            docstrings that start with a list of parameters.

    Raises:
        DataError: If a package named is not installed.
    """
    packages = _selected_packages(source)
    if source.standard_library:
        yield from _topics()
    for package in packages:
        files = _python_files(package)
        if files is None:
            skipped["packages_without_file_list"] += 1
            continue
        for module, path in files:
            yield from _docstrings(package.name, module, path, skipped)


def content_key(source: InterpreterDocs) -> dict[str, Any]:
    """What decides the documents: the Python release and the versions of the packages read."""
    packages = _selected_packages(source)
    return {
        "kind": source.kind,
        "python": platform.python_version(),
        "topics": source.standard_library,
        "packages": {package.name: package.version for package in packages},
    }


# --- packages ---------------------------------------------------------------------------------


def _selected_packages(source: InterpreterDocs) -> list[_Package]:
    installed = {package.name: package for package in _installed_packages()}
    wanted = installed
    if source.packages is not None:
        _check_names(source.packages, installed, "source.packages")
        wanted = {canonical(name): installed[canonical(name)] for name in source.packages}
    excluded = {canonical(name) for name in source.exclude}
    chosen = [wanted[name] for name in sorted(wanted) if name not in excluded]
    return [_standard_library(), *chosen] if source.standard_library else chosen


def _check_names(names: tuple[str, ...], installed: dict[str, _Package], key: str) -> None:
    for name in names:
        if canonical(name) not in installed:
            near = did_you_mean(canonical(name), installed)
            raise DataError(f"{key}: '{name}' is not installed here{near}")


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it: ``Scikit_Learn`` -> ``scikit-learn``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed_packages() -> list[_Package]:
    """Regular installs in this interpreter's site-packages; editable ones belong to the machine."""
    packages: dict[str, _Package] = {}
    folders = dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("purelib")])
    for distribution in importlib.metadata.distributions(path=list(folders)):
        name = canonical(distribution.name)
        if name not in packages and name != "samara" and not _is_editable(distribution):
            packages[name] = _Package(
                name=name, version=distribution.version, distribution=distribution
            )
    return list(packages.values())


def _is_editable(distribution: importlib.metadata.Distribution) -> bool:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


def _standard_library() -> _Package:
    return _Package(name=STANDARD_LIBRARY, version=platform.python_version(), distribution=None)


def _python_files(package: _Package) -> list[tuple[str, Path]] | None:
    """Module names and paths, sorted; None if the installer recorded no files (some systems')."""
    if package.distribution is not None:
        files = package.distribution.files
        if files is None:
            return None
        found = {file.parts: Path(str(file.locate())) for file in files if file.suffix == ".py"}
    else:
        root = Path(sysconfig.get_path("stdlib"))
        found = {path.relative_to(root).parts: path for path in root.rglob("*.py")}
    return sorted((_module_name(parts), path) for parts, path in found.items() if _is_wanted(parts))


def _is_wanted(parts: tuple[str, ...]) -> bool:
    """Whether a file is an importable module of the package itself, and no test."""
    names = [part.removesuffix(".py") for part in parts]
    if any(name in UNWANTED or name.startswith("test_") for name in names):
        return False
    # Scripts in ../bin, and site-packages below the standard library, are not modules of it.
    return all(name.isidentifier() for name in names)


def _module_name(parts: tuple[str, ...]) -> str:
    names = [part.removesuffix(".py") for part in parts]
    return ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 1 else names)


# --- texts ------------------------------------------------------------------------------------


def _topics() -> Iterator[Document]:
    """The language reference that ``help('for')`` shows: a dictionary literal in pydoc_data."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.exists():
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield make_document(
                    prose_of(topics[name]),
                    id=f"{STANDARD_LIBRARY}/topics:{name}",
                    package=STANDARD_LIBRARY,
                    module="pydoc_data.topics",
                    name=name,
                )


def _docstrings(package: str, module: str, path: Path, skipped: Counter[str]) -> Iterator[Document]:
    """The docstrings of one file: the module's, then its classes' and functions', in file order."""
    try:
        source = path.read_bytes()
    except OSError:
        skipped["missing_files"] += 1
        return
    if b'"""' not in source and b"'''" not in source:
        return
    tree = _parse(source)
    if tree is None:
        skipped["unparsable_files"] += 1
        return
    for name, docstring in _walk(tree, ""):
        text = prose_of(inspect.cleandoc(docstring))
        if not has_summary(text):
            skipped["docstrings_without_summary"] += 1
            continue
        yield make_document(
            text,
            id=f"{package}/{module}:{name}",
            package=package,
            module=module,
            name=name,
        )


def _parse(source: bytes) -> ast.Module | None:
    # A tree is thousands of objects without cycles: letting the collector look at them while they
    # are made costs a fifth of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    finally:
        if enabled:
            gc.enable()


def _walk(node: ast.Module | ast.stmt, prefix: str) -> Iterator[tuple[str, str]]:
    """Qualified name and raw docstring of a node and of what is defined in it."""
    documented = isinstance(
        node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    )
    if documented:
        docstring = ast.get_docstring(node, clean=False)  # type: ignore[arg-type]
        if docstring:
            yield prefix, docstring
    for child in _statements(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{prefix}.{child.name}" if prefix else child.name)
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _walk(child, prefix)


def _statements(node: ast.Module | ast.stmt) -> Iterator[ast.stmt]:
    for field in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, field, ()):
            if isinstance(child, ast.ExceptHandler):
                yield from child.body
            else:
                yield child
