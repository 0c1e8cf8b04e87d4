"""The rooms, and which of them may import which.

All of it is read from the source's syntax, imports inside functions included; nothing is executed
but the last test, which asks a fresh interpreter what was loaded.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# A room may import the rooms on the lines below its own.
LAYERS = """
    cli
    integrations
    draw
    simulate probe convert
    run transfers
    tiers quant
    plan
    allocation
    machine formats
    vgpu
    compiler files sizes
    errors
"""

TORCH_ROOMS = (
    "distorch._probe_accelerators",
    "distorch.convert.write",
    "distorch.integrations",
    "distorch.plan.profile",
    "distorch.probe",
    "distorch.quant",
    "distorch.run.executor",
    "distorch.run.slots",
    "distorch.tiers.accelerator",
    "distorch.tiers.cached",
    "distorch.tiers.host",
    "distorch.tiers.links",
    "distorch.tiers.memory",
    "distorch.tiers.pinned",
    "distorch.tiers.stopwatch",
    "distorch.vgpu.install",
    "distorch.vgpu.torch_module",
)
TORCH_PACKAGES = {"accelerate", "diffusers", "torch", "transformers"}

MAX_FILE_LINES = 400

SOURCE = Path(__file__).parents[1] / "src" / "distorch"
LAYER_OF = {room: layer for layer, line in enumerate(LAYERS.split("\n")) for room in line.split()}


def _module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {
    _module_name(path): ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for path in sorted(SOURCE.rglob("*.py"))
}
# The package itself is the shop window: it shows names of every room, and imports them when asked.
INNER_MODULES = sorted(set(MODULES) - {"distorch", "distorch.__main__"})


def _room(module: str) -> str:
    name = module.split(".")[1]
    # A module of one underscore belongs to the room that it is named after.
    return name.removeprefix("_").partition("_")[0] if name.startswith("_") else name


def _imported(node: ast.AST, *, with_types: bool) -> Iterator[str]:
    """Dotted names that are imported at or below a node, those for type checkers if asked."""
    children: Iterator[ast.AST] = ast.iter_child_nodes(node)
    match node:
        case ast.Import(names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module, names, level):
            assert level == 0, f"line {node.lineno}: imports are absolute here"
            yield from (f"{module}.{alias.name}" for alias in names)
        case ast.If(ast.Name("TYPE_CHECKING"), _, orelse) if not with_types:
            children = iter(orelse)
    for child in children:
        yield from _imported(child, with_types=with_types)


def _inner_imports(module: str, *, with_types: bool) -> set[str]:
    """Modules of DisTorch that a module imports: of each imported name, the longest that is one."""
    found = set()
    for name in _imported(MODULES[module], with_types=with_types):
        prefixes = accumulate(name.split("."), "{}.{}".format)
        found |= {max((prefix for prefix in prefixes if prefix in MODULES), key=len, default="")}
    return found - {"", module}


@pytest.mark.parametrize("module", INNER_MODULES)
def test_every_module_is_in_a_room_of_the_design(module: str) -> None:
    assert _room(module) in LAYER_OF


@pytest.mark.parametrize("module", INNER_MODULES)
def test_imports_go_down(module: str) -> None:
    room = _room(module)
    imported = {_room(name) for name in _inner_imports(module, with_types=True) - {"distorch"}}
    assert {other for other in imported - {room} if LAYER_OF[other] <= LAYER_OF[room]} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: _inner_imports(module, with_types=False) for module in MODULES}
    TopologicalSorter(graph).prepare()  # an error names the modules of a circle


@pytest.mark.parametrize("module", MODULES)
def test_torch_is_imported_only_where_bytes_move_or_become_numbers(module: str) -> None:
    roots = {name.split(".")[0] for name in _imported(MODULES[module], with_types=False)}
    allowed = any(f"{module}.".startswith(f"{room}.") for room in TORCH_ROOMS)
    assert allowed or roots & TORCH_PACKAGES == set()


def test_no_file_is_long() -> None:
    lines = {
        str(path.relative_to(SOURCE)): len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCE.rglob("*")
        if path.suffix in {".py", ".c", ".cpp", ".h"}
    }
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_the_import_rules_see_every_kind_of_import() -> None:
    source = """
if TYPE_CHECKING:
    import for_types
else:
    import otherwise

def function():
    from package import name
    if x:
        import nested.module as other
"""
    runtime = ["otherwise", "package.name", "nested.module"]
    tree = ast.parse(source)
    assert list(_imported(tree, with_types=False)) == runtime
    assert list(_imported(tree, with_types=True)) == ["for_types", *runtime]


@pytest.mark.parametrize("module", ["distorch", "distorch.cli", "distorch.vgpu"])
def test_importing_it_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({TORCH_PACKAGES} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
