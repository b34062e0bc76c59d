"""Quality of samples, the bound in a few evaluations, the protocol, the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddpm_core import data, evaluate, features, files, losses, metrics
from ddpm_core.schedules import cosine, linear
from ddpm_core.training import stream
from ddpm_core.unet import UNET_CONFIGS, UNet


@pytest.fixture(scope="module")
def digits():
    return features.load_reference("digits")


@given(T=st.integers(2, 1200), count=st.integers(2, 40))
def test_stretches_cover_every_step_once(T, count):
    stretches = evaluate.strata(T, count)
    assert [t for steps in stretches for t in steps] == list(range(1, T + 1))
    assert len(stretches) <= count
    assert all(len(steps) > 0 for steps in stretches)


def test_the_bound_by_stretches_is_unbiased():
    """Against the whole bound, with a guess that does look at x_t."""
    schedule = linear(50)
    x = data.digits("test").images[:1].double().expand(600, 1, 8, 8)
    reverse = losses.fixed_variance(lambda x_t, t: 0.5 * x_t, schedule, "fixed_large")
    whole = losses.variational_bound(
        reverse,
        schedule,
        x[:100],
        levels=17,
        generator=torch.Generator().manual_seed(0),
    )
    exact = losses.bits_per_dim(whole.total, 64).mean()
    for count in (4, 12, None):
        found = evaluate.stratified_bits(
            reverse,
            schedule,
            x if count else x[:50],
            levels=17,
            count=count,
            generator=torch.Generator().manual_seed(1),
        )
        assert abs(found.value - exact) < 5 * found.standard_error + 0.005 * exact


def test_the_bound_does_not_depend_on_the_batch_when_every_step_is_taken():
    schedule = cosine(9)
    reverse = losses.fixed_variance(lambda x_t, t: 0 * x_t, schedule, "fixed_small")
    x = data.digits("test").images[:10]
    found = [
        evaluate.stratified_bits(
            reverse, schedule, x, levels=17, count=None, batch=batch
        )
        for batch in (3, 10)
    ]
    torch.testing.assert_close(found[0].value, found[1].value)
    torch.testing.assert_close(found[0].standard_error, found[1].standard_error)


def test_samples_are_rounded_cut_and_unpadded():
    x = torch.linspace(-1.3, 1.3, 2 * 12 * 12).reshape(2, 1, 12, 12)
    found = evaluate.as_data(x, 8, 17)
    assert found.shape == (2, 1, 8, 8)
    levels = (found + 1) * 8
    torch.testing.assert_close(levels, levels.round())
    inside = x[..., 2:-2, 2:-2].clamp(-1, 1)
    assert (found - inside).abs().max() <= 1 / 16 + 1e-6
    real = data.digits("test").images
    torch.testing.assert_close(evaluate.as_data(real, 8, 17), real)


def test_real_images_are_better_than_noise(digits):
    real = evaluate.feature_quality(digits.train[:500], digits)
    noise = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    bad = evaluate.quality(noise, digits)
    assert bad.frechet > 20 * real.frechet
    assert bad.kernel > 20 * abs(real.kernel)
    assert bad.precision < 0.85 < real.precision
    assert bad.recall < 0.2 < 0.7 < real.recall
    assert real.inception > 8
    images = data.digits("train").images[:500]
    by_features = evaluate.feature_quality(
        features.features_of(digits.network, images), digits
    )
    assert evaluate.quality(images, digits) == pytest.approx(by_features, rel=1e-4)


def test_a_copier_wins_against_the_training_images_only(digits):
    fashion = features.load_reference("fashion-mnist")
    copier, honest = (metrics.moments(x[:2000]) for x in (fashion.train, fashion.test))
    seen, unseen = metrics.moments(fashion.train), metrics.moments(fashion.test[2000:])
    assert metrics.frechet_distance(seen, copier) < 0.9 * metrics.frechet_distance(
        seen, honest
    )
    ratio = metrics.frechet_distance(unseen, copier)
    ratio /= metrics.frechet_distance(unseen, honest)
    assert 0.7 < ratio < 1.4
    train = data.digits("train").images
    assert metrics.copied(train[:50], train, digits.radius) == 1


def made_up(train):
    """A reference whose training features are these."""
    fashion = features.load_reference("fashion-mnist")
    return fashion._replace(train=train)


def test_samples_stand_beside_a_disjoint_half_of_the_real_images():
    """The halves, by hand, are what the definition says, and neither holds the other."""
    train = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    found = evaluate.standing(train[100:200], made_up(train[:200]))
    assert found[2:4] == metrics.precision_recall(train[:100], train[100:200])
    assert found[:2] == found[2:4]
    assert found[4:] == (1, 1)
    fewer = evaluate.standing(train[200:240], made_up(train[:200]))
    assert fewer[:2] == metrics.precision_recall(train[:40], train[200:240])
    assert fewer[2:4] == metrics.precision_recall(train[:40], train[40:80])
    more = evaluate.standing(train[100:], made_up(train[:90]))
    assert more[:2] == metrics.precision_recall(train[:45], train[100:145])
    assert more[2:4] == metrics.precision_recall(train[:45], train[45:90])


def test_what_is_missing_lowers_recall_and_garbage_lowers_precision():
    generator = torch.Generator().manual_seed(1)
    centres = 100 * torch.eye(4)

    def clouds(which, n):
        z = torch.randn(len(which) * n, 4, generator=generator)
        x = centres[which].repeat(n, 1) + z
        return x[torch.randperm(len(x), generator=generator)]

    real = made_up(clouds([0, 1, 2, 3], 400))
    half = evaluate.standing(clouds([0, 1], 400), real)
    assert half.precision_ratio > 0.95
    assert half.recall_ratio == pytest.approx(0.5, abs=0.05)
    garbage = 1e4 + torch.randn(400, 4, generator=generator)
    mixed = torch.cat([clouds([0, 1, 2, 3], 100), garbage])
    order = torch.randperm(len(mixed), generator=generator)
    worse = evaluate.standing(mixed[order], real)
    assert worse.precision_ratio == pytest.approx(0.5, abs=0.05)
    assert worse.recall_ratio > 0.9
    assert evaluate.verdict("recall_ratio", half.recall_ratio).endswith("not reached")


def test_no_real_image_near_another_gives_no_ratio():
    far = torch.cat([torch.arange(5.0), 1e3 + 10 * torch.arange(5.0)])[:, None]
    found = evaluate.standing(far[:5], made_up(far))
    assert found.real_precision == 0
    assert np.isnan(found.precision_ratio)
    assert "not reached" in evaluate.verdict("precision_ratio", found.precision_ratio)


def test_marks():
    assert evaluate.MARKS == {
        "precision_ratio": 0.75,
        "recall_ratio": 0.75,
        "copies": 0.03,
    }
    for name in ("precision_ratio", "recall_ratio"):
        assert evaluate.verdict(name, 0.75) == "at least 0.75: reached"
        assert evaluate.verdict(name, 0.7499) == "at least 0.75: not reached"
    assert evaluate.verdict("copies", 0.03) == "at most 0.03: reached"
    assert evaluate.verdict("copies", 0.031) == "at most 0.03: not reached"
    with pytest.raises(ValueError, match="name must be one of"):
        evaluate.verdict("recall", 1.0)


def test_the_protocol_says_all():
    card = evaluate.Protocol(9, "digits", "ancestral", 5, False, (3, 4), 0.25)
    for part in ("samples 9", "digits", "ancestral, 5 steps", "weights no", "3, 4"):
        assert part in str(card)
    assert "0.25" in str(card)
    assert card.facts()["seeds"] == (3, 4)
    unknown = str(evaluate.Protocol(9, "digits", "a file", None, None, (0,)))
    assert unknown.count("unknown") == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0, "x", "x", 5, True, (0,)), "samples"),
        ((9, "x", "x", 0, True, (0,)), "steps"),
        ((9, "x", "x", 5, True, ()), "spread"),
        ((9, "x", "x", 5, True, (0, 1)), "spread"),
        ((9, "x", "x", 5, True, (0,), 0.1), "spread"),
    ],
)
def test_impossible_protocols(fields, message):
    with pytest.raises(ValueError, match=message):
        evaluate.Protocol(*fields)


class Means(nn.Module):
    """A stand-in for Inception: the three mean colours of an 8-bit image."""

    num_features = 3

    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return x.double().mean((2, 3)) / 255


def test_the_published_distance_takes_bytes_in_three_colours():
    generator = torch.Generator().manual_seed(0)
    real, made = torch.rand(2, 60, 3, 4, 4, generator=generator) * 2 - 1
    found = evaluate.published_frechet(real, made, Means(), batch=25)
    both = [metrics.moments(Means()(evaluate.as_bytes(x))) for x in (real, made)]
    assert found == pytest.approx(metrics.frechet_distance(*both), abs=1e-9)
    assert evaluate.as_bytes(torch.zeros(1, 1, 1, 1)).flatten().tolist() == [128] * 3


def run(*words):
    return evaluate.main(["--device", "cpu", *map(str, words)])


def test_the_command_draws_and_measures(tmp_path, capsys):
    out = tmp_path / "found.json"
    words = "--weights digits --n 40 --steps 4 --bits 6 --strata 4 --seeds 2"
    run(*words.split(), "--untrained", "--out", out)
    said = capsys.readouterr().out
    for part in ("untrained", "precision over that of real images", "at least 0.75: "):
        assert part in said
    for part in ("Fréchet", "precision", "copies", "bits per dimension", "seeds 0, 1"):
        assert part in said
    found = json.loads(out.read_text())
    assert found["protocol"]["samples"] == 40
    assert found["protocol"]["averaged"] is True
    assert found["protocol"]["spread"] > 0
    assert len(found["each seed"]) == 2
    mean = np.mean([q["frechet"] for q in found["each seed"]])
    assert found["samples"]["frechet"] == pytest.approx(mean)
    assert found["bits"]["images"] == 6
    assert found["samples"]["frechet"] > found["real"]["frechet"]
    assert found["options"]["steps"] == 4
    assert found["untrained"]["frechet"] > found["samples"]["frechet"]
    place = found["standing"]
    ratio = place["recall"] / place["real_recall"]
    assert place["recall_ratio"] == pytest.approx(ratio)


def test_the_command_measures_a_file(tmp_path, capsys):
    x = data.digits("train").images[:60]
    files.save_tensors(tmp_path / "x.safetensors", {"samples": x})
    np.save(tmp_path / "x.npy", x.numpy())
    for suffix in ("npy", "safetensors"):
        run("--file", tmp_path / f"x.{suffix}", "--out", tmp_path / f"{suffix}.json")
    said = capsys.readouterr().out
    assert "100.00%" in said  # copies, all of them
    assert "bits" not in said
    assert "untrained" not in said
    assert "at most 0.03: not reached" in said
    one, two = (
        json.loads((tmp_path / f"{s}.json").read_text()) for s in ("npy", "safetensors")
    )
    assert one["samples"] == two["samples"]
    assert one["protocol"]["steps"] is None


def test_without_the_data_set_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DDPM_DATA", str(tmp_path))
    monkeypatch.setattr(data, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")
    np.save(tmp_path / "x.npy", np.zeros((40, 1, 32, 32), np.float32))
    run("--file", tmp_path / "x.npy")
    said = capsys.readouterr().out
    assert "not measured: data set 'fashion_mnist' was not found" in said
    assert "fashion-mnist, 10,000 test images" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give --weights"),
        ("--weights digits --file x.npy", "give --weights"),
        ("--weights cats", "weights must be one of"),
        ("--file x.npy --untrained", "--untrained needs --weights"),
        ("--file no.npy", "No such file"),
        ("--file no.png", ".npy or a .safetensors"),
        ("--weights digits --n 5", "n must be an integer of at least 30"),
        ("--weights digits --bits 1", "bits must be 0"),
        ("--weights digits --strata 1", "strata"),
        ("--weights digits --steps 999", "steps"),
        ("--weights digits --out no/such/file.json", "no folder"),
        ("--weights digits --expect-processes 2", "2 processes were expected"),
    ],
)
def test_what_the_command_refuses(words, message):
    with pytest.raises(SystemExit, match=message):
        run(*words.split())


def test_sides_that_have_no_reference():
    assert evaluate.reference_name(28) == "fashion-mnist"
    with pytest.raises(ValueError, match="side 64"):
        evaluate.reference_name(64)
    with pytest.raises(ValueError, match="squares of side 28"):
        evaluate.as_data(torch.zeros(1, 1, 27, 27), 28, 256)


def test_untrained_weights_are_those_that_a_training_starts_from():
    loaded = files.load_pretrained("digits")
    blank, schedule, card = evaluate.untrained(loaded, seed=3)
    start = UNet(UNET_CONFIGS["digits"], stream(3, "weights", 0))
    assert (schedule, card) == loaded[1:]
    assert not blank.training
    for a, b in zip(blank.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_padded_network_gets_no_bits(digits):
    model = UNet(replace(UNET_CONFIGS["digits"], image_size=12, attention=()))
    options = evaluate.parser().parse_args(["--weights", "digits"])
    with pytest.raises(ValueError, match="padded"):
        evaluate.measure_bits(model, cosine(9), "eps", digits, options)
