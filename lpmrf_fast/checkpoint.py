"""Weights and configs on disk.

A checkpoint is a folder with `config.json` and one `model.safetensors`. The config also stands in the metadata of the
safetensors file, so that the single file explains itself and loads on its own. Two kinds:

    pipeline   {"format_version": 1, "pipeline": class, "settings": {noise_std, ...}, "card": {...},
                "modules": {"vae": {"class": "SimVAE", "config": constructor arguments}, ...}}
               with the weights named `vae.<official name>` and so on
    one model  {"format_version": 1, "class": "SimVAE", "config": constructor arguments, "card": {...}}
               with the official names

Weights are stored in any float dtype and come back in at least float32. Buffers that depend on nothing but the config
and are exact on any machine (`published.RECOMPUTED`) need not be stored; every other key must be there, and no other.
Published checkpoints are read as well, whatever their files are called: see `published.py`. Names and shapes are
compared before a network is made, so that nothing is ever half loaded, and nothing is unpickled but through
torch.load(weights_only=True).
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import published
from .published import RECOMPUTED, Checkpoint, CheckpointError, build, few, line

FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
MODEL_INDEX = "model_index.json"
LIBRARY = "lpmrf_fast.models"
SHARD_INDEX = ".index.json"
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
METADATA_KEY = "lpmrf_fast.config"
BUNDLED = Path(__file__).parent / "weights"
DEFAULT_NAME = "demo"
HUB_FILES = [
    *(CONFIG, MODEL_INDEX, WEIGHTS, *DIFFUSERS_WEIGHTS),
    *(f"*/{name}" for name in (CONFIG, *DIFFUSERS_WEIGHTS)),
    *(f"*{SHARD_INDEX}", "*-of-*.safetensors", "*-of-*.bin"),
]
"""What is fetched of a repository on the hub."""
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of AutoencoderKL's attention in older published files → their names now."""


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
            allow_patterns=HUB_FILES,
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
    found = read(name_or_path, revision, local_files_only)
    if "pipeline" not in found.config:
        kind = found.config.get("class")
        raise CheckpointError(f"{found.where}: a single model ({kind}), not a pipeline; use checkpoint.load_model")
    networks = _networks(found)
    _fill(networks, found.tensors)
    return found.config, dict(networks.items())


def load_model(name_or_path, revision: str | None = None, local_files_only: bool = False) -> nn.Module:
    """One network in eval mode, from a folder or file of ours or a published one (Sim-VAE, DifFace's SwinIR, ...).

    On the CPU in float32, or float64 where stored so; `locate` has the arguments. `network.config` is its config.
    Raises CheckpointError.
    """
    found = read(name_or_path, revision, local_files_only)
    if "pipeline" in found.config:
        raise CheckpointError(
            f"{found.where}: a whole {found.config['pipeline']}, not a single model; use its from_pretrained"
        )
    network = _networks(found)
    _fill(network, found.tensors)
    return network


def load_weights(network: nn.Module, path) -> None:
    """Fill a network from a weights file with its official names (safetensors, or a pickle of tensors), strictly.

    The values are cast to the network's dtypes. Raises CheckpointError, and then the network is as it was.
    """
    load_tensors(network, read_weights(path), path)


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor], where="these weights") -> None:
    """`load_weights`, of tensors by name; `where` they are from, for messages."""
    _compare(network, tensors, where)
    _fill(network, tensors, keep_dtype=True)


def read(name_or_path=None, revision: str | None = None, local_files_only: bool = False) -> Checkpoint:
    """A checkpoint of any known form in our terms, its names and shapes compared with its config.

    Weights of safetensors files and of new pickles stay on disk until they are used. Raises CheckpointError.
    """
    found = _open(locate(name_or_path, revision, local_files_only))
    _compare(_networks(found, "meta"), found.tensors, found.where)
    return found


def describe(name_or_path=None, revision: str | None = None, local_files_only: bool = False) -> str:
    """What a checkpoint is, in a few lines for people: form, networks, settings, and what was ignored or replaced."""
    return report(read(name_or_path, revision, local_files_only))


def report(found: Checkpoint) -> str:
    """`describe`, of a checkpoint that has been read."""
    modules = found.config.get("modules") or {"": found.config}
    rows = []
    for name, entry in modules.items():
        own = {key: t for key, t in found.tensors.items() if key.startswith(f"{name}." if name else "")}
        floats = [t for key, t in own.items() if t.is_floating_point() and key.split(".")[-1] not in RECOMPUTED]
        values = sum(t.numel() for t in floats) / 1e6
        dtypes = few({str(t.dtype).removeprefix("torch.") for t in floats})
        rows.append((name or "model", f"{entry['class']}, {len(own)} tensors, {values:.1f} M values, {dtypes}"))
    settings = found.config.get("settings") or {}
    if settings:
        rows.append(("settings", ", ".join(f"{key} {value}" for key, value in settings.items())))
    rows += [("note", note) for note in found.notes]
    return "\n".join([f"{found.where}: {found.form}", *(f"  {name:15} {text}" for name, text in rows)])


def read_config(name_or_path=None) -> dict:
    """The config of a local or bundled checkpoint, card included, in our terms. Raises CheckpointError."""
    return _open(locate(name_or_path, local_files_only=True)).config


def read_weights(path) -> dict[str, Tensor]:
    """All tensors of a file by name: safetensors, or a pickle through torch.load(weights_only=True), on the CPU.

    Of a pickled training checkpoint, the part under `state_dict`, `params_ema` or `params` is taken. Raises
    CheckpointError.
    """
    return published.unwrapped(path, _content(Path(path))[0])[0]


def _open(path: Path) -> Checkpoint:
    """Folder or file → what it holds, not yet compared with its config."""
    config = None
    weights = path
    if path.is_dir():
        if (path / MODEL_INDEX).exists():
            return _open_parts(path)
        if (path / CONFIG).exists():
            config = _versioned(_read_json(path / CONFIG), path)
        weights = _weights_in(path, config)
    elif re.search(r"-\d+-of-\d+$", path.stem):
        raise CheckpointError(
            f"{path}: expected whole weights, found one shard of them; give the folder with its index"
        )
    elif _kind(path) is None:
        raise CheckpointError(
            f"{path}: not a checkpoint; give a folder with {CONFIG}, or a file of weights ({', '.join(SUFFIXES)})"
        )
    content, embedded = _content(weights)
    if config is None and embedded is not None:
        config = _versioned(_parse(embedded, weights), weights)
    return published.read(weights, config, content)


def _open_parts(path: Path) -> Checkpoint:
    """A pipeline in the diffusers layout: a folder a network, and an index that holds the settings."""
    index = _versioned(_read_json(path / MODEL_INDEX), path)
    parts = {name: value for name, value in index.items() if _names_a_class(value)}
    foreign = [name for name, (library, _) in parts.items() if library != LIBRARY]
    if foreign or not parts:
        raise CheckpointError(
            f"{path}: expected a pipeline of networks from {LIBRARY}; found a {index.get('_class_name')} with"
            f" {few(f'{name} from {parts[name][0]}' for name in foreign) or 'no networks'}; give one of ours"
        )
    modules, tensors = {}, {}
    for name in parts:
        part = _open(path / name)
        modules[name] = part.config
        tensors |= {f"{name}.{key}": tensor for key, tensor in part.tensors.items()}
    settings = {k: v for k, v in index.items() if k not in parts and not k.startswith("_") and k != "format_version"}
    config = {"pipeline": index.get("_class_name"), "settings": settings, "modules": modules}
    if published.CARD in index:
        config["card"] = index[published.CARD]
    return Checkpoint(f"{index.get('_class_name')} in the diffusers layout", str(path), config, tensors)


def _names_a_class(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _weights_in(path: Path, config: dict | None) -> Path:
    """The weights of a folder: under their usual names, or the only ones that there are."""
    usual = DIFFUSERS_WEIGHTS if config is not None and "_class_name" in config else (WEIGHTS,)
    names = [*usual, *(f"{name}{SHARD_INDEX}" for name in usual)]
    weights = next((path / name for name in names if (path / name).exists()), None)
    if weights is None:
        others = sorted(p for p in path.iterdir() if p.name.endswith((*SUFFIXES, SHARD_INDEX)))
        others = [p for p in others if p.name.endswith(SHARD_INDEX)] or others  # an index stands for its shards
        if len(others) == 1:
            return others[0]
        if config is None and not others:
            raise CheckpointError(f"{path}: not a checkpoint: no {CONFIG} in this folder")
        found = f"; found {few(p.name for p in others)}, name the one you mean" if others else ""
        raise CheckpointError(f"{path}: no weights; expected {' or '.join(usual)} beside {CONFIG}{found}")
    return weights


def _versioned(config: dict, path: Path) -> dict:
    version = config.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version!r}, this lpmrf-fast reads {FORMAT_VERSION}; upgrade it")
    return config


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
        raise CheckpointError(f"{path}: not valid JSON ({line(error)}); fetch or save it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: the config must be a JSON object, got a {type(config).__name__}")
    return config


# ---- weights files


def _kind(path: Path) -> str | None:
    """ "safetensors", "pickle" or "index" by the first bytes of a file, by its name where they say nothing."""
    if path.name.endswith(SHARD_INDEX):
        return "index"
    try:
        with open(path, "rb") as file:
            start, size = file.read(9), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    # First: the length of a header, which a safetensors file begins with, may look like a pickle's or a zip's mark.
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"
    if start[:4] == b"PK\x03\x04" or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "pickle"
    if start[8:] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    return "pickle" if path.suffix in SUFFIXES else None


def _content(path: Path) -> tuple[Mapping, str | None]:
    """What a weights file holds, named tensors or what was pickled, and the config inside, if any."""
    kind = _kind(path)
    if kind == "index":
        return _shards(path), None
    if kind == "safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                return tensors, (file.metadata() or {}).get(METADATA_KEY)
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: damaged safetensors file ({line(error)}); fetch or save it again"
            ) from error
        except OSError as error:
            raise _unreadable(path, error) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)), None
    except OSError as error:
        raise _unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        more = f"it asks for {asked[1]}" if asked else "the pickle is damaged or holds more than plain tensors"
        raise CheckpointError(
            f"{path}: refused: expected plain tensors; {more}, and unpickling it may run any code; where you trust it,"
            " convert it once, with the code that wrote it and on a machine that may break:"
            " safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        ) from error
    except Exception as error:  # torch.load: RuntimeError, EOFError, ... by kind of damage
        raise CheckpointError(f"{path}: damaged PyTorch file ({line(error)}); fetch or save it again") from error


def _shards(path: Path) -> dict[str, Tensor]:
    """All tensors that an index names, out of all its shards."""
    where = _read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) and Path(v).name == v for v in where.values()):
        raise CheckpointError(f"{path}: expected a weight_map of tensors to files beside it; fetch or save it again")
    shards = sorted(set(where.values()))
    missing = [name for name in shards if not (path.parent / name).exists()]
    if missing:
        raise CheckpointError(
            f"{path}: expected {len(shards)} shards, found {len(shards) - len(missing)} of them; fetch {few(missing)}"
        )
    tensors = {}
    for name in shards:
        tensors |= read_weights(path.parent / name)
    lost = where.keys() - tensors.keys()
    if lost:
        raise CheckpointError(
            f"{path}: expected the {len(where)} tensors of its weight_map, found {len(tensors)} in the shards, without"
            f" {few(lost)}; fetch the shards again"
        )
    return tensors


# ---- networks


def _networks(found: Checkpoint, device=None) -> nn.Module:
    """The network of a checkpoint, or a ModuleDict of a pipeline's; with the device "meta", their shapes."""
    if "pipeline" not in found.config:
        return build(found.where, found.config, device)
    modules = found.config.get("modules")
    if not isinstance(modules, dict) or not isinstance(found.config.get("settings"), dict):
        raise CheckpointError(f'{found.where}: the config needs "modules" and "settings"; save the pipeline again')
    networks = {name: build(f"{found.where}: {name}", entry, device) for name, entry in modules.items()}
    try:
        return nn.ModuleDict(networks)
    except KeyError as error:  # a name with a dot, or one that a module cannot have
        raise CheckpointError(f"{found.where}: {line(error)} cannot name a network; save the pipeline again") from error


def _compare(network: nn.Module, tensors: Mapping[str, Tensor], where) -> None:
    """Names and shapes must be the network's. Raises CheckpointError."""
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
    found = [f"{len(names)} {kind} ({few(names)})" for kind, names in reports.items() if names]
    if found:
        raise CheckpointError(
            f"{where}: weights do not fit the config: expected {len(wanted) - len(optional)} tensors, found"
            f" {len(tensors.keys() - optional)}: {'; '.join(found)}; give the config they have, or fetch them again"
        )


def _renamed(name: str, wanted: Mapping[str, Tensor]) -> str:
    """What the network calls the tensor `name` of a file: its newer name where that is wanted and this is not."""
    layer, _, parameter = name.rpartition(".")
    parent, _, last = layer.rpartition(".")
    newer = f"{parent}.{RENAMED.get(last, last)}.{parameter}"
    return newer if name not in wanted and newer in wanted else name


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], keep_dtype: bool = False) -> None:
    """Copy tensors that `_compare` has seen into the network."""
    if not keep_dtype and any(t.dtype == torch.float64 for t in tensors.values()):
        network.double()
    wanted = network.state_dict()
    tensors = {_renamed(name, wanted): tensor for name, tensor in tensors.items()}
    network.load_state_dict(tensors, strict=False)  # strict but for RECOMPUTED, see above


RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of AutoencoderKL's attention in older published files → their names now."""


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror or line(error)})")


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
        "pipeline": pipeline,
        "settings": settings,
        "modules": {name: _describe(network) for name, network in modules.items()},
    }
    return _save(folder, config, nn.ModuleDict(modules), dtype, card)


def save_model(folder, network: nn.Module, dtype: torch.dtype | None = None, card: dict | None = None) -> Path:
    """Write the checkpoint of one network, with its official names; arguments as in `save`."""
    return _save(folder, _describe(network), network, dtype, card)


def _describe(network: nn.Module) -> dict:
    if not hasattr(network, "config"):
        raise CheckpointError(f"a {type(network).__name__} has no config to save; use a network of lpmrf_fast.models")
    return {"class": type(network).__name__, "config": network.config}


def _save(folder, config: dict, network: nn.Module, dtype: torch.dtype | None, card: dict | None) -> Path:
    if card is not None:
        config = {**config, "card": card}
    tensors = _stored(network, dtype)
    return write(folder, config, tensors)


def write(folder, config: dict, tensors: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint of ours as it is; a name that ends in .safetensors is one file, any other a folder.

    Files appear whole or not at all. Raises CheckpointError where they cannot be written.
    """
    folder = Path(folder)
    config = {"format_version": FORMAT_VERSION, **config}
    alone = folder.suffix == ".safetensors" and not folder.is_dir()
    try:
        (folder.parent if alone else folder).mkdir(parents=True, exist_ok=True)
        write_tensors(folder if alone else folder / WEIGHTS, tensors, {METADATA_KEY: json.dumps(config)})
        if not alone:
            write_json(folder / CONFIG, config)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({line(error)})") from error
    return folder


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that appears whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    save_file(dict(tensors), part, metadata={"format": "pt", **(metadata or {})})
    part.chmod(0o644)  # safetensors creates it for its owner alone, which an installed package must not be
    os.replace(part, path)


def write_json(path: Path, value) -> None:
    """A JSON file that appears whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


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
