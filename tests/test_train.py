"""The commands: options, files, metrics, signals, full disks, samples."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from two_processes import stopped_after

from ddpm_core import files, sample, train, training
from ddpm_core.files import load_model, load_pretrained, load_tensors
from ddpm_core.samplers import (
    ancestral,
    ddim,
    dpm_solver_2m,
    heun,
    kept_steps,
    last,
)
from ddpm_core.schedules import cosine, linear, respace
from ddpm_core.training import Trainer

COMMON = ["--T", "50", "--batch-size", "4", "--warmup", "1", "--steps", "6"]
COMMON += ["--device", "cpu", "--save-every", "1", "--log-every", "1"]


def options(*words):
    return train.read_options(train.parser(), ["out", *words])


def checkpoint(folder):
    return load_tensors(folder / "checkpoint.safetensors")


def steps(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train.main([str(folder), *COMMON])
    return folder


def same_weights(a, b):
    one, two = checkpoint(a)[0], checkpoint(b)[0]
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# Options


def test_help_names_every_option_of_the_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name in training.TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in said
    assert "None" not in said
    assert max(map(len, said.splitlines())) <= 100


def test_defaults_are_those_of_the_settings():
    found, config = vars(options()), training.TrainConfig(steps=1)
    for name in (
        "batch_size",
        "lr",
        "decay",
        "clip_norm",
        "accumulate",
        "flip",
        "seed",
    ):
        assert found[name] == getattr(config, name)


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-3\nbatch-size: 16\nwarmup: 7\nflip: true\nfolder:\n")
    found = options("--config", str(path), "--batch-size", "32", "--no-flip")
    assert (found.lr, found.batch_size, found.warmup) == (1e-3, 32, 7)
    assert found.flip is False
    assert found.folder is None
    assert options("--config", str(path)).flip is True


def test_the_file_may_name_the_folder(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("out: runs/digits\n")
    read = train.read_options(train.parser(), ["--config", str(path)])
    assert read.out == Path("runs/digits")
    assert options("--config", str(path)).out == Path("out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "no option 'batchsize'; the nearest is 'batch_size'"),
        ("learning_rate: 3", "no option 'learning_rate'; the nearest is"),
        ("lr: fast", "argument --lr: invalid float value: 'fast'"),
        ("data: imagenet", "invalid choice: 'imagenet'"),
        ("lr: true", "argument --lr"),
        ("flip: 3", "ignored explicit argument '3'"),
        ("- lr", "must hold lines"),
        ("lr: [", "run.yaml: while parsing"),
        ("config: a.yaml", "no option 'config'"),
    ],
)
def test_bad_files_are_refused(tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        options("--config", str(path))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batchsize", "3"], "no option '--batchsize'; the nearest is 'batch_size'"),
        (["--step", "3"], "no option '--step'; the nearest is 'steps'"),
        (["--config", "no/such.yaml"], "No such file"),
    ],
)
def test_bad_flags_are_refused(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        options(*words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_no_tags_of_yaml_run_anything(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: !!python/object/apply:os.getcwd []")
    with pytest.raises(SystemExit):
        options("--config", str(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--accumulate", "3"], "accumulate = 3 must divide"),
        (["--steps", "0"], "steps must"),
        (["--network", "fashion28"], "network 'fashion28'"),
        (["--data", "folder"], "--folder"),
        (["--expect-processes", "2"], "2 processes were expected, 1 is running"),
    ],
)
def test_impossible_runs_leave_with_a_message_and_no_folder(tmp_path, words, message):
    with pytest.raises(SystemExit) as stop:
        train.main([str(tmp_path / "run"), *COMMON, *words])
    assert message in str(stop.value.code)
    assert not (tmp_path / "run").exists()


def test_the_folder_must_be_given(capsys):
    with pytest.raises(SystemExit):
        train.main([])
    assert "OUT is missing" in capsys.readouterr().err


def test_the_command_reads_a_folder(tmp_path):
    Image.new("L", (20, 10), 255).save(tmp_path / "a.png")
    images = train.read_data("folder", "digits", str(tmp_path))
    assert images.shape == (1, 1, 8, 8)
    assert images.min() == 1
    with pytest.raises(ValueError, match="--folder"):
        train.read_data("folder", "digits", None)
    with pytest.raises(ValueError, match="network 'fashion28'"):
        train.read_data("digits", "fashion28", None)


# A run


def test_a_run_leaves_weights_card_checkpoint_and_metrics(whole):
    model, schedule, card = load_model(whole / "model.safetensors")
    assert schedule.T == 50
    assert card["training"]["steps_done"] == 6
    names = {f.name for f in whole.iterdir() if f.is_file()}
    assert names == {
        "checkpoint.safetensors",
        "metrics.jsonl",
        "model.json",
        "model.safetensors",
    }
    average = {k: v for k, v in checkpoint(whole)[0].items() if k.startswith("ema.")}
    for name, x in model.state_dict().items():
        assert torch.equal(x, average[f"ema.{name}"])
    lines = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6]
    assert [x["samples"] for x in lines] == [4, 8, 12, 16, 20, 24]
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "samples"}
    assert all(0 < x["loss"] < 3 and x["grad_norm"] > 0 for x in lines)


def test_no_bar_where_nobody_watches(tmp_path, capsys):
    train.main([str(tmp_path), *COMMON])
    said = capsys.readouterr()
    assert "fp32 on cpu, 1 process, from step 0" in said.out
    assert said.err == ""


def test_every_so_often(tmp_path, monkeypatch):
    saved, real = [], train.save_checkpoint
    monkeypatch.setattr(
        train,
        "save_checkpoint",
        lambda path, trainer: saved.append(trainer.step) or real(path, trainer),
    )
    train.main([str(tmp_path), *COMMON, "--save-every", "4", "--log-every", "2"])
    assert saved == [4, 6]
    assert steps(tmp_path) == [2, 4, 6]


def test_resume_of_a_finished_run_changes_nothing(whole, tmp_path, capsys):
    before = {f.name: f.read_bytes() for f in whole.iterdir() if f.is_file()}
    train.main([str(whole), *COMMON])
    assert "from step 6" in capsys.readouterr().out
    after = {f.name: f.read_bytes() for f in whole.iterdir() if f.is_file()}
    assert before == after


def test_resume_drops_metrics_past_the_checkpoint(whole, tmp_path):
    """As after a kill between two checkpoints, in the middle of a line."""
    with pytest.raises(SystemExit), stopped_after(2):
        train.main([str(tmp_path), *COMMON])
    early = (tmp_path / "metrics.jsonl").read_text()
    assert steps(tmp_path) == [1, 2]
    late = early + '{"step": 3, "loss": 7.0}\n{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(late)
    train.main([str(tmp_path), *COMMON])
    ours, theirs = ((f / "metrics.jsonl").read_text() for f in (tmp_path, whole))
    assert ours == theirs


def test_resume_with_other_settings_is_refused(whole):
    with pytest.raises(SystemExit) as stop:
        train.main([str(whole), *COMMON, "--lr", "1e-3"])
    assert "is of another run: its config" in str(stop.value.code)


# Crashes of all kinds


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_crash_by_a_signal_saves_after_the_step(
    whole, tmp_path, monkeypatch, capsys, number, code
):
    real = Trainer.one_step

    def one_step(self):
        if self.step == 2:
            signal.raise_signal(number)
        return real(self)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Trainer, "one_step", one_step)
    with pytest.raises(SystemExit) as stop:
        train.main([str(tmp_path), *COMMON, "--save-every", "100"])
    monkeypatch.undo()
    assert stop.value.code == code
    assert "stopped and saved after step 3" in capsys.readouterr().out
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not (tmp_path / "model.safetensors").exists()
    train.main([str(tmp_path), *COMMON, "--save-every", "100"])
    assert "from step 3" in capsys.readouterr().out
    assert same_weights(tmp_path, whole)


def test_crash_by_a_second_ctrl_c_interrupts_at_once():
    with train.asked_to_stop() as signals:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signals == [signal.SIGINT]
    with train.asked_to_stop(alone=False) as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert len(signals) == 2


def test_signals_are_left_alone_outside_the_main_thread():
    found = []

    def watch():
        with train.asked_to_stop() as signals:
            found.append(signals)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert found == [[]]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_crash_by_a_signal_from_outside(tmp_path):
    """A process of its own, stopped as a queue stops it."""
    command = [sys.executable, "-m", "ddpm_core.train", str(tmp_path), *COMMON[:-4]]
    command += ["--steps", "100000", "--save-every", "100000", "--log-every", "1"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 143
    step = json.loads(checkpoint(tmp_path)[1]["checkpoint"])["step"]
    assert f"stopped and saved after step {step}" in said
    assert steps(tmp_path)[-1] == step


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_crash_of_the_numbers_keeps_the_last_good_checkpoint(
    tmp_path, monkeypatch, value
):
    real = Trainer.losses

    def losses(self, x_0, t, eps):
        return real(self, x_0, t, eps) * (value if self.step == 3 else 1.0)

    monkeypatch.setattr(Trainer, "losses", losses)
    with pytest.raises(SystemExit) as stop:
        train.main([str(tmp_path), *COMMON, "--save-every", "2"])
    message = str(stop.value.code)
    for part in ("step 4", "lower learning rate", "more warm-up", "fp32", "checkpoint"):
        assert part in message
    tensors, metadata = checkpoint(tmp_path)
    assert json.loads(metadata["checkpoint"])["step"] == 2
    assert all(torch.isfinite(x).all() for x in tensors.values())
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("saved_before", [True, False])
def test_crash_by_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path, monkeypatch, saved_before
):
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(path, trainer):
        if trainer.step == 3 or not saved_before:
            monkeypatch.setattr(files.os, "fsync", fsync)
        training.save_checkpoint(path, trainer)

    monkeypatch.setattr(train, "save_checkpoint", save)
    with pytest.raises(SystemExit) as stop:
        train.main([str(tmp_path), *COMMON])
    monkeypatch.setattr(files.os, "fsync", real)
    message = str(stop.value.code)
    assert calls
    assert f"no checkpoint of step {3 if saved_before else 1}" in message
    assert "No space left on device" in message
    before = "the file that was there before is untouched"
    assert (before if saved_before else "no file was written") in message
    assert str(tmp_path / "checkpoint.safetensors") in message
    if saved_before:
        assert json.loads(checkpoint(tmp_path)[1]["checkpoint"])["step"] == 2
    assert not [f.name for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_a_process_without_the_checkpoint_of_the_others_is_found_out(
    tmp_path, monkeypatch
):
    """The folder is on a disk of its own: process 1 would start anew."""

    class Second(training.Processes):
        rank, count = 1, 2

        def add_up(self, x):
            return x + 1  # process 0 has found one

    monkeypatch.setattr(train, "join", lambda *_: (Second(), torch.device("cpu")))
    with pytest.raises(SystemExit) as stop:
        train.main([str(tmp_path), *COMMON])
    assert "share" in str(stop.value.code)


# TensorBoard


def test_tensorboard_is_used_where_it_is_installed(tmp_path, monkeypatch):
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.append(("open", folder.name, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, step))

        def close(self):
            told.append("close")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train.main([str(tmp_path), *COMMON, "--steps", "1"])
    names = [("loss", 1), ("lr", 1), ("grad_norm", 1)]
    assert told == [("open", "tensorboard", 1), *names, "close"]


def test_tensorboard_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train.tensorboard(tmp_path, 0) is None


# Sampling


def drawn(*words):
    return sample.main(["--weights", "digits", "--device", "cpu", *map(str, words)])


def test_samples_as_picture_and_as_numbers(tmp_path, capsys):
    out = [tmp_path / f"s{suffix}" for suffix in sample.SUFFIXES]
    drawn("--n", 5, "--steps", 3, "--zoom", 3, "--out", *out)
    assert "5 samples in" in capsys.readouterr().out
    raw = np.load(out[1])
    tensors, metadata = load_tensors(out[2])
    assert raw.shape == (5, 1, 8, 8)
    assert raw.dtype == np.float32
    assert np.array_equal(raw, tensors["samples"].numpy())
    assert metadata["seed"] == "0"
    with Image.open(io.BytesIO(out[0].read_bytes())) as picture:
        assert picture.size == (3 * 26 + 2, 2 * 26 + 2)
        pixels = np.asarray(picture.convert("L"))
    wanted = np.clip(raw[0, 0], -1, 1) * 127.5 + 127.5
    assert np.abs(pixels[2:26:3, 2:26:3] - wanted).max() <= 1


def test_samples_depend_on_their_number_and_the_seed_alone(tmp_path):
    path, found = tmp_path / "s.npy", []
    for words in (["--batch", 50], ["--batch", 2], ["--n", 3], ["--seed", 1]):
        drawn("--n", 5, "--steps", 4, "--out", path, *words)
        found.append(np.load(path))
    whole, small, few, other = found
    assert np.abs(whole - small).max() < 1e-5
    assert np.abs(whole[:3] - few).max() < 1e-5
    assert np.abs(whole - other).max() > 0.1
    assert np.abs(whole[0] - whole[1]).max() > 0.1


def test_samples_are_those_of_the_sampler(tmp_path):
    drawn(
        "--n", 2, "--no-clip", "--variance", "fixed_small", "--out", tmp_path / "s.npy"
    )
    model, schedule, _ = load_pretrained("digits")
    x_T, generators = sample.noise(0, [0, 1], (1, 8, 8))
    states = ancestral(
        model, schedule, x_T, variance="fixed_small", clip=False, generator=generators
    )
    assert np.abs(last(states).numpy() - np.load(tmp_path / "s.npy")).max() < 1e-5


@pytest.mark.parametrize(
    ("words", "sampler", "options", "steps"),
    [
        (["ddim", "--evaluations", 7], ddim, {}, 7),
        (["ddim", "--steps", 5, "--eta", 0.5], ddim, {"eta": 0.5}, 5),
        (["heun", "--evaluations", 9], heun, {}, 5),
        (["heun", "--evaluations", 8], heun, {}, 4),
        (["dpm-solver-2m", "--evaluations", 6, "--no-clip"], dpm_solver_2m, {}, 6),
        (["ancestral", "--evaluations", 4], ancestral, {}, 4),
    ],
)
def test_every_sampler_by_its_name(tmp_path, words, sampler, options, steps):
    path = tmp_path / "s.npy"
    drawn("--n", 2, "--sampler", *words, "--out", path)
    model, schedule, _ = load_pretrained("digits")
    x_T, generators = sample.noise(0, [0, 1], (1, 8, 8))
    short = respace(schedule, kept_steps(200, steps))
    options |= {"clip": "--no-clip" not in words, "generator": generators}
    wanted = last(sampler(model, short, x_T, **options))
    assert np.abs(wanted.numpy() - np.load(path)).max() < 1e-5


def test_samples_of_a_file_with_its_own_schedule(whole, tmp_path):
    words = [
        "--weights",
        str(whole / "model.safetensors"),
        "--n",
        "2",
        "--device",
        "cpu",
    ]
    sample.main([*words, "--out", str(tmp_path / "s.npy")])
    assert np.load(tmp_path / "s.npy").shape == (2, 1, 8, 8)


@pytest.mark.parametrize("steps", [1, 3, 7, 49, 50])
def test_shortened_schedules_end_at_the_last_step(steps):
    short = sample.shortened(cosine(50), steps)
    assert len(short.timesteps) == steps + 1
    assert short.timesteps[-1] == 50
    gaps = short.timesteps.diff()
    assert gaps.max() - gaps.min() <= 1


def test_all_steps_are_the_schedule_itself():
    assert sample.shortened(linear(50), None).T == 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.gif"], "must end in .png, .npy or .safetensors"),
        (["--out", "no/such/folder/a.png"], "there is no folder"),
        (["--n", "0"], "n must"),
        (["--batch", "0"], "batch must"),
        (["--zoom", "0"], "zoom must"),
        (["--steps", "201"], "steps must"),
        (["--evaluations", "0"], "evaluations must"),
        (["--evaluations", "201"], "steps must"),
        (["--evaluations", "9", "--steps", "9"], "not both"),
        (["--eta", "0.5"], "--eta belongs to --sampler ddim; got it with"),
        (
            ["--eta", "2", "--sampler", "ddim"],
            "eta must be a finite number from 0 to 1",
        ),
        (
            ["--variance", "fixed_small", "--sampler", "heun"],
            "--variance belongs to --sampler ancestral",
        ),
        (["--weights", "imagenet"], "weights must be one of ['digits'"),
        (["--expect-processes", "4"], "4 processes were expected"),
    ],
)
def test_impossible_samples_are_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        drawn(*words)
    assert message in str(stop.value.code)
    assert not list(tmp_path.iterdir())


def test_samples_need_weights():
    with pytest.raises(SystemExit) as stop:
        sample.main([])
    assert "--weights is missing" in str(stop.value.code)


def test_samples_by_a_file_of_options(tmp_path):
    path = tmp_path / "s.yaml"
    outs = [str(tmp_path / n) for n in ("a.png", "b.npy")]
    path.write_text(f"weights: digits\nn: 2\nsteps: 2\nclip: false\nout: {outs}\n")
    sample.main(["--config", str(path), "--n", "3", "--device", "cpu"])
    assert np.load(outs[1]).shape[0] == 3
    assert Path(outs[0]).exists()


@pytest.mark.parametrize(("steps", "warmup"), [(10_000, 500), (40, 4), (5, 0)])
def test_warm_up_fits_the_run_unless_it_is_given(steps, warmup):
    words = ["no/such/folder", "--device", "cpu", "--steps", str(steps)]
    assert train.build(train.parser().parse_args(words)).config.warmup == warmup
    asked = train.parser().parse_args([*words, "--warmup", "3"])
    assert train.build(asked).config.warmup == 3
