# SPDX-License-Identifier: MIT
"""The promises of femtoqueue, each held by tests.

Processes are real ones, kills are SIGKILL, time is handed in by patching `time.time`, `time.monotonic`
and `time.sleep`, and faults are injected at each system call in turn.

The sections are those of the contract: what is on disk, the clock, who is alive, the API in the order of
its table, the promises, the command line, README, several machines, Windows, the packages.
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
import importlib.util
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
from hypothesis import HealthCheck, example, given, settings
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


# ====================================================================================================
# What the tests are made of
# ====================================================================================================

# --- time ---------------------------------------------------------------------------------------------


class Time:
    """Stands in for the clocks: it moves when told to, and when somebody sleeps."""

    def __init__(self, wall: float = 1_800_000_000.0, boot: float = 5_000.0) -> None:
        self.wall = wall
        self.boot = boot  # counts time asleep
        self.asleep = 0.0

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds

    def suspend(self, seconds: float) -> None:
        """The machine sleeps for so long."""
        self.advance(seconds)
        self.asleep += seconds

    def step_wall(self, seconds: float) -> None:
        """Somebody set the wall clock."""
        self.wall += seconds

    def set_to_real(self) -> None:
        """Be where the clocks of the real processes are."""
        self.wall = REAL_CLOCK(time.CLOCK_REALTIME)
        self.boot = REAL_CLOCK(time.CLOCK_BOOTTIME)

    def read(self, clock: int) -> float:
        """`time.clock_gettime`"""
        if clock == time.CLOCK_REALTIME:
            return self.wall
        return self.boot - (self.asleep if clock == time.CLOCK_MONOTONIC else 0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
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

    def stop(number: int, frame: object) -> None:
        pytest.fail("blocked")  # no Exception, let alone OSError: nobody handles it

    before = signal.signal(signal.SIGALRM, stop)
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
def scratch(tmp_path: Path) -> Iterator[Path]:
    """An empty directory, in memory where that can be had."""
    if not (SHM.is_dir() and os.access(SHM, os.W_OK)):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="femtoqueue-test-", dir=SHM))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def queue(directory: Path) -> FemtoQueue:
    """A queue of node-1 that holds "a" and "b"."""
    queue = FemtoQueue(directory, "node-1")
    queue.push(b"a")
    queue.push(b"b")
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
    found = []
    while task := queue.pop():
        found.append(task.data)
        queue.done(task)
    return found


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
        return put(self.directory / state / name, Original.content(payload))

    @staticmethod
    def content(payload: bytes) -> bytes:
        return b"\x01" + bytes(7) + hashlib.md5(payload).digest() + payload


def where(directory: Path, state: str) -> str:
    """The one file below `state`, relative to it."""
    [name] = files(directory / state)
    return name


# --- processes ----------------------------------------------------------------------------------------

Process = subprocess.Popen[str]
Spawn = Callable[..., Process]
Patch = pytest.MonkeyPatch


def start(code: str, *arguments: object, under: Iterable[str] = (), **options: Any) -> Process:
    """Start a real Python process, `under` another command, that has imported femtoqueue, and runs `code`."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [*under, sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    return subprocess.Popen(command, **pipes | options)


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
    return subprocess.run(
        [*map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def execute(*command: object, succeeds: bool = True, **options: Any) -> str:
    """Run a command, which must succeed, to its end, and return all that it printed."""
    process = executed(*command, **options)
    assert (process.returncode == 0) is succeeds, process.stdout
    return process.stdout


def forked(work: Callable[[], object], report: int | None = None) -> int:
    """Do something in a forked child; its status is 0 if nothing was raised.

    The traceback of what was raised goes to the descriptor `report`, or to standard error.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        os.write(2 if report is None else report, traceback.format_exc().encode())
    finally:
        os._exit(status)


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
NEW_TIME = ["unshare", "-T", "-f", "--kill-child", "--monotonic", "100000"]
needs_pid_namespace = needs(*NEW_PIDS, "true")
needs_mounts = needs("unshare", "-m", "mount", "--bind", "/dev/null", "/proc/sys/kernel/random/boot_id")
needs_root = pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root may do this")


def rebooted(tmp_path: Path) -> list[str]:
    """A command prefix under which the machine seems to have been booted once more."""
    boot_id = put(tmp_path / f"boot-{uuid.uuid4()}", f"{uuid.uuid4()}\n".encode())
    script = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
    return ["unshare", "-m", "sh", "-c", script, str(boot_id)]


# What a machine without a battery for its clock sees after a boot, until it finds an NTP server.
IN_2001 = """
real, booted = time.clock_gettime, time.clock_gettime(time.CLOCK_BOOTTIME)
time.time = lambda: 978_307_200 + real(time.CLOCK_BOOTTIME) - booted
time.clock_gettime = lambda clock: real(clock) - booted
"""
AS_NOBODY = """
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
"""


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
        arguments = (directory, node_id, lease_ms)
        process = guard(start(code + SERVE, *arguments, under=under, stderr=subprocess.PIPE))
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
        self.at = at
        self.meet = meet
        self.once = once
        self.count = 0
        self.met = ""

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

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
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
                raise OSError(
                    code, os.strerror(code), path, None, rest[0] if name == "rename" else None
                )
        return real(path, *rest, **options)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refusal:
    return Refusal(monkeypatch)


def synced_path(descriptor: int) -> str:
    """What an fsync of this descriptor is about."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


@contextlib.contextmanager
def synced_slowly(queue: FemtoQueue, end: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The block runs while a pop in another thread is held up where it syncs a path with this end.

    Yields what happens, in order: that it was synced, and that the block returned.
    """
    begun, returned = threading.Event(), threading.Event()
    events: list[str] = []
    real = os.fsync

    def sync_slowly(descriptor: int) -> None:
        if threading.current_thread() is slow and synced_path(descriptor).endswith(end):
            begun.set()
            returned.wait(0.5)  # in vain, unless the block returns too early
            events.append("synced")
        real(descriptor)

    slow = threading.Thread(target=queue.pop)
    monkeypatch.setattr(os, "fsync", sync_slowly)
    slow.start()
    assert begun.wait(10)
    yield events
    events.append("returned")
    returned.set()
    slow.join()


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
    while read() != wanted:
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


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


def meanwhile(
    patch: pytest.MonkeyPatch, at: int, action: Callable[[], object], *more: tuple[Any, str]
) -> list[str]:
    """Before filesystem call number `at` of a block, `action` happens; the list tells where it did.

    `more`: other functions whose calls count, too, each as its module and name.
    """
    met: list[str] = []
    count = itertools.count(1)

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
    if not others:
        yield [tmp_path]
    else:
        with tempfile.TemporaryDirectory(dir=others[0]) as other:
            yield [tmp_path, Path(other)]


def never(task: FemtoTask) -> None:
    """A handler that must not be called."""
    pytest.fail(f"{task} was handled")


def counted(q: FemtoQueue) -> dict[str, int]:
    """How many tasks there are, by state."""
    return {state: count for state, count in q.counts().items() if count}


def ended(process: Process) -> tuple[str, int]:
    """What else the process prints, without errors, and its exit status; it ends by itself."""
    status = process.wait(15)
    return process.stdout.read(), status


@pytest.fixture(scope="session", autouse=True)
def _as_in_a_terminal() -> None:
    """What a script (`pytest & wait`) ignored or blocked is inherited, over exec too. No core files."""
    wanted = dict.fromkeys(("SIGQUIT", "SIGHUP", "SIGTERM", "SIGCHLD"), signal.SIG_DFL)
    wanted["SIGINT"] = signal.default_int_handler
    for name, handler in wanted.items():
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    if sys.platform != "win32":
        import resource

        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


# --- figures ------------------------------------------------------------------------------------------

FIGURES: dict[str, collections.Counter[str]] = {}


def figure(promise: str, **counts: int) -> None:
    """Add to the figures that are shown when all tests have run."""
    FIGURES.setdefault(promise, collections.Counter()).update(
        {name.replace("_", " "): count for name, count in counts.items()}
    )


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
    queue, other = FemtoQueue(directory, "node-1"), FemtoQueue(directory, "node-2")
    id = queue.push(b'{"a": 1}')
    assert re.fullmatch(r"\d{16}_node-1_[0-9a-f]{18}\.[0-9a-f]{8}", id)
    assert NOW_US <= int(id[:16]) < NOW_US + 10 and int(id[-8:], 16) == zlib.crc32(b'{"a": 1}')
    tasks: list[FemtoTask] = []

    def pop(queue: FemtoQueue) -> None:
        task = queue.pop()
        assert task and task.id == id and Path(task.path).read_bytes() == task.data
        tasks.append(task)

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
        (lambda: other.fail(tasks[-1]), "failed/ID"),
        (lambda: queue.requeue(id), "pending/BUCKET/ID"),
        (lambda: pop(queue), f"{claim}~1~+30"),
        (lambda: queue.done(tasks[-1]), "done/ID"),
    ]
    for call, expected in steps:
        call()
        [name] = [name for name in files(directory) if id in name]
        assert (directory / name).read_bytes() == b'{"a": 1}'
        assert queue.status(id) == name.split("/")[0]
        name = re.sub(r"/\d{16}/", "/BUCKET/", name.replace(id, "ID"))
        name = re.sub(r"(~\d+)~\d+~[^/~]+~[^/~]+/", r"\1~START~PLACE~TOKEN/", name)
        name = re.sub(r"~(\d{16})", lambda m: f"~{int(m[1]) / 1e6 - clock.wall:+.0f}", name)
        assert name == expected
    assert [task.attempt for task in tasks] == [1, 2, 3, 4, 1]
    assert queue.status("0" * 16 + id[16:]) is None
    assert len(files(directory)) == 3  # the clock and the layout's version are the others


def test_schedule(directory: Path, clock: Time) -> None:
    """What is scheduled is due at that time, or the instant of an aware datetime, in any time zone. Its
    file is <id>~0~<due_us>, and the time in its id the due time, or now if that is later."""
    queue, due_us = FemtoQueue(directory, "node-1"), NOW_US + HOUR_US
    zones = [datetime.timezone(datetime.timedelta(hours=hours)) for hours in (9, 5.5, -3, 0)]
    times = [due_us, *(datetime.datetime.fromtimestamp(due_us / 1e6, zone) for zone in zones)]
    ids = [queue.schedule(b"later", time) for time in times]
    assert names(directory, "scheduled") == sorted(f"{id}~0~{due_us}" for id in ids)
    assert {int(id[:16]) for id in ids} == {due_us}
    assert NOW_US <= int(queue.schedule(b"now", NOW_US - HOUR_US)[:16]) < NOW_US + 10
    for seconds, expected in ((3_599.9, [b"now"]), (0.1, [b"later"] * 5)):
        clock.advance(seconds)
        assert drained(queue) == expected


def test_many_tasks_for_one_microsecond(directory: Path, clock: Time) -> None:
    """Equal payloads of two processes with one node_id, for the same microsecond, are as many tasks."""
    code = """
time.time, time.clock_gettime = lambda: 1_800_000_000.0, lambda clock: 5_000.0
queue = FemtoQueue(sys.argv[1], "same")
for _ in range(200):
    print(queue.push(b"same"), queue.schedule(b"same", 1_800_000_001_000_000))
"""
    ids = [id for _ in range(2) for id in run(code, directory).split()]
    queue = FemtoQueue(directory, "same")
    ids += [queue.schedule(b"same", NOW_US + 1_000_000) for _ in range(200)]
    clock.advance(2)
    assert drained(queue) == [b"same"] * 1_000
    assert sorted(queue.ids("done")) == sorted({*ids})


def test_long_names(directory: Path, clock: Time) -> None:
    """There is room in every state's names for the longest node_id, and for very many attempts."""
    queue = FemtoQueue(directory, "n" * 64)
    queue.push(b"x")
    put(directory / "pending" / f"1700000000000000_y~{10**9 - 4}", b"y")
    for delay_ms in (1, 0):
        for task in [queue.pop(), queue.pop()]:
            queue.touch(task)
            queue.retry(task, delay_ms)
        clock.advance(1)
    assert sorted(drained(queue)) == [b"x", b"y"] and "1700000000000000_y" in queue.ids("done")


def test_the_count_of_attempts_has_an_end(directory: Path) -> None:
    """A task that was delivered as often as a name can tell has failed."""
    queue = FemtoQueue(directory, "a")
    put(directory / "pending" / f"1700000000000000_x~{10**9 - 2}")
    task = queue.pop()
    assert task and (task.id, task.attempt) == ("1700000000000000_x", 10**9 - 1)
    queue.retry(task)
    assert queue.pop() is None
    assert queue.status(task.id) == "failed"


@pytest.mark.parametrize("locale", ["LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", "PYTHONUTF8=1"])
def test_what_is_not_ascii_is_seen_alike_in_every_locale(tmp_path: Path, locale: str) -> None:
    """Names that are not ASCII are never delivered; a data_dir may have one, and a reason any text."""
    directory = tmp_path / "données"
    queue = FemtoQueue(directory, "a")
    put(directory / "pending" / "1700000000000000_é", b"never")
    id = queue.push(b"x")
    code = """
queue = FemtoQueue(sys.argv[1], "b")
task, no = queue.pop(), queue.pop()
print(task.data, no, queue.counts()["pending"], sys.getfilesystemencoding() == "utf-8")
queue.fail(task, "gr\\u00f6\\u00dfe \\u65e5 \\udcff")
"""
    utf_8 = locale == "PYTHONUTF8=1"
    assert run(code, directory, under=["env", *locale.split()]) == f"b'x' None 0 {utf_8}\n"
    text = (directory / "failed" / f"{id}~reason").read_text("utf-8")
    assert queue.reason(id) == text and text.startswith("größe 日 ")


@pytest.mark.parametrize("state", ["pending", "scheduled"])
def test_buckets(directory: Path, clock: Time, state: str) -> None:
    """All begin in the bucket of the period; after 1,000 tasks of its own a producer opens others."""
    one, other = FemtoQueue(directory, "1"), FemtoQueue(directory, "2")

    def add(queue: FemtoQueue) -> str:
        clock.advance(0.0001)
        due_us = int(clock.wall * 1e6) + 10**7
        return queue.push(b"") if state == "pending" else queue.schedule(b"", due_us)

    ids = [add(one), add(other)]
    [shared] = os.listdir(directory / state)
    assert int(shared) % 10_000_000 == 0
    assert state == "scheduled" or shared == f"{NOW_US:016d}"
    ids += [add(one) for _ in range(2_000)]
    buckets = {path.name: os.listdir(path) for path in (directory / state).iterdir()}
    assert [len(buckets[bucket]) for bucket in sorted(buckets)] == [1_001, 1_000, 1]
    for bucket, names in buckets.items():
        oldest = min(name[:16] if state == "pending" else name[-16:] for name in names)
        assert re.fullmatch(rf"{oldest}\.[0-9a-f]{{8}}", bucket) or (oldest > bucket == shared)
    assert list(one.ids(state)) == ids
    clock.advance(1_000)
    add(other)
    assert len(os.listdir(directory / state)) == 4, "a new period, a new bucket"


def test_empty_buckets_vanish(directory: Path, clock: Time) -> None:
    """An empty bucket is removed, but none that is younger than 2 s; then a push makes another."""
    queue = FemtoQueue(directory, "a")
    buckets = (directory / "pending", directory / "scheduled")
    for number in (b"1", b"2"):
        queue.push(number)
        queue.schedule(number, int(clock.wall * 1e6))
        assert drained(queue) == [number, number] and all(map(os.listdir, buckets))
        clock.advance(1_002)  # nobody uses the bucket of that period any more
        assert queue.pop() is None and not any(map(os.listdir, buckets))
    # Who brings an old task back makes a bucket with an old name.
    bucket = directory / "pending" / "1600000000000001"
    for age_s, stays in ((0, True), (1.9, True), (2.1, False)):
        bucket.mkdir(exist_ok=True)
        os.utime(bucket, (clock.wall - age_s, clock.wall - age_s))
        assert queue.pop() is None
        assert bucket.exists() is stays


@pytest.mark.parametrize("data", [b"", b"hello\n", b"\x01" + bytes(23) + b"like the original's"])
@pytest.mark.parametrize(
    "rest",
    ["shell.00000000", "a (copy).txt", "h_0.part", "x" * 182, "x_01234567890abcdef", "h_" + "g" * 18],
)
def test_shell_push(directory: Path, rest: str, data: bytes) -> None:
    """A file renamed into pending/ as 16 digits, "_" and more is a task, taken as it is."""
    queue = FemtoQueue(directory, "a")
    name = f"1700000000000000_{rest}"  # none of our ids is in it, so there is no checksum
    put(directory / "draft", data).rename(directory / "pending" / name)
    assert list(queue.ids("pending")) == [name] and queue.status(name) == "pending"
    assert drained(queue) == [data]
    assert (directory / "done" / name).read_bytes() == data


# --- what else lies about -----------------------------------------------------------------------------

NAMES = (
    *("{time}_node_0123456789ab{n:06x}.01234567", "{time}_node_0123456789ab{n:06x}.01234567~{n}"),
    *("{time}_node_0123456789ab{n:06x}.01234567~1~{time}", "{time}_node_0123456789ab{n:06x}.01234567~"),
    *("{time}_node_0123456789ab{n:06x}.01234567.bak", "{time}_node_0123456789ab{n:06x}-1.01234567"),
    "{time}_node_0123456789ab{n:06x} (conflicted copy).01234567",
    "{time}_node_0123456789ab{n:06x}.sync-conflict-20260101-101010-ABCDEFG.01234567",
    "Copy of {time}_node_0123456789ab{n:06x}.01234567",
    *("{time}_shell-{n}", "{time}_shell-{n}~1", "{time}_shell-{n}~1~{time}", "{time}_shell-{n}~x"),
    *("{time}_", "{time}", "{time}.0123abcd", "{time}-{n}", "{n}_x", "{time}_é{n}", "{time}_\udcff{n}"),
    *("{time}_{n}\n", "１７００００００００００００００_{n}", "{time}_{n:0183}"),
    *("node~999999999~{n}~place~token", "node~999999999~{n}~place~token~{time}"),
    *("node~{n}~1~elsewhere~token~{time}", "clock-{n}", "clock-0123456789ab.{n}"),
    *(".DS_Store-{n}", ".nfs{time}{n}", ".{time}_shell-{n}.swp"),
)
ALPHABET = [*"~._/0 a\n\t\x7f", "\N{ARABIC-INDIC DIGIT THREE}", "\udcff", "\u2028", "~1", "x" * 200]
PLACES = (
    *("", "creating", "pending", "pending/{bucket}", "scheduled", "scheduled/{bucket}"),
    *("in_progress", "in_progress/node~999999999~1~place~token", *("done", "failed", "corrupt")),
)
KINDS: dict[str, Callable[[Path, Path], object]] = {
    "file": lambda path, outside: path.write_bytes(b"hostile"),
    "directory": lambda path, outside: path.mkdir(),
    "full directory": lambda path, outside: put(
        path / f"1700000000000000_{zlib.crc32(os.fsencode(path))}", b"hostile"
    ),
    "link": lambda path, outside: path.symlink_to(outside / "file"),
    "directory link": lambda path, outside: path.symlink_to(outside),
    "dangling link": lambda path, outside: path.symlink_to(outside / "none"),
    "FIFO": lambda path, outside: os.mkfifo(path),
    "socket": lambda path, outside: os.mknod(path, stat.S_IFSOCK | 0o600),
}


@st.composite
def near_names(draw: st.DrawFn) -> str:
    """A name by our grammar, or with a few characters put in or left out."""
    us = draw(st.sampled_from([0, 1, 10**15, 1_799_999_999_000_000, 1_800_000_000_000_000, 10**16 - 1]))
    name = draw(st.sampled_from(NAMES)).format(time=f"{us:016d}", n=draw(st.integers(0, 99_999)))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
        at = draw(st.integers(0, len(name)))
        name = name[:at] + draw(st.sampled_from(["", *ALPHABET])) + name[at + draw(st.integers(0, 2)) :]
    name = name.replace("/", "").strip() or "_"
    return name if len(os.fsencode(name)) <= 255 and name not in (".", "..") else "too-long"


def is_ours(place: str, name: str, kind: str) -> bool:
    """May the queue move or delete this? Written apart from femtoqueue's own parser."""
    folder = place.split("/")[0]
    owner, bucket = "[^~]+~[0-9]+~[0-9]+~[^~]+~[^~]+", r"[0-9]{16}(\.[0-9a-f]{8})?"
    if kind in ("directory", "full directory"):  # what is in there is a task, once it has such a name
        pattern = {"pending": bucket, "scheduled": bucket, "in_progress": owner}.get(place)
        return pattern is not None and re.fullmatch(pattern, name) is not None
    if kind != "file" or place in ("", "in_progress"):
        return False
    if folder == "creating":
        return re.fullmatch(owner + "~[^~]*", name) is not None
    found = re.fullmatch("([0-9]{16}_[ -}]+)(~[0-9]{1,9}(~[0-9]{16}){0,2})?", name)
    if found is None or len(found[1]) > 199:
        return False
    like_ours = re.match("[0-9]{16}_.*_[0-9a-f]{18}", found[1])
    return (
        not like_ours or re.fullmatch(r"[0-9]{16}_.*_[0-9a-f]{18}\.[0-9a-f]{8}", found[1]) is not None
    )


everything = [
    (place, name.format(time=f"{(1, 1_799_000_000_000_000, 9 * 10**15)[n % 3] + n:016d}", n=n), kind)
    for n, (place, name, kind) in enumerate(itertools.product(PLACES, NAMES, KINDS))
]
objects = st.lists(
    st.tuples(st.sampled_from(PLACES), near_names(), st.sampled_from(["file", *KINDS])),
    min_size=8,
    max_size=40,
)


@example(objects=everything, reboot=False)
@example(objects=everything, reboot=True)
@given(objects=objects, reboot=st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_hostile_directories(objects: list[tuple[str, str, str]], reboot: bool) -> None:
    """Whatever lies about: nothing raises, blocks, is followed, lost, deleted or taken for a task."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=SHM) as scratch:
        clock = Time()
        patch.setattr(time, "time", lambda: clock.wall)
        patch.setattr(time, "clock_gettime", clock.read)
        patch.setitem(sys.modules, "ctypes", None)
        directory, outside = Path(scratch) / "queue", Path(scratch) / "outside"
        inside = outside / "0000000000000001_outside"
        put(outside / "file", b"followed")
        put(inside, b"followed")
        queue = FemtoQueue(directory, "a", LONG_MS)
        real = {queue.push(payload): payload for payload in (b"claimed", b"done", b"failed", b"first")}
        queue.pop()
        queue.done(queue.pop())
        queue.fail(queue.pop())
        done, failed = list(real)[1:3]
        del queue  # what it claimed first is abandoned
        queue = FemtoQueue(directory, "a", LONG_MS)
        real[queue.schedule(b"due", int((clock.wall + 5) * 1e6))] = b"due"
        clock.advance(10)

        made: dict[Path, tuple[str, str, str]] = {}
        ids: set[str] = set()  # no two files are one task
        bucket = os.listdir(directory / "pending")[0]
        [clock_file] = directory.glob("clock-*")
        for place, name, kind in objects:
            folder = directory / place.format(bucket=bucket)
            folder.mkdir(parents=True, exist_ok=True)
            id = name.partition("~")[0] if "_" in name else name
            if id not in ids and not os.path.lexists(folder / name):
                ids.add(id)
                KINDS[kind](folder / name, outside)
                made[folder / name] = (place, name, kind)
        theirs = {path: seen(path, times=False) for path, what in made.items() if not is_ours(*what)}
        if reboot:
            del queue
            clock_file.unlink()
            queue = FemtoQueue(directory, "a", LONG_MS)

        signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("it blocks"))
        signal.alarm(60)
        ours = [path for path in made if path not in theirs]
        inner = [entry for path in ours if path.is_dir() for entry in path.iterdir()]
        tasks = {path.name.partition("~")[0] for path in ours + inner}
        listed = {state: list(queue.ids(state)) for state in STATES}
        assert {*itertools.chain(*listed.values())} <= {*real, *tasks}
        assert queue.counts() == {state: len(found) for state, found in listed.items()}
        for path in list(made)[:100]:
            assert queue.status(path.name) in (None, *STATES)
        assert all(map(queue.status, real))
        got: list[str] = []
        nothing = 0
        while nothing < 4:
            clock.advance(1.5 if nothing else 0.1)
            nothing += 1
            if task := queue.pop():
                nothing = 0
                if task.id in real:
                    assert task.data == real[task.id]
                    got.append(task.id)
                else:
                    assert task.data == b"hostile" and task.id in tasks
                queue.done(task)
        assert sorted(got) == sorted({*real} - {done, failed})
        assert (queue.status(done), queue.status(failed)) == ("done", "failed")
        clock.advance(3_000)
        assert queue.pop() is None
        for path in list(made)[:100]:
            assert queue.cancel(path.name) in (False, True)
        for state in ("done", "failed", "corrupt", "scheduled", "pending"):
            queue.purge(state, 0)
        queue.close()
        signal.alarm(0)
        for path, before in theirs.items():
            assert os.path.lexists(path), f"{made[path]} is gone"
            assert seen(path, times=False) == before, f"{made[path]} was changed"
        assert inside.read_bytes() == (outside / "file").read_bytes() == b"followed"
        assert len(os.listdir(outside)) == 2
        figure("hostile directories", directories=1, objects=len(made), foreign=len(theirs))


@pytest.mark.parametrize("kind", ["link", "FIFO", "socket", "directory"])
def test_replaced_after_the_listing(directory: Path, tmp_path: Path, kind: str, no_hang: None) -> None:
    """What becomes a link, a FIFO or a directory after it was listed is not delivered either."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"1")
    queue.push(b"2")
    assert drained_one(queue) == b"1"  # the other one has been listed
    path = directory / "pending" / where(directory, "pending")
    path.rename(tmp_path / "file")
    KINDS[kind](path, tmp_path)
    with contextlib.suppress(OSError):
        assert queue.pop() is None
    queue.push(b"3")
    assert drained(queue) == [b"3"]


@pytest.mark.parametrize("made_by", ["us", "a shell script", "nobody yet"])
def test_the_version_file_is_written_when_missing(directory: Path, made_by: str) -> None:
    """A directory that has no version file gets one when it is first opened, in plain text."""
    if made_by == "us":
        FemtoQueue(directory, "a").push(b"x")
        (directory / "layout").unlink()
    elif made_by == "a shell script":
        put(directory / "pending" / "1700000000000000_shell")
    assert drained(FemtoQueue(directory, "a")) == [b"x"] * (made_by != "nobody yet")
    assert (directory / "layout").read_text().splitlines()[0] == "femtoqueue layout 1"
    before, magic = seen(directory / "layout"), Original.content(b"y")
    FemtoQueue(directory, "b").push(magic)
    assert drained(FemtoQueue(directory, "c")) == [magic], "now, magic bytes are just bytes"
    assert seen(directory / "layout") == before


NEWER = {"layout 2": r"layout.*\b2\b", "layout 10": r"layout.*\b10\b", "layout 999": r"layout.*\b999\b"}
ORIGINAL = ("pending", "scheduled", "node-1", "done", "failed")


@pytest.mark.parametrize("what", [*NEWER, *ORIGINAL])
def test_a_directory_that_is_not_ours_is_refused_untouched(directory: Path, what: str) -> None:
    """A newer layout, or a directory of the original, is refused with an error that says what to do."""
    if what in NEWER:
        FemtoQueue(directory, "a").push(b"x")
        shutil.rmtree(directory / "corrupt")
        (directory / "layout").write_text(f"femtoqueue {what}\nwhatever\n")
    else:
        states = {"scheduled", "node-1"} if what in ("scheduled", "node-1") else ()
        Original(directory, *states).add(what, 1_700_000_000_000_000, b"x")
    before, expected = snapshot(directory, times=True), NEWER.get(what, "README")
    with pytest.raises(FemtoQueueError, match=expected):
        FemtoQueue(directory, "a")
    for command in ("status", "list pending", "push", "run --until-empty -- true", "purge done 0s"):
        if what in ("layout 2", "pending"):
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


# --- what vanishes ------------------------------------------------------------------------------------


def test_hostile_owners(directory: Path, clock: Time) -> None:
    """Directories that are named almost like an owner, or like one with strange numbers, do no harm."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"x")
    task = queue.pop()
    place = os.listdir(directory / "in_progress")[0].split("~")[3]
    strange = [f"a~{pid}~1~{place}~x" for pid in (0, 1, os.getppid(), "9" * 30)]
    for name in [*strange, *"a a~1~2~3 a~x~1~p~t a~~1~p~t a~1~1~p~t~ ~1~1~p~t".split()]:
        odd = "not a task" if name in strange else f"{OLD_ID}~1~1700000000000000"
        put(directory / "in_progress" / name / odd)
    queue.done(task)
    before = snapshot(directory)
    assert queue.pop() is None and queue.counts()["in_progress"] == 0
    assert snapshot(directory) == before


@pytest.mark.parametrize("call", ["done", "fail", "retry", "touch"])
def test_another_queue_in_the_place_of_data_dir_finishes_nothing(directory: Path, call: str) -> None:
    """A verdict on a claim that is not there is no success, and changes nothing in the other queue."""
    queue, task, _ = full_house(directory)
    away = directory.rename(directory.with_name("away"))
    full_house(directory)
    before, kept = snapshot(directory), snapshot(away)
    with pytest.raises((NotInProgress, OSError)):
        getattr(queue, call)(task)
    assert (snapshot(directory), snapshot(away)) == (before, kept)


def test_bucket_vanishes_during_a_push(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that somebody removes between being made and being used does not stop the push."""
    queue, real, removed = FemtoQueue(directory, "a"), os.mkdir, []

    def mkdir_in_vain(path: str, *mode: int) -> None:
        real(path, *mode)
        if not removed and "/pending/" in path:
            removed.append(os.rmdir(path))

    monkeypatch.setattr(os, "mkdir", mkdir_in_vain)
    queue.push(b"x")
    assert removed and drained(queue) == [b"x"]


# call: which state's task it is about; its result with that task, and without
FINISHED = ("done", "failed", "corrupt")
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
    "q.retry(task, 1e9) or q.status(task.id)": ("in_progress", "scheduled", NotInProgress),
    "q.touch(task) or q.status(task.id)": ("in_progress", "in_progress", NotInProgress),
    "q.join(0)": ("", False, None),
    "sum(q.counts().values())": ("any", 6, 5),
    "q.close()": ("", None, None),
    **{f"q.status(ids[{s!r}])": (s, s, None) for s in STATES},
    **{f"len([*q.ids({s!r})])": (s, 1, 0) for s in STATES},
    **{f"q.requeue(ids[{s!r}])": (s, True, False) for s in (*FINISHED, "scheduled")},
    **{f"q.cancel(ids[{s!r}])": (s, True, False) for s in ("pending", "scheduled")},
    **{f"q.purge({s!r}, 0)": (s, 1, 0) for s in (*FINISHED, "pending", "scheduled")},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("gone", ["creating", *STATES, "pending/*", "scheduled/*", "in_progress/*"])
def test_a_directory_that_vanishes_is_made_again(directory: Path, gone: str, call: str) -> None:
    """The next call that needs a vanished directory makes it again, and looks take it for empty."""
    queue, task, ids = full_house(directory)
    names = {"q": queue, "task": task, "ids": ids}
    for path in directory.glob(gone):
        shutil.rmtree(path)
    state = gone.partition("/")[0]
    about, there, missing = CALLS[call]
    expected = missing if about == state or (about == "any" and state in STATES) else there
    if expected is NotInProgress:
        with pytest.raises(NotInProgress):
            eval(call, globals(), names)
    else:
        assert eval(call, globals(), names) == expected
    queue = FemtoQueue(directory, "node") if "close" in call else queue
    queue.push(b"after")
    assert drained(queue)[-1] == b"after", "the queue goes on"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["renamed", "unmounted", "with a stray pending/"])
def test_a_data_dir_that_is_gone_is_an_os_error(directory: Path, how: str, call: str) -> None:
    """Gone, or there without the version file: OSError, nothing made, no claim finished or lost."""
    queue, task, ids = full_house(directory)
    names = {"q": queue, "task": task, "ids": ids}
    away = directory.rename(directory.with_name("away"))
    if how == "unmounted":
        directory.mkdir()
    elif how != "renamed":  # a script's `mkdir -p` in the empty mount point
        put(directory / "pending" / "1700000000000000_shell")
    before, kept = snapshot(directory.parent, times=True), snapshot(away)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            eval(call, globals(), names)
        assert str(caught.value.filename).startswith(str(directory))
    assert snapshot(directory.parent, times=True) == before
    assert snapshot(away) == kept
    assert not task.lost
    if how != "renamed":
        shutil.rmtree(directory)
    away.rename(directory)
    assert eval(call, globals(), names) == CALLS[call][1], "the call can be made again"


def test_pending_is_made_again_under_a_call_that_waits(directory: Path) -> None:
    """A worker that waits gets what is pushed after pending/ vanished and was made again."""
    queue, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    found = in_thread(queue.pop, 20)
    for number in range(5):
        shutil.rmtree(directory / "pending")
        other.push(b"%d" % number)
        if number == 4 or not other.pop():  # else the waiter had perhaps not begun
            break
    assert found.result(20)


# ====================================================================================================
# The queue clock
# ====================================================================================================

PUSH = "FemtoQueue(sys.argv[1], 'node-1').push(sys.argv[2].encode())"
CLOCKS = [  # wrong ones, or those of a time namespace
    ("time.time = lambda: 978_307_200.0", ()),
    ("assert time.time() < 1e9", ("faketime", "2001-01-01")),
    ("assert time.clock_gettime(7) > float(sys.argv[3]) + 50_000", (*NEW_TIME, "--boottime", "100000")),
]


@pytest.mark.parametrize(
    ("code", "under"),
    [pytest.param(*clock, marks=needs(*clock[1], "true") if clock[1] else ()) for clock in CLOCKS],
    ids=["2001", "faketime", "time namespace"],
)
def test_the_clock_is_shared(
    directory: Path, monkeypatch: Patch, code: str, under: tuple[str, ...]
) -> None:
    """Processes of one boot push in one order, however wrong their clocks, in time namespaces too."""
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    monkeypatch.setenv("DONT_FAKE_MONOTONIC", "1")
    queue, booted_s = FemtoQueue(directory, "a"), REAL_CLOCK(time.CLOCK_BOOTTIME)
    for number in range(0, 4, 2):
        queue.push(b"%d" % number)
        run(f"{code}\n{PUSH}", directory, number + 1, booted_s, under=under)
    assert drained(queue) == [b"0", b"1", b"2", b"3"]


@pytest.mark.parametrize("days", [-1, 1])
def test_the_clock_is_chosen_once(directory: Path, serve: Spawn, monkeypatch: Patch, days: int) -> None:
    """All share the clock that the first process chose, also who was about to choose another one."""
    code = f"time.time = lambda real=time.time: real() + 86_400 * {days}\n"
    other, queue = serve(directory, "a", code=code), FemtoQueue(directory, "b")
    quicker: list[str] = []

    def publish(real: Callable[..., Any], source: str, target: str) -> None:
        if "/clock-" in target and not quicker:
            quicker.append(tell(other, "queue.push(b'0')"))
        real(source, target)

    for name in ("link", "rename"):
        monkeypatch.setattr(os, name, functools.partial(publish, getattr(os, name)))
    for number in (b"1", b"2", b"3", b"4"):
        tell(other, f"queue.push({number})") if number in b"24" else queue.push(number)
    assert quicker and len([*directory.glob("clock-*")]) == 1
    assert drained(FemtoQueue(directory, "c")) == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("wall_s", [1_326_511_294.0, 3_600_000_000.0])
@pytest.mark.usefixtures("no_hang")
def test_frozen_time_stays_out_of_stamps_and_timeouts(directory: Path, wall_s: float) -> None:
    """Frozen time makes scheduled tasks due, is no part of the queue clock, and stops no timeout."""
    queue = FemtoQueue(directory, "a")
    ids = [queue.push(b"1")]
    queue.schedule(b"due", 3_500_000_000_000_000)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("time", "monotonic", "perf_counter"):  # as freezegun's freeze_time does
            patch.setattr(time, name, lambda: wall_s)
            patch.setattr(time, f"{name}_ns", lambda: int(wall_s * 1e9))
        ids.append(queue.push(b"2"))
        begun_s = REAL_CLOCK(time.CLOCK_BOOTTIME)
        found = drained(queue)
        queue.schedule(b"later", LATER_US)
        assert queue.pop(timeout=0.3) is None and queue.join(timeout=0.3) is False
        assert 0.6 <= REAL_CLOCK(time.CLOCK_BOOTTIME) - begun_s < 9
    ids.append(queue.push(b"3"))
    assert found + drained(queue) == [b"1", b"2", *[b"due"] * (wall_s > 3.5e9), b"3"]
    assert ids == sorted(ids) and all(abs(int(id[:16]) / 1e6 - time.time()) < 60 for id in ids)


@pytest.mark.parametrize("call", ["pop", "join"])
@pytest.mark.usefixtures("no_hang")
def test_a_timeout_runs_out_while_the_machine_sleeps(
    directory: Path, clock: Time, monkeypatch: Patch, call: str
) -> None:
    """All waiting and all timeouts count time asleep."""
    queue = FemtoQueue(directory, "a")
    queue.schedule(b"x", LATER_US)
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.suspend(600))
    assert not getattr(queue, call)(timeout=3_600)
    assert 8_600 <= clock.boot < 10_000


@needs_mounts
def test_a_host_that_slept_is_not_robbed(directory: Path, tmp_path: Path, serve: Spawn) -> None:
    """Of two hosts with equal wall clocks, one that was suspended keeps its claims for their lease."""
    code = """
real_monotonic, real_gettime = time.monotonic, time.clock_gettime
time.monotonic = lambda: real_monotonic() - 600
time.clock_gettime = lambda clock: real_gettime(clock) - 600 * (clock == time.CLOCK_MONOTONIC)
"""
    queue, host = FemtoQueue(directory, "a"), rebooted(tmp_path)
    run(PUSH, directory, "x", under=host)
    slept = serve(directory, "b", host, code=code)
    assert tell(slept, TAKE) == "b'x'"
    assert queue.pop() is None and FemtoQueue(directory, "c").pop() is None
    assert tell(slept, "(task.lost, queue.done(task))") == "(False, None)"


@needs_mounts
@pytest.mark.parametrize("step_s", [5, -5, 0.5])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_clocks_that_disagree_are_logged(
    now: Time, queue: FemtoQueue, serve: Spawn, caplog: Any, elsewhere: bool, step_s: float
) -> None:
    """Where other machines take part, a queue clock more than a second off the wall clock is logged."""
    other = serve(queue.data_dir, "b", rebooted(Path(queue.data_dir).parent) if elsewhere else [])
    assert tell(other, TAKE) == "b'a'"
    now.step_wall(step_s)
    now.advance(2)
    assert drained(queue) == [b"b"]
    queue.push(b"c")
    assert drained(queue) == [b"c"]
    logged = any("clock" in message for message in caplog.messages)
    assert logged is (elsewhere and abs(step_s) > 1), caplog.messages


# --- after a boot -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", ["in_progress", "pending"])
def test_the_first_stamp_after_a_boot_among_what_others_hide(
    directory: Path, clock: Time, refuse: Refusal, hidden: str
) -> None:
    """What another user hides does not stop who is first after a boot, nor with a `maxsize`."""
    queue = FemtoQueue(directory, "a", LONG_MS)
    queue.push(b"claimed")
    assert queue.pop()
    clock.advance(2_000)
    queue.push(b"pending")
    break_clock(directory)
    part = max(os.listdir(directory / hidden))
    other = FemtoQueue(directory, "b", maxsize=5)
    if hidden == "pending":  # which holds the newest task
        refuse("list", part, errno.EIO)
        with pytest.raises(OSError, match=part):  # no reason to do without
            other.push(b"later")
        refuse.rules.clear()
    refuse("list", part, errno.EACCES)
    clock.advance(2_000)
    other.push(b"later")
    assert drained_one(other) == (b"pending" if hidden == "in_progress" else b"later")


@needs_mounts
@pytest.mark.parametrize("newest", ["pending", "in_progress"])
def test_order_survives_a_reboot(directory: Path, tmp_path: Path, newest: str) -> None:
    """After a reboot order continues, though the wall clock restarts in the past."""
    FemtoQueue(directory, "node-1").push(b"1")
    if newest == "in_progress":
        run("FemtoQueue(sys.argv[1], 'node-1').pop(); os._exit(0)", directory)
    run(IN_2001 + PUSH, directory, 2, under=rebooted(tmp_path))
    again = rebooted(tmp_path)
    run(IN_2001 + PUSH, directory, 3, under=again)
    code = 'queue = FemtoQueue(sys.argv[1], "node-1")\nwhile t := queue.pop(): print(t.data.decode())'
    assert run(IN_2001 + code, directory, under=again).split() == ["1", "2", "3"]


@needs_mounts
@pytest.mark.parametrize("step_s", [-86_400, -0.5, 86_400])
def test_the_clock_begins_above_what_is_queued(directory: Path, tmp_path: Path, step_s: float) -> None:
    """The offset is chosen at the first stamp of a boot, above the newest task in the queue then."""
    FemtoQueue(directory, "a").push(b"1")
    code = f"""
early, late = FemtoQueue(sys.argv[1], "a"), FemtoQueue(sys.argv[1], "b")
open(f"{{sys.argv[1]}}/pending/{{time.time_ns() // 1000 - 5000}}_shell", "wb", 0).write(b"2")
time.time = lambda real=time.time: real() + {step_s}
early.push(b"3"); late.push(b"4"); early.push(b"5")
print(*[task.data.decode() for task in iter(late.pop, None)])
"""
    assert run(code, directory, under=rebooted(tmp_path)) == "1 2 3 4 5\n"


@needs_mounts
@pytest.mark.parametrize(("days", "lease_s"), [(0, 30), (3, 3_600), (3_000, 30), (9_000, 3_600)])
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


@pytest.mark.usefixtures("no_hang")
def test_broken_clock_file(tmp_path: Path) -> None:
    """A broken clock file is made anew, above all that is in the queue, and nothing odd is followed."""
    texts = b"|\n|17999|-\n|x\n|\xff\n|9999999999999999\n|-9999999999999999\n".split(b"|")
    outside = put(tmp_path / "outside" / "file", b"-1\n").parent
    cases = {tmp_path / f"queue-{n}": case for n, case in enumerate([*texts, "link", "FIFO", "socket"])}
    for directory, case in cases.items():
        FemtoQueue(directory, "a").push(b"1")
        path = break_clock(directory)
        path.write_bytes(case) if isinstance(case, bytes) else KINDS[case](path, outside)
    code = """
time.time = lambda real=time.time: real() - 86_400
for name in sys.argv[1:]:
    FemtoQueue(name, "b").push(b"2")
"""
    run(code, *cases)
    for directory, case in cases.items():
        [path] = directory.glob("clock-*")
        assert stat.S_ISREG(path.lstat().st_mode) and re.fullmatch(r"-?\d+\n", path.read_text()), case
        queue = FemtoQueue(directory, "c")
        queue.push(b"3")
        assert drained(queue) == [b"1", b"2", b"3"], case
    assert files(outside) == ["file"]


# --- what gets its place later ------------------------------------------------------------------------


@pytest.mark.parametrize("ahead_s", [0.5, 8 * 3_600, 8_199_999_999.999_999])
@pytest.mark.parametrize("bucket", [".", "shared", "own"])
def test_a_stamp_ahead_of_the_queue_clock_is_not_passed_by(
    directory: Path, clock: Time, ahead_s: float, bucket: str
) -> None:
    """A file put there by hand whose stamp is ahead of the queue clock gets a place all the same, and
    does not drag the clock along."""
    queue, stamp_us = FemtoQueue(directory, "a"), NOW_US + int(ahead_s * 1e6)
    if ahead_s < 1e9:  # else the clock is chosen beside it
        assert queue.cancel(queue.push(b"before"))
    folder = {"shared": str(NOW_US), "own": str(stamp_us)}.get(bucket, bucket)
    put(directory / "pending" / folder / f"{stamp_us}_shell", b"by hand")
    found = []
    while b"by hand" not in found and len(found) < 21:
        assert int(queue.push(b"newer")[:16]) < NOW_US + 10**7
        clock.advance(0.1)
        found.append(drained_one(queue))
    assert len(found) <= 20, "not within a look or two"
    assert names(directory, "done").count(f"{stamp_us}_shell") == 1, "its id does not change"


@pytest.mark.parametrize("kind", ["due", "abandoned"])
def test_many_at_once_and_a_stream_starve_nobody(scratch: Path, clock: Time, kind: str) -> None:
    """While there is more to move the next look comes at once, not a second later."""
    queue = FemtoQueue(scratch / "queue", "a", 10_000, keep_done=False)
    many = [b"%d" % number for number in range(2_100)]
    if kind == "due":
        for payload in many:
            queue.schedule(payload, NOW_US + 5_000_000)
    else:
        hung = FemtoQueue(scratch / "queue", "b", 10_000)
        hung.push_many(many)
        assert all(hung.pop() for _ in many)
    clock.advance(11)
    new = [b"new %d" % number for number in range(4_300)]
    found = []
    for payload in new:
        queue.push(payload)
        clock.advance(0.000_1)  # ten thousand tasks a second
        found.append(drained_one(queue))
    assert sorted({*found} - {*new}) == sorted(many), "all of them came"
    assert [payload for payload in found if payload in {*new}] == new[:2_200]


def test_the_earliest_due_comes_first(scratch: Path, clock: Time) -> None:
    """Scheduled tasks come earliest first of all that are due, whichever bucket they lie in."""
    queue = FemtoQueue(scratch / "queue", "a", keep_done=False)
    due = random.Random(1).sample(range(NOW_US, NOW_US + 10_000_000), 2_700)
    for number, due_us in enumerate(due):
        bucket = scratch / "queue" / "scheduled" / str(NOW_US - 1 - number % 3)
        put(bucket / f"{due_us}_{number}~0~{due_us}", b"%d" % due_us)
    for second in (5, 3, 40_000, 4, 400):
        due.append(NOW_US + second * 1_000_000)
        queue.schedule(b"%d" % due[-1], due[-1])
    clock.advance(50_000)
    assert [int(payload) for payload in drained(queue)] == sorted(due)


# ====================================================================================================
# Who is alive
# ====================================================================================================


@pytest.mark.parametrize("end", ["close", "drop"])
def test_dropped_object(directory: Path, queue: FemtoQueue, end: str) -> None:
    """An object is alive until it is closed or dropped; then its tasks come back at the next pop."""
    gc.disable()  # dropping the last reference is enough
    try:
        other = FemtoQueue(directory, "node-1")
        assert in_thread(other.pop, 0.001).result(10)  # the end of a thread proves nothing
        queue.push(b"c")
        assert drained_one(queue) == b"b"
        assert drained(FemtoQueue(directory, "node-1")) == [b"c"] and queue.pop() is None
        queue.push(b"d")
        if end == "close":
            other.close()
        del other
        assert drained(queue) == [b"a", b"d"], "at its old place"
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["another name", "reload"])
def test_two_copies_of_the_module(directory: Path, how: str) -> None:
    """Between two copies of the file in one process the lease decides; what is closed is given back."""
    code = """
import importlib.util
real, passed_s = time.clock_gettime, 0
time.clock_gettime = lambda clock: real(clock) + passed_s
mine = FemtoQueue(sys.argv[1], "node")
mine.push_many([b"a", b"b"])
spec = importlib.util.spec_from_file_location("vendored", femtoqueue.__file__)
sys.modules["vendored"] = vendored = importlib.util.module_from_spec(spec)
spec.loader.exec_module(vendored)
if sys.argv[2] == "reload":
    vendored = importlib.reload(femtoqueue)
task = mine.pop()
theirs, third = vendored.FemtoQueue(sys.argv[1], "node"), vendored.FemtoQueue(sys.argv[1], "node")
print(task.data, theirs.pop().data, mine.pop(), theirs.pop(), third.pop())
print(FemtoQueue(sys.argv[1], "node").pop())
mine.close()
print(theirs.pop().data, third.pop())
del theirs
passed_s = 31.1
late = FemtoQueue(sys.argv[1], "node")
print(late.pop().data, late.pop().data, late.pop())
"""
    expected = ["b'a' b'b' None None None", "None", "b'a' None", "b'a' b'b' None"]
    assert run(code, directory, how).splitlines() == expected


INTERPRETERS = [n for n in ("_interpreters", "_xxsubinterpreters") if importlib.util.find_spec(n)]


@pytest.mark.skipif(not INTERPRETERS, reason="this Python has one interpreter")
def test_two_interpreters_in_one_process(directory: Path) -> None:
    """Objects in two interpreters of one process are alive to each other: none takes what is held."""
    there = f"""
import sys
sys.path[:0] = {sys.path!r}
from femtoqueue import FemtoQueue
queue = FemtoQueue({str(directory)!r}, "node")
tasks = [queue.pop(), queue.pop()]
print([task.data for task in tasks], queue.pop(), flush=True)
"""
    here = """
import importlib
interpreters = importlib.import_module(sys.argv[2])
other = interpreters.create()
queue = FemtoQueue(sys.argv[1], "node")
queue.push_many([b"1", b"2", b"3"])
tasks = [queue.pop()]
interpreters.run_string(other, sys.argv[3])
print(tasks[0].data, queue.pop(), flush=True)
interpreters.run_string(other, "queue.done(tasks[0]); queue.retry(tasks[1])")
tasks.append(queue.pop())
interpreters.run_string(other, "print(queue.pop(), flush=True)")
print([queue.done(task) for task in tasks], queue.counts()["done"], queue.pop())
"""
    expected = ["[b'2', b'3'] None", "b'1' None", "None", "[None, None] 3 None"]
    assert run(here, directory, INTERPRETERS[0], there).splitlines() == expected


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
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    if who != "its parent":
        worker.wait()
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


FORKS = """
import signal
def claim():
    FemtoQueue(sys.argv[1], "node-2").pop()
    os.write(pipe[1], b"claimed")
    signal.pause()
def fork(work):
    pid = os.fork()
    if pid == 0:
        work()
    return pid
pipe = os.pipe()
worker = fork(claim)
assert os.read(pipe[0], 7) == b"claimed"
def kill():
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
"""


@needs_pid_namespace
def test_pid_reused(directory: Path, queue: FemtoQueue) -> None:
    """A PID that was given to another process does not keep the dead one's tasks."""
    code = """
kill()
time.sleep(0.03)  # start times are in hundredths of a second
with open("/proc/sys/kernel/ns_last_pid", "w") as file:
    file.write(str(worker - 1))
assert fork(signal.pause) == worker
print(FemtoQueue(sys.argv[1], "node-3").pop().data)
"""
    assert run(FORKS + code, directory, under=NEW_PIDS) == "b'a'\n"


@needs_pid_namespace
def test_foreign_proc(directory: Path, queue: FemtoQueue) -> None:
    """Where /proc shows another PID namespace, a live worker is not robbed, and a dead one is seen."""
    code = """
assert os.readlink("/proc/self") != str(os.getpid())
queue = FemtoQueue(sys.argv[1], "node-3")
print(queue.pop().data, queue.pop())
kill()
print(FemtoQueue(sys.argv[1], "node-3").pop().data)
"""
    assert run(FORKS + code, directory, under=NEW_PIDS_OLD_PROC) == "b'b' None\nb'a'\n"


HIDEPID = ["unshare", "-m", "sh", "-c", 'mount -t proc -o hidepid=$0 proc /proc && exec "$@"']


@needs(*HIDEPID, "2", "true")
@pytest.mark.parametrize("level", ["1", "2"])
def test_hidepid(open_to_all: Path, serve: Spawn, level: str) -> None:
    """A /proc that cannot be read proves nothing: another user's live worker is not robbed."""
    FemtoQueue(open_to_all, "node-1").push_many([b"a", b"b"])
    worker = serve(open_to_all, "node-2")
    assert tell(worker, TAKE) == "b'a'"
    for path in [open_to_all, *open_to_all.rglob("*")]:
        path.chmod(0o777)
    code = """
try:
    sys.exit(open(f"/proc/{sys.argv[2]}/stat").read())
except OSError:
    queue = FemtoQueue(sys.argv[1], "node-3")
    print(*[task.data for task in iter(queue.pop, None)])
"""
    for expected in ("b'b'\n", "b'a' b'b'\n"):
        assert run(AS_NOBODY + code, open_to_all, worker.pid, under=[*HIDEPID, level]) == expected
        killed(worker)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")
@pytest.mark.parametrize("error", ["EMFILE", "EIO"])
@pytest.mark.parametrize("call", ["constructor", "first call in a forked child"])
def test_no_false_identity(queue: FemtoQueue, serve: Spawn, call: str, error: str) -> None:
    """A process that cannot find out who it is gets OSError; when it can, it is who it is."""
    code = f"""
import builtins, errno
code, broken, raised = errno.{error}, "", 0
def fault(real):
    def call(path, *rest, **options):
        if broken and path == broken:
            raise OSError(code, "broken", path)
        return real(path, *rest, **options)
    return call
builtins.open, os.readlink = fault(builtins.open), fault(os.readlink)
PATHS = [f"/proc/{{path}}" for path in ("self/stat", "sys/kernel/random/boot_id", "self")]
PATHS += [f"/proc/self/ns/{{kind}}" for kind in ("time", "pid")]
call = lambda: FemtoQueue(sys.argv[1], "node-1")
if {call != "constructor"}:
    call = call().pop
    broken = PATHS[0]
    if pid := os.fork():
        sys.exit(os.waitpid(pid, 0)[1])
for broken in PATHS:
    try:
        call()
    except OSError as error:
        raised += (error.errno, error.filename) == (code, broken)
broken = ""
"""
    directory, mine = Path(queue.data_dir), queue.pop()
    [me] = os.listdir(directory / "in_progress")
    process = serve(directory, "node-2", code=code)
    assert (tell(process, "raised"), tell(process, TAKE)) == ("5", "b'b'")
    [other] = {*os.listdir(directory / "in_progress")} - {me}
    _, _, start, place, _ = other.split("~")
    assert place == me.split("~")[3] and int(start) >= int(me.split("~")[2]) > 0
    assert len([*directory.glob("clock-*")]) == 1
    assert queue.pop() is None and FemtoQueue(directory, "node-2").pop() is None, "it is alive"
    assert tell(process, "queue.done(task)") == "None"
    queue.done(mine)


# --- elsewhere ----------------------------------------------------------------------------------------


@needs_pid_namespace
def test_two_containers_of_one_name_leave_each_other_their_work(
    directory: Path, queue: FemtoQueue, serve: Spawn
) -> None:
    """My node_id elsewhere is dead as far as it claimed before I opened; later its lease decides."""
    old = serve(directory, "web", NEW_PIDS)
    assert tell(old, TAKE) == "b'a'"
    new = serve(directory, "web", NEW_PIDS)
    assert tell(new, TAKE) == "b'a'", "it was claimed before"
    assert tell(old, "queue.done(task)") == "NotInProgress"
    assert tell(old, TAKE) == "b'b'"
    for container in (new, old, new):
        assert tell(container, "queue.pop(1.1)") == "None"
    for container in (old, new):
        assert tell(container, "queue.touch(task) or queue.done(task)") == "None"
    assert queue.counts()["done"] == 2
    places = [tell(container, "os.readlink('/proc/self/ns/pid')[5:-1]") for container in (old, new)]
    log = ending(new)[0]
    assert all(word in log for word in ("web", *places)), "a warning names both places"


NO_BOOT = ["unshare", "-m", "sh", "-c", 'mount -t proc -o subset=pid proc /proc && exec "$0" "$@"']
needs_proc_subset = needs(*NO_BOOT, "test", "!", "-e", "/proc/sys")


PLACES_ELSEWHERE = {  # under what the worker runs, and under what the one that judges it
    "container": (NEW_PIDS, []),
    "container, /proc of the host": (NEW_PIDS_OLD_PROC, []),
    "no boot": (NO_BOOT, []),
    "neither has a boot": (NO_BOOT, NO_BOOT),
}


@needs_pid_namespace
@needs_proc_subset
@pytest.mark.parametrize("node_id", ["web", "WEB"])
@pytest.mark.parametrize("place", PLACES_ELSEWHERE)
def test_elsewhere_the_lease_decides(
    directory: Path, queue: FemtoQueue, serve: Spawn, place: str, node_id: str
) -> None:
    """Of who is elsewhere nothing is known, nor of my node_id after I opened, nor where the boot cannot
    be told (ProcSubset=pid): a task comes back by its lease, not before, and not later."""
    under, judged_under = PLACES_ELSEWHERE[place]
    worker = serve(directory, node_id, under, 3_500)
    judge = serve(directory, "web", judged_under, 60_000)
    assert tell(worker, TAKE) == "b'a'" and tell(judge, TAKE) == "b'b'"
    assert tell(judge, "queue.pop(1.1)") == tell(worker, "queue.pop()") == "None"
    assert tell(worker, "queue.touch(task)") == "None"
    killed(worker)
    fresh = "FemtoQueue(sys.argv[1], 'other').pop()"
    assert tell(judge, "queue.pop()") == tell(judge, fresh) == "None"
    assert tell(judge, "(back := queue.pop(10)) and (back.data, back.attempt)") == "(b'a', 2)"
    if under is NO_BOOT:
        assert len([*directory.glob("clock-*")]) == 1, "its clock is shared by nothing"


@needs_proc_subset
@pytest.mark.parametrize("steps_s", [(0, -3_600, 0), (0, 3_600, -3_600)])
def test_where_the_boot_cannot_be_told_the_clock_never_goes_backwards(
    directory: Path, steps_s: tuple[int, ...]
) -> None:
    """There the queue clock is the wall clock, made never to go backwards, and order is kept."""
    code = """
queue, real = FemtoQueue(sys.argv[1], "a"), time.time
for number, step in enumerate(sys.argv[2:]):
    time.time = lambda: real() + int(step)
    queue.push(b"%d" % number); queue.push(b"%d+" % number)
time.time = real
print(*[task.data.decode() for task in iter(queue.pop, None)])
"""
    assert run(code, directory, *steps_s, under=NO_BOOT) == "0 0+ 1 1+ 2 2+\n"


def test_empty_directories_of_owners_elsewhere(directory: Path, clock: Time) -> None:
    """An owner that cannot be judged leaves an empty directory: it goes when it is older than a day."""
    queue = FemtoQueue(directory, "a")
    claim = f"{OLD_ID}~1~{NOW_US + 10**12}"
    owners = [DEAD_OWNER.replace("~0", f"~{number}") for number in range(4)]
    put(directory / "in_progress" / owners[3] / claim)
    for owner, age_s in zip(owners, (86_500, 80_000, -(10**6), 10**6), strict=True):
        (directory / "in_progress" / owner).mkdir(exist_ok=True)
        os.utime(directory / "in_progress" / owner, (clock.wall - age_s, clock.wall - age_s))
    for gone in (1, 2):
        assert queue.pop() is None
        assert sorted(os.listdir(directory / "in_progress")) == owners[gone:]
        clock.advance(10_000)
    assert os.listdir(directory / "in_progress" / owners[3]) == [claim]


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize(("lease_s", "others_s"), [(10, 30), (60, 1), (1, 60)])
def test_live_owner_within_its_lease(
    directory: Path, clock: Time, lease_s: int, others_s: int, asleep: bool
) -> None:
    """No task is taken within the lease of who claimed it, asleep or not; 1 s later at most it is."""
    owner = FemtoQueue(directory, "a", lease_s * 1_000)
    other = FemtoQueue(directory, "b", others_s * 1_000)
    owner.push(b"old")
    clock.advance(86_400)
    task = owner.pop()
    passed_s, found = 0.0, b""
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


def test_signature() -> None:
    """The constructor takes what the original's takes, in its order, and more by keyword only."""
    assert str(inspect.signature(FemtoQueue)).replace("'", "").replace(" -> None", "") == (
        "(data_dir: str | os.PathLike[str], node_id: str, timeout_stale_ms: float = 30000, "
        "sync_after_write: bool = False, *, max_attempts: int | None = None, keep_done: bool = True, "
        "keep_failed: bool = True, maxsize: int = 0)"
    )


NAN = float("nan")
BAD_ARGUMENTS: dict[tuple[str, type[Exception]], tuple[object, ...]] = {
    ("data_dir", TypeError): (5, None, b"bytes"),
    ("data_dir", ValueError): ("", "a\0b"),
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
def test_bad_constructor_arguments(directory: Path, argument: str, error: type[Exception]) -> None:
    """A bad argument, or a node_id that is not printable ASCII, gets its error at the call, which names
    it, before anything is written."""
    for value in BAD_ARGUMENTS[argument, error]:
        arguments = {"data_dir": directory, "node_id": "a", argument: value}
        with pytest.raises(error, match=argument):
            FemtoQueue(**arguments)
        assert not directory.exists(), repr(value)


@pytest.mark.parametrize("below", ["", "deep/er"], ids=["itself", "below"])
@pytest.mark.parametrize("kind", ["file", "dangling link", "link loop", "/proc"])
def test_a_data_dir_that_is_no_directory(tmp_path: Path, kind: str, below: str) -> None:
    """Where a file, a link that leads nowhere, or a filesystem refuses: an OSError with its path."""
    path = Path("/proc/femtoqueue") if kind == "/proc" else tmp_path / "queue"
    if kind == "file":
        put(path)
    elif kind != "/proc":
        path.symlink_to("nowhere" if kind == "dangling link" else "queue")
    before = snapshot(tmp_path, times=True)
    with pytest.raises(OSError) as caught:
        FemtoQueue(path / below, "node")
    assert not isinstance(caught.value, FileExistsError)
    assert caught.value.filename.startswith(str(path))
    assert snapshot(tmp_path, times=True) == before


# --- push, push_many, push_file -----------------------------------------------------------------------


def test_maxsize_among_what_others_hide(directory: Path, refuse: Refusal) -> None:
    """A bucket that another user keeps to himself does not stop a push; what is seen is counted."""
    q = FemtoQueue(directory, "node", maxsize=2)
    hidden = put(directory / "pending" / "1700000000000000" / "1700000000000000_x").parent
    refuse("list", hidden.name, errno.EACCES)
    for _ in range(2):
        q.push(b"x")
    with pytest.raises(Full):
        q.push(b"x")
    refuse.rules.clear()
    refuse("list", hidden.name, errno.EIO)
    with pytest.raises(OSError, match=hidden.name):  # which is no reason to go beyond the limit
        q.push(b"x")


@pytest.mark.parametrize("maxsize", [10, 11])
def test_maxsize_where_names_are_listed_twice(
    directory: Path, monkeypatch: pytest.MonkeyPatch, maxsize: int
) -> None:
    """A directory that lists names twice makes a queue no fuller."""

    @contextlib.contextmanager
    def scandir(path: str) -> Iterator[Iterable[os.DirEntry[str]]]:
        with REAL["scandir"](path) as entries:
            yield list(entries) * 2

    monkeypatch.setattr(os, "scandir", scandir)
    queue = FemtoQueue(directory, "a", maxsize=maxsize)
    assert len([queue.push(b"x") for _ in range(maxsize)]) == maxsize
    with pytest.raises(Full):
        queue.push(b"x")


def test_what_pop_could_not_read_makes_no_room(directory: Path, refuse: Refusal) -> None:
    """What was claimed, and put back as it could not be read, counts against maxsize as before."""
    q = FemtoQueue(directory, "node", maxsize=2)
    q.push_many([b"1", b"2"])
    refuse("open", "/in_progress/", errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        q.pop()
    refuse.rules.clear()
    with pytest.raises(Full):
        q.push(b"3")


def test_maxsize_where_times_are_coarse(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds where a directory's time moves in steps of two seconds, as on vfat and exfat."""
    q, step_ns = FemtoQueue(directory, "node", maxsize=20), 10**18
    monkeypatch.setattr(time, "time_ns", lambda: step_ns + 1_900_000_000)
    for _ in range(60):
        with contextlib.suppress(Full):
            q.push(b"x")
        for bucket in (directory / "pending").iterdir():
            os.utime(bucket, ns=(step_ns, step_ns))
    assert q.counts()["pending"] == 20


def test_push_many_takes_back_the_last_ones_first(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a failed batch is withdrawn, what can be seen of it is a prefix at every moment."""
    q = FemtoQueue(directory, "node", sync_after_write=True)
    assert q.cancel(q.push(b"first"))  # the clock and the bucket are there
    items = [b"%d" % n for n in range(5)]
    seen = []
    real = os.unlink

    def unlink(path: str) -> None:
        seen.append(sorted(p.read_bytes() for p in (directory / "pending").rglob("*") if p.is_file()))
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "fsync", lambda descriptor: names(directory, "creating") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        q.push_many(items)
    assert seen[0] == items
    assert all(pushed == items[: len(pushed)] for pushed in seen)
    assert drained(FemtoQueue(directory, "other")) == []


@durable_or_not
def test_push_takes_bytes_likes(directory: Path, clock: Time, durable: bool) -> None:
    """Payloads are bytes-like, of any kind; push_many takes any iterable of them, and returns their ids
    in order; data_dir is a str or a path, and made if need be."""
    q = FemtoQueue(str(directory / "deep" / "er"), "a", sync_after_write=durable)
    items = [b"x", bytearray(b"x"), memoryview(b"-x-")[1:2], b"", *(b"%d" % n for n in range(250))]
    ids = [*q.push_many(iter(items)), *map(q.push, items), *q.push_many([])]
    assert ids == sorted(set(ids)) == list(q.ids("pending"))
    for item in items[:3]:
        q.schedule(item, NOW_US)
    assert drained(FemtoQueue(directory / "deep" / "er", "b")) == [*map(bytes, items * 2), *[b"x"] * 3]


@durable_or_not
@pytest.mark.parametrize("fails", ["an item", "the iterable"])
def test_push_many_that_fails_has_pushed_a_prefix(directory: Path, fails: str, durable: bool) -> None:
    """On an error, be it of an item or of the iterable, what was pushed is a prefix."""
    q = FemtoQueue(directory, "node", sync_after_write=durable)
    items = (b"%d" % n if n < 2 else "text" if fails == "an item" else 1 / 0 for n in range(4))
    with pytest.raises((TypeError, ZeroDivisionError)):
        q.push_many(items)
    found = drained(q)
    assert found == [b"0", b"1"][: len(found)] and names(directory, "creating") == []


@durable_or_not
def test_maxsize_is_exact_for_one_producer(directory: Path, durable: bool) -> None:
    """Every push raises queue.Full when maxsize tasks are pending, not before; a pop makes room."""
    q = FemtoQueue(directory, "node", maxsize=5, sync_after_write=durable)
    file = put(directory / "file")
    with pytest.raises(Full):
        q.push_many(b"%d" % n for n in range(20))
    pushed = drained(q)
    assert pushed == [b"%d" % n for n in range(5)][: len(pushed)]
    assert len(q.push_many([b"x"] * 4)) == 4 and q.push(b"x")
    for call in ("push(b'x')", "push_many([b'x'])", "push_file(file)", "push_file(file, move=True)"):
        with pytest.raises(Full, match="5 tasks are pending"):
            eval(f"q.{call}")
    assert file.exists() and names(directory, "creating") == []
    assert q.pop() and q.push(b"y")
    with pytest.raises(Full):
        q.push(b"z")
    assert q.counts()["pending"] == 5


@pytest.mark.parametrize("how", ["due", "retried", "requeued", "abandoned"])
def test_maxsize_counts_what_comes_back(directory: Path, clock: Time, how: str) -> None:
    """Tasks that fall due or come back take up room, though the producer counted before them."""
    q, other = FemtoQueue(directory, "node", maxsize=10), FemtoQueue(directory, "other", 1_000)
    ids = [q.schedule(b"later", NOW_US) if how == "due" else other.push(b"earlier") for _ in range(12)]
    claims = [other.pop() for _ in ids if how != "due"]
    for claim in claims if how == "requeued" else ():
        other.fail(claim)
    q.push(b"x")  # from here on, it has room for some, and need not count
    for id, claim in zip(ids, claims, strict=False):
        q.requeue(id) if how == "requeued" else how == "retried" and q.retry(claim)
    clock.advance(2.2)
    assert q.pop()
    for pending in (12, 10):
        with pytest.raises(Full):
            while True:
                q.push(b"y")
        assert q.counts()["pending"] == pending
        assert q.pop() and q.pop() and q.pop()


@durable_or_not
@pytest.mark.parametrize("how", ["copy", "move", "open file"])
def test_push_file_copies_or_moves(
    directory: Path, places: list[Path], durable: bool, how: str
) -> None:
    """push_file makes a file's content a task, from any filesystem; moved, the file is gone."""
    q = FemtoQueue(directory, "node", sync_after_write=durable)
    for place, content in itertools.product(places, (b"", b"x" * 3_000_000)):
        source = put(place / "file", content)
        inode = source.stat().st_ino
        if how == "open file":
            with source.open("rb") as file:
                id = q.push_file(file)
                assert file.tell() == len(content)
        else:
            id = q.push_file(source if how == "copy" else str(source), move=how == "move")
        assert source.exists() is (how != "move")
        task = q.pop()
        assert (task.id, task.data) == (id, content)
        assert (os.stat(task.path).st_ino == inode) is (how == "move" and place == places[0])
        q.done(task)
    assert names(directory, "creating") == []


@pytest.mark.parametrize("other", [False, True], ids=["same filesystem", "another filesystem"])
def test_a_durable_move_syncs_content_and_both_sides(
    directory: Path, places: list[Path], monkeypatch: Patch, other: bool
) -> None:
    """A durable move fsyncs the file's content, and the directory that it came from."""
    if len(places) <= other:
        pytest.skip("there is one filesystem here")
    source = put(places[other] / "from here" / "file")
    q = FemtoQueue(directory, "node", sync_after_write=True)
    q.cancel(q.push(b"first"))
    synced: list[tuple[str, bool]] = []

    def fsync(descriptor: int) -> None:
        synced.append((synced_path(descriptor), source.exists()))
        REAL["fsync"](descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert q.status(q.push_file(source, move=True)) == "pending" and not source.exists()
    assert (str(source.parent), False) in synced
    content = f"{directory}/creating/" if other else str(source)
    assert any(path.startswith(content) and not os.path.isdir(path) for path, _ in synced)


@pytest.mark.parametrize("move", [False, True], ids=["copy", "move"])
def test_push_file_refuses_what_is_no_file(directory: Path, tmp_path: Path, move: bool) -> None:
    """What is no file raises, a FIFO at once, and a link that is to be moved; nothing is changed."""
    q = FemtoQueue(directory, "node")
    assert q.cancel(q.push(b"first"))
    os.mkfifo(tmp_path / "fifo")
    put(tmp_path / "dir" / "file")
    links = ("nowhere", "fifo", "dir/file")
    for number, target in enumerate(links):
        (tmp_path / f"link-{number}").symlink_to(target)
    before = snapshot(tmp_path)
    for name in ("fifo", "dir", "link-1", "/dev/null", "link-0", "missing", *["link-2"][:move]):
        missing = name == "missing" or (name == "link-0" and not move)
        with pytest.raises(FileNotFoundError if missing else ValueError, match=re.escape(name)):
            q.push_file(tmp_path / name, move=move)
        assert snapshot(tmp_path) == before
    assert move or q.status(q.push_file(tmp_path / "link-2")) == "pending"


# --- pop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "code", "lists"),
    [
        ("rename", errno.ENOENT, True),
        ("rename", errno.EIO, True),
        ("rename", errno.EIO, False),
        ("open", errno.EIO, True),
    ],
)
def test_what_was_claimed_at_the_second_try_is_not_taken_back(
    directory: Path, clock: Time, refuse: Refusal, call: str, code: int, lists: bool
) -> None:
    """What a fault kept from being claimed at first is had by the same pop, and then kept: even if
    nobody could see, after the fault, what had become of it."""
    queue = FemtoQueue(directory, "a")
    assert queue.cancel(queue.push(b"0"))
    id = queue.push(b"1")
    failures = iter([code])
    real = {name: getattr(os, name) for name in (call, "scandir")}

    def in_vain(path: str, *rest: Any) -> Any:
        if "/in_progress/" in (path, *rest)[call == "rename"] and (code := next(failures, None)):
            if not lists:
                refuse("list", "in_progress/a~", errno.EIO)
            raise OSError(code, os.strerror(code), path)
        refuse.rules.clear()
        return real[call](path, *rest)

    setattr(os, call, in_vain)
    try:
        task = queue.pop()
        clock.advance(1.1)
        assert queue.pop() is next(failures, None) is None and task and task.id == id
        queue.done(task)
    finally:
        setattr(os, call, real[call])


def test_a_lease_begins_with_its_claim(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pop had to do before costs its task none of the lease: another worker leaves it alone."""
    one, other = (FemtoQueue(directory, node_id, 1_000, max_attempts=1) for node_id in "ab")
    *broken, good = one.push_many([b"x"] * 5)
    for id in broken:
        next(directory.glob(f"pending/*/{id}")).write_bytes(b"rot")
    seen: list[FemtoTask | None] = []

    def rename(source: str, target: str) -> None:
        REAL["rename"](source, target)
        if "/corrupt/" in target:
            clock.advance(0.3)
        elif good in target:
            seen.append(other.pop())

    monkeypatch.setattr(os, "rename", rename)
    task = one.pop()
    assert task and task.id == good and seen == [None]


def test_a_signal_handler_pops_while_buckets_are_opened(directory: Path) -> None:
    """A pop that comes in the midst of a pop: neither raises, and each task is delivered once."""
    for at in range(1, 10_000, 7):
        queue = FemtoQueue(directory, "a", keep_done=False)
        for number in range(12):  # of two producers
            bucket = directory / f"pending/{10**15 + number % 2}.0000000{number % 2}"
            put(bucket / f"{10**15 + number}_x")
        got: list[FemtoTask | None] = []
        with Lines(at, lambda: got.append(queue.pop())) as lines:  # noqa: B023
            got += [queue.pop() for _ in range(6)]
        got += [queue.pop() for _ in range(6)]
        ids = [task.id for task in got if task]
        assert sorted(ids) == [f"{10**15 + number}_x" for number in range(12)]
        for task in got:
            if task:
                queue.done(task)
        queue.close()
        if lines.count < at:
            return


def test_a_lease_begins_with_the_claim(directory: Path, clock: Time, monkeypatch: Patch) -> None:
    """However long the look before a claim takes, the claim has a full lease."""
    q = FemtoQueue(directory, "node", timeout_stale_ms=1_000)
    for _ in range(5):
        q.schedule(b"x", NOW_US + 1_000_000)
    clock.advance(2)
    monkeypatch.setattr(os, "rename", lambda *paths: (clock.advance(0.9), REAL["rename"](*paths)))
    task = q.pop()
    assert task
    deadline_us = int(Path(task.path).name.split("~")[2])
    assert deadline_us >= int((clock.wall - 0.91) * 1e6) + 1_000_000, "one rename ago, it began"


def test_never_none_while_due(directory: Path, clock: Time) -> None:
    """pop never returns None while a task is due, however recently it looked; nor 1 s after a lease."""
    queue, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "b", 300)
    queue.schedule(b"due", NOW_US + 500_000)
    queue.push(b"leased")
    assert other.pop()
    assert queue.pop() is None
    clock.advance(0.5)
    found = drained(queue)
    assert b"due" in found
    clock.advance(0.85)
    assert sorted(found + drained(queue)) == [b"due", b"leased"]


@pytest.mark.usefixtures("now")
def test_never_none_after_lost_races(queue: FemtoQueue, serve: Spawn, monkeypatch: Patch) -> None:
    """pop never returns None for what a worker skips because others were quicker to claim."""
    queue.push_many([b"c", b"d"])
    worker, rival = serve(queue.data_dir, "node-3"), FemtoQueue(queue.data_dir, "node-2")
    assert tell(worker, TAKE) == "b'a'"  # where no other process is, nobody skips
    lost: list[FemtoTask | None] = []

    def rename_too_late(source: str, target: str) -> None:
        if len(lost) < 2 and "/in_progress/node-1~" in target:
            lost.append(rival.pop())
        REAL["rename"](source, target)

    monkeypatch.setattr(os, "rename", rename_too_late)
    task = queue.pop()
    assert [task and task.data for task in (*lost, task)] == [b"b", b"c", b"d"]


def test_an_alarm_in_pop_leaves_no_claim_to_its_lease(scratch: Path) -> None:
    """A signal handler raises at any line of pop: the same object delivers all, and at once."""
    kept = []  # no line of an end that comes late is counted
    for at in itertools.count(1):
        kept.append(q := FemtoQueue(scratch / str(at), "node"))
        q.push_many([b"1", b"2", b"3"])
        try:
            with Lines(at, lambda: 1 / 0):
                assert q.pop()
            break
        except ZeroDivisionError:
            assert (at, sorted(drained(q))) == (at, [b"1", b"2", b"3"])
            assert (at, names(scratch / str(at), "in_progress")) == (at, [])
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
@pytest.mark.parametrize("how", [*VERDICTS, "lease", "own lease", "close", "drop", "another queue"])
@pytest.mark.parametrize("call", TASK_CALLS)
def test_a_task_is_finished_once_and_by_who_has_it(
    directory: Path, clock: Time, call: str, how: str, keep: bool
) -> None:
    """Who finished a task, or lost its claim, gets NotInProgress for every verdict, however often he
    tries, and whatever the next one did; who has it from another directory a ValueError. Nothing changes."""
    options = {"keep_done": keep, "keep_failed": keep}
    q, other = FemtoQueue(directory, "node", **options), FemtoQueue(directory, "other", **options)
    q.push(b"x")
    lost = q.pop()
    clock.advance(31.1 if "lease" in how else 0)
    if how in VERDICTS:
        VERDICTS[how](q, lost)
    elif how == "close":
        q.close()
    elif how == "drop":
        del q
    through = FemtoQueue(directory.with_name("third"), "node") if how == "another queue" else other
    through = through if how in ("close", "drop", "another queue") else q
    task = None if how in VERDICTS else (q if how == "own lease" else other).pop()
    error = ValueError if how == "another queue" else NotInProgress
    for finish in (lambda: None, lambda: task and other.done(task)):
        finish()
        before = files(directory.parent)
        for _ in range(2):
            with pytest.raises(error, match=lost.id):
                TASK_CALLS[call](through, lost)
            assert files(directory.parent) == before
    assert "lease" not in how or (lost.lost and task.attempt == 2)


@pytest.mark.parametrize("delay_ms", [0, 1_000])
@pytest.mark.parametrize("keep_failed", [True, False])
def test_max_attempts_end_in_failed(
    directory: Path, clock: Time, keep_failed: bool, delay_ms: int
) -> None:
    """After max_attempts deliveries retry, with or without a delay, is fail, which keeps or deletes."""
    q = FemtoQueue(directory, "node", max_attempts=2, keep_failed=keep_failed)
    id = q.push(b"x")
    for _ in range(2):
        q.retry(q.pop(), delay_ms)
        clock.advance(1)
    q.push(b"y")
    q.fail(q.pop(), "why")
    assert q.status(id) == ("failed" if keep_failed else None) and q.pop() is None
    assert len(names(directory, "failed")) == (4 if keep_failed else 0), "two tasks and their reasons"


def test_a_task_that_kills_its_worker(directory: Path, spawn: Spawn) -> None:
    """Claimed, SIGKILL, claimed again: after max_attempts it is in failed/ and the next one runs."""
    worker = """
import signal
def handle(task):
    print(task.attempt, task.data.decode(), flush=True)
    if task.data == b"poison":
        os.kill(os.getpid(), signal.SIGKILL)
FemtoQueue(sys.argv[1], "node", max_attempts=3).run(handle, until_empty=True)
"""
    q = FemtoQueue(directory, "producer")
    poison, _ = q.push_many([b"poison", b"behind"])
    for attempt in (1, 2, 3):
        assert ending(spawn(worker, directory)) == (f"{attempt} poison\n", -signal.SIGKILL)
    out, status = ending(spawn(worker, directory))
    assert out.startswith("1 behind\n") and status == 0
    assert f"{poison} has used up its 3 attempts" in out
    assert counted(q) == {"done": 1, "failed": 1}


def test_lost_though_no_other_thread_could_run(directory: Path) -> None:
    """task.lost is true once the lease is over, by the clock, whatever thread was starved."""
    code = """
import ctypes
q = FemtoQueue(sys.argv[1], "node", timeout_stale_ms=400)
q.push(b"x")
def handle(task):
    print(task.lost)
    sys.setswitchinterval(1e3)  # nobody gets the GIL who asks for it
    ctypes.PyDLL(None).usleep(900_000)
    lost = task.lost
    sys.setswitchinterval(0.005)
    print(lost)
q.run(handle, until_empty=True)
"""
    assert run(code, directory) == "False\nTrue\n"


# --- run ----------------------------------------------------------------------------------------------


def test_run_finishes_what_the_handler_returns_from(directory: Path) -> None:
    """When the handler returns, whatever it returns, the task is done; run says how many there were."""
    q = FemtoQueue(directory, "node")
    results = [None, False, 0, "failed", [1], iter([1]), map(str, [1]), ValueError(), coroutine, type]
    ids = q.push_many([b"x"] * len(results))
    handled: list[str] = []

    def handle(task: FemtoTask) -> object:
        handled.append(task.id)
        return results[len(handled) - 1]

    assert q.run(handle, until_empty=True) == len(results)
    assert handled == ids == list(q.ids("done"))
    assert q.run(never, until_empty=True) == 0


async def coroutine(task: FemtoTask) -> None:
    """Never runs, if nobody awaits it."""


async def async_generator(task: FemtoTask) -> Any:
    yield task


@pytest.mark.parametrize("handler", [coroutine, async_generator, lambda task: (x for x in [task])])
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_handler_that_has_not_run(directory: Path, handler: Callable[[FemtoTask], Any]) -> None:
    """A handler that returns what somebody else must run is a TypeError, and the task comes back."""
    q = FemtoQueue(directory, "node", max_attempts=1)
    id = q.push(b"x")

    def handle(task: FemtoTask) -> object:
        return handler(task)

    with pytest.raises(TypeError, match=r"^handler: .*asyncio\.run\(handler\(task\)\)"):
        q.run(handle, until_empty=True)
    assert q.status(id) == "pending"


@pytest.mark.parametrize("error", [RuntimeError("no"), *map(SystemExit, (0, 3, "no", None))], ids=repr)
def test_run_logs_and_retries_what_the_handler_raises_from(
    directory: Path, clock: Time, caplog: Any, error: BaseException
) -> None:
    """An exception, SystemExit too, is logged and the task retried with exponential backoff up to
    max_attempts; then the traceback is its reason."""
    q = FemtoQueue(directory, "node", max_attempts=4)
    id, good = q.push_many([b"x", b"good"])

    def misfit(task: FemtoTask) -> None:
        if task.id == id:
            raise error

    for attempt in (1, 2, 3, 4):
        assert q.run(misfit, until_empty=True) == (attempt == 1), "the other task is done"
        assert len(caplog.messages) == attempt and id in caplog.messages[-1]
        if attempt < 4:
            [name] = names(directory, "scheduled")
            delay_s = int(name[-16:]) / 1e6 - clock.wall
            assert 0.499 <= delay_s / 2 ** (attempt - 1) <= 1.501
            assert q.pop() is None and q.reason(id) is None
            clock.advance(delay_s + 1e-3)
    assert [q.status(id), q.status(good)] == ["failed", "done"]
    for text in (caplog.text, q.reason(id)):
        assert "Traceback" in text and "in misfit" in text and type(error).__name__ in text


def test_backoff_has_jitter_and_a_limit(directory: Path, clock: Time) -> None:
    """Tasks that failed together do not come back together; each is tried again within 90 minutes."""
    q = FemtoQueue(directory, "node")
    for number in range(50):
        put(directory / "pending" / f"1790000000000000_{number}~60")
    assert q.run(lambda task: 1 / 0, until_empty=True) == 0
    delays_s = {int(name[-16:]) / 1e6 - clock.wall for name in names(directory, "scheduled")}
    assert len(delays_s) > 20
    assert 1_799 <= min(delays_s) < 3_600 < max(delays_s) <= 5_401


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
        if raises:
            raise ZeroDivisionError("behind it")

    count = 2 if call == "retry" else 1  # it is delivered at once
    assert q.run(handle, until_empty=True) == (0 if raises else count)
    assert q.status(id) == ("failed" if call == "retry" else AFTER[call])
    assert "lease" not in caplog.text
    assert sum("behind it" in (r.exc_text or "") for r in caplog.records) == (count if raises else 0)


def test_the_handler_is_told_that_its_lease_was_lost(directory: Path, spawn: Spawn) -> None:
    """Stopped past its lease: another has the task; task.lost says so, and run leaves it alone."""
    worker = """
q = FemtoQueue(sys.argv[1], "worker", timeout_stale_ms=300)
def handle(task):
    print("begun", flush=True)
    while not task.lost:
        time.sleep(0.001)
    print("lost")
print(q.run(handle, until_empty=True))
"""
    q = FemtoQueue(directory, "other")
    id = q.push(b"x")
    process = spawn(worker, directory)
    expect(process, "begun")
    process.send_signal(signal.SIGSTOP)
    task = q.pop(timeout=10)
    assert (task.id, task.attempt) == (id, 2)
    process.send_signal(signal.SIGCONT)
    out, status = ending(process)
    assert out.startswith("lost\n0\n") and status == 0
    assert f"{id}: its lease was lost" in out
    q.done(task)


@pytest.mark.parametrize("end", ["raise SystemExit(3)", "raise ValueError", "pass", "q.close()"])
def test_a_process_that_a_handler_forked_leaves_the_task_alone(directory: Path, end: str) -> None:
    """A handler may fork, however the child ends: the task stays its parent's."""
    code = f"""
q, other = FemtoQueue(sys.argv[1], "node"), FemtoQueue(sys.argv[1], "other")
q.push(b"x")
parent = os.getpid()
def handle(task):
    if pid := os.fork():
        os.waitpid(pid, 0)
        print(q.status(task.id), other.pop())
    else:
        {end}
try:
    print(q.run(handle, until_empty=True), q.counts("done"))
finally:
    if os.getpid() != parent:
        os._exit(0)
"""
    assert run(code, directory) == "in_progress None\n1 {'done': 1}\n"


def test_also_looks_into_the_queues_in_their_order_before_each_task(tmp_path: Path) -> None:
    """run(handler, also=[q2, q3]) looks into its own queue first, then into the others, each time, and
    until_empty handles what comes meanwhile, and waits for nothing."""
    q1, q2, q3 = queues = [FemtoQueue(tmp_path / name, "node") for name in "123"]
    q3.push_many([b"3a", b"3b", b"3c"])
    q2.push(b"2a")
    q3.schedule(b"3d", LATER_US)
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
    assert [*map(counted, queues)] == [{"done": 3}, {"done": 2}, {"scheduled": 1, "done": 3}]


def test_also_verdicts_are_those_of_the_right_queue(tmp_path: Path) -> None:
    """Each task has the backoff, the max_attempts and the keeping of its own queue."""
    q1 = FemtoQueue(tmp_path / "1", "node")
    q2 = FemtoQueue(tmp_path / "2", "node", max_attempts=1, keep_done=False)
    ids = q1.push_many([b"raise ValueError('no')", b"pass"])
    more = q2.push_many([b"raise ValueError('no')", b"pass", b"task.queue.fail(task, 'because')"])
    more.append(q2.push(b"task.queue.touch(task); task.queue.retry(task, 10**6)"))
    q1.run(lambda task: exec(task.data), also=[q2], until_empty=True)
    assert [q1.status(id) for id in ids] == ["scheduled", "done"]
    # max_attempts=1: another delivery of the last one there is none
    assert [q2.status(id) for id in more] == ["failed", None, "failed", "failed"]
    assert "no" in q2.reason(more[0]) and q2.reason(more[2]) == "because"


@pytest.mark.parametrize("leases_ms", [[400], [60_000, 400], [400, 60_000]], ids=str)
def test_the_lease_is_kept_alive_while_the_handler_runs(tmp_path: Path, leases_ms: list[int]) -> None:
    """A handler may take longer than the lease of its task's queue: nobody else gets its task."""
    queues = [FemtoQueue(tmp_path / str(ms), "node", timeout_stale_ms=ms) for ms in leases_ms]
    queues[leases_ms.index(400)].push(b"x")
    other = FemtoQueue(tmp_path / "400", "other")
    lost = []

    def handle(task: FemtoTask) -> None:
        assert other.pop(timeout=1.6) is None
        lost.append((task.lost, task.data))

    assert queues[0].run(handle, also=queues[1:], until_empty=True) == 1
    assert lost == [(False, b"x")] and counted(other) == {"done": 1}


def test_also_waits_for_all_of_them(tmp_path: Path) -> None:
    """A run that waits wakes on a push into any of its queues."""
    queues = [FemtoQueue(tmp_path / str(n), "node") for n in range(3)]
    ran = in_thread(lambda: queues[0].run(lambda task: None, also=queues[1:]))
    for n in (2, 0, 1, 1):
        other = FemtoQueue(tmp_path / str(n), "other")
        other.push(b"x")
        assert other.join(timeout=10)
    queues[0].stop()
    assert ran.result(10) == 4


# --- signals are deferred, not swallowed --------------------------------------------------------------

WORKER = """
import signal
q, second = (FemtoQueue(sys.argv[1] + name, "worker") for name in ("", "-2"))
def handle(task):
    print("begun", task.data.decode(), flush=True)
    input()
def mine(number, frame):
    print("mine", number, flush=True)
def late(number, frame):
    raise TimeoutError("late")
def caught():
    try:
        q.run(handle)
    except (TimeoutError, KeyboardInterrupt) as error:
        print("caught", error, flush=True)
def by_turns():
    while True:
        q.run(handle, until_empty=True)
        second.run(handle, until_empty=True)
"""
TERM, INT, HUP, QUIT = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
RETURNS = "signal.signal(15, mine); print(q.run(handle), signal.getsignal(15) is mine)"
RAISES = "signal.signal(15, late); caught(); print(signal.getsignal(15) is late)"
# What is signalled, how the worker runs, what it prints afterwards, its exit status.
DEFERRED: dict[str, tuple[int, str, str, int]] = {
    **{number.name: (number, "q.run(handle)", "", -number) for number in (TERM, INT, HUP, QUIT)},
    "until empty": (TERM, "q.run(handle, until_empty=True)", "", -15),
    "a loop around run": (TERM, "while True: q.run(handle, until_empty=True); time.sleep(1)", "", -15),
    "two queues by turns": (TERM, "by_turns()", "", -15),
    "also": (TERM, "q.run(handle, also=[second])", "", -15),
    "nested": (TERM, "second.run(lambda task: q.run(handle))", "", -15),
    "KeyboardInterrupt": (INT, "caught()", "caught \n", 0),
    "its handler returns": (TERM, RETURNS, "mine 15\n1 True\n", 0),
    "its handler exits": (TERM, "signal.signal(15, lambda *_: sys.exit(5)); q.run(handle)", "", 5),
    "its handler raises": (TERM, RAISES, "caught late\nTrue\n", 0),
    "a task that fails": (TERM, "q.run(lambda task: (handle(task), 1 / 0))", "", -15),
}


WAITS = ("SIGTERM", "SIGINT", "also", "nested", "its handler returns")
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
    if when == "waits":
        assert q.cancel(ids[1]) and (case == "nested" or second.purge("pending", 0))
    process = spawn(WORKER + code, directory)
    expect(process, "begun 1")
    if when == "waits":
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
    # With two nested runs, the task of the outer one is in hand, too.
    nested = {"done": 1} if case == "nested" and when != "twice" else {"pending": 1}
    assert counted(second) == ({} if when == "waits" and case != "nested" else nested)
    expected = {"waits": None, "in hand": (b"2", 1), "twice": (b"1", 2)}[when]
    task = FemtoQueue(directory, "next").pop()
    assert (task and (task.data, task.attempt)) == expected
    first = "scheduled" if "fails" in case else "done"
    assert q.status(ids[0]) == ("in_progress" if when == "twice" else first)


def test_a_handler_that_was_not_set_from_python_is_there_afterwards(directory: Path) -> None:
    """The handlers from before are restored, also those of C (faulthandler, an embedding program)."""
    code = """
import faulthandler
faulthandler.register(signal.SIGHUP, file=sys.stdout)
q.run(handle, until_empty=True)
signal.raise_signal(signal.SIGHUP)
print("alive")
"""
    out = run(WORKER + code, directory)
    assert "most recent call first" in out and out.endswith("alive\n")


@pytest.mark.parametrize("what", ["SIGTERM", "stop"])
def test_interrupted_at_any_line_of_run(scratch: Path, what: str) -> None:
    """Wherever it comes, between two tasks too, a signal or a stop ends run, and no claim stays."""

    def work(place: Path, at: int) -> int:
        signal.signal(TERM, signal.SIG_DFL)
        q = FemtoQueue(place, "node")
        q.push_many([b"1", b"2"])
        with Lines(at, q.stop if what == "stop" else lambda: os.kill(os.getpid(), TERM)) as lines:
            q.run(lambda task: None, until_empty=True)
        if what == "stop" and at:
            assert q.run(never) == 0
        return lines.count

    total = work(scratch / "0", 0)
    assert total > 50
    for at in range(1, total, max(1, total // 60)):
        place = scratch / str(at)
        status, error = in_child(lambda place=place, at=at: work(place, at))
        status = os.waitstatus_to_exitcode(status)
        assert (at, status, error) == (at, 0 if what == "stop" else -TERM, "")
        counts = FemtoQueue(place, "other").counts()
        assert (at, counts["pending"] + counts["done"]) == (at, 2)


class Gate:
    """A handler that waits until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, task: FemtoTask) -> None:
        self.begun.set()
        assert self.go.wait(20)


@pytest.mark.parametrize("how", ["two runs", "also", "nested"])
def test_stop_ends_every_run_after_the_task_in_hand(directory: Path, how: str) -> None:
    """stop: every run of this object ends after the task in hand; what waits stays pending."""
    q, more = FemtoQueue(directory, "node"), FemtoQueue(f"{directory}-2", "node")
    q.push_many([b"1", b"2", b"3"])
    gates = [Gate(), Gate()]
    calls: dict[str, Callable[[Gate], int]] = {
        "two runs": q.run,
        "also": lambda gate: q.run(gate, also=[more]),
        "nested": lambda gate: gate is gates[0] and q.run(lambda task: q.run(gate) and None),
    }
    runs = [in_thread(calls[how], gate) for gate in gates]
    used = gates[: 1 if how == "nested" else 2]
    assert all(gate.begun.wait(10) for gate in used)
    q.stop()
    for gate in gates:
        gate.go.set()
    assert [ran.result(10) for ran in runs] == [1, 1][: len(used)] + [False] * (how == "nested")
    assert counted(q) == {"done": 2, "pending": 1}


def test_stop_ends_what_is_begun_later_at_once_and_nothing_else(directory: Path) -> None:
    """stop: run and waiting calls begun later end at once; all else still works, and for others all."""
    q, other = FemtoQueue(directory, "node"), FemtoQueue(directory, "other")
    q.push(b"held")
    held = other.pop()
    q.stop()
    assert q.run(never) == q.run(never, until_empty=True) == 0
    assert q.pop(timeout=None) is None and q.join() is False
    q.push_many([b"1", b"2", b"3"])
    assert q.run(never) == 0, "though a task is there"
    assert [q.pop().data, q.pop(timeout=1e6).data] == [b"1", b"2"]
    assert other.run(lambda task: None, until_empty=True) == 1
    other.done(held)
    assert counted(q) == {"done": 2, "in_progress": 2}
    q.close()
    assert drained(other) == [b"1", b"2"]


HOSTILE_IDS = [
    *("", ".", "..", "*", "../../secret", "/etc/passwd", f"../done/{OLD_ID}"),
    *(f"{OLD_ID}/../../../secret", f"{OLD_ID}\0", f"{OLD_ID[:20]}\0{OLD_ID[21:]}", f"{OLD_ID}\n"),
    *(f"{OLD_ID}\udcff", f"{OLD_ID}~1", f"{OLD_ID[:17]}{'x' * 300}", "٣" * 16 + "_x"),
]


def test_a_hostile_id_never_reaches_the_filesystem(directory: Path) -> None:
    """An id that is no task's name is no task: no system call ever sees it."""
    q = FemtoQueue(directory, "node")
    put(directory.parent / "secret")
    for id in [*HOSTILE_IDS, OLD_ID]:
        calls = calls_of(lambda id=id: [call(id) for call in (q.status, q.cancel, q.requeue, q.reason)])
        assert (calls == []) is (id != OLD_ID), id
        assert q.status(id) is q.reason(id) is None and q.cancel(id) is q.requeue(id) is False


MOVES = ["successor", "retry", "retry later"]


@pytest.mark.parametrize(
    ("look", "move"), [*itertools.product(["join"], MOVES), *itertools.product(["status"], MOVES[1:])]
)
@pytest.mark.parametrize("moves", [2, 4, 12])
def test_a_task_that_moves_during_a_scan_does_not_slip_through(
    directory: Path, clock: Time, monkeypatch: Patch, look: str, move: str, moves: int
) -> None:
    """join is True only if there was such a moment; status never misses what exists all the while."""
    queue, observer = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    id = queue.push(b"x")
    held = queue.pop()
    left = 0

    def scandir(path: Any = ".") -> Any:
        """Before the directory is read that the task is in, it goes to one that was read before."""
        nonlocal held, left
        in_progress = os.path.relpath(path, directory).startswith("in_progress")
        if left and (held is not None) is in_progress:
            left, before = 0, left  # the move itself scans, too
            if not held:
                clock.advance(1)
                held = queue.pop()
            elif move == "successor":
                queue.push(b"x")
                held = queue.done(held)
            else:
                held = queue.retry(held, 1 if move == "retry later" else 0)
            left = before - 1
        return REAL["scandir"](path)

    monkeypatch.setattr(os, "scandir", scandir)
    for _ in range(10):
        left = moves
        found = observer.join(0) if look == "join" else observer.status(id)
        assert found in ([False] if look == "join" else ["scheduled", "pending", "in_progress"])
        assert left < moves, "it scanned"
        left = 0
        clock.advance(1)
        held = held or queue.pop()


def test_what_exists_all_the_while_is_always_listed(scratch: Path, spawn: Spawn) -> None:
    """Beside a process that retries one task, and renews the leases of others, on and on: join is False,
    status never None, and ids reports no claim absent."""
    queue = FemtoQueue(scratch / "queue", "a")
    id, *ids = queue.push_many([b"%d" % number for number in range(600)])
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
        assert queue.join(0) is False


def test_a_renewed_lease_does_not_hide_since_when_a_claim_runs(directory: Path, clock: Time) -> None:
    """claims tells of each claim whose it is, and if that one is alive or cannot be judged from here, its
    attempt, since when it runs, and what is left."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"x")
    queue.retry(queue.pop())
    put(directory / "in_progress" / DEAD_OWNER / f"{OLD_ID}~1~{NOW_US + HOUR_US}")
    task = queue.pop()
    for _ in range(4):
        clock.advance(20)
        queue.touch(task)
    clock.advance(5)
    elsewhere, claim = sorted(FemtoQueue(directory, "b").claims(), key=lambda claim: claim["id"])
    assert (elsewhere["id"], elsewhere["alive"]) == (OLD_ID, "unknown")
    expected = {"id": task.id, "attempt": 2, "node_id": "a", "pid": os.getpid(), "alive": "yes"}
    times = {"since_s": pytest.approx(85, abs=0.01), "lease_left_s": pytest.approx(25, abs=0.01)}
    assert claim == expected | times


# --- cancel, requeue, purge, join ---------------------------------------------------------------------


@pytest.mark.parametrize("state", ["pending", "scheduled", "done", "failed", "corrupt"])
def test_purge_goes_by_the_time_in_the_state(
    directory: Path, tmp_path: Path, monkeypatch: Patch, state: str
) -> None:
    """purge deletes what has been in its state for so long, however old task or file are; it says how
    many, and nothing else is touched."""
    q, now, ids = FemtoQueue(directory, "node"), time.time(), []
    for age_s in (10**6, -(10**6)):  # files of long ago, and from a machine whose clock is ahead
        os.utime(put(tmp_path / "file"), (now - age_s, now - age_s))
        ids.append(id := q.push_file(tmp_path / "file", move=True))
        if state == "corrupt":
            next((directory / "pending").rglob(id)).rename(directory / "corrupt" / id)
        elif state != "pending":
            finish = {"done": "done", "failed": "fail", "scheduled": "retry"}[state]
            getattr(q, finish)(q.pop(), *[1e9][: finish == "retry"])
    others = [other for other in STATES if other not in (state, "in_progress")]
    for other in others:
        put(directory / other / OLD_ID)
    stray = put(directory / state / ".DS_Store")
    for past_s, count in ((0, 0), (59, 0), (120, 2)):
        monkeypatch.setattr(time, "time", lambda past_s=past_s: now + past_s)
        assert q.purge(state, 60) == count
    assert stray.exists() and [q.status(id) for id in ids] == [None, None]
    assert q.counts(state) == {state: 0} and all(q.counts(other)[other] for other in others)


def test_join_watches_until_all_is_finished(directory: Path, clock: Time) -> None:
    """True when nothing is pending, in progress or scheduled; False after timeout, never early."""
    q = FemtoQueue(directory, "node")
    assert q.join() is q.join(0) is True
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


@pytest.mark.skipif(sys.platform != "linux", reason="it closes while inotify is opened")
def test_close_ends_a_wait_that_begins(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is about to wait, and finds itself closed, returns None like one that waits."""
    queue = FemtoQueue(directory, "a")

    real = os.eventfd

    def eventfd(*arguments: int) -> int:
        queue.close()
        return real(*arguments)

    monkeypatch.setattr(os, "eventfd", eventfd)
    assert queue.pop(timeout=60) is None


@pytest.mark.parametrize("closers", [1, 2])
@pytest.mark.parametrize("which", ["its own", "also"])
def test_close_waits_for_the_task_in_hand(directory: Path, which: str, closers: int) -> None:
    """close ends this object's run first, and waits for it: no task is given away in mid-work."""
    q, urgent = FemtoQueue(directory, "node"), FemtoQueue(f"{directory}-2", "node")
    ids = q.push_many([b"1", b"2"])
    handle = Gate()
    ran = in_thread(lambda: urgent.run(handle, also=[q]) if which == "also" else q.run(handle))
    assert handle.begun.wait(10)
    closed = [in_thread(q.close) for _ in range(closers)]
    assert concurrent.futures.wait(closed, 0.3).done == set(), "closed while the handler works"
    other = FemtoQueue(directory, "other")
    assert other.status(ids[0]) == "in_progress"
    handle.go.set()
    assert [call.result(10) for call in closed] == [None] * closers and ran.result(10) == 1
    assert [other.status(id) for id in ids] == ["done", "pending"]


@pytest.mark.parametrize("how", ["handler", "nested", "also"])
def test_close_by_its_own_handler(directory: Path, how: str) -> None:
    """close called by its own handler: a FemtoQueueError that names stop(); the task stays in hand."""
    q, more = FemtoQueue(directory, "node"), FemtoQueue(f"{directory}-2", "node")
    id = q.push(b"x")
    refused = []

    def close(task: FemtoTask) -> None:
        with pytest.raises(FemtoQueueError, match=re.escape("stop()")):
            q.close()
        refused.append(q.status(id))

    def nested(task: FemtoTask) -> None:
        more.push(b"x")
        more.run(close, until_empty=True)

    runner, also = (more, [q]) if how == "also" else (q, [])
    assert runner.run(nested if how == "nested" else close, also=also, until_empty=True) == 1
    assert refused == ["in_progress"] and q.status(id) == "done"


def test_a_closed_queue_refuses_every_call(directory: Path) -> None:
    """Every later call raises FemtoQueueError and changes nothing; close may be repeated."""
    q, task, ids = full_house(directory)
    scope = {"q": q, "task": task, "ids": ids}
    others = ["q.stop()", "q.claims()", "q.reason(task.id)", "q.pop(timeout=None)", "q.__enter__()"]
    for call in [*CALLS, *others]:
        q.close()
        before = files(directory)
        with pytest.raises(FemtoQueueError, match="closed"):
            eval(call, globals(), scope)
            assert call == "q.close()" and q.stop()
        assert files(directory) == before


@pytest.mark.parametrize("call", ["scandir", "rename", "fsync"])
@pytest.mark.usefixtures("unlogged")
def test_close_that_raised_can_be_made_again(directory: Path, monkeypatch: Patch, call: str) -> None:
    """A close that raised has closed, but given nothing back: the next one does, for all to have."""
    q = FemtoQueue(directory, "node", sync_after_write=call == "fsync")
    id = q.push(b"x")
    task = q.pop()

    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(arguments[0]))

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, call, broken)
        q.close()
    with pytest.raises(FemtoQueueError, match="closed"):
        q.done(task)
    q.close()
    assert names(directory, "pending") == [f"{id}~1"]
    assert run("print(FemtoQueue(sys.argv[1], 'other').pop().id)", directory) == f"{id}\n"


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
        q.push_many([b"1", b"2"])
        drained(q)
        with Lines() as task:
            q.push(b"x")
            q.done(q.pop())
        with Lines() as drop:
            objects.clear()
        return drop.count / count, task.count

    few, many = cost(20), cost(400)
    assert 0 < many[0] <= 1.5 * few[0] + 5 and many[1] <= 1.2 * few[1] + 5


@pytest.mark.parametrize("size", [1, (1 << 20) + 1])
@pytest.mark.parametrize("call", ["done", "fail", "retry", "touch"])
def test_finished_in_another_process(directory: Path, call: str, size: int) -> None:
    """A task can be pickled and finished from another process, though it was touched meanwhile."""
    queue = FemtoQueue(directory, "a")
    id = queue.push(b"x" * size)
    task = queue.pop()
    copy = pickle.dumps(task)
    queue.touch(task)
    code = f"""
import pickle
task = pickle.loads({copy if size == 1 else pickle.dumps(task)})
assert task.data == b"x" * {size}
FemtoQueue(sys.argv[1], "b").{call}(task)
"""
    run(code, directory)
    assert queue.status(id) == AFTER[call]
    if call in ("touch", "done"):  # a done whose answer was lost looks like that of another process
        assert call == "done" or task.data == b"x" * size
        queue.done(task)
    with pytest.raises(NotInProgress):
        queue.done(task)


@pytest.mark.parametrize("through", ["itself", "a copy"])
def test_data_while_the_lease_is_renewed(directory: Path, monkeypatch: Patch, through: str) -> None:
    """A large payload is read all the same when its lease is renewed at that moment, even twice."""
    queue = FemtoQueue(directory, "a")
    queue.push(payload := bytes((1 << 20) + 1))
    task = queue.pop()
    other = task if through == "itself" else pickle.loads(pickle.dumps(task))
    touches = iter([queue.touch, queue.touch])
    real = builtins.open

    def open_too_late(path: Any, *rest: Any, **options: Any) -> object:
        if path == task.path:
            next(touches, lambda task: None)(other)
        return real(path, *rest, **options)

    monkeypatch.setattr(builtins, "open", open_too_late)
    assert task.data == payload and next(touches, None) is None
    queue.done(task)
    with pytest.raises(FileNotFoundError):
        task.data  # noqa: B018


NO_STR = [(TypeError, "id: expected str", [None, 5, OLD_ID.encode(), [], FemtoTask(OLD_ID, b"")])]
BAD_CALLS: dict[str, list[tuple[type[Exception], str, list[object]]]] = {
    "push": [(TypeError, r"data.*\.encode\(\)", ["text"]), (TypeError, "data", [5, None, [1]])],
    "push_many": [
        (TypeError, "items.*push", [b"one", "one", memoryview(b"one"), bytearray(b"one"), 5]),
        (TypeError, r"\.encode\(\)", [["text"]]),
    ],
    "push_file": [
        (TypeError, "path", [5.0, None]),
        (ValueError, "path", ["."]),
        (FileNotFoundError, "nowhere", ["/nowhere"]),
    ],
    "schedule": [
        (TypeError, r"data.*\.encode\(\)", [("text", NOW_US)]),
        (TypeError, "time_us", [(b"", bad) for bad in (1.8e15, "tomorrow", None)]),
        (TypeError, "time_us", [(b"", datetime.date(2027, 1, 1))]),
        (TypeError, "time_us", [(b"", datetime.time(tzinfo=datetime.timezone.utc))]),
        (ValueError, "time_us.*time zone", [(b"", datetime.datetime(2027, 1, 1))]),
        (ValueError, "time_us", [(b"", NOW_US // 10**6), (b"", NOW_US // 1_000)]),
        (ValueError, "time_us", [(b"", NOW_US * 1_000), (b"", -NOW_US)]),
    ],
    "pop": [
        (ValueError, "timeout", [-1, -0.001, NAN, 10**400]),
        (TypeError, "timeout", ["5", "", True]),
    ],
    "join": [(ValueError, "timeout", [-1, NAN, 10**400]), (TypeError, "timeout", ["5", True])],
    **{call: [(TypeError, "task", [OLD_ID, None])] for call in ("done", "touch")},
    **dict.fromkeys(("status", "cancel", "requeue", "reason"), NO_STR),
    "fail": [(TypeError, "task", [OLD_ID]), (TypeError, "reason", [("task", 5), ("task", b"x")])],
    "retry": [
        (TypeError, "task", [OLD_ID]),
        (ValueError, "delay_ms", [("task", bad) for bad in (-1, NAN, 10**400)]),
        (TypeError, "delay_ms", [("task", bad) for bad in ("5", True, None)]),
    ],
    "run": [
        (TypeError, "^handler: ", [None, "text"]),
        (TypeError, "^also: ", [("handler", bad) for bad in (5, "text", [5], [None], ["queue"])]),
    ],
    "counts": [(ValueError, "state", ["creating", "Done", ""])],
    "ids": [(ValueError, "state", ["creating", "", "Done", "../..", None])],
    "purge": [
        (ValueError, "state", [("in_progress", 0), ("creating", 0), ("../x", 0), (None, 0)]),
        (ValueError, "older_than_s", [("done", bad) for bad in (-1, NAN, 10**400)]),
        (TypeError, "older_than_s", [("done", bad) for bad in ("1d", None, True)]),
    ],
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_arguments(directory: Path, queue: FemtoQueue, call: str) -> None:
    """A bad argument gets its error at the call, which names it, and nothing has changed."""
    task = queue.pop()
    before = snapshot(directory)
    for error, message, values in BAD_CALLS[call]:
        for value in values:
            given = value if isinstance(value, tuple) else (value,)
            stand_ins = {"task": task, "handler": never}
            arguments = [stand_ins.get(a, a) if isinstance(a, str) else a for a in given]
            options = {"until_empty": True} if call == "run" else {}
            if len(arguments) == 2 and call == "run":
                options["also"] = arguments.pop()
            with pytest.raises(error, match=message):
                getattr(queue, call)(*arguments, **options)
            assert snapshot(directory) == before, value
    queue.done(task)


# ====================================================================================================
# Rights and room: whoever comes first owns nothing that others need
# ====================================================================================================

# The standard library may lie where nobody else can read it.
IMPORTS = """
import argparse, ctypes, datetime, inspect, json, locale, logging, queue as _queue
import select, shutil, signal, stat, subprocess, threading, traceback
"""


def as_user(uid: int, gid: int, *groups: int, umask: int = 0o022) -> str:
    """Code by which a process becomes this user."""
    become = f"os.setgroups({[*groups]}); os.setgid({gid}); os.setuid({uid}); os.umask({umask})"
    return f"{IMPORTS}\n{become}\n"


def owned(directory: Path, uid: int, gid: int, mode: int) -> None:
    """Make a directory that belongs to somebody."""
    directory.mkdir()
    os.chown(directory, uid, gid)
    directory.chmod(mode)


LOOKS = """
for command in ("status", "status --json", "list pending", "list done", "cancel x", "requeue x"):
    femtoqueue.main([sys.argv[1], *command.split()])
"""
MAKES = """
queue = FemtoQueue(sys.argv[1], "first", sync_after_write=sys.argv[2] == "durable")
queue.push_many([b"%d" % number for number in range(5)])
for move in (False, True):
    with open(sys.argv[1] + "/file", "wb") as file:
        file.write(b"file")
    queue.push_file(file.name, move=move)
queue.schedule(b"due", time.time_ns() // 1000)
queue.schedule(b"later", time.time_ns() // 1000 + 10**9)
queue.done(queue.pop())
queue.fail(queue.pop(), "broken")
queue.retry(queue.pop())
queue.retry(queue.pop(), 10**6)
queue.touch(queue.pop())
femtoqueue.main([sys.argv[1], "push"])
"""
USES = """
queue = FemtoQueue(sys.argv[1], "second")
queue.push(b"mine"); queue.schedule(b"mine", time.time_ns() // 1000)
for state in ("failed", "done", "scheduled"):
    for id in list(queue.ids(state)):
        assert queue.requeue(id), state
count = 0
while task := queue.pop():
    task.data
    (queue.done, queue.fail)[count % 2](task)
    count += 1
print(count, queue.purge("done", 0) + queue.purge("failed", 0), queue.counts()["in_progress"])
"""


@needs_root
@needs_mounts
@pytest.mark.parametrize(
    "who",  # the mode and owner of data_dir, the first and the second user, the umask of the first
    [
        (0o755, (65534, 65534), (0, 0), (65534, 65534), 0o077),
        (0o700, (65534, 65534), (0, 0), (65534, 65534), 0o022),
        (0o2770, (65534, 65533), (0, 0), (65534, 65533), 0o077),
        (0o770, (1001, 65533), (1002, 65533), (1001, 65533), 0o027),
        (0o2770, (1001, 65533), (1002, 1002, 65533), (1001, 1001, 65533), 0o007),
        (0o777, (1001, 65533), (1002, 1002, 65533), (1001, 1001, 65533), 0o022),
    ],
)
@pytest.mark.parametrize("kind", ["used before", "durable"])
def test_whoever_comes_first_owns_nothing_that_others_need(
    open_to_all: Path, tmp_path: Path, who: tuple[Any, ...], kind: str
) -> None:
    """Who looks first after a boot writes nothing. What is shared has data_dir's mode, and what root makes
    its owner and group as well; payloads have what the umask says."""
    mode, owner, first, second, umask = who
    owned(open_to_all, *owner, mode)
    again = rebooted(tmp_path)
    if kind == "used before":
        run(as_user(*second) + MAKES.splitlines()[-1], open_to_all)
        before = snapshot(open_to_all, times=True)
        run(as_user(*first, umask=umask) + LOOKS, open_to_all, under=again)
        assert snapshot(open_to_all, times=True) == before
    id = run(as_user(*first, umask=umask) + MAKES, open_to_all, kind, under=again).strip()
    for path in open_to_all.rglob("*"):
        info = path.stat()
        assert (info.st_uid, info.st_gid) == owner or first != (0, 0), path
        place = path.relative_to(open_to_all).parts
        if path.is_dir() and (len(place) == 1 or place[1].isdigit()):
            assert (path, stat.S_IMODE(info.st_mode)) == (path, mode)
    [path] = (open_to_all / "pending").rglob(id)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    count = 12 + (kind == "used before")
    assert run(as_user(*second) + USES, open_to_all, under=again) == f"{count} {count} 0\n"


@needs_root
@pytest.mark.parametrize("kind", ["another's", "a file"])
@pytest.mark.parametrize("call", ["push(b'%d')", "schedule(b'%d', 10**15)"])
def test_a_shared_bucket_that_cannot_be_used(open_to_all: Path, call: str, kind: str) -> None:
    """Where another user made the shared bucket his own, a producer opens one of its own."""
    owned(open_to_all, 0, 0, 0o777)
    push = "FemtoQueue(sys.argv[1], 'node')." + call
    run(push % 1, open_to_all)
    for path in open_to_all.rglob("*"):
        path.chmod(0o777)
    [bucket] = (open_to_all / ("pending" if "push" in call else "scheduled")).iterdir()
    if kind == "a file":
        shutil.rmtree(bucket)
        put(bucket)
    bucket.chmod(0o700)
    for number in (2, 3):
        run(as_user(65534, 65534, umask=0) + push % number, open_to_all)
    first = [b"1"] if kind != "a file" else []
    assert drained(FemtoQueue(open_to_all, "root")) == [*first, b"2", b"3"]


WITHOUT_ROOM: dict[str, object] = {
    "[q.status(id) for id in ids.values()]": [*STATES],
    "q.counts()": dict.fromkeys(STATES, 1),
    "[*q.ids('done')] == [ids['done']]": True,
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
    break_clock(directory)
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
    queue = FemtoQueue(directory, "a")
    found: list[tuple[str, bytes]] = []
    pushed: dict[str, bytes] = {}

    def take() -> bool:
        if task := queue.pop():
            found.append((task.id, task.data))
            queue.done(task)
        return bool(task)

    def work(number: int) -> None:
        for count in range(150):
            data = b"%d" % (number * 1_000 + count)
            pushed[queue.push(data)] = data
            if count % 3:
                take()
        while take():
            pass

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in [in_thread(work, number) for number in range(8)]:
            thread.result(60)
    finally:
        sys.setswitchinterval(before)
    assert sorted(found) == sorted(pushed.items()) and len(found) == queue.counts()["done"] == 1_200


def test_done_in_a_thread_is_durable_by_itself(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A durable done has synced both sides of its claim, though another thread is about to do that."""
    queue = FemtoQueue(directory, "a", sync_after_write=True)
    queue.push_many([b"1", b"2"])
    first, second = queue.pop(), queue.pop()
    sides = {str(directory / "done"), os.path.dirname(second.path)}
    sides |= {str(path) for path in (directory / "pending").iterdir()}
    begun, returned = threading.Event(), threading.Event()
    synced: set[str] = set()  # begun after the rename, and ended

    def sync_slowly(descriptor: int) -> None:
        moved, path = not os.path.exists(second.path), synced_path(descriptor)
        if not begun.is_set():
            begun.set()
            returned.wait(0.3)  # in vain, if the other one waits for this
        REAL["fsync"](descriptor)
        if moved:
            synced.add(path)

    monkeypatch.setattr(os, "fsync", sync_slowly)
    other = in_thread(queue.done, first)
    assert begun.wait(10)
    queue.done(second)
    assert sides <= synced
    returned.set()
    other.result(10)


@pytest.mark.parametrize("what", ["a task's way back", "its directory, made again"])
def test_what_another_thread_syncs_is_waited_for(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A durable done, or a claim, does not stand before all it needs is on disk, whoever syncs that."""
    queue = FemtoQueue(directory, "a", sync_after_write=True)
    if what == "a task's way back":
        end = f"/{DEAD_OWNER}"
        for number in range(2):  # one for each thread
            put(directory / f"in_progress{end}" / f"170000000000000{number}_x~1~1700000000000000")
    else:
        end = "/in_progress"
        queue.push(b"0")
        queue.done(queue.pop())
        for _ in range(3):
            clock.advance(10)
            assert queue.pop() is None  # and its directory is removed
        queue.push_many([b"1", b"2"])
    with synced_slowly(queue, end, monkeypatch) as events:
        task = queue.pop()
        if task.attempt == 2:
            queue.done(task)
    assert events == ["synced", "returned"]


@pytest.mark.parametrize("who", ["signal handler", "thread"])
@pytest.mark.parametrize("inner", ["push", "pop"])
@pytest.mark.parametrize("outer", ["push", "pop", "looking pop", "done"])
@pytest.mark.usefixtures("no_hang")
def test_a_call_in_the_midst_of_another_one(
    scratch: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, outer: str, inner: str, who: str
) -> None:
    """A signal handler, or thread, may push or pop at any step of another call: both are made."""
    before = signal.getsignal(signal.SIGUSR1)
    for at in itertools.count(1):
        queue = FemtoQueue(scratch / str(at), "a", LONG_MS, who == "thread")
        pushed = queue.push_many([b"0", b"1", b"2"])
        held = queue.pop()
        clock.advance({"looking pop": 2, "push": 2_000}.get(outer, 0))  # into a bucket to be made
        found: list[FemtoTask | None] = []
        calls: dict[str, Callable[[], object]] = {
            "push": lambda q=queue, pushed=pushed: pushed.append(q.push(b"3")),
            "pop": lambda q=queue, found=found: found.append(q.pop()),
            "done": lambda q=queue, held=held: q.done(held),
        }
        others: list[Any] = []

        def begin(call: Callable[[], object] = calls[inner], others: list[Any] = others) -> None:
            others.append(in_thread(call))
            concurrent.futures.wait(others, 0.1)  # a thread may wait for what this one syncs

        signal.signal(signal.SIGUSR1, lambda number, frame, call=calls[inner]: call())
        try:
            with monkeypatch.context() as patch:
                ring = functools.partial(signal.raise_signal, signal.SIGUSR1)
                met = meanwhile(patch, at, begin if who == "thread" else ring, (time, "clock_gettime"))
                calls[outer.split()[-1]]()
                concurrent.futures.wait(others, 10)
        finally:
            signal.signal(signal.SIGUSR1, before)
        if not met:
            break
        assert len(pushed) - 3 + len(found) == 1 + (outer != "done"), "both were made"
        ids = {held.id, *(task.id for task in found if task)}
        assert len(ids) == 1 + len(found)
        assert drained(queue) == [b"01233"[n : n + 1] for n, id in enumerate(pushed) if id not in ids]
    assert at > 1


# Forks by which an object is carried into a child: C programs that embed Python know no fork hooks.
FORK_BY: dict[str, Callable[[], int]] = {
    "os.fork": os.fork,
    "libc.fork": lambda: ctypes.PyDLL(None).fork(),  # it keeps the GIL, as such a program does
    "clone": lambda: ctypes.PyDLL(None).syscall(
        {"x86_64": 56, "aarch64": 220}[platform.machine()], signal.SIGCHLD, 0, 0, 0, 0
    ),
}
forks = pytest.mark.parametrize("fork", FORK_BY)


def child_of(fork: str, work: Callable[[], object]) -> int:
    """The PID of a forked child that does `work`; its status is 0 if nothing was raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fork", FORK_BY[fork])
        return forked(lambda: (signal.alarm(20), work()))


@forks
def test_forked_children_make_ids_of_their_own(queue: FemtoQueue, clock: Time, fork: str) -> None:
    """Which process an object is in is asked at each call: children share no id, however forked.

    Time stands still: all that tells the ids apart is who makes them.
    """

    def add() -> None:
        for _ in range(10):
            queue.schedule(b"x", NOW_US + HOUR_US), queue.push_many([b"x"]), queue.push(b"x")

    def fork_again() -> None:
        queue.cancel(queue.push(b"here it is another process"))
        assert os.waitpid(child_of(fork, add), 0)[1] == 0

    pids = [child_of(fork, work) for work in (add, add, fork_again, fork_again)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert counted(queue) == {"pending": 2 + 4 * 20, "scheduled": 40}


@forks
@pytest.mark.parametrize("closer", ["parent", "child"])
def test_close_and_the_claims_of_the_other(
    directory: Path, queue: FemtoQueue, fork: str, closer: str
) -> None:
    """close, and the end of a process, give back its own claims, not those of parent or child."""
    other = FemtoQueue(directory, "other")
    id = next(queue.ids("pending"))
    held: list[Any] = []
    ready, go = os.pipe(), os.pipe()

    def hold() -> None:
        held.append(queue.pop())
        assert held[0].id == id

    def hold_and_finish() -> None:
        hold()
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        queue.done(held[0])

    def close() -> None:
        assert queue.pop().data == b"b"
        assert len({name.split("~")[1] for name in os.listdir(directory / "in_progress")}) == 2
        queue.close()
        assert other.pop().data == b"b" and other.pop() is None

    if closer == "child":
        hold()
        assert os.waitpid(child_of(fork, close), 0)[1] == 0
        queue.done(held[0])
    else:
        pid = child_of(fork, hold_and_finish)
        os.read(ready[0], 1)
        try:
            close()
        finally:
            os.write(go[1], b"x")
        assert os.waitpid(pid, 0)[1] == 0
    assert other.status(id) == "done"
    for descriptor in (*ready, *go):
        os.close(descriptor)


@forks
def test_the_child_takes_what_its_dead_parent_had(
    directory: Path, queue: FemtoQueue, fork: str
) -> None:
    """A parent that dies is dead to its child, too, though the child has a copy of the object."""

    def take() -> None:
        task = queue.pop(timeout=5)
        assert (task.data, task.attempt) == (b"a", 2)
        queue.done(task)

    def die() -> None:
        queue.pop()
        parent = os.getpid()
        child_of(fork, lambda: becomes(True, lambda: os.getppid() != parent) and take())
        os.kill(parent, signal.SIGKILL)

    os.waitpid(forked(die), 0)
    assert becomes("done", lambda: queue.status(next(iter(queue.ids("done")), "")))


def test_a_forked_child_is_one_owner_for_all_its_threads(scratch: Path) -> None:
    """Threads of a forked child that use an object at the same time are one owner of its claims."""
    for number in range(20):
        queue = FemtoQueue(scratch / str(number), "node")
        queue.push_many([b"x"] * 8)

        def pop_by_threads(queue: FemtoQueue = queue) -> None:
            sys.setswitchinterval(1e-6)
            begin = threading.Barrier(8)
            for popped in [in_thread(lambda: (begin.wait(), queue.pop())) for _ in range(8)]:
                assert popped.result(20)[1]
            owners = Path(queue.data_dir, "in_progress").iterdir()
            assert [len(os.listdir(owner)) for owner in owners] == [8]

        status, error = in_child(pop_by_threads)
        assert status == 0, error


# --- 9: no thread, no signal handler, no open file ----------------------------------------------------


@durable_or_not
def test_no_thread_no_signal_handler_no_open_file(
    directory: Path, tmp_path: Path, durable: bool
) -> None:
    """Only run, and a call that waits, has a thread, a signal handler or an open file; none stays."""

    def held() -> tuple[object, ...]:
        handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
        return os.listdir("/proc/self/task"), handlers, len(os.listdir("/proc/self/fd"))

    before = held()
    with FemtoQueue(directory, "node", sync_after_write=durable) as q:
        ids = [q.push(b"1"), *q.push_many([b"2", bytes(2 << 20), b"4"])]
        ids += [q.push_file(put(tmp_path / "file"), move=True), q.schedule(b"6", 10**15)]
        for finish in (q.done, q.fail, q.retry, q.touch):
            task = q.pop(timeout=1)
            assert task and held() == before
            assert task.data
            finish(task)
        assert q.pop() and q.pop() and q.pop()
        assert q.requeue(ids[0]) and q.cancel(ids[0]) and q.purge("failed", 0) == 1
        assert sum(q.counts().values()) == 4 and next(q.ids("in_progress"))
        # What watched for changes is closed by a thread, which ends within milliseconds.
        assert sum(bool(q.status(id)) for id in ids) == 4 and becomes(before, held)
        assert q.pop(timeout=0.02) is None and not q.join(timeout=0.02)
        assert becomes(before, held)
    assert becomes(before, held)


def test_run_leaves_no_thread_and_no_reference_behind(directory: Path, unlogged: None) -> None:
    """A heartbeat only while run is running; the last reference dropped, the object is gone at once."""
    q = FemtoQueue(directory, "node", max_attempts=1)
    q.push_many([b"1", b"fails", b"3"])
    held = q.pop()
    threads = threading.active_count()
    running = []

    def handle(task: FemtoTask) -> None:
        running.append(threading.active_count())
        if task.data == b"fails":
            raise ValueError("fails")

    assert q.run(handle, until_empty=True) == 1
    assert running == [threads + 1] * 2
    assert threading.active_count() == threads
    gone = weakref.ref(q)
    gc.disable()
    try:
        del q
        assert gone() is None
    finally:
        gc.enable()
    assert FemtoQueue(directory, "other").pop().id == held.id


def test_run_restores_the_signal_handlers_before_it(queue: FemtoQueue) -> None:
    """run has its handlers while it runs in the main thread, and leaves those that it found."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    found = [lambda *_: None, signal.SIG_IGN, signal.default_int_handler, signal.SIG_DFL]
    before = [signal.signal(number, handler) for number, handler in zip(numbers, found, strict=True)]
    stayed: list[list[bool]] = []

    def handle(task: FemtoTask) -> None:
        now = map(signal.getsignal, numbers)
        stayed.append([handler == was for handler, was in zip(now, found, strict=True)])
        if task.data == b"b":
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            queue.run(handle)
        assert [*map(signal.getsignal, numbers)] == found
        assert stayed == [[False, True, False, False]] * 2, "what was ignored stays ignored"
        queue.purge("pending", 0)
        queue.push(b"c")
        assert in_thread(lambda: queue.run(handle, until_empty=True)).result(30) == 1
        assert stayed[2:] == [[True] * 4]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize(("handler", "status"), [("SIG_DFL", -15), ("lambda *_: os._exit(7)", 7)])
def test_a_process_that_the_handler_forks_ends_by_a_signal(
    directory: Path, handler: str, status: int
) -> None:
    """run's signal handlers are not for children: there a signal does what it did before run."""
    FemtoQueue(directory, "node").push(b"x")
    code = f"""
import multiprocessing, signal
from signal import SIG_DFL
def work(pipe):
    pipe.send("begun")
    while True:
        time.sleep(0.01)
def handle(task):
    context = multiprocessing.get_context("fork")
    for daemon in (False, True):
        here, there = context.Pipe()
        child = context.Process(target=work, args=(there,), daemon=daemon)
        child.start()
        here.recv()
        if not daemon:  # the other one is ended when this process ends
            child.terminate()
            child.join(10)
            print(child.exitcode)
            child.kill()
signal.signal(signal.SIGTERM, {handler})
print(FemtoQueue(sys.argv[1], "node").run(handle, until_empty=True))
"""
    assert run(code, directory) == f"{status}\n1\n"


# --- 9: while a call waits ----------------------------------------------------------------------------


class Waits:
    """Stands in for `select.poll`: it puts off the look once a second, so that only events wake."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.first: Callable[[], object] = lambda: None  # called before it waits
        real = select.poll

        def make() -> object:
            poll = real()
            wait = functools.partial(self._wait, poll.poll)
            return types.SimpleNamespace(register=poll.register, poll=wait)

        monkeypatch.setattr(select, "poll", make)

    def _wait(self, poll: Callable[[float], list[Any]], ms: float) -> list[Any]:
        self.first()
        self.begun.set()
        events = poll(20_000 if ms > 500 else ms)
        assert events or ms <= 500, "nothing woke it"
        return events


def play_inotify(monkeypatch: pytest.MonkeyPatch, sleep: Callable[[float], object]) -> None:
    """Wait with inotify, though the clock stands still unless `sleep` moves it."""
    poll = types.SimpleNamespace(
        register=lambda *_: None, poll=lambda ms: sleep(max(ms / 1e3, 1e-4)) or []
    )
    monkeypatch.setitem(sys.modules, "ctypes", ctypes)
    monkeypatch.setattr(select, "poll", lambda: poll)


def without(means: str, monkeypatch: pytest.MonkeyPatch, waits: Waits) -> None:
    """Take something away that waiting by events needs. Then it is sleeping."""
    init, sleep = ctypes.CDLL(None).inotify_init1, time.sleep

    def none(*arguments: object) -> int:
        ctypes.set_errno(errno.EMFILE)
        return -1

    def no_bell(*arguments: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    if means == "no ctypes":
        monkeypatch.setitem(sys.modules, "ctypes", None)
    if means == "no eventfd":
        monkeypatch.setattr(os, "eventfd", no_bell)
    library = {
        "no inotify": {},
        "no instance": {"inotify_init1": none, "inotify_add_watch": none},
        "no watch": {"inotify_init1": init, "inotify_add_watch": none},
    }
    if means in library:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(**library[means]))
    if means != "inotify":
        monkeypatch.setattr(time, "sleep", lambda seconds: (waits.begun.set(), sleep(seconds)))


@pytest.mark.parametrize(
    "end", ["stop", "close", "a handler that stops", "a handler that raises", "task"]
)
@pytest.mark.parametrize(
    "means", ["inotify", "no ctypes", "no inotify", "no instance", "no watch", "no eventfd"]
)
@pytest.mark.usefixtures("no_hang")
def test_what_ends_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, means: str, end: str
) -> None:
    """A signal, stop, close or a task ends what waits, with inotify and wherever that cannot be had."""
    waits = Waits(monkeypatch)
    without(means, monkeypatch, waits)
    before = signal.getsignal(signal.SIGUSR1), len(os.listdir("/proc/self/fd"))
    calls: dict[str, tuple[Callable[[FemtoQueue], object], object]] = {
        "pop": (lambda q: q.pop(timeout=None), None),
        "pop for long": (lambda q: q.pop(timeout=1e6), None),
        "join": (lambda q: q.join(), False),
        "run": (lambda q: q.run(lambda task: q.stop()), 0),
    }

    def act(name: str, q: FemtoQueue, other: FemtoQueue, held: Any, over: threading.Event) -> None:
        assert waits.begun.wait(10)
        if end == "task":
            other.done(held) if name == "join" else other.push(b"x")
        elif end in ("stop", "close"):
            getattr(q, end)()
        else:  # again, for it may come just before the system call, of which Python would not know
            while not over.wait(0.01):
                os.kill(os.getpid(), signal.SIGUSR1)

    for name, (call, nothing) in calls.items():
        q, other = (FemtoQueue(tmp_path / name, node_id) for node_id in ("node", "other"))
        other.push(b"held")
        held, over = other.pop(), threading.Event()

        def handler(number: int, frame: object, q: FemtoQueue = q, over: Any = over) -> None:
            if end == "a handler that raises" and not over.is_set():
                over.set()
                raise KeyboardInterrupt
            q.stop()

        signal.signal(signal.SIGUSR1, handler)
        waits.begun.clear()
        acting = in_thread(act, name, q, other, held, over)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                result = call(q)
                assert bool(result) if end == "task" else result == nothing
                assert end != "a handler that raises"
            over.set()
            acting.result(10)
        finally:
            signal.signal(signal.SIGUSR1, before[0])
    assert becomes(before[1], lambda: len(os.listdir("/proc/self/fd")))


# What may come while a call waits, through another object on the same directory.
COMES: dict[str, Callable[[FemtoQueue, FemtoTask], object]] = {
    "push": lambda q, task: q.push(b"x"),
    "due": lambda q, task: q.schedule(b"x", time.time_ns() // 1000),
    "retry": lambda q, task: q.retry(task),
    "close": lambda q, task: q.close(),
    "by hand": lambda q, task: put(Path(q.data_dir, "file")).rename(
        Path(q.data_dir, "pending", f"{time.time_ns() // 1000}_x")
    ),
    "new bucket": lambda q, task: put(Path(q.data_dir, "file")).rename(
        put(Path(q.data_dir, "pending", "1700000000000000", "odd")).with_name("1700000000000000_x")
    ),
}


@pytest.mark.parametrize("what", COMES)
def test_no_change_is_lost_between_looking_and_waiting(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Watch, look, wait: what comes at any step of a call that waits is found, or it wakes."""
    waits = Waits(monkeypatch)
    for at in itertools.count(1):
        queue, other = (FemtoQueue(scratch / str(at), node_id) for node_id in ("node", "other"))
        other.push(b"x")
        held = other.pop()
        if what not in ("retry", "close"):
            other.done(held)
        come = functools.partial(COMES[what], other, held)
        with monkeypatch.context() as patch:
            met = meanwhile(patch, at, come)
            waits.first = lambda met=met, come=come: met or (met.append("poll"), come())
            task = queue.pop(timeout=60)
        assert task and task.data == b"x"
        if met == ["poll"]:
            break
    assert at > 10


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("means", ["inotify", "sleeping"])
def test_what_falls_due_wakes_at_its_time(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, means: str, when: str
) -> None:
    """A task that falls due wakes at its time, not at the next look, if scheduled meanwhile, too."""
    q, other = FemtoQueue(directory, "node"), FemtoQueue(directory, "other")
    due_us = int(clock.wall * 1e6) + 2_345_678
    naps = itertools.count()

    def sleep(seconds: float) -> None:
        early = next(naps) == 2 and when == "meanwhile"
        clock.advance(0.1 if early else seconds)
        if early:  # an event, or what is seen at the next nap
            other.schedule(b"x", due_us)

    other.schedule(b"later", due_us + HOUR_US)
    if when == "before":
        other.schedule(b"x", due_us)
    monkeypatch.setattr(time, "sleep", sleep)
    if means == "inotify":
        play_inotify(monkeypatch, sleep)
    task = q.pop(60)
    assert task and task.data == b"x" and 0 <= clock.wall * 1e6 - due_us <= 10_000
    assert next(naps) < (20 if means == "inotify" else 500)


@pytest.mark.parametrize("means", ["inotify", "sleeping"])
def test_waiting_makes_few_calls(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, means: str
) -> None:
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
        assert len(calls) - len(listed) <= (60 * 20 if means == "inotify" else 60 * 1_000)


def test_every_push_of_another_process_wakes(
    directory: Path, spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other processes push, at any moment, by any way, wakes: not the look once a second."""
    Waits(monkeypatch)
    code = """
import random
from pathlib import Path
q = FemtoQueue(sys.argv[1], "producer")
for line in sys.stdin:
    time.sleep(random.random() * 0.003)
    way = random.choice(["push", "durable", "new object", "schedule", "by hand"])
    if way == "push":
        q.push(b"x")
    elif way == "durable":
        FemtoQueue(sys.argv[1], "durable", sync_after_write=True).push_many([b"x"])
    elif way == "new object":
        FemtoQueue(sys.argv[1], "new").push(b"x")
    elif way == "schedule":
        q.schedule(b"x", time.time_ns() // 1000)
    else:
        now_us = time.time_ns() // 1000
        bucket = Path(sys.argv[1], "pending", f"{now_us}.{random.randrange(16**8):08x}")
        bucket.mkdir()
        Path(sys.argv[1], "file").write_bytes(b"x")
        Path(sys.argv[1], "file").rename(bucket / f"{now_us}_x")
"""
    process = spawn(code, directory)
    queue = FemtoQueue(directory, "node")
    for _ in range(150):
        say(process)
        task = queue.pop(timeout=60)
        assert task and task.data == b"x"
        queue.done(task)


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_an_event_that_brings_no_task_costs_one_look(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits, and is woken for nothing, waits on: he does not look again and again."""
    queue, waits, begun = FemtoQueue(directory, "a"), Waits(monkeypatch), []

    def begin() -> None:
        begun.append(0)
        if len(begun) == 1:
            put(directory / "pending" / ".not-a-task")

    waits.first = begin
    assert queue.pop(timeout=0.3) is None
    assert 2 <= len(begun) < 6


def test_waiting_without_inotify_forgets_what_is_gone(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where change times must do, who waits looks at the directories that are there, however many were."""
    queue, counts, buckets = FemtoQueue(directory, "a"), [0], itertools.count(10**15)

    def sleep(seconds: float) -> None:
        clock.advance(seconds)
        counts.append(0)
        for bucket in (directory / "pending").glob("1*"):
            shutil.rmtree(bucket)
        put(directory / "pending" / f"{next(buckets)}.01234567" / "kept")  # or pop removes it

    def stat_(path: Any, **options: Any) -> os.stat_result:
        counts[-1] += 1
        return REAL["stat"](path, **options)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(os, "stat", stat_)
    assert queue.pop(timeout=3) is None
    assert len(counts) > 100 and max(counts[-50:]) <= max(counts[:50])


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
        tracemalloc.start()
        try:
            firsts.append(calls_of(q.pop, listed))
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()
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
    q = FemtoQueue(directory, "node", keep_done=False)
    idle = [q, *(FemtoQueue(directory, f"node-{n}") for n in range(100))]

    def empty() -> list[str]:
        for queue in [*idle[1:], q]:
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
    q = FemtoQueue(directory, "node")
    assert q.pop() is None
    alone = calls_of(q.pop)
    lay_out_busy_owners(directory, 40)
    clock.advance(1.1)
    assert q.pop() is None
    listed: list[str] = []
    for _ in range(9):
        clock.advance(0.1)
        assert calls_of(q.pop, listed) == alone
    assert not [path for path in listed if "in_progress" in path]
    clock.advance(1.1)
    calls_of(q.pop, listed)
    assert len([path for path in listed if "in_progress/" in path]) == 40


def test_a_full_queue_is_not_counted_again(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """push at maxsize with one place free counts nothing; and what changed is counted again."""
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
    buckets = [*(directory / "pending").iterdir()]
    for path in buckets:
        os.utime(path, (1e9, 1e9))
    for at in range(3):
        listed.clear()
        with pytest.raises(Full):
            calls_of(lambda: q.push(b"x"), listed)
        assert at == 0 or not [path for path in listed if "pending/" in path]
    # Within one tick of the filesystem's clock, a change does not show.
    monkeypatch.setattr(time, "time_ns", lambda: 2 * 10**18 + 1_000_000)
    for _ in range(3):
        os.utime(buckets[0], (2e9, 2e9))
        with pytest.raises(Full):
            q.push(b"x")
        os.unlink(next(buckets[0].iterdir()))
        os.utime(buckets[0], (2e9, 2e9))
        q.push(b"x")


def test_one_id_among_many_costs_no_listing(directory: Path, clock: Time) -> None:
    """status and cancel of one id list no bucket, of scheduled or of pending tasks."""
    q = FemtoQueue(directory, "node")
    fill(directory, "pending", 3_000)
    fill(directory, "scheduled", 3_000, 100)
    q.push(b"x")
    ids = {"scheduled": q.schedule(b"x", NOW_US + 2 * HOUR_US), "pending": q.push(b"x")}
    listed: list[str] = []
    found: list[object] = []
    for state, id in ids.items():
        calls_of(lambda id=id: found.extend((q.status(id), q.cancel(id))), listed)
        assert found[-2:] == [state, True] and q.status(id) is None
    assert listed and not [path for path in listed if re.search("(pending|scheduled)/", path)]


def test_counting_and_listing_keep_nothing(scratch: Path, clock: Time) -> None:
    """counts keeps no list of what is done; the first ids of a long queue cost one bucket."""
    q = FemtoQueue(scratch, "node")
    fill(scratch, "done", 20_000)
    fill(scratch, "pending", 5_000, 100)
    tracemalloc.start()
    try:
        assert q.counts()["done"] == 20_000
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    listed: list[str] = []
    ids = q.ids("pending")
    assert calls_of(lambda: next(ids), listed) and len(listed) <= 3
    assert len(list(ids)) == 4_999


def test_many_that_come_back_leave_the_shared_bucket_small(directory: Path, clock: Time) -> None:
    """Pushing and retrying by turns, over two periods, puts no more than 1,000 into one directory."""
    q = FemtoQueue(directory, "node")
    q.push(b"old")
    clock.advance(2_000)
    for _ in range(1_200):
        q.push(b"new")
        task = q.pop()
        assert task.data == b"old"
        q.retry(task)
    sizes = [len(os.listdir(path)) for path in (directory / "pending").iterdir()]
    assert sum(sizes) == 1_201 and max(sizes) <= 1_000


def test_a_gigabyte_goes_through_in_32_megabytes(places: list[Path]) -> None:
    """push_file, pop and task.path, and the command push, stream: 1 GiB in 32 MB of memory."""
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
os.truncate("file", 100 << 20)
os.dup2(os.open("file", os.O_RDONLY), 0)
femtoqueue.main(["big", "push"])
assert os.path.getsize(q.pop().path) == 100 << 20
# Not ru_maxrss: that begins with what the parent had when it forked.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    assert int(run(code, places[-1]).split()[-1]) < 32_000


def test_the_module_imports_little() -> None:
    """import femtoqueue: what only the command line, a warning or waiting needs is left out."""
    path = f"sys.path.insert(0, {str(MODULE.parent)!r})"
    code = f"import sys; {path}; import femtoqueue; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, check=True)
    costly = {"argparse", "logging", "typing", "dataclasses", "re", "datetime", "json", "hashlib"}
    costly |= {"subprocess", "signal", "queue", "inspect", "tempfile", "enum", "random", "uuid"}
    assert not (costly | {"ctypes", "select", "threading"}) & set(done.stdout.decode().split())


# ====================================================================================================
# The command line
# ====================================================================================================


class Shell:
    """Runs `python femtoqueue.py DIR ...` as a user would."""

    def __init__(self, directory: Path, guard: Callable[[Process], Process] = lambda p: p) -> None:
        self.command = [sys.executable, str(MODULE), str(directory)]
        self.guard = guard

    def __call__(
        self, *arguments: object, stdin: bytes = b"", status: int = 0, **variables: str
    ) -> list[str]:
        """Run a command; return the lines it printed, or if `status` is an error, its complaint."""
        done = subprocess.run(
            [*self.command, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            env=os.environ | variables,
            timeout=60,
        )
        complaint = done.stderr.decode()
        assert done.returncode == status, complaint
        assert "Traceback" not in complaint
        if status:
            return [*done.stdout.decode().splitlines(), complaint]
        assert not complaint
        return done.stdout.decode().splitlines()

    def start(self, *arguments: object, under: str = "") -> Process:
        """Start a command in a process group of its own, as a shell does, by way of another one."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [*under.split(), *self.command, *map(str, arguments)]
        return self.guard(subprocess.Popen(command, text=True, start_new_session=True, **pipes))


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
    assert shell("list", "done") == [*ids, id]
    assert shell("list", "pending", status=1) == [""]


# A command, and what its complaint says.
WRONG_USAGE = {
    "": "required: COMMAND",
    "nonsense": "invalid choice",
    "status --nonsense": "unrecognized",
    "list": "required: state",
    "list creating": "invalid choice",
    "cancel": "required: ID",
    "requeue": "required: ID",
    "run": "required",
    "run --max-attempts 0 -- true": "max_attempts",
    "run --max-attempts many -- true": "invalid int",
    "run -- no-such-command": "no-such-command",
    "purge in_progress 1d": "invalid choice",
    "purge done": "required: age",
    "purge done yesterday": "no length of time",
    "purge done -1d": "",
    "schedule": "required: when",
    "schedule ": "no time",
}
NO_TIMES = """tomorrow + +m +10 +10x +-1m +nans +infd +1e300d +1e15d +inf +999999d 1 1790000000 2030-13-01
    2030-01-01T25:00 Z 0001-01-01 9999-12-31T23:59:59+00:00 9999-12-31T23:59:59"""
for when in NO_TIMES.split():
    WRONG_USAGE[f"schedule {when}"] = f"{when[1:]!r} is no length of time" * when.startswith("+")


@pytest.mark.parametrize("command", WRONG_USAGE)
def test_cli_wrong_usage(directory: Path, shell: Shell, command: str) -> None:
    """Wrong usage is exit status 2, a line that says what is wrong, and no change: no attempt is used.

    So is a time that is none, in every time zone.
    """
    FemtoQueue(directory, "node").push(b"x")
    before = snapshot(directory)
    for zone in ("JST-9", "EST5") if "9999" in command or "0001" in command else ("UTC",):
        out = shell(*command.split(" ") if command else (), stdin=b"x", status=2, TZ=zone)
        assert len(out) == 1 and out[0].startswith("usage: ")
        assert WRONG_USAGE[command] in out[0].splitlines()[-1]
    assert snapshot(directory) == before


@pytest.mark.parametrize("made_by", ["nobody", "the original"])
@pytest.mark.parametrize(
    "command", ["status", "list done", "cancel x", "requeue x", "purge done 0s", "schedule 0001-01-01"]
)
def test_cli_where_there_is_no_queue(tmp_path: Path, command: str, made_by: str) -> None:
    """Where there is none, or one of the original, looking says so, exits with 1, changes nothing."""
    if made_by == "the original":
        original = Original(tmp_path / "queue", "scheduled", "node-1")
        for state in ("pending", "node-1"):
            original.add(state, 1_790_000_000_000_000, b"x")
    before = snapshot(tmp_path, times=True)
    wrong = command == "schedule 0001-01-01"
    *out, complaint = Shell(tmp_path / "queue")(*command.split(), status=2 if wrong else 1)
    assert out == [] and (wrong or str(tmp_path / "queue") in complaint)
    assert snapshot(tmp_path, times=True) == before


# What a shell makes of it ("$@" is `femtoqueue.py DIR`), and what the complaint says.
COMPLAINTS = {
    '"$0" "$1" "$1" push </dev/null': "femtoqueue.py",  # a directory that cannot be
    '"$@" list failed >/dev/full': "No space left",
    'PYTHONIOENCODING=ascii "$@" list failed --reasons': "codec can't encode",
    '"$@" push <&-': "standard input",
    '"$@" schedule +1m <&-': "standard input",
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("line", COMPLAINTS)
def test_cli_what_fails_says_so(directory: Path, shell: Shell, line: str) -> None:
    """What fails is exit status 1 and one line that says what, and neither silence nor a traceback."""
    q = FemtoQueue(directory, "node")
    q.push(b"x")
    q.fail(q.pop(), "caf\u00e9")
    done = subprocess.run(["sh", "-c", line.replace('"$@"', '"$0" "$@"'), *shell.command],
                          capture_output=True, text=True, timeout=30)  # fmt: skip
    assert done.returncode == 1
    assert COMPLAINTS[line] in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 or "/dev/full" in line  # where the interpreter has a say
    assert q.join(0)


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
    claims = {claim["id"]: claim for claim in report["claims"]}
    assert {id: (c["attempt"], c["node_id"], c["alive"]) for id, c in claims.items()} == {
        gone: (1, "gone", "no"),
        mine: (1, "node-7", "yes"),
    }
    for claim in claims.values():
        assert 0 <= claim["since_s"] < 30 and 29 < claim["since_s"] + claim["lease_left_s"] < 31
    lines = shell("status")
    rows = [line.split() for line in lines]
    assert rows[0] == ["state", "count", "oldest"] and rows[4] == ["done", "0", "-"]
    assert [row[:2] for row in rows[2:4]] == [["pending", "2"], ["in_progress", "2"]]
    assert rows[7:9] == [[], ["id", "attempt", "node_id", "pid", "alive", "since", "lease_left"]]
    assert [mine, "1", "node-7", str(os.getpid()), "yes"] in [row[:5] for row in rows]
    for block in (lines[:7], lines[8:]):
        assert len({line.index(line.split()[1], len(line.split()[0])) for line in block}) == 1, (
            "aligned"
        )


def test_cli_watch_ends_at_ctrl_c(shell: Shell) -> None:
    """status --watch repeats itself; Ctrl-C ends it as it ends other tools: by the signal, quietly."""
    shell("push", stdin=b"x")
    process = shell.start("status", "--watch")
    expect(process, "state        count  oldest")
    os.killpg(process.pid, signal.SIGINT)
    out, status = ending(process)
    assert status == -signal.SIGINT and "Traceback" not in out and "KeyboardInterrupt" not in out


def test_cli_list_into_head_is_quiet(directory: Path, shell: Shell) -> None:
    """A reader that has seen enough ends the command without a word."""
    FemtoQueue(directory, "node").close()
    for n in range(3_000):
        put(directory / "done" / f"{n:016d}_{'x' * 100}")
    done = executed("sh", "-c", '"$@" list done | head -1', "-", *shell.command)
    assert (done.returncode, done.stdout) == (0, "0000000000000000_" + "x" * 100 + "\n")


DUE_S = {
    "+90s": 90,
    "+10m": 600,
    "+1.5h": 5_400,
    "+2d": 172_800,
    "2030-01-01T12:00:00Z": 1_893_499_200.0,
    "2030-01-01T12:00:00+02:00": 1_893_492_000.0,
    "2030-01-01 12:00": 1_893_517_200.0,
    "2030-07-01": 1_909_108_800.0,
    "2030-01-01Z": 1_893_456_000.0,
}


@pytest.mark.parametrize("when", DUE_S)
def test_cli_schedule(directory: Path, shell: Shell, when: str) -> None:
    """WHEN is a wait, or an ISO time: of its own zone, UTC for Z, or local, summer time included."""
    before_s = time.time() if when.startswith("+") else 0
    (id,) = shell("schedule", when, stdin=b"x", TZ="EST5EDT,M3.2.0,M11.1.0")
    assert shell("list", "scheduled") == [id]
    due_s = int(names(directory, "scheduled")[0][-16:]) / 1e6
    assert -0.001 <= due_s - before_s - DUE_S[when] <= (30 if before_s else 0)


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
    assert shell("purge", "pending", "1h", status=1)[0] == "0"
    assert shell("purge", "pending", "0s") == ["2"]
    assert shell("purge", "pending", "0s", status=1)[0] == "0"


# --- run: a command for each task -------------------------------------------------------------------


def test_cli_run_hands_each_payload_to_a_command(directory: Path, tmp_path: Path, shell: Shell) -> None:
    """run gives the payload on standard input, and id, attempt and path in the environment."""
    payload = bytes(range(256)) * 10_000
    (id,) = shell("push", stdin=payload)
    script = 'echo "$1 $FEMTOQUEUE_ID $FEMTOQUEUE_ATTEMPT"; cat >in; cat "$FEMTOQUEUE_PATH" >path'
    script = f"cd {shlex.quote(str(tmp_path))}; {script}"
    assert shell("run", "--until-empty", "--", "sh", "-c", script, "--", "-- x") == [f"-- x {id} 1"]
    assert (tmp_path / "in").read_bytes() == (tmp_path / "path").read_bytes() == payload
    assert shell("list", "done") == [id]
    assert shell("run", "--until-empty", "--", "true", status=1) == [""]


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ("--until-empty -- grep -- -x", "-x"),
        ("--until-empty cat -n", "     1\t-x"),
        ("--until-empty --max-attempts 2 sed s/x/y/", "-y"),
        ("--until-empty echo --until-empty -h --", "--until-empty -h --"),
        ("cat -n", "     1\t-x"),
        ("-- echo - -- -y", "- -- -y"),
    ],
)
def test_cli_run_takes_options_of_the_command(shell: Shell, arguments: str, printed: str) -> None:
    """What follows the command is the command's own, also without --, and even if we have the like."""
    (id,) = shell("push", stdin=b"-x\n")
    process = shell.start("run", *arguments.split())
    expect(process, printed)
    stays = "--until-empty" not in arguments
    if stays:
        process.terminate()
    assert ending(process) == ("", -signal.SIGTERM if stays else 0)
    assert shell("list", "done") == [id]


@pytest.mark.parametrize("under", ["", "env --ignore-signal=CHLD"], ids=["", "SIGCHLD ignored"])
def test_cli_run_takes_the_exit_status_as_the_verdict(
    directory: Path, shell: Shell, under: str
) -> None:
    """0 done, 100 failed for good, others retried: also where an ignored SIGCHLD makes all of them 0.

    What is retried is logged. --max-attempts N: the Nth failure is the last. The exit status is kept
    as text beside the failed task, and shown by list.
    """
    verdicts = {b"true": "done", b"exit 100": "failed"}
    verdicts |= dict.fromkeys((b"exit 7", b"exit 99", b"exit 101", b"kill -9 $$"), "scheduled")
    q = FemtoQueue(directory, "node")
    ids = dict(zip(verdicts, q.push_many(verdicts), strict=True))
    out, status = ending(shell.start("run", "--until-empty", "--", "sh", under=under))
    assert {script: q.status(id) for script, id in ids.items()} == verdicts and status == 0
    said = {id: line for line in out.splitlines() for id in ids.values() if id in line}
    assert [*said] == [id for script, id in ids.items() if verdicts[script] != "done"]
    assert all(line.startswith("femtoqueue: ") for line in out.splitlines())
    assert "exit status 7" in said[ids[b"exit 7"]] and "exit status -9" in said[ids[b"kill -9 $$"]]
    id, again = ids[b"exit 100"], ids[b"exit 7"]
    shell("requeue", again)
    shell("purge", "scheduled", "0s")
    options = ("--until-empty", "--max-attempts", "2")
    out, status = ending(shell.start("run", *options, "--", "sh", under=under))
    assert again in out and status == 1
    assert shell("list", "failed") == [id, again]
    assert files(directory / "failed") == [id, f"{id}~reason", again, f"{again}~reason"]
    assert (directory / "failed" / f"{id}~reason").read_text() == "sh: exit status 100"
    assert (directory / "failed" / id).read_bytes() == b"exit 100"
    shown = shell("list", "failed", "--reasons")
    assert shown[0] == f"{id}  sh: exit status 100" and shown[1].endswith("sh: exit status 7")


BEGUN = ("sh", "-c", 'echo begun; cat "$1" "$FEMTOQUEUE_PATH"', "-")


def test_cli_run_path_outlives_a_renewed_lease(directory: Path, tmp_path: Path, shell: Shell) -> None:
    """FEMTOQUEUE_PATH opens the payload even after the claim was renamed by a touch."""
    (id,) = shell("push", stdin=b"payload")
    os.mkfifo(tmp_path / "go")
    process = shell.start("run", "--until-empty", "--", *BEGUN, tmp_path / "go")
    expect(process, "begun")
    (claim,) = (directory / "in_progress").rglob(f"{id}*")
    FemtoQueue(directory, "node").touch(FemtoTask(id, b"", 1, str(claim)))
    assert not claim.exists()
    (tmp_path / "go").write_text("renewed ")
    assert ending(process) == ("renewed payload", 0)
    assert shell("list", "done") == [id]


# --- run trusts no inherited state ------------------------------------------------------------------

SIGNALS = pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT], ids=lambda n: n.name
)


@SIGNALS
@pytest.mark.parametrize("before", ["default", "block", "ignore"])
def test_cli_run_ends_by_the_signal_after_the_command(
    directory: Path, tmp_path: Path, shell: Shell, number: signal.Signals, before: str
) -> None:
    """A signal, though the parent blocked it, lets the command finish; the exit status is its own.

    What was ignored before (nohup, or a background job of a script) stays ignored.
    """
    ids = [shell("push", stdin=data)[0] for data in (b"x", b"y")]
    go = tmp_path / "go"
    os.mkfifo(go)
    until_empty = ["--until-empty"] * (before != "default")
    under = f"env --{before}-signal={number.name[3:]}"
    process = shell.start("run", *until_empty, "--", *BEGUN, go, under=under)
    expect(process, "begun")
    os.killpg(process.pid, number)
    go.write_text("finished ")
    if before == "ignore":
        expect(process, "finished xbegun")
        os.killpg(process.pid, number)
        go.write_text("finished ")
    handled, end = (2, ("finished y", 0)) if before == "ignore" else (1, ("finished x", -number))
    assert ending(process) == end
    assert [*FemtoQueue(directory, "node").ids("done")] == ids[:handled]


@SIGNALS
def test_cli_a_second_signal_ends_the_command(shell: Shell, number: int) -> None:
    """A second signal kills the command and its children, gives the task back, and ends run itself."""
    (id,) = shell("push", stdin=b"x")
    # Both children hold standard output: its end is theirs.
    process = shell.start("run", "--", "sh", "-c", "sleep 60 & echo begun; sleep 60")
    expect(process, "begun")
    while process.poll() is None:
        os.killpg(process.pid, number)  # one that comes too soon after another is the same
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    assert ending(process) == ("", -number)
    assert shell("list", "pending") == [id]


def test_cli_run_hands_no_strange_state_to_the_command(shell: Shell) -> None:
    """The command begins with no signal blocked, and neither SIGCHLD nor SIGPIPE ignored."""
    shell("push", stdin=b"x")
    shell.command[:0] = ["env", "--ignore-signal=CHLD,PIPE", "--block-signal=TERM,QUIT,CHLD"]
    lines = shell("run", "--until-empty", "--", "grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status")
    blocked, ignored = [int(line.split()[1], 16) for line in lines]
    assert not blocked and not ignored & (1 << signal.SIGCHLD - 1 | 1 << signal.SIGPIPE - 1)


@pytest.mark.parametrize("under", ["env --ignore-signal=PIPE", "env --default-signal=PIPE"])
@pytest.mark.parametrize("closed", ["", "2>&-"], ids=["a closed pipe", "closed"])
def test_cli_run_outlives_its_log(directory: Path, shell: Shell, under: str, closed: str) -> None:
    """A closed log kills no worker: a command that fails is retried, and the next task is done."""
    ids = [shell("push", stdin=script)[0] for script in (b"exit 1", b"echo done")]
    line = shlex.join([*under.split(), *shell.command, "run", "--until-empty", "--", "sh"])
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as log:
        command = ["sh", "-c", f"exec {line} {closed}"]
        worker = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, timeout=20)
    assert (worker.stdout, worker.returncode) == (b"done\n", 0)
    assert [FemtoQueue(directory, "node").status(id) for id in ids] == ["scheduled", "done"]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="it is read from /proc")
def test_cli_ctrl_z_stops_run_and_the_command_or_neither(tmp_path: Path, shell: Shell) -> None:
    """At Ctrl-Z the command does not work on while nobody renews its lease; with fg it is finished."""

    def stopped(*pids: int) -> list[bool]:
        states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids]
        return [state == "T" for state in states]

    (id,) = shell("push", stdin=b"x")
    os.mkfifo(tmp_path / "go")
    # Not a session of its own: there, Ctrl-Z would stop nobody.
    options: dict[str, Any] = {"stdin": -1, "stdout": -1, "text": True, "preexec_fn": os.setpgrp}
    script = 'echo $$; read line <"$1"; echo $line'
    command = [*shell.command, "run", "--until-empty", "--", "sh", "-c", script, "-", tmp_path / "go"]
    process = shell.guard(subprocess.Popen([*map(str, command)], **options))
    assert process.stdout
    pid = int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGTSTP)
    becomes([True, True], lambda: stopped(process.pid, pid), seconds=2)
    assert len({*stopped(process.pid, pid)}) == 1, "the command works on"
    os.killpg(process.pid, signal.SIGCONT)
    (tmp_path / "go").write_text("finished\n")
    assert (process.stdout.read(), process.wait(15)) == ("finished\n", 0)
    assert shell("list", "done") == [id]


# ====================================================================================================
# README
# ====================================================================================================

# How each fenced block of README is run is told by its language:
#
#   python, sh       as it stands, in an empty directory that has femtoqueue.py, as a user pastes it
#   crontab          the command of its last line; /srv/myapp is that directory, `queue` has a task, and
#                    ./handle appends what it reads to `handled`
#   ini              a systemd unit: its ExecStart likewise, then SIGTERM
#   none, text, mermaid   not at all; another one is an error, so that nothing is untested by mistake
#
# All must end with exit status 0 and nothing on standard error (ini: by the SIGTERM). A block with
# `kill -9` must print each attempt. An HTML comment on a line of its own before a block changes that:
#
#   <!-- test: not run, WHY -->   Python and sh are only compiled, the rest is left alone (no network)
#   <!-- test: original -->       `old_queue` is a directory of the original's, 0.4; what was unfinished
#                                 there is in `my_queue` afterwards, in order


PAGE = README.read_text(encoding="utf-8") if README.exists() else ""
# Each block: what its comment says, its indentation, language, text.
BLOCKS = re.findall(
    r"^(?: *<!-- test: ([^\n]+?) -->\n\n?)?( *)```(\w*)\n(.*?)^\2```$", PAGE, re.MULTILINE | re.DOTALL
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project as the recipes assume it: femtoqueue.py copied there, the script installed."""
    shutil.copy(MODULE, tmp_path)
    for name, command in {
        "bin/python3": f'exec {sys.executable} "$@"',
        "bin/femtoqueue": f'exec {sys.executable} {tmp_path}/femtoqueue.py "$@"',
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
def test_readme_runs(project: Path, test: str, indent: str, language: str, text: str) -> None:
    """Every example on the page runs as it stands, and has nothing to complain about."""
    text = re.sub(f"^{indent}", "", text, flags=re.MULTILINE)
    commands = {
        "python": [sys.executable, "recipe.py"],
        "sh": ["sh", "-eu", "-c", text],
        "crontab": ["sh", "-c", text.split(maxsplit=5)[-1].replace("/srv/myapp", str(project))],
    }
    if test.startswith("not run, "):
        if language == "python":
            compile(text, "README.md", "exec")
        elif language == "sh":
            execute("sh", "-n", "-c", text)
        return
    assert test in ("", "original") and language in {*commands, "ini"}
    if test == "original":
        old = Original(project / "old_queue", "scheduled", "node-1")
        for number, state in enumerate(("node-1", "pending", "scheduled", "pending", "done", "failed")):
            old.add(state, 1_700_000_000_000_000 + number, b"%d" % number)
    if language in ("crontab", "ini"):
        FemtoQueue("queue", "node").push(b"payload\n")
    if language == "ini":
        run_unit(text)
    else:
        put(project / "recipe.py", text.encode())
        done = subprocess.run(commands[language], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        if "kill -9" in text:
            assert done.stdout.splitlines()[1:] == ["hello", "attempt 1", "hello", "attempt 2"]
    if test == "original":
        assert drained(FemtoQueue("my_queue", "node")) == [b"0", b"1", b"2", b"3"]
    if language in ("crontab", "ini"):
        assert (project / "handled").read_text() == "payload\n"


def run_unit(unit: str) -> None:
    """Do what systemd does with a service: start it, and stop it by SIGTERM to the main process."""
    unit_of = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
    assert unit_of["WorkingDirectory"] == "/srv/myapp" and unit_of["KillMode"] == "mixed"
    program, *arguments = shlex.split(unit_of["ExecStart"])
    with subprocess.Popen([os.path.basename(program), *arguments]) as process:
        try:
            assert FemtoQueue("queue", "node").join(timeout=20)
        finally:
            process.terminate()
        assert process.wait(20) == -signal.SIGTERM  # which systemd takes for a clean end


def test_readme_names_what_exists() -> None:
    """Calls, arguments, states, commands, options, links, files and variables on the page are there."""
    # What was promised is there: a worker is killed, and the original's tasks are moved over.
    assert [text for test, _, _, text in BLOCKS if "kill -9" in text and not test]
    assert "original" in {test for test, *_ in BLOCKS}

    # Python
    called = set(re.findall(r"\bq\.(\w+)\(", PAGE))
    assert len(called) > 10 and called <= {*dir(FemtoQueue)}
    for call in re.findall(r"FemtoQueue\(([^()]*)\)", PAGE):
        assert {*re.findall(r"(\w+)=", call)} <= {*inspect.signature(FemtoQueue).parameters}
    states = set(re.findall(r"(?:ids|purge|counts\(\))[(\[]\"(\w+)\"", PAGE))
    assert states and states <= set(STATES)

    # Links, files, variables
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", PAGE))
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    anchors |= set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", PAGE))
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", PAGE):
        path, _, anchor = "".join(target).partition("#")
        if not path.startswith(("http:", "https:")):
            assert (HERE / path).exists() and (path or anchor in anchors), target
    code = MODULE.read_text(encoding="utf-8") + Path(__file__).read_text(encoding="utf-8")
    words = re.findall(r"\bFEMTOQUEUE_[A-Z]+\b|(?<= -k )\w+", PAGE)
    assert not [word for word in words if word not in code]

    # Each test that is named is here, and each promise has one.
    named = set(re.findall(r"\b(?:test_[a-z_]+|Test[A-Z]\w+)", PAGE)) - {"test_femtoqueue"}
    assert named <= globals().keys()
    promises = PAGE.partition("under the heading with its number")[2].partition("\n## ")[0]
    items = re.split(r"^(?=\d+\. )", promises, flags=re.MULTILINE)[1:]
    assert [item.partition(".")[0] for item in items] == [str(number) for number in range(1, 11)]
    assert all("test_" in item or "Test" in item for item in items)


# ====================================================================================================
# Several machines
# ====================================================================================================

# A folder with scripts that start, break and stop each of these; the tests are skipped without it.
TOOLS = Path(os.environ.get("FEMTOQUEUE_MACHINES", "nowhere"))
PROGRAMS = {
    "NFS": ("nfs", "linux.uml", "mount.nfs", "rpc.nfsd"),
    "GlusterFS": ("gluster", "glusterd", "glusterfs"),
    "CephFS": ("ceph", "ceph-mon", "ceph-mds", "ceph-fuse"),
}
# Runs on a host, and forks for each numbered file that appears in its box: a name and what it runs.
AGENT = r"""
import os, sys, time, traceback
sys.path.insert(0, sys.argv[1])
import femtoqueue
from femtoqueue import *
box, number, pids, name = sys.argv[2], 0, {}, "agent"
def say(*words):
    os.write(1, (" ".join(map(str, (name, *words))) + "\n").encode())
def stop_before(part):
    # Says "in flight" before the change whose name has `part` in it, and makes it when it is told to.
    def change(real, path, *rest, **options):
        target = os.path.join(path, *map(str, rest[:1]))
        if part in target and os.path.isdir(os.path.dirname(target)):
            for call, function in calls.items():
                setattr(os, call, function)
            # All that the kernel asks before it, it asks now: delegations are returned, rights known.
            os.rename(path, path + "~")
            os.rename(path + "~", path)
            for directory in {os.path.dirname(path), os.path.dirname(target)}:
                os.listdir(directory), os.access(directory, os.W_OK)
            say("in-flight")
            while not os.path.exists(f"{box}/go"):
                time.sleep(0.01)
        return real(path, *rest, **options)
    calls = {call: getattr(os, call) for call in ("rename", "replace", "link", "unlink", "remove")}
    for call, function in calls.items():
        setattr(os, call, lambda *a, real=function, **o: change(real, *a, **o))
def produce(root, count, pause_s, **options):
    queue = FemtoQueue(root, name, **options)
    begun_s = time.time()
    for number in range(count):
        queue.push(f"{name}-{number:04d}".encode())
        say("ack", f"{name}-{number:04d}")
        time.sleep(pause_s)
    say("pushed", count / (time.time() - begun_s))
def work(root, hold_s, **options):
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
while not os.path.exists(f"{box}/quit"):
    if os.path.exists(path := f"{box}/{number}"):
        number += 1
        if (pid := os.fork()) == 0:
            name, code = open(path).read().split("\n", 1)
            try:
                exec(code)
            except BaseException as error:
                traceback.print_exc()
                say("error", repr(error))
            say("end")
            os._exit(0)
        pids[open(path).readline().strip()] = pid
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        pass
    time.sleep(0.01)
"""


class Host:
    """One machine: what is run there, and what that says."""

    def __init__(self, machines: Machines, name: str) -> None:
        self.machines, self.name = machines, name
        self.box = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=machines.base))
        self.said: list[list[str]] = []
        self.count = 0
        if machines.kind == "NFS":
            under = [str(TOOLS / "nfs-fault.sh"), str(machines.base), "in", name]
        else:
            under = rebooted(self.box)  # it is this machine, but for its mount and its boot
        command = [*under, sys.executable, "-c", AGENT, str(MODULE.parent), str(self.box)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        threading.Thread(target=self._listen, daemon=True).start()
        machines.wait(lambda: self.heard("ready"), f"{name} to answer")

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.append(line.split())

    def root(self, version: str = "4.2") -> str:
        """The queue's directory as it is called there."""
        top = f"{self.machines.base}/{self.name.replace('h', 'host')}"
        if self.machines.kind == "NFS" and version != "4.2":
            top = self.machines.mount(self.name, version) + "-"
        return f"{top}/{self.machines.name}"

    def run(self, who: str, code: str) -> None:
        """Start a process there; `who` is its node_id and begins all it says."""
        draft = self.box / "draft"
        draft.write_text(f"{who}\n{code}")
        draft.rename(self.box / str(self.count))
        self.count += 1

    def heard(self, kind: str, who: str = "") -> list[list[str]]:
        return [line[2:] for line in tuple(self.said) if line[1] == kind and who in ("", line[0])]


class Machines:
    """Servers, and hosts h1 to h4 that mount what they serve. NFS: by 4.2, and by 3 where asked."""

    def __init__(self, kind: str, base: Path) -> None:
        self.kind, self.base, self.name = kind, base, ""  # a short path: sockets need one
        self.hosts: dict[str, Host] = {}
        self.is_broken = True
        self.frozen: set[str] = set()

    def tool(self, what: str, *arguments: str, **environment: str) -> str:
        """Run one of the scripts; what it printed."""
        name = PROGRAMS[self.kind][0]
        script = TOOLS / (f"{name}-fault.sh" if what == "fault" else f"{what}-{name}.sh")
        return execute(script, self.base, *arguments, env={**os.environ, **environment})

    def repair(self) -> None:
        """Start all, or whatever of it was broken."""
        for who in tuple(self.frozen):
            self.fault("thaw", who)
        if self.is_broken:
            more = {"MOUNT_OPTS": "vers=4.2,hard", "LEASE": "10"} if self.kind == "NFS" else {}
            self.tool("start", HOSTS="4", **more)
            self.is_broken = False

    def fault(self, what: str, who: str, *rest: str) -> str:
        self.is_broken |= what not in ("in", "heal")
        self.frozen = self.frozen | {who} if what == "freeze" else self.frozen - {who}
        found = self.tool("fault", what, who, *rest)
        if what == "kill" and self.kind != "NFS" and who in self.hosts:
            os.killpg(self.hosts[who].process.pid, signal.SIGKILL)  # with its mount, what runs there
        return found

    def mount(self, host: str, version: str, *names: str) -> str:
        """Where it is mounted; by names, as filesystems that share no lock, and trust their caches."""
        path = f"/run/nfs-{version}"
        what, options = "10.78.0.11:/", f"nosharecache,vers={version},hard"
        options += ",actimeo=600" if names else ""
        if version == "3":
            what += "run/disk/export"
            options += ",nolock,mountproto=tcp,mountport=20048,port=2049"
        once = 'mountpoint -q "$1" || { mkdir -p "$1"; mount -t nfs -o "$2" "$3" "$1"; }'
        each = f'set -- "{path}$name" {options} {what}; {once}'
        self.fault(
            "in", host, "sh", "-c", f"for name in {' '.join(names) or '-'}; do {each} & done; wait"
        )
        return path

    def __getitem__(self, name: str) -> Host:
        if name not in self.hosts or self.hosts[name].process.poll() is not None:
            self.hosts[name] = Host(self, name)
        return self.hosts[name]

    def end(self) -> None:
        """Let all that runs on the hosts end."""
        for host in self.hosts.values():
            (host.box / "stop").touch()
            (host.box / "quit").touch()
        for host in self.hosts.values():
            host.process.wait(60)
        self.hosts = {}

    def wait(self, found: Callable[[], object], what: str, timeout_s: float = 90) -> None:
        end_s = time.monotonic() + timeout_s
        while not found():
            if time.monotonic() > end_s:
                said = {host.name: host.said[-20:] for host in self.hosts.values()}
                pytest.fail(f"waited in vain for {what}: {said}")
            time.sleep(0.02)

    def all(self, kind: str, who: str = "") -> list[list[str]]:
        return [words for host in self.hosts.values() for words in host.heard(kind, who)]

    def check_all_once(self, count: int) -> None:
        """Wait for the end: each task pushed was delivered and done, once, and nobody saw an error.

        A worker that is alone has what one producer pushed in order.
        """
        for kind in ("ack", "done"):
            self.wait(lambda kind=kind: len(self.all(kind)) >= count, f"{count} times {kind}")
        pushed, got, done = (
            sorted(words[0] for words in self.all(kind)) for kind in ("ack", "got", "done")
        )
        assert self.all("error") == self.all("lost") == []
        assert pushed == got == done and len(set(done)) == count
        for producer in ("h1-", "h2-"):
            found = [p for p, _ in self.all("got", "alone") if p.startswith(producer)]
            assert found == sorted(found)


@pytest.fixture(scope="session")
def running() -> Iterator[dict[str, Machines]]:
    """The machines that were started, by their kind."""
    found: dict[str, Machines] = {}
    yield found
    for machines in found.values():
        machines.tool("stop")
        shutil.rmtree(machines.base, ignore_errors=True)


@pytest.fixture
def cluster(request: pytest.FixtureRequest, running: dict[str, Machines]) -> Iterator[Machines]:
    """The machines of one kind, whole, with nothing running on them."""
    kind = request.param
    name, *programs = PROGRAMS[kind]
    if not (TOOLS / f"start-{name}.sh").exists():
        pytest.skip(f"several machines: FEMTOQUEUE_MACHINES names no folder with start-{name}.sh")
    if os.geteuid() != 0:
        pytest.skip(f"several machines: {kind} needs root")
    if missing := [program for program in programs if shutil.which(program) is None]:
        pytest.skip(f"several machines: {', '.join(missing)} not installed")
    if kind not in running:
        running[kind] = Machines(kind, Path(tempfile.mkdtemp(prefix="fq", dir="/tmp")))
    machines = running[kind]
    machines.repair()
    machines.name = f"queue-{os.urandom(4).hex()}"
    yield machines
    machines.repair()
    machines.end()


def on(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("cluster", kinds, indirect=True)


class TestMachines:
    @pytest.mark.parametrize(
        ("cluster", "version"),
        [("NFS", "4.2"), ("NFS", "3"), ("GlusterFS", ""), ("CephFS", "")],
        indirect=["cluster"],
    )
    def test_contested(self, cluster: Machines, version: str) -> None:
        """Two producers and four workers on two hosts: each task delivered, and exactly once."""
        for host in (cluster["h1"], cluster["h2"]):
            root = host.root(version)
            host.run(f"{host.name}-a", f"work({root!r}, 0)")
            host.run(f"{host.name}-b", f"work({root!r}, 0)")
            host.run(host.name, f"produce({root!r}, 150, 0)")
        begun_s = time.monotonic()
        cluster.check_all_once(300)
        rates = [round(float(words[0])) for words in cluster.all("pushed")]
        took_s = time.monotonic() - begun_s
        print(f"{cluster.kind} {version}: 300 tasks in {took_s:.1f} s, a host pushes {rates} a second")
        assert all(host.heard("done") for host in cluster.hosts.values())

    @pytest.mark.parametrize(
        ("cluster", "workers", "faults"),
        [
            ("NFS", "alone", "stop s1, start s1"),
            # A new connection, but the same answers.
            ("NFS", "h1-a h2-a", "mute s1, reset h1, reset h2, unmute s1"),
            ("GlusterFS", "h1-a h2-a", "kill s2"),
            ("CephFS", "h1-a h2-a", "kill mds"),
            ("CephFS", "h1-a h2-a", "kill osd.0"),
        ],
        indirect=["cluster"],
    )
    def test_a_server_is_away(self, cluster: Machines, workers: str, faults: str) -> None:
        """Calls wait until it, or another one, is there. Nothing fails, is lost or comes twice."""
        roots = {"h1": cluster["h1"].root(), "h2": cluster["h2"].root("3")}
        for host, root in roots.items():
            cluster[host].run(host, f"produce({root!r}, 60, 0.02)")
        for host, worker in zip(roots, workers.split(), strict=False):
            cluster[host].run(worker, f"work({roots[host]!r}, 0.02, timeout_stale_ms=120_000)")
        cluster.wait(lambda: len(cluster.all("got")) > 10, "a claim in hand")
        for fault in faults.split(", "):
            cluster.fault(*fault.split())
        cluster.check_all_once(120)

    @on("GlusterFS")
    def test_a_slow_stream_keeps_the_copies_together(self, cluster: Machines) -> None:
        """Buckets that are always empty are not removed and remade by two hosts at a time.

        Each push then races with a removal: some fail, and `pending/` itself ends in a split brain.
        """
        for host in (cluster["h1"], cluster["h2"]):
            host.run(host.name, f"produce({host.root()!r}, 250, 0.03)")
            host.run(f"{host.name}-a", f"work({host.root()!r}, 0)")
        cluster.check_all_once(500)
        assert "split-brain" not in cluster.fault("heal", "s1")
        pending = [os.listdir(f"{cluster[host].root()}/pending") for host in ("h1", "h2")]
        assert sorted(pending[0]) == sorted(pending[1])

    @on("NFS", "GlusterFS", "CephFS")
    def test_a_worker_dies(self, cluster: Machines) -> None:
        """Its claim comes back at once on its own host, and not before the lease is over on another."""
        h1, h2 = cluster["h1"], cluster["h2"]
        h1.run("dies", f"produce({h1.root()!r}, 1, 0)\nwork({h1.root()!r}, 600)")
        cluster.wait(lambda: h1.heard("got"), "a claim in hand")
        h2.run("other", f"work({h2.root()!r}, 0)")
        h1.run("killer", "os.kill(pids['dies'], 9)")
        h1.run("neighbour", f"time.sleep(1)\nwork({h1.root()!r}, 0)")
        cluster.wait(lambda: cluster.all("done"), "it to be done")
        assert h1.heard("got", "neighbour") == [["dies-0000", "2"]]

    @on("NFS", "GlusterFS", "CephFS")
    def test_a_producer_and_its_host_die(self, cluster: Machines) -> None:
        """What a durable push returned is whole, and there for others, though its host died at once."""
        h1, h2 = cluster["h1"], cluster["h2"]
        h2.run("h2", f"produce({h2.root()!r}, 10_000, 0, sync_after_write=True)")
        cluster.wait(lambda: len(h2.heard("ack")) > 100, "pushes")
        cluster.fault("kill", "h2")
        h1.run("other", f"work({h1.root()!r}, 0)")
        pushed = {payload for (payload,) in h2.heard("ack")}
        cluster.wait(lambda: pushed <= {words[0] for words in h1.heard("done")}, "all that was pushed")
        assert h1.heard("error") == []

    @on("NFS", "GlusterFS", "CephFS")
    def test_hosts_go_away(self, cluster: Machines) -> None:
        """What a host had in hand that died, was cut off or stood still is done by another one.

        That is after its lease, and those that come back are told. What a longer lease protects comes
        back at once, and only, to the node_id that claimed it, wherever that starts again.
        """
        names = ("h2", "h3", "h4")
        for who in names:
            root = f"{cluster[who].root()}-{who}"
            hold = f"work({root!r}, 600, timeout_stale_ms=2_000)"
            cluster[who].run(who, f"produce({root!r}, 1, 0)\n{hold}")
        root = f"{cluster['h2'].root()}-long"
        hold = f"work({root!r}, 600, timeout_stale_ms=3_600_000)"
        cluster["h2"].run("long", f"produce({root!r}, 1, 0)\n{hold}")
        h1 = cluster["h1"]
        cluster.wait(lambda: len(cluster.all("got")) == 4, "claims in hand")
        cluster.fault("cut", "h3")
        cluster.fault("freeze", "h4")
        cluster.fault("kill", "h2")
        begun_s = time.monotonic()
        for who in names:
            h1.run(f"for-{who}", f"work({h1.root()!r} + '-{who}', 0)")
        h1.run("other", f"say(FemtoQueue({h1.root()!r} + '-long', name).pop(timeout=5))")
        for who in names:
            cluster.wait(lambda who=who: h1.heard("done", f"for-{who}"), f"what {who} had")
            took_s = time.monotonic() - begun_s
            print(f"{cluster.kind}: what {who} had is back {took_s:.1f} s after it went away")
        cluster.wait(lambda: h1.heard("None", "other"), "a pop of the long lease's in vain")
        h1.run("long", f"work({h1.root()!r} + '-long', 0)")
        cluster.wait(lambda: h1.heard("done", "long"), "the long lease's to be done")
        cluster.fault("join", "h3")
        cluster.fault("thaw", "h4")
        h3, h4 = cluster.hosts["h3"], cluster.hosts["h4"]
        for host in (h3, h4):
            (host.box / "release").touch()
        # CephFS shuts out a host that is silent for a minute, until it mounts anew: ESHUTDOWN.
        is_shut_out = cluster.kind == "CephFS"
        news = "error" if is_shut_out else "lost"
        cluster.wait(lambda: h3.heard(news) and h4.heard(news), "the news")
        assert sorted(h1.heard("got")) == [[f"{who}-0000", "2"] for who in (*names, "long")]
        assert h3.heard("done") == h4.heard("done") == []
        errors = [words[0] for words in cluster.all("error")]
        assert errors == ["BrokenPipeError(108,"] * 2 * is_shut_out
        if is_shut_out:
            cluster.fault("kill", "h3")
            cluster.fault("kill", "h4")

    @on("NFS")
    def test_the_server_dies_before_it_answers(self, cluster: Machines) -> None:
        """What was done is reported as done, in whichever call, even if another host had it meanwhile.

        The server's machine dies with its answers, and sessions or caches of answers with it: what the
        kernel repeats is told that there is no such file. Each call has a mount of its own, for a
        kernel makes one rename between directories of a filesystem at a time.
        """

        def on_disk() -> set[str]:
            """All files of the queues, as the server has them."""
            find = f"cd /run/disk/export; find {cluster.name}* -type f"
            return set(cluster.fault("in", "s1", "sh", "-c", find).split())

        def back(host: str) -> None:
            cluster.fault("thaw", host)
            # The new server has a new hardware address, which would else be noticed after a minute.
            cluster.fault("in", host, "ip", "neigh", "flush", "all")

        h1, h2 = cluster["h1"], cluster["h2"]
        calls = [(version, call) for version in ("4.2", "3") for call in IN_FLIGHT]
        mounts = {version: cluster.mount("h1", version, *IN_FLIGHT) for version in ("4.2", "3")}
        for version, call in calls:
            part, end, code = IN_FLIGHT[call]
            root = f"{mounts[version]}{call}/{cluster.name}-{call}-{version}"
            *before, last = code.split("; ")
            new = f"q = FemtoQueue({root!r}, name, 120_000, keep_done={bool(end)})"
            h1.run(f"{call}-{version}", "\n".join([new, *before, f"stop_before('/{part}/')", last]))
        cluster.wait(lambda: len(h1.heard("in-flight")) == len(calls), "calls in flight")
        there = on_disk()
        path = h2.root("3")
        cluster.fault("mute", "s1")
        (h1.box / "go").touch()
        cluster.wait(lambda: len(there - on_disk()) == len(calls), "all to be done", 20)
        for host in ("h1", "h2"):
            cluster.fault("freeze", host)  # or they wait longer and longer for a server that is silent
        cluster.fault("kill", "s1")
        cluster.frozen.clear()  # not yet
        cluster.repair()
        back("h2")
        taken = [f"{call}-{version}" for version, call in calls if "taken" in call]
        for call in taken:
            h2.run(f"for-{call}", f"work({path!r} + '-{call}', 0)")
        cluster.wait(lambda: len(h2.heard("done")) == len(taken), "some to be taken")
        back("h1")
        cluster.wait(lambda: len(h1.heard("end")) == len(calls), "answers")
        assert cluster.all("error") == []
        tasks = [path.split("/") for path in on_disk() if "_" in path.rpartition("/")[2]]
        for version, call in calls:
            states = [path[1] for path in tasks if path[0] == f"{cluster.name}-{call}-{version}"]
            assert states == [IN_FLIGHT[call][1]] * bool(IN_FLIGHT[call][1]), call


# Before which change it waits, where the task is in the end, and what is called.
IN_FLIGHT = {
    "push": ("pending", "pending", "q.push(b'x')"),
    "push-taken": ("pending", "done", "q.push(b'x')"),
    "schedule": ("scheduled", "scheduled", "q.schedule(b'x', 1900000000000000)"),
    "schedule-taken": ("scheduled", "done", "q.schedule(b'x', 1600000000000000)"),
    "pop": ("in_progress", "in_progress", "q.push(b'x'); t = q.pop()"),
    "touch": ("in_progress", "in_progress", "q.push(b'x'); t = q.pop(); q.touch(t)"),
    "done": ("done", "done", "q.push(b'x'); t = q.pop(); q.done(t)"),
    "done-unkept": ("in_progress", "", "q.push(b'x'); t = q.pop(); q.done(t)"),
    "retry": ("pending", "pending", "q.push(b'x'); t = q.pop(); q.retry(t)"),
}


# --- what a distributed filesystem does, done by one machine ------------------------------------------


def test_names_that_linger_cost_no_listing_each(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where listings show for long what is gone, as over NFS, a task costs no listing of its own."""
    queue = FemtoQueue(directory, "a")
    ids = queue.push_many([b"x"] * 200)
    shown: dict[str, list[os.DirEntry[str]]] = {}
    listed = 0

    @contextlib.contextmanager
    def scandir(path: str) -> Iterator[Iterable[os.DirEntry[str]]]:
        nonlocal listed
        with REAL["scandir"](path) as entries:
            found = list(entries)
        if os.path.dirname(path).endswith("/pending"):
            listed += 1
            found = shown.setdefault(path, found)
        yield found

    monkeypatch.setattr(os, "scandir", scandir)
    for id in ids:
        task = queue.pop()
        assert task and task.id == id
        queue.done(task)
        clock.advance(0.02)  # 4 s in all, and a look at everything each second
    assert listed < 10


def test_hosts_that_make_the_directory_at_once_share_its_files(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes second replaces neither `layout` nor the clock: to who reads them, that is ESTALE."""
    inodes: list[int] = []

    def open_(path: str, *arguments: int) -> int:
        if "/creating/" in path and not inodes:
            inodes.append(0)
            FemtoQueue(directory, "b").push(b"x")  # another host is quicker, now
            inodes[:] = [(directory / name).stat().st_ino for name in shared()]
        return REAL["open"](path, *arguments)

    def shared() -> list[str]:
        return sorted(path.name for path in directory.iterdir() if path.is_file())

    monkeypatch.setattr(os, "open", open_)
    FemtoQueue(directory, "a").push(b"x")
    assert len(inodes) == 2 and [(directory / name).stat().st_ino for name in shared()] == inodes


@pytest.mark.parametrize("size", [1, 2_000_000])
def test_a_task_is_finished_on_another_host(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Task and queue can be pickled, also where the directory is mounted under another path."""
    first = FemtoQueue(directory, "h1")
    first.push(b"x" * size)
    task = pickle.loads(pickle.dumps(first.pop()))
    task.path = f"/elsewhere{task.path}"
    assert size > 1 or task.data == b"x"  # a large one is read when it is asked for
    (tmp_path / "mnt").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(FemtoQueue("mnt/queue", "h2", max_attempts=5))
    monkeypatch.chdir("/")
    second = pickle.loads(pickled)
    assert (second.node_id, second.max_attempts) == ("h2", 5)
    second.done(task)
    with pytest.raises(NotInProgress):
        first.done(task)
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

    hosts = worker, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    with Steps(1, note, once=False):
        for _ in range(300):  # through two periods of 1,000 s
            clock.advance(7)
            for queue in hosts:
                queue.push(b"x")
                assert drained(queue) == [b"x"]
        assert len(made) == len({*made}) <= 4
        clock.advance(2_000)
        put(directory / "pending" / "1600000000000123_x")
        for _ in range(4):  # it comes back when its bucket was removed
            task = worker.pop()
            clock.advance(5)
            for path in (directory / "pending").iterdir():
                os.utime(path, (clock.wall - 5, clock.wall - 5))
            assert other.pop() is None and os.listdir(directory / "pending") == []
            worker.retry(task)
    assert len(made) == len({*made}) > 4


def test_a_name_listed_twice(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that lists names twice changes no order, no delivery, and ids has each once."""

    @contextlib.contextmanager
    def twice(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        with REAL["scandir"](path) as entries:
            found = list(entries)
        yield iter(found + found[::-1])

    monkeypatch.setattr(os, "scandir", twice)
    queue = FemtoQueue(directory, "a")
    ids = [queue.push(b"%d" % number) for number in range(50)]
    assert list(queue.ids("pending")) == ids
    tasks = [queue.pop() for _ in ids]
    assert [task and task.id for task in tasks] == ids == list(queue.ids("in_progress"))
    assert queue.pop() is None
    for task in tasks:
        queue.done(task)
    assert list(queue.ids("done")) == ids and queue.purge("done", 0) == 50 and queue.join(0)


@pytest.mark.parametrize("first", ["claim", "pending"])
@pytest.mark.parametrize("state", ["done", "failed"])
def test_a_finished_task_under_two_names(directory: Path, clock: Time, state: str, first: str) -> None:
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
    os.link(path, directory / state / id)
    for _ in range(5):
        clock.advance(2.1)
        assert queue.pop() is None
    assert queue.status(id) == state
    assert [*queue.counts(state, "pending", "in_progress").values()] == [1, 0, first == "pending"]


def test_a_slow_filesystem_is_left_alone(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiting worker looks for a tenth of the time at most, however slow a look is."""
    queue, looks = FemtoQueue(directory, "a"), []

    def slow(path: str) -> object:
        clock.advance(0.002)
        looks.append(path)
        return REAL["scandir"](path)

    monkeypatch.setattr(os, "scandir", slow)
    assert queue.pop(timeout=10) is None
    assert 0.002 * len(looks) < 1.2


# ====================================================================================================
# Windows
# ====================================================================================================


def become_windows() -> None:
    """Take from this process what Windows lacks, and forbid what means another thing there.

    Runs in a child process, before femtoqueue is imported. Paths stay POSIX paths: only what the
    system calls do is told apart here.
    """
    import fcntl
    import select

    real: Any = type("Real", (), dict(vars(os)))
    real_open, real_time, real_monotonic = builtins.open, time.time, time.monotonic
    binary = 0x8000_0000  # O_BINARY, as a flag that Linux does not have

    def refuse(number: int, path: object, winerror: int = 0) -> None:
        problem = OSError(number, real.strerror(number), path)
        problem.winerror = winerror
        raise problem

    def is_name(path: object, *mode: int) -> None:
        name = real.path.basename(real.fspath(path))
        if set(name) & set('<>:"|?*\\') or not name.isprintable() or name[-1:] in (".", " "):
            refuse(errno.EINVAL, path, 123)

    def is_closed(path: object) -> None:
        """A file that somebody has open can be neither renamed nor deleted: a sharing violation."""
        for number in real.listdir("/proc/self/fd"):
            try:
                found, wanted = real.fstat(int(number)), real.stat(path)
            except OSError:
                continue
            if stat.S_ISREG(found.st_mode) and real.path.samestat(found, wanted):
                refuse(errno.EACCES, path, 32)

    def is_not_proc(path: object, *rest: object) -> None:
        if str(path).startswith("/proc"):
            refuse(errno.ENOENT, path, 3)

    def may_rename(source: object, target: object) -> None:
        may_replace(source, target)
        if real.path.lexists(source) and real.path.lexists(target):
            refuse(errno.EEXIST, target, 183)

    def may_replace(source: object, target: object) -> None:
        is_name(target)
        is_closed(source)
        is_closed(target)

    def may_link(source: object, target: object) -> None:
        if os.environ.get("NO_HARD_LINKS"):  # FAT, exFAT
            refuse(errno.EINVAL, target, 1)

    def may_unlink(path: object) -> None:
        is_closed(path)
        if real.path.isdir(path):
            refuse(errno.EACCES, path, 5)

    def may_open(path: object, flags: int, mode: int = 0) -> None:
        is_not_proc(path)
        if real.path.isdir(path):
            refuse(errno.EACCES, path, 5)
        if flags & os.O_CREAT:
            is_name(path)
        assert flags & binary, f"{path} is opened as text: every newline would change"

    def may_fsync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & real.O_ACCMODE == real.O_RDONLY:
            refuse(errno.EBADF, None)

    def may_kill(pid: int, number: int) -> None:
        raise AssertionError("os.kill(pid, 0) ends a process there")

    def guarded(call: Any, check: Any) -> Any:
        return lambda *arguments, **options: (check(*arguments), call(*arguments, **options))[1]

    checks = {"rename": may_rename, "replace": may_replace, "unlink": may_unlink, "remove": may_unlink}
    checks |= {"link": may_link, "mkdir": is_name, "readlink": is_not_proc, "fsync": may_fsync}
    for name, check in (checks | {"kill": may_kill}).items():
        setattr(os, name, guarded(getattr(real, name), check))
    os.open = guarded(lambda path, flags, *rest: real.open(path, flags & ~binary, *rest), may_open)
    builtins.open = guarded(real_open, is_not_proc)
    lacks = {
        os: """O_NOFOLLOW O_NONBLOCK O_DIRECTORY O_CLOEXEC O_SYNC O_DSYNC O_NOATIME O_PATH O_TMPFILE
            register_at_fork uname posix_fadvise posix_fallocate fork forkpty POSIX_FADV_DONTNEED
            POSIX_FADV_WILLNEED getuid geteuid getgid getegid getpgid getpgrp setsid killpg chown fchown
            lchown fchmod mkfifo pread pwrite sync fdatasync statvfs fstatvfs sysconf sendfile
            copy_file_range splice sched_yield sched_getaffinity nice pidfd_open eventfd memfd_create""",
        signal: """SIGPIPE SIGKILL SIGHUP SIGQUIT SIGALRM SIGUSR1 SIGCHLD SIGTSTP setitimer alarm
            pthread_sigmask""",
        time: "clock_gettime CLOCK_BOOTTIME CLOCK_MONOTONIC CLOCK_REALTIME",
        select: "poll epoll",
    }
    for module, names in lacks.items():
        for name in names.split():
            vars(module).pop(name, None)
    sys.modules |= dict.fromkeys(("fcntl", "pwd", "grp", "resource", "termios", "posix"))
    os.name, sys.platform, os.O_BINARY = "nt", "win32", binary
    # Before Python 3.13, both clocks tick 64 times a second.
    time.time = lambda: int(real_time() * 64) / 64
    time.monotonic = lambda: int(real_monotonic() * 64) / 64


# What holds on Windows, and a program that shows it: it runs in an empty directory, where Q makes the
# queue of the node "node-1", or of another one.
ON_WINDOWS = {
    "the module imports and works: push, pop, done, fail, and first in, first out": r"""
for options in ({}, {"sync_after_write": True}):
    q, other = Q(**options), Q("node-2")
    ids = [q.push(b"%d\r\n" % n) for n in range(50)]
    ids += q.push_many(b"%d\r\n" % n for n in range(50, 99)) + [other.push(b"99\r\n")]
    got = []
    while task := q.pop():
        got.append((task.id, task.data))
        (q.fail if len(got) == 100 else q.done)(task)
    assert got == [(id, b"%d\r\n" % n) for n, id in enumerate(ids)], got
    assert [*q.ids("done")] == ids[:99]
    assert q.status(ids[99]) == "failed" and q.requeue(ids[99]) and q.cancel(ids[99])
    for id in ids[:99]:  # the clock there moves in steps, and may be behind the files
        os.utime(f"queue/done/{id}", (0, 0))
    assert q.purge("done", 0) == 99 and {*q.counts().values()} == {0}
""",
    "a task is scheduled, retried now and later, touched, pickled, given back; max_attempts": """
import pickle
for options in ({}, {"sync_after_write": True}):
    q = Q(max_attempts=3, **options)
    id = q.schedule(b"later", time.time_ns() // 1000 + 100_000)
    assert q.pop() is None
    task = q.pop(5)
    assert (task.id, task.data, task.attempt) == (id, b"later", 1), task
    q.touch(task)
    q.retry(task)
    task = q.pop()
    assert task.attempt == 2
    q.retry(task, 50)
    assert q.status(id) == "scheduled"
    task = pickle.loads(pickle.dumps(q.pop(5)))
    assert task.attempt == 3
    q.retry(task)
    assert q.status(id) == "failed"
    q.push(b"given back")
    q.pop()
    q.close()
    with Q("node-2") as other:
        task = other.pop()
        assert (task.data, task.attempt) == (b"given back", 2), task
        other.done(task)
        assert other.join(1)
""",
    "a file is pushed, moving or not: none is renamed, or synced, while it is open": r"""
payload = b"\r\n\x1a" * 500_000
for move in (True, False):
    for durable in (True, False):
        with open("payload", "wb") as file:
            file.write(payload)
        q = Q(sync_after_write=durable)
        id = q.push_file("payload", move=move)
        task = q.pop()
        assert task.id == id and task.data == payload and os.path.exists("payload") is not move
        q.done(task)
""",
    "no process is judged: a dead worker's task comes back by its lease, and not before": """
import subprocess
if sys.argv[-1] == "dies":
    q = Q(timeout_stale_ms=3_000)
    q.push(b"x")
    assert q.pop()
    os._exit(0)
subprocess.run([*sys.orig_argv, "dies"], check=True)
q = Q()
assert q.pop() is None
assert q.pop(10).attempt == 2
""",
    "while a handler reads task.path after its lease, other workers go on with the rest": """
slow, quick = Q(timeout_stale_ms=100), Q("node-2")
slow.push_many([b"read slowly", b"next"])
task = slow.pop()
with open(task.path, "rb") as payload:
    time.sleep(0.3)
    assert quick.pop().data == b"next"
    assert payload.read() == b"read slowly"
assert quick.pop(3).data == b"read slowly"
""",
    "run handles tasks, keeps leases alive, and ends by SIGINT after the task in hand": """
import signal
q = Q(timeout_stale_ms=300)
ids = q.push_many([b"short", b"long", b"stop", b"next"])
def handle(task):
    if task.data == b"long":
        time.sleep(0.8)
    if task.data == b"stop":
        signal.raise_signal(signal.SIGINT)
    assert not task.lost
try:
    q.run(handle)
except KeyboardInterrupt:
    assert [q.status(id) for id in ids] == ["done", "done", "done", "pending"]
else:
    raise AssertionError
""",
    "a virus scanner's sharing violation passes: the verdict is made, and run goes on": """
import errno
def refusing(real, refused):
    def call(source, target, *rest):
        if f"/{state}/" in target and len(refused) < 3:
            refused.append(target)
            error = PermissionError(errno.EACCES, "The process cannot access the file", source)
            error.winerror = 32
            raise error
        return real(source, target, *rest)
    return call
def handle(task):
    assert task.data == b"2" or state == "done"
calls = {name: getattr(os, name) for name in ("rename", "replace", "link")}
for state, handled in ("done", 2), ("failed", 1), ("scheduled", 1):
    refused = []
    q = Q(max_attempts=1 if state == "failed" else None)
    ids = q.push_many([b"1", b"2"])
    for name, real in calls.items():
        setattr(os, name, refusing(real, refused))
    assert q.run(handle, until_empty=True) == handled and refused
    assert [q.status(id) for id in ids] == [state, "done"]
""",
    "push, status, list, run, requeue, cancel and purge work from a shell": r"""
def cli(*words):
    return femtoqueue.main(["queue", *words])

with open("payload", "w") as file:
    file.write("from a file")
assert cli("status") == 1
assert cli("push", "payload") == 0
assert cli("status") == cli("status", "--json") == cli("list", "pending") == 0
copy = "import sys; open('copy', 'w').write(sys.stdin.read())"
assert cli("run", "--until-empty", "--", sys.executable, "-c", copy) == 0
assert open("copy").read() == "from a file"
(id,) = Q().ids("done")
assert cli("requeue", id) == cli("cancel", id) == 0
assert cli("cancel", id) == cli("purge", "failed", "0s") == 1
""",
    "an id from outside never becomes a path: what separates names there is in no id": r"""
import ntpath
q = Q()
os.path.basename, seen = ntpath.basename, []
os.lstat, os.path.lexists = seen.append, seen.append
for name in ("..\\..\\file", "x\\file"):
    id = "1700000000000000_" + name
    assert (q.status(id), q.cancel(id), q.requeue(id), seen) == (None, False, False, [])
""",
    "a node_id that no file's name can have is a ValueError, and nothing is written": r"""
for node_id in ("host:8080", "a\\b", 'a"b', "a?", "a*", "a|b", "<a>"):
    try:
        Q(node_id)
        raise AssertionError
    except ValueError as error:
        assert "node_id" in str(error) and not os.path.exists("queue")
""",
}


@pytest.mark.skipif(sys.platform != "linux", reason="Windows is played on Linux only")
@pytest.mark.parametrize("hard_links", [True, False], ids=["", "FAT"])
@pytest.mark.parametrize("promise", ON_WINDOWS)
def test_on_windows(tmp_path: Path, promise: str, hard_links: bool) -> None:
    """On Windows the module imports and works, without process liveness and without directory fsync."""
    code = [
        "from __future__ import annotations\nimport argparse, builtins, datetime, errno, json, logging, os",
        "import queue, shutil, signal, stat, subprocess, sys, time, threading, typing",
        f"Any = typing.Any\n{inspect.getsource(become_windows)}\nbecome_windows()\n{PRELUDE}",
        "def Q(node_id='node-1', **options): return FemtoQueue('queue', node_id, **options)",
        ON_WINDOWS[promise],
    ]
    more = {} if hard_links else {"NO_HARD_LINKS": "1"}
    execute(sys.executable, "-c", "\n".join(code), cwd=tmp_path, env=os.environ | more)


# ====================================================================================================
# The packages
# ====================================================================================================

SOURCES = ("femtoqueue.py", "benchmark_mini.py", "test_femtoqueue.py", "README.md", "LICENSE")
SOURCES += ("pyproject.toml", ".ci/backend.py")
IN_WHEEL = {"femtoqueue/__init__.py", "femtoqueue/__main__.py", "femtoqueue/py.typed"}
INFO_IN_WHEEL = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
EGG_INFO = {"PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt"}
EGG_INFO |= {"top_level.txt"}
# A program of somebody else's. A line with "# wrong" has one mistake that only annotations tell.
USER = b"""
from datetime import datetime, timezone
from pathlib import Path

from femtoqueue import STATES, FemtoQueue, FemtoQueueError, FemtoTask, NotInProgress


def handle(task: FemtoTask) -> int:
    return len(task.data) + task.attempt


def main(directory: Path) -> dict[str, int]:
    with FemtoQueue(directory, "node", max_attempts=3, maxsize=100) as q:
        id: str = q.push(bytearray(b"x"))
        ids: list[str] = q.push_many(b"%d" % number for number in range(3))
        due: str = q.schedule(memoryview(b"y"), datetime.now(timezone.utc))
        task: FemtoTask | None = q.pop(timeout=None)
        if task:
            try:
                q.touch(task)
                q.retry(task, 1_000)
                q.fail(task, "why")
            except NotInProgress as lost:
                error: FemtoQueueError = lost
                print(error)
        state: str | None = q.status(id)
        pids: list[int] = [claim["pid"] for claim in q.claims()]
        print(state, q.reason(id), pids, ids, due, [*q.ids("pending")], STATES, q.cancel(id))
        count: int = q.run(handle, until_empty=True, also=[q]) + q.purge("done", 3600.0)
        return {**q.counts(), "handled": count}


q = FemtoQueue("queue", "node")
q.push("text")  # wrong
q.push_many(["text"])  # wrong
q.pop().data  # wrong
q.done(None)  # wrong
q.schedule(b"x", "tomorrow")  # wrong
q.no_such_call()  # wrong
FemtoQueue("queue")  # wrong
number: int = q.push(b"x")  # wrong
"""


def environment(**more: str) -> dict[str, str]:
    """This process's environment, without what leads to the checkout."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "MYPYPATH")
    return {name: value for name, value in os.environ.items() if name not in hidden} | more


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist that it was built from."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    if not (HERE / ".ci" / "backend.py").exists():
        pytest.skip("this is not a checkout: there is nothing to build")
    tree = tmp_path_factory.mktemp("packages") / "tree"
    for name in SOURCES:
        put(tree / name, (HERE / name).read_bytes())
    execute(sys.executable, "-m", "build", "--no-isolation", cwd=tree, env=environment())
    (wheel,), (sdist,) = (tree / "dist").glob("*.whl"), (tree / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_the_packages_hold_what_they_should(packages: tuple[Path, Path], tmp_path: Path) -> None:
    """The wheel: the module byte for byte, two more files that a package needs, and its metadata.

    The sdist: the repository's own files and the generated metadata. A checkout makes the same wheel.
    """
    top = f"femtoqueue-{femtoqueue.__version__}"

    def read(wheel: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    wheel = read(packages[0])
    assert set(wheel) == IN_WHEEL | {f"{top}.dist-info/{name}" for name in INFO_IN_WHEEL}
    assert wheel["femtoqueue/__init__.py"] == MODULE.read_bytes()
    assert wheel["femtoqueue/py.typed"] == b""
    metadata = wheel[f"{top}.dist-info/METADATA"].decode()
    assert "\nLicense-Expression: MIT\n" in metadata and "\nRequires-Python: >=3.10\n" in metadata
    assert all("extra ==" in line for line in metadata.splitlines() if line.startswith("Requires-Dist"))
    wanted = {*SOURCES, "PKG-INFO", "setup.cfg"} | {f"femtoqueue.egg-info/{name}" for name in EGG_INFO}
    with tarfile.open(packages[1]) as sdist:
        assert {m.name for m in sdist if not m.isdir()} == {f"{top}/{name}" for name in wanted}
        module = sdist.extractfile(f"{top}/femtoqueue.py")
        assert module and module.read() == MODULE.read_bytes()
    command = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path)
    execute(*command, packages[0].parents[1], env=environment())
    assert read(*tmp_path.glob("*.whl")) == wheel


def test_an_installed_femtoqueue_runs(packages: tuple[Path, Path], tmp_path: Path) -> None:
    """Installed, it is `import femtoqueue`, `python -m femtoqueue` and `femtoqueue`."""
    pytest.importorskip("pip")
    home = tmp_path / "venv"
    venv.create(home, symlinks=os.name != "nt")
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    execute(
        *(
            sys.executable,
            "-m",
            "pip",
            "--python",
            scripts / "python",
            "install",
            "--quiet",
            "--no-index",
        ),
        *("--no-deps", "--ignore-installed", "--no-warn-script-location"),
        *("--disable-pip-version-check", "--prefix", home, packages[0]),
        env=environment(),
        cwd=home,
    )
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment()}
    path = execute(scripts / "python", "-c", "import femtoqueue as f; print(f.__file__)", **options)
    module = Path(path.strip())
    assert module.parts[-2:] == ("femtoqueue", "__init__.py")
    assert module.read_bytes() == MODULE.read_bytes()
    for command in ([scripts / "python", "-m", "femtoqueue"], [scripts / "femtoqueue"]):
        version = execute(*command, "--version", **options)
        assert version == f"femtoqueue {femtoqueue.__version__}\n"
        id = execute(*command, "queue", "push", module, **options)
        assert execute(*command, "queue", "list", "pending", **options).endswith(id)
        execute(*command, "queue", "no-such-command", succeeds=False, **options)


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_copied_file_is_typed(tmp_path: Path, checker: str, system: str) -> None:
    """A user's program beside a copy of the file: its mistakes are found, on each system, and no more."""
    pytest.importorskip(checker)
    put(tmp_path / "user.py", USER)
    shutil.copyfile(MODULE, tmp_path / "femtoqueue.py")
    platform = {"Windows": "win32"}.get(system, system.lower())
    options = {
        "mypy": ["--strict", "--config-file=", "--python-version=3.10", "--platform", platform],
        "pyright": ["--pythonversion=3.10", "--pythonplatform", system],
    }[checker]
    command = (sys.executable, "-m", checker, *options, "user.py", "femtoqueue.py")
    out = executed(*command, cwd=tmp_path, env=environment()).stdout
    if checker == "pyright" and "0 informations" not in out:
        pytest.skip(f"pyright does not run here: {out.strip()[-200:]}")
    found = {(name, int(line)) for name, line in re.findall(r"(\w+)\.py:(\d+).*? error", out)}
    lines = enumerate(USER.decode().splitlines(), 1)
    assert found == {("user", number) for number, line in lines if line.endswith("# wrong")}, out
