"""Which parameters a run trains (config.train.trainable), and which stay as they are.

Parameters are nested dicts; a path is the names down to one. What is trained and what is frozen are two such trees, of
which every parameter is in one. Trained ones are float32, frozen ones config.model.param_dtype.
"""

import difflib
import fnmatch
from typing import Any

from flax import traverse_util

from evo_jax import config as config_lib
from evo_jax.errors import UserError
from evo_jax.network import evo as evo_lib

ALL, WINDOWS = "all", "windows"


def split(params: dict[str, Any], trainable: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """(trained, frozen) of a tree with a leaf, whatever it is, for every parameter.

  trainable: config.train.trainable. Raises UserError for a pattern that fits no parameter.
  """
  if trainable == ALL:
    return params, {}
  flat = traverse_util.flatten_dict(params)
  trained = set().union(*(_selected(part, flat) for part in config_lib.parts_of(trainable)))
  parts = ({p: x for p, x in flat.items() if (p in trained) == wanted} for wanted in (True, False))
  return tuple(traverse_util.unflatten_dict(part) for part in parts)


def _selected(part: str, paths: dict[tuple[str, ...], Any]) -> set[tuple[str, ...]]:
  """The paths that a part of config.train.trainable means."""
  if part == WINDOWS:
    return {path for path in paths if evo_lib.is_of_windows(path)}
  names = {"/".join(path): path for path in paths}
  if found := fnmatch.filter(names, part):
    return {names[name] for name in found}
  near = ", ".join(difflib.get_close_matches(part, names, n=4, cutoff=0.0))
  raise UserError(f"config.train.trainable: {part!r} fits no parameter; there are {near} and others")


def merge(trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
  """The whole tree: the inverse of `split`."""
  if not frozen:
    return trained
  return traverse_util.unflatten_dict(traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen))


def leaves_clean_stream(trained: dict[str, Any]) -> bool:
  """Whether training these parameters changes nothing that the clean stream computes."""
  return all(map(evo_lib.is_of_windows, traverse_util.flatten_dict(trained)))


def describe_work(trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
  """What `network.flops.train_step` is to know of a partition, by shapes."""
  sizes = [sum(leaf.size for leaf in traverse_util.flatten_dict(part).values()) for part in (trained, frozen)]
  return {"trained": sizes[0] / sum(sizes), "clean_frozen": leaves_clean_stream(trained)}


def check_trains(config: config_lib.Config, trained: dict[str, Any]) -> None:
  """Raises UserError where nothing that is trained receives a gradient, as long as there are no windows."""
  if not leaves_clean_stream(trained):
    return
  require = lambda condition, problem: config.train.require(condition, "trainable", f"{problem} trains nothing")
  require(config.window.count > 0, "with window.count = 0")
  require(config.loss.window_weight > 0, "with loss.window_weight = 0")
  require(config.window.start == 0, f"before window.start = {config.window.start}")
