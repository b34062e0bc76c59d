"""Written by tools/extract.py; edit the chapters:

- book/ddpm/training.ipynb
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ddpm_core import checks

__all__ = ["EMA", "ema_decay"]


# --- book/ddpm/training.ipynb · training-export-ema-decay · The average of the weights
def ema_decay(steps: int) -> float:
    r"""A decay for a run of this many steps: 1 - 10/steps, at most 0.9999, at least 0.

    `eq-training-ema-decay`: the average covers the last tenth of the run. The cap is
    the paper's decay (Ho et al. 2020, B), reached from 100,000 steps on.

    >>> ema_decay(1000), ema_decay(800_000)
    (0.99, 0.9999)
    """
    checks.integer("steps", steps, low=1)
    return min(max(1 - 10 / steps, 0.0), 0.9999)


# --- book/ddpm/training.ipynb · training-export-ema · The average of the weights
class EMA:
    r"""An exponential moving average of a model's weights, `eq-training-ema`.

    It starts as a copy of the weights; buffers are copied, not averaged. `decay` lies
    in [0, 1): the average covers about 1/(1 - decay) steps. Raises ValueError.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> ema = EMA(model, 0.9)
    >>> with torch.no_grad():
    ...     _ = model.weight.fill_(1.0)
    >>> ema.update(model)
    >>> with ema.swapped(model):
    ...     averaged = model.weight.item()
    >>> model.weight.item()
    1.0
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = checks.number("decay", decay, low=0.0, high=1.0)
        if self.decay == 1.0:
            raise ValueError(
                "decay must be below 1, or nothing is ever averaged; got 1"
            )
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights into the average, `eq-training-ema`."""
        now = model.state_dict()
        floating = [k for k, v in now.items() if v.is_floating_point()]
        averages = [self.average[k] for k in floating]
        torch._foreach_lerp_(averages, [now[k] for k in floating], 1 - self.decay)
        for k in now.keys() - set(floating):
            self.average[k].copy_(now[k])

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Lend the averaged weights to the model; give its own back, come what may."""
        own = {k: v.detach().clone() for k, v in model.state_dict().items()}
        try:
            model.load_state_dict(self.average)
            yield
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, by name: what one ships."""
        return dict(self.average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over averaged weights; raises ValueError if names or shapes differ."""
        if state.keys() != self.average.keys():
            odd = sorted(state.keys() ^ self.average.keys())
            raise ValueError(
                f"state must have the names of the model; differing: {odd}"
            )
        for name, x in self.average.items():
            checks.same_shape(f"state[{name!r}]", state[name], "the model's", x)
            x.copy_(state[name])
