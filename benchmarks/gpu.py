"""Everything about speed and memory that needs a GPU, in pieces of at most nine minutes, beside a PyTorch peer.

    python benchmarks/gpu.py                     all pieces; a second call goes on where the first stopped
    python benchmarks/gpu.py edm_train loop      these pieces only, anew
    python benchmarks/gpu.py --table             the table of what has been measured

On a machine without a GPU the same pieces run at toy size in float32 and say so: they rehearse the script, and their
figures mean nothing. Each measurement is a JSON line in runs/gpu/DEVICE/PIECE.jsonl: medians of rounds after a warm-up,
batch and dtype named. Peers run where PyTorch is installed with support for the device (benchmarks/peers.py), in turn
with ours in one process. `reach` is what this project set out for on one H100.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share the memory

LIMIT = 540
"""Seconds a piece may take."""
REACH = {
    "EDM DDPM++ train": ("images/s", 3200),
    "EDM DDPM++ sampling": ("images/s", 300),
    "DDPM train": ("images/s", 5500),
    "DiT-XL/2 train": ("images/s", 600),
    "DiT-B/2 train": ("images/s", 2700),
    "DiT-XL/2 guided call, 64 images": ("ms", 60),
    "DiT-XL/2 guided call, 4 images": ("ms", 5),
    "cifar10_edm first step, cold": ("s", 50),
    "cifar10_edm first step, warm": ("s", 10),
    "loop / bare step": ("ratio", 0.98),
    "drawing and writing / drawing": ("ratio", 0.95),
    "EDM DDPM++ train, memory": ("GiB", 24),
    "DiT-XL/2 train, memory": ("GiB", 80),
    "EDM2-XXL train, memory": ("GiB", 80),
    "SD 1.5, batch 1": ("s", "0.8 of PyTorch's"),
    "SD 1.5, batch 8": ("s", "0.8 of PyTorch's"),
    "SD 1.5, batch 1, memory": ("GiB", 16),
    "SD 1.5 first picture, cold": ("s", "none"),
    "SD 1.5 first picture, warm": ("s", 20),
}


def line(work: str, who: str, value: float | None, unit: str, **more) -> None:
    shown = None if value is None else round(value, 4)
    print(json.dumps({"work": work, "who": who, "value": shown, "unit": unit} | more), flush=True)


# Timing --------------------------------------------------------------------------------------------------------------


def alternating(functions: dict, rounds: int, calls: int) -> dict[str, float]:
    """Median seconds a call of each function, the functions taking turns; each returns what to wait for."""
    times = {name: [] for name in functions}
    for run, wait in functions.values():
        for _ in range(2):
            wait(run())
    for _ in range(rounds):
        for name, (run, wait) in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                last = run()
            wait(last)
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(of) for name, of in times.items()}


def ours(run):
    import jax

    return run, jax.block_until_ready


def theirs(run):
    import torch

    return run, lambda _: torch.cuda.synchronize() if torch.cuda.is_available() else None


def toy() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def peers():
    """The module of peers, or None where PyTorch is missing or does not see the GPU that JAX sees."""
    try:
        import peers
    except ImportError:
        return None
    return peers if peers.CUDA or toy() else None


# Ours ----------------------------------------------------------------------------------------------------------------


def find(name: str, **arguments):
    """An experiment in bfloat16, float32 at toy size."""
    from diffusion_jax.experiment import find_experiment

    return find_experiment(name)(**arguments, precision="float32" if toy() else "bfloat16")


def made_up(experiment) -> dict:
    """A batch of random examples on the device, of the shapes and types that the experiment reads."""
    import jax
    import jax.numpy as jnp

    from diffusion_jax.training.roofline import batch_shapes

    def random(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype)
        if leaf.dtype == jnp.uint8:
            return jax.random.bits(jax.random.key(1), leaf.shape, leaf.dtype)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(random, batch_shapes(experiment))


def our_step(experiment):
    """() -> metrics: the jitted training step, its state donated."""
    import jax

    from diffusion_jax.experiment import initial_state, loss_fn
    from diffusion_jax.training.step import make_train_step

    step = make_train_step(loss_fn(experiment), experiment.optimizer, experiment.ema, accumulate=experiment.accumulate)
    step, batch = jax.jit(step, donate_argnums=0), made_up(experiment)
    held = [jax.jit(lambda: initial_state(experiment))()]

    def run():
        held[0], metrics = step(held[0], batch)
        return metrics

    return run


def our_draw(experiment, steps: int):
    """() -> pictures: the jitted sampling program on a full batch."""
    import jax

    from diffusion_jax.training.generate import example_keys, make_draw

    params = jax.jit(experiment.net.init)(jax.random.key(0))
    draw, keys = jax.jit(make_draw(experiment, steps=steps)), example_keys(0, 0, experiment.batch)
    labels = None if experiment.null is None else jax.numpy.zeros(experiment.batch, jax.numpy.int32)
    return lambda: draw(params, keys, labels)


def our_diffusion(batch: int, folder: str | None = None):
    """() -> pictures: Stable Diffusion 1.5 from token ids to bytes, one program; weights of a folder or random ones."""
    import jax
    import jax.numpy as jnp

    from diffusion_jax import ddim, leading
    from diffusion_jax.systems import stable_diffusion as sd
    from diffusion_jax.training.data import to_uint8

    model, params = random_diffusion() if folder is None else read_diffusion(folder)
    side, steps = SD[toy()]
    key, text = jax.random.key(0), (1, 1, 77)
    prompts = [
        sd.Prompt({"text_encoder": jax.random.randint(k, text, 0, 49407)}, {"text_encoder": jnp.ones(text)})
        for k in jax.random.split(key)
    ]
    noise = jax.random.normal(key, (batch, side // 8, side // 8, 4))
    request = sd.Request(*prompts, jnp.float32(7.5), leading(steps, 1000, 1), noise)

    @jax.jit
    def draw(params, request):
        return to_uint8(sd.text_to_image(model, params, key, request, ddim(model.schedule)))

    return lambda: draw(params, request)


def random_diffusion():
    """(model, parameters) of Stable Diffusion 1.5's shape, narrow at toy size, kernels in bfloat16."""
    import jax
    import jax.numpy as jnp

    from diffusion_jax import from_betas, scaled_linear_betas
    from diffusion_jax.nets import clip_text, kl_autoencoder, text_unet
    from diffusion_jax.systems import stable_diffusion as sd
    from diffusion_jax.systems.tuning import halved

    kind = jnp.float32 if toy() else jnp.bfloat16
    unet, vae, text = ({}, {}, {}) if not toy() else SD_SMALL
    model = sd.Model(
        texts={"text_encoder": clip_text(**text, dtype=kind)}, unet=text_unet(**unet, dtype=kind),
        vae=kl_autoencoder(**vae, dtype=kind), schedule=from_betas(scaled_linear_betas(1000, 0.00085, 0.012)),
    )  # fmt: skip
    nets = {"unet": model.unet, "vae": model.vae, **model.texts}
    made = jax.jit(lambda key: {name: halved(net.init(key), kind) for name, net in nets.items()})
    return model, made(jax.random.key(0))


def read_diffusion(folder: str):
    """(model, parameters) as `make generate` has them."""
    import jax
    import jax.numpy as jnp

    from diffusion_jax.generating.loading import load_model, read_files

    options = {"embedding": (), "tokenizer": "", "tile": 0}
    loaded = load_model(read_files(folder), jnp.float32 if toy() else jnp.bfloat16, options)
    return loaded.model, jax.device_put(loaded.params)


def parameters(experiment) -> int:
    from diffusion_jax.training.state import parameter_count

    return parameter_count(experiment.net)


# Pieces --------------------------------------------------------------------------------------------------------------


def throughput(work: str, experiment, run, peer, rounds: int, calls: int, **more) -> None:
    """Examples a second of ours, and of the peer (a function that makes its step), in turn."""
    functions = {"ours": ours(run)} | ({} if peer is None else {"torch": theirs(peer)})
    for who, seconds in alternating(functions, rounds, calls).items():
        line(work, who, experiment.batch / seconds, "images/s", batch=experiment.batch, **more)


def dtype() -> dict:
    import jax

    return {"dtype": "float32" if toy() else "bfloat16", "device": jax.devices()[0].device_kind}


def edm_train() -> None:
    small = {"width": 16, "blocks": 1, "batch": 4} if toy() else {"batch": 512}
    experiment, them = find("cifar10_edm", **small), peers()
    step = None
    if them is not None:
        net = them.DDPMpp(16, blocks=1) if toy() else them.DDPMpp()
        assert them.size(net) == parameters(experiment), "not the same network"
        step = them.train_step(net, them.edm_loss(experiment.batch), 1e-3)
    throughput("EDM DDPM++ train", experiment, our_step(experiment), step, *ROUNDS[toy()], **dtype())


def edm_sample() -> None:
    small = {"width": 16, "blocks": 1, "batch": 4} if toy() else {"batch": 512}
    experiment, them, steps = find("cifar10_edm", **small), peers(), 3 if toy() else 18
    draw = None
    if them is not None:
        net = them.prepared((them.DDPMpp(16, blocks=1) if toy() else them.DDPMpp()).eval())
        draw = partial(them.edm_sample, net, experiment.batch, steps)
    more = dtype() | {"evaluations": 2 * steps - 1}
    throughput("EDM DDPM++ sampling", experiment, our_draw(experiment, steps), draw, 3, 1, **more)


def ddpm_train() -> None:
    small = {"width": 32, "batch": 4} if toy() else {"batch": 512}
    experiment, them = find("cifar10", **small), peers()
    step = None
    if them is not None:
        net = them.ddpm_net(32 if toy() else 128)
        assert them.size(net) == parameters(experiment), "not the same network"
        step = them.train_step(net, them.noise_loss(experiment.batch, (3, 32, 32), 0), 2e-4)
    throughput("DDPM train", experiment, our_step(experiment), step, *ROUNDS[toy()], **dtype())


def dit_train(work: str, model: str, batch: int, **widths) -> None:
    experiment, them = (
        find("imagenet256_dit_xl2", **({"batch": 2} | SMALL if toy() else {"model": model, "batch": batch})),
        peers(),
    )
    step = None
    if them is not None:
        net = them.DiT(**(SMALL if toy() else widths))
        assert them.size(net) == parameters(experiment), "not the same network"
        step = them.train_step(net, them.noise_loss(experiment.batch, (4, 32, 32), 1000), 1e-4)
    throughput(work, experiment, our_step(experiment), step, *ROUNDS[toy()], **dtype())


def dit_xl2_train() -> None:
    dit_train("DiT-XL/2 train", "XL", 192)


def dit_b2_train() -> None:
    dit_train("DiT-B/2 train", "B", 256, width=768, depth=12, heads=12)


def dit_call() -> None:
    """One evaluation with classifier-free guidance: both halves in one call of the network."""
    import jax
    import jax.numpy as jnp

    experiment, them = find("imagenet256_dit_xl2", **(SMALL if toy() else {})), peers()
    params, apply = jax.jit(experiment.net.init)(jax.random.key(0)), jax.jit(experiment.net.apply)
    net = None
    if them is not None:
        import torch

        net = them.DiT(**(SMALL if toy() else {})).eval()
        net = them.prepared(net)
    for images in (1,) if toy() else (64, 4):
        x, t, y = jnp.zeros((2 * images, 32, 32, 4)), jnp.ones((2 * images,)), jnp.zeros((2 * images,), jnp.int32)
        functions = {"ours": ours(partial(apply, params, x, t, y))}
        if them is not None and net is not None:
            args = torch.zeros(2 * images, 4, 32, 32), torch.ones(2 * images), torch.zeros(2 * images, dtype=torch.long)
            args = [a.to(them.DEVICE) for a in args]

            def call(net=net, args=args):
                with torch.no_grad(), them.autocast():
                    return net(*args)

            functions["torch"] = theirs(call)
        for who, seconds in alternating(functions, 1 if toy() else 7, 1 if toy() else 20).items():
            line(f"DiT-XL/2 guided call, {images} images", who, 1000 * seconds, "ms", **dtype())


def first_step() -> None:
    from startup import FIRST_STEP, seconds

    arguments = "width=16, blocks=1, batch=4" if toy() else "batch=512, precision='bfloat16'"
    code = FIRST_STEP.replace("NAME", "cifar10_edm").replace("ARGUMENTS", arguments)
    with tempfile.TemporaryDirectory() as cache:
        for temperature in ("cold", "warm"):
            took = seconds(code, JAX_COMPILATION_CACHE_DIR=cache)
            line(f"cifar10_edm first step, {temperature}", "ours", took, "s", arguments=arguments, **dtype())


def loop() -> None:
    """The whole loop, feeding, logging and all, against the bare step in turn."""
    from loop import bare, looped

    small = (
        {"width": 16, "blocks": 1, "batch": 4, "steps": 6, "log_every": 2} if toy() else {"batch": 512, "steps": 300}
    )
    experiment = find("cifar10_edm", **small, sample_every=0, checkpoint_every=0)
    experiment = dataclasses.replace(experiment, data=lambda: pictures(50_000 if not toy() else 64), sample_steps=2)
    pairs = [(looped(experiment), bare(experiment)) for _ in range(1 if toy() else 3)]
    ratio = statistics.median(a / b for a, b in pairs)
    line("loop / bare step", "ours", ratio, "ratio", batch=experiment.batch, **dtype())


def drawing() -> None:
    """`make sample` with its files against the bare sampling program."""
    from diffusion_jax.training.draw import draw_to_folder
    from diffusion_jax.training.generate import at_a_time
    from diffusion_jax.training.loop import fit

    small = {"width": 16, "blocks": 1, "batch": 8} if toy() else {"batch": 512}
    experiment = find("cifar10_edm", **small, steps=1, sample_every=0, checkpoint_every=0)
    experiment = dataclasses.replace(experiment, data=lambda: pictures(1024), sample_steps=2 if toy() else 18)
    n = 16 if toy() else 50_000
    with tempfile.TemporaryDirectory() as folder:
        fit(experiment, Path(folder), {})
        options = {"n": n, "seed": 0, "sampler": "default", "steps": None, "guidance": None, "label": None}
        options |= {"format": "png", "checkpoint": "newest", "out": f"{folder}/drawn", "devices": None}
        draw_to_folder(experiment, Path(folder), options | {"n": 1})
        start = time.perf_counter()
        draw_to_folder(experiment, Path(folder), options)
        whole = time.perf_counter() - start
    batch = at_a_time(experiment)
    run = our_draw(dataclasses.replace(experiment, batch=batch), experiment.sample_steps)
    bare = alternating({"ours": ours(run)}, 3, 1)["ours"] * -(-n // batch)
    line("drawing and writing / drawing", "ours", bare / whole, "ratio", n=n, seconds=round(whole, 1), **dtype())


def pictures(n: int):
    import numpy as np

    from diffusion_jax.training.data import Data

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
    return Data({"image": images, "label": np.zeros(n, np.int32)}, None, (), (32, 32, 3))


def memory(work: str, experiment) -> None:
    """The most that was in use during two steps; the piece has its process to itself."""
    import jax

    run = our_step(experiment)
    jax.block_until_ready([run(), run()])
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")  # a processor does not say
    line(f"{work}, memory", "ours", used and used / 2**30, "GiB", batch=experiment.batch, **dtype())


def memory_edm() -> None:
    memory(
        "EDM DDPM++ train", find("cifar10_edm", **({"width": 16, "blocks": 1, "batch": 4} if toy() else {"batch": 512}))
    )


def memory_dit() -> None:
    memory(
        "DiT-XL/2 train",
        find("imagenet256_dit_xl2", **({"batch": 2} | SMALL if toy() else {"batch": 256, "remat": "dots"})),
    )


def memory_edm2() -> None:
    memory(
        "EDM2-XXL train",
        find(
            "imagenet64_edm2_s",
            **(
                {"width": 16, "blocks": 1, "size": 16, "batch": 2}
                if toy()
                else {"width": 448, "batch": 128, "remat": "full"}
            ),
        ),
    )


def sd_draw(batch: int) -> None:
    """Seconds a picture, and memory, of text to picture: 512 x 512 pixels, 50 steps of DDIM under guidance."""
    import jax

    them, (side, steps) = peers(), SD[toy()]
    more = dtype() | {"batch": batch, "size": side, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        functions = {}
        if them is not None:
            pipe = them.diffusion(toy())
            pipe.save_pretrained(folder)
            functions["torch"] = theirs(them.diffusion_draw(pipe, batch, side, steps))
        functions["ours"] = ours(our_diffusion(batch, folder if functions else None))
        for who, seconds in alternating(functions, 1 if toy() else 5, 1).items():
            line(f"SD 1.5, batch {batch}", who, seconds / batch, "s", **more)
    used = {"ours": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}
    if them is not None:
        used["torch"] = them.most_memory()
    for who, held in used.items():
        line(f"SD 1.5, batch {batch}, memory", who, held and held / 2**30, "GiB", **more)


def sd_1() -> None:
    sd_draw(1)


def sd_8() -> None:
    sd_draw(2 if toy() else 8)


def sd_first() -> None:
    """From parameters on the device to the first picture, in a process of its own."""
    from startup import seconds

    with tempfile.TemporaryDirectory() as cache:
        for temperature in ("cold", "warm"):
            took = seconds(FIRST_PICTURE, JAX_COMPILATION_CACHE_DIR=cache, PYTHONPATH=str(Path(__file__).parent))
            line(f"SD 1.5 first picture, {temperature}", "ours", took, "s", batch=1, **dtype())


FIRST_PICTURE = """
import time, jax
from diffusion_jax.__main__ import _set_up_jax
from gpu import our_diffusion
_set_up_jax()
run = our_diffusion(1)
start = time.perf_counter()
jax.block_until_ready(run())
print(time.perf_counter() - start)
"""
SD = {False: (512, 50), True: (64, 2)}
"""Pixels a side and steps."""
SD_SMALL = (
    {"widths": (32, 64, 64, 64), "tokens": 64, "groups": 32}, {"widths": (32,) * 4, "groups": 32},
    {"width": 64, "mlp": 256, "heads": 1},
)  # fmt: skip
"""U-Net, autoencoder and text encoder at toy size, as in benchmarks/sd_full_size.py."""
SMALL = {"width": 64, "depth": 2, "heads": 2}
"""A transformer at toy size."""
ROUNDS = {False: (5, 10), True: (1, 1)}
PIECES = (
    edm_train, edm_sample, ddpm_train, dit_xl2_train, dit_b2_train, dit_call, first_step, loop, drawing, memory_edm,
    memory_dit, memory_edm2, sd_1, sd_8, sd_first,
)  # fmt: skip


# All of them ---------------------------------------------------------------------------------------------------------


def measure(name: str, folder: Path) -> str | None:
    """Run a piece in a process of its own and keep its lines; returns why not, if it failed."""
    command = [sys.executable, __file__, "--piece", name]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT} s"
    if done.returncode:
        return f"exit status {done.returncode}"
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.part"
    part.write_text(done.stdout)
    part.replace(folder / f"{name}.jsonl")
    sys.stdout.write(done.stdout)
    return None


def table(folder: Path) -> str:
    """What has been measured, beside the peer and what was set out for."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text().splitlines():
            entry = json.loads(text)
            found.setdefault(entry["work"], {})[entry["who"]] = entry
    rows = [
        f"| work on {folder.name} | unit | ours | PyTorch | ratio | reach (H100) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for work, (unit, reach) in REACH.items():
        mine, peer = (found.get(work, {}).get(who, {}).get("value") for who in ("ours", "torch"))
        ratio = "" if not (mine and peer) else f"{peer / mine if unit in ('ms', 's') else mine / peer:.2f}"
        shown = ["open" if mine is None else f"{mine:,.4g}", "" if peer is None else f"{peer:,.4g}"]
        aim = reach if isinstance(reach, str) else f"{reach:,}"
        rows.append(f"| {work} | {unit} | {shown[0]} | {shown[1]} | {ratio} | {aim} |")
    return "\n".join(rows)


def device_folder() -> Path:
    """Found by a process that ends, so that this one takes no memory on the device."""
    code = "import jax; d = jax.devices()[0]; print(d.device_kind if d.platform != 'cpu' else 'toy size on a CPU')"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return Path("runs/gpu") / done.stdout.strip().replace("/", "-")


def main(words: list[str]) -> int:
    if words[:1] == ["--piece"]:
        from diffusion_jax.__main__ import _set_up_jax

        _set_up_jax()  # a second compilation of the same program comes from the cache
        next(piece for piece in PIECES if piece.__name__ == words[1])()
        return 0
    names, folder = [piece.__name__ for piece in PIECES], device_folder()
    wanted = [word for word in words if word != "--table"]
    unknown = [word for word in wanted if word not in names]
    if unknown:
        print(f"no piece {unknown[0]!r}; there are: {', '.join(names)}", file=sys.stderr)
        return 2
    todo = wanted or [] if words else [name for name in names if not (folder / f"{name}.jsonl").exists()]
    problems = {name: why for name in todo if (why := measure(name, folder))}
    print(table(folder))
    for name, why in problems.items():
        print(f"{name}: {why}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
