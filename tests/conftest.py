"""What every test stands on: no network, one thread, a folder of its own, and launches that cannot outlive it."""

import atexit
import contextlib
import ipaddress
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch


# Read by the Hugging Face libraries when they are imported, so set before the first test module is. Each process of
# pytest-xdist comes by here and gets caches of its own; what a parent process set is overwritten on purpose.
_CACHE = Path(tempfile.mkdtemp(prefix="hf_curriculum-tests-"))
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update(
    {
        "HF_HOME": str(_CACHE),
        "HF_HUB_CACHE": str(_CACHE / "hub"),
        "HF_DATASETS_CACHE": str(_CACHE / "datasets"),
        "HF_MODULES_CACHE": str(_CACHE / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
)

if not torch.cuda.is_available():
    # DeepSpeed looks for an accelerator at import and, finding none, warns in every process.
    os.environ["DS_ACCELERATOR"] = "cpu"

REPOSITORY = Path(__file__).resolve().parent.parent
ACCELERATE_CONFIGS = REPOSITORY / "accelerate_configs"
_SHOWN_CHARACTERS = 12_000
_LOCAL_NAMES = (None, "", "localhost", socket.gethostname())

# On a CPU DeepSpeed compiles a shared-memory all-reduce at the first use, for a minute or two, and stops where there
# is no compiler; a test that is ended meanwhile leaves a lock that later runs wait for. Gloo does the same sums.
_WITHOUT_COMPILED_ALL_REDUCE = """
import runpy, sys
import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without_gpu)


def _is_local(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in _LOCAL_NAMES:
        return True
    try:
        address = ipaddress.ip_address(str(name).split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse(host: object) -> None:
    # `pytest.fail` raises a BaseException: libraries that fall back on a cache after an OSError cannot hide it.
    pytest.fail(f"A test reached for the network: got {host!r}, expected the loopback only.", pytrace=True)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    patch = pytest.MonkeyPatch()

    def guard_method(name: str) -> None:
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, *args: Any) -> Any:
            # `sendto(data, address)` and `sendto(data, flags, address)`; `connect(address)`: the address is last.
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(args[-1][0]):
                _refuse(args[-1])
            return original(self, *args)

        patch.setattr(socket.socket, name, guarded)

    for name in ("connect", "connect_ex", "sendto"):
        guard_method(name)
    resolve = socket.getaddrinfo

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            _refuse(host)
        return resolve(host, *args, **kwargs)

    patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _own_folder_seed_and_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What a launcher may have left in the environment would make a Trainer here believe in other processes.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout that is tested."""
    return REPOSITORY


def _end_tree(process: subprocess.Popen[bytes]) -> None:
    # torchrun gives every worker a session of its own, so ending the launcher's process group would orphan them.
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    for child in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(tree, timeout=5)


def _launch_command(script: Path, num_processes: int, config: str | None, log_dir: Path) -> list[str]:
    if config is not None:
        # fmt: off
        return [
            sys.executable, "-m", "accelerate.commands.launch",
            "--config_file", str(ACCELERATE_CONFIGS / config), "--num_processes", str(num_processes),
            "--main_process_port", "0", str(script),
        ]
        # fmt: on
    if num_processes == 1:
        return [sys.executable, str(script)]
    # fmt: off
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--nnodes", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--log-dir", str(log_dir), str(script),
    ]
    # fmt: on


Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """
    Runs a script in processes of its own and returns when all have ended.

    `launch(script, num_processes=2, args=(), env=None, config=None, timeout=300, check=True)` takes the text of a
    script or a `Path`, and returns a `CompletedProcess` whose `stdout` holds what every process wrote. One process
    runs as `python script`, more under torchrun, and with `config="zero2.yaml"` under `accelerate launch` with that
    file of `accelerate_configs`. A script that opens a process group must end with `end_processes()`: gloo
    aborts now and then in interpreters that are finalized with one.
    """
    running: list[subprocess.Popen[bytes]] = []

    def run(
        script: str | Path,
        num_processes: int = 2,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        config: str | None = None,
        timeout: float = 300.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        folder = Path(tempfile.mkdtemp(prefix="launch-", dir=tmp_path))
        if isinstance(script, str):
            path = folder / "script.py"
            path.write_text(textwrap.dedent(script))
        else:
            path = script
        command = _launch_command(path, num_processes, config, folder)
        if config is not None and config.startswith("zero") and not torch.cuda.is_available():
            wrapper = folder / "without_compiled_all_reduce.py"
            wrapper.write_text(_WITHOUT_COMPILED_ALL_REDUCE)
            command.insert(-1, str(wrapper))
        command.extend(args)
        # Buffered, so that a flushed `print` is one write: pieces of lines of several processes would mix.
        environment = {**os.environ, "PYTHONUNBUFFERED": "", "PYTHONFAULTHANDLER": "1", **(env or {})}
        output = folder / "output.txt"
        start = time.monotonic()
        # A file and not a pipe: a worker that outlives its launcher would keep a pipe open, and the reader waiting.
        with output.open("wb") as sink:
            process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path, start_new_session=True
            )
            running.append(process)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end_tree(process)
        text = output.read_text(errors="replace")
        if code is None or (check and code != 0):
            ending = f"ran past {timeout:.0f} s" if code is None else f"ended with {code}"
            pytest.fail(
                f"{' '.join(command)}\n{ending} after {time.monotonic() - start:.1f} s; it wrote:\n"
                f"{text[-_SHOWN_CHARACTERS:]}",
                pytrace=False,
            )
        return subprocess.CompletedProcess(command, code, stdout=text)

    yield run
    for process in running:
        if process.poll() is None:
            _end_tree(process)
