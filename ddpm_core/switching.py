"""Written by tools/extract.py; edit the chapters:

- book/ddpm/training.ipynb
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["mode"]


# --- book/ddpm/training.ipynb · training-export-mode · The trainer
@contextmanager
def mode(model: Callable[..., Tensor], training: bool) -> Iterator[None]:
    r"""Put every part of a model in training or evaluation mode, and back afterwards.

    A model that is no `torch.nn.Module` is left alone. For use inside one step, never
    around a `yield`.

    >>> layer = nn.Dropout(0.5)
    >>> with mode(layer, training=False):
    ...     print(layer.training)
    False
    >>> layer.training
    True
    """
    parts = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [part.training for part in parts]
    try:
        for part in parts:
            part.training = training
        yield
    finally:
        for part, was in zip(parts, before, strict=True):
            part.training = was
