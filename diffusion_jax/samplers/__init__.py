"""Samplers: ways to move x from t to s < t (see `driver`), by family."""

from diffusion_jax.samplers.ancestral import analytic_dpm, ancestral, ddim, ddpm, estimate_mmse, euler_ancestral
from diffusion_jax.samplers.driver import chain, ravelled, sample, skipping
from diffusion_jax.samplers.exponential import (
    deis,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m,
    dpmpp_3m_sde,
    exponential_ab,
    ipndm,
    multistep,
    sa_solver,
    unipc,
)
from diffusion_jax.samplers.few_step import consistency, jump, undershoot
from diffusion_jax.samplers.flow import adaptive, dpm_2, euler, heun, midpoint
from diffusion_jax.samplers.langevin import annealed_langevin, langevin, langevin_dynamics, underdamped_langevin
from diffusion_jax.samplers.noise import brownian, white
from diffusion_jax.samplers.singlestep import dpm_solver_2, dpm_solver_3, dpmpp_2s, dpmpp_2s_sde, dpmpp_3s
from diffusion_jax.samplers.stochastic import churn, euler_maruyama, restart, reverse_diffusion
