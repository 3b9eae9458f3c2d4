"""The peers of benchmarks/gpu.py: the same networks and steps in plain PyTorch, from the papers' equations, tuned.

NCHW, fused Adam, foreach averages, bfloat16 autocast with float32 parameters, `torch.compile` on CUDA. Each network is
checked by the caller to have as many parameters as ours.
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import nn

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class Attention(nn.Module):
    """Self-attention over pixels, x + W_o softmax(q k^T / sqrt(d)) v, rescaled by sqrt(1/2)."""

    def __init__(self, n, groups):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.GroupNorm(groups, n, eps=1e-6), nn.Conv2d(n, 3 * n, 1), nn.Conv2d(n, n, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = (z.flatten(2).transpose(1, 2)[:, None] for z in self.qkv(self.norm(x)).chunk(3, dim=1))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(b, c, h, w)
        return (x + self.proj(y)) * math.sqrt(0.5)


class Block(nn.Module):
    """The residual block of DDPM++ (Karras et al. 2022, arXiv:2206.00364, table 7)."""

    def __init__(self, n_in, n_out, n_emb, groups, dropout, resample="", attends=False):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, n_in, eps=1e-6), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, n_out, eps=1e-6), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.emb, self.dropout, self.resample = nn.Linear(n_emb, n_out), dropout, resample
        self.skip = nn.Conv2d(n_in, n_out, 1) if resample or n_in != n_out else nn.Identity()
        self.attention = Attention(n_out, groups) if attends else nn.Identity()

    def scaled(self, x):
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x, emb):
        h = self.conv1(self.scaled(F.silu(self.norm1(x)))) + self.emb(emb)[:, :, None, None]
        h = self.conv2(F.dropout(F.silu(self.norm2(h)), self.dropout, self.training))
        return self.attention((self.skip(self.scaled(x)) + h) * math.sqrt(0.5))


class DDPMpp(nn.Module):
    """EDM's DDPM++ for 32x32x3: 55.7M parameters at the defaults."""

    def __init__(self, channels=128, multipliers=(2, 2, 2), blocks=4, dropout=0.13, attend_level=1):
        super().__init__()
        n_emb, groups, n, skips = 4 * channels, max(1, min(32, channels // 4)), channels, [channels]
        self.channels, self.conv_in = channels, nn.Conv2d(3, channels, 3, padding=1)
        self.embed = nn.Sequential(nn.Linear(channels, n_emb), nn.SiLU(), nn.Linear(n_emb, n_emb), nn.SiLU())
        self.encoder, self.decoder, self.joins = nn.ModuleList(), nn.ModuleList(), []
        for i, m in enumerate(multipliers):
            if i:
                self.encoder.append(Block(n, n, n_emb, groups, dropout, "down"))
                skips.append(n)
            for _ in range(blocks):
                self.encoder.append(Block(n, channels * m, n_emb, groups, dropout, attends=i == attend_level))
                n = channels * m
                skips.append(n)
        for attends in (True, False):
            self.decoder.append(Block(n, n, n_emb, groups, dropout, attends=attends))
            self.joins.append(False)
        for i, m in reversed(list(enumerate(multipliers))):
            if i < len(multipliers) - 1:
                self.decoder.append(Block(n, n, n_emb, groups, dropout, "up"))
                self.joins.append(False)
            for j in range(blocks + 1):
                attends = i == attend_level and j == blocks
                self.decoder.append(Block(n + skips.pop(), channels * m, n_emb, groups, dropout, attends=attends))
                self.joins.append(True)
                n = channels * m
        self.norm_out, self.conv_out = nn.GroupNorm(groups, n, eps=1e-6), nn.Conv2d(n, 3, 3, padding=1)

    def forward(self, x, t):
        emb = self.embed(sinusoids(t, self.channels))
        x = self.conv_in(x)
        skips = [x]
        for block in self.encoder:
            x = block(x, emb)
            skips.append(x)
        for block, joins in zip(self.decoder, self.joins, strict=True):
            x = block(torch.cat([x, skips.pop()], 1) if joins else x, emb)
        return self.conv_out(F.silu(self.norm_out(x)))


class DiTBlock(nn.Module):
    """The adaLN-zero block (Peebles & Xie 2023, arXiv:2212.09748, section 3.2)."""

    def __init__(self, n, heads):
        super().__init__()
        self.heads, self.modulation = heads, nn.Linear(n, 6 * n)
        self.qkv, self.proj = nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.fc1, self.fc2 = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)

    def forward(self, x, c):
        b, n, d = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, (d,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + gate1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        h = F.layer_norm(x, (d,), eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class DiT(nn.Module):
    """The class-conditional transformer on latents 32x32x4, patches of 2, learned variance."""

    def __init__(self, width=1152, depth=28, heads=16, size=32, channels=4, patch=2, classes=1000):
        super().__init__()
        self.patch, self.width, outputs = patch, width, 2 * channels * patch**2
        self.x_embedder = nn.Conv2d(channels, width, patch, patch)
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(classes + 1, width)
        self.register_buffer("position", torch.randn(1, (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.modulation, self.linear = nn.Linear(width, 2 * width), nn.Linear(width, outputs)

    def forward(self, x, t, labels):
        b, _, h, w = x.shape
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.position
        c = self.t_embedder(sinusoids(t, 256)) + self.y_embedder(labels)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        x = self.linear(F.layer_norm(x, (self.width,), eps=1e-6) * (1 + scale) + shift)
        x = x.reshape(b, h // self.patch, w // self.patch, self.patch, self.patch, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h, w)


def sinusoids(t, n):
    rates = torch.exp(torch.arange(n // 2, device=t.device) * (-math.log(10000.0) / (n // 2 - 1)))
    angles = t[:, None].float() * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def size(net):
    return sum(p.numel() for p in net.parameters())


def prepared(net):
    """The network on the device, compiled there, and whether it runs in bfloat16."""
    net = net.to(DEVICE)
    return torch.compile(net) if CUDA else net


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA)


def train_step(net, loss, lr):
    """() -> None, one update: loss(net) -> scalar, fused AdamW, and a moving average of the parameters."""
    params = [p for p in net.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr, weight_decay=0.0, fused=CUDA)
    compiled = prepared(net.train())

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            value = loss(compiled)
        value.backward()
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in params], 1e-4)
        return value

    return step


def edm_loss(batch, spread=0.5):
    """The loss of EDM (Karras et al. 2022, eq. 8) on made-up pictures."""
    images = torch.rand(batch, 3, 32, 32, device=DEVICE) * 2 - 1

    def loss(net):
        sigma = torch.exp(torch.randn(batch, 1, 1, 1, device=DEVICE) * 1.2 - 1.2)
        error = edm_denoise(net, images + sigma * torch.randn_like(images), sigma, spread) - images
        return (((sigma**2 + spread**2) / (sigma * spread) ** 2) * error**2).mean()

    return loss


def edm_denoise(net, x, sigma, spread=0.5):
    total = (sigma**2 + spread**2).sqrt()
    out = net(x / total, sigma.flatten().log() / 4).float()
    return x * (spread / total) ** 2 + out * (sigma * spread / total)


def edm_sample(net, batch, steps):
    """Heun's method on EDM's grid, 2 steps - 1 evaluations."""
    ramp = torch.arange(steps, device=DEVICE) / (steps - 1)
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    x = torch.randn(batch, 3, 32, 32, device=DEVICE) * sigmas[0]
    with torch.no_grad(), autocast():
        for i, sigma in enumerate(sigmas):
            here = sigma.expand(batch, 1, 1, 1)
            slope = (x - edm_denoise(net, x, here)) / here
            if i == steps - 1:
                return x - sigma * slope
            there = sigmas[i + 1].expand(batch, 1, 1, 1)
            euler = x + (there - here) * slope
            x = x + (there - here) * (slope + (euler - edm_denoise(net, euler, there)) / there) / 2
    return x


def noise_loss(batch, shape, labels):
    """L_simple on made-up data; a network with twice the channels predicts a variance too, which is left alone."""
    x0 = torch.randn(batch, *shape, device=DEVICE)
    y = torch.randint(0, labels, (batch,), device=DEVICE) if labels else None

    def loss(net):
        eps, t = torch.randn_like(x0), torch.rand(batch, device=DEVICE)
        alpha = torch.cos(t * math.pi / 2)[:, None, None, None]
        x = alpha * x0 + (1 - alpha**2).sqrt() * eps
        out = net(x, 1000 * t) if y is None else net(x, 1000 * t, y)
        return ((getattr(out, "sample", out)[:, : shape[0]].float() - eps) ** 2).mean()

    return loss


def ddpm_net(width=128):
    """diffusers' U-Net in the shape of Ho et al. 2020 for CIFAR-10."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=max(1, min(32, width // 4)),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        dropout=0.1,
    )


def diffusion(toy):
    """diffusers' pipeline of Stable Diffusion 1.5 with random weights, narrow at toy size."""
    from sd_full_size import pipeline

    return pipeline(toy, seed=0)


def diffusion_draw(pipe, batch, size, steps):
    """() -> pictures: the pipeline in bfloat16, channels last, its U-Net and decoder compiled with CUDA graphs.

    PEER_COMPILE=max-autotune takes minutes more to compile, and is the fastest that torch.compile has.
    """
    pipe.set_progress_bar_config(disable=True)
    if CUDA:
        pipe.to(DEVICE, torch.bfloat16)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        mode = os.environ.get("PEER_COMPILE", "reduce-overhead")
        pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True)

    def draw():
        with torch.no_grad():
            return pipe(
                "a lighthouse", negative_prompt="blurry", num_images_per_prompt=batch, num_inference_steps=steps,
                guidance_scale=7.5, height=size, width=size, output_type="pt",
            ).images  # fmt: skip

    return draw


def most_memory():
    """Bytes on the device at most, or None where it does not say."""
    return torch.cuda.max_memory_allocated() if CUDA else None
