"""Results of runs that take longer than a chapter may: book/results/NAME.json.

Each says how it was made: command, machine, versions, duration, and a digest of the
modules and weights behind it, so that `refresh.py --check` can tell when it is old.

    start = time.perf_counter()
    ...
    results.write("bench", found, start, modules=["unet"])
"""

import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chapters import ROOT

PACKAGE = ROOT / "ddpm_core"
FOLDER = ROOT / "book" / "results"
LIBRARIES = ("torch", "torchvision", "numpy")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def bytes_behind(modules: Iterable[str], weights: Iterable[str]) -> list[bytes]:
    """The files of the modules and of the weights; not their cards.

    A card holds what was measured later. What a computation takes from it, network,
    schedule and prediction, stands in the weights' file, too.
    """
    paths = [PACKAGE / f"{name}.py" for name in sorted(modules)]
    weighed = [PACKAGE / "weights" / f"{n}.safetensors" for n in sorted(weights)]
    paths += [path for path in weighed if path.exists()]
    return [path.read_bytes() for path in paths]


def digest(parts: Iterable[bytes]) -> str:
    """One SHA-256 of several contents."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


def processor() -> str:
    """The processor's name, and which instruction sets that matter here it has."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    text = info.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("model name")]
    name = lines[0].split(": ")[1] if lines else platform.machine()
    return f"{name} ({', '.join(s for s in INSTRUCTIONS if f' {s}' in text)})"


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def write(
    name: str,
    found: dict[str, Any],
    start: float,
    *,
    modules: Iterable[str],
    weights: Iterable[str] = (),
    libraries: Iterable[str] = (),
) -> Path:
    """Write the result, whole or not at all; `start` is the `perf_counter` then."""
    from ddpm_core.files import write_atomically

    script = Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix()
    made_from = {"modules": sorted(modules), "weights": sorted(weights)}
    record = {
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "machine": machine(),
        "versions": {n: version(n) for n in (*LIBRARIES, *libraries)},
        "seconds": round(time.perf_counter() - start),
        "made_from": made_from | {"digest": digest(bytes_behind(**made_from))},
        **found,
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    print(f"written: {path.relative_to(ROOT)}")
    return path


def old() -> list[str]:
    """A line for every result whose modules or weights have changed since."""
    lines = []
    for path in sorted(FOLDER.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        made = record["made_from"]
        if made["digest"] != digest(bytes_behind(made["modules"], made["weights"])):
            lines.append(f"old: results/{path.name}, by {record['command']}")
    return lines
