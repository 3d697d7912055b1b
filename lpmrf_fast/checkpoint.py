"""Weights and configs on disk.

A checkpoint is a folder with `config.json` and one `model.safetensors`. The config also stands in the metadata of the
safetensors file, so that the single file explains itself and loads on its own. Two kinds:

    pipeline   {"format_version": 1, "pipeline": class, "settings": {noise_std, ...}, "card": {...},
                "modules": {"vae": {"class": "SimVAE", "config": constructor arguments}, ...}}
               with the weights named `vae.<official name>` and so on
    one model  {"format_version": 1, "class": "SimVAE", "config": constructor arguments, "card": {...}}
               with the official names

Weights are stored in any float dtype and come back in at least float32. Buffers that depend on nothing but the config
and are exact on any machine (RECOMPUTED) are not stored; every other key must be there, and no other.
Models published in the diffusers layout (config.json with `_class_name`, diffusion_pytorch_model.safetensors) are read
by `load_model`. Nothing is ever unpickled but through torch.load(weights_only=True).
"""

import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import models

FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
METADATA_KEY = "lpmrf_fast.config"
BUNDLED = Path(__file__).parent / "weights"
DEFAULT_NAME = "demo"
RECOMPUTED = ("attn_mask", "relative_position_index")
"""Last components of the names of SwinIR's masks and index tables: 25 MB of a published file, zero information."""
CLASS_NAMES = {"AutoencoderKLSim": "SimVAE"}
"""Class names of published configs → ours; ours stand for themselves."""
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of AutoencoderKL's attention in older published files → their names now."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or used; one line: which, why, and what to do."""


# ---- finding


def bundled() -> list[str]:
    """Names of the checkpoints that ship inside the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def locate(name_or_path=None, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The local folder or weights file of a checkpoint.

    None: the bundled default. An existing path wins, then a bundled name, then an `owner/name` of the Hugging Face hub,
    which is downloaded unless `local_files_only` (or HF_HUB_OFFLINE) says to use the cache.
    Raises CheckpointError where there is none.
    """
    if name_or_path is None:
        if DEFAULT_NAME not in bundled():
            raise CheckpointError(
                "this installation has no bundled checkpoint; give a folder or a name, or install the released package"
            )
        return BUNDLED / DEFAULT_NAME
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name and path.exists():  # an empty name would be the working directory
        return path
    if name in bundled():
        return BUNDLED / name
    known = f"bundled: {', '.join(bundled()) or 'none'}"
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not name.endswith((".safetensors", ".json")):
        return _from_hub(name, revision, local_files_only, known)
    raise CheckpointError(f"no checkpoint {name!r}: not a folder or file here, and not a bundled name ({known})")


def _from_hub(name: str, revision: str | None, local_files_only: bool, known: str) -> Path:
    missing = f"no checkpoint {name!r}: not a folder here, not a bundled name ({known})"
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f'{missing}, and names of the Hugging Face hub need: pip install "lpmrf-fast[hub]"'
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, WEIGHTS, *DIFFUSERS_WEIGHTS],
        )
    except Exception as error:  # its error classes differ between versions and network libraries
        where = "in the local Hugging Face cache" if local_files_only else "on the Hugging Face hub or in its cache"
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{missing}, and not found {where}{at} ({type(error).__name__}); check the name and the network, or give"
            " a local folder"
        ) from error
    return Path(folder)


# ---- reading


def load(name_or_path=None, revision: str | None = None, local_files_only: bool = False):
    """A pipeline checkpoint → (config dict, {module name: network in eval mode}); arguments as in `locate`.

    Networks are on the CPU in float32, or float64 where stored so. Raises CheckpointError.
    """
    path = locate(name_or_path, revision, local_files_only)
    config, weights = _open(path)
    if "pipeline" not in config:
        kind = config.get("class", config.get("_class_name"))
        raise CheckpointError(f"{path}: a single model ({kind}), not a pipeline; use checkpoint.load_model")
    modules = config.get("modules")
    if not isinstance(modules, dict) or not isinstance(config.get("settings"), dict):
        raise CheckpointError(f'{path}: the config needs "modules" and "settings"; save the pipeline again')
    networks = {name: _build(f"{path}: {name}", entry) for name, entry in modules.items()}
    try:
        everything = nn.ModuleDict(networks)
    except KeyError as error:  # a name with a dot, or one that a module cannot have
        raise CheckpointError(f"{path}: {_line(error)} cannot name a network; save the pipeline again") from error
    _fill(everything, read_weights(weights), weights)
    return config, networks


def load_model(name_or_path, revision: str | None = None, local_files_only: bool = False) -> nn.Module:
    """One network in eval mode from a folder or file of ours, or a folder in the diffusers layout (official Sim-VAE).

    On the CPU in float32, or float64 where stored so; `locate` has the arguments. `network.config` is its config.
    Raises CheckpointError.
    """
    path = locate(name_or_path, revision, local_files_only)
    config, weights = _open(path)
    if "pipeline" in config:
        raise CheckpointError(f"{path}: a whole {config['pipeline']}, not a single model; use its from_pretrained")
    if "_class_name" in config:
        config = {"class": config["_class_name"], "config": config}
    network = _build(str(path), config)
    _fill(network, read_weights(weights), weights)
    return network


def load_weights(network: nn.Module, path) -> None:
    """Fill a network from a weights file with its official names (safetensors, or a pickle of tensors), strictly.

    The values are cast to the network's dtypes. Raises CheckpointError.
    """
    _fill(network, read_weights(path), path, keep_dtype=True)


def read_weights(path) -> dict[str, Tensor]:
    """All tensors of a file by name: safetensors, or a pickle through torch.load(weights_only=True), on the CPU.

    Of a pickled training checkpoint, the part under `state_dict` is taken. Raises CheckpointError.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({_line(error)}); fetch or save it again") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: the pickle is damaged or holds more than plain tensors; where you trust it, convert it:"
            " safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        ) from error
    except Exception as error:  # torch.load: RuntimeError, EOFError, ... by kind of damage
        raise CheckpointError(f"{path}: damaged PyTorch file ({_line(error)}); fetch or save it again") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path}: holds something other than named tensors; save model.state_dict() alone")
    return dict(tensors)


def read_config(name_or_path=None) -> dict:
    """The config of a local or bundled checkpoint, card included, without reading weights. Raises CheckpointError."""
    return _open(locate(name_or_path, local_files_only=True))[0]


def _open(path: Path) -> tuple[dict, Path]:
    """Folder or safetensors file → (config, weights file)."""
    if path.is_dir():
        if not (path / CONFIG).exists():
            if (path / WEIGHTS).exists():
                return _open(path / WEIGHTS)
            raise CheckpointError(f"{path}: not a checkpoint: no {CONFIG} in this folder")
        config = _read_json(path / CONFIG)
        names = DIFFUSERS_WEIGHTS if "_class_name" in config else (WEIGHTS,)
        weights = next((path / name for name in names if (path / name).exists()), None)
        if weights is None:
            raise CheckpointError(f"{path}: no weights; expected {' or '.join(names)} beside {CONFIG}")
    elif path.suffix == ".safetensors":
        weights = path
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(METADATA_KEY)
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: damaged safetensors file ({_line(error)}); fetch or save it again"
            ) from error
        except OSError as error:
            raise _unreadable(path, error) from error
        if text is None:
            raise CheckpointError(
                f"{path}: bare weights, no config inside; give the folder with its {CONFIG}, or build the network and"
                " use checkpoint.load_weights"
            )
        config = _parse(text, path)
    else:
        raise CheckpointError(f"{path}: not a checkpoint; give a folder with {CONFIG}, or a .safetensors file")
    version = config.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version!r}, this lpmrf-fast reads {FORMAT_VERSION}; upgrade it")
    return config, weights


def _read_json(path: Path) -> dict:
    try:
        return _parse(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON (not UTF-8); fetch or save it again") from error


def _parse(text: str, path: Path) -> dict:
    try:
        config = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({_line(error)}); fetch or save it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: the config must be a JSON object, got a {type(config).__name__}")
    return config


def _build(where: str, entry) -> nn.Module:
    """The network that a config entry {"class", "config"} describes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        raise CheckpointError(f'{where}: the config of a network needs "class" and "config"')
    name = str(entry.get("class"))
    classes = {cls.__name__: cls for cls, _ in models.PRESETS.values()}
    cls = classes.get(CLASS_NAMES.get(name, name))
    if cls is None:
        raise CheckpointError(f"{where}: unknown network class {name!r}; there are {', '.join(classes)}")
    try:
        return cls(**entry["config"]).eval()
    except Exception as error:  # whatever a nonsense config makes a constructor do
        raise CheckpointError(f"{where}: {name} cannot be built from this config: {_line(error)}") from error


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], where, keep_dtype: bool = False) -> None:
    """Copy tensors into the network, strictly by name and shape."""
    wanted = network.state_dict()
    tensors = {_renamed(name, wanted): tensor for name, tensor in tensors.items()}
    optional = {name for name, _ in network.named_buffers() if name.split(".")[-1] in RECOMPUTED}
    reports = {
        "missing": wanted.keys() - tensors.keys() - optional,
        "unexpected": tensors.keys() - wanted.keys(),
        "of another shape": {
            f"{name} {tuple(tensors[name].shape)} in place of {tuple(wanted[name].shape)}"
            for name in wanted.keys() & tensors.keys()
            if tensors[name].shape != wanted[name].shape
        },
    }
    found = [f"{len(names)} {kind} ({_few(names)})" for kind, names in reports.items() if names]
    if found:
        raise CheckpointError(f"{where}: weights do not fit the config: {'; '.join(found)}; give the config they have")
    if not keep_dtype and any(t.dtype == torch.float64 for t in tensors.values()):
        network.double()
    network.load_state_dict(dict(tensors), strict=False)  # strict but for `optional`, see above


def _renamed(name: str, wanted: Mapping[str, Tensor]) -> str:
    """What the network calls the tensor `name` of a file: its newer name where that is wanted and this is not."""
    layer, _, parameter = name.rpartition(".")
    parent, _, last = layer.rpartition(".")
    newer = f"{parent}.{RENAMED.get(last, last)}.{parameter}"
    return newer if name not in wanted and newer in wanted else name


def _few(names: Iterable[str], limit: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror or _line(error)})")


# ---- writing


def save(
    folder,
    pipeline: str,
    settings: dict,
    modules: Mapping[str, nn.Module],
    dtype: torch.dtype | None = None,
    card: dict | None = None,
) -> Path:
    """Write a pipeline checkpoint; `pipeline` is the class's name, `settings` its other constructor arguments.

    dtype: how parameters are stored (None: as they are); buffers keep their dtype, because frequencies need their
    digits. card: anything JSON can hold, for people. Files appear whole or not at all; returns the folder.
    Raises CheckpointError where the folder cannot be written or a parameter overflows dtype.
    """
    config = {
        "format_version": FORMAT_VERSION,
        "pipeline": pipeline,
        "settings": settings,
        "modules": {name: _describe(network) for name, network in modules.items()},
    }
    return _write(folder, config, nn.ModuleDict(modules), dtype, card)


def save_model(folder, network: nn.Module, dtype: torch.dtype | None = None, card: dict | None = None) -> Path:
    """Write the checkpoint of one network, with its official names; arguments as in `save`."""
    return _write(folder, {"format_version": FORMAT_VERSION, **_describe(network)}, network, dtype, card)


def _describe(network: nn.Module) -> dict:
    if not hasattr(network, "config"):
        raise CheckpointError(f"a {type(network).__name__} has no config to save; use a network of lpmrf_fast.models")
    return {"class": type(network).__name__, "config": network.config}


def _write(folder, config: dict, network: nn.Module, dtype: torch.dtype | None, card: dict | None) -> Path:
    folder = Path(folder)
    if card is not None:
        config = {**config, "card": card}
    text = json.dumps(config, indent=2, ensure_ascii=False)
    tensors = _stored(network, dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{WEIGHTS}.part"
        save_file(tensors, part, metadata={"format": "pt", METADATA_KEY: json.dumps(config)})
        part.chmod(0o644)  # safetensors creates it for its owner alone, which an installed package must not be
        os.replace(part, folder / WEIGHTS)
        part = folder / f"{CONFIG}.part"
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, folder / CONFIG)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({_line(error)})") from error
    return folder


def _stored(network: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    tensors = {}
    for name, tensor in network.state_dict().items():
        if name not in parameters and name.split(".")[-1] in RECOMPUTED:
            continue
        stored = tensor.detach().cpu()
        if dtype is not None and name in parameters:
            stored = stored.to(dtype)
            if stored.isinf().any() and not tensor.isinf().any():
                raise CheckpointError(f"{name} overflows {dtype}; store bfloat16 or float32")
        tensors[name] = stored.contiguous()
    return tensors
