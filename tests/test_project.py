"""The house itself: which room may import which, what every module owes its reader, and what the wheel holds."""

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml


PACKAGE = "hf_curriculum"
METHODS = ("curriculum", "distillation", "layerwise", "multitask")
COMPOSITION = ("trainers", "cli", "commands", "recipe", "recipe_data")
# Room -> the rooms it may import beside itself. The package's own `__init__` is lazy: it names everything and imports
# nothing, which `test_import_alone_stays_light` holds it to.
ALLOWED = {
    "core": (),
    **dict.fromkeys(METHODS, ("core",)),
    "analysis": ("core",),
    "demo": ("core",),
    **dict.fromkeys(COMPOSITION, ("core", *METHODS, "analysis", *COMPOSITION)),
    "__init__": ("core", *METHODS, "analysis", *COMPOSITION),
}
MAX_MODULE_LINES = 400
# Written in pieces, so that this file does not hold what it looks for.
FOLDERS = ("ho" + "me", "ro" + "ot", "wo" + "rk", "op" + "t", "Us" + "ers")
MACHINE_PATHS = re.compile(r"(?<![\w.~$}-])/(?:" + "|".join(FOLDERS) + r")/\w")


def modules(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def room_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported_names(path: Path, package: Path) -> Iterator[str]:
    """Dotted names below the package that a module imports, at its top, inside functions or for types alone."""
    here = list(path.relative_to(package.parent).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            # `from .. import core` names the room in its alias; the deeper name does no harm in the other cases.
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def edges(package: Path) -> set[tuple[str, str, str]]:
    """Every `(module, its room, the room it imports)` inside the package."""
    rooms = {room_of(path, package) for path in modules(package)}
    found = set()
    for path in modules(package):
        for name in imported_names(path, package):
            parts = name.split(".")
            if parts[0] != package.name or len(parts) < 2:
                continue
            # A name that is no room is a public name of the lazy `__init__`.
            target = parts[1] if parts[1] in rooms else "__init__"
            found.add((str(path.relative_to(package)), room_of(path, package), target))
    return found


def forbidden_edges(package: Path) -> list[str]:
    return sorted(
        f"{module}: {source} -> {target}"
        for module, source, target in edges(package)
        if target != source and target not in ALLOWED.get(source, ())
    )


def declared_all(path: Path) -> tuple[list[str] | None, list[str]]:
    """`__all__` of a module as written (`None` without one), and the public names that it binds itself."""
    declared, bound = None, []
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        if "__all__" in names and isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Tuple):
            declared = [ast.literal_eval(item) for item in node.value.elts]
        bound += [name for name in names if not name.startswith("_")]
    return declared, bound


def tracked_files(repository: Path) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=repository,
        capture_output=True,
        check=False,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [repository / name for name in listing.stdout.split("\0") if name and (repository / name).is_file()]


@pytest.fixture
def package(repository: Path) -> Path:
    return repository / PACKAGE


def package_modules() -> list[Path]:
    return modules(Path(__file__).resolve().parent.parent / PACKAGE)


each_module = pytest.mark.parametrize("path", package_modules(), ids=lambda path: f"{path.parent.name}/{path.name}")


def test_imports_run_one_way(package: Path) -> None:
    assert forbidden_edges(package) == []


@pytest.mark.parametrize(
    ("module", "line", "edge"),
    [
        ("core/order.py", "from ..curriculum import plan", "core/order.py: core -> curriculum"),
        ("core/order.py", "from .. import analysis", "core/order.py: core -> analysis"),
        ("core/order.py", f"import {PACKAGE}.trainers", "core/order.py: core -> trainers"),
        ("core/order.py", f"from {PACKAGE} import CurriculumConfig", "core/order.py: core -> __init__"),
        (
            "curriculum/plan.py",
            "from ..distillation.losses import x",
            "curriculum/plan.py: curriculum -> distillation",
        ),
        (
            "multitask/cgc/layer.py",
            "def f():\n    from ...layerwise import x",
            "multitask/cgc/layer.py: multitask -> layerwise",
        ),
        (
            "analysis/report.py",
            f"from {PACKAGE}.curriculum.plan import x",
            "analysis/report.py: analysis -> curriculum",
        ),
        ("trainers.py", "from .demo import corpus", "trainers.py: trainers -> demo"),
        ("demo/corpus.py", "from ..curriculum import plan", "demo/corpus.py: demo -> curriculum"),
        ("extras.py", "from .core import order", "extras.py: extras -> core"),
    ],
)
def test_import_checker_reports_a_forbidden_edge(tmp_path: Path, module: str, line: str, edge: str) -> None:
    root = tmp_path / PACKAGE
    rooms = ["core/order.py", "curriculum/plan.py", "distillation/losses.py", "layerwise/policies.py"]
    for name in [*rooms, "analysis/report.py", "demo/corpus.py", "trainers.py", "cli.py", module]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('"""A room."""\n')
    (root / "trainers.py").write_text("from .core import order\nfrom .curriculum import plan\n")
    (root / "curriculum/plan.py").write_text("import numpy\nfrom ..core.order import x\nfrom . import levels\n")
    assert forbidden_edges(root) == []

    with (root / module).open("a") as file:
        file.write(line + "\n")
    assert edge in forbidden_edges(root)


def test_demo_is_imported_by_nothing_in_the_package(package: Path) -> None:
    assert [edge for edge in edges(package) if edge[2] == "demo" and edge[1] != "demo"] == []


@each_module
def test_module_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_MODULE_LINES


@each_module
def test_all_is_sorted_and_names_what_the_module_defines(path: Path) -> None:
    declared, bound = declared_all(path)
    if path.name == "__init__.py" and declared is None:
        assert bound == [], "a package that defines names says which of them are public"
        return
    assert declared is not None, "`__all__` is missing"
    assert declared == sorted_as_ruff(declared)
    assert len(set(declared)) == len(declared)
    if path.name != "__init__.py":
        assert set(declared) <= set(bound)


def sorted_as_ruff(names: list[str]) -> list[str]:
    """RUF022's order: constants, then classes, then everything else."""

    def key(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)

    return sorted(names, key=key)


def test_every_public_name_of_the_package_can_be_imported() -> None:
    import hf_curriculum

    missing = [name for name in hf_curriculum.__all__ if not hasattr(hf_curriculum, name)]
    assert missing == []
    assert set(hf_curriculum.__all__) <= set(dir(hf_curriculum))
    with pytest.raises(AttributeError, match="no_such_name"):
        hf_curriculum.no_such_name  # noqa: B018 - the access is what raises


def test_import_alone_stays_light() -> None:
    code = "import sys, json, hf_curriculum; hf_curriculum.__version__; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    )
    heavy = {"accelerate", "datasets", "deepspeed", "evaluate", "numpy", "peft", "torch", "transformers", "trl"}
    assert heavy & set(loaded) == set()
    assert "hf_curriculum" in loaded


@each_module
def test_module_imports_only_what_the_project_declares(path: Path, repository: Path) -> None:
    """An import at the top of a module needs a dependency; an optional package is imported where it is used."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    declared = {requirement_name(line) for line in project["dependencies"]}
    known = {*sys.stdlib_module_names, PACKAGE, *declared}
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {
        name.split(".")[0]
        for node in top
        if not (isinstance(node, ast.ImportFrom) and node.level)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert roots <= known


def requirement_name(line: str) -> str:
    return re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0].lower().replace("-", "_").replace("pyyaml", "yaml")


def test_constraints_satisfy_every_floor(repository: Path) -> None:
    from packaging.requirements import Requirement
    from packaging.version import Version

    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"]]
    for name in ("deepspeed", "plots", "test", "quality"):
        wanted += extras[name]
    pins = {}
    for line in (repository / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            assert Version(specifier.version).local is None, "a local version exists on one kind of machine only"
            pins[requirement_name(pin.name)] = specifier.version
    for requirement in map(Requirement, wanted):
        if requirement.name != PACKAGE:
            assert requirement.specifier.contains(pins[requirement_name(requirement.name)]), requirement


def test_tracked_files_hold_no_path_of_a_machine(repository: Path) -> None:
    found = []
    for path in tracked_files(repository):
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(repository)}: {match.group()}" for match in MACHINE_PATHS.finditer(text)]
    assert found == []


def test_machine_path_pattern_finds_paths_and_spares_addresses() -> None:
    folder = "ho" + "me"
    assert MACHINE_PATHS.search(f"open('/{folder}/someone/data')")
    assert MACHINE_PATHS.search(f"/{folder}/someone")
    assert not MACHINE_PATHS.search(f"https://example.org/{folder}/page")
    assert not MACHINE_PATHS.search(f"../{folder}/page")


def test_every_yaml_parses(repository: Path) -> None:
    files = sorted([*(repository / "accelerate_configs").rglob("*.yaml"), *(repository / "recipes").rglob("*.yaml")])
    assert len(files) >= 7
    for path in files:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def test_accelerate_configs_say_what_their_names_promise(repository: Path) -> None:
    from accelerate.commands.config import load_config_from_file

    found = {path.stem: path for path in (repository / "accelerate_configs").glob("*.yaml")}
    assert sorted(found) == ["ddp", "ddp_cpu", "fsdp2", "single", "zero1", "zero2", "zero3"]
    for name, path in found.items():
        config = load_config_from_file(str(path))
        # Another value overrules `bf16=False` under DDP without a word, and stops DeepSpeed.
        assert config.mixed_precision == "no", name
        assert config.use_cpu == (name == "ddp_cpu")
        assert config.num_processes == (1 if name == "single" else 2)
        if name.startswith("zero"):
            assert config.distributed_type == "DEEPSPEED"
            assert config.deepspeed_config["zero_stage"] == int(name[-1])
    assert load_config_from_file(str(found["fsdp2"])).fsdp_config["fsdp_version"] == 2
    # MULTI_CPU starts one process where there is no mpirun.
    assert load_config_from_file(str(found["ddp_cpu"])).distributed_type == "MULTI_GPU"


BACKEND = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_curriculum.core.distributed import end_processes

args = TrainingArguments("out", max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 32
trainer = Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=rows)
trainer.train()
accelerator = trainer.accelerator
stage = trainer.model_wrapped.zero_optimization_stage() if accelerator.distributed_type == "DEEPSPEED" else 0
with open(f"seen-{accelerator.process_index}", "w") as file:
    file.write(f"{accelerator.distributed_type.value} {accelerator.num_processes} {stage}")
end_processes()
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "seen"),
    [
        pytest.param("single.yaml", "NO 1 0", id="single"),
        pytest.param("ddp_cpu.yaml", "MULTI_CPU 2 0", id="ddp_cpu"),
        pytest.param("zero1.yaml", "DEEPSPEED 2 1", id="zero1"),
        pytest.param("zero2.yaml", "DEEPSPEED 2 2", id="zero2"),
        pytest.param("zero3.yaml", "DEEPSPEED 2 3", id="zero3"),
    ],
)
def test_accelerate_config_gives_the_backend_of_its_name(launch, tmp_path: Path, config: str, seen: str) -> None:
    processes = int(seen.split()[1])
    launch(BACKEND, processes, config=config)
    assert [(tmp_path / f"seen-{rank}").read_text() for rank in range(processes)] == [seen] * processes


@pytest.mark.slow
@pytest.mark.distributed
def test_launch_shows_output_of_a_failing_worker_and_leaves_none_behind(launch, tmp_path: Path) -> None:
    import psutil

    with pytest.raises(pytest.fail.Exception, match="a word from the worker"):
        launch("raise SystemExit('a word from the worker')", 2)
    waiting = "import os, time\nopen('pid' + os.environ['RANK'], 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    with pytest.raises(pytest.fail.Exception, match="ran past"):
        launch(waiting, 2, timeout=20)
    for rank in range(2):
        assert not psutil.pid_exists(int((tmp_path / f"pid{rank}").read_text()))


def test_network_is_out_of_reach() -> None:
    import socket

    with pytest.raises(pytest.fail.Exception, match="reached for the network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(pytest.fail.Exception, match="reached for the network"):
        socket.getaddrinfo("example.org", 443)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(repository: Path, tmp_path: Path) -> None:
    # From a copy: setuptools writes `build/` and `*.egg-info` beside the sources. The environment's own setuptools
    # builds, for an isolated build would fetch one.
    source = tmp_path / "source"
    for path in tracked_files(repository):
        copy = source / path.relative_to(repository)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    expected = {str(path.relative_to(source)) for path in modules(source / PACKAGE)}
    assert f"{PACKAGE}/py.typed" in names
    assert expected <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {PACKAGE}
    assert any(name.endswith("licenses/LICENSE") for name in names)
