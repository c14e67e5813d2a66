"""Samplers of one window: a solver state, a policy, a stepper, a scan. Pure functions of a field.

A pass reads the field, asks the policy where the tokens move, lets those that reach t = 0 jump (each is drawn from its
belief) and moves the others along the flow by a stepper. With z = y / sqrt(lambda) the probability-flow ODE is

    dz / d sqrt(lambda) = e_hat,

so that z only accumulates expected codes, and steppers are quadratures of e_hat over sqrt(lambda).

Letters in names: B sequences, T tokens of a window, V vocabulary, M code elements.
"""

from collections.abc import Callable

import chex
import flax.struct
import jax
import jax.numpy as jnp

from evo_jax.flow import latents as latents_lib
from evo_jax.flow import policies
from evo_jax.flow.warp import Warp, precision_at

# A stepper gives the y (..., T, M) at a higher precision (..., T). It gets a key (ancestral draws), the solver's state,
# log beliefs (..., T, V), their expected codes (..., T, M), the table of codes and the precision.
Stepper = Callable[[jax.Array, latents_lib.SolverState, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def euler(key, solver, log_belief, code, codes_VxM, precision):
  """The probability-flow ODE by an exponential Euler step (DDIM), e_hat held fixed; first order in the step of
  sqrt(lambda)."""
  del key, log_belief, codes_VxM
  return latents_lib.euler_step(solver.y, code, solver.precision, precision)


def multistep(key, solver, log_belief, code, codes_VxM, precision):
  """The same with e_hat extrapolated linearly from the pass before (two-step Adams-Bashforth in sqrt(lambda), as
  DPM-Solver++(2M) in its variables); second order, no more passes. A token's first step is Euler's."""
  first_order = euler(key, solver, log_belief, code, codes_VxM, precision)
  return first_order + latents_lib.multistep_correction(solver, code, precision)


def ancestral(key, solver, log_belief, code, codes_VxM, precision):
  """A draw of a token from the belief, and of the evidence that it would give."""
  del code
  return latents_lib.ancestral_step(key, solver.y, log_belief, codes_VxM, precision - solver.precision)


STEPPERS: dict[str, Stepper] = {"ode": euler, "ode2": multistep, "ancestral": ancestral}


def step_latents(
  solver: latents_lib.SolverState,
  time: jax.Array,
  time_next: jax.Array,
  log_belief: jax.Array,
  codes_VxM: jax.Array,
  warp: Warp,
  stepper: Stepper,
  key: jax.Array,
) -> latents_lib.SolverState:
  """Tokens at times (..., T) moved to `time_next`; those that stay, jump or are known keep their y.

  key: one for all, or (B,), one for each row of the first axis, so that a row's draws do not depend on the others.
  """
  chex.assert_equal_shape([solver.precision, time, time_next])
  code = latents_lib.expected_code(log_belief, codes_VxM)
  moves = (time_next > 0.0) & (time_next < time)
  precision = jnp.where(moves, jnp.maximum(precision_at(warp, time_next), solver.precision), solver.precision)
  step = jax.vmap(stepper, in_axes=(0, 0, 0, 0, None, 0)) if key.ndim else stepper
  return solver.after(step(key, solver, log_belief, code, codes_VxM, precision), precision, code)


@flax.struct.dataclass
class _Sample:
  """A window being sampled: latents, the solver's state, the last pass's context logits (None: not needed), passes."""

  latent: latents_lib.Latent
  solver: latents_lib.SolverState
  context: jax.Array | None
  passes: jax.Array


def sample_window(
  field: latents_lib.Field,
  codes_VxM: jax.Array,
  warp: Warp,
  policy: policies.Policy,
  key: jax.Array,
  shape: tuple[int, ...],
  stepper: Stepper = euler,
  prior_logits: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws tokens `shape` = (..., T) int32 from a field, and the passes (...) that it took.

  A fixed time grid is scanned; any other policy is followed until every token is known. prior_logits (V,): what the
  field gets as the context logits before the first pass; None: the field is called with the latents alone.
  """
  dtype, uncertainty = codes_VxM.dtype, warp.entropy()[0]
  start_key, key = jax.random.split(key)

  def step(sample: _Sample, index: jax.Array) -> _Sample:
    latent = sample.latent
    token_key, step_key = jax.random.split(jax.random.fold_in(key, index))
    context = field(latent) if sample.context is None else field(latent, sample.context)
    log_belief = latents_lib.log_belief(context, codes_VxM, latent.y)
    observation = policies.Observation(index, latent.time, log_belief, uncertainty, sample.solver, codes_VxM, warp)
    time_next = jnp.broadcast_to(policy(observation), shape).astype(dtype)
    drawn = jax.random.categorical(token_key, log_belief, axis=-1).astype(jnp.int32)
    token = jnp.where((time_next <= 0.0) & ~latent.known, drawn, latent.token)
    solver = step_latents(sample.solver, latent.time, time_next, log_belief, codes_VxM, warp, stepper, step_key)
    passes = sample.passes + jnp.any(~latent.known, axis=-1)
    context = None if sample.context is None else context
    return _Sample(latents_lib.Latent(solver.y, time_next, token), solver, context, passes)

  solver = latents_lib.SolverState.start(jax.random.normal(start_key, (*shape, codes_VxM.shape[1]), dtype))
  start = _Sample(
    latent=latents_lib.Latent(solver.y, jnp.ones(shape, dtype), jnp.zeros(shape, jnp.int32)),
    solver=solver,
    context=None if prior_logits is None else jnp.broadcast_to(prior_logits, (*shape, len(prior_logits))),
    passes=jnp.zeros(shape[:-1], jnp.int32),
  )
  end = policies.run_policy(policy, step, start, lambda sample: jnp.any(~sample.latent.known))
  return end.latent.token, end.passes
