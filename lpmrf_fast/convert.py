"""`lpmrf-fast convert`: a checkpoint in another form. Tensors are renamed, never changed, and keep their dtypes.

    official    what the authors' code reads: PMRF's folder (config.json and model.safetensors, `model.*` and
                `mmse_model.*`), Sim-VAE's folder in the diffusers layout, a .pth with SwinIR's `state_dict`
    diffusers   config.json and diffusion_pytorch_model.safetensors; of a pipeline one folder a network, and
                model_index.json with the settings
    single      ours: one .safetensors file with the config inside; or, where the target has another ending, a folder

What a published config says and ours does not (learning rate, library version) waits in the card for the way back. Two
things are not kept on the way from PMRF: metric modules, and, of a training checkpoint, all but the EMA weights.
"""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, published
from .checkpoint import CheckpointError

FORMS = ("official", "diffusers", "single")


def convert(source, target, to: str, local_files_only: bool = False) -> str:
    """Write the checkpoint `source` (a folder, file or name) to `target` in the form `to`; returns what it was.

    The target must not exist; it appears whole or not at all. Raises CheckpointError where the source cannot be read or
    has no such form, ValueError for another form.
    """
    if to not in FORMS:
        raise ValueError(f"the form must be one of {', '.join(FORMS)}, got {to!r}")
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: exists, and is not overwritten; choose another name, or remove it")
    found = checkpoint.read(source, local_files_only=local_files_only)
    part = target.with_name(f".part-{target.name}")  # the ending chooses between file and folder
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        {"official": _official, "diffusers": _diffusers, "single": _single}[to](part, found)
        if target.is_dir():
            target.rmdir()
        os.replace(part, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        _remove(part)
    return checkpoint.report(found)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- forms


def _single(target: Path, found: published.Checkpoint) -> None:
    checkpoint.write(target, found.config, _whole(found.tensors))


def _diffusers(target: Path, found: published.Checkpoint) -> None:
    config = found.config
    if "pipeline" not in config:
        _folder(target, published.diffusers_config(config), checkpoint.DIFFUSERS_WEIGHTS[0], found.tensors)
        return
    for name, entry in config["modules"].items():
        own = {k.removeprefix(f"{name}."): t for k, t in found.tensors.items() if k.startswith(f"{name}.")}
        _folder(target / name, published.diffusers_config(entry), checkpoint.DIFFUSERS_WEIGHTS[0], own)
    classes = {name: [checkpoint.LIBRARY, entry["class"]] for name, entry in config["modules"].items()}
    index = {"_class_name": config["pipeline"], **classes, **config["settings"]}
    if config.get("card"):
        index[published.CARD] = config["card"]
    checkpoint.write_json(target / checkpoint.MODEL_INDEX, index)


def _official(target: Path, found: published.Checkpoint) -> None:
    kind = found.config.get("pipeline") or found.config["class"]
    if kind == "PMRFPipeline":
        config, tensors = published.official_pmrf(found.where, found.config, found.tensors)
        _folder(target, config, checkpoint.WEIGHTS, tensors)
    elif kind == "SimVAE":
        _diffusers(target, found)
    elif kind == "SwinIR":
        tensors = published.with_recomputed(found.where, found.config, found.tensors)
        # Copies: pickling a view would write all of the file that it looks into.
        torch.save({"state_dict": {name: tensor.clone() for name, tensor in tensors.items()}}, target)
    else:
        raise CheckpointError(
            f"{found.where}: expected something that has an official form, a PMRFPipeline, SimVAE or SwinIR; found a"
            f" {kind}; convert it to diffusers or single"
        )


def _folder(target: Path, config: dict, weights: str, tensors: dict[str, Tensor]) -> None:
    target.mkdir(parents=True)
    checkpoint.write_tensors(target / weights, _whole(tensors))
    checkpoint.write_json(target / checkpoint.CONFIG, config)


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and each with memory of its own, as the file format wants it."""
    seen, whole = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        whole[name] = tensor
    return whole
