"""Our KL autoencoder equals diffusers' AutoencoderKL when it has the same weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from diffusion_jax.nets import count
from diffusion_jax.nets.autoencoder import kl_autoencoder, sd_vae
from diffusion_jax.weights.autoencoder import from_diffusers, load, to_diffusers

torch.set_num_threads(1)
CASES = {
    "f=2": {"widths": (8, 16), "blocks": 1, "channels": 3, "latent": 4, "groups": 4},
    "three levels, grey": {"widths": (8, 8, 16), "blocks": 2, "channels": 1, "latent": 2, "groups": 8},
}


def peer(*, widths, blocks, channels, latent, groups) -> AutoencoderKL:
    """The AutoencoderKL with the same arguments, of random weights: also those that usually start at one or zero."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=latent, layers_per_block=blocks,
        block_out_channels=widths, norm_num_groups=groups,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.3 * torch.randn_like(p))
    return model


def state_of(model: AutoencoderKL) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def like(autoencoder):
    return jax.eval_shape(autoencoder.init, jax.random.key(0))


@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=str)
@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_encode_and_decode_equal(arguments, size):
    model, ours = peer(**arguments), kl_autoencoder(**arguments)
    params = from_diffusers(state_of(model), like(ours))
    factor = 2 ** (len(arguments["widths"]) - 1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, arguments["channels"])).astype(np.float32)
    z = rng.normal(size=(2, size[0] // factor, size[1] // factor, arguments["latent"])).astype(np.float32)
    with torch.no_grad():
        q = model.encode(torch.from_numpy(np.moveaxis(x, -1, 1))).latent_dist
        decoded = model.decode(torch.from_numpy(np.moveaxis(z, -1, 1))).sample
    mean, logvar = jax.jit(ours.encode)(params, x)
    for a, b in ((mean, q.mean), (logvar, q.logvar), (jax.jit(ours.decode)(params, z), decoded)):
        reference = np.moveaxis(b.numpy(), 1, -1)
        assert np.std(reference) > 0.05
        np.testing.assert_allclose(a, reference, atol=1e-4, rtol=1e-4)


def test_written_by_diffusers_read_here_and_back(tmp_path):
    arguments = CASES["f=2"]
    model, ours = peer(**arguments), kl_autoencoder(**arguments)
    model.save_pretrained(tmp_path)
    state = state_of(model)
    back = to_diffusers(load(tmp_path, ours))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


def test_stable_diffusions_graph_has_the_same_weights():
    with torch.device("meta"):
        model = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, norm_num_groups=32,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    shapes = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like(sd_vae()))
    ours = {name: value.shape for name, value in to_diffusers(shapes).items()}
    assert ours == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert count(like(sd_vae())) == sum(p.numel() for p in model.parameters()) == 83_653_863
