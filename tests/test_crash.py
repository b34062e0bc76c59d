"""Crash safety: killed, damaged, out of disk; the last good checkpoint stays.

What is marked `prove` is the same on a larger scale; `make prove` prints its figures.
"""

import errno
import importlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from torch import nn

from ddpm_core import files, training
from ddpm_core.schedules import cosine
from ddpm_core.training import TrainConfig, Trainer
from ddpm_core.unet import UNET_CONFIGS, UNet

COMMAND = "ddpm_core.train"
NAMES = ("checkpoint.safetensors", "model.safetensors", "model.json")
FACTS = {"schedule": {"name": "cosine", "T": 20}, "prediction": "eps"}
DAMAGED = r"no whole safetensors file|damaged|no 'sha256'"
CONFIG = TrainConfig(steps=6, batch_size=8, seed=3)

posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


# Real processes, really killed


def start(out: Path, steps: int, every: int = 1) -> subprocess.Popen[bytes]:
    """Start training the digits in `out`, or going on there, on one thread."""
    options = "--data digits --T 50 --batch-size 8 --warmup 0 --seed 5 --device cpu "
    options += f"--steps {steps} --save-every {every}"
    command = [sys.executable, "-m", COMMAND, str(out), *options.split()]
    root = Path(files.__file__).parents[1]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, env=settings)


def end(process: subprocess.Popen[bytes], step: int) -> None:
    """Let a process end by itself, well; it must have begun after this step."""
    out, told = process.communicate(timeout=600)
    assert process.returncode == 0, told.decode()
    assert f"from step {step}\n" in out.decode()


def saved(out: Path) -> int:
    """When the checkpoint was last replaced; 0 if there is none."""
    try:
        return (out / NAMES[0]).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def step_of(out: Path) -> int:
    """The step of the checkpoint, which must be whole; 0 if there is none yet."""
    if not saved(out):
        return 0
    _, metadata = files.load_tensors(out / NAMES[0])
    return int(json.loads(metadata["checkpoint"])["step"])


def unfinished(out: Path) -> list[Path]:
    return list(out.glob(f".{NAMES[0]}.*"))


def wait(process: subprocess.Popen[bytes], happened: Callable[[], object]) -> None:
    """Look again every half millisecond until it has happened."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def kill(
    process: subprocess.Popen[bytes], out: Path, moment: str, later: float = 0.0
) -> bool:
    """`kill -9` so long after a moment (a save begins, or is done); did it hit a save?"""
    before, old = saved(out), set(unfinished(out))
    if moment == "saving":
        wait(process, lambda: set(unfinished(out)) - old)
    elif moment == "saved":
        wait(process, lambda: saved(out) != before)
    time.sleep(later)
    process.kill()
    process.communicate()
    assert process.returncode != 0, "it had ended by itself"
    return bool(set(unfinished(out)) - old)


def same_files(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in NAMES)


def test_crash_three_kills_and_resumes_end_in_the_same_bytes(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed, steps = start(whole, 12), 12
    try:
        for moment in ("saved", "saving", "saved"):
            kill(start(broken, steps), broken, moment)
        stopped = step_of(broken)
        assert 2 <= stopped < steps
        end(start(broken, steps), stopped)
        end(undisturbed, 0)
    finally:
        undisturbed.kill()
    assert same_files(whole, broken)
    assert not unfinished(broken)


# Damage


class Tiny(nn.Module):
    """A network of two layers: what is tried here does not depend on its size."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.into = nn.Conv2d(1, width, 3, padding=1)
            self.out = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.out(self.into(x).tanh() * t.reshape(-1, 1, 1, 1) / 20)


def trainer(width: int = 2) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(5, 1, 4, 4, generator=generator).mul(2).sub(1)
    return Trainer(Tiny(width), cosine(20), pictures, CONFIG)


@cache
def trained(steps: int) -> Trainer:
    """After so many steps; shared by the tests, which may save it but not change it."""
    run = trainer()
    for _, _ in zip(range(steps), run.steps(), strict=False):
        pass
    return run


def state(run: Trainer) -> str:
    """A digest of everything that a checkpoint of this trainer would hold."""
    tensors = training.checkpoint_tensors(run)
    return files.digest(tensors, {"facts": str(training.checkpoint_facts(run))})


def refused(path: Path, run: Trainer, error: str = DAMAGED) -> None:
    """The file is refused by name, and the trainer is as it was before."""
    before = state(run)
    with pytest.raises(ValueError, match=error) as caught:
        training.load_checkpoint(path, run)
    assert str(path) in str(caught.value)
    assert state(run) == before


def flip(content: bytes, place: int, mask: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= mask
    return bytes(changed)


def regions(content: bytes) -> dict[str, range]:
    """Where in a file are: length of the header, metadata, header, tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    begin, stop = content.index(b"{", 9), content.index(b'"},"', 9)
    return {
        "length": range(8),
        "metadata": range(begin, stop + 1),
        "header": range(8, 8 + length),
        "tensors": range(8 + length, len(content)),
    }


def corruptions(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Twenty: bits flipped in each part, cuts, bytes at the end."""
    rng = random.Random(0)
    for name, places in regions(content).items():
        for _ in range(3):
            place, bit = rng.choice(places), rng.randrange(8)
            yield f"{name}, byte {place}, bit {bit}", flip(content, place, 1 << bit)
    body = regions(content)["tensors"]
    for length in (0, 7, body.start - 1, body.start, body.stop - 1):
        yield f"cut to {length}", content[:length]
    yield "one byte more", content + b"\0"
    yield "twice", content + content
    yield (
        "zeros from the middle on",
        content[: len(content) // 2].ljust(body.stop, b"\0"),
    )


@pytest.mark.parametrize("place", range(20))
def test_crash_twenty_damaged_checkpoints_are_refused_by_name(tmp_path, place):
    path = tmp_path / "run.safetensors"
    training.save_checkpoint(path, trained(2))
    found = list(corruptions(path.read_bytes()))
    assert len(found) == 20
    name, content = found[place]
    assert content != path.read_bytes()
    path.write_bytes(content)
    run = trained(1)
    refused(path, run)
    assert path.read_bytes() == content, name


def test_crash_the_command_refuses_a_damaged_checkpoint_and_leaves_it(tmp_path):
    content = b"not a checkpoint"
    (tmp_path / NAMES[0]).write_bytes(content)
    options = ["--steps", "1", "--warmup", "0", "--device", "cpu"]
    with pytest.raises((ValueError, SystemExit), match="no whole") as caught:
        importlib.import_module(COMMAND).main([str(tmp_path), *options])
    assert str(tmp_path / NAMES[0]) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [NAMES[0]]
    assert (tmp_path / NAMES[0]).read_bytes() == content


def test_resume_from_whole_tensors_that_do_not_fit_changes_nothing(tmp_path):
    path = tmp_path / "run"
    training.save_checkpoint(path, trained(2))
    tensors, metadata = files.load_tensors(path)
    facts = {k: v for k, v in metadata.items() if k != files.DIGEST}
    adam = [k for k in tensors if k.startswith("optimizer.")]
    first, last = sorted(tensors)[0], sorted(tensors)[-1]
    others = {
        "lacks one": {k: v for k, v in tensors.items() if k != last},
        "one more": {**tensors, "model.more": torch.ones(1)},
        "not ours": {**tensors, "more": torch.ones(1)},
        "no average": {k: v for k, v in tensors.items() if not k.startswith("ema.")},
        "half of Adam": {k: v for k, v in tensors.items() if k != adam[-1]},
        "too many of Adam": {**tensors, "optimizer.999.step": torch.ones(())},
        "other shape": {**tensors, last: torch.ones(1, 2, 3)},
        "other dtype": {**tensors, first: tensors[first].double()},
        "other order": {**tensors, last: tensors[last][None]},
    }
    run = trained(1)
    for changed in others.values():
        files.save_tensors(path, changed, facts)
        refused(path, run, "is of another network")
    files.save_tensors(path, tensors, {"checkpoint": '{"step": 1}'})
    refused(path, run, "holds the facts")
    files.save_tensors(path, tensors, facts)
    again = trainer()
    training.load_checkpoint(path, again)
    assert state(again) == state(trained(2))


def test_resume_from_another_network_changes_nothing(tmp_path):
    path = tmp_path / "run"
    training.save_checkpoint(path, trainer(width=3))
    refused(path, trained(1), "is of another network")


def test_resume_before_the_first_step(tmp_path):
    training.save_checkpoint(tmp_path / "run", trainer())
    run = trainer()
    next(run.steps())
    training.load_checkpoint(tmp_path / "run", run)
    assert state(run) == state(trainer())


# Faults at each step of a save


class PowerCut(BaseException):
    """Nothing may catch this and go on; from now on nothing can be deleted either."""


POINTS = (
    "digest",
    "serialise",
    "create",
    "open",
    "write",
    "flush",
    "fsync",
    "chmod",
    "rename",
    "open folder",
    "sync folder",
)
AFTER = POINTS.index("open folder")  # from here on the new file has its name
FAULTS = {
    "full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "quota": lambda: OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "broken": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    "bare": lambda: OSError("no number"),
    "memory": MemoryError,
    "interrupt": KeyboardInterrupt,
    "power": PowerCut,
}


class Faulty:
    """A file that fails half-way through a write, or in a flush."""

    def __init__(self, file, point: str, fail: Callable[[], None]) -> None:
        self.file, self.point, self.fail = file, point, fail
        self.fileno = file.fileno

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        if self.point == "write":
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            self.fail()
        return self.file.write(content)

    def flush(self):
        if self.point == "flush":
            self.fail()
        self.file.flush()


@contextmanager
def fault(point: str, make: Callable[[], BaseException]) -> Iterator[list[str]]:
    """Raise at one point of every save; yields the list of the points reached."""
    reached: list[str] = []
    real_open = os.fdopen

    def fail(*_: object, **__: object) -> None:
        reached.append(point)
        error = make()
        if isinstance(error, PowerCut):  # a dead process tidies nothing up
            patch.setattr(Path, "unlink", fail)
        raise error

    def half(*arguments: object) -> Faulty:
        return Faulty(real_open(*arguments), point, fail)

    def of(name: str, folder: bool) -> Callable[..., object]:
        real = getattr(os, name)

        def run(what, *rest):
            if os.path.isdir(what) == folder:
                fail()
            return real(what, *rest)

        return run

    places = {
        "digest": (files, "digest", fail),
        "serialise": (files, "to_safetensors", fail),
        "create": (files.tempfile, "mkstemp", fail),
        "open": (os, "fdopen", fail),
        "write": (os, "fdopen", half),
        "flush": (os, "fdopen", half),
        "fsync": (os, "fsync", of("fsync", folder=False)),
        "chmod": (os, "chmod", fail),
        "rename": (os, "replace", fail),
        "open folder": (os, "open", of("open", folder=True)),
        "sync folder": (os, "fsync", of("fsync", folder=True)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*places[point])
        yield reached


@posix
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("point", POINTS)
def test_crash_at_each_point_of_a_save_leaves_a_whole_checkpoint(tmp_path, point, kind):
    path, old, new = tmp_path / "run", trained(1), trained(2)
    training.save_checkpoint(path, old)
    error, caught = FAULTS[kind](), None
    renamed = POINTS.index(point) >= AFTER
    with fault(point, FAULTS[kind]) as reached:
        try:
            training.save_checkpoint(path, new)
        except BaseException as raised:
            caught = raised
    assert reached
    run = trainer()
    training.load_checkpoint(path, run)
    assert state(run) == state(new if renamed else old)
    left = [p.name for p in tmp_path.iterdir()]
    if kind == "power":
        assert len(left) <= 2
    else:
        assert left == ["run"]
    if isinstance(error, OSError) and renamed:
        assert caught is None  # the file is there; only its name may not be safe yet
    else:
        assert type(caught) is type(error)
    if isinstance(caught, OSError) and POINTS.index(point) > POINTS.index("serialise"):
        assert caught.errno == error.errno
        assert str(path) in str(caught)
        assert "the file that was there before is untouched" in str(caught)
    training.save_checkpoint(path, new)
    training.load_checkpoint(path, run)
    assert state(run) == state(new)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_crash_in_the_first_save_of_all_leaves_nothing(tmp_path):
    path = tmp_path / "run"
    with (
        fault("fsync", FAULTS["full"]),
        pytest.raises(OSError, match="Errno") as caught,
    ):
        training.save_checkpoint(path, trainer())
    assert "no file was written" in str(caught.value)
    assert "untouched" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_crash_between_weights_and_card_is_noticed(tmp_path):
    path = tmp_path / "m.safetensors"
    model = UNet(UNET_CONFIGS["digits"])
    files.save_model(path, model, FACTS)
    nn.init.ones_(model.conv_out.weight)
    real, calls = files.write_atomically, []

    def second(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise PowerCut
        real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_atomically", second)
        with pytest.raises(PowerCut):
            files.save_model(path, model, FACTS)
    with pytest.raises(ValueError, match="its card") as caught:
        files.load_model(path)
    assert str(path) in str(caught.value)


def test_crash_leftovers_are_those_of_this_file_alone(tmp_path):
    names = ["a", ".a.12345678", ".ab.12345678", ".a", "a.12345678", ".[a].12345678"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    files.remove_leftovers(tmp_path / "a")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == set(names) - {".a.12345678"}
    files.remove_leftovers(tmp_path / "[a]")
    assert left - {p.name for p in tmp_path.iterdir()} == {".[a].12345678"}
    files.remove_leftovers(tmp_path / "no" / "such")


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """The system itself refuses to write more: a real error, not a made one."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@posix
def test_crash_a_real_refusal_to_write_keeps_the_last_checkpoint(tmp_path):
    path, run = tmp_path / "run", trainer()
    training.save_checkpoint(path, trained(1))
    new, size = trained(2), path.stat().st_size
    with (
        no_file_longer_than(size // 2),
        pytest.raises(OSError, match="before is untouched") as caught,
    ):
        training.save_checkpoint(path, new)
    assert caught.value.errno == errno.EFBIG
    training.load_checkpoint(path, run)
    assert state(run) == state(trained(1))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# make prove


class Whole(NamedTuple):
    """A run of the command that nothing disturbed."""

    out: Path
    steps: int
    first: float  # seconds until the first checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    steps, out, begin = 400, tmp_path_factory.mktemp("whole"), time.monotonic()
    process = start(out, steps)
    wait(process, lambda: saved(out))
    first = time.monotonic() - begin
    end(process, 0)
    return Whole(out, steps, first)


@posix
@pytest.mark.prove
def test_prove_crash_thirty_kills(whole, tmp_path):
    rng, hits, at, steps = random.Random(30), 0, [], whole.steps
    latest = {"any": 1.5 * whole.first, "saving": 0.01, "saved": 0.3}
    for number in range(30):
        moment = ("any", "saving", "saved")[number % 3]
        process = start(tmp_path, steps)
        hits += kill(process, tmp_path, moment, rng.uniform(0, latest[moment]))
        at.append(step_of(tmp_path))
    assert at == sorted(at)
    assert 10 <= at[-1] < steps
    end(start(tmp_path, steps), at[-1])
    assert same_files(whole.out, tmp_path)
    assert not unfinished(tmp_path)
    print(f"30 kills in a run of {steps} steps, {hits} of them within a save;")
    print(f"checkpoints after them: steps {at}")
    print("weights, card and checkpoint: the same bytes as of the undisturbed run")


@pytest.mark.prove
def test_prove_crash_hundreds_of_damaged_checkpoints(whole, tmp_path):
    content = (whole.out / NAMES[0]).read_bytes()
    rng, path, run = random.Random(200), tmp_path / "run", trained(1)
    everywhere, part = range(len(content)), regions(content)
    damaged: dict[str, Callable[[], bytes]] = {
        "flipped bits": lambda: flip(
            content, rng.choice(everywhere), 1 << rng.randrange(8)
        ),
        "changed bytes": lambda: flip(
            content, rng.choice(everywhere), rng.randrange(1, 256)
        ),
        "flipped bits in the header": lambda: flip(
            content, rng.choice(part["header"]), 1 << rng.randrange(8)
        ),
        "flipped bits in the metadata": lambda: flip(
            content, rng.choice(part["metadata"]), 1 << rng.randrange(8)
        ),
        "cuts": lambda: content[: rng.choice(everywhere)],
        "cuts by less than 100 bytes": lambda: content[: -rng.randrange(1, 100)],
    }
    for name, make in damaged.items():
        silent = 0
        for _ in range(200):
            changed = make()
            path.write_bytes(changed)
            refused(path, run)
            silent += loads(changed)
        print(f"200 {name}: 200 refused by name; safetensors alone loads {silent}")


def loads(content: bytes) -> bool:
    """Whether safetensors alone takes these bytes."""
    try:
        safetensors.torch.load(content)
    except safetensors.SafetensorError:
        return False
    return True


@posix
@pytest.mark.prove
def test_prove_crash_full_disk(whole, tmp_path):
    steps = whole.steps
    size = (whole.out / NAMES[0]).stat().st_size
    with small_disk(tmp_path, 2 * size - size // 4) as make_room:
        process = start(tmp_path, steps)
        if make_room is None:  # not root: the system's limit on the size of a file
            wait(process, lambda: saved(tmp_path))
            resource = pytest.importorskip("resource")
            limit = (size // 2, resource.RLIM_INFINITY)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
        told = process.communicate(timeout=600)[1].decode()
        assert process.returncode == 1
        last = told.strip().splitlines()[-1]
        number = errno.EFBIG if make_room is None else errno.ENOSPC
        untouched = "the file that was there before is untouched"
        for part in (
            f"[Errno {number}]",
            os.strerror(number),
            untouched,
            str(tmp_path),
        ):
            assert part in last
        assert not unfinished(tmp_path)
        assert not (tmp_path / NAMES[1]).exists()
        kept = step_of(tmp_path)
        assert 1 <= kept < steps
        if make_room is not None:
            make_room()
        end(start(tmp_path, steps), kept)
        assert same_files(whole.out, tmp_path)
    print(f"{'limited files' if make_room is None else 'full disk'}: stopped with")
    print(f"  {last.replace(str(tmp_path), 'OUT')}")
    print(f"the checkpoint of step {kept} stayed whole; with room again the run went")
    print("on from it to the same bytes as the undisturbed run")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None] | None]:
    """A disk of so many bytes at `folder`, and how to enlarge it; None if not allowed."""
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if (
        mount is None
        or subprocess.run([mount, *options], capture_output=True).returncode
    ):
        yield None
        return

    def make_room() -> None:
        more = f"remount,size={10 * size}"
        subprocess.run([str(mount), "-o", more, str(folder)], check=True)

    try:
        yield make_room
    finally:
        subprocess.run(["umount", str(folder)], check=True)
