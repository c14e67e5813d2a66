"""Parameters of windows alone: they act on unknown slots, as the changes that they stand for, and on nothing else."""

import functools

from conftest import small_config
import jax
import jax.numpy as jnp
from model_test import V, batch, build
import numpy as np
import pytest
import step_test
from step_test import AT_ONCE, assert_close, first_step

from evo_jax import config as config_lib
from evo_jax.flow import objective
from evo_jax.flow import windows as windows_lib
from evo_jax.flow.interface import WindowInputs
from evo_jax.network import evo as evo_lib
from evo_jax.training import state as state_lib

ALL = dict(model__window_rank=3, model__window_twins=True, model__window_unknown=True, model__window_head=8)
DRAFTS = ALL | step_test.DRAFTS
WEIGHTED = DRAFTS | dict(model__window_candidates=4, loss__position_decay=2.0, loss__head_weight=0.5)  # informed slots
ANCHOR, L, S = jnp.array([[0, 11], [5, 20]]), 32, 8


def tokens():
  return jax.random.randint(jax.random.key(1), (2, L + 1), 1, V)


def inputs(net, time, all_unknown=False, first=ANCHOR):
  """Random embedded slots of two windows; the known ones are the text's."""
  size = time.shape[-1]
  text = windows_lib.gather_windows(net.embed_tokens(tokens()), first, size - 1)
  x = jax.random.normal(jax.random.key(2), (2, 2, S + 1, net.config.width))[:, :, :size]
  return WindowInputs(first, jnp.where(time[..., None] > 0, x, text), time, all_unknown)


def without(params):
  """Without what only windows with parameters of their own have."""
  blocks = {name: x for name, x in params["blocks"].items() if not name.startswith("window_")}
  return {name: x for name, x in params.items() if not name.startswith("window_")} | {"blocks": blocks}


@functools.partial(jax.jit, static_argnums=0)
def everything(model, params, time):
  """Hidden states of the clean stream alone, of both streams in one pass, and of a decoding pass over 3 clean slots and
  a window, with the cache behind it: those of clean slots, and the others."""
  net = model.bind({"params": params})
  x, windows = net.embed_tokens(tokens()[:, :-1]), inputs(net, time)
  one_pass = net.forward(x, None, windows)
  alone, cache = net.clean(tokens()[:, :-1])
  apart = model.clone(stacked=False).bind({"params": evo_lib.unstack_layers(params)})
  position = jnp.broadcast_to(jnp.arange(4, 4 + 3 + S), (2, 3 + S))
  slots = jnp.concatenate([x[:, 4:7], windows.x_BxNxSxD[:, 0, 1:]], axis=1)
  visible = jnp.pad(jnp.ones((2, S, S), bool), ((0, 0), (3, 0), (0, 0)))
  stop = jnp.where(jnp.arange(3 + S) < 3, position + 1, 7)
  decoded, past = apart.decode(
    (tuple(cache.k), tuple(cache.v)),
    jnp.array([4, 4]),
    3,
    slots,
    jnp.pad(time[:, 0, 1:], ((0, 0), (3, 0))),
    position,
    stop,
    visible,
  )
  return (alone, one_pass[0], decoded[:, :3], past), (one_pass[1], decoded[:, 3:])


def mixed_time():
  """Known, partly known and unknown slots behind known anchors."""
  time = jnp.tile(jnp.array([0.0, 0, 0, 1, 0.4, 1, 0, 1, 1]), (2, 2, 1))
  return time.at[0, 0, 1:].set(1.0)


def test_the_clean_stream_stays_bit_for_bit():
  """By itself, in one pass with windows, and in decoding; whatever the parameters of windows are."""
  net, _, _ = build(**ALL)
  plain = evo_lib.Evo(small_config().model, V)
  params = net.variables["params"]
  clean, window = everything(net.clone(), params, mixed_time())
  want, other = everything(plain, without(params), mixed_time())
  jax.tree.map(np.testing.assert_array_equal, clean, want)
  assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(window, other))


def test_before_training_windows_are_those_without():
  """Low rank and the head change nothing yet, twins are copies."""
  config = small_config(**ALL)
  model, plain = (evo_lib.Evo(c.model, V) for c in (config, small_config()))
  params = jax.jit(lambda: state_lib.partition.merge(model.init(jax.random.key(0), tokens())["params"], {}))()
  params = jax.tree.map(lambda x: getattr(x, "value", x), params, is_leaf=lambda x: hasattr(x, "value"))
  np.testing.assert_array_equal(params["blocks"]["window_qkv"], params["blocks"]["w_qkv"])
  got, want = everything(model, params, mixed_time()), everything(plain, without(params), mixed_time())
  assert_close(got, want, atol=1e-5)
  net = model.bind({"params": params})
  logits = jax.random.normal(jax.random.key(4), (3, 5))
  hidden = jax.random.normal(jax.random.key(5), (3, 32))
  scored = net.rescore(hidden, jnp.arange(3), jnp.arange(15).reshape(3, 5), logits)
  np.testing.assert_array_equal(scored, logits)


@functools.partial(jax.jit, static_argnums=0)
def _window_and_gradient(model, params, time):
  def loss(params):
    net = model.bind({"params": params})
    x = jax.random.normal(jax.random.key(2), (2, 2, S + 1, net.config.width))
    hidden = net.window(None, WindowInputs(ANCHOR, x, time))
    return jnp.sum(jnp.sin(hidden)), hidden

  return jax.grad(loss, has_aux=True)(params)


def test_they_are_the_changes_that_they_stand_for():
  """Slots at t > 0 alone, without a past: an ordinary network whose matrices are W + A B, or the twins; gradients, too,
  by the chain rule. Known slots give them none."""
  net, _, _ = build(**ALL)
  params, plain = net.variables["params"], evo_lib.Evo(small_config().model, V)
  blocks = params["blocks"]
  blocks = jax.tree.map(np.asarray, blocks)
  product = lambda a, b: np.einsum(
    "l...r,lrx->l...x", blocks[f"window_{a}_a"], blocks[f"window_{b}_b"].reshape(2, 3, -1)
  )
  changed = {
    "w_qkv": blocks["window_qkv"] + product("qkv", "qkv").reshape(blocks["w_qkv"].shape),
    "w_o": blocks["w_o"] + product("o", "o"),
    "w_gate": blocks["w_gate"] + product("mlp", "gate"),
    "w_up": blocks["w_up"] + product("mlp", "up"),
    "w_down": blocks["w_down"] + product("down", "down"),
  }
  merged = without(params)
  merged["blocks"] |= changed
  time = jnp.linspace(0.1, 1.0, S + 1) * jnp.ones((2, 2, 1))
  gradient, hidden = _window_and_gradient(net.clone(), params, time)
  of_merged, want = _window_and_gradient(plain, merged, time)
  np.testing.assert_allclose(hidden, want, atol=2e-5)
  gradient, of_merged = (jax.tree.map(np.asarray, tree["blocks"]) for tree in (gradient, of_merged))
  np.testing.assert_allclose(gradient["window_qkv"], of_merged["w_qkv"], rtol=2e-3, atol=1e-4)
  assert not np.asarray(gradient["w_qkv"]).any()
  for a, b in (("qkv", "qkv"), ("o", "o"), ("mlp", "gate"), ("mlp", "up"), ("down", "down")):
    down = blocks[f"window_{a}_a"].reshape(2, -1, 3)
    whole = of_merged[f"w_{b}"].reshape(2, down.shape[1], -1)
    found = gradient[f"window_{b}_b"].reshape(2, 3, -1)
    np.testing.assert_allclose(found, np.einsum("ldr,ldx->lrx", down, whole), rtol=2e-3, atol=1e-4, err_msg=b)
  known, _ = _window_and_gradient(net.clone(), params, jnp.zeros((2, 2, S + 1)))
  assert not any(np.asarray(x).any() for name, x in known["blocks"].items() if name.startswith("window_"))


def test_slots_are_informed_by_what_is_known_alone():
  """Known slots behind an anchor are the clean stream's; unknown ones do not depend on what is unknown behind them, nor
  on how much of it there is; what is partly known behind them they see."""
  net, _, _ = build(**WEIGHTED)

  @jax.jit
  def read(params, shift, time):
    net_ = net.clone().bind({"params": params})
    hidden, cache = net_.clean(tokens()[:, :-1])
    windows = inputs(net_, time)
    x = windows.x_BxNxSxD + shift
    return (
      hidden,
      net_.window(cache, windows.replace(x_BxNxSxD=x)),
      net_.forward(net_.embed_tokens(tokens()[:, :-1]), None, windows.replace(x_BxNxSxD=x))[1],
    )

  params, zeros = net.variables["params"], jnp.zeros((2, 2, S + 1, 32))
  clean, hidden, one_pass = read(params, zeros, mixed_time())
  np.testing.assert_allclose(hidden, one_pass, atol=2e-5)
  for b, n in ((0, 1), (1, 0), (1, 1)):  # the anchor and two known tokens
    a = int(ANCHOR[b, n])
    np.testing.assert_allclose(hidden[b, n, :3], clean[b, a : a + 3], atol=2e-5)
  after = read(params, zeros.at[:, :, 5].set(1.0), mixed_time())[1]  # unknown
  np.testing.assert_array_equal(after[:, :, :5], hidden[:, :, :5])
  assert np.abs(after[:, :, 7] - hidden[:, :, 7]).min() > 1e-4  # which see it; the known one between does not
  np.testing.assert_array_equal(after[1:, :, 6], hidden[1:, :, 6])
  after = read(params, zeros.at[:, :, 4].set(1.0), mixed_time())[1]  # partly known
  assert np.abs(after[1, :, 3] - hidden[1, :, 3]).max() > 1e-4
  np.testing.assert_array_equal(after[1, :, :3], hidden[1, :, :3])
  unknown = jnp.ones((2, 2, S + 1)).at[..., 0].set(0.0)
  many = read(params, zeros, unknown)[1]
  few = read(params, zeros[:, :, :4], unknown[..., :4])[1]
  np.testing.assert_allclose(few, many[:, :, :4], atol=2e-5)


def test_the_clean_anchor_needs_no_slot():
  """Behind it all slots are unknown: without the anchor's they give the same, by whatever is known beforehand, and
  whether or not the first unknown token begins a document."""
  net, statistics, _ = build(**WEIGHTED, model__isolate_documents=True)

  @jax.jit
  def read(params, segments):
    net_ = net.clone().bind({"params": params})
    x = net_.embed_unknown(statistics.log_unigram_V)
    cache = net_.clean(tokens()[:, :-1], segments)[1]
    x = jnp.broadcast_to(x, (2, 2, S, len(x)))
    anchors = windows_lib.gather_windows(net_.embed_tokens(tokens()), ANCHOR, 0)
    time = jnp.ones((2, 2, S))
    with_anchor = WindowInputs(ANCHOR, jnp.concatenate([anchors, x], 2), jnp.pad(time, ((0, 0), (0, 0), (1, 0))))
    return (
      net_.window(cache, with_anchor)[:, :, 1:],
      net_.window(cache, WindowInputs(ANCHOR, x, time, skips_anchor=True)),
      net_.window(cache, WindowInputs(ANCHOR, x, time, all_unknown=True, skips_anchor=True)),
    )

  want, *others = read(net.variables["params"], jnp.zeros((2, L), int))
  behind = jnp.arange(L) > ANCHOR[:, 1:]  # the second window's first token begins a document
  for other in [*others, *read(net.variables["params"], behind.astype(int))]:
    np.testing.assert_allclose(other, want, atol=2e-5)


@functools.cache
def _losses(clean_frozen):
  """Terms and metrics of the objective, and its draw."""
  net, statistics, config = build(**WEIGHTED)
  draw = windows_lib.draw_windows(jax.random.key(0), 2, L, config.model.code_dim, config.window, config.paths, 0)

  @jax.jit
  def loss(params):
    bound, whole = net.clone().bind({"params": params}), batch(tokens())
    counts = objective.Counts.of(whole, draw)
    return objective.training_loss(bound, statistics, whole, draw, counts, config.loss, False, clean_frozen)

  (ar, window), _, metrics = loss(net.variables["params"])
  return float(ar), float(window), {name: float(mean.value) for name, mean in metrics.items()}, draw


def test_distillation_and_the_head_by_hand():
  """From whole logits: KL divergences, the head's beliefs among its tokens, weights by position, accepted drafts."""
  net, statistics, config = build(**WEIGHTED)
  _, window, metrics, draw = _losses(True)
  token = windows_lib.gather_windows(tokens(), draw.anchor, 8)[..., 1:]

  @jax.jit
  def logits(params):
    """Of the windows, of the clean stream about the same tokens, and of the head about all."""
    bound = net.clone().bind({"params": params})
    hidden, cache = bound.clean(tokens()[:, :-1])
    x = jnp.broadcast_to(bound.embed_unknown(statistics.log_unigram_V), (2, 2, 7, 32))
    mine = bound.window(cache, WindowInputs(draw.anchor, x, jnp.ones((2, 2, 7)), all_unknown=True, skips_anchor=True))
    context = jnp.take_along_axis(hidden[:, None], (draw.anchor[..., None] + jnp.arange(1, 8))[..., None], axis=2)
    every = jnp.broadcast_to(jnp.arange(V), (2, 2, 7, V))
    mine_and_clean = [bound.logits(h)[..., :V] for h in (mine, context)]
    return *mine_and_clean, bound.rescore(mine, token[..., :-1], every, mine_and_clean[0])

  of_window, of_clean, of_head = map(np.asarray, logits(net.variables["params"]))
  assert np.abs(of_head - of_window).max() > 1e-3
  log_softmax = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
  q, p, token = log_softmax(of_window), log_softmax(of_clean), np.asarray(token)
  kl = np.sum(np.exp(p) * (p - q), -1)
  best, best_of_teacher = np.argsort(-q)[..., :4], np.argsort(-p)[..., :8]
  head, accepted = np.zeros((2, 2, 7)), np.zeros((2, 2, 7))
  for i in np.ndindex(2, 2, 7):
    own = best[i].tolist()
    ids = own + [t for t in dict.fromkeys([token[i[0], i[1], i[2] + 1], *best_of_teacher[i]]) if t not in own]
    log_q, log_p = log_softmax(of_head[i][ids]), log_softmax(p[i][ids])
    head[i] = np.sum(np.exp(log_p) * (log_p - log_q))
    accepted[i] = np.minimum(np.exp(log_softmax(of_head[i][own])), np.exp(p[i][own])).sum()
  weights = np.exp(-np.arange(8) / 2.0)
  weights = (weights / weights.mean())[1:]
  scale = config.loss.window_weight / (2 * 2 * 8)
  np.testing.assert_allclose(window, scale * np.sum((kl + 0.5 * head) * weights), rtol=1e-4)
  bits = 1 / np.log(2)
  np.testing.assert_allclose(metrics["window_kl"], bits * kl.mean(), rtol=1e-4)
  np.testing.assert_allclose(metrics["head_loss"], bits * head.mean(), rtol=1e-4)
  np.testing.assert_allclose(metrics["draft_accept"], np.cumprod(accepted, -1).sum(-1).mean(), rtol=1e-4)


def test_a_frozen_clean_stream_is_a_metric_alone():
  """And the windows' loss is that beside a trained one, in whichever order both are read."""
  ar, window, metrics, _ = _losses(True)
  _, trained, others, _ = _losses(False)
  assert ar == 0.0 and metrics["bits"] > 1
  np.testing.assert_allclose(window, trained, rtol=1e-5)
  for name, value in metrics.items():
    np.testing.assert_allclose(others[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_windows_train_alike_on_a_mesh():
  """In shards and chunks of the vocabulary as on one device at once."""
  one, metrics = first_step("some", **AT_ONCE, **DRAFTS)
  other, on_mesh = first_step("some", mesh=(2, 2, 2), **AT_ONCE, **DRAFTS, loss__chunk=96)
  assert metrics["gradient_norm"] > 0.01 and "head_loss" in metrics
  for name, value in on_mesh.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-3, atol=1e-6, err_msg=name)
  assert_close(one.params, other.params, rtol=2e-3, atol=2e-6)


def test_windows_that_leave_nothing_to_draft_are_refused():
  with pytest.raises(config_lib.UserError, match=r"config.window.size: 1 leaves nothing to draft"):
    small_config(**DRAFTS, window__size=1)
