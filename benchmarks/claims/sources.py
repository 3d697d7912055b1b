"""Where should the flow start? Posterior mean, flow from noise, from the degraded face, PMRF, Latent-PMRF.

    python -m benchmarks.claims.sources --out claims --train faces --val faces-val

All flows train with equal compute on the same faces and degradations; those in latents share network, VAE and size. The
flow from noise sees the degraded face as a condition.
"""

from . import study

METHODS = {
    "noise": "flow from noise, told the degraded face",
    "degraded": "flow from the degraded face",
    "pmrf": "PMRF, in pixels",
    "latent": "Latent-PMRF",
}


def runs(s: study.Study) -> dict[str, list[list[dict]]]:
    """Rows of every seed. All but PMRF live in latents."""
    s.mean()
    found = {"mean": [study.scores_of(s.folder)], "vae": [s.vae("sim", 0)], **{name: [] for name in METHODS}}
    vae = {"vae": str(s.folder / "model")}
    for seed in range(s.args.seeds):
        found["latent"].append(s.latent_pmrf(seed))
        found["degraded"].append(s.flow("from-degraded", seed, s.loouformer(), source="degraded", **vae))
        told = {"source": "noise", "condition": "degraded", **vae}
        found["noise"].append(s.flow("from-noise", seed, s.loouformer(told=True), **told))
        found["pmrf"].append(s.pmrf(seed, s.args.pixel_budget))
    return found


def at_budget(rows: list[dict], tflop: float) -> dict:
    """The row nearest to the compute: runs are whole steps."""
    return min(rows, key=lambda row: abs(row["tflop"] - tflop))


def plot(args, last: dict[str, list[dict]]) -> None:
    figure, ax = study.axes(1, f"Distortion and perception after equal compute, {args.size}x{args.size} faces")
    for name, rows in last.items():
        ax.plot([r["psnr"] for r in rows], [r["swd"] for r in rows], "o", label=name)
    ax.set(xlabel="PSNR, dB", ylabel="sliced Wasserstein distance", yscale="log")
    ax.legend(fontsize=7)
    figure.savefig(args.out / "sources.png", dpi=100)


def main(argv=None) -> None:
    parser = study.arguments(__doc__)
    parser.add_argument(
        "--pixel-budget",
        type=float,
        default=3.0,
        help="of the PMRF run that `convergence` shares; scored here at the budget of all (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    s = study.Study(args)
    found = s.gather(runs)
    last = {
        "posterior mean": [rows[-1] for rows in found["mean"]],
        "the VAE's reconstruction of the original": [rows[-1] for rows in found["vae"]],
        **{label: [at_budget(rows, args.flow_tflop) for rows in found[name]] for name, label in METHODS.items()},
    }
    table = {
        name: {measure: study.spread([row[measure] for row in rows]) for measure in ("psnr", "ssim", "swd")}
        for name, rows in last.items()
    }
    lines = "; ".join(
        f"{name}: {entry['psnr']['mean']:.2f} dB, distance {entry['swd']['mean']:.0f}"
        + (f" ({min(entry['swd']['values']):.0f} to {max(entry['swd']['values']):.0f})" if entry["swd"]["std"] else "")
        for name, entry in table.items()
    )
    caption = (
        f"After equal training compute of the velocity network, PSNR and sliced Wasserstein distance to the originals"
        f" (and its range over seeds): {lines}. {study.what_was_run(s)} It does not show what becomes of them with more"
        " compute: the flow from noise has the farthest to go."
    )
    study.write(args, "sources", caption, table=table)
    plot(args, last)


if __name__ == "__main__":
    main()
