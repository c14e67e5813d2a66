"""Which tensor of a transformers checkpoint is which part of which parameter.

Letters: D width, H heads, K heads for keys and values, G = H / K, E elements of a head, F hidden, V rows of the tables.
"""

import dataclasses

import numpy as np

from evo_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Part:
  """A tensor, and the part of a parameter that it is.

  name, shape: the tensor's, as in the checkpoint. path: the parameter's names. layer: of a stacked parameter; None: it
  has none. start, target: where in the parameter, or in its layer, the part begins, and its shape. transposed: a matrix
  (out, in) there is (in, out) here.
  """

  name: str
  shape: tuple[int, ...]
  path: tuple[str, ...]
  layer: int | None
  start: tuple[int, ...]
  target: tuple[int, ...]
  transposed: bool = False

  @property
  def slices(self) -> tuple[int | slice, ...]:
    """Of the whole parameter."""
    layer = () if self.layer is None else (self.layer,)
    return (*layer, *(slice(a, a + size) for a, size in zip(self.start, self.target)))

  def to_parameter(self, tensor: np.ndarray) -> np.ndarray:
    """The tensor as the part of the parameter."""
    return (tensor.T if self.transposed else tensor).reshape(self.target)

  def to_tensor(self, part: np.ndarray) -> np.ndarray:
    """The inverse of `to_parameter`, contiguous."""
    shape = self.shape[::-1] if self.transposed else self.shape
    part = part.reshape(shape)
    return np.ascontiguousarray(part.T if self.transposed else part)


def parts(model: config_lib.Model, rows: int) -> list[Part]:
  """All tensors of a model. rows: V, those of the checkpoint's tables; the parameters may have more."""
  D = model.width
  table = lambda name, own: Part(name, (rows, D), (own,), None, (0, 0), (rows, D))
  found = [
    table("model.embed_tokens.weight", "embedding"),
    Part("model.norm.weight", (D,), ("final_norm",), None, (0,), (D,)),
  ]
  if not model.tie_embeddings:
    found.append(table("lm_head.weight", "head"))
  return found + [part for layer in range(model.layers) for part in _layer(model, layer)]


def _layer(model: config_lib.Model, layer: int) -> list[Part]:
  D, H, K, E, F = model.width, model.heads, model.kv_heads, model.head_size, model.hidden
  G = H // K

  def part(name, shape, own, target, start=None, transposed=False):
    start = start or (0,) * len(target)
    return Part(f"model.layers.{layer}.{name}", shape, ("blocks", own), layer, start, target, transposed)

  def vector(name, own, size):
    return part(f"{name}.weight", (size,), own, (size,))

  def matrix(name, own, inputs, outputs, target):
    return part(f"{name}.weight", (outputs, inputs), own, target, transposed=True)

  found = [
    vector("input_layernorm", "attention_norm", D),
    vector("post_attention_layernorm", "mlp_norm", D),
    matrix("self_attn.o_proj", "w_o", H * E, D, (H, E, D)),
    matrix("mlp.gate_proj", "w_gate", D, F, (D, F)),
    matrix("mlp.up_proj", "w_up", D, F, (D, F)),
    matrix("mlp.down_proj", "w_down", F, D, (F, D)),
  ]
  # Each head for keys and values has its G queries, its key and its value side by side.
  for name, begin, count in (("q_proj", 0, G), ("k_proj", G, 1), ("v_proj", G + 1, 1)):
    size, start = K * count * E, (0, 0, begin, 0)
    found.append(part(f"self_attn.{name}.weight", (size, D), "w_qkv", (D, K, count, E), start, transposed=True))
    if model.qkv_bias:
      found.append(part(f"self_attn.{name}.bias", (size,), "b_qkv", (K, count, E), start[1:]))
  if model.qk_norm:
    found += [vector("self_attn.q_norm", "q_norm", E), vector("self_attn.k_norm", "k_norm", E)]
  return found
