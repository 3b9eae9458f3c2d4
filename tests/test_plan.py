"""Operations, bytes, communication and time of programs, against numbers worked out by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion_jax.experiment import initial_state, loss_fn
from diffusion_jax.planning import report
from diffusion_jax.planning.estimate import collective_seconds, estimate
from diffusion_jax.planning.hlo import Collective, Program, Shape, collective_kind
from diffusion_jax.planning.plan import make_plan
from diffusion_jax.planning.topology import find_topology, known
from diffusion_jax.training.mesh import make_mesh
from diffusion_jax.training.roofline import (
    CHIPS,
    batch_shapes,
    convolution_bytes,
    count_flops,
    find_chip,
    image_share,
    peak_flops,
    train_flops,
)
from diffusion_jax.typing import InputError

# A loop of 5 products of [8, 16] and [16, 4] on each of 4 devices, a sum over them and a gather of bfloat16.
TEXT = """HloModule jit_toy, is_scheduled=true, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,16], f32[16,4])) -> (s32[], f32[8,16], f32[16,4]) {
  %p = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(2)
  %next = s32[] add(%i, %one)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %w = f32[16,4]{1,0} get-tuple-element(%p), index=2
  %y = f32[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) tuple(%next, %x, %w)
}

%cond (p: (s32[], f32[8,16], f32[16,4])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,16], w: f32[16,4], h: bf16[6,10]) -> f32[16,4] {
  %x = f32[8,16]{1,0:T(8,128)} parameter(0)
  %w = f32[16,4]{1,0} parameter(1)
  %h = bf16[6,10]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) tuple(%zero, %x, %w)
  %loop = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) while(%start), condition=%cond, body=%body
  %end = f32[16,4]{1,0} get-tuple-element(%loop), index=2
  %all = bf16[12,10]{1,0} all-gather(%h), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  ROOT %out = f32[16,4]{1,0} all-reduce(%end), replica_groups={{0,1,2,3}}, to_apply=%sum
}
"""
GROUPS = {
    "{{0,1,2,3}}": (0, 1, 2, 3),
    "{{0,2},{1,3}}": (0, 2),
    "[2,2]<=[2,2]T(1,0)": (0, 2),
    "[2,2]<=[4]": (0, 1),
    "mesh['axis_0'=4,'axis_1'=1] {'axis_0'}": (0, 1, 2, 3),
    "mesh['axis_0'=1,'axis_1'=4] {'axis_1'}": (0, 1, 2, 3),
    "mesh['axis_0'=2,'axis_1'=2] {'axis_0'}": (0, 2),
    "mesh['axis_0'=2,'axis_1'=2] {'axis_1'}": (0, 1),
    "mesh['axis_0'=2,'axis_1'=2,'axis_2'=1] {'axis_0','axis_1'}": (0, 1, 2, 3),
}
"""Ways in which XLA writes groups of devices, and the first of each for four devices."""
PLAIN = CHIPS["v5e"]._replace(flops=1e3, flops32=1e3, bandwidth=1e2, link=10.0, clock=1.0)


def shapes(*sizes, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def convolve(x, k, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x, k, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def test_the_number_of_devices_is_read_from_a_header_of_any_length():
    assert Program(TEXT.replace("num_partitions=4", f"options={{{'0;' * 100_000}}}, num_partitions=4")).partitions == 4


@pytest.mark.parametrize("written", GROUPS)
def test_groups_of_devices_in_every_notation(written):
    text = TEXT.replace("replica_groups={{0,1,2,3}}", f"replica_groups={written}, use_global_device_ids=true")
    reduced = next(c for c in Program(text).collectives() if c.kind == "all-reduce")
    assert reduced.group[: len(GROUPS[written])] == GROUPS[written]
    assert reduced.size == len(GROUPS[written])


class TestModelFlops:
    def test_matmul(self):
        assert count_flops(jnp.matmul, *shapes((7, 5, 3), (7, 3, 11))) == 2 * 7 * 5 * 3 * 11

    @pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
    def test_convolution(self, stride, groups):
        x, k = shapes((2, 8, 8, 12), (3, 3, 12 // groups, 16))
        flops = count_flops(lambda x, k: convolve(x, k, stride, groups), x, k)
        assert flops == 2 * 2 * (8 // stride) ** 2 * 9 * (12 // groups) * 16

    def test_attention(self):
        q, k, v = shapes((2, 6, 4, 8), (2, 10, 4, 8), (2, 10, 4, 8))
        assert count_flops(jax.nn.dot_product_attention, q, k, v) == 2 * 2 * 2 * 4 * 6 * 10 * 8

    def test_loops_branches_and_calls(self):
        def f(x, w):
            step = jax.checkpoint(lambda x: x @ w)
            x, _ = jax.lax.scan(lambda x, _: (jax.jit(step)(x), None), x, None, length=5)
            return jax.lax.cond(jnp.sum(x) > 0, lambda x: (x @ w) @ w, lambda x: x @ w, x)

        assert count_flops(f, *shapes((4, 4), (4, 4))) == (5 + 2) * 2 * 4**3

    def test_arrays_of_the_largest_convolution(self):
        def f(x, small, large):
            def both(x, _):
                return convolve(convolve(x, large, 1, 1), small, 1, 1), None

            return jax.lax.scan(jax.checkpoint(both), x, None, length=5)[0] + convolve(x, small[..., :12, :], 1, 1)

        x, small, large = shapes((2, 8, 8, 12), (1, 1, 40, 12), (3, 3, 12, 40))
        wanted = 4 * 2 * 8 * 8 * (12 + 40)
        assert convolution_bytes(f, x, small, large) == wanted
        assert jax.jit(f).lower(x, small, large).compile().memory_analysis().peak_memory_in_bytes >= wanted

    def test_backward_is_two_products_for_each(self):
        x, w = shapes((4, 6), (6, 8))
        assert count_flops(lambda x, w: jax.vjp(jnp.matmul, x, w)[1](jnp.ones((4, 8))), x, w) == 3 * count_flops(
            jnp.matmul, x, w
        )

    def test_training_step_is_three_forward_passes(self):
        experiment = toy.experiment(batch=16, width=16)
        net, params = experiment.net, jax.eval_shape(experiment.net.init, jax.random.key(0))
        x, t, y = (*shapes((16, 8, 8, 1), (16,)), jax.ShapeDtypeStruct((16,), jnp.int32))
        forward = count_flops(net.apply, params, x, t, y)
        kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2 and leaf.shape[0] != 11]
        assert forward == 2 * 16 * sum(leaf.size for leaf in kernels)
        assert train_flops(experiment, loss_fn(experiment), batch_shapes(experiment)) == 3 * forward


class TestChips:
    def test_kinds_of_devices(self):
        found = {kind: find_chip(kind) for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite")}
        assert [chip.name for chip in found.values()] == ["TPU v4", "TPU v5e", "TPU v5p", "TPU v6e"]
        assert find_chip("NVIDIA A100-SXM4-80GB").flops == 312e12
        assert find_chip("NVIDIA H200").memory > find_chip("NVIDIA H100 80GB HBM3").memory
        assert find_chip("cpu") is find_chip("H1000") is None

    def test_peak(self):
        assert peak_flops("TPU v5 lite") == 197e12
        assert peak_flops("cpu") is None
        assert peak_flops("cpu", "1e11") == 1e11
        for bad in ("fast", "-1", "nan", "inf"):
            with pytest.raises(InputError, match="PEAK"):
                peak_flops("cpu", bad)

    def test_share_of_one_example(self, monkeypatch):
        experiment, mesh = toy.experiment(batch=16), make_mesh(1)
        monkeypatch.delenv("PEAK", raising=False)
        assert image_share(experiment, mesh) is None
        monkeypatch.setenv("PEAK", "1e9")
        whole = train_flops(experiment, loss_fn(experiment), batch_shapes(experiment))
        assert image_share(experiment, mesh) == pytest.approx(whole / 16 / 1e9)


def runs(program):
    return {op.name: times for _, op, times in program.walk()}


class TestProgram:
    def test_shapes_in_memory(self):
        assert Shape("bf16", (3, 5)).bytes == 30
        assert Shape("pred", (3,)).bytes == 3
        assert Shape("f32", (130, 3), (1, 0), (8, 128)).padded_bytes == 4 * 136 * 128
        assert Shape("f32", (130, 3), (0, 1), (8, 128)).padded_bytes == 4 * 256 * 8

    def test_loops_are_counted(self):
        program = Program(TEXT)
        assert runs(program)["y"] == 5
        assert runs(program)["out"] == 1
        assert program.flops(program.computations["body"]["y"], "body") == 2 * 8 * 16 * 4
        known = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
        assert runs(Program(known))["y"] == 7

    def test_loops_whose_counter_is_copied_to_another_memory(self):
        copied = TEXT.replace("add(%i, %one)", "add(%kept, %one)").replace("compare(%i, %n)", "compare(%kept, %n)")
        for line in ("  %one = ", "  %n = "):
            copied = copied.replace(line, f"  %kept = s32[]{{:T(128)S(6)}} copy(%i)\n{line}")
        assert runs(Program(copied))["y"] == 5

    def test_kernels_whose_metadata_has_lines_of_its_own(self):
        kernel = (
            '  %kernel = f32[8,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes='
            '{kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 512}"\n}}, '
            'metadata={op_name="attend" stack_frame_id=7}\n'
        )
        program = Program(TEXT.replace("  %y = ", f"{kernel}  %y = "))
        assert runs(program) == {**runs(Program(TEXT)), "kernel": 5}
        assert program.computations["body"]["kernel"].frame == 7

    def test_collectives(self):
        gather, reduce = sorted(Program(TEXT).collectives(), key=lambda c: c.kind)
        assert gather == Collective("all-gather", 2 * 120, (0, 2), 2, 1, False)
        assert reduce == Collective("all-reduce", 256, (0, 1, 2, 3), 4, 1, False)
        assert gather.sent == 120
        assert reduce.sent == 2 * 256 * 3 / 4
        assert collective_kind("all-gather-start") == "all-gather"
        assert collective_kind("all-gathering") is None

    def test_roofline_by_hand(self):
        work = estimate(Program(TEXT), PLAIN, (4,), lambda i: (i,))
        product, moved = 1024 / 1e3, (4 * 8 * 16 + 256 + 128) / 1e2  # compute, memory, of each of the five
        assert work.flops == 5 * 1024
        assert work.seconds["matrix product"] == pytest.approx(5 * max(product, moved))
        # On a line of four with links of 10 B/s: 2 and 4 neighbours in a row.
        gather, reduce = 120 / 10 + 2e-6, 384 / 10 + 2 * 3e-6
        assert work.exposed == pytest.approx(gather + reduce)
        assert work.step == work.worst == pytest.approx(work.ops + gather + reduce)

    def test_what_overlaps_hides(self):
        text = TEXT.replace("all-reduce(%end)", "all-reduce-start(%end)")
        work = estimate(Program(text), PLAIN, (4,), lambda i: (i,))
        hidden = 384 / 10 + 6e-6
        assert work.exposed == pytest.approx(120 / 10 + 2e-6 + max(0.0, hidden - work.ops))
        assert work.worst == pytest.approx(work.ops + 120 / 10 + 2e-6 + hidden)

    def test_not_a_program(self):
        with pytest.raises(ValueError, match="no entry"):
            Program("nothing")

    @pytest.mark.parametrize("case", ["matmul", "convolution", "strided", "transposed", "attention"])
    def test_flops_of_compiled_programs(self, case):
        x, k = shapes((2, 8, 8, 4), (3, 3, 4, 6))
        valid, strided = (3 * 8 - 2) ** 2, (3 * 4 - 1) ** 2  # taps that are not padding; stride 2 pads on one side
        f, args, wanted = {
            "matmul": (jnp.matmul, shapes((32, 48), (48, 64)), 2 * 32 * 48 * 64),
            "convolution": (convolve, (x, k), 2 * 2 * valid * 4 * 6),
            "strided": (lambda x, k: convolve(x, k, 2), (x, k), 2 * 2 * strided * 4 * 6),
            "transposed": (
                lambda g, k: jax.linear_transpose(lambda x: convolve(x, k, 2), x)(g)[0],
                shapes((2, 4, 4, 6), (3, 3, 4, 6)),
                2 * 2 * strided * 4 * 6,
            ),
            "attention": (
                lambda q: jax.nn.dot_product_attention(q, q, q), shapes((2, 6, 4, 8)), 4 * 2 * 4 * 6 * 6 * 8,
            ),
        }[case]  # fmt: skip
        program = Program(jax.jit(f).lower(*args).compile().as_text())
        assert sum(program.flops(op, name) * times for name, op, times in program.walk()) == wanted


class TestNetwork:
    def at(self, grid):
        return lambda i: tuple(int(n) for n in np.unravel_index(i, grid))

    def test_torus_and_mesh(self):
        chip, n = CHIPS["v5e"], 2**30
        ring = Collective("all-gather", n, tuple(range(256)), 256, 1, False)
        # Both axes close: four links; 8 + 8 hops.
        assert collective_seconds(ring, chip, (16, 16), self.at((16, 16))) == pytest.approx(
            n * 255 / 256 / (4 * chip.link) + 16e-6
        )
        small = Collective("all-reduce", n, tuple(range(8)), 8, 1, False)
        # Neither axis closes: two links; 1 + 3 hops, twice.
        assert collective_seconds(small, chip, (2, 4), self.at((2, 4))) == pytest.approx(
            2 * n * 7 / 8 / (2 * chip.link) + 8e-6
        )
        row = Collective("reduce-scatter", n, tuple(range(16)), 16, 1, False)
        assert collective_seconds(row, chip, (16, 16), self.at((16, 16))) == pytest.approx(
            n * 15 / 16 / (2 * chip.link) + 8e-6
        )

    def test_alone_sends_nothing(self):
        assert (
            collective_seconds(Collective("all-reduce", 100, (0,), 1, 1, False), CHIPS["v5e"], (1,), self.at((1,))) == 0
        )

    def test_hosts_of_gpus(self):
        chip, n = CHIPS["H100"], 2**30
        inside = Collective("all-gather", n, tuple(range(8)), 8, 1, False)
        outside = Collective("all-gather", n, tuple(range(16)), 16, 1, False)
        times = [collective_seconds(c, chip, (16,), lambda i: (i,)) for c in (inside, outside)]
        assert times[0] == pytest.approx(n * 7 / 8 / 450e9, rel=1e-2)
        assert times[1] == pytest.approx(n * 15 / 16 / (8 * 50e9), rel=1e-2)


class TestTopology:
    @pytest.mark.parametrize("name", ["v5e", "v5e:", "v9z:2x2", "cpu", "cpu:0", "cpu:x", "16x16"])
    def test_unknown_names(self, name):
        with pytest.raises(InputError, match="v5e:16x16"):
            find_topology(name)

    def test_unknown_chip(self):
        with pytest.raises(InputError, match="did you mean 'H100'"):
            find_topology("", "H1000")

    def test_libtpu_is_missing(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match="make plan"):
            find_topology("v5e:1x1")

    def test_the_known_ones_are_listed(self):
        assert {"v5e:1x1", "v5e:2x4", "v5e:16x16", "v6e:16x16"} <= set(known())


@pytest.fixture(scope="module")
def planned():
    experiment = toy.experiment(batch=16, width=16)
    return experiment, make_plan(experiment, find_topology("", "v5e"))


class TestPlan:
    @pytest.mark.slow
    def test_memory_is_that_of_live_arrays(self, planned):
        experiment, result = planned
        state = jax.jit(lambda: initial_state(experiment))()
        live = {
            "parameters": sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)),
            "averages": sum(leaf.nbytes for leaf in jax.tree.leaves(state.averages)),
            "optimizer": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
        }
        assert result["state"] == live
        assert result["batch_bytes"] == 16 * (64 + 4)
        rest = result["programs"]["train"]["memory"]["arguments"] - sum(live.values()) - 16 * (64 + 4)
        assert 0 <= rest < 64  # step, key and the number of steps

    @pytest.mark.slow
    def test_the_state_is_donated(self, planned):
        _, result = planned
        memory = result["programs"]["train"]["memory"]
        assert memory["aliased"] >= sum(result["state"].values())
        assert memory["total"] < memory["arguments"] + memory["outputs"] + memory["temporaries"] + memory["code"]

    def test_operations(self, planned):
        _, result = planned
        train = result["programs"]["train"]
        # The gradient by the input of the first layer is not needed, and nothing else is left out or added.
        assert 0.8 * result["model_flops"] < train["flops"] <= result["model_flops"]
        assert train["mfu"] == pytest.approx(result["model_flops"] / train["step_seconds"] / 197e12)
        assert train["collectives"] == []

    def test_the_page(self, planned):
        _, result = planned
        page = report.text({"experiment": "toy", **result, "advice": []})
        assert page.endswith("of 16.00 GiB per device")
        for word in ("parameters", "temporaries", "collectives: none", "predicted", "utilisation", "sampling"):
            assert word in page
        json.dumps(result)

    @pytest.mark.slow
    def test_what_does_not_fit_says_what_helps(self, planned):
        experiment, _ = planned
        topology = find_topology("", "v5e")
        small = topology._replace(chip=topology.chip._replace(memory=1000))
        result = {"experiment": "toy", **make_plan(experiment, small, sample=False)}
        assert not result["fits"]
        result["advice"] = report.advice(result, {"accumulate": 1, "batch": 16, "split": False, "tensor": 1})
        said = report.verdict(result)
        assert said.startswith("does not fit")
        assert "accumulate=2" in said
        assert "batch=" in said
        assert "split=True" not in said  # of one device
        assert "remat" not in said  # the toy has no such argument

    def test_an_error_of_the_compiler_is_told(self, planned):
        _, result = planned
        broken = {**result, "fits": False, "advice": [], "programs": {"train": {"error": "Used 20.13G of 15.75G hbm"}}}
        assert report.verdict(broken) == "does not fit: train: Used 20.13G of 15.75G hbm"

    @pytest.mark.slow
    def test_compilations_are_remembered(self, planned, tmp_path):
        experiment, _ = planned
        topology = find_topology("", "v5e")
        first = make_plan(experiment, topology, sample=False, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
        assert make_plan(experiment, topology, sample=False, cache=tmp_path) == first

    def test_bad_devices(self, planned):
        experiment, _ = planned
        with pytest.raises(InputError, match="devices=99"):
            make_plan(experiment, find_topology(""), devices=99)


def test_examples_are_found_without_the_data():
    experiment = toy.experiment(batch=8)
    assert {k: (v.shape, str(v.dtype)) for k, v in batch_shapes(experiment).items()} == {
        "image": ((8, 8, 8, 1), "uint8"), "label": ((8,), "int32")
    }  # fmt: skip
    latents = experiment.__class__(**{**vars(experiment), "prepare": lambda x, key, flip: x[..., :1] * x[..., 1:]})
    assert batch_shapes(latents, 3)["image"].shape == (3, 8, 8, 2)
    strange = experiment.__class__(**{**vars(experiment), "prepare": lambda x, key, flip: x[:, :3]})
    with pytest.raises(InputError, match="stored"):
        batch_shapes(strange)
