"""Samplers: ways to move x from t to s < t (see `driver`), by family."""

from diffusion_jax.samplers.ancestral import ancestral, ddim, ddpm
from diffusion_jax.samplers.driver import chain, sample
from diffusion_jax.samplers.exponential import dpmpp_2m
from diffusion_jax.samplers.flow import euler, heun
from diffusion_jax.samplers.langevin import langevin
from diffusion_jax.samplers.noise import white
from diffusion_jax.samplers.stochastic import churn

__all__ = ["ancestral", "chain", "churn", "ddim", "ddpm", "dpmpp_2m", "euler", "heun", "langevin", "sample", "white"]
