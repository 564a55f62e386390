"""Holds the house rules on imports: package levels, where optional dependencies may appear, who reads the environment.

The rules read the source, so a function-level, relative, typing-only or by-name import counts like any other.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "moegraft"

# A package imports itself and packages of a lower level; packages of one level do not know each other.
LEVELS = {
    "core": 0,
    "files": 1,
    "formats": 1,
    "parallel": 1,
    "tuning": 1,
    "testing": 1,
    "kernels": 2,
    "lora": 3,
    "moe": 4,
    "oracle": 5,
    "build": 6,
    "integrations": 7,
    "layers": 7,
    "tuner": 7,
    "serving": 8,
    "cli": 9,
    "": 10,  # moegraft/__init__.py: re-exports, imported by nobody inside
}

# Third-party packages that the source may import, and the packages that may do it (None: all).
THIRD_PARTY: dict[str, frozenset[str] | None] = {
    "torch": None,
    "triton": frozenset({"kernels"}),
    "transformers": frozenset({"integrations", "serving", "cli"}),
    "vllm": frozenset({"integrations"}),
    "llguidance": frozenset({"serving"}),
    "fsspec": frozenset({"serving"}),
    "fastapi": frozenset({"serving"}),
    "starlette": frozenset({"serving"}),
    "pydantic": frozenset({"serving"}),
    "prometheus_client": frozenset({"serving"}),
    "ray": frozenset({"serving"}),
    "uvicorn": frozenset({"cli"}),
    "peft": frozenset({"cli"}),
    "typer": frozenset({"cli"}),
    "rich": frozenset({"cli"}),
}

# A plug-in has no command line: its host's users set variables, which one module reads.
ENVIRONMENT_OF_PLUGIN = "moegraft.integrations.vllm.versions"
# Tells the ranks that it starts their places, as torchrun does: transformers reads them.
LAUNCHER = "moegraft.parallel.processes"
# Keys come in the environment, as for the command line: Serve's YAML is no place for them.
RAY_APP = "moegraft.serving.ray_app"

TYPE_CHECKING = re.compile(r"(typing\.)?TYPE_CHECKING")
MODULE_IN_STRING = re.compile(r"(moegraft(?:\.[a-z_]\w*)+)(?::\w+)?")


@dataclass(frozen=True, kw_only=True)
class Import:
    """``target`` is absolute: a module, or a module and a name in it. An eager import runs when its module loads."""

    line: int
    target: str
    eager: bool


@dataclass(frozen=True, kw_only=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def package(self) -> str:
        """First component below moegraft; empty for moegraft itself."""
        return self.name.partition(".")[2].partition(".")[0]

    def at(self, line: int) -> str:
        return f"{self.path.as_posix()}:{line}"


def find_imports(node: ast.AST, anchor: list[str], *, eager: bool = True) -> Iterator[Import]:
    """Every import below a node; relative ones count from ``anchor``, the components of the enclosing package."""
    match node:
        case ast.Import(names=names):
            for alias in names:
                yield Import(line=node.lineno, target=alias.name, eager=eager)
        case ast.ImportFrom(module=module, names=names, level=level):
            base = anchor[: len(anchor) - level + 1] if level else []
            for alias in names:
                target = ".".join([*base, *([module] if module else []), alias.name])
                yield Import(line=node.lineno, target=target, eager=eager)
        case ast.Constant(value=str(text)) if named := MODULE_IN_STRING.fullmatch(text):
            yield Import(line=node.lineno, target=named[1], eager=False)
        case ast.If(test=test, body=body, orelse=orelse):
            runs = eager and not TYPE_CHECKING.fullmatch(ast.unparse(test))
            for child in body:
                yield from find_imports(child, anchor, eager=runs)
            for child in [test, *orelse]:
                yield from find_imports(child, anchor, eager=eager)
        case _:
            runs = eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from find_imports(child, anchor, eager=runs)


@cache
def read_modules(source: Path) -> dict[str, Module]:
    """All modules below a ``moegraft`` folder, by dotted name; paths are relative to the folder that holds it."""
    modules = {}
    for file in sorted(source.rglob("*.py")):
        path = file.relative_to(source.parent)
        parts = list(path.with_suffix("").parts)
        package = parts[:-1]
        name = ".".join(package if parts[-1] == "__init__" else parts)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        modules[name] = Module(name=name, path=path, tree=tree, imports=tuple(find_imports(tree, package)))
    return modules


def resolve(target: str, modules: dict[str, Module]) -> str:
    """The longest prefix of an import target that is a module; the top-level name of a third party."""
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in modules:
            return name
    return parts[0]


def find_level_violations(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.package not in LEVELS:
            yield f"{module.at(1)}: moegraft.{module.package} has no level"
            continue
        for found in module.imports:
            name = resolve(found.target, modules)
            if name not in modules or modules[name].package not in (LEVELS.keys() - {module.package}):
                continue
            package = modules[name].package
            if LEVELS[package] >= LEVELS[module.package]:
                yield (
                    f"{module.at(found.line)}: {module.package} (level {LEVELS[module.package]}) imports "
                    f"{name} (level {LEVELS[package]})"
                )


def find_third_party_violations(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for found in module.imports:
            name = found.target.partition(".")[0]
            if name == "moegraft" or name in sys.stdlib_module_names:
                continue
            if name not in THIRD_PARTY:
                yield f"{module.at(found.line)}: {name} is not a dependency"
            elif (allowed := THIRD_PARTY[name]) is not None and module.package not in allowed:
                yield f"{module.at(found.line)}: {name} may be imported in {', '.join(sorted(allowed))} only"


def find_eager_triton_violations(modules: dict[str, Module]) -> Iterator[str]:
    """Only device modules, which are modules (not ``__init__``) of kernels, may need Triton when they load."""

    @cache
    def loaded_by(name: str) -> frozenset[str]:
        """What loading a module loads directly: its parents, and its eager imports with theirs."""
        targets = {resolve(found.target, modules) for found in modules[name].imports if found.eager}
        with_parents = {name} | {target for target in targets if target in modules}
        parents = {part.rsplit(".", depth)[0] for part in with_parents for depth in range(1, part.count(".") + 1)}
        return frozenset((targets | parents) - {name})

    needs_triton = {"triton"}
    while grown := {name for name in modules if loaded_by(name) & needs_triton} - needs_triton:
        needs_triton |= grown
    for module in (modules[name] for name in sorted(needs_triton - {"triton"})):
        if module.package != "kernels" or module.is_package:
            yield f"{module.at(1)}: loading {module.name} needs triton"


def find_environment_violations(modules: dict[str, Module]) -> Iterator[str]:
    readers = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv"}
    for module in modules.values():
        if module.package == "cli" or module.name in (ENVIRONMENT_OF_PLUGIN, LAUNCHER, RAY_APP):
            continue
        lines = {found.line for found in module.imports if found.target in readers}
        lines |= {
            node.lineno
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node) in readers
        }
        for line in sorted(lines):
            yield f"{module.at(line)}: only cli reads environment variables"


RULES = [
    find_level_violations,
    find_third_party_violations,
    find_eager_triton_violations,
    find_environment_violations,
]
Rule = Callable[[dict[str, Module]], Iterator[str]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps_the_rule(rule: Rule) -> None:
    modules = read_modules(SOURCE)
    assert {module.package for module in modules.values()} >= {"", "core", "kernels", "lora", "moe"}
    assert list(rule(modules)) == []


def plant(tmp_path: Path, files: dict[str, str]) -> dict[str, Module]:
    """A synthetic tree with every package of the house and the given files on top."""
    source = tmp_path / "moegraft"
    for package in LEVELS:
        (source / package).mkdir(parents=True, exist_ok=True)
        (source / package / "__init__.py").write_text("")
    for path, text in files.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(text)
    return read_modules(source)


PLANTED: list[tuple[Rule, dict[str, str], str]] = [
    (find_level_violations, {"core/a.py": "import moegraft.lora"}, "core/a.py:1: core (level 0) imports moegraft.lora"),
    (find_level_violations, {"core/a.py": "from moegraft.moe import b"}, "imports moegraft.moe (level 4)"),
    (find_level_violations, {"lora/a.py": "from moegraft import moe"}, "imports moegraft.moe (level 4)"),
    (find_level_violations, {"lora/a.py": "from moegraft import attach"}, "imports moegraft (level 10)"),
    (find_level_violations, {"lora/a.py": "from .. import moe"}, "imports moegraft.moe (level 4)"),
    (find_level_violations, {"lora/p/__init__.py": "from ...moe import x"}, "imports moegraft.moe (level 4)"),
    (find_level_violations, {"lora/p/a.py": "from ...moe import x"}, "imports moegraft.moe (level 4)"),
    (find_level_violations, {"formats/a.py": "import moegraft.tuning"}, "imports moegraft.tuning (level 1)"),
    (find_level_violations, {"core/a.py": "def f():\n    import moegraft.lora"}, "core/a.py:2"),
    (find_level_violations, {"core/a.py": "if TYPE_CHECKING:\n    import moegraft.lora"}, "core/a.py:2"),
    (find_level_violations, {"core/a.py": "x = import_module('moegraft.lora')"}, "core/a.py:1"),
    (find_level_violations, {"core/a.py": "TABLE = {'x': 'moegraft.lora.bank:Bank'}"}, "core/a.py:1"),
    (find_level_violations, {"extra/a.py": ""}, "moegraft.extra has no level"),
    (find_level_violations, {"extra.py": ""}, "moegraft.extra has no level"),
    (find_third_party_violations, {"core/a.py": "import pandas"}, "pandas is not a dependency"),
    (find_third_party_violations, {"core/a.py": "import safetensors.torch"}, "safetensors is not a dependency"),
    (find_third_party_violations, {"lora/a.py": "def f():\n    import triton"}, "triton may be imported in kernels"),
    (find_third_party_violations, {"lora/a.py": "from transformers import x"}, "transformers may be imported in"),
    (find_eager_triton_violations, {"kernels/__init__.py": "import triton"}, "loading moegraft.kernels needs triton"),
    (
        find_eager_triton_violations,
        {
            "kernels/op/device.py": "import triton.language as tl",
            "lora/a.py": "from moegraft.kernels.op.device import k",
        },
        "lora/a.py:1: loading moegraft.lora.a needs triton",
    ),
    (
        find_eager_triton_violations,
        {"kernels/op/device.py": "import triton", "kernels/op/__init__.py": "from .device import k"},
        "loading moegraft.kernels.op needs triton",
    ),
    (find_environment_violations, {"lora/a.py": "import os\nx = os.environ['X']"}, "lora/a.py:2"),
    (find_environment_violations, {"lora/a.py": "from os import getenv"}, "lora/a.py:1"),
]


@pytest.mark.parametrize(("rule", "files", "message"), PLANTED)
def test_planted_violation_is_found(tmp_path: Path, rule: Rule, files: dict[str, str], message: str) -> None:
    violations = list(rule(plant(tmp_path, files)))
    assert any(message in violation for violation in violations), violations


def test_clean_tree_has_no_violation(tmp_path: Path) -> None:
    modules = plant(
        tmp_path,
        {
            "__init__.py": "from moegraft.integrations.hf import attach",
            "core/a.py": "import os.path\nimport torch\nfrom . import b\nfrom .b import x",
            "core/b.py": "NAME = 'moegraft'\nx = 1",
            "kernels/op/device.py": "import triton\nfrom .math import y",
            "kernels/op/math.py": "import triton.language as tl\ny = 1",
            "kernels/op/host.py": "from ...core import a\ndef f():\n    from .device import k",
            "lora/a.py": "from moegraft.kernels.op import host\nfrom ..core.a import x\nimport json",
            "integrations/hf.py": "def f():\n    import transformers",
            "cli/__init__.py": "import os, typer\nx = os.environ.get('X')\ndef f():\n    import peft",
        },
    )
    assert [violation for rule in RULES for violation in rule(modules)] == []
