"""Who may import whom (docs/design), read off the syntax trees; and what `import diffusion_jax` may not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusion_jax

PACKAGE = Path(diffusion_jax.__file__).parent
FILES = {str(f.relative_to(PACKAGE).with_suffix("")).replace("/", "."): f for f in sorted(PACKAGE.rglob("*.py"))}
LAYERS = [
    {"typing", "ops"},
    {"schedules"},
    {"forward", "operators", "predictions", "times"},
    {"denoisers"},
    {"samplers", "guidance", "inverse", "likelihood", "losses", "distill"},
]
CORE = set().union(*LAYERS)
ROOMS = {  # room -> what it may import of this package beside itself; a room not named here is the surface
    "nets": LAYERS[0],
    "text": {"typing"},
    "weights": LAYERS[0] | {"nets"},
    "systems": CORE | {"nets", "text", "weights"},
    "training": CORE | {"experiment"},
    "evaluation": CORE | {"nets", "text", "weights"},
    "planning": CORE | {"arguments", "experiment", "training"},
    "generating": CORE | {"_version", "arguments", "experiment", "nets", "systems", "text", "training", "weights"},
    "measuring": CORE | {"arguments", "experiment", "training", "evaluation"},
}
HEAVY = {"flax", "optax", "orbax"}
MAY_PRINT = {"training.loop", "__main__", "experiment"}


def imports(path):
    """Dotted names that a file imports, wherever in the file; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module != "diffusion_jax":
                yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def inside(path):
    """The rooms of this package that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("diffusion_jax.")}


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module):
    room, used = module.split(".")[0], inside(FILES[module])
    outside = {name.split(".")[0] for name in imports(FILES[module])}
    if room in CORE:
        level = next(i for i, layer in enumerate(LAYERS) if room in layer)
        same = {"ops": {"typing"}, "samplers": {"samplers"}, "inverse": {"samplers"}}.get(room, set())
        assert used <= set().union(*LAYERS[:level]) | same, "the core imports lower layers only"
        assert not outside & HEAVY, "the core needs neither flax nor optax nor orbax"
    elif room in ROOMS:
        assert used <= ROOMS[room] | {room}
        assert "diffusion_jax" not in set(imports(FILES[module])), "import modules, not the surface"
    if room == "nets":
        assert not outside & {"optax", "orbax"}
    assert "experiments" not in outside, "nobody imports experiments"


def test_the_core_stays_small():
    assert sum(len(FILES[m].read_text().splitlines()) for m in FILES if m.split(".")[0] in CORE) < 5000


@pytest.mark.parametrize("module", FILES)
def test_no_print_no_private_jax_no_pmap(module):
    tree = ast.parse(FILES[module].read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert module in MAY_PRINT or "print" not in called
    assert not any(name.startswith("jax._src") for name in imports(FILES[module]))
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"pmap", "_src", "PRNGKey"}


def test_importing_the_surface_loads_nothing_heavy():
    heavy = HEAVY | {"tensorflow", "grain", "sklearn", "tyro"}
    code = f"import sys, diffusion_jax; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_the_surface_lists_what_it_exports():
    names = {name for name in vars(diffusion_jax) if not name.startswith("_")}
    modules = {Path(name.replace(".", "/")).parts[0] for name in FILES} | {"nets", "training", "weights"}
    assert sorted(names - modules - set(diffusion_jax.__all__)) == []
    assert all(hasattr(diffusion_jax, name) for name in diffusion_jax.__all__)
