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
import multiprocessing
import os
import pickle
import platform
import queue as queues
import random
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
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
from contextlib import contextmanager
from pathlib import Path
from queue import Full
from typing import Any, NamedTuple

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


def set_to_real_time(clock: Time) -> None:
    """Bring the `clock` to where the clocks of the real processes are."""
    clock.wall = REAL_CLOCK(time.CLOCK_REALTIME)
    clock.boot = REAL_CLOCK(time.CLOCK_BOOTTIME)


@pytest.fixture
def now(clock: Time) -> Time:
    """The `clock`, set to the real time, so that a queue can be shared with real processes."""
    set_to_real_time(clock)
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


def start(
    code: str, *arguments: object, under: Iterable[str] = (), **options: Any
) -> subprocess.Popen[str]:
    """Start a real Python process that runs `code`, with femtoqueue imported; sys.argv[1:] = arguments.

    `under`: another command, by way of which it is started.
    """
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
    assert process.stdin
    process.stdin.write(line + "\n")
    process.stdin.flush()


def expect(process: Process, line: str) -> None:
    """Wait for the next line that the process prints, which must be this one."""
    assert process.stdout
    assert process.stdout.readline().rstrip("\n") == line


def tell(process: Process, expression: str) -> str:
    """Have a process that `claimed_by` started evaluate this; return what it prints."""
    say(process, expression)
    assert process.stdout
    return process.stdout.readline().strip()


def ending(process: Process) -> tuple[str, int]:
    """What else the process prints, errors behind the rest, and its exit status."""
    assert process.stdin and process.stdout and process.stderr
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
needs_time_namespace = needs(*NEW_TIME, "true")
needs_mounts = needs("unshare", "-m", "mount", "--bind", "/dev/null", "/proc/sys/kernel/random/boot_id")
needs_faketime = needs("faketime", "2001-01-01", "true")
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


CLAIM = """
queue = FemtoQueue(sys.argv[1], sys.argv[2])
task = queue.pop()
print(task.id, flush=True)
for line in sys.stdin:
    try:
        print(eval(line), flush=True)
    except NotInProgress:
        print("NotInProgress", flush=True)
"""


@contextmanager
def claimed_by(directory: Path, node_id: str, under: Iterable[str] = ()) -> Iterator[Process]:
    """A real process that has claimed the oldest task, and then does what it is told."""
    process = start(CLAIM, directory, node_id, under=under)
    try:
        assert process.stdout and process.stdout.readline(), "it did not get the task"
        yield process
    finally:
        process.kill()
        process.communicate()


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


def break_call(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    """Let the call number `at` of os.<name> raise EIO."""
    real = getattr(os, name)
    count = itertools.count()

    def broken(*arguments: object, **options: object) -> object:
        if next(count) == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, broken)


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


@pytest.fixture
def vanish(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """vanish(path): somebody deletes this file right after it was looked at for the first time."""
    doomed: list[str] = []

    def look_once(real: Callable[..., Any], path: Any, *rest: Any, **options: Any) -> Any:
        info = real(path, *rest, **options)
        if path in doomed:
            doomed.remove(path)
            os.unlink(path)
        return info

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, functools.partial(look_once, getattr(os, name)))
    return lambda path: doomed.append(str(path))


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


LATER_US = 4_000_000_000_000_000  # the year 2096


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


VERDICTS = {
    "done": lambda q, task: q.done(task),
    "fail": lambda q, task: q.fail(task),
    "retry": lambda q, task: q.retry(task),
    "retry-later": lambda q, task: q.retry(task, 1_000),
}


def never(task: FemtoTask) -> None:
    """A handler that must not be called."""
    pytest.fail(f"{task} was handled")


def counted(q: FemtoQueue) -> dict[str, int]:
    """How many tasks there are, by state."""
    return {state: count for state, count in q.counts().items() if count}


def ended(process: Process) -> tuple[str, int]:
    """What else the process prints, without errors, and its exit status; it ends by itself."""
    status = process.wait(15)
    assert process.stdout
    return process.stdout.read(), status


def signalled_until_it_ends(process: Process, *numbers: int) -> None:
    """Send the signals, again and again: one that comes too soon after another is the same."""
    end = time.monotonic() + 15
    while process.poll() is None and time.monotonic() < end:
        for number in numbers:
            os.kill(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)


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

# --- names and files ----------------------------------------------------------------------------------


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


def test_scheduled_names(directory: Path, clock: Time) -> None:
    """A scheduled task's file is <id>~0~<due_us>; its id's time is the due time, or now if later."""
    queue = FemtoQueue(directory, "node-1")
    due_us = NOW_US + HOUR_US
    id = queue.schedule(b"x", due_us)
    assert re.fullmatch(rf"\d{{16}}/{re.escape(id)}~0~{due_us}", where(directory, "scheduled"))
    assert int(id[:16]) == due_us
    assert NOW_US <= int(queue.schedule(b"x", NOW_US - HOUR_US)[:16]) < NOW_US + 10


def test_the_count_of_attempts_has_an_end(directory: Path) -> None:
    """A task that was delivered as often as a name can tell has failed."""
    queue = FemtoQueue(directory, "a")
    put(directory / "pending" / f"1700000000000000_x~{10**9 - 2}")
    task = queue.pop()
    assert task and (task.id, task.attempt) == ("1700000000000000_x", 10**9 - 1)
    queue.retry(task)
    assert queue.pop() is None
    assert queue.status(task.id) == "failed"


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
    """The longest node_id has room in every state's names."""
    queue = FemtoQueue(directory, "n" * 64)
    id = queue.push(b"x")
    for delay_ms in (1, 0):
        task = queue.pop()
        assert task
        queue.touch(task)
        queue.retry(task, delay_ms)
        clock.advance(1)
    assert drained(queue) == [b"x"] and queue.status(id) == "done"


@pytest.mark.parametrize("node_id", ["müller", "日本", "a\u00a0b", "e\u0301", "\x7f", "a\tb", "\udcff"])
def test_a_node_id_is_printable_ascii(directory: Path, node_id: str) -> None:
    """node_ids are printable ASCII: a name that one process can read and another cannot is no name."""
    with pytest.raises(ValueError, match="node_id"):
        FemtoQueue(directory, node_id)
    assert not directory.exists()


LANG_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("variables", [LANG_C, {"PYTHONUTF8": "1"}], ids=["C", "UTF-8"])
def test_what_is_not_ascii_is_seen_alike_in_every_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """Names that are not ASCII are never delivered; a data_dir may have one, and a reason any text."""
    directory = tmp_path / "données"
    queue = FemtoQueue(directory, "a")
    put(directory / "pending" / "1700000000000000_é", b"never")
    id = queue.push(b"x")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = """
queue = FemtoQueue(sys.argv[1], "b")
task, no = queue.pop(), queue.pop()
print(task.data, no, queue.counts()["pending"], sys.getfilesystemencoding() == "utf-8")
queue.fail(task, "gr\\u00f6\\u00dfe \\u65e5 \\udcff")
"""
    assert run(code, directory) == f"b'x' None 0 {variables is not LANG_C}\n"
    reason = queue.reason(id)
    assert reason and reason.startswith("größe 日 ")


# --- buckets ------------------------------------------------------------------------------------------


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


def test_ids_are_never_older_than_their_bucket(directory: Path, clock: Time) -> None:
    """Nothing in a bucket is older than its name says, what came back included."""
    queue = FemtoQueue(directory, "a")
    ids = [queue.push(b"old"), queue.push(b"old 2")]
    claims = [queue.pop(), queue.pop()]
    clock.advance(2_000)
    ids.append(queue.push(b"new"))
    for claim in reversed(claims):
        assert claim
        queue.retry(claim)
    for bucket, id in (name.split("/") for name in files(directory / "pending")):
        assert id >= bucket[:16]
    assert [task.id for task in iter(queue.pop, None)] == ids


def test_empty_buckets_vanish(directory: Path, clock: Time) -> None:
    """An empty bucket is removed, but none that is younger than 2 s; then a push makes another."""
    queue = FemtoQueue(directory, "a")
    buckets = (directory / "pending", directory / "scheduled")
    queue.push(b"1")
    queue.schedule(b"2", NOW_US + 1_500_000)
    assert drained(queue) == [b"1"]
    clock.advance(1.6)
    assert drained(queue) == [b"2"]
    assert all(map(os.listdir, buckets))
    clock.advance(1_002)  # nobody uses the bucket of that period any more
    assert queue.pop() is None
    assert not any(map(os.listdir, buckets))
    queue.push(b"3")
    queue.schedule(b"4", NOW_US)
    assert drained(queue) == [b"3", b"4"]
    # Who brings an old task back makes a bucket with an old name.
    bucket = directory / "pending" / "1600000000000001"
    for age_s, stays in ((0, True), (1.9, True), (2.1, False)):
        bucket.mkdir(exist_ok=True)
        os.utime(bucket, (clock.wall - age_s, clock.wall - age_s))
        assert queue.pop() is None
        assert bucket.exists() is stays


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


# --- tasks of shell scripts ---------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"hello\n", b"\x01" + bytes(23) + b"like the original's"])
@pytest.mark.parametrize(
    "rest",
    [
        *(
            "from a shell.00000000",
            "job.bak",
            "a (conflicted copy).txt",
            "host_0123.partial",
            "x" * 182,
        ),
        *("x_0123456789abcdef0.bak", "h_" + "g" * 18),
    ],
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
        outside.mkdir()
        inside = outside / "0000000000000001_outside"
        for path in (outside / "file", inside):
            path.write_bytes(b"followed")
        queue = FemtoQueue(directory, "a", LONG_MS)
        real = {queue.push(payload): payload for payload in (b"claimed", b"done", b"failed", b"first")}
        queue.pop()
        for finish in (queue.done, queue.fail):
            task = queue.pop()
            assert task
            finish(task)
        done, failed = list(real)[1:3]
        del queue, finish  # what it claimed first is abandoned
        queue = FemtoQueue(directory, "a", LONG_MS)
        real[queue.schedule(b"due", int((clock.wall + 5) * 1e6))] = b"due"
        clock.advance(10)

        made: dict[Path, tuple[str, str, str]] = {}
        bucket = os.listdir(directory / "pending")[0]
        [clock_file] = directory.glob("clock-*")
        for place, name, kind in objects:
            folder = directory / place.format(bucket=bucket)
            folder.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(folder / name):
                KINDS[kind](folder / name, outside)
                made[folder / name] = (place, name, kind)
        theirs = {path: seen(path, times=False) for path, what in made.items() if not is_ours(*what)}
        if reboot:
            del queue
            clock_file.unlink()
            queue = FemtoQueue(directory, "a", LONG_MS)

        signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("it blocks"))
        signal.alarm(60)
        inner = [
            entry for path in made if path not in theirs and path.is_dir() for entry in path.iterdir()
        ]
        tasks = {path.name.partition("~")[0] for path in [*made, *inner] if path not in theirs}
        listed = {state: list(queue.ids(state)) for state in STATES}
        assert {*itertools.chain(*listed.values())} <= {*real, *tasks}
        assert queue.counts() == {state: len(ids) for state, ids in listed.items()}
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


COPIES = "{id}.bak|{id}.partial|{id}.tmp|{id}~|{id} (1)|{id}.{crc}|Copy of {id}|.{id}.swp|{stem}.bak"
COPIES += (
    "|{stem}-1.{crc}|{stem} (conflicted copy).{crc}|{stem}.sync-conflict-20260101-101010-ABCDE.{crc}"
)


@pytest.mark.parametrize("state", STATES)
def test_a_copy_that_a_tool_made_is_no_task(directory: Path, state: str) -> None:
    """A name that begins with one of our ids and goes on otherwise is no task, and is left alone."""
    queue, task, ids = full_house(directory)
    id = ids[state]
    copies = COPIES.format(id=id, stem=id[:-9], crc=id[-8:]).split("|")
    [path] = (directory / state).rglob(f"{id}*")
    folders = (path.parent, directory / state)
    paths = [shutil.copy(path, folder / name) for folder in folders for name in copies]
    assert queue.counts() == dict.fromkeys(STATES, 1)
    assert [*queue.ids(state)] == [id]
    for name in copies:
        assert queue.status(name) is None and queue.cancel(name) is queue.requeue(name) is False
    assert drained(queue) == [b"pending"]
    queue.done(task)
    queue.cancel(ids["scheduled"])
    assert [queue.purge(state, 0) for state in ("done", "failed", "corrupt")] == [3, 1, 1]
    assert queue.join(0) is True
    assert all(map(os.path.exists, paths))


# --- the layout's version -----------------------------------------------------------------------------


@pytest.mark.parametrize("made_by", ["us", "a shell script", "nobody yet", "mkdir"])
def test_the_version_file_is_written_when_missing(directory: Path, made_by: str) -> None:
    """A directory that has no version file gets one when it is first opened, in plain text."""
    if made_by == "us":
        FemtoQueue(directory, "a").push(b"x")
        (directory / "layout").unlink()
    elif made_by == "a shell script":
        put(directory / "pending" / "1700000000000000_shell")
    elif made_by == "mkdir":
        directory.mkdir()
    queue = FemtoQueue(directory, "a")
    assert (directory / "layout").read_text().splitlines()[0] == "femtoqueue layout 1"
    assert drained(queue) == [b"x"] * (made_by in ("us", "a shell script"))
    before = seen(directory / "layout")
    FemtoQueue(directory, "b").push(Original.content(b"y"))
    assert seen(directory / "layout") == before
    assert drained(FemtoQueue(directory, "c")) == [Original.content(b"y")], (
        "now, magic bytes are just bytes"
    )


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
    for process in processes:
        expect(process, "go")
    for process in processes:
        say(process)
    assert [ending(process) for process in processes] == [("_\n", 0)] * 4
    assert len(drained(FemtoQueue(directory, "a"))) == 5
    assert (directory / "layout").read_text().startswith("femtoqueue layout 1\n")


# --- what vanishes ------------------------------------------------------------------------------------

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


def test_pending_is_made_again_under_a_call_that_waits(directory: Path) -> None:
    """A worker that waits gets what is pushed after pending/ vanished and was made again."""
    queue, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    found: list[object] = []
    waiter = threading.Thread(target=lambda: found.append(queue.pop(20)))
    waiter.start()
    for number in range(5):
        shutil.rmtree(directory / "pending")
        other.push(b"%d" % number)
        if number == 4 or not other.pop():  # else the waiter had perhaps not begun
            break
    waiter.join()
    assert isinstance(found[0], FemtoTask)


# ====================================================================================================
# The queue clock
# ====================================================================================================

PUSH = "FemtoQueue(sys.argv[1], 'node-1').push(sys.argv[2].encode())"


@pytest.mark.parametrize("step_s", [0, -86_400, -0.01, 86_400])
def test_wall_clock_steps_reorder_nothing(directory: Path, clock: Time, step_s: float) -> None:
    """Stepping or freezing the wall clock reorders nothing and expires nothing, among objects too."""
    queue, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    queue.push(b"1")
    task = queue.pop()
    payloads = [b"%d" % number for number in range(100)]
    for number, payload in enumerate(payloads):
        clock.step_wall(step_s)
        (queue, other)[number % 2].push(payload)
    assert drained(other) == payloads
    queue.done(task)


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
    directory: Path, monkeypatch: pytest.MonkeyPatch, code: str, under: tuple[str, ...]
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
def test_the_clock_is_chosen_once(
    directory: Path, spawn: Spawn, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """All share the clock that the first process chose, also who was about to choose another one."""
    code = f"""
time.time = lambda real=time.time: real() + 86_400 * {days}
queue = FemtoQueue(sys.argv[1], "a")
for line in sys.stdin:
    print(queue.push(line.strip().encode()), flush=True)
"""
    other, queue = spawn(code, directory), FemtoQueue(directory, "b")
    quicker: list[str] = []

    def publish(real: Callable[..., Any], source: str, target: str) -> None:
        if "/clock-" in target and not quicker:
            quicker.append(tell(other, "0"))
        real(source, target)

    for name in ("link", "rename"):
        monkeypatch.setattr(os, name, functools.partial(publish, getattr(os, name)))
    for number in range(1, 7):
        tell(other, str(number)) if number % 2 == 0 else queue.push(b"%d" % number)
    assert quicker and len([*directory.glob("clock-*")]) == 1
    assert drained(FemtoQueue(directory, "c")) == [b"%d" % number for number in range(7)]


@pytest.mark.parametrize("wall_s", [1_326_511_294.0, 3_600_000_000.0])
def test_frozen_time_stays_out_of_stamps_and_timeouts(
    directory: Path, no_hang: None, wall_s: float
) -> None:
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
def test_a_timeout_runs_out_while_the_machine_sleeps(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, no_hang: None, call: str
) -> None:
    """All waiting and all timeouts count time asleep."""
    queue = FemtoQueue(directory, "a")
    queue.schedule(b"x", LATER_US)
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.suspend(600))
    assert not getattr(queue, call)(timeout=3_600)
    assert 8_600 <= clock.boot < 10_000


@needs_mounts
def test_a_host_that_slept_is_not_robbed(
    directory: Path, tmp_path: Path, guard: Callable[[Process], Process]
) -> None:
    """Of two hosts with equal wall clocks, one that was suspended keeps its claims for their lease."""
    code = """
real_monotonic, real_gettime = time.monotonic, time.clock_gettime
time.monotonic = lambda: real_monotonic() - 600
time.clock_gettime = lambda clock: real_gettime(clock) - 600 * (clock == time.CLOCK_MONOTONIC)
"""
    queue, host = FemtoQueue(directory, "a"), rebooted(tmp_path)
    run(PUSH, directory, "x", under=host)
    slept = guard(start(code + CLAIM, directory, "b", under=host))
    assert slept.stdout and slept.stdout.readline()
    assert queue.pop() is None and FemtoQueue(directory, "c").pop() is None
    assert tell(slept, "task.lost") == "False"
    assert tell(slept, "queue.done(task)") == "None"


@needs_mounts
@pytest.mark.parametrize(
    ("step_s", "other_machine", "logged"),
    [(5, True, True), (-5, True, True), (0.5, True, False), (5, False, False)],
)
def test_clocks_that_disagree_are_logged(
    directory: Path,
    tmp_path: Path,
    now: Time,
    queue: FemtoQueue,
    caplog: pytest.LogCaptureFixture,
    step_s: float,
    other_machine: bool,
    logged: bool,
) -> None:
    """Where other machines take part, a queue clock more than a second off the wall clock is logged."""
    with claimed_by(directory, "b", rebooted(tmp_path) if other_machine else []):
        now.step_wall(step_s)
        now.advance(2)
        queue.push(b"c")
        assert b"c" in drained(queue)
    assert any("clock" in message for message in caplog.messages) is logged, caplog.messages


# --- after a boot -------------------------------------------------------------------------------------


@needs_mounts
@pytest.mark.parametrize("newest", ["pending", "in_progress"])
def test_order_survives_a_reboot(directory: Path, tmp_path: Path, newest: str) -> None:
    """After a reboot order continues, though the wall clock restarts in the past."""
    FemtoQueue(directory, "node-1").push(b"1")
    if newest == "in_progress":
        assert run(CLAIM, directory, "node-1")
    run(IN_2001 + PUSH, directory, 2, under=rebooted(tmp_path))
    again = rebooted(tmp_path)
    run(IN_2001 + PUSH, directory, 3, under=again)
    code = 'queue = FemtoQueue(sys.argv[1], "node-1")\nwhile t := queue.pop(): print(t.data.decode())'
    assert run(IN_2001 + code, directory, under=again).split() == ["1", "2", "3"]


@needs_mounts
@pytest.mark.parametrize("step_s", [-86_400, -0.5, 86_400])
def test_the_clock_begins_above_all_that_is_queued(
    directory: Path, tmp_path: Path, step_s: float
) -> None:
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
@pytest.mark.parametrize(("behind_days", "lease_s"), [(0, 30), (3, 3_600), (3_000, 30), (9_000, 3_600)])
def test_leases_survive_a_reboot(
    directory: Path, tmp_path: Path, behind_days: int, lease_s: int
) -> None:
    """After a reboot, with the wall clock behind, another node's claim comes back one lease later."""
    put(directory / "pending" / "1700000000000000_shell")
    claim = "queue = FemtoQueue(sys.argv[1], 'node-2', float(sys.argv[2])); queue.pop(); os._exit(0)"
    run(claim, directory, lease_s * 1_000, under=rebooted(tmp_path))
    code = """
behind_s, lease_s = 86_400 * int(sys.argv[2]), int(sys.argv[3])
real_time, real_gettime = time.time, time.clock_gettime
booted_s = time.clock_gettime(time.CLOCK_BOOTTIME)
passed_s = 0
time.time = lambda: real_time() - behind_s + passed_s
time.clock_gettime = lambda clock: real_gettime(clock) - booted_s + passed_s
queue = FemtoQueue(sys.argv[1], "node-1")  # whose own lease is 30 s
for passed_s in (0, 15, lease_s - 5, lease_s + 5):
    task = queue.pop()
    print(task and task.attempt)
"""
    out = run(code, directory, behind_days, lease_s, under=rebooted(tmp_path))
    assert out.split() == ["None", "None", "None", "2"]


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


# --- a clock file that is no clock file ---------------------------------------------------------------


def break_clock(directory: Path) -> Path:
    """Delete the clock's file; return where it was."""
    [path] = directory.glob("clock-*")
    path.unlink()
    return path


def test_broken_clock_file(tmp_path: Path, no_hang: None) -> None:
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


def test_stray_names_do_not_drag_the_clock(directory: Path, clock: Time) -> None:
    """A stray name in the far future does not become the time of all that follows."""
    queue = FemtoQueue(directory, "a")
    put(directory / "pending" / "9999999999999999_x", b"stray")
    (directory / "pending" / "9999999999999998").mkdir()
    assert int(queue.push(b"1")[:16]) < NOW_US + 10
    assert drained(queue) == [b"1", b"stray"]


# --- what gets its place later ------------------------------------------------------------------------


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize("step_s", [0, 0.004, -0.004, 3_600, -3_600])
@pytest.mark.parametrize("wait_s", [0.5, 36, 8 * 3_600])
def test_scheduled_tasks_come_after_what_was_pending(
    directory: Path, clock: Time, wait_s: float, step_s: float, asleep: bool
) -> None:
    """What falls due comes behind all that is pending then, before all that is pushed afterwards."""
    queue = FemtoQueue(directory, "a")
    for payload in (b"0", b"1"):
        queue.push(payload)
    due_s = clock.wall + wait_s
    queue.schedule(b"due", int(due_s * 1e6))
    assert drained_one(queue) == b"0"
    clock.step_wall(step_s)
    (clock.suspend if asleep else clock.advance)(max(0, due_s - clock.wall) + 0.1)
    queue.push(b"2")
    clock.advance(1)  # what is due is seen within a second, beside other work
    assert drained_one(queue) == b"1"
    queue.push(b"after")
    assert drained(queue) == [b"2", b"due", b"after"]


@pytest.mark.parametrize("ahead_s", [0.5, 36, 8 * 3_600, 10**9])
@pytest.mark.parametrize("bucket", [None, "shared", "own"])
def test_a_stamp_ahead_of_the_queue_clock_is_not_passed_by(
    directory: Path, clock: Time, ahead_s: float, bucket: str | None
) -> None:
    """A file put there by hand whose stamp is ahead of the queue clock gets a place all the same."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"before")
    stamp_us = NOW_US + int(ahead_s * 1e6)
    folder = {None: ".", "shared": str(NOW_US), "own": str(stamp_us)}[bucket]
    put(directory / "pending" / folder / f"{stamp_us}_shell", b"by hand")
    assert drained_one(queue) == b"before"
    found = []
    while b"by hand" not in found and len(found) < 50:
        queue.push(b"newer")
        clock.advance(0.1)
        found.append(drained_one(queue))
    assert len(found) <= 20, "not within a look or two"
    assert names(directory, "done").count(f"{stamp_us}_shell") == 1, "its id does not change"


@pytest.mark.parametrize("kind", ["due", "abandoned"])
def test_many_that_come_at_once_and_a_stream_do_not_starve_each_other(
    scratch: Path, clock: Time, kind: str
) -> None:
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
        payload = b"%d" % due_us
        id = f"{due_us}_host_{number:018x}.{zlib.crc32(payload):08x}"
        bucket = scratch / "queue" / "scheduled" / str(NOW_US - 1 - number % 3)
        put(bucket / f"{id}~0~{due_us}", payload)
    for second in (5, 3, 40_000, 4, 400):
        due.append(NOW_US + second * 1_000_000)
        queue.schedule(b"%d" % due[-1], due[-1])
    clock.advance(50_000)
    assert [int(payload) for payload in drained(queue)] == sorted(due)


# ====================================================================================================
# Who is alive
# ====================================================================================================

# --- in this process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "drop"])
def test_dropped_object(directory: Path, queue: FemtoQueue, end: str) -> None:
    """An object is alive until it is closed or dropped; then its tasks come back at the next pop."""
    gc.disable()  # dropping the last reference is enough
    try:
        other = FemtoQueue(directory, "node-1")
        thread = threading.Thread(target=other.pop, args=[0.001])  # whose end proves nothing
        thread.start()
        thread.join()
        del thread
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


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("call", ["done", "fail", "retry", "touch"])
@pytest.mark.parametrize("end", ["close", "drop"])
def test_claims_of_an_object_that_is_gone(directory: Path, end: str, call: str, keep: bool) -> None:
    """Whoever finishes a claim that was given back gets NotInProgress, and the task is not lost."""
    queue = FemtoQueue(directory, "node-1", keep_done=keep, keep_failed=keep)
    id = queue.push(b"a")
    other = FemtoQueue(directory, "node-2")
    claim = other.pop()
    if end == "close":
        other.close()
    del other
    again = queue.pop()
    assert again and again.id == id
    with pytest.raises(NotInProgress):
        getattr(queue, call)(claim)
    assert queue.status(id) == "in_progress"
    queue.retry(again)
    with pytest.raises(NotInProgress):
        getattr(queue, call)(claim)
    assert drained(queue) == [b"a"]


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
other = theirs.pop()
print(task.data, other.data, mine.pop(), theirs.pop(), third.pop())
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


# No Python until 3.14 has a public name for what makes another interpreter in this process.
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
@pytest.mark.parametrize("who", ["a new object", "one that works", "one that waits"])
def test_killed(directory: Path, queue: FemtoQueue, now: Time, node_id: str, who: str) -> None:
    """A killed worker's task comes back at the first pop of a new object, to others within 1 s."""
    with claimed_by(directory, node_id) as worker:
        set_to_real_time(now)
        assert drained(queue) == [b"b"]
        killed(worker)
        if who == "one that works":
            found = []
            while b"a" not in found and len(found) < 11:
                queue.push(b"more")
                found.append(drained_one(queue))
                now.advance(0.1)
            assert found[-1] == b"a"
        elif who == "one that waits":
            task = queue.pop(1.01)
            assert task and (task.data, task.attempt) == (b"a", 2)
            queue.done(task)
        else:
            queue.push(b"c")
            assert drained(FemtoQueue(directory, "node-3")) == [b"a", b"c"]
        now.advance(1.1)
        drained(queue)
        assert str(worker.pid) not in " ".join(os.listdir(directory / "in_progress")), "nothing is left"


def test_zombie(directory: Path, queue: FemtoQueue) -> None:
    """A worker that was killed and not yet waited for is dead."""
    with claimed_by(directory, "node-2") as worker:
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie, and stays one
        os.kill(worker.pid, 0)
        assert drained(FemtoQueue(directory, "node-3")) == [b"a", b"b"]


SYS_EXIT = {"x86_64": 60, "aarch64": 93}.get(platform.machine())


@pytest.mark.skipif(SYS_EXIT is None, reason="the number of the exit system call is not known here")
def test_zombie_leader(directory: Path, queue: FemtoQueue, spawn: Spawn) -> None:
    """A worker whose main thread has ended is alive while another thread of it works."""
    code = f"""
import ctypes, threading
queue = FemtoQueue(sys.argv[1], "node-2")
task = queue.pop()
def work():
    print(task.id, flush=True)
    sys.stdin.readline()
    queue.done(task)
    os._exit(0)
threading.Thread(target=work).start()
ctypes.CDLL(None).syscall({SYS_EXIT}, 0)
"""
    worker = spawn(code, directory)
    assert worker.stdout
    id = worker.stdout.readline().strip()
    end_s = time.monotonic() + 10
    while Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end_s
    assert drained(FemtoQueue(directory, "node-3")) == [b"b"]
    say(worker)
    assert ending(worker)[1] == 0
    assert queue.status(id) == "done"


@needs_pid_namespace
def test_pid_reused(directory: Path, queue: FemtoQueue) -> None:
    """A PID that was given to another process does not keep the dead one's tasks."""
    code = """
import signal
def fork(work):
    pid = os.fork()
    if pid == 0:
        work()
    return pid
def claim():
    FemtoQueue(sys.argv[1], "node-2").pop()
    os.write(pipe[1], b"claimed")
    signal.pause()
pipe = os.pipe()
dead = fork(claim)
assert os.read(pipe[0], 7) == b"claimed"
os.kill(dead, signal.SIGKILL)
os.waitpid(dead, 0)
time.sleep(0.03)  # start times are in hundredths of a second
with open("/proc/sys/kernel/ns_last_pid", "w") as file:
    file.write(str(dead - 1))
assert fork(signal.pause) == dead
print(FemtoQueue(sys.argv[1], "node-3").pop().data.decode())
"""
    assert run(code, directory, under=NEW_PIDS) == "a\n"


HIDEPID = ["unshare", "-m", "sh", "-c", 'mount -t proc -o hidepid=$0 proc /proc && exec "$@"']


@needs(*HIDEPID, "2", "true")
@pytest.mark.parametrize("level", ["1", "2"])
def test_hidepid(open_to_all: Path, level: str) -> None:
    """A /proc that cannot be read proves nothing: another user's live worker is not robbed."""
    queue = FemtoQueue(open_to_all, "node-1")
    queue.push_many([b"a", b"b"])
    judge = """
try:
    sys.exit(open(f"/proc/{sys.argv[2]}/stat").read())
except OSError:
    pass
queue = FemtoQueue(sys.argv[1], "node-3")
print(*[task.data for task in iter(queue.pop, None)])
"""
    with claimed_by(open_to_all, "node-2") as worker:
        for path in [open_to_all, *open_to_all.rglob("*")]:
            path.chmod(0o777)
        hidden = [*HIDEPID, level]
        as_nobody = functools.partial(run, AS_NOBODY + judge, open_to_all, worker.pid, under=hidden)
        assert as_nobody() == "b'b'\n"
        killed(worker)
        assert as_nobody() == "b'a' b'b'\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")
@pytest.mark.parametrize("error", ["EMFILE", "EIO"])
@pytest.mark.parametrize("call", ["constructor", "first call in a forked child"])
def test_no_false_identity(
    directory: Path, queue: FemtoQueue, spawn: Spawn, call: str, error: str
) -> None:
    """A process that cannot find out who it is gets OSError; when it can, it is who it is."""
    code = """
import builtins, errno
broken = ""
def fault(real):
    def call(path, *rest, **options):
        if broken and path == broken:
            raise OSError(getattr(errno, sys.argv[2]), "broken", path)
        return real(path, *rest, **options)
    return call
builtins.open, os.readlink = fault(builtins.open), fault(os.readlink)
PATHS = [f"/proc/{path}" for path in ("self/stat", "sys/kernel/random/boot_id", "self")]
PATHS += [f"/proc/self/ns/{kind}" for kind in ("time", "pid")]
call = lambda: FemtoQueue(sys.argv[1], "node-1")
if sys.argv[3] != "constructor":
    call = call().pop
    broken = PATHS[0]
    if pid := os.fork():
        sys.exit(os.waitpid(pid, 0)[1])
for broken in PATHS:
    try:
        print("no error:", call(), flush=True)
    except OSError as error:
        print(error.errno == getattr(errno, sys.argv[2]), error.filename == broken, flush=True)
broken = ""
"""
    mine = queue.pop()
    [name] = os.listdir(directory / "in_progress")
    process = spawn(code + CLAIM, directory, error, call)  # whose node_id is `error` for the claim
    for _ in range(5):
        expect(process, "True True")
    assert process.stdout and process.stdout.readline()
    found = {name.split("~")[0]: name.split("~") for name in os.listdir(directory / "in_progress")}
    assert found[error][3] == name.split("~")[3]
    assert int(found[error][2]) >= int(name.split("~")[2]) > 0
    assert len([*directory.glob("clock-*")]) == 1
    assert queue.pop() is None and FemtoQueue(directory, error).pop() is None, "it is alive"
    assert tell(process, "queue.done(task)") == "None"
    queue.done(mine)


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


# --- elsewhere ----------------------------------------------------------------------------------------


@needs_pid_namespace
@pytest.mark.parametrize("prefix", [NEW_PIDS, NEW_PIDS_OLD_PROC])
@pytest.mark.parametrize("node_id", ["node-2", "NODE-1"])  # other letters, another name
def test_another_pid_namespace(
    directory: Path, queue: FemtoQueue, now: Time, prefix: list[str], node_id: str
) -> None:
    """Of another container's worker of another node_id nothing is known; its lease decides."""
    with claimed_by(directory, node_id, prefix) as worker:
        assert drained(queue) == [b"b"]
        set_to_real_time(now)
        now.advance(20)
        assert FemtoQueue(directory, "node-1").pop() is None
        killed(worker)
        assert FemtoQueue(directory, "node-3").pop() is None
        now.advance(11)
        assert drained(queue) == [b"a"]


@needs_pid_namespace
def test_foreign_proc(directory: Path, queue: FemtoQueue) -> None:
    """Where /proc shows another PID namespace, a live worker is not robbed, and a dead one is seen."""
    code = """
import signal
pipe = os.pipe()
worker = os.fork()
if worker == 0:
    FemtoQueue(sys.argv[1], "node-2").pop()
    os.write(pipe[1], b"claimed")
    signal.pause()
assert os.read(pipe[0], 7) == b"claimed"
assert os.readlink("/proc/self") != str(os.getpid())
queue = FemtoQueue(sys.argv[1], "node-3")
print(queue.pop().data, queue.pop())
os.kill(worker, signal.SIGKILL)
os.waitpid(worker, 0)
print(FemtoQueue(sys.argv[1], "node-3").pop().data)
"""
    assert run(code, directory, under=NEW_PIDS_OLD_PROC) == "b'b' None\nb'a'\n"


# What a process does that is told, by `tell`, what to evaluate. argv: data_dir, node_id, lease in ms
SERVE = """
queue = FemtoQueue(sys.argv[1], sys.argv[2], float(sys.argv[3]))
print(os.readlink("/proc/self/ns/pid"), flush=True)
for line in sys.stdin:
    try:
        print(eval(line), flush=True)
    except NotInProgress:
        print("NotInProgress", flush=True)
"""
TAKE = "(task := queue.pop()) and task.data"
Serve = Callable[[str, int, list[str]], tuple[Process, str]]


@pytest.fixture
def serve(directory: Path, guard: Callable[[Process], Process]) -> Serve:
    """Starts a process that has the queue open, under a command prefix; returns it and where it is."""

    def serve(node_id: str, lease_ms: int, under: list[str]) -> tuple[Process, str]:
        arguments = (directory, node_id, lease_ms)
        process = guard(start(SERVE, *arguments, under=under, stderr=subprocess.PIPE))
        assert process.stdout
        return process, process.stdout.readline()

    return serve


@needs_pid_namespace
def test_two_containers_of_one_name_leave_each_other_their_work(
    queue: FemtoQueue, serve: Serve
) -> None:
    """My node_id elsewhere is dead as far as it claimed before I opened; later its lease decides."""
    old, old_place = serve("web", 30_000, NEW_PIDS)
    assert tell(old, TAKE) == "b'a'"
    new, new_place = serve("web", 30_000, NEW_PIDS)
    assert tell(new, TAKE) == "b'a'", "it was claimed before"
    assert tell(old, "queue.done(task)") == "NotInProgress"
    assert tell(old, TAKE) == "b'b'"
    for container in (new, old, new):
        assert tell(container, "queue.pop(1.1)") == "None"
    for container in (old, new):
        assert tell(container, "queue.touch(task) or queue.done(task)") == "None"
    assert queue.counts()["done"] == 2
    log = ending(new)[0]
    assert "web" in log, "a warning names it"
    for place in (old_place, new_place):
        assert "".join(filter(str.isdigit, place)) in log, "and both places"


@needs_pid_namespace
def test_a_claim_under_my_name_after_i_opened_is_kept_for_its_lease(
    directory: Path, queue: FemtoQueue, serve: Serve
) -> None:
    """Whoever claimed under my name after I opened is unknown: its tasks come back by the lease."""
    mine = FemtoQueue(directory, "web")
    theirs, _ = serve("web", 3_500, NEW_PIDS)
    assert tell(theirs, TAKE) == "b'a'"
    assert drained(mine) == [b"b"]
    killed(theirs)
    assert mine.pop() is None
    task = mine.pop(10)
    assert task and (task.data, task.attempt) == (b"a", 2)


@needs_pid_namespace
@pytest.mark.parametrize("keep", [True, False], ids=["keep", "delete"])
def test_who_lost_a_claim_to_another_container_is_told(
    directory: Path, queue: FemtoQueue, keep: bool
) -> None:
    """Whoever lost the claim gets NotInProgress, kept or not, also while its lease still runs."""
    mine = FemtoQueue(directory, "web", keep_done=keep, keep_failed=keep)
    task = mine.pop()
    with claimed_by(directory, "web", NEW_PIDS) as other:
        for call in ("done(task)", "fail(task)", "retry(task)", "retry(task, 9000)", "touch(task)"):
            with pytest.raises(NotInProgress):
                eval(f"mine.{call}")
            assert mine.status(task.id) == "in_progress"
        assert tell(other, "(task.data, queue.done(task))") == "(b'a', None)"
    assert mine.status(task.id) == "done"


NO_BOOT = ["unshare", "-m", "sh", "-c", 'mount -t proc -o subset=pid proc /proc && exec "$0" "$@"']
needs_proc_subset = needs(*NO_BOOT, "test", "!", "-e", "/proc/sys")


@needs_proc_subset
@pytest.mark.parametrize(
    ("node_id", "under"), [("web", NO_BOOT), ("api", NO_BOOT), ("web", [])], ids=["web", "api", "one"]
)
def test_where_the_boot_cannot_be_told_the_lease_decides(
    directory: Path, queue: FemtoQueue, serve: Serve, node_id: str, under: list[str]
) -> None:
    """With ProcSubset=pid nobody is judged dead, of either name; a task comes back by its lease."""
    before = {*os.listdir(directory), *STATES}
    worker, _ = serve("web", 3_500, NO_BOOT)
    judge, _ = serve(node_id, 60_000, under)
    assert tell(worker, TAKE) == "b'a'" and tell(judge, TAKE) == "b'b'"
    assert tell(judge, "queue.pop(1.1)") == tell(worker, "queue.pop()") == "None"
    assert tell(worker, "queue.touch(task)") == "None"
    killed(worker)
    assert tell(judge, "queue.pop()") == "None"
    assert tell(judge, "(back := queue.pop(10)) and (back.data, back.attempt)") == "(b'a', 2)"
    assert {*os.listdir(directory)} <= before, "its clock is shared by nothing"


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


# --- hung: the lease ----------------------------------------------------------------------------------


def test_live_owner_past_its_lease(directory: Path, queue: FemtoQueue, now: Time) -> None:
    """A live owner whose lease ran out is hung: its task comes back, and it is told NotInProgress."""
    with claimed_by(directory, "node-2") as worker:
        assert drained(queue) == [b"b"]
        set_to_real_time(now)
        now.advance(20)
        assert queue.pop() is None
        now.advance(11)
        task = queue.pop()
        assert task and (task.data, task.attempt) == (b"a", 2)
        for call in ("done(task)", "fail(task)", "touch(task)", "retry(task)", "retry(task, 5)"):
            assert tell(worker, f"queue.{call}") == "NotInProgress"
        assert queue.status(task.id) == "in_progress"
        queue.done(task)


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


# --- the constructor ----------------------------------------------------------------------------------


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
    ("node_id", ValueError): ("", "a/b", "a~b", "a\n", "a\0", "\udc80", "é" * 33),
    ("timeout_stale_ms", TypeError): ("5", None, True, b""),
    ("timeout_stale_ms", ValueError): (0, -1, 0.0, NAN, float("inf")),
    ("max_attempts", TypeError): ("5", 1.5, True),
    ("max_attempts", ValueError): (0, -1),
    ("maxsize", TypeError): ("5", 1.5, None, True),
    ("maxsize", ValueError): (-1,),
    ("sync_after_write", TypeError): ("no", "", None, 1.0, []),
    ("keep_done", TypeError): ("false", None, b""),
    ("keep_failed", TypeError): ("0", None, ()),
}


@pytest.mark.parametrize(("argument", "error"), BAD_ARGUMENTS)
def test_bad_constructor_arguments(directory: Path, argument: str, error: type[Exception]) -> None:
    """A bad argument gets its error at the call, which names it, before anything is written."""
    for value in BAD_ARGUMENTS[argument, error]:
        arguments = {"data_dir": directory, "node_id": "a", argument: value}
        with pytest.raises(error, match=argument):
            FemtoQueue(**arguments)
        assert not directory.exists(), repr(value)


@pytest.mark.parametrize("below", ["", "deep/er"], ids=["itself", "below"])
@pytest.mark.parametrize("kind", ["file", "dangling link", "link loop", "/proc"])
def test_a_data_dir_that_is_no_directory(tmp_path: Path, kind: str, below: str) -> None:
    """Where a file, a link that leads nowhere, or a filesystem refuses: an OSError with its path."""
    path = tmp_path / "queue"
    if kind == "file":
        put(path)
    elif kind == "/proc":
        path = Path("/proc/femtoqueue")
    else:
        path.symlink_to("nowhere" if kind == "dangling link" else "queue")
    before = snapshot(tmp_path, times=True)
    with pytest.raises(OSError) as caught:
        FemtoQueue(path / below, "node")
    assert not isinstance(caught.value, FileExistsError)
    assert caught.value.filename.startswith(str(path))
    assert snapshot(tmp_path, times=True) == before


# --- push, push_many ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"x", bytearray(b"x"), memoryview(b"x"), memoryview(b"-x-")[1:2]],
    ids=lambda data: type(data).__name__,
)
def test_bytes_like(directory: Path, clock: Time, data: bytes) -> None:
    """Payloads are bytes-like, of any kind; data_dir is a str or a path, and made if need be."""
    queue = FemtoQueue(str(directory / "deep" / "er"), "a")
    queue.push(data)
    queue.push_many([data])
    queue.schedule(data, NOW_US)
    assert drained(FemtoQueue(directory / "deep" / "er", "b")) == [b"x"] * 3


@durable_or_not
def test_push_many_keeps_order(directory: Path, durable: bool) -> None:
    """push_many takes any iterable of bytes-likes, returns their ids in order, and none is no task."""
    q = FemtoQueue(directory, "node", sync_after_write=durable)
    items = [b"%d" % n for n in range(250)] + [bytearray(b"x"), memoryview(b"y"), b""]
    ids = q.push_many(iter(items))
    assert ids == sorted(set(ids)) == list(q.ids("pending"))
    assert drained(q) == [bytes(item) for item in items]
    assert q.push_many([]) == []
    assert names(directory, "creating") == []


@durable_or_not
@pytest.mark.parametrize("bad", ["text", None, 5, ZeroDivisionError, "emptied"], ids=str)
def test_push_many_that_fails_has_pushed_a_prefix(directory: Path, bad: object, durable: bool) -> None:
    """On an error, be it of an item, of the iterable, or that creating/ was emptied: a prefix."""
    q = FemtoQueue(directory, "node", sync_after_write=durable)

    def items() -> Iterator[Any]:
        yield b"0"
        yield b"1"
        if bad == "emptied":
            for path in (directory / "creating").iterdir():
                path.unlink()
        elif bad is ZeroDivisionError:
            raise ZeroDivisionError
        else:
            yield bad
        yield b"3"

    try:
        ids = q.push_many(items())
    except (TypeError, ZeroDivisionError, FileNotFoundError):
        found = drained(q)
        assert found == [b"0", b"1"][: len(found)]
    else:  # its files had left creating/ before
        assert bad == "emptied" and not durable and ids == list(q.ids("pending"))
    assert names(directory, "creating") == []


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
def test_maxsize_is_exact_for_one_producer(directory: Path, durable: bool) -> None:
    """Every push raises queue.Full when maxsize tasks are pending, not before; a pop makes room."""
    q = FemtoQueue(directory, "node", maxsize=5, sync_after_write=durable)
    file = put(directory / "file")
    with pytest.raises(Full):
        q.push_many(b"%d" % n for n in range(20))
    pushed = drained(q)
    assert pushed == [b"%d" % n for n in range(5)][: len(pushed)]
    assert len(q.push_many([b"x"] * 4)) == 4
    q.push(b"x")
    calls: list[Callable[[], object]] = [
        *(lambda: q.push(b"x"), lambda: q.push_many([b"x"])),
        *(lambda: q.push_file(file), lambda: q.push_file(file, move=True)),
    ]
    for call in calls:
        with pytest.raises(Full, match="5 tasks are pending"):
            call()
    assert file.exists() and names(directory, "creating") == []
    assert q.pop()
    q.push(b"y")
    with pytest.raises(Full):
        q.push(b"z")
    assert q.counts()["pending"] == 5


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


@pytest.mark.parametrize("how", ["due", "retried", "requeued", "abandoned"])
def test_maxsize_counts_what_comes_back(directory: Path, clock: Time, how: str) -> None:
    """Tasks that fall due or come back take up room, though the producer counted before them."""
    q = FemtoQueue(directory, "node", maxsize=10)
    other = FemtoQueue(directory, "other", 1_000)
    if how == "due":
        for _ in range(12):
            q.schedule(b"later", NOW_US)
    else:
        other.push_many([b"earlier"] * 12)
        claims = [other.pop() for _ in range(12)]
        if how == "requeued":
            for claim in claims:
                other.fail(claim)
    q.push(b"x")  # from here on, it has room for some, and need not count
    for claim in claims if how == "retried" else ():
        q.retry(claim)
    for id in list(q.ids("failed")):
        q.requeue(id)
    clock.advance(2.2)
    assert q.pop()
    for pending in (12, 10):
        with pytest.raises(Full):
            while True:
                q.push(b"y")
        assert q.counts()["pending"] == pending
        for _ in range(3):
            assert q.pop()


# --- push_file ----------------------------------------------------------------------------------------


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
    directory: Path, places: list[Path], monkeypatch: pytest.MonkeyPatch, other: bool
) -> None:
    """A durable move fsyncs the file's content, and the directory that it came from."""
    if len(places) <= other:
        pytest.skip("there is one filesystem here")
    source = put(places[other] / "from here" / "file")
    q = FemtoQueue(directory, "node", sync_after_write=True)
    q.cancel(q.push(b"first"))
    synced: list[tuple[str, bool]] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append((synced_path(fd), source.exists())), real(fd))[1]
    )
    id = q.push_file(source, move=True)
    assert (str(source.parent), False) in synced
    content = f"{directory}/creating/" if other else str(source)
    first = [path for path, _ in synced if not os.path.isdir(path)]
    assert any(path.startswith(content) for path in first), "nor is its content"
    assert q.status(id) == "pending" and not source.exists()


@pytest.mark.parametrize("move", [False, True], ids=["copy", "move"])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        *((name, ValueError) for name in ("fifo", "dir", "link to fifo", "/dev/null", "link to file")),
        *((name, FileNotFoundError) for name in ("dangling", "missing")),
    ],
)
def test_push_file_refuses_what_is_no_file(
    directory: Path, tmp_path: Path, name: str, error: type[Exception], move: bool
) -> None:
    """What is no file raises, a FIFO at once, and a link that is to be moved; nothing is changed."""
    q = FemtoQueue(directory, "node")
    put(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for target in ("fifo", "file"):
        (tmp_path / f"link to {target}").symlink_to(target)
    if name == "link to file" and not move:
        assert q.push_file(tmp_path / name)
        return
    before = snapshot(tmp_path)
    with pytest.raises((ValueError, error), match=re.escape(name)):
        q.push_file(tmp_path / name, move=move)
    assert {*snapshot(tmp_path)} - {*before} <= {os.fsencode(p) for p in directory.glob("clock-*")}
    assert q.counts()["pending"] == 0


# --- schedule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [9, 5.5, -3, 0])
def test_schedule_takes_an_aware_datetime(directory: Path, clock: Time, hours: float) -> None:
    """A datetime is due at its instant, whatever its time zone."""
    q = FemtoQueue(directory, "node")
    zone = datetime.timezone(datetime.timedelta(hours=hours))
    id = q.schedule(b"x", datetime.datetime.fromtimestamp(clock.wall + 60, zone))
    assert names(directory, "scheduled") == [f"{id}~0~{int((clock.wall + 60) * 1e6)}"]
    clock.advance(59.9)
    assert q.pop() is None
    clock.advance(0.1)
    assert q.pop().id == id


# --- pop ----------------------------------------------------------------------------------------------


def test_timeout_is_never_early(directory: Path) -> None:
    """pop(timeout) never returns early."""
    queue = FemtoQueue(directory, "a")
    for timeout_s in (0, 0.001, 0.1):
        begun_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        assert queue.pop(timeout_s) is None
        assert time.clock_gettime(time.CLOCK_BOOTTIME) - begun_s >= timeout_s


def test_timeout_to_the_point(directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """pop(timeout) ends when the time is over, not a poll later, and sleeps meanwhile."""
    queue = FemtoQueue(directory, "a")
    sleeps: list[float] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: (sleeps.append(seconds), clock.advance(seconds)))
    begun_s = clock.boot
    assert queue.pop(timeout=5.0001) is None
    assert 0 <= clock.boot - begun_s - 5.0001 < 2e-6
    assert 10 < len(sleeps) < 1_500
    assert queue.pop() is None and queue.pop(0.0) is None
    assert clock.boot - begun_s < 5.001, "without a timeout nobody sleeps"


def test_a_lease_begins_with_the_claim(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the look before a claim takes, the claim has a full lease."""
    q = FemtoQueue(directory, "node", timeout_stale_ms=1_000)
    for _ in range(5):
        q.schedule(b"x", NOW_US + 1_000_000)
    clock.advance(2)
    rename = os.rename

    def slow(source: str, target: str) -> None:
        clock.advance(0.9)
        rename(source, target)

    monkeypatch.setattr(os, "rename", slow)
    task = q.pop()
    assert task
    deadline_us = int(Path(task.path).name.split("~")[2])
    assert deadline_us >= int((clock.wall - 0.91) * 1e6) + 1_000_000, "one rename ago, it began"


def test_never_none_while_due(directory: Path, clock: Time) -> None:
    """pop never returns None while a task is due, however recently it looked; nor 1 s after a lease."""
    queue = FemtoQueue(directory, "a")
    queue.schedule(b"due", NOW_US + 500_000)
    queue.push(b"leased")
    other = FemtoQueue(directory, "b", 300)
    assert other.pop()
    assert queue.pop() is None
    clock.advance(0.5)
    found = drained(queue)
    assert b"due" in found
    clock.advance(0.85)
    assert sorted(found + drained(queue)) == [b"due", b"leased"]


def test_never_none_after_lost_races(
    directory: Path, queue: FemtoQueue, now: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pop never returns None for what a worker skips because others were quicker to claim."""
    rival = FemtoQueue(directory, "node-2")
    lost: list[FemtoTask | None] = []
    rename = os.rename

    def rename_too_late(source: str, target: str) -> None:
        if len(lost) < 2 and "/in_progress/node-1~" in target:
            lost.append(rival.pop())
        rename(source, target)

    queue.push_many([b"c", b"d"])
    with claimed_by(directory, "node-3"):  # of "a"; where no other process is, nobody skips
        monkeypatch.setattr(os, "rename", rename_too_late)
        task = queue.pop()
    assert [task and task.data for task in (*lost, task)] == [b"b", b"c", b"d"]


@pytest.mark.parametrize(
    ("call", "code"), [("rename", errno.ENOENT), ("rename", errno.EIO), ("open", errno.EIO)]
)
def test_what_was_claimed_at_the_second_try_is_not_taken_back(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """What a fault, or another worker that put it back, kept from being claimed at first is had by the
    same pop, and then kept like any other."""
    queue = FemtoQueue(directory, "a")
    assert queue.cancel(queue.push(b"0"))
    id = queue.push(b"1")
    real, failures = getattr(os, call), iter([code])

    def in_vain(path: str, *rest: Any) -> Any:
        if "/in_progress/" in (path, *rest)[call == "rename"] and (code := next(failures, None)):
            raise OSError(code, os.strerror(code), path)
        return real(path, *rest)

    monkeypatch.setattr(os, call, in_vain)
    task = queue.pop()
    clock.advance(1.1)
    assert queue.pop() is next(failures, None) is None and task and task.id == id
    queue.done(task)


def test_an_alarm_in_pop_leaves_no_claim_to_its_lease(scratch: Path) -> None:
    """A signal handler raises at any line of pop: the same object delivers all, and at once."""

    def ring() -> None:
        raise ZeroDivisionError

    kept = []  # no line of an end that comes late is counted
    for at in itertools.count(1):
        kept.append(q := FemtoQueue(scratch / str(at), "node"))
        q.push_many([b"1", b"2", b"3"])
        try:
            with Lines(at, ring):
                assert q.pop()
            break
        except ZeroDivisionError:
            assert (at, sorted(drained(q))) == (at, [b"1", b"2", b"3"])
            assert (at, names(scratch / str(at), "in_progress")) == (at, [])
    assert at > 50


# --- done, fail ---------------------------------------------------------------------------------------

TASK_CALLS = {**VERDICTS, "touch": lambda q, task: q.touch(task)}
AFTER = dict(zip(TASK_CALLS, ("done", "failed", "pending", "scheduled", "in_progress"), strict=True))
keep_or_not = pytest.mark.parametrize("keep", [True, False], ids=["keep", "delete"])


@keep_or_not
@pytest.mark.parametrize("first", VERDICTS)
def test_a_task_is_finished_once(directory: Path, first: str, keep: bool) -> None:
    """After one verdict every other, the same one and touch raise NotInProgress, and change nothing."""
    q = FemtoQueue(directory, "node", keep_done=keep, keep_failed=keep)
    for second in TASK_CALLS:
        q.push(b"x")
        task = q.pop()
        VERDICTS[first](q, task)
        before = snapshot(directory, times=True)
        for _ in range(2):
            with pytest.raises(NotInProgress, match=f"^{re.escape(task.id)} was finished already$"):
                TASK_CALLS[second](q, task)
            assert snapshot(directory, times=True) == before
        for id in q.ids("pending"):
            q.cancel(id)


@keep_or_not
@pytest.mark.parametrize("through", ["another object", "the same"])
@pytest.mark.parametrize("call", TASK_CALLS)
def test_a_lost_claim_has_no_verdict(
    directory: Path, clock: Time, call: str, through: str, keep: bool
) -> None:
    """Whose lease ran out gets NotInProgress, however often he tries, and whatever the next one did."""
    q = FemtoQueue(directory, "node", keep_done=keep, keep_failed=keep)
    other = FemtoQueue(directory, "other", keep_done=keep, keep_failed=keep)
    q.push(b"x")
    lost = q.pop()
    clock.advance(31.1)
    task = (q if through == "the same" else other).pop()
    assert (lost.attempt, task.attempt) == (1, 2)
    for finish in (lambda: None, lambda: other.done(task)):
        finish()
        before = files(directory)
        for _ in range(2):
            with pytest.raises(NotInProgress, match=re.escape(lost.id)):
                TASK_CALLS[call](q, lost)
            assert files(directory) == before and lost.lost


@keep_or_not
@pytest.mark.parametrize("call", TASK_CALLS)
def test_a_task_of_another_queue(directory: Path, clock: Time, call: str, keep: bool) -> None:
    """What was popped from another directory: every verdict is a ValueError, and changes nothing."""
    mine = FemtoQueue(directory, "node", keep_done=keep, keep_failed=keep)
    theirs = FemtoQueue(directory.with_name("other"), "node")
    for queue in (mine, theirs):
        queue.push(b"x")
    held, task = mine.pop(), theirs.pop()
    before = snapshot(directory.parent, times=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"task: {re.escape(task.id)} is of another queue"):
            TASK_CALLS[call](mine, task)
        assert snapshot(directory.parent, times=True) == before
    mine.done(held)
    theirs.done(task)


@pytest.mark.parametrize("how", ["popped by way of a link", "finished by way of a link", "moved"])
@pytest.mark.parametrize("call", TASK_CALLS)
def test_a_task_of_the_same_queue_under_another_path(directory: Path, call: str, how: str) -> None:
    """A directory that has another name, or two, is one queue: what was popped from it is finished."""
    directory.mkdir()
    link = directory.with_name("link")
    link.symlink_to(directory)
    queue = FemtoQueue(link if how.startswith("popped") else directory, "node")
    id = queue.push(b"x")
    task = queue.pop()
    if how == "moved":
        link.unlink()
        directory.rename(link)
    other = FemtoQueue(directory if how.startswith("popped") else link, "other")
    TASK_CALLS[call](other, task)
    assert other.status(id) == AFTER[call]
    if call == "touch":
        other.done(task)
    with pytest.raises(NotInProgress):
        other.done(task)


@durable_or_not
def test_finished_tasks_need_not_be_kept(directory: Path, durable: bool) -> None:
    """keep_done=False and keep_failed=False delete at done and fail, and the reason with it."""
    q = FemtoQueue(directory, "node", sync_after_write=durable, keep_done=False, keep_failed=False)
    for finish in (q.done, q.fail, lambda task: q.fail(task, "why")):
        id = q.push(b"x")
        finish(q.pop())
        assert q.status(id) is None and not any(id in name for name in files(directory))


@keep_or_not
@pytest.mark.parametrize("how", ["pickled", "after a fork", "after its lease"])
def test_done_that_raised_can_be_made_again(directory: Path, clock: Time, how: str, keep: bool) -> None:
    """A done whose fsync failed returns when made again, whatever came between; a third one raises."""
    q = FemtoQueue(directory, "node", sync_after_write=True, keep_done=keep)
    id = q.push(b"x")
    task = q.pop()
    if how == "pickled":
        task = pickle.loads(pickle.dumps(task))
    elif how == "after a fork":
        os.waitpid(forked(lambda: None), 0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        break_call(patch, "fsync", 0)
        q.done(task)
    if how == "after its lease":
        clock.advance(31)
    q.done(task)
    assert q.status(id) == ("done" if keep else None)
    with pytest.raises(NotInProgress):
        q.done(task)
    assert q.pop() is None


@pytest.mark.parametrize("reason", ["on fire", "two\nlines\n", "größe 日本", "x" * 10**5, None])
@pytest.mark.parametrize("end", ["requeue", "purge"])
def test_a_reason_is_kept_until_the_task_is_requeued_or_purged(
    directory: Path, reason: str | None, end: str
) -> None:
    """The reason is kept as text beside the failed task until that is requeued or purged."""
    queue = FemtoQueue(directory, "a")
    id = queue.push(b"x")
    queue.fail(queue.pop(), reason)
    assert FemtoQueue(directory, "b").reason(id) == reason
    assert names(directory, "failed") == [id, f"{id}~reason"][: 2 if reason else 1]
    if reason:
        assert (directory / "failed" / f"{id}~reason").read_text("utf-8") == reason
    assert [*queue.ids("failed")] == [id] and queue.status(f"{id}~reason") is None
    put(directory / "failed" / f"{OLD_ID}~reason")  # what a crash leaves is no task
    assert queue.counts("failed") == {"failed": 1} and queue.reason(OLD_ID) is None
    assert (queue.requeue(id) if end == "requeue" else queue.purge("failed", 0)) == 1
    assert queue.reason(id) is None and not any(id in name for name in names(directory, "failed"))
    if end == "requeue":
        queue.fail(queue.pop())
        assert queue.reason(id) is None


# --- retry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_ms", [0, 1_000])
@pytest.mark.parametrize("keep_failed", [True, False])
def test_max_attempts_end_in_failed(
    directory: Path, clock: Time, keep_failed: bool, delay_ms: int
) -> None:
    """After max_attempts deliveries retry, with or without a delay, is fail."""
    q = FemtoQueue(directory, "node", max_attempts=2, keep_failed=keep_failed)
    id = q.push(b"x")
    q.retry(q.pop(), delay_ms)
    clock.advance(1)
    q.retry(q.pop(), delay_ms)
    assert q.status(id) == ("failed" if keep_failed else None)
    assert q.pop() is None and sum(q.counts().values()) == keep_failed


def test_a_task_that_kills_its_worker_does_not_take_the_queue_down(
    directory: Path, spawn: Spawn
) -> None:
    """Claimed, SIGKILL, claimed again: after max_attempts it is in failed/ and the next one runs."""
    worker = """
import signal
def handle(task):
    print(task.attempt, task.data.decode(), flush=True)
    if task.data == b"poison":
        os.kill(os.getpid(), signal.SIGKILL)
print("done", FemtoQueue(sys.argv[1], "node", max_attempts=3).run(handle, until_empty=True))
"""
    q = FemtoQueue(directory, "producer")
    poison, _ = q.push_many([b"poison", b"behind"])
    for attempt in (1, 2, 3):
        assert ending(spawn(worker, directory)) == (f"{attempt} poison\n", -signal.SIGKILL)
    out, status = ending(spawn(worker, directory))
    assert (out.splitlines()[:2], status) == (["1 behind", "done 1"], 0)
    assert f"{poison} has used up its 3 attempts" in out
    assert q.counts() == dict.fromkeys(STATES, 0) | {"done": 1, "failed": 1}


# --- touch, and the lease -----------------------------------------------------------------------------


def test_touch_begins_a_new_lease(directory: Path, clock: Time) -> None:
    """touch begins a new full lease; task.lost is true once that is over, by the clock."""
    queue, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    id = queue.push(b"x")
    task = queue.pop()
    for _ in range(5):
        clock.advance(29)
        queue.touch(task)
        assert other.pop() is None
    assert Path(task.path).read_bytes() == task.data == b"x"
    clock.advance(29.9)
    assert other.pop() is None and not task.lost
    clock.advance(0.2)
    assert task.lost
    FemtoQueue(directory, "c", 60_000).touch(task)  # whose lease it is then
    clock.advance(59)
    assert not task.lost and other.pop() is None
    clock.advance(2.1)
    assert task.lost and other.pop().id == id


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


def generator(task: FemtoTask) -> Iterator[FemtoTask]:
    yield task


async def async_generator(task: FemtoTask) -> Any:
    yield task


@pytest.mark.parametrize("handler", [coroutine, generator, async_generator])
def test_a_handler_that_has_not_run(directory: Path, handler: Callable[[FemtoTask], Any]) -> None:
    """A handler that returns what somebody else must run is a TypeError, and the task comes back."""
    q = FemtoQueue(directory, "node", max_attempts=1)
    id = q.push(b"x")
    made: list[Any] = []

    def handle(task: FemtoTask) -> object:
        made.append(handler(task))
        return made[0]

    with pytest.raises(TypeError, match=r"^handler: .*asyncio\.run\(handler\(task\)\)"):
        q.run(handle, until_empty=True)
    if handler is not async_generator:
        made[0].close()  # or Python warns that it was never awaited
    assert (q.status(id), len(made)) == ("pending", 1)


@pytest.mark.parametrize("error", [RuntimeError("no"), *map(SystemExit, (0, 3, "no", None))], ids=repr)
def test_run_logs_and_retries_what_the_handler_raises_from(
    directory: Path, clock: Time, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """An exception, SystemExit too, is logged and the task retried with exponential backoff up to
    max_attempts; then the traceback is its reason."""
    q = FemtoQueue(directory, "node", max_attempts=4)
    id, good = q.push_many([b"x", b"good"])

    def misfit(task: FemtoTask) -> None:
        if task.id == id:
            raise error

    for attempt in (1, 2, 3, 4):
        caplog.clear()
        assert q.run(misfit, until_empty=True) == (attempt == 1), "the other task is done"
        (record,) = caplog.records
        assert record.name == "femtoqueue" and id in record.getMessage()
        assert "in misfit" in caplog.text and f"{type(error).__name__}: {error}" in caplog.text
        if attempt == 4:
            break
        (name,) = names(directory, "scheduled")
        delay_s = int(name[-16:]) / 1e6 - clock.wall
        assert 0.499 <= delay_s / 2 ** (attempt - 1) <= 1.501
        assert q.pop() is None and q.reason(id) is None
        clock.advance(delay_s + 1e-3)
    assert [q.status(id), q.status(good)] == ["failed", "done"]
    assert "Traceback" in q.reason(id) and "in misfit" in q.reason(id)
    assert f"{type(error).__name__}" in q.reason(id).splitlines()[-1]
    clock.advance(1e6)
    assert q.pop() is None


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
    directory: Path, caplog: pytest.LogCaptureFixture, call: str, raises: bool
) -> None:
    """The handler's own verdict stays, whatever it does then, and no lease is said to be lost."""
    q = FemtoQueue(directory, "node")
    id = q.push(b"x")
    attempts: list[int] = []

    def handle(task: FemtoTask) -> None:
        attempts.append(task.attempt)
        if len(attempts) < 3:
            VERDICTS[call](q, task) if call != "retry-later" else q.retry(task, 1e6)
            if raises:
                raise ZeroDivisionError("behind it")

    handled = q.run(handle, until_empty=True)
    assert attempts == ([1, 2, 3] if call == "retry" else [1]), "a retry is delivered at once"
    failed = min(len(attempts), 2) if raises else 0
    assert handled == len(attempts) - failed
    assert q.status(id) == ("done" if call == "retry" else AFTER[call])
    assert "lease" not in caplog.text and len(caplog.messages) == failed


def test_until_empty_does_all_that_is_due_and_waits_for_nothing(directory: Path, clock: Time) -> None:
    """until_empty handles pending and due tasks, also those that come meanwhile, then returns."""
    q = FemtoQueue(directory, "node")
    q.push(b"pending")
    q.schedule(b"due", NOW_US + 1_000_000)
    q.schedule(b"later", NOW_US + 10**10)
    clock.advance(2)
    handled = []

    def handle(task: FemtoTask) -> None:
        if not handled:
            q.push(b"pushed meanwhile")
        handled.append(task.data)

    assert q.run(handle, until_empty=True) == 3
    assert handled == [b"pending", b"due", b"pushed meanwhile"]
    assert counted(q) == {"scheduled": 1, "done": 3}


def test_the_handler_is_told_that_its_lease_was_lost(directory: Path, spawn: Spawn) -> None:
    """Stopped past its lease: another has the task; task.lost says so, and run leaves it alone."""
    worker = """
import logging
logging.basicConfig(stream=sys.stdout, format="%(message)s")
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
    assert (out.splitlines()[0], out.splitlines()[-1], status) == ("lost", "0", 0)
    assert f"{id}: its lease was lost" in out
    q.done(task)


@pytest.mark.parametrize("end", ["raise SystemExit(3)", "raise ValueError", "pass", "q.close()"])
def test_a_process_that_a_handler_forked_leaves_the_task_alone(directory: Path, end: str) -> None:
    """A handler may fork, however the child ends: the task stays its parent's."""
    code = f"""
import logging
q, other = FemtoQueue(sys.argv[1], "node"), FemtoQueue(sys.argv[1], "other")
q.push(b"x")
parent = os.getpid()
def handle(task):
    if pid := os.fork():
        os.waitpid(pid, 0)
        print(q.status(task.id), other.pop())
    else:
        logging.disable()
        {end}
try:
    print(q.run(handle, until_empty=True), q.counts("done"))
finally:
    if os.getpid() != parent:
        os._exit(0)
"""
    assert run(code, directory) == "in_progress None\n1 {'done': 1}\n"


@pytest.mark.skipif(not INTERPRETERS, reason="this Python has one interpreter")
def test_run_in_a_subinterpreter(directory: Path) -> None:
    """run and calls that wait work in a second interpreter: without daemon threads, without signals."""
    code = """
import importlib
interpreters = importlib.import_module(sys.argv[2])
other = interpreters.create(**({"isolated": False} if sys.version_info < (3, 12) else {}))
text = '''
import sys, time
sys.path[:0] = PATH
from femtoqueue import FemtoQueue
q = FemtoQueue(DIR, "node", timeout_stale_ms=400)
q.push_many([b"1", b"2"])
lost = []
def handle(task):
    time.sleep(1)  # more than two leases
    lost.append(task.lost)
print(q.run(handle, until_empty=True), lost, q.pop(timeout=0.05), q.join(timeout=0.05), flush=True)
'''
text = text.replace("PATH", repr(sys.path)).replace("DIR", repr(sys.argv[1]))
print(interpreters.run_string(other, text) or "", end="")
"""
    assert run(code, directory, INTERPRETERS[0]) == "2 [False, False] None True\n"


# --- run, and other queues ----------------------------------------------------------------------------


def test_also_looks_into_the_queues_in_their_order_before_each_task(tmp_path: Path) -> None:
    """run(handler, also=[q2, q3]) looks into its own queue first, then into the others, each time."""
    q1, q2, q3 = queues = [FemtoQueue(tmp_path / name, "node") for name in "123"]
    q3.push_many([b"3a", b"3b", b"3c"])
    q2.push(b"2a")
    q3.schedule(b"3d", time.time_ns() // 1000 + 10**12)
    pushed = {b"2a": (q1, b"1a"), b"3a": (q2, b"2b"), b"2b": (q1, b"1b"), b"3c": (q1, b"1c")}
    seen: list[bytes] = []

    def handle(task: FemtoTask) -> None:
        assert task.queue is queues[int(task.data[:1]) - 1]
        seen.append(task.data)
        if task.data in pushed:
            queue, data = pushed[task.data]
            queue.push(data)

    assert q1.run(handle, also=[q2, q3], until_empty=True) == 8
    assert b" ".join(seen) == b"2a 1a 3a 2b 1b 3b 3c 1c"
    assert [*map(counted, queues)] == [{"done": 3}, {"done": 2}, {"scheduled": 1, "done": 3}]
    q1.push(b"x")
    task = q1.pop()
    assert task and task.queue is None


def test_also_verdicts_are_those_of_the_right_queue(tmp_path: Path) -> None:
    """Each task has the backoff, the max_attempts and the keeping of its own queue."""
    q1 = FemtoQueue(tmp_path / "1", "node")
    q2 = FemtoQueue(tmp_path / "2", "node", max_attempts=1, keep_done=False)
    ids = q1.push_many([b"raises", b"ok"])
    more = q2.push_many([b"raises", b"ok", b"fails", b"later"])

    def handle(task: FemtoTask) -> None:
        if task.data == b"raises":
            raise ValueError("no")
        if task.data == b"fails":
            task.queue.fail(task, "because")
        if task.data == b"later":
            task.queue.touch(task)
            task.queue.retry(task, 10**6)

    q1.run(handle, also=[q2], until_empty=True)
    assert [q1.status(id) for id in ids] == ["scheduled", "done"]
    # max_attempts=1: another delivery of "later" there is none
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
import resource, signal, threading
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for name in ("TERM", "INT", "HUP", "QUIT"):  # a background job of a script ignores some
    signal.signal(getattr(signal, "SIG" + name), signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
q, second = (FemtoQueue(sys.argv[1] + name, "worker") for name in ("", "-2"))
def handle(task):
    print("begun", task.data.decode(), flush=True)
    input()
def mine(number, frame):
    print("mine", number, flush=True)
def late(number, frame):
    raise TimeoutError("late")
def caught(*_):
    try:
        q.run(handle)
    except (TimeoutError, KeyboardInterrupt) as error:
        print("caught", error, flush=True)
def by_turns():
    while True:
        q.run(handle, until_empty=True)
        second.run(handle, until_empty=True)
def takes_it(task):
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    handle(task)
def in_thread():
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: (q.stop(), stopped.set()))
    thread = threading.Thread(target=q.run, args=(lambda task: (handle(task), stopped.wait(10)),))
    thread.start()
    thread.join()
    print("ended")
"""
TERM, INT, HUP, QUIT = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
IS_NOW = "signal.getsignal(signal.SIGTERM) is"
# What is signalled, how the worker runs, what it prints afterwards, its exit status.
DEFERRED: dict[str, tuple[int, str, str, int]] = {
    "SIGTERM": (TERM, "q.run(handle)", "", -15),
    "SIGINT": (INT, "q.run(handle)", "", -2),
    "SIGHUP": (HUP, "q.run(handle)", "", -1),
    "SIGQUIT": (QUIT, "q.run(handle)", "", -3),
    "until empty": (TERM, "q.run(handle, until_empty=True)", "", -15),
    "a loop around run": (TERM, "while True: q.run(handle, until_empty=True); time.sleep(1)", "", -15),
    "two queues by turns": (TERM, "by_turns()", "", -15),
    "also": (TERM, "q.run(handle, also=[second])", "", -15),
    "nested": (TERM, "second.run(lambda task: q.run(handle))", "", -15),
    "nested and caught": (INT, "second.run(caught)", "", -2),
    "KeyboardInterrupt": (INT, "caught()", "caught \n", 0),
    "its handler returns": (
        TERM,
        f"signal.signal(signal.SIGTERM, mine); print(q.run(handle), {IS_NOW} mine)",
        *("mine 15\n1 True\n", 0),
    ),
    "its handler exits": (TERM, "signal.signal(15, lambda *_: sys.exit(5)); q.run(handle)", "", 5),
    "its handler raises": (
        TERM,
        f"signal.signal(signal.SIGTERM, late); caught(); print({IS_NOW} late)",
        *("caught late\nTrue\n", 0),
    ),
    "taken by the task for a while": (TERM, "q.run(takes_it)", "", -15),
    "run in a thread, and stop": (TERM, "in_thread()", "ended\n", 0),
    "a task that fails": (TERM, "q.run(lambda task: (handle(task), 1 / 0))", "", -15),
}


@pytest.fixture
def three(directory: Path) -> Callable[[], list[str | None]]:
    """Tells the states of tasks 1 and 2, and of 3 in a second queue."""
    queues = [FemtoQueue(f"{directory}{name}", "producer") for name in ("", "-2")]
    ids = [*queues[0].push_many([b"1", b"2"]), queues[1].push(b"3")]
    return lambda: [queues[n // 2].status(id) for n, id in enumerate(ids)]


@pytest.mark.parametrize("case", DEFERRED)
def test_a_signal_waits_for_the_task_in_hand(
    directory: Path, spawn: Spawn, three: Callable[[], list[str | None]], case: str
) -> None:
    """Deferred, not swallowed: the program's own handler is called, or the signal ends the program."""
    number, code, printed, status = DEFERRED[case]
    process = spawn(WORKER + code, directory)
    expect(process, "begun 1")
    process.send_signal(number)
    say(process)
    assert ended(process) == (printed, status)
    # With two nested runs, the task of the outer one is in hand, too.
    first = "scheduled" if "fails" in case else "done"
    assert three() == [first, "pending", "done" if "nested" in case else "pending"]
    task = FemtoQueue(directory, "next").pop()
    assert task and (task.data, task.attempt) == (b"2", 1)


@pytest.mark.parametrize(
    "case", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "also", "nested", "its handler returns"]
)
def test_a_signal_ends_a_run_that_waits(directory: Path, spawn: Spawn, case: str) -> None:
    """With no task in hand, the signal does at once what it would have done without run."""
    number, code, printed, status = DEFERRED[case]
    q = FemtoQueue(directory, "producer")
    q.push(b"1")
    if case == "nested":
        FemtoQueue(f"{directory}-2", "producer").push(b"3")
    process = spawn(WORKER + code, directory)
    expect(process, "begun 1")
    say(process)
    assert q.join(timeout=15)
    process.send_signal(number)
    assert ended(process) == (printed, status)


@pytest.mark.parametrize("number", [HUP, QUIT])
def test_a_handler_that_was_not_set_from_python_is_there_afterwards(
    directory: Path, spawn: Spawn, number: int
) -> None:
    """The handlers from before are restored, also those of C (faulthandler, an embedding program)."""
    code = f"""
import faulthandler
faulthandler.register({int(number)}, file=sys.stdout)
q.run(handle, until_empty=True)
signal.raise_signal({int(number)})
print("alive")
"""
    out, status = ended(spawn(WORKER + code, directory))
    assert status == 0 and "most recent call first" in out and out.endswith("alive\n")


SECOND: dict[str, tuple[list[int], str, set[int]]] = {
    "TERM": ([TERM], "q.run(handle)", {-15}),
    "INT": ([INT], "q.run(handle)", {-2}),
    "QUIT": ([QUIT], "q.run(handle)", {-3}),
    "both": ([TERM, INT], "q.run(handle)", {-15, -2}),
    "own handler": ([TERM], "signal.signal(15, lambda *_: sys.exit(5)); q.run(handle)", {5}),
    "nested": ([TERM], "second.run(lambda task: q.run(handle))", {-15}),
}


@pytest.mark.parametrize("case", SECOND)
def test_a_second_signal_gives_the_task_back_at_once(
    directory: Path, spawn: Spawn, three: Callable[[], list[str | None]], case: str
) -> None:
    """A second signal gives the task back at once; the exit status is the signal's."""
    numbers, code, statuses = SECOND[case]
    process = spawn(WORKER + code, directory)
    expect(process, "begun 1")
    signalled_until_it_ends(process, *numbers)
    out, status = ended(process)
    assert out == "" and status in statuses
    assert three() == ["pending", "pending", "pending"]
    task = FemtoQueue(directory, "next").pop()
    assert task and (task.data, task.attempt) == (b"1", 2)


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


# --- stop ---------------------------------------------------------------------------------------------


class Gate:
    """A handler that waits until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, task: FemtoTask) -> None:
        self.begun.set()
        assert self.go.wait(20)


@pytest.mark.parametrize("how", ["thread", "handler", "two runs", "also", "nested"])
def test_stop_ends_every_run_after_the_task_in_hand(directory: Path, how: str) -> None:
    """stop: every run of this object ends after the task in hand; what waits stays pending."""
    q, more = FemtoQueue(directory, "node"), FemtoQueue(f"{directory}-2", "node")
    q.push_many([b"1", b"2", b"3"])
    gates = [Gate(), Gate()][: 2 if how == "two runs" else 1]
    free = [*gates]

    def handle(task: FemtoTask) -> None:
        free.pop()(task)
        if how == "handler":
            q.stop()

    calls: dict[str, Callable[[], int]] = {
        "also": lambda: q.run(handle, also=[more]),
        "nested": lambda: q.run(lambda task: q.run(handle) and None),
    }
    runs = [in_thread(calls.get(how, lambda: q.run(handle))) for _ in gates]
    assert all(gate.begun.wait(10) for gate in gates)
    if how != "handler":
        q.stop()
    for gate in gates:
        gate.go.set()
    assert [ran.result(10) for ran in runs] == [1] * len(gates)
    done = 2 if how in ("two runs", "nested") else 1
    assert counted(q) == {"done": done, "pending": 3 - done}


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


# --- status, counts, ids, claims ----------------------------------------------------------------------


def test_ids_are_oldest_first(directory: Path, clock: Time) -> None:
    """ids are oldest first, those of scheduled tasks as they are due; counts counts what is asked."""
    q = FemtoQueue(directory, "node")
    due = [q.schedule(b"x", NOW_US + s * 1_000_000) for s in (5000, 9, 70, 600)]
    ids = [q.push(b"%d" % n) for n in range(3)]
    assert list(q.ids("scheduled")) == [due[1], due[2], due[3], due[0]]
    for task in reversed([q.pop() for _ in ids]):
        q.done(task)
    assert list(q.ids("done")) == ids
    assert q.counts("done", "scheduled") == {"done": 3, "scheduled": 4}


HOSTILE_IDS = [
    *("", ".", "..", "*", "../../secret", "/etc/passwd", f"../done/{OLD_ID}"),
    *(f"{OLD_ID}/../../../secret", f"{OLD_ID}\0", f"{OLD_ID[:20]}\0{OLD_ID[21:]}", f"{OLD_ID}\n"),
    *(f"{OLD_ID}\udcff", f"{OLD_ID}~1", f"{OLD_ID[:17]}{'x' * 300}", "٣" * 16 + "_x"),
]


@pytest.mark.parametrize("id", [OLD_ID, *HOSTILE_IDS], ids=ascii)
def test_a_hostile_id_never_reaches_the_filesystem(directory: Path, id: str) -> None:
    """An id that is no task's name is no task: no system call ever sees it."""
    q = FemtoQueue(directory, "node")
    put(directory.parent / "secret")
    calls: list[object] = []

    def note(name: str, *args: Any, **options: Any) -> Any:
        calls.append(args)
        return REAL[name](*args, **options)

    with Steps(1, note, once=False):
        assert q.status(id) is None
        assert q.cancel(id) is q.requeue(id) is False
        assert q.reason(id) is None
    assert any(OLD_ID in str(call) for call in calls) if id == OLD_ID else calls == []


MOVES = ["successor", "retry", "retry later"]


@pytest.mark.parametrize(
    ("look", "move"), [*itertools.product(["join"], MOVES), *itertools.product(["status"], MOVES[1:])]
)
@pytest.mark.parametrize("moves", [2, 4, 12])
def test_a_task_that_moves_during_a_scan_does_not_slip_through(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, look: str, move: str, moves: int
) -> None:
    """join is True only if there was such a moment; status never misses what exists all the while."""
    queue, observer = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    id = queue.push(b"x")
    held = queue.pop()
    left, real = 0, os.scandir

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
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for _ in range(10):
        left = moves
        seen = observer.join(0) if look == "join" else observer.status(id)
        assert seen in ([False] if look == "join" else ["scheduled", "pending", "in_progress"])
        assert left < moves, "it scanned"
        left = 0
        clock.advance(1)
        held = held or queue.pop()


def test_a_task_retried_for_ever_is_always_there(scratch: Path, spawn: Spawn) -> None:
    """Beside a process that retries the one task on and on, join(0) is False, status never None."""
    queue = FemtoQueue(scratch / "queue", "a")
    id = queue.push(b"x")
    code = "q = FemtoQueue(sys.argv[1], 'b'); print('go', flush=True)\nwhile True: q.retry(q.pop(9))"
    expect(spawn(code, scratch / "queue"), "go")
    wrong = [(queue.join(0), queue.status(id)) for _ in range(1_000)]
    wrong = [pair for pair in wrong if pair[0] or pair[1] not in ("pending", "in_progress")]
    assert not wrong, f"{len(wrong)} of 1,000: {wrong[:3]}"


def test_claims_being_renewed_are_always_listed(scratch: Path, spawn: Spawn) -> None:
    """ids never reports a claim absent that exists all the while, though its lease is renewed."""
    queue = FemtoQueue(scratch / "queue", "a")
    ids = queue.push_many([b"%d" % number for number in range(600)])
    code = """
queue = FemtoQueue(sys.argv[1], "b", 10**6)
tasks = [queue.pop() for _ in range(600)]
print("go", flush=True)
while True:
    for task in tasks:
        queue.touch(task)
"""
    expect(spawn(code, scratch / "queue"), "go")
    missing = [len(ids) - len({*queue.ids("in_progress")}) for _ in range(100)]
    assert not any(missing), f"{sum(map(bool, missing))} of 100 listings"


def test_a_renewed_lease_does_not_hide_since_when_a_claim_runs(directory: Path, clock: Time) -> None:
    """claims tells of each claim whose it is, its attempt, since when it runs, and what is left."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"x")
    queue.retry(queue.pop())
    task = queue.pop()
    for _ in range(4):
        clock.advance(20)
        queue.touch(task)
    clock.advance(5)
    [claim] = FemtoQueue(directory, "b").claims()
    expected = {"id": task.id, "attempt": 2, "node_id": "a", "pid": os.getpid(), "alive": "yes"}
    times = {"since_s": pytest.approx(85, abs=0.01), "lease_left_s": pytest.approx(25, abs=0.01)}
    assert claim == expected | times
    queue.done(task)
    assert queue.claims() == []


@needs_pid_namespace
@pytest.mark.parametrize(("under", "alive"), [([], ("yes", "no")), (NEW_PIDS, ("unknown", "unknown"))])
def test_claims_tell_who_is_alive(
    directory: Path, queue: FemtoQueue, under: list[str], alive: tuple[str, str]
) -> None:
    """A claim's owner is alive, dead, or cannot be judged from here; and looking takes no task."""
    with claimed_by(directory, "b", under) as worker:
        assert [claim["alive"] for claim in queue.claims()] == [alive[0]]
        killed(worker)
        observer = FemtoQueue(directory, "c")  # what an older one learned holds for a second
        assert [(claim["node_id"], claim["alive"]) for claim in observer.claims()] == [("b", alive[1])]
        assert queue.counts()["in_progress"] == 1


# --- cancel, requeue, purge ---------------------------------------------------------------------------


def test_a_bucket_removed_meanwhile_is_no_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A durable cancel that emptied a bucket returns True, also when a worker removes the bucket."""
    q = FemtoQueue(directory, "node", sync_after_write=True)
    id = q.push(b"x")
    [bucket] = (directory / "pending").iterdir()
    real = os.unlink
    monkeypatch.setattr(os, "unlink", lambda path: (real(path), bucket.rmdir())[0])
    assert q.cancel(id) is True


@durable_or_not
def test_requeue_gives_a_fresh_start(directory: Path, clock: Time, durable: bool) -> None:
    """A failed, corrupt or done task is pending again, at its old place, with no delivery used up; a
    scheduled one is pending now, behind all that is pending, attempts kept."""
    q = FemtoQueue(directory, "node", sync_after_write=durable, max_attempts=2)
    ids = q.push_many([b"failed", b"done", b"corrupt", b"last"])
    next((directory / "pending").rglob(ids[2])).write_bytes(b"broken!")
    q.retry(q.pop())
    q.retry(q.pop())
    q.done(q.pop())
    assert q.pop().id == ids[3]
    assert [q.status(id) for id in ids] == ["failed", "done", "corrupt", "in_progress"]
    (directory / "corrupt" / ids[2]).write_bytes(b"corrupt")  # repaired
    for id in reversed(ids[:3]):
        assert q.requeue(id) is True
        assert q.requeue(id) is False
    assert q.requeue(ids[3]) is False
    tasks = [q.pop(), q.pop(), q.pop()]
    assert [(task.id, task.attempt) for task in tasks] == [(id, 1) for id in ids[:3]]
    later = [q.schedule(b"later", 4 * 10**15), ids[0]]
    q.retry(tasks[0], 1e9)
    ids = [q.push(b"before"), *later]
    for id in later:
        assert (q.requeue(id), q.status(id), q.requeue(id)) == (True, "pending", False)
    ids.append(q.push(b"after"))
    tasks = [q.pop() for _ in ids]
    assert [(task.id, task.attempt) for task in tasks] == [*zip(ids, (1, 1, 2, 1), strict=True)]


@pytest.mark.parametrize("state", ["pending", "scheduled", "done", "failed", "corrupt"])
def test_purge_goes_by_the_time_in_the_state(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """purge deletes what has been in its state for so long, however old task or file are; it says how
    many, and nothing else is touched."""
    q = FemtoQueue(directory, "node")
    now = time.time()
    ids = []
    for age_s in (10**6, -(10**6)):  # files of long ago, and from a machine whose clock is ahead
        os.utime(put(tmp_path / "file"), (now - age_s, now - age_s))
        ids.append(q.push_file(tmp_path / "file", move=True))
        if state == "corrupt":
            next((directory / "pending").rglob(ids[-1])).rename(directory / "corrupt" / ids[-1])
        elif state != "pending":
            task = q.pop()
            {"done": q.done, "failed": q.fail, "scheduled": lambda task: q.retry(task, 1e9)}[state](
                task
            )
    others = [other for other in STATES if other not in (state, "in_progress")]
    for other in others:
        put(directory / other / OLD_ID)
    stray = put(directory / state / ".DS_Store")
    for past_s, count in ((0, 0), (59, 0), (120, 2)):
        monkeypatch.setattr(time, "time", lambda past_s=past_s: now + past_s)
        assert q.purge(state, 60) == count
    assert stray.exists() and [q.status(id) for id in ids] == [None, None]
    assert q.counts(state) == {state: 0} and all(q.counts(other)[other] for other in others)


# --- join ---------------------------------------------------------------------------------------------


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


def test_close_gives_back_what_was_not_finished(directory: Path) -> None:
    """After close, others get the tasks at once, at their old places; so does with, on errors too."""
    other = FemtoQueue(directory, "other")
    ids = other.push_many([b"1", b"2", b"3"])
    with pytest.raises(ZeroDivisionError), FemtoQueue(directory, "node") as q:
        q.done(q.pop())
        q.pop()
        q.pop()
        raise ZeroDivisionError
    q.close()
    assert [other.status(id) for id in ids] == ["done", "pending", "pending"]
    assert os.listdir(directory / "in_progress") == []
    assert other.pop().id == ids[1]


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


@pytest.mark.parametrize("how", ["handler", "signal handler", "nested", "also"])
def test_close_by_its_own_handler(directory: Path, how: str) -> None:
    """close called by its own handler: a FemtoQueueError that names stop(); the task stays in hand."""
    q, more = FemtoQueue(directory, "node"), FemtoQueue(f"{directory}-2", "node")
    id = q.push(b"x")
    refused = []

    def close(*_: object) -> None:
        with pytest.raises(FemtoQueueError, match=re.escape("stop()")):
            q.close()
        refused.append(q.status(id))

    def nested(task: FemtoTask) -> None:
        more.push(b"x")
        more.run(close, until_empty=True)

    handler = {"nested": nested, "signal handler": lambda task: signal.raise_signal(signal.SIGUSR1)}
    before = signal.signal(signal.SIGUSR1, close)
    try:
        runner, also = (more, [q]) if how == "also" else (q, [])
        assert runner.run(handler.get(how, close), also=also, until_empty=True) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert refused == ["in_progress"] and q.status(id) == "done"
    q.close()


def test_a_closed_queue_refuses_every_call(directory: Path) -> None:
    """Every later call raises FemtoQueueError and changes nothing; close may be repeated."""
    q = FemtoQueue(directory, "node", max_attempts=1)
    q.push(b"x")
    task = q.pop()
    calls: list[Callable[[], object]] = [
        *(lambda: q.push(b"x"), lambda: q.push_many([b"x"]), lambda: q.push_file(__file__)),
        *(lambda: q.schedule(b"x", NOW_US), q.pop, lambda: q.pop(timeout=None)),
        *(lambda call=call: call(q, task) for call in TASK_CALLS.values()),
        *(lambda: q.run(never, until_empty=True), q.stop, lambda: q.status(task.id), q.counts),
        *(lambda: q.ids("pending"), q.claims, lambda: q.reason(task.id), lambda: q.cancel(task.id)),
        *(lambda: q.requeue(task.id), lambda: q.purge("done", 0), lambda: q.join(0), q.__enter__),
    ]
    for call in calls:
        q.close()
        before = files(directory)
        with pytest.raises(FemtoQueueError, match="closed"):
            call()
        assert files(directory) == before


@pytest.mark.parametrize("call", ["scandir", "rename", "fsync"])
def test_close_that_raised_can_be_made_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch, unlogged: None, call: str
) -> None:
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
    q.close()


def test_a_claim_is_not_made_behind_close(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pop that close overtakes in another thread raises; the task is there for others as it was."""
    q = FemtoQueue(directory, "node")
    id = q.push(b"x")
    real = os.rename

    def overtaken(source: str, target: str) -> None:
        monkeypatch.setattr(os, "rename", real)
        q.close()
        real(source, target)

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


# --- a task, and a queue, in another process ----------------------------------------------------------


@pytest.mark.parametrize("size", [1, (1 << 20) + 1])
@pytest.mark.parametrize("call", ["done", "fail", "retry", "touch"])
def test_finished_in_another_process(directory: Path, call: str, size: int) -> None:
    """A task can be pickled and finished from another process, though it was touched meanwhile."""
    payload = b"x" * size
    queue = FemtoQueue(directory, "a")
    id = queue.push(payload)
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
    if call == "touch":
        assert task.data == payload
    if call in (
        "touch",
        "done",
    ):  # a done whose answer was lost looks just like that of another process
        queue.done(task)
    with pytest.raises(NotInProgress):
        queue.done(task)


@pytest.mark.parametrize("through", ["itself", "a copy"])
def test_data_while_the_lease_is_renewed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
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


def test_pickled_queue(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickled queue has its settings, and is the same queue wherever it is unpickled."""
    monkeypatch.chdir(directory.parent)
    queue = FemtoQueue(directory.name, "a", 5_000, max_attempts=3, keep_done=False, maxsize=7)
    queue.push(b"x")
    (directory.parent / "elsewhere").mkdir()
    os.chdir(directory.parent / "elsewhere")
    again = pickle.loads(pickle.dumps(queue))
    settings = ("node_id", "timeout_stale_ms", "max_attempts", "keep_done", "keep_failed", "maxsize")
    assert all(getattr(again, name) == getattr(queue, name) for name in settings)
    assert drained(again) == [b"x"]


# --- bad arguments ------------------------------------------------------------------------------------

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
COMMANDS = """
for command in sys.argv[2:]:
    print(femtoqueue.main([sys.argv[1], *command.split()]))
"""
SERVICE = (65534, 65534)


def as_user(uid: int, gid: int, *groups: int, umask: int = 0o022) -> str:
    """Code by which a process becomes this user."""
    become = f"os.setgroups({[*groups]}); os.setgid({gid}); os.setuid({uid}); os.umask({umask})"
    return f"{IMPORTS}\n{become}\n"


def owned(directory: Path, uid: int, gid: int, mode: int) -> None:
    """Make a directory that belongs to somebody."""
    directory.mkdir()
    os.chown(directory, uid, gid)
    directory.chmod(mode)


@needs_root
@needs_mounts
@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_looking_as_root_after_a_boot_locks_nobody_out(
    open_to_all: Path, tmp_path: Path, umask: int
) -> None:
    """Looking writes nothing, whoever looks first after a boot: the service goes on."""
    owned(open_to_all, *SERVICE, 0o755)
    run(as_user(*SERVICE) + COMMANDS, open_to_all, "push", "push", "run --until-empty -- true", "push")
    again = rebooted(tmp_path)
    before = snapshot(open_to_all, times=True)
    looks = ("status", "status --json", "list pending", "list done", "cancel x", "requeue x")
    run(f"os.umask({umask})\n" + COMMANDS, open_to_all, *looks, under=again)
    assert snapshot(open_to_all, times=True) == before
    run(f"os.umask({umask})\n" + COMMANDS, open_to_all, "purge done 0s", under=again)
    commands = ("push", "status", "run --until-empty -- true")
    out = run(as_user(*SERVICE) + COMMANDS, open_to_all, *commands, under=again).splitlines()
    assert (out[1], out[-1]) == ("0", "0")
    assert len(names(open_to_all, "done")) == 2


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
    ("mode", "owner", "first", "second", "umask"),
    [
        (0o755, (65534, 65534), (0, 0), (65534, 65534), 0o077),
        (0o700, (65534, 65534), (0, 0), (65534, 65534), 0o022),
        (0o2770, (65534, 65533), (0, 0), (65534, 65533), 0o077),
        (0o770, (65534, 65533), (0, 0), (65534, 65533), 0o022),
        (0o770, (1001, 65533), (1002, 65533), (1001, 65533), 0o027),
        (0o2770, (1001, 65533), (1002, 1002, 65533), (1001, 1001, 65533), 0o007),
        (0o777, (1001, 65533), (1002, 1002, 65533), (1001, 1001, 65533), 0o022),
    ],
)
@pytest.mark.parametrize("kind", ["used before", "durable"])
def test_whoever_comes_first_owns_nothing_that_others_need(
    open_to_all: Path,
    tmp_path: Path,
    mode: int,
    owner: tuple[int, int],
    first: tuple[int, ...],
    second: tuple[int, ...],
    umask: int,
    kind: str,
) -> None:
    """What is shared has data_dir's mode, and what root makes its owner and group as well; payloads
    have what the umask says."""
    owned(open_to_all, *owner, mode)
    if kind == "used before":
        run(as_user(*second) + COMMANDS, open_to_all, "push")
    again = rebooted(tmp_path)
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
def test_a_shared_bucket_that_cannot_be_used_is_no_obstacle(
    open_to_all: Path, call: str, kind: str
) -> None:
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
        run(as_user(*SERVICE, umask=0) + push % number, open_to_all)
    first = [b"1"] if kind != "a file" else []
    assert drained(FemtoQueue(open_to_all, "root")) == [*first, b"2", b"3"]


HOUSE = """
queue = FemtoQueue(sys.argv[1] + "/queue", "before")
payloads = [b"corrupt", b"done", b"failed", b"in_progress", b"pending"]
corrupt = queue.push_many(payloads)[0]
queue.schedule(b"scheduled", 4 * 10**15)
for top, _, names in os.walk(queue.data_dir + "/pending"):
    if corrupt in names:
        open(f"{top}/{corrupt}", "wb").write(b"broken")
queue.done(queue.pop())
queue.fail(queue.pop())
queue.pop()
os._exit(0)
"""
AFTERWARDS = """
import argparse, json, subprocess
disk, kind = sys.argv[1:3]
directory = disk + "/queue"
def id(state):
    [found] = queue.ids(state)
    return found
def fill():
    try:
        while kind != "read-only":
            with open(f"{disk}/fill-{len(os.listdir(disk))}", "wb", 0) as file:
                while kind == "blocks":
                    file.write(bytes(4096))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    except OSError as error:
        assert error.errno == 28
for expression in sys.argv[3:]:
    fill()
    try:
        queue = FemtoQueue(directory, "after")
        print(expression, "->", eval(expression))
    except OSError as error:
        print(expression, "->", error)
    assert len([name for name in os.listdir(directory) if name.startswith("clock-")]) == 1
"""
LOOKS = {
    "[queue.status(id(state)) for state in STATES]": str([*STATES]),
    "queue.counts()": str(dict.fromkeys(STATES, 1)),
    "queue.join(0)": "False",
    **{f"femtoqueue.main([directory, {command}])": "0" for command in ("'status'", "'list', 'done'")},
}
DELETES = {
    "queue.cancel(id('pending'))": "True",
    "queue.cancel(id('scheduled'))": "True",
    **{f"queue.purge({state!r}, 0)": "1" for state in ("done", "failed", "corrupt")},
}


@needs_root
@needs_mounts
@pytest.mark.parametrize("kind", ["blocks", "inodes", "read-only"])
def test_looking_and_deleting_need_no_room_after_a_boot(tmp_path: Path, kind: str) -> None:
    """Neither looking nor deleting needs room on the disk, and looking takes no right to write."""
    boot_id = put(tmp_path / "boot", f"{uuid.uuid4()}\n".encode())
    (tmp_path / "disk").mkdir()
    script = """
mount -t tmpfs -o size=256k,nr_inodes=99 tmpfs "$1" && "$2" -c "$3" "$1" || exit
mount --bind "$0" /proc/sys/kernel/random/boot_id && place="$1" && shift 3 && exec "$@"
"""
    before = (tmp_path / "disk", sys.executable, PRELUDE + HOUSE)
    under = ["unshare", "-m", "sh", "-c", script, *map(str, (boot_id, *before))]
    expected = LOOKS if kind == "read-only" else LOOKS | DELETES
    out = run(AFTERWARDS, tmp_path / "disk", kind, *expected, under=under)
    answers = [line for line in out.splitlines() if " -> " in line]
    assert answers == [f"{expression} -> {answer}" for expression, answer in expected.items()]


# ====================================================================================================
# The promises
# ====================================================================================================

# --- the calls that are killed, failed and answered wrongly at every step -----------------------------


def kill_now(name: str, *args: object, **kwargs: object) -> None:
    """Die as by `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def look(directory: Path) -> dict[bytes, list[str]]:
    """What lies where, read without femtoqueue: payload -> "delivered n", "later n", "done" ...

    n is the attempt that the next delivery will be.
    """
    words = {"pending": "delivered", "in_progress": "delivered", "scheduled": "later"}
    found: dict[bytes, list[str]] = {}
    for state in STATES:
        for path in (directory / state).rglob("*"):
            if path.is_file() and not path.name.endswith("~reason"):
                attempt = int([*path.name.split("~"), "0"][1]) + 1
                fate = f"{words[state]} {attempt}" if state in words else state
                found.setdefault(path.read_bytes(), []).append(fate)
    return found


def audit(directory: Path, clock: Time, allowed: dict[bytes, set[str]]) -> None:
    """Open the queue anew, empty it, and compare each payload's fate with what is `allowed`."""
    clock.advance(10 * 86_400)  # all that is scheduled is due, no lease runs out
    clock.wall = max(clock.wall, 5e9)  # later than file times, which are not ours to patch
    queue = FemtoQueue(directory, "a", LONG_MS, keep_done=False)
    there = look(directory)
    fates = {payload: states[0] for payload, states in there.items()}
    assert all(len(states) == 1 for states in there.values()), f"visible twice: {there}"
    order, later = [], set()
    while task := queue.pop():
        order.append(task.id)
        word = fates.get(task.data, "nothing").split()[0]
        assert word in ("delivered", "later"), f"{task.data!r} was {word}, and delivered"
        later |= {task.id} if word == "later" else set()
        fates[task.data] = f"{word} {task.attempt}"
        queue.done(task)
    assert order == sorted(order, key=lambda id: (id in later, id)), "what falls due comes last"
    fates.update((payload, states[0]) for payload, states in look(directory).items())
    for payload in {*fates, *allowed}:
        fate = fates.get(payload, "gone")
        possible = {"corrupt"} if payload == b"broken" else allowed.get(payload, {"gone"})
        assert fate in possible, f"{payload!r} is {fate}: {possible}"
    live = [state for state in fates.values() if state.split()[0] in ("delivered", "later")]
    assert len(order) == len(live), "some could not be delivered"
    clock.advance(2_000)
    assert queue.pop() is None
    for state in ("done", "failed", "corrupt"):
        queue.purge(state, 0)
    queue.close()
    for state in (*STATES, "creating"):
        assert [*(directory / state).glob("*")] == [], f"left over in {state}/"
    other = {name for name in os.listdir(directory) if not name.startswith("clock-")}
    assert other | {"creating"} == {*STATES, "creating", "layout"}, f"left over: {other}"
    assert (directory / "layout").read_text().startswith("femtoqueue layout 1\n")


def source_of(directory: Path, elsewhere: bool = False) -> Path:
    """The file that push_file takes; `elsewhere`: on another filesystem, where there are two."""
    if elsewhere:
        return Path(tempfile.gettempdir(), f"{directory.parent.name}-{directory.name}-source")
    return directory.with_name(f"{directory.name}-source")


def clear(directory: Path) -> None:
    shutil.rmtree(directory)
    for elsewhere in (False, True):
        source_of(directory, elsewhere).unlink(missing_ok=True)


class Stage:
    """A queue with a task in each state, and the call that a case is about."""

    def __init__(self, case: Case, directory: Path, durable: bool, clock: Time) -> None:
        vars(clock).update(vars(Time()))  # each run takes the same steps
        self.case = case
        self.directory = directory
        self.durable = durable
        self.clock = clock
        self.source = source_of(directory)
        self.kept: list[FemtoQueue] = []
        self.tasks: dict[bytes, FemtoTask] = {}
        self.ids: dict[bytes, str] = {}
        self.results: list[Any] = []
        self.pushed = 0  # of NEW
        if case.world:
            self.queue = self.open(**case.options)
            for payload in (b"claimed", b"finished", b"failed", b"first", b"second"):
                self.ids[payload] = self.queue.push(payload)
            self.ids[b"later"] = self.queue.schedule(b"later", self.in_us(HOUR_US))
            for payload in (b"claimed", b"finished", b"failed"):
                self.tasks[payload] = self.pop()
            self.queue.done(self.tasks[b"finished"])
            self.queue.fail(self.tasks[b"failed"], "why")
        case.prepare(self)

    def act(self) -> None:
        """Make the call. Its result is of interest if it says whether something was done."""
        result = self.case.act(self)
        if isinstance(result, (bool, tuple)):
            self.results.append(result)

    def drop(self) -> None:
        """Let go of all queue objects: from here on their owners are dead."""
        self.kept.clear()
        self.queue = None  # type: ignore[assignment]

    def open(self, lease_ms: float = LONG_MS, **options: Any) -> FemtoQueue:
        return FemtoQueue(self.directory, "a", lease_ms, self.durable, **options)

    def reopen(self, keep: bool = True, **options: Any) -> None:
        """Use another object; the one before is `kept` alive, or not."""
        if keep:
            self.kept.append(self.queue)
        self.queue = self.open(**options)

    def in_us(self, us: int) -> int:
        return int(self.clock.wall * 1e6) + us

    def pop(self) -> FemtoTask:
        task = self.queue.pop()
        assert task is not None, "pop said None while tasks are pending"
        return task

    def pop_first(self) -> tuple[bytes, int]:
        """The call of all cases about pop."""
        task = self.pop()
        return task.data, task.attempt

    def write_source(self, elsewhere: bool = False) -> None:
        self.source = source_of(self.directory, elsewhere)
        self.source.write_bytes(b"new")

    def push_open_file(self) -> None:
        with open(self.source, "rb") as file:
            self.queue.push_file(file)

    def run_twice(self) -> None:
        """What a fault keeps from being found, or finished, comes back with the next look, or lease."""
        for _ in range(2):
            self.clock.advance(102)
            self.queue.run(lambda task: None, until_empty=True)

    def look_around(self) -> None:
        for state in STATES:
            for id in self.queue.ids(state):
                assert self.queue.status(id) and self.queue.reason(id) in (None, "why")
        assert self.queue.counts().keys() == {*STATES}
        self.queue.claims()
        self.queue.join(0)

    # What cases begin with.

    def put_by_hand(self, ahead_us: int) -> None:
        put(self.directory / "pending" / f"{NOW_US + ahead_us}_a-shell-script", b"by hand")

    def hang(self) -> None:
        self.kept.append(self.open(lease_ms=1))
        self.kept[0].pop()
        self.clock.advance(2)

    def schedule_near_the_next_bucket(self) -> None:
        begin_s = self.clock.wall // 100 * 100 + 3_000  # of one that is 100 s long
        self.queue.schedule(b"far", int((begin_s + 80) * 1e6))
        self.clock.advance(begin_s + 20 - self.clock.wall)

    def break_first(self) -> None:
        next(self.directory.glob(f"pending/*/{self.ids[b'first']}")).write_bytes(b"broken")

    def use_up_first(self) -> None:
        self.queue.retry(self.pop())
        self.reopen(max_attempts=1)

    def hand_claimed_over(self) -> None:
        self.reopen()
        self.tasks[b"claimed"] = pickle.loads(pickle.dumps(self.tasks[b"claimed"]))

    def remove_bucket(self) -> None:
        for _ in range(2):
            self.queue.done(self.pop())
        self.clock.advance(10)
        assert self.queue.pop() is None

    def claim_all(self) -> None:
        self.clock.step_wall(3_700)  # "later" is due: the time of its id is ahead of the queue clock
        self.tasks |= {task.data: task for task in [self.pop() for _ in range(3)]}

    def forget_file_times(self) -> None:
        self.clock.wall = max(5e9, self.clock.wall)  # they are not ours to patch


@dataclasses.dataclass
class Case:
    """A call, what it is about, and the fates of each payload from before it to after it."""

    changes: dict[bytes, tuple[str, ...]]
    act: Callable[[Stage], object]
    prepare: Callable[[Stage], object] = lambda stage: None
    world: bool = True
    undone: bool = False  # after an error, everything is as it was before the call
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def before(self) -> dict[bytes, str]:
        return (WORLD if self.world else {}) | {name: fates[0] for name, fates in self.changes.items()}

    def after(self) -> dict[bytes, str]:
        return (WORLD if self.world else {}) | {name: fates[-1] for name, fates in self.changes.items()}

    def allowed(
        self,
        returned: bool,
        undone: bool = False,
        popped: tuple[bytes, int] | None = None,
        disordered: bool = False,
    ) -> dict[bytes, set[str]]:
        """The fates that each payload may have; `popped`: payload and attempt that a pop returned."""
        before, after = self.before(), self.after()
        fates = {}
        for payload in after:
            fates[payload] = {before[payload] if undone else after[payload]}
            if not (returned or undone):
                fates[payload] |= {before[payload], *self.changes.get(payload, ())}
            if disordered:
                fates[payload] |= {before[payload], before[payload].replace("1", "2")}
        for payload in after if popped else ():
            # Something went wrong, and pop went on: this one is claimed now, and no other one.
            claimed = {before[payload], after[payload]} <= {f"delivered {n}" for n in range(1, 9)}
            fates[payload] |= {before[payload]}
            if payload == popped[0]:
                fates[payload] = {f"delivered {popped[1] + 1}"}
            elif claimed and not disordered:
                fates[payload] = {before[payload]}
        return fates


# Payload -> what becomes of it in a world in which nothing more happens.
WORLD = {
    b"claimed": "delivered 2",
    b"finished": "done",
    b"failed": "failed",
    b"first": "delivered 1",
    b"second": "delivered 1",
    b"later": "later 1",
}
AGAIN = {"delivered 1": "delivered 2", "delivered 2": "delivered 3"}
NEW = [b"new 0", b"new 1", b"new 2"]
Fates = dict[bytes, tuple[str, ...]]
PUSHED: Fates = {b"new": ("gone", "delivered 1")}
FIRST: Fates = {b"first": ("delivered 1", "delivered 2")}
A_SECOND: Fates = {b"second": ("delivered 1", "delivered 2")}
BY_HAND: Fates = {b"by hand": ("delivered 1", "delivered 1")}
ENDED, BURIED = {b"claimed": ("delivered 2", "done")}, {b"claimed": ("delivered 2", "failed")}
CASES: dict[str, Case] = {
    "construction": Case({}, lambda s: s.open(), world=False),
    "construction_where_a_script_was": Case(
        BY_HAND, lambda s: s.open(), lambda s: s.put_by_hand(-1), world=False
    ),
    "push": Case(PUSHED, lambda s: s.queue.push(b"new"), undone=True),
    "push_into_a_new_bucket": Case(
        PUSHED, lambda s: s.queue.push(b"new"), lambda s: s.clock.advance(5_000), undone=True
    ),
    "push_heals": Case(
        PUSHED,
        lambda s: s.queue.push(b"new"),
        lambda s: shutil.rmtree(s.directory / "creating"),
        undone=True,
    ),
    "push_many": Case(
        dict.fromkeys(NEW, ("gone", "delivered 1")), lambda s: s.queue.push_many(NEW[s.pushed :])
    ),
    "push_file": Case(PUSHED, lambda s: s.queue.push_file(s.source), Stage.write_source, undone=True),
    "push_file_that_is_open": Case(PUSHED, Stage.push_open_file, Stage.write_source, undone=True),
    "push_file_move": Case(
        PUSHED, lambda s: s.queue.push_file(s.source, move=True), Stage.write_source, undone=True
    ),
    "push_file_move_from_elsewhere": Case(
        PUSHED,
        lambda s: s.queue.push_file(s.source, move=True),
        lambda s: s.write_source(elsewhere=True),
    ),
    "schedule": Case(
        {b"new": ("gone", "later 1")},
        lambda s: s.queue.schedule(b"new", NOW_US + 2 * HOUR_US),
        undone=True,
    ),
    "pop": Case(FIRST, Stage.pop_first, undone=True),
    "pop_of_a_new_object": Case(FIRST, Stage.pop_first, Stage.reopen, undone=True),
    "pop_of_a_stopped_object": Case(FIRST, Stage.pop_first, lambda s: s.queue.stop(), undone=True),
    "pop_from_the_dead": Case(
        {b"claimed": ("delivered 2", "delivered 3")}, Stage.pop_first, lambda s: s.reopen(keep=False)
    ),
    "pop_from_the_hung": Case({b"first": ("delivered 2", "delivered 3")}, Stage.pop_first, Stage.hang),
    "pop_when_one_fell_due": Case(
        FIRST | {b"later": ("later 1", "delivered 1")},
        Stage.pop_first,
        lambda s: s.clock.advance(3_700),
    ),
    "pop_moves_closer": Case(
        FIRST | {b"far": ("later 1", "later 1")}, Stage.pop_first, Stage.schedule_near_the_next_bucket
    ),
    "pop_settles_what_is_ahead": Case(
        FIRST | BY_HAND, Stage.pop_first, lambda s: s.put_by_hand(HOUR_US)
    ),
    "pop_meets_a_broken_one": Case(
        A_SECOND | {b"first": ("gone", "gone"), b"broken": ("delivered 1", "corrupt")},
        Stage.pop_first,
        Stage.break_first,
    ),
    "pop_buries": Case(
        A_SECOND | {b"first": ("delivered 2", "failed")}, Stage.pop_first, Stage.use_up_first
    ),
    "done": Case(ENDED, lambda s: s.queue.done(s.tasks[b"claimed"])),
    "done_through_another_object": Case(
        ENDED, lambda s: s.queue.done(s.tasks[b"claimed"]), Stage.hand_claimed_over
    ),
    "done_and_not_kept": Case(
        {b"claimed": ("delivered 2", "gone"), b"finished": ("gone", "gone")},
        lambda s: s.queue.done(s.tasks[b"claimed"]),
        options={"keep_done": False},
    ),
    "fail": Case(BURIED, lambda s: s.queue.fail(s.tasks[b"claimed"])),
    "fail_with_a_reason": Case(BURIED, lambda s: s.queue.fail(s.tasks[b"claimed"], "why")),
    "retry": Case({}, lambda s: s.queue.retry(s.tasks[b"claimed"])),
    "retry_into_a_removed_bucket": Case(
        {b"first": ("done", "done"), b"second": ("done", "done")},
        lambda s: s.queue.retry(s.tasks[b"claimed"]),
        Stage.remove_bucket,
    ),
    "retry_at_a_new_place": Case(
        dict.fromkeys((b"first", b"second", b"later"), ("delivered 2", "delivered 2")),
        lambda s: s.queue.retry(s.tasks[b"later"]),
        Stage.claim_all,
    ),
    "retry_later": Case(
        {b"claimed": ("delivered 2", "later 2")},
        lambda s: s.queue.retry(s.tasks[b"claimed"], 3_600_000),
    ),
    "retry_for_the_last_time": Case(
        BURIED, lambda s: s.queue.retry(s.tasks[b"claimed"]), options={"max_attempts": 1}
    ),
    "touch": Case({}, lambda s: s.queue.touch(s.tasks[b"claimed"])),
    "run": Case(
        {name: (WORLD[name], AGAIN[WORLD[name]], "done") for name in (b"claimed", b"first", b"second")},
        Stage.run_twice,
        options={"lease_ms": 100_000},
    ),
    "looking": Case({}, Stage.look_around),
    "requeue": Case(
        {b"failed": ("failed", "delivered 1")}, lambda s: s.queue.requeue(s.ids[b"failed"])
    ),
    "requeue_scheduled": Case(
        {b"later": ("later 1", "delivered 1")}, lambda s: s.queue.requeue(s.ids[b"later"])
    ),
    "cancel": Case({b"first": ("delivered 1", "gone")}, lambda s: s.queue.cancel(s.ids[b"first"])),
    "cancel_scheduled": Case(
        {b"later": ("later 1", "gone")}, lambda s: s.queue.cancel(s.ids[b"later"])
    ),
    "purge": Case(
        {b"failed": ("failed", "gone")}, lambda s: s.queue.purge("failed", 0), Stage.forget_file_times
    ),
    "purge_pending": Case(
        {b"first": ("delivered 1", "gone"), b"second": ("delivered 1", "gone")},
        lambda s: [s.queue.purge("pending", 0) for _ in range(2)],  # what it may not read is left out
        Stage.forget_file_times,
    ),
    "close": Case({}, lambda s: s.queue.close()),
}
each_case = pytest.mark.parametrize("name", CASES)


def check_source(name: str, directory: Path, returned: bool, error: bool = False) -> None:
    """A file that is moved is where it was, or it is a task; a file that is copied stays."""
    source = source_of(directory, "elsewhere" in name)
    if not name.startswith("push_file"):
        return
    there = (source.exists(), b"new" in look(directory))
    if error or (returned and "move" in name):
        assert sum(there) == 1, f"the file is there, the task is there: {there}"
    else:
        assert any(there) and (source.exists() or "move" in name)


# --- 1 and 2: whole, one claimant at a time, at least once and after done never again -----------------


class Crowd:
    """Producers and workers on one queue, some of which are killed or stopped now and then."""

    LEASE_MS = 300
    PRODUCERS, WORKERS = 2, 4

    def __init__(self, directory: Path, chance: random.Random) -> None:
        self.directory = directory
        self.chance = chance
        self.journal = directory.with_name("journal")
        self.no_more = directory.with_name("no-more")
        self.roles: dict[int, Callable[[int], None]] = {}  # PID -> what it is
        self.stopped: dict[int, float] = {}  # PID -> when it shall go on
        self.disturbed: set[int] = set()
        self.kills = self.stops = self.started = 0
        FemtoQueue(directory, "parent").close()

    def say(self, *words: object) -> None:
        """One line in one write: what a process says about itself before it is killed."""
        descriptor = os.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
        os.close(descriptor)

    def produce(self, number: int) -> None:
        queue = FemtoQueue(self.directory, f"producer-{number}", maxsize=200)
        for i in itertools.count():
            if self.no_more.exists():
                return
            self.say("try", f"{number}.{i}")
            while True:
                try:
                    queue.push(f"{number}.{i}".encode())
                    break
                except Full:
                    time.sleep(0.002)
            self.say("acknowledged", f"{number}.{i}")

    def consume(self, number: int) -> None:
        queue = FemtoQueue(self.directory, "worker", self.LEASE_MS)
        while (task := queue.pop(timeout=0.2)) or not self.no_more.exists():
            if task:
                self.handle(queue, task)

    def handle(self, queue: FemtoQueue, task: FemtoTask) -> None:
        self.say("got", task.data.decode(), task.attempt, os.getpid())
        time.sleep(0.0005)
        try:
            queue.done(task)
            self.say("done", task.data.decode(), task.attempt)
        except NotInProgress:
            self.say("robbed", task.data.decode(), task.attempt, os.getpid())

    def start(self, role: Callable[[int], None]) -> None:
        self.started += 1
        self.roles[forked(functools.partial(role, self.started))] = role

    def disturb(self, now: float) -> None:
        """Kill one, and start another in its place; or stop one, perhaps for longer than its lease."""
        pid = self.chance.choice(sorted(self.roles.keys() - self.stopped.keys()))
        if self.chance.random() < 0.5:
            os.kill(pid, signal.SIGKILL)
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, "it had ended by itself"
            self.kills += 1
            self.start(self.roles.pop(pid))
        elif len(self.stopped) < 3:
            os.kill(pid, signal.SIGSTOP)
            self.stopped[pid] = now + self.chance.uniform(1, 6) * self.LEASE_MS / 1_000
            self.stops += 1
        self.disturbed.add(pid)

    def run(self, seconds: float) -> None:
        for role in (self.produce,) * self.PRODUCERS + (self.consume,) * self.WORKERS:
            self.start(role)
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end or "robbed" not in self.journal.read_text():
            assert now < end + 30, "nobody was stopped for longer than the lease with a task in hand"
            for pid in [pid for pid, until in self.stopped.items() if until <= now]:
                os.kill(pid, signal.SIGCONT)
                del self.stopped[pid]
            self.disturb(now)
            time.sleep(self.chance.uniform(0.02, 0.12))
        self.no_more.touch()
        for pid in self.stopped:
            os.kill(pid, signal.SIGCONT)
        while self.roles:
            pid = next(iter(self.roles))
            status = os.waitpid(pid, 0)[1]
            del self.roles[pid]
            assert status == 0, "a process that was not killed failed"

    def clear(self) -> None:
        """Leave nobody behind, however the test ended."""
        for pid in self.roles:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_many_processes_many_kills(scratch: Path) -> None:
    """Nothing acknowledged is lost, nothing invented; only a kill or a stop makes a duplicate."""
    crowd = Crowd(scratch / "queue", random.Random(7))
    try:
        crowd.run(seconds=7)
    finally:
        crowd.clear()
    queue = FemtoQueue(crowd.directory, "worker")
    while task := queue.pop():
        crowd.handle(queue, task)
    assert not any(queue.counts()[state] for state in STATES if state != "done")

    said: dict[str, list[list[str]]] = collections.defaultdict(list)
    got: dict[str, dict[int, int]] = collections.defaultdict(dict)  # name -> attempt -> PID
    finished: dict[str, int] = {}
    for kind, name, *rest in map(str.split, crowd.journal.read_text().splitlines()):
        said[kind].append([name, *rest])
        if kind == "got":
            attempt, pid = map(int, rest)
            assert attempt not in got[name], "one attempt was delivered twice"
            got[name][attempt] = pid
        elif kind == "done":
            assert name not in finished, "done twice"
            finished[name] = int(rest[0])
    tried, acknowledged = ({name for [name] in said[kind]} for kind in ("try", "acknowledged"))
    duplicated = {name for name, attempts in got.items() if len(attempts) > 1}
    figure(
        "many processes",
        processes=crowd.started,
        kills=crowd.kills,
        stops=crowd.stops,
        tasks_acknowledged=len(acknowledged),
        delivered=len(got),
        lost=len(acknowledged - {*got}),
        unexpected=len({*got} - tried),
        duplicated=len(duplicated),
        robbed_while_stopped=len(said["robbed"]),
    )
    assert acknowledged <= {*got}, "lost"
    assert {*got} <= tried, "unexpected"
    assert queue.counts()["done"] == len(got)
    for name, attempts in got.items():
        last = finished.get(name, max(attempts))
        assert last == max(attempts), f"{name} was delivered after it was done"
        for attempt in sorted(attempts)[:-1]:
            assert attempts[attempt] in crowd.disturbed, f"{name} was taken from an undisturbed worker"
    assert len(acknowledged) > 1_000 and duplicated and crowd.kills > 10 and crowd.stops > 10


# --- 1 to 3: a model --------------------------------------------------------------------------------


@dataclasses.dataclass
class Expected:
    """What the model knows of a task."""

    payload: bytes
    state: str
    used: int = 0  # deliveries
    place_us: int = 0  # in pending/
    due_us: int = 0
    owner: int | None = None  # which queue object's claim it is; None: an owner that is gone
    deadline_s: float = 0
    reason: str | None = None


VERDICT_CALLS = [
    *(("done",), ("done",), ("fail", None), ("fail", "why"), ("touch",), ("touch",)),
    *(("retry",), ("retry",), ("retry", 1), ("retry", 5_000), ("retry", 4_000_000)),
]


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
        self.directory = Path(
            tempfile.mkdtemp(prefix="femtoqueue-test-", dir=SHM if SHM.is_dir() else None)
        )
        self.queues: list[FemtoQueue | None] = [self.new_queue() for _ in range(self.COUNT)]
        self.tasks: dict[str, Expected] = {}
        self.claims: dict[str, list[FemtoTask]] = {}  # every delivery there ever was
        self.pushes: list[str] = []
        self.unsettled: set[str] = set()  # files put there by hand
        self.behind: set[int] = set()  # objects that may hold a listing without what came back since
        self.company = False  # may it look as if other processes were at work?
        self.offset_us = int(self.clock.wall * 1e6) - int(self.clock.boot * 1e6)
        self.last_us = 0  # not above the last stamp
        figure("model", runs=1)

    def teardown(self) -> None:
        try:
            self.drain()
        finally:
            self.queues.clear()
            self.patch.undo()
            shutil.rmtree(self.directory)

    def new_queue(self) -> FemtoQueue:
        return FemtoQueue(self.directory, "a", self.LEASE_S * 1_000)

    def queue(self, number: int) -> FemtoQueue:
        queue = self.queues[number]
        assert queue is not None
        return queue

    def queue_us(self) -> int:
        """The queue clock, which goes on as the clock since boot does."""
        return max(int(self.clock.boot * 1e6) + self.offset_us, self.last_us)

    def later_us(self, seconds: float) -> int:
        """A wall-clock time that no stamp of the queue clock can meet: those have full milliseconds."""
        return int((self.clock.wall + seconds) * 1e3) * 1_000 + 500

    def in_state(self, *states: str) -> list[str]:
        """The ids in these states, in their order."""

        def order(id: str) -> tuple[int, str]:
            task = self.tasks[id]
            return {"pending": task.place_us, "scheduled": task.due_us}.get(task.state, 0), id

        return sorted((id for id, task in self.tasks.items() if task.state in states), key=order)

    def make_pending(self, id: str, is_new: bool = False, by: int | None = None) -> None:
        """At the place of its id, or behind all others. The object that did it knows of it at once."""
        task = self.tasks[id]
        task.state = "pending"
        task.place_us = int(id[:16])
        if is_new or task.place_us > self.queue_us():
            task.place_us = self.last_us = self.queue_us() + 1
        self.behind |= {*range(self.COUNT)} - {by}

    def is_ahead(self, id: str) -> bool:
        return self.tasks[id].state == "pending" and self.tasks[id].place_us > self.queue_us()

    def learn_places(self, new: list[str], above_us: int, popped: str) -> None:
        """What is `new` in pending/, and a file put there with a stamp ahead, got a place behind all.

        Only the disk tells which: a file put there by hand gets one at this look or the next.
        """
        names = (path.name.split("~") for path in (self.directory / "pending").glob("*/*~*~*"))
        places = {id: int(place) for id, _, place in names if id in (*new, *self.unsettled)}
        assert all(place_us > above_us for place_us in places.values()), "not behind all others"
        if popped in new or (popped in self.unsettled and self.is_ahead(popped)):
            places[popped] = above_us  # it had one before it was claimed
        for group in (new, sorted(self.unsettled)):
            order = [id for id in sorted(places, key=places.__getitem__) if id in group]
            assert order == [id for id in group if id in places], "not first in, first out"
        for id, place_us in places.items():
            self.tasks[id].place_us = place_us
        self.last_us = max([self.last_us, *places.values()])
        self.unsettled -= {*places, popped}

    def comes_back(self, id: str) -> bool:
        """Does a pop that looks make this one pending?"""
        task = self.tasks[id]
        if task.state == "scheduled":
            return task.due_us <= int(self.clock.wall * 1e6)
        gone = task.owner is None or task.deadline_s < self.clock.boot
        return task.state == "in_progress" and gone

    def come_back(self, by: int) -> list[str]:
        """What is abandoned, in the order of the ids; then what is due. Those that get a new place."""
        back = [id for id in self.in_state("in_progress", "scheduled") if self.comes_back(id)]
        back.sort(key=lambda id: (self.tasks[id].due_us, id))
        for id in back:
            self.make_pending(id, self.tasks[id].state == "scheduled", by)
        return [id for id in back if self.tasks[id].place_us != int(id[:16])]

    @initialize(company=st.booleans())
    def begin(self, company: bool) -> None:
        self.company = company
        self.push(0, [10] * 6)
        self.pop([0, 1, 2, 0], at_once=True)

    numbers = st.integers(0, COUNT - 1)
    choice = st.randoms(use_true_random=False)

    @rule(number=numbers, sizes=st.lists(st.sampled_from([0, 10, 70_000]), min_size=1, max_size=4))
    def push(self, number: int, sizes: list[int]) -> None:
        for size in sizes:
            payload = b"%d " % len(self.tasks) + b"x" * size
            id = self.queue(number).push(payload)
            assert id not in self.tasks
            assert all(id > other for other in self.pushes[-1:]), "not in the order of the pushes"
            self.pushes.append(id)
            self.last_us = int(id[:16])
            self.tasks[id] = Expected(payload, "pending", place_us=self.last_us)

    @rule(seconds=st.sampled_from([-3_000, 2, 40, 90_000]))
    def put_by_hand(self, seconds: float) -> None:
        """A shell script pushes, by a clock of its own."""
        time_us = self.queue_us() // 1_000 * 1_000 + int(seconds * 1e6) + 500
        id, payload = f"{time_us}_script-{len(self.tasks)}", b"%d" % len(self.tasks)
        put(self.directory / "pending" / id, payload)
        self.tasks[id] = Expected(payload, "pending", place_us=time_us)
        self.unsettled.add(id)
        self.behind = {*range(self.COUNT)}

    @rule(number=numbers, delay_s=st.sampled_from([-5, 0, 0.5, 20, 20, 900, 90_000]))
    def schedule(self, number: int, delay_s: float) -> None:
        payload = b"%d" % len(self.tasks)
        due_us = self.later_us(delay_s)
        id = self.queue(number).schedule(payload, due_us)
        assert id not in self.tasks
        self.tasks[id] = Expected(payload, "scheduled", due_us=due_us)

    @rule(numbers=st.lists(numbers, min_size=1, max_size=4), at_once=st.booleans())
    def pop(self, numbers: list[int], at_once: bool) -> None:
        for number in numbers:
            self.pop_one(number, at_once)

    def pop_one(self, number: int, at_once: bool) -> FemtoTask | None:
        # In company, what is in hand from an earlier look is not taken in exact order.
        looks, new, above_us = self.company or number in self.behind, [], self.last_us
        if not at_once or looks or any(self.comes_back(id) or self.is_ahead(id) for id in self.tasks):
            self.clock.advance(1.1)  # from then on a pop looks for what is to come back
            self.behind.discard(number)
            new = self.come_back(by=number)
        task = self.queue(number).pop()
        self.learn_places(new, above_us, task.id if task else "")
        pending = self.in_state("pending")
        assert (task and task.id) == (pending[0] if pending else None), "not the oldest"
        if task:
            expected = self.tasks[task.id]
            expected.state = "in_progress"
            expected.used += 1
            expected.due_us = 0
            expected.owner = number
            expected.deadline_s = self.clock.boot + self.LEASE_S
            assert (task.data, task.attempt) == (expected.payload, expected.used)
            self.claims.setdefault(task.id, []).append(task)
            figure("model", deliveries=1)
        return task

    @staticmethod
    def mostly(choice: random.Random, wanted: list[str], others: Iterable[str]) -> str:
        return choice.choice(wanted if wanted and choice.random() < 0.7 else sorted(others))

    @precondition(lambda self: self.claims)
    @rule(choice=choice, calls=st.lists(st.sampled_from(VERDICT_CALLS), min_size=1, max_size=3))
    def finish(self, choice: random.Random, calls: list[tuple[Any, ...]]) -> None:
        """Call a queue with some delivery, whose claim is valid or not."""
        for name, *arguments in calls:
            held = [id for id in self.in_state("in_progress") if id in self.claims]
            id = self.mostly(choice, held, self.claims)
            claim, task = choice.choice(self.claims[id][-2:]), self.tasks[id]
            valid = task.state == "in_progress" and claim.attempt == task.used
            others = range(self.COUNT)
            number = (
                task.owner if task.owner in others and choice.random() < 0.7 else choice.choice(others)
            )
            # A retry that had the same effect may be one whose answer was lost.
            done = (name, task.state, task.used) == ("retry", "pending", claim.attempt)
            try:  # not pytest.raises, which keeps the error, and so the queue object alive
                getattr(self.queue(number), name)(claim, *arguments)
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
                self.make_pending(id, by=number)
            else:
                task.state = {"done": "done", "fail": "failed"}[name]
                task.reason = arguments[0] if arguments else None

    @precondition(lambda self: self.tasks)
    @rule(choice=choice, number=numbers)
    def cancel(self, choice: random.Random, number: int) -> None:
        id = self.mostly(choice, self.in_state("pending", "scheduled"), self.tasks)
        waiting = self.tasks[id].state in ("pending", "scheduled")
        assert self.queue(number).cancel(id) == waiting
        if waiting:
            self.tasks[id].state = "gone"

    @precondition(lambda self: self.tasks)
    @rule(choice=choice, number=numbers)
    def requeue(self, choice: random.Random, number: int) -> None:
        id = self.mostly(choice, self.in_state("done", "failed", "scheduled"), self.tasks)
        task = self.tasks[id]
        assert self.queue(number).requeue(id) == (task.state in ("done", "failed", "scheduled"))
        if task.state in ("done", "failed"):
            task.used, task.reason = 0, None
            self.claims.pop(id, None)  # its attempts are counted anew
            self.make_pending(id, by=number)
        elif task.state == "scheduled":
            self.make_pending(id, is_new=True, by=number)

    @rule(number=numbers, state=st.sampled_from([*STATES[:2], *STATES[3:]]))
    def purge(self, number: int, state: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda: 1e10)  # file times are not ours to patch
            found = self.in_state(state)
            assert self.queue(number).purge(state, 0) == len(found)
        for id in found:
            self.tasks[id].state = "gone"

    @rule(number=numbers, how=st.sampled_from(["dropped", "dropped", "killed", "closed", "elsewhere"]))
    def crash(self, number: int, how: str) -> None:
        holders = [task.owner for task in self.tasks.values() if task.state == "in_progress"]
        number = next((n for n in holders if n in range(self.COUNT)), number)  # one that holds a claim
        queue = self.queue(number)
        if how in ("killed", "elsewhere") and not self.company:
            how = "dropped"
        held = [id for id in self.in_state("in_progress") if self.tasks[id].owner == number]
        if how == "closed":
            queue.close()
        # As if it had been a process that is gone, or one on another machine.
        lost = held if how in ("killed", "elsewhere") else []
        for was in {Path(self.claims[id][-1].path).parent for id in lost}:
            node, pid, start, place, token = was.name.split("~")
            gone = f"{node}~{2**22 + 1}~{start}~{place}~{token}"
            was.rename(
                was.with_name(f"b~{pid}~{start}~elsewhere~{token}" if how == "elsewhere" else gone)
            )
        for id in held:
            self.tasks[id].owner = self.COUNT if how == "elsewhere" else None
            if how == "closed":
                self.make_pending(id)
            if how in ("killed", "elsewhere"):
                self.claims.pop(id)  # nobody is there who could finish it
        del queue
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
        queue = self.queue(len(self.tasks) % self.COUNT)
        counts = collections.Counter(task.state for task in self.tasks.values())
        assert queue.counts() == {state: counts[state] for state in STATES}
        for id, task in self.tasks.items():
            assert task.state == "gone" or queue.status(id) == task.state
            assert queue.reason(id) == (task.reason if task.state == "failed" else None)
        for state in STATES:
            assert list(queue.ids(state)) == self.in_state(state)
        figure("model", steps=1)

    def drain(self) -> None:
        """At the end everything that was not finished is delivered once more, in order."""
        self.clock.advance(10**6)
        while task := self.pop_one(0, at_once=False):
            self.queue(0).done(task)
            self.tasks[task.id].state = "done"
        assert not self.in_state("pending", "in_progress", "scheduled")
        assert all(self.queue(0).status(id) is None for id in self.in_state("gone"))


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# Neither who lost a claim nor who hung believes in it.


def taken_elsewhere(path: Path, finished: bool = False) -> str:
    """Another host claims this task, and perhaps finishes it: what becomes of it."""
    id, used, *_ = [*path.name.split("~"), "0"]
    root = next(above.parent for above in path.parents if above.name in STATES)
    target = root / "in_progress" / "b~1~1~elsewhere~0" / f"{id}~{int(used) + 1}~{NOW_US}"
    target.parent.mkdir(exist_ok=True)
    REAL["rename"](path, target)
    if finished:
        REAL["unlink"](target)
    return "gone" if finished else f"delivered {int(used) + 2}"


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "delete"])
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
    assert task.lost and look(directory) == {b"x": ["delivered 3"]}


@pytest.mark.parametrize("taken", [False, True], ids=["still there", "taken by another"])
def test_a_claim_whose_lease_is_over_is_not_handed_out(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """A claim that was granted while the process hung is renewed, or it is none."""
    queue, other = FemtoQueue(directory, "a", 30_000), FemtoQueue(directory, "b", 30_000)
    queue.push(b"x")
    held: list[FemtoTask | None] = []

    def slowly(source: str, target: str) -> None:
        REAL["rename"](source, target)
        if "in_progress/" in target and not held:
            clock.advance(40)
            held.append(None)
            held.extend([other.pop()] if taken else [])

    monkeypatch.setattr(os, "rename", slowly)
    task = queue.pop()
    assert (task is None) is taken
    assert other.pop() is None
    other.done(held[1]) if taken else queue.done(task)


# --- 3: first in, first out ---------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["retry", "requeue"])
@pytest.mark.parametrize("by", ["the same", "another"])
def test_what_comes_back_has_its_old_place(directory: Path, clock: Time, call: str, by: str) -> None:
    """It is the next task: at once of the object that put it back, within a second of every other."""
    queue, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "a")
    queue.push_many([b"0", b"1", b"2", b"3"])
    first, _ = queue.pop(), other.pop()  # from here on, what is left is in the hand of both
    if call == "requeue":
        queue.done(first)
        queue.requeue(first.id)
    else:
        queue.retry(first)
    if by == "another":
        clock.advance(1.1)
    assert (queue if by == "the same" else other).pop().id == first.id


def test_a_pop_that_raised_does_not_change_the_order(directory: Path, clock: Time) -> None:
    """Out of descriptors behind a claim, and then not any more: first in, first out."""
    queue = FemtoQueue(directory, "a", LONG_MS)
    queue.push_many([b"0", b"1", b"2"])
    claimed: list[str] = []

    def be_short(name: str, path: str, *rest: Any, **options: Any) -> Any:
        if claimed and name in ("open", "scandir"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        claimed.extend(rest[:1] if name == "rename" else ())
        return REAL[name](path, *rest, **options)

    with Steps(1, be_short, once=False), pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        queue.pop()
    assert drained(queue) == [b"0", b"1", b"2"]


def test_ids_raise_or_leave_nothing_out(queue: FemtoQueue, refuse: Refusal) -> None:
    """ids never reports a task absent that exists all the while, whatever cannot be listed."""
    ids = list(queue.ids("pending"))
    refuse("list", "/pending/", errno.EIO)
    with pytest.raises(OSError):
        list(queue.ids("pending"))
    refuse.rules.clear()
    assert list(queue.ids("pending")) == ids


# --- 4: a crash at any instruction --------------------------------------------------------------------


@durable_or_not
@each_case
def test_killed_before_every_filesystem_call(
    name: str, durable: bool, scratch: Path, clock: Time
) -> None:
    """A crash at any instruction loses nothing, breaks nothing, shows nothing twice, leaves nothing."""
    case = CASES[name]
    for at in itertools.count(1):
        directory = scratch / str(at)

        def work(at: int = at, directory: Path = directory) -> None:
            stage = Stage(case, directory, durable, clock)
            with Steps(at, kill_now):
                stage.act()

        status, error = in_child(work)
        returned = status == 0
        assert returned or os.WTERMSIG(status) == signal.SIGKILL, error
        check_source(name, directory, returned)
        if returned and name == "fail_with_a_reason":
            assert [path.read_text() for path in directory.glob("failed/*~reason")] == ["why"] * 2
        audit(directory, clock, case.allowed(returned))
        clear(directory)
        if returned:
            break
    assert at > 1
    figure("killed at every step", calls=1, kill_points=at - 1)


def test_what_a_live_writer_writes_is_not_swept(directory: Path, clock: Time) -> None:
    """A half-written file goes when its writer is dead, and only then."""
    queue = FemtoQueue(directory, "a")
    put(directory / "creating" / "of somebody else")

    def sweep_first(name: str, *paths: str, **options: Any) -> Any:
        if name == "rename" and "/creating/" in paths[0]:
            assert FemtoQueue(directory, "b").pop() is None
        return REAL[name](*paths, **options)

    with Steps(1, sweep_first, once=False):
        queue.push(b"x")
    assert names(directory, "creating") == ["of somebody else"]
    assert drained(queue) == [b"x"]


# --- 2 and 4: what a call reports when the answer to what it did is lost ------------------------------


class Lost:
    """Stands in for filesystem calls: the change number `at` is made, and answered with an error."""

    def __init__(self, at: int, answer: str, stage: Stage, other: str) -> None:
        self.at = at
        self.answer = answer
        self.directory = stage.directory
        self.other = other
        self.before = self.files()
        self.count = 0
        self.met = ""
        self.taken: dict[bytes, str] = {}  # by another host, and what becomes of it

    def files(self) -> set[Path]:
        found = [
            path
            for state in ("pending", "done", "failed")
            for path in self.directory.glob(f"{state}/**/*_*")
        ]
        return {path for path in found if path.is_file() and not path.name.endswith("~reason")}

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        result = REAL[name](*args, **kwargs)
        if name not in ("rename", "link", "unlink", "mkdir", "rmdir"):
            return result
        self.count += 1
        if self.count == self.at:
            self.met = name
            if self.other != "nobody":  # before the request is sent again
                for path in self.files() - self.before:
                    payload = path.read_bytes()
                    self.taken[payload] = taken_elsewhere(path, self.other == "finishes it")
            repeated = errno.EEXIST if name in ("mkdir", "link") else errno.ENOENT
            code = getattr(errno, self.answer, repeated)
            raise OSError(code, os.strerror(code), args[0])
        return result


@pytest.mark.parametrize("answer", ["as if repeated", "ESTALE", "ENOTCONN"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "run"])  # pop and done
@pytest.mark.usefixtures("unlogged")
def test_a_change_that_was_made_and_whose_answer_was_lost(
    name: str, answer: str, scratch: Path, clock: Time
) -> None:
    """A call reports what it did, whatever a network answered and whoever came in between.

    Another host may take, finish or purge what was just made pending, done or failed. What raises can
    be made again.
    """
    wrong = []
    for other in ("nobody", "takes it", "finishes it"):
        for at in itertools.count(1):
            stage = Stage(CASES[name], scratch / f"{other} {at}", at % 2 == 0, clock)
            lost = Lost(at, answer, stage, other)
            try:
                act_unanswered(name, stage, lost)
            except Exception as problem:
                what = f"{type(problem).__name__}: {problem}".partition("\n")[0]
                wrong.append(f"{lost.met} {at}, {other}: {what}")
            clear(stage.directory)
            if not lost.met:
                break
    assert not wrong, "\n".join(wrong)


def act_unanswered(name: str, stage: Stage, lost: Lost) -> None:
    """Make a case's call, again if it raised, and see what is reported and what is there."""
    error = ""  # not itself: with its traceback, it keeps the queue object alive
    try:
        with Steps(1, lost, once=False):
            stage.act()
    except NotInProgress:
        assert lost.taken or "another" in name, "NotInProgress"
    except OSError as raised:
        error = str(raised)
        stage.pushed = sum(item in lost.taken or item in look(stage.directory) for item in NEW)
    if error:
        # A disk may be broken, and a directory that another one made could be anything.
        assert lost.answer == "ENOTCONN" or lost.met == "mkdir", f"raised {error}"
        with contextlib.suppress(*[NotInProgress] * bool(lost.taken)):
            stage.act()
    assert lost.taken or all(stage.results) or name.startswith("cancel"), (
        "it said that there is nothing"
    )
    popped = stage.results[-1] if name.startswith("pop") else None
    allowed = stage.case.allowed(True, popped=popped, disordered=bool(popped) and lost.met == "rename")
    stage.drop()
    audit(stage.directory, stage.clock, allowed | {data: {fate} for data, fate in lost.taken.items()})


# --- 5: a power cut -----------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Node:
    """A file or directory on the simulated disk."""

    is_directory: bool = False
    content: bytes = b""
    # name -> node, and the operation that put it there
    entries: dict[str, tuple[Node, int]] = dataclasses.field(default_factory=dict)
    emptied_by: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Operation:
    """One change: `removed` from and `added` to directories, whole or not at all."""

    removed: tuple[Node, str] | None = None
    added: tuple[Node, str, Node] | None = None
    needs: tuple[int, ...] = ()  # what must have happened for this to be possible
    synced: Node | None = None
    written: tuple[Node, bytes] | None = None
    fates: tuple[bytes, frozenset[str]] | None = None


class Disk:
    """Records what a workload does to the filesystem below `base`, to replay it up to a power cut.

    Certain is what was fsynced: a file's content, a directory's entries. Any other change of a
    directory may have reached the disk or not, each for itself; a rename happens as a whole. What lies
    in a directory whose own entry is not there is lost with it.
    """

    def __init__(self, base: Path) -> None:
        self.base = str(base)
        self.root = Node(is_directory=True)
        self.log: list[Operation] = []
        self.open: dict[int, Node] = {}
        self.fails_at = ""  # one call on a path with this end

    def place(self, path: str) -> tuple[Node, str]:
        *folders, name = os.path.relpath(path, self.base).split("/")
        node = self.root
        for folder in folders:
            node = node.entries[folder][0]
        return node, name

    def fate(self, payload: bytes, *fates: str) -> None:
        """From here on, this is what may have become of a task after a power cut."""
        self.log.append(Operation(fates=(payload, frozenset(fates))))

    def note(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Stands in for a filesystem call: makes it, and if it worked, records it."""
        if self.fails_at and str(args[0]).endswith(self.fails_at):
            self.fails_at = ""
            raise OSError(errno.EIO, os.strerror(errno.EIO), args[0])
        existed = name == "open" and os.path.lexists(args[0])
        result = REAL[name](*args, **kwargs)
        if name == "open":
            self._open(result, existed, *args)
        elif record := getattr(self, f"_{name}", None):
            record(*args)
        return result

    def _change(
        self, removed: tuple[Node, str] | None = None, added: tuple[Node, str, Node] | None = None
    ) -> None:
        needs = []
        if removed:
            node, put_by = removed[0].entries.pop(removed[1])
            needs = [put_by, *node.emptied_by]
            removed[0].emptied_by.append(len(self.log))
        if added:
            if added[1] in added[0].entries:  # one entry of a directory has one history
                needs.append(added[0].entries[added[1]][1])
            added[0].entries[added[1]] = (added[2], len(self.log))
        self.log.append(Operation(removed, added, tuple(i for i in needs if i >= 0)))

    def _open(self, descriptor: int, existed: bool, path: str, *rest: object) -> None:
        if path == self.base:
            self.open[descriptor] = self.root
        elif path.startswith(self.base):
            folder, name = self.place(path)
            if not existed:
                self._change(added=(folder, name, Node()))
            self.open[descriptor] = folder.entries[name][0]

    def _write(self, descriptor: int, data: bytes) -> None:
        if node := self.open.get(descriptor):
            node.content += bytes(data)
            self.log.append(Operation(written=(node, node.content)))

    def _fsync(self, descriptor: int) -> None:
        if node := self.open.get(descriptor):  # a directory above `base` is certain already
            self.log.append(Operation(synced=node))

    def _close(self, descriptor: int) -> None:
        self.open.pop(descriptor, None)

    def _mkdir(self, path: str, *rest: object) -> None:
        self._change(added=(*self.place(path), Node(is_directory=True)))

    def _rename(self, source: str, target: str) -> None:
        removed = self.place(source)
        self._change(removed, (*self.place(target), removed[0].entries[removed[1]][0]))

    def _link(self, source: str, target: str) -> None:
        folder, name = self.place(source)
        self._change(added=(*self.place(target), folder.entries[name][0]))

    def _unlink(self, path: str) -> None:
        self._change(self.place(path))

    _rmdir = _unlink

    def uncertain(self, end: int) -> list[int]:
        """The changes among the first `end` operations that no fsync made certain."""
        synced: set[Node] = set()
        needed: set[int] = set()  # by something that is certain
        found = []
        for i in reversed(range(end)):
            operation = self.log[i]
            if operation.synced:
                synced.add(operation.synced)
            places = [place[0] for place in (operation.removed, operation.added) if place]
            if i in needed or synced.intersection(places):
                needed.update(operation.needs)
            elif places:
                found.append(i)
        return found

    def image(self, end: int, missing: set[int], torn: bool, half: bool) -> dict[str, bytes]:
        """The files on disk after `end` operations and a cut; those `missing` never got there.

        `torn`: what was written but not synced is not there either. `half`: as on btrfs, a file whose
        newest directory alone was synced after its renames has its old names too.
        """
        missing = set(missing)
        tree: dict[Node, dict[str, Node]] = collections.defaultdict(dict)
        synced_at: dict[Node, int] = {}
        synced: dict[Node, bytes] = {}
        written: dict[Node, bytes] = {}
        renames, last = [], {}
        for i, operation in enumerate(self.log[:end]):
            if missing.intersection(
                operation.needs
            ):  # what builds on something missing is missing, too
                missing.add(i)
            if operation.written:
                written[operation.written[0]] = operation.written[1]
            if operation.synced:
                synced_at[operation.synced] = i
                synced[operation.synced] = written.get(operation.synced, b"")
            if i in missing:
                continue
            if operation.removed:
                tree[operation.removed[0]].pop(operation.removed[1])
            if operation.added:
                tree[operation.added[0]][operation.added[1]] = operation.added[2]
            if operation.removed and operation.added:
                folder, name, node = operation.added
                renames.append((i, *operation.removed, node))
                last[node] = i, folder, name
        for i, old, old_name, node in renames if half else ():
            put_by, folder, name = last[node]  # perhaps it was renamed again since
            is_certain = put_by < synced_at.get(folder, -1) and tree[folder].get(name) is node
            if is_certain and synced_at.get(old, -1) < i:
                tree[old][old_name] = node
        found = {}
        todo = [("", self.root)]
        while todo:
            path, node = todo.pop()
            for name, child in tree[node].items():
                if child.is_directory:
                    todo.append((f"{path}{name}/", child))
                else:
                    found[path + name] = (synced if torn else written).get(child, b"")
        return found


class PowerCutWorkload:
    """Does everything that a durable queue can do, and says to `disk` what it was promised."""

    def __init__(self, disk: Disk, directory: Path, clock: Time) -> None:
        self.disk = disk
        self.directory = directory
        self.clock = clock
        self.ids: dict[bytes, str] = {}
        self.numbers = itertools.count()
        disk.fails_at = "/pending"
        with pytest.raises(OSError):
            self.open()  # and what this one made, the next one makes durable
        self.queue = self.open()
        self.run()

    def open(self) -> FemtoQueue:
        return FemtoQueue(self.directory, "a", LONG_MS, sync_after_write=True)

    def promise(self, payload: bytes, before: str, after: str, call: Callable[[], Any]) -> Any:
        """Make a call; when it has returned, nothing but `after` is possible."""
        self.disk.fate(payload, before, after)
        result = call()
        self.disk.fate(payload, after)
        return result

    def payload(self) -> bytes:
        return b"task %d" % next(self.numbers)

    def add(self, call: Callable[..., str], *arguments: object) -> bytes:
        payload = self.payload()
        self.ids[payload] = self.promise(payload, "gone", "live", lambda: call(payload, *arguments))
        return payload

    def push(self, count: int = 1) -> None:
        for _ in range(count):
            self.add(self.queue.push)

    def push_many(self, count: int) -> None:
        payloads = [self.payload() for _ in range(count)]
        for payload in payloads:
            self.disk.fate(payload, "gone", "live")
        self.ids.update(zip(payloads, self.queue.push_many(payloads), strict=True))
        for payload in payloads:
            self.disk.fate(payload, "live")

    def write_source(self, *synced: str) -> tuple[bytes, str]:
        """Make a file in `base`, of which only `synced` is certain to be on disk."""
        payload, source = self.payload(), self.disk.base + "/source"
        self.disk.fate(payload, "gone", "source")
        descriptor = os.open(source, os.O_WRONLY | os.O_CREAT, 0o666)
        os.write(descriptor, payload)
        os.close(descriptor)
        self.sync(*synced)
        return payload, source

    def sync(self, *paths: str) -> None:
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def put_by_hand(self, ahead_s: float = 0) -> None:
        """Somebody moves a file into pending/."""
        base = self.disk.base
        payload, source = self.write_source(base + "/source", base)
        self.disk.fate(payload, "source", "live")
        self.ids[payload] = "%016d_%d" % ((self.clock.wall + ahead_s) * 1e6, next(self.numbers))
        os.rename(source, f"{self.directory}/pending/{self.ids[payload]}")
        self.sync(f"{self.directory}/pending", base)
        self.disk.fate(payload, "live")

    def push_file(self, move: bool) -> None:
        """One that nobody has synced."""
        payload, source = self.write_source()
        after = ["live"] if move else ["live", "both"]
        self.disk.fate(payload, "gone", "source", *after)
        with contextlib.nullcontext(source) if move else open(source, "rb") as file:
            self.ids[payload] = self.queue.push_file(file, move=move)
        self.disk.fate(payload, *after)
        if not move:
            os.unlink(source)
            self.sync(self.disk.base)
            self.disk.fate(payload, "live")

    def pop(self) -> FemtoTask:
        task = self.queue.pop()
        assert task is not None
        return task

    def done(self, task: FemtoTask) -> None:
        self.promise(task.data, "live", "done", lambda: self.queue.done(task))

    def retry(self, task: FemtoTask, delay_ms: int = 0) -> None:
        self.promise(task.data, "live, perhaps twice", "live", lambda: self.queue.retry(task, delay_ms))

    def work(self, count: int) -> None:
        for _ in range(count):
            self.done(self.pop())

    def run(self) -> None:
        queue = self.queue
        self.disk.fate(b"layout", "layout")
        self.push()
        self.disk.fate(b"clock", "clock")  # chosen at the first stamp
        self.push(10)
        self.work(2)
        now_us = int(self.clock.wall * 1e6)
        later = [
            self.add(queue.schedule, now_us + in_s * 10**6) for in_s in (60, 60, 3_600, 7_200, 9_000)
        ]
        self.push_many(7)
        for move in (True, False, True):
            self.push_file(move)
        self.put_by_hand()
        self.put_by_hand(ahead_s=1_000)
        failed = self.pop()
        self.promise(failed.data, "live", "failed", lambda: queue.fail(failed, "why"))
        self.retry(self.pop())
        self.retry(self.pop(), 30_000)
        held, *others = [self.pop() for _ in range(8)]  # out of several buckets
        queue.touch(held)
        for task in others[::-2] + others[1::2]:
            self.done(task)
        self.clock.advance(31)
        self.work(1)
        self.clock.advance(31)  # two fell due
        self.work(3)
        self.promise(failed.data, "failed", "live", lambda: queue.requeue(failed.id))
        self.promise(later[2], "live", "gone", lambda: queue.cancel(self.ids[later[2]]))
        self.promise(later[3], "live", "live", lambda: queue.requeue(self.ids[later[3]]))
        self.clock.step_wall(9_000)
        while (task := self.pop()).id != self.ids[later[4]]:
            self.done(task)
        self.retry(task)  # at a new place: its id is ahead of the queue clock
        self.push(3)
        victim = next(queue.ids("pending"))
        payload = next(data for data, id in self.ids.items() if id == victim)
        self.promise(payload, "live", "gone", lambda: queue.cancel(victim))
        self.done(held)
        other, moved = self.open(), pickle.loads(pickle.dumps(self.pop()))
        self.promise(moved.data, "live", "done", lambda: other.done(moved))
        held = self.pop()
        self.push()  # with which the claim is certain, too
        self.queue = queue = self.open()  # what the first one held is taken back
        self.work(2)
        self.clock.advance(2_000)
        while task := queue.pop():
            self.done(task)
        for _ in range(3):
            self.clock.advance(10)
            assert queue.pop() is None  # buckets are removed, and its own directory
        self.push(2)
        self.promise(held.data, "done", "live", lambda: queue.requeue(held.id))
        held = self.pop()
        self.clock.wall = max(5e9, self.clock.wall)  # file times are not ours to patch
        waiting = [data for data, id in self.ids.items() if queue.status(id) == "pending"]
        for payload in waiting:
            self.disk.fate(payload, "live", "gone")
        assert queue.purge("pending", 0) == len(waiting) > 1
        for payload in waiting:
            self.disk.fate(payload, "gone")
        self.promise(held.data, "live, perhaps twice", "live", queue.close)


def check_image(
    image: dict[str, bytes], fates: dict[bytes, frozenset[str]], queue: str, half: bool
) -> None:
    """Each task is whole, and where it may be; if a call did not return, perhaps at both places."""
    live = dict.fromkeys(("pending", "scheduled", "in_progress"), "live")
    found: dict[bytes, list[str]] = {}
    for path, content in image.items():
        state = path.removeprefix(queue).split("/")[0].split("-")[0]
        if state in ("clock", "layout"):
            assert content.endswith(b"\n"), f"{path} is broken"
            found[state.encode()] = [state]
        elif state != "creating" and not path.endswith("~reason") and (state != "source" or content):
            assert content in fates, f"{path} holds {content!r}"
            found.setdefault(content, []).append(live.get(state, state))
    for payload, possible in fates.items():
        places = found.get(payload, ["gone"])
        if "both" in possible and {*places} == {"live", "source"}:
            places = ["both"]
        assert {*places} <= possible, f"{payload!r} is {places}, not {set(possible)}"
        # With half renames it may be at both, before the call that renames it has returned.
        twice = half and "live, perhaps twice" in possible
        assert twice or len({*places}) == len(places), f"{payload!r} is visible twice: {places}"
        assert half or len(places) == 1, f"{payload!r} is at both places: {places}"


def reopen_image(
    image: dict[str, bytes], fates: dict[bytes, frozenset[str]], queue: str, place: Path, clock: Time
) -> None:
    """Put an image of the disk on a disk, and work on it."""
    for path, content in image.items():
        put(place / path, content)
    clock.advance(10**6)
    delivered = drained(FemtoQueue(place / queue, "a", LONG_MS, keep_done=False))
    for payload, possible in fates.items():
        if possible == {"live"}:
            count = delivered.count(payload)
            assert count == 1, f"{payload!r} is delivered {count} times"
        assert {"live", "both"} & possible or payload not in delivered, (
            f"{payload!r} is delivered again"
        )
    shutil.rmtree(place)


@pytest.mark.parametrize("half", [False, True], ids=["whole renames", "half renames"])
def test_power_cut_after_every_operation(
    half: bool, scratch: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sync_after_write, what returned survives a power cut at any point, `done` included."""
    monkeypatch.setattr(femtoqueue, "_BUCKET_TASKS", 5)
    disk = Disk(scratch)
    queue = "nested/twice/"
    with Steps(1, disk.note, once=False):
        PowerCutWorkload(disk, scratch / queue, clock)
    chance = random.Random(5)
    fates: dict[bytes, frozenset[str]] = {}
    problems: dict[str, int] = {}  # and after which operation it was first seen
    images = reopened = 0
    for end in range(len(disk.log) + 1):
        uncertain = disk.uncertain(end)
        choices = [set(uncertain), set(), {i for i in uncertain if chance.random() < 0.5}]
        if uncertain:
            one = chance.choice(uncertain)
            choices += [{one}, {*uncertain} - {one}]
        for missing in choices:
            images += 1
            image = disk.image(end, missing, images % 2 == 0, half)
            try:
                check_image(image, fates, queue, half)
                if images % 20 == 0:
                    reopen_image(image, fates, queue, scratch / f"cut {images}", clock)
                    reopened += 1
            except AssertionError as problem:
                problems.setdefault(str(problem).partition("\n")[0], end)
        if end < len(disk.log) and (fate := disk.log[end].fates):
            fates[fate[0]] = fate[1]
    assert not problems, "\n".join(f"after operation {end}: {what}" for what, end in problems.items())
    figure("power cuts", operations=len(disk.log), images=images, of_which_reopened=reopened)


def test_a_directory_made_again_is_synced_before_other_threads_claim(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread of a durable worker claims into its directory while another one is yet to sync it."""
    queue = FemtoQueue(directory, "a", sync_after_write=True)
    queue.push(b"0")
    queue.done(queue.pop())
    for _ in range(3):
        clock.advance(10)
        assert queue.pop() is None  # and its directory is removed
    queue.push_many([b"1", b"2"])
    with synced_slowly(queue, "/in_progress", monkeypatch) as events:
        assert queue.pop()
    assert events == ["synced", "returned"]


@pytest.mark.parametrize("call", ["pop", "done"])
def test_what_could_not_be_synced_is_synced_later(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, unlogged: None, call: str
) -> None:
    """A task's way back whose fsync failed is synced by the next call that works: pop, or any done."""
    queue = FemtoQueue(directory, "a", sync_after_write=True)
    other = FemtoQueue(directory, "b", 1_000, sync_after_write=True)
    other.push_many([b"1", b"2"])
    lost, held = other.pop(), queue.pop()
    clock.advance(2.1)
    abandoned = os.path.dirname(lost.path)
    fails, synced = [True], []

    def sync(descriptor: int) -> None:
        if (path := synced_path(descriptor)) == abandoned and fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        synced.append(path)
        REAL["fsync"](descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match=re.escape(abandoned)):
        queue.pop()
    assert queue.status(lost.id) == "pending"
    fails.clear()
    synced.clear()
    clock.advance(1.1)
    queue.done(held) if call == "done" else queue.pop()
    assert abandoned in synced


# --- 6: a payload that does not match its checksum ----------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 20) + 1])
def test_broken_payload(directory: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    """A payload that does not match its checksum goes to corrupt/ and the log; the queue goes on."""
    queue = FemtoQueue(directory, "a")
    id = queue.push(b"x" * size)
    put(directory / "pending" / where(directory, "pending"), b"y" + b"x" * (size - 1))
    queue.push(b"next")
    with caplog.at_level(logging.WARNING, "femtoqueue"):
        assert drained(queue) == [b"next"]
    assert id in caplog.text
    assert queue.status(id) == "corrupt" and names(directory, "corrupt") == [id]


# --- 7: a call that raises ----------------------------------------------------------------------------

ERRORS = ("ENOSPC", "EIO", "EMFILE", "EACCES", "EROFS", "ESTALE", "EINTR")
# What each call can answer; the rest answers all of ERRORS.
ERRORS_OF = {
    **dict.fromkeys(("stat", "lstat"), ("EIO", "EACCES", "ESTALE")),
    **dict.fromkeys(("read", "fstat"), ("EIO", "ESTALE")),
    **dict.fromkeys(("lseek", "posix_fadvise"), ("EIO",)),
    "write": ("ENOSPC", "EIO", "ESTALE"),
    "close": ("EIO", "ENOSPC"),
    "fsync": ("EIO", "ENOSPC", "EROFS", "ESTALE"),
    "scandir": ("EIO", "EMFILE", "EACCES", "ESTALE", "EINTR"),
}
LOSABLE = ("rename", "link", "unlink", "fsync", "mkdir", "write", "scandir")


class HalfListing:
    """A directory listing that breaks off."""

    def __init__(self, directory: str, code: int) -> None:
        self.entries = REAL["scandir"](directory)
        self.error = (code, os.strerror(code), directory)

    def __enter__(self) -> Iterator[os.DirEntry[str]]:
        yield from itertools.islice(self.entries, 1)
        raise OSError(*self.error)

    def __exit__(self, *exception: object) -> None:
        self.entries.close()


def fail_with(code: int, performed: bool, name: str, *args: Any, **kwargs: Any) -> Any:
    """Raise OSError instead of a call, or `performed`: although the call was made, perhaps in part."""
    if name == "close":
        REAL["close"](*args)  # the descriptor is gone, whatever it answers
    elif performed and name == "write":
        REAL["write"](args[0], args[1][: len(args[1]) // 2])
    elif performed and name == "scandir":
        return HalfListing(args[0], code)
    elif performed and name in LOSABLE:
        REAL[name](*args, **kwargs)
    # As the system does: of a descriptor it names no path. In no variable: with its traceback, that
    # would be a cycle that keeps the queue object alive.
    other = (None, args[1]) if name in ("rename", "link") else ()
    path = None if isinstance(args[0], int) else os.fspath(args[0])
    raise OSError(code, os.strerror(code), path, *other)


def check_at_once(stage: Stage, allowed: dict[bytes, set[str]], error: bool) -> None:
    """What is there right after a call: each task whole, once, and where it may be."""
    there = look(stage.directory)
    stage.pushed = sum(item in there for item in NEW)
    assert all(item in there for item in NEW[: stage.pushed]), "not the first ones of push_many"
    assert not (error and stage.durable and stage.pushed), "a durable push_many that raised is undone"
    for payload, states in there.items():
        assert len(states) == 1, f"{payload!r} is visible {len(states)} times: {states}"
        assert states[0] in allowed.get(payload, ()), (
            f"{payload!r} is {states[0]}: {allowed.get(payload)}"
        )


def run_with_fault(stage: Stage, case: Case, name: str, steps: Steps, step: str, code: str) -> None:
    """Make a case's call with a fault, and if it raised once more without."""
    descriptors = len(os.listdir("/proc/self/fd"))
    path: str | None = None
    error = False
    with steps:
        try:
            stage.act()
        except OSError as raised:
            error, path = True, raised.filename
    assert steps.met == step, f"it took other steps, {steps.met}"
    if error and step != "close":
        assert path and os.path.isabs(path), f"an error that tells no path, but {path}"
    popped = stage.results[-1] if name.startswith("pop") and not error else None
    # Of a claim that is answered ESTALE, only a later look can tell whether it was made.
    disordered = popped is not None and (step, code) == ("rename", "ESTALE")
    if case.world:
        allowed = case.allowed(not error, error and case.undone, popped, disordered)
        check_at_once(stage, allowed, error)
    if error:
        check_source(name, stage.directory, returned=False, error=True)
    if error and (stage.source.exists() or not name.startswith("push_file")):
        stage.act()
    assert len(os.listdir("/proc/self/fd")) == descriptors, "a file was left open"
    if not error or (step == "fsync" and not name.startswith("cancel")):
        assert all(stage.results), "it said that there is nothing"
    stage.drop()
    audit(stage.directory, stage.clock, case.allowed(True, popped=popped, disordered=disordered))


def steps_of(case: Case, directory: Path, durable: bool, clock: Time) -> list[str]:
    """The names of the filesystem calls that a case makes when all goes well."""
    stage = Stage(case, directory, durable, clock)
    names = calls_of(stage.act)
    clear(directory)
    return names


@durable_or_not
@each_case
@pytest.mark.usefixtures("unlogged")
def test_failing_at_every_filesystem_call(name: str, durable: bool, scratch: Path, clock: Time) -> None:
    """A call raises OSError, with a path, or succeeds, never in between; made again, it works."""
    case = CASES[name]
    failures = []
    count = 0
    for at, step in enumerate(steps_of(case, scratch / "plain", durable, clock), 1):
        errors = ERRORS_OF.get(step, ERRORS)
        if durable:  # what differs from the above is where it fails, not how
            errors = tuple({"EIO", "ESTALE", errors[at % len(errors)]} & {*errors})
        for error in errors:
            for performed in (False, True)[: 1 + (step in LOSABLE)]:
                directory = scratch / str(count)
                meet = functools.partial(fail_with, getattr(errno, error), performed)
                doubtful = name.startswith("cancel") or "another" in name
                if doubtful and performed and step in ("rename", "unlink") and error == "ESTALE":
                    continue  # that another process was quicker looks just the same
                try:
                    stage = Stage(case, directory, durable, clock)
                    run_with_fault(stage, case, name, Steps(at, meet), step, error)
                except Exception as problem:
                    how = "after" if performed else "instead of"
                    what = f"{type(problem).__name__}: {problem}".partition("\n")[0]
                    failures.append(f"{error} {how} call {at}, {step}: {what}")
                clear(directory)
                count += 1
    assert not failures, "\n".join([f"{len(failures)} of {count} faults:", *failures])
    figure("failing at every step", calls=1, faults=count)


@durable_or_not
@each_case
@pytest.mark.usefixtures("unlogged")
def test_failing_from_a_filesystem_call_on(
    name: str, durable: bool, scratch: Path, clock: Time
) -> None:
    """A disk that stays broken from the middle of a call on, and is repaired: nothing is lost."""
    case = CASES[name]
    adds = "gone" in case.before().values()
    count = len(steps_of(case, scratch / "plain", durable, clock))
    for at in range(1, count + 1):
        stage = Stage(case, scratch / str(at), durable, clock)
        error = False
        with Steps(at, functools.partial(fail_with, errno.EIO, False), once=False):
            try:
                stage.act()
            except OSError:
                error = True
        if error and not adds:  # made again, what could not be withdrawn would be there twice
            stage.act()
        stage.drop()
        allowed = case.allowed(not (error and adds), disordered=name.startswith("pop"))
        audit(stage.directory, clock, allowed)
        clear(stage.directory)
    figure("failing from some step on", calls=1, faults=count)


# What each call does to a task that was claimed: the state that it is in afterwards.
AWAY: dict[str, tuple[Callable[[FemtoQueue, FemtoTask], object], str]] = {
    "push": (lambda q, task: q.push(b"y"), "in_progress"),
    "push_many": (lambda q, task: q.push_many([b"y"]), "in_progress"),
    "schedule": (lambda q, task: q.schedule(b"y", 10**15), "in_progress"),
    "pop": (lambda q, task: q.pop(), "in_progress"),
    "done": (lambda q, task: q.done(task), "done"),
    "fail": (lambda q, task: q.fail(task, "why"), "failed"),
    "retry": (lambda q, task: q.retry(task), "pending"),
    "retry later": (lambda q, task: q.retry(task, 10_000), "scheduled"),
    "touch": (lambda q, task: q.touch(task), "in_progress"),
    "status": (lambda q, task: q.status(task.id), "in_progress"),
    "counts": (lambda q, task: q.counts(), "in_progress"),
    "requeue": (lambda q, task: q.requeue(task.id), "in_progress"),
    "cancel": (lambda q, task: q.cancel(task.id), "in_progress"),
    "purge": (lambda q, task: q.purge("done", 0), "in_progress"),
}


@pytest.mark.parametrize("mounted", [False, True], ids=["gone", "an empty directory"])
@pytest.mark.parametrize("call", AWAY)
def test_while_the_directory_is_away(tmp_path: Path, call: str, mounted: bool) -> None:
    """data_dir renamed or unmounted: OSError, nothing is made, a claim is neither finished nor lost."""
    make, state = AWAY[call]
    for durable, keep in itertools.product((False, True), repeat=2):
        directory = tmp_path / f"{durable}-{keep}"
        q = FemtoQueue(directory, "node", 30_000, durable, keep_done=keep, keep_failed=keep)
        q.push(b"x")
        task = q.pop()
        elsewhere = directory.rename(directory.with_name("elsewhere"))
        if mounted:
            directory.mkdir()
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                make(q, task)
            assert caught.value.filename.startswith(str(directory))
        assert directory.exists() is mounted and not (mounted and os.listdir(directory))
        if mounted:
            directory.rmdir()
        elsewhere.rename(directory)
        assert q.status(task.id) == "in_progress" and not task.lost
        make(q, task)
        assert q.status(task.id) == (state if keep or state not in ("done", "failed") else None)
        if state == "in_progress":
            q.done(task)
        else:
            with pytest.raises(NotInProgress):
                q.done(task)


@pytest.mark.parametrize("call", ["push", "push_many", "schedule", "push_file"])
def test_a_push_whose_file_was_deleted(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Somebody empties creating/ during a push: it raises FileNotFoundError, and there is no task."""
    queue = FemtoQueue(directory, "a", sync_after_write=call == "push_many")
    what: Any = {"push_many": [b"x"], "push_file": put(tmp_path / "file")}.get(call, b"x")

    def too_late(source: str, target: str) -> None:
        Path(source).unlink(missing_ok=True)
        REAL["rename"](source, target)

    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError) as caught:
        patch.setattr(os, "rename", too_late)
        getattr(queue, call)(what, *[10**15][: call == "schedule"])
    assert caught.value.filename.startswith(f"{directory}/creating/")
    assert not any(queue.counts().values())


def put_stuck(queue: FemtoQueue, place: str, clock: Time) -> str:
    """Add the task b"stuck"; return the part of its path that tells it, or where it lies."""
    if place == "due":
        id = queue.schedule(b"stuck", int(clock.wall * 1e6) + 1_000_000)
    else:
        id = queue.push(b"stuck")
    if place in ("claim", "owner"):
        other = FemtoQueue(queue.data_dir, "other")
        assert other.pop()
        del other  # its claim is abandoned
    clock.advance(2_000)  # whatever comes now is in another bucket
    [path] = Path(queue.data_dir).rglob(f"{id}*")
    return path.parent.name if place in ("bucket", "owner") else id


@pytest.mark.parametrize(
    ("place", "what", "code"),
    [
        *(("pending", "move", errno.EACCES), ("pending", "move", errno.EPERM)),
        *(("pending", "open", errno.EACCES), ("pending", "open", errno.EIO)),
        *(("bucket", "list", errno.EACCES), ("owner", "list", errno.EACCES)),
        *(("due", "move", errno.EACCES), ("claim", "move", errno.EACCES)),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value,
)
def test_a_task_that_cannot_be_had_holds_up_no_other(
    directory: Path, clock: Time, refuse: Refusal, caplog: Any, place: str, what: str, code: int
) -> None:
    """What may not be read or moved is logged and stays; pop and run go on, and raise at the end."""
    queue = FemtoQueue(directory, "a")
    part = put_stuck(queue, place, clock)
    [path] = [path for path in directory.rglob("*_*") if path.is_file()]
    queue.push_many([b"4", b"5"])
    refuse(what, part, code)
    assert drained_one(queue) == b"4" and drained_one(FemtoQueue(directory, "b")) == b"5"
    assert part in caplog.text and {record.name for record in caplog.records} == {"femtoqueue"}
    handled: list[bytes] = []

    def handle(task: FemtoTask) -> None:
        handled.append(task.data)
        if task.data != b"0":
            queue.push(b"%d" % (int(task.data) - 1))

    queue.push(b"3")
    for call in (
        lambda: queue.run(handle, until_empty=True),
        queue.pop,
        FemtoQueue(directory, "b").pop,
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert (caught.value.errno, part in caught.value.filename) == (code, True)
        assert path.read_bytes() == b"stuck" and handled == [b"3", b"2", b"1", b"0"]
    refuse.rules.clear()
    with pytest.MonkeyPatch.context() as patch:  # repaired, it is found even among passing faults
        failed = fail_once(patch, "scandir", "pending")
        task = queue.pop()
    assert failed and task and task.data == b"stuck"
    assert task.attempt == (2 if place in ("claim", "owner") else 1)


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str, part: str, times: int = 1) -> list[str]:
    """Let the next os.<name> of a path with `part` in it raise EIO; the list tells when it did."""
    real = getattr(os, name)
    failed: list[str] = []

    def call(path: str, *rest: Any) -> Any:
        if part in path and len(failed) < times:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path, *rest)

    monkeypatch.setattr(os, name, call)
    return failed


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("name", ["open", "rename", "scandir"])
def test_a_passing_fault_changes_nothing(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, caplog: Any, name: str, at: int
) -> None:
    """What fails once is had at the second try, within the same pop: in order, and no word is said."""
    queue = FemtoQueue(directory, "a")
    ids = []
    for payload in (b"1", b"2", b"3"):
        ids.append(queue.push(payload))
        clock.advance(2_000)  # each in a bucket of its own
    tasks = [queue.pop() for _ in range(at)]
    failed = fail_once(monkeypatch, name, f"/pending/{ids[at][:7]}" if name == "scandir" else ids[at])
    tasks += [queue.pop() for _ in range(3 - at)]
    assert failed and caplog.messages == []
    assert [task and (task.id, task.attempt) for task in tasks] == [(id, 1) for id in ids]


@pytest.mark.parametrize("how", ["waiting", "waiting shortly", "polling", "started again"])
@pytest.mark.parametrize("state", ["in_progress", "scheduled"])
def test_very_many_that_cannot_be_moved_hold_up_no_other(
    directory: Path, clock: Time, refuse: Refusal, monkeypatch: pytest.MonkeyPatch, state: str, how: str
) -> None:
    """More abandoned or due tasks than one look moves, that stay where they are, starve none."""
    monkeypatch.setattr(femtoqueue, "_BATCH", 5)
    queue = FemtoQueue(directory, "a")
    for number in range(18):
        good = number == 17
        folder = f"{1_700_000_000_000_000 + good:016d}"
        if state == "in_progress":
            folder = DEAD_OWNER + "good" * good
        name = f"17000000000000{number:02d}_x~1~17000000000001{number:02d}"
        put(directory / state / folder / name, b"%d" % number)
    stuck = DEAD_OWNER if state == "in_progress" else "scheduled/1700000000000000"
    refuse("move", f"/{stuck}/", errno.EACCES)
    task = None
    for _ in range(50):
        with contextlib.suppress(PermissionError):  # and made again, it gets further
            task = queue.pop({"waiting": 1.2, "waiting shortly": 0.3}.get(how, 0))
            break
        clock.advance(0.1 if how in ("polling", "waiting shortly") else 1.2)
        if how == "started again":
            queue = FemtoQueue(directory, "a")
    assert task and task.data == b"17"


def test_what_cannot_be_had_is_logged_once_a_minute(
    directory: Path, clock: Time, refuse: Refusal, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be had costs a line a minute, not one at each pop; a minute later it has its turn."""
    queue = FemtoQueue(directory, "a")
    put_stuck(queue, "owner", clock)
    [hidden] = os.listdir(directory / "in_progress")
    bucket = put_stuck(queue, "bucket", clock)
    stuck = queue.push(b"stuck")
    refuse("list", hidden, errno.EACCES)
    refuse("list", bucket, errno.EACCES)
    refuse("open", stuck, errno.EACCES)
    for minute in range(1, 5):
        if minute == 4:
            refuse.rules.clear()
        found, begun_s = [], clock.boot
        while clock.boot < begun_s + 60.5 + 5 * (minute == 4):
            queue.push(b"other")
            found.append(drained_one(queue))
            clock.advance(0.6)
        for name in (hidden, bucket, stuck):
            told = sum(name in record.getMessage() for record in caplog.records)
            assert min(3, minute) <= told <= minute + 1
        assert found.count(b"stuck") == 3 * (minute == 4)
    assert len(caplog.records) <= 12


@pytest.mark.parametrize("place", ["pending", "due", "claim"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_fault_of_the_whole_filesystem_is_no_tasks_fault(
    directory: Path, clock: Time, refuse: Refusal, place: str, code: int
) -> None:
    """A full or read-only disk costs a pop a few calls, whatever waits; then, order is exact."""
    queue = FemtoQueue(directory, "a")
    folder = {"pending": "pending/1700000000000000", "due": "scheduled/1700000000000000"}.get(
        place, f"in_progress/{DEAD_OWNER}"
    )
    ids = [f"17000000000000{number:02d}_x" for number in range(50)]
    for id in ids:
        put(directory / folder / (id if place == "pending" else f"{id}~0~{id[:16]}"), id.encode())
    refuse("move", folder, code)
    for _ in range(3):
        before = refuse.count
        with pytest.raises(OSError) as caught:
            queue.pop()
        assert caught.value.errno == code and refuse.count - before < 15
    refuse.rules.clear()
    assert drained(queue) == [id.encode() for id in ids]


def test_a_worker_that_stays_outlives_what_cannot_be_had(
    directory: Path, clock: Time, refuse: Refusal, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """`run` stays beside a task that it may not read, and says so once a minute; not for an alarm."""
    queue, producer = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    stuck = queue.push(b"stuck")
    refuse("open", stuck, errno.EACCES)
    begun_s, handled = clock.boot, []

    def sleep(seconds: float) -> None:
        clock.advance(seconds)
        if handled:
            raise TimeoutError  # as from a signal handler: no error of the filesystem
        if clock.boot > begun_s + 90 and len([*producer.ids("pending")]) == 1:
            producer.push(b"good")

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(TimeoutError):
        queue.run(lambda task: handled.append(task.data))
    assert handled == [b"good"]
    told = [message for message in caplog.messages if "the worker stays:" in message]
    assert len(told) in (2, 3) and all(stuck in message for message in told)


def test_without_descriptors_for_the_log(directory: Path) -> None:
    """A worker that can open no file, not even to import what logs, stays, and goes on when it can."""
    code = """
import resource, signal, threading
q = FemtoQueue(sys.argv[1], "node")
q.push_many([b"1", b"2"])
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
real, naps = time.sleep, []
def sleep(seconds):
    naps.append(seconds)
    if len(naps) == 20:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    real(seconds / 10)
time.sleep = sleep
def handle(task):
    if task.data == b"2":
        return q.stop()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
assert "logging" not in sys.modules
print(q.run(handle), len(naps) >= 20)
"""
    assert run(code, directory) == "2 True\n"


@pytest.mark.parametrize("place", ["due", "claim", "later", "broken"])
def test_a_full_disk_stops_no_task_that_needs_no_room(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """When no directory can be made any more, tasks that need none are delivered all the same."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"0")
    assert drained_one(queue) == b"0"
    if place == "broken":
        put(directory / "pending" / OLD_ID, b"not its payload")
        (directory / "corrupt").rmdir()
    else:
        bucket = directory / "scheduled" / f"{NOW_US - 10**9:016d}"
        folder = directory / "in_progress" / DEAD_OWNER if place == "claim" else bucket
        put(folder / f"{NOW_US - HOUR_US}_stuck~1~{NOW_US + (10**8 if place == 'later' else -1)}")
    queue.push_many([b"1", b"2", b"3", b"4"])
    clock.advance(1.5)
    refused: list[str] = []

    def mkdir(path: str, *mode: int) -> None:
        if os.path.isdir(path):
            raise FileExistsError(errno.EEXIST, "there", path)
        refused.append(path)
        raise OSError(errno.ENOSPC, "full", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", mkdir)
        found = [drained_one(queue) for _ in range(2)]
        before = len(refused)
        found += [drained_one(queue) for _ in range(2)]
        assert found == [b"1", b"2", b"3", b"4"]
        assert len(refused) == before, "what cannot be had is tried again at each pop"
    clock.advance(200)
    if place == "broken":
        assert queue.pop() is None and names(directory, "corrupt") == [OLD_ID]
    else:
        assert drained(queue) == [b"x"]


def test_without_room_for_the_own_directory(
    clock: Time, queue: FemtoQueue, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A worker that polls while it cannot claim takes no memory, and says so once a minute."""

    def mkdir(path: str, *mode: int) -> None:
        if "in_progress" in path:
            raise PermissionError(errno.EACCES, "not here", path)
        REAL["mkdir"](path, *mode)

    def poll(times: int) -> int:
        for _ in range(times):
            with contextlib.suppress(PermissionError):
                raise AssertionError(queue.pop())
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", mkdir)
        tracemalloc.start()
        try:
            assert -poll(20) + poll(200) < 20_000
        finally:
            tracemalloc.stop()
    assert len(caplog.records) <= 2, "one for each task"
    assert drained(queue) == [b"a", b"b"]


@pytest.mark.parametrize("world", ["nothing else", "set aside", "not listed", "retried"])
def test_pop_while_another_thread_is_at_work(
    scratch: Path, clock: Time, refuse: Refusal, monkeypatch: pytest.MonkeyPatch, world: str
) -> None:
    """Another thread pops or retries at any call of pop: never None while a task is there, in order."""
    for at in itertools.count(1):
        queue = FemtoQueue(scratch / str(at), "node")
        ids = queue.push_many([b"a", b"b"])
        clock.advance(2)
        held, left, others = None, [b"a", b"b"], []
        if world == "retried":
            held = queue.pop()
            clock.advance(2 * (at % 2))  # with a new listing, and with the one at hand
        elif world == "nothing else":
            queue.cancel(ids[0])
            left, ids = [b"b"], [ids[1]]
        if world in ("nothing else", "set aside"):
            refuse("open", ids[0], errno.EACCES)
        if world == "set aside":
            left.remove(drained_one(queue))

        def pop(queue: FemtoQueue = queue) -> FemtoTask | bool | None:
            try:
                return queue.pop()
            except OSError:
                return True

        def work(
            pop: Any = pop, queue: FemtoQueue = queue, held: Any = held, others: Any = others
        ) -> None:
            there = names(Path(queue.data_dir), "pending")  # or this one has it in hand
            if world == "not listed":
                fail_once(patch, "scandir", "/pending/1", 2)
            others.append(in_thread(lambda: queue.retry(held) if held else pop() or not there))
            concurrent.futures.wait(others, 0.3)
            if not others[0].done():  # it waits for this thread: now they run at the same time
                others.append(others[0])

        with monkeypatch.context() as patch:
            met = meanwhile(patch, (at + 1) // 2 if held else at, work)
            popped = [pop(), *(other.result(10) for other in others[:1])]
        if not met and at % 2:
            break
        if not met:
            continue
        assert len(others) > 1 or (popped[0] and (held or popped[1])), f"None at call {at}, {met}"
        refuse.rules.clear()
        found = [task.data for task in popped if isinstance(task, FemtoTask)] + drained(queue)
        assert (found if held else sorted(found)) in (left, left[::-1]), (
            f"at call {at}, {met}: {popped}"
        )
    assert at > 5


def test_an_interrupted_pop_keeps_the_order(scratch: Path, clock: Time) -> None:
    """A pop that was interrupted at any call, as by Ctrl-C, has no claim, and leaves all in order."""

    def interrupt(performed: bool, name: str, *args: Any, **kwargs: Any) -> None:
        if performed and name != "scandir":
            REAL[name](*args, **kwargs)
        raise KeyboardInterrupt

    for at, performed, look in itertools.product(range(1, 40), (False, True), (0, 2)):
        queue = FemtoQueue(scratch / f"{at}{performed}{look}", "node")
        queue.push_many([b"a", b"b", b"c"])
        assert drained_one(queue) == b"a"
        clock.advance(look)  # with the listing in hand, and with another
        steps = Steps(at, functools.partial(interrupt, performed))
        with contextlib.suppress(KeyboardInterrupt):
            with steps:
                task = queue.pop()
            queue.retry(task)
        assert drained(queue) == [b"b", b"c"]
    assert not steps.met


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(["done", "fail", "retry"], 2)])
def test_another_verdict_after_one_that_raised(
    directory: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    """A task that a call moved and could not sync is not another call's to finish, kept or deleted."""
    for keep in (True, False):
        queue = FemtoQueue(directory / str(keep), "a", 30_000, True, keep_done=keep, keep_failed=keep)
        queue.push(b"x")
        task = queue.pop()

        def fsync(descriptor: int, path: str = task.path) -> None:
            if not os.path.exists(path):
                raise OSError(errno.EIO, "not synced")
            REAL["fsync"](descriptor)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="not synced"):
            patch.setattr(os, "fsync", fsync)
            getattr(queue, first)(task)
        kept = {"done": "done", "fail": "failed"} if keep else {}
        for call, error in ((second, NotInProgress), (first, None), (first, NotInProgress)):
            with pytest.raises(error) if error else contextlib.nullcontext():
                getattr(queue, call)(task)
            assert queue.status(task.id) == ("pending" if first == "retry" else kept.get(first))


def test_a_batch_that_cannot_be_synced_or_closed_leaves_no_file_open(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """push_many on a full network filesystem raises the first error, and leaves nothing behind."""
    queue = FemtoQueue(directory, "a", sync_after_write=True)
    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        for name, code in (("fsync", errno.ENOSPC), ("close", errno.EIO)):
            patch.setattr(os, name, functools.partial(fail_with, code, False, name))
        queue.push_many([b"x"] * 150)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert files(directory / "pending") == files(directory / "creating") == []


def test_a_retried_task_makes_no_bucket_again(directory: Path, clock: Time) -> None:
    """A bucket of retried tasks that was removed, being empty, is not made again under its name."""
    worker, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    made: list[str] = []
    put(directory / "pending" / "1600000000000123_x")
    for _ in range(4):
        task = worker.pop()
        clock.advance(5)
        for path in (directory / "pending").iterdir():
            os.utime(path, (clock.wall - 5, clock.wall - 5))
        assert other.pop() is None and os.listdir(directory / "pending") == []
        worker.retry(task)
        made += os.listdir(directory / "pending")
    assert len(made) == len({*made}) == 4


def test_purged_while_it_is_looked_at(directory: Path, vanish: Callable[[Path], None]) -> None:
    """That another process purges a finished task meanwhile is no error of status, requeue or pop."""
    queue = FemtoQueue(directory, "a")
    looked, requeued, twice = ids = queue.push_many([b"1", b"2", b"3"])
    queue.done(queue.pop())
    queue.done(queue.pop())
    queue.retry(queue.pop())
    [pending] = (directory / "pending").rglob(f"{twice}~1")
    os.link(pending, directory / "done" / twice)  # as healing a distributed filesystem leaves it
    for id in ids:
        vanish(directory / "done" / id)
    assert queue.status(looked) in ("done", None)
    assert queue.requeue(requeued) is False
    assert queue.pop() is None, "it was finished"
    assert [queue.status(id) for id in ids] == [None] * 3


def test_a_second_name_of_a_finished_task_where_others_take_part(directory: Path, clock: Time) -> None:
    """After done never again: not under the name at attempt 0 that healing left, either."""
    queue = FemtoQueue(directory, "a")
    put(directory / "in_progress" / DEAD_OWNER / f"{OLD_ID}~1~{NOW_US + HOUR_US}")  # elsewhere, alive
    finished = queue.push(b"finished")
    [pending] = (directory / "pending").glob("*/*")
    os.link(pending, directory / "done" / finished)
    assert queue.pop() is None and queue.status(finished) == "done"


@needs_root
@pytest.mark.parametrize("clock_file", ["with", "without"])
def test_looking_takes_no_more_than_the_right_to_read(open_to_all: Path, clock_file: str) -> None:
    """status, counts and ids, and the commands status and list, work for who may only read."""
    queue = FemtoQueue(open_to_all, "node-1")
    ids = queue.push_many([b"done", b"failed", b"corrupt", b"claimed", b"pending"])
    next((open_to_all / "pending").rglob(ids[2])).write_bytes(b"broken")
    queue.done(queue.pop())
    queue.fail(queue.pop())
    claimed = queue.pop()
    assert claimed and claimed.data == b"claimed"
    ids.append(queue.schedule(b"scheduled", time.time_ns() // 1000 + 10**10))
    for path in open_to_all.glob("clock-*" if clock_file == "without" else "no such"):
        path.unlink()
    before = snapshot(open_to_all, times=True)
    # The standard library may lie where nobody else can read it.
    imports = "import argparse, ctypes, datetime, json, locale, logging, select, shutil"
    looker = """
queue = FemtoQueue(sys.argv[1], "reader")
print([queue.status(id) for id in sys.argv[2:]], sum(queue.counts().values()))
assert {state: len(list(queue.ids(state))) for state in STATES} == queue.counts()
for command in (["status"], ["status", "--json"], *(["list", state] for state in STATES)):
    assert femtoqueue.main([sys.argv[1], *command]) == 0, command
for call in (lambda: queue.push(b"x"), queue.pop):
    try:
        print("no error:", call())
    except PermissionError as error:
        print(error.filename.startswith(sys.argv[1]))
"""
    first, *lines = run(imports + AS_NOBODY + looker, open_to_all, *ids).splitlines()
    states = ["done", "failed", "corrupt", "in_progress", "pending", "scheduled"]
    assert first == f"{states} 6"
    assert lines[-8:] == [*(ids[states.index(state)] for state in STATES), "True", "True"]
    assert all(state in "".join(lines) for state in STATES)
    assert snapshot(open_to_all, times=True) == before


# --- 8: many threads, and fork ------------------------------------------------------------------------


def test_threads(directory: Path) -> None:
    """One object may be used by many threads: nothing is delivered twice, nothing is lost."""
    queue = FemtoQueue(directory, "a")
    found: list[tuple[str, bytes]] = []
    pushed: dict[str, bytes] = {}

    def work(number: int) -> None:
        for count in range(150):
            data = b"%d" % (number * 1_000 + count)
            pushed[queue.push(data)] = data
            if count % 3:
                take()
        while take():
            pass

    def take() -> FemtoTask | None:
        if task := queue.pop():
            found.append((task.id, task.data))
            queue.done(task)
        return task

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


def test_done_waits_for_what_another_thread_syncs(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A durable done does not return before a task's way back, synced by another thread, is on disk."""
    queue = FemtoQueue(directory, "a", sync_after_write=True)
    owner = directory / "in_progress" / DEAD_OWNER
    for number in range(2):  # one for each thread
        put(owner / f"170000000000000{number}_x~1~1700000000000000")
    with synced_slowly(queue, str(owner), monkeypatch) as events:
        task = queue.pop()
        assert task and task.attempt == 2
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
FORK = """
import ctypes, platform, signal
libc = ctypes.PyDLL(None)  # which keeps the GIL, as such a program does
q, other = FemtoQueue(sys.argv[1], "node"), FemtoQueue(sys.argv[1], "other")
def fork():
    if sys.argv[2] == "os.fork":
        return os.fork()
    if sys.argv[2] == "clone":
        number = {"x86_64": 56, "aarch64": 220}[platform.machine()]
        return libc.syscall(number, signal.SIGCHLD, 0, 0, 0, 0)
    if sys.argv[2] == "a fork in a fork":
        if pid := os.fork():
            return pid
        q.cancel(q.push(b"here it is another process"))
        if pid := libc.fork():
            os._exit(ends(pid))
        return 0
    return libc.fork()
def ends(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def child(*works):
    if not (pid := fork()):
        signal.alarm(20)
        try:
            for work in works:
                work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return pid
"""
forks = pytest.mark.parametrize("fork", ["os.fork", "libc.fork", "clone", "a fork in a fork"])


@forks
def test_forked_children_make_ids_of_their_own(directory: Path, fork: str) -> None:
    """Which process an object is in is asked at each call: children share no id, however forked."""
    code = """
due = time.time_ns() // 1000 + 10**9
q.push(b"before")
# Time stands still: all that tells the ids apart is who makes them.
time.time = lambda now=time.time(): now
real, first = time.clock_gettime, {}
time.clock_gettime = lambda number: first.setdefault(number, real(number))
def add():
    for _ in range(10):
        q.schedule(b"x", due), q.push_many([b"x"]), q.push(b"x")
pids = [child(add) for _ in range(4)]
print([ends(pid) for pid in pids], sum(q.counts().values()))
"""
    assert run(FORK + code, directory, fork) == "[0, 0, 0, 0] 121\n"


@forks
@pytest.mark.parametrize("closer", ["parent", "child"])
def test_close_and_the_claims_of_the_other(directory: Path, fork: str, closer: str) -> None:
    """close, and the end of a process, give back its own claims, not those of parent or child."""
    code = """
id = q.push(b"held")
q.push(b"for whoever closes")
held = []
def hold():
    held.append(q.pop())
    assert held[0].id == id
def close():
    assert q.pop().data == b"for whoever closes"
    assert len({name.split("~")[1] for name in os.listdir(f"{sys.argv[1]}/in_progress")}) == 2
    q.close()
    assert other.pop().data == b"for whoever closes" and other.pop() is None
def finish():
    q.done(held[0])
if sys.argv[3] == "child":
    hold()
    assert ends(child(close)) == 0
    finish()
else:
    reader, writer = os.pipe()
    go, let_go = os.pipe()
    pid = child(hold, lambda: os.write(writer, b"x"), lambda: os.read(go, 1), finish)
    os.read(reader, 1)
    try:
        close()
    finally:
        os.write(let_go, b"x")
    assert ends(pid) == 0
print(other.status(id))
"""
    assert run(FORK + code, directory, fork, closer) == "done\n"


@pytest.mark.parametrize("fork", ["os.fork", "libc.fork", "clone"])
def test_the_child_takes_what_its_dead_parent_had(directory: Path, spawn: Spawn, fork: str) -> None:
    """A parent that dies is dead to its child, too, though the child has a copy of the object."""
    code = """
q.push(b"x")
mine = q.pop()
reader, writer = os.pipe()
def until_the_parent_is_dead():
    os.close(writer)
    os.read(reader, 1)
def take():
    task = q.pop(timeout=5)
    print(task and task.attempt, flush=True)
child(until_the_parent_is_dead, take)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = spawn(FORK + code, directory, fork)
    assert process.wait(15) == -signal.SIGKILL
    expect(process, "2")


def owners(directory: Path) -> set[int]:
    """The PIDs of all who hold claims."""
    claims = (directory / "in_progress").glob("*/*")
    return {int(path.parent.name.split("~")[1]) for path in claims}


def claim_for_the_parent(queue: FemtoQueue, mine: FemtoTask, pipe: Any) -> None:
    """What the child of `test_multiprocessing` does."""
    claim = queue.pop()
    queue.done(mine)
    pipe.send((os.getpid(), claim))
    pipe.recv()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(directory: Path, queue: FemtoQueue, method: str) -> None:
    """Queue and task may be passed to a child, which claims as itself, and may finish the task."""
    mine = queue.pop()
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    child = context.Process(target=claim_for_the_parent, args=(queue, mine, there))
    child.start()
    there.close()  # so that its death ends the recv
    try:
        pid, claim = here.recv()
        assert owners(directory) == {pid} == {child.pid}
        assert queue.status(mine.id) == "done"
        for call in (queue.fail, queue.retry):
            with pytest.raises(NotInProgress):
                call(mine)
        assert queue.pop() is None, "the child is alive"
    finally:
        child.kill()
        child.join()
    assert claim.data == b"b" and drained(FemtoQueue(directory, "node-2")) == [b"b"]


def test_a_forked_child_is_one_owner_for_all_its_threads(directory: Path) -> None:
    """Threads of a forked child that use an object at the same time are one owner of its claims."""
    code = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
sys.setswitchinterval(1e-6)
for round in range(20):
    q = FemtoQueue(f"{sys.argv[1]}/{round}", "node")
    q.push_many([b"x"] * 8)
    pid = os.fork()
    if not pid:
        begin, top = Barrier(8), f"{q.data_dir}/in_progress"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: (begin.wait(), q.pop()), range(8)))
        os._exit([len(os.listdir(f"{top}/{owner}")) for owner in os.listdir(top)] != [8])
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), end="")
"""
    assert run(code, directory) == "0" * 20


@pytest.mark.parametrize("how", ["subprocess", "posix_spawn", "system"])
def test_processes_that_are_started_beside_a_claim(directory: Path, how: str) -> None:
    """A command that a worker starts, by vfork or without Python's knowledge, changes nothing."""
    code = """
import ctypes, subprocess
q, other = FemtoQueue(sys.argv[1], "node"), FemtoQueue(sys.argv[1], "other")
q.push_many([b"1", b"2"])
task = q.pop()
command = ["/bin/sh", "-c", "exit 7"]
def start():
    if sys.argv[2] == "subprocess":
        return subprocess.Popen(command).wait()
    if sys.argv[2] == "system":
        return os.waitstatus_to_exitcode(ctypes.PyDLL(None).system(b"exit 7"))
    pid = os.posix_spawn(command[0], command, os.environ)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
statuses = [start() for _ in range(3)]
pids = {name.split("~")[1] for name in os.listdir(f"{sys.argv[1]}/in_progress")}
print(statuses, pids == {str(os.getpid())}, other.pop().data, other.pop())
q.done(task)
"""
    assert run(code, directory, how) == "[7, 7, 7] True b'2' None\n"


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


@pytest.mark.parametrize(
    ("call", "what", "part", "code"),
    [
        *(("push", "list", "nothing", 0), ("push", "list", "pending/17", errno.EACCES)),
        *(("push", "list", "pending/17", errno.EIO), ("pop", "open", "/in_progress/", errno.EIO)),
        *(
            ("pop", "list", "pending/1700000000000000", errno.EIO),
            ("pop", "list", "pending/1", errno.EIO),
        ),
        *(("pop", "list", "/in_progress/", errno.EACCES), ("close", "move", "_x~1~", errno.EIO)),
        ("close", "move", "_x~1~", errno.ENOSPC),
    ],
)
def test_a_call_that_raised_keeps_nothing_alive(
    directory: Path, refuse: Refusal, unlogged: None, call: str, what: str, part: str, code: int
) -> None:
    """The last reference dropped, the object is gone at once, though one of its calls raised."""
    q = FemtoQueue(directory, "node", maxsize=1)
    put(directory / "in_progress" / DEAD_OWNER / "1700000000000000_y~1~1700000000000000")
    for name in (
        "1700000000000000/1700000000000000_x",
        "1700000000000001/1700000000000001_x",
        OLD_ID[:17] + "z",
    ):
        put(directory / "pending" / name)
    if call == "close":
        assert q.pop() and q.pop()
    refuse(what, part, code)
    gone = weakref.ref(q)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(queues.Full, OSError):
            if call == "close":
                q.close()
            while q.push(b"x") if call == "push" else q.pop():
                pass
            raise AssertionError("it did not raise")
        del q
        assert gone() is None
    finally:
        gc.enable()


def test_run_restores_the_signal_handlers_before_it(directory: Path) -> None:
    """run has its handlers while it runs in the main thread, and leaves those that it found."""
    q = FemtoQueue(directory, "node")
    q.push_many([b"1", b"2", b"3"])
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    found = [lambda *_: None, signal.SIG_IGN, signal.default_int_handler, signal.SIG_DFL]
    before = [signal.signal(number, handler) for number, handler in zip(numbers, found, strict=True)]
    stayed: list[list[bool]] = []

    def handle(task: FemtoTask) -> None:
        stayed.append(
            [signal.getsignal(n) == handler for n, handler in zip(numbers, found, strict=True)]
        )
        if task.data == b"2":
            raise KeyboardInterrupt
        if task.data == b"3":
            q.stop()

    try:
        with pytest.raises(KeyboardInterrupt):
            q.run(handle, until_empty=True)
        assert [*map(signal.getsignal, numbers)] == found
        assert stayed == [[False, True, False, False]] * 2, "what was ignored stays ignored"
        q.done(q.pop())
        assert in_thread(q.run, handle).result(30) == 1
        assert stayed[2:] == [[True] * 4]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize("handler", ["SIG_DFL", "lambda *_: os._exit(7)"])
def test_a_process_that_the_handler_forks_ends_by_a_signal(
    directory: Path, spawn: Spawn, handler: str
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
            print(child.exitcode, flush=True)
            child.kill()
signal.signal(signal.SIGTERM, {handler})
print(FemtoQueue(sys.argv[1], "node").run(handle, until_empty=True), flush=True)
"""
    process = spawn(code, directory)
    expect(process, "-15" if handler == "SIG_DFL" else "7")
    expect(process, "1")
    assert ending(process) == ("", 0)


# --- 9: while a call waits ----------------------------------------------------------------------------


class Waits:
    """Stands in for `select.poll`: it puts off the look once a second, so that only events wake.

    `begun` is set once a call waits. `first`, if it is set, is called before that.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.first: Callable[[], object] = lambda: None
        self.asked_ms: list[float] = []
        self.real = select.poll
        monkeypatch.setattr(select, "poll", lambda: Poll(self))


class Poll:
    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.real = waits.real()
        self.register = self.real.register

    def poll(self, ms: float) -> list[tuple[int, int]]:
        self.waits.first()
        self.waits.asked_ms.append(ms)
        self.waits.begun.set()
        events = self.real.poll(20_000 if ms > 500 else ms)
        assert events or ms <= 500, "nothing woke it"
        return events


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    return Waits(monkeypatch)


def play_inotify(monkeypatch: pytest.MonkeyPatch, sleep: Callable[[float], object]) -> None:
    """Wait with inotify, though the clock stands still unless `sleep` moves it."""

    class Asleep(Poll):
        def poll(self, ms: float) -> list[tuple[int, int]]:
            sleep(max(ms / 1e3, 1e-4))  # time does not stand still there
            return []

    monkeypatch.setitem(sys.modules, "ctypes", ctypes)
    waits = Waits(monkeypatch)
    monkeypatch.setattr(select, "poll", lambda: Asleep(waits))


def without(means: str, monkeypatch: pytest.MonkeyPatch, waits: Waits) -> None:
    """Take something away that waiting by events needs. Then it is sleeping."""
    real = ctypes.CDLL(None)

    def none(*arguments: object) -> int:
        ctypes.set_errno(errno.EMFILE)
        return -1

    def no_bell(*arguments: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def sleep(seconds: float, real: Callable[[float], None] = time.sleep) -> None:
        waits.begun.set()
        real(seconds)

    if means == "no ctypes":
        monkeypatch.setitem(sys.modules, "ctypes", None)
    if means == "no eventfd":
        monkeypatch.setattr(os, "eventfd", no_bell)
    library = {
        "no inotify": {},
        "no instance": {"inotify_init1": none, "inotify_add_watch": none},
        "no watch": {"inotify_init1": real.inotify_init1, "inotify_add_watch": none},
    }
    if means in library:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(**library[means]))
    if means != "inotify":
        monkeypatch.setattr(time, "sleep", sleep)


@pytest.mark.parametrize(
    "end", ["stop", "close", "a handler that stops", "a handler that raises", "task"]
)
@pytest.mark.parametrize(
    "means", ["inotify", "no ctypes", "no inotify", "no instance", "no watch", "no eventfd"]
)
@pytest.mark.usefixtures("no_hang")
def test_what_ends_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: Waits, means: str, end: str
) -> None:
    """A signal, stop, close or a task ends what waits, with inotify and wherever that cannot be had."""
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
    scratch: Path, monkeypatch: pytest.MonkeyPatch, waits: Waits, what: str
) -> None:
    """Watch, look, wait: what comes at any step of a call that waits is found, or it wakes."""
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


def test_every_push_of_another_process_wakes(directory: Path, spawn: Spawn, waits: Waits) -> None:
    """What other processes push, at any moment, by any way, wakes: not the look once a second."""
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


def test_what_a_task_costs_does_not_grow(scratch: Path, clock: Time) -> None:
    """A task's system calls, and the entries listed for it, do not grow with what the queue holds."""

    def cost(directory: Path) -> tuple[int, int]:
        """The filesystem calls, and the directory entries read, of 300 tasks that come and go."""
        listed = 0

        def count(name: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal listed
            if name == "scandir":
                assert os.path.basename(args[0]) not in ("done", "failed", "corrupt")
                listed += len(os.listdir(args[0]))
            return REAL[name](*args, **kwargs)

        queue = FemtoQueue(directory, "node")
        with Steps(1, count, once=False) as steps:
            for number in range(300):
                queue.push(b"%d" % number)
                clock.advance(0.01)
                task = queue.pop()
                assert task
                queue.done(task)
        return steps.count, listed

    calls, listed = cost(scratch / "small")
    for state in ("pending", "scheduled", "done", "failed"):
        fill(scratch / "large", state, 3_000, 1 if state == "scheduled" else 1_000)
    more_calls, more_listed = cost(scratch / "large")
    figure("costs", calls=calls, among_thousands=more_calls, entries=listed, of_thousands=more_listed)
    assert more_calls < 1.1 * calls
    assert more_listed < listed + 5 * 3_000  # each look lists the buckets, and one of them is opened


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
    """However many wait, the first pop reads one bucket in little memory, and a later one none."""
    firsts = []
    for count in (2_000, 20_000):
        fill(scratch / str(count), "pending", count)
        q = FemtoQueue(scratch / str(count), "node")
        q.push(b"")  # the clock is read
        clock.advance(1)
        tracemalloc.start()
        try:
            firsts.append(calls_of(q.pop))
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()
        later = calls_of(lambda q=q: [q.pop() for _ in range(500)])
        assert later.count("scandir") == 0 and len(later) == 4 * 500
    assert firsts[0] == firsts[1]


def test_a_drained_queue_costs_what_a_new_one_does(directory: Path, clock: Time) -> None:
    """Once the emptied buckets are gone, a look at the empty queue makes the calls of the first one."""
    q = FemtoQueue(directory, "node", keep_done=False)

    def empty() -> list[str]:
        while task := q.pop():
            q.done(task)
        clock.advance(3)
        assert q.pop() is None
        return calls_of(q.pop)

    q.push(b"")
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


def test_many_idle_owners_cost_nothing(directory: Path, clock: Time) -> None:
    """A hundred idle workers leave no directory behind for the others to list."""
    idle = [FemtoQueue(directory, f"node-{n}") for n in range(100)]
    for q in idle:
        q.push(b"")
        q.done(q.pop())
    for _ in range(2):
        clock.advance(3)
        for q in idle:
            assert q.pop() is None
    assert os.listdir(directory / "in_progress") == []
    assert len(calls_of(idle[0].pop)) <= 16


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
    """push_file, pop and task.path stream: 1 GiB in 32 MB of memory."""
    peak_kb = run(
        """
place = sys.argv[1]
with open(f"{place}/file", "wb") as file:
    file.write(b"begin")
    file.truncate(1 << 30)
q = FemtoQueue(f"{place}/big", "node")
q.push_file(f"{place}/file")
task = q.pop()
with open(task.path, "rb") as file:
    size = sum(map(len, iter(lambda: file.read(1 << 20), b"")))
assert size == 1 << 30
q.done(task)
# Not ru_maxrss: that begins with what the parent had when it forked.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
""",
        places[-1],
    )
    assert int(peak_kb) < 32_000


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


def test_cli_push_streams_standard_input(directory: Path) -> None:
    """push holds no more of its input in memory than a megabyte or two, and takes it from a pipe."""
    code = """
import threading
megabyte = bytes(range(256)) * 4096
read, write = os.pipe()
def feed():
    with os.fdopen(write, "wb") as file:
        for _ in range(100):
            file.write(megabyte)
threading.Thread(target=feed).start()
os.dup2(read, 0)
os.close(read)
femtoqueue.main([sys.argv[1], "push"])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    assert int(run(code, directory).split()[1]) < 40_000
    task = FemtoQueue(directory, "node").pop()
    assert os.path.getsize(task.path) == 100 << 20


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
for (
    when
) in """tomorrow + +m +10 +10x +-1m +nans +infd +1e300d +1e15d +inf +999999d 1 1790000000 2030-13-01
    2030-01-01T25:00 Z 0001-01-01 9999-12-31T23:59:59+00:00 9999-12-31T23:59:59""".split():
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
    q.schedule(b"later", time.time_ns() // 1_000 + 10**9)
    (line,) = shell("status", "--json")
    report = json.loads(line)
    states = {row["state"]: row for row in report["states"]}
    assert list(states) == list(STATES)
    counts = {state: row["count"] for state, row in states.items()}
    assert counts == {
        "scheduled": 1,
        "pending": 2,
        "in_progress": 2,
        "done": 0,
        "failed": 0,
        "corrupt": 0,
    }
    assert 0 <= states["pending"]["oldest_s"] <= states["in_progress"]["oldest_s"] < 60
    assert states["scheduled"]["oldest_s"] < 0 and states["done"]["oldest_s"] is None
    claims = {claim["id"]: claim for claim in report["claims"]}
    assert {id: (c["attempt"], c["node_id"], c["alive"]) for id, c in claims.items()} == {
        gone: (1, "gone", "no"),
        mine: (1, "node-7", "yes"),
    }
    for claim in claims.values():
        assert 0 <= claim["since_s"] < 30 and 29 < claim["since_s"] + claim["lease_left_s"] < 31
    lines = shell("status")
    rows = [line.split() for line in lines]
    assert rows[0] == ["state", "count", "oldest"] and rows[3][:2] == ["in_progress", "2"]
    assert (
        rows[2][:2] == ["pending", "2"] and rows[2][2].endswith("s") and rows[4] == ["done", "0", "-"]
    )
    assert rows[7:9] == [[], ["id", "attempt", "node_id", "pid", "alive", "since", "lease_left"]]
    (row,) = [row for row in rows if row[:1] == [mine]]
    assert row[1:5] == ["1", "node-7", str(os.getpid()), "yes"]
    for block in (lines[:7], lines[8:]):
        starts = {line.index(line.split()[1], len(line.split()[0])) for line in block}
        assert len(starts) == 1, "columns are aligned"


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


@pytest.mark.parametrize(
    "when, due",
    [
        ("+90s", 90),
        ("+10m", 600),
        ("+1.5h", 5_400),
        ("+2d", 172_800),
        ("2030-01-01T12:00:00Z", 1_893_499_200.0),
        ("2030-01-01T12:00:00+02:00", 1_893_492_000.0),
        ("2030-01-01 12:00", 1_893_517_200.0),
        ("2030-07-01", 1_909_108_800.0),
        ("2030-01-01Z", 1_893_456_000.0),
    ],
)
def test_cli_schedule(directory: Path, shell: Shell, when: str, due: float) -> None:
    """WHEN is a wait, or an ISO time: of its own zone, UTC for Z, or local, summer time included."""
    before = time.time()
    (id,) = shell("schedule", when, stdin=b"x", TZ="EST5EDT,M3.2.0,M11.1.0")
    assert shell("list", "scheduled") == [id]
    due_s = int(names(directory, "scheduled")[0][-16:]) / 1e6
    if isinstance(due, float):
        assert due_s == due
    else:
        assert before + due - 0.001 <= due_s <= time.time() + due


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
    for command, wanted in (
        ("cancel", "pending or scheduled"),
        ("requeue", "failed, corrupt, done or scheduled"),
    ):
        complaint = shell(command, ids[3], "nope", status=1)[-1]
        assert complaint.startswith(f"femtoqueue: {ids[3]} is in_progress, not {wanted}\n")
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


EXIT_VERDICTS = {
    b"true": "done",
    b"exit 100": "failed",
    **dict.fromkeys((b"exit 7", b"exit 99", b"exit 101", b"kill -9 $$"), "scheduled"),
}


@pytest.mark.parametrize("under", ["", "env --ignore-signal=CHLD"], ids=["", "SIGCHLD ignored"])
def test_cli_run_takes_the_exit_status_as_the_verdict(
    directory: Path, shell: Shell, under: str
) -> None:
    """0 done, 100 failed for good, others retried: also where an ignored SIGCHLD makes all of them 0.

    What is retried is logged. --max-attempts N: the Nth failure is the last. The exit status is kept
    as text beside the failed task, and shown by list.
    """
    q = FemtoQueue(directory, "node")
    ids = dict(zip(EXIT_VERDICTS, q.push_many(EXIT_VERDICTS), strict=True))
    out, status = ending(shell.start("run", "--until-empty", "--", "sh", under=under))
    assert {script: q.status(id) for script, id in ids.items()} == EXIT_VERDICTS and status == 0
    said = {id: line for line in out.splitlines() for id in ids.values() if id in line}
    assert [*said] == [id for script, id in ids.items() if EXIT_VERDICTS[script] != "done"]
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
@pytest.mark.parametrize("options", [[], ["--until-empty"]], ids=["stays", "until empty, blocked"])
def test_cli_run_ends_by_the_signal_after_the_command(
    tmp_path: Path, shell: Shell, number: signal.Signals, options: list[str]
) -> None:
    """A signal, though the parent blocked it, lets the command finish; the exit status is its own."""
    ids = [shell("push", stdin=data)[0] for data in (b"x", b"y")]
    os.mkfifo(tmp_path / "go")
    under = f"env --block-signal={number.name[3:]}" if options else ""
    process = shell.start("run", *options, "--", *BEGUN, tmp_path / "go", under=under)
    expect(process, "begun")
    os.killpg(process.pid, number)
    (tmp_path / "go").write_text("finished ")
    assert ending(process) == ("finished x", -number)
    assert (shell("list", "done"), shell("list", "pending")) == (ids[:1], ids[1:])


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


def test_cli_a_command_that_may_not_be_killed(directory: Path, spawn: Spawn) -> None:
    """A second SIGTERM ends by the signal, and gives the task back, though the command runs as root."""
    FemtoQueue(directory, "node").push(b"x")
    code = """
import signal, subprocess
def wait_for_signals(child, *timeout, real=subprocess.Popen.wait):
    subprocess.Popen.wait = real
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
def not_permitted(pid, number):
    raise PermissionError(1, "Operation not permitted")
subprocess.Popen.wait, os.killpg = wait_for_signals, not_permitted
sys.exit(femtoqueue.main([sys.argv[1], "run", "--", "true"]))
"""
    assert ending(spawn(code, directory)) == ("", -signal.SIGTERM)
    task = FemtoQueue(directory, "node").pop()
    assert task and task.attempt == 2


@SIGNALS
def test_cli_run_heeds_no_signal_that_was_ignored(
    tmp_path: Path, shell: Shell, number: signal.Signals
) -> None:
    """What was ignored before (nohup, or a background job of a script) stays ignored."""
    ids = [shell("push", stdin=b"x")[0] for _ in range(2)]
    os.mkfifo(tmp_path / "go")
    under = f"env --ignore-signal={number.name[3:]}"
    process = shell.start("run", "--until-empty", "--", *BEGUN, tmp_path / "go", under=under)
    for answer in ("begun", "finished xbegun"):
        expect(process, answer)
        os.killpg(process.pid, number)
        (tmp_path / "go").write_text("finished ")
    assert ending(process) == ("finished x", 0)
    assert shell("list", "done") == ids


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
    end_s = time.monotonic() + 2
    while stopped(process.pid, pid) != [True, True] and time.monotonic() < end_s:
        time.sleep(0.01)
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
#   none, text, mermaid   not at all
#
# All of them must end with exit status 0 and nothing on standard error (ini: by the SIGTERM). Another
# language is an error, so that nothing on the page is untested by mistake. An HTML comment on a line of
# its own before a block changes that:
#
#   <!-- test: not run, WHY -->   Python and sh are only compiled, the rest is left alone (no network)
#   <!-- test: original -->       `old_queue` is a directory of the original's, 0.4; what was unfinished
#                                 there is in `my_queue` afterwards, in order
#
# A block with `kill -9` has a worker killed, and must print each attempt.


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


def options_of(*program: object) -> set[str]:
    """The options that a program's --help names."""
    return set(re.findall(r"--?[a-z][\w-]*", execute(sys.executable, *program, "--help")))


def test_readme_names_what_exists() -> None:
    """Calls, arguments, states, commands, options, links, files and variables on the page are there."""
    text = PAGE

    # What was promised is there: a worker is killed, and the original's tasks are moved over.
    assert [text for test, _, _, text in BLOCKS if "kill -9" in text and not test]
    assert "original" in {test for test, *_ in BLOCKS}

    # Python
    called = set(re.findall(r"\bq\.(\w+)\(", text))
    assert len(called) > 10
    assert not [name for name in called if not hasattr(FemtoQueue, name)]
    parameters = {*inspect.signature(FemtoQueue).parameters}
    passed = [re.findall(r"(\w+)=", call) for call in re.findall(r"FemtoQueue\(([^()]*)\)", text)]
    assert set(itertools.chain.from_iterable(passed)) <= parameters
    states = set(re.findall(r"(?:ids|purge|counts\(\))[(\[]\"(\w+)\"", text))
    assert states and states <= set(STATES)

    # The shell
    commands = re.findall(r"(?:femtoqueue\.py|`femtoqueue) [\w/.$\"-]+ ([a-z]+)\b([^`\n]*)", text)
    assert len(commands) > 5
    known = {name: options_of(MODULE, "DIR", name) for name in {name for name, _ in commands}}
    for name, rest in commands:
        ours = re.split(r" -- |#|[|>&]", rest)[0]
        assert set(re.findall(r"(?<=\s)--?[a-z][\w-]*", ours)) <= known[name], (name, rest)

    # What makes the figures
    figures = re.findall(r"benchmark_mini\.py([^`\n]*)", text)
    assert figures
    benchmark = options_of(HERE / "benchmark_mini.py")
    for rest in figures:
        assert set(re.findall(r"(?<=\s)--?[a-z][\w-]*", rest)) <= benchmark, rest
    extras = set(re.findall(r"'\.\[([\w,]+)\]'", text))
    project = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    assert extras and all(f"\n{name} = [" in project for name in ",".join(extras).split(","))

    # Links, files, variables
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", text))
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    anchors |= set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        path, _, anchor = "".join(target).partition("#")
        if not path.startswith(("http:", "https:")):
            assert (HERE / path).exists() and (path or anchor in anchors), target
    code = MODULE.read_text(encoding="utf-8") + Path(__file__).read_text(encoding="utf-8")
    words = re.findall(r"\bFEMTOQUEUE_[A-Z]+\b|(?<= -k )\w+", text)
    assert not [word for word in words if word not in code]


def test_the_page_names_tests_that_exist() -> None:
    """Each test that README names is here, and each promise has one."""
    named = set(re.findall(r"\b(?:test_[a-z_]+|Test[A-Z]\w+)", PAGE)) - {"test_femtoqueue"}
    assert not [name for name in named if name not in globals()]
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
def produce(root, count, pause_s):
    queue = FemtoQueue(root, name)
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

    @on("NFS", "GlusterFS")
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

    @on("NFS", "GlusterFS")
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
        cluster.wait(lambda: h3.heard("lost") and h4.heard("lost"), "the news")
        assert sorted(h1.heard("got")) == [[f"{who}-0000", "2"] for who in (*names, "long")]
        assert h3.heard("done") == h4.heard("done") == cluster.all("error") == []

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


@pytest.mark.parametrize("size", [1, 2_000_000])
def test_a_task_is_finished_on_another_host(directory: Path, tmp_path: Path, size: int) -> None:
    """A pickled task can be finished where the directory is mounted under another path."""
    first = FemtoQueue(directory, "h1")
    first.push(b"x" * size)
    task = pickle.loads(pickle.dumps(first.pop()))
    task.path = f"/elsewhere{task.path}"
    assert size > 1 or task.data == b"x"  # a large one is read when it is asked for
    (tmp_path / "mnt").symlink_to(tmp_path)
    second = FemtoQueue(tmp_path / "mnt" / "queue", "h2")
    second.done(task)
    with pytest.raises(NotInProgress):
        first.done(task)
    assert names(directory, "done") == [task.id]


def test_no_bucket_is_made_twice(directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that producers may still use is not removed, and none is made again under its name.

    Hosts that remove and make one directory at a time split the copies of a replicated filesystem.
    """
    made: list[str] = []

    def mkdir(path: str, *arguments: int) -> None:
        REAL["mkdir"](path, *arguments)
        made.append(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    hosts = [FemtoQueue(directory, name) for name in ("a", "b")]
    for _ in range(300):  # through two periods of 1,000 s
        clock.advance(7)
        for queue in hosts:
            queue.push(b"x")
            assert drained(queue) == [b"x"]
    buckets = [path for path in made if "/pending/" in path]
    assert len(buckets) == len(set(buckets)) <= 4


def test_a_file_that_is_being_made_elsewhere_is_not_swept(directory: Path, now: Time) -> None:
    """What a writer on another host has begun is not swept within a day, whatever its mtime says.

    In NFSv3, a file that is made with O_EXCL has a number of its maker's there at first.
    """
    draft = put(directory / "creating" / f"{DEAD_OWNER}~{OLD_ID[:-9]}")
    os.utime(draft, (0, 0))
    assert FemtoQueue(directory, "a").pop() is None and draft.exists()
    now.advance(90_000)
    assert FemtoQueue(directory, "a").pop() is None and not draft.exists()


class TestWhatListingsShow:
    def test_a_name_listed_twice(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    def test_a_finished_task_under_two_names(
        self, directory: Path, clock: Time, state: str, first: str
    ) -> None:
        """A finished task that healing gave its earlier name back does not come round for ever.

        A rename onto another name of the same file does nothing, and says that all went well.
        """
        queue = FemtoQueue(directory, "a", timeout_stale_ms=1_000)
        id = queue.push(b"x")
        path = next((directory / "pending").rglob(id))
        if first == "claim":
            path = Path(queue.pop().path)
        else:
            claim = f"{OLD_ID}~1~{NOW_US + HOUR_US}"  # of another machine
            put(directory / "in_progress" / DEAD_OWNER / claim)
        os.link(path, directory / state / id)
        for _ in range(5):
            clock.advance(2.1)
            assert queue.pop() is None
        assert queue.status(id) == state
        counts = queue.counts(state, "pending", "in_progress")
        assert [*counts.values()] == [1, 0, first == "pending"]

    def test_a_look_that_hangs_is_no_wrong_clock(
        self,
        directory: Path,
        clock: Time,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """That the queue clock and the wall clock differ is not logged because a look took long."""
        queue = FemtoQueue(directory, "a")
        queue.push(b"x")
        put(directory / "in_progress" / DEAD_OWNER / f"{OLD_ID}~1~{NOW_US + HOUR_US}")
        monkeypatch.setattr(os, "scandir", lambda path: (clock.advance(20), REAL["scandir"](path))[1])
        assert queue.pop() and "clock" not in caplog.text

    def test_a_slow_filesystem_is_left_alone(
        self, directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A waiting worker looks for a tenth of the time at most, however slow a look is."""
        queue = FemtoQueue(directory, "a")
        spent_s = 0.0

        def slow(path: str) -> object:
            nonlocal spent_s
            clock.advance(0.002)
            spent_s += 0.002
            return REAL["scandir"](path)

        monkeypatch.setattr(os, "scandir", slow)
        assert queue.pop(timeout=10) is None
        assert spent_s < 1.2


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

    def is_name(path: object) -> None:
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

    def is_no_directory(path: object) -> None:
        if real.path.isdir(path):
            refuse(errno.EACCES, path, 5)

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
        is_no_directory(path)

    def may_open(path: object, flags: int, mode: int = 0) -> None:
        is_not_proc(path)
        is_no_directory(path)
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

    for name, check in {
        "rename": may_rename,
        "replace": may_replace,
        "unlink": may_unlink,
        "remove": may_unlink,
        "link": may_link,
        "mkdir": lambda path, mode=0: is_name(path),
        "readlink": is_not_proc,
        "fsync": may_fsync,
        "kill": may_kill,
    }.items():
        setattr(os, name, guarded(getattr(real, name), check))
    os.open = guarded(lambda path, flags, *rest: real.open(path, flags & ~binary, *rest), may_open)
    builtins.open = guarded(real_open, is_not_proc)
    lacks = {
        os: """O_NOFOLLOW O_NONBLOCK O_DIRECTORY O_CLOEXEC O_SYNC O_DSYNC O_NOATIME O_PATH O_TMPFILE
            O_ASYNC O_DIRECT O_NOCTTY register_at_fork uname posix_fadvise posix_fallocate fork forkpty
            POSIX_FADV_DONTNEED POSIX_FADV_WILLNEED getuid geteuid getgid getegid getpgid getpgrp setsid
            killpg chown fchown lchown fchmod mkfifo mknod pread pwrite sync fdatasync statvfs fstatvfs
            sysconf sendfile copy_file_range splice sched_yield sched_getaffinity nice pidfd_open
            eventfd memfd_create""",
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
    "what these tests rely on: as there, calls are missing, and calls fail": """
def fails(call, *arguments, why=PermissionError):
    try:
        call(*arguments)
    except why:
        return True

with open("a", "w") as file:
    assert fails(os.rename, "a", "b") and fails(os.unlink, "a")
with open("a") as file:
    assert fails(os.fsync, file.fileno(), why=OSError)
os.rename("a", "b")
open("a", "w").close()
assert fails(os.rename, "a", "b", why=FileExistsError) and fails(os.rename, "a", "a:b", why=OSError)
assert fails(os.open, ".", os.O_RDONLY | os.O_BINARY) and fails(os.open, "a", 0, why=AssertionError)
assert fails(os.kill, 1, 0, why=AssertionError) and fails(lambda: os.uname(), why=AttributeError)
assert fails(__import__, "fcntl", why=ImportError) and os.name == "nt"
""",
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
    "an object of this process that was dropped is known to be gone at once": """
q, other = Q(), Q()
q.push(b"x")
task = other.pop()
assert q.pop() is None
del other
assert q.pop(3).attempt == 2
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
    before = (
        "argparse builtins datetime errno json logging os queue shutil signal stat subprocess sys time"
    )
    code = [
        f"from __future__ import annotations\nimport {', '.join(before.split())}, threading, typing",
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
GOOD_USER = '''
"""A program of somebody else's."""

import datetime
import queue as queues
from collections.abc import Iterator
from pathlib import Path

from femtoqueue import STATES, FemtoQueue, FemtoQueueError, FemtoTask, NotInProgress


def payloads() -> Iterator[bytes]:
    yield b"a"
    yield b"b"


def handle(task: FemtoTask) -> int:
    return len(task.data) + task.attempt


def main(directory: Path) -> dict[str, int]:
    with FemtoQueue(directory, "node", max_attempts=3, maxsize=100) as q:
        try:
            id: str = q.push(bytearray(b"x"))
        except queues.Full:
            return {}
        ids: list[str] = q.push_many(payloads())
        due: str = q.schedule(memoryview(b"y"), datetime.datetime.now(datetime.timezone.utc))
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
        reason: str | None = q.reason(id)
        pids: list[int] = [claim["pid"] for claim in q.claims()]
        print(state, reason, pids, ids, due, [*q.ids("pending")], STATES, q.cancel(id))
        count: int = q.run(handle, until_empty=True, also=[q]) + q.purge("done", 3600.0)
        return {**q.counts(), "handled": count}
'''
# Each line has one mistake that only somebody who sees the annotations finds.
BAD_USER = """
from femtoqueue import FemtoQueue

q = FemtoQueue("queue", "node")
q.push("text")
q.push_many(["text"])
q.pop().data
q.done(None)
q.schedule(b"x", "tomorrow")
q.no_such_call()
FemtoQueue("queue")
number: int = q.push(b"x")
"""
MISTAKES = {5, 6, 7, 8, 9, 10, 11, 12}


class Packages(NamedTuple):
    """The two archives, and the tree that they were built from."""

    wheel: Path
    sdist: Path
    tree: Path


def needs_package(name: str) -> None:
    """Skip this test where a Python package is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[check]'")


def environment(**more: str) -> dict[str, str]:
    """This process's environment, without what leads to the checkout."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "MYPYPATH")
    return {name: value for name, value in os.environ.items() if name not in hidden} | more


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """The sdist, and the wheel that was built from the unpacked sdist."""
    needs_package("build")
    needs_package("setuptools")
    if not (HERE / ".ci" / "backend.py").exists():
        pytest.skip("this is not a checkout: there is nothing to build")
    tree = tmp_path_factory.mktemp("packages") / "tree"
    for name in SOURCES:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / name, target)
    execute(sys.executable, "-m", "build", "--no-isolation", cwd=tree, env=environment())
    (wheel,) = (tree / "dist").glob("*.whl")
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    return Packages(wheel, sdist, tree)


class Installation(NamedTuple):
    """A virtual environment that femtoqueue was installed into."""

    python: Path
    script: Path
    module: Path


@pytest.fixture(scope="session", params=["wheel", "sdist"])
def installed(
    request: pytest.FixtureRequest, packages: Packages, tmp_path_factory: pytest.TempPathFactory
) -> Installation:
    """A new environment with one of the archives in it; the sdist is built there by pip."""
    needs_package("pip")
    archive: Path = getattr(packages, request.param)
    home = tmp_path_factory.mktemp(request.param) / "venv"
    venv.create(home, symlinks=os.name != "nt")
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    suffix = ".exe" if os.name == "nt" else ""
    python = scripts / f"python{suffix}"
    # Nothing is fetched: an sdist is built with the setuptools that is installed here.
    execute(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"),
        *("--no-deps", "--no-build-isolation", "--ignore-installed", "--no-warn-script-location"),
        *("--disable-pip-version-check", "--prefix", home, archive),
        env=environment(PYTHONPATH=sysconfig.get_path("purelib")),
        cwd=home,
    )
    where = "import femtoqueue; print(femtoqueue.__file__)"
    module = Path(execute(python, "-c", where, cwd=home, env=environment()).strip())
    return Installation(python, scripts / f"femtoqueue{suffix}", module)


def complaints(checker: str, directory: Path, python: Path, *more: str) -> dict[str, set[int]]:
    """Type-check a user's files as the user would; return the lines found wrong, by file."""
    needs_package(checker)
    programs = sorted(path.name for path in directory.glob("*.py"))
    cache = directory.parent / "mypy-cache"
    options = {
        "mypy": ["--strict", "--config-file=", f"--cache-dir={cache}", f"--python-executable={python}"],
        "pyright": [f"--pythonpath={python}"],
    }[checker]
    command = (sys.executable, "-m", checker, *options, *more, *programs)
    process = executed(*command, cwd=directory, env=environment())
    if checker == "pyright" and "0 informations" not in process.stdout:
        pytest.skip(f"pyright does not run here: {process.stdout.strip()[-200:]}")
    assert process.returncode in (0, 1), process.stdout
    found: dict[str, set[int]] = {}
    for line in process.stdout.splitlines():
        path, _, rest = line.strip().partition(".py:")
        if rest and "error" in rest:
            found.setdefault(Path(path).name, set()).add(int(rest.split(":")[0]))
    assert bool(found) == bool(process.returncode), process.stdout
    return found


def test_the_packages_hold_what_they_should(packages: Packages, tmp_path: Path) -> None:
    """The wheel: the module byte for byte, two more files that a package needs, and its metadata.

    The sdist: the repository's own files and the generated metadata. A checkout makes the same wheel.
    """
    top = f"femtoqueue-{femtoqueue.__version__}"
    with zipfile.ZipFile(packages.wheel) as archive:
        wheel = {name: archive.read(name) for name in archive.namelist()}
    assert set(wheel) == IN_WHEEL | {f"{top}.dist-info/{name}" for name in INFO_IN_WHEEL}
    assert wheel["femtoqueue/__init__.py"] == MODULE.read_bytes()
    assert wheel["femtoqueue/py.typed"] == b""
    metadata = wheel[f"{top}.dist-info/METADATA"].decode()
    assert "\nLicense-Expression: MIT\n" in metadata and "\nRequires-Python: >=3.10\n" in metadata
    assert all("extra ==" in line for line in metadata.splitlines() if line.startswith("Requires-Dist"))
    wanted = {*SOURCES, "PKG-INFO", "setup.cfg"} | {f"femtoqueue.egg-info/{name}" for name in EGG_INFO}
    with tarfile.open(packages.sdist) as sdist:
        assert {m.name for m in sdist if not m.isdir()} == {f"{top}/{name}" for name in wanted}
        module = sdist.extractfile(f"{top}/femtoqueue.py")
        assert module and module.read() == MODULE.read_bytes()
    command = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path)
    execute(*command, packages.tree, env=environment())
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(again) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == wheel


def test_twine_accepts_the_packages(packages: Packages) -> None:
    """`twine check --strict` has nothing to say: an index would show the README as it is."""
    needs_package("twine")
    execute(sys.executable, "-m", "twine", "check", "--strict", packages.wheel, packages.sdist)


def test_an_installed_femtoqueue_runs(installed: Installation, tmp_path: Path) -> None:
    """Installed, it is `import femtoqueue`, `python -m femtoqueue` and `femtoqueue`."""
    assert installed.module.parts[-2:] == ("femtoqueue", "__init__.py")
    assert installed.module.read_bytes() == MODULE.read_bytes()
    version = f"femtoqueue {femtoqueue.__version__}\n"
    for command in ([installed.python, "-m", "femtoqueue"], [installed.script]):
        assert execute(*command, "--version", cwd=tmp_path, env=environment()) == version
        id = execute(*command, "queue", "push", installed.module, cwd=tmp_path, env=environment())
        listed = execute(*command, "queue", "list", "pending", cwd=tmp_path, env=environment())
        assert listed.endswith(id)
        execute(*command, "queue", "no-such-command", succeeds=False, cwd=tmp_path, env=environment())


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A folder with two programs of a user's."""
    put(tmp_path / "program" / "good.py", GOOD_USER.encode())
    return put(tmp_path / "program" / "bad.py", BAD_USER.encode()).parent


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_an_installed_femtoqueue_is_typed(installed: Installation, program: Path, checker: str) -> None:
    """A user's program is checked against the installed annotations, and its mistakes are found."""
    assert complaints(checker, program, installed.python) == {"bad": MISTAKES}


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_copied_file_is_typed(program: Path, checker: str, system: str) -> None:
    """The same with the file copied beside the program, which passes itself, on each system."""
    shutil.copyfile(MODULE, program / "femtoqueue.py")
    mypys_name = {"Linux": "linux", "Darwin": "darwin", "Windows": "win32"}[system]
    options = {
        "mypy": ["--python-version=3.10", "--platform", mypys_name],
        "pyright": ["--pythonversion=3.10", "--pythonplatform", system],
    }[checker]
    found = complaints(checker, program, Path(sys.executable), *options)
    assert found == {"bad": MISTAKES}


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_the_public_names_are_typed_completely(installed: Installation, tmp_path: Path) -> None:
    """`pyright --verifytypes`: no public name of the installed package lacks a type."""
    needs_package("pyright")
    path = f"{installed.python.parent}{os.pathsep}{os.environ['PATH']}"
    command = (sys.executable, "-m", "pyright", "--verifytypes", "femtoqueue", "--ignoreexternal")
    process = executed(*command, cwd=tmp_path, env=environment(PATH=path))
    if "completeness" not in process.stdout:
        pytest.skip(f"pyright does not run here: {process.stdout.strip()[-200:]}")
    assert process.returncode == 0, process.stdout
