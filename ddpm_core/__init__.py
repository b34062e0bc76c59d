"""Diffusion models, derived and run: the package of the book.

Conventions, in all modules:

- t runs from 1 to T, in the text and in code. Tables of a schedule have T + 1
  entries, and entry 0 is the clean data: beta[0] = 0, alpha[0] = alpha_bar[0] = 1.
- Images are float32 tensors [B, C, H, W] with values in [-1, 1].
- A model is a callable `model(x_t, t)` with t an int64 tensor [B] of values in 1...T.
- Divergences, entropies and likelihoods are in nats unless a name says bits.

Every module is written from the chapters by tools/extract.py.
"""

__version__ = "0.1.0"
