"""The benchmark of trainers: the wrapping of the peers, the budget, table and verdict."""

import inspect
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quality
import results
import trainers
from networks import CONFIGS

from ddpm_core import train
from ddpm_core.features import load_reference
from ddpm_core.files import save_tensors
from ddpm_core.sample import shortened
from ddpm_core.samplers import ancestral, ddim, last
from ddpm_core.schedules import cosine, respace
from ddpm_core.unet import UNET_CONFIGS

PEER = "denoising_diffusion_pytorch"
STEPS = (1000, 500, 2)


class Dummy(nn.Module):
    """A network whose answer depends on t so much that no other t will do."""

    channels = out_dim = 1
    self_condition = False

    def forward(self, x: Tensor, t: Tensor, x_self_cond: None = None) -> Tensor:
        at_t = t.double().sin().to(x.dtype).reshape(-1, 1, 1, 1)
        return at_t * x + at_t.square() / 2


def noise(n: int = 2) -> Tensor:
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(3))


def our_step(one: trainers.Denoiser, x_t: Tensor, t: int) -> Tensor:
    """One step of Algorithm 2 from t to t - 1, with the posterior's variance."""
    upto = respace(one.schedule, range(1, t + 1))
    generator = torch.Generator().manual_seed(5)
    how: dict[str, Any] = {"prediction": one.prediction, "variance": "fixed_small"}
    return next(ancestral(one.model, upto, x_t, generator=generator, **how)).x


def our_ddim(one: trainers.Denoiser) -> Tensor:
    short = shortened(one.schedule, 20)
    return last(ddim(one.model, short, noise(), prediction=one.prediction))


@pytest.fixture
def tutorial() -> trainers.Denoiser:
    _, found = trainers.tutorial_denoiser({})
    return found._replace(model=trainers.FromZero(Dummy()))


@pytest.mark.parametrize("t", STEPS)
def test_a_step_of_ddpm_is_that_of_diffusers(t: int, tutorial: Any) -> None:
    x_t, scheduler = noise(), trainers.noise_scheduler()
    y = Dummy()(x_t, torch.full((2,), t - 1))
    generator = torch.Generator().manual_seed(5)
    theirs = scheduler.step(y, t - 1, x_t, generator=generator).prev_sample
    torch.testing.assert_close(our_step(tutorial, x_t, t), theirs, rtol=0, atol=1e-4)


def test_twenty_steps_of_ddim_are_those_of_diffusers(tutorial: Any) -> None:
    from diffusers import DDIMScheduler

    config = trainers.noise_scheduler().config
    scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    x = noise()
    for t in scheduler.timesteps:
        y = Dummy()(x, t.expand(2))
        x = scheduler.step(y, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(our_ddim(tutorial), x, rtol=0, atol=1e-4)


def test_the_networks_of_diffusers_are_asked_for_t_from_zero() -> None:
    network = trainers.tutorial_network().eval()
    x, t = noise(1), torch.tensor([7])
    with torch.no_grad():
        assert torch.equal(
            trainers.FromZero(network)(x, t), network(x, torch.tensor([6])).sample
        )


@pytest.fixture
def lucid() -> trainers.Denoiser:
    pytest.importorskip(PEER)
    _, found = trainers.their_denoiser({})
    return found._replace(model=trainers.FromZero(Dummy()))


@pytest.mark.parametrize("t", STEPS)
def test_a_step_of_ddpm_is_that_of_the_pytorch_peer(t: int, lucid: Any) -> None:
    x_t, diffusion = noise(), trainers.their_diffusion(Dummy())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs, _ = diffusion.p_sample(x_t.clone(), t - 1)
    torch.testing.assert_close(our_step(lucid, x_t, t), theirs, rtol=0, atol=1e-4)


def test_twenty_steps_of_ddim_are_those_of_the_pytorch_peer(
    lucid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusion = trainers.their_diffusion(Dummy(), sampling_timesteps=20)
    own = torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda *a, **k: noise() if len(a) == 1 else own(*a, **k)
    )
    theirs = diffusion.ddim_sample((2, 1, 28, 28)) * 2 - 1
    monkeypatch.undo()
    torch.testing.assert_close(our_ddim(lucid), theirs, rtol=0, atol=1e-4)


def test_settings_are_the_defaults_of_the_pytorch_peer() -> None:
    peer = pytest.importorskip(PEER)
    departed = {
        "Unet": {"dim", "dim_mults", "channels"},
        "GaussianDiffusion": {"image_size"},
        "Trainer": {"calculate_fid", "save_and_sample_every"},
    }
    ours = (trainers.UNET, trainers.DIFFUSION, trainers.TRAINER)
    for (name, free), settings in zip(departed.items(), ours, strict=True):
        theirs = inspect.signature(getattr(peer, name)).parameters
        kept = {key: theirs[key].default for key in settings if key not in free}
        assert kept == {k: v for k, v in settings.items() if k not in free}
    assert trainers.their_diffusion(Dummy()).objective == "pred_v"


def fake_time(step: float = 1.0) -> Callable[[], float]:
    count = itertools.count()
    return lambda: step * next(count)


def test_the_clock_stops_at_the_budget() -> None:
    clock = trainers.Clock(2.5, now=fake_time())
    clock.start()
    assert [clock.tick() for _ in range(3)] == [True, True, False]
    assert (clock.steps, clock.spent) == (3, 3.0)
    clock = trainers.Clock(0.5, at_least=2, now=fake_time())
    clock.start()
    assert [clock.tick() for _ in range(2)] == [True, False]


def test_the_clock_counts_what_this_process_computes() -> None:
    clock = trainers.Clock(60.0)
    clock.start()
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    assert clock.tick()
    assert 0 < clock.spent < 30


def test_steps_are_the_budget_over_the_mean_cost_without_the_first() -> None:
    cost = trainers.step_seconds([0.0, 50.0, 60.0, 61.0, 64.0], skip=2)
    assert cost == 2.0
    assert trainers.planned_steps(cost, 9.0) == 4
    assert trainers.planned_steps(cost, 1.0) == 1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """Few images, and networks that take no time."""
    accelerate = pytest.importorskip("accelerate")
    images = torch.rand(128, 1, 28, 28).mul(255).round() / 127.5 - 1
    monkeypatch.setattr(train, "read_data", lambda *_: images)
    tiny: dict[str, Any] = {"channels": 8, "groups": 8, "channel_mult": (1, 1)}
    config = replace(trainers.CONFIG, **tiny, attention=(), blocks=1)
    monkeypatch.setattr(trainers, "CONFIG", config)
    networks = {**UNET_CONFIGS, trainers.NETWORK: config}
    monkeypatch.setattr(trainers, "UNET_CONFIGS", networks)
    monkeypatch.setattr(train, "UNET_CONFIGS", networks)
    monkeypatch.setitem(trainers.UNET, "dim", 8)
    monkeypatch.setitem(trainers.UNET, "dim_mults", (1, 1))
    reset = accelerate.state.AcceleratorState._reset_state
    reset(True)
    with torch.random.fork_rng():
        yield images
    reset(True)


@pytest.mark.parametrize("name", trainers.RUNS)
def test_a_trainer_stops_at_the_budget_or_at_its_steps(
    name: str, small: Tensor, tmp_path: Path
) -> None:
    if name == trainers.THEIRS:
        pytest.importorskip(PEER)
    for steps, budget, expected in ((50, 2.5, 3), (2, 60.0, 2)):
        run = trainers.RUNS[name](steps, tmp_path)
        clock = trainers.Clock(budget, now=fake_time())
        quality.timed(run, clock)
        assert clock.steps == expected
    weights = run.weights()
    one = trainers.denoiser(name, run.settings, weights)
    before = trainers.denoiser(name, run.settings, None).model.state_dict()
    after = one.model.state_dict()
    assert any(not torch.equal(after[k], before[k]) for k in before)
    assert quality.draw(one, 2, seed=0).isfinite().all()
    assert json.loads(json.dumps(run.settings))


def test_pictures_lose_nothing(small: Tensor, tmp_path: Path) -> None:
    peer = pytest.importorskip(f"{PEER}.{PEER}")
    trainers.write_pictures(tmp_path / "pictures")
    read = peer.Dataset(tmp_path / "pictures", 28, convert_image_to="L")
    read.paths.sort()
    found = torch.stack([read[i] for i in range(len(read))]) * 2 - 1
    torch.testing.assert_close(found, small, rtol=0, atol=1e-6)


def test_ours_is_the_command_without_flags_on_how_to_learn(
    small: Tensor, tmp_path: Path
) -> None:
    settings = trainers.our_run(1000, tmp_path).settings
    plain = train.parser().parse_args(["out"])
    assert settings["schedule"] == {"name": plain.schedule, "T": plain.T}
    for key in ("batch_size", "lr", "decay", "clip_norm", "flip", "prediction"):
        assert settings["training"][key] == getattr(plain, key)
    assert settings["training"]["warmup"] == 100


def made_up(ours: float, first: float, second: float) -> dict[str, Any]:
    rows: dict[str, Any] = {quality.REAL: {"distances": [0.1, 0.1, 0.1]}}
    figures: dict[str, Any] = dict.fromkeys(
        ("parameters", "steps", "images_seen"), 1234
    )
    figures |= dict.fromkeys(("cpu_seconds", "wall_seconds"), 60)
    for name, x in zip(quality.ORDER, (ours, first, second), strict=True):
        rows[name] = {**figures, "distances": [x - 1, x, x + 1]}
    return rows


def test_table_and_verdict() -> None:
    rows = made_up(4.0, 8.0, 5.0)
    lines = quality.table(rows).splitlines()
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3] == (
        "| ddpm_core | 1,234 | 1,234 | 1,234 | 60 | 60 | 3, 4, 5 | 4 | 1 |"
    )
    found = quality.verdict(rows)
    expected = {"better_peer": trainers.THEIRS, "ratio": 0.8, "aim": 0.8}
    assert found == expected | {"reached": True}
    assert quality.in_words(found).endswith("aim 0.8: reached")
    worse = quality.verdict(made_up(4.1, 5.0, 8.0))
    assert worse is not None
    assert (worse["better_peer"], worse["reached"]) == (trainers.TUTORIAL, False)
    assert quality.verdict({k: rows[k] for k in (*rows,)[:-1]}) is None


def nothing(x: Tensor, t: Tensor) -> Tensor:
    return 0 * x


def test_images_are_judged_by_the_reference_that_ships() -> None:
    reference = load_reference(quality.REFERENCE)
    one = trainers.Denoiser(trainers.FromZero(nothing), cosine(1000), "eps")
    sets = [quality.draw(one, 30, seed) for seed in quality.SEEDS]
    found = quality.judged(sets, reference)
    assert len(set(found["distances"])) == 3
    assert min(found["distances"]) > 10  # noise, cut to its sign
    assert [q["frechet"] for q in found["quality"]] == found["distances"]
    drawn = quality.real(torch.arange(60.0).reshape(60, 1), 60, seed=1)
    assert drawn.flatten().sort().values.tolist() == list(range(60))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark without trainings, networks and judge; what was done with it."""
    done = SimpleNamespace(launched=[], fails="", found=[])

    def launch(name: str, minutes: float, path: Path) -> None:
        if name == done.fails:
            raise KeyboardInterrupt
        done.launched.append(name)
        record = {"settings": {}, "wall_seconds": 60.0, "cpu_seconds": 60.0}
        record |= dict.fromkeys(("parameters", "steps", "images_seen"), 1)
        told = {"record": record, "made_with": quality.made_with(name, minutes)}
        path.parent.mkdir(exist_ok=True)
        words = {k: json.dumps(v) for k, v in told.items()}
        save_tensors(path, {"x": torch.ones(1)}, words)

    def write(name: str, found: dict[str, Any], *_: Any, **__: Any) -> None:
        done.found.append((name, json.loads(json.dumps(found))))

    judged = {"distances": [1.0, 2.0, 3.0]}
    monkeypatch.setattr(quality, "user_cache", lambda: tmp_path)
    monkeypatch.setattr(quality, "version", lambda name: "1")
    monkeypatch.setattr(quality, "launch", launch)
    monkeypatch.setattr(quality, "denoiser", lambda *_: None)
    monkeypatch.setattr(quality, "judge", lambda *_: judged)
    monkeypatch.setattr(quality, "judged", lambda *_: judged)
    monkeypatch.setattr(trainers, "images", lambda: torch.zeros(1, 1, 28, 28))
    monkeypatch.setattr(results, "write", write)
    return done


def test_an_interrupted_benchmark_goes_on(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fails = quality.ORDER[2]
    with pytest.raises(KeyboardInterrupt):
        quality.main([])
    assert bench.launched == [*quality.ORDER[:2]]
    name, stored = bench.found[-1]
    first = [quality.REAL, trainers.OURS, quality.UNTRAINED, trainers.TUTORIAL]
    assert (name, list(stored["rows"]), stored["verdict"]) == ("quality", first, None)
    bench.fails, bench.launched[:] = "", []
    quality.main([])
    assert bench.launched == [quality.ORDER[2]]
    assert bench.found[-1][1]["verdict"]["ratio"] == 1.0
    bench.launched.clear()
    monkeypatch.setitem(trainers.LOOP, "learning_rate", 1.0)
    quality.main([])
    assert bench.launched == [trainers.TUTORIAL]


def test_a_file_cut_short_is_not_taken_for_a_training(
    bench: Any, tmp_path: Path
) -> None:
    path = tmp_path / "quality" / f"{trainers.OURS}-20.safetensors"
    quality.main([])
    path.write_bytes(path.read_bytes()[:-1])
    bench.launched.clear()
    quality.main([])
    assert bench.launched == [trainers.OURS]


@pytest.mark.parametrize("words", [["--minutes", "1"], ["--n", "64"]])
def test_a_trial_writes_nothing(
    words: list[str], bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    quality.main(words)
    assert len(bench.launched) == 3
    assert bench.found == []
    assert "a trial: nothing is written" in capsys.readouterr().out


def test_a_training_has_its_own_process_and_says_why_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def process(command: list[str], **how: Any) -> Any:
        seen.update(how, command=command)
        return SimpleNamespace(returncode=seen.get("code", 0), stderr="no memory")

    monkeypatch.setattr(subprocess, "run", process)
    quality.launch(trainers.OURS, 20.0, tmp_path / "kept")
    assert seen["command"][1].endswith("benchmarks/quality.py")
    assert seen["command"][2:6] == ["--train", "ddpm_core", "--minutes", "20.0"]
    assert seen["env"]["OMP_NUM_THREADS"] == str(quality.THREADS)
    seen["code"] = 1
    with pytest.raises(RuntimeError, match="ddpm_core did not end:\nno memory"):
        quality.launch(trainers.OURS, 20.0, tmp_path / "kept")


def test_the_network_of_the_tutorial_is_the_one_that_is_timed() -> None:
    small = CONFIGS["small"]
    assert (trainers.CONFIG.widths, trainers.CONFIG.blocks) == (small.widths, 2)
    assert trainers.CONFIG.image_size == 28
