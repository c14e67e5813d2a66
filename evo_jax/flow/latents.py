"""Latents in information form: beliefs, the NLL of steps, and steps of the probability flow. Pure arrays, no network.

A token w with precision lambda >= 0 has the latent

    y = lambda * e[w] + sqrt(lambda) * eps,   eps ~ N(0, I),

where e is a table of unit codes (V x M). y = 0 exactly at lambda = 0 (t = 1: nothing is known), and evidence adds up:
y' = y + d * e[w] + sqrt(d) * eps' is the latent at precision lambda + d. Since the codes have unit norm, the
log-likelihood of token v under y is y . e_v plus a constant, so that with context logits c the belief is
softmax(c + E y). NLLs are in nats. Letters in names: V vocabulary, M code elements; `...` any leading axes.

This is the Gaussian channel; it is the same diffusion as x = alpha e + sigma eps with lambda = alpha^2 / sigma^2
(Kingma et al., "Variational Diffusion Models", 2021), written so that both ends are exact in floating point.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

PRECISION_MIN = (
  1e-4  # where sampling starts: y = sqrt(PRECISION_MIN) eps carries no information, and fixes the trajectory
)


@flax.struct.dataclass
class Latent:
  """What is known about some tokens.

  y: (..., M) float, the evidence vector; time: (...) float, the progression t in [0, 1]; token: (...) int32, the
  token itself, meaningful only where t = 0 (there y is not read).
  """

  y: jax.Array
  time: jax.Array
  token: jax.Array

  @property
  def known(self) -> jax.Array:
    """(...) bool: where the token is known, t = 0."""
    return self.time <= 0.0


# A field reads a latent (..., T) and returns context logits (..., T, V): what the context says about each token. A
# self-conditioned one also reads the context logits of the pass before.
Field = Callable[..., jax.Array]


def unit(table_VxM: jax.Array) -> jax.Array:
  """Codes of unit norm, float32 or wider, from an unconstrained table (V, M)."""
  table_VxM = table_VxM.astype(jnp.promote_types(table_VxM.dtype, jnp.float32))
  return table_VxM * jax.lax.rsqrt(jnp.sum(table_VxM**2, axis=-1, keepdims=True) + 1e-12)


def evidence(codes_VxM: jax.Array, y: jax.Array) -> jax.Array:
  """E y: (..., V) log-likelihoods in nats, up to a constant, of every token under y (..., M)."""
  return jnp.einsum("...m,vm->...v", y, codes_VxM)


def observe(codes_VxM: jax.Array, token: jax.Array, precision: jax.Array, noise: jax.Array) -> jax.Array:
  """The latent (..., M) of `token` (...) at `precision` (...) with standard normal `noise` (..., M).

  Also the increment between two precisions, with `precision` their difference.
  """
  precision = precision[..., None]
  positive = precision > 0.0  # the root's slope at 0 is infinite, and a learned clock's gradient passes here
  root = jnp.where(positive, jnp.sqrt(jnp.where(positive, precision, 1.0)), 0.0)
  return precision * codes_VxM[token] + root * noise


def belief_logits(context_logits: jax.Array, codes_VxM: jax.Array, y: jax.Array) -> jax.Array:
  """c + E y: (..., V) logits of the belief, not normalized."""
  return context_logits + evidence(codes_VxM, y)


def log_belief(context_logits: jax.Array, codes_VxM: jax.Array, y: jax.Array) -> jax.Array:
  """log softmax(c + E y): (..., V) in nats."""
  return jax.nn.log_softmax(belief_logits(context_logits, codes_VxM, y), axis=-1)


def expected_code(log_p: jax.Array, codes_VxM: jax.Array) -> jax.Array:
  """e_hat = sum_v p(v) e_v: (..., M) from log beliefs (..., V)."""
  return jnp.einsum("...v,vm->...m", jnp.exp(log_p), codes_VxM)


def pick(values: jax.Array, token: jax.Array) -> jax.Array:
  """values[..., token[...]]: (...) from (..., V)."""
  return jnp.take_along_axis(values, token[..., None], axis=-1)[..., 0]


def log_prob(logits: jax.Array, token: jax.Array) -> jax.Array:
  """log softmax(logits)[token]: (...) in nats, from logits (..., V) that need not be normalized and tokens (...)."""
  return pick(logits, token) - jax.nn.logsumexp(logits, axis=-1)


def step_nll(before: jax.Array, after: jax.Array) -> jax.Array:
  """NLL in nats (...) of a Gaussian step, from the token's log-probabilities (...) with the old and with the new
  evidence.

  The log-ratio between the true increment's density and that of the mixture that the belief predicts: with the same
  context logits in both, log softmax(c + E y')[w] - log softmax(c + E y)[w]. Its mean over the increment's noise is a
  KL divergence; single values may be negative.
  """
  return after - before


def jump_nll(before: jax.Array) -> jax.Array:
  """NLL in nats (...) of a jump, which makes the token known: -log softmax(c + E y)[w], from that log-probability."""
  return -before


def small_step_rate(codes_VxM: jax.Array, predicted: jax.Array, token: jax.Array) -> jax.Array:
  """The limit of the step NLL per unit of precision, in nats (...): |e[w] - e_hat|^2 / 2."""
  return 0.5 * jnp.sum((codes_VxM[token] - predicted) ** 2, axis=-1)


def euler_step(y: jax.Array, predicted: jax.Array, precision: jax.Array, precision_next: jax.Array) -> jax.Array:
  """One exponential Euler step (..., M) of dy / dlog(lambda) = (lambda e_hat + y) / 2 with e_hat (..., M) held fixed.

  precision (...) must be positive. This is the DDIM step (Song et al., 2021) in information form.
  """
  old, new = precision[..., None], precision_next[..., None]
  return new * predicted + jnp.sqrt(new / old) * (y - old * predicted)


@flax.struct.dataclass
class SolverState:
  """Where tokens are on the flow, and what a multistep solver remembers.

  y: (..., T, M) latents; precision: (..., T), theirs; code: (..., T, M), e_hat of the pass before; root: (..., T),
  sqrt(precision) before the last step, negative before the first.
  """

  y: jax.Array
  precision: jax.Array
  code: jax.Array
  root: jax.Array

  @classmethod
  def start(cls, noise: jax.Array) -> "SolverState":
    """At t = 1, from standard normal noise (..., T, M)."""
    precision = jnp.full(noise.shape[:-1], PRECISION_MIN, noise.dtype)
    return cls(PRECISION_MIN**0.5 * noise, precision, jnp.zeros_like(noise), jnp.full_like(precision, -1.0))

  def after(self, y: jax.Array, precision: jax.Array, code: jax.Array) -> "SolverState":
    """After a step to y (..., T, M) at `precision` (..., T) under e_hat `code`; where precision is no higher, nothing
    moved."""
    moved = precision > self.precision
    put = lambda new, old: jnp.where(moved.reshape(moved.shape + (1,) * (new.ndim - moved.ndim)), new, old)
    return SolverState(
      put(y, self.y), put(precision, self.precision), put(code, self.code), put(jnp.sqrt(self.precision), self.root)
    )


def multistep_correction(solver: SolverState, code: jax.Array, precision_next: jax.Array) -> jax.Array:
  """What a second-order step to `precision_next` (..., T) adds to `euler_step` (..., T, M), e_hat being `code` now.

  With z = y / sqrt(lambda) the flow is dz / dsqrt(lambda) = e_hat; this is the two-step Adams-Bashforth rule in
  sqrt(lambda) (DPM-Solver++(2M) in its variables) less Euler's, and an estimate of Euler's error. Zero on a
  token's first step.
  """
  old, new = jnp.sqrt(solver.precision), jnp.sqrt(precision_next)
  before = old - solver.root
  known = (solver.root >= 0.0) & (before > 0.0)
  share = jnp.where(known, (new - old) ** 2 / (2.0 * jnp.where(known, before, 1.0)), 0.0)
  return (new * share)[..., None] * (code - solver.code)


def ancestral_step(key: jax.Array, y: jax.Array, log_p: jax.Array, codes_VxM: jax.Array, d: jax.Array) -> jax.Array:
  """One ancestral step (..., M): draws a token from the belief and adds its increment over d >= 0 (...)."""
  token_key, noise_key = jax.random.split(key)
  token = jax.random.categorical(token_key, log_p, axis=-1)
  return y + observe(codes_VxM, token, d, jax.random.normal(noise_key, y.shape, y.dtype))
