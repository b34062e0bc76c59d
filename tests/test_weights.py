"""From a training run to weights that ship: rounded, measured, with card and result."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_core import data, files, train
from ddpm_core.training import TrainConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import weights

OPTIONS = ["--T", "40", "--batch-size", "4", "--steps", "7", "--lr", "3e-3", "--flip"]
OPTIONS += ["--seed", "5", "--warmup", "2", "--decay", "linear", "--ema-decay", "0.5"]
PEERS = "--n 40 --sampler dpm-solver-2m --steps 2"
MEASURE = "--n 40 --steps 3 --bits 4 --strata 2 --seeds 2 --untrained"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of seven steps."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train.main([str(folder), *OPTIONS, "--device", "cpu", "--log-every", "1"])
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package and an empty folder of results; digits measured quickly."""
    package = tmp_path / "ddpm_core"
    shutil.copytree(weights.results.PACKAGE, package)
    monkeypatch.setattr(weights.results, "ROOT", tmp_path)
    monkeypatch.setattr(weights.results, "PACKAGE", package)
    monkeypatch.setattr(weights.results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(weights, "FOLDER", package / "weights")
    plan = weights.PLANS["digits"]._replace(measure=MEASURE, stored=True)
    monkeypatch.setitem(weights.PLANS, "digits", plan)
    monkeypatch.setattr(weights, "AS_PEERS", PEERS)
    script = tmp_path / "benchmarks" / "weights.py"
    monkeypatch.setattr(sys, "argv", [str(script), "digits"])
    return tmp_path


def shipped(elsewhere: Path) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    folder = elsewhere / "ddpm_core" / "weights"
    card = json.loads((folder / "digits.json").read_text(encoding="utf-8"))
    result = json.loads((elsewhere / "results" / "digits.json").read_text())
    return (folder / "digits.safetensors").read_bytes(), card, result


def test_a_run_is_shipped_and_measured_again(
    run: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights.main(["digits", "--run", str(run), "--commit", "HEAD"])
    content, card, result = shipped(elsewhere)
    assert "precision over that of real images" in capsys.readouterr().out

    path = elsewhere / "ddpm_core" / "weights" / "digits.safetensors"
    (stored,) = files.load_tensors(path)[0].values()
    assert stored.dtype == torch.float16
    model, schedule, read = files.load_model(path)
    whole = files.load_model(run / "model.safetensors")[0]
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.half().float(), b)
    assert schedule.T == 40

    assert read == card
    assert len(card["commit"]) == 40
    assert (card["steps"], card["seed"], card["dtype"]) == (7, 5, "float16")
    found = card["figures"]["evaluation"]
    assert found["protocol"].startswith("samples 40; reference digits, 500 test images")
    assert found["command"].endswith(f"evaluate --weights digits {MEASURE}")
    assert found["frechet"].keys() == {"samples", "real", "untrained"}
    assert found["recall"]["at least"] == 0.75
    ratio = found["recall"]["samples"] / found["recall"]["real"]
    assert found["recall"]["ratio"] == pytest.approx(ratio, rel=1e-3)

    assert result["run"]["step"] == [*range(1, 8)]
    assert result["measured"]["samples"]["frechet"] == found["frechet"]["samples"]
    assert result["peer"] is None
    assert result["drawn as the peers"] > 0
    assert weights.results.old() == []

    weights.main(["digits"])
    again = shipped(elsewhere)
    assert again[:2] == (content, card)
    assert {**again[2], "seconds": 0} == {**result, "seconds": 0}


def test_the_command_of_a_card_gives_the_settings_of_the_run(run: Path) -> None:
    card = json.loads((run / "model.json").read_text())
    words = weights.training_command(card, "digits").split()
    assert words[:4] == ["python", "-m", "ddpm_core.train", "OUT"]
    given = vars(train.parser().parse_args(words[3:]))
    for field in dataclasses.fields(TrainConfig):
        if field.name in given:
            assert given[field.name] == card["training"][field.name], field.name
    assert (given["network"], given["T"], given["schedule"]) == ("digits", 40, "cosine")
    card["training"]["ema_decay"] = train.build(
        train.parser().parse_args(["no/such/folder", "--steps", "7"])
    ).ema.decay
    assert "--ema-decay" not in weights.training_command(card, "digits")


def test_the_neighbours_are_the_nearest_and_drawn_from_their_pixels() -> None:
    reference = weights.load_reference("digits")
    images = data.digits("train").images
    generator = torch.Generator().manual_seed(0)
    grain = 0.1 * torch.randn(40, 1, 8, 8, generator=generator)
    grain[7] = 0  # a copy
    found = weights.neighbours((images[100:140] + grain).clamp(-1, 1), reference)
    pairs = [
        torch.tensor([[*bytes.fromhex(x)] for x in found[key]]) / 127.5 - 1
        for key in ("samples", "training images")
    ]
    assert pairs[0].shape == (10, 64)
    apart = (pairs[0] - pairs[1]).norm(dim=1).tolist()
    assert apart == pytest.approx(found["distances"], abs=0.05)
    assert apart[0] == found["distances"][0] == 0
    assert found["distances"] == sorted(found["distances"])
    assert found["distances"][-1] < found["median of test images"]


def test_the_loss_is_thinned(tmp_path: Path) -> None:
    lines = [{"step": 20 * k, "loss": float(k)} for k in range(1, 11)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert weights.curve(path, 4) == {
        "step": [60, 120, 180, 200],
        "loss": [2.0, 5.0, 8.0, 10.0],
    }
    assert weights.curve(path)["step"] == [20 * k for k in range(1, 11)]


def test_the_better_peer_is_put_beside(elsewhere: Path) -> None:
    folder = elsewhere / "results"
    folder.mkdir()
    known = {"peer": None, "drawn as the peers": 1.5, "rows": ["ä"]}
    (folder / "digits.json").write_text(json.dumps(known))
    before = (folder / "digits.json").read_bytes()
    weights.main(["digits", "--peer"])  # nothing was measured
    quality = folder / "quality.json"
    rows = {"a": {"distances": [2.0, 3.0]}, "b": {"distances": [1.0]}}
    quality.write_text(json.dumps({"rows": rows, "verdict": None}))
    weights.main(["digits", "--peer"])  # not to the end
    assert (folder / "digits.json").read_bytes() == before
    stored = {"rows": rows, "verdict": {"better_peer": "a"}, "sampler": weights.PEERS}
    quality.write_text(json.dumps(stored))
    weights.main(["digits", "--peer"])
    _, card, result = shipped(elsewhere)
    assert result["peer"] == {"name": "a", "frechet": 2.5}
    assert result["rows"] == ["ä"]
    beside = {"drawn as the peer": 1.5, "name": "a", "frechet": 2.5}
    assert card["figures"]["evaluation"]["better peer"] == beside
    stored["sampler"] = {**weights.PEERS, "steps": 50}
    quality.write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match="the peers were drawn with"):
        weights.main(["digits", "--peer"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["digits", "--run", "no-such-run", "--commit", "HEAD"],
            "no run that has ended",
        ),
        (
            ["digits", "--run", "RUN", "--commit", "no-such"],
            "'no-such' is none of this",
        ),
    ],
)
def test_what_cannot_be_shipped(
    words: list[str], message: str, run: Path, elsewhere: Path
) -> None:
    before = (elsewhere / "ddpm_core" / "weights" / "digits.json").read_bytes()
    with pytest.raises(SystemExit, match=message):
        weights.main([str(run) if word == "RUN" else word for word in words])
    assert (elsewhere / "ddpm_core" / "weights" / "digits.json").read_bytes() == before


def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--run", "x"], ["--commit", "x"]):
        with pytest.raises(SystemExit):
            weights.main(["digits", *words])
        assert "--run and --commit together" in capsys.readouterr().err


def test_a_missing_data_set_is_said_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDPM_DATA", str(tmp_path))
    monkeypatch.setattr(data, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(weights, "measure", lambda *_: pytest.fail("drawn"))
    with pytest.raises(SystemExit, match="error: data set 'fashion_mnist'"):
        weights.main(["fashion-mnist"])
