"""Is Sim-VAE the better autoencoder for its size? Reconstruction, and restoration on top of it, over seeds.

    python -m benchmarks.claims.vae --out claims --train faces --val faces-val

Trains a Sim-VAE (layer norm) and a Stable-Diffusion-style VAE (group norm, attention in the middle) of equally many
parameters and equal latents with equal compute on the same crops, and with `--restoration` Latent-PMRF flows of equal
compute on those of seed 0.
"""

from . import study

KINDS = {"sim": "Sim-VAE", "sd": "SD-style VAE"}
MEASURES = {"psnr": "higher", "ssim": "higher", "swd": "lower"}


def runs(s: study.Study) -> dict[str, dict[str, list[list[dict]]]]:
    """What → VAE → rows of each seed."""
    seeds = range(s.args.seeds)
    found = {"reconstruction": {kind: [s.vae(kind, seed) for seed in seeds] for kind in KINDS}}
    if s.args.restoration:
        found["restoration"] = {kind: [s.latent_pmrf(seed, kind) for seed in seeds] for kind in KINDS}
    return found


def verdict(sim: list[float], sd: list[float], better: str) -> str:
    """Which of the two is better in every seed, if one is."""
    if better == "lower":
        sim, sd = [-v for v in sim], [-v for v in sd]
    if min(sim) > max(sd):
        return "Sim-VAE"
    return "SD-style VAE" if max(sim) < min(sd) else "inconclusive"


def table(found) -> dict:
    """What → measure → both VAEs' last scores and which is better."""
    result = {}
    for what, by_kind in found.items():
        result[what] = {}
        for measure, better in MEASURES.items():
            last = {kind: [rows[-1][measure] for rows in by_kind[kind]] for kind in KINDS}
            result[what][measure] = {KINDS[k]: study.spread(v) for k, v in last.items()}
            result[what][measure]["better"] = verdict(last["sim"], last["sd"], better)
    return result


def plot(args, found) -> None:
    panels = [(what, measure) for what in found for measure in ("psnr", "swd")]
    figure, plots = study.axes(len(panels), f"Sim-VAE and an SD-style VAE of equal size, {args.size}x{args.size} faces")
    for ax, (what, measure) in zip(plots, panels):
        for kind, colour in (("sim", "tab:blue"), ("sd", "tab:green")):
            for seed, rows in enumerate(found[what][kind]):
                label = KINDS[kind] if seed == 0 else None
                x, y = [r["tflop"] for r in rows[1:]], [r[measure] for r in rows[1:]]
                ax.plot(x, y, ".-", color=colour, alpha=0.7, label=label)
        ax.set(xlabel="training compute, TFLOP", ylabel=f"{what}: {measure}")
        ax.legend()
    figure.savefig(args.out / "vae.png", dpi=100)


def main(argv=None) -> None:
    parser = study.arguments(__doc__)
    parser.add_argument("--restoration", action="store_true", help="also train a flow on each VAE")
    args = parser.parse_args(argv)
    s = study.Study(args)
    found = s.gather(runs)
    results = table(found)
    models = {"sim": s.sim_vae(), "sd": s.sd_vae()}
    sizes = {
        KINDS[k]: {
            "parameters": study.parameters("vae", model),
            "training_gflop_an_image": round(study.training_flops("vae", model, args.size) / 1e9, 3),
            "steps": found["reconstruction"][k][0][-1]["step"],
            "training_seconds": study.spread([rows[-1]["seconds"] for rows in found["reconstruction"][k]]),
        }
        for k, model in models.items()
    }
    said = "; ".join(
        f"{what} {measure} {entry[KINDS['sim']]['mean']:.4g} (Sim-VAE) and {entry[KINDS['sd']]['mean']:.4g} (SD-style),"
        f" better in every seed: {entry['better']}"
        for what, measures in results.items()
        for measure, entry in measures.items()
    )
    caption = (
        f"After equal training compute: {said}. {study.what_was_run(s)} L1 and KL alone, without perceptual or"
        " adversarial terms. It does not show which is better at full size, with those terms, or fully trained."
    )
    study.write(args, "vae", caption, table=results, networks=sizes, rows=found)
    plot(args, found)


if __name__ == "__main__":
    main()
