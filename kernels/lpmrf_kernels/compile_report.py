"""Compiles every registered Triton kernel for GPUs that need not be there, and says what each one uses.

    python -m lpmrf_kernels.compile_report [--targets sm_80,sm_90] [--op euler_step] [--dtype bf16] [--candidates]

Every compile case of every op, and again with every row of the shipped tables (`configs/*.json`) of that target's GPUs;
with --candidates also the launch choices that `tune` races, upon the cases that it races them at.
Registers a thread, bytes of stack a thread (a spill shows there), bytes of shared memory a program and the seconds that
compilation took, out of the compiled code itself. Compilation runs in processes of its own, as many as there are cores,
because what a target does not support can abort the process: that case is reported as failed and the rest goes on.
Nothing is read from or left in Triton's cache.

Exit status 1 where a kernel does not compile, wants more shared memory than the chip has, or, as the heuristic's
default, needs a stack frame. (A row of a table has won a race as it is.)
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import _triton
from .registry import OPS, CompileCase, Op

KIB = 1024
SHARED_MEMORY = {  # the most that one program can have
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}
TARGETS = tuple(SHARED_MEMORY)
CONFIGS = Path(__file__).parent / "configs"
LAUNCH = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target; `error` is None where it compiled. Bytes and registers are None where unknown."""

    op: str
    label: str
    target: str
    registers: int | None = None
    stack: int | None = None
    shared: int | None = None
    seconds: float | None = None
    error: str | None = None

    @property
    def kind(self) -> str:
        """ "default" of the heuristic, "row" of a shipped table, or "candidate" of `tune`: the label says it."""
        source = self.label.partition("; ")[2]
        return "candidate" if source.startswith("candidate ") else "row" if source else "default"

    @property
    def fault(self) -> str | None:
        """Why this kernel must not be shipped, None if it may."""
        if self.error:
            return self.error
        if self.kind != "row" and self.stack:
            return f"a {self.kind} must need no stack frame, this one has {self.stack} B: smaller tiles, or more warps"
        limit = SHARED_MEMORY.get(self.target)
        if limit and self.shared and self.shared > limit:
            return f"{self.shared} B of shared memory, {self.target} has {limit}: smaller tiles, or fewer stages"
        return None

    def __str__(self) -> str:
        used = {"registers": self.registers, "B stack": self.stack, "B shared": self.shared}
        known = [f"{n} {unit}" for unit, n in used.items() if n is not None]
        known += [f"{self.seconds:.1f} s"] if self.seconds is not None else []
        fault = f"FAILS: {self.fault}; " if self.fault else ""
        return f"{self.target:7} {self.op} [{self.label}]: {fault}{', '.join(known)}"


def compile_report(
    targets=TARGETS, ops=None, dtype: str | None = None, jobs: int | None = None, candidates: bool = False
) -> list[Compiled]:
    """Compile each case of these ops (None: all that have a Triton kernel) for each target, in subprocesses.

    dtype: only cases with a pointer of this Triton type, such as "bf16" (of an op without one: all). jobs: processes
    at a time, by default one a core. candidates: those of `tune`, too. Raises ValueError for an unknown target or op,
    RuntimeError without triton.
    """
    if _triton.MISSING:
        raise RuntimeError(f"compile_report: {_triton.MISSING}")
    for target in targets:
        if not re.fullmatch(r"sm_\d+|gfx[0-9a-f]+", target):
            raise ValueError(f"compile_report: expected a target such as sm_90 or gfx942, got {target!r}")
    for op in ops or ():
        if op not in OPS:
            raise ValueError(f"compile_report: no op is called {op!r}; there are {', '.join(OPS)}")
    jobs = jobs or os.cpu_count() or 1
    work = []  # (target, cases): one process each
    for target in targets:
        cases = [
            (op.name, label)
            for op in OPS.values()
            if not ops or op.name in ops
            for label in _of_dtype(cases_of(op, target, candidates), dtype)
        ]
        parts = max(1, min(len(cases), -(-jobs // len(targets))))
        work += [(target, cases[first::parts]) for first in range(parts)]
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda item: _compile_all(item[1], item[0], cache), work)
        return [result for results in done for result in results]


def cases_of(op: Op, target: str, candidates: bool = False) -> dict[str, CompileCase]:
    """What is compiled of an op for this target, by label: its cases, then upon each the rows that the shipped tables
    have for its launch, or the candidates that `tune` races for it."""
    tables = {path.stem: json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))}
    tables = {name: table for name, table in tables.items() if table.get("target") == target}
    if candidates:
        tables["candidate"] = op.candidates
    cases = {case.label: case for case in op.compile_cases()}
    found = dict(cases)
    for source, table in tables.items():
        for case in cases.values():
            if source == "candidate" and not case.raced:
                continue
            for row in table.get(case.config or op.name, ()):
                choice = {k: n for k, n in row.items() if k.isupper() or k in LAUNCH}
                tiles = {k: n for k, n in choice.items() if k not in LAUNCH}
                if tiles.keys() <= case.constexprs.keys():
                    label = f"{case.label}; {source} {' '.join(f'{k}={n}' for k, n in choice.items())}"
                    launch = {k: choice[k] for k in LAUNCH if k in choice}
                    found[label] = dataclasses.replace(
                        case, label=label, constexprs={**case.constexprs, **tiles}, **launch
                    )
    return found


def _of_dtype(cases: dict[str, CompileCase], dtype: str | None) -> list[str]:
    chosen = [label for label, case in cases.items() if f"*{dtype}" in case.signature.values()]
    return chosen or list(cases)


def _compile_all(cases: list[tuple[str, str]], target: str, cache: str) -> list[Compiled]:
    package = Path(__file__).parent
    # Interpreted kernels cannot be compiled, and the child must find this very package.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1"}
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

    case = cases_of(OPS[op], target, candidates=True)[label]
    result = Compiled(op, label, target)
    names = case.kernel.arg_names
    types = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name].startswith("*") or name in case.divisible or case.aligned and types[name] in ("i32", "i64")
    }
    source = ASTSource(case.kernel, {name: types[name] for name in names}, dict(case.constexprs), aligned)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    options = {"num_warps": case.num_warps} | ({"num_stages": case.num_stages} if case.num_stages else {})
    started = time.perf_counter()
    try:
        kernel = compile(source, target=gpu, options=options)
    except Exception as error:  # whatever a compiler raises is the report
        return dataclasses.replace(result, error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
    seconds = round(time.perf_counter() - started, 2)
    return dataclasses.replace(result, shared=kernel.metadata.shared, seconds=seconds, **_usage(kernel.asm))


def _usage(asm) -> dict[str, int]:
    if "amdgcn" in asm:
        text, names = asm["amdgcn"], {"registers": r"\.vgpr_count:", "stack": r"\.private_segment_fixed_size:"}
    else:
        tool = Path(_triton.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if not tool.exists():
            return {}
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        names = {"registers": "REG:", "stack": "STACK:"}
    found = {name: re.search(rf"{key}\s*(\d+)", text) for name, key in names.items()}
    return {name: int(match[1]) for name, match in found.items() if match}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lpmrf_kernels.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--dtype", help="only cases with such pointers: fp32, fp16 or bf16")
    parser.add_argument("--candidates", action="store_true", help="also the launch choices that tune races: for hours")
    parser.add_argument("--jobs", type=int, help="processes at a time (default: one a core)")
    parser.add_argument("--child", metavar="TARGET", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        for op, label in json.load(sys.stdin):
            print(json.dumps(dataclasses.asdict(_compile(op, label, arguments.child))), flush=True)
        return 0
    started = time.perf_counter()
    try:
        results = compile_report(
            arguments.targets.split(","), arguments.op, arguments.dtype, arguments.jobs, arguments.candidates
        )
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(*results, sep="\n")
    faults = [result for result in results if result.fault]
    print(f"{len(results)} compilations in {time.perf_counter() - started:.0f} s, {len(faults)} faults")
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
