"""Everything that needs a GPU, in one command that ends in time: correctness, tuning, kernels, the engine.

    python -m benchmarks.gpu_suite --out gpu-results --minutes 9 [--parts correctness,kernels]

Each part is a process of its own: one that fails, hangs or crashes costs its own minutes and the rest goes on. OUT
holds `<part>.log`, `<part>.json` with the part's results, and `suite.json`, which is written anew after every part. The
parts see one folder of tuned tables, in OUT, so that what `tune` finds serves those after it. A short table comes last.

Exit status: 0 all parts are fine, 1 some are not, 2 no GPU or unusable arguments.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = "cache"


@dataclass(frozen=True)
class Part:
    """One process. `{out}` in a word of the command is the folder of the results."""

    name: str
    minutes: float
    """The most that it may take, out of nine."""
    command: tuple[str, ...]
    results: Callable[[Path], object] | None = None
    """What goes to OUT/<name>.json after it, where the command does not write that itself."""


def test_counts(out: Path) -> dict:
    """Counts, and the names of what failed, out of pytest's own report."""
    suite = xml.etree.ElementTree.parse(out / "correctness.xml").getroot().find("testsuite")
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "seconds": float(suite.get("time")), "failed": failed}


def tuned_tables(out: Path) -> dict:
    """File name → table: copy one to lpmrf_kernels/configs to ship it."""
    tables = sorted((out / CACHE / "lpmrf-fast" / "configs").glob("*.json"))
    return {path.name: json.loads(path.read_text()) for path in tables}


ENGINE = (sys.executable, "-m", "benchmarks.engine", "--device", "cuda", "--preset", "full")
PARTS = [
    Part(
        "correctness",
        2,
        (
            *(sys.executable, "-m", "pytest", "tests/kernels", "tests/engine"),
            *("-k", "cuda or gpu", "--junitxml={out}/correctness.xml"),
        ),
        test_counts,
    ),
    Part("tune", 1.5, (sys.executable, "-m", "lpmrf_fast", "tune"), tuned_tables),
    Part("kernels", 2, (sys.executable, "-m", "benchmarks.kernels", "--device", "cuda", "--out", "{out}/kernels.json")),
    Part("engine", 2, (*ENGINE, "--batch", "1", "32", "--steps", "25", "--seconds", "4", "--out", "{out}/engine.json")),
    Part(
        "engine-compile",  # by itself: torch.compile takes minutes, and what it leaves unfinished costs nobody else
        1.5,
        (*ENGINE, "--batch", "1", "--steps", "25", "--only", "engine", "compile", "--out", "{out}/engine-compile.json"),
    ),
]


def run_part(part: Part, out: Path, seconds: float) -> dict:
    """Run it for at most so many seconds; what came of it."""
    command = [word.replace("{out}", str(out)) for word in part.command]
    environment = {**os.environ, "XDG_CACHE_HOME": str(out / CACHE)}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")])
    )
    log, started, status = out / f"{part.name}.log", time.monotonic(), "ok"
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
    if part.results is not None:
        try:
            (out / f"{part.name}.json").write_text(json.dumps(part.results(out), indent=1) + "\n")
        except Exception as error:  # a part that died may have left anything
            row["no_results"] = f"{type(error).__name__}: {error}"
    return row | {"last_line": lines[-1][:200] if lines else ""}


def run(parts: list[Part], out: Path, minutes: float, machine: dict, log=print) -> list[dict]:
    """Run the parts in order within the minutes, each within its share; writes suite.json and returns its rows."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end, rows = time.monotonic() + 60 * minutes, []
    for part in parts:
        left = end - time.monotonic()
        if left < 1:
            rows.append({"part": part.name, "status": "no time left", "seconds": 0.0, "last_line": ""})
        else:
            log(f"{part.name} ...")
            try:
                rows.append(run_part(part, out, min(left, 60 * part.minutes * max(1.0, minutes / 9))))
            except Exception as error:  # no such program, a full disk
                failed = f"failed ({type(error).__name__}: {error})"
                rows.append({"part": part.name, "status": failed, "seconds": 0.0, "last_line": ""})
        (out / "suite.json").write_text(json.dumps({"machine": machine, "parts": rows}, indent=1) + "\n")
    return rows


def table(rows: list[dict]) -> str:
    return "\n".join(f"{r['part']:14}{r['status']:16}{r['seconds']:8.1f} s  {r['last_line'][:90]}" for r in rows)


def chosen(names: str | None, parts: list[Part]) -> list[Part]:
    """The named parts in the suite's order. Raises ValueError for an unknown one."""
    known = {part.name: part for part in parts}
    wanted = names.split(",") if names else list(known)
    for name in wanted:
        if name not in known:
            raise ValueError(f"no part is called {name!r}; there are {', '.join(known)}")
    return [part for part in parts if part.name in wanted]


def main(argv=None, parts=None) -> int:
    parts = PARTS if parts is None else parts
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together (default: %(default)s)")
    parser.add_argument("--parts", help=f"comma-separated, of {', '.join(p.name for p in parts)} (default: all)")
    args = parser.parse_args(argv)
    try:
        parts = chosen(args.parts, parts)
    except ValueError as error:
        parser.error(str(error))

    import torch

    if not torch.cuda.is_available():
        print("gpu_suite: PyTorch sees no GPU; nothing was run", file=sys.stderr)
        return 2
    from . import machine

    rows = run(parts, args.out, args.minutes, machine.describe("cuda"))
    print(table(rows))
    return any(row["status"] != "ok" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
