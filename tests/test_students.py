"""Students: how they begin, that they are the teacher at first, and that they come to the exact map of its flow.

For data N(0, s^2) a network that says 0 in EDM's preconditioning with sigma_data = s is the exact denoiser, and `mlp`
says 0 at first: the teacher of these tests has no error at all. Its flow takes x_sigma to s x / sqrt(s^2 + sigma^2).
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import diffusion_jax as dj
from diffusion_jax.denoisers import edm_precondition
from diffusion_jax.distill import improved_mean_flow_loss, mean_flow_loss, pseudo_huber, squared_error
from diffusion_jax.experiment import find_experiment, initial_state
from diffusion_jax.forward import q_sample
from diffusion_jax.nets import mlp
from diffusion_jax.training import checkpoint, ema, students
from diffusion_jax.training.generate import example_keys, make_draw
from diffusion_jax.training.loop import fit
from diffusion_jax.training.parameters import read_parameters, write_parameters
from diffusion_jax.training.records import write_record
from diffusion_jax.training.state import digest, init_state
from diffusion_jax.training.step import make_train_step
from diffusion_jax.typing import InputError

S, SPREAD, CLASSES = 0.5, 1.0, 3
EDM, ANGLES = dj.edm(), students.angular(SPREAD)


def read(net):
    return edm_precondition(lambda x, t, cond: net(x, 250 * t, cond), EDM, S)


def shaken(params, size=0.3):
    """Parameters none of which is zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype), params)


# How a run begins ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return toy.experiment(width=16, batch=8, steps=10)


def test_a_run_begins_with_the_parameters_it_is_given(small):
    given = shaken(small.net.init(jax.random.key(5)))
    state = jax.jit(partial(initial_state, small))(given)
    own = jax.eval_shape(partial(initial_state, small))
    assert jax.tree.map(lambda x: x.shape, own.opt_state) == jax.tree.map(lambda x: x.shape, state.opt_state)
    for tree in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, given)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.averages, given))]
    assert len(set(buffers)) == len(buffers)  # a buffer that is donated may not be held twice


@pytest.mark.parametrize("change", ["missing", "more", "shape", "type"])
def test_parameters_of_another_network_are_refused_by_name(small, change):
    given = dict(small.net.init(jax.random.key(0)))
    kernel = given["linear_in"]["kernel"]
    given["linear_in"] = {
        "missing": {},
        "more": given["linear_in"] | {"extra": kernel},
        "shape": given["linear_in"] | {"kernel": kernel[1:]},
        "type": given["linear_in"] | {"kernel": kernel.astype(jnp.bfloat16)},
    }[change]
    with pytest.raises(InputError, match=r"linear_in\.(kernel|bias|extra)"):
        init_state(jax.random.key(0), small.net, optax.sgd(0.1), params=given)


@pytest.mark.slow
def test_a_resumed_run_does_not_begin_again(small, tmp_path, monkeypatch):
    """Bit for bit the uninterrupted one; `start` is asked once."""
    monkeypatch.setattr("diffusion_jax.training.loop._finish", lambda run, state: {"step": int(state.step)})
    given, asked = shaken(small.net.init(jax.random.key(5))), []

    def start():
        asked.append(True)
        return jax.device_get(given)

    whole = replace(small, start=start, checkpoint_every=5)
    for name, parts in (("once", (10,)), ("twice", (5, 10))):
        for steps in parts:
            fit(replace(whole, steps=steps), tmp_path / name, {"arguments": {}}, devices=1)
    assert len(asked) == 2

    def last(name):
        manager = checkpoint.open_read_only(tmp_path / name / "checkpoints")
        like = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(
                s.shape, s.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
            ),
            jax.eval_shape(partial(initial_state, whole)),
        )
        state = checkpoint.restore(manager, like, print, read_only=True)[0]
        manager.close()
        return np.asarray(digest(state))

    np.testing.assert_array_equal(last("once"), last("twice"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_staged_loss_is_told_the_step(accumulate):
    optimizer = optax.sgd(0.0)
    state = init_state(jax.random.key(0), dj.Net(lambda key: {"w": jnp.ones(())}, lambda *_: jnp.ones(())), optimizer)
    step = make_train_step(
        lambda params, batch, key, step: params["w"] * step.astype(jnp.float32),
        optimizer, ema.constant(), accumulate, staged=True,
    )  # fmt: skip
    for n in range(3):
        state, metrics = step(state, {"image": jnp.zeros((4, 1))})
        assert float(metrics["loss"]) == n


def test_samples_of_a_model_of_two_times_are_jumps_of_its_flow_map(small):
    """The map is asked once a step, with the labels; another sampler asks the denoiser, and guidance is refused."""
    seen = []

    def flow_map(denoiser):
        def move(x, t, s, cond):
            seen.append((t.shape, cond.dtype))
            return x * 0 + dj.bcast(t + 2 * s, x) + dj.bcast(cond.astype(x.dtype), x)

        return move

    jumping = replace(small, flow_map=flow_map, guidance=1.0, times=lambda n: jnp.linspace(1, 0.25, n + 1))
    params, keys = small.net.init(jax.random.key(0)), example_keys(0, 0, 3)
    x = make_draw(jumping, steps=1)(params, keys, jnp.arange(3, dtype=jnp.int32))
    np.testing.assert_allclose(x[:, 0, 0, 0], 1.5 + np.arange(3))
    assert set(seen) == {((3,), jnp.dtype("int32"))}
    seen.clear()
    other = make_draw(jumping, sampler=small.sampler, guidance=2.0)(params, keys, None)
    assert not seen and other.shape == x.shape
    with pytest.raises(InputError, match="not guided"):
        make_draw(jumping, guidance=2.0)


# Objectives ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_easy_consistency_begins_as_denoising_and_halves_its_distance():
    """With k = 0: at stage 0 r = t (1 - 1 / q), and with q = 1 r = 0, the target being the data itself."""
    x0, key = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32), jax.random.key(0)
    asked = []

    def student(x, t, cond):
        asked.append(np.asarray(t))
        return dj.from_x0(EDM, x, t, jnp.tanh(x))

    draw = dj.draw_lognormal()
    denoising = students.easy_consistency(EDM, draw, 8, 1, q=1.0, k=0.0)(key, student, x0, None, step=jnp.int32(3))
    t = asked[0]
    eps = dj.normal_like(jax.random.fold_in(key, 1), x0)
    error = jnp.tanh(x0 + t[:, None] * eps) - x0
    np.testing.assert_allclose(denoising, pseudo_huber()(error) / t, rtol=1e-5)
    objective = students.easy_consistency(EDM, draw, 8, 4, k=0.0)
    for step, stage in ((0, 0), (1, 0), (2, 1), (7, 3), (100, 3), (None, 3)):
        asked.clear()
        objective(key, student, x0, None, **({} if step is None else {"step": jnp.int32(step)}))
        np.testing.assert_allclose(asked[1], asked[0] * (1 - 2.0 ** -(stage + 1)), rtol=1e-6)


def test_angles_are_drawn_as_often_as_asked():
    a, b = students.draw_angles(dj.draw_lognormal(-1.1, 2.0), SPREAD, 0.6, 0.5)(jax.random.key(0), 4000)
    assert bool(jnp.all((b <= a) & (b >= 0) & (a < np.pi / 2)))
    error = 4 * np.sqrt(0.25 / 4000)
    assert abs(float(jnp.mean(b == a)) - 0.4) < error
    assert abs(float(jnp.mean(b == 0)) - 0.3) < error


def test_the_angular_schedule_is_edms():
    """The same noised data up to a scale, at sigma = spread tan(a); dz/da of a pair is the schedule's velocity."""
    sigma = jnp.asarray([0.01, 0.7, 80.0])
    a = students.to_angle(sigma, SPREAD)
    alpha, scale = ANGLES(a)
    np.testing.assert_allclose(scale / alpha, sigma, rtol=1e-4)
    np.testing.assert_allclose(alpha**2 + (scale / SPREAD) ** 2, 1, rtol=1e-6)


# At first a student is its teacher -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks():
    plain, double = (mlp(2, width=16, blocks=1, classes=CLASSES, vector=v) for v in (None, 2 * students.HARMONICS))
    silent = students.silent_vector(double)
    params = shaken(plain.init(jax.random.key(0)))
    return plain, params, silent, students.with_vector(silent, params, jax.random.key(1))


def exact_velocity(net, params, z, a, cond):
    """Equation (3) from the teacher's own prediction."""
    told = read(partial(net.apply, params))(z / jnp.cos(a)[:, None], SPREAD * jnp.tan(a), cond)
    return SPREAD * jnp.cos(a)[:, None] * told.eps - jnp.sin(a)[:, None] * told.x0


@pytest.mark.slow
def test_a_second_time_changes_nothing_at_first(networks):
    plain, params, silent, more = networks
    z = jnp.asarray(np.random.default_rng(1).normal(size=(5, 2)), jnp.float32)
    a, label = jnp.asarray([0.02, 0.3, 0.8, 1.2, 1.5]), jnp.asarray([0, 1, 2, 3, 0], jnp.int32)
    velocity = students.average_velocity(students.two_time_denoiser(read, SPREAD)(partial(silent.apply, more)), ANGLES)
    for b in (a, 0.5 * a, 0 * a):
        np.testing.assert_allclose(velocity(z, a, b, label), exact_velocity(plain, params, z, a, label), atol=2e-4)
    moved = students.flow_map_of(ANGLES)(students.two_time_denoiser(read, SPREAD)(partial(silent.apply, more)))
    np.testing.assert_allclose(moved(z, a, 0 * a, label), z - a[:, None] * velocity(z, a, a, label), atol=1e-5)


@pytest.mark.slow
def test_at_equal_times_the_average_is_the_velocity(networks):
    """u(z, a, a) is what the denoiser of one time says, whatever the second time has learned; elsewhere it differs."""
    silent, more = networks[2], shaken(networks[3])
    denoiser = students.two_time_denoiser(read, SPREAD)(partial(silent.apply, more))
    z, a = jnp.ones((3, 2)), jnp.asarray([0.2, 0.8, 1.4])
    for label in (None, jnp.zeros((3,), jnp.int32)):
        velocity = students.average_velocity(denoiser, ANGLES)
        alone = dj.to_velocity(ANGLES, denoiser(z, a, label), a)
        np.testing.assert_array_equal(velocity(z, a, a, label), alone)
        assert float(jnp.min(jnp.abs(velocity(z, a, 0 * a, label) - alone))) > 1e-3


def test_networks_without_a_vector_or_with_more_are_refused(networks):
    plain, params, silent, more = networks
    with pytest.raises(InputError, match="takes a vector"):
        students.silent_vector(plain).init(jax.random.key(0))
    with pytest.raises(InputError, match="by nothing"):
        students.with_vector(silent, more, jax.random.key(0))
    lacking = {name: leaf for name, leaf in params.items() if name != "linear_in"}
    with pytest.raises(InputError, match="linear_in"):
        students.with_vector(silent, lacking, jax.random.key(0))


# Trained students ----------------------------------------------------------------------------------------------------


def trained(net, objective, read, steps=1500, rate=3e-3, batch=256):
    """The first parameters of a student, whose network begins as the exact teacher, and their average at the end."""
    optimizer = toy.lenient(optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.99))

    def loss(params, batch, key, **step):
        x0 = S * dj.normal_like(jax.random.fold_in(key, 7), batch["image"])
        return jnp.mean(objective(key, read(partial(net.apply, params)), x0, None, **step))

    step = make_train_step(loss, optimizer, ema.power_function(0.1), staged=True)
    state = init_state(jax.random.key(0), net, optimizer)
    image = {"image": jnp.zeros((batch, 1))}
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: (step(s, image)[0], None), state, None, steps)[0])
    return state.params, run(state).ema


def consistency_student(steps=1500):
    net = mlp(1, width=32, blocks=1)

    def jump(params, x, high):
        return read(partial(net.apply, params))(x, jnp.full((len(x),), high)).x0

    return jump, *trained(net, students.easy_consistency(EDM, dj.draw_lognormal(-0.5, 2.0), steps, 7), read, steps)


def average_student(steps=1500):
    net = students.silent_vector(mlp(1, width=64, blocks=1, vector=2 * students.HARMONICS))
    both = students.two_time_denoiser(read, SPREAD)
    draw = students.draw_angles(dj.draw_lognormal(-0.5, 2.0), SPREAD)

    def jump(params, x, high):
        a = jnp.full((len(x),), students.to_angle(jnp.float32(high), SPREAD))
        move = students.flow_map_of(ANGLES)(both(partial(net.apply, params)))
        return move(jnp.cos(a)[:, None] * x, a, jnp.zeros_like(a), None)

    return jump, *trained(net, students.alpha_flow(ANGLES, draw, steps, 4, squared_error), both, steps)


@pytest.mark.slow
@pytest.mark.parametrize("make", [consistency_student, average_student])
def test_one_step_of_a_trained_student_is_the_teachers_flow(make):
    """Root mean square distance from the exact map, in deviations of the data, from two noise levels to none."""
    jump, before, after = make()
    for high in (80.0, 0.8):
        x = jnp.linspace(-2, 2, 21)[:, None] * np.sqrt(S**2 + high**2)
        exact = S * x / np.sqrt(S**2 + high**2)
        first, last = (float(jnp.sqrt(jnp.mean((jump(p, x, high) - exact) ** 2))) / S for p in (before, after))
        print(f"{make.__name__} from {high}: {first:.3f} -> {last:.3f}")
        assert last < 0.9 * first
        assert last < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3, 6])
def test_the_exact_average_velocity_is_the_target_of_alpha_flow(stage):
    """For data of one point all pairs lie on the flow, so that equation (4) holds example by example."""
    x0, point = jnp.full((64, 2), 0.3), 0.3

    def denoiser(x, t, cond):
        s = cond[1] if isinstance(cond, tuple) else t
        a, b = t[:, None], s[:, None]
        eps = (x - jnp.cos(a) * point) / (SPREAD * jnp.sin(a))
        velocity = SPREAD * jnp.cos(a) * eps - jnp.sin(a) * point
        end = jnp.cos(b) * point + SPREAD * jnp.sin(b) * eps
        return dj.from_velocity(ANGLES, x, t, jnp.where(a > b, (x - end) / jnp.where(a > b, a - b, 1), velocity))

    draw = students.draw_angles(dj.draw_lognormal(-0.5, 1.0), SPREAD)
    objective = students.alpha_flow(ANGLES, draw, 10, stage, squared_error)
    losses = objective(jax.random.key(0), denoiser, x0, None)
    assert float(jnp.max(losses)) < 1e-6
    off = students.alpha_flow(ANGLES, draw, 10, stage, squared_error)(
        jax.random.key(0), lambda x, t, c: dj.from_x0(ANGLES, x, t, 1.1 * denoiser(x, t, c).x0), x0, None
    )
    assert float(jnp.mean(off)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("loss", [mean_flow_loss, improved_mean_flow_loss])
def test_the_objective_of_mean_flow_is_its_loss_at_the_drawn_angles(loss, networks):
    """With the derivative taken through angle, noise level and vector: against central differences."""
    silent, more = networks[2], shaken(networks[3], 0.1)
    velocity = students.average_velocity(
        students.two_time_denoiser(lambda net: edm_precondition(net, EDM, S), SPREAD)(partial(silent.apply, more)),
        ANGLES,
    )
    seen = []

    def draw(key, n):
        seen.append((jnp.asarray([1.2, 0.9, 0.5]), jnp.asarray([0.0, 0.3, 0.5])))
        return seen[0]

    x0, key = jnp.asarray([[0.3, -0.2], [0.1, 0.5], [-0.4, 0.2]]), jax.random.key(3)
    denoiser = students.two_time_denoiser(lambda net: edm_precondition(net, EDM, S), SPREAD)(
        partial(silent.apply, more)
    )
    given = students.mean_flow(ANGLES, draw, partial(loss, metric=squared_error))(key, denoiser, x0, None)
    (t, s), eps, h = seen[0], dj.normal_like(jax.random.fold_in(key, 1), x0), 1e-2
    z, v = q_sample(ANGLES, x0, t, eps), dj.to_velocity(ANGLES, dj.Prediction(x0, eps), t)
    along = v if loss is mean_flow_loss else velocity(z, t, t)
    du = (velocity(z + h * along, t + h, s) - velocity(z - h * along, t - h, s)) / (2 * h)
    expected = squared_error(velocity(z, t, s) - v + (t - s)[:, None] * du)
    np.testing.assert_allclose(given, expected, rtol=2e-2, atol=1e-4)


# The experiment ------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(toy.__file__.rsplit("/", 2)[0])


@pytest.mark.parametrize(
    ("record", "arguments", "message"),
    [
        (None, {}, "no trained run is there"),
        ({"experiment": "nothing"}, {}, "unknown experiment"),
        ({"experiment": "digits", "arguments": {"widht": 3}}, {}, "no longer has"),
        ({"experiment": "digits", "arguments": {}}, {}, "not a model of Fashion-MNIST in EDM's"),
        ({"experiment": "fashion_mnist", "arguments": {"width": 8}}, {"width": 16}, "the teacher's is 8"),
    ],
)
def test_a_teacher_that_cannot_be_used_is_one_clear_error(tmp_path, in_root, record, arguments, message):
    if record is not None:
        write_record(tmp_path / "experiment.json", record)
    with pytest.raises(InputError, match=message):
        find_experiment("fashion_mnist_student")(teacher=str(tmp_path), **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ect", "alphaflow"])
def test_a_student_has_its_teachers_network_and_parameters(tmp_path, in_root, method):
    """The arguments of the run, and what is in a file; a file of another network is refused before all else."""
    write_record(tmp_path / "experiment.json", {"experiment": "fashion_mnist", "arguments": {"width": 8}})
    teacher = find_experiment("fashion_mnist")(width=8)
    params = shaken(jax.jit(teacher.net.init)(jax.random.key(3)))
    write_parameters(tmp_path / "own.npz", params)
    made = find_experiment("fashion_mnist_student")
    student = made(method=method, teacher=str(tmp_path), params=str(tmp_path / "own.npz"))
    first = jax.eval_shape(partial(initial_state, student), student.start()).params
    began = student.start()
    jax.tree.map(np.testing.assert_array_equal, params, {name: began[name] for name in params})
    assert jax.tree.structure(first) == jax.tree.structure(began)
    assert student.times(1).shape == (2,) and student.times(2).shape == (3,)
    write_parameters(tmp_path / "other.npz", toy.experiment().net.init(jax.random.key(0)))
    with pytest.raises(InputError, match="another network"):
        made(method=method, teacher=str(tmp_path), params=str(tmp_path / "other.npz")).start()
    with pytest.raises(InputError, match="no checkpoint"):
        made(method=method, teacher=str(tmp_path)).start()


def test_parameters_in_a_file_come_back(tmp_path):
    params = {"a": {"b": np.float32([1.5, -2.0]), "c.d": np.ones((), np.float32)}, "e": np.zeros((0, 3), np.float32)}
    path = write_parameters(tmp_path / "p.npz", {"a": {"b": params["a"]["b"]}, "e": params["e"]}, w="2")
    back = read_parameters(path)
    np.testing.assert_array_equal(back["a"]["b"], params["a"]["b"])
    assert back["e"].shape == (0, 3) and set(back) == {"a", "e"}
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="cannot be read"):
        read_parameters(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_parameters(tmp_path / "missing.npz")
    with pytest.raises(InputError, match=r"ends in \.npz"):
        write_parameters(tmp_path / "p.bin", params)
