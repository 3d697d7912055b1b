"""The command `lpmrf-fast`: parses, calls, prints. No logic, and no torch before a subcommand runs."""

import argparse
import os
import re
import sys
from pathlib import Path

STAGES = ("vae", "posterior-mean", "flow")
FORMS = ("official", "diffusers", "single")
DTYPES = ("auto", "fp32", "float32", "bf16", "bfloat16", "fp16", "float16")
MAX_MEMORY = "for networks and activations, such as 8GB (default: what is free)"
DEFAULT_MAX_PIXELS = 2048 * 2048  # lpmrf_fast.restore's, which imports torch; a test keeps them equal


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status: 0 all done, 1 something failed, 2 unusable arguments."""
    args = parse(argv)
    # Both are read when torch is imported. Huge pages make large tensors several times faster to touch. In training,
    # threads that wait leave the cores to the data workers' processes. Elsewhere they may spin, as OpenMP's do for a
    # moment: sleeping between a network's small operations, two threads took 0.86 s for one photo in place of 0.59, and
    # a folder of photos, each on one thread, gained nothing (eight in 5.1 and 6.5 s, and in 5.6 and 6.1 with spinning).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if args.run is train:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        complain("interrupted; what was finished is kept, and the same command goes on from there")
        return 130
    except BrokenPipeError:  # the reader of stdout has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        expected = isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
        kind = "" if expected and str(error) else f"{type(error).__name__}: "
        complain(f"{kind}{error}" + ("" if expected else " (LPMRF_DEBUG=1 shows where)"))
        return getattr(error, "exit_status", 1)  # 2 of errors that say that an argument is to blame


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"lpmrf-fast: {' '.join(message.split())}", file=sys.stderr, flush=True)


# ---- subcommands


def restore(args) -> int:
    from .devices import default_device, default_dtype
    from .pipeline import Pipeline
    from .restore import restore_files

    default_dtype(args.dtype, default_device(args.device))  # refused at once, not where the first photo needs them
    report = restore_files(
        args.sources,
        args.output,
        lambda: Pipeline.from_pretrained(
            args.model, dtype=args.dtype, device=args.device, local_files_only=args.offline
        ),
        num_inference_steps=args.steps,
        seed=args.seed,
        batch_size=args.batch_size,
        ext=args.ext,
        posterior_mean=args.posterior_mean,
        overwrite=args.overwrite,
        max_pixels=args.max_pixels,
        max_memory=args.max_memory,
        settings={"model": args.model or "bundled", "dtype": args.dtype},
        log=complain,
    )
    print(report)
    return 1 if report.failures else 0


def demo(args) -> int:
    from .demo import make

    print(make(args.output, args.steps, args.seed, args.model, args.dtype, args.device))
    return 0


def doctor(args) -> int:
    from .doctor import plan, report

    if args.plan is None:
        print(report())
    else:
        options = (args.batch_size, args.steps, args.model, args.dtype, args.device, args.max_memory, args.offline)
        print(plan(*args.plan, *options))
    return 0


def convert(args) -> int:
    from . import checkpoint
    from .convert import convert

    if args.target is None:
        print(checkpoint.describe(args.source, local_files_only=args.offline))
    else:
        print(convert(args.source, args.target, args.to, args.offline))
        print(f"written: {args.target}")
    return 0


def train(args) -> int:
    from .training import run

    run(args.stage, args.config, args.set)
    return 0


def evaluate(args) -> int:
    from .evaluation.scores import Files
    from .evaluation.scores import evaluate as scores

    if not args.reference and not args.real:
        complain("evaluate: give the originals (--reference DIR), real faces (--real DIR) or both")
        return 2
    names = ("lpips", "inception", "dinov2", "face_detector", "face_embedder")
    files = Files(**{name: getattr(args, name) for name in names})
    for path in (args.out, args.csv, args.sheet):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    folders = args.restored, args.reference, args.degraded
    report = scores(*folders, files, args.device, args.limit, args.sheet, args.real)
    for problem in report.problems:
        complain(problem)
    print(report)
    if args.out:
        args.out.write_text(report.json(), encoding="utf-8")
    if args.csv:
        report.write_csv(args.csv)
    return 1 if report.problems else 0


def tune(args) -> int:
    from lpmrf_kernels import tune

    if reason := tune.missing():
        complain(f"tune: {reason}")
        return 2
    try:
        print(tune.tune(args.op, log=complain))
    except ValueError as error:  # an unknown op
        complain(str(error))
        return 2
    return 0


# ---- arguments


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples, and adds the defaults that there are."""

    def _get_help_string(self, action):
        default = action.default
        shown = default is not None and default is not False and default != []
        return f"{action.help} (default: {default})" if shown else action.help


class Parser(argparse.ArgumentParser):
    """Unusable arguments are one line, and exit status 2."""

    def error(self, message):
        complain(f"{message} ({self.prog} --help lists the options)")
        raise SystemExit(2)


def whole_number(low: int, high: int, what: str):
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return number

    return parse


def pixels(text: str) -> int:
    found = re.fullmatch(r"(\d+)([kM]?)", text)
    if not found or not (number := int(found[1]) * {"": 1, "k": 1000, "M": 1000_000}[found[2]]):
        raise argparse.ArgumentTypeError(f"expected a number of pixels such as 4194304 or 100M, got {text!r}")
    return number


def memory(text: str) -> str:
    if not re.fullmatch(r"(?!0+(\.0+)?\D*$)\d+(\.\d+)? ?[kKMGT]?i?B?", text):
        raise argparse.ArgumentTypeError(f"expected an amount of memory such as 8GB or 800MiB, got {text!r}")
    return text


def size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected a size in pixels such as 512 or 640x480, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def device(text: str) -> str:
    if text != "auto" and not re.fullmatch(r"(cpu|cuda|xpu|mps|hpu)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}")
    return path


def picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise argparse.ArgumentTypeError(f"expected the name of a PNG, JPEG or WebP file, got {text!r}")
    return path


class Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser, *_):
        from importlib.metadata import PackageNotFoundError, version

        try:
            print("lpmrf-fast", version("lpmrf-fast"))
        except PackageNotFoundError:
            print("lpmrf-fast (not installed: run from a checkout)")
        parser.exit()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; photos may also stand between and behind the options, where argparse takes none."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if rest and (args.run is not restore or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.run is restore:
        args.sources = [*args.input, *args.sources, *rest]
        if not args.sources:
            top.error("restore: no photos given; name files, folders or globs")
    return args


def parser() -> argparse.ArgumentParser:
    """All of the command line."""
    debug = bool(os.environ.get("LPMRF_DEBUG"))
    top = Parser(
        "lpmrf-fast",
        formatter_class=Formatter,
        description="Fast Latent-PMRF face restoration.",
        epilog="examples:\n"
        "  lpmrf-fast demo                       restore a face that scikit-image ships, and show it\n"
        "  lpmrf-fast restore photos/ -o out     restore a folder of aligned faces\n"
        "  lpmrf-fast doctor                     what a bug report should say\n\n"
        "exit status: 0 all done, 1 something failed, 2 unusable arguments",
    )
    top.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)

    model = argparse.ArgumentParser(add_help=False)
    group = model.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="checkpoint: folder, file or name (default: the bundled one)")
    group.add_argument(
        "--steps",
        type=whole_number(1, 100_000, "at least 1 step"),
        default=25,
        metavar="K",
        help="Euler steps of the flow",
    )
    group.add_argument("--device", type=device, default="auto", metavar="D", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", metavar="T", help="of the networks: auto, fp32, bf16 or fp16"
    )

    noise = argparse.ArgumentParser(add_help=False)
    noise.add_argument(
        "--seed",
        type=whole_number(0, 2**63 - 1, "a whole number from 0 to 2**63 - 1"),
        default=0,
        metavar="S",
        help="seed of the noise",
    )

    command = commands.add_parser(
        "restore",
        parents=[model, noise],
        formatter_class=Formatter,
        help="restore files, folders and globs of aligned faces",
        description="Restore aligned face photos of any size (the field's framing is 512x512; others are padded by\n"
        "reflection and cropped back). Outputs keep their place and name below OUT. A photo that fails is a line on\n"
        "stderr and in OUT/manifest.jsonl, and the others go on. Outputs that exist are skipped, so that the same\n"
        "command continues an interrupted job.",
        epilog="examples:\n"
        "  lpmrf-fast restore photos/ -o out\n"
        "  lpmrf-fast restore 'albums/**/*.jpg' more/face.png -o out --ext png --steps 10\n"
        "  lpmrf-fast restore face.jpg -o restored.png",
    )
    command.add_argument("sources", nargs="*", metavar="SRC", help="photos, folders of photos, or globs")
    command.add_argument("-i", "--input", action="extend", nargs="+", default=[], metavar="SRC", help="the same")
    command.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        type=Path,
        help="folder for the outputs; for one photo also a file name",
    )
    command.add_argument(
        "--ext",
        choices=("auto", "png", "jpg", "webp"),
        default="auto",
        help="format of the outputs; auto: that of the photo's name",
    )
    command.add_argument(
        "--batch-size",
        type=whole_number(1, 100_000, "at least 1 photo"),
        metavar="N",
        help="photos of one size that run together; halved when memory runs out (default: as many as"
        " fit, up to 32, on a GPU, 1 on a CPU)",
    )
    command.add_argument("--max-memory", type=memory, metavar="M", help=MAX_MEMORY)
    command.add_argument(
        "--posterior-mean", action="store_true", help="also write the posterior means, into OUT-posterior-mean"
    )
    command.add_argument("--overwrite", action="store_true", help="make outputs that exist again")
    command.add_argument(
        "--max-pixels",
        type=pixels,
        default=DEFAULT_MAX_PIXELS,
        metavar="N",
        help="refuse larger photos, before they are decoded; 100M is 100 million",
    )
    command.add_argument("--offline", action="store_true", help="never download a model")
    command.set_defaults(run=restore)

    command = commands.add_parser(
        "demo",
        parents=[model, noise],
        formatter_class=Formatter,
        help="restore a well-known face and write a picture of it",
        description="Degrade and restore the astronaut portrait that scikit-image ships, and write one picture:\n"
        "degraded | posterior mean | restored | original. Downloads nothing; needs the extra `demo`.",
    )
    command.add_argument("-o", "--output", type=picture, default=Path("demo.png"), help="the picture")
    command.set_defaults(run=demo)

    command = commands.add_parser(
        "doctor",
        parents=[model],
        formatter_class=Formatter,
        help="show versions, devices and which backend serves each op; or what a batch would take",
        description="Show versions, devices, and which backend serves each op and why not another: paste it into a\n"
        "bug report. With --plan, show instead how a batch would run, what each stage costs, and whether it fits;\n"
        "the other options are of the plan.",
        epilog="examples:\n"
        "  lpmrf-fast doctor\n"
        "  lpmrf-fast doctor --plan 512 --batch-size 32\n"
        "  lpmrf-fast doctor --plan 1024x768 --device cuda --max-memory 24GB",
    )
    command.add_argument("--plan", type=size, metavar="SIZE", help="photos of 512 (square) or 640x480 (width x height)")
    command.add_argument(
        "--batch-size", type=whole_number(1, 100_000, "at least 1 photo"), default=1, metavar="N", help="that many"
    )
    command.add_argument("--max-memory", type=memory, metavar="M", help=MAX_MEMORY)
    command.add_argument("--offline", action="store_true", help="never download a model")
    command.set_defaults(run=doctor)

    command = commands.add_parser(
        "train",
        formatter_class=Formatter,
        help="train one of the three stages",
        description="Train one stage as a YAML file says; the same command continues a run that was stopped.\n"
        "Needs the extra `train`.",
        epilog="example:\n  lpmrf-fast train vae --config vae.yaml --set steps=2000 lr=2e-4",
    )
    command.add_argument("stage", choices=STAGES, help="which network")
    command.add_argument("--config", required=True, metavar="FILE", type=Path, help="YAML file with the settings")
    command.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="change some of them"
    )
    command.set_defaults(run=train)

    command = commands.add_parser(
        "convert",
        formatter_class=Formatter,
        help="say what a checkpoint is, or write it in another form",
        description="Say what a checkpoint is, by its content: ours, PMRF weights (folder or training checkpoint),\n"
        "Sim-VAE, SwinIR. With a target, write it in another form: official, what the authors' code reads;\n"
        "diffusers, a folder a network; single, one file of ours. Tensors keep their values and dtypes.",
        epilog="examples:\n"
        "  lpmrf-fast convert PMRF_blind_face_image_restoration/\n"
        "  lpmrf-fast convert blind_face_restoration_pmrf.ckpt pmrf.safetensors --to single\n"
        "  lpmrf-fast convert pmrf.safetensors pmrf-official --to official",
    )
    command.add_argument("source", metavar="SRC", help="folder, file or name of a checkpoint")
    command.add_argument("target", nargs="?", metavar="DST", type=Path, help="what to write; must not exist")
    command.add_argument("--to", choices=FORMS, default="single", help="form of DST")
    command.add_argument("--offline", action="store_true", help="never download a model")
    command.set_defaults(run=convert)

    command = commands.add_parser(
        "evaluate",
        formatter_class=Formatter,
        help="score restored faces against the originals, or against real faces",
        description="Score a folder of restored faces against the originals: PSNR, SSIM, sliced Wasserstein distance,\n"
        "and, where their weights are given, LPIPS, FID and KID, MMD on DINOv2, identity and landmark distance.\n"
        "Files pair up by stem. Photos whose originals nobody has are scored against a folder of real faces (--real).\n"
        "A metric that cannot run is named with the reason. Needs the extra `eval`.",
        epilog="examples:\n"
        "  lpmrf-fast evaluate restored --reference originals --degraded photos --out scores.json\n"
        "  lpmrf-fast evaluate restored --real ffhq --inception pt_inception-2015-12-05-6726825d.pth",
    )
    command.add_argument("restored", metavar="RESTORED", type=folder, help="folder of restored faces")
    command.add_argument("--reference", metavar="DIR", type=folder, help="folder of the originals")
    command.add_argument("--real", metavar="DIR", type=folder, help="folder of real faces for FID, KID and MMD")
    command.add_argument("--degraded", metavar="DIR", type=folder, help="folder of the degraded faces: scored as well")
    command.add_argument("--out", metavar="FILE", type=Path, help="JSON with every number")
    command.add_argument("--csv", metavar="FILE", type=Path, help="one row a face")
    command.add_argument("--sheet", metavar="FILE", type=picture, help="picture of up to 8 faces, worst PSNR to best")
    command.add_argument(
        "--limit", metavar="N", type=whole_number(1, 10**9, "at least 1 face"), help="the first N faces"
    )
    command.add_argument("--device", type=device, default="auto", metavar="D", help="auto, cpu, cuda or cuda:N")
    group = command.add_argument_group("weights: a file, or OWNER/NAME/FILE on the Hugging Face hub")
    group.add_argument("--lpips", metavar="FILE", help="LPIPS: AlexNet or VGG16 of torchvision")
    group.add_argument("--inception", metavar="FILE", help="FID and KID: pt_inception-2015-12-05-6726825d.pth")
    group.add_argument("--dinov2", metavar="FILE", help="MMD: dinov2_vits14_pretrain.pth or a larger one")
    group.add_argument("--face-detector", metavar="FILE", help="landmark distance: YuNet, ONNX")
    group.add_argument("--face-embedder", metavar="FILE", help="identity distance: an ArcFace network, ONNX")
    command.set_defaults(run=evaluate)

    command = commands.add_parser(
        "tune",
        formatter_class=Formatter,
        help="time launch choices of the kernels on this GPU",
        description="Time the launch choices of every kernel at the pipeline's shapes on this GPU and write the\n"
        "winners to the user's table, which the kernels read from then on. Prints the table's path.",
    )
    command.add_argument("--op", nargs="+", action="extend", metavar="OP", help="only these ops")
    command.set_defaults(run=tune)

    for command in commands.choices.values():
        command.add_argument(
            "--debug", action="store_true", default=debug, help="show tracebacks (also: LPMRF_DEBUG=1)"
        )
    return top
