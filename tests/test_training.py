"""Training: randomness as a function, resume bit for bit, accumulation, modes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_core import training
from ddpm_core.files import load_tensors
from ddpm_core.losses import simple_loss
from ddpm_core.process import q_sample
from ddpm_core.schedules import cosine, linear
from ddpm_core.training import TrainConfig, Trainer, batch_indices, draws
from ddpm_core.unet import UNet, UNetConfig

SMALL = UNetConfig(4, 1, 1, 4, (1, 2), 1, (2,), groups=2, dropout=0.3)
CONFIG = TrainConfig(steps=6, batch_size=8, lr=1e-2, warmup=2, decay="linear", seed=3)


def net(config: UNetConfig = SMALL, dtype: torch.dtype = torch.float32) -> UNet:
    """A network that is not zero anywhere."""
    generator = torch.Generator().manual_seed(0)
    model = UNet(config, generator).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(dtype))
    return model


def pictures(n: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 4, 4, generator=generator).mul(2).sub(1).to(dtype)


def trainer(config: TrainConfig = CONFIG, shape: UNetConfig = SMALL) -> Trainer:
    return Trainer(net(shape), cosine(20), pictures(), config)


def everything(run: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in training.checkpoint_tensors(run).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def finish(run: Trainer) -> dict[str, torch.Tensor]:
    for _ in run.steps():
        pass
    return everything(run)


# Randomness is a function of (seed, step) and of the place in the batch


@given(
    n=st.integers(1, 40),
    size=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    epochs=st.integers(1, 4),
)
def test_every_epoch_holds_each_image_once(n, size, seed, epochs):
    config = TrainConfig(steps=1, batch_size=size, seed=seed)
    steps = math.ceil(epochs * n / size)
    order = torch.cat([batch_indices(config, k, n) for k in range(1, steps + 1)])
    for epoch in order[: epochs * n].reshape(epochs, n):
        assert epoch.sort().values.tolist() == list(range(n))


def test_epochs_and_seeds_differ():
    config = TrainConfig(steps=1, batch_size=50)
    first, second = batch_indices(config, 1, 50), batch_indices(config, 2, 50)
    assert not torch.equal(first, second)
    other = batch_indices(replace(config, seed=1), 1, 50)
    assert not torch.equal(first, other)


def test_draws_are_a_function_of_seed_and_step():
    a, b = (
        draws(CONFIG, cosine(20), 4, (1, 4, 4)),
        draws(CONFIG, cosine(20), 4, (1, 4, 4)),
    )
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for other in (
        draws(CONFIG, cosine(20), 5, (1, 4, 4)),
        draws(replace(CONFIG, seed=4), cosine(20), 4, (1, 4, 4)),
    ):
        assert not torch.equal(a.eps, other.eps)


def test_streams_are_unrelated():
    seeds = {
        training.stream_seed(seed, name, k)
        for seed in range(20)
        for name in ("t", "eps", "flip", "order")
        for k in range(20)
    }
    assert len(seeds) == 20 * 4 * 20
    assert all(0 <= s < 2**63 for s in seeds)


def test_t_covers_every_step_evenly():
    schedule = linear(25)
    config = TrainConfig(steps=1, batch_size=1000)
    t = torch.cat([draws(config, schedule, k, (1,)).t for k in range(1, 101)])
    counts = torch.bincount(t, minlength=26).double()
    assert counts[0] == 0
    assert len(counts) == 26
    chi_squared = ((counts[1:] - 4000) ** 2 / 4000).sum()
    assert 5 < chi_squared < 60  # 24 degrees of freedom: mean 24, deviation 7


def test_eps_is_standard_normal_and_flips_are_fair():
    config = TrainConfig(steps=1, batch_size=4000, flip=True)
    drawn = draws(config, linear(25), 1, (1, 5, 5))
    assert drawn.eps.mean().abs() < 5 / math.sqrt(1e5)
    assert (drawn.eps.var() - 1).abs() < 5 * math.sqrt(2 / 1e5)
    assert abs(drawn.flip.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(4000)
    assert not draws(replace(config, flip=False), linear(25), 1, (1,)).flip.any()


def test_flip_mirrors_left_and_right():
    config = replace(CONFIG, flip=True, batch_size=64, accumulate=1)
    run, seen = trainer(config), []
    run.losses = lambda x_0, t, eps: (
        seen.append(x_0) or run.model(x_0, t).mean((1, 2, 3))
    )
    run.one_step()
    which = batch_indices(config, 1, 5)
    flip = draws(config, run.schedule, 1, (1, 4, 4)).flip
    expected = [
        x.flip(-1) if f else x for x, f in zip(run.images[which], flip, strict=True)
    ]
    assert torch.equal(seen[0], torch.stack(expected))


# One step


def test_one_step_is_algorithm_1_written_out():
    shape = replace(SMALL, dropout=0.0)
    images = pictures(dtype=torch.float64)
    run = Trainer(net(shape, torch.float64), cosine(20), images, CONFIG)
    model = net(shape, torch.float64)
    run.one_step()
    x_0 = images[batch_indices(CONFIG, 1, 5)]
    t, eps, _ = draws(CONFIG, cosine(20), 1, (1, 4, 4))
    x_t = q_sample(cosine(20), x_0, t, eps.double())
    (model(x_t, t) - eps).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert norm > 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2 / 2, foreach=False)
    optimizer.step()
    compared = 0
    for a, b in zip(run.model.parameters(), model.parameters(), strict=True):
        real = b.grad.abs() > 1e-9  # elsewhere Adam divides rounding by rounding
        torch.testing.assert_close(a[real], b[real], atol=1e-9, rtol=0)
        compared += int(real.sum())
    assert compared > 1000


def test_progress_says_what_happened():
    run = trainer()
    first, second = next(run.steps()), next(run.steps())
    assert (first.step, second.step) == (1, 2)
    assert first.loss == pytest.approx(first.losses.double().mean().item())
    assert first.losses.shape == first.t.shape == (8,)
    assert (first.lr, second.lr) == (5e-3, 1e-2)
    assert first.grad_norm > 0


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradient_is_that_of_the_whole_batch(parts):
    gradients = []
    for accumulate in (1, parts):
        config = replace(CONFIG, accumulate=accumulate)
        model = net(replace(SMALL, dropout=0.0), torch.float64)
        run = Trainer(model, cosine(20), pictures(dtype=torch.float64), config)
        run.accumulate(1)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=1e-10)


def test_accumulated_gradient_in_float32_agrees_to_1e_6():
    gradients = []
    for accumulate in (1, 4):
        run = trainer(
            replace(CONFIG, accumulate=accumulate), replace(SMALL, dropout=0.0)
        )
        run.accumulate(1)
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    scale = gradients[0].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-6 * max(scale, 1)


def test_learning_rate():
    config = TrainConfig(steps=10, lr=1.0, warmup=4, decay="linear")
    rates = [config.learning_rate(k) for k in range(1, 11)]
    expected = [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates == pytest.approx(expected)
    flat = TrainConfig(steps=10, lr=1.0, warmup=4)
    assert [flat.learning_rate(k) for k in (4, 5, 10)] == [1, 1, 1]
    assert TrainConfig(steps=3, lr=1.0).learning_rate(1) == 1


# Reproducible, resumable


def test_loaded_optimiser_state_lies_in_memory_as_the_weights_do(tmp_path):
    run, again = trainer(), trainer()
    next(run.steps())
    training.save_checkpoint(tmp_path / "c", run)
    training.load_checkpoint(tmp_path / "c", again)
    weight = again.model.conv_out.weight
    assert not weight.is_contiguous()  # channels last
    assert again.optimizer.state[weight]["exp_avg"].stride() == weight.stride()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_reproducible_bit_for_bit(accumulate):
    config = replace(CONFIG, accumulate=accumulate)
    first = finish(trainer(config))
    torch.manual_seed(999)
    torch.rand(7)
    assert same(first, finish(trainer(config)))
    assert not same(first, finish(trainer(replace(config, seed=4))))


def test_training_leaves_the_global_generator_alone():
    run = trainer()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    next(run.steps())
    assert torch.equal(torch.rand(3), expected)


@settings(max_examples=12)
@given(step=st.integers(0, 6), accumulate=st.sampled_from([1, 2]), flip=st.booleans())
def test_resuming_at_any_step_gives_the_same_bits(
    tmp_path_factory, step, accumulate, flip
):
    config = replace(CONFIG, accumulate=accumulate, flip=flip)
    whole = finish(trainer(config))
    run = trainer(config)
    for _, _ in zip(range(step), run.steps(), strict=False):
        pass
    path = tmp_path_factory.mktemp("resume") / "checkpoint"
    training.save_checkpoint(path, run)
    again = trainer(config)
    torch.manual_seed(step)
    training.load_checkpoint(path, again)
    assert again.step == step
    assert same(whole, finish(again))


def test_loading_twice_is_no_different(tmp_path):
    run = trainer()
    next(run.steps())
    training.save_checkpoint(tmp_path / "c", run)
    whole = finish(run)
    training.load_checkpoint(tmp_path / "c", run)
    assert run.step == 1
    assert same(whole, finish(run))


def test_a_checkpoint_holds_model_average_and_optimiser(tmp_path):
    run = trainer()
    next(run.steps())
    training.save_checkpoint(tmp_path / "c", run)
    tensors, metadata = load_tensors(tmp_path / "c")
    assert same(tensors, everything(run))
    assert {name.split(".")[0] for name in tensors} == {"model", "ema", "optimizer"}
    assert "checkpoint" in metadata


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("config", lambda: trainer(replace(CONFIG, lr=1e-3))),
        ("schedule", lambda: Trainer(net(), linear(40), pictures(), CONFIG)),
        ("images", lambda: Trainer(net(), cosine(20), pictures(6), CONFIG)),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, what, other):
    training.save_checkpoint(tmp_path / "c", trainer())
    with pytest.raises(ValueError, match=what):
        training.load_checkpoint(tmp_path / "c", other())


def test_a_damaged_checkpoint_is_refused_and_nothing_changes(tmp_path):
    run = trainer()
    next(run.steps())
    training.save_checkpoint(tmp_path / "c", run)
    content = bytearray((tmp_path / "c").read_bytes())
    content[-100] ^= 1
    (tmp_path / "c").write_bytes(content)
    other = trainer()
    before = everything(other)
    with pytest.raises(ValueError, match="damaged"):
        training.load_checkpoint(tmp_path / "c", other)
    assert same(before, everything(other))
    assert other.step == 0


def test_weights_are_no_checkpoint(tmp_path):
    training.save_tensors(tmp_path / "c", {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="no checkpoint"):
        training.load_checkpoint(tmp_path / "c", trainer())


# Modes


def test_breaking_off_leaves_every_mode_as_before():
    run = trainer()
    run.model.eval()
    run.model.middle_1.train()
    before = [m.training for m in run.model.modules()]
    steps = run.steps()
    next(steps)
    assert [m.training for m in run.model.modules()] == before
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    next(steps)
    steps.close()
    assert [m.training for m in run.model.modules()] == before


def test_dropout_is_on_in_training_and_off_in_measuring():
    run, modes = trainer(), []
    hook = run.model.middle_1.register_forward_pre_hook(
        lambda module, _: modes.append(module.training)
    )
    run.model.eval()
    run.one_step()
    run.model.train()
    training.loss_per_bin(run.model, run.schedule, pictures(), 2)
    hook.remove()
    assert modes == [True, False, False]
    assert run.model.training


def test_modes_come_back_after_an_exception():
    run = trainer()
    run.model.eval()
    run.losses = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.one_step()
    assert not run.model.training


# Precision


def test_precision_follows_the_device(monkeypatch):
    for amx in (True, False):
        able = {"amx_bf16": amx}
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda a=able: a, raising=False
        )
        large = training.choose_precision("cpu", weights=10**6)
        assert large == ("bf16" if amx else "fp32")
        assert training.choose_precision("cpu", weights=10**6 - 1) == "fp32"
        assert training.choose_precision("cpu") == "fp32"
        assert training.choose_precision("mps", weights=10**7) == "fp32"
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert training.choose_precision("cpu", weights=10**7) == "fp32"
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return supported.answer

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    supported.answer = True
    assert training.choose_precision("cuda") == "bf16"
    supported.answer = False
    assert training.choose_precision("cuda:1") == "fp16"
    assert asked == [False, False]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_on_a_cpu_and_keeps_float32_weights(precision, tmp_path):
    config = replace(CONFIG, precision=precision)
    run = trainer(config)
    used = []
    run.model.conv_in.register_forward_hook(lambda m, i, y: used.append(y.dtype))
    whole = finish(run)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    assert set(used) == {kinds[precision]}
    assert all(v.dtype == torch.float32 for v in run.model.state_dict().values())
    assert run.scaler.is_enabled() == (precision == "fp16")
    again = trainer(config)
    next(again.steps())
    training.save_checkpoint(tmp_path / "c", again)
    third = trainer(config)
    training.load_checkpoint(tmp_path / "c", third)
    assert third.scaler.state_dict() == again.scaler.state_dict()
    assert same(whole, finish(third))


def test_a_precision_that_was_chosen_is_kept_on_resume(tmp_path, monkeypatch):
    choice = ["bf16"]
    monkeypatch.setattr(training, "choose_precision", lambda *_: choice[0])
    whole = finish(trainer(CONFIG))
    run = trainer(CONFIG)
    next(run.steps())
    training.save_checkpoint(tmp_path / "c", run)
    choice[0] = "fp16"  # another machine
    other = trainer(CONFIG)
    training.load_checkpoint(tmp_path / "c", other)
    assert other.precision == "bf16"
    assert not other.scaler.is_enabled()
    assert same(whole, finish(other))
    asked = trainer(replace(CONFIG, precision="fp32"))
    with pytest.raises(ValueError, match="config"):
        training.load_checkpoint(tmp_path / "c", asked)


def test_losses_run_backward_on_the_meta_device():
    model = net().to("meta")
    x = torch.zeros(3, 1, 4, 4, device="meta")
    t = torch.ones(3, dtype=torch.int64, device="meta")
    simple_loss(model, cosine(20).to("meta"), x, t, x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# Loss per bin


class Off(nn.Module):
    """Predicts zero but for t above a limit, where its output is huge."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.seen = limit, []

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.seen.append(t)
        return torch.where(t > self.limit, 1000.0, 0.0).reshape(-1, 1, 1, 1) + 0 * x


def test_loss_per_bin_knows_the_bins():
    model = Off(10)
    loss = training.loss_per_bin(model, cosine(20), torch.zeros(500, 1, 4, 4), 4)
    assert loss.shape == (4,)
    assert loss.dtype == torch.float64
    assert loss[:2].sub(1).abs().max() < 5 * math.sqrt(2 / 8000)
    assert loss[2:].min() > 1e5
    for place, t in enumerate(model.seen):
        assert set(t.tolist()) == set(range(1 + 5 * place, 6 + 5 * place))


def test_loss_per_bin_repeats_its_draws():
    args = (net(), cosine(20), pictures(), 4)
    assert torch.equal(training.loss_per_bin(*args), training.loss_per_bin(*args))
    other = training.loss_per_bin(*args, seed=1)
    assert not torch.equal(training.loss_per_bin(*args), other)
    with pytest.raises(ValueError, match="bins = 3"):
        training.loss_per_bin(net(), cosine(20), pictures(), 3)


# Bad input


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("batch_size", 0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("warmup", -1),
        ("warmup", 7),
        ("decay", "cosine"),
        ("clip_norm", -1.0),
        ("accumulate", 3),
        ("accumulate", 0),
        ("prediction", "noise"),
        ("precision", "fp8"),
        ("seed", 0.5),
    ],
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        replace(CONFIG, **{name: value})


def test_impossible_images_are_refused():
    with pytest.raises(ValueError, match="images"):
        Trainer(net(), cosine(20), pictures() + 2, CONFIG)
    with pytest.raises(TypeError, match="images"):
        Trainer(net(), cosine(20), pictures().to(torch.uint8), CONFIG)
    with pytest.raises(ValueError, match="step"):
        batch_indices(CONFIG, 0, 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_crash_of_the_numbers_stops_before_anything_changes(bad, where, precision):
    config = replace(CONFIG, precision=precision, steps=30)
    run = trainer(config)
    next(run.steps())
    before, real = everything(run), run.losses

    def losses(x_0, t, eps):
        found = real(x_0, t, eps)
        if where == "loss":
            return found + bad
        found.register_hook(lambda gradient: gradient + bad)
        return found

    run.losses = losses
    if (where, precision) == ("gradient", "fp16"):
        # GradScaler leaves out such a step, and its factor falls until it is below 1
        for _ in run.steps():
            if run.scaler.get_scale() < 1:
                break
        with pytest.raises(FloatingPointError, match="length of the gradient"):
            run.one_step()
        return
    with pytest.raises(FloatingPointError, match=r"step 2: .* of step 1\. Try a lower"):
        run.one_step()
    assert run.step == 1
    assert same(before, everything(run))
    assert all(p.grad is None for p in run.model.parameters())
    run.losses = real
    assert same(finish(run), finish(trainer(config)))


def test_a_copied_trainer_goes_its_own_way():
    run = trainer()
    other = copy.deepcopy(run.model)
    run.one_step()
    assert not torch.equal(run.model.conv_out.weight, other.conv_out.weight)
