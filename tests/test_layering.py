"""The architecture is a test: imports only go downwards, siblings do not know each other, heavy libraries come late.

`violations(root)` reads the sources below `root` (nothing is imported) and returns one line for each breach. The tests
run it on this repository, and on small planted trees to show that it finds what it should.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

# From the top down, as DESIGN.md has them, larger modules split. A module may import from lines below its own.
MBRIDGE = (
    "__main__ cli __init__ bridge export checkpoint gather megatron spelling plan families ops topology hf_config fp8 "
    "live pieces errors"
)
MBRIDGE_RL = (
    "testing __init__ syncer lanes conductor follower ray fleet engines receiver shard_path bucket_path "
    "direct_path checker borrower learning loading target placement recorder views agreement lender filler "
    "broadcaster broadcast_slots shard_sender local_copies needs broadcast_plan source switchboard inbox observe "
    "metrics checksum copy_plan copy_triton checksum_triton patches transports buckets verification protocol "
    "waits flows parties control handshake endpoints hosts wire report messages errors"
)
LAYERS = {"mbridge": MBRIDGE.split(), "mbridge_rl": MBRIDGE_RL.split()}
NOT_YET = {"ray"}  # layers of DESIGN.md that need not be there; strike out what has been built
# Packages of interchangeable files: a file may import `base`, shared files that begin with "_", its `<name>_worker`.
SEAMS = ("mbridge.families", "mbridge_rl.engines", "mbridge_rl.transports")
# Who may import a library at all. A trailing "*" stands for the rest of a module's name.
OWNERS = {
    "megatron": ("mbridge.megatron", "mbridge.megatron.*"),
    "vllm": ("mbridge_rl.engines.vllm", "mbridge_rl.engines.vllm_*"),
    "sglang": ("mbridge_rl.engines.sglang", "mbridge_rl.engines.sglang_*"),
    "ray": ("mbridge_rl.ray", "mbridge_rl.ray.*"),
}
# Pure arithmetic and files: no process groups here.
NO_DISTRIBUTED = (
    "checkpoint",
    "spelling",
    "fp8",
    "plan",
    "families",
    "ops",
    "topology",
    "hf_config",
    "pieces",
    "errors",
)
# What mbridge_rl may see of mbridge.
SEEN_BY_RL = ("mbridge", "mbridge.live", "mbridge.pieces", "mbridge.plan", "mbridge.errors")

HEAVY = {"megatron", "vllm", "sglang", "ray", "triton", "transformers"}
CORE_DEPENDENCIES = {"torch", "safetensors", "numpy", "pyzmq", "msgspec"}


class Import(NamedTuple):
    """`importer` (a module's full name) names `target` at `line` of its file."""

    importer: str
    target: str
    line: int


def find_modules(root: Path) -> dict[str, Path]:
    """Full name -> file of each module of the two packages."""
    found = {}
    for package in LAYERS:
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(module: str, file: Path, known: set[str]) -> Iterator[Import]:
    """Every import statement, wherever it stands, and import_module("...") with a literal; relative ones made absolute.

    `from a import b` counts as an import of `a.b` if that is a module (always, for libraries whose files are not read).
    """
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(module, alias.name, node.lineno)
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    above = package.split(".")[: len(package.split(".")) - level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                for alias in names:
                    full = f"{base}.{alias.name}"
                    ours = base is not None and base.split(".")[0] in LAYERS
                    yield Import(module, full if full in known or not ours else str(base), node.lineno)
            case ast.Call(func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module")):
                if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                    yield Import(module, node.args[0].value, node.lineno)
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield Import(module, "torch.distributed", node.lineno)


def is_one_of(module: str, patterns: tuple[str, ...]) -> bool:
    return any(module == p or (p.endswith("*") and module.startswith(p[:-1])) for p in patterns)


def within(target: str, package: str) -> bool:
    return target == package or target.startswith(package + ".")


def layer_of(module: str) -> tuple[str, str]:
    """("mbridge", "families") for mbridge.families.llama; mbridge itself is its __init__."""
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0] or "__init__"


def breach(item: Import) -> str | None:
    """Which rule this import breaks, if any."""
    importer, target = item.importer, item.target
    package, layer = layer_of(importer)
    library = target.split(".")[0]
    if library in OWNERS and not is_one_of(importer, OWNERS[library]):
        return f"only {OWNERS[library][0]} may import {library}"
    if within(target, "torch.distributed") and package == "mbridge" and layer in NO_DISTRIBUTED:
        return "nothing below gather.py uses torch.distributed"
    if library not in LAYERS:
        return None
    if library != package:
        if package == "mbridge":
            return "mbridge knows nothing of mbridge_rl"
        return None if target in SEEN_BY_RL else f"mbridge_rl sees only {', '.join(SEEN_BY_RL)}"
    return breach_inside(importer, target)


def breach_inside(importer: str, target: str) -> str | None:
    """The rules between modules of one package."""
    (package, layer), (_, target_layer) = layer_of(importer), layer_of(target)
    order = LAYERS[package]
    if target_layer not in order:
        return f"{package}.{target_layer} has no place in LAYERS; give it one"
    if layer != target_layer:
        return None if order.index(target_layer) > order.index(layer) else "imports only go downwards"
    seam = f"{package}.{layer}"
    if seam not in SEAMS or target == seam:
        return None
    mine, other = importer.removeprefix(seam + "."), target.removeprefix(seam + ".")
    if other.startswith("_") or (other == "base" and not mine.startswith("_")) or other == mine:
        return None
    if {mine, other} == {mine.removesuffix("_worker"), mine.removesuffix("_worker") + "_worker"}:
        return None
    return f"siblings in {seam} never import each other"


def violations(root: Path) -> list[str]:
    """One line for each breach in the sources below `root`; also for a module that has no layer."""
    modules = find_modules(root)
    found = []
    for module, file in modules.items():
        package, layer = layer_of(module)
        if layer not in LAYERS[package]:
            found.append(f"{module}: has no place in LAYERS; give it one")
            continue
        for item in imports_of(module, file, set(modules)):
            rule = breach(item)
            found += [] if rule is None else [f"{module}:{item.line} imports {item.target}: {rule}"]
    return list(dict.fromkeys(found))


def test_this_repository_keeps_its_layers(repo_root: Path) -> None:
    modules = find_modules(repo_root)
    for package, layers in LAYERS.items():
        assert package in modules, f"no {package} below {repo_root}"
        present = {layer_of(module)[1] for module in modules if layer_of(module)[0] == package}
        assert set(layers) - present <= NOT_YET, "a layer has no file: is the table right, or the search broken?"
    num_imports = sum(
        1 for m, f in modules.items() for i in imports_of(m, f, set(modules)) if i.target.split(".")[0] in LAYERS
    )
    assert num_imports >= 40, f"only {num_imports} imports between our modules found: the reader of imports is broken"
    assert violations(repo_root) == []


# Each: file, source, and the rule that must be named.
PLANTED = {
    "upwards": ("mbridge/pieces.py", "from .plan import audit", "only go downwards"),
    "upwards, absolute": ("mbridge/ops.py", "import mbridge.bridge", "only go downwards"),
    "upwards, in a function": ("mbridge/plan.py", "def f():\n    from . import gather", "only go downwards"),
    "upwards, to the package": ("mbridge/plan.py", "from . import AutoBridge", "only go downwards"),
    "upwards, from a package": ("mbridge/families/a.py", "from ..plan import audit", "only go downwards"),
    "upwards, in rl": ("mbridge_rl/buckets.py", "from .transports import base", "only go downwards"),
    "testing is above all": ("mbridge_rl/syncer.py", "from .testing import suite", "only go downwards"),
    "families": ("mbridge/families/a.py", "from .b import TABLE", "siblings"),
    "families, of the package": ("mbridge/families/__init__.py", "from . import b", "siblings"),
    "engines": ("mbridge_rl/engines/sglang.py", "from .vllm_worker import f", "siblings"),
    "engines, other worker": ("mbridge_rl/engines/module.py", "from . import vllm", "siblings"),
    "transports": ("mbridge_rl/transports/cuda_ipc.py", "from mbridge_rl.transports import shared_memory", "siblings"),
    "base knows no one": ("mbridge_rl/transports/base.py", "from .shared_memory import x", "siblings"),
    "megatron": ("mbridge/gather.py", "from megatron.core import parallel_state", "only mbridge.megatron"),
    "megatron, by name": ("mbridge/bridge.py", "importlib.import_module('megatron.core')", "only mbridge.megatron"),
    "megatron, in rl": ("mbridge_rl/syncer.py", "import megatron.core", "only mbridge.megatron"),
    "vllm": ("mbridge_rl/receiver.py", "def f():\n    import vllm", "only mbridge_rl.engines.vllm"),
    "vllm, elsewhere": ("mbridge_rl/engines/module.py", "from vllm import LLM", "only mbridge_rl.engines.vllm"),
    "sglang": ("mbridge_rl/engines/vllm.py", "import sglang", "only mbridge_rl.engines.sglang"),
    "ray": ("mbridge_rl/syncer.py", "import ray", "only mbridge_rl.ray"),
    "distributed": ("mbridge/plan.py", "import torch.distributed as dist", "torch.distributed"),
    "distributed, from": ("mbridge/ops.py", "from torch import distributed", "torch.distributed"),
    "distributed, as attribute": ("mbridge/checkpoint.py", "torch.distributed.barrier()", "torch.distributed"),
    "distributed, deep": ("mbridge/families/a.py", "from torch.distributed.device_mesh import x", "torch.distributed"),
    "rl looks inside": ("mbridge_rl/syncer.py", "from mbridge.gather import g", "mbridge_rl sees only"),
    "rl looks inside, from": ("mbridge_rl/syncer.py", "from mbridge import families", "mbridge_rl sees only"),
    "mbridge knows rl": ("mbridge/bridge.py", "import mbridge_rl", "knows nothing"),
    "no layer": ("mbridge/utils.py", "", "has no place"),
}  # fmt: skip


def plant(root: Path, files: dict[str, str]) -> None:
    for package, layers in LAYERS.items():
        for layer in layers:
            is_package = f"{package}.{layer}" in {*SEAMS, "mbridge.megatron", "mbridge_rl.ray"}
            file = root / package / layer / "__init__.py" if is_package else root / package / f"{layer}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    for name in ("families/a", "families/b", "families/_blocks"):
        (root / "mbridge" / f"{name}.py").touch()
    for name in (
        "engines/base",
        "engines/module",
        "engines/vllm",
        "engines/vllm_worker",
        "transports/base",
        "transports/shared_memory",
    ):
        (root / "mbridge_rl" / f"{name}.py").touch()
    for path, source in files.items():
        (root / path).write_text(source + "\n")


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_found(case: str, tmp_path: Path) -> None:
    path, source, rule = PLANTED[case]
    plant(tmp_path, {path: source})
    found = violations(tmp_path)
    assert len(found) == 1, found
    assert rule in found[0]


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "mbridge/__init__.py": "from .bridge import AutoBridge\nfrom . import errors",
            "mbridge/bridge.py": "from . import plan\nfrom .megatron import build\nfrom .families import find",
            "mbridge/gather.py": "import torch.distributed",
            "mbridge/megatron/__init__.py": "import megatron.core\nfrom ..families import MegatronConfig",
            "mbridge/families/a.py": "from . import Family, _blocks\nfrom ._blocks import rows\nfrom ..ops import QKV",
            "mbridge_rl/syncer.py": "from mbridge import Bridge\nfrom mbridge.plan import T\nfrom .engines import base",
            "mbridge_rl/engines/vllm.py": "import vllm\nfrom .base import Engine\nfrom . import vllm_worker",
            "mbridge_rl/engines/vllm_worker.py": "import vllm.x\nfrom .vllm import z\nfrom ..transports import base",
            "mbridge_rl/transports/shared_memory.py": "from . import base\nfrom ..buckets import B",
            "mbridge_rl/ray/__init__.py": "import ray",
        },
    )
    assert violations(tmp_path) == []


def modules_after(statement: str, root: Path) -> tuple[float, dict[str, str]]:
    """Run `statement` after `import torch` in a fresh process: seconds it took, and name -> file of what it added."""
    code = (
        "import json, sys, time, torch\n"
        "before = set(sys.modules); begin = time.perf_counter()\n"
        f"{statement}\n"
        "took = time.perf_counter() - begin\n"
        "added = {n: getattr(m, '__file__', None) or '' for n, m in sys.modules.items() if n not in before}\n"
        "print(json.dumps([took, added]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    took, added = json.loads(done.stdout)
    return took, added


def test_importing_both_packages_is_light(repo_root: Path) -> None:
    runs = [modules_after("import mbridge, mbridge_rl", repo_root) for _ in range(3)]
    added = runs[0][1]
    assert {"mbridge", "mbridge_rl"} <= set(added)
    assert {name.split(".")[0] for name in added} & HEAVY == set()
    third_party = {name.split(".")[0] for name, file in added.items() if "site-packages" in file}
    assert third_party <= {"safetensors", "numpy", "zmq", "msgspec"}
    assert min(took for took, _ in runs) < 1.0, f"seconds beyond import torch: {[took for took, _ in runs]}"


def test_what_every_vllm_process_loads_is_light(repo_root: Path) -> None:
    """vLLM imports the module of our entry point in each of its processes, also when the user has no use for it."""
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["mbridge"].partition(":")
    took, added = modules_after(f"import {module}; assert callable({module}.{function})", repo_root)
    assert {name.split(".")[0] for name in added} & HEAVY == set()
    assert took < 3.0


def test_the_core_needs_only_five_libraries(repo_root: Path) -> None:
    dependencies = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {d.partition(">=")[0] for d in dependencies} == CORE_DEPENDENCIES
