"""The clean stream's keys and values in pages, blocks of positions that texts with the same beginning share.

A table says, text by text, which page holds which positions, so that memory is taken page by page and a page that
several texts begin with is there once (PagedAttention, Kwon et al., 2023). Attention goes over the table's columns with
a running maximum and sum (FlashAttention, Dao et al., 2022): what a text gives depends neither on how long the others
are nor on where its pages lie, bit for bit, since columns behind its end change nothing.

Letters in names: B texts, K heads for keys and values, G = H / K queries that share them, S slots, T new positions,
E elements of a head, P pages, W positions of a page, J columns of the table. Pages may be in X groups, one for each
shard of a batch: then a text's pages are those of its shard.
"""

import flax.struct
import jax
import jax.numpy as jnp

_LOWEST = -1e30  # below all scores, and finite, so that differences of maxima are numbers


@flax.struct.dataclass
class Pages:
  """Keys and values of one layer.

  k: (X, P, K, E, W), positions last, which makes a CPU's product with queries six times as fast; v: (X, P, K, W, E).
  table: (B, J) int32, the page of positions j W to (j + 1) W - 1, of its text's group, which is number
  b // (B / X). read: () int32, so many columns hold all that any slot sees.
  """

  k: jax.Array
  v: jax.Array
  table: jax.Array
  read: jax.Array

  @property
  def width(self) -> int:
    """W."""
    return self.k.shape[-1]

  def write(self, first_B: jax.Array, keys_BxKxTxE: jax.Array, values_BxKxTxE: jax.Array) -> "Pages":
    """With new keys and values at the positions first[b], first[b] + 1, ..."""
    B, _, T, _ = keys_BxKxTxE.shape
    X, W = self.k.shape[0], self.width
    position = first_B[:, None] + jnp.arange(T)
    page = jnp.take_along_axis(self.table, position // W, axis=1, mode="clip")
    grouped = lambda a: a.reshape(X, B // X, *a.shape[1:])

    def write(k, v, page, offset, new_k, new_v):  # one group
      new_k, new_v = (a.swapaxes(1, 2).astype(k.dtype) for a in (new_k, new_v))
      return k.at[page, :, :, offset].set(new_k), v.at[page, :, offset].set(new_v)

    new = (page, position % W, keys_BxKxTxE, values_BxKxTxE)
    k, v = jax.vmap(write)(self.k, self.v, *map(grouped, new))
    return self.replace(k=k, v=v)

  def column(self, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys (B, K, E, W) and values (B, K, W, E) of column j of the table."""
    X, (B, _) = self.k.shape[0], self.table.shape
    page = jax.lax.dynamic_index_in_dim(self.table, j, axis=1, keepdims=False).reshape(X, B // X)
    take = jax.vmap(lambda pages, page: pages[page])
    return tuple(take(a, page).reshape(B, *a.shape[2:]) for a in (self.k, self.v))


def attend_pages(
  q_BxKxGxSxE: jax.Array,
  pages: Pages,
  stop_BxS: jax.Array,
  own: tuple[jax.Array, jax.Array] | None = None,
  visible_BxSxT: jax.Array | None = None,
) -> jax.Array:
  """Softmax attention of every slot to positions of its text and to T slots beside it: (B, K, G, S, E) in q's dtype.

  stop_BxS: a slot sees the positions before it. own: keys and values (B, K, T, E) of the slots that visible_BxSxT says;
  None: there are none. The softmax spans both and is computed in float32.
  """
  B, K, G, S, E = q_BxKxGxSxE.shape
  q = (q_BxKxGxSxE * E**-0.5).reshape(B, K, G * S, E)
  by_query = lambda mask_BxSxT: jnp.broadcast_to(mask_BxSxT[:, None, None], (B, K, G, *mask_BxSxT.shape[1:]))

  def add(carry, keys_BxKxExT, values_BxKxTxE, seen_BxSxT):
    maximum, total, out = carry
    scores = jnp.einsum("bkme,bket->bkmt", q, keys_BxKxExT, preferred_element_type=jnp.float32)
    scores = jnp.where(by_query(seen_BxSxT).reshape(scores.shape), scores, -jnp.inf)
    highest = jnp.maximum(maximum, jnp.max(scores, axis=-1, keepdims=True))
    weights, kept = jnp.exp(scores - highest), jnp.exp(maximum - highest)
    added = jnp.einsum("bkmt,bkte->bkme", weights.astype(q.dtype), values_BxKxTxE, preferred_element_type=jnp.float32)
    return highest, total * kept + jnp.sum(weights, axis=-1, keepdims=True), out * kept + added

  carry = jnp.full((B, K, G * S, 1), _LOWEST), jnp.zeros((B, K, G * S, 1)), jnp.zeros((B, K, G * S, E))
  if own is not None:
    keys, values = own
    carry = add(carry, keys.swapaxes(2, 3), values, jnp.broadcast_to(visible_BxSxT, (B, S, keys.shape[2])))

  def step(loop):
    j, carry = loop
    position = j * pages.width + jnp.arange(pages.width)
    return j + 1, add(carry, *pages.column(j), position < stop_BxS[..., None])

  _, (_, total, out) = jax.lax.while_loop(lambda loop: loop[0] < pages.read, step, (jnp.int32(0), carry))
  # A slot of a row that holds no text may see nothing: 0.
  return (out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).reshape(q_BxKxGxSxE.shape).astype(q_BxKxGxSxE.dtype)
