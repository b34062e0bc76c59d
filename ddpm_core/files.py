"""Written by tools/extract.py; edit the chapters:

- book/workshop/files.ipynb
"""

import glob
import hashlib
import json
import math
import os
import struct
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ddpm_core import checks
from ddpm_core.schedules import SCHEDULES, Schedule
from ddpm_core.unet import UNet, UNetConfig

__all__ = [
    "DIGEST",
    "PACKED",
    "build_model",
    "check_digest",
    "current_umask",
    "digest",
    "in_order",
    "load_model",
    "load_pretrained",
    "load_tensors",
    "pack",
    "parse_tensors",
    "pretrained",
    "read_result",
    "read_tensors",
    "remove_leftovers",
    "replace",
    "save_model",
    "save_tensors",
    "schedule_on",
    "split_header",
    "sync_folder",
    "tensor_bytes",
    "unpack",
    "write_and_rename",
    "write_atomically",
]


# --- book/workshop/files.ipynb · files-export-digest · Why no pickle
DIGEST = "sha256"


def tensor_bytes(x: Tensor) -> bytes:
    r"""The bytes of a tensor, row by row, whatever its device and memory format.

    >>> tensor_bytes(torch.tensor([1, 256], dtype=torch.int16))
    b'\x01\x00\x00\x01'
    """
    flat = x.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    r"""SHA-256 of names, dtypes, shapes and bytes, and of the metadata but for itself.

    The order of the mappings does not matter. Returns 64 hexadecimal digits.

    >>> digest({"x": torch.zeros(2)}, {}) == digest({"x": torch.zeros(2, 1)}, {})
    False
    """
    rest = {k: v for k, v in sorted(metadata.items()) if k != DIGEST}
    whole = hashlib.sha256(json.dumps(rest).encode())
    for name, x in sorted(tensors.items()):
        whole.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        whole.update(tensor_bytes(x))
    return whole.hexdigest()


# --- book/workshop/files.ipynb · files-export-atomic · Written whole or not at all
def replace(temporary: Path, path: Path, tries: int = 5) -> None:
    r"""Rename `temporary` to `path` in one step, waiting a little if `path` is in use.

    Raises PermissionError when it is still in use at the last try.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     old, new = Path(folder, "old"), Path(folder, "new")
    ...     _ = old.write_bytes(b"1")
    ...     replace(old, new)
    ...     old.exists(), new.read_bytes()
    (False, b'1')
    """
    for left in range(tries - 1, -1, -1):
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            if not left:
                raise
            time.sleep(0.1)


def sync_folder(folder: Path) -> None:
    r"""Bring the names in a folder to the disk, where the platform can do that.

    >>> sync_folder(Path())
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def write_atomically(path: str | Path, content: bytes) -> None:
    r"""Write a file whole or not at all: temporary name, sync, rename, sync the folder.

    A crash leaves the file that was there before. The folder must exist. Raises OSError
    that names `path`, as on a full disk, and says that nothing there has changed.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder, "note.txt"), b"done")
    ...     [file.name for file in Path(folder).iterdir()]
    ['note.txt']
    """
    path = Path(path)
    try:
        write_and_rename(path, content)
    except OSError as error:
        before = "the file that was there before is untouched"
        kept = before if os.path.exists(path) else "no file was written"
        reason = f"{error.strerror or error}; {kept}"
        raise type(error)(error.errno, reason, str(path)) from error
    sync_folder(path.parent)


def write_and_rename(path: Path, content: bytes) -> None:
    r"""The steps up to the rename; what fails takes the temporary file with it.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_and_rename(Path(folder, "note.txt"), b"done")
    ...     Path(folder, "note.txt").read_bytes()
    b'done'
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # what went wrong first is what must be told
            temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: str | Path) -> None:
    r"""Delete the temporary files that killed writers of `path` have left beside it.

    For a file that one process alone writes: the unfinished file of another goes too.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, ".note.txt.a1b2c3d4").write_bytes(b"do")
    ...     remove_leftovers(Path(folder, "note.txt"))
    ...     list(Path(folder).iterdir())
    []
    """
    path = Path(path)
    for old in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with suppress(OSError):
            old.unlink()


def current_umask() -> int:
    r"""The permissions that new files of this process go without.

    Temporary files are private; a checkpoint should be as readable as any other file.

    >>> 0 <= current_umask() <= 0o777
    True
    """
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# --- book/workshop/files.ipynb · files-export-tensors · Tensors with metadata
def save_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    r"""Write tensors and strings as a safetensors file with a digest, atomically.

    Returns the digest, stored under "sha256" in the metadata, which must not have
    that key already. Raises TypeError, ValueError or OSError.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_tensors(Path(folder, "a"), {"x": torch.ones(2)}, {"step": "7"})
    ...     tensors, metadata = load_tensors(Path(folder, "a"))
    >>> tensors["x"], metadata["step"]
    (tensor([1., 1.]), '7')
    """
    strings = dict(metadata or {})
    for name, x in tensors.items():
        checks.tensor(f"tensors[{name!r}]", x, kind="any")
    for key, value in strings.items():
        if not isinstance(value, str) or key == DIGEST:
            raise ValueError(f"metadata[{key!r}] must be a str, the key not {DIGEST!r}")
    strings[DIGEST] = digest(tensors, strings)
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    write_atomically(path, in_order(to_safetensors(plain, metadata=strings)))
    return strings[DIGEST]


def in_order(content: bytes) -> bytes:
    r"""The same safetensors file with the metadata sorted by name.

    >>> written = [to_safetensors({}, {"a": "1", "b": "2"}) for _ in range(20)]
    >>> len({in_order(content) for content in written})
    1
    """
    header, tensors = split_header(content)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text + tensors


def split_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    r"""The header of a safetensors file, and the bytes of the tensors after it.

    >>> split_header(to_safetensors({}, {"a": "1"}))
    ({'__metadata__': {'a': '1'}}, b'')
    """
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def parse_tensors(
    content: bytes, where: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    r"""Tensors and metadata of any safetensors file's bytes; `where` names it.

    Raises ValueError if the bytes are no whole safetensors file.

    >>> parse_tensors(to_safetensors({}, {"a": "1"}), "somewhere")
    ({}, {'a': '1'})
    """
    try:
        tensors = parse_safetensors(content)
        header, _ = split_header(content)
    except (SafetensorError, struct.error, ValueError, KeyError) as error:
        raise ValueError(f"{where} is no whole safetensors file: {error}") from error
    return tensors, header.get("__metadata__") or {}


def check_digest(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str
) -> None:
    r"""Raise ValueError unless the digest in the metadata is that of the rest.

    >>> check_digest({}, {}, "somewhere")
    Traceback (most recent call last):
    ValueError: somewhere has no 'sha256': save_tensors did not write it
    """
    found, stored = digest(tensors, metadata), metadata.get(DIGEST)
    if stored is None:
        raise ValueError(f"{where} has no {DIGEST!r}: save_tensors did not write it")
    if found != stored:
        raise ValueError(f"{where} is damaged: {DIGEST} {found}, stored {stored}")


def read_tensors(
    content: bytes, where: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    r"""Tensors and metadata of a file's bytes, its digest checked; `where` names it.

    Raises ValueError if the bytes are no safetensors file, have no digest or another.

    >>> read_tensors(b"no such thing", "somewhere")
    Traceback (most recent call last):
    ValueError: somewhere is no whole safetensors file: ...
    """
    tensors, metadata = parse_tensors(content, where)
    check_digest(tensors, metadata, where)
    return tensors, metadata


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    r"""Read what `save_tensors` wrote: (tensors on the CPU, metadata).

    Raises FileNotFoundError, or ValueError if the file is damaged or of another kind.

    >>> load_tensors("no/such/file")
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    return read_tensors(Path(path).read_bytes(), str(path))


# --- book/workshop/files.ipynb · files-export-pack · Half the bytes
PACKED = "packed"


def pack(
    tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    r"""All tensors, rounded to `dtype`, as one; and a string with names and shapes.

    Returns tensors and metadata for `save_tensors`; `unpack` undoes it but for the
    rounding. Raises TypeError, or ValueError for a value that `dtype` cannot hold.

    >>> pack({"a": torch.ones(2, 1), "b": torch.zeros(1)}, torch.float16)[1]
    {'packed': '{"a":[2,1],"b":[1]}'}
    """
    for name, x in tensors.items():
        checks.tensor(f"tensors[{name!r}]", x)
        checks.finite(f"tensors[{name!r}] as {dtype}", x.to(dtype))
    parts = [x.detach().cpu().to(dtype).reshape(-1) for x in tensors.values()]
    shapes = {name: list(x.shape) for name, x in tensors.items()}
    text = json.dumps(shapes, separators=(",", ":"))
    return {PACKED: torch.cat(parts)}, {PACKED: text}


def unpack(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    r"""What `pack` was given, from what it returned; other tensors as they are.

    Raises ValueError if names and shapes are not those of the numbers.

    >>> unpack(*pack({"a": torch.ones(1, 2)}, torch.float16))
    {'a': tensor([[1., 1.]], dtype=torch.float16)}
    """
    if PACKED not in metadata:
        return dict(tensors)
    shapes: dict[str, list[int]] = json.loads(metadata[PACKED])
    sizes = [math.prod(shape) for shape in shapes.values()]
    whole = tensors.get(PACKED, torch.zeros(0))
    if whole.shape != (sum(sizes),):
        raise ValueError(
            f"{PACKED!r} must be of shape {(sum(sizes),)}; got {tuple(whole.shape)}"
        )
    pairs = zip(shapes.items(), torch.split(whole, sizes), strict=True)
    return {name: part.reshape(shape) for (name, shape), part in pairs}


# --- book/workshop/files.ipynb · files-export-model · A model and its card
def save_model(
    path: str | Path,
    model: UNet,
    card: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    r"""Write a network's weights to `path` (.safetensors) and its card beside it (.json).

    `card` must hold "schedule" ({"name", "T"}) and "prediction"; "unet", "parameters"
    and "sha256" are added. `dtype`: round to it, see `pack`; the card says "dtype".
    Returns the card written. Raises ValueError, OSError.

    >>> from ddpm_core.unet import UNET_CONFIGS
    >>> facts = {"schedule": {"name": "cosine", "T": 200}, "prediction": "eps"}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "m.safetensors")
    ...     card = save_model(path, UNet(UNET_CONFIGS["digits"]), facts)
    ...     load_model(path)[1].T
    200
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors; got {str(path)!r}")
    for key in ("schedule", "prediction"):
        if key not in card:
            raise ValueError(f"card must hold {key!r}; got {sorted(card)}")
    count = sum(p.numel() for p in model.parameters())
    whole = {**card, "unet": asdict(model.config), "parameters": count}
    text = json.dumps({k: whole[k] for k in ("unet", "schedule", "prediction")})
    tensors: Mapping[str, Tensor] = model.state_dict()
    told = {"model": text}
    if dtype is not None:
        whole["dtype"] = str(dtype).removeprefix("torch.")
        tensors, names = pack(tensors, dtype)
        told |= names
    whole[DIGEST] = save_tensors(path, tensors, told)
    written = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path.with_suffix(".json"), written.encode())
    read: dict[str, Any] = json.loads(written)
    return read


def build_model(
    content: bytes, card: Mapping[str, Any], where: str, device: torch.device | str
) -> tuple[UNet, Schedule, dict[str, Any]]:
    r"""The network in `eval()` mode, the schedule and the card, from a file's bytes.

    Raises ValueError if the bytes are damaged or are not those that the card is of.

    >>> build_model(b"", {}, "somewhere", "cpu")
    Traceback (most recent call last):
    ValueError: somewhere is no whole safetensors file: ...
    """
    tensors, metadata = read_tensors(content, where)
    if metadata[DIGEST] != card.get(DIGEST):
        raise ValueError(
            f"{where} has {DIGEST} {metadata[DIGEST]}, its card {card.get(DIGEST)}"
        )
    name = checks.one_of("schedule", card["schedule"]["name"], SCHEDULES)
    schedule = SCHEDULES[name](card["schedule"]["T"])
    model = UNet(UNetConfig(**card["unet"]))
    model.load_state_dict(unpack(tensors, metadata))
    return model.to(device).eval(), schedule_on(schedule, device), dict(card)


def schedule_on(schedule: Schedule, device: torch.device | str) -> Schedule:
    r"""The schedule on a device: float64, or float32 where the device has no float64.

    >>> from ddpm_core.schedules import cosine
    >>> schedule_on(cosine(10), "cpu").beta.dtype
    torch.float64
    """
    has_none = torch.device(device).type == "mps"
    return schedule.to(device, torch.float32 if has_none else None)


def load_model(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[UNet, Schedule, dict[str, Any]]:
    r"""Read what `save_model` wrote: (network in `eval()` mode, schedule, card).

    Network and schedule lie on `device`. Raises FileNotFoundError or ValueError.

    >>> load_model("no/such/file.safetensors")
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    path = Path(path)
    content = path.read_bytes()
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return build_model(content, card, str(path), device)


# --- book/workshop/files.ipynb · files-export-pretrained · The weights that come...
def pretrained() -> list[str]:
    r"""The names that `load_pretrained` knows.

    >>> "digits" in pretrained()
    True
    """
    folder = resources.files("ddpm_core") / "weights"
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return sorted(n.removesuffix(".safetensors") for n in names if ".safetensors" in n)


def load_pretrained(
    name: str, device: torch.device | str = "cpu"
) -> tuple[UNet, Schedule, dict[str, Any]]:
    r"""The weights of this name that ship with the package: (network, schedule, card).

    The network is in `eval()` mode; it and the schedule lie on `device`. The card is a
    dictionary: data, steps, seed, measured figures, licence. Raises ValueError for an
    unknown name or a damaged file.

    >>> model, schedule, card = load_pretrained("digits")
    >>> card["prediction"], model.config.image_size
    ('eps', 8)
    """
    checks.one_of("name", name, pretrained())
    folder = resources.files("ddpm_core") / "weights"
    content = (folder / f"{name}.safetensors").read_bytes()
    card = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return build_model(content, card, f"weights/{name}.safetensors", device)


# --- book/workshop/files.ipynb · files-export-results · Results that took long
def read_result(name: str) -> dict[str, Any]:
    r"""The stored result of a long run, book/results/NAME.json, with its command.

    Raises ValueError for an unknown name.

    >>> read_result("nothing")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: name must be one of ...; got 'nothing'
    """
    beside = Path(__file__).parents[1] / "book" / "results"
    folder = beside if beside.is_dir() else resources.files("ddpm_core.results")
    stored = {file.name.removesuffix(".json"): file for file in folder.iterdir()}
    checks.one_of("name", name, sorted(stored))
    found: dict[str, Any] = json.loads(stored[name].read_text(encoding="utf-8"))
    return found
