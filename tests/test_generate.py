"""make generate: what is drawn depends on what is asked for and nothing else, and what cannot be drawn is one line."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from PIL import Image

from diffusion_jax.__main__ import main
from diffusion_jax.arguments import resolve
from diffusion_jax.generating import command, files, tasks
from diffusion_jax.generating.options import generate_options
from diffusion_jax.ops import fold, normal_like
from diffusion_jax.training.generate import example_keys
from diffusion_jax.typing import InputError, Sampler
from diffusion_jax.weights import files as weight_files
from diffusion_jax.weights import ldm_configs, lora, model_folder, single_file, textual_inversion
from diffusion_jax.weights.lora import Update
from diffusion_jax.weights.textual_inversion import TABLE, Embedding

ROOT = Path(__file__).parent.parent
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Programs that are compiled once for a use of a model, and not optimized."""
    kept, make = {}, command.picture_program

    def program(options, loaded, job, mesh, tick):
        asked = [options[key] for key in ("model", "refiner", "upscale", "sampler", "controlnet")]
        name = str((asked, bool(options["embedding"]), job.use, job.latent))
        if name not in kept:
            kept[name] = make(options, loaded, job, mesh, tick)
        return kept[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "reporting", lambda sampler, tick: sampler)
        patch.setattr(command, "picture_program", program)
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", True)
        yield kept
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models, the one called "main" with the settings that a file of its weights alone is read with."""
    folder = tmp_path_factory.mktemp("models")
    plain = model_folder.load(tiny_models.write_model(folder / "plain"))
    configs = ldm_configs.configs("sd1", plain.hub)
    configs["unet"]["sample_size"] = 8
    model_folder.save(folder / "main", plain._replace(configs=configs))
    single_file.save(folder / "main.safetensors", single_file.of("sd1", plain.hub))
    return folder


@pytest.fixture
def draw(models, tmp_path):
    """Pictures u8[n, h, w, 3] of `make generate`, which are left in the folder `out`."""

    def drawn(out="out", **given):
        given = {"model": models / "main", "prompt": "a red cat", "size": "16x24", "steps": 3, **given}
        command.generate(options(out=tmp_path / out, **given))
        return np.stack([pixels(path) for path in sorted((tmp_path / out).glob("0*.png"))])

    return drawn


def options(**given):
    return resolve(generate_options, {name: str(value) for name, value in given.items()}, "generate")


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def picture(path, height=24, width=16, mode="RGB"):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (height, width, 3) if mode == "RGB" else (height, width), np.uint8)
    Image.fromarray(values).save(path)
    return path


def refused(**given):
    """The line that says why not, before anything is compiled."""
    with pytest.raises(InputError) as error, pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "picture_program", lambda *_: pytest.fail("a program is made of bad input"))
        command.generate(options(**{"out": "/dev/null/out", **given}))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500
    return str(error.value)


# What is drawn --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_picture_says_how_it_was_made_and_that_makes_it_again(draw, models, tmp_path, quick):
    first = draw(n=3, seed=5, negative="a dog", guidance=3)
    assert len({image.tobytes() for image in first}) == 3
    with Image.open(tmp_path / "out" / "0001.png") as image:
        assert image.size == (16, 24)
        assert image.text["parameters"].startswith("a red cat\nNegative prompt: a dog\n")
        assert "seed: 5" in image.text["parameters"]
    settings = files.read_settings(tmp_path / "out" / "0001.png")
    assert settings.pop("version")
    number = settings.pop("number")
    again = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    again["model"] = str(models / "main")  # of which a picture tells the name alone
    command.generate({**options(out=tmp_path / "again"), **again, "n": number + 1})
    np.testing.assert_array_equal(pixels(tmp_path / "again" / "0001.png"), first[1])
    assert settings["model"] == "main"
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == {**settings, "model": again["model"]}
    assert pixels(tmp_path / "out" / "sheet.png").shape[2] == 3


@pytest.mark.slow
def test_one_program_draws_whatever_is_asked_for(draw, quick):
    """Seeds, scales, prompts and numbers of steps up to the same bucket."""
    base, compiled = draw("a"), sum(program._cache_size() for program in quick.values())
    for i, other in enumerate(
        ({"seed": 1}, {"guidance": 2}, {"prompt": "a (blue:1.4) sky"}, {"prompt": ""}, {"negative": "x"}, {"steps": 4})
    ):
        assert np.any(draw(f"b{i}", **other) != base), other
    assert sum(program._cache_size() for program in quick.values()) == compiled


@pytest.mark.slow
def test_picture_i_depends_on_the_seed_and_i_alone(draw):
    many = draw("many", n=3)
    np.testing.assert_array_equal(draw("few", n=1), many[:1])
    assert np.any(draw("other", seed=1) != many[0])


@pytest.mark.slow
def test_pictures_drawn_together_are_those_drawn_one_by_one(draw):
    together = draw("together", n=3, batch=2)
    assert np.abs(together.astype(int) - draw("alone", n=3)).max() <= 1  # another program, which rounds otherwise


@pytest.mark.slow
def test_without_a_prompt_and_at_scale_one_the_negative_counts_for_nothing(draw):
    plain = draw("plain", prompt="", negative="")
    np.testing.assert_array_equal(draw("scaled", prompt="", negative="", guidance=1), plain)
    one = draw("one", guidance=1)
    np.testing.assert_array_equal(draw("also", guidance=1, negative="a dog"), one)
    assert np.any(one != plain)


@pytest.mark.slow
def test_latents_in_a_file_stand_for_the_seed(draw, tmp_path):
    expected = draw("seed", n=2, seed=9)
    keys = example_keys(np.uint32(9), np.int32(0), 2)
    np.save(tmp_path / "noise.npy", normal_like(fold(keys, 0), jnp.zeros((2, 12, 8, 4))))
    np.testing.assert_array_equal(draw("file", n=2, seed=1, latents=tmp_path / "noise.npy"), expected)


@pytest.mark.slow
def test_a_file_of_all_weights_is_the_folder(draw, models):
    one_file = draw("file", model=models / "main.safetensors", tokenizer=models / "main" / "tokenizer")
    np.testing.assert_array_equal(one_file, draw("folder"))


@pytest.mark.slow
def test_another_autoencoder(draw, models, tmp_path):
    folder = draw("folder")
    np.testing.assert_array_equal(draw("same", vae=models / "main" / "vae"), folder)
    config = model_folder.load(models / "main").configs["vae"]
    other = tiny_models.write_component(tmp_path / "vae", "vae", config)
    assert np.any(draw("other", vae=other) != folder)


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_lora_counts_as_much_as_it_is_told_to(draw, models, tmp_path, naming):
    path = write_lora(tmp_path / "l.safetensors", models, naming)
    plain, once, twice = draw("plain"), draw("once", lora=path), draw("twice", lora=f"{path}:2")
    np.testing.assert_array_equal(draw("nothing", lora=f"{path}:0"), plain)
    np.testing.assert_array_equal(draw("both", lora=f"{path},{path}"), twice)
    assert np.any(once != plain)
    assert np.any(twice != once)


def write_lora(path, models, naming="diffusers"):
    hub = model_folder.load(models / "main").hub
    rng = np.random.default_rng(1)
    updates = {}
    for name, weight in hub["unet"].items():
        if name.endswith(("attn2.to_k.weight", "attn1.to_q.weight")):
            n_out, n_in = weight.shape
            updates[name] = Update(*(rng.normal(size=s).astype("f4") for s in ((2, n_in), (n_out, 2))), alpha=1.0)
    return lora.save(path, {"unet": updates}, naming)


@pytest.mark.slow
def test_an_embedding_is_a_word(draw, models, tmp_path):
    """One with the vector of a letter draws what the letter does."""
    table = model_folder.load(models / "main").hub["text_encoder"][TABLE]
    letter = table[tiny_models.TOKENS.index("q</w>")]
    copy, other = tmp_path / "copy.safetensors", tmp_path / "other.safetensors"
    textual_inversion.save(copy, Embedding("<cat>", {"text_encoder": letter[None]}))
    textual_inversion.save(other, Embedding("<cat>", {"text_encoder": -letter[None]}))
    plain = draw("plain", prompt="a q sky")
    np.testing.assert_array_equal(draw("word", prompt="a <cat> sky", embedding=copy), plain)
    np.testing.assert_array_equal(draw("named", prompt="a <dog> sky", embedding=f"{copy}:<dog>"), plain)
    assert np.any(draw("other", prompt="a <cat> sky", embedding=other) != plain)


KINDS = {
    "image to image": ("sd15", {"init": ..., "strength": 0.7}),
    "blending": ("sd15", {"init": ..., "mask": ..., "strength": 1.0}),
    "outpainting": ("sd15", {"init": ..., "expand": "0,8,16,0"}),
    "its own inpainting": ("inpainting", {"init": ..., "mask": ...}),
    "editing": ("editing", {"init": ...}),
    "upscaling": ("upscaling", {"init": ..., "noise_level": 20}),
    "v": ("sd2", {}),
    "XL": ("sdxl", {"prompt": "a cat BREAK a sky"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", KINDS)
def test_every_use(draw, tmp_path, what):
    kind, asked = KINDS[what]
    model = tiny_models.write_model(tmp_path / kind, kind)
    found = {"init": picture(tmp_path / "init.png"), "mask": tmp_path / "mask.png"}
    white = np.zeros((24, 16), np.uint8)
    white[8:16, 4:10] = 255
    Image.fromarray(white).save(found["mask"])
    given = {name: found[name] if value is ... else value for name, value in asked.items()}
    size = {} if "init" in given else {"size": "16x24"}
    (image,) = draw(**{"model": model, "size": "", **size, **given})
    wanted = {"outpainting": (32, 32, 3), "upscaling": (48, 32, 3)}
    assert image.shape == wanted.get(what, (24, 16, 3))
    assert image.std() > 0
    settings = files.read_settings(tmp_path / "out" / "0000.png")
    assert settings["init"] == ("init.png" if "init" in given else "")  # names, no folders of whoever drew it


@pytest.mark.slow
def test_a_controlnet_counts_as_much_as_it_is_told_to(draw, models, tmp_path):
    config = tiny_models.CONTROLNET | {"norm_num_groups": 8, "attention_head_dim": 8}
    control = tiny_models.write_component(tmp_path / "control", "controlnet", config)
    asked = {"control": picture(tmp_path / "edges.png"), "controlnet": control}
    plain, without, fully = draw("plain"), draw("without", control_scale=0, **asked), draw("fully", **asked)
    assert np.abs(without.astype(int) - plain).max() <= 1
    assert np.abs(fully.astype(int) - plain).max() > 1


@pytest.mark.slow
def test_a_refiner_and_an_upscaler_follow(draw, tmp_path):
    refiner, upscaler = (tiny_models.write_model(tmp_path / kind, kind) for kind in ("sdxl_refiner", "upscaling"))
    plain, refined = draw("plain"), draw("refined", refiner=refiner, refine=0.4)
    assert refined.shape == plain.shape
    assert np.any(refined != plain)
    assert draw("larger", upscale=upscaler).shape == (1, 48, 32, 3)


def test_the_bar_moves_with_each_step():
    bar = command.tqdm(total=4, disable=False, file=open(os.devnull, "w"))  # noqa: SIM115
    plain = Sampler(lambda x: (), lambda key, x, state, t, s, denoise: (x + s, state))
    sampler = command_reporting(plain, bar.update)
    x = jax.jit(lambda x: sampler.step(None, x, (), 1.0, 0.5, None)[0])(jnp.zeros(2))
    jax.effects_barrier()
    assert x.tolist() == [0.5, 0.5]
    assert bar.n == 1


command_reporting = command.reporting


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_the_check_of_memory_traces_what_is_compiled(draw, tmp_path, monkeypatch, given):
    traced, text = [], tasks.USES["text"]
    monkeypatch.setitem(tasks.USES, "text", lambda *parts: traced.append(parts) or text(*parts))
    np.save(tmp_path / "noise.npy", np.zeros((3, 12, 8, 4), np.float32))
    draw(n=3, **({"latents": tmp_path / "noise.npy"} if given else {}))
    assert len(traced) == 1


def test_what_cannot_fit_is_refused_before_it_is_compiled(draw, models, monkeypatch, capfd):
    params = command.load_models(options(model=models / "main"))["main"].params
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    layer = 4 * 16 * 24 * (8 + 8)  # of the decoder's last block
    for n in (1, 2):
        monkeypatch.setattr(command, "memory_of", lambda device, n=n: held + n * layer - 1)
        with pytest.raises(InputError, match="not enough memory.*batch=1, a smaller size="):
            draw(n=n, batch=n)
    assert capfd.readouterr().err == ""


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": ""}, "which model"),
        ({"model": "/nowhere"}, "there is no model at /nowhere"),
        ({"size": "20x16"}, "multiples of 8, such as 16x16"),
        ({"size": "0x16"}, "multiples of 8, such as 8x16"),
        ({"size": "large"}, "give WIDTHxHEIGHT"),
        ({"prompt": "a " * 80, "chunks": 1}, "longer than 75 tokens"),
        ({"prompt": "a BREAK b", "chunks": 1}, "longer than 75 tokens"),
        ({"steps": 1001}, "steps=1001 is not possible here"),
        ({"seed": 2**32}, "seed=4294967296 is not possible"),
        ({"devices": 99}, "devices=99"),
        ({"mask": "{file}"}, "mask= needs init="),
        ({"expand": "0,8,0,0"}, "expand= needs init="),
        ({"control": "{file}"}, "control= needs controlnet="),
        ({"controlnet": "{model}"}, "controlnet= needs control="),
        ({"init": "/nowhere.png"}, "init=/nowhere.png: there is no such file"),
        ({"init": "{file}"}, "cannot be read as a picture"),
        ({"init": "{picture}", "mask": "{mask}"}, "they must be the same"),
        ({"init": "{picture}", "mask": "/nowhere.png"}, "mask=/nowhere.png: there is no such file"),
        ({"init": "{picture}", "expand": "0,8,0,0", "size": "16x16"}, "give no size= with it"),
        ({"init": "{picture}", "expand": "0,3,0,0"}, "multiples of"),
        ({"init": "{picture}", "expand": "0,0,0,0"}, "one of them above 0"),
        ({"init": "{picture}", "strength": 0}, "strength=0.0"),
        ({"init": "{picture}", "strength": 1.5}, "strength=1.5"),
        ({"init": "{picture}", "strength": 0.1, "steps": 3}, "leaves none of 3 steps"),
        ({"init": "{picture}", "upscale": "{model}"}, "not one for upscaling"),
        ({"refiner": "{model}", "refine": 1}, "without any of 30 steps"),
        ({"refiner": "{model}", "init": "{picture}"}, "give no init= and no control="),
        ({"latents": "/nowhere.npy"}, "there is no such file"),
        ({"latents": "{file}"}, "not an array of numbers"),
        ({"latents": "{latents}"}, "holds float32[1, 2, 2, 4]; here f32[1, 8, 8, 4] is needed"),
        ({"lora": "/nowhere.safetensors"}, "there are no weights at /nowhere.safetensors"),
        ({"lora": "{file}"}, "is not a .safetensors file"),
        ({"lora": "{alien}"}, "does not fit the model"),
        ({"lora": "{embedding}"}, "does not fit the model"),
        ({"embedding": "/nowhere.safetensors"}, "there are no weights"),
        ({"embedding": "{embedding}"}, "is for another model: 5 numbers a vector, not 16"),
        ({"embedding": "{alien}"}, "an embedding has the vectors of one word"),
        ({"vae": "{model}/unet"}, "holds unet and no vae"),
        ({"tokenizer": "/nowhere"}, "there is no tokenizer at /nowhere"),
        ({"control": "{picture}", "controlnet": "{model}/vae"}, "holds vae and no controlnet"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(models, bad_files, given, message):
    given = {name: str(value).format(model=models / "main", **bad_files) for name, value in given.items()}
    assert message in refused(**{"model": models / "main", "prompt": "a cat", **given})


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """Files that are not what they are given for."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "file").write_text("not a picture")
    np.save(folder / "latents.npy", np.zeros((1, 2, 2, 4), np.float32))
    weight_files.save(folder / "alien.safetensors", {
        "unet.nowhere.lora_A.weight": np.zeros((1, 8), "f4"), "unet.nowhere.lora_B.weight": np.zeros((8, 1), "f4"),
    })  # fmt: skip
    textual_inversion.save(folder / "e.safetensors", Embedding("<cat>", {"text_encoder": np.zeros((1, 5), "f4")}))
    return {
        "file": folder / "file", "latents": folder / "latents.npy", "alien": folder / "alien.safetensors",
        "embedding": folder / "e.safetensors", "picture": picture(folder / "picture.png"),
        "mask": picture(folder / "mask.png", 16, 16, "L"),
    }  # fmt: skip


def cut_header(path):
    path.write_bytes(path.read_bytes()[:50])


def cut_body(path):
    path.write_bytes(path.read_bytes()[:-8])


def changed(change):
    def damage(path):
        state = weight_files.load(path)
        change(state)
        weight_files.save(path, state)

    return damage


def other_type(path):
    """The numbers of one weight called a type that weights do not have."""
    state = weight_files.load(path)
    state["conv_out.bias"] = np.zeros(4, np.int64)
    weight_files.save(path, state)


def unknown_type(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["conv_out.bias"]["dtype"] = "F99"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


DAMAGE = {
    "a header that ends": (cut_header, UNET),
    "a body that ends": (cut_body, UNET),
    "no file": (Path.unlink, UNET),
    "a weight too few": (changed(lambda state: state.pop("conv_in.bias")), "missing: conv_in.bias"),
    "a weight too many": (changed(lambda state: state.update(more=np.zeros(2, "f4"))), "left over: more"),
    "a weight of another shape": (
        changed(lambda state: state.update({"conv_out.bias": np.zeros(5, "f4")})), "shape of conv_out.bias"
    ),
    "whole numbers": (other_type, "conv_out.bias"),
    "a type that is none": (unknown_type, UNET),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_weights_are_named(models, tmp_path, what):
    damage, named = DAMAGE[what]
    copy = shutil.copytree(models / "main", tmp_path / "model")
    damage(copy / UNET)
    named = "unet" if named == UNET else named
    assert named in refused(model=copy)


def settings_changed(folder, name, **new):
    path = folder / name
    path.write_text(json.dumps({key: v for key, v in {**json.loads(path.read_text()), **new}.items() if v is not ...}))


@pytest.mark.parametrize(
    ("file", "new", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline", "unet": ...}, "FluxPipeline, which is not of Stable Diff"),
        ("model_index.json", {"unet": ["diffusers", "UNetSpatioTemporalConditionModel"]}, "SpatioTemporal"),
        ("model_index.json", {"vae": [None, None]}, "no vae"),
        ("unet/config.json", {"block_out_channels": ...}, "block_out_channels"),
        ("unet/config.json", {"block_out_channels": "wide"}, "unet"),
        ("unet/config.json", {"block_out_channels": [8, 12]}, "12"),
        ("unet/config.json", {"layers_per_block": [1, 2]}, "layers_per_block"),
        ("unet/config.json", {"cross_attention_dim": 24}, "16 numbers a token, of which the unet takes 24"),
        ("unet/config.json", {"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ("unet/config.json", {"in_channels": 6}, "2 channels beside the latent"),
        ("unet/config.json", {"block_out_channels": [16, 32]}, "unet is another network: shape of"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type=image"),
        ("vae/config.json", {"latent_channels": 16}, "vae"),
        ("vae/config.json", {"mid_block_add_attention": False}, "mid_block_add_attention=False"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "relu"),
        ("text_encoder/config.json", {"hidden_size": ...}, "hidden_size"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type=flow"),
    ],
)  # fmt: skip
def test_models_of_other_kinds_are_named(models, tmp_path, file, new, message):
    copy = shutil.copytree(models / "main", tmp_path / "model")
    settings_changed(copy, file, **new)
    assert message in refused(model=copy, prompt="a cat")


def test_parts_of_other_models_are_named(models, tmp_path):
    """Each fits its own configuration, and not the others."""
    wide = tiny_models.write_component(tmp_path / "wide", "controlnet", {
        **tiny_models.CONTROLNET, "block_out_channels": [16, 32],
    })  # fmt: skip
    told = tiny_models.write_component(tmp_path / "told", "controlnet", {
        **tiny_models.CONTROLNET, "cross_attention_dim": 24
    })  # fmt: skip
    edges = picture(tmp_path / "edges.png")
    for other in (wide, told):
        assert "controlnet" in refused(model=models / "main", controlnet=other, control=edges)
    deep = tiny_models.write_component(tmp_path / "deep", "vae", {**tiny_models.VAE, "latent_channels": 8})
    assert "vae" in refused(model=models / "main", vae=deep)
    copy = shutil.copytree(models / "main", tmp_path / "model")
    settings_changed(copy, "vae/config.json", scaling_factor=0.5)
    assert "refiner" in refused(model=models / "main", refiner=copy)
    shutil.rmtree(copy / "text_encoder")
    tiny_models.write_component(copy / "text_encoder", "text_encoder", {**tiny_models.TEXT, "hidden_size": 24})
    assert "text_encoder" in refused(model=copy)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("inpainting", {}, "this model is for inpainting: give init= and mask="),
        ("editing", {}, "this model is for editing: give init="),
        ("editing", {"init": "{picture}", "mask": "{picture}"}, "not for a model for editing"),
        ("upscaling", {}, "this model is for upscaling: give init="),
        ("upscaling", {"init": "{picture}", "noise_level": 1000}, "noise_level=1000"),
    ],
)
def test_what_a_model_is_not_for(bad_files, tmp_path, kind, given, message):
    given = {name: str(value).format(**bad_files) for name, value in given.items()}
    assert message in refused(model=tiny_models.write_model(tmp_path / kind, kind), **given)


def test_other_files_than_checkpoints(bad_files, tmp_path):
    flux = weight_files.save(tmp_path / "flux.safetensors", {"double_blocks.0.img_mod.lin.weight": np.zeros((2, 2))})
    assert "this looks like Flux" in refused(model=flux)
    assert "not a .safetensors file" in refused(model=bad_files["file"])
    assert "this looks like a textual-inversion" in refused(
        model=weight_files.save(tmp_path / "e.safetensors", {"emb_params": np.zeros((1, 4), "f4")})
    )


def test_not_enough_memory_is_one_line_that_says_what_helps(models, monkeypatch, capsys, tmp_path):
    def short(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nlong story")

    monkeypatch.setattr(command, "pictures", short)
    assert main(["generate", f"model={models / 'main'}", f"out={tmp_path / 'out'}"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: out of memory: ")
    assert "precision=bfloat16" in line
    assert "batch=1" in line


@pytest.mark.slow
def test_the_command_line_says_in_one_line_what_is_wrong(models, tmp_path):
    words = ["generate", f"model={models / 'main'}", "prompt=a cat", "size=500x500", f"out={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_jax", *words], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip() == "error: size=500x500: width and height must be multiples of 8, such as 496x496"
    assert not (tmp_path / "out").exists()
