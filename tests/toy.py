"""A source whose posterior is exact: random probabilities of all strings of length 4 over 3 symbols."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.flow import latents as latents_lib
from evo_jax.flow import warp as warp_lib

LENGTH, SYMBOLS = 4, 3
STRINGS = np.array(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))  # (81, 4)


class Toy:
  """Probabilities, codes, a warp that only orders precisions, and the Bayes-optimal field."""

  def __init__(self, seed: int = 0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    logits = 1.2 * rng.normal(size=len(STRINGS))
    self.probability = np.exp(logits) / np.exp(logits).sum()
    self.entropy = float(-(self.probability * np.log(self.probability)).sum())
    self.codes = latents_lib.unit(jnp.asarray(rng.normal(size=(SYMBOLS, 4)), dtype))
    self.log_p = jnp.asarray(np.log(self.probability), dtype)
    share = np.exp(-np.expm1(np.linspace(0, np.log1p(200.0), 48)) / 8.0)
    self.warp = warp_lib.Warp.start(jnp.asarray(share, dtype), 200.0)

  def sample(self, key, count):
    """(count, 4) strings, and their numbers (count,)."""
    number = jax.random.categorical(key, self.log_p, shape=(count,))
    return jnp.asarray(STRINGS)[number], number

  def field(self, latent: latents_lib.Latent, context=None):
    """Context logits c = log p(symbol | all latents) - evidence, so that softmax(c + E y) is the exact posterior."""
    evidence = latents_lib.evidence(self.codes, latent.y)  # (..., 4, 3)
    exact = jnp.where(jax.nn.one_hot(latent.token, SYMBOLS, dtype=bool), 0.0, -1e9)
    likelihood = jnp.where(latent.known[..., None], exact, evidence)
    joint = self.log_p + sum(likelihood[..., i, :][..., STRINGS[:, i]] for i in range(LENGTH))  # (..., 81)
    marginal = [
      jnp.stack([jax.nn.logsumexp(joint[..., STRINGS[:, i] == v], axis=-1) for v in range(SYMBOLS)], -1)
      for i in range(LENGTH)
    ]
    return jnp.stack(marginal, axis=-2) - evidence
