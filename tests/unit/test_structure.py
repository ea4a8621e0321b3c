"""The house stands: layers, no cycles, no imports of the root, every technique at its address."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

import samara
from samara import catalog

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "samara"
MODULES = sorted(PACKAGE.rglob("*.py"))

# docs/architecture.md, "The layers". A module may import what stands on a lower line.
LAYERS: list[set[str]] = [
    {"errors"},
    {"config", "launch"},
    {"runs", "progress", "catalog"},
    {"registry"},
    {"model", "data"},
    {"measure"},
    {"train"},
    {"growth", "sparse"},
    {"adapt"},
    {"federated", "release", "report"},
    {"recipe"},
    {
        "lifecycle",
        "designs",
        "audit_command",
        "delta_commands",
        "deployment_commands",
        "model_commands",
        "personal_commands",
        "registry_commands",
    },
    {"analyze_command"},
    {"cli", "deployment"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> list[str]:
    """Every module of ours that a file imports, wherever in it the import stands."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    known = {_name(module) for module in MODULES}
    return [name for name in found if name == "samara" or name in known]


GRAPH = {_name(path): _imports(path) for path in MODULES}


@pytest.mark.parametrize("module", [name for name in GRAPH if name != "samara"])
def test_a_module_imports_only_lower_layers_and_its_own_folder(module):
    own = module.split(".")[1]
    assert own in LEVEL, f"{module}: add it to the layers and to docs/architecture.md"
    for target in GRAPH[module]:
        if target == "samara":
            continue
        other = target.split(".")[1]
        allowed = other == own or LEVEL[other] < LEVEL[own]
        assert allowed, f"{module} imports {target}, which is no lower layer"


@pytest.mark.parametrize("path", [p for p in MODULES if p != PACKAGE / "__init__.py"], ids=str)
def test_nobody_inside_imports_the_package_root(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert all(alias.name != "samara" for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module == "samara":
            names = {alias.name for alias in node.names}
            modules = {p.stem for p in PACKAGE.iterdir()}
            assert names <= modules, f"{path} imports {names - modules} from the root"


def test_there_are_no_import_cycles():
    state: dict[str, str] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != "open", f"import cycle: {' -> '.join((*trail, module))}"
        if module in state:
            return
        state[module] = "open"
        for target in GRAPH.get(module, ()):
            if target not in ("samara", module) and GRAPH.get(target) is not None:
                visit(target, (*trail, module))
        state[module] = "done"

    for module in GRAPH:
        if module != "samara":
            visit(module, ())


def test_package_init_files_are_empty():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert path.read_text() == "", path


def test_there_is_no_drawer_of_odds_and_ends():
    assert not [p for p in MODULES if p.stem in {"utils", "util", "helpers", "common", "misc"}]


def test_every_setting_has_a_place_that_reads_it():
    """An option that does nothing is a defect: each field's name is used outside config.py."""
    source = "\n".join(p.read_text() for p in MODULES if p.name != "config.py")
    methods = "\n".join(p.read_text() for p in MODULES if p.name == "config.py")
    for path in PACKAGE.rglob("*/config.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        name = item.target.id
                        used = f".{name}" in source or f"self.{name}" in methods
                        assert used, f"{path.relative_to(ROOT)}: {node.name}.{name} is never read"


@pytest.mark.parametrize("item", catalog.TECHNIQUES, ids=lambda item: item.name)
def test_every_technique_stands_where_the_catalogue_says(item):
    assert importlib.util.find_spec(item.module)
    assert (ROOT / item.recipe).exists()
    assert (ROOT / item.test).exists()


def test_the_papers_page_is_the_catalogue():
    assert (ROOT / "docs" / "papers.md").read_text() == catalog.markdown()


def test_the_public_names_exist():
    for name in samara.__all__:
        assert getattr(samara, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        samara.nonsense  # noqa: B018
