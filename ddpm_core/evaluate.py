"""Written by tools/extract.py; edit the chapters:

- book/ddpm/evaluation.ipynb
- book/workshop/command_line.ipynb
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_core import checks, sample
from ddpm_core.features import (
    RECIPES,
    Reference,
    features_of,
    images_of,
    load_reference,
)
from ddpm_core.files import load_tensors, pretrained, write_atomically
from ddpm_core.losses import (
    Estimate,
    Reverse,
    bits_per_dim,
    bound_term,
    fixed_variance,
    prior_kl,
)
from ddpm_core.metrics import (
    copied,
    frechet_distance,
    library_scores,
    moments,
    precision_recall,
)
from ddpm_core.parallel import join
from ddpm_core.process import to_x_0
from ddpm_core.schedules import Schedule
from ddpm_core.train import add_number, add_running, read_options
from ddpm_core.training import Processes, stream
from ddpm_core.unet import UNet

__all__ = [
    "MARKS",
    "NEIGHBOURS",
    "ROWS",
    "Protocol",
    "Quality",
    "Standing",
    "as_bytes",
    "as_data",
    "attempt",
    "check_options",
    "copies_among",
    "feature_quality",
    "main",
    "mean_of",
    "measure_bits",
    "measured",
    "parser",
    "published_frechet",
    "quality",
    "read_samples",
    "reference_name",
    "report",
    "sample_features",
    "sampled",
    "settled",
    "spread_over",
    "standing",
    "strata",
    "stratified_bits",
    "untrained",
    "verdict",
]


# --- book/ddpm/evaluation.ipynb · evaluation-export-strata · Likelihood in twenty...
def strata(T: int, count: int = 20) -> list[range]:
    r"""The steps 1...T in at most `count` stretches: step 1, then longer and longer.

    The ends are in geometric progression; where two of them round to the same step
    there is one stretch less. Raises TypeError or ValueError.

    >>> strata(1000, 4)
    [range(1, 2), range(2, 16), range(16, 126), range(126, 1001)]
    """
    T, count = checks.integer("T", T, 2), checks.integer("count", count, 2)
    ratio = ((T + 1) / 2) ** (1 / (count - 1))
    ends = sorted({round(2 * ratio**k) for k in range(count)})
    return [range(1, 2), *(range(a, b) for a, b in pairwise(ends))]


@torch.no_grad()
def stratified_bits(
    reverse: Reverse,
    schedule: Schedule,
    x_0: Tensor,
    *,
    levels: int,
    count: int | None = 20,
    batch: int = 256,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""The bound in bits per dimension, `eq-evaluation-strata`, with its standard error.

    Unbiased: one step of each of `strata(T, count)` for each image, or every step for
    count None. Draws on the CPU.
    Args: reverse: as in `bound_term`. x_0: images [B, ...], B at least 2. levels: how
        many grey levels they have. batch: images at a time.
    Returns: Estimate of two scalars, over the images. Raises: TypeError, ValueError.
    >>> stratified_bits.__name__
    'stratified_bits'
    """
    checks.tensor("x_0", x_0)
    checks.integer("the number of images", len(x_0), 2)
    checks.integer("batch", batch, 1)
    every = [range(t, t + 1) for t in range(1, schedule.T + 1)]
    each = []
    for part in torch.split(x_0, batch):
        total = prior_kl(schedule, part)
        for steps in every if count is None else strata(schedule.T, count):
            size = (len(part),)
            t = torch.randint(steps.start, steps.stop, size, generator=generator)
            eps = torch.randn(part.shape, generator=generator, dtype=part.dtype)
            t, eps = t.to(part.device), eps.to(part.device)
            terms = bound_term(reverse, schedule, part, t, eps, levels)
            total = total + len(steps) * terms
        each.append(bits_per_dim(total, part[0].numel()))
    found = torch.cat(each)
    return Estimate(found.mean(), found.std() / math.sqrt(len(found)))


# --- book/ddpm/evaluation.ipynb · evaluation-export-protocol · All of it in one...
NEIGHBOURS = 2048  # at most so many images of each kind for precision and recall


class Quality(NamedTuple):
    r"""What is measured of samples; the smaller distances and larger scores are better.

    Fréchet distances to the test and to the training images, kernel distance to the
    test images with its spread over subsets, Inception score, precision, recall.

    >>> Quality._fields[:2]
    ('frechet', 'frechet_train')
    """

    frechet: float
    frechet_train: float
    kernel: float
    kernel_spread: float
    inception: float
    precision: float
    recall: float


def as_data(images: Tensor, side: int, levels: int) -> Tensor:
    r"""Images cut to [-1, 1], rounded to `levels` grey levels, padding cut off.

    Raises TypeError or ValueError: for images smaller than `side`, or padded unevenly.

    >>> as_data(torch.full((1, 1, 2, 2), 0.3), 2, 3)[0, 0, 0]
    tensor([0., 0.])
    """
    checks.tensor("images", images, shape=(None, 1, None, None))
    checks.finite("images", images)
    edge, odd = divmod(images.shape[-1] - side, 2)
    if images.shape[-1] != images.shape[-2] or edge < 0 or odd:
        raise ValueError(
            f"images must be squares of side {side}, or padded by the same on each "
            f"side; got {images.shape[-2]} by {images.shape[-1]}"
        )
    inside = images[..., edge : edge + side, edge : edge + side].float().clamp(-1, 1)
    return ((inside + 1) * ((levels - 1) / 2)).round() * (2 / (levels - 1)) - 1


@torch.no_grad()
def feature_quality(features: Tensor, reference: Reference, seed: int = 0) -> Quality:
    r"""Measure features [N, 64] made by the reference's network.

    Precision and recall compare the first min(N, 2048) with as many test images.

    >>> feature_quality.__name__
    'feature_quality'
    """
    head = reference.network.head
    logits = head(features.to(head.weight.device)).cpu()
    scores = library_scores(reference.test, features, logits, seed)
    n = min(len(features), len(reference.test), NEIGHBOURS)
    shares = precision_recall(reference.test[:n], features[:n])
    to_train = frechet_distance(reference.train_moments, moments(features))
    return Quality(scores.frechet, to_train, *scores[1:], *shares)


def sample_features(images: Tensor, reference: Reference) -> Tensor:
    r"""Features [N, 64] of samples [N, 1, H, W], rounded and cut by `as_data`.

    N must be at least 30. Raises TypeError or ValueError.

    >>> sample_features.__name__
    'sample_features'
    """
    x = as_data(images, reference.network.side, reference.levels)
    checks.integer("the number of images", len(x), 30)
    return features_of(reference.network, x)


def quality(images: Tensor, reference: Reference, seed: int = 0) -> Quality:
    r"""Measure samples [N, 1, H, W] (about [-1, 1]) against a reference.

    They are rounded and cut by `as_data`; N at least 30. `seed` is that of the subsets.
    Raises TypeError or ValueError.

    >>> quality.__name__
    'quality'
    """
    return feature_quality(sample_features(images, reference), reference, seed)


# --- book/ddpm/evaluation.ipynb · evaluation-export-card · All of it in one table,...
@dataclass(frozen=True)
class Protocol:
    r"""How a result was obtained; printed with it.

    `spread`: the standard deviation of the Fréchet distance over the seeds, None for
    one seed. `averaged`: whether the weights are a running average. None where it is
    not known. Raises TypeError or ValueError.

    >>> print(Protocol(500, "digits, 500 test images", "ancestral", 50, True, (0,)))
    samples 500; reference digits, 500 test images; sampler ancestral, 50 steps;
    averaged weights yes; seeds 0; spread of the Fréchet distance: one seed, unknown
    """

    samples: int
    reference: str
    sampler: str
    steps: int | None
    averaged: bool | None
    seeds: tuple[int, ...]
    spread: float | None = None

    def __post_init__(self) -> None:
        checks.integer("samples", self.samples, 1)
        if self.steps is not None:
            checks.integer("steps", self.steps, 1)
        if not self.seeds or (self.spread is None) != (len(self.seeds) == 1):
            raise ValueError(
                "spread must be given for several seeds, and for them only; got "
                f"{self.spread} for seeds {self.seeds}"
            )

    def __str__(self) -> str:
        spread = "one seed, unknown" if self.spread is None else f"{self.spread:.2g}"
        steps = "unknown" if self.steps is None else self.steps
        averaged = {None: "unknown", True: "yes", False: "no"}[self.averaged]
        return (
            f"samples {self.samples}; reference {self.reference}; "
            f"sampler {self.sampler}, {steps} steps;\n"
            f"averaged weights {averaged}; "
            f"seeds {', '.join(map(str, self.seeds))}; "
            f"spread of the Fréchet distance: {spread}"
        )

    def facts(self) -> dict[str, object]:
        """The same as a dictionary, for a file."""
        return asdict(self)


def spread_over(values: list[float]) -> float | None:
    r"""The standard deviation of a result over seeds; None for a single one.

    >>> spread_over([1.0]), spread_over([1.0, 3.0])
    (None, 1.4142135381698608)
    """
    return torch.tensor(values).std().item() if len(values) > 1 else None


# --- book/ddpm/evaluation.ipynb · evaluation-export-inception-fid · The paper's...
def as_bytes(images: Tensor) -> Tensor:
    r"""Images [N, 1 or 3, H, W] in [-1, 1] as 8-bit RGB, uint8 [N, 3, H, W].

    >>> as_bytes(torch.ones(1, 1, 2, 2)).shape, as_bytes(torch.ones(1, 1, 1, 1)).max()
    (torch.Size([1, 3, 2, 2]), tensor(255, dtype=torch.uint8))
    """
    checks.tensor("images", images, ndim=4)
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.expand(-1, 3, -1, -1)


def published_frechet(
    real: Tensor,
    generated: Tensor,
    feature: int | nn.Module = 2048,
    device: torch.device | str = "cpu",
    batch: int = 100,
) -> float:
    r"""Fréchet distance by torchmetrics as in papers: the FID, for `feature` = 2048.

    Inception needs torch-fidelity and, once, a network; any module with `num_features`
    that takes 8-bit RGB serves too. Images [N, C, H, W] in [-1, 1].
    Raises ModuleNotFoundError, OSError, TypeError, ValueError.

    >>> published_frechet.__name__
    'published_frechet'
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=feature, sync_on_compute=False).to(device)
    for images, is_real in ((real, True), (generated, False)):
        for part in torch.split(images, batch):
            metric.update(as_bytes(part).to(device), real=is_real)
    return float(metric.compute())


# --- book/ddpm/evaluation.ipynb · evaluation-export-standing · The clothes that ship
MARKS = {"precision_ratio": 0.75, "recall_ratio": 0.75, "copies": 0.03}


class Standing(NamedTuple):
    r"""Precision and recall of samples, those of real images, and their ratios.

    >>> Standing._fields[-2:]
    ('precision_ratio', 'recall_ratio')
    """

    precision: float
    recall: float
    real_precision: float
    real_recall: float
    precision_ratio: float
    recall_ratio: float


def standing(features: Tensor, reference: Reference) -> Standing:
    r"""Precision and recall of features [N, 64] beside those of real images.

    Both against the first n training images of the reference; the real ones are the
    next n. n is N, but at most 2048 and at most half of the training images.
    Raises TypeError or ValueError.

    >>> standing.__name__
    'standing'
    """
    n = min(len(features), len(reference.train) // 2, NEIGHBOURS)
    first, second = reference.train[:n], reference.train[n : 2 * n]
    made, real = precision_recall(first, features[:n]), precision_recall(first, second)
    ratios = [a / b if b > 0 else math.nan for a, b in zip(made, real, strict=True)]
    return Standing(*made, *real, *ratios)


def verdict(name: str, value: float) -> str:
    r"""The mark for a measurement in MARKS, and whether the value reaches it, in words.

    >>> verdict("copies", 0.01), verdict("recall_ratio", 0.7)
    ('at most 0.03: reached', 'at least 0.75: not reached')
    """
    checks.one_of("name", name, MARKS)
    mark, at_most = MARKS[name], name == "copies"
    good = value <= mark if at_most else value >= mark
    words = "at most" if at_most else "at least"
    return f"{words} {mark:g}: {'reached' if good else 'not reached'}"


# --- book/workshop/command_line.ipynb · command-line-export-evaluate-options · ...
def parser() -> argparse.ArgumentParser:
    r"""The options of `python -m ddpm_core.evaluate`.

    >>> parser().parse_args(["--weights", "digits"]).n
    2048
    """
    options = argparse.ArgumentParser(
        prog="python -m ddpm_core.evaluate",
        usage="%(prog)s --weights NAME|PATH [--n N] [--seeds N] ...",
        description="Draw samples with trained weights and measure them, with the "
        "protocol beside the numbers. 20 evaluations of the network a sample and 20 "
        "for each image of the bound, unless told otherwise.",
        allow_abbrev=False,
    )
    add, names = options.add_argument, ", ".join(pretrained())
    add("--weights", metavar="NAME|PATH", help=f"{names}, or a model.safetensors")
    add("--file", type=Path, help="measure the samples of this .npy or .safetensors")
    many = "how many samples; under torchrun write --samples [%(default)s]"
    add("--n", "--samples", type=int, default=2048, metavar="N", help=many)
    add("--out", type=Path, metavar="FILE", help="write the results as JSON, too")
    add_running(options)
    add_number(options, "--seeds", 1, "draw with so many seeds, from --seed on")
    switch = argparse.BooleanOptionalAction
    add("--reference", choices=sorted(RECIPES), help="real images [by the size]")
    sample.add_sampler(options)
    add_number(options, "--batch", 64, "samples drawn at once by one process")
    blank = "measure an untrained network of the same shape, too [no]"
    add("--untrained", action=switch, default=False, help=blank)
    add_number(options, "--bits", 256, "held-out images for the bound; 0: none")
    add_number(options, "--strata", 20, "evaluations for each of those images")
    whole = "the bound of all held-out images at every step: for 10,000 images and "
    whole += "T = 1000 that is 10 million evaluations, days on two cores; the first "
    whole += "process does it alone [no]"
    add("--full", action=switch, default=False, help=whole)
    return options


def check_options(options: argparse.Namespace) -> None:
    r"""Find what is wrong before anything is drawn. Raises ValueError or TypeError.

    >>> check_options(parser().parse_args([]))
    Traceback (most recent call last):
    ValueError: give --weights (a name or a file) or --file, and not both
    """
    if (options.weights is None) == (options.file is None):
        raise ValueError("give --weights (a name or a file) or --file, and not both")
    if options.untrained and options.weights is None:
        raise ValueError("--untrained needs --weights: a file has no network's shape")
    checks.integer("n", options.n, low=30)
    for name in ("batch", "seeds"):
        checks.integer(name, getattr(options, name), low=1)
    checks.integer("strata", options.strata, low=2)
    checks.integer("bits", options.bits, low=0)
    if options.bits == 1:
        raise ValueError("bits must be 0, or at least 2 for a standard error; got 1")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ValueError(f"out: there is no folder {options.out.absolute().parent}")


def settled(options: argparse.Namespace) -> argparse.Namespace:
    r"""Twenty evaluations a sample, and fixed_small's noise, unless told otherwise.

    >>> settled(parser().parse_args(["--weights", "digits"])).evaluations
    20
    """
    if options.steps is None and options.evaluations is None:
        options.evaluations = 20
    if options.variance is None and options.sampler == "ancestral":
        options.variance = "fixed_small"
    return options


# --- book/workshop/command_line.ipynb · command-line-export-evaluate-parts · ...
def reference_name(side: int) -> str:
    r"""The data set of RECIPES whose images have this side, padded by two or not.

    Raises ValueError if there is none.

    >>> reference_name(8), reference_name(32)
    ('digits', 'fashion-mnist')
    """
    for name, recipe in RECIPES.items():
        if side in (recipe.side, recipe.side + 4):
            return name
    raise ValueError(f"there is no reference for images of side {side}")


def read_samples(path: Path) -> Tensor:
    r"""Samples [N, C, H, W] of a .npy or of the one tensor in a .safetensors file.

    Raises ValueError or OSError.

    >>> read_samples(Path("no/such.npy"))
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False)).float()
    if path.suffix != ".safetensors":
        raise ValueError(f"file must be a .npy or a .safetensors; got {str(path)!r}")
    tensors, _ = load_tensors(path)
    if len(tensors) != 1:
        raise ValueError(f"{path} must hold one tensor; got {sorted(tensors)}")
    return next(iter(tensors.values())).float()


def mean_of(each: Sequence[dict[str, float]]) -> dict[str, float]:
    r"""The mean of each entry over several dictionaries.

    >>> mean_of([{"a": 1.0}, {"a": 2.0}])
    {'a': 1.5}
    """
    return {key: sum(one[key] for one in each) / len(each) for key in each[0]}


def untrained(
    loaded: tuple[UNet, Schedule, dict[str, Any]], seed: int = 0
) -> tuple[UNet, Schedule, dict[str, Any]]:
    r"""The same with the random weights that a training with this seed starts from.

    >>> untrained.__name__
    'untrained'
    """
    model, schedule, card = loaded
    blank = UNet(model.config, stream(seed, "weights", 0))
    return blank.to(schedule.beta.device).eval(), schedule, card


def copies_among(sets: Sequence[Tensor], reference: Reference) -> float:
    r"""The share of copies, `metrics.copied`, among all samples [N, 1, H, W] of all sets.

    Raises FileNotFoundError without the data set.

    >>> copies_among.__name__
    'copies_among'
    """
    train = images_of(reference.name, "train").images
    x = as_data(torch.cat([*sets]), reference.network.side, reference.levels)
    return copied(x, train, reference.radius)


def measure_bits(
    model: UNet,
    schedule: Schedule,
    prediction: str,
    reference: Reference,
    options: argparse.Namespace,
) -> dict[str, float]:
    r"""The bound of a network on held-out images, the first `bits` of a random order.

    Raises ValueError if the network takes padded images; FileNotFoundError.

    >>> measure_bits.__name__
    'measure_bits'
    """
    if model.config.image_size != reference.network.side:
        raise ValueError("the network takes padded images, whose bits would count")
    images = images_of(reference.name, "test").images
    n = len(images) if options.full else min(options.bits, len(images))
    generator = stream(options.seed, "bits", 0)
    chosen = images[torch.randperm(len(images), generator=generator)[:n]]

    def guess(x_t: Tensor, t: Tensor) -> Tensor:
        return to_x_0(schedule, x_t, t, model(x_t, t), prediction)

    found = stratified_bits(
        fixed_variance(guess, schedule, options.variance or "fixed_small", clip=True),
        schedule,
        chosen.to(schedule.beta.device),
        levels=reference.levels,
        count=None if options.full else options.strata,
        generator=generator,
    )
    error = found.standard_error.item()
    return {"value": found.value.item(), "standard_error": error, "images": n}


def attempt(action: Callable[[], Any]) -> Any:
    r"""What the action returns; where it cannot be done, a sentence that says why.

    >>> attempt(lambda: images_of("mnist", "test"))[:27]
    'not measured: name must be '
    """
    try:
        return action()
    except (ValueError, OSError) as error:
        return "not measured: " + str(error).split(". Tried")[0].splitlines()[0]


# --- book/workshop/command_line.ipynb · command-line-export-evaluate-main · ...
def measured(
    sets: Sequence[Tensor],
    loaded: tuple[UNet, Schedule, dict[str, Any]] | None,
    options: argparse.Namespace,
    blank: Tensor | None = None,
) -> dict[str, Any]:
    r"""All results: samples of one or more seeds, and the network if there is one.

    `blank`: samples of an untrained network.

    >>> measured.__name__
    'measured'
    """
    name = options.reference or reference_name(sets[0].shape[-1])
    reference, n = load_reference(name), len(sets[0])
    seeds = tuple(range(options.seed, options.seed + len(sets)))
    features = [sample_features(x, reference) for x in sets]
    pairs = zip(features, seeds, strict=True)
    each = [feature_quality(f, reference, s)._asdict() for f, s in pairs]
    found: dict[str, Any] = {
        "samples": mean_of(each),
        "real": feature_quality(reference.train[:n], reference)._asdict(),
        "each seed": each,
        "standing": mean_of([standing(f, reference)._asdict() for f in features]),
        "copies": attempt(lambda: copies_among(sets, reference)),
    }
    if blank is not None:
        found["untrained"] = quality(blank, reference, options.seed)._asdict()
    sampler, steps, averaged = f"file {options.file}", None, None
    if loaded is not None:
        model, schedule, card = loaded
        own = [f"{k} {v}" for k, v in sample.own_options(options).items()]
        sampler, steps = ", ".join([options.sampler, *own]), sample.steps_of(options)
        averaged = card.get("training", {}).get("ema_decay") is not None
        arguments = (model, schedule, card["prediction"], reference, options)
        if options.full or options.bits:
            found["bits"] = attempt(lambda: measure_bits(*arguments))
    against = f"{name}, {len(reference.test):,} test images"
    spread = spread_over([q["frechet"] for q in each])
    how = Protocol(n, against, sampler, steps, averaged, seeds, spread)
    return {"protocol": how.facts(), "card": str(how), **found}


ROWS = {
    "frechet": "Fréchet distance to the test images",
    "frechet_train": "Fréchet distance to the training images",
    "kernel": "kernel distance to the test images",
    "inception": "Inception-type score",
    "precision": "precision",
    "recall": "recall",
}


def report(results: dict[str, Any]) -> str:
    r"""The results as a table, and below it the protocol.

    >>> report.__name__
    'report'
    """
    columns = [c for c in ("samples", "real", "untrained") if c in results]
    lines = [f"{'':41}{''.join(f'{c:>10}' for c in columns)}"]
    for key, text in ROWS.items():
        row = [f"{results[column][key]:10.4g}" for column in columns]
        lines.append(f"{text:41}{''.join(row)}")
    for key in ("precision", "recall"):
        ratio = results["standing"][f"{key}_ratio"]
        text = f"{key} over that of real images"
        lines.append(f"{text:41}{ratio:10.3g}  {verdict(f'{key}_ratio', ratio)}")
    copies, bits = results["copies"], results.get("bits")
    if not isinstance(copies, str):
        copies = f"{copies:10.2%}  {verdict('copies', copies)}; 1.00% expected"
    lines.append(f"{'copies of training images':41}{copies}")
    if bits is not None:
        if not isinstance(bits, str):
            error = f"+- {bits['standard_error']:.2g}"
            bits = f"{bits['value']:10.4g} {error}, {bits['images']} held-out images"
        lines.append(f"{'bits per dimension, at most':41}{bits}")
    return "\n".join([*lines, results["card"]])


def main(arguments: Sequence[str] | None = None) -> None:
    r"""The command `python -m ddpm_core.evaluate`: draw, measure, report.

    Leaves with a message (SystemExit) when something is wrong.

    >>> main(["--help"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    options = settled(read_options(parser(), arguments))
    try:
        check_options(options)
        processes, device = join(options.device, options.expect_processes)
        loaded, blank = None, None
        if options.file is not None:
            sets = [read_samples(options.file)]
        else:
            loaded = sample.load(options.weights, device)
            reference_name(loaded[0].config.image_size)
            sets = sampled(loaded, options, processes)
        if loaded is not None and options.untrained:
            once = argparse.Namespace(**{**vars(options), "seeds": 1})
            blank = sampled(untrained(loaded, options.seed), once, processes)[0]
        if processes.rank == 0:
            results = measured(sets, loaded, options, blank)
            print(report(results))
            if options.out is not None:
                text = json.dumps({**results, "options": vars(options)}, default=str)
                write_atomically(options.out, (text + "\n").encode())
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def sampled(
    loaded: tuple[UNet, Schedule, dict[str, Any]],
    options: argparse.Namespace,
    processes: Processes,
) -> list[Tensor]:
    r"""Samples [n, C, H, W] of each seed, in every process.

    >>> sampled.__name__
    'sampled'
    """
    model, schedule, card = loaded
    short = sample.shortened(schedule, sample.steps_of(options))
    shape = model.config.in_channels, *[model.config.image_size] * 2
    found = []
    for seed in range(options.seed, options.seed + options.seeds):
        again = argparse.Namespace(**{**vars(options), "seed": seed})
        found.append(
            sample.draw(model, short, shape, again, card["prediction"], processes)
        )
    return found


if __name__ == "__main__":
    main()
