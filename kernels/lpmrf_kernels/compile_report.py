"""Compiles every registered Triton kernel for GPUs that need not be there, and says what each one uses.

    python -m lpmrf_kernels.compile_report --targets sm_80,sm_90,sm_100 [--op euler_step]

Registers a thread, bytes of stack a thread (a spill shows there), static local memory a thread and shared memory a
program, out of the compiled code itself; gfx... targets give shared memory only. Compilation runs in a process of its
own for each target, because what a target does not support can abort the process: that case is reported as failed and
the rest goes on. Exit status 1 if any failed.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import _triton
from .registry import OPS

TARGETS = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target; `error` is None where it compiled. Bytes and registers are None where unknown."""

    op: str
    label: str
    target: str
    registers: int | None = None
    stack: int | None = None
    local: int | None = None
    shared: int | None = None
    error: str | None = None

    def __str__(self) -> str:
        used = {
            "registers": self.registers,
            "B stack": self.stack,
            "B local": self.local,
            "B shared": self.shared,
        }
        known = ", ".join(f"{n} {unit}" for unit, n in used.items() if n is not None)
        return f"{self.target:7} {self.op} [{self.label}]: {self.error or known}"


def compile_report(targets=TARGETS, ops=None) -> list[Compiled]:
    """Compile each case of these ops (None: all that have a Triton kernel) for each target, in subprocesses.

    Raises ValueError for an unknown target or op, RuntimeError without triton.
    """
    if _triton.MISSING:
        raise RuntimeError(f"compile_report: {_triton.MISSING}")
    for target in targets:
        if not re.fullmatch(r"sm_\d+|gfx[0-9a-f]+", target):
            raise ValueError(f"compile_report: expected a target such as sm_90 or gfx942, got {target!r}")
    for op in ops or ():
        if op not in OPS:
            raise ValueError(f"compile_report: no op is called {op!r}; there are {', '.join(OPS)}")
    cases = [(op.name, case.label) for op in OPS.values() if not ops or op.name in ops for case in op.compile_cases()]
    return [result for target in targets for result in _compile_all(cases, target)]


def _compile_all(cases: list[tuple[str, str]], target: str) -> list[Compiled]:
    package = Path(__file__).parent
    # Interpreted kernels cannot be compiled, and the child must find this very package.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")]))
    results = []
    while len(results) < len(cases):
        child = subprocess.run(
            [sys.executable, "-m", f"{__package__}.compile_report", "--child", target],
            input=json.dumps(cases[len(results) :]),
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        results += [Compiled(**json.loads(line)) for line in child.stdout.splitlines() if line.startswith("{")]
        if len(results) < len(cases):  # the child died of the next case
            tail = (child.stderr.strip().splitlines() or ["no message"])[-1]
            results.append(
                Compiled(*cases[len(results)], target, error=f"the compiler died ({child.returncode}): {tail}")
            )
    return results


# ---- in the child


def _compile(op: str, label: str, target: str) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    case = next(case for case in OPS[op].compile_cases() if case.label == label)
    signature = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    names = case.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, {name: signature[name] for name in names}, dict(case.constexprs), attributes)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    try:
        kernel = compile(source, target=gpu, options={"num_warps": case.num_warps})
    except Exception as error:  # whatever a compiler raises is the report
        return Compiled(op, label, target, error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
    result = Compiled(op, label, target, shared=kernel.metadata.shared)
    return dataclasses.replace(result, **_usage(kernel.asm["cubin"])) if "cubin" in kernel.asm else result


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(_triton.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    names = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}
    found = {name: re.search(rf"{key}:(\d+)", text) for name, key in names.items()}
    return {name: int(match[1]) for name, match in found.items() if match}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lpmrf_kernels.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--child", metavar="TARGET", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        for op, label in json.load(sys.stdin):
            print(json.dumps(dataclasses.asdict(_compile(op, label, arguments.child))), flush=True)
        return 0
    try:
        results = compile_report(arguments.targets.split(","), arguments.op)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(*results, sep="\n")
    return any(result.error for result in results)


if __name__ == "__main__":
    sys.exit(main())
