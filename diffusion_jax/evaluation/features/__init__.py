"""Feature networks: what the distances between sets of pictures are measured in."""

from diffusion_jax.evaluation.features.clip import clip_features as clip_features
from diffusion_jax.evaluation.features.clip import clip_image as clip_image
from diffusion_jax.evaluation.features.dinov2 import dinov2_features as dinov2_features
from diffusion_jax.evaluation.features.dinov2 import dinov2_vitl14 as dinov2_vitl14
from diffusion_jax.evaluation.features.inception import inception_v3 as inception_v3
from diffusion_jax.evaluation.features.known import Opened as Opened
from diffusion_jax.evaluation.features.known import networks as networks
from diffusion_jax.evaluation.features.known import open_features as open_features
from diffusion_jax.evaluation.features.known import pixels as pixels
from diffusion_jax.evaluation.features.net import FeatureNet as FeatureNet
from diffusion_jax.evaluation.features.net import Loaded as Loaded
from diffusion_jax.evaluation.features.net import pictures as pictures
from diffusion_jax.evaluation.features.net import to_pictures as to_pictures
