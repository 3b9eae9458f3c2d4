"""make eval, make reference and make average: from words to a page of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.typing import InputError

if TYPE_CHECKING:  # it is slow to import, and help needs it not
    from diffusion_jax.experiment import Experiment

SamplerName = Literal[
    "default", "ddpm", "ddpm_large", "ancestral", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde",
    "unipc", "deis",
]  # fmt: skip
Precision = Literal["highest", "tensorfloat32", "bfloat16"]


def eval_options(
    *,
    metrics: tuple[str, ...] = (),
    n: Count | None = None,
    seed: Natural = 0,
    seeds: Count = 1,
    features: str = "",
    weights: str = "",
    precision: Precision = "highest",
    judge: Literal["default", "features", "pixels"] = "default",
    reference: str = "",
    images: str = "",
    texts: str = "",
    against: str = "",
    sampler: SamplerName = "default",
    steps: Count | None = None,
    guidance: float | None = None,
    unconditional: bool = False,
    checkpoint: str = "newest",
    ema: Amount | None = None,
    params: str = "",
    batch: Count | None = None,
    out: str = "",
    run: str = "",
    runs: str = "runs",
    devices: Count | None = None,
) -> dict:
    """Measure samples of a trained run, or of a folder, against real examples; each number with its protocol.

    By default an experiment whose name begins with fashion_mnist is measured by the frozen protocol of Fashion-MNIST,
    any other by FID.

    Args:
        metrics: fid sfid kid cmmd precision recall density coverage c2st copy authenticity is vendi clip_score
            accuracy, and bits, the bits per dimension of held-out pictures; with commas between. fid and kid are told
            as fd and kd in features other than Inception's.
        n: number of samples; by default 50000, or 10000 for Fashion-MNIST, or all pictures of images=.
        seed: of the first set of samples.
        seeds: sets of samples, from seed on; their mean and its standard error are told.
        features: inception, inception_pytorch_fid, dinov2, dinov2_torch, clip, clip_openai, fashion_mnist or pixels.
        weights: the file of the network's weights, where it needs one; the error says which.
        precision: of the feature network's arithmetic; published numbers are float32, which is highest.
        judge: of c2st, a perceptron on the features or a convolutional network on the pixels.
        reference: the real examples: a folder or .npz of pictures, or a file of statistics (of make reference,
            pytorch-fid, ADM or EDM); by default the experiment's training data.
        images: measure the pictures of this folder or .npz instead of a run's.
        texts: the texts that the pictures of images= were made for, a line each in a .txt, read by the text tower in
            the file of weights=; or CLIP's features of them, f32[n, 768] in a .npy.
        against: an evaluation.jsonl to tell the difference from; refused where the protocols differ.
        sampler: another sampler than the experiment's.
        steps: another number of sampling steps than the experiment's.
        guidance: another scale of classifier-free guidance than the experiment's.
        unconditional: draw without classes from a class-conditional model.
        checkpoint: newest, best, or a step.
        ema: an average of this relative width, 0.08 say, put together from the snapshots of the run.
        params: parameters in a file of make average.
        batch: pictures drawn and looked at at a time on each device.
        out: file that the results are appended to; by default evaluation.jsonl in the run.
        run: name of the run; by default the newest one of the experiment.
        runs: the folder of all runs.
        devices: how many devices to use; by default all.
    """
    return dict(locals())


def reference_options(
    *,
    features: str = "inception",
    weights: str = "",
    precision: Precision = "highest",
    images: str = "",
    split: Literal["train", "test"] = "train",
    batch: Count | None = None,
    out: str = "",
    run: str = "",
    runs: str = "runs",
    devices: Count | None = None,
) -> dict:
    """Statistics of an experiment's data set, or of a folder, in a file that says what it is of.

    Args:
        features: as in make eval.
        weights: the file of the network's weights, where it needs one; the error says which.
        precision: of the feature network's arithmetic.
        images: the pictures of this folder or .npz instead of the experiment's data.
        split: train or test.
        batch: pictures looked at at a time on each device.
        out: the file to write, .npz; by default named after data and network, in the folder of the runs.
        run: name of the run whose arguments the experiment gets; without it they are given here.
        runs: the folder of all runs.
        devices: how many devices to use; by default all.
    """
    return dict(locals())


def average_options(
    *,
    ema: Amount = 0.1,
    checkpoint: str = "newest",
    out: str = "",
    run: str = "",
    runs: str = "runs",
) -> dict:
    """An average of the parameters of any relative width, put together from the snapshots of a run.

    Args:
        ema: the relative width, below 0.288; 0.1 is a tenth of the training.
        checkpoint: newest, or a step: the average as it would have been then.
        out: the file to write, .npz; by default average-ema=…-step=….npz in the run.
        run: name of the run; by default the newest one of the experiment.
        runs: the folder of all runs.
    """
    return dict(locals())


def eval_page(experiment: Experiment, name: str, folder: Path, options: Mapping[str, Any]) -> Iterator[str]:
    """Lines as they are found: the network's weights, results with floors, what there is to warn of, differences.

    `folder` is the run's, or with images= that of all runs of the experiment. InputError for bad input.
    """
    from diffusion_jax.measuring import evaluate, session
    from diffusion_jax.training.mesh import make_mesh

    if options["images"] and options["seeds"] > 1:
        raise InputError("images= is one set of samples: seeds= is for what is drawn from a run")
    mesh = make_mesh(options["devices"])
    opened = session.open_session(experiment, Path(name).stem, mesh, options)
    if opened.lens is not None:
        yield opened.lens.opened.said
    sets = session.of_images(opened) if options["images"] else session.of_run(opened, folder)
    runs, warned = [], list(opened.warned)
    for told, samples in sets:
        found, more = session.results(opened, told, samples)
        runs.append(found)
        warned += more
    total = [*evaluate.mean_over_seeds(runs), *session.bits_of(opened, folder)]
    path = Path(options["out"]) if options["out"] else folder / "evaluation.jsonl"
    each = [result for found in runs for result in found] if len(runs) > 1 else []
    evaluate.write(path, [*each, *opened.floors, *total])
    yield evaluate.page(total, opened.floors, dict.fromkeys(warned))
    yield f"appended to {path}"
    if options["against"]:
        yield evaluate.compared(total, Path(options["against"]))


def reference_page(experiment: Experiment | None, name: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Measure a data set, or the pictures of images=, and write their statistics; InputError for bad input."""
    from diffusion_jax.evaluation.statistics import save_reference
    from diffusion_jax.measuring import pictures, reals, session
    from diffusion_jax.training.mesh import make_mesh

    if experiment is None:
        found = pictures.of_path(options["images"])
    else:
        found = session.of_split(experiment, Path(name).stem, options["split"])
    lens = session.make_lens(options, found.shape[-1], make_mesh(options["devices"]))
    yield lens.opened.said
    names = ("pooled", "spatial") if options["features"].startswith("inception") else ("pooled",)
    gathered = lens.look(pictures.parts(found), found.n, f"features of {found.name}", names, ())
    reference = reals.as_reference(lens, found.name, found.digest(), gathered)
    path = Path(options["out"] or Path(options["runs"]) / Path(name).stem / f"{options['features']}-{found.name}.npz")
    path = path.with_name(path.name.replace(" ", "-"))
    if path.suffix != ".npz":
        raise InputError(f"out={path}: statistics are written to a file that ends in .npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_reference(path, reference)
    said = ", ".join(f"{key}={value}" for key, value in reference.protocol.items())
    yield f"{found.n} pictures, {len(reference.moments.mean)} features: {path} ({said})"


def average_page(folder: Path, options: Mapping[str, Any]) -> str:
    """Put an average together and write it; InputError for bad input."""
    from diffusion_jax.training.parameters import write_parameters
    from diffusion_jax.training.snapshots import reconstruct

    which, width = options["checkpoint"], options["ema"]
    if which != "newest" and not which.isdigit():
        raise InputError(f"checkpoint={which}: give a step, or nothing for the newest")
    params, error, step = reconstruct(folder / "averages", width, int(which) if which.isdigit() else None)
    path = Path(options["out"] or folder / f"average-ema={width}-step={step}.npz")
    write_parameters(path, params, ema=str(width), step=str(step), run=folder.name)
    return f"ema={width} at step {step}, its profile met to {100 * error:.2g} %: {path}"
