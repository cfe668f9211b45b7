"""What `doctor` looks at: each probe tries one thing on this machine and says what it found and what it means."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from orchestrator.cli import machine
from orchestrator.cli.rundir import local_path
from orchestrator.errors import OrchestratorError
from orchestrator.text import human_bytes

_SYNC_TRIALS = 5
_SLOW_SYNC_S = 0.05
_WRITE_BYTES = 16 << 20
_IMPORT_TIMEOUT_S = 120

_DEATH_SIGNAL_PROBE = """
import ctypes, sys
libc, found = ctypes.CDLL(None), ctypes.c_int()
refused = libc.prctl(1, 9, 0, 0, 0) or libc.prctl(2, ctypes.byref(found), 0, 0, 0)
sys.exit(1 if refused or found.value != 9 else 0)
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `level`: "ok", "warning" (works, but) or "error" (a launch would fail)."""

    topic: str
    text: str
    level: str = "ok"


def python() -> Finding:
    return Finding("python", f"{platform.python_version()} ({sys.executable})")


def system() -> Finding:
    found = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if sys.platform != "linux":
        return Finding("system", f"{found}; `launch` needs Linux, plain `python train.py` works here", "error")
    return Finding("system", found)


def torch() -> Finding:
    """Installed, new enough, importable, and able to see the GPUs there are? Imported in a child: it may crash."""
    found = package("torch", (2, 11))
    if found.level == "error":
        return found
    says, why = _ask_python("import torch;print(torch.version.cuda or '-', torch.cuda.device_count())")
    if not says:
        return Finding("torch", f"{found.text}, but `import torch` fails: {why}", "error")
    cuda, visible = says.split()
    if int(visible) < machine.gpus():
        built = "is built without CUDA" if cuda == "-" else f"(CUDA {cuda}) sees {visible} of them"
        return Finding("torch", f"{found.text}: {machine.gpus()} GPUs are here, and this torch {built}", "warning")
    return Finding("torch", found.text)


def ray() -> Finding:
    """Installed, new enough and importable?"""
    found = package("ray", (2, 52))
    if found.level == "error":
        return found
    says, why = _ask_python("import ray;print(ray.__version__)")
    return found if says else Finding("ray", f"{found.text}, but `import ray` fails: {why}", "error")


def _ask_python(code: str) -> tuple[str, str]:
    """(what a fresh interpreter prints, or "" and why it failed)."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "", f"not done after {_IMPORT_TIMEOUT_S} s"
    if done.returncode != 0:
        return "", (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return done.stdout.strip().splitlines()[-1], ""


def package(name: str, least: tuple[int, ...]) -> Finding:
    """Is a package there, and new enough? Its metadata is read; it is not imported."""
    wanted = ".".join(map(str, least))
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, f"not installed; `pip install '{name}>={wanted}'`", "error")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < least:
        return Finding(name, f"{version}; `pip install '{name}>={wanted}'`", "error")
    return Finding(name, version)


def cores() -> Finding:
    count = machine.cores()
    return Finding("cores", f"{count} usable of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}")


def memory() -> Finding:
    available = _meminfo().get("MemAvailable")
    total = _meminfo().get("MemTotal")
    if available is None or total is None:
        return Finding("memory", "unknown: /proc/meminfo cannot be read", "warning")
    text = f"{human_bytes(available)} available of {human_bytes(total)}"
    limit = _memory_limit()
    if limit is not None and limit < total:
        text += f", limited to {human_bytes(limit)} by the container"
    return Finding("memory", text, "warning" if min(available, limit or available) < (1 << 30) else "ok")


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if len(words) >= 2 and words[1].isdigit()}


def _memory_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < 1 << 60 else None
    return None


def shared_memory() -> Finding:
    """/dev/shm is used by Ray and by data loaders; our own segments are memfds and need none of it."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return Finding("/dev/shm", f"not usable ({error.strerror}); Ray and data loaders need it", "error")
    text = f"{human_bytes(usage.free)} free of {human_bytes(usage.total)}"
    if usage.total < 256 << 20:
        text += "; data loaders with num_workers > 0 may fail: give the container a larger one (--shm-size=2g)"
        return Finding("/dev/shm", text, "warning")
    return Finding("/dev/shm", text)


def gpus() -> Finding:
    count = machine.gpus()
    if count == 0:
        return Finding("GPUs", "none; training runs on CPU")
    names = _gpu_names()
    return Finding("GPUs", f"{count}{': ' + names if names else ''}")


def _gpu_names() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        asked = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(sorted({line.strip() for line in found.splitlines() if line.strip()}))


def memfd() -> Finding:
    """Snapshots live in memfds: without them nothing can be launched."""
    try:
        descriptor = os.memfd_create("orchestrator-doctor", os.MFD_CLOEXEC)
    except (OSError, AttributeError) as error:
        return Finding("memfd", f"cannot be created ({error}); snapshots in memory need it", "error")
    os.close(descriptor)
    return Finding("memfd", "works")


def pidfd() -> Finding:
    """Deaths are seen through pidfds, or else by waiting alone."""
    try:
        descriptor = os.pidfd_open(os.getpid())
    except (OSError, AttributeError) as error:
        return Finding("pidfd", f"cannot be opened ({error}); a kernel from 5.3 on has them", "warning")
    os.close(descriptor)
    return Finding("pidfd", "works")


def death_signal() -> Finding:
    """PR_SET_PDEATHSIG ends workers with their parent: set it in a child of our own and read it back."""
    done = subprocess.run([sys.executable, "-S", "-c", _DEATH_SIGNAL_PROBE], capture_output=True, timeout=30)
    ok = done.returncode == 0
    return Finding(
        "death signal", "works" if ok else "refused; workers may outlive their agent", "ok" if ok else "error"
    )


def ptrace() -> Finding:
    """Stacks of a hung rank are read by a tracer; nothing else needs it. Tried on a child that is ours."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "import sys;sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        ok, why = _attach(child.pid)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    if ok:
        return Finding("ptrace", "works: stacks of a hung rank can be read")
    return Finding("ptrace", f"refused ({why}); stacks of a hung rank cannot be read", "warning")


def _attach(pid: int) -> tuple[bool, str]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    seize, no_data = 0x4206, None
    if libc.ptrace(seize, pid, no_data, no_data) != 0:
        return False, os.strerror(ctypes.get_errno())
    return True, ""


def user_namespaces() -> Finding:
    """Only tests that fence networks off want them."""
    tool = shutil.which("unshare")
    if tool is None:
        return Finding("user namespaces", "unknown: there is no `unshare` here; only network fault tests need them")
    ok = subprocess.run([tool, "--user", "--net", "true"], capture_output=True, timeout=10).returncode == 0
    return Finding("user namespaces", "work" if ok else "not permitted; only network fault tests need them")


def descriptors() -> Finding:
    """Open files: each worker takes some tens."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return Finding("open files", f"at most {soft}; raise it with `ulimit -n 65536`", "warning")
    return Finding("open files", f"at most {soft} (hard limit {hard})")


def storage(uri: str) -> Finding:
    """Can runs be written there, linked exclusively, and synced at what speed? Leaves nothing behind."""
    try:
        place = local_path(uri).absolute()
    except OrchestratorError as error:
        return Finding("storage", str(error), "error")
    existing = place
    while not existing.is_dir() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".orchestrator-doctor-", dir=existing) as folder:
            return _storage_finding(place, Path(folder))
    except OSError as error:
        return Finding("storage", f"{place} cannot be written ({error.strerror}); choose another --storage", "error")


def _storage_finding(place: Path, folder: Path) -> Finding:
    sync_s = sorted(_sync_once(folder / f"sync-{trial}") for trial in range(_SYNC_TRIALS))[_SYNC_TRIALS // 2]
    speed = _write_speed(folder / "speed")
    free = shutil.disk_usage(folder).free
    text = f"{place}: {human_bytes(free)} free, fsync {1000 * sync_s:.1f} ms, writes {human_bytes(speed)}/s"
    if not _links(folder):
        return Finding("storage", f"{text}; no hard links, so commits fall back to exclusive creation", "warning")
    if sync_s > _SLOW_SYNC_S:
        return Finding("storage", f"{text}; a slow fsync makes commits slow, never steps", "warning")
    return Finding("storage", text, "warning" if free < 1 << 30 else "ok")


def _sync_once(path: Path) -> float:
    begin = time.perf_counter()
    with path.open("wb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begin


def _write_speed(path: Path) -> float:
    block = os.urandom(1 << 20)
    begin = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(_WRITE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return _WRITE_BYTES / (time.perf_counter() - begin)


def _links(folder: Path) -> bool:
    target = folder / "link-target"
    target.write_bytes(b"x")
    try:
        os.link(target, folder / "link")
    except OSError:
        return False
    return True


def extra(name: str, module: str, what_for: str) -> Finding:
    """An optional package."""
    there = importlib.util.find_spec(module) is not None
    return Finding(name, "installed" if there else f"not installed; only {what_for} needs it")


def auto_workers() -> Finding:
    count = machine.gpus()
    return Finding("--workers auto", f"{max(1, count)} ({'one per GPU' if count else 'no GPU to count by'})")


def all_probes(uri: str) -> list[Callable[[], Finding]]:
    """Every probe, in the order of the report."""
    return [
        system,
        python,
        torch,
        ray,
        lambda: extra("boto3", "boto3", "storage on S3"),
        cores,
        memory,
        shared_memory,
        gpus,
        auto_workers,
        memfd,
        pidfd,
        death_signal,
        ptrace,
        user_namespaces,
        descriptors,
        lambda: storage(uri),
    ]
