"""The header of a GGUF file: its metadata, and where its tensors are."""

import math
import os
import struct
from typing import Any, ClassVar, NamedTuple

import numpy as np

from evo_jax.errors import UserError


class Tensor(NamedTuple):
  """A tensor in a file that is mapped into memory. kind: a gguf.GGMLQuantizationType. data: its bytes, (n,) uint8."""

  kind: Any
  shape: tuple[int, ...]
  data: np.ndarray


def read_header(path: str | os.PathLike, library) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Values by key, and tensors by name. Raises UserError, OSError.

  The reader of the package gguf makes an object of each of the half a million strings of a vocabulary and its merges,
  which takes a gigabyte; from the package come names of types and what their tensors need.
  """
  if os.path.getsize(path) == 0:
    raise UserError(f"{path}: is empty")
  data = np.memmap(path, np.uint8, "r")
  try:
    return _Header(data, library).read()
  except (struct.error, ValueError, LookupError, TypeError, ArithmeticError) as error:  # whatever damage leads to
    reason = "it ends within its header" if isinstance(error, struct.error) else str(error)
    raise UserError(f"{path}: is not a GGUF file, or cut off or damaged ({reason})") from error


class _Header:
  """Reads the header of a GGUF file of version 2 or 3, little-endian, from its start to its end.

  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
  """

  _STRING, _ARRAY = 8, 9
  _NUMBERS: ClassVar = dict(
    enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8"))
  )

  def __init__(self, data: np.ndarray, library):
    self._data, self._bytes, self._at, self._library = data, memoryview(data), 0, library

  def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
    magic, version, tensors, keys = self._numbers("<4sIQQ")
    if magic != b"GGUF":
      raise ValueError("it does not begin as one")
    if version not in (2, 3):
      raise ValueError(f"its version is {version}, or it is of the other byte order")
    metadata = {}
    for _ in range(keys):
      key = self._string()
      metadata[key] = self._value(*self._numbers("<I"))
    described = [self._tensor() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    start = -(-self._at // alignment) * alignment
    return metadata, {name: self._locate(name, kind, shape, start + at) for name, shape, kind, at in described}

  def _numbers(self, form: str) -> tuple[Any, ...]:
    values = struct.unpack_from(form, self._bytes, self._at)
    self._at += struct.calcsize(form)
    return values

  def _string(self) -> str:
    (length,) = self._numbers("<Q")
    text = bytes(self._bytes[self._at : self._at + length])
    if len(text) < length:
      raise ValueError("a string ends behind the file")
    self._at += length
    return text.decode()

  def _value(self, kind: int) -> Any:
    if kind == self._STRING:
      return self._string()
    if kind == self._ARRAY:
      kind, length = self._numbers("<IQ")
      if self._NUMBERS[kind]:
        return self._array(kind, length).tolist()
      return [self._value(kind) for _ in range(length)]
    (value,) = self._array(kind, 1)
    # A float32 as the shortest decimal that names it, which is what it was written from: 1e-05.
    return float(str(value)) if self._NUMBERS[kind] == "<f4" else value.item()

  def _array(self, kind: int, length: int) -> np.ndarray:
    array = np.frombuffer(self._bytes, self._NUMBERS[kind], length, self._at)
    self._at += array.nbytes
    return array

  def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape with the rows first, type and position behind the header."""
    name, (dimensions,) = self._string(), self._numbers("<I")
    shape = self._numbers(f"<{dimensions}Q")
    return name, shape[::-1], *self._numbers("<IQ")

  def _locate(self, name: str, kind: int, shape: tuple[int, ...], at: int) -> Tensor:
    try:
      kind = self._library.GGMLQuantizationType(kind)
    except ValueError as error:
      raise ValueError(f"{name} is of GGUF type {kind}, which the package gguf does not know") from error
    block, block_bytes = self._library.GGML_QUANT_SIZES[kind]
    size = math.prod(shape) // block * block_bytes
    if shape[-1] % block or at + size > len(self._data):
      raise ValueError(f"{name} of shape {shape} does not fit into it")
    return Tensor(kind, shape, self._data[at : at + size])
