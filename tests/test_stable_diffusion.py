"""Stable Diffusion's uses, by their laws: for networks that are simple formulas, and for tiny ones of the real kind."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from diffusion_jax import ddim, ddpm, from_betas, sample, scaled_linear_betas
from diffusion_jax.denoisers import discrete_time, parameterize
from diffusion_jax.forward import q_sample
from diffusion_jax.generating.loading import load_model, read_files
from diffusion_jax.generating.prompts import read_prompts
from diffusion_jax.nets.autoencoder import Autoencoder, Gaussian
from diffusion_jax.nets.clip import TextEncoder, TextStates
from diffusion_jax.systems import stable_diffusion as sd
from diffusion_jax.times import leading
from diffusion_jax.typing import InputError, Net

RNG = np.random.default_rng(0)
KEYS = jax.random.split(jax.random.key(3), 2)
B, H, W, F = 2, 6, 4, 2
SCHEDULE = from_betas(scaled_linear_betas())


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# A model whose networks are formulas ----------------------------------------------------------------------------------


def patches(x):
    """Squares of F x F pixels as channels, which loses nothing: [b, F h, F w, 3] -> [b, h, w, 3 F^2]."""
    b, h, w, c = x.shape
    x = jnp.transpose(jnp.reshape(x, (b, h // F, F, w // F, F, c)), (0, 1, 3, 2, 4, 5))
    return jnp.reshape(x, (b, h // F, w // F, F * F * c))


def pixels(z):
    """The inverse of `patches`."""
    b, h, w, c = z.shape
    z = jnp.transpose(jnp.reshape(z, (b, h, w, F, F, c // F**2)), (0, 1, 3, 2, 4, 5))
    return jnp.reshape(z, (b, F * h, F * w, c // F**2))


def autoencoder():
    return Autoencoder(
        lambda key: {}, lambda params, x: Gaussian(patches(x), jnp.zeros_like(patches(x))), lambda params, z: pixels(z)
    )


def reader(width):
    """A text encoder in which a token's state depends on all tokens of its chunk."""

    def apply(params, ids):
        words = params["table"][ids]
        return TextStates(words + 0.5 * jnp.mean(words, axis=1, keepdims=True), words[:, 0])

    return TextEncoder(lambda key: {"table": jax.random.normal(key, (9, width))}, apply, width)


def unet(params, x, t, cond=None, *, key=None):
    """A network that looks at everything it is told, and at no other example."""
    h = x @ params["x"] + (jnp.mean(cond["tokens"], axis=1) @ params["tokens"])[:, None, None]
    for name in ("vector", "sizes"):
        if name in cond:
            h = h + (cond[name] @ params[name])[:, None, None]
    if "label" in cond:
        h = h + jnp.cos(cond["label"].astype(jnp.float32))[:, None, None, None]
    if "image" in cond:
        h = h + cond["image"] @ params["image"]
    if "residuals" in cond:
        h = h + cond["residuals"][0]
    return jnp.tanh(h + (t / 1000)[:, None, None, None])


def helper(params, x, t, cond=None, *, key=None):
    """What a ControlNet sees in a picture."""
    return (patches(cond["image"]) + jnp.mean(cond["tokens"], axis=(1, 2))[:, None, None, None],)


def model(image=0, **more):
    """(model, parameters); image: channels that the U-Net sees beside the latent."""
    params = {
        "unet": {"x": 0.3 * normal(12, 12), "tokens": normal(5, 12), "vector": normal(5, 12), "sizes": normal(6, 12)}
        | ({"image": 0.5 * normal(image, 12)} if image else {}),
        "one": {"table": normal(9, 3)}, "two": {"table": normal(9, 2)}, "vae": {}, "controlnet": {},
    }  # fmt: skip
    texts = {"one": reader(3), "two": reader(2)}
    net = Net(lambda key: params["unet"], unet)
    return sd.Model(
        texts,
        net,
        autoencoder(),
        SCHEDULE,
        "v",
        scale=2.0,
        factor=F,
        channels=12,
        control=Net(lambda key: {}, helper),
        **more,
    ), params


PLAIN, OWN, EDITING = model(), model(13), model(12)
UPSCALING = model(3, noised=SCHEDULE)


def prompt(*rows, chunks=1):
    """b prompts of some chunks of three ids, each counting one."""
    ids = np.asarray(rows, np.int32).reshape(len(rows), chunks, 3)
    return sd.Prompt({name: jnp.asarray(ids) for name in ("one", "two")},
                     {name: jnp.ones(ids.shape) for name in ("one", "two")})  # fmt: skip


NOISE = normal(B, H, W, 12)
IMAGE = jnp.clip(0.5 * normal(1, F * H, F * W, 3), -1, 1)
SMALL = jnp.clip(0.5 * normal(1, H, W, 3), -1, 1)
MASK = jnp.zeros((1, F * H, F * W, 1)).at[:, 2:9, 4:].set(1.0)
CONTROL = sd.Control((IMAGE + 1) / 2, jnp.float32(0.7))
TIMES = jnp.asarray(sd.fill(np.asarray(leading(5, offset=1))))


def asked(noise=NOISE, guidance=4.0, times=TIMES, positive=None, negative=None):
    positive, negative = positive or prompt([1, 5, 2]), negative or prompt([1, 2, 2])
    return sd.Request(positive, negative, jnp.asarray(guidance, jnp.float32), times, noise)


USES = {
    "text": (PLAIN, lambda m, p, k, r, s: sd.text_to_image(m, p, k, r, s)),
    "control": (PLAIN, lambda m, p, k, r, s: sd.text_to_image(m, p, k, r, s, CONTROL)),
    "image": (PLAIN, lambda m, p, k, r, s: sd.image_to_image(m, p, k, r, s, IMAGE)),
    "blending": (PLAIN, lambda m, p, k, r, s: sd.inpaint(m, p, k, r, s, IMAGE, MASK, whole=jnp.asarray(False))),
    "inpainting": (
        OWN, lambda m, p, k, r, s: sd.inpaint(m, p, k, r, s, IMAGE, MASK, whole=jnp.asarray(True), own=True)
    ),
    "editing": (EDITING, lambda m, p, k, r, s: sd.edit(m, p, k, r, s, IMAGE, jnp.float32(1.5))),
    "upscaling": (UPSCALING, lambda m, p, k, r, s: sd.upscale(m, p, k, r, s, SMALL, jnp.int32(20))),
    "refined": (PLAIN, lambda m, p, k, r, s: sd.text_to_image_refined((m, m), (p, p), k, halves(r), (s, s))),
}  # fmt: skip


def halves(request):
    """The way up to the third time, and the rest of it."""
    end = jnp.full_like(request.times[3:], request.times[2])
    start = jnp.full_like(request.times[:2], request.times[2])
    return (request._replace(times=jnp.concatenate([request.times[:3], end])),
            request._replace(times=jnp.concatenate([start, request.times[2:]])))  # fmt: skip


@functools.cache
def compiled(use, make=ddim):
    """(keys, request) -> pictures, as one program."""
    (m, params), function = USES[use]

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def program(params, keys, request):
        return function(m, params, keys, request, make(SCHEDULE))

    return program, partial(program, params)


def draw(use, make=ddim, keys=KEYS, **more):
    """Pictures of a use, by a program that is kept."""
    return compiled(use, make)[1](keys, asked(**more))


@pytest.mark.parametrize("use", USES)
def test_one_program_serves_seeds_scales_prompts_and_steps(use):
    steps = [sd.fill(np.asarray(leading(n, offset=1))) for n in (5, 6, 8)]
    assert {len(times) for times in steps} == {9}
    before = compiled(use, ddpm)[0]._cache_size()
    drawn = [draw(use, ddpm, times=jnp.asarray(times)) for times in steps]
    drawn += [draw(use, ddpm, noise=-NOISE), draw(use, ddpm, guidance=2.0), draw(use, ddpm, KEYS[::-1])]
    drawn += [draw(use, ddpm, positive=prompt([1, 7, 2])), draw(use, ddpm, negative=prompt([1, 7, 2]))]
    assert compiled(use, ddpm)[0]._cache_size() == before + 1
    assert np.max(np.abs(drawn)) <= 1
    for i, one in enumerate(drawn):
        assert all(np.max(np.abs(one - other)) > 1e-3 for other in drawn[:i])


@pytest.mark.parametrize("use", ["text", "blending", "editing", "upscaling"])
def test_filling_up_the_times_changes_no_bit(use):
    np.testing.assert_array_equal(draw(use, ddpm), draw(use, ddpm, times=TIMES[:6]))


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_examples_are_drawn_by_themselves(use):
    same, one, two = prompt([1, 5, 2]), prompt([1, 5, 2], [1, 6, 2]), prompt([1, 2, 2], [1, 3, 2])
    both = draw(use, ddpm, positive=one, negative=two)
    for i in range(B):
        told = {"positive": prompt([1, 5 + i, 2]), "negative": prompt([1, 2 + i, 2])}
        alone = draw(use, ddpm, KEYS[i : i + 1], noise=NOISE[i : i + 1], **told)
        np.testing.assert_allclose(alone[0], both[i], atol=1e-5)
    plain, other = draw(use, ddpm, positive=same), draw(use, ddpm, noise=NOISE.at[1].add(1.0), positive=same)
    np.testing.assert_array_equal(other[0], plain[0])
    assert np.max(np.abs(other[1] - plain[1])) > 1e-3


def test_times_that_are_known_need_not_be_traced():
    m, params = PLAIN
    known = jax.jit(lambda noise: sd.text_to_image(m, params, KEYS, asked(noise), ddim(SCHEDULE)))(NOISE)
    np.testing.assert_allclose(known, draw("text"), atol=1e-5)


def test_each_picture_may_have_its_own_scale():
    both = draw("text", guidance=[4.0, 2.0])
    for i, scale in enumerate((4.0, 2.0)):
        np.testing.assert_allclose(draw("text", guidance=scale)[i], both[i], atol=1e-5)


def alone(m, params, positive, noise=NOISE, **more):
    """Pictures by the denoiser that knows a prompt, without guidance."""
    cond = {"tokens": jnp.repeat(sd.encode_prompt(m, params, positive)["tokens"], B, axis=0), **more}
    denoiser = parameterize(partial(m.unet.apply, params["unet"]), SCHEDULE, "v", discrete_time(1000))
    z = sample(KEYS, ddim(SCHEDULE), denoiser, noise, TIMES[:6], cond)
    return sd.decode(m, params, z)


@pytest.mark.parametrize(("guidance", "told"), [(1.0, [1, 5, 2]), (0.0, [1, 2, 2])])
def test_at_scale_one_the_prompt_counts_and_at_scale_nought_the_negative(guidance, told):
    drawn = draw("text", guidance=guidance)
    np.testing.assert_allclose(drawn, jax.jit(partial(alone, PLAIN[0]))(PLAIN[1], prompt(told)), atol=1e-5)


def test_editing_at_scales_of_one_is_the_model_that_knows_text_and_picture():
    m, params = EDITING
    drawn = jax.jit(lambda r: sd.edit(m, params, KEYS, r, ddim(SCHEDULE), IMAGE, jnp.float32(1)))(asked(guidance=1))
    seen = jnp.repeat(patches(IMAGE), B, axis=0)
    np.testing.assert_allclose(drawn, jax.jit(partial(alone, m))(params, prompt([1, 5, 2]), image=seen), atol=1e-5)


@pytest.mark.slow
def test_upscaling_tells_the_network_the_picture_with_its_noise_and_the_level():
    m, params = UPSCALING
    drawn, other = draw("upscaling", guidance=1), draw("upscaling", keys=KEYS[::-1], guidance=1)
    noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), (H, W, 3)))(KEYS)
    seen = q_sample(SCHEDULE, jnp.repeat(SMALL, B, axis=0), jnp.float32(21 / 1000), noise)
    told = {"image": seen, "label": jnp.full(B, 20)}
    np.testing.assert_allclose(drawn, jax.jit(partial(alone, m))(params, prompt([1, 5, 2]), **told), atol=1e-5)
    assert np.max(np.abs(other - drawn)) > 1e-4  # other keys, other noise in the picture
    with pytest.raises(ValueError, match="no schedule"):
        sd.upscale(*PLAIN, KEYS, asked(), ddim(SCHEDULE), SMALL, jnp.int32(20))


def test_a_control_of_scale_nought_is_none():
    def drawn(scale):
        return sd.text_to_image(*PLAIN, KEYS, asked(), ddim(SCHEDULE), CONTROL._replace(scale=scale))

    program, plain = jax.jit(drawn), draw("text")
    np.testing.assert_allclose(program(jnp.float32(0)), plain, atol=1e-6)
    assert np.max(np.abs(program(jnp.float32(0.5)) - plain)) > 1e-2
    m, params = PLAIN[0]._replace(control=None), PLAIN[1]
    with pytest.raises(ValueError, match="no ControlNet"):
        sd.text_to_image(m, params, KEYS, asked(), ddim(SCHEDULE), CONTROL)


# Pictures to begin with ----------------------------------------------------------------------------------------------


def test_a_little_noise_leaves_the_picture():
    late = jnp.asarray([2, 0]) / 1000
    drawn = draw("image", times=late, guidance=1)
    assert 1e-4 < np.max(np.abs(drawn - IMAGE)) < 0.5
    still = draw("image", times=late, guidance=1, noise=jnp.zeros_like(NOISE))
    np.testing.assert_allclose(still, jnp.repeat(IMAGE, B, axis=0), atol=0.3)
    np.testing.assert_allclose(sd.decode(*PLAIN, sd.encode(*PLAIN, IMAGE)), IMAGE, atol=1e-6)


@pytest.fixture(scope="module")
def blending():
    m, params = PLAIN

    @jax.jit
    def drawn(mask, whole, image):
        return sd.inpaint(m, params, KEYS, asked(), ddim(SCHEDULE), image, mask, whole=whole)

    return drawn


def test_where_the_mask_is_nought_the_picture_stays(blending):
    for whole in (True, False):
        drawn = blending(MASK, jnp.asarray(whole), IMAGE)
        kept = np.broadcast_to(np.asarray(MASK == 0), drawn.shape)
        kept_latents = np.asarray(pixels(jnp.repeat(1 - sd.shrink(MASK, F), 12, axis=-1)))[..., :3] > 0
        pictures = np.broadcast_to(np.asarray(IMAGE), drawn.shape)
        stays = np.broadcast_to(kept_latents, drawn.shape)
        np.testing.assert_allclose(drawn[stays], pictures[stays], atol=1e-6)
        assert np.max(np.abs(np.asarray(drawn - IMAGE)[~stays & ~kept])) > 0.1
    nothing = blending(jnp.zeros_like(MASK), jnp.asarray(True), IMAGE)
    np.testing.assert_allclose(nothing, jnp.repeat(IMAGE, B, axis=0), atol=1e-6)


def test_a_mask_of_everything_is_text_or_image_to_image(blending):
    every = jnp.ones_like(MASK)
    fresh, begun = (blending(every, jnp.asarray(whole), IMAGE) for whole in (True, False))
    np.testing.assert_allclose(fresh, draw("text"), atol=1e-5)
    np.testing.assert_allclose(begun, draw("image"), atol=1e-5)
    np.testing.assert_array_equal(blending(every, jnp.asarray(True), -IMAGE), fresh)


def test_blending_puts_back_what_is_known_at_the_level_of_each_step():
    """By the equation, for a sampler that leaves x alone."""
    z0, noise, mask = normal(B, 2, 2, 1), normal(B, 2, 2, 1), jnp.asarray(RNG.integers(0, 2, (B, 2, 2, 1)), jnp.float32)
    still = sd.Sampler(lambda x: (), lambda key, x, state, t, s, denoise: (x, state))
    x, _ = sd.blend(still, SCHEDULE, z0, mask, noise).step(KEYS, 0 * z0, (), jnp.float32(0.5), jnp.float32(0.4), None)
    alpha, sigma = SCHEDULE(jnp.float32(0.4))
    np.testing.assert_allclose(x, (1 - mask) * (alpha * z0 + sigma * noise), atol=1e-6)


def test_its_own_network_sees_the_mask_and_what_is_outside_of_it():
    m, params = OWN
    outside = m.scale * patches(IMAGE * (1 - MASK))
    seen = jnp.repeat(jnp.concatenate([sd.shrink(MASK, F), outside], axis=-1), B, axis=0)
    wanted = jax.jit(partial(alone, m))(params, prompt([1, 5, 2]), image=seen)
    np.testing.assert_allclose(draw("inpainting", guidance=1), wanted, atol=1e-5)


def test_a_mask_of_latents_takes_the_pixel_at_the_corner():
    mask = jnp.zeros((1, 4, 4, 1)).at[0, 0, 2].set(0.5).at[0, 1, 1].set(1.0).at[0, 2, 0].set(0.49)
    assert sd.shrink(mask, 2)[0, ..., 0].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert sd.shrink(mask, 1)[0, ..., 0].tolist()[1] == [0.0, 1.0, 0.0, 0.0]


# Prompts and times ----------------------------------------------------------------------------------------------------


def test_chunks_are_read_by_themselves_and_joined():
    encode = jax.jit(partial(sd.encode_prompt, *PLAIN))
    two = encode(prompt([1, 5, 2, 1, 7, 2], [1, 3, 2, 1, 4, 2], chunks=2))
    first, second = (encode(prompt(*rows)) for rows in
                     (([1, 5, 2], [1, 3, 2]), ([1, 7, 2], [1, 4, 2])))  # fmt: skip
    joined = jnp.concatenate([first["tokens"], second["tokens"]], axis=1)
    np.testing.assert_allclose(two["tokens"], joined, atol=1e-6)
    assert two["tokens"].shape == (B, 6, 5)


def test_a_text_as_a_whole_is_that_of_the_last_encoder_and_first_chunk():
    m, params = PLAIN[0]._replace(pooled=True), PLAIN[1]
    sizes = jnp.asarray([[12.0, 8, 0, 0, 12, 8]])
    found = jax.jit(partial(sd.encode_prompt, m))(params, prompt([4, 5, 2, 1, 7, 2], chunks=2)._replace(sizes=sizes))
    np.testing.assert_array_equal(found["vector"], params["two"]["table"][jnp.asarray([4])])
    np.testing.assert_array_equal(found["sizes"], sizes)
    assert set(jax.eval_shape(partial(sd.encode_prompt, *PLAIN), prompt([4, 5, 2]))) == {"tokens"}


def test_weights_scale_states_and_keep_their_mean_unless_there_is_a_pooled_text():
    m, params = PLAIN
    heavy = prompt([1, 5, 2])
    heavy = heavy._replace(weights={name: jnp.asarray([[[1.0, 1.6, 1.0]]]) for name in heavy.weights})
    encode = jax.jit(partial(sd.encode_prompt, m))
    plain, kept = (encode(params, p)["tokens"] for p in (prompt([1, 5, 2]), heavy))
    scaled = jax.jit(partial(sd.encode_prompt, m._replace(pooled=True)))(params, heavy)["tokens"]
    np.testing.assert_allclose(scaled, plain * jnp.asarray([1.0, 1.6, 1.0])[None, :, None], rtol=1e-6)
    for part in (slice(0, 3), slice(3, 5)):  # each encoder's states by themselves
        np.testing.assert_allclose(jnp.mean(kept[..., part]), jnp.mean(plain[..., part]), rtol=1e-4)
    assert np.max(np.abs(kept - plain)) > 1e-2


def test_a_refiner_that_is_the_model_itself_is_not_seen():
    """Of a sampler without a memory, which would begin anew."""
    np.testing.assert_allclose(draw("refined"), draw("text"), atol=1e-5)


@pytest.mark.parametrize("n", [1, 3, 50, 51, 1000, 1200])
def test_times_are_filled_with_the_last_one_to_the_next_bucket(n):
    times = np.linspace(1, 0.1, n + 1).astype(np.float32)
    filled = sd.fill(times)
    assert len(filled) - 1 == min([size for size in sd.BUCKETS if size >= n], default=n)
    np.testing.assert_array_equal(filled[: n + 1], times)
    assert (filled[n:] == times[-1]).all()
    assert filled.dtype == np.float32


def test_strength_is_the_share_of_the_steps_that_is_left():
    times = np.asarray(leading(10))
    for strength, n in ((1.0, 10), (0.999, 9), (0.5, 5), (0.1, 1)):
        left = sd.from_strength(times, strength)
        np.testing.assert_array_equal(left, times[10 - n :])
    for strength in (0.0, -0.1, 1.01, 0.05, float("nan")):
        with pytest.raises(InputError, match="leaves none of 10 steps"):
            sd.from_strength(times, strength)


# Real networks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A tiny Stable Diffusion 1 and a program for two pictures of 16 x 24 pixels."""
    folder = tiny_models.write_model(tmp_path_factory.mktemp("model") / "sd15")
    options = {"vae": "", "controlnet": "", "lora": (), "embedding": (), "tokenizer": "", "tile": 0}
    loaded = load_model(read_files(str(folder)), jnp.float32, options)

    def draw(params, request):
        return sd.text_to_image(loaded.model, params, jax.random.key(0), request, ddim(loaded.model.schedule))

    return loaded, jax.jit(draw, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.slow
def test_a_tiny_stable_diffusion(real):
    """One program for scales, prompts of as many chunks, and numbers of steps; examples do not see each other."""
    loaded, program = real
    noise = normal(2, 8, 12, 4)

    def drawn(text="a red cat BREAK a sky", n=3, guidance=5.0, noise=noise, negative="a dog"):
        positive, against = read_prompts(loaded.tokenizers, [text], [negative], 2)
        times = jnp.asarray(sd.fill(loaded.grid(n, "ddim")))
        return program(loaded.params, sd.Request(positive, against, jnp.float32(guidance), times, noise))

    first = drawn()
    assert first.shape == (2, 16, 24, 3)
    others = [drawn(n=4), drawn(guidance=2.0), drawn("a blue dog BREAK no sky"), drawn("a red cat BREAK no sky")]
    others += [drawn(noise=noise.at[0].set(0.0)), drawn(negative="")]
    assert program._cache_size() == 1
    assert all(np.max(np.abs(first - other)) > 1e-4 for other in others)
    np.testing.assert_array_equal(others[4][1], first[1])
    np.testing.assert_array_equal(drawn(guidance=1.0), drawn(guidance=1.0, negative="a fish"))
    swapped = drawn(noise=noise[::-1])
    np.testing.assert_allclose(swapped[::-1], first, atol=1e-5)
