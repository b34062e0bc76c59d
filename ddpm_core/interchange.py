"""Written by tools/extract.py; edit the chapters:

- book/workshop/interchange.ipynb
"""

import json
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_core import checks
from ddpm_core.files import (
    DIGEST,
    check_digest,
    current_umask,
    parse_tensors,
    replace,
    save_tensors,
    schedule_on,
    sync_folder,
    write_atomically,
)
from ddpm_core.schedules import SCHEDULES, Schedule, cosine, from_beta
from ddpm_core.unet import EPS, UNet, UNetConfig

__all__ = [
    "BOOKKEEPING",
    "CONFIG_FIELDS",
    "DOWN",
    "LARGEST",
    "LONGEST_JSON",
    "OLD_PARTS",
    "PARTS",
    "PLACES",
    "PREDICTION_NAMES",
    "RECIPE_NAMES",
    "RESAMPLING",
    "SCHEDULER",
    "SCHEDULER_DEFAULTS",
    "SCHEDULER_FITS",
    "SCHEDULER_READERS",
    "UNET_DEFAULTS",
    "UNET_FITS",
    "UNET_READERS",
    "UP",
    "VARIANCE_NAMES",
    "WEIGHTS",
    "fit_weights",
    "load_diffusers",
    "our_name",
    "read_json",
    "read_scheduler_config",
    "read_unet_config",
    "read_weights",
    "recognise",
    "save_diffusers",
    "scheduler_fields",
    "their_name",
    "unet_fields",
]


# --- book/workshop/interchange.ipynb · interchange-export-names · Names
PLACES = (  # in diffusers, here; a # stands for a number
    ("conv_in", "conv_in"),
    ("conv_norm_out", "norm_out"),
    ("conv_out", "conv_out"),
    ("time_embedding.linear_1", "time.0"),
    ("time_embedding.linear_2", "time.2"),
    ("down_blocks.#.resnets.#", "down.#.#.block"),
    ("down_blocks.#.attentions.#", "down.#.#.attention"),
    ("down_blocks.#.downsamplers.0", "downsample.#"),
    ("mid_block.resnets.0", "middle_1.block"),
    ("mid_block.attentions.0", "middle_1.attention"),
    ("mid_block.resnets.1", "middle_2.block"),
    ("up_blocks.#.resnets.#", "up.#.#.block"),
    ("up_blocks.#.attentions.#", "up.#.#.attention"),
    ("up_blocks.#.upsamplers.0", "upsample.#"),
)
PARTS = {  # of a place: in diffusers, here
    "": "",
    "norm1": "norm_1",
    "conv1": "conv_1",
    "time_emb_proj": "time",
    "norm2": "norm_2",
    "conv2": "conv_2",
    "conv_shortcut": "shortcut",
    "group_norm": "norm",
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "out",
    "conv": "conv",
}
OLD_PARTS = {"query": "query", "key": "key", "value": "value", "proj_attn": "out"}


def _translate(
    name: str, places: Mapping[str, str], parts: Mapping[str, str]
) -> str | None:
    stem, _, leaf = name.rpartition(".")
    for source, target in places.items():
        pattern = re.escape(source).replace(r"\#", "([0-9]+)") + r"(?:\.(.+))?"
        found = re.fullmatch(pattern, stem)
        if found and (found[found.re.groups] or "") in parts:
            *numbers, part = found.groups()
            for number in numbers:
                target = target.replace("#", number, 1)
            return ".".join(filter(None, (target, parts[part or ""], leaf)))
    return None


def our_name(name: str) -> str | None:
    r"""The name in our U-Net of one of diffusers' tensors, new or old; None: no such.

    >>> our_name("down_blocks.1.attentions.0.to_q.weight")
    'down.1.0.attention.query.weight'
    >>> our_name("mid_block.attentions.0.proj_attn.bias")
    'middle_1.attention.out.bias'
    """
    return _translate(name, dict(PLACES), PARTS | OLD_PARTS)


def their_name(name: str) -> str | None:
    r"""The name in diffusers' UNet2DModel of one of our U-Net's tensors; None: no such.

    >>> their_name("middle_1.attention.out.bias")
    'mid_block.attentions.0.to_out.0.bias'
    """
    places = {ours: theirs for theirs, ours in PLACES}
    return _translate(name, places, {ours: theirs for theirs, ours in PARTS.items()})


# --- book/workshop/interchange.ipynb · interchange-export-fields · What the arrays...
BOOKKEEPING = (
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "_use_default_values",
)
DOWN = ("DownBlock2D", "AttnDownBlock2D")  # without and with attention
UP = ("UpBlock2D", "AttnUpBlock2D")

UNET_FITS: dict[str, Any] = {  # what our U-Net computes, and nothing else
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "norm_eps": EPS,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
RESAMPLING = ("downsample_padding", "downsample_type", "upsample_type")

UNET_DEFAULTS: dict[str, Any] = UNET_FITS | {  # of diffusers, for fields left out
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "downsample_padding": 1,
    "norm_eps": 1e-5,
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "num_train_timesteps": None,  # of a learned embedding, which is refused
}


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is(value: object, fits: object) -> bool:
    return value == fits and isinstance(value, bool) == isinstance(fits, bool)


def _absent(field: str, given: Mapping[str, Any]) -> str:
    return "" if field in given else " (not in the file: diffusers' default)"


def _misfit(
    field: str, given: Mapping[str, Any], whole: Mapping[str, Any], fits: object
) -> str:
    said = f"{field} = {_show(whole[field])}{_absent(field, given)}"
    return f"{said}; {json.dumps(fits)} would fit"


def _strangers(given: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    unknown = [f for f in given if f not in known and f not in BOOKKEEPING]
    return [
        f"{field} = {_show(given[field])} is a field that we do not know; "
        "only null would fit"
        for field in unknown
        if given[field] is not None
    ]


def _class_of(given: Mapping[str, Any], right: str) -> list[str]:
    found = given.get("_class_name", right)
    return [] if found == right else [f'_class_name = "{found}"; "{right}" would fit']


def _refuse(where: str, problems: list[str]) -> None:
    if problems:
        lines = [p if len(p) <= 500 else f"{p[:497]}..." for p in problems]
        raise ValueError(f"{where} does not fit:\n- " + "\n- ".join(lines))


# --- book/workshop/interchange.ipynb · interchange-export-config · What the arrays...
LARGEST = 2**14  # of a side or a number of channels; more is a damaged file


def _side(field: str, value: object) -> int:
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return checks.integer(field, value, low=1, high=LARGEST)


def _channels(field: str, value: object) -> int:
    return checks.integer(field, value, low=1, high=LARGEST)


def _blocks(field: str, value: object) -> int:
    return checks.integer(field, value, low=1, high=16)


def _probability(field: str, value: object) -> float:
    return checks.number(field, value, low=0.0, high=1.0)


def _head_dim(field: str, value: object) -> int | None:
    return None if value is None else checks.integer(field, value, 1, LARGEST)


def _widths(field: str, value: object) -> list[int]:
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise ValueError(f"{field} must be a list of 1 to 8 integers; got {value!r}")
    widths = [_channels(field, width) for width in value]
    if any(width % widths[0] for width in widths):
        raise ValueError(
            f"{field} = {value}: our levels are as wide as whole multiples of the first"
        )
    return widths


def _attends(field: str, value: object) -> list[bool]:
    kinds = DOWN if field.startswith("down") else UP
    if not isinstance(value, list) or any(kind not in kinds for kind in value):
        raise ValueError(f"{field} = {_show(value)}: a list of {kinds} would fit")
    return [kind == kinds[1] for kind in value]


UNET_READERS: dict[str, Callable[[str, object], Any]] = {
    "sample_size": _side,
    "in_channels": _channels,
    "out_channels": _channels,
    "block_out_channels": _widths,
    "layers_per_block": _blocks,
    "dropout": _probability,
    "norm_num_groups": _channels,
    "attention_head_dim": _head_dim,
    "down_block_types": _attends,
    "up_block_types": _attends,
}


# --- book/workshop/interchange.ipynb · interchange-export-unet-config · What the...
def _shape(read: Mapping[str, Any]) -> UNetConfig:
    widths, down = read["block_out_channels"], read["down_block_types"]
    if not len(widths) == len(down) == len(read["up_block_types"]):
        raise ValueError("block_out_channels and both lists of blocks: not one length")
    if down != read["up_block_types"][::-1]:
        raise ValueError(
            "up_block_types must attend where down_block_types do: ours are mirrored"
        )
    places = [w for w, attends in zip(widths, down, strict=True) if attends]
    per_head = read["attention_head_dim"]
    heads = {1 if per_head is None else w / per_head for w in (*places, widths[-1])}
    if len(heads) > 1 or heads.pop() % 1:
        raise ValueError(
            f"attention_head_dim = {per_head} with {sorted({*places, widths[-1]})} "
            "channels: ours has the same whole number of heads wherever it attends"
        )
    side = read["sample_size"]
    return UNetConfig(
        image_size=side,
        in_channels=read["in_channels"],
        out_channels=read["out_channels"],
        channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        blocks=read["layers_per_block"],
        attention=[side >> i for i, attends in enumerate(down) if attends],
        heads=1 if per_head is None else widths[-1] // per_head,
        dropout=read["dropout"],
        groups=read["norm_num_groups"],
    )


def read_unet_config(given: Mapping[str, Any], where: str = "config") -> UNetConfig:
    r"""Our config of the network that the fields of diffusers' config.json describe.

    Fields left out have diffusers' defaults. Raises ValueError that lists every field
    with which the function would be another one, its value and what would fit.

    >>> read_unet_config({"norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1,
    ...                   "sample_size": 32, "attention_head_dim": None})
    Traceback (most recent call last):
    ValueError: config does not fit:
    - downsample_padding = 1 (not in the file: diffusers' default); 0 would fit
    """
    whole = UNET_DEFAULTS | dict(given)
    problems = _class_of(given, "UNet2DModel") + _strangers(given, UNET_DEFAULTS)
    read: dict[str, Any] = {}
    for field, reader in UNET_READERS.items():
        try:
            read[field] = reader(field, whole[field])
        except (TypeError, ValueError) as error:
            problems.append(f"{error}{_absent(field, given)}")
    widths, groups = read.get("block_out_channels"), whole["norm_num_groups"]
    fits = UNET_FITS | {"time_embedding_dim": None, "attn_norm_num_groups": None}
    for field, value in fits.items():
        also = {"attn_norm_num_groups": groups}  # what null stands for
        if widths and len(widths) == 1 and field in RESAMPLING:
            continue  # one level is never resampled
        if widths:
            also["time_embedding_dim"] = 4 * widths[0]
        if not any(_is(whole[field], v) for v in (value, also.get(field, value))):
            problems.append(_misfit(field, given, whole, value))
    if len(read) == len(UNET_READERS):
        try:
            config = _shape(read)
        except (TypeError, ValueError) as error:
            problems.append(str(error))
    _refuse(where, problems)
    return config


# --- book/workshop/interchange.ipynb · interchange-export-scheduler · The schedule
PREDICTION_NAMES = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
VARIANCE_NAMES = {"fixed_large": "fixed_large", "fixed_small": "fixed_small"}
RECIPE_NAMES = {
    "linear": "linear",
    "scaled-linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}

SCHEDULER_FITS: dict[str, Any] = {
    "thresholding": False,
    "clip_sample_range": 1.0,  # does not matter where nothing is clipped
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
SCHEDULER_DEFAULTS: dict[str, Any] = SCHEDULER_FITS | {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "dynamic_thresholding_ratio": 0.995,  # these two belong to thresholding
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",  # all three are the same when no step is skipped
}


def _recipe(field: str, value: object) -> str:
    return checks.one_of(field, value, list(RECIPE_NAMES.values()))


def _truth(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{field} must be true or false; got {value!r}")
    return value


def _beta(field: str, value: object) -> float:
    return checks.number(field, value, low=0.0, high=1.0)


def _beta_list(field: str, value: object) -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise TypeError(f"{field} must be null or a list; got {_show(value)}")
    return [_beta(field, beta) for beta in value]


SCHEDULER_READERS: dict[str, Callable[[str, object], Any]] = {
    "num_train_timesteps": lambda field, T: checks.integer(field, T, 1, 100_000),
    "beta_start": _beta,
    "beta_end": _beta,
    "beta_schedule": _recipe,
    "trained_betas": _beta_list,
    "variance_type": lambda field, name: checks.one_of(field, name, VARIANCE_NAMES),
    "clip_sample": _truth,
    "prediction_type": lambda field, name: checks.one_of(field, name, PREDICTION_NAMES),
    "timestep_spacing": lambda field, name: checks.one_of(
        field, name, ("leading", "linspace", "trailing")
    ),
}


# --- book/workshop/interchange.ipynb · interchange-export-schedule · The schedule
def recognise(schedule: Schedule) -> Schedule | None:
    r"""The schedule of our own that has these betas, whatever its name; None: no such.

    Up to rounding: 1e-12, or that of the dtype of `schedule`.

    >>> same = recognise(from_beta(torch.linspace(1e-4, 0.02, 1000, dtype=torch.double)))
    >>> same.name
    'linear'
    """
    beta = schedule.beta.detach().cpu()
    near = 1e-12 if beta.dtype == torch.float64 else 0.0
    for make in SCHEDULES.values():
        try:
            ours = make(schedule.T)
        except ValueError:
            continue  # too few steps for this one
        if torch.allclose(ours.beta.to(beta.dtype), beta, rtol=near, atol=0.0):
            return ours
    return None


def _tables(read: Mapping[str, Any]) -> Schedule:
    T, betas, recipe = (
        read[name] for name in ("num_train_timesteps", "trained_betas", "beta_schedule")
    )
    if betas is not None:
        if len(betas) != T:
            raise ValueError(
                f"trained_betas has {len(betas)} numbers, num_train_timesteps is {T}"
            )
        return from_beta(torch.tensor(betas, dtype=torch.float64))
    if recipe == "squaredcos_cap_v2":
        return cosine(T)
    first, last = read["beta_start"], read["beta_end"]
    if recipe == "linear":
        return from_beta(torch.linspace(first, last, T, dtype=torch.float64))
    ends = math.sqrt(first), math.sqrt(last)
    return from_beta(torch.linspace(*ends, T, dtype=torch.float64).square())


def read_scheduler_config(
    given: Mapping[str, Any], where: str = "scheduler"
) -> tuple[Schedule, dict[str, Any]]:
    r"""The schedule and the options of our samplers that a scheduler_config.json gives.

    The options are "prediction", "variance" and "clip". Fields left out have the
    defaults of diffusers' DDPMScheduler. Raises ValueError that lists what is not ours.

    >>> schedule, options = read_scheduler_config({"variance_type": "fixed_large"})
    >>> schedule.name, schedule.T, options
    ('linear', 1000, {'prediction': 'eps', 'variance': 'fixed_large', 'clip': True})
    """
    whole = SCHEDULER_DEFAULTS | dict(given)
    problems = _class_of(given, "DDPMScheduler") + _strangers(given, SCHEDULER_DEFAULTS)
    read: dict[str, Any] = {}
    for field, reader in SCHEDULER_READERS.items():
        try:
            read[field] = reader(field, whole[field])
        except (TypeError, ValueError) as error:
            problems.append(str(error))
    for field, value in SCHEDULER_FITS.items():
        inert = field == "clip_sample_range" and read.get("clip_sample") is False
        if not inert and not _is(whole[field], value):
            problems.append(_misfit(field, given, whole, value))
    if len(read) == len(SCHEDULER_READERS):
        try:
            schedule = _tables(read)
            schedule = recognise(schedule) or schedule
        except ValueError as error:
            problems.append(str(error))
    _refuse(where, problems)
    return schedule, {
        "prediction": PREDICTION_NAMES[read["prediction_type"]],
        "variance": VARIANCE_NAMES[read["variance_type"]],
        "clip": read["clip_sample"],
    }


# --- book/workshop/interchange.ipynb · interchange-export-read · Loading
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler_config.json"
LONGEST_JSON = 10_000_000  # bytes


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def read_json(path: Path) -> dict[str, Any]:
    r"""The one JSON object in a file; ValueError for anything else, or over 10 MB.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "config.json")
    ...     _ = path.write_text('{"norm_eps": 1e-6}')
    ...     read_json(path)
    {'norm_eps': 1e-06}
    """
    size = path.stat().st_size
    if size > LONGEST_JSON:
        raise ValueError(f"{path} has {size} bytes: too long for a configuration")
    try:
        text = path.read_bytes().decode()
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object but a {type(found).__name__}")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    r"""The tensors of a safetensors file, the digest checked if it has one of ours.

    Raises ValueError if the file is damaged or of another kind.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "x.safetensors")
    ...     _ = save_tensors(path, {"x": torch.ones(2)})
    ...     read_weights(path)
    {'x': tensor([1., 1.])}
    """
    tensors, metadata = parse_tensors(path.read_bytes(), str(path))
    if DIGEST in metadata:
        check_digest(tensors, metadata, str(path))
    return tensors


# --- book/workshop/interchange.ipynb · interchange-export-fit · Loading
def fit_weights(
    config: UNetConfig, tensors: Mapping[str, Tensor], where: str = "weights"
) -> UNet:
    r"""A U-Net of this config that holds diffusers' tensors, in float32 or float64.

    float64 if a tensor is; every conversion is exact. Raises ValueError that lists
    tensors missing, left over, of another shape, not floating or not finite.

    >>> from ddpm_core.unet import UNET_CONFIGS
    >>> fit_weights(UNET_CONFIGS["digits"], {"conv_in.bias": torch.ones(3)})
    Traceback (most recent call last):
    ValueError: weights does not fit:
    - conv_in.bias has shape [3], not [16]
    - time_embedding.linear_1.weight [64, 16] is missing
    ...
    """
    with torch.device("meta"):
        model = UNet(config)
    expected, found, problems = model.state_dict(), dict[str, Tensor](), []
    for name, x in sorted(tensors.items()):  # the library has no order
        ours, shape = our_name(name), list(x.shape)
        if ours is None or ours not in expected:
            problems.append(f"{name} {shape} has no place in our U-Net")
        elif ours in found:
            problems.append(f"{name} is there twice, under its old and its new name")
        elif x.shape != expected[ours].shape:
            problems.append(
                f"{name} has shape {shape}, not {list(expected[ours].shape)}"
            )
        elif not x.is_floating_point():
            problems.append(f"{name} holds {x.dtype}, not floating-point numbers")
        elif not bool(torch.isfinite(x).all()):
            problems.append(f"{name} holds numbers that are not finite")
        if ours is not None:
            found[ours] = x
    missing = [name for name in expected if name not in found]
    for name in missing:
        shape = list(expected[name].shape)
        problems.append(f"{their_name(name)} {shape} is missing")
    _refuse(where, problems)
    double = any(x.dtype == torch.float64 for x in found.values())
    dtype = torch.float64 if double else torch.float32
    exact = {name: found[name].to(dtype, copy=True) for name in expected}
    model.load_state_dict(exact, assign=True)
    return model


# --- book/workshop/interchange.ipynb · interchange-export-load · Loading
def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS
    if path.is_file():
        return path
    pickled = path.with_suffix(".bin")
    if pickled.is_file():
        raise ValueError(
            f"{pickled} is a pickle, which can run code when it is opened: it is not "
            "read. Take a revision with .safetensors, or convert it where you trust "
            "it: UNet2DModel.from_pretrained(folder).save_pretrained(other_folder)"
        )
    names = sorted(file.name for file in folder.iterdir())
    raise FileNotFoundError(f"{folder} has no {WEIGHTS}; there are {names}")


def _scheduler_file(folder: Path) -> Path | None:
    for path in (folder / "scheduler" / SCHEDULER, folder / SCHEDULER):
        if path.is_file():
            return path
    return None


def _check_pipeline(folder: Path) -> None:
    path = folder / "model_index.json"
    if path.is_file():
        parts = {k: v for k, v in read_json(path).items() if not k.startswith("_")}
        known = ("unet", "scheduler")
        others = [
            k for k in parts if k not in known and parts[k] not in (None, [None] * 2)
        ]
        _refuse(
            str(path), [f"{k} = {_show(parts[k])}: no part of ours" for k in others]
        )


def load_diffusers(
    folder: str | Path, device: torch.device | str = "cpu"
) -> tuple[UNet, Schedule, dict[str, Any]]:
    r"""Read a folder that diffusers wrote: (network in `eval()` mode, schedule, card).

    A pipeline with `unet/` and `scheduler/`, or a network's own folder. The card holds
    "schedule", "prediction", "variance", "clip" (options of `ancestral`), "unet",
    "parameters" and the files' fields in "diffusers". Warns if there is no scheduler's
    file and takes diffusers' default. Raises FileNotFoundError, or ValueError for what
    is damaged or does not fit. Pickles (.bin) are not read.

    >>> load_diffusers("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: no/such/folder is no folder
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.as_posix()} is no folder")
    _check_pipeline(folder)
    inner = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (inner / "config.json").is_file():
        raise FileNotFoundError(f"{inner} has no config.json")
    fields_of = {"unet": read_json(inner / "config.json"), "scheduler": {}}
    config = read_unet_config(fields_of["unet"], str(inner / "config.json"))
    scheduler = _scheduler_file(folder)
    if scheduler is None:
        said = f"{folder} has no {SCHEDULER}: taking linear, T = 1000, eps"
        warnings.warn(said, stacklevel=2)
    else:
        fields_of["scheduler"] = read_json(scheduler)
    schedule, options = read_scheduler_config(fields_of["scheduler"], str(scheduler))
    path = _weights_file(inner)
    model = fit_weights(config, read_weights(path), str(path))
    card = {
        "schedule": {"name": schedule.name, "T": schedule.T},
        **options,
        "unet": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "diffusers": fields_of,
    }
    return model.to(device).eval(), schedule_on(schedule, device), card


# --- book/workshop/interchange.ipynb · interchange-export-write · Saving
CONFIG_FIELDS = (
    "image_size",
    "in_channels",
    "out_channels",
    "channels",
    "channel_mult",
    "blocks",
    "attention",
    "heads",
    "dropout",
    "groups",
)


def unet_fields(config: UNetConfig) -> dict[str, Any]:
    r"""The config.json of diffusers' UNet2DModel that is the same network.

    Raises ValueError if diffusers has no such network.

    >>> from ddpm_core.unet import UNET_CONFIGS
    >>> unet_fields(UNET_CONFIGS["cifar10"])["block_out_channels"]
    [128, 256, 256, 256]
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in CONFIG_FIELDS and value != field.default:
            raise ValueError(f"{field.name} = {value}: UNet2DModel has no such thing")
    attends = [side in config.attention for side in config.sides]
    places = [w for w, a in zip(config.widths, attends, strict=True) if a]
    widths = sorted({*places, config.widths[-1]})
    if config.heads > 1 and len(widths) > 1:
        raise ValueError(
            f"heads = {config.heads} at widths {widths}: diffusers has one number of "
            "channels a head, so all attending levels must be equally wide"
        )
    return {
        "_class_name": "UNet2DModel",
        **UNET_FITS,
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": [DOWN[a] for a in attends],
        "up_block_types": [UP[a] for a in reversed(attends)],
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "dropout": config.dropout,
        "attention_head_dim": None if config.heads == 1 else widths[0] // config.heads,
        "norm_num_groups": config.groups,
    }


def scheduler_fields(
    schedule: Schedule, prediction: str, variance: str, clip: bool
) -> dict[str, Any]:
    r"""The scheduler_config.json of diffusers' DDPMScheduler that is the same.

    Raises ValueError for a schedule that diffusers cannot follow, or unknown names.

    >>> from ddpm_core.schedules import linear
    >>> scheduler_fields(linear(500), "eps", "fixed_large", True)["beta_end"]
    0.04
    """
    checks.one_of("prediction", prediction, list(PREDICTION_NAMES.values()))
    checks.one_of("variance", variance, list(VARIANCE_NAMES.values()))
    _check_writable(schedule, prediction)
    ours = recognise(schedule)
    beta = (ours or schedule).beta.detach().to("cpu", torch.float64)[1:]
    first, last = float(beta[0]), float(beta[-1])
    straight = torch.linspace(first, last, schedule.T, dtype=torch.float64)
    recipe, betas = "linear", None
    if ours is not None:
        recipe = RECIPE_NAMES[ours.name]
    elif not torch.equal(beta, straight):
        betas = beta.tolist()
    return {
        "_class_name": "DDPMScheduler",
        **SCHEDULER_FITS,
        "num_train_timesteps": schedule.T,
        "beta_start": first,
        "beta_end": last,
        "beta_schedule": recipe,
        "trained_betas": betas,
        "variance_type": {v: k for k, v in VARIANCE_NAMES.items()}[variance],
        "clip_sample": _truth("clip", clip),
        "prediction_type": {v: k for k, v in PREDICTION_NAMES.items()}[prediction],
    }


# --- book/workshop/interchange.ipynb · interchange-export-save · Saving
def _check_writable(schedule: Schedule, prediction: str) -> None:
    beta = schedule.beta.detach().to("cpu", torch.float64)[1:]
    if schedule.timesteps.tolist() != list(range(schedule.T + 1)):
        raise ValueError(
            f"schedule {schedule.name!r} visits only some steps; diffusers would tell "
            "the network other ones. Save the schedule that it was trained with"
        )
    lost = (1 - beta.float() == 1) | ((beta.float() == 1) & (beta < 1))
    if bool(lost.any()):
        t = int(lost.nonzero()[0]) + 1
        raise ValueError(
            f"beta = {float(beta[t - 1])} at t = {t} is 0 or 1 beside 1 in float32, "
            "in which diffusers keeps its tables"
        )
    if prediction == "eps" and float(beta[-1]) == 1:
        raise ValueError(
            "beta = 1 at t = T: prediction must be 'x_0' or 'v'; got 'eps'"
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def save_diffusers(
    folder: str | Path,
    model: UNet,
    schedule: Schedule,
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = True,
) -> None:
    r"""Write a network and its schedule as a new folder that diffusers reads.

    `DDPMPipeline.from_pretrained(folder)` is the same sampler, `UNet2DModel` in
    `unet/` the same network; weights keep their dtype. The folder's parent must exist,
    the folder must not, or be empty. Raises ValueError for what diffusers cannot
    compute, FileExistsError or OSError; then nothing is left behind.

    >>> from ddpm_core.schedules import linear
    >>> from ddpm_core.unet import UNET_CONFIGS
    >>> model = UNet(UNET_CONFIGS["digits"])
    >>> with tempfile.TemporaryDirectory() as shelf:
    ...     save_diffusers(Path(shelf, "net"), model, linear(1000))
    ...     load_diffusers(Path(shelf, "net"))[1].name
    'linear'
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model must be a UNet of ours; got {type(model).__name__}")
    folder = Path(folder)
    scheduler = scheduler_fields(schedule, prediction, variance, clip)
    unet = unet_fields(model.config)
    tensors = {str(their_name(n)): x for n, x in model.state_dict().items()}
    for name, x in tensors.items():
        checks.tensor(name, x)
        checks.finite(name, x.detach().cpu())
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose another, or delete it")
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        temporary.chmod(0o777 & ~current_umask())
        for part in ("unet", "scheduler"):
            (temporary / part).mkdir()
        save_tensors(temporary / "unet" / WEIGHTS, tensors, {"format": "pt"})
        _write_json(temporary / "unet" / "config.json", unet)
        _write_json(temporary / "scheduler" / SCHEDULER, scheduler)
        _write_json(temporary / "model_index.json", index)
        if folder.exists():
            folder.rmdir()  # it is empty
        replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)
