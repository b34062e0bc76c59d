"""The wheel, built from a clean checkout, carries its weights elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import pathlib, sys
root = pathlib.Path(sys.argv[2])
sys.path = [p for p in sys.path if pathlib.Path(p).resolve() != root]
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]
import ddpm_core, torch
here = pathlib.Path(ddpm_core.__file__).resolve()
assert here.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), here
from ddpm_core.files import load_pretrained
from ddpm_core.equations import tex
model, schedule, card = load_pretrained("digits")
with torch.no_grad():
    out = model(torch.zeros(2, 1, 8, 8), torch.tensor([1, schedule.T]))
assert out.shape == (2, 1, 8, 8) and out.isfinite().all()
tex("eq-posterior-variance")
from ddpm_core.features import load_reference
assert len(load_reference("fashion-mnist").test) == 10_000
print("loaded", here.name)
"""


def run(*command, cwd, **more):
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, **more
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_from_a_clean_checkout_works_elsewhere(tmp_path):
    tree, wheels, target, away = (
        tmp_path / n for n in ("tree", "wheels", "site", "away")
    )
    away.mkdir()
    run("git", "checkout-index", "--all", f"--prefix={tree}/", cwd=ROOT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run(
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(wheels),
        ".",
        cwd=tree,
    )
    (wheel,) = wheels.glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", str(target), str(wheel), cwd=away)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # -P keeps the working folder off the path; the target folder goes first.
    program = f"import sys; sys.path.insert(0, {str(target)!r})\n{PROGRAM}"
    arguments = [sys.executable, "-P", "-c", program, str(target), str(ROOT)]
    out = run(*arguments, cwd=away, env=environment)
    assert out.strip() == "loaded __init__.py"
