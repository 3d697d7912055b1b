"""How published checkpoints read in our terms, recognised by what is in them. No files here: names, shapes, configs.

    PMRF        config {"stage", "arch", "mmse_model_arch", ...}; tensors `model.*` (HDiT), `mmse_model.*` (SwinIR), and
                `fid.*`, `inception_score.*` of metric modules, which are ignored: a Hugging Face folder. A Lightning
                checkpoint has the same under `hyper_parameters` and `state_dict`, and the EMA weights of `model` as a
                list in parameter order under `ema`
    DifFace     SwinIR's state dict without a config, possibly under `params_ema`, `params` or `state_dict`, possibly
                with `module.` in front of every name
    Sim-VAE     the diffusers layout: config {"_class_name": "AutoencoderKLSim", ...} and the official names
    ours        see `checkpoint.py`

Source of the PMRF form: the official repository ohayonguy/PMRF (MmseRectifiedFlow, create_arch).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import models
from .models.config import BOOKKEEPING

CLASS_NAMES = {"AutoencoderKLSim": "SimVAE"}
"""Class names of published configs → ours; ours stand for themselves."""
RECOMPUTED = ("attn_mask", "relative_position_index")
"""Last components of the names of SwinIR's masks and index tables: 25 MB of a published file, zero information."""
ARCHITECTURES = {
    "hdit_ImageNet256Sp4": "hdit-imagenet256sp4",
    "hdit_XL2": "hdit-xl2",
    "swinir_L": "swinir-l",
    "swinir_M": "swinir-m",
}
"""PMRF's names of its networks → our presets."""
PMRF_PARTS = {"velocity": "model.", "posterior_mean": "mmse_model."}
PMRF_METRICS = ("fid.", "inception_score.")
WRAPPERS = ("params_ema", "params", "state_dict")  # the first that a pickle has
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
CARD = "_card"
"""Where a published form keeps our card; diffusers skips keys with an underscore."""
SIGNATURES = {
    "SwinIR": "layers.0.residual_group.blocks.0.attn.relative_position_bias_table",
    "HDiT": "patch_in.proj.weight",
    "LooUFormer": "proj_in.proj.weight",
    "SimVAE": "encoder.down_blocks.0.resnets.0.norm.weight",
    "AutoencoderKL": "encoder.down_blocks.0.resnets.0.norm1.weight",
}
"""A tensor that every network of a class has, and no other's."""
STRANGERS = {
    "a Stable Diffusion model": r"model\.diffusion_model\.",
    "ControlNet or DiffBIR": r"control_model\.",
    "a diffusion U-Net such as DifFace's": r"input_blocks\.0\.0\.",
    "a diffusers U-Net": r"down_blocks\.0\.resnets\.0\.time_emb_proj\.",
    "GFPGAN": r"stylegan_decoder\.",
    "CodeFormer, RestoreFormer or VQFR": r"quantize\.embedding\.",
    "Real-ESRGAN": r"body\.0\.rdb1\.",
}
"""What people have beside our checkpoints, by the beginning of a name."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or used: which, what was expected and found, and what to do."""

    exit_status = 2
    """Of the command line: an argument that cannot be used."""


@dataclass
class Checkpoint:
    """A checkpoint in our terms, whatever form it has on disk."""

    form: str
    """What it is, for people."""
    where: str
    """The path of its weights."""
    config: dict
    """{"pipeline", "settings", "modules", "card"} or {"class", "config", "card"}, see `checkpoint.py`."""
    tensors: dict[str, Tensor]
    """By our names, with the dtypes that they are stored in."""
    notes: list[str] = field(default_factory=list)
    """What was left out, replaced or deduced on the way."""


def read(where, config: dict | None, content) -> Checkpoint:
    """The checkpoint that a config, if there is one, and the content of its weights file make.

    content: named tensors, or what a pickle holds. Raises CheckpointError for what is not recognised.
    """
    tensors, beside = unwrapped(where, content)
    if config is None and isinstance(beside.get("hyper_parameters"), dict):
        config = beside["hyper_parameters"]
    if config is not None and ("pipeline" in config or "class" in config):
        return Checkpoint(f"lpmrf-fast {config.get('pipeline', 'model')}", str(where), config, tensors)
    if config is not None and "_class_name" in config:
        entry = diffusers_entry(config)
        return Checkpoint(f"{config['_class_name']} in the diffusers layout", str(where), entry, tensors)
    if (config is not None and ("stage" in config or "arch" in config)) or _is_pmrf(tensors):
        return _pmrf(where, config, tensors, beside)
    return _bare(where, tensors)


def unwrapped(where, content) -> tuple[dict[str, Tensor], dict]:
    """The named tensors of a weights file's content, and what a pickle holds beside them.

    Raises CheckpointError where there is something else in their place.
    """
    beside = {}
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            beside = {k: v for k, v in content.items() if k != key}
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        found = f"the keys {few(map(str, content))}" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{where}: holds something other than named tensors (found {found}); save model.state_dict() alone"
        )
    return _unprefixed({str(name): tensor for name, tensor in content.items()}), beside


def _unprefixed(tensors: dict[str, Tensor], prefixes=PREFIXES) -> dict[str, Tensor]:
    """Without the prefixes that all names share."""
    while tensors and (shared := [p for p in prefixes if all(name.startswith(p) for name in tensors)]):
        tensors = {name.removeprefix(shared[0]): tensor for name, tensor in tensors.items()}
    return tensors


# ---- each form


def diffusers_entry(config: dict) -> dict:
    """A config.json of the diffusers layout → our config of one network; what ours has no place for is in the card."""
    name = str(config["_class_name"])
    arguments = {key: value for key, value in config.items() if key not in (*BOOKKEEPING, CARD)}
    published = {key: value for key, value in config.items() if key in BOOKKEEPING}
    return {"class": CLASS_NAMES.get(name, name), "config": arguments, "card": _card(config, published)}


def diffusers_config(entry: dict) -> dict:
    """The inverse of `diffusers_entry`."""
    official = {ours: theirs for theirs, ours in CLASS_NAMES.items()}
    name = official.get(entry["class"], entry["class"])
    return {**_uncarded(entry), "_class_name": name, **entry["config"]}


def _card(config: dict, published: dict):
    """The card of a published config: the one that we wrote into it, if any, and what it said beside."""
    card = config.get(CARD, {})
    return {**card, "published": published} if isinstance(card, dict) else card


def _uncarded(config: dict) -> dict:
    """The inverse of `_card`: keys for a published config."""
    card = config.get("card", {})
    if not isinstance(card, dict):
        return {CARD: card}
    own = {key: value for key, value in card.items() if key != "published"}
    return {**(card.get("published") or {}), **({CARD: own} if own else {})}


def _is_pmrf(tensors: dict[str, Tensor]) -> bool:
    velocity, mean = PMRF_PARTS.values()
    return any(name.startswith(mean) for name in tensors) or velocity + SIGNATURES["HDiT"] in tensors


def _pmrf(where, config: dict | None, tensors: dict[str, Tensor], beside: dict) -> Checkpoint:
    form = "PMRF training checkpoint (Lightning)" if beside else "PMRF checkpoint"
    notes = [] if config is not None else ["no config: the networks are told by their tensors"]
    metrics = [name for name in tensors if name.startswith(PMRF_METRICS)]
    if metrics:
        modules = sorted({name.split(".")[0] for name in metrics})
        notes.append(f"ignored: {len(metrics)} tensors of metric modules ({', '.join(modules)})")
    parts = {
        part: _unprefixed({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        for part, prefix in PMRF_PARTS.items()
    }
    named = tuple(PMRF_PARTS.values()) + PMRF_METRICS
    others = [name for name in tensors if not name.startswith(named)]
    if others or not parts["velocity"]:
        raise CheckpointError(
            f"{where}: expected a PMRF checkpoint, tensors model.* and mmse_model.*; found {contents(tensors)}; fetch"
            " the weights that belong to its config"
        )
    config = _plain(config or {})
    card = _card(config, {key: value for key, value in config.items() if key != CARD})
    stage = config.get("stage") or ("mmse" if SIGNATURES["SwinIR"] in parts["velocity"] else "flow")
    if stage == "mmse" and not parts["posterior_mean"]:
        entry = _architecture(where, config.get("arch"), parts["velocity"], "SwinIR")
        _use_ema(where, entry, parts["velocity"], beside, notes)
        entry["card"] = card
        return Checkpoint("PMRF posterior-mean checkpoint", str(where), entry, parts["velocity"], notes)
    if stage != "flow" or config.get("conditional"):
        kind = "a conditional flow" if config.get("conditional") else f"stage {stage!r}"
        raise CheckpointError(
            f"{where}: expected a PMRF checkpoint, stage 'flow' from a posterior mean; found {kind}, a baseline of the"
            " paper, which this pipeline does not run; use the PMRF weights"
        )
    if not parts["posterior_mean"]:
        raise CheckpointError(
            f"{where}: expected a PMRF checkpoint with both networks, model.* and mmse_model.*; found no mmse_model.*;"
            " fetch the whole file"
        )
    modules = {
        "posterior_mean": _architecture(where, config.get("mmse_model_arch"), parts["posterior_mean"], "SwinIR"),
        "velocity": _architecture(where, config.get("arch"), parts["velocity"], "HDiT"),
    }
    _use_ema(where, modules["velocity"], parts["velocity"], beside, notes)
    settings = {"noise_std": config.get("mmse_noise_std", 0.1), "eps": config.get("eps", 0.0)}
    ours = {"pipeline": "PMRFPipeline", "settings": settings, "modules": modules, "card": card}
    tensors = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
    return Checkpoint(form, str(where), ours, tensors, notes)


def _architecture(where, name, tensors: dict[str, Tensor], cls: str) -> dict:
    """The config entry of a network that PMRF calls `name`; without a name, by its tensors."""
    if name is None:
        return _deduced(where, tensors, cls)
    known = [arch for arch in ARCHITECTURES if models.PRESETS[ARCHITECTURES[arch]][0].__name__ == cls]
    if name not in known:
        raise CheckpointError(
            f"{where}: expected one of the networks {', '.join(known)}; found {name!r} in the config; give the config"
            " of these weights"
        )
    return {"class": cls, "config": dict(models.PRESETS[ARCHITECTURES[name]][1])}


def _use_ema(where, entry: dict, tensors: dict[str, Tensor], beside: dict, notes: list[str]) -> None:
    """Put the EMA weights, a list in parameter order, in the place of the last ones, as the official inference does."""
    ema = beside.get("ema")
    if ema is None:
        return
    weights = ema.get("shadow_params") if isinstance(ema, Mapping) else ema
    if not isinstance(weights, (list, tuple)) or not all(isinstance(w, Tensor) for w in weights):
        raise CheckpointError(
            f"{where}: ema: expected a list of tensors, bare or as shadow_params; found {type(weights).__name__}; give"
            " the file as it was saved"
        )
    names = [name for name, _ in build(where, entry, "meta").named_parameters()]
    wrong = [f"{n} {tuple(w.shape)}" for n, w in zip(names, weights) if n in tensors and w.shape != tensors[n].shape]
    if len(names) != len(weights) or wrong:
        found = f", of another shape {few(wrong)}" if wrong else ""
        raise CheckpointError(
            f"{where}: ema: expected {len(names)} tensors in the order of the network's parameters; found"
            f" {len(weights)}{found}; give the file and config of one training run"
        )
    tensors.update((name, weight) for name, weight in zip(names, weights) if name in tensors)
    decay = f", decay {ema['decay']}" if isinstance(ema, Mapping) and "decay" in ema else ""
    notes.append(f"weights: the EMA's, {len(weights)} tensors{decay}")


def _bare(where, tensors: dict[str, Tensor]) -> Checkpoint:
    own = _unprefixed(tensors, (*PREFIXES, "model."))
    cls = next((cls for cls, name in SIGNATURES.items() if name in own), None)
    if cls is None:
        stranger = next((s for s, start in STRANGERS.items() if any(re.match(start, name) for name in tensors)), None)
        looks = f"; it looks like {stranger}" if stranger else ""
        raise CheckpointError(
            f"{where}: expected a checkpoint of lpmrf-fast, PMRF, Sim-VAE or SwinIR; found {contents(tensors)}{looks};"
            " give one of those"
        )
    notes = ["no config: the network is told by its tensors"]
    return Checkpoint(f"{cls} state dict", str(where), _deduced(where, own, cls), own, notes)


def _deduced(where, tensors: dict[str, Tensor], cls: str) -> dict:
    """The config entry of a network by its tensors: of a SwinIR always, of others where they fit a preset."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if cls == "SwinIR":
        try:
            return {"class": cls, "config": _swinir(shapes)}
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{where}: expected the tensors of a SwinIR; found {contents(tensors)} and no usable {error}; fetch the"
                " whole file"
            ) from error
    for network, config in models.PRESETS.values():
        if network.__name__ == cls:
            entry = {"class": cls, "config": dict(config)}
            if shapes == {k: tuple(v.shape) for k, v in build(where, entry, "meta").state_dict().items()}:
                return entry
    raise CheckpointError(
        f"{where}: bare weights, no config inside; they are {cls}'s, but of no published size; give the folder with its"
        " config.json, or build the network and use checkpoint.load_weights"
    )


def _swinir(shapes: dict[str, tuple]) -> dict:
    """A SwinIR's constructor arguments by the shapes of its tensors. Raises KeyError and others where some lack."""
    unshuffle = "conv_first.1.weight" in shapes
    first = shapes["conv_first.1.weight" if unshuffle else "conv_first.weight"]
    dim = first[0]
    groups = _count(shapes, r"layers\.(\d+)\.")
    depths = [_count(shapes, rf"layers\.{i}\.residual_group\.blocks\.(\d+)\.") for i in range(groups)]
    block = "layers.{}.residual_group.blocks.0."
    tables = [shapes[block.format(i) + "attn.relative_position_bias_table"] for i in range(groups)]
    window = (math.isqrt(tables[0][0]) + 1) // 2
    hidden = shapes[block.format(0) + "mlp.fc1.weight"][0]
    doublings = _count(shapes, r"conv_up(\d+)\.")
    if doublings:
        upsampler, sf = "nearest+conv", 2 ** (doublings - 1)  # counted from conv_up1
    elif "conv_before_upsample.0.weight" in shapes:
        stages = [s for name, s in shapes.items() if re.fullmatch(r"upsample\.\d+\.weight", name)]
        upsampler, sf = "pixelshuffle", math.prod(math.isqrt(s[0] // s[1]) for s in stages)
    elif "upsample.0.weight" in shapes:
        upsampler, sf = "pixelshuffledirect", math.isqrt(shapes["upsample.0.weight"][0] // 3)
    else:
        upsampler, sf = "", 1
    # Masks are stored for the maps of img_size; without one any size will do.
    masks = [s[0] for name, s in shapes.items() if name.endswith("attn_mask")]
    size = math.isqrt(masks[0]) * window if masks else 64
    if "absolute_pos_embed" in shapes:
        size = math.isqrt(shapes["absolute_pos_embed"][1])
    return dict(
        img_size=size,
        patch_size=1,
        in_chans=first[1] // sf**2 if unshuffle else first[1],
        num_out_ch=3 if upsampler == "pixelshuffledirect" else shapes["conv_last.weight"][0],
        embed_dim=dim,
        depths=depths,
        num_heads=[table[1] for table in tables],
        window_size=window,
        mlp_ratio=hidden // dim if hidden % dim == 0 else hidden / dim,
        qkv_bias=block.format(0) + "attn.qkv.bias" in shapes,
        ape="absolute_pos_embed" in shapes,
        patch_norm="patch_embed.norm.weight" in shapes,
        sf=sf,
        img_range=1.0,
        upsampler=upsampler,
        resi_connection="1conv" if "conv_after_body.weight" in shapes else "3conv",
        unshuffle=unshuffle,
        unshuffle_scale=sf if unshuffle else None,
    )


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern finds at the beginning of a name."""
    return max((int(found[1]) + 1 for name in names if (found := re.match(pattern, name))), default=0)


# ---- back


def official_pmrf(where, config: dict, tensors: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Our checkpoint of a PMRFPipeline → config and tensors of the official form.

    Raises CheckpointError for a pipeline that the official code cannot build.
    """
    settings = dict(config["settings"])
    if list(settings.pop("posterior_mean_range", [0, 1])) != [0, 1]:
        raise CheckpointError(
            f"{where}: expected a posterior mean in [0, 1], which the official form has; found"
            f" {config['settings']['posterior_mean_range']}; keep this checkpoint in our form"
        )
    archs = {part: _official_name(where, part, config["modules"][part]) for part in PMRF_PARTS}
    official = {
        **_uncarded(config),
        "stage": "flow",
        "arch": archs["velocity"],
        "conditional": False,
        "mmse_model_ckpt_path": None,
        "mmse_model_arch": archs["posterior_mean"],
        "mmse_noise_std": settings.get("noise_std", 0.1),
        "eps": settings.get("eps", 0.0),
    }
    renamed = {}
    for part, prefix in PMRF_PARTS.items():
        own = {k.removeprefix(f"{part}."): t for k, t in tensors.items() if k.startswith(f"{part}.")}
        renamed |= {prefix + k: t for k, t in with_recomputed(where, config["modules"][part], own).items()}
    return official, renamed


def _official_name(where, part: str, entry: dict) -> str:
    network = build(where, entry, "meta")
    for name, preset in ARCHITECTURES.items():
        cls, arguments = models.PRESETS[preset]
        official = {"class": cls.__name__, "config": arguments}
        if type(network) is cls and build(where, official, "meta").config == network.config:
            return name
    raise CheckpointError(
        f"{where}: {part}: expected one of the networks that the official code can build, {', '.join(ARCHITECTURES)};"
        f" found a {entry['class']} of other sizes; convert it to diffusers or single"
    )


def with_recomputed(where, entry: dict, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those that our form leaves out, in the network's order: official code wants all of them."""
    names = list(build(where, entry, "meta").state_dict())
    if all(name in tensors for name in names):
        return {name: tensors[name] for name in names}
    return {name: tensors.get(name, made) for name, made in build(where, entry).state_dict().items()}


# ---- networks


def classes() -> dict[str, type[nn.Module]]:
    return {cls.__name__: cls for cls, _ in models.PRESETS.values()}


def build(where, entry, device=None) -> nn.Module:
    """The network, in eval mode, that a config entry {"class", "config"} describes; "meta": shapes without values.

    Raises CheckpointError where there is none.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        raise CheckpointError(f'{where}: the config of a network needs "class" and "config"')
    name = str(entry.get("class"))
    cls = classes().get(CLASS_NAMES.get(name, name))
    if cls is None:
        raise CheckpointError(f"{where}: unknown network class {name!r}; there are {', '.join(classes())}")
    try:
        with torch.device(device or "cpu"):
            return cls(**entry["config"]).eval()
    except Exception as error:  # whatever a nonsense config makes a constructor do
        raise CheckpointError(f"{where}: {name} cannot be built from this config: {line(error)}") from error


# ---- words


def few(names: Iterable[str], limit: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def contents(tensors: Mapping[str, Tensor]) -> str:
    """How many tensors there are, and of which beginnings."""
    if not tensors:
        return "no tensors"
    return f"{len(tensors)} tensors, {few({name.rsplit('.', 1)[0] for name in tensors}, 4)}"


def line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _plain(value):
    """JSON's version of what a pickle's config may hold; what JSON cannot hold becomes its text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
