"""Files: written whole or not at all, damage found, nothing run by reading."""

import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_core import files
from ddpm_core.unet import UNET_CONFIGS, UNet

KINDS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
CARD = {"schedule": {"name": "cosine", "T": 50}, "prediction": "eps"}


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 1)])
def test_round_trip(tmp_path, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, shape, generator=generator).to(dtype)
    files.save_tensors(tmp_path / "x", {"x": x}, {"a": "ä\n"})
    tensors, metadata = files.load_tensors(tmp_path / "x")
    assert torch.equal(tensors["x"], x)
    assert tensors["x"].dtype == dtype
    assert tensors["x"].shape == x.shape
    assert metadata["a"] == "ä\n"


def test_strided_and_shared_tensors_are_saved_plainly(tmp_path):
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    layouts = {
        "last": x.contiguous(memory_format=torch.channels_last),
        "turned": x.transpose(1, 3),
        "shared": x[:, :1],
        "shared too": x[:, :1],
        "parameter": torch.nn.Parameter(x),
    }
    files.save_tensors(tmp_path / "x", layouts)
    tensors, _ = files.load_tensors(tmp_path / "x")
    for name, layout in layouts.items():
        assert torch.equal(tensors[name], layout)


def test_others_can_read_it(tmp_path):
    files.save_tensors(tmp_path / "x", {"x": torch.ones(2)}, {"step": "1"})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x")["x"], torch.ones(2))


@given(bit=st.integers(0, 10**9))
def test_every_flipped_bit_is_found(bit):
    tensors = {"weight": torch.arange(6.0), "n": torch.tensor(7)}
    strings = {"step": "7"}
    strings["sha256"] = files.digest(tensors, strings)
    content = bytearray(safetensors.torch.save(tensors, metadata=strings))
    assert files.read_tensors(bytes(content), "here")[1] == strings
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="here"):
        files.read_tensors(bytes(content), "here")


@given(length=st.integers(0, 10**9))
def test_every_cut_is_found(length):
    tensors = {"weight": torch.arange(6.0)}
    strings = {"sha256": files.digest(tensors, {})}
    content = safetensors.torch.save(tensors, metadata=strings)
    with pytest.raises(ValueError, match="here"):
        files.read_tensors(content[: length % len(content)], "here")


@pytest.mark.parametrize("junk", [b"", b"\x00", b"\xff" * 99, b"PK\x03\x04" * 9])
def test_junk_is_refused(tmp_path, junk):
    (tmp_path / "x").write_bytes(junk)
    with pytest.raises(ValueError, match="no whole safetensors file"):
        files.load_tensors(tmp_path / "x")


class Trap:
    def __reduce__(self):
        return (os._exit, (3,))


def test_a_pickle_is_refused_and_not_run(tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="no whole safetensors file"):
        files.load_tensors(tmp_path / "x")


def test_a_file_without_digest_is_refused(tmp_path):
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "x")
    with pytest.raises(ValueError, match="save_tensors did not write it"):
        files.load_tensors(tmp_path / "x")


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"tensors\['x'\]"):
        files.save_tensors(tmp_path / "x", {"x": [1.0]})
    with pytest.raises(ValueError, match="metadata"):
        files.save_tensors(tmp_path / "x", {}, {"step": 7})
    with pytest.raises(ValueError, match="metadata"):
        files.save_tensors(tmp_path / "x", {}, {"sha256": "0"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["fsync", "replace", "write"])
def test_a_crash_leaves_the_last_good_file(tmp_path, monkeypatch, where):
    path = tmp_path / "x"
    files.write_atomically(path, b"old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    if where == "write":
        monkeypatch.setattr(os, "fdopen", crash)
    else:
        monkeypatch.setattr(os, where, crash)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_order_is_write_sync_rename_sync(tmp_path, monkeypatch):
    calls = []

    def record(name, real):
        def run(*args):
            calls.append(name)
            return real(*args)

        return run

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, record(name, getattr(os, name)))
    files.write_atomically(tmp_path / "x", b"new")
    expected = ["fsync", "replace", "fsync"]
    assert calls == (expected if os.name == "posix" else expected[:2])


def test_a_file_in_use_is_tried_again(tmp_path, monkeypatch):
    path, tries, real = tmp_path / "x", [], os.replace

    def busy(a, b):
        tries.append(a)
        if len(tries) < 3:
            raise PermissionError("in use")
        real(a, b)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert len(tries) == 3
    monkeypatch.setattr(
        os, "replace", lambda a, b: (_ for _ in ()).throw(PermissionError)
    )
    with pytest.raises(PermissionError):
        files.write_atomically(path, b"newer")
    assert path.read_bytes() == b"new"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    def refuse(*_: object) -> int:
        raise PermissionError("not a file")

    monkeypatch.setattr(os, "open", refuse)
    files.sync_folder(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions_are_those_of_any_new_file(tmp_path):
    files.write_atomically(tmp_path / "x", b"")
    (tmp_path / "y").write_bytes(b"")
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in "xy"]
    assert modes[0] == modes[1]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_atomically(tmp_path / "no" / "x", b"")


def net(seed: int = 0) -> UNet:
    generator = torch.Generator().manual_seed(seed)
    model = UNet(UNET_CONFIGS["digits"], generator)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    return model


def test_a_model_goes_round(tmp_path):
    model, path = (
        net().to(memory_format=torch.channels_last),
        tmp_path / "m.safetensors",
    )
    model.train()
    card = files.save_model(path, model, {**CARD, "data": "none"})
    assert model.training
    other, schedule, read = files.load_model(path)
    assert read == json.loads(path.with_suffix(".json").read_text()) == card
    assert read["data"] == "none"
    assert read["parameters"] == sum(p.numel() for p in model.parameters())
    assert (schedule.name, schedule.T) == ("cosine", 50)
    assert not other.training
    for a, b in zip(
        model.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_a_model_goes_round_in_half_the_bytes(tmp_path):
    model = net().to(memory_format=torch.channels_last)
    paths = [tmp_path / f"{bits}.safetensors" for bits in (32, 16)]
    files.save_model(paths[0], model, CARD)
    card = files.save_model(paths[1], model, CARD, torch.float16)
    assert card["dtype"] == "float16"
    assert paths[1].stat().st_size < 0.52 * paths[0].stat().st_size
    (stored,) = files.load_tensors(paths[1])[0].values()
    assert stored.dtype == torch.float16
    assert stored.numel() == card["parameters"]
    other, _, read = files.load_model(paths[1])
    assert read == card
    for (name, a), b in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert b.dtype == torch.float32
        assert torch.equal(b, a.half().float()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_packed_tensors_come_back_in_their_shapes(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"b": (2, 3, 1), "a": (), "ä": (0,), "c.d": (4,)}
    tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    tensors["turned"] = tensors["b"].transpose(0, 1)
    files.save_tensors(tmp_path / "x", *files.pack(tensors, dtype))
    found = files.unpack(*files.load_tensors(tmp_path / "x"))
    assert [*found] == [*tensors]
    for name, x in tensors.items():
        assert torch.equal(found[name], x.to(dtype)), name
    assert files.unpack(tensors, {}) == tensors


def test_what_cannot_be_packed_or_unpacked():
    with pytest.raises(ValueError, match=r"tensors\['x'\] as torch.float16"):
        files.pack({"x": torch.tensor([1.0, 7e4])}, torch.float16)
    with pytest.raises(TypeError, match=r"tensors\['n'\]"):
        files.pack({"n": torch.tensor([1])}, torch.float16)
    names = files.pack({"x": torch.ones(3)}, torch.float16)[1]
    for tensors in ({}, {"packed": torch.ones(2)}, {"packed": torch.ones(3, 1)}):
        with pytest.raises(ValueError, match=r"'packed' must be of shape \(3,\)"):
            files.unpack(tensors, names)


def test_a_card_of_other_weights_is_refused(tmp_path):
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    files.save_model(first, net(1), CARD)
    files.save_model(second, net(2), CARD)
    first.with_suffix(".json").write_bytes(second.with_suffix(".json").read_bytes())
    with pytest.raises(ValueError, match="its card"):
        files.load_model(first)


def test_bad_model_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.safetensors"):
        files.save_model(tmp_path / "m.pt", net(), CARD)
    with pytest.raises(ValueError, match="prediction"):
        files.save_model(tmp_path / "m.safetensors", net(), {"schedule": {}})
    with pytest.raises(ValueError, match="name must be one of"):
        files.load_pretrained("../../secret")


@pytest.mark.parametrize("name", files.pretrained())
def test_shipped_weights_are_whole_small_and_described(name):
    model, schedule, card = files.load_pretrained(name)
    path = Path(files.__file__).parent / "weights" / f"{name}.safetensors"
    assert path.stat().st_size <= 8_000_000
    assert sum(p.numel() for p in model.parameters()) == card["parameters"] <= 4e6
    for key in ("data", "command", "steps", "seed", "training", "figures", "licence"):
        assert key in card, key
    for key in ("schedule", "prediction", "unet", "sha256"):
        assert key in card, key
    assert card["command"].startswith("python -m ddpm_core.train OUT --data ")
    assert card["training"]["steps_done"] == card["steps"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    side = model.config.image_size
    x = torch.zeros(2, model.config.in_channels, side, side)
    assert torch.isfinite(model(x, torch.tensor([1, schedule.T]))).all()


@pytest.mark.parametrize("name", files.pretrained())
def test_the_cards_of_shipped_weights_hold_what_was_measured(name):
    card = files.load_pretrained(name)[2]
    found = card["figures"]["evaluation"]
    assert found["command"].startswith(f"python -m ddpm_core.evaluate --weights {name}")
    assert "seeds 0, 1, 2" in found["protocol"]
    distances = found["frechet"]
    assert distances["real"] < distances["samples"] < 0.2 * distances["untrained"]
    for what in ("precision", "recall"):
        of = found[what]
        assert of["ratio"] == pytest.approx(of["samples"] / of["real"], rel=2e-3)
        assert of["ratio"] >= of["at least"] == 0.75
    assert found["copies"]["share"] <= found["copies"]["at most"] == 0.03
    assert found["bits"]["images"] >= 256


def test_nothing_of_ours_reads_or_writes_pickles():
    package = Path(files.__file__).parent
    for module in package.glob("*.py"):
        text = module.read_text(encoding="utf-8")
        for word in ("import pickle", "torch.save(", "torch.load(", "joblib"):
            assert word not in text, (module.name, word)
