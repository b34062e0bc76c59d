"""The feature network: what ships, what it knows, how it is trained and stored."""

import json
from pathlib import Path

import pytest
import torch

from ddpm_core import data, features, metrics
from ddpm_core.training import stream

WEIGHTS = Path(features.__file__).parent / "weights" / "features"


@pytest.fixture(scope="module")
def fashion():
    return features.load_reference("fashion-mnist")


@pytest.fixture(scope="module")
def digits():
    return features.load_reference("digits")


def card(name):
    return json.loads((WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", features.RECIPES)
def test_each_network_ships_with_its_card(name):
    told, network = card(name), features.load_features(name)
    assert told["parameters"] == sum(p.numel() for p in network.parameters())
    recipe = features.RECIPES[name]._asdict()
    assert told["recipe"] == json.loads(json.dumps(recipe))
    assert told["command"] == f"python -m ddpm_core.features {name} OUT"
    assert told["sha256"] == features.shipped(name)[1]["sha256"]
    assert told["figures"]["accuracy on the test images"] > 0.92
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_what_ships_is_small():
    sizes = {path.name: path.stat().st_size for path in WEIGHTS.iterdir()}
    assert sizes["fashion-mnist.safetensors"] + sizes["digits.safetensors"] < 1e6
    assert sizes["fashion-mnist-reference.safetensors"] < 3e6


def test_the_digits_network_names_held_out_digits():
    found = features.accuracy(features.load_features("digits"), data.digits("test"))
    told = card("digits")["figures"]["accuracy on the test images"]
    assert found == pytest.approx(told, abs=0.005)


@pytest.mark.data
def test_the_fashion_network_and_its_reference_are_those_of_the_data(fashion):
    test = data.fashion_mnist("test")
    told = card("fashion-mnist")["figures"]["accuracy on the test images"]
    assert features.accuracy(fashion.network, test) == pytest.approx(told, abs=1e-3)
    found = features.features_of(fashion.network, test.images[:300])
    torch.testing.assert_close(fashion.test[:300], found, atol=2e-3, rtol=2e-3)
    train = data.fashion_mnist("train").images
    order = torch.randperm(60_000, generator=stream(0, "reference", 0))
    found = features.features_of(fashion.network, train[order[:300]])
    torch.testing.assert_close(fashion.train[:300], found, atol=2e-3, rtol=2e-3)
    near = metrics.nearest_neighbours(test.images[:500], train).distance
    share = (near < fashion.radius).double().mean().item()
    assert 0.002 < share < 0.03


def test_the_shipped_reference(fashion):
    assert fashion.test.shape == fashion.train.shape == (10_000, 64)
    assert fashion.train_moments.size == 60_000
    assert fashion.train_moments.covariance.dtype == torch.float64
    of_part = metrics.moments(fashion.train)
    apart = metrics.frechet_distance(fashion.train_moments, of_part)
    total = of_part.covariance.trace().item()
    assert apart < 0.01 * total
    with torch.no_grad():
        sure = fashion.network.head(fashion.test).softmax(1).max(1).values
    assert sure.mean() > 0.85  # the head belongs to these features


def test_the_digits_reference_is_computed(digits):
    assert digits.test.shape == (500, 64)
    assert digits.train_moments.size == 1297
    test, train = (data.digits(split).images for split in ("test", "train"))
    near = metrics.nearest(test, train)
    assert (near < digits.radius).double().mean() == pytest.approx(0.01, abs=0.002)


def test_features_do_not_depend_on_the_batch(digits):
    x = data.digits("test").images[:20]
    one = features.features_of(digits.network, x, batch=20)
    torch.testing.assert_close(one, features.features_of(digits.network, x, batch=7))


def test_training_is_a_function_of_the_seed_and_learns():
    images = data.digits("train")
    recipe = features.RECIPES["digits"]._replace(cycles=((4, 5e-3),))
    torch.manual_seed(1)
    first = features.learn(images, recipe, seed=3)
    torch.manual_seed(2)
    again = features.learn(images, recipe, seed=3)
    for a, b in zip(
        first.state_dict().values(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert features.accuracy(first, data.digits("test")) > 0.9
    other = features.learn(images, recipe._replace(cycles=((1, 5e-3),)), seed=4)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_copies_for_training_are_mirrored_and_moved():
    recipe = features.RECIPES["fashion-mnist"]._replace(shift=2)
    x = torch.full((64, 1, 28, 28), -1.0)
    x[:, :, 10, 5] = 1
    moved = features.jittered(x, recipe, torch.Generator().manual_seed(0))
    places = {tuple(place) for place in (moved[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert len(places) == 2  # mirrored or not, all moved alike
    assert {abs(column - 13.5) for _, column in places} <= {k + 0.5 for k in range(15)}
    assert moved.shape == x.shape


def test_the_command_trains_and_writes(tmp_path, capsys):
    features.main(["digits", str(tmp_path / "out"), "--epochs", "2"])
    assert "named rightly" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert told["recipe"]["cycles"] == [[2, 5e-3]]
    assert (tmp_path / "out" / "digits.safetensors").exists()


def test_a_reference_is_stored_and_small(tmp_path, fashion, monkeypatch):
    features.save_features(tmp_path, fashion, {"name": "fashion-mnist"})
    for name in ("fashion-mnist", "fashion-mnist-reference"):
        stored = (tmp_path / f"{name}.safetensors").read_bytes()
        assert stored == (WEIGHTS / f"{name}.safetensors").read_bytes()


def test_a_data_set_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_DATA", str(tmp_path))
    monkeypatch.setattr(data, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")
    with pytest.raises(SystemExit, match="error: data set 'fashion_mnist'"):
        features.main(["fashion-mnist", str(tmp_path / "out")])
    assert features.load_reference("fashion-mnist").test.shape == (10_000, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: features.FeatureNetwork(2), "side"),
        (lambda: features.FeatureNetwork(8)(torch.zeros(1, 1, 28, 28)), "x"),
        (lambda: features.load_features("cifar10"), "name"),
        (lambda: features.load_reference("mnist"), "name"),
        (lambda: features.images_of("cifar10", "test"), "name"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
