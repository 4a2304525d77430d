"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import importlib
import statistics
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmkit"
PLUGINS = ROOT / "plugins"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Floors from the ground up; a module may import its own floor and those below.
FLOORS = [
    ["errors", "lazy_imports", "version"],
    ["entry_points"],
    ["tensors"],
    ["formats"],
    ["quantization"],
    ["architecture"],
    ["layouts"],
    ["checkpoint", "tokenization"],
    ["transforms"],
    ["pipeline", "api"],
    ["releases", "drafting"],
    ["inspection"],
    ["decoder"],
    ["calibration"],
    ["onnx"],
    ["evaluation"],
    ["report"],
    ["cli"],
]
FLOOR_OF = {name: i for i, names in enumerate(FLOORS) for name in names}
# Imports that point up on purpose: each is inside a function and says why there.
UPWARD = {("architecture", "decoder")}


def floor_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imported(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmkit"):
            yield node.module.split(".")[1] if "." in node.module else None, node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("llmkit."):
                    yield alias.name.split(".")[1], node.lineno


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parent != PACKAGE or p.stem in FLOOR_OF], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_down(path):
    if path == PACKAGE / "architecture" / "hooks.py":
        return  # it names, for type checkers only, what readers above it have; at run time it is on its floor
    mine = floor_name(path)
    assert mine in FLOOR_OF, f"{mine} has no floor: add it to FLOORS"
    for name, line in imported(ast.parse(path.read_text())):
        if name is None or (mine, name) in UPWARD:
            continue
        assert FLOOR_OF[name] <= FLOOR_OF[mine], f"{path}:{line}: {mine} imports {name}, which is above it"


def module_name(path: Path) -> str:
    package = "llmkit" if path.is_relative_to(PACKAGE) else "llmkit_plugins"
    folder = PACKAGE if package == "llmkit" else PLUGINS
    return ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")


def needed_modules(tree: ast.AST, modules, package: str = "") -> set[str]:
    """The modules that a module imports when it runs: at its top or in a function, not for a type checker."""
    needed, rest = set(), [tree]
    while rest:
        node = rest.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            rest += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = f"{package}.{node.module}" if node.level else node.module
            inner = [f"{whole}.{alias.name}" for alias in node.names]
            needed |= {name if name in modules else whole for name in inner}
        elif isinstance(node, ast.Import):
            needed |= {alias.name for alias in node.names}
        rest += ast.iter_child_nodes(node)
    return needed & modules.keys()


def circles(imports: dict[str, set[str]]) -> list[str]:
    """One line for each import that leads back to the module it stands in."""

    def reached(start: str) -> set[str]:
        seen, rest = set(), [start]
        while rest:
            new = imports[rest.pop()] - seen
            seen |= new
            rest += new
        return seen

    below = {name: reached(name) for name in imports}
    return sorted(f"{a} <-> {b}" for a, own in imports.items() for b in own if a != b and a in below[b])


def test_no_imports_go_in_circles():
    paths = {module_name(p): p for p in [*MODULES, *sorted(PLUGINS.rglob("*.py"))]}
    imports = {}
    for name, path in paths.items():
        package = module_name(path.parent / "__init__.py")
        imports[name] = needed_modules(ast.parse(path.read_text()), paths, package)
    assert circles(imports) == []


def test_a_circle_is_seen():
    sources = {
        "a": "from b import x",
        "b": "def f():\n    import c",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import b\nelse:\n    import a",
        "d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import e",
        "e": "import d",
    }
    imports = {name: needed_modules(ast.parse(text), sources) for name, text in sources.items()}
    assert circles(imports) == ["a <-> b", "b <-> c", "c <-> a"]


def test_no_module_is_over_400_lines_and_the_median_is_small():
    code = MODULES + sorted((ROOT / "plugins").rglob("*.py"))
    lengths = {p: len(p.read_text().splitlines()) for p in code}
    assert not {str(p): n for p, n in lengths.items() if n > 400}
    assert statistics.median(n for p, n in lengths.items() if p.name != "__init__.py") <= 180


def test_every_package_is_packaged():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(config["tool"]["setuptools"]["packages"])
    roots = {"llmkit": PACKAGE, "llmkit_plugins": ROOT / "plugins", "llmkit_evalsets": ROOT / "evalsets"}
    found = set()
    for name, folder in roots.items():
        for file in folder.rglob("*"):  # folders of data, too: setuptools warns of those it is not told of
            if file.is_file() and "__pycache__" not in file.parts:
                found.add(".".join([name, *file.parent.relative_to(folder).parts]))
    assert listed == found


def test_versions_agree():
    import llmkit

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == llmkit.__version__


def test_importing_llmkit_is_cheap():
    code = (
        "import sys, llmkit, llmkit.api, llmkit.cli.app;"
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exported_names_exist():
    for path in MODULES:
        tree = ast.parse(path.read_text())
        exports = [n for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
        if not exports or path.name == "__main__.py":
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(name)
        names = ast.literal_eval(exports[0].value)
        assert all(hasattr(module, n) for n in names), name


def test_nothing_prints_or_exits_below_the_command_line():
    for path in MODULES:
        if floor_name(path) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "exit", "quit"), f"{path}:{node.lineno}"


def test_no_path_of_one_machine_is_tracked():
    done = subprocess.run(
        ["git", "grep", "-nE", r"(^|[^.a-z])/(work|farm|root)/", "--", ".", ":!.ci"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if "test_house.py" not in line]
    assert lines == []


def test_nothing_large_is_tracked_but_the_mini_models_and_the_recordings():
    """Downloads once came in with a hurried `git add`."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {
        name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()
    }
    large = {
        name: n for name, n in sizes.items() if n > 300_000 and not name.startswith(("evalsets/mini/", "tests/golden/"))
    }
    assert not large


# What looks like a private name or a constant and may be replaced: (file, name) -> why.
PATCHED = {("test_target.py", "CDLL"): "the system's library, without the calls that a system may lack"}


def private_patches(tree: ast.AST):
    """What `setattr`, `delattr` and `setitem` of pytest replace that is private, or a module's constant."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr not in ("setattr", "delattr", "setitem") or not node.args:
            continue
        first = node.args[0]
        if isinstance(first, ast.Constant):
            name = str(first.value).rpartition(".")[2]
        elif node.func.attr == "setitem":
            name = ast.unparse(first).rpartition(".")[2]
        else:
            name = str(getattr(node.args[1], "value", "?"))
        if name.startswith("_") or (name.isupper() and node.func.attr != "setitem"):
            yield name


def test_no_test_replaces_what_is_private():
    """A default that a test has to change is a parameter; other private names are changed without a test to mend."""
    found = {
        (path.name, name)
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for name in private_patches(ast.parse(path.read_text()))
    }
    assert found == set(PATCHED)


def test_a_private_patch_is_seen():
    code = (
        'm.setattr(module, "_x", 1)\nm.setattr("llmkit.a._LIMIT", 1)\nm.setattr(module, "LIMIT", 1)\n'
        'm.setattr(f, "__defaults__", ())\nm.setitem(a._FORMATS, "x", 1)\nm.setattr(os, "rename", f)'
    )
    assert [*private_patches(ast.parse(code))] == ["_x", "_LIMIT", "LIMIT", "__defaults__", "_FORMATS"]


def test_test_modules_have_names_of_their_own():
    """pytest imports them by their base names: two of one name stop the run while it collects."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, n in names.items() if n > 1] == []
