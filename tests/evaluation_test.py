"""The evaluator: sums and counts over sequences of which some tokens may not count; path gap; inferred progression."""

import dataclasses

from conftest import small_config
import jax
from model_test import build
import numpy as np
import pytest
from step_test import LEARNED

from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.batch import Batch
from evo_jax.data import tokenizers
from evo_jax.evaluation import paths as paths_lib
from evo_jax.evaluation import progression
from evo_jax.parallel import sharding
from evo_jax.training import state as state_lib

PATHS = ("ar", "diagonal:2")


@pytest.fixture(scope="module")
def evaluator():
  config, tokenizer = small_config(eval__batch_size=4), tokenizers.Bytes()
  mesh = sharding.make_mesh(config_lib.Mesh(), jax.devices()[:1])
  return paths_lib.Evaluator(state_lib.make_model(config, tokenizer), config, tokenizer, mesh)


@pytest.fixture(scope="module")
def state():
  config = small_config()
  mesh = sharding.make_mesh(config_lib.Mesh(), jax.devices()[:1])
  return state_lib.sharded_init(state_lib.make_model(config, tokenizers.Bytes()), config, mesh)


@pytest.fixture(scope="module")
def tokens():
  """Six sequences with a few separators: one and a half of the evaluator's batches."""
  tokens = np.random.default_rng(0).integers(1, 257, (6, 33)).astype(np.int32)
  tokens[:, 0] = tokens[2, 5] = tokens[3, 9:12] = 0
  return tokens


def test_only_counted_tokens_enter_bits_and_units(evaluator, state, tokens):
  counted = np.random.default_rng(1).random(tokens.shape) < 0.5
  counted[:, -1] = True
  batch = Batch(tokens, counted)
  for path, (entry, bits) in zip(PATHS, evaluator.measure(state.params, state.statistics, batch, PATHS)):
    with jax.set_mesh(evaluator.mesh):
      nll, passes = evaluator.token_nll(state.params, state.statistics, batch, path)
    assert nll.shape == (6, 32) and passes.shape == (6,)
    np.testing.assert_allclose(bits, (nll * counted[:, 1:]).sum(1, dtype=np.float64) / np.log(2), rtol=1e-6)
    units = (counted[:, 1:] & (tokens[:, 1:] > 0)).sum()
    assert entry["bits"] == pytest.approx(bits.sum() / units) and entry["stderr"] > 0
    assert entry["passes_per_token"] == {"ar": 1.0, "diagonal:2": 0.25}[path]


def test_a_mask_that_counts_everything_changes_nothing(evaluator, state, tokens):
  measure = lambda batch: evaluator(state.params, state.statistics, batch, PATHS)
  assert measure(Batch(tokens)) == measure(Batch(tokens, np.ones(tokens.shape, bool)))


def test_a_sequence_without_counted_tokens_is_as_good_as_absent(evaluator, state, tokens):
  counted = np.ones(tokens.shape, bool)
  counted[4:] = False
  masked = evaluator(state.params, state.statistics, Batch(tokens, counted), ("ar",))[0]
  absent = evaluator(state.params, state.statistics, Batch(tokens[:4]), ("ar",))[0]
  assert masked["bits"] == absent["bits"]


def test_what_fills_up_a_short_text_is_read_by_no_path(evaluator, state, tokens):
  """Ten tokens of each row, two of them in the second window: neither bits nor passes depend on the padding."""
  counted = np.broadcast_to(np.arange(33) <= 10, tokens.shape)
  paths = ("ar", "diagonal:2", "streams:2", "spread:3", "random:4")
  tables = [
    evaluator(state.params, state.statistics, Batch(np.where(counted, tokens, filler), counted), paths)
    for filler in (0, 7)
  ]
  assert tables[0] == tables[1]
  assert [entry["passes_per_token"] for entry in tables[0][:2]] == [1.0, 0.4]
  assert all(entry["passes_per_token"] <= 1.0 for entry in tables[0])


def test_a_learned_clock_needs_no_text_before_a_window(tokens):
  net, statistics, config = build(257, **LEARNED)
  mesh = sharding.make_mesh(config_lib.Mesh(), jax.devices()[:1])
  evaluator = paths_lib.Evaluator(net.clone(), config, tokenizers.Bytes(), mesh, window=32)
  (entry,) = evaluator(net.variables["params"], statistics, Batch(tokens), ("learned:4",))
  assert np.isfinite(entry["bits"]) and entry["passes_per_token"] == 4 / 32


def test_answers_are_measured_from_their_first_token(tokens):
  """Where windows are informed by what is known alone, tokens one by one cost what autoregression costs: the tiles read
  what the clean stream has read, up to the end of the row, and nothing behind an answer."""
  config = small_config(eval__batch_size=4, model__window_attention="informed", model__isolate_documents=True)
  mesh = sharding.make_mesh(config_lib.Mesh(), jax.devices()[:1])
  model = state_lib.make_model(config, tokenizers.Bytes())
  evaluator = paths_lib.Evaluator(model, config, tokenizers.Bytes(), mesh)
  state = state_lib.sharded_init(model, config, mesh)
  answers = np.zeros(tokens.shape, bool)
  answers[:, 3:14] = answers[:4, 20:21] = answers[2:, 30:] = True
  segments = np.broadcast_to(1 + (np.arange(33) > 16), tokens.shape).astype(np.int32)
  batch = Batch(tokens, None, segments, answers)
  paths = ("ar", "certain:1", "certain:2", "random:8")
  ar, one, two, random = evaluator(state.params, state.statistics, batch, paths)
  assert ar["unit"] == "bits per answer token" and one["bits"] == pytest.approx(ar["bits"], rel=1e-4)
  assert ar["passes_per_token"] == one["passes_per_token"] == 1.0
  few, most = 6 * (4 + 2) + 4 * 1 + 4 * 2, 6 * (4 + 3) + 4 * 1 + 4 * 3  # of 8 and 3 tokens, of 1, of 3
  assert few <= two["passes_per_token"] * answers.sum() <= most  # what is behind an answer's end may come first
  with jax.set_mesh(mesh):
    nll, _ = evaluator.token_nll(state.params, state.statistics, batch, "random:8")
  assert ((nll > 0) == answers[:, 1:]).all() and random["bits"] > 0
  move = lambda x: np.concatenate([x[:, 17:], np.zeros_like(x[:, :17])], axis=1)
  alone = Batch(move(tokens), None, move(segments), move(answers))  # the second conversation of each row
  for path in ("ar", "certain:1"):
    with jax.set_mesh(mesh):
      packed, apart = (evaluator.token_nll(state.params, state.statistics, some, path)[0] for some in (batch, alone))
    counted = alone.answers[:, 1:16]
    np.testing.assert_allclose(packed[:, 17:][counted], apart[:, :15][counted], rtol=1e-4)
  mixed = Batch(tokens, None, segments, np.concatenate([answers[:-1], np.arange(33)[None] > 0]))
  assert evaluator(state.params, state.statistics, mixed, ("ar",))[0]["unit"] == "bits per counted token"


def test_the_gap_extrapolates_the_two_longest_diagonals():
  """A diagonal whose excess over `ar` is 0.5 + 2 / K bits."""
  bits = {"ar": 3.0, **{f"diagonal:{K}": 3.5 + 2 / K for K in (1, 4, 16)}}
  table = [{"path": path, "bits": value} for path, value in bits.items()]
  gap = {entry["path"]: entry["gap"] for entry in paths_lib.path_gap(table)}
  assert gap == pytest.approx({"diagonal:1": 2.5, "diagonal:4": 1.0, "diagonal:16": 0.625, "diagonal:inf": 0.5})
  assert not paths_lib.path_gap(table[1:]) and not paths_lib.path_gap(table[:2])


def test_inferred_times_fall_from_one_to_zero_for_each_token():
  net, statistics, config = build(257, **LEARNED)
  tokenizer = tokenizers.Bytes()
  run = run_lib.Run(config, tokenizer, net.clone(), net.variables["params"], statistics, 0)
  sequence = np.random.default_rng(0).integers(1, 257, 33).astype(np.int32)
  entries = progression.infer_progression(run, Batch(sequence[None]), 8, 4)
  times = np.array([entry["times"] for entry in entries])
  assert times.shape == (32, 5) and (times[:, 0] == 1).all() and (times[:, -1] == 0).all()
  assert (np.diff(times) <= 0).all() and np.ptp(times[:, 2]) > 0.01  # each token has its own
  assert all(0 < entry["half"] < 1 for entry in entries)
  assert len(progression.format_progression(entries, tokenizer, 8).splitlines()) == 1 + 4 + 32
  counted = np.arange(33)[None] >= 11
  some = progression.infer_progression(run, Batch(sequence[None], counted), 8, 4)
  assert some == entries[10:] and some[0]["position"] == 11
  lines = progression.format_progression(some, tokenizer, 8).splitlines()
  assert [i for i, line in enumerate(lines) if line.startswith("---")] == [1, 8, 17]  # before 11, 17 and 25
  apart_config = dataclasses.replace(config.model, isolate_documents=True)
  isolating = dataclasses.replace(run, model=net.clone(config=apart_config))
  apart = progression.infer_progression(isolating, Batch(sequence[None], None, 1 + (np.arange(33)[None] > 12)), 8, 4)
  alone = progression.infer_progression(run, Batch(sequence[None, 13:30]), 4, 4)
  np.testing.assert_allclose([e["nats"] for e in apart[13:29]], [e["nats"] for e in alone], rtol=1e-4)
