# SPDX-License-Identifier: MIT
"""The promises of femtoqueue, each held by tests, in the order in which README gives them.

Processes are real ones, kills are SIGKILL, time is handed in by patching `time.time`,
`time.clock_gettime` and `time.sleep`, and faults are injected at each system call in turn.
"""

from __future__ import annotations

import builtins
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import functools
import gc
import hashlib
import inspect
import itertools
import json
import logging
import os
import pickle
import platform
import random
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import tracemalloc
import types
import uuid
import venv
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import Full
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import femtoqueue
from femtoqueue import STATES, FemtoQueue, FemtoQueueError, FemtoTask, NotInProgress

HERE = Path(__file__).resolve().parent
MODULE = Path(femtoqueue.__file__).resolve()
README = HERE / "README.md"
PRELUDE = f"import sys, os, time; sys.path.insert(0, {str(MODULE.parent)!r}); import femtoqueue; from femtoqueue import *\n"
REAL_CLOCK = time.clock_gettime
NOW_US = 1_800_000_000_000_000  # where the `clock` fixture begins
OLD_ID = "1700000000000000_host_0123456789ab000000.00000000"
DEAD_OWNER = "host~4194305~1~elsewhere~0"
SHM = Path("/dev/shm")
LONG_MS = 10**12  # a lease that never runs out: what comes back is judged dead
HOUR_US = 3_600_000_000
LATER_US = 4_000_000_000_000_000  # the year 2096
durable_or_not = pytest.mark.parametrize("durable", [False, True], ids=["fast", "durable"])
needs_root = pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root may do this")
Process = subprocess.Popen[str]
Spawn = Callable[..., Process]
Patch = pytest.MonkeyPatch
FIGURES: dict[str, collections.Counter[str]] = {}


# ====================================================================================================
# What the tests are made of
# ====================================================================================================

# --- time ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Time:
    """Stands in for the clocks: it moves when told to, and when somebody sleeps."""

    wall: float = 1_800_000_000.0
    boot: float = 5_000.0  # counts the time that the machine was asleep
    asleep: float = 0.0

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds

    def suspend(self, seconds: float) -> None:
        self.advance(seconds)
        self.asleep += seconds

    def step_wall(self, seconds: float) -> None:
        self.wall += seconds

    def set_to_real(self) -> None:
        """Be where the clocks of the real processes are."""
        self.wall, self.boot = REAL_CLOCK(time.CLOCK_REALTIME), REAL_CLOCK(time.CLOCK_BOOTTIME)

    def read(self, clock: int) -> float:
        """`time.clock_gettime`"""
        asleep = self.asleep if clock == time.CLOCK_MONOTONIC else 0
        return self.wall if clock == time.CLOCK_REALTIME else self.boot - asleep


@pytest.fixture
def clock(monkeypatch: Patch) -> Time:
    """Time that stands still unless the test, or a sleep, moves it."""
    fake = Time()
    monkeypatch.setattr(time, "time", lambda: fake.wall)
    monkeypatch.setattr(time, "clock_gettime", fake.read)
    monkeypatch.setattr(time, "sleep", fake.advance)
    monkeypatch.setitem(sys.modules, "ctypes", None)  # without inotify, waiting is sleeping
    return fake


@pytest.fixture
def now(clock: Time) -> Time:
    """The `clock`, set to the real time, so that a queue can be shared with real processes."""
    clock.set_to_real()
    return clock


@pytest.fixture
def no_hang() -> Iterator[None]:
    """Fail instead of blocking for ever."""
    # Neither Exception nor OSError, which somebody may handle.
    before = signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("blocked"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- directories --------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where a queue may be made; nothing is there yet."""
    return tmp_path / "queue"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty directory, in memory where that can be had."""
    with tempfile.TemporaryDirectory(dir=SHM if os.access(SHM, os.W_OK) else None) as path:
        yield Path(path)


@pytest.fixture
def queue(directory: Path) -> FemtoQueue:
    """A queue of node-1 that holds "a" and "b"."""
    queue = FemtoQueue(directory, "node-1")
    queue.push_many([b"a", b"b"])
    return queue


def put(path: Path, data: bytes = b"x") -> Path:
    """Write a file, and make the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def files(directory: Path) -> list[str]:
    """All files below `directory`, relative to it, sorted."""
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir())


def names(directory: Path, state: str) -> list[str]:
    """The names of the task files of a state."""
    return sorted(p.name for p in (directory / state).rglob("*") if not p.is_dir())


def seen(path: Path | bytes, times: bool = True) -> tuple[int, ...]:
    """All that can be seen of a file or directory, a link not followed."""
    info = os.lstat(path)
    change = (info.st_size, info.st_mtime_ns) if times or not stat.S_ISDIR(info.st_mode) else ()
    return (info.st_mode, info.st_ino, info.st_nlink, *change)


def snapshot(directory: Path, times: bool = False) -> dict[bytes, tuple[int, ...]]:
    """All that can be seen below `directory`; `times`: if something came and went there, too."""
    found = {os.fsencode(directory): seen(directory, times)}
    for top, directories, names in os.walk(os.fsencode(directory)):
        for name in directories + names:
            found[os.path.join(top, name)] = seen(os.path.join(top, name), times)
    return found


def drained(queue: FemtoQueue) -> list[bytes]:
    """Pop and finish all there is."""
    return [(task.data, queue.done(task))[0] for task in iter(queue.pop, None)]


def drained_one(queue: FemtoQueue, timeout_s: float = 0) -> bytes:
    """Pop one task and finish it."""
    task = queue.pop(timeout_s)
    assert task
    queue.done(task)
    return task.data


class Original:
    """Writes a directory as version 0.3 and 0.4 of the original femtoqueue do."""

    def __init__(self, directory: Path, *states: str) -> None:
        self.directory = directory
        for state in ("creating", "pending", "done", "failed", *states):
            (directory / state).mkdir(parents=True)

    def add(self, state: str, time_us: int, payload: bytes) -> Path:
        name = f"{time_us}_<built-in method hex of bytes object at 0x7f{zlib.crc32(payload):010x}>"
        head = b"\x01" + bytes(7) + hashlib.md5(payload).digest()
        return put(self.directory / state / name, head + payload)


def where(directory: Path, state: str) -> str:
    """The one file below `state`, relative to it."""
    [name] = files(directory / state)
    return name


# --- processes ----------------------------------------------------------------------------------------


def start(code: str, *arguments: object, under: Iterable[str] = (), **options: Any) -> Process:
    """Start a real Python process, `under` another command, that has imported femtoqueue, and runs `code`."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(
        [*under, sys.executable, "-c", PRELUDE + code, *map(str, arguments)], **options
    )


def run(code: str, *arguments: object, under: Iterable[str] = ()) -> str:
    """Run `code` in a real process to its end and return what it printed."""
    process = start(code, *arguments, under=under)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    return out


def say(process: Process, line: str = "") -> None:
    """Write a line to a process: to what it evaluates, or to let it go on that waits in input()."""
    process.stdin.write(line + "\n")
    process.stdin.flush()


def expect(process: Process, line: str) -> None:
    """Wait for the next line that the process prints, which must be this one."""
    assert process.stdout.readline().rstrip("\n") == line


def tell(process: Process, expression: str) -> str:
    """Have a process that `serve` started evaluate this; return what it prints."""
    say(process, expression)
    return process.stdout.readline().strip()


def ending(process: Process) -> tuple[str, int]:
    """What else the process prints, errors behind the rest, and its exit status."""
    process.stdin.close()
    # Not communicate(): that loses what readline() has read ahead.
    return process.stdout.read() + process.stderr.read(), process.wait()


def ended(process: Process) -> tuple[str, int]:
    """What else the process prints, without errors, and its exit status; it ends by itself."""
    status = process.wait(15)
    return process.stdout.read(), status


def killed(process: Process) -> None:
    """End a process with SIGKILL, and wait for it."""
    process.kill()
    process.wait()


@pytest.fixture
def guard() -> Iterator[Callable[[Process], Process]]:
    """Sees that a process ends with the test, or after 30 s if the test waits in vain."""
    with contextlib.ExitStack() as stack:

        def guard(process: Process) -> Process:
            stack.enter_context(process)
            watchdog = threading.Timer(30, process.kill)
            watchdog.start()
            stack.callback(watchdog.cancel)
            stack.callback(process.kill)
            return process

        yield guard


@pytest.fixture
def spawn(guard: Callable[[Process], Process]) -> Spawn:
    """`start`, guarded."""
    return lambda code, *arguments: guard(start(code, *arguments, stderr=subprocess.PIPE))


def executed(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its status, and all that it printed."""
    options |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run([*map(str, command)], text=True, timeout=300, **options)


def execute(*command: object, succeeds: bool = True, **options: Any) -> str:
    """Run a command, which must succeed, to its end, and return all that it printed."""
    process = executed(*command, **options)
    assert (process.returncode == 0) is succeeds, process.stdout
    return process.stdout


def forked(work: Callable[[], object], report: int = 2) -> int:
    """Do something in a forked child; its status is 0, or `report` gets the traceback."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        os.write(report, traceback.format_exc().encode())
    finally:
        os._exit(1)


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """Do `work` in a forked process to its end; its wait status and, if it raised, the traceback."""
    read_end, write_end = os.pipe()
    pid = forked(work, write_end)
    os.close(write_end)
    with open(read_end) as pipe:
        text = pipe.read()
    return os.waitpid(pid, 0)[1], text


def needs(*command: str) -> pytest.MarkDecorator:
    """Skip where this command does not work: it takes root, a package, or a newer kernel."""
    found = shutil.which(command[0])
    works = found and subprocess.run([found, *command[1:]], capture_output=True).returncode == 0
    return pytest.mark.skipif(not works, reason=f"`{' '.join(command)}` does not work here")


NEW_PIDS = ["unshare", "-pf", "--kill-child", "--mount-proc"]
NEW_PIDS_OLD_PROC = ["unshare", "-pf", "--kill-child"]
NEW_TIME = ["unshare", "-T", "-f", "--kill-child", "--monotonic", "100000", "--boottime", "100000"]
HIDEPID = ["unshare", "-m", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec "$0" "$@"']
NO_BOOT = ["unshare", "-m", "sh", "-c", 'mount -t proc -o subset=pid proc /proc && exec "$0" "$@"']
AS_NOBODY = "\nos.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
needs_pid_namespace = needs(*NEW_PIDS, "true")
needs_proc_subset = needs(*NO_BOOT, "test", "!", "-e", "/proc/sys")
needs_mounts = needs("unshare", "-m", "mount", "--bind", "/dev/null", "/proc/sys/kernel/random/boot_id")


def rebooted(tmp_path: Path) -> list[str]:
    """A command prefix under which the machine seems to have been booted once more."""
    boot_id = put(tmp_path / f"boot-{uuid.uuid4()}", f"{uuid.uuid4()}\n".encode())
    script = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
    return ["unshare", "-m", "sh", "-c", script, str(boot_id)]


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """Where a queue may be made that every user of this machine can reach."""
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        yield Path(top, "queue")


SERVE = """
queue = FemtoQueue(sys.argv[1], sys.argv[2], float(sys.argv[3]))
for line in sys.stdin:
    try:
        print(eval(line), flush=True)
    except NotInProgress:
        print("NotInProgress", flush=True)
"""
TAKE = "(task := queue.pop()) and task.data"


@pytest.fixture
def serve(guard: Callable[[Process], Process]) -> Spawn:
    """Starts a real process that has a queue open, and then evaluates what it is told."""

    def serve(
        directory: Path, node_id: str, under: Iterable[str] = (), lease_ms: int = 30_000, code: str = ""
    ) -> Process:
        options = {"under": under, "stderr": subprocess.PIPE}
        process = guard(start(code + SERVE, directory, node_id, lease_ms, **options))
        assert tell(process, "queue.node_id") == node_id
        return process

    return serve


# --- faults -------------------------------------------------------------------------------------------

HOOKED = (
    *("open", "read", "write", "close", "fsync", "fstat", "lseek", "posix_fadvise", "stat", "lstat"),
    *("rename", "link", "unlink", "mkdir", "rmdir", "scandir"),
)
REAL = {name: getattr(os, name) for name in HOOKED}


class Steps:
    """Counts the filesystem calls of a block; from call `at` on, `meet` stands in for them."""

    def __init__(self, at: int, meet: Callable[..., Any], once: bool = True) -> None:
        self.at, self.meet, self.once = at, meet, once
        self.count, self.met = 0, ""

    def __enter__(self) -> Steps:
        for name in HOOKED:
            setattr(os, name, functools.partial(self._step, name))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, call in REAL.items():
            setattr(os, name, call)

    def _step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count == self.at or (self.count > self.at and not self.once):
            self.met = self.met or name
            return self.meet(name, *args, **kwargs)
        return REAL[name](*args, **kwargs)


class Refusal:
    """Makes calls on some paths fail, as for a user without the rights: root has all of them."""

    def __init__(self, monkeypatch: Patch) -> None:
        self.rules: list[tuple[tuple[str, ...], str, int]] = []
        self.count = 0
        for name in ("rename", "link", "unlink", "open", "scandir"):
            monkeypatch.setattr(os, name, functools.partial(self._call, name, getattr(os, name)))

    def __call__(self, what: str, part: str, code: int) -> None:
        """From now on, to `what` any path with `part` in it fails with `code`."""
        calls = {"move": ("rename", "link", "unlink"), "open": ("open",), "list": ("scandir",)}[what]
        self.rules.append((calls, part, code))

    def _call(self, name: str, real: Callable[..., Any], path: Any, *rest: Any, **options: Any) -> Any:
        for refused, part, code in self.rules:
            if name in refused and part in os.fspath(path):
                self.count += 1
                other = rest[0] if name == "rename" else None
                raise OSError(code, os.strerror(code), path, None, other)
        return real(path, *rest, **options)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refusal:
    return Refusal(monkeypatch)


def synced_path(descriptor: int) -> str:
    """What an fsync of this descriptor is about."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


@pytest.fixture
def unlogged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody keeps what is logged: with its traceback, an error keeps queue objects alive."""
    monkeypatch.setattr(logging.getLogger("femtoqueue"), "disabled", True)


# --- what several parts need ---------------------------------------------------------------------------


def full_house(directory: Path) -> tuple[FemtoQueue, FemtoTask, dict[str, str]]:
    """A queue with one task in each state: the one in progress, and the ids by state."""
    queue = FemtoQueue(directory, "node")
    order = ("corrupt", "done", "failed", "in_progress", "pending")
    ids = {state: queue.push(state.encode()) for state in order}
    ids["scheduled"] = queue.schedule(b"scheduled", LATER_US)
    next((directory / "pending").rglob(ids["corrupt"])).write_bytes(b"broken")
    queue.done(queue.pop())
    queue.fail(queue.pop())
    task = queue.pop()
    assert task and queue.counts() == dict.fromkeys(STATES, 1)
    return queue, task, ids


def in_thread(work: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future[Any]:
    """Begin a call in a thread that keeps nobody from ending."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def call() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def becomes(wanted: object, read: Callable[[], object], seconds: float = 10) -> bool:
    """Wait until `read` returns what is wanted."""
    end = time.monotonic() + seconds
    while not (same := read() == wanted) and time.monotonic() < end:
        time.sleep(0.002)
    return same


def calls_of(work: Callable[[], object], listed: list[str] | None = None) -> list[str]:
    """The names of the filesystem calls that `work` makes, in order; `listed`: gets the directories."""
    names: list[str] = []

    def note(name: str, *args: Any, **kwargs: Any) -> Any:
        names.append(name)
        if name == "scandir" and listed is not None:
            listed.append(args[0])
        return REAL[name](*args, **kwargs)

    with Steps(1, note, once=False):
        work()
    return names


def meanwhile(patch: Patch, at: int, action: Callable[[], object], *more: tuple[Any, str]) -> list[str]:
    """Before filesystem call number `at` of a block, `action` happens; the list tells where it did.
    `more`: other functions whose calls count, too, each as its module and name."""
    met, count = [], itertools.count(1)

    def call(name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not met and next(count) == at:
            met.append(name)
            action()
        return real(*args, **kwargs)

    for module, name in (*((os, name) for name in HOOKED), *more):
        patch.setattr(module, name, functools.partial(call, name, getattr(module, name)))
    return met


class Lines:
    """Counts the lines of femtoqueue.py that this thread comes to; at line `at`, `action` is called."""

    def __init__(self, at: int = 0, action: Callable[[], object] = lambda: None) -> None:
        self.at, self.action, self.count = at, action, 0

    def __enter__(self) -> Lines:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: types.FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != femtoqueue.__file__:
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.action()
        return self._trace


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[Path]]:
    """A directory on the queue's filesystem, and one on another, if there is one."""
    here = tmp_path.stat().st_dev
    others = [p for p in (SHM, Path("/tmp")) if p.is_dir() and p.stat().st_dev != here]
    with tempfile.TemporaryDirectory(dir=[*others, tmp_path][0]) as other:
        yield [tmp_path, Path(other)] if others else [tmp_path]


def never(task: FemtoTask) -> None:
    """A handler that must not be called."""
    pytest.fail(f"{task} was handled")


def counted(q: FemtoQueue) -> dict[str, int]:
    """How many tasks there are, by state."""
    return {state: count for state, count in q.counts().items() if count}


@pytest.fixture(scope="session", autouse=True)
def _as_in_a_terminal() -> None:
    """What a script (`pytest & wait`) ignored or blocked is inherited, over exec too. No core files."""
    if sys.platform != "win32":
        import resource

        for number in (signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD, signal.SIGINT):
            if signal.getsignal(number) is signal.SIG_IGN:
                by_hand = number == signal.SIGINT
                signal.signal(number, signal.default_int_handler if by_hand else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def figure(promise: str, **counts: int) -> None:
    """Add to the figures that are shown when all tests have run."""
    named = {name.replace("_", " "): count for name, count in counts.items()}
    FIGURES.setdefault(promise, collections.Counter()).update(named)


@pytest.fixture(scope="session", autouse=True)
def _show_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for promise, counts in FIGURES.items():
            figures = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            print(f"\n{promise}: {figures}", end="")


# ====================================================================================================
# On disk
# ====================================================================================================


def test_files_and_names(directory: Path, clock: Time) -> None:
    """A task is one file that holds exactly the payload; all else is in its path, and its id stays."""
    queue, other, tasks = FemtoQueue(directory, "node-1"), FemtoQueue(directory, "node-2"), []
    id, crc = queue.push(b'{"a": 1}'), zlib.crc32(b'{"a": 1}')
    assert re.fullmatch(rf"18000000000000\d\d_node-1_[0-9a-f]{{18}}\.{crc:08x}", id)

    def pop(queue: FemtoQueue) -> None:
        tasks.append(queue.pop())
        assert tasks[-1].id == id and Path(tasks[-1].path).read_bytes() == tasks[-1].data

    claim = f"in_progress/node-1~{os.getpid()}~START~PLACE~TOKEN/ID"
    steps: list[tuple[Callable[[], object], str]] = [  # and where the file is then, times in seconds
        (lambda: None, "pending/BUCKET/ID"),
        (lambda: pop(queue), f"{claim}~1~+30"),
        (lambda: clock.advance(10) or queue.touch(tasks[-1]), f"{claim}~1~+30~-10"),
        (lambda: queue.retry(tasks[-1]), "pending/BUCKET/ID~1"),
        (lambda: pop(queue), f"{claim}~2~+30"),
        (lambda: queue.retry(tasks[-1], delay_ms=5_000), "scheduled/BUCKET/ID~2~+5"),
        (lambda: clock.advance(6) or pop(queue), f"{claim}~3~+30"),
        (lambda: clock.advance(31.1) or pop(other), f"{claim.replace('-1', '-2')}~4~+30"),
        (lambda: other.fail(tasks[-1], "größe \udcff"), "failed/ID"),
        (lambda: queue.requeue(id), "pending/BUCKET/ID"),
        (lambda: pop(queue) or queue.done(tasks[-1]), "done/ID"),
    ]
    for call, expected in steps:
        call()
        [name] = [name for name in files(directory) if id in name and not name.endswith("~reason")]
        assert (directory / name).read_bytes() == b'{"a": 1}' and name.startswith(queue.status(id))
        name = re.sub(r"/\d{16}/", "/BUCKET/", name.replace(id, "ID"))
        name = re.sub(r"(~\d+)~\d+~[^/~]+~[^/~]+/", r"\1~START~PLACE~TOKEN/", name)
        assert re.sub(r"~(\d{16})", lambda m: f"~{int(m[1]) / 1e6 - clock.wall:+.0f}", name) == expected
    assert [task.attempt for task in tasks] == [1, 2, 3, 4, 1]
    assert len(files(directory)) == 3  # the clock and the layout's version are the others


def test_schedule(directory: Path, clock: Time) -> None:
    """What is scheduled is due at that time, or the instant of an aware datetime; its file is
    <id>~0~<due_us>. Equal payloads, for one microsecond, of objects with one name are as many tasks."""
    queue, other, due_us = *(FemtoQueue(directory, "same") for _ in "12"), NOW_US + HOUR_US
    zones = [datetime.timezone(datetime.timedelta(hours=hours)) for hours in (9, 5.5, -3)]
    times = [*[due_us] * 200, *(datetime.datetime.fromtimestamp(due_us / 1e6, zone) for zone in zones)]
    ids = {q.schedule(b"later", time) for q in (queue, other) for time in times}
    assert names(directory, "scheduled") == sorted(f"{id}~0~{due_us}" for id in ids)
    assert {int(id[:16]) for id in ids} == {due_us}
    assert NOW_US <= int(queue.schedule(b"now", NOW_US - HOUR_US)[:16]) < NOW_US + 1_000
    for seconds, expected in ((3_599.9, [b"now"]), (0.1, [b"later"] * 406)):
        clock.advance(seconds)
        assert drained(queue) == expected


@pytest.mark.parametrize("state", ["pending", "scheduled"])
def test_buckets(directory: Path, clock: Time, state: str) -> None:
    """All begin in the bucket of the period; after 1,000 tasks of its own a producer opens others."""
    queues, ids = [FemtoQueue(directory, name) for name in "ab"], []
    for number in range(2_002):
        clock.advance(0.0001)
        queue, due_us = queues[number == 1], int(clock.wall * 1e6) + 10**7
        ids.append(queue.push(b"") if state == "pending" else queue.schedule(b"", due_us))
    buckets = {path.name: os.listdir(path) for path in (directory / state).iterdir()}
    assert [len(buckets[bucket]) for bucket in sorted(buckets)] == [1_001, 1_000, 1]
    for bucket, names in buckets.items():
        oldest = min(name[:16] if state == "pending" else name[-16:] for name in names)
        assert oldest == bucket[:16] or oldest > bucket == min(buckets)
    assert list(queue.ids(state)) == ids
    clock.advance(1_000)
    queues[1].push(b"") if state == "pending" else queues[1].schedule(b"", NOW_US + 10**10)
    assert len(os.listdir(directory / state)) == 4, "a new period, a new bucket"


@pytest.mark.parametrize("data", [b"", b"hello\n", b"\x01" + bytes(23) + b"like the original's"])
@pytest.mark.parametrize(
    "rest", ["shell.00000000", "a (copy).txt", "x_01234567890abcdef", "0123456789abcdef01"]
)
def test_shell_push(directory: Path, rest: str, data: bytes) -> None:
    """A file renamed into pending/ as 16 digits, "_" and more is a task, taken as it is."""
    queue, name = FemtoQueue(directory, "a"), f"1700000000000000_{rest}"
    put(directory / "draft", data).rename(directory / "pending" / name)
    assert list(queue.ids("pending")) == [name] and queue.status(name) == "pending"
    assert drained(queue) == [data] and (directory / "done" / name).read_bytes() == data


# --- what else lies about -----------------------------------------------------------------------------

OUR_ID = "{time}_node_0123456789ab{n:06x}"
NAMES = (
    *(OUR_ID + ".01234567" + end for end in ("", "~{n}", "~1~{time}", "~", ".bak")),
    *(OUR_ID + end for end in ("-1.01234567", " (conflicted copy).01234567")),
    OUR_ID + ".sync-conflict-20260101-101010-ABCDEFG.01234567",
    *(
        "{time}_shell-{n}" + end
        for end in ("", "~1", "~x", "~1234567890", "~1~{time}~{time}~{time}", "é")
    ),
    *("Copy of " + OUR_ID, "{time}", "{time}.0123abcd", "{time}.012", "{time}-{n}", "{time}_", "{n}_x"),
    *("１７００００００００００００００_{n}", "{time}_{n:0183}", "{time}_{n}\n", "{time}_\udcff{n}"),
    *("node~1~{n}~elsewhere~x" + end for end in ("", "~{time}", "~")),
    *("clock-0123456789ab.{n}", ".DS_Store-{n}", ".nfs{time}{n}", ".{time}_shell-{n}.swp"),
)
PLACES = (
    *("", "creating", "pending", "pending/{bucket}", "scheduled", "scheduled/{bucket}", "in_progress"),
    *("in_progress/node~999999999~1~place~token", "done", "failed", "corrupt"),
)
KINDS: dict[str, Callable[[Path, Path], object]] = {
    "file": lambda path, outside: path.write_bytes(b"hostile"),
    "directory": lambda path, outside: path.mkdir(),
    "full directory": lambda path, outside: put(path / f"{OLD_ID[:17]}{abs(hash(path))}", b"hostile"),
    "link": lambda path, outside: path.symlink_to(outside / "0000000000000001_file"),
    "directory link": lambda path, outside: path.symlink_to(outside),
    "dangling link": lambda path, outside: path.symlink_to(outside / "none"),
    "FIFO": lambda path, outside: os.mkfifo(path),
    "socket": lambda path, outside: os.mknod(path, stat.S_IFSOCK | 0o600),
}


def is_ours(place: str, name: str, kind: str) -> bool:
    """May the queue move or delete this? Written apart from femtoqueue's own parser."""
    owner, bucket = "[^~]+~[0-9]+~[0-9]+~[^~]+~[^~]+", r"[0-9]{16}(\.[0-9a-f]{8})?"
    if kind in ("directory", "full directory"):  # what is in there is a task, once it has such a name
        pattern = {"pending": bucket, "scheduled": bucket, "in_progress": owner}.get(place, "nothing")
        return re.fullmatch(pattern, name) is not None
    if kind != "file" or place in ("", "in_progress"):
        return False
    if place == "creating":
        return re.fullmatch(owner + "~[^~]*", name) is not None
    found = re.fullmatch("([0-9]{16}_[ -}]{1,182})(~[0-9]{1,9}(~[0-9]{16}){0,2})?", name)
    end = found and re.split("^[0-9]{16}_.*_[0-9a-f]{18}", found[1])[1:]  # of what begins as ours do
    return bool(found) and (not end or re.fullmatch(r"\.[0-9a-f]{8}", end[0]) is not None)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("no_hang")
def test_hostile_directories(directory: Path, tmp_path: Path, clock: Time, seed: int) -> None:
    """Whatever lies about: nothing raises, blocks, is followed, lost, deleted or taken for a task."""
    queue, task, real = full_house(directory)
    outside = put(tmp_path / "outside" / "0000000000000001_file", b"-1\n").parent
    [bucket], chance = os.listdir(directory / "pending"), random.Random(seed)
    clock_file = break_clock(directory)  # as after a boot, where something odd lies in its place
    KINDS[("file", "link", "dangling link", "FIFO")[seed % 4]](clock_file, outside)
    made, ids = {}, set()  # no two files are one task
    for n, (place, pattern, kind) in enumerate(itertools.product(PLACES, NAMES, KINDS)):
        name = pattern.format(time=f"{(1, 1_799_000_000_000_000, 9 * 10**15)[n % 3] + n:016d}", n=n)
        for _ in range(chance.choice((0, 0, 1, 2)) if seed > 1 else 0):  # put in, or leave out
            at, new = chance.randrange(len(name)), chance.choice("~._0 a\n\t\x7f٣\udcff\u2028")
            name = name[:at] + new[: chance.randrange(3)] + name[at + chance.randrange(3) :] or "_"
        path = directory / place.format(bucket=bucket) / name
        id = name.partition("~")[0] if "_" in name else name
        if len(os.fsencode(name)) < 256 and id not in ids and not os.path.lexists(path):
            ids.add(id)
            path.parent.mkdir(exist_ok=True)
            KINDS[kind](path, outside)
            made[path] = (place, name, kind)
    theirs = {path: seen(path, times=False) for path, what in made.items() if not is_ours(*what)}
    ours = {*made} - {*theirs}
    inner = [entry for path in ours if path.is_dir() for entry in path.iterdir()]
    tasks = {path.name.partition("~")[0] for path in [*ours, *inner]}
    queue = task = None  # what it claimed is abandoned
    queue = FemtoQueue(directory, "a", LONG_MS)
    listed = {state: list(queue.ids(state)) for state in STATES}
    assert {*itertools.chain(*listed.values())} <= {*real.values(), *tasks}
    assert queue.counts() == {state: len(found) for state, found in listed.items()}
    for path in chance.sample(list(theirs), 100):
        assert not queue.status(path.name) and not queue.cancel(path.name)
    clock.advance(LATER_US / 1e6 - clock.wall)
    got, nothing = [], 0
    while nothing < 4:
        clock.advance(1.5 if nothing else 0.1)
        nothing += 1
        if task := queue.pop():
            nothing = 0
            assert task.id in real.values() or (task.data == b"hostile" and task.id in tasks)
            got += [task.data] * (task.id in real.values())
            queue.done(task)
    assert sorted(got) == [b"in_progress", b"pending", b"scheduled"]
    assert all(queue.status(real[state]) == state for state in ("done", "failed", "corrupt"))
    clock.advance(3_000)
    assert queue.pop() is None
    for state in ("done", "failed", "corrupt", "scheduled", "pending"):
        queue.purge(state, 0)
    queue.close()
    for path, before in theirs.items():
        assert os.path.lexists(path), f"{made[path]} is gone"
        assert seen(path, times=False) == before, f"{made[path]} was changed"
    assert stat.S_ISREG(clock_file.lstat().st_mode)
    assert [path.read_bytes() for path in outside.iterdir()] == [b"-1\n"]
    figure("hostile directories", directories=1, objects=len(made), foreign=len(theirs))


@pytest.mark.parametrize("what", ["2", "10", "pending", "scheduled", "node-1", "done", "failed"])
def test_a_directory_that_is_not_ours_is_refused_untouched(directory: Path, what: str) -> None:
    """A newer layout, or a directory of the original, is refused with an error that says what to do."""
    if what.isdigit():
        FemtoQueue(directory, "a").push(b"x")
        (directory / "layout").write_text(f"femtoqueue layout {what}\nwhatever\n")
    else:
        Original(directory, *{"scheduled", "node-1"} & {what}).add(what, 1_700_000_000_000_000, b"x")
    before = snapshot(directory, times=True)
    expected = rf"layout {what},.*later version" if what.isdigit() else "README"
    with pytest.raises(FemtoQueueError, match=expected):
        FemtoQueue(directory, "a")
    for command in ("status", "push", "run --until-empty -- true", "purge done 0s"):
        process = executed(sys.executable, MODULE, directory, *command.split())
        assert process.returncode == 1 and re.search(expected, process.stdout)
    assert snapshot(directory, times=True) == before


def test_a_directory_is_first_opened_by_several_at_once(directory: Path, spawn: Spawn) -> None:
    """Processes that open a directory without a version file together all open it."""
    put(directory / "pending" / "1700000000000000_shell")
    code = "print('go', flush=True); input(); q = FemtoQueue(sys.argv[1], 'a'); print(q.push(b'x')[16])"
    processes = [spawn(code, directory) for _ in range(4)]
    for act in (lambda process: expect(process, "go"), say):
        [*map(act, processes)]
    assert [ending(process) for process in processes] == [("_\n", 0)] * 4
    assert len(drained(FemtoQueue(directory, "a"))) == 5
    assert (directory / "layout").read_text().startswith("femtoqueue layout 1\n"), "it has one now"


# --- what vanishes ------------------------------------------------------------------------------------

# call: which state's task it is about; its result with that task, and without
CALLS: dict[str, tuple[str, object, object]] = {
    "q.status(q.push(b'x'))": ("", "pending", None),
    "len(q.push_many([b'x', b'y']))": ("", 2, None),
    "q.status(q.push_file(__file__))": ("", "pending", None),
    "q.status(q.schedule(b'x', LATER_US))": ("", "scheduled", None),
    "getattr(q.pop(), 'data', None)": ("pending", b"pending", None),
    "q.run(str, until_empty=True)": ("pending", 1, 0),
    "q.done(task) or q.status(task.id)": ("in_progress", "done", NotInProgress),
    "q.fail(task) or q.status(task.id)": ("in_progress", "failed", NotInProgress),
    "q.retry(task) or q.status(task.id)": ("in_progress", "pending", NotInProgress),
    "q.touch(task) or q.status(task.id)": ("in_progress", "in_progress", NotInProgress),
    "q.join(0)": ("", False, None),
    "q.close()": ("", None, None),
    **{f"q.status(ids[{s!r}])": (s, s, None) for s in STATES},
    **{f"len([*q.ids({s!r})])": (s, 1, 0) for s in STATES},
    **{f"q.counts()[{s!r}]": (s, 1, 0) for s in STATES},
    **{f"q.requeue(ids[{s!r}])": (s, True, False) for s in ("failed", "scheduled")},
    **{f"q.cancel(ids[{s!r}])": (s, True, False) for s in ("pending", "scheduled")},
    **{f"q.purge({s!r}, 0)": (s, 1, 0) for s in STATES if s != "in_progress"},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("gone", ["creating", *STATES, "pending/*", "scheduled/*", "in_progress/*"])
def test_a_directory_that_vanishes_is_made_again(directory: Path, gone: str, call: str) -> None:
    """The next call that needs a vanished directory makes it again, and looks take it for empty."""
    queue, task, ids = full_house(directory)
    for path in directory.glob(gone):
        shutil.rmtree(path)
    about, there, missing = CALLS[call]
    expected = missing if about == gone.partition("/")[0] else there
    try:
        assert eval(call, globals(), {"q": queue, "task": task, "ids": ids}) == expected
    except NotInProgress:
        assert expected is NotInProgress
    queue = FemtoQueue(directory, "node") if "close" in call else queue
    queue.push(b"after")
    assert drained(queue)[-1] == b"after", "the queue goes on"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["renamed", "unmounted", "with a stray pending/"])
def test_a_data_dir_that_is_gone_is_an_os_error(directory: Path, how: str, call: str) -> None:
    """Gone, or there without the version file: OSError, nothing made, no claim finished or lost."""
    queue, task, ids = full_house(directory)
    away = directory.rename(directory.with_name("away"))
    if how == "unmounted":
        directory.mkdir()
    elif how != "renamed":  # a script's `mkdir -p` in the empty mount point
        put(directory / "pending" / "1700000000000000_shell")
    before = snapshot(directory.parent, times=True)
    for _ in range(2):
        with pytest.raises(OSError, match=re.escape(str(directory))):
            eval(call, globals(), {"q": queue, "task": task, "ids": ids})
    assert snapshot(directory.parent, times=True) == before and not task.lost
    shutil.rmtree(directory, ignore_errors=True)
    away.rename(directory)
    assert eval(call, globals(), {"q": queue, "task": task, "ids": ids}) == CALLS[call][1], "made again"


# ====================================================================================================
# The queue clock
# ====================================================================================================


@pytest.mark.parametrize("under", [[], pytest.param(NEW_TIME, marks=needs(*NEW_TIME, "true"))])
def test_the_clock_is_shared(directory: Path, under: list[str]) -> None:
    """Processes of one boot push in one order, however wrong their clocks, in time namespaces too."""
    queue, code = FemtoQueue(directory, "a"), "FemtoQueue(sys.argv[1], 'b').push(sys.argv[2].encode())"
    code = code if under else "time.time = lambda: 978_307_200.0\n" + code
    for number in range(0, 4, 2):
        queue.push(b"%d" % number)
        run(code, directory, number + 1, under=under)
    assert drained(queue) == [b"0", b"1", b"2", b"3"]


@pytest.mark.parametrize("days", [-1, 1])
def test_the_clock_is_chosen_once(directory: Path, serve: Spawn, monkeypatch: Patch, days: int) -> None:
    """All share the clock that the first process chose, also who was about to choose another one."""
    code = f"time.time = lambda real=time.time: real() + 86_400 * {days}\n"
    other, queue, quicker = serve(directory, "a", code=code), FemtoQueue(directory, "b"), []

    def publish(source: str, target: str) -> None:
        if "/clock-" in target and not quicker:
            quicker.append(tell(other, "queue.push(b'0')"))
        REAL["link"](source, target)

    monkeypatch.setattr(os, "link", publish)
    for number in (b"1", b"2", b"3", b"4"):
        tell(other, f"queue.push({number})") if number in b"24" else queue.push(number)
    assert quicker and drained(FemtoQueue(directory, "c")) == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("wall_s", [1_326_511_294.0, 3_600_000_000.0])
@pytest.mark.usefixtures("no_hang")
def test_frozen_time_stays_out_of_stamps_and_timeouts(directory: Path, wall_s: float) -> None:
    """Frozen time makes scheduled tasks due, is no part of the queue clock, and stops no timeout."""
    queue, begun_s = FemtoQueue(directory, "a"), REAL_CLOCK(time.CLOCK_BOOTTIME)
    queue.schedule(b"due", 3_500_000_000_000_000)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("time", "monotonic", "perf_counter"):  # as freezegun's freeze_time does
            patch.setattr(time, name, lambda: wall_s)
            patch.setattr(time, f"{name}_ns", lambda: int(wall_s * 1e9))
        id = queue.push(b"x")
        assert drained(queue) == [b"x", *[b"due"] * (wall_s > 3.5e9)]
        queue.schedule(b"later", LATER_US)
        assert queue.pop(timeout=0.3) is None and queue.join(timeout=0.3) is False
        assert 0.6 <= REAL_CLOCK(time.CLOCK_BOOTTIME) - begun_s < 9
    assert id < queue.push(b"y") and abs(int(id[:16]) / 1e6 - time.time()) < 60


@needs_mounts
@pytest.mark.parametrize(("elsewhere", "step_s"), [(True, 5), (True, -5), (True, 0.5), (False, 5)])
def test_clocks_that_disagree_are_logged(
    now: Time, queue: FemtoQueue, serve: Spawn, caplog: Any, elsewhere: bool, step_s: float
) -> None:
    """Where other machines take part, a queue clock more than a second off the wall clock is logged."""
    other = serve(queue.data_dir, "b", rebooted(Path(queue.data_dir).parent) if elsewhere else [])
    assert tell(other, TAKE) == "b'a'"
    now.step_wall(step_s)
    now.advance(2)
    assert drained(queue) == [b"b"] and ("clock" in caplog.text) is (elsewhere and abs(step_s) > 1)


@needs_mounts
@pytest.mark.parametrize("ahead_s", [0, 86_399.5])
@pytest.mark.parametrize("newest", ["pending", "in_progress"])
def test_order_survives_a_reboot(directory: Path, tmp_path: Path, newest: str, ahead_s: float) -> None:
    """After a reboot order continues, though the wall clock restarts in the past: the offset is chosen
    at the first stamp, above all that is queued then."""
    begin = "time.time = lambda real=time.time: real() + {}\n"
    begin += "queue, other = (FemtoQueue(sys.argv[1], 'node-1') for _ in '12')\n"
    pop = "queue.pop(), " * (newest == "in_progress")
    run(f"{begin.format(86_400)}queue.push(b'1'), {pop}os._exit(0)", directory)
    code = """
real, booted = time.clock_gettime, time.clock_gettime(time.CLOCK_BOOTTIME)
time.clock_gettime = lambda clock: real(clock) - booted
queue.push(b"2"), other.push(b"3"), queue.push(b"4")
print(*[task.data.decode() for task in iter(queue.pop, None)])
"""
    assert run(begin.format(ahead_s) + code, directory, under=rebooted(tmp_path)) == "1 2 3 4\n"


@needs_mounts
@pytest.mark.parametrize(("days", "lease_s"), [(0, 30), (3_000, 3_600)])
def test_leases_survive_a_reboot(directory: Path, tmp_path: Path, days: int, lease_s: int) -> None:
    """After a reboot, with the wall clock behind, another node's claim comes back one lease later."""
    put(directory / "pending" / "1700000000000000_shell")
    claim = f"queue = FemtoQueue(sys.argv[1], 'node-2', {lease_s * 1_000}); queue.pop(); os._exit(0)"
    run(claim, directory, under=rebooted(tmp_path))
    code = f"""
real_time, real_gettime = time.time, time.clock_gettime
booted_s = time.clock_gettime(time.CLOCK_BOOTTIME)
passed_s = 0
time.time = lambda: real_time() - 86_400 * {days} + passed_s
time.clock_gettime = lambda clock: real_gettime(clock) - booted_s + passed_s
queue = FemtoQueue(sys.argv[1], "node-1")  # whose own lease is 30 s
for passed_s in (0, 15, {lease_s} - 5, {lease_s} + 5):
    task = queue.pop()
    print(task and task.attempt)
"""
    out = run(code, directory, under=rebooted(tmp_path))
    assert out.split() == ["None", "None", "None", "2"]


def break_clock(directory: Path) -> Path:
    """Delete the clock's file; return where it was."""
    [path] = directory.glob("clock-*")
    path.unlink()
    return path


# --- what gets its place later ------------------------------------------------------------------------


@pytest.mark.parametrize("ahead_s", [0.5, 8 * 3_600, 8_000_000_000])
@pytest.mark.parametrize("bucket", [".", str(NOW_US), "own"])
def test_a_stamp_ahead_is_not_passed_by(
    directory: Path, clock: Time, ahead_s: float, bucket: str
) -> None:
    """A file put there by hand with a stamp ahead gets a place all the same, and drags no clock along."""
    queue, stamp_us, found = FemtoQueue(directory, "a"), NOW_US + int(ahead_s * 1e6), []
    if ahead_s < 1e9:  # else the clock is chosen beside it
        queue.cancel(queue.push(b"before"))
    put(directory / "pending" / bucket.replace("own", str(stamp_us)) / f"{stamp_us}_shell", b"by hand")
    queue.push_many([b"newer"] * 50)
    while b"by hand" not in found:
        assert int(queue.push(b"newer")[:16]) < NOW_US + 10**7
        clock.advance(0.1)
        found.append(drained_one(queue))
        assert len(found) <= 80, "not within a look or two"


@pytest.mark.parametrize("kind", ["due", "abandoned"])
def test_many_at_once_and_a_stream_starve_nobody(scratch: Path, clock: Time, kind: str) -> None:
    """While there is more to move the next look comes at once, not a second later; what is due comes
    earliest first of all, whichever bucket it lies in."""
    queue, hung = (FemtoQueue(scratch / "queue", name, 10_000) for name in "ab")
    many, new, found = [b"%d" % n for n in range(2_100)], [b"new %d" % n for n in range(4_300)], []
    if kind == "due":
        for number, payload in enumerate(many):
            bucket, due_us = scratch / f"queue/scheduled/{NOW_US - number % 3}", NOW_US + number
            put(bucket / f"{due_us}_x~0~{due_us}", payload)
    else:
        hung.push_many(many)
        assert all(hung.pop() for _ in many)
    clock.advance(11)
    for payload in new:
        queue.push(payload)
        clock.advance(0.000_1)  # ten thousand tasks a second
        found.append(drained_one(queue))
    assert [payload for payload in found if payload in {*many}] == many
    assert [payload for payload in found if payload in {*new}] == new[:2_200]


# ====================================================================================================
# Who is alive
# ====================================================================================================


@pytest.mark.parametrize("end", ["dropped", "closed", "closed, and of another copy of the file"])
def test_dropped_object(directory: Path, queue: FemtoQueue, end: str) -> None:
    """An object is alive until it is closed or dropped; then its tasks come back at the next pop."""
    vendored = types.ModuleType("vendored")
    exec(MODULE.read_text(), vars(vendored))
    other = (vendored if "copy" in end else femtoqueue).FemtoQueue(directory, "node-1")
    assert in_thread(other.pop).result(10)  # the end of a thread proves nothing
    assert drained(queue) == [b"b"] and FemtoQueue(directory, "node-1").pop() is None
    assert vendored.FemtoQueue(directory, "node-1").pop() is None
    queue.push(b"c")
    if "closed" in end:
        other.close()
    del other
    assert drained(queue) == [b"a", b"c"], "at its old place"


# --- same boot and PID namespace ----------------------------------------------------------------------


@pytest.mark.parametrize("node_id", ["node-1", "node-2"])
@pytest.mark.parametrize("who", ["a new object", "one that works", "one that waits", "its parent"])
def test_killed(queue: FemtoQueue, serve: Spawn, now: Time, node_id: str, who: str) -> None:
    """A killed worker's task comes back at the first pop of a new object, to others within 1 s; so it
    does while the worker is a zombie, for which nobody has waited yet."""
    worker = serve(directory := Path(queue.data_dir), node_id)
    assert tell(worker, TAKE) == "b'a'"
    now.set_to_real()
    assert drained(queue) == [b"b"]
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | (0 if who != "its parent" else os.WNOWAIT))
    if who == "one that works":
        found = []
        while b"a" not in found and len(found) < 11:
            queue.push(b"more")
            found.append(drained_one(queue))
            now.advance(0.1)
        assert found[-1] == b"a"
    elif who == "one that waits":
        assert drained_one(queue, 1.01) == b"a"
    else:
        queue.push(b"c")
        assert drained(FemtoQueue(directory, "node-3")) == [b"a", b"c"]
    now.advance(1.1)
    drained(queue)
    assert f"~{worker.pid}~" not in " ".join(os.listdir(directory / "in_progress")), "nothing is left"


SYS_EXIT = {"x86_64": 60, "aarch64": 93}.get(platform.machine())


@pytest.mark.skipif(SYS_EXIT is None, reason="the number of the exit system call is not known here")
def test_zombie_leader(directory: Path, queue: FemtoQueue, spawn: Spawn) -> None:
    """A worker whose main thread has ended is alive while another thread of it works."""
    code = f"""
import ctypes, threading
queue = FemtoQueue(sys.argv[1], "node-2")
task = queue.pop()
def work():
    print("claimed", flush=True)
    sys.stdin.readline()
    queue.done(task)
    os._exit(0)
threading.Thread(target=work).start()
ctypes.CDLL(None).syscall({SYS_EXIT}, 0)
"""
    worker = spawn(code, directory)
    expect(worker, "claimed")
    process_stat = Path(f"/proc/{worker.pid}/stat")
    assert becomes("Z", lambda: process_stat.read_text().rpartition(")")[2].split()[0])
    assert drained(FemtoQueue(directory, "node-3")) == [b"b"]
    say(worker)
    assert ending(worker)[1] == 0
    assert queue.counts()["done"] == 2


@needs_pid_namespace
@pytest.mark.parametrize("under", [NEW_PIDS, NEW_PIDS_OLD_PROC], ids=["PID reused", "foreign /proc"])
def test_a_process_is_told_from_others(directory: Path, queue: FemtoQueue, under: list[str]) -> None:
    """A PID that was given to another process does not keep the dead one's tasks. Where /proc shows
    another PID namespace, a live worker is not robbed, and a dead one is seen."""
    code = """
import signal
def claim():
    FemtoQueue(sys.argv[1], "node-2").pop()
    os.write(pipe[1], b"claimed")
    signal.pause()
pipe = os.pipe()
worker = os.fork() or claim()
os.read(pipe[0], 7)
print(FemtoQueue(sys.argv[1], "node-3").pop().data)
os.kill(worker, signal.SIGKILL)
os.waitpid(worker, 0)
if os.readlink("/proc/self") == str(os.getpid()):
    time.sleep(0.03)  # start times are in hundredths of a second
    open("/proc/sys/kernel/ns_last_pid", "w").write(str(worker - 1))
    assert (os.fork() or signal.pause()) == worker
print(FemtoQueue(sys.argv[1], "node-4").pop().data)
"""
    assert run(code, directory, under=under) == "b'b'\nb'a'\n"


@needs(*HIDEPID, "true")
def test_hidepid(open_to_all: Path, serve: Spawn) -> None:
    """A /proc that cannot be read proves nothing: another user's live worker is not robbed."""
    FemtoQueue(open_to_all, "node-1").push_many([b"a", b"b"])
    worker = serve(open_to_all, "node-2")
    assert tell(worker, TAKE) == "b'a'"
    for path in [open_to_all, *open_to_all.rglob("*")]:
        path.chmod(0o777)
    code = """
assert not os.path.exists(f"/proc/{sys.argv[2]}")
queue = FemtoQueue(sys.argv[1], "node-3")
print(*[task.data for task in iter(queue.pop, None)])
"""
    for expected in ("b'b'\n", "b'a' b'b'\n"):
        assert run(AS_NOBODY + code, open_to_all, worker.pid, under=HIDEPID) == expected
        killed(worker)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")
def test_no_false_identity(queue: FemtoQueue) -> None:
    """A process that cannot find out who it is gets OSError; when it can, it is who it is."""
    mine = Path(queue.pop().path).parent.name.split("~")

    def broken(path: str, real: Callable[..., Any], asked: Any, *rest: Any) -> Any:
        if asked == path:
            raise OSError(errno.EMFILE, "broken", path)
        return real(asked, *rest)

    def work() -> None:  # which asks anew
        for name in ("self/stat", "sys/kernel/random/boot_id", "self", "self/ns/time", "self/ns/pid"):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=f"/proc/{name}"):
                for module, call in ((builtins, "open"), (os, "readlink")):
                    real = getattr(module, call)
                    patch.setattr(module, call, functools.partial(broken, f"/proc/{name}", real))
                queue.pop()
        child = Path(queue.pop().path).parent.name.split("~")
        assert child[3] == mine[3] and child[2] > "0"

    assert in_child(work) == (0, "")


# --- elsewhere ----------------------------------------------------------------------------------------


@needs_pid_namespace
def test_two_containers_of_one_name(directory: Path, queue: FemtoQueue, serve: Spawn) -> None:
    """My node_id elsewhere is dead as far as it claimed before I opened; later its lease decides."""
    old = serve(directory, "web", NEW_PIDS)
    assert tell(old, TAKE) == "b'a'"
    new = serve(directory, "web", NEW_PIDS)
    assert tell(new, TAKE) == "b'a'", "it was claimed before"
    assert tell(old, "queue.done(task)") == "NotInProgress"
    assert tell(old, TAKE) == "b'b'"
    for container in (new, old, new):
        assert tell(container, "queue.pop(1.1)") == "None"
    assert tell(old, "queue.done(task)") == tell(new, "queue.touch(task) or queue.done(task)") == "None"
    places = [tell(container, "os.readlink('/proc/self/ns/pid')[5:-1]") for container in (old, new)]
    log = ending(new)[0]
    assert all(word in log for word in ("web", *places)), "a warning names both places"


@needs_pid_namespace
@needs_proc_subset
@pytest.mark.parametrize("node_id", ["web", "other"])
@pytest.mark.parametrize(("under", "judged_under"), [(NEW_PIDS, []), (NO_BOOT, []), (NO_BOOT, NO_BOOT)])
def test_elsewhere_the_lease_decides(
    directory: Path, queue: FemtoQueue, serve: Spawn, under: Any, judged_under: Any, node_id: str
) -> None:
    """Of who is elsewhere nothing is known, nor of my node_id after I opened, nor where the boot cannot
    be told (ProcSubset=pid): a task comes back by its lease, not before, and not later."""
    worker = serve(directory, node_id, under, 2_500)
    judge = serve(directory, "web", judged_under, 60_000)
    assert tell(worker, TAKE) == "b'a'" and tell(judge, TAKE) == "b'b'"
    assert tell(judge, "queue.pop(1.1)") == tell(worker, "queue.pop()") == "None"
    assert tell(worker, "queue.touch(task)") == "None"
    killed(worker)
    fresh = node_id if under is NO_BOOT else "third"
    assert tell(judge, f"FemtoQueue(sys.argv[1], {fresh!r}).pop()") == "None"
    assert tell(judge, "(back := queue.pop(10)) and (back.data, back.attempt)") == "(b'a', 2)"


@needs_proc_subset
def test_where_the_boot_cannot_be_told_the_clock_never_goes_backwards(directory: Path) -> None:
    """There the queue clock is the wall clock, made never to go backwards, and order is kept."""
    code = """
queues, real = [FemtoQueue(sys.argv[1], node_id) for node_id in "ba"], time.time
for number, step_s in enumerate((0, -3600, 3600, 0)):
    time.time = lambda: real() + step_s
    queues[number % 2].push(b"%d" % number)
print(*[task.data.decode() for task in iter(queues[0].pop, None)])
"""
    assert run(code, directory, under=NO_BOOT) == "0 1 2 3\n"


def test_empty_directories_of_owners_elsewhere(directory: Path, clock: Time) -> None:
    """An owner that cannot be judged leaves an empty directory: it goes when it is older than a day."""
    queue, owner = FemtoQueue(directory, "a"), directory / "in_progress" / DEAD_OWNER
    for age_s, stays in ((80_000, True), (86_500, False)):
        owner.mkdir(exist_ok=True, parents=True)
        os.utime(owner, (clock.wall - age_s, clock.wall - age_s))
        clock.advance(100)
        assert queue.pop() is None and owner.exists() is stays


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize(("lease_s", "others_s"), [(10, 30), (60, 1)])
def test_live_owner_within_its_lease(
    directory: Path, clock: Time, lease_s: int, others_s: int, asleep: bool
) -> None:
    """No task is taken within the lease of who claimed it, asleep or not; 1 s later at most it is."""
    owner, other = (FemtoQueue(directory, "a", s * 1_000) for s in (lease_s, others_s))
    owner.push(b"old")
    clock.advance(86_400)
    task, passed_s, found = owner.pop(), 0.0, b""
    while found != b"old":
        (clock.suspend if asleep else clock.advance)(0.25)
        passed_s += 0.25
        assert task.lost is (passed_s > lease_s)
        other.push(b"new")  # there is always other work
        found = drained_one(other)
    assert lease_s < passed_s <= lease_s + 1
    with pytest.raises(NotInProgress):
        owner.done(task)


# ====================================================================================================
# The API, in the order of its table
# ====================================================================================================

NAN = float("nan")
BAD_ARGUMENTS: dict[tuple[str, type[Exception]], tuple[object, ...]] = {
    ("data_dir", TypeError): (5, None, b"bytes"),
    ("data_dir", ValueError): ("", "a\0b"),
    ("data_dir", OSError): (
        "femtoqueue",
        "femtoqueue/x",
        __file__,
        f"{__file__}/x",
        "/proc/femtoqueue",
    ),
    ("node_id", TypeError): (5, None, b"bytes"),
    ("node_id", ValueError): ("a" * 65, *"|a/b|a~b|a\n|\0|\x7f|\udc80|ü|日|e\u0301|\u00a0".split("|")),
    ("timeout_stale_ms", TypeError): ("5", None, True, b""),
    ("timeout_stale_ms", ValueError): (0, -1, 0.0, NAN, float("inf")),
    ("max_attempts", TypeError): ("5", 1.5, True),
    ("max_attempts", ValueError): (0, -1, 10**9),
    ("maxsize", TypeError): ("5", 1.5, None, True),
    ("maxsize", ValueError): (-1,),
    ("sync_after_write", TypeError): ("no", "", None, 1.0, []),
    ("keep_done", TypeError): ("false", None, b""),
    ("keep_failed", TypeError): ("0", None, ()),
}


@pytest.mark.parametrize(("argument", "error"), BAD_ARGUMENTS)
def test_bad_constructions(directory: Path, monkeypatch: Patch, argument: str, error: Any) -> None:
    """A bad argument, such as a node_id that is not printable ASCII, gets its error at the call, which
    names it, before anything is written. Where there can be no directory, it is OSError."""
    monkeypatch.chdir(directory.parent)
    Path("femtoqueue").symlink_to("nowhere")
    for value in BAD_ARGUMENTS[argument, error]:
        with pytest.raises(error, match="femtoqueue" if error is OSError else argument):
            FemtoQueue(**{"data_dir": directory, "node_id": "a", argument: value})
        assert not directory.exists(), repr(value)


# --- push, push_many, push_file -----------------------------------------------------------------------


@durable_or_not
def test_push_takes_bytes_likes(directory: Path, clock: Time, durable: bool) -> None:
    """Payloads are bytes-like, push_many takes any iterable of them; data_dir is a str or a path."""
    q = FemtoQueue(str(directory / "deep" / "er"), "a", sync_after_write=durable)
    items = [b"x", bytearray(b"x"), memoryview(b"-x-")[1:2], b"", *(b"%d" % n for n in range(250))]
    ids = [*q.push_many(iter(items)), *map(q.push, items), *q.push_many([])]
    assert ids == sorted(set(ids)) == list(q.ids("pending"))
    for item in items[:3]:
        q.schedule(item, NOW_US)
    assert drained(FemtoQueue(directory / "deep" / "er", "b")) == [*map(bytes, items * 2), *[b"x"] * 3]


@pytest.mark.parametrize("fails", ["an item", "a durable item", "the iterable", "a durable disk"])
def test_push_many_that_fails_pushed_a_prefix(directory: Path, monkeypatch: Patch, fails: str) -> None:
    """On an error, what was pushed is a prefix, and so is what can be seen of it while it is withdrawn."""
    q, items = FemtoQueue(directory, "node", sync_after_write="durable" in fails), [b"0", b"1", b"2"]
    assert q.cancel(q.push(b"first"))  # the clock and the bucket are there
    seen = []

    def unlink(path: str) -> None:
        seen.append([p.read_bytes() for p in sorted(directory.glob("pending/*/*"))])
        REAL["unlink"](path)

    monkeypatch.setattr(os, "unlink", unlink)
    if "disk" in fails:  # once all are there
        monkeypatch.setattr(os, "fsync", lambda descriptor: names(directory, "creating") or 1 / 0)
    extra = () if "disk" in fails else ("" if "iterable" in fails else "text",)
    with pytest.raises((TypeError, ZeroDivisionError)):
        q.push_many(item or 1 / 0 for item in (*items, *extra))
    for pushed in (*seen, drained(FemtoQueue(directory, "b"))):
        assert pushed == items[: len(pushed)]
    assert names(directory, "creating") == [] and (items in seen or "disk" not in fails)


@durable_or_not
def test_maxsize_is_exact_for_one_producer(directory: Path, refuse: Refusal, durable: bool) -> None:
    """Every push raises queue.Full when maxsize tasks are pending, not before; what pop could not read,
    and put back, makes no room."""
    q = FemtoQueue(directory, "node", maxsize=5, sync_after_write=durable)
    file = put(directory / "file")
    with pytest.raises(Full):
        q.push_many(b"%d" % n for n in range(20))
    pushed = drained(q)
    assert pushed == [b"%d" % n for n in range(5)][: len(pushed)]
    assert len(q.push_many([b"x"] * 4)) == 4 and q.push(b"x")
    refuse("open", "/in_progress/", errno.EIO)
    for call in ("push(b'x')", "push_many([b'x'])", "push_file(file)", "push_file(file, move=True)"):
        with pytest.raises(Full, match="5 tasks are pending"):
            eval(f"q.{call}")
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            q.pop()
    assert file.exists() and names(directory, "creating") == []


@pytest.mark.parametrize("how", ["due", "retried", "requeued", "abandoned"])
def test_maxsize_counts_what_returns(directory: Path, clock: Time, refuse: Refusal, how: str) -> None:
    """What falls due or comes back takes up room; a bucket that another user hides is no obstacle."""
    q, other = FemtoQueue(directory, "node", maxsize=10), FemtoQueue(directory, "other", 1_000)
    ids = [q.schedule(b"later", NOW_US) if how == "due" else other.push(b"earlier") for _ in range(12)]
    claims = [other.pop() for _ in ids if how != "due"]
    for claim in claims if how == "requeued" else ():
        other.fail(claim)
    put(directory / "pending" / "1700000000000000" / "1700000000000000_x")
    refuse("list", "1700000000000000", errno.EACCES)
    q.push(b"x")  # from here on, it has room for some, and need not count
    for id, claim in zip(ids, claims, strict=False):
        q.requeue(id) if how == "requeued" else how == "retried" and q.retry(claim)
    clock.advance(2.2)
    assert q.pop()
    for pending in (12, 10):
        with pytest.raises(Full):
            q.push_many([b"y"] * 12)
        assert q.counts()["pending"] == pending and q.pop() and q.pop() and q.pop()


@durable_or_not
@pytest.mark.parametrize("how", ["copy", "move", "open file"])
def test_push_file(directory: Path, places: Any, monkeypatch: Patch, durable: bool, how: str) -> None:
    """push_file makes a file's content a task, from any filesystem; moved, the file is gone for good."""
    q, synced = FemtoQueue(directory, "node", sync_after_write=durable), []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(synced_path(number)))
    for place, content in itertools.product(places, (b"", b"x" * 3_000_000)):
        source = put(place / "file", content)
        inode = source.stat().st_ino
        with source.open("rb") if how == "open file" else contextlib.nullcontext(source) as file:
            id = q.push_file(file, move=how == "move")
        assert source.exists() is (how != "move")
        assert (str(place) in synced) is (durable and how == "move")
        task = q.pop()
        assert (task.id, task.data) == (id, content)
        assert (os.stat(task.path).st_ino == inode) is (how == "move" and place == places[0])
        q.done(task)
    assert names(directory, "creating") == []


@pytest.mark.parametrize("move", [False, True], ids=["copy", "move"])
def test_push_file_refuses_what_is_no_file(directory: Path, tmp_path: Path, move: bool) -> None:
    """What is no file raises, a FIFO at once, and a link that is to be moved; nothing is changed."""
    q = FemtoQueue(directory, "node")
    assert q.cancel(q.push(b"first"))
    os.mkfifo(tmp_path / "fifo")
    put(tmp_path / "dir" / "file")
    (tmp_path / "to-fifo").symlink_to("fifo")
    (tmp_path / "to-file").symlink_to("dir/file")
    before = snapshot(tmp_path)
    for name in ("fifo", "dir", "to-fifo", "/dev/null", "missing", *["to-file"][:move]):
        with pytest.raises(FileNotFoundError if name == "missing" else ValueError, match=name):
            q.push_file(tmp_path / name, move=move)
        assert snapshot(tmp_path) == before
    assert move or q.status(q.push_file(tmp_path / "to-file")) == "pending"


# --- pop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [["rename"], ["rename", "scandir"], ["open"]], ids=" and ".join)
def test_a_fault_in_a_claim_costs_a_turn_at_most(
    directory: Path, clock: Time, fails: list[str]
) -> None:
    """The task comes next, at the same attempt, and what pop returned instead is not taken back."""
    queue, left = FemtoQueue(directory, "a"), [*fails]
    queue.push_many([b"1", b"2"])

    def fail_once(name: str, *args: Any, **options: Any) -> Any:
        if left and name == left[0] and "/in_progress/a~" in args[name == "rename"]:
            raise OSError(errno.EIO, left.pop(0), args[0])
        return REAL[name](*args, **options)

    with Steps(1, fail_once, once=False):
        task = queue.pop()
        clock.advance(1.1)
        assert [task.data, queue.pop().data, queue.pop(), *left] == [b"2", b"1", None]
    queue.done(task)


def test_a_lease_begins_with_its_claim(directory: Path, clock: Time, monkeypatch: Patch) -> None:
    """However long what a pop has to do before takes, its claim has a full lease."""
    q = FemtoQueue(directory, "node", timeout_stale_ms=1_000)
    for id in q.push_many([b"x"] * 3):
        next(directory.glob(f"pending/*/{id}")).write_bytes(b"rot")
    q.schedule(b"due", NOW_US + 1_000_000)
    clock.advance(2)
    left_s: list[float] = []

    def rename(source: str, target: str) -> None:
        if "/in_progress/" in target:
            left_s.append(int(Path(target).name.split("~")[2]) / 1e6 - clock.wall)
        clock.advance(0.4)
        REAL["rename"](source, target)

    monkeypatch.setattr(os, "rename", rename)
    assert q.pop().data == b"due" and len(left_s) >= 4 and min(left_s) > 0.99


def test_never_none_after_lost_races(directory: Path, queue: FemtoQueue, monkeypatch: Patch) -> None:
    """pop never returns None for what a worker skips because others were quicker to claim."""
    queue.push(b"c")
    rival = FemtoQueue(directory, "node-2")
    put(directory / "in_progress" / DEAD_OWNER / "company")  # alone, nobody skips
    lost: list[bytes] = []

    def rename_too_late(source: str, target: str) -> None:
        if len(lost) < 2 and "/in_progress/node-1~" in target:
            lost.append(rival.pop().data)
        REAL["rename"](source, target)

    monkeypatch.setattr(os, "rename", rename_too_late)
    assert queue.pop().data == b"c" and lost == [b"a", b"b"]


@pytest.mark.parametrize("does", ["raises", "pops"])
def test_a_signal_handler_at_any_line_of_pop(scratch: Path, does: str) -> None:
    """Whatever it does, the same object delivers each task once, and at once."""
    act = {"raises": lambda q: 1 / 0, "pops": FemtoQueue.pop}[does]
    kept = []  # no line of an end that comes late is counted
    for at in itertools.count(1):
        top, found = scratch / str(at), []
        kept.append(q := FemtoQueue(top, "node"))
        for number in range(4):  # of two producers
            put(top / f"pending/{10**15 + number % 2}.0000000{number % 2}/{10**15 + number}_x")
        with contextlib.suppress(ZeroDivisionError), Lines(at, lambda: found.append(act(q))) as lines:  # noqa: B023
            while task := q.pop():
                found.append(task)
        if lines.count < at:
            break
        ids = [task.id for task in (*found, *iter(q.pop, None)) if task and not q.done(task)]
        assert (at, sorted(ids)) == (at, [f"{10**15 + number}_x" for number in range(4)])
        assert (at, names(top, "in_progress")) == (at, [])
    assert at > 50


# --- done, fail, retry, touch -------------------------------------------------------------------------

VERDICTS = {
    "done": lambda q, task: q.done(task),
    "fail": lambda q, task: q.fail(task),
    "retry": lambda q, task: q.retry(task),
    "retry-later": lambda q, task: q.retry(task, 1_000),
}
TASK_CALLS = {**VERDICTS, "touch": lambda q, task: q.touch(task)}
AFTER = dict(zip(TASK_CALLS, ("done", "failed", "pending", "scheduled", "in_progress"), strict=True))


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "delete"])
@pytest.mark.parametrize("how", [*VERDICTS, "lease", "another queue"])
@pytest.mark.parametrize("call", TASK_CALLS)
def test_a_task_is_finished_once_and_by_who_has_it(
    directory: Path, clock: Time, call: str, how: str, keep: bool
) -> None:
    """Who finished a task, or lost its claim, gets NotInProgress for every verdict, however often he
    tries, and whatever the next one did; who has it from another directory a ValueError. Nothing changes."""
    options = {"keep_done": keep, "keep_failed": keep}
    q, other = FemtoQueue(directory, "node", **options), FemtoQueue(directory, "other", **options)
    third = FemtoQueue(directory.with_name("third"), "node")
    q.push(b"x")
    held, task = q.pop(), None
    if how in VERDICTS:
        VERDICTS[how](q, held)
    elif how == "lease":
        clock.advance(31.1)
        task = other.pop()
        assert held.lost and task.attempt == 2
    through, error = (third, ValueError) if how == "another queue" else (q, NotInProgress)
    for finish in (lambda: None, lambda: task and other.done(task)):
        finish()
        before = files(directory.parent)
        with pytest.raises(error, match=held.id):
            TASK_CALLS[call](through, held)
        assert files(directory.parent) == before


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "delete"])
@pytest.mark.parametrize("end", ["retry", "retry-later", "crash"])
def test_max_attempts_end_in_failed(directory: Path, clock: Time, end: str, keep: bool) -> None:
    """After max_attempts deliveries, however they ended, a task is in failed/, or deleted."""
    id = FemtoQueue(directory, "producer").push(b"poison")
    for attempt in (1, 2):
        q = FemtoQueue(directory, "node", max_attempts=2, keep_failed=keep)
        task = q.pop()
        assert task and task.attempt == attempt
        if end != "crash":
            VERDICTS[end](q, task)
        clock.advance(1)
    if end == "crash":
        q = FemtoQueue(directory, "node", max_attempts=2, keep_failed=keep)
        assert q.pop() is None
    assert q.status(id) == ("failed" if keep else None)
    assert names(directory, "failed") == [id, f"{id}~reason"][: 2 * keep]


# --- run ----------------------------------------------------------------------------------------------


def test_run_finishes_what_the_handler_returns_from(directory: Path) -> None:
    """When the handler returns, whatever it returns, the task is done; run says how many there were."""
    q = FemtoQueue(directory, "node")
    results = [None, False, 0, "failed", [1], iter([1]), ValueError(), type]
    ids, left = q.push_many([b"x"] * len(results)), iter(results)
    assert q.run(lambda task: next(left), until_empty=True) == len(results)
    assert ids == list(q.ids("done")) and q.run(never, until_empty=True) == 0


async def coroutine(task: FemtoTask) -> None:
    """Never runs, if nobody awaits it."""


@pytest.mark.parametrize("handler", [coroutine, lambda task: (x for x in [task])])
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_handler_that_has_not_run(directory: Path, handler: Callable[[FemtoTask], Any]) -> None:
    """A handler that returns what somebody else must run is a TypeError, and the task comes back."""
    q = FemtoQueue(directory, "node", max_attempts=1)
    id = q.push(b"x")
    with pytest.raises(TypeError, match=r"^handler: .*(asyncio\.run|no yield)"):
        q.run(handler, until_empty=True)
    assert q.status(id) == "pending"


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(0)], ids=repr)
def test_run_logs_and_retries_what_the_handler_raises_from(
    directory: Path, clock: Time, caplog: Any, error: BaseException
) -> None:
    """An exception, SystemExit too, is logged and the task retried with exponential backoff up to
    max_attempts; then the traceback is its reason."""
    q = FemtoQueue(directory, "node", max_attempts=3)
    id = q.push(b"x")

    def misfit(task: FemtoTask) -> None:
        raise error

    for attempt in (1, 2, 3):
        assert q.run(misfit, until_empty=True) == 0
        assert len(caplog.messages) == attempt and id in caplog.messages[-1]
        if attempt < 3:
            delay_s = int(names(directory, "scheduled")[0][-16:]) / 1e6 - clock.wall
            assert 0.499 <= delay_s / 2 ** (attempt - 1) <= 1.501
            clock.advance(delay_s + 1e-3)
    assert q.status(id) == "failed"
    for text in (caplog.text, q.reason(id)):
        assert "Traceback" in text and "in misfit" in text and type(error).__name__ in text


def test_backoff_has_jitter_and_a_limit(directory: Path, clock: Time) -> None:
    """Tasks that failed together do not come back together; each is tried again within 90 minutes."""
    q = FemtoQueue(directory, "node")
    for number in range(50):
        put(directory / "pending" / f"1790000000000000_{number}~60")
    assert q.run(lambda task: 1 / 0, until_empty=True) == 0
    delays_s = {int(name[-16:]) / 1e6 - clock.wall for name in names(directory, "scheduled")}
    assert len(delays_s) > 20 and 1_799 <= min(delays_s) < 3_600 < max(delays_s) <= 5_401


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("call", VERDICTS)
def test_a_handler_may_finish_its_task_itself(
    directory: Path, clock: Time, caplog: Any, call: str, raises: bool
) -> None:
    """The handler's own verdict stays, whatever it does then, and no lease is said to be lost."""
    q = FemtoQueue(directory, "node", max_attempts=2)
    id = q.push(b"x")

    def handle(task: FemtoTask) -> None:
        VERDICTS[call](q, task)
        assert not raises, "behind it"

    count = 2 if call == "retry" else 1  # it is delivered at once
    assert q.run(handle, until_empty=True) == (0 if raises else count)
    assert q.status(id) == ("failed" if call == "retry" else AFTER[call])
    assert "lease" not in caplog.text and caplog.text.count(", in handle\n") == count * raises


def test_the_handler_is_told_that_its_lease_was_lost(directory: Path, spawn: Spawn) -> None:
    """Stopped past its lease: another has the task; task.lost says so, and run leaves it alone."""
    worker = """
def handle(task):
    print("begun", flush=True)
    while not task.lost:
        time.sleep(0.001)
print(FemtoQueue(sys.argv[1], "worker", timeout_stale_ms=300).run(handle, until_empty=True))
"""
    q = FemtoQueue(directory, "other")
    id = q.push(b"x")
    process = spawn(worker, directory)
    expect(process, "begun")
    process.send_signal(signal.SIGSTOP)
    task = q.pop(timeout=10)
    process.send_signal(signal.SIGCONT)
    out, status = ending(process)
    assert out.startswith("0\n") and f"{id}: its lease was lost" in out
    assert (status, task.attempt, q.done(task)) == (0, 2, None)


@pytest.mark.parametrize(
    "end", ["sys.exit(3)", "1 / 0", "pass", "q.close()", "raise_signal(15)", "raise_signal(2)"]
)
def test_a_process_that_a_handler_forked(directory: Path, end: str) -> None:
    """A handler may fork, however the child ends: the task stays its parent's; and there a signal does
    what it did before run."""
    code = f"""
from signal import raise_signal, signal
signal(2, lambda *_: os._exit(7))
q, other = FemtoQueue(sys.argv[1], "node"), FemtoQueue(sys.argv[1], "other")
q.push(b"x")
parent = os.getpid()
def handle(task):
    if pid := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, q.status(task.id), other.pop())
    else:
        {end}
try:
    print(q.run(handle, until_empty=True), q.counts("done"))
finally:
    if os.getpid() != parent:
        os._exit(0)
"""
    status = {"raise_signal(15)": -15, "raise_signal(2)": 7}.get(end, 0)
    assert run(code, directory) == f"{status} in_progress None\n1 {{'done': 1}}\n"


def test_also_looks_into_the_queues_in_their_order_before_each_task(tmp_path: Path) -> None:
    """run(handler, also=[q2, q3]) looks into its own queue first, then into the others, each time."""
    q1, q2, q3 = queues = [FemtoQueue(tmp_path / name, "node") for name in "123"]
    q3.push_many([b"3a", b"3b", b"3c"])
    q2.push(b"2a")
    pushed = {b"2a": (q1, b"1a"), b"3a": (q2, b"2b"), b"2b": (q1, b"1b"), b"3c": (q1, b"1c")}
    handled: list[bytes] = []

    def handle(task: FemtoTask) -> None:
        assert task.queue is queues[int(task.data[:1]) - 1]
        handled.append(task.data)
        if task.data in pushed:
            queue, data = pushed[task.data]
            queue.push(data)

    assert q1.run(handle, also=[q2, q3], until_empty=True) == 8
    assert b" ".join(handled) == b"2a 1a 3a 2b 1b 3b 3c 1c"


def test_also_goes_on_behind_a_queue_that_has_trouble(tmp_path: Path, refuse: Refusal) -> None:
    """What cannot be read in one queue keeps nobody from the others; it is raised when they are empty."""
    q1, q2 = FemtoQueue(tmp_path / "1", "node"), FemtoQueue(tmp_path / "2", "node")
    id = q1.push(b"stuck")
    q2.push_many([b"a", b"b"])
    refuse("open", id, errno.EIO)
    with pytest.raises(OSError, match=id):
        q1.run(lambda task: None, also=[q2], until_empty=True)
    assert q2.counts("pending", "done") == {"pending": 0, "done": 2}


def test_also_verdicts_are_those_of_the_right_queue(tmp_path: Path) -> None:
    """Each task has the backoff, the max_attempts and the keeping of its own queue."""
    q1 = FemtoQueue(tmp_path / "1", "node")
    q2 = FemtoQueue(tmp_path / "2", "node", max_attempts=1, keep_done=False)
    payloads = [b"1 / 0", b"pass", b"task.queue.touch(task); task.queue.retry(task, 10**6)"]
    ids, more = q1.push_many(payloads), q2.push_many(payloads)
    q1.run(lambda task: exec(task.data), also=[q2], until_empty=True)
    assert [q1.status(id) for id in ids] == ["scheduled", "done", "scheduled"]
    assert [q2.status(id) for id in more] == ["failed", None, "failed"]


@pytest.mark.parametrize("leases_ms", [[60_000, 400], [400, 60_000]], ids=str)
def test_the_lease_is_kept_alive_while_the_handler_runs(tmp_path: Path, leases_ms: list[int]) -> None:
    """A handler may take longer than the lease of its task's queue: nobody else gets its task."""
    q, more = queues = [FemtoQueue(tmp_path / str(ms), "node", timeout_stale_ms=ms) for ms in leases_ms]
    queues[leases_ms.index(400)].push(b"x")
    other = FemtoQueue(tmp_path / "400", "other")
    taken: list[object] = []

    def handle(task: FemtoTask) -> None:
        taken.extend([other.pop(timeout=1.6), task.lost])

    assert q.run(handle, also=[more], until_empty=True) == 1
    assert taken == [None, False] and counted(other) == {"done": 1}


# --- signals are deferred, not swallowed --------------------------------------------------------------

WORKER = """
import faulthandler, signal, threading
q, second = (FemtoQueue(sys.argv[1] + name, "worker") for name in ("", "-2"))
def handle(task):
    print("begun", task.data.decode(), flush=True)
    input()
def mine(number, frame):
    print("mine", number, flush=True)
"""
TERM, INT, HUP, QUIT = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
CAUGHT = "try: q.run(handle)\nexcept KeyboardInterrupt: print('caught')"
# What is signalled, how the worker runs, what it prints afterwards, its exit status.
DEFERRED: dict[str, tuple[int, str, str, int]] = {
    **{number.name: (number, "q.run(handle)", "", -number) for number in (TERM, INT, HUP, QUIT)},
    "also": (TERM, "second.purge('pending', 0); second.run(handle, also=[q])", "", -15),
    "nested": (TERM, "second.run(lambda task: q.run(handle))", "", -15),
    "KeyboardInterrupt": (INT, CAUGHT, "caught\n", 0),
    "its handler returns": (TERM, "signal.signal(15, mine); print(q.run(handle))", "mine 15\n1\n", 0),
    "its handler exits": (TERM, "signal.signal(15, lambda *_: sys.exit(5)); q.run(handle)", "", 5),
}
WAITS = ("SIGTERM", "also", "nested", "its handler returns")
TWICE = ("SIGTERM", "SIGINT", "nested", "its handler exits")


@pytest.mark.parametrize(
    ("case", "when"),
    [(c, "in hand") for c in DEFERRED] + [(c, "waits") for c in WAITS] + [(c, "twice") for c in TWICE],
)
def test_signals_are_deferred(directory: Path, spawn: Spawn, case: str, when: str) -> None:
    """Not swallowed: after the task in hand, at once if there is none, the program's own handler is called,
    or the signal ends the program. A second signal gives the task back at once."""
    number, code, printed, status = DEFERRED[case]
    q, second = (FemtoQueue(f"{directory}{name}", "producer") for name in ("", "-2"))
    ids = q.push_many([b"1", b"2"])
    second.push(b"3")
    process = spawn(WORKER + code, directory)
    expect(process, "begun 1")
    if when == "waits":
        assert q.cancel(ids[1])
        say(process)
        assert becomes("done", lambda: q.status(ids[0]))
    process.send_signal(number)
    if when == "in hand":
        say(process)
    end = time.monotonic() + 15
    while when == "twice" and process.poll() is None and time.monotonic() < end:
        process.send_signal(number)  # one that comes too soon after another is the same
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    assert ended(process) == (printed, status)
    assert "in_progress" not in counted(q) | counted(second), "it gave back what it had"
    task = FemtoQueue(directory, "next").pop()
    expected = {"waits": None, "in hand": (b"2", 1), "twice": (b"1", 2)}[when]
    assert (task and (task.data, task.attempt)) == expected


def test_run_restores_the_signal_handlers_before_it(directory: Path) -> None:
    """run has its handlers while it runs in the main thread, and leaves those that it found: what was
    ignored, and what was set by C code (faulthandler, an embedding program), all the while."""
    code = """
faulthandler.register(1, file=sys.stdout)
signal.signal(3, signal.SIG_IGN)
signal.signal(15, mine)
before = [*map(signal.getsignal, (1, 2, 3, 15))]
def compare(*_):
    print([signal.getsignal(number) == was for number, was in zip((1, 2, 3, 15), before)])
def work():
    q.push(b"x")
    q.run(compare, until_empty=True)
work()
compare()
signal.raise_signal(1)
threading.Thread(target=work).start()
"""
    first, *others = run(WORKER + code, directory).splitlines()
    assert first == "[True, False, True, False]" and others.count("[True, True, True, True]") == 2
    assert "most recent call first" in "".join(others)


@pytest.mark.parametrize("what", ["SIGTERM", "stop"])
def test_interrupted_at_any_line_of_run(scratch: Path, what: str) -> None:
    """Wherever it comes, between two tasks too, a signal or a stop ends run, and no claim stays."""

    def work(place: Path, at: int) -> int:
        signal.signal(TERM, signal.SIG_DFL)
        q = FemtoQueue(place, "node")
        q.push_many([b"1", b"2"])
        with Lines(at, q.stop if what == "stop" else lambda: os.kill(os.getpid(), TERM)) as lines:
            q.run(lambda task: None, until_empty=True)
        assert what != "stop" or not at or q.run(never) == 0
        return lines.count

    total = work(scratch / "0", 0)
    assert total > 50
    for at in range(1, total, max(1, total // 60)):
        place = scratch / str(at)
        status, error = in_child(functools.partial(work, place, at))
        status = os.waitstatus_to_exitcode(status)
        assert (at, status, error) == (at, 0 if what == "stop" else -TERM, "")
        counts = FemtoQueue(place, "other").counts()
        assert (at, counts["pending"] + counts["done"]) == (at, 2)


def test_stop_ends_what_runs_and_what_begins_later_and_nothing_else(directory: Path) -> None:
    """Every run ends after the task in hand, what begins later at once; all else works, for others all."""
    q, more = FemtoQueue(directory, "node"), FemtoQueue(f"{directory}-2", "node")
    q.push_many([b"1", b"2", b"3"])
    gate = threading.Barrier(3, timeout=20)

    def handle(task: FemtoTask) -> None:
        gate.wait(), gate.wait()

    runs = [in_thread(q.run, handle), in_thread(lambda: more.run(handle, also=[q]))]
    gate.wait()
    q.stop()
    gate.wait()
    assert [ran.result(10) for ran in runs] == [1, 1]
    assert counted(q) == {"done": 2, "pending": 1}
    assert q.run(never) == q.run(never, until_empty=True) == 0 and q.join() is False
    assert q.pop(timeout=None).data == b"3" and q.pop(timeout=None) is None
    q.push(b"4")
    assert FemtoQueue(directory, "other").run(lambda task: None, until_empty=True) == 1
    assert counted(q) == {"done": 3, "in_progress": 1}


def test_a_hostile_id_never_reaches_the_filesystem(directory: Path) -> None:
    """An id that is no task's name is no task: no system call ever sees it."""
    q = FemtoQueue(directory, "node")
    hostile = ["", "..", "*", "/etc/passwd", f"../done/{OLD_ID}", f"{NOW_US}_x/../../secret"]
    hostile += [OLD_ID + end for end in ("\0", "\n", "\udcff", "~1", "x" * 300)]
    for id in [*hostile, OLD_ID]:
        found: list[object] = []
        calls = calls_of(lambda: found.extend(f(id) for f in (q.status, q.cancel, q.requeue, q.reason)))  # noqa: B023
        assert (calls == []) is (id != OLD_ID) and found == [None, False, False, None], id


@pytest.mark.parametrize("look", ["join", "status"])
@pytest.mark.parametrize("move", ["successor", "retry"])
@pytest.mark.parametrize("moves", [2, 12])
def test_a_task_that_moves_during_a_scan_does_not_slip_through(
    directory: Path, clock: Time, monkeypatch: Patch, look: str, move: str, moves: int
) -> None:
    """join is True only if there was such a moment; status never misses what exists all the while."""
    queue, observer = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    id, left = queue.push(b"x"), 0
    held = queue.pop()

    def scandir(path: Any = ".") -> Any:
        """Before the directory is read that the task is in, it goes to one that was read before."""
        nonlocal held, left
        if left and bool(held) is (f"{directory}/in_progress" in path):
            left, before = 0, left  # the move itself scans, too
            if not held:
                held = queue.pop()
            elif move == "retry":
                held = queue.retry(held)
            else:
                queue.push(b"x")
                held = queue.done(held)
            left = before - 1
        return REAL["scandir"](path)

    monkeypatch.setattr(os, "scandir", scandir)
    for _ in range(5):
        left = moves
        assert observer.join(0) is False if look == "join" else observer.status(id)
        assert left < moves, "it scanned"
        left = 0
        clock.advance(1)
        held = held or queue.pop()


def test_what_exists_all_the_while_is_always_listed(scratch: Path, spawn: Spawn) -> None:
    """Beside a process that retries a task, and renews leases, on and on, nothing is reported absent."""
    queue = FemtoQueue(scratch / "queue", "a")
    id, *ids = queue.push_many([b"x"] * 600)
    code = """
queue = FemtoQueue(sys.argv[1], "b", 10**6)
first, *tasks = [queue.pop() for _ in range(600)]
print("go", flush=True)
while True:
    for task in tasks:
        queue.touch(task)
        queue.retry(first)
        first = queue.pop()
"""
    expect(spawn(code, scratch / "queue"), "go")
    for _ in range(50):
        assert {*ids} <= {*queue.ids("in_progress")}
        assert queue.status(id) in ("pending", "in_progress")


def test_a_renewed_lease_does_not_hide_since_when_a_claim_runs(directory: Path, clock: Time) -> None:
    """claims tells whose each claim is, if that one lives, the attempt, since when it runs, what is left."""
    queue = FemtoQueue(directory, "a")
    put(directory / "in_progress" / DEAD_OWNER / f"{OLD_ID}~1~{NOW_US + HOUR_US}")
    id = queue.push(b"x")
    task = queue.pop()
    for _ in range(4):
        clock.advance(20)
        queue.touch(task)
    elsewhere, claim = sorted(queue.claims(), key=lambda claim: claim["id"])
    assert (elsewhere["id"], elsewhere["alive"]) == (OLD_ID, "unknown")
    times = {"since_s": pytest.approx(80, abs=0.01), "lease_left_s": pytest.approx(30, abs=0.01)}
    assert claim == {"id": id, "attempt": 1, "node_id": "a", "pid": os.getpid(), "alive": "yes"} | times


# --- cancel, requeue, purge, join ---------------------------------------------------------------------


@pytest.mark.parametrize("state", ["pending", "scheduled", "done", "failed"])
def test_purge_goes_by_the_time_in_the_state(tmp_path: Path, monkeypatch: Patch, state: str) -> None:
    """purge deletes what has been in its state for so long, however old task or file are."""
    q, now = FemtoQueue(tmp_path / "queue", "node"), time.time()
    for age_s in (10**6, -(10**6)):  # files of long ago, and from a machine whose clock is ahead
        os.utime(put(tmp_path / "file"), (now - age_s, now - age_s))
        q.push_file(tmp_path / "file", move=True)
        if state != "pending":
            VERDICTS[{"done": "done", "failed": "fail", "scheduled": "retry-later"}[state]](q, q.pop())
    for past_s, count in ((0, 0), (59, 0), (120, 2)):
        monkeypatch.setattr(time, "time", lambda past_s=past_s: now + past_s)
        assert q.purge(state, 60) == count
    assert q.counts(state) == {state: 0}


def test_join_watches_until_all_is_finished(directory: Path, clock: Time) -> None:
    """True when nothing is pending, in progress or scheduled; False after timeout, never early."""
    q = FemtoQueue(directory, "node")
    assert q.join() is True
    for step in (lambda: q.push(b"x"), q.pop, lambda: q.retry(q.pop(), 60_000)):
        step()
        before = clock.boot
        assert q.join(0) is q.join(timeout=2.5) is False
        assert 2.5 <= clock.boot - before < 2.6
        clock.advance(29)  # what is claimed comes back
    clock.advance(30)
    q.done(q.pop())
    assert q.join() is True


# --- close --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["its own", "also"])
def test_close_waits_for_the_task_in_hand(directory: Path, which: str) -> None:
    """close ends this object's run first, and waits for it: no task is given away in mid-work."""
    q, urgent = FemtoQueue(directory, "node"), FemtoQueue(f"{directory}-2", "node")
    ids = q.push_many([b"1", b"2"])
    gate = threading.Barrier(2, timeout=20)

    def handle(task: FemtoTask) -> None:
        gate.wait(), gate.wait()

    ran = in_thread(lambda: urgent.run(handle, also=[q]) if which == "also" else q.run(handle))
    gate.wait()
    closed = [in_thread(q.close) for _ in range(2)]
    assert not concurrent.futures.wait(closed, 0.3).done, "closed while the handler works"
    gate.wait()
    assert [call.result(10) for call in closed] == [None, None] and ran.result(10) == 1
    other = FemtoQueue(directory, "other")
    assert [other.status(id) for id in ids] == ["done", "pending"]


def test_close_by_its_own_handler(directory: Path) -> None:
    """close called by its own handler: a FemtoQueueError that names stop(); the task stays in hand."""
    q, more = FemtoQueue(directory, "node"), FemtoQueue(f"{directory}-2", "node")
    q.push(b"x")
    more.push(b"x")

    def close(task: FemtoTask) -> None:
        with pytest.raises(FemtoQueueError, match=re.escape("stop()")):
            q.close()
        assert task.queue.status(task.id) == "in_progress"

    q.run(lambda task: (close(task), more.run(close, until_empty=True)), also=[more], until_empty=True)
    assert counted(q) == counted(more) == {"done": 1}


def test_a_closed_queue_refuses_every_call(directory: Path) -> None:
    """Every later call raises FemtoQueueError and changes nothing; close may be repeated."""
    q, task, ids = full_house(directory)
    q.close()
    before = files(directory)
    others = ["q.stop()", "q.claims()", "q.reason(task.id)", "q.pop(timeout=None)", "q.__enter__()"]
    for call in {*CALLS, *others} - {"q.close()"}:
        with pytest.raises(FemtoQueueError, match="closed"):
            eval(call, globals(), {"q": q, "task": task, "ids": ids})
        q.close()
        assert files(directory) == before


@pytest.mark.parametrize("what", ["list", "move"])
def test_close_that_raised_can_be_made_again(directory: Path, refuse: Refusal, what: str) -> None:
    """A close that raised has closed, but given nothing back: the next one does, for all to have."""
    q = FemtoQueue(directory, "node")
    q.push(b"x")
    assert q.pop()
    refuse(what, "/in_progress/node~", errno.EIO)
    with pytest.raises(OSError):
        q.close()
    with pytest.raises(FemtoQueueError, match="closed"):
        q.counts()
    refuse.rules.clear()
    q.close()
    assert run("print(FemtoQueue(sys.argv[1], 'other').pop().attempt)", directory) == "2\n"


def test_a_claim_is_not_made_behind_close(directory: Path, monkeypatch: Patch) -> None:
    """A pop that close overtakes in another thread raises; the task is there for others as it was."""
    q = FemtoQueue(directory, "node")
    id = q.push(b"x")

    def overtaken(source: str, target: str) -> None:
        monkeypatch.setattr(os, "rename", REAL["rename"])
        q.close()
        REAL["rename"](source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    with pytest.raises(FemtoQueueError, match="closed"):
        q.pop()
    other = FemtoQueue(directory, "other")
    assert other.status(id) == "pending"
    assert other.pop().attempt == 1


def test_dropping_an_object_costs_the_same_however_many_there_are(directory: Path) -> None:
    """Costs do not grow with how many objects a process has: counted in lines, of a drop and a task."""

    def cost(count: int) -> tuple[float, int]:
        objects = [FemtoQueue(directory, "node") for _ in range(count)]
        q = FemtoQueue(directory, "node")
        drained(q)
        with Lines() as task:
            q.push(b"x")
            q.done(q.pop())
        with Lines() as drop:
            objects.clear()
        return drop.count / count, task.count

    few, many = cost(20), cost(400)
    assert 0 < many[0] <= 1.5 * few[0] + 5 and many[1] <= 1.2 * few[1] + 5


@pytest.mark.parametrize("call", ["done", "fail", "retry", "touch"])
def test_finished_in_another_process(directory: Path, call: str) -> None:
    """A task can be pickled, and read and finished in another process, though it was touched meanwhile."""
    queue = FemtoQueue(directory, "a")
    id = queue.push(bytes((1 << 20) + 1))
    task = queue.pop()
    copy = pickle.dumps(task)
    queue.touch(task)
    code = f"""
import pickle
task = pickle.loads({copy})
print(task.data == bytes((1 << 20) + 1))
FemtoQueue(sys.argv[1], "b").{call}(task)
"""
    assert run(code, directory) == "True\n" and queue.status(id) == AFTER[call]
    if call in ("touch", "done"):  # a done whose answer was lost looks like that of another process
        queue.done(task)
    with pytest.raises(NotInProgress):
        queue.done(task)
    with pytest.raises(FileNotFoundError):
        task.data  # noqa: B018


NUMBERS = {"timeout": "pop({0}) join({0})", "delay_ms": "retry(task,{0})", "older": "purge('done',{0})"}
BAD_CALLS: dict[tuple[Any, ...], str] = {
    (TypeError, r"data.*\.encode\(\)"): "push('x') push_many(['x']) schedule('x',NOW_US)",
    (TypeError, "data"): "push(5) push(None)",
    (TypeError, "items.*push"): "push_many(b'x') push_many('x') push_many(5)",
    (TypeError, "path"): "push_file(5.0)",
    (ValueError, "path"): "push_file('.')",
    (FileNotFoundError, "nowhere"): "push_file('/nowhere')",
    (TypeError, "time_us"): "schedule(b'',1.8e15) schedule(b'','tomorrow') schedule(b'',None)",
    (ValueError, "time_us.*time zone"): "schedule(b'',datetime.datetime(2027,1,1))",
    (ValueError, "time_us"): "schedule(b'',18*10**8) schedule(b'',18*10**11) schedule(b'',18*10**17)",
    (TypeError, "task"): "done(OLD_ID) fail(OLD_ID) retry(OLD_ID) touch(None)",
    (TypeError, "id: expected str"): "status(None) cancel(b'x') requeue(5) reason([])",
    (TypeError, "reason"): "fail(task,b'x')",
    (TypeError, "^handler: "): "run(None)",
    (TypeError, "^also: "): "run(never,also=5,until_empty=True) run(never,also=[5],until_empty=True)",
    (ValueError, "state"): "counts('Done') ids('creating') ids(None) purge('in_progress',0)",
    **{(ValueError, n, x): c.format(x) for n, c in NUMBERS.items() for x in (-1, "NAN", "10**400")},
    **{(TypeError, n, x): c.format(x) for n, c in NUMBERS.items() for x in ("'5'", True)},
}


@pytest.mark.parametrize("key", BAD_CALLS, ids=str)
def test_bad_arguments(directory: Path, queue: FemtoQueue, key: tuple[Any, ...]) -> None:
    """A bad argument gets its error at the call, which names it, and nothing has changed."""
    task = queue.pop()
    before = snapshot(directory)
    for call in BAD_CALLS[key].split():
        with pytest.raises(key[0], match=key[1]):
            eval(f"queue.{call}", globals(), {"queue": queue, "task": task})
        assert snapshot(directory) == before, call
    queue.done(task)


# ====================================================================================================
# Rights and room: whoever comes first owns nothing that others need
# ====================================================================================================


def as_user(uid: int, gid: int, *groups: int, umask: int = 0o022) -> str:
    """Code by which a process becomes a user, who may be unable to read the standard library."""
    return f"""
import argparse, ctypes, datetime, inspect, json, locale, logging, queue as _queue
import select, shutil, signal, stat, subprocess, threading, traceback
os.setgroups({[*groups]}); os.setgid({gid}); os.setuid({uid}); os.umask({umask})
"""


MAKES = """
queue = FemtoQueue(sys.argv[1], "first", sync_after_write=True)
queue.push_many([b"%d" % number for number in range(5)])
with open(sys.argv[1] + "/file", "wb") as file:
    file.write(b"file")
queue.push_file(file.name, move=True)
queue.schedule(b"due", time.time_ns() // 1000)
queue.schedule(b"later", time.time_ns() // 1000 + 10**9)
queue.done(queue.pop())
queue.fail(queue.pop(), "broken")
queue.retry(queue.pop())
queue.retry(queue.pop(), 10**6)
queue.touch(queue.pop())
print(queue.push(b"last"))
"""
USES = """
queue = FemtoQueue(sys.argv[1], "second")
queue.schedule(b"mine", time.time_ns() // 1000)
for state in ("failed", "done", "scheduled"):
    for id in list(queue.ids(state)):
        assert queue.requeue(id), state
for count, task in enumerate(iter(queue.pop, None), 1):
    task.data
    (queue.done, queue.fail)[count % 2](task)
print(count, queue.purge("done", 0) + queue.purge("failed", 0), queue.counts()["in_progress"])
"""


@needs_root
@needs_mounts
@pytest.mark.parametrize(
    "who",  # the mode and owner of data_dir, the first and the second user, the umask of the first
    [
        (0o755, (65534, 65534), (0, 0), (65534, 65534), 0o077),
        (0o770, (1001, 65533), (1002, 65533), (1001, 65533), 0o027),
        (0o2770, (1001, 65533), (1002, 1002, 65533), (1001, 1001, 65533), 0o007),
    ],
)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
def test_whoever_comes_first_owns_nothing_that_others_need(
    open_to_all: Path, tmp_path: Path, who: tuple[Any, ...], used: bool
) -> None:
    """Who looks first after a boot writes nothing. What is shared has data_dir's mode, and what root makes
    its owner and group as well; payloads have what the umask says."""
    mode, owner, first, second, umask = who
    open_to_all.mkdir()
    os.chown(open_to_all, *owner)
    open_to_all.chmod(mode)
    again = rebooted(tmp_path)
    if used:
        run(as_user(*second) + "FemtoQueue(sys.argv[1], 'second').push(b'x')", open_to_all)
        before = snapshot(open_to_all, times=True)
        looks = "[femtoqueue.main([sys.argv[1], *c.split()]) for c in ('status', 'list pending', 'cancel x')]"
        run(as_user(*first, umask=umask) + looks, open_to_all, under=again)
        assert snapshot(open_to_all, times=True) == before
    id = run(as_user(*first, umask=umask) + MAKES, open_to_all, under=again).strip()
    for path in open_to_all.rglob("*"):
        info, place = path.stat(), path.relative_to(open_to_all).parts
        assert (info.st_uid, info.st_gid) == owner or first != (0, 0), path
        if len(place) == 1 or (path.is_dir() and place[1].isdigit()):
            assert stat.S_IMODE(info.st_mode) == mode & (0o7777 if path.is_dir() else 0o666), path
    [path] = (open_to_all / "pending").rglob(id)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    uses = as_user(*second) + USES
    assert run(uses, open_to_all, under=again) == f"{10 + used} {10 + used} 0\n"


@needs_root
@pytest.mark.parametrize("call", ["push(b'%d')", "schedule(b'%d', 10**15)"])
def test_a_shared_bucket_that_cannot_be_used(open_to_all: Path, call: str) -> None:
    """Where another user made the shared bucket his own, a producer opens one of its own."""
    push = "FemtoQueue(sys.argv[1], 'node')." + call
    run(push % 1, open_to_all)
    for path in (open_to_all, *open_to_all.rglob("*")):
        path.chmod(0o700 if path.name.isdigit() else 0o777)
    for number in (2, 3):
        run(as_user(65534, 65534, umask=0) + push % number, open_to_all)
    assert drained(FemtoQueue(open_to_all, "root")) == [b"1", b"2", b"3"]


def test_a_link_in_the_place_of_a_shared_bucket_is_not_followed(
    directory: Path, tmp_path: Path
) -> None:
    """A producer opens a bucket of its own beside it."""
    FemtoQueue(directory, "a").push(b"1")
    [bucket] = (directory / "pending").iterdir()
    shutil.rmtree(bucket)
    (outside := tmp_path / "outside").mkdir()
    bucket.symlink_to(outside)
    q = FemtoQueue(directory, "b")
    q.push_many([b"2", b"3"])
    assert drained(q) == [b"2", b"3"] and not [*outside.iterdir()]


WITHOUT_ROOM: dict[str, object] = {
    "[q.status(id) for id in ids.values()]": [*STATES],
    "q.counts()": dict.fromkeys(STATES, 1),
    "q.join(0)": False,
    "femtoqueue.main([str(q.data_dir), 'status'])": 0,
    **{f"q.cancel(ids[{state!r}])": True for state in ("pending", "scheduled")},
    **{f"q.purge({state!r}, 0)": 1 for state in ("done", "failed", "corrupt", "pending")},
}


@pytest.mark.parametrize("call", WITHOUT_ROOM)
def test_looking_and_deleting_need_no_room_after_a_boot(directory: Path, call: str) -> None:
    """Neither looking nor deleting needs room on the disk, and looking takes no right to write."""
    _, _, ids = full_house(directory)
    ids = {state: ids[state] for state in STATES}
    next(directory.glob("clock-*")).unlink()
    deletes = "cancel" in call or "purge" in call

    def full(name: str, *args: Any, **options: Any) -> Any:
        makes = name in ("write", "mkdir", "link") or (name == "open" and args[1] & os.O_ACCMODE)
        if makes or (name in ("unlink", "rename", "rmdir") and not deletes):
            raise OSError(errno.ENOSPC, f"{name} needs room, or rights", args[0])
        return REAL[name](*args, **options)

    with Steps(1, full, once=False):
        q = FemtoQueue(directory, "after")
        assert eval(call, globals() | {"q": q, "ids": ids}) == WITHOUT_ROOM[call]


# ====================================================================================================
# The promises
# ====================================================================================================

# --- the calls that are killed, failed and answered wrongly at every step -----------------------------


def fates_in(files: dict[str, bytes]) -> dict[bytes, list[str]]:
    """Payload -> what its paths below data_dir say: "1" or "later1", the attempt to come, or a state."""
    found: dict[bytes, list[str]] = {}
    words = {"pending": "", "in_progress": "", "scheduled": "later"}
    for path, payload in files.items():
        state = path.partition("/")[0]
        if state in STATES and not path.endswith("~reason"):
            attempt = int([*os.path.basename(path).split("~"), "0"][1]) + 1
            fate = f"{words[state]}{attempt}" if state in words else state
            found.setdefault(payload, []).append(fate)
    return found


def look(directory: Path) -> dict[bytes, list[str]]:
    """The fates of what lies there, read without femtoqueue."""
    return fates_in({name: (directory / name).read_bytes() for name in files(directory)})


def audit(directory: Path, clock: Time, allowed: dict[bytes, set[str]]) -> None:
    """Open the queue anew, empty it, and compare each payload's fate with what is `allowed`."""
    clock.advance(10 * 86_400)  # all that is scheduled is due, no lease runs out
    clock.wall = max(clock.wall, 5e9)  # later than file times, which are not ours to patch
    queue = FemtoQueue(directory, "a", LONG_MS, keep_done=False)
    there = look(directory)
    assert all(len(fates) == 1 for fates in there.values()), f"visible twice: {there}"
    fates, order = {payload: fates[0] for payload, fates in there.items()}, []
    while task := queue.pop():
        was = fates.get(task.data, "nothing")
        assert was[-1].isdigit() and task.data != b"broken", f"{task.data!r} was {was}, and delivered"
        order.append((was > "later", task.id))
        fates[task.data] = f"{was[:-1]}{task.attempt}"
        queue.done(task)
    assert order == sorted(order), "the oldest comes first, what falls due comes last"
    fates |= {payload: fates[0] for payload, fates in look(directory).items()}
    for payload in {*fates, *allowed}:
        fate, possible = fates.get(payload, "gone"), allowed.get(payload, {"gone"})
        assert fate in possible, f"{payload!r} is {fate}: {possible}"
    assert len(order) == sum(fate[-1].isdigit() for fate in fates.values()), "some are not delivered"
    clock.advance(2_000)
    assert queue.pop() is None
    for state in ("done", "failed", "corrupt"):
        queue.purge(state, 0)
    queue.close()
    left = {path.name for path in directory.rglob("*") if not path.name.startswith("clock-")}
    assert left <= {*STATES, "creating", "layout"}, "something is left behind"
    assert (directory / "layout").read_text().startswith("femtoqueue layout 1\n")


# The fates of what is there before each case, in which nothing more happens.
WORLD = "claimed=2 finished=done failed=failed first=1 second=1 later=later1"
LIVE = {"1", "2", "3", "later1", "later2", "later3"}
NEW = [b"new0", b"new1", b"new2"]


class Case:
    """The fates of each payload, from before a call to after it; the call, and what comes before it.

    In what it says, `s` is the stage, `q` its queue, `t` its claims by name. Its words: "alone", nothing
    else is there; "undone", after an error everything is as it was before; "elsewhere", the source of
    push_file lies on another filesystem.
    """

    def __init__(self, fates: str, act: str, prepare: str = "None", **options: Any) -> None:
        self.act, self.prepare, self.options = act, prepare, options
        self.words = {word for word in fates.split() if "=" not in word}
        pairs = re.findall(r"(\w+)=(\S+)", fates if "alone" in self.words else f"{WORLD} {fates}")
        self.fates = {name.encode(): each.split(">") for name, each in pairs}

    def source(self, directory: Path) -> Path:
        """The file that push_file takes."""
        above = Path(tempfile.gettempdir()) if "elsewhere" in self.words else directory.parent
        return above / f"{directory.parent.name}-{directory.name}-source"

    def clear(self, directory: Path) -> None:
        shutil.rmtree(directory)
        self.source(directory).unlink(missing_ok=True)

    def allowed(
        self, returned: bool, popped: Any = None, loose: bool = False, undone: bool = False
    ) -> dict[bytes, set[str]]:
        """The fates that each payload may have; `popped`: payload and attempt that a pop returned.

        A fault may have made it go on to another one. Where `loose`, it may have claimed more.
        """
        found = {}
        for payload, fates in self.fates.items():
            found[payload] = {fates[-1]} if returned else {*fates}
            if undone and "undone" in self.words:
                found[payload] = {fates[0]}
            elif loose:
                found[payload] |= {fates[0], fates[0].replace("1", "2")}
            elif popped:
                is_claimed = (fates[0] + fates[-1]).isdigit()
                found[payload] = {fates[0]} if is_claimed else {fates[0], fates[-1]}
        return found | ({popped[0]: {f"{popped[1] + 1}"}} if popped else {})

    def check_source(self, directory: Path, returned: bool, error: bool = False) -> None:
        """A file that is moved is where it was, or it is a task; a file that is copied stays."""
        if "push_file" in self.act:
            is_file, moves = self.source(directory).exists(), "move" in self.act
            assert is_file or moves
            both = is_file + (b"new" in look(directory))
            assert both == 1 if error or (returned and moves) else both, f"the file is there: {is_file}"


class Stage:
    """A queue with a task in each state, and the call that a case is about."""

    def __init__(self, case: Case, directory: Path, durable: bool, clock: Time) -> None:
        vars(clock).update(vars(Time()))  # each run takes the same steps
        self.case, self.directory, self.durable, self.clock = case, directory, durable, clock
        self.source = case.source(directory)
        self.kept: list[FemtoQueue] = []
        self.tasks: dict[str, FemtoTask] = {}
        self.ids: dict[str, str] = {}
        self.results: list[Any] = []  # of the calls that say whether something was done
        self.pushed = 0  # of NEW
        self.queue: Any = None
        if "alone" not in case.words:
            self.queue = self.open(**case.options)
            for name in ("claimed", "finished", "failed", "first", "second"):
                self.ids[name] = self.queue.push(name.encode())
            self.ids["later"] = self.queue.schedule(b"later", NOW_US + HOUR_US)
            self.claim(3)
            self.queue.done(self.tasks["finished"])
            self.queue.fail(self.tasks["failed"], "why")
        self.do(case.prepare)

    def do(self, code: str) -> Any:
        return eval(code, globals() | {"s": self, "q": self.queue, "t": self.tasks})

    def act(self) -> None:
        result = self.do(self.case.act)
        if isinstance(result, (bool, tuple)):
            self.results.append(result)

    def drop(self) -> None:
        """Let go of all queue objects: from here on their owners are dead."""
        self.kept.clear()
        self.queue = None

    def open(self, lease_ms: float = LONG_MS, **options: Any) -> FemtoQueue:
        return FemtoQueue(self.directory, "a", lease_ms, self.durable, **options)

    def reopen(self, **options: Any) -> None:
        """Use another object; the one before is `kept` alive."""
        self.kept.append(self.queue)
        self.queue = self.open(**options)

    def claim(self, count: int) -> None:
        self.tasks |= {task.data.decode(): task for task in [self.queue.pop() for _ in range(count)]}

    def pop_first(self) -> tuple[bytes, int]:
        task = self.queue.pop()
        assert task is not None, "pop said None while tasks are pending"
        return task.data, task.attempt

    def look_around(self) -> bool:
        ids = [id for state in STATES for id in self.queue.ids(state)]
        for id in ids:
            assert self.queue.status(id) and self.queue.reason(id) in (None, "why")
        assert self.queue.counts().keys() == {*STATES}
        self.queue.claims()
        self.queue.join(0)
        return len(ids) == 6

    def write_source(self) -> None:
        """By calls that the simulated disk sees."""
        descriptor = os.open(self.source, os.O_WRONLY | os.O_CREAT, 0o666)
        os.write(descriptor, b"new")
        os.close(descriptor)

    def hang(self) -> None:
        self.kept.append(self.open(lease_ms=1))
        self.kept[0].pop()
        for bucket in (self.directory / "pending").iterdir():  # no pop is certain by itself
            descriptor = os.open(bucket, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        self.clock.advance(2)


CASES = {
    "construction": Case("alone", "s.open()"),
    "construction_in_a_part": Case(
        "alone undone new=gone>1", "s.open().push(b'new')", "os.makedirs(s.directory / 'scheduled')"
    ),
    "push": Case("undone new=gone>1", "q.push(b'new')"),
    "push_into_a_new_bucket": Case("undone new=gone>1", "q.push(b'new')", "s.clock.advance(5_000)"),
    "push_heals": Case("undone new=gone>1", "q.push(b'new')", "os.rmdir(s.directory / 'creating')"),
    "push_many": Case("new0=gone>1 new1=gone>1 new2=gone>1", "q.push_many(NEW[s.pushed :])"),
    "push_file": Case("undone new=gone>1", "q.push_file(s.source)", "s.write_source()"),
    "push_file_move": Case("undone new=gone>1", "q.push_file(s.source, move=True)", "s.write_source()"),
    "push_file_move_from_elsewhere": Case(
        "elsewhere new=gone>1", "q.push_file(s.source, move=True)", "s.write_source()"
    ),
    "schedule": Case("undone new=gone>later1", "q.schedule(b'new', NOW_US + 2 * HOUR_US)"),
    "pop": Case("undone first=1>2", "s.pop_first()"),
    "pop_of_a_new_object": Case("undone first=1>2", "s.pop_first()", "s.reopen()"),
    "pop_from_the_dead": Case("claimed=2>3", "s.pop_first()", "s.drop(), s.reopen()"),
    "pop_from_the_hung": Case("first=2>3", "s.pop_first()", "s.hang()"),
    "pop_when_one_is_due": Case("first=1>2 later=later1>1", "s.pop_first()", "s.clock.advance(3_700)"),
    "pop_moves_closer": Case(  # out of a bucket of 100 s that has begun
        *("first=1>2 far=later1", "s.pop_first()"),
        "q.schedule(b'far', NOW_US + 3_080_000_000), s.clock.advance(3_020)",
    ),
    "pop_settles_what_is_ahead": Case(
        *("first=1>2 by_hand=1", "s.pop_first()"),
        "put(s.directory / f'pending/{NOW_US + HOUR_US}_script', b'by_hand')",
    ),
    "pop_meets_a_broken_one": Case(
        *("first=gone broken=1>corrupt second=1>2", "s.pop_first()"),
        "[path.write_bytes(b'broken') for path in s.directory.rglob(s.ids['first'])]",
    ),
    "pop_buries": Case(
        "first=2>failed second=1>2", "s.pop_first()", "q.retry(q.pop()), s.reopen(max_attempts=1)"
    ),
    "done": Case("claimed=2>done", "q.done(t['claimed'])"),
    "done_through_another_object": Case(
        *("claimed=2>done", "q.done(t['claimed'])"),
        "s.reopen(), t.update(claimed=pickle.loads(pickle.dumps(t['claimed'])))",
    ),
    "done_and_not_kept": Case("claimed=2>gone finished=gone", "q.done(t['claimed'])", keep_done=False),
    "fail": Case("claimed=2>failed", "q.fail(t['claimed'], 'why')"),
    "retry": Case("", "q.retry(t['claimed'])"),
    "retry_into_a_removed_bucket": Case(
        *("first=done second=done", "q.retry(t['claimed'])"),
        "[q.done(q.pop()) for _ in range(2)], s.clock.advance(10), q.pop()",
    ),
    "retry_at_a_new_place": Case(  # the time of its id is ahead of the queue clock
        "first=2 second=2 later=2", "q.retry(t['later'])", "s.clock.step_wall(3_700), s.claim(3)"
    ),
    "retry_later": Case("claimed=2>later2", "q.retry(t['claimed'], 3_600_000)"),
    "retry_for_the_last_time": Case("claimed=2>failed", "q.retry(t['claimed'])", max_attempts=1),
    "touch": Case("", "q.touch(t['claimed'])"),
    "run": Case(  # twice: what a fault hides, or keeps from being finished, comes back with the lease
        "claimed=2>3>done first=1>2>done second=1>2>done",
        "[(s.clock.advance(102), q.run(str, until_empty=True)) for _ in range(2)]",
        lease_ms=100_000,
    ),
    "looking": Case("", "s.look_around()"),
    "requeue": Case("failed=failed>1", "q.requeue(s.ids['failed'])"),
    "requeue_scheduled": Case("later=later1>1", "q.requeue(s.ids['later'])"),
    "cancel": Case("first=1>gone", "q.cancel(s.ids['first'])"),
    "cancel_scheduled": Case("later=later1>gone", "q.cancel(s.ids['later'])"),
    "purge": Case("failed=failed>gone", "q.purge('failed', 0)", "s.clock.step_wall(4e9)"),
    "purge_pending": Case(  # twice, for what it may not read is left out
        *("first=1>gone second=1>gone", "[q.purge('pending', 0) for _ in range(2)]"),
        "s.clock.step_wall(4e9)",
    ),
    "close": Case("", "q.close()"),
}


# --- 1 and 2: whole, one claimant at a time, at least once and after done never again -----------------


def test_many_processes_many_kills(scratch: Path) -> None:
    """Nothing acknowledged is lost, nothing invented; only a kill or a stop makes a duplicate."""
    journal, no_more, chance, lease_s = scratch / "journal", scratch / "no-more", random.Random(7), 0.3

    def say(*words: object) -> None:
        """One line in one write: what a process says about itself before it is killed."""
        with open(journal, "ab", buffering=0) as file:
            file.write((" ".join(map(str, words)) + "\n").encode())

    def produce(number: int) -> None:
        queue = FemtoQueue(scratch / "queue", f"producer-{number}")
        for name in (f"{number}.{i}" for i in itertools.count()):
            if no_more.exists():
                return
            while queue.counts("pending")["pending"] > 200:
                time.sleep(0.002)
            say("try", name)
            queue.push(name.encode())
            say("acknowledged", name)

    def consume(number: int) -> None:
        queue = FemtoQueue(scratch / "queue", "worker", lease_s * 1_000)
        while (task := queue.pop(timeout=0.2)) or not no_more.exists():
            if task is None:
                continue
            say("got", task.data.decode(), task.attempt, os.getpid())
            time.sleep(0.0005)
            try:
                queue.done(task)
                say("done", task.data.decode(), task.attempt)
            except NotInProgress:
                say("robbed", task.data.decode())

    def begin(role: Callable[[int], None]) -> None:
        counts["started"] += 1
        roles[forked(functools.partial(role, counts["started"]))] = role

    counts: collections.Counter[str] = collections.Counter()
    roles: dict[int, Callable[[int], None]] = {}  # PID -> what it is
    stopped: dict[int, float] = {}  # PID -> when it shall go on
    disturbed: set[int] = set()
    try:
        for role in (produce,) * 2 + (consume,) * 4:
            begin(role)
        end = time.monotonic() + 7
        while (now := time.monotonic()) < end or "robbed" not in journal.read_text():
            assert now < end + 30, "nobody was stopped for longer than the lease with a task in hand"
            for pid in [pid for pid, until in stopped.items() if until <= now]:
                os.kill(pid, signal.SIGCONT)
                del stopped[pid]
            pid = chance.choice(sorted(roles.keys() - stopped.keys()))
            disturbed.add(pid)
            if chance.random() < 0.5:  # kill it, and start another in its place
                os.kill(pid, signal.SIGKILL)
                assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, "it had ended by itself"
                counts["kills"] += 1
                begin(roles.pop(pid))
            elif len(stopped) < 3:  # stop it, mostly for longer than its lease
                os.kill(pid, signal.SIGSTOP)
                stopped[pid] = now + chance.uniform(1, 6) * lease_s
                counts["stops"] += 1
            time.sleep(chance.uniform(0.02, 0.12))
        no_more.touch()
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        for pid in tuple(roles):
            status = os.waitpid(pid, 0)[1]
            del roles[pid]
            assert status == 0, "a process that was not killed failed"
    finally:
        for pid in roles:  # leave nobody behind
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    consume(0)
    queue = FemtoQueue(scratch / "queue", "worker")
    assert queue.join(0)
    said: dict[str, set[str]] = collections.defaultdict(set)
    got: dict[str, dict[int, int]] = collections.defaultdict(dict)  # name -> attempt -> PID
    finished: dict[str, int] = {}
    for kind, name, *rest in map(str.split, journal.read_text().splitlines()):
        said[kind].add(name)
        if kind == "got":
            assert int(rest[0]) not in got[name], "one attempt was delivered twice"
            got[name][int(rest[0])] = int(rest[1])
        elif kind == "done":
            assert name not in finished, "done twice"
            finished[name] = int(rest[0])
    assert said["acknowledged"] <= {*got} <= said["try"], "one was lost, or invented"
    assert queue.counts()["done"] == len(got) == sum(queue.counts().values())
    for name, attempts in got.items():
        *earlier, last = sorted(attempts)
        assert finished.get(name, last) == last, f"{name} was delivered after it was done"
        assert all(attempts[n] in disturbed for n in earlier), f"{name} was taken from a live one"
    duplicated = sum(len(attempts) > 1 for attempts in got.values())
    figure("many processes", **counts, delivered=len(got), duplicated=duplicated)
    assert len(said["acknowledged"]) > 1_000 and duplicated and min(counts.values()) > 10


# --- 1 to 3: a model --------------------------------------------------------------------------------


@dataclasses.dataclass
class Expected:
    """What the model knows of a task."""

    payload: bytes
    state: str
    used: int = 0  # deliveries
    place: tuple[int, int] = (0, 0)  # in pending/: its time, and a number among equals
    due_us: int = 0
    owner: int | None = None  # which queue object's claim it is; None: an owner that is gone
    deadline_s: float = 0
    reason: str | None = None


class Model(RuleBasedStateMachine):
    """Three queue objects on one directory do as a plain list of tasks says, whatever happens."""

    LEASE_S = 30.05  # the sum of no waits
    COUNT = 3

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.clock = Time()
        self.patch.setattr(time, "time", lambda: self.clock.wall)
        self.patch.setattr(time, "clock_gettime", self.clock.read)
        self.patch.setattr(time, "sleep", self.clock.advance)
        self.patch.setitem(sys.modules, "ctypes", None)
        self.directory = Path(tempfile.mkdtemp("", "femtoqueue-test-", SHM if SHM.is_dir() else None))
        self.queues: list[Any] = [self.new_queue() for _ in range(self.COUNT)]
        self.tasks: dict[str, Expected] = {}
        self.claims: dict[str, list[FemtoTask]] = {}  # every delivery there ever was
        self.last_push = ""
        self.offset_us = int(self.clock.wall * 1e6) - int(self.clock.boot * 1e6)
        self.last_us = 0  # the stamp of the last push
        self.new_places = itertools.count(1)
        self.behind: set[int] = set()  # objects that may hold a listing without what came back since
        self.company = False  # does it look as if other machines were at work?
        figure("model", runs=1)

    def teardown(self) -> None:
        """What was not finished is delivered once more, in order."""
        try:
            self.clock.advance(10**6)
            while task := self.pop_one(0, at_once=False):
                self.queues[0].done(task)
                self.tasks[task.id].state = "done"
            assert not self.in_state("pending", "in_progress", "scheduled")
            assert all(self.queues[0].status(id) is None for id in self.in_state("gone"))
        finally:
            self.queues.clear()
            self.patch.undo()
            shutil.rmtree(self.directory)

    def new_queue(self) -> FemtoQueue:
        return FemtoQueue(self.directory, "a", self.LEASE_S * 1_000)

    def queue_us(self) -> int:
        """The queue clock, which goes on as the clock since boot does."""
        return max(int(self.clock.boot * 1e6) + self.offset_us, self.last_us)

    def in_state(self, *states: str) -> list[str]:
        """The ids in these states, in their order."""

        def order(id: str) -> tuple[tuple[int, int], str]:
            task = self.tasks[id]
            places = {"pending": task.place, "scheduled": (task.due_us, 0)}
            return places.get(task.state, (0, 0)), id

        return sorted((id for id, task in self.tasks.items() if task.state in states), key=order)

    def make_pending(self, id: str, by: int, is_new: bool = False) -> None:
        """At the place of its id, or behind all others. The object that did it knows of it at once."""
        task = self.tasks[id]
        task.state, task.place = "pending", (int(id[:16]), 0)
        if is_new or task.place[0] > self.queue_us():
            task.place = self.queue_us(), next(self.new_places)
        self.behind |= {*range(self.COUNT)} - {by}

    def comes_back(self, id: str) -> bool:
        """Does a pop that looks make this one pending?"""
        task = self.tasks[id]
        if task.state == "scheduled":
            return task.due_us <= int(self.clock.wall * 1e6)
        gone = task.owner is None or task.deadline_s < self.clock.boot
        return task.state == "in_progress" and gone

    @initialize()
    def begin(self) -> None:
        self.push(0, [10] * 6)
        self.pop([0, 1, 2, 0], at_once=True)

    numbers = st.integers(0, COUNT - 1)
    choice = st.randoms(use_true_random=False)
    verdicts = (*(("done",), ("touch",), ("retry",)) * 2, ("fail", None), ("fail", "why"))
    verdicts += (("retry", 1), ("retry", 5_000), ("retry", 4_000_000))

    @rule(number=numbers, sizes=st.lists(st.sampled_from([0, 10, 70_000]), min_size=1, max_size=4))
    def push(self, number: int, sizes: list[int]) -> None:
        for size in sizes:
            payload = b"%d " % len(self.tasks) + b"x" * size
            id = self.queues[number].push(payload)
            assert id > self.last_push, "not in the order of the pushes"
            self.last_push, self.last_us = id, int(id[:16])
            self.tasks[id] = Expected(payload, "pending", place=(self.last_us, 0))

    @rule(number=numbers, delay_s=st.sampled_from([-5, 0, 0.5, 20, 20, 900, 90_000]))
    def schedule(self, number: int, delay_s: float) -> None:
        payload = b"%d" % len(self.tasks)
        # No stamp of the queue clock can meet it: those have full milliseconds.
        due_us = int((self.clock.wall + delay_s) * 1e3) * 1_000 + 500
        id = self.queues[number].schedule(payload, due_us)
        assert id not in self.tasks
        self.tasks[id] = Expected(payload, "scheduled", due_us=due_us)

    @rule(numbers=st.lists(numbers, min_size=1, max_size=4), at_once=st.booleans())
    def pop(self, numbers: list[int], at_once: bool) -> None:
        for number in numbers:
            self.pop_one(number, at_once)

    def pop_one(self, number: int, at_once: bool) -> FemtoTask | None:
        looks = not at_once or any(map(self.comes_back, self.tasks))
        # One that does not may go on with the listing in its hand, and others have that, too.
        exact = looks or not (self.company or number in self.behind)
        if looks:
            self.behind.discard(number)
            self.clock.advance(1.1)  # from then on a pop looks for what is to come back
            back = [id for id in self.in_state("in_progress", "scheduled") if self.comes_back(id)]
            for id in sorted(back, key=lambda id: (self.tasks[id].due_us, id)):
                self.make_pending(id, number, self.tasks[id].state == "scheduled")
        task = self.queues[number].pop()
        pending = self.in_state("pending")
        assert (task and task.id) in ((pending[:1] if exact else pending) or [None]), "not the oldest"
        if task:
            expected = self.tasks[task.id]
            expected.state, expected.owner, expected.due_us = "in_progress", number, 0
            expected.used += 1
            expected.deadline_s = self.clock.boot + self.LEASE_S
            assert (task.data, task.attempt) == (expected.payload, expected.used)
            self.claims.setdefault(task.id, []).append(task)
            figure("model", deliveries=1)
        return task

    @staticmethod
    def mostly(choice: random.Random, wanted: list[str], others: Iterable[str]) -> str:
        return choice.choice(wanted if wanted and choice.random() < 0.7 else sorted(others))

    @precondition(lambda self: self.claims)
    @rule(choice=choice, calls=st.lists(st.sampled_from(verdicts), min_size=1, max_size=3))
    def finish(self, choice: random.Random, calls: list[tuple[Any, ...]]) -> None:
        """Call a queue with some delivery, whose claim is valid or not."""
        for name, *arguments in calls:
            held = [id for id in self.in_state("in_progress") if id in self.claims]
            id = self.mostly(choice, held, self.claims)
            claim, task = choice.choice(self.claims[id][-2:]), self.tasks[id]
            valid = task.state == "in_progress" and claim.attempt == task.used
            others = range(self.COUNT)
            owners = [task.owner] if task.owner in others and choice.random() < 0.7 else others
            number = choice.choice(owners)
            # A retry that had the same effect may be one whose answer was lost.
            done = (name, task.state, task.used) == ("retry", "pending", claim.attempt)
            try:  # not pytest.raises, which keeps the error, and so the queue object alive
                getattr(self.queues[number], name)(claim, *arguments)
                assert valid or done, f"{name} of a lost claim"
            except NotInProgress:
                assert not valid
            if not valid:
                continue
            if name == "touch":
                task.deadline_s = self.clock.boot + self.LEASE_S
            elif name == "retry" and arguments:
                task.state = "scheduled"
                task.due_us = int(self.clock.wall * 1e6) + arguments[0] * 1_000
            elif name == "retry":
                self.make_pending(id, number)
            else:
                task.state = {"done": "done", "fail": "failed"}[name]
                task.reason = arguments[0] if arguments else None

    @precondition(lambda self: self.tasks)
    @rule(choice=choice, number=numbers)
    def cancel(self, choice: random.Random, number: int) -> None:
        id = self.mostly(choice, self.in_state("pending", "scheduled"), self.tasks)
        waiting = self.tasks[id].state in ("pending", "scheduled")
        assert self.queues[number].cancel(id) == waiting
        if waiting:
            self.tasks[id].state = "gone"

    @precondition(lambda self: self.tasks)
    @rule(choice=choice, number=numbers)
    def requeue(self, choice: random.Random, number: int) -> None:
        id = self.mostly(choice, self.in_state("done", "failed", "scheduled"), self.tasks)
        task = self.tasks[id]
        assert self.queues[number].requeue(id) == (task.state in ("done", "failed", "scheduled"))
        if task.state in ("done", "failed"):
            task.used, task.reason = 0, None
            self.claims.pop(id, None)  # its attempts are counted anew
            self.make_pending(id, number)
        elif task.state == "scheduled":
            self.make_pending(id, number, is_new=True)

    @rule(number=numbers, state=st.sampled_from([*STATES[:2], *STATES[3:]]))
    def purge(self, number: int, state: str) -> None:
        found, wall = self.in_state(state), self.clock.wall
        self.clock.wall = 1e10  # file times are not ours to patch
        assert self.queues[number].purge(state, 0) == len(found)
        self.clock.wall = wall
        for id in found:
            self.tasks[id].state = "gone"

    @rule(number=numbers, how=st.sampled_from(["dropped", "closed", "elsewhere"]))
    def crash(self, number: int, how: str) -> None:
        """An object that holds a claim goes, as if it had been on another machine perhaps."""
        owners = {task.owner for task in self.tasks.values() if task.state == "in_progress"}
        number = min(owners.intersection(range(self.COUNT)), default=number)
        held = [id for id in self.in_state("in_progress") if self.tasks[id].owner == number]
        if how == "closed":
            self.queues[number].close()
        for was in {Path(self.claims[id][-1].path).parent for id in held if how == "elsewhere"}:
            _, pid, start, _, token = was.name.split("~")
            was.rename(was.with_name(f"b~{pid}~{start}~elsewhere~{token}"))
        for id in held:
            self.tasks[id].owner = self.COUNT if how == "elsewhere" else None
            if how == "closed":
                self.make_pending(id, by=self.COUNT)
            elif how == "elsewhere":
                self.claims.pop(id)  # nobody is there who could finish it
        self.company |= how == "elsewhere"
        self.queues[number] = None
        self.queues[number] = self.new_queue()

    @rule(seconds=st.sampled_from([0.3, 8, 31, 3_000, 100_000]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(seconds=st.sampled_from([-3_000, -1, 0.001, 50, 100_000, 100_000]))
    def set_wall_clock(self, seconds: float) -> None:
        self.clock.step_wall(seconds)

    @invariant()
    def states_are_as_expected(self) -> None:
        queue = self.queues[len(self.tasks) % self.COUNT]
        counts = collections.Counter(task.state for task in self.tasks.values())
        assert queue.counts() == {state: counts[state] for state in STATES}
        for id, task in self.tasks.items():
            assert task.state == "gone" or queue.status(id) == task.state
            assert queue.reason(id) == (task.reason if task.state == "failed" else None)
        for state in STATES:
            assert list(queue.ids(state)) == self.in_state(state)
        figure("model", steps=1)


TestModel = Model.TestCase
TestModel.settings = settings(
    TestModel.settings, max_examples=80, stateful_step_count=40, derandomize=True
)


# --- 4: a crash at any instruction --------------------------------------------------------------------


@durable_or_not
@pytest.mark.parametrize("name", CASES)
def test_killed_before_every_filesystem_call(
    name: str, durable: bool, scratch: Path, clock: Time
) -> None:
    """A crash at any instruction loses nothing, breaks nothing, shows nothing twice, leaves nothing."""
    case = CASES[name]
    for at in itertools.count(1):
        directory = scratch / str(at)

        def work(at: int = at, directory: Path = directory) -> None:
            stage = Stage(case, directory, durable, clock)
            with Steps(at, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)):
                stage.act()

        status, error = in_child(work)
        returned = status == 0
        assert returned or os.WTERMSIG(status) == signal.SIGKILL, error
        case.check_source(directory, returned)
        audit(directory, clock, case.allowed(returned))
        case.clear(directory)
        if returned:
            break
    figure("killed at every step", calls=1, kill_points=at - 1)


def test_what_a_live_writer_writes_is_not_swept(directory: Path, now: Time) -> None:
    """A half-written file goes when its writer is dead, and only then; of another host, in a day."""
    queue = FemtoQueue(directory, "a")
    put(directory / "creating" / "of somebody else")
    elsewhere = put(directory / "creating" / f"{DEAD_OWNER}~{OLD_ID[:-9]}")
    os.utime(elsewhere, (0, 0))  # on NFSv3, what is made with O_EXCL has any mtime at first

    def sweep_first(name: str, *paths: str, **options: Any) -> Any:
        if name == "rename" and "/creating/" in paths[0]:
            assert FemtoQueue(directory, "b").pop() is None
        return REAL[name](*paths, **options)

    with Steps(1, sweep_first, once=False):
        queue.push(b"x")
    assert drained(queue) == [b"x"] and elsewhere.exists()
    now.advance(90_000)
    assert queue.pop() is None and names(directory, "creating") == ["of somebody else"]


# --- 1 and 2: claims that are lost --------------------------------------------------------------------


def taken_elsewhere(path: Path) -> str:
    """Another host claims this task: what becomes of it."""
    id, used, *_ = [*path.name.split("~"), "0"]
    root = next(above.parent for above in path.parents if above.name in STATES)
    target = root / "in_progress" / "b~1~1~elsewhere~0" / f"{id}~{int(used) + 1}~{NOW_US}"
    target.parent.mkdir(exist_ok=True)
    REAL["rename"](path, target)
    return f"{int(used) + 2}"


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("call", ["done", "fail", "retry", "touch"])
def test_a_claim_that_another_host_took_is_lost(
    directory: Path, clock: Time, call: str, keep: bool
) -> None:
    """Success is never reported while another has the task, though the lease runs by this clock."""
    queue = FemtoQueue(directory, "a", keep_done=keep, keep_failed=keep)
    queue.push(b"x")
    task = queue.pop()
    taken_elsewhere(Path(task.path))
    with pytest.raises(NotInProgress):
        getattr(queue, call)(task)
    assert task.lost and look(directory) == {b"x": ["3"]}


@pytest.mark.parametrize("taken", [False, True], ids=["still there", "taken by another"])
def test_a_claim_whose_lease_is_over_is_not_handed_out(
    clock: Time, queue: FemtoQueue, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """A claim that was granted while the process hung is renewed, or it is none."""
    other = FemtoQueue(queue.data_dir, "other", 30_000)
    late: list[FemtoTask | None] = []

    def slowly(source: str, target: str) -> None:
        REAL["rename"](source, target)
        if "in_progress/" in target and not late:
            clock.advance(40)
            late.append(None)
            late.append(other.pop() if taken else None)

    monkeypatch.setattr(os, "rename", slowly)
    found = [task and task.data for task in (queue.pop(), queue.pop(), other.pop())]
    assert found == ([b"b", None, None] if taken else [b"a", b"b", None])


# --- 5: a power cut -----------------------------------------------------------------------------------


class Disk:
    """Records what a workload does to the filesystem below `base`, to replay it up to a power cut.

    Certain is what was fsynced: a file's content, a directory's entries. Any other change of a
    directory may have reached the disk or not, each for itself; a rename happens as a whole. What lies
    in a directory whose own entry is not there is lost with it.
    """

    def __init__(self, base: Path) -> None:
        self.base = str(base)
        # What was done ("write", "fsync" or "change"), and what to: a file's number, or a directory's
        # path. Then the content; or a change's old and new path, and the earlier changes it needs.
        self.log: list[tuple[Any, ...]] = []
        self.there: dict[str, Any] = {self.base: self.base}
        self.content: dict[int, bytes] = {}
        self.open: dict[int, Any] = {}

    def note(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Stands in for a filesystem call: makes it, and if it worked, records it."""
        result = REAL[name](*args, **kwargs)
        first = args[0] if isinstance(args[0], int) else os.fspath(args[0])
        if name == "open" and first.startswith(self.base):
            if first not in self.there:
                self.content[len(self.log)] = b""
                self.change("", first, len(self.log))
            self.open[result] = self.there[first]
        elif name == "close":
            self.open.pop(first, None)
        elif name in ("write", "fsync") and first in self.open:
            node = self.open[first]
            if name == "write":
                self.content[node] += bytes(args[1][:result])
            self.log.append((name, node, self.content.get(node)))
        elif name == "mkdir":
            self.change("", first, first)
        elif name == "link":
            self.change("", os.fspath(args[1]), self.there[first])
        elif name in ("unlink", "rmdir", "rename"):
            self.change(first, os.fspath(args[1]) if name == "rename" else "", self.there.pop(first))
        return result

    def change(self, old: str, new: str, node: Any) -> None:
        """An entry has one history; a directory that is removed was emptied before."""
        changes = [(i, {*done[2:4]}) for i, done in enumerate(self.log) if done[0] == "change"]
        names = {old, new} - {""}
        needs = {i for i, paths in changes if names & {*paths, *map(os.path.dirname, paths)}}
        if new:
            self.there[new] = node
        self.log.append(("change", node, old, new, needs))

    def uncertain(self, end: int) -> list[int]:
        """The changes among the first `end` operations that no fsync made certain."""
        synced, needed, found = set(), set(), []  # `needed` by what is certain
        for i in reversed(range(end)):
            what, node, *paths = self.log[i]
            if what == "fsync":
                synced.add(node)
            elif what == "change" and (i in needed or synced & {*map(os.path.dirname, paths[:2])}):
                needed |= paths[2]
            elif what == "change":
                found.append(i)
        return found

    def image(self, end: int, missing: set[int], torn: bool, half: bool) -> dict[str, bytes]:
        """The files on disk after `end` operations and a cut; those `missing` never got there.

        `torn`: what was written but not synced is not there either. `half`: as on btrfs, a file whose
        newest directory alone was synced after its renames has its old names too.
        """
        missing, tree, renames = {*missing}, {self.base: self.base}, []
        synced_at, content, latest = {}, {}, {}
        for i, (what, node, *more) in enumerate(self.log[:end]):
            if what == "fsync":
                synced_at[node] = i
            if what == "fsync" or (what == "write" and not torn):
                content[node] = more[0]
            if what != "change" or i in missing or missing & more[2]:
                missing |= {i} if what == "change" else set()  # with what it needs
                continue
            tree.pop(more[0], None)
            if more[1]:
                tree[more[1]], latest[node] = node, (i, more[1])
            if all(more[:2]):
                renames.append((i, more[0], node))
        for i, old, node in renames if half else ():
            at, path = latest[node]  # perhaps it was renamed again since
            certain = tree.get(path) == node and at < synced_at.get(os.path.dirname(path), -1)
            if certain and synced_at.get(os.path.dirname(old), -1) < i:
                tree[old] = node
        found = {}
        for path in sorted(tree):  # a directory before what is in it
            if path == self.base or os.path.dirname(path) in found:
                found[path] = tree[path]
        return {path: content.get(node, b"") for path, node in found.items() if node != path}


CUTS = {name: case for name, case in CASES.items() if not re.search("broken|elsewhere|ahead", name)} | {
    "pop_and_done": Case("first=1>done", "q.done(q.pop())"),
    "pop_and_done_elsewhere": Case(
        "first=1>done", "s.open().done(pickle.loads(pickle.dumps(q.pop())))"
    ),
    "pop_and_retry": Case("", "q.retry(q.pop())"),
    "pop_from_the_dead_and_done": Case("claimed=2>done", "q.done(q.pop())", "s.drop(), s.reopen()"),
    "pop_from_the_hung_and_done": Case("first=1>done", "q.done(q.pop())", "s.hang()"),
    "push_after_another_moved_what_fell_due": Case(
        *("first=1>2 later=later1>1 new=gone>1", "s.open().push(b'new')"),
        "s.clock.advance(3_700), s.pop_first()",
    ),
    "done_of_one_that_fell_due": Case(
        *("first=1>done second=1>done later=later1>done", "[q.done(q.pop()) for _ in range(3)]"),
        "s.clock.advance(3_700)",
    ),
    "done_out_of_two_buckets": Case(
        "first=1>done second=1>done", "[q.done(task) for task in [q.pop(), q.pop()][::-1]]"
    ),
}


@pytest.mark.parametrize("half", [False, True], ids=["whole renames", "half renames"])
@pytest.mark.parametrize("name", CUTS)
def test_power_cut_after_every_operation(
    name: str, half: bool, scratch: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sync_after_write, what returned survives a power cut at any point, `done` included."""
    monkeypatch.setattr(femtoqueue, "_BUCKET_TASKS", 2)
    case, disk, place = CUTS[name], Disk(scratch), scratch / "nested/twice/queue"
    with Steps(1, disk.note, once=False):
        stage = Stage(case, place, True, clock)
        begin = len(disk.log)
        stage.act()
    stage.drop()
    images, top, chance = 0, f"{place}/", random.Random(5)
    for end in range(begin, len(disk.log) + 1):
        returned = end == len(disk.log)
        # What is waiting, or claimed, need not be certain.
        possible = {data: f | LIVE if f & LIVE else f for data, f in case.allowed(returned).items()}
        uncertain = {*disk.uncertain(end)}
        choices = [uncertain, set(), *({i for i in uncertain if chance.random() < 0.5} for _ in "12")]
        for one in uncertain:
            choices += [{one}, uncertain - {one}]
        for missing in choices:
            images += 1
            image = disk.image(end, missing, images % 2 == 0, half)
            image = {path[len(top) :]: data for path, data in image.items() if path.startswith(top)}
            found = fates_in(image)
            for payload in {*found, *possible}:
                fates = found.get(payload, ["gone"])
                assert {*fates} <= possible.get(payload, set()), f"{payload!r} is {fates}"
                assert len(fates) == 1 or (half and not returned), f"{payload!r} is visible twice"
            shared = [data for path, data in image.items() if path.startswith(("clock-", "layout"))]
            assert all(data.endswith(b"\n") for data in shared), "a broken clock or version"
            assert len(shared) >= (returned if "alone" in case.words else 2)
            if images % 20 == 0 and not (half and not returned):  # work on it
                for path, content in image.items():
                    put(scratch / f"cut {images}" / path, content)
                audit(scratch / f"cut {images}", clock, possible)
                shutil.rmtree(scratch / f"cut {images}")
    figure("power cuts", calls=1, operations=len(disk.log), images=images)


# --- 6: a payload that does not match its checksum ----------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 20) + 1])
def test_broken_payload(directory: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    """A payload that does not match its checksum goes to corrupt/ and the log; the queue goes on."""
    queue = FemtoQueue(directory, "a")
    id = queue.push(b"x" * size)
    put(directory / "pending" / where(directory, "pending"), b"y" + b"x" * (size - 1))
    queue.push(b"next")
    assert drained(queue) == [b"next"] and id in caplog.text
    assert queue.status(id) == "corrupt" and names(directory, "corrupt") == [id]


# --- 7: a call that raises ----------------------------------------------------------------------------

ERRORS = ("ENOSPC", "EIO", "EMFILE", "EACCES", "ESTALE")
CHANGES = ("rename", "link", "unlink", "mkdir", "rmdir")


def faults_of(name: str, at: int, step: str, durable: bool) -> Iterator[tuple[str, str]]:
    """How this step of a case may fail: the error, and how far the call was made."""
    errors = {"EIO", "ESTALE", ERRORS[at % 5]} if durable else ERRORS  # where it fails differs, not how
    yield from ((error, "instead") for error in errors)
    yield "EIO", "from there on"
    if step in (*CHANGES, "fsync", "write", "scandir"):
        yield from ((error, "after") for error in errors)
    if step in CHANGES and name != "run":  # pop and done
        # A network repeats a request, or breaks off; and another host may be quicker than we are.
        repeated = "EEXIST" if step in ("mkdir", "link") else "ENOENT"
        yield from ((error, "after") for error in (repeated, "ENOTCONN"))
        if step == "rename":
            yield repeated, "after, and taken"
    if step == "rename" and name.startswith(("push", "schedule")) and "move" not in name:
        yield "ENOENT", "deleted"


class Fault:
    """Stands in for a filesystem call that fails."""

    def __init__(self, error: str, how: str) -> None:
        self.code, self.how = getattr(errno, error), how
        self.taken: dict[bytes, set[str]] = {}  # by another host, and what becomes of it

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "close":
            REAL[name](*args)  # the descriptor is gone, whatever it answers
        elif self.how == "deleted":
            REAL["unlink"](args[0])
        elif "after" in self.how and name == "write":
            REAL[name](args[0], args[1][: len(args[1]) // 2])
        elif "after" in self.how and name == "scandir":
            return contextlib.closing(self.half_listing(args[0]))
        elif "after" in self.how:
            REAL[name](*args, **kwargs)
        if "taken" in self.how and re.search("/(pending|done|failed)/", args[1]):
            payload = Path(args[1]).read_bytes()
            self.taken[payload] = {taken_elsewhere(Path(args[1]))}
        # As the system does: of a descriptor it names no path. In no variable: with its traceback,
        # that would be a cycle that keeps the queue object alive.
        other = (None, args[1]) if name in ("rename", "link") else ()
        path = None if isinstance(args[0], int) else os.fspath(args[0])
        raise OSError(self.code, os.strerror(self.code), path, *other)

    def half_listing(self, directory: str) -> Iterator[os.DirEntry[str]]:
        with REAL["scandir"](directory) as entries:
            yield from itertools.islice(entries, 1)
        raise OSError(self.code, os.strerror(self.code), directory)


def check_fault(stage: Stage, name: str, at: int, step: str, error: str, how: str) -> None:
    """Make a case's call with a fault, and if it raised once more without."""
    case, fault, lasts, is_pop = stage.case, Fault(error, how), "on" in how, name.startswith("pop")
    answers, descriptors = step in CHANGES and "after" in how, len(os.listdir("/proc/self/fd"))
    raised: list[Any] = []  # not the error: with its traceback, it keeps the queue object alive
    with Steps(at, fault, once=not lasts) as steps:
        try:
            stage.act()
        except OSError as problem:
            raised.append(problem.filename)
        except NotInProgress:  # that another process was quicker looks just the same
            assert fault.taken or (answers and "another" in name)
    assert steps.met == step, f"it took other steps, {steps.met}"
    if raised and step != "close" and not lasts:
        assert os.path.isabs(raised[0] or ""), "an error that tells no path"
    if answers and error in ("ESTALE", "EEXIST", "ENOENT"):
        assert not raised or step == "mkdir", "it was done, the answer was lost, and it raised"
    popped = stage.results[-1] if is_pop and not raised and not lasts else None
    # Of a claim whose answer was lost, only a later look can tell whether it was made.
    unknown = not raised and step == "rename" and error in ("ESTALE", "ENOENT", "ENOTCONN")
    loose, there = is_pop and (lasts or unknown), look(stage.directory)
    stage.pushed = sum(item in there or item in fault.taken for item in NEW)
    assert {*NEW[: stage.pushed]} <= {*there, *fault.taken}, "not the first ones of push_many"
    if not lasts and not fault.taken:
        assert not (raised and stage.durable and stage.pushed), "a durable push_many was not undone"
        allowed = case.allowed(not raised, popped, loose, undone=bool(raised))
        for payload, fates in there.items():
            assert len(fates) == 1 and {*fates} <= allowed[payload], f"{payload!r} is {fates}"
        if raised:
            case.check_source(stage.directory, returned=False, error=True)
            drafts = {path.name for path in stage.directory.glob("creating/*_*")}
            assert step == "unlink" or not drafts, "a draft was left, and the disk stays full"
    # What stays broken may not be withdrawn: made again, it would be there twice.
    adds = lasts and "gone" in {fates[0] for fates in case.fates.values()}
    if raised and not adds and (stage.source.exists() or "push_file" not in name):
        with contextlib.suppress(*[NotInProgress] * bool(fault.taken)):
            stage.act()
    assert len(os.listdir("/proc/self/fd")) == descriptors, "a file was left open"
    excused = fault.taken or lasts or (raised and step != "fsync")
    excused = excused or (name.startswith("cancel") and (raised or answers))
    if not excused and (name, error) != ("looking", "EACCES"):  # what it may not read, it leaves out
        assert all(stage.results), "it said that there is nothing"
    stage.drop()
    allowed = case.allowed(not (raised and adds), popped, loose)
    audit(stage.directory, stage.clock, allowed | fault.taken)


@durable_or_not
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("unlogged")
def test_failing_at_every_filesystem_call(name: str, durable: bool, scratch: Path, clock: Time) -> None:
    """A call raises OSError, with a path, or succeeds, never in between; made again, it works.

    Whether the call failed, or stays broken, or was made, in part or as a whole, and its answer was lost.
    """
    case, wrong = CASES[name], []
    steps = calls_of(Stage(case, scratch / "0", durable, clock).act)
    case.clear(scratch / "0")
    faults = [(*at, *how) for at in enumerate(steps, 1) for how in faults_of(name, *at, durable)]
    for fault in faults:
        directory = scratch / " ".join(map(str, fault))
        try:
            check_fault(Stage(case, directory, durable, clock), name, *fault)
        except Exception as problem:
            wrong.append(f"{directory.name}: {type(problem).__name__}: {problem}".partition("\n")[0])
        case.clear(directory)
    assert not wrong, "\n".join([f"{len(wrong)} of {len(faults)} faults:", *wrong])
    figure("failing at every step", calls=1, faults=len(faults))


@pytest.mark.parametrize(
    ("place", "what", "code"),
    [
        *(("pending", "move", errno.EACCES), ("pending", "open", errno.EIO)),
        *(("bucket", "list", errno.EACCES), ("owner", "list", errno.EACCES)),
        *(("due", "move", errno.EPERM), ("claim", "move", errno.EACCES)),
    ],
)
def test_a_task_that_cannot_be_had_holds_up_no_other(
    directory: Path, clock: Time, refuse: Refusal, caplog: Any, place: str, what: str, code: int
) -> None:
    """It is passed over, and logged and tried once a minute; pop and run raise if nothing else is there."""
    queue, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "other")
    id = queue.schedule(b"stuck", NOW_US + 10**6) if place == "due" else queue.push(b"stuck")
    was_claimed = place in ("claim", "owner") and other.pop() is not None
    del other  # its claim is abandoned
    clock.advance(2_000)  # whatever comes now is in another bucket
    [path] = directory.rglob(f"{id}*")
    part = path.parent.name if place in ("bucket", "owner") else id
    refuse(what, part, code)
    for minute in range(1, 4):
        end_s = clock.boot + 60.5
        while clock.boot < end_s:
            queue.push(b"other")
            assert drained_one(queue) == b"other"
            clock.advance(0.6)
        assert minute <= len(caplog.messages) <= minute + 1 and refuse.count < 10 * minute + 10
    assert all(part in message for message in caplog.messages)
    queue.push(b"other")
    for call in (lambda: queue.run(lambda task: None, until_empty=True), queue.pop):
        with pytest.raises(OSError) as caught:
            call()
        assert (caught.value.errno, part in caught.value.filename) == (code, True)
    assert path.read_bytes() == b"stuck"
    refuse.rules.clear()
    queue.push(b"other")
    clock.advance(65)
    found = {task.data: task.attempt for task in iter(queue.pop, None)}
    assert found == {b"other": 1, b"stuck": 1 + was_claimed}


@pytest.mark.parametrize("place", ["pending", "scheduled", "in_progress"])
def test_a_fault_of_the_whole_filesystem_is_no_tasks_fault(
    directory: Path, clock: Time, refuse: Refusal, place: str
) -> None:
    """A full disk costs a pop a few calls, whatever waits; then, order is exact."""
    queue = FemtoQueue(directory, "a")
    folder = directory / place / (DEAD_OWNER if place == "in_progress" else "1700000000000000")
    ids = [f"17000000000000{number:02d}_x" for number in range(50)]
    for id in ids:
        put(folder / (id if place == "pending" else f"{id}~0~{id[:16]}"), id.encode())
    refuse("move", str(folder), errno.ENOSPC)
    for at in range(1, 4):
        with pytest.raises(OSError, match="No space left"):
            queue.pop()
        assert refuse.count < 15 * at
    refuse.rules.clear()
    assert drained(queue) == [id.encode() for id in ids]


@pytest.mark.parametrize("place", ["due", "claim", "broken"])
def test_a_full_disk_stops_no_task_that_needs_no_room(directory: Path, clock: Time, place: str) -> None:
    """When no directory can be made any more, tasks that need none are delivered all the same."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"0")
    assert drained_one(queue) == b"0"
    if place == "broken":
        put(directory / "pending" / OLD_ID, b"not its payload")
        (directory / "corrupt").rmdir()
    else:
        folder = f"in_progress/{DEAD_OWNER}" if place == "claim" else f"scheduled/{NOW_US - 10**9}"
        put(directory / folder / f"{NOW_US - HOUR_US}_stuck~1~{NOW_US - 1}", b"stuck")
    queue.push_many([b"1", b"2", b"3"])
    clock.advance(1.5)

    def full(name: str, *args: Any, **options: Any) -> Any:
        if name == "mkdir" and not os.path.isdir(args[0]):
            raise OSError(errno.ENOSPC, "full", args[0])
        return REAL[name](*args, **options)

    with Steps(1, full, once=False):
        assert [drained_one(queue) for _ in "123"] == [b"1", b"2", b"3"]
    clock.advance(200)
    assert drained(queue) == ([] if place == "broken" else [b"stuck"])
    assert names(directory, "corrupt") == ([OLD_ID] if place == "broken" else [])


def test_a_worker_that_stays_outlives_what_cannot_be_had(
    directory: Path, clock: Time, refuse: Refusal, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """`run` stays beside a task that it may not read, and says so once a minute; not for an alarm."""
    queue, end_s = FemtoQueue(directory, "a"), clock.boot + 90
    stuck = queue.push(b"stuck")
    refuse("open", stuck, errno.EACCES)
    handled, alarm = [], iter([TimeoutError])  # as from a signal handler: no error of the filesystem

    def sleep(seconds: float) -> None:
        clock.advance(seconds)
        if clock.boot > end_s:
            refuse.rules.clear()
        if handled:
            raise next(alarm)

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(TimeoutError):
        queue.run(handled.append)
    assert [task.id for task in handled] == [stuck]
    told = [message for message in caplog.messages if "the worker stays:" in message]
    assert len(told) == 2 and len(caplog.messages) <= 5 and all(stuck in it for it in caplog.messages)


def test_pop_while_another_thread_is_at_work(scratch: Path, clock: Time, monkeypatch: Patch) -> None:
    """Another thread retries at any call of pop: never None while a task is there, and in order."""
    for at in itertools.count(2):
        queue = FemtoQueue(scratch / str(at), "node")
        queue.push(b"a")
        clock.advance(2_000)
        queue.push_many([b"b", b"c"])  # into another bucket
        held = queue.pop()
        clock.advance(2 * (at % 2))  # with a new listing, and with the one in hand
        others: list[concurrent.futures.Future[Any]] = []

        def work(queue: FemtoQueue = queue, held: Any = held, others: list[Any] = others) -> None:
            others.append(in_thread(queue.retry, held))
            concurrent.futures.wait(others, 0.3)  # in vain, if it waits for this thread

        with monkeypatch.context() as patch:
            met = meanwhile(patch, at // 2, work)
            found = queue.pop().data
        if met:
            assert others[0].result(10) is None
            assert drained(queue) == sorted({b"a", b"b", b"c"} - {found}), f"call {at // 2}, {met}"
        elif at % 2:
            break
    assert at > 10


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(["done", "fail", "retry"], 2)])
@pytest.mark.parametrize("keep", [True, False])
def test_another_verdict_after_one_that_raised(
    directory: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, first: str, second: str
) -> None:
    """A task that a call moved and could not sync is not another call's to finish, kept or deleted."""
    queue = FemtoQueue(directory, "a", sync_after_write=True, keep_done=keep, keep_failed=keep)
    queue.push(b"x")
    task, fails, synced = queue.pop(), [OSError(errno.EIO, "not synced")], []

    def fsync(descriptor: int) -> None:
        synced.append(synced_path(descriptor))
        if fails and not os.path.exists(task.path):
            raise fails.pop()
        REAL["fsync"](descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="not synced"):
        getattr(queue, first)(task)
    failed = synced.pop()
    synced.clear()
    for call, error in ((second, NotInProgress), (first, None), (first, NotInProgress)):
        with pytest.raises(error) if error else contextlib.nullcontext():
            getattr(queue, call)(task)
    assert failed in synced, "made again, it does not sync what it could not"
    kept = {"done": "done", "fail": "failed"} if keep else {}
    assert queue.status(task.id) == (kept | {"retry": "pending"}).get(first)


@needs_root
@pytest.mark.parametrize("clock_file", ["with", "without"])
def test_looking_takes_no_more_than_the_right_to_read(open_to_all: Path, clock_file: str) -> None:
    """status, counts and ids, and the commands status and list, work for who may only read."""
    _, _, ids = full_house(open_to_all)
    for path in open_to_all.glob("clock-*" if clock_file == "without" else "no such"):
        path.unlink()
    before, in_order = snapshot(open_to_all, times=True), [ids[state] for state in STATES]
    # The standard library may lie where nobody else can read it.
    looker = "import argparse, ctypes, datetime, json, locale, logging, select, shutil" + AS_NOBODY
    looker += """
queue = FemtoQueue(sys.argv[1], "reader")
assert [queue.status(id) for id in sys.argv[2:]] == list(STATES)
assert {state: len(list(queue.ids(state))) for state in STATES} == queue.counts()
for command in (["status"], *(["list", state] for state in STATES)):
    assert femtoqueue.main([sys.argv[1], *command]) == 0, command
"""
    assert run(looker, open_to_all, *in_order).splitlines()[-6:] == in_order
    assert snapshot(open_to_all, times=True) == before


# --- 8: many threads, and fork ------------------------------------------------------------------------


def test_threads(directory: Path) -> None:
    """One object may be used by many threads: nothing is delivered twice, nothing is lost."""
    queue = FemtoQueue(directory, "a", keep_done=False)
    found: list[tuple[str, bytes]] = []
    pushed: dict[str, bytes] = {}

    def work(number: int) -> None:
        for count in range(150):
            data = b"%d %d" % (number, count)
            pushed[queue.push(data)] = data
            for task in filter(None, [queue.pop() for _ in range(count % 3)]):
                found.append((task.id, task.data))
                queue.done(task)

    with contextlib.ExitStack() as stack:
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-5)
        for thread in [in_thread(work, number) for number in range(8)]:
            thread.result(60)
    found += [(task.id, task.data) for task in iter(queue.pop, None)]
    assert sorted(found) == sorted(pushed.items()) and len(found) == 1_200


def test_the_old_side_of_each_rename_is_synced_first(directory: Path, monkeypatch: Patch) -> None:
    """On btrfs, a file whose new name alone is certain comes back under the old one as well."""
    q, order = FemtoQueue(directory, "a", sync_after_write=True), []

    def fsync(descriptor: int) -> None:
        order.append(Path(synced_path(descriptor)).relative_to(directory).parts[0])
        REAL["fsync"](descriptor)

    q.push_many([b"x", b"y"])
    _, y = q.pop(), q.pop()
    monkeypatch.setattr(os, "fsync", fsync)
    q.done(y)
    assert order == ["pending", "in_progress", "done"]
    order.clear()
    q.close()  # which gives x back
    assert order == ["in_progress", "pending"]


@pytest.mark.parametrize("what", ["a way back", "a directory", "a done"])
def test_what_another_thread_syncs_is_waited_for(
    directory: Path, clock: Time, monkeypatch: Patch, what: str
) -> None:
    """A durable done, or a claim, does not stand before all it needs is on disk, whoever syncs that: what
    is renamed during a sync is synced once more."""
    queue = FemtoQueue(directory, "a", sync_after_write=True)
    queue.push_many([b"1", b"2", b"3"])
    work, task, end = queue.pop, None, "/in_progress"
    if what == "a done":
        work, task, end = functools.partial(queue.done, queue.pop()), queue.pop(), "/done"
    elif what == "a directory":
        drained_one(queue)
        next((directory / "in_progress").iterdir()).rmdir()
    else:
        drained(queue)
        for number in range(2):  # one for each thread
            put(
                directory / "in_progress" / DEAD_OWNER / f"170000000000000{number}_x~1~1700000000000000"
            )
        clock.advance(2)
        end = f"/{DEAD_OWNER}"
    begun, returned = threading.Event(), threading.Event()
    events: list[str] = []

    def sync_slowly(descriptor: int) -> None:
        if synced_path(descriptor).endswith(end):
            if not begun.is_set():
                begun.set()
                returned.wait(0.4)  # in vain, unless this thread returns too early
            events.append("synced")
        REAL["fsync"](descriptor)

    monkeypatch.setattr(os, "fsync", sync_slowly)
    other = in_thread(work)
    assert begun.wait(10)
    task = task or queue.pop()
    if what != "a directory":
        queue.done(task)
    events.append("returned")
    returned.set()
    other.result(10)
    assert events.count("synced") > (what == "a done") and events[-1] == "returned"


@pytest.mark.parametrize("inner", ["push", "pop"])
@pytest.mark.parametrize("outer", ["push", "pop", "looking pop", "done"])
@pytest.mark.usefixtures("no_hang")
def test_a_call_in_the_midst_of_another_one(scratch: Path, clock: Time, outer: str, inner: str) -> None:
    """A signal handler may push or pop at any line of another call: both are made."""
    for at in itertools.count(1, 3):
        queue = FemtoQueue(scratch / str(at), "a", LONG_MS, sync_after_write=True, maxsize=9)
        pushed = queue.push_many([b"0", b"1", b"2"])
        held = queue.pop()
        clock.advance({"looking pop": 2, "push": 2_000}.get(outer, 0))  # into a bucket to be made
        found: list[FemtoTask | None] = []
        calls: dict[str, Callable[[], object]] = {
            "push": lambda q=queue, pushed=pushed: pushed.append(q.push(b"3")),
            "pop": lambda q=queue, found=found: found.append(q.pop()),
            "done": lambda q=queue, held=held: q.done(held),
        }
        with Lines(at, calls[inner]) as lines:
            calls[outer.split()[-1]]()
        if lines.count < at:
            break
        assert len(pushed) - 3 + len(found) == 1 + (outer != "done"), "both were made"
        ids = {held.id, *(task.id for task in found if task)}
        assert len(ids) == 1 + len(found)
        assert drained(queue) == [b"01233"[n : n + 1] for n, id in enumerate(pushed) if id not in ids]
    assert at > 1


def child_of(work: Callable[[], object]) -> int:
    """The PID of a forked child that does `work`; its status is 0 if nothing was raised.

    C programs that embed Python know no fork hooks, and keep the GIL.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fork", ctypes.PyDLL(None).fork)
        return forked(lambda: (signal.alarm(20), work()))


def test_forked_children_make_ids_of_their_own(queue: FemtoQueue, clock: Time) -> None:
    """Which process an object is in is asked at each call: children share no id, however forked.

    Time stands still: all that tells the ids apart is who makes them.
    """

    def add() -> None:
        for _ in range(10):
            queue.schedule(b"x", NOW_US + HOUR_US), queue.push_many([b"x"]), queue.push(b"x")

    assert [os.waitpid(pid, 0)[1] for pid in [child_of(add) for _ in range(4)]] == [0] * 4
    assert counted(queue) == {"pending": 2 + 4 * 20, "scheduled": 40}


def test_close_and_the_claims_of_the_other(directory: Path, queue: FemtoQueue) -> None:
    """close, and the end of a process, give back its own claims, not those of parent or child."""
    other, go, held = FemtoQueue(directory, "other"), directory.with_name("go"), queue.pop()

    def close() -> None:
        assert queue.pop().data == b"b"
        queue.close()

    def hold() -> None:
        task = queue.pop()
        assert becomes(True, go.exists)
        queue.done(task)

    assert os.waitpid(child_of(close), 0)[1] == 0
    task = other.pop()
    assert (task.data, task.attempt) == (b"b", 2) and other.pop() is None
    other.retry(task)
    queue.done(held)
    pid = child_of(hold)
    assert becomes({"in_progress": 1}, lambda: other.counts("in_progress"))
    queue.close()
    assert other.pop() is None
    go.touch()
    assert os.waitpid(pid, 0)[1] == 0 and counted(other) == {"done": 2}


# --- 9: no thread, no signal handler, no open file ----------------------------------------------------


@durable_or_not
def test_no_thread_no_signal_handler_no_open_file(tmp_path: Path, durable: bool) -> None:
    """Only run, and a call that waits, has a thread, a signal handler or an open file; none stays."""

    def held() -> tuple[object, ...]:
        handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
        return os.listdir("/proc/self/task"), handlers, len(os.listdir("/proc/self/fd"))

    before = held()
    with FemtoQueue(tmp_path / "queue", "node", sync_after_write=durable) as q:
        ids = [q.push(b"1"), *q.push_many([b"2", bytes(2 << 20), b"4"])]
        ids += [q.push_file(put(tmp_path / "file"), move=True), q.schedule(b"6", 10**15)]
        for finish in (q.done, q.fail, q.retry, q.touch):
            task = q.pop(timeout=1)
            assert task and task.data and held() == before
            finish(task)
        assert q.pop() and q.pop() and q.requeue(ids[0]) and q.cancel(ids[0]) and q.purge("failed", 0)
        assert sum(q.counts().values()) == 4 and next(q.ids("in_progress"))
        # What watched for changes is closed by a thread, which ends within milliseconds.
        assert sum(bool(q.status(id)) for id in ids) == 4 and becomes(before, held)
        assert q.pop() and q.pop(timeout=0.02) is None and not q.join(timeout=0.02)
        assert becomes(before, held)
    assert becomes(before, held)


def test_run_leaves_no_thread_and_no_reference_behind(directory: Path, unlogged: None) -> None:
    """A heartbeat only while run is running; the last reference dropped, the object is gone at once."""
    q = FemtoQueue(directory, "node", max_attempts=1)
    q.push_many([b"1", b"0"])
    running, threads = [], threading.active_count()

    def handle(task: FemtoTask) -> float:
        running.append(threading.active_count())
        return 1 / int(task.data)

    assert q.run(handle, until_empty=True) == 1
    assert [*running, threading.active_count()] == [threads + 1, threads + 1, threads]
    gone = weakref.ref(q)
    gc.disable()
    try:
        del q
        assert gone() is None
    finally:
        gc.enable()


# --- 9: while a call waits ----------------------------------------------------------------------------


def before_waits(monkeypatch: Patch, first: Callable[[], object]) -> None:
    """`first` is called before each wait. Only events end one: the look once a second is put off."""
    real = select.poll

    def make() -> object:
        poll = real()

        def wait(ms: float) -> list[Any]:
            first()
            events = poll.poll(20_000 if ms > 500 else ms)
            assert events or ms <= 500, "nothing woke it"
            return events

        return types.SimpleNamespace(register=poll.register, poll=wait)

    monkeypatch.setattr(select, "poll", make)


def play_inotify(monkeypatch: Patch, sleep: Callable[[float], object]) -> None:
    """Wait with inotify, though the clock stands still unless `sleep` moves it."""
    poll = types.SimpleNamespace(
        register=lambda *_: None, poll=lambda ms: sleep(max(ms / 1e3, 1e-4)) or []
    )
    monkeypatch.setitem(sys.modules, "ctypes", ctypes)
    monkeypatch.setattr(select, "poll", lambda: poll)


@pytest.mark.parametrize("name", ["pop", "join", "run"])
@pytest.mark.parametrize("end", ["stop", "close", "a signal", "an exception", "a task"])
@pytest.mark.parametrize("means", ["inotify", "no ctypes", "no instance", "no watch"])
@pytest.mark.usefixtures("no_hang")
def test_what_ends_a_wait(directory: Path, monkeypatch: Patch, means: str, end: str, name: str) -> None:
    """A signal, stop, close or a task ends what waits, with inotify and wherever that cannot be had."""
    begun, over = threading.Event(), threading.Event()
    before_waits(monkeypatch, begun.set)
    if means == "no ctypes":
        monkeypatch.setitem(sys.modules, "ctypes", None)
    elif means != "inotify":
        init = ctypes.CDLL(None).inotify_init1 if means == "no watch" else lambda flags: -1
        library = types.SimpleNamespace(inotify_init1=init, inotify_add_watch=lambda *_: -1)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    if means != "inotify":
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: (begun.set(), sleep(seconds)))
    open_files = len(os.listdir("/proc/self/fd"))
    q, other = (FemtoQueue(directory, node_id) for node_id in ("node", "other"))
    urgent = FemtoQueue(f"{directory}-2", "node")
    other.push(b"held")
    held = other.pop()
    call, nothing = {
        "pop": (lambda: q.pop(timeout=None), None),
        "join": (q.join, False),
        "run": (lambda: urgent.run(lambda task: q.stop(), also=[q]), 0),
    }[name]

    def on_signal(number: int, frame: object) -> None:
        if end == "an exception" and not over.is_set():
            over.set()
            raise KeyboardInterrupt
        q.stop()

    def act() -> None:
        assert begun.wait(10)
        if end == "a task":
            other.done(held) if name == "join" else other.push(b"x")
        elif end in ("stop", "close"):
            getattr(q, end)()
        else:  # again, for it may come just before the system call, of which Python would not know
            while not over.wait(0.01):
                os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, on_signal)
    acting = in_thread(act)
    try:
        with pytest.raises(KeyboardInterrupt) if end == "an exception" else contextlib.nullcontext():
            result = call()
            assert bool(result) if end == "a task" else result == nothing
        over.set()
        acting.result(10)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert becomes(open_files, lambda: len(os.listdir("/proc/self/fd")))


# What may come while a call waits, through another object on the same directory.
COMES: dict[str, Callable[[FemtoQueue, FemtoTask], object]] = {
    "push": lambda q, task: q.push(b"x"),
    "due": lambda q, task: q.schedule(b"x", time.time_ns() // 1000),
    "retry": lambda q, task: q.retry(task),
    "new bucket": lambda q, task: put(Path(q.data_dir, "file")).rename(
        put(Path(q.data_dir, "pending", "1700000000000000", "odd")).with_name("1700000000000000_x")
    ),
}


@pytest.mark.parametrize("what", COMES)
def test_no_change_is_lost_between_looking_and_waiting(
    scratch: Path, monkeypatch: Patch, what: str
) -> None:
    """Watch, look, wait: what comes at any step of a call that waits is found, or it wakes; so it does
    behind what brought no task."""
    for at in itertools.count(1):
        queue, other = (FemtoQueue(scratch / str(at), node_id) for node_id in ("node", "other"))
        other.push(b"x")
        held = other.pop()
        if what != "retry":
            other.done(held)
        come = functools.partial(COMES[what], other, held)
        with monkeypatch.context() as patch:
            met = meanwhile(patch, at, come)
            stray = Path(queue.data_dir, "pending", ".no-task").touch
            firsts = iter([stray, lambda met=met, come=come: (met.append("poll"), come())])
            before_waits(patch, lambda met=met, firsts=firsts: met or next(firsts)())
            assert queue.pop(timeout=60).data == b"x"
        if met == ["poll"]:
            break
    assert at > 10


@pytest.mark.parametrize("means", ["inotify", "sleeping"])
def test_what_falls_due_wakes_at_its_time(
    directory: Path, clock: Time, monkeypatch: Patch, means: str
) -> None:
    """A task that falls due wakes at its time, not at the next look, if scheduled meanwhile, too."""
    q, other = FemtoQueue(directory, "node"), FemtoQueue(directory, "other")
    due_us = int(clock.wall * 1e6) + 2_345_678
    naps = itertools.count()

    def sleep(seconds: float) -> None:
        early = next(naps) == 2
        clock.advance(0.1 if early else seconds)
        if early:  # an event, or what is seen at the next nap
            other.schedule(b"x", due_us)

    other.schedule(b"later", due_us + 3_456_789)
    monkeypatch.setattr(time, "sleep", sleep)
    if means == "inotify":
        play_inotify(monkeypatch, sleep)
    for late_us in (0, 3_456_789):
        assert q.pop(60) and 0 <= clock.wall * 1e6 - due_us - late_us <= 10_000
    assert next(naps) < (30 if means == "inotify" else 900)


@pytest.mark.parametrize("means", ["inotify", "sleeping"])
def test_waiting_makes_few_calls(directory: Path, clock: Time, monkeypatch: Patch, means: str) -> None:
    """A call that waits looks once a second, and makes no more calls than that takes."""
    lay_out_busy_owners(directory, 40)
    queue = FemtoQueue(directory, "node")
    if means == "inotify":
        play_inotify(monkeypatch, clock.advance)
    for call in (queue.pop, queue.join)[: 1 + (means == "inotify")]:
        begun_s, listed = clock.boot, []
        calls = calls_of(functools.partial(call, timeout=60), listed)
        assert clock.boot - begun_s >= 60
        assert len(listed) <= 60 * 150
        assert len(calls) - len(listed) <= 60 * (20 if means == "inotify" else 1_000)


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_an_event_that_brings_no_task_costs_one_look(directory: Path, monkeypatch: Patch) -> None:
    """Who waits, and is woken for nothing, waits on: he does not look again and again."""
    queue, begun = FemtoQueue(directory, "a"), []
    stray = directory / "pending" / ".not-a-task"
    before_waits(monkeypatch, lambda: begun.append(0) if stray.exists() else stray.touch())
    assert queue.pop(timeout=0.3) is None and 1 <= len(begun) < 5


def test_waiting_without_inotify_forgets_what_is_gone(
    directory: Path, clock: Time, monkeypatch: Patch
) -> None:
    """Where change times must do, who waits looks at the directories that are there, however many were."""
    queue, counts = FemtoQueue(directory, "a"), [0]

    def sleep(seconds: float) -> None:
        clock.advance(seconds)
        for bucket in (directory / "pending").glob("1*"):
            shutil.rmtree(bucket)
        put(directory / "pending" / f"{10**15 + len(counts)}.01234567" / "kept")  # or pop removes it
        counts.append(steps.count)

    monkeypatch.setattr(time, "sleep", sleep)
    with Steps(0, never) as steps:
        assert queue.pop(timeout=3) is None
    assert len(counts) > 100 and counts[-1] - counts[-50] < 2 * (counts[50] - counts[1])


# --- 10: what does not grow ---------------------------------------------------------------------------


def lay_out_busy_owners(directory: Path, count: int) -> None:
    """So many workers of other machines, each with a claim within its lease."""
    for number in range(count):
        owner = f"host-{number}~4194305~1~elsewhere~{number}"
        put(directory / "in_progress" / owner / f"17000000000000{number:02d}_x~1~{NOW_US + HOUR_US}")


def fill(directory: Path, state: str, count: int, size: int = 1_000) -> None:
    """Lay out so many tasks, in buckets of `size` if the state has such."""
    for first in range(0, count, size):
        at_us = NOW_US - HOUR_US + first if state == "pending" else NOW_US + HOUR_US + first * 10**6
        top = directory / state / (f"{at_us}.{first:08x}" if state in ("pending", "scheduled") else "")
        top.mkdir(parents=True, exist_ok=True)
        for number in range(first, min(count, first + size)):
            id = f"{at_us + number - first}_node_{number:018x}.{zlib.crc32(b'x'):08x}"
            name = f"{id}~0~{at_us + number - first}" if state == "scheduled" else id
            (top / name).write_bytes(b"x")


@contextlib.contextmanager
def little_memory(limit: int) -> Iterator[None]:
    """The block takes less than so many bytes at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@durable_or_not
def test_system_calls_of_a_task_are_those_of_the_floor(
    directory: Path, clock: Time, durable: bool
) -> None:
    """Create, write, close, rename; rename, open, read, close; rename; durable, an fsync for each."""
    q = FemtoQueue(directory, "node", sync_after_write=durable)
    q.push_many([b"1", b"2", b"3", b"4"])
    q.done(q.pop())
    q.push(b"x")
    file, directory_sync = ["fsync"] * durable, ["open", "fsync", "close"] * durable
    push = ["open", "write", *file, "close", "rename", *directory_sync]
    assert calls_of(lambda: q.push(b"x" * 100)) == push
    tasks: list[FemtoTask] = []
    assert calls_of(lambda: tasks.append(q.pop())) == ["rename", "open", "read", "close"]
    assert calls_of(lambda: q.done(tasks[0])) == ["rename"] + 3 * directory_sync  # from, by way of, to
    calls = calls_of(lambda: q.push_many([b"x"] * 100))
    assert calls.count("rename") == 100 and calls.count("fsync") == 101 * durable


def test_a_backlog_costs_nothing(scratch: Path, clock: Time) -> None:
    """However many wait, the first pop reads one bucket in little memory, and a later one none.

    Nor does what is scheduled for later, or done.
    """
    firsts, listed = [], []
    for count in (2_000, 20_000):
        fill(scratch / str(count), "pending", count)
        for state in ("scheduled", "done", "failed"):
            fill(scratch / str(count), state, count // 10, 1 if state == "scheduled" else count)
        q = FemtoQueue(scratch / str(count), "node")
        q.push(b"")  # the clock is read
        clock.advance(1)
        with little_memory(2_000_000):
            firsts.append(calls_of(q.pop, listed))
        later = calls_of(lambda q=q: [q.pop() for _ in range(500)])
        assert later.count("scandir") == 0 and len(later) == 4 * 500
        clock.advance(1.1)
        calls_of(q.pop, listed)
    assert firsts[0] == firsts[1] and len(listed) < 40
    assert not {os.path.basename(path) for path in listed} & {"done", "failed", "corrupt"}


def test_a_drained_queue_costs_what_a_new_one_does(directory: Path, clock: Time) -> None:
    """Once the emptied buckets are gone, a look at the empty queue makes the calls of the first one.

    A hundred idle workers leave no directory behind for the others to list.
    """
    q, *others = idle = [FemtoQueue(directory, f"node-{n}", keep_done=False) for n in range(101)]

    def empty() -> list[str]:
        for queue in [*others, q]:
            drained_one(queue)
        drained(q)
        for _ in range(2):
            clock.advance(3)
            assert [queue.pop() for queue in idle] == [None] * 101
        assert os.listdir(directory / "in_progress") == []
        return calls_of(q.pop)

    q.push_many([b""] * 101)
    new = empty()
    q.push_many([b""] * 5_000)
    assert empty() == new and len(new) <= 16


def test_due_tasks_are_moved_a_thousand_at_a_time(directory: Path, clock: Time) -> None:
    """When very many fall due at once, one pop moves a thousand, the earliest; the next pop goes on."""
    q = FemtoQueue(directory, "node")
    due_us = int((clock.wall + 60) * 1e6)
    ids = [q.schedule(b"", due_us + (n * 7) % 2_500) for n in range(2_500)]
    clock.advance(120)
    found: list[str] = []
    calls = calls_of(lambda: found.append(q.pop().id))
    assert calls.count("rename") <= 1_000 + 1_000 + 1  # moved, or sorted into a closer bucket; claimed
    found.extend(iter(lambda: (task := q.pop()) and task.id, None))
    assert found == sorted(ids)


def test_many_busy_owners_cost_nothing(directory: Path, clock: Time) -> None:
    """What a look learns of owners holds for a second: an empty pop lists none of 40 busy ones."""
    q, listed = FemtoQueue(directory, "node"), []
    assert q.pop() is None
    alone = calls_of(q.pop)
    lay_out_busy_owners(directory, 40)
    clock.advance(1.1)
    assert q.pop() is None
    for _ in range(9):
        clock.advance(0.1)
        assert calls_of(q.pop, listed) == alone
    assert not [path for path in listed if "in_progress" in path]


def test_a_full_queue_is_not_counted_again(directory: Path, clock: Time) -> None:
    """push at maxsize with one place free counts nothing; nor what is full, until it changed."""
    q, other = FemtoQueue(directory, "node", maxsize=3_001), FemtoQueue(directory, "other")
    fill(directory, "pending", 3_000)
    q.push(b"x")
    for _ in range(20):
        with pytest.raises(Full):
            q.push(b"x")
        assert other.pop(), "which q has to count"
        q.push(b"x")
    listed: list[str] = []
    calls = calls_of(lambda: [(q.pop(), q.push(b"x")) for _ in range(50)], listed)
    assert len(listed) <= 8 and len(calls) <= 50 * 8 + 20  # the first pop's look
    for path in (directory / "pending").iterdir():
        os.utime(path, (1e9, 1e9))
    for _ in range(2):
        listed.clear()
        with pytest.raises(Full):
            calls_of(lambda: q.push(b"x"), listed)
    assert not [path for path in listed if "pending/" in path]


def test_looking_at_one_of_many_costs_little(directory: Path, clock: Time) -> None:
    """status and cancel of one id list no bucket, the first of ids one, and counts keeps no list."""
    q = FemtoQueue(directory, "node")
    fill(directory, "done", 20_000, 20_000)
    for state in ("pending", "scheduled"):
        fill(directory, state, 3_000, 100)
    q.push(b"x")
    ids = {"scheduled": q.schedule(b"x", NOW_US + 10 * HOUR_US), "pending": q.push(b"x")}
    listed, found = [], []
    for state, id in ids.items():
        calls_of(lambda id=id: found.extend((q.status(id), q.cancel(id))), listed)
        assert found[-2:] == [state, True] and q.status(id) is None
    assert listed and not [path for path in listed if re.search("(pending|scheduled)/", path)]
    with little_memory(200_000):
        assert q.counts()["done"] == 20_000
    listed.clear()
    assert calls_of(lambda: next(q.ids("pending")), listed) and len(listed) <= 3


def test_a_gigabyte_goes_through_in_32_megabytes(places: list[Path]) -> None:
    """push_file, pop and task.path stream: 1 GiB in 32 MB of memory."""
    code = """
os.chdir(sys.argv[1])
with open("file", "wb") as file:
    file.write(b"begin")
    file.truncate(1 << 30)
q = FemtoQueue("big", "node", keep_done=False)
q.push_file("file")
task = q.pop()
with open(task.path, "rb") as file:
    assert sum(map(len, iter(lambda: file.read(1 << 20), b""))) == 1 << 30
q.done(task)
# Not ru_maxrss: that begins with what the parent had when it forked.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    assert int(run(code, places[-1]).split()[-1]) < 32_000


def test_the_module_imports_little() -> None:
    """import femtoqueue: what only the command line, a warning or waiting needs is left out."""
    code = f"import sys; sys.path.insert(0, {str(MODULE.parent)!r}); import femtoqueue; print(*sys.modules)"
    costly = (
        "argparse logging typing dataclasses re datetime json subprocess signal queue ctypes threading"
    )
    assert not {*costly.split()} & {*execute(sys.executable, "-ISc", code).split()}


# ====================================================================================================
# The command line
# ====================================================================================================


class Shell:
    """Runs `python femtoqueue.py DIR ...` as a user would."""

    def __init__(self, directory: Path, guard: Callable[[Process], Process]) -> None:
        self.command, self.guard = [sys.executable, str(MODULE), str(directory)], guard

    def __call__(
        self, *arguments: object, stdin: bytes = b"", status: int = 0, **variables: str
    ) -> list[str]:
        """Run a command; return the lines it printed, and if `status` is an error, its complaint."""
        command, env = [*self.command, *map(str, arguments)], os.environ | variables
        done = subprocess.run(command, input=stdin, capture_output=True, env=env, timeout=60)
        complaint = done.stderr.decode()
        assert done.returncode == status and "Traceback" not in complaint, complaint
        assert status or not complaint
        return done.stdout.decode().splitlines() + [complaint] * bool(status)

    def start(self, *arguments: object, under: str = "") -> Process:
        """Start a command in a process group of its own, as a shell does, by way of another one."""
        options: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [*under.split(), *self.command, *map(str, arguments)]
        # In a session of its own, Ctrl-Z would stop nobody.
        return self.guard(subprocess.Popen(command, text=True, **options | {"preexec_fn": os.setpgrp}))


@pytest.fixture
def shell(directory: Path, guard: Callable[[Process], Process]) -> Shell:
    return Shell(directory, guard)


def test_cli_push_and_list(directory: Path, tmp_path: Path, shell: Shell) -> None:
    """push takes standard input, or files; it prints ids in order, and list prints them again.

    A file that cannot be pushed is exit status 1; those before it were pushed, and say so.
    """
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "-b").write_bytes(b"\xff\0")
    ids = shell("push", stdin=b"from standard input\n")
    ids += shell("push", "--", tmp_path / "a", tmp_path / "-b")
    id, complaint = shell("push", tmp_path / "a", tmp_path / "missing", status=1)
    assert str(tmp_path / "missing") in complaint
    assert shell("list", "pending") == [*ids, id]
    assert drained(FemtoQueue(directory, "node")) == [b"from standard input\n", b"a", b"\xff\0", b"a"]
    assert shell("list", "pending", status=1) == [""]


# A command, and what its complaint says.
WRONG_USAGE = {
    "nonsense": "invalid choice",
    "list creating": "invalid choice",
    "cancel": "required: ID",
    "run --max-attempts 0 -- true": "max_attempts",
    "run -- no-such-command": "no-such-command",
    "purge in_progress 1d": "invalid choice",
    "purge done yesterday": "no length of time",
}
NO_TIMES = "+ +10 +10x +-1m +nans +infd +1e300d tomorrow 1790000000 Z 0001-01-01 9999-12-31T23:59:59"
WRONG_USAGE |= {f"schedule {when}": when[1:] * when.startswith("+") for when in NO_TIMES.split()}


@pytest.mark.parametrize("command", WRONG_USAGE)
def test_cli_wrong_usage(directory: Path, shell: Shell, command: str) -> None:
    """Wrong usage is exit status 2, a line that says what is wrong, and no change: no attempt is used."""
    FemtoQueue(directory, "node").push(b"x")
    before = snapshot(directory)
    zone = "JST-9" if "0001" in command else "EST5"  # at either end of time
    [out] = shell(*command.split(), stdin=b"x", status=2, TZ=zone)
    assert out.startswith("usage: ") and WRONG_USAGE[command] in out.splitlines()[-1]
    assert snapshot(directory) == before


# What a shell makes of it ("$@" is `femtoqueue.py DIR`), and what the complaint says.
COMPLAINTS = {
    '"$0" "$1" "$1" push </dev/null': "femtoqueue.py",  # a directory that cannot be
    '"$@" list failed >/dev/full': "No space left",
    'PYTHONIOENCODING=ascii "$@" list failed --reasons': "codec can't encode",
    '"$@" push <&-': "standard input",
}
COMPLAINTS |= {f'"$@"-none {what}': "-none" for what in ("status", "list done", "cancel x")}


@pytest.mark.parametrize("line", COMPLAINTS)
def test_cli_what_fails_says_so(directory: Path, shell: Shell, line: str) -> None:
    """What fails is exit status 1 and one line that says what, and neither silence nor a traceback.

    Where there is no queue, looking makes none.
    """
    q = FemtoQueue(directory, "node")
    q.push(b"x")
    q.fail(q.pop(), "caf\u00e9")
    command = ["sh", "-c", line.replace('"$@"', '"$0" "$@"'), *shell.command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and q.join(0) and len(os.listdir(directory.parent)) == 1
    assert COMPLAINTS[line] in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 or "/dev/full" in line  # where the interpreter has a say


def test_cli_status(directory: Path, shell: Shell) -> None:
    """status shows each state with its count and oldest task, and since when each claim runs.

    --json is for programs: numbers are numbers, and what is unknown is null.
    """
    q = FemtoQueue(directory, "node-7")
    mine, gone, *_ = q.push_many([b"1", b"2", b"3", b"4"])
    q.pop()
    run("q = FemtoQueue(sys.argv[1], 'gone'); q.pop()", directory)
    q.schedule(b"later", LATER_US)
    report = json.loads(*shell("status", "--json"))
    assert {row["state"]: row["count"] for row in report["states"]} == q.counts()
    oldest = {row["state"]: row["oldest_s"] for row in report["states"]}
    assert 0 <= oldest["pending"] <= oldest["in_progress"] < 60
    assert oldest["scheduled"] < 0 and oldest["done"] is None
    claims = {c["id"]: (c["attempt"], c["node_id"], c["alive"]) for c in report["claims"]}
    assert claims == {gone: (1, "gone", "no"), mine: (1, "node-7", "yes")}
    for claim in report["claims"]:
        assert 0 <= claim["since_s"] < 30 and 29 < claim["since_s"] + claim["lease_left_s"] < 31
    text = re.sub(" +", " ", "\n".join(shell("status")))
    assert text.startswith("state count oldest\n") and "\ndone 0 -\n" in text
    assert "\n\nid attempt node_id pid alive since lease_left\n" in text
    assert f"\n{mine} 1 node-7 {os.getpid()} yes " in text


def test_cli_looking_ends_quietly(directory: Path, shell: Shell) -> None:
    """status --watch ends at Ctrl-C, by the signal; `list | head` when its reader has seen enough."""
    for n in range(3_000):
        put(directory / "done" / f"{n:016d}_{'x' * 100}")
    process = shell.start("status", "--watch")
    expect(process, "state        count  oldest")
    os.killpg(process.pid, signal.SIGINT)
    out, status = ending(process)
    assert status == -signal.SIGINT and "Traceback" not in out and "KeyboardInterrupt" not in out
    listed = execute("sh", "-c", '"$@" list done | head -1', "-", *shell.command)
    assert listed == "0000000000000000_" + "x" * 100 + "\n"


@pytest.mark.parametrize(
    ("when", "due_s"),
    [
        ("+1.5h", 5_400),
        ("2030-01-01T12:00:00Z", 1_893_499_200),
        ("2030-01-01T12:00:00+02:00", 1_893_492_000),
        ("2030-07-01", 1_909_108_800),
    ],
)
def test_cli_schedule(directory: Path, shell: Shell, when: str, due_s: int) -> None:
    """WHEN is a wait, or an ISO time: of its own zone, UTC for Z, or local, summer time included."""
    before_s = time.time() if when.startswith("+") else 0
    (id,) = shell("schedule", when, stdin=b"x", TZ="EST5EDT,M3.2.0,M11.1.0")
    assert shell("list", "scheduled") == [id]
    found_s = int(names(directory, "scheduled")[0][-16:]) / 1e6
    assert -0.001 <= found_s - before_s - due_s <= (30 if before_s else 0)


def test_cli_cancel_requeue_purge(directory: Path, shell: Shell) -> None:
    """Each id is tried; exit status 1 says that nothing could be done of one or more, which, and why.

    purge prints how many it deleted, of pending and scheduled ones too; none is exit status 1.
    """
    q = FemtoQueue(directory, "node")
    ids = q.push_many([b"1", b"2", b"3", b"4"])
    later = q.schedule(b"later", time.time_ns() // 1_000 + HOUR_US)
    assert shell("cancel", ids[0]) == []
    complaint = shell("cancel", ids[0], ids[1], "../x", status=1)[-1]
    assert complaint == "".join(f"femtoqueue: there is no task {id}\n" for id in (ids[0], "../x"))
    q.fail(q.pop())
    q.pop()
    for command in ("cancel", "requeue"):
        complaint = shell(command, ids[3], "nope", status=1)[-1]
        assert complaint.startswith(f"femtoqueue: {ids[3]} is in_progress, not ")
    assert shell("requeue", ids[2], later) == []
    assert list(q.ids("pending")) == [ids[2], later]
    for age, count in {"1h": 0, "0s": 2}.items():
        assert shell("purge", "pending", age, status=not count)[0] == str(count)


# --- run: a command for each task -------------------------------------------------------------------


def test_cli_run_hands_each_payload_to_a_command(directory: Path, tmp_path: Path, shell: Shell) -> None:
    """run gives the payload on standard input, and id, attempt and path in the environment.

    What follows the command is the command's own, also without --, and even if we have the like.
    """
    payload = bytes(range(256)) * 10_000
    (id,) = shell("push", stdin=payload)
    script = f'cd {shlex.quote(str(tmp_path))}; cat >in; cat "$FEMTOQUEUE_PATH" >path; '
    script += 'echo "$1 $FEMTOQUEUE_ID $FEMTOQUEUE_ATTEMPT"'
    assert shell("run", "--until-empty", "--", "sh", "-c", script, "--", "-- x") == [f"-- x {id} 1"]
    assert (tmp_path / "in").read_bytes() == (tmp_path / "path").read_bytes() == payload
    assert shell("list", "done") == [id]
    assert shell("run", "--until-empty", "--", "true", status=1) == [""]
    for words in ("echo --until-empty -h --", "-- echo -"):
        shell("push", stdin=b"x")
        assert shell("run", "--until-empty", *words.split()) == [words.partition("echo ")[2]]


@pytest.mark.parametrize("under", ["", "env --ignore-signal=CHLD"], ids=["", "SIGCHLD ignored"])
def test_cli_run_takes_the_exit_status_as_the_verdict(
    directory: Path, shell: Shell, under: str
) -> None:
    """0 done, 100 failed for good, others retried: also where an ignored SIGCHLD makes all of them 0.

    What is retried is logged. --max-attempts N: the Nth failure is the last. The exit status is kept
    as text beside the failed task, and shown by list.
    """
    scripts = {b"true": "done", b"exit 100": "failed"}
    scripts |= dict.fromkeys((b"exit 7", b"exit 99", b"exit 101", b"kill -9 $$"), "scheduled")
    q = FemtoQueue(directory, "node")
    _, failed, again, *_, dead = ids = q.push_many(scripts)
    out, status = ending(shell.start("run", "--until-empty", "--", "sh", under=under))
    assert [q.status(id) for id in ids] == [*scripts.values()] and status == 0
    said = dict(line.removeprefix("femtoqueue: ").split(":", 1) for line in out.splitlines())
    assert [*said] == ids[1:] and "status 7" in said[again] and "status -9" in said[dead]
    shell("requeue", again)
    command = ["run", "--until-empty", "--max-attempts", 2, "--", "sh"]
    out, status = ending(shell.start(*command, under=under))
    assert again in out and status == 1
    assert (directory / "failed" / f"{failed}~reason").read_text() == "sh: exit status 100"
    shown = shell("list", "failed", "--reasons")
    assert shown[0] == f"{failed}  sh: exit status 100"
    assert shown[1].startswith(again) and shown[1].endswith("sh: exit status 7")


BEGUN = ("sh", "-c", 'echo begun; cat "$1" "$FEMTOQUEUE_PATH"', "-")


def test_cli_run_path_outlives_a_renewed_lease(directory: Path, tmp_path: Path, shell: Shell) -> None:
    """FEMTOQUEUE_PATH opens the payload even after the claim was renamed by a touch.

    Ctrl-Z stops neither the command nor who renews its lease.
    """
    (id,) = shell("push", stdin=b"payload")
    os.mkfifo(tmp_path / "go")
    process = shell.start("run", "--until-empty", "--", *BEGUN, tmp_path / "go")
    expect(process, "begun")
    os.killpg(process.pid, signal.SIGTSTP)
    (claim,) = (directory / "in_progress").rglob(f"{id}*")
    FemtoQueue(directory, "node").touch(FemtoTask(id, b"", 1, str(claim)))
    assert not claim.exists()
    (tmp_path / "go").write_text("renewed ")
    assert ending(process) == ("renewed payload", 0)
    assert shell("list", "done") == [id]


SIGNALS = pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])


@SIGNALS
@pytest.mark.parametrize("before", ["default", "block", "ignore"])
def test_cli_run_ends_by_the_signal_after_the_command(
    directory: Path, tmp_path: Path, shell: Shell, name: str, before: str
) -> None:
    """A signal, though the parent blocked it, lets the command finish; the exit status is its own.

    What was ignored before (nohup, or a background job of a script) stays ignored.
    """
    ids = [shell("push", stdin=data)[0] for data in (b"x", b"y")[: 1 + (before == "ignore")]]
    os.mkfifo(tmp_path / "go")
    under, number = f"env --{before}-signal={name[3:]}", getattr(signal, name)
    process = shell.start("run", "--until-empty", "--", *BEGUN, tmp_path / "go", under=under)
    expect(process, "begun")
    os.killpg(process.pid, number)
    (tmp_path / "go").write_text("finished ")
    if ids[1:]:
        expect(process, "finished xbegun")
        (tmp_path / "go").write_text("finished ")
    assert ending(process) == (("finished y", 0) if ids[1:] else ("finished x", -number))
    assert [*FemtoQueue(directory, "node").ids("done")] == ids


@SIGNALS
def test_cli_a_second_signal_ends_the_command(shell: Shell, name: str) -> None:
    """A second signal kills the command and its children, gives the task back, and ends run itself."""
    (id,) = shell("push", stdin=b"x")
    # Both children hold standard output: its end is theirs.
    process = shell.start("run", "--", "sh", "-c", "sleep 60 & echo begun; sleep 60")
    expect(process, "begun")
    while process.poll() is None:
        os.killpg(
            process.pid, getattr(signal, name)
        )  # one that comes too soon after another is the same
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    assert ending(process) == ("", -getattr(signal, name))
    assert shell("list", "pending") == [id]


def test_cli_run_outlives_its_log(directory: Path, shell: Shell) -> None:
    """A closed log kills no worker: a command that fails is retried, and the next task is done."""
    ids = [shell("push", stdin=script)[0] for script in (b"exit 1", b"echo done")]
    process = shell.start("run", "--until-empty", "--", "sh", under="env --default-signal=PIPE")
    process.stderr.close()
    assert ended(process) == ("done\n", 0)
    assert [FemtoQueue(directory, "node").status(id) for id in ids] == ["scheduled", "done"]


# ====================================================================================================
# README
# ====================================================================================================

# Each fenced block of README is run as its language says, in an empty directory that has femtoqueue.py. It
# must end with exit status 0, and say nothing on standard error.
#
#   python, sh    as it stands; with `kill -9`, it must print each attempt
#   crontab       the command of its last line; /srv/myapp is that directory, `queue` has a task, and
#                 ./handle appends what it reads to `handled`
#   ini           a systemd unit: its ExecStart likewise, ended by SIGTERM
#
# <!-- test: not run, WHY --> before a block: it is only compiled. <!-- test: original -->: `old_queue` is
# a directory of the original's, 0.4; what was unfinished there is in `my_queue` afterwards, in order.
PAGE = README.read_text(encoding="utf-8") if README.exists() else ""
BLOCKS = re.findall(
    r"^(?: *<!-- test: ([^\n]+?) -->\n\n?)?( *)```(\w*)\n(.*?)^\2```$", PAGE, re.MULTILINE | re.DOTALL
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project as the recipes assume it: femtoqueue.py was copied there."""
    shutil.copy(MODULE, tmp_path)
    for name, command in {
        "bin/python3": f'exec {sys.executable} "$@"',
        "handle": "cat >> handled",
    }.items():
        put(tmp_path / name, f"#!/bin/sh\n{command}\n".encode()).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("test", "indent", "language", "text"),
    [
        pytest.param(*block, id=re.findall(r"(?m)^#{2,} (.+)$", PAGE[: PAGE.index(block[3])])[-1])
        for block in BLOCKS
        if block[2] not in ("", "text", "mermaid")
    ],
)
def test_readme_runs(
    project: Path, guard: Callable[[Process], Process], test: str, indent: str, language: str, text: str
) -> None:
    """Every example on the page runs as it stands, and has nothing to complain about."""
    text = re.sub(f"^{indent}", "", text, flags=re.MULTILINE)
    if test.startswith("not run, "):
        assert language == "python"
        compile(text, "README.md", "exec")
        return
    assert test in ("", "original")
    if test == "original":
        old = Original(project / "old_queue", "scheduled", "node-1")
        for number, state in enumerate(("node-1", "pending", "scheduled", "pending", "done", "failed")):
            old.add(state, 1_700_000_000_000_000 + number, b"%d" % number)
    if language in ("crontab", "ini"):
        FemtoQueue("queue", "node").push(b"payload\n")
    if language == "ini":
        command = re.findall("ExecStart=/usr/bin/(.*)", text)[0].split()
        process = guard(subprocess.Popen(command, text=True))
        assert FemtoQueue("queue", "node").join(timeout=20)
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM  # which systemd takes for a clean end
    else:
        command = {
            "python": [sys.executable, put(project / "recipe.py", text.encode())],
            "sh": ["sh", "-euc", text],
            "crontab": ["sh", "-c", text.split(maxsplit=5)[-1].replace("/srv/myapp", str(project))],
        }[language]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        if "kill -9" in text:
            assert done.stdout.splitlines()[1:] == ["hello", "attempt 1", "hello", "attempt 2"]
    if test == "original":
        assert drained(FemtoQueue("my_queue", "node")) == [b"0", b"1", b"2", b"3"]
    if language in ("crontab", "ini"):
        assert (project / "handled").read_text() == "payload\n"


def test_readme_names_what_exists() -> None:
    """Calls, arguments, links, files and tests on the page are there; each promise names its test."""
    # What was promised is there: a worker is killed, and the original's tasks are moved over.
    assert "kill -9" in PAGE and "original" in {test for test, *_ in BLOCKS}
    assert set(re.findall(r"\bq\.(\w+)\(", PAGE)) <= {*dir(FemtoQueue)}
    for call in re.findall(r"FemtoQueue\(([^()]*)\)", PAGE):
        assert {*re.findall(r"(\w+)=", call)} <= {*inspect.signature(FemtoQueue).parameters}

    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", PAGE))
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", PAGE):
        path, _, anchor = "".join(target).partition("#")
        if not path.startswith(("http:", "https:")):
            assert (HERE / path).exists() and (path or anchor in anchors), target

    named = set(re.findall(r"\b(?:test_[a-z_]+|Test[A-Z]\w+)", PAGE)) - {"test_femtoqueue"}
    assert named <= globals().keys()
    promises = PAGE.partition("\n## Promises\n")[2].partition("\n## ")[0]
    items = re.split(r"^(?=\d+\. )", promises, flags=re.MULTILINE)[1:]
    assert len(items) == 10 and all("test_" in item or "Test" in item for item in items)


# ====================================================================================================
# Several machines
# ====================================================================================================

# A folder with scripts that start, break and stop each of these; the tests are skipped without it.
TOOLS = Path(os.environ.get("FEMTOQUEUE_MACHINES", "nowhere"))
# How its scripts are called, what must be installed, and what takes servers, or their answers, away.
CLUSTERS = {
    "NFS": ("nfs", "linux.uml rpc.nfsd", "stop s1, start s1", "mute s1, reset h1, reset h2, unmute s1"),
    "GlusterFS": ("gluster", "glusterd glusterfs", "kill s2"),
    "CephFS": ("ceph", "ceph-mon ceph-mds ceph-fuse", "kill mds", "kill osd.0"),
}
# Runs on a host, and forks for each numbered file that appears in its box: a name and what it runs.
AGENT = r"""
import os, sys, time
sys.path.insert(0, sys.argv[1])
from femtoqueue import *
box, number, pids, name = sys.argv[2], 0, {}, "agent"
def say(*words):
    os.write(1, (" ".join(map(str, (name, *words))) + "\n").encode())
def produce(root, count, pause_s=0, **options):
    queue = FemtoQueue(root, name, **options)
    for payload in (f"{name}-{number:04d}" for number in range(count)):
        queue.push(payload.encode())
        say("ack", payload)
        time.sleep(pause_s)
def work(root, hold_s=0, **options):
    queue = FemtoQueue(root, name, **options)
    while not os.path.exists(f"{box}/stop"):
        if task := queue.pop(timeout=0.3):
            payload = task.data.decode()
            say("got", payload, task.attempt)
            end_s = time.time() + hold_s
            while time.time() < end_s and not os.path.exists(f"{box}/release"):
                time.sleep(0.01)
            try:
                queue.done(task)
                say("done", payload)
            except NotInProgress:
                say("lost", payload)
say("ready")
while not os.path.exists(f"{box}/stop"):
    time.sleep(0.01)
    if os.path.exists(path := f"{box}/{number}"):
        number += 1
        name, code = open(path).read().split("\n", 1)
        pids[name] = os.fork()
        if not pids[name]:
            try:
                exec(code)
            except BaseException as error:
                say("error", repr(error))
            os._exit(0)
for pid in pids.values():
    os.waitpid(pid, 0)
"""


class Host:
    """One machine: what is run there, and what that says."""

    def __init__(self, machines: Machines, name: str) -> None:
        self.name, self.count = name, 0
        self.said: list[list[str]] = []
        self.box = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=machines.base))
        self.root = f"{machines.base}/{name.replace('h', 'host')}/{machines.name}"
        under = rebooted(self.box)  # it is this machine, but for its mount and its boot
        if machines.kind == "NFS":
            under = [str(TOOLS / "nfs-fault.sh"), str(machines.base), "in", name]
        if machines.kind == "NFS" and name == "h2":
            self.root = f"/run/nfs-3/{machines.name}"
            mount = "mount -t nfs -o vers=3,hard,nosharecache,nolock,mountproto=tcp,mountport=20048,port=2049"
            mount = f"mkdir -p /run/nfs-3; {mount} 10.78.0.11:/run/disk/export /run/nfs-3"
            machines.fault("in", name, "sh", "-c", f"mountpoint -q /run/nfs-3 || {{ {mount}; }}")
        command = [*under, sys.executable, "-c", AGENT, str(MODULE.parent), str(self.box)]
        self.process = subprocess.Popen(command, stdout=-1, text=True, start_new_session=True)
        in_thread(self._listen)
        machines.wait(lambda: self.heard("ready"))

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.said.append(line.split())

    def run(self, who: str, code: str) -> None:
        """Start a process there; `who` is its node_id and begins all it says."""
        put(self.box / "draft", f"{who}\n{code}".encode()).rename(self.box / str(self.count))
        self.count += 1

    def heard(self, kind: str, who: str = "") -> list[list[str]]:
        return [line[2:] for line in tuple(self.said) if line[1] == kind and who in ("", line[0])]


class Machines:
    """Servers, and hosts h1 to h4 that mount what they serve. NFS: by version 4.2, and h2 by 3."""

    def __init__(self, kind: str) -> None:
        self.kind, self.is_broken = kind, True
        self.base = Path(tempfile.mkdtemp(prefix="fq", dir="/tmp"))  # short: sockets need that
        self.hosts: dict[str, Host] = {}

    def tool(self, script: str, *arguments: str, **environment: str) -> str:
        """Run one of the scripts; what it printed."""
        script = script.format(CLUSTERS[self.kind][0])
        return execute(TOOLS / script, self.base, *arguments, env=os.environ | environment)

    def repair(self) -> None:
        """Start all, or whatever of it was broken."""
        if self.is_broken:
            nfs = {"MOUNT_OPTS": "vers=4.2,hard", "LEASE": "10"} if self.kind == "NFS" else {}
            self.tool("start-{}.sh", HOSTS="4", **nfs)
        self.is_broken = False

    def fault(self, what: str, who: str, *rest: str) -> None:
        self.is_broken |= what != "in"
        self.tool("{}-fault.sh", what, who, *rest)
        if what == "kill" and self.kind != "NFS" and who in self.hosts:
            os.killpg(self.hosts[who].process.pid, signal.SIGKILL)  # with its mount, what runs there

    def start(self, *names: str) -> list[Host]:
        self.hosts |= {name: Host(self, name) for name in names}
        return [*self.hosts.values()]

    def wait(self, found: Callable[[], object], seconds: float = 90) -> None:
        was = becomes(True, lambda: bool(found()), seconds)
        assert was, [(host.name, host.said[-20:]) for host in self.hosts.values()]

    def all(self, kind: str) -> list[list[str]]:
        return [words for host in self.hosts.values() for words in host.heard(kind)]


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Machines]:
    """The machines of one kind."""
    name, programs, *_ = CLUSTERS[request.param]
    missing = [program for program in programs.split() if shutil.which(program) is None]
    if missing or os.geteuid() != 0 or not (TOOLS / f"start-{name}.sh").exists():
        pytest.skip(f"{request.param} takes FEMTOQUEUE_MACHINES, root, and {programs}")
    machines = Machines(request.param)
    yield machines
    machines.tool("stop-{}.sh")
    shutil.rmtree(machines.base, ignore_errors=True)


@pytest.mark.parametrize("cluster", CLUSTERS, indirect=True)
class TestMachines:
    @pytest.fixture(autouse=True)
    def _whole(self, cluster: Machines) -> Iterator[None]:
        cluster.repair()
        cluster.name, cluster.hosts = f"queue-{os.urandom(4).hex()}", {}
        yield
        cluster.repair()
        for host in cluster.hosts.values():
            (host.box / "stop").touch()
            host.process.wait(60)

    def test_a_server_is_away(self, cluster: Machines) -> None:
        """Two producers and four workers on two hosts: each task is done, and delivered exactly once.

        Servers go away meanwhile. Calls wait until they are back, or others there; nothing fails.
        """
        for host in cluster.start("h1", "h2"):
            host.run(host.name, f"produce({host.root!r}, 150, 0.02)")
            for who in (f"{host.name}-a", f"{host.name}-b"):
                host.run(who, f"work({host.root!r}, 0.02, timeout_stale_ms=120_000)")
        for number, faults in enumerate(CLUSTERS[cluster.kind][2:]):
            cluster.wait(lambda number=number: len(cluster.all("got")) > 10 + 100 * number)
            for fault in faults.split(", "):
                cluster.fault(*fault.split())
        cluster.wait(lambda: len(cluster.all("ack")) == len(cluster.all("done")) == 300)
        pushed, got, done = (sorted(w[0] for w in cluster.all(k)) for k in ("ack", "got", "done"))
        assert pushed == got == done and cluster.all("error") == cluster.all("lost") == []

    def test_a_worker_dies(self, cluster: Machines) -> None:
        """Its claim comes back at once on its own host, and not before the lease is over on another."""
        h1, h2 = cluster.start("h1", "h2")
        hold = f"work({h1.root!r}, 600, timeout_stale_ms=3_600_000)"
        h1.run("dies", f"produce({h1.root!r}, 1)\n{hold}")
        cluster.wait(lambda: h1.heard("got"))
        h1.run("killer", "os.kill(pids['dies'], 9)")
        h2.run("other", f"say(FemtoQueue({h2.root!r}, name).pop(timeout=3))")
        cluster.wait(lambda: h2.heard("None"))
        h1.run("neighbour", f"work({h1.root!r})")
        cluster.wait(lambda: h1.heard("done"))
        assert h1.heard("got", "neighbour") == [["dies-0000", "2"]]

    def test_a_producer_and_its_host_die(self, cluster: Machines) -> None:
        """What a durable push returned is whole, and there for others, though its host died at once."""
        h1, h2 = cluster.start("h1", "h2")
        h2.run("h2", f"produce({h2.root!r}, 10_000, sync_after_write=True)")
        cluster.wait(lambda: len(h2.heard("ack")) > 100)
        cluster.fault("kill", "h2")
        h1.run("other", f"work({h1.root!r})")
        pushed = {payload for (payload,) in h2.heard("ack")}
        cluster.wait(lambda: pushed <= {words[0] for words in h1.heard("done")})
        assert h1.heard("error") == []

    def test_hosts_go_away(self, cluster: Machines) -> None:
        """What a host had in hand that died, was cut off or stood still is done by another one.

        That is after its lease, and those that come back are told. What a longer lease protects comes
        back at once, and only, to the node_id that claimed it, wherever that starts again.
        """
        h1, *away = cluster.start("h1", "h2", "h3", "h4")
        for who, host, lease_ms in [*((h.name, h, 2_000) for h in away), ("long", away[0], 3_600_000)]:
            root = f"{host.root}-{who}"
            host.run(who, f"produce({root!r}, 1)\nwork({root!r}, 600, timeout_stale_ms={lease_ms})")
        cluster.wait(lambda: len(cluster.all("got")) == 4)
        for fault in ("cut h3", "freeze h4", "kill h2"):
            cluster.fault(*fault.split())
        for host in away:
            h1.run(f"for-{host.name}", f"work({h1.root!r} + '-{host.name}')")
        h1.run("other", f"say(FemtoQueue({h1.root!r} + '-long', name).pop(timeout=5))")
        cluster.wait(lambda: len(h1.heard("done")) == 3 and h1.heard("None", "other"), 200)
        h1.run("long", f"work({h1.root!r} + '-long')")
        cluster.wait(lambda: h1.heard("done", "long"))
        assert sorted(h1.heard("got")) == [[f"{who}-0000", "2"] for who in ("h2", "h3", "h4", "long")]
        cluster.fault("join", "h3")
        cluster.fault("thaw", "h4")
        for host in away[1:]:
            (host.box / "release").touch()
            # CephFS shuts out a host that is silent for a minute, until it mounts anew: ESHUTDOWN.
            told = "error" if cluster.kind == "CephFS" else "lost"
            cluster.wait(lambda host=host, told=told: host.heard(told))
            assert host.heard("done") == [] and len(host.heard("error")) == (told == "error")
            if told == "error":
                cluster.fault("kill", host.name)


# --- what a distributed filesystem does, done by one machine ------------------------------------------


@pytest.mark.usefixtures("no_hang")
def test_listings_of_a_network_filesystem(directory: Path, clock: Time, monkeypatch: Patch) -> None:
    """Where a listing shows a name twice, and for long what is gone, order and costs are the same.

    ids has each once, and a task costs no listing of its own.
    """
    queue, listed = FemtoQueue(directory, "a"), []
    ids = queue.push_many([b"x"] * 200)
    shown: dict[str, list[Any]] = {}

    @contextlib.contextmanager
    def scandir(path: str) -> Iterator[Iterator[Any]]:
        with REAL["scandir"](path) as entries:
            found = [entry for entry in entries for _ in range(2)][::-1]
        listed.extend([path] * ("/pending/" in path))
        yield iter(shown.setdefault(path, found) if "/pending/" in path else found)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list(queue.ids("pending")) == ids
    for id in ids:
        task = queue.pop()
        assert task and task.id == id
        queue.done(task)
        clock.advance(0.02)  # 4 s in all, and a look at everything each second
    assert queue.pop() is None and list(queue.ids("done")) == ids and len(listed) < 20


def test_a_queue_is_pickled(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled, it finishes tasks elsewhere, also where the directory is mounted under another path."""
    task = (first := FemtoQueue(directory, "h1")).push(b"x") and first.pop()
    task.path = f"/elsewhere{task.path}"
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(FemtoQueue("queue", "h2", max_attempts=5))
    monkeypatch.chdir("/")
    second = pickle.loads(pickled)
    assert (second.node_id, second.max_attempts) == ("h2", 5)
    second.done(task)
    assert names(directory, "done") == [task.id]


def test_no_bucket_is_made_twice(directory: Path, clock: Time) -> None:
    """A bucket that producers may still use is not removed, and none is made again under its name.

    Hosts that remove and make one directory at a time split the copies of a replicated filesystem.
    """
    made: list[str] = []

    def note(name: str, *args: Any, **options: Any) -> Any:
        result = REAL[name](*args, **options)
        made.extend(args[:1] if name == "mkdir" and "/pending/" in args[0] else ())
        return result

    slow, *queues = (FemtoQueue(directory, f"host-{n}", LONG_MS) for n in range(3))
    with Steps(1, note, once=False):
        held = queues[0].push(b"held") and slow.pop()
        for _ in range(300):  # through two periods of 1,000 s
            clock.advance(7)
            for queue in queues:
                queue.push(b"x")
                assert drained(queue) == [b"x"]
        slow.retry(held)  # to its old place, whose bucket is gone
    assert len(made) == len({*made}) <= 5 and drained(slow) == [b"held"]


@pytest.mark.parametrize("first", ["claim", "pending"])
def test_a_finished_task_under_two_names(directory: Path, clock: Time, first: str) -> None:
    """A finished task that healing gave its earlier name back does not come round for ever.

    A rename onto another name of the same file does nothing, and says that all went well.
    """
    queue = FemtoQueue(directory, "a", timeout_stale_ms=1_000)
    id = queue.push(b"x")
    path = next((directory / "pending").rglob(id))
    if first == "claim":
        path = Path(queue.pop().path)
    else:
        lay_out_busy_owners(directory, 1)
    os.link(path, directory / "done" / id)
    for _ in range(5):
        clock.advance(2.1)
        assert queue.pop() is None
    assert queue.status(id) == "done" and queue.counts("pending") == {"pending": 0}


# ====================================================================================================
# Windows
# ====================================================================================================

# Takes from a process what Windows lacks, and forbids what means another thing there, Paths
# stay POSIX paths. The imports are those that tell the systems apart themselves.
BECOME_WINDOWS = """
import argparse, builtins, errno, fcntl, json, logging, os, queue, shutil, signal, stat
import subprocess, sys, time
scanned = set()
def guard(name, check, module=os):
    call = getattr(module, name)
    setattr(module, name, lambda *args, **options: (check(*args), call(*args, **options))[1])
def refuse(number, path, when=True):
    if when:
        raise OSError(number, os.strerror(number), path)
def may_unlink(path):
    opened = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    refuse(errno.EACCES, path, any(os.path.exists(o) and os.path.samefile(o, path) for o in opened))
def may_rename(source, target):
    may_unlink(source)
    refuse(errno.EEXIST, target, os.path.lexists(source) and os.path.lexists(target))
    if "/done/" in target and source not in scanned:  # a virus scanner has it open for a moment
        scanned.add(source)
        refuse(errno.EACCES, source)
def may_open(path, flags, mode=0):
    refuse(errno.EACCES, path, os.path.isdir(path))
    assert flags & os.O_BINARY, f"{path} is opened as text: every newline would change"
def may_fsync(number):
    refuse(errno.EBADF, None, fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY)
def may_kill(pid, number):
    raise AssertionError("os.kill(pid, 0) ends a process there")
for check in may_rename, may_open, may_fsync, may_unlink, may_kill:
    guard(check.__name__[4:], check)
guard("open", lambda path, *rest: refuse(errno.ENOENT, path, str(path).startswith("/proc")), builtins)
for module, names in {
    os: "O_NOFOLLOW O_NONBLOCK O_DIRECTORY register_at_fork uname posix_fadvise geteuid killpg readlink",
    signal: "SIGPIPE SIGKILL SIGHUP SIGQUIT SIGCHLD SIGTSTP pthread_sigmask",
    time: "clock_gettime CLOCK_BOOTTIME CLOCK_MONOTONIC",
}.items():
    for name in names.split():
        delattr(module, name)
os.name, sys.platform, os.O_BINARY = "nt", "win32", 1 << 30  # a flag that Linux does not have
for name in ("time", "monotonic"):  # before Python 3.13, both tick 64 times a second
    setattr(time, name, lambda real=getattr(time, name): int(real() * 64) / 64)
"""
# What holds on Windows, and a program that shows it, in an empty directory.
ON_WINDOWS = {
    "the module imports and works: first in, first out, and each call does its own": r"""
for root, durable in ("queue", False), ("durable", True):
    q, other = (FemtoQueue(root, f"node-{n}", sync_after_write=durable, max_attempts=3) for n in (1, 2))
    ids = [q.push(b"%d\r\n" % n) for n in range(50)] + q.push_many(b"%d\r\n" % n for n in range(50, 99))
    ids.append(other.push(b"99\r\n"))
    for n, id in enumerate(ids):
        task = q.pop()
        assert (task.id, task.data) == (id, b"%d\r\n" % n)
        (q.fail if n == 99 else q.done)(task)
        os.utime(f"{root}/{q.status(id)}/{id}", (0, 0))
    assert q.requeue(id) and q.cancel(id) and [*q.ids("done")] == ids[:99]
    assert q.purge("done", 1e6) == 99 and {*q.counts().values()} == {0}
    for move in (True, False):  # nothing is renamed, or synced, while it is open for reading
        with open("payload", "wb") as file:
            file.write(b"\r\n\x1a" * 500_000)
        id = q.push_file("payload", move=move)
        task = q.pop()
        assert task.id == id and len(task.data) == 1_500_000 and os.path.exists("payload") is not move
        q.done(task)
    q.schedule(b"later", time.time_ns() // 1000 + 100_000)
    assert q.pop() is None
    task = q.pop(5)
    q.touch(task)
    q.retry(task)
    q.retry(q.pop(), 50)
    assert q.pop(5).attempt == 3
    q.close()
    assert other.pop() is None and other.status(task.id) == "failed"
""",
    "no process is judged: a dead worker's task comes back by its lease, and not before": """
if sys.argv[-1] == "dies":
    q = FemtoQueue("queue", "node", timeout_stale_ms=3_000)
    q.push(b"x")
    assert q.pop()
    os._exit(0)
subprocess.run([*sys.orig_argv, "dies"], check=True)
q = FemtoQueue("queue", "node")
assert q.pop() is None and q.pop(10).attempt == 2
""",
    "run keeps leases alive, and ends by SIGINT after the task in hand": """
q = FemtoQueue("queue", "node", timeout_stale_ms=300)
ids = q.push_many([b"long", b"stop", b"next"])
def handle(task):
    time.sleep(0.8)
    assert not task.lost
    if task.data == b"stop":
        signal.raise_signal(signal.SIGINT)
try:
    q.run(handle)
except KeyboardInterrupt:
    sys.exit([q.status(id) for id in ids] != ["done", "done", "pending"])
raise AssertionError
""",
    "the command line works; what separates names or streams there is in no id and no node_id": r"""
def cli(*words):
    return femtoqueue.main(["queue", *words])
assert cli("status") == 1 and cli("push", __file__) == cli("status") == cli("list", "pending") == 0
copy = "import sys; open('copy', 'w').write(sys.stdin.read())"
assert cli("run", "--until-empty", "--", sys.executable, "-c", copy) == 0
assert os.path.getsize("copy") == os.path.getsize(__file__)
open(f"queue/done/1700000000000000_x\\y", "w").close()
assert FemtoQueue("queue", "node").status("1700000000000000_x\\y") is None
try:
    FemtoQueue("queue", "host:8080")
except ValueError:
    sys.exit()
raise AssertionError
""",
}


@pytest.mark.skipif(sys.platform != "linux", reason="Windows is played on Linux only")
@pytest.mark.parametrize("promise", ON_WINDOWS)
def test_on_windows(tmp_path: Path, promise: str) -> None:
    """On Windows the module imports and works, without process liveness and without directory fsync."""
    code = (BECOME_WINDOWS + PRELUDE + ON_WINDOWS[promise]).encode()
    execute(sys.executable, put(tmp_path / "program.py", code), cwd=tmp_path)


# ====================================================================================================
# The packages
# ====================================================================================================

SOURCES = ("femtoqueue.py", "benchmark_mini.py", "test_femtoqueue.py", "README.md", "LICENSE")
SOURCES += ("pyproject.toml", ".ci/backend.py")
# A program of somebody else's. A line with "# wrong" has one mistake that only annotations tell.
USER = b"""
from datetime import datetime, timezone
from femtoqueue import STATES, FemtoQueue, FemtoQueueError, FemtoTask, NotInProgress

def handle(task: FemtoTask) -> int:
    return len(task.data) + task.attempt

with FemtoQueue("queue", "node", max_attempts=3, maxsize=100) as q:
    ids: list[str] = [q.push(bytearray(b"x")), *q.push_many(b"%d" % number for number in range(3))]
    due: str = q.schedule(memoryview(b"y"), datetime.now(timezone.utc))
    try:
        if task := q.pop(timeout=None):
            q.retry(task, 1_000)
            q.fail(task, "why")
    except NotInProgress as lost:
        error: FemtoQueueError = lost
    state: str | None = q.status(due)
    count: int = q.run(handle, until_empty=True, also=[q]) + q.purge("done", 3600.0)
    print(q.reason(due), [claim["pid"] for claim in q.claims()], [*q.ids("pending")], STATES)
q.push("text")  # wrong
q.pop().data  # wrong
q.done(None)  # wrong
q.schedule(b"x", "tomorrow")  # wrong
number: int = q.push(b"x")  # wrong
"""


# Nothing leads to the checkout.
AWAY = os.environ | {"PYTHONPATH": "", "MYPYPATH": ""}


@pytest.mark.skipif(not (HERE / ".ci").exists(), reason="this is no checkout")
def test_an_installed_femtoqueue_runs(tmp_path: Path) -> None:
    """Built and installed, it is `import femtoqueue`, `python -m femtoqueue` and `femtoqueue`, and typed.

    The wheel is built from the sdist, so that both are whole. The module is there byte for byte.
    """
    for module in ("build", "setuptools", "pip"):
        pytest.importorskip(module)
    for name in SOURCES:
        put(tmp_path / "tree" / name, (HERE / name).read_bytes())
    tree, home = tmp_path / "tree", tmp_path / "venv"
    options: dict[str, Any] = {"cwd": tmp_path, "env": AWAY}
    execute(sys.executable, "-m", "build", "--no-isolation", tree, **options)
    with tarfile.open(*(tree / "dist").glob("*.tar.gz")) as sdist:
        assert {*SOURCES} <= {name.partition("/")[2] for name in sdist.getnames()}
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("femtoqueue/__init__.py") == MODULE.read_bytes()
        assert "femtoqueue/py.typed" in archive.namelist()
    venv.create(home, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install"]
    execute(*pip, "--no-index", "--no-deps", wheel, **options)
    for command in ([home / "bin" / "python", "-m", "femtoqueue"], [home / "bin" / "femtoqueue"]):
        version = execute(*command, "--version", **options)
        assert version == f"femtoqueue {femtoqueue.__version__}\n"
        id = execute(*command, "queue", "push", MODULE, **options)
        assert execute(*command, "queue", "list", "pending", **options).endswith(id)


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_copied_file_is_typed(tmp_path: Path, checker: str, system: str) -> None:
    """A user's program beside a copy of the file: its mistakes are found, on each system, and no more."""
    pytest.importorskip(checker)
    put(tmp_path / "user.py", USER)
    shutil.copy(MODULE, tmp_path)
    options = {
        "mypy": f"--strict --config-file= --python-version=3.10 --platform {system}",
        "pyright": f"--pythonversion=3.10 --pythonplatform {system.title().replace('Win32', 'Windows')}",
    }[checker]
    command = (sys.executable, "-m", checker, *options.split(), "user.py", "femtoqueue.py")
    out = executed(*command, cwd=tmp_path, env=AWAY).stdout
    if checker == "pyright" and "0 informations" not in out:
        pytest.skip(f"pyright does not run here: {out.strip()[-200:]}")
    found = {(name, int(line)) for name, line in re.findall(r"(\w+)\.py:(\d+).*? error", out)}
    lines = enumerate(USER.decode().splitlines(), 1)
    assert found == {("user", number) for number, line in lines if line.endswith("# wrong")}, out
