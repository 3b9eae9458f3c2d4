"""Networks: Flax NNX modules behind the `Net` border of two pure functions."""

from diffusion_jax.nets.functional import count as count
from diffusion_jax.nets.functional import functional as functional
from diffusion_jax.nets.mlp import mlp as mlp
from diffusion_jax.nets.ncsnpp import ddpmpp as ddpmpp
from diffusion_jax.nets.ncsnpp import edm_cifar10 as edm_cifar10
from diffusion_jax.nets.ncsnpp import song_cifar10 as song_cifar10
from diffusion_jax.nets.unet import ddpm_cifar10 as ddpm_cifar10
from diffusion_jax.nets.unet import unet as unet
