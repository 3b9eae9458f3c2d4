"""Networks: Flax NNX modules behind the `Net` border of two pure functions."""

from diffusion_jax.nets.autoencoder import Autoencoder as Autoencoder
from diffusion_jax.nets.autoencoder import kl_autoencoder as kl_autoencoder
from diffusion_jax.nets.autoencoder import sd_vae as sd_vae
from diffusion_jax.nets.edm2 import edm2 as edm2
from diffusion_jax.nets.edm2 import edm2_imagenet64 as edm2_imagenet64
from diffusion_jax.nets.edm2 import edm2_imagenet512 as edm2_imagenet512
from diffusion_jax.nets.edm2 import forced_weight_norm as forced_weight_norm
from diffusion_jax.nets.functional import count as count
from diffusion_jax.nets.functional import functional as functional
from diffusion_jax.nets.mlp import mlp as mlp
from diffusion_jax.nets.ncsnpp import ddpmpp as ddpmpp
from diffusion_jax.nets.ncsnpp import edm_cifar10 as edm_cifar10
from diffusion_jax.nets.ncsnpp import song_cifar10 as song_cifar10
from diffusion_jax.nets.unet import ddpm_cifar10 as ddpm_cifar10
from diffusion_jax.nets.unet import unet as unet
