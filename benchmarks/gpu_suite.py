"""Everything that needs a GPU, in commands that end in time: correctness, tuning, the engine, kernels, training.

    python -m benchmarks.gpu_suite --out gpu-results --minutes 9
    python -m benchmarks.gpu_suite --out gpu-results --minutes 9 --run 2    # another nine minutes: what takes longer
    python -m benchmarks.gpu_suite --out gpu-results --minutes 3 --parts correctness,tune

Each part is a process of its own: one that fails, hangs or crashes costs its own minutes and the rest goes on; what a
part leaves of its minutes goes to the next ones. OUT holds `<part>.log`, `<part>.json` with the part's results, which
most write row by row, and `suite.json`, written anew after every part: it has all results in one file, with the
machine, and keeps the parts of earlier commands. The parts see one folder of tuned tables, in OUT, so that what `tune`
finds serves those after it. A short table comes last. Where there is no git, LPMRF_COMMIT says which commit it is.

Exit status: 0 all parts are fine, 1 some are not, 2 no GPU or unusable arguments.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = "cache"
TAIL = 30
"""Lines of the log that suite.json keeps of a part that is not fine."""


@dataclass(frozen=True)
class Part:
    """One process. `{out}` in a word of the command is the folder of the results."""

    name: str
    minutes: float
    """The most that it may take, out of nine; more where the parts before it have left some."""
    command: tuple[str, ...]
    results: Callable[[Path], object] | None = None
    """What goes to OUT/<name>.json after it, where the command does not write that itself."""
    run: int = 1
    """Which command of nine minutes it belongs to."""


def test_counts(out: Path) -> dict:
    """Counts, and the names of what failed, out of pytest's lines: also of a run that was cut off."""
    results = {}
    for line in (out / "correctness.log").read_text(errors="replace").splitlines():
        name, status = (re.search(p, line) for p in (r"\S+\.py::[^\[\s]+(\[[^\]]*\])?", r"\b(PASS|FAIL|SKIPP|ERROR)"))
        if name and status:
            results[name[0]] = {"PASS": "passed", "FAIL": "failed", "SKIPP": "skipped", "ERROR": "failed"}[status[1]]
    counts = {status: list(results.values()).count(status) for status in ("passed", "failed", "skipped")}
    return {**counts, "which_failed": sorted(name for name, status in results.items() if status == "failed")}


def tuned_tables(out: Path) -> dict:
    """File name → table: copy one to lpmrf_kernels/configs to ship it."""
    tables = sorted((out / CACHE / "lpmrf-fast" / "configs").glob("*.json"))
    return {path.name: json.loads(path.read_text()) for path in tables}


def module(name: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *words)


TESTS = module("pytest", "tests/kernels", "tests/engine", "-k", "(cuda or gpu) and not cuda-torch", "-vv")
# Most of their time is the compilation of kernels, on the CPU's cores.
TESTS += ("-n", str(max(1, min(12, (os.cpu_count() or 1) - 2)))) if importlib.util.find_spec("xdist") else ()
ENGINE = module("benchmarks.engine", "--device", "cuda", "--preset", "full")
KERNELS = module("benchmarks.kernels", "--device", "cuda")
TRAINING = module("benchmarks.training", "--device", "cuda", "--seconds", "2")
PARTS = [
    Part("correctness", 1.5, TESTS, test_counts),
    Part("tune", 1.0, module("lpmrf_fast", "tune"), tuned_tables),
    Part(
        "engine",
        4.5,
        (
            *(*ENGINE, "--batch", "1", "32", "--steps", "25", "--seconds", "3", "--out", "{out}/engine.json"),
            *("--only", "engine", "eager", "eager + graph", "engine step"),
        ),
    ),
    Part("kernels", 2.0, (*KERNELS, "--no-compile", "--out", "{out}/kernels.json")),
    Part(
        "engine-compile",  # by itself: torch.compile takes minutes, and what it leaves unfinished costs nobody else
        3.5,
        (
            *(*ENGINE, "--batch", "1", "--steps", "25", "--only", "engine", "compile", "--parts", "providers"),
            *("--out", "{out}/engine-compile.json"),
        ),
        run=2,
    ),
    Part("training", 1.5, (*TRAINING, "--out", "{out}/training.json"), run=2),
    Part("kernels-compile", 2.0, (*KERNELS, "--out", "{out}/kernels-compile.json"), run=2),
    Part(
        "engine-more",
        2.0,
        (
            *(*ENGINE, "--batch", "8", "1", "--steps", "25", "5", "1", "--seconds", "2", "--parts", "providers"),
            *("--only", "engine", "engine fp32", "engine deterministic", "--out", "{out}/engine-more.json"),
        ),
        run=2,
    ),
]


def run_part(part: Part, out: Path, seconds: float) -> dict:
    """Run it for at most so many seconds; what came of it."""
    command = [word.replace("{out}", str(out)) for word in part.command]
    environment = {**os.environ, "XDG_CACHE_HOME": str(out / CACHE), "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")])
    )
    log, results, started, status = out / f"{part.name}.log", out / f"{part.name}.json", time.monotonic(), "ok"
    results.unlink(missing_ok=True)  # of an earlier command
    with open(log, "w") as file:
        # A session of its own, so that the end reaches whatever the part has started.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            status = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    row = {"part": part.name, "status": status, "seconds": round(time.monotonic() - started, 1)}
    row |= {"last_line": lines[-1][:200] if lines else "", "command": command}
    if status != "ok":
        row["log"] = lines[-TAIL:]
    try:
        if part.results is not None:
            results.write_text(json.dumps(part.results(out), indent=1) + "\n")
        row["results"] = json.loads(results.read_text())
    except Exception as error:  # a part that died may have left anything
        row["no_results"] = f"{type(error).__name__}: {error}"
    return row


def run(parts: list[Part], out: Path, minutes: float, machine: dict, log=print) -> list[dict]:
    """Run the parts in order within the minutes, each within its share; writes suite.json and returns their rows."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "parts": []}
    try:
        names = {part.name for part in parts}
        before = json.loads((out / "suite.json").read_text())["parts"]
        report["parts"] = [row for row in before if row["part"] not in names]
    except (OSError, ValueError, LookupError, TypeError):  # the first command, or a file that was cut off
        pass
    end, rows, unit = time.monotonic() + 60 * minutes, [], 60 * max(1.0, minutes / 9)
    for i, part in enumerate(parts):
        left = end - time.monotonic()
        spare = left - unit * sum(later.minutes for later in parts[i:])
        row = {"part": part.name, "status": "no time left", "seconds": 0.0, "last_line": ""}
        if left >= 1:
            log(f"{part.name} ...")
            try:
                row = run_part(part, out, min(left, unit * part.minutes + max(0.0, spare)))
            except Exception as error:  # no such program, a full disk
                row["status"] = f"failed ({type(error).__name__}: {error})"
        rows.append(row)
        report["parts"].append(row | {"machine": machine})
        whole = out / "suite.json.partial"
        whole.write_text(json.dumps(report, indent=1) + "\n")
        whole.replace(out / "suite.json")
    return rows


def table(rows: list[dict]) -> str:
    return "\n".join(f"{r['part']:16}{r['status']:16}{r['seconds']:8.1f} s  {r['last_line'][:90]}" for r in rows)


def chosen(names: str | None, parts: list[Part], run: int = 1) -> list[Part]:
    """The named parts, or those of a run, in the suite's order. Raises ValueError for an unknown one."""
    known = {part.name: part for part in parts}
    wanted = names.split(",") if names else [part.name for part in parts if part.run == run]
    for name in wanted:
        if name not in known:
            raise ValueError(f"no part is called {name!r}; there are {', '.join(known)}")
    return [part for part in parts if part.name in wanted]


def main(argv=None, parts=None, device="cuda") -> int:
    """The command. parts, device: others, for tests."""
    parts = PARTS if parts is None else parts
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together (default: %(default)s)")
    parser.add_argument(
        "--run", type=int, choices=sorted({p.run for p in parts}), default=1, help="its parts (default: 1)"
    )
    parser.add_argument("--parts", help=f"in place of a run's, comma-separated: {', '.join(p.name for p in parts)}")
    args = parser.parse_args(argv)
    try:
        parts = chosen(args.parts, parts, args.run)
    except ValueError as error:
        parser.error(str(error))

    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: PyTorch sees no GPU; nothing was run", file=sys.stderr)
        return 2
    from . import machine

    rows = run(parts, args.out, args.minutes, machine.describe(device))
    print(table(rows))
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
