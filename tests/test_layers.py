"""A layer imports only what stands below it (docs/design.md, "Layers").

Read from the sources, not from what happens to be imported at run time, and including imports inside functions and
under TYPE_CHECKING: an annotation is a dependency too.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Bottom to top. A module belongs to the layer of the longest name here that is its own or a package around it. Modules
#: of one layer may import each other. A module that belongs nowhere fails the test below: give it its place.
LAYERS: list[set[str]] = [
    {
        "storage.abandoned",
        "storage.buffers",
        "storage.errors",
        "storage.failpoints",
        "storage.seams",
        "storage.replication",
        "storage.interfaces",
        "storage.status",
        "storage.metadata.keys",
        "storage.turn",
        "storage.wording",
    },
    {"storage.documents", "storage.durable", "storage.lock", "storage.nurseries", "storage.pacing", "storage.lending"},
    {"storage.sealing", "storage.sealed_ids", "storage.coprocess", "storage.keys", "storage.keyfile", "storage.config"},
    {"storage.metadata"},
    {"storage.epochs"},
    {"storage.hosts"},
    {"storage.quick_reads"},
    {
        "storage.coprocess.serve",
        "storage.coprocess.__main__",
        "storage.contractor",
        "storage.host_io",
        "storage.standing",
        "storage.renewal",
    },
    {"storage.history"},
    {"storage.sectors"},
    {"storage.values"},
    {"storage.namespace"},
    {"storage.files"},
    {"storage.checking"},
    {"storage.volume", "storage.status_of"},
    {"storage.servable"},
    {"storage.wiring"},
    {"storage.creation", "storage.recovery", "storage.salvage", "storage.salvage_index", "storage.read_only", "storage.pruning"},
    {"storage"},  # storage/__init__.py: the public names
]
#: Besides these, fusefs takes from storage what `storage.__all__` lists.
PUBLIC_MODULES = {"storage", "storage.errors"}
#: What storage must not know of, at whatever depth: that FUSE exists, and who uses it.
UNKNOWN_TO_STORAGE = {"fusefs", "pyfuse3", "simulation", "tests"}


class Import(NamedTuple):
    """One imported module, or one name out of a module, as absolute dotted names."""

    line: int
    module: str
    name: str | None


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(package: str) -> dict[str, Path]:
    return {module_name(path): path for path in sorted((ROOT / package).rglob("*.py"))}


def imports_of(source: str, module: str, *, is_package: bool) -> list[Import]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            around = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            found += [Import(node.lineno, base, alias.name) for alias in node.names]
    return found


def imports_in(path: Path) -> list[Import]:
    return imports_of(path.read_text(encoding="utf-8"), module_name(path), is_package=path.name == "__init__.py")


def target(imported: Import, known: dict[str, Path]) -> str:
    """`from package import module` means the module, `from module import name` the module it comes from."""
    inner = f"{imported.module}.{imported.name}"
    return inner if inner in known else imported.module


def layer_of(module: str) -> int | None:
    best: tuple[int, int] | None = None
    for level, names in enumerate(LAYERS):
        for name in names:
            covers = module == name or (module.startswith(f"{name}.") and name != "storage")
            if covers and (best is None or len(name) > best[0]):
                best = (len(name), level)
    return best[1] if best else None


def upward_imports(module: str, imports: list[Import], known: dict[str, Path]) -> list[str]:
    own = layer_of(module)
    if own is None:
        return [f"{module} has no layer: give it one in tests/test_layers.py"]
    wrong = []
    for imported in imports:
        if imported.module.split(".")[0] != "storage":
            continue
        name = target(imported, known)
        level = layer_of(name)
        if level is None or level > own:
            wrong.append(f"{module}:{imported.line} imports {name}, which does not stand below it")
    return wrong


def public_names() -> set[str]:
    return set(importlib.import_module("storage").__all__)


def private_uses(module: str, source: str, imports: list[Import], public: set[str]) -> list[str]:
    """What a module of fusefs takes from storage besides its public names."""
    wrong = []
    for imported in imports:
        if imported.module.split(".")[0] != "storage":
            continue
        if imported.module not in PUBLIC_MODULES:
            wrong.append(f"{module}:{imported.line} imports {imported.module}, which is not public")
        elif imported.module == "storage" and imported.name not in {None, "errors"} | public:
            wrong.append(f"{module}:{imported.line} imports storage.{imported.name}, which storage.__all__ does not list")
    for node in ast.walk(ast.parse(source)):
        # import storage; storage.name
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "storage":
            plain = any(imported.module == "storage" and imported.name is None for imported in imports)
            if plain and node.attr not in {"errors"} | public:
                wrong.append(f"{module}:{node.lineno} uses storage.{node.attr}, which storage.__all__ does not list")
    return wrong


STORAGE = modules_of("storage")
FUSEFS = modules_of("fusefs")


def test_a_module_of_storage_imports_only_from_its_layer_and_below() -> None:
    wrong = [line for module, path in STORAGE.items() for line in upward_imports(module, imports_in(path), STORAGE)]
    assert not wrong, "\n".join(wrong)


def test_storage_does_not_know_that_fuse_exists() -> None:
    wrong = [
        f"{module}:{imported.line} imports {imported.module}"
        for module, path in STORAGE.items()
        for imported in imports_in(path)
        if imported.module.split(".")[0] in UNKNOWN_TO_STORAGE
    ]
    assert not wrong, "\n".join(wrong)


def test_fusefs_imports_only_public_names_of_storage() -> None:
    public = public_names()
    wrong = [
        line for module, path in FUSEFS.items() for line in private_uses(module, path.read_text(encoding="utf-8"), imports_in(path), public)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_public_name_is_there() -> None:
    missing = sorted(name for name in public_names() if not hasattr(importlib.import_module("storage"), name))
    assert not missing, f"storage.__all__ lists what storage does not have: {missing}"


def test_every_name_in_layers_exists() -> None:
    named = set().union(*LAYERS)
    assert named <= set(STORAGE), f"no such module: {sorted(named - set(STORAGE))}"


# The checks themselves: each of these must be caught, or the tests above would pass whatever the sources say.


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("storage.errors", "from storage.volume import Volume"),
        ("storage.hosts.directory", "import storage.sectors.manager"),
        ("storage.hosts.directory", "from ..sectors import manager"),
        ("storage.hosts.directory", "def f() -> None:\n    from storage import files"),
        ("storage.sealing", "from storage import open_volume"),
        ("storage.metadata.keys", "from storage.metadata import store"),
    ],
)
def test_an_upward_import_is_caught(module: str, line: str) -> None:
    known = {"storage.sectors.manager": ROOT, "storage.files": ROOT, "storage.metadata.store": ROOT}
    assert upward_imports(module, imports_of(line, module, is_package=False), known)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("storage.volume", "from storage.errors import Busy\nfrom .hosts import registry\nimport trio"),
        ("storage.metadata.store", "from storage.metadata.keys import PREFIX\nfrom . import journal"),
    ],
)
def test_a_downward_import_is_allowed(module: str, line: str) -> None:
    known = {"storage.hosts.registry": ROOT, "storage.metadata.journal": ROOT}
    assert upward_imports(module, imports_of(line, module, is_package=False), known) == []


@pytest.mark.parametrize(
    "line",
    ["from storage.sectors import manager", "import storage.volume", "from storage import secret", "import storage\nstorage.secret()"],
)
def test_a_private_use_is_caught(line: str) -> None:
    assert private_uses("fusefs.x", line, imports_of(line, "fusefs.x", is_package=False), {"open_volume"})


@pytest.mark.parametrize(
    "line", ["from storage import open_volume, errors", "import storage\nstorage.open_volume()", "from storage.errors import Busy"]
)
def test_a_public_use_is_allowed(line: str) -> None:
    assert private_uses("fusefs.x", line, imports_of(line, "fusefs.x", is_package=False), {"open_volume"}) == []
