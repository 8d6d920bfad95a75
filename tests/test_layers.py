"""The shape of the package: imports point down, `import acs_fast` is light, files are short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import acs_fast

ROOT = Path(__file__).resolve().parent.parent
# a room imports rooms further down only; those in one line do not know each other
ORDER = [
    ["__main__"],
    ["cli"],
    ["evaluation"],
    ["curriculum", "bench", "encoding", "status"],
    ["steering", "estimate", "pipeline"],
    ["backends"],
    ["generator", "training", "report", "output", "resume"],
    ["engine"],
    ["sampler", "denoiser"],
    ["judge", "real", "samples", "parts"],
    ["discriminator", "guidance", "compiled"],
    ["feeds", "session"],
    ["latents"],
    ["manifest", "record"],
    ["images"],
    ["environment"],
    ["shards", "writer", "attention", "linear", "plan", "networks"],
    ["graph"],
    ["ops", "testing", "schedulers"],
    ["augment", "diffusion"],
    ["models"],
    ["data"],
    ["loader"],
    ["listing"],
    ["distributed"],
    ["config", "log", "stopping", "heartbeat", "units"],
    ["kernels"],
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def sources():
    """Every Python file of the package by its path inside it; kernels/ lies beside it, behind a symlink."""
    files = {path.relative_to(ROOT / "acs_fast"): path for path in (ROOT / "acs_fast").rglob("*.py")}
    files |= {path.relative_to(ROOT): path for path in (ROOT / "kernels").rglob("*.py")}
    return {str(name): path for name, path in sorted(files.items())}


SOURCES = sources()


def room_of(file):
    return Path(file).parts[0].removesuffix(".py")


def imported(tree):
    """Every module or name that a file imports, dotted, wherever in the file the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports of the package absolutely"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(tree):
    """The rooms that a file imports; the lazy public names of the package count as names from above."""
    for name in imported(tree):
        parts = name.split(".")
        if parts[0] == "acs_fast" and name != "acs_fast.__version__":
            yield parts[1] if len(parts) > 1 else "__init__"


def upward(file, tree):
    """The imports of a file that do not point down."""
    room = room_of(file)
    return [
        other for other in imported_rooms(tree) if other != room and not LEVEL.get(other, -1) > LEVEL[room]
    ]


def test_every_room_has_its_place():
    rooms = {room_of(file) for file in SOURCES} - {"__init__"}
    assert rooms == set(LEVEL), "add the new room to ORDER, or remove the one that is gone"


@pytest.mark.parametrize("file", [file for file in SOURCES if file != "__init__.py"])
def test_imports_point_down(file):
    assert upward(file, ast.parse(SOURCES[file].read_text())) == []


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("data.py", "from acs_fast.sampler import denoise", ["sampler"]),
        ("data.py", "def f():\n    import acs_fast.cli", ["cli"]),
        ("data.py", "from acs_fast import distill", ["distill"]),
        ("data.py", "import acs_fast", ["__init__"]),
        ("sampler.py", "from acs_fast.training import train", ["training"]),
        ("kernels/reference.py", "from acs_fast import config", ["config"]),
        ("cli.py", "from acs_fast import __version__, sampler\nfrom acs_fast.data import DIGITS", []),
    ],
)
def test_the_rule_finds_what_it_forbids(file, text, found):
    assert upward(file, ast.parse(text)) == found


@pytest.mark.parametrize("file", [file for file in SOURCES if room_of(file) == "kernels"])
def test_kernels_import_torch_and_triton_alone(file):
    names = {name.split(".")[0] for name in imported(ast.parse(SOURCES[file].read_text()))}
    assert names <= {"torch", "triton", "acs_fast", *sys.stdlib_module_names}


LIGHT = ["__init__.py", *(file for file in SOURCES if room_of(file) == "config")]


@pytest.mark.parametrize("file", LIGHT)
def test_light_rooms_import_no_heavy_package(file):
    names = {name.split(".")[0] for name in imported(ast.parse(SOURCES[file].read_text()))}
    assert names <= {"acs_fast", "yaml", *sys.stdlib_module_names}


@pytest.mark.parametrize("file", SOURCES)
def test_files_stay_under_400_lines(file):
    assert len(SOURCES[file].read_text().splitlines()) <= 400


@pytest.mark.parametrize("file", SOURCES)
def test_no_behaviour_hangs_on_an_environment_variable(file):
    tree = ast.parse(SOURCES[file].read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert not names & {"environ", "environb", "getenv", "getenvb", "putenv"}


def run_python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, acs_fast; from acs_fast import DistillConfig, InputError; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run_python(code).split()}
    assert "acs_fast" in loaded
    assert not loaded & {
        "torch",
        "numpy",
        "PIL",
        "safetensors",
        "matplotlib",
        "yaml",
        "tqdm",
        "triton",
        "diffusers",
    }


def test_importing_the_package_is_fast():
    code = (
        "import time; started = time.process_time(); import acs_fast; acs_fast.DistillConfig;"
        "print(time.process_time() - started)"  # of this process alone: other work must not fail the test
    )
    assert min(float(run_python(code)) for _ in range(5)) < 0.2


def test_public_names_load():
    for name in acs_fast.__all__:
        assert getattr(acs_fast, name).__name__ == name
    assert acs_fast.evaluate.__module__ == "acs_fast.evaluation"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        acs_fast.nothing  # noqa: B018


def test_top_level_kernels_is_no_package():
    # Hugging Face publishes a package `kernels` that diffusers imports: ours must not stand in its way
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "acs_fast" / "kernels").resolve() == (ROOT / "kernels").resolve()
    for path in [*(ROOT / "acs_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert "kernels" not in {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}, path
