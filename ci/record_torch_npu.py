"""Records from a torch_npu wheel what torchspec's Ascend adapter uses of it: `python ci/record_torch_npu.py WHEEL...`.

Nothing of the wheel is imported, which would need CANN: operators come from the table that its own code is generated
from, Python functions from their source. tests/devices/ascend checks the adapter against the files that this writes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).resolve().parents[1] / "tests" / "devices" / "ascend" / "recorded"
OPERATOR_TABLE = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"

OPERATORS = (
    "npu_fusion_attention",
    "npu_fusion_attention_grad",
    "npu_rms_norm",
    "npu_rms_norm_backward",
    "npu_rotary_mul",
    "npu_swiglu",
    "npu_swiglu_backward",
)
NAMES = {
    "torch_npu.npu": (
        "Event", "Stream", "_is_in_bad_fork", "current_device", "current_stream", "device_count", "get_device_name",
        "get_rng_state", "manual_seed_all", "max_memory_allocated", "mem_get_info", "memory_allocated",
        "reset_peak_memory_stats", "set_device", "set_per_process_memory_fraction", "set_rng_state", "stream",
        "synchronize",
    ),
    "torch_npu.profiler": ("ProfilerActivity", "profile", "tensorboard_trace_handler"),
}  # fmt: skip


def main(wheels: list[str]) -> None:
    for wheel in wheels:
        found = record(Path(wheel))
        path = RECORDED / f"{found['version']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{path.name}: {len(found['operators'])} operators")


def record(wheel: Path) -> dict[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        facts = re.findall(r"^(?:Version|Requires-Dist): (\d.*|torch\b.*)$", _text(archive, metadata), re.MULTILINE)
        return {
            "version": facts[0],
            "requires": facts[1],
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "operators": operators(_text(archive, OPERATOR_TABLE)),
            "python": {
                module: {name: python_name(archive, module, name) for name in names} for module, names in NAMES.items()
            },
        }


def operators(table: str) -> list[str]:
    """The schemas of every overload of `OPERATORS`, once each."""
    pattern = rf"func: ((?:{'|'.join(OPERATORS)})(?:\.\w+)?\(.*)$"
    found = sorted(set(re.findall(pattern, table, re.MULTILINE)))
    missing = set(OPERATORS) - {re.split(r"[.(]", schema)[0] for schema in found}
    if missing:
        raise SystemExit(f"the wheel has no {', '.join(sorted(missing))}")
    return found


def python_name(archive: zipfile.ZipFile, module: str, name: str) -> dict[str, str] | str:
    """A function's parameters, a class's methods with theirs, or where compiled code is imported from."""
    path, tree = _module(archive, module)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return parameters(node)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {each.name: parameters(each) for each in node.body if isinstance(each, ast.FunctionDef)}
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        names = {alias.asname or alias.name: alias.name for alias in node.names}
        if name not in names and "*" not in names:
            continue
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        source = f"{package}.{node.module}" if node.level == 1 else str(node.module)
        if source.startswith("torch_npu._C"):
            return f"of {source}"
        if _is_there(archive, source):
            try:
                return python_name(archive, source, names.get(name, name))
            except LookupError:
                continue
    raise LookupError(f"{module} has no {name}")


def parameters(function: ast.FunctionDef) -> str:
    """Without annotations, and with `...` for every default."""
    arguments = function.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(...) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(...) for default in arguments.kw_defaults]
    return ast.unparse(arguments)


def _module(archive: zipfile.ZipFile, module: str) -> tuple[str, ast.Module]:
    folder = module.replace(".", "/")
    path = next(each for each in (f"{folder}/__init__.py", f"{folder}.py") if each in archive.namelist())
    return path, ast.parse(_text(archive, path))


def _is_there(archive: zipfile.ZipFile, module: str) -> bool:
    folder = module.replace(".", "/")
    return f"{folder}/__init__.py" in archive.namelist() or f"{folder}.py" in archive.namelist()


def _text(archive: zipfile.ZipFile, path: str) -> str:
    return archive.read(path).decode()


if __name__ == "__main__":
    main(sys.argv[1:])
