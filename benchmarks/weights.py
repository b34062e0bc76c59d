"""The weights that ship: from a training run to ddpm_core/weights, measured, with a card.

python benchmarks/weights.py fashion-mnist --run fashion28 --commit COMMIT
python benchmarks/weights.py digits            measure again what ships already
python benchmarks/weights.py fashion-mnist --peer   only look up the better peer

A run's averaged weights are rounded to 16 bits and packed, read back, and measured as
every reader can measure them, by ddpm_core.evaluate. The card says what they were trained
on, by which command of which commit, and what was measured. What the chapters show of
Fashion-MNIST without the data set goes into book/results/fashion-mnist.json: the loss of
the run, all figures, ten samples and the training images nearest to them.

Needs the data set. Fashion-MNIST takes a quarter of an hour on two quiet cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_core import evaluate, train
from ddpm_core.data import user_cache
from ddpm_core.ema import ema_decay
from ddpm_core.features import Reference, images_of, load_reference
from ddpm_core.files import load_model, save_model, write_atomically
from ddpm_core.metrics import nearest_neighbours
from ddpm_core.schedules import Schedule
from ddpm_core.training import Processes, TrainConfig
from ddpm_core.unet import UNET_CONFIGS, UNet

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import results

FOLDER = results.PACKAGE / "weights"
BEHIND = ("features", "metrics", "process", "samplers", "schedules", "unet")
POINTS, SHOWN = 100, 10  # of the loss; samples beside their nearest training images
# How quality.py draws from the peers: what it stores of it, and the same as options.
PEERS = {"name": "DPM-Solver++(2M)", "steps": 20, "clip": True}
AS_PEERS = "--n 2048 --sampler dpm-solver-2m --steps 20"
Loaded = tuple[UNet, Schedule, dict[str, Any]]


class Plan(NamedTuple):
    """What a card says of the data, and how the weights are measured."""

    data: str  # as ddpm_core.train calls it
    about: str
    licence: str
    measure: str  # options of ddpm_core.evaluate
    stored: bool  # whether chapters need a result in the place of the data


PLANS = {
    "digits": Plan(
        "digits",
        "scikit-learn's 8x8 handwritten digits, training part (1,297 images, UCI Optical "
        "Recognition of Handwritten Digits)",
        "MIT for the weights; data CC BY 4.0 (Alpaydin and Kaynak 1998)",
        "--n 500 --steps 25 --seeds 3 --untrained",
        stored=False,
    ),
    "fashion-mnist": Plan(
        "fashion_mnist",
        "Fashion-MNIST, 60,000 training images of 28x28 (MIT licence, (c) 2017 Zalando "
        "SE)",
        "MIT for the weights; data MIT, (c) 2017 Zalando SE",
        "--n 2048 --steps 50 --seeds 3 --untrained",
        stored=True,
    ),
}


def run_folder(name: str) -> Path:
    """The folder of a training run: a path, or a name among the runs in the cache."""
    found = Path(name) if Path(name).is_dir() else user_cache() / "runs" / name
    if not (found / "model.safetensors").is_file():
        raise FileNotFoundError(f"{name}: no run that has ended, no model.safetensors")
    return found


def training_command(card: dict[str, Any], data: str) -> str:
    """The command of ddpm_core.train that a run's card stands for, without defaults."""
    run: dict[str, Any] = card["training"]
    shapes = {n: json.loads(json.dumps(asdict(c))) for n, c in UNET_CONFIGS.items()}
    (network,) = [name for name, shape in shapes.items() if shape == card["unet"]]
    wanted = {"data": data, "network": network, "schedule": card["schedule"]["name"]}
    wanted |= {"T": card["schedule"]["T"]}
    wanted |= {f.name: run[f.name] for f in fields(TrainConfig) if f.name in run}
    if wanted["ema_decay"] == ema_decay(run["steps"]):
        wanted["ema_decay"] = None
    words = ["python", "-m", "ddpm_core.train", "OUT"]
    for name, default in vars(train.parser().parse_args([])).items():
        value = wanted.get(name, default)
        flag = name.replace("_", "-")
        if isinstance(value, bool) and value != default:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != default:
            words += [f"--{flag}", str(value)]
    return " ".join(words)


def whole_commit(name: str) -> str:
    """The 40 digits of a commit of this repository."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"commit {name!r} is none of this repository")
    return done.stdout.strip()


def described(card: dict[str, Any], name: str, commit: str) -> dict[str, Any]:
    """A run's card with what a stranger needs, in the order in which it is read."""
    plan, run = PLANS[name], card["training"]
    return {
        "name": name,
        "data": plan.about,
        "command": training_command(card, plan.data),
        "commit": whole_commit(commit),
        "steps": run["steps_done"],
        "seed": run["seed"],
        "schedule": card["schedule"],
        "prediction": card["prediction"],
        "training": run,
        "licence": plan.licence,
    }


def curve(path: Path, points: int = POINTS) -> dict[str, list[float]]:
    """The loss in a metrics.jsonl, as means over at most so many stretches."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    size = -(-len(lines) // points)
    parts = [lines[i : i + size] for i in range(0, len(lines), size)]
    return {
        "step": [part[-1]["step"] for part in parts],
        "loss": [short(statistics.fmean(p["loss"] for p in part)) for part in parts],
    }


def short(value: Any) -> Any:
    """Numbers with 4 significant digits, wherever they are in it."""
    if isinstance(value, dict):
        return {key: short(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [short(x) for x in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def asked(name: str, words: str) -> argparse.Namespace:
    """The options of ddpm_core.evaluate, as its command would take them."""
    given = ["--weights", name, *words.split()]
    options = evaluate.settled(evaluate.parser().parse_args(given))
    evaluate.check_options(options)
    return options


def drawn_as_peers(loaded: Loaded, reference: Reference) -> float:
    """The Fréchet distance of samples that are drawn as those of the peers are."""
    options = asked(reference.name, AS_PEERS)
    (samples,) = evaluate.sampled(loaded, options, Processes())
    return evaluate.quality(samples, reference, options.seed).frechet


def measure(loaded: Loaded, name: str) -> tuple[dict[str, Any], Tensor]:
    """All that ddpm_core.evaluate measures, and the samples of the first seed."""
    options = asked(name, PLANS[name].measure)
    sets = evaluate.sampled(loaded, options, Processes())
    once = argparse.Namespace(**{**vars(options), "seeds": 1})
    blank = evaluate.sampled(
        evaluate.untrained(loaded, options.seed), once, Processes()
    )
    found = evaluate.measured(sets, loaded, options, blank[0])
    for part in ("copies", "bits"):
        if isinstance(found[part], str):
            raise ValueError(f"{part}: {found[part]}")
    return found, sets[0]


def figures(found: dict[str, Any], name: str) -> dict[str, Any]:
    """What a card says of the measurement, with the marks."""
    place, marks = found["standing"], evaluate.MARKS
    columns = ("samples", "real", "untrained")
    shares = {
        key: {
            "samples": place[key],
            "real": place[f"real_{key}"],
            "ratio": place[f"{key}_ratio"],
            "at least": marks[f"{key}_ratio"],
        }
        for key in ("precision", "recall")
    }
    words = f"--weights {name} {PLANS[name].measure}"
    return {
        "command": f"python -m ddpm_core.evaluate {words}",
        "protocol": found["card"].replace("\n", " "),
        "frechet": {column: short(found[column]["frechet"]) for column in columns},
        **short(shares),
        "copies": {"share": short(found["copies"]), "at most": marks["copies"]},
        "bits": short(found["bits"]),
    }


def better_peer() -> dict[str, Any] | None:
    """The better peer of benchmarks/quality.py and its distance; None if not measured.

    Raises ValueError if the peers were drawn in another way than `AS_PEERS`.
    """
    path = results.FOLDER / "quality.json"
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    if not stored["verdict"]:
        return None
    if stored["sampler"] != PEERS:
        raise ValueError(f"the peers were drawn with {stored['sampler']}, not {PEERS}")
    name = stored["verdict"]["better_peer"]
    distance = statistics.fmean(stored["rows"][name]["distances"])
    return {"name": name, "frechet": short(distance)}


def hexadecimal(images: Tensor) -> list[str]:
    """Images in [-1, 1], each as a string: two hexadecimal digits a pixel."""
    levels = ((images + 1) * 127.5).round().to(torch.uint8).flatten(1)
    return [bytes(image.tolist()).hex() for image in levels]


def neighbours(samples: Tensor, reference: Reference) -> dict[str, Any]:
    """The samples nearest to a training image, and those; distances in pixels."""
    train_, test = (images_of(reference.name, s).images for s in ("train", "test"))
    x = evaluate.as_data(samples, reference.network.side, reference.levels)
    near = nearest_neighbours(x, train_)
    of_test = nearest_neighbours(test[: len(x)], train_).distance
    order = near.distance.argsort()[:SHOWN]
    return {
        "of": len(x),
        "radius": short(reference.radius),
        "distances": short(near.distance[order].tolist()),
        "median of the samples": short(near.distance.median().item()),
        "median of test images": short(of_test.median().item()),
        "samples": hexadecimal(x[order]),
        "training images": hexadecimal(train_[near.place[order]]),
    }


def pixels(name: str) -> dict[str, float]:
    """Mean and spread of the training images' pixels, in [-1, 1]."""
    x = images_of(name, "train").images
    kept: dict[str, float] = short({"mean": x.mean().item(), "spread": x.std().item()})
    return kept


def write_card(path: Path, card: dict[str, Any]) -> None:
    """The card as save_model writes it, for weights that stay as they are."""
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def rounded(run: Path, name: str, commit: str, folder: Path) -> Path:
    """A run's weights in 16 bits with their card, but for the figures."""
    model, _, card = load_model(run / "model.safetensors")
    path = folder / f"{name}.safetensors"
    save_model(path, model, described(card, name, commit), torch.float16)
    return path


def ship(name: str, run: Path | None, commit: str) -> None:
    """Measure weights of a run, or those that ship, and write card and result."""
    start, plan = time.perf_counter(), PLANS[name]
    reference = load_reference(name)
    images_of(name, "train")  # what is missing is said before anything is drawn
    target, result = FOLDER / f"{name}.safetensors", results.FOLDER / f"{name}.json"
    with tempfile.TemporaryDirectory() as scratch:
        path = rounded(run, name, commit, Path(scratch)) if run else target
        loaded = load_model(path)
        found, samples = measure(loaded, name)
        card = loaded[2] | {"figures": loaded[2].get("figures", {})}
        card["figures"]["evaluation"] = figures(found, name)
        if run:
            write_atomically(target, path.read_bytes())
        write_card(target.with_suffix(".json"), card)
    print(evaluate.report(found))
    if plan.stored:
        known = {} if run else json.loads(result.read_text(encoding="utf-8"))["run"]
        told = {key: card[key] for key in ("command", "commit", "steps")}
        record = {
            "run": {**told, **curve(run / "metrics.jsonl")} if run else known,
            "measured": short(found),
            "neighbours": neighbours(samples, reference),
            "pixels of training images": pixels(name),
            "drawn as the peers": short(drawn_as_peers(loaded, reference)),
            "peer": None,
        }
        results.write(name, record, start, modules=BEHIND, weights=[name])
    note_peer(name)


def note_peer(name: str) -> None:
    """Put the better peer, if it was measured, beside our distance."""
    peer, result = better_peer(), results.FOLDER / f"{name}.json"
    if peer is None or not PLANS[name].stored:
        return
    kept = json.loads(result.read_text(encoding="utf-8"))
    kept["peer"] = peer
    write_atomically(result, (json.dumps(kept, indent=1) + "\n").encode())
    card = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    beside = {"drawn as the peer": kept["drawn as the peers"], **peer}
    card["figures"]["evaluation"]["better peer"] = beside
    write_card(FOLDER / f"{name}.json", card)
    print(f"better peer: {beside}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PLANS)
    words = "a training's folder, or its name among the runs in the user's cache"
    parser.add_argument("--run", metavar="FOLDER", help=words)
    words = "of the code that trained; needed with --run"
    parser.add_argument("--commit", metavar="HASH", help=words)
    words = "measure nothing; read the better peer from the result of quality.py"
    parser.add_argument("--peer", action="store_true", help=words)
    given = parser.parse_args(arguments)
    if (given.run is None) != (given.commit is None) or (given.run and given.peer):
        parser.error("give --run and --commit together, and neither with --peer")
    try:
        if given.peer:
            note_peer(given.name)
            return
        run = run_folder(given.run) if given.run else None
        ship(given.name, run, given.commit or "")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
