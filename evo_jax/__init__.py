"""Evo: an autoregressive-diffusion language model as one latent flow, in JAX and Flax."""
