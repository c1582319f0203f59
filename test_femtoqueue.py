# SPDX-License-Identifier: MIT
"""The promises of femtoqueue, each held by tests.

Processes are real ones, kills are SIGKILL, time is handed in by patching `time.time`, `time.monotonic`
and `time.sleep`, and faults are injected at each system call in turn.

The sections are those of the contract: what is on disk, the clock, who is alive, the API in the order of
its table, the promises, the command line, README, several machines, Windows, the packages.

promise                                tests that hold it
------------------------------------   ---------------------------------------------------------------
 1 whole or not at all, one claimant   test_killed_before_every_filesystem_call, test_threads,
                                       test_many_processes_many_kills, test_one_node_id_in_two_processes,
                                       test_many_tasks_for_one_microsecond
 2 at least once; after done, fail     test_many_processes_many_kills, TestModel,
   or cancel never again               test_a_task_is_finished_once, test_a_lost_claim_has_no_verdict,
                                       test_not_in_progress_once_finished_or_lost,
                                       test_cancel_drops_a_waiting_task, test_never_none_while_due,
                                       test_never_none_while_threads_make_their_directory,
                                       test_never_none_while_threads_empty_what_was_listed,
                                       test_touch_of_a_finished_task,
                                       test_done_that_raised_can_be_made_again,
                                       TestAnswersThatAreLost, TestWhatListingsShow
 3 first in, first out                 TestModel, test_wall_clock_steps_reorder_nothing,
                                       test_the_clock_is_shared, test_time_namespaces,
                                       test_order_survives_a_reboot, test_order_while_time_is_frozen,
                                       test_what_comes_back_has_its_old_place,
                                       test_a_pop_that_raised_does_not_change_the_order,
                                       test_a_passing_fault_changes_nothing,
                                       test_opening_after_a_boot_among_what_others_hide,
                                       test_scheduled_tasks_come_after_what_was_pending
   a live worker keeps its task        test_live_owner_within_its_lease, test_hidepid, test_foreign_proc,
                                       test_another_pid_namespace, test_unreadable_proc,
                                       test_two_copies_of_the_module,
                                       test_two_interpreters_in_one_process, test_no_false_identity,
                                       test_my_node_id_where_the_boot_cannot_be_told,
                                       test_what_was_claimed_at_the_second_try_is_not_taken_back
   a dead or hung one's comes back     test_killed, test_zombie, test_pid_reused, test_dropped_object,
                                       test_live_owner_past_its_lease, test_earlier_boot,
                                       test_leases_survive_a_reboot,
                                       test_close_that_raised_can_be_made_again,
                                       test_close_that_raised_keeps_nothing_alive
 4 a crash loses, breaks and           test_killed_before_every_filesystem_call,
   leaves nothing                      test_empty_directories_of_owners_elsewhere,
                                       test_leftovers_of_dead_writers_are_swept_and_those_of_live_ones_are_not
 5 so does a power cut                 test_power_cut_after_every_operation,
                                       test_cancel_and_requeue_can_be_made_again,
                                       test_done_in_a_thread_is_durable_by_itself,
                                       test_done_waits_for_what_another_thread_syncs,
                                       test_a_directory_made_again_is_synced_again,
                                       test_a_directory_made_again_is_synced_before_other_threads_claim,
                                       test_what_could_not_be_synced_is_synced_later
 6 a broken payload is not delivered   test_broken_payload, test_torn_original,
                                       test_killed_before_every_filesystem_call
 7 a call that raises changed          test_failing_at_every_filesystem_call,
   nothing, and can be made again      test_failing_from_a_filesystem_call_on, test_bad_arguments,
                                       test_a_task_of_another_queue, test_a_data_dir_that_is_no_directory,
                                       test_a_handler_that_has_not_run,
                                       test_a_task_that_cannot_be_had_holds_up_no_other,
                                       test_what_fails_once_beside_what_always_does,
                                       test_a_push_whose_file_was_deleted, test_errors_of_the_filesystem,
                                       test_an_error_tells_its_path, test_while_the_directory_is_away,
                                       test_very_many_that_cannot_be_moved_hold_up_no_other,
                                       test_opening_after_a_boot_as_another_user,
                                       test_maxsize_among_what_others_hide,
                                       test_data_while_the_lease_is_renewed
 8 many threads, and fork              test_threads, test_two_threads_make_one_bucket, test_fork,
                                       test_a_forked_child_finishes, test_multiprocessing,
                                       test_a_signal_handler_may_use_the_object_that_it_interrupts
 9 no thread, no signal handler, no    test_no_thread_no_signal_handler_no_open_file,
   open file, unless run is used       test_run_leaves_no_thread_and_no_reference_behind,
                                       test_a_call_that_raised_keeps_nothing_alive,
                                       test_run_restores_the_signal_handlers_before_it,
                                       test_a_process_that_the_handler_forks_ends_by_a_signal
10 costs do not grow                   test_what_a_task_costs_does_not_grow, test_a_backlog_costs_nothing,
                                       test_a_drained_queue_costs_what_a_new_one_does,
                                       test_what_is_scheduled_for_later_costs_nothing,
                                       test_what_is_done_costs_nothing, test_many_idle_owners_cost_nothing,
                                       test_system_calls_of_a_task_are_those_of_the_floor,
                                       test_ids_of_pending_are_lazy, test_buckets, test_empty_buckets_vanish,
                                       test_what_cannot_be_had_is_logged_once_a_minute
   odd files are left alone            test_hostile_directories, test_hostile_entries,
                                       test_foreign_entries, test_replaced_after_the_listing,
                                       test_almost_a_name_of_the_original, test_the_count_of_attempts_has_an_end
"""

from __future__ import annotations

import builtins
import collections
import contextlib
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

    def __init__(self, wall: float = 1_800_000_000.0, monotonic: float = 5_000.0) -> None:
        self.wall = wall
        self.boot = monotonic

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds

    def step_wall(self, seconds: float) -> None:
        """Somebody set the wall clock."""
        self.wall += seconds

    def read(self, clock: int) -> float:
        """`time.clock_gettime`"""
        return self.wall if clock == time.CLOCK_REALTIME else self.boot


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

    def add(self, state: str, time_us: int, payload: bytes, size: int | None = None) -> Path:
        """One task; with `size`, only so much of its file, as a power cut leaves it."""
        return Original.put(self.directory / state, time_us, payload, size)

    @staticmethod
    def put(folder: Path, time_us: int, payload: bytes, size: int | None = None) -> Path:
        name = f"{time_us}_<built-in method hex of bytes object at 0x7f{zlib.crc32(payload):010x}>"
        return put(folder / name, Original.content(payload)[:size])

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

ID = r"\d{16}_node-1_[0-9a-f]{18,}\.[0-9a-f]{8}"


def test_files_and_names(directory: Path, clock: Time) -> None:
    """A task is one file that holds exactly the payload; all else that is known of it is its path."""
    queue = FemtoQueue(directory, "node-1")
    id = queue.push(b'{"a": 1}')
    assert re.fullmatch(ID, id)
    assert id.startswith(f"{NOW_US:016d}_") or int(id[:16]) - NOW_US < 10
    assert int(id[-8:], 16) == zlib.crc32(b'{"a": 1}')

    def check(state: str, pattern: str) -> None:
        name = where(directory, state)
        assert re.fullmatch(pattern.replace("ID", re.escape(id)), name), name
        assert (directory / state / name).read_bytes() == b'{"a": 1}'

    check("pending", r"\d{16}/ID")
    task = queue.pop()
    assert task
    pid = os.getpid()
    check(
        "in_progress",
        rf"node-1~{pid}~\d+~[^/~]+~[^/~]+/ID~1~{NOW_US + 30_000_000:016d}"[:-4] + r"\d{4}",
    )
    assert task.path == str(directory / "in_progress" / where(directory, "in_progress"))
    queue.retry(task)
    check("pending", r"\d{16}/ID~1")
    task = queue.pop()
    assert task
    queue.retry(task, delay_ms=5_000)
    check("scheduled", rf"\d{{16}}/ID~2~{NOW_US + 5_000_000}")
    clock.advance(6)
    task = queue.pop()
    assert task and (task.id, task.attempt) == (id, 3)
    queue.done(task)
    check("done", "ID")
    assert len(files(directory)) == 2  # the clock is the other one


def test_scheduled_names(directory: Path, clock: Time) -> None:
    """A scheduled task's file is <id>~0~<due_us>; its id's time is the due time, or now if later."""
    queue = FemtoQueue(directory, "node-1")
    due_us = NOW_US + 3_600_000_000
    id = queue.schedule(b"x", due_us)
    assert re.fullmatch(rf"\d{{16}}/{re.escape(id)}~0~{due_us}", where(directory, "scheduled"))
    assert int(id[:16]) == due_us
    assert NOW_US <= int(queue.schedule(b"x", NOW_US - 3_600_000_000)[:16]) < NOW_US + 10


def test_the_id_never_changes(directory: Path, clock: Time) -> None:
    """The id that push returned is what pop hands out and status takes; it never changes."""
    queue = FemtoQueue(directory, "a")
    id = queue.push(b"x")
    states = [queue.status(id)]

    def pop() -> FemtoTask:
        task = queue.pop()
        assert task and task.id == id
        states.append(queue.status(id))
        return task

    queue.retry(pop())
    queue.retry(pop(), delay_ms=1_000)
    states.append(queue.status(id))
    clock.advance(1.1)
    pop()
    clock.advance(31)  # the lease runs out
    queue.fail(pop())
    states.append(queue.status(id))
    assert queue.requeue(id)
    queue.done(pop())
    states.append(queue.status(id))
    assert states == [
        *("pending", "in_progress", "in_progress", "scheduled", "in_progress", "in_progress"),
        *("failed", "in_progress", "done"),
    ]
    assert queue.status("0" * 16 + id[16:]) is None


def test_attempts_are_counted_in_the_name_at_each_claim(directory: Path, clock: Time) -> None:
    """Every claim uses up one delivery, before the task is handed out, and a lost lease counts too."""
    q = FemtoQueue(directory, "node", timeout_stale_ms=1_000)
    id = q.push(b"x")
    for attempt in (1, 2, 3):
        task = FemtoQueue(directory, f"node{attempt}", timeout_stale_ms=1_000).pop()
        assert task.attempt == attempt
        (name,) = names(directory, "in_progress")
        assert name.startswith(f"{id}~{attempt}~")
        clock.advance(1.1)


def test_the_count_of_attempts_has_an_end(directory: Path) -> None:
    """A task that was delivered as often as a name can tell is delivered and finished all the same."""
    queue = FemtoQueue(directory, "a")
    id = "1700000000000000_x"
    put(directory / "pending" / f"{id}~{10**9 - 1}")
    task = queue.pop()
    assert task and (task.id, task.data) == (id, b"x")
    assert queue.status(id) == "in_progress"
    queue.retry(task)
    assert drained(queue) == [b"x"]
    assert queue.status(id) == "done"


def test_done_and_failed_hold_the_payload(directory: Path) -> None:
    """done/<task.id> exists after done, failed/<task.id> after fail, each with the payload."""
    queue = FemtoQueue(directory, "a")
    ids = [queue.push(b"good"), queue.push(b"bad")]
    good, bad = queue.pop(), queue.pop()
    assert good and bad
    assert [(good.id, good.data), (bad.id, bad.data)] == [(ids[0], b"good"), (ids[1], b"bad")]
    queue.done(good)
    queue.fail(bad)
    assert (directory / "done" / good.id).read_bytes() == b"good"
    assert (directory / "failed" / bad.id).read_bytes() == b"bad"
    assert queue.pop() is None


def test_many_tasks_for_one_microsecond(directory: Path, clock: Time) -> None:
    """1,000 equal payloads scheduled for the same microsecond are 1,000 tasks."""
    queue = FemtoQueue(directory, "a")
    ids = [queue.schedule(b"same", NOW_US + 1_000_000) for _ in range(1_000)]
    assert len(set(ids)) == 1_000
    clock.advance(2)
    assert drained(queue) == [b"same"] * 1_000
    assert sorted(queue.ids("done")) == sorted(ids)


def test_one_node_id_in_two_processes(directory: Path) -> None:
    """Two processes with one node_id never make the same id, not even in the same microsecond."""
    code = """
time.time = lambda: 1_800_000_000.0
time.monotonic = lambda: 5_000.0
queue = FemtoQueue(sys.argv[1], "same")
for _ in range(200):
    print(queue.push(b"same"), queue.schedule(b"same", 1_800_000_001_000_000))
"""
    ids = [id for _ in range(2) for id in run(code, directory).split()]
    queue = FemtoQueue(directory, "a")
    assert len(set(ids)) == 800
    assert sorted([*queue.ids("pending"), *queue.ids("scheduled")]) == sorted(ids)


def test_long_names(directory: Path, clock: Time) -> None:
    """The longest node_id has room in every state's names; a name that has not is left alone."""
    queue = FemtoQueue(directory, "é" * 32)
    id = queue.push(b"x")
    task = queue.pop()
    assert task
    queue.touch(task)
    queue.retry(task, delay_ms=1)
    clock.advance(1)
    task = queue.pop()
    assert task and task.id == id
    queue.retry(task)
    assert drained(queue) == [b"x"]
    for length in (221, 240, 255):
        put(directory / "pending" / f"1700000000000000_{'x' * (length - 17)}")
    before = snapshot(directory)
    assert queue.pop() is None
    assert snapshot(directory) == before
    put(directory / "pending" / f"1700000000000000_{'x' * 183}", b"200 bytes")
    assert drained(queue) == [b"200 bytes"]


# --- buckets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["pending", "scheduled"])
def test_buckets(directory: Path, clock: Time, state: str) -> None:
    """All begin in the bucket of the period; after 1,000 tasks of its own a producer opens others."""
    one, other = FemtoQueue(directory, "1"), FemtoQueue(directory, "2")

    def add(queue: FemtoQueue) -> str:
        clock.advance(0.0001)
        return (
            queue.push(b"")
            if state == "pending"
            else queue.schedule(b"", int(clock.wall * 1e6) + 10**7)
        )

    ids = [add(one), add(other)]
    [shared] = os.listdir(directory / state)
    assert int(shared) % 10_000_000 == 0
    assert state == "scheduled" or shared == f"{NOW_US:016d}"
    ids += [add(one) for _ in range(2_000)]
    buckets = {path.name: os.listdir(path) for path in (directory / state).iterdir()}
    assert [len(buckets[bucket]) for bucket in sorted(buckets)] == [1_001, 1_000, 1]
    for bucket, names in buckets.items():
        oldest = min(name[:16] if state == "pending" else name[-16:] for name in names)
        assert oldest == bucket or (oldest > bucket == shared)
    assert list(one.ids(state)) == ids
    clock.advance(1_000)
    add(other)
    assert len(os.listdir(directory / state)) == 4, "a new period, a new bucket"


def test_ids_are_never_older_than_their_bucket(directory: Path, clock: Time) -> None:
    """A task that comes back goes to any bucket that is not younger than it."""
    queue = FemtoQueue(directory, "a")
    ids = [queue.push(b"old"), queue.push(b"old 2")]
    claims = [queue.pop(), queue.pop()]
    clock.advance(2_000)
    ids.append(queue.push(b"new"))
    for claim in reversed(claims):
        assert claim
        queue.retry(claim)
    for name in files(directory / "pending"):
        bucket, id = name.split("/")
        assert id >= bucket
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


@pytest.mark.parametrize("state", ["pending", "scheduled"])
def test_push_into_a_vanished_bucket(directory: Path, clock: Time, state: str) -> None:
    """A push into a bucket that was removed meanwhile makes one again."""
    queue = FemtoQueue(directory, "a")

    def add(data: bytes) -> None:
        queue.push(data) if state == "pending" else queue.schedule(data, NOW_US + 1_000_000)

    add(b"lost with it")
    shutil.rmtree(*(directory / state).iterdir())
    add(b"1")
    clock.advance(2)
    assert drained(queue) == [b"1"]


def test_bucket_vanishes_during_a_push(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that somebody removes between being made and being used does not stop the push."""
    queue = FemtoQueue(directory, "a")
    mkdir = os.mkdir
    in_vain = []

    def mkdir_in_vain(path: str, *mode: int) -> None:
        mkdir(path, *mode)
        if not in_vain:
            in_vain.append(path)
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", mkdir_in_vain)
    queue.push(b"x")
    assert "/pending/" in in_vain[0]
    assert drained(queue) == [b"x"]


def test_a_bucket_that_was_just_made_for_old_tasks_stays(directory: Path, clock: Time) -> None:
    """Who brings an old task back makes a bucket with an old name: it is not removed under his hands."""
    q = FemtoQueue(directory, "node")
    bucket = directory / "pending" / "1600000000000001"
    for age_s, stays in ((0, True), (1.9, True), (2.1, False)):
        bucket.mkdir(exist_ok=True)
        os.utime(bucket, (clock.wall - age_s, clock.wall - age_s))
        assert q.pop() is None
        assert bucket.exists() is stays


# --- tasks of shell scripts, and of the original ------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"hello\n", b"\x01" + bytes(23) + b"not of the original"])
def test_shell_push(directory: Path, data: bytes) -> None:
    """A file renamed into pending/ as 16 digits, "_", anything is a task, taken as it is."""
    queue = FemtoQueue(directory, "a")
    put(directory / "draft", data)
    name = "1700000000000000_from a shell.00000000"  # no checksum of ours: the token is not ours
    subprocess.run(["mv", directory / "draft", directory / "pending" / name], check=True)
    assert list(queue.ids("pending")) == [name] and queue.status(name) == "pending"
    assert drained(queue) == [data]
    assert (directory / "done" / name).read_bytes() == data


@pytest.mark.parametrize("version", ["0.3", "0.4"])
def test_original_directory(directory: Path, clock: Time, version: str) -> None:
    """A directory of the original opens with nothing lost: pending, scheduled, in progress."""
    original = Original(directory, *(["scheduled"] if version == "0.4" else []), "node-1", "node-2")
    later = "scheduled" if version == "0.4" else "pending"
    original.add(later, NOW_US + 60_000_000, b"scheduled")
    original.add("pending", NOW_US - 10, b"pending 1")
    original.add("pending", NOW_US - 5, b"")
    original.add("node-1", NOW_US - 30, b"in progress 1")
    original.add("node-2", NOW_US - 20, b"in progress 2")
    queue = FemtoQueue(directory, "node-1")
    queue.push(b"ours")
    assert drained(queue) == [b"in progress 1", b"in progress 2", b"pending 1", b"", b"ours"]
    assert not (directory / "node-1").exists() and not (directory / "node-2").exists()
    clock.advance(59)
    assert queue.pop() is None
    clock.advance(2)
    assert drained(queue) == [b"scheduled"]


def test_a_durable_queue_takes_the_original_over_for_good(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """in_progress/, which tells that nothing is left to take over, is made when the renames are on disk."""
    original = Original(directory, "scheduled", "node-1")
    original.add("node-1", NOW_US - 30, b"in progress")
    (directory / "node-1" / "notes").touch()
    original.add("pending", NOW_US + 60_000_000, b"scheduled")
    log: list[object] = []
    real_fsync, real_mkdir = os.fsync, os.mkdir

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        log.append(os.fstat(descriptor).st_ino)

    def mkdir(path: str, *mode: int) -> None:
        real_mkdir(path, *mode)
        log.append(path)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "mkdir", mkdir)
    FemtoQueue(directory, "node-1", sync_after_write=True)
    synced = log[: log.index(str(directory / "in_progress"))]
    touched = [directory / name for name in ("node-1", "pending", "scheduled")]
    assert {path.stat().st_ino for path in touched} <= {*synced}


@pytest.mark.parametrize("size", [0, 5, 23, 24, 30])
@pytest.mark.parametrize("state", ["pending", "scheduled", "node-1"])
def test_torn_original(directory: Path, clock: Time, state: str, size: int) -> None:
    """A task of the original that does not match its digest goes to corrupt/, and the queue goes on."""
    original = Original(directory, "scheduled", "node-1")
    torn = original.add(state, NOW_US - 20, b"payload", size)
    original.add("pending", NOW_US - 10, b"whole")
    queue = FemtoQueue(directory, "a")
    assert drained(queue) == [b"whole"]
    assert list(queue.ids("corrupt")) == [torn.name]
    assert not torn.exists()


@pytest.mark.parametrize("size", [0, 9, 5_000, 3 << 20])
@pytest.mark.parametrize("call", ["done", "fail", "retry", "retry later", "close"])
def test_original_file_keeps_its_header(directory: Path, clock: Time, size: int, call: str) -> None:
    """The file of a task of the original stays as it was; `data` is the payload, at each delivery."""
    payload = os.urandom(size)
    path = Original(directory).add("pending", NOW_US - 10, payload)
    name, content = path.name, path.read_bytes()
    queue = FemtoQueue(directory, "a")
    task = queue.pop()
    assert task and (task.id, task.data, task.attempt) == (name, payload, 1)
    assert queue.status(name) == "in_progress"
    queue.touch(task)
    assert task.data == payload and Path(task.path).read_bytes() == content
    if call in ("retry", "retry later"):
        queue.retry(task, 1_000 if call == "retry later" else 0)
    else:
        getattr(queue, call)(*[task] * (call != "close"))
    [path] = directory.rglob(f"{name}*")
    assert path.read_bytes() == content
    if call in ("done", "fail"):
        assert path == directory / {"done": "done", "fail": "failed"}[call] / name
        return
    clock.advance(2)
    task = FemtoQueue(directory, "b").pop()
    assert task and (task.id, task.data, task.attempt) == (name, payload, 2)


def test_large_original(directory: Path, clock: Time) -> None:
    """A payload over 1 MiB that the original wrote is delivered without its header, too."""
    payload = os.urandom(3 << 20)
    Original(directory).add("pending", NOW_US - 10, payload)
    assert drained(FemtoQueue(directory, "a")) == [payload]


def test_almost_a_name_of_the_original(directory: Path) -> None:
    """A file whose name has all of an original's but its time is left alone, and opening goes on."""
    original = Original(directory)
    original.add("pending", 1_700_000_000_000_000, b"x")
    odd = put(directory / "pending" / "--5_<built-in method hex of bytes object at 0x7f0123456789>")
    assert drained(FemtoQueue(directory, "a")) == [b"x"]
    assert odd.read_bytes() == b"x"


def test_original_directory_opened_by_several_at_once(directory: Path) -> None:
    """Workers that open an original directory at the same time lose nothing, and none of them fails."""
    original = Original(directory, "scheduled")
    for number in range(600):
        original.add(f"node-{number % 60}", 1_700_000_000_000_000 + number, b"%d" % number)
    open_and_drain = """
    print("ready", flush=True)
    sys.stdin.readline()
    queue = FemtoQueue(sys.argv[1], sys.argv[2])
    print("open", flush=True)
    sys.stdin.readline()
    while task := queue.pop():
        print(task.data.decode())
        queue.done(task)
    """
    code = inspect.cleandoc(open_and_drain)
    workers = [start(code, directory, f"w{number}") for number in range(4)]
    for answer in ("ready", "open"):
        for worker in workers:
            expect(worker, answer)
        for worker in workers:
            say(worker)
    found = [number for worker in workers for number in worker.communicate(timeout=60)[0].split()]
    assert sorted(map(int, found)) == list(range(600))


# --- what else lies about -----------------------------------------------------------------------------

STATE_DIRS = ("", "creating", "pending", "scheduled", "in_progress", "done", "failed", "corrupt")
FOREIGN = (
    *(b".DS_Store", b".nfs000000000001", b"1700000000000000", b"notes.txt", b"5_x", b"\xff\xfe"),
    *(OLD_ID.encode() + b"~", b"." + OLD_ID.encode() + b".swp", OLD_ID.encode() + b"~1~"),
    *(OLD_ID.encode() + b"\xff", b"1700000000000000_\n", b"170000000000000a_x", b"1700000000000000-x"),
    *(
        "１７００００００００００００００_x".encode(),
        OLD_ID.encode() + b"~x",
        OLD_ID.encode() + b"~1~99",
    ),
)


def try_everything(queue: FemtoQueue, *ids: str) -> None:
    """Call all that could deliver, move or delete something, and see that nothing happens."""
    assert queue.pop() is None
    assert not any(queue.counts().values())
    assert [id for state in femtoqueue.STATES for id in queue.ids(state)] == []
    assert [queue.status(id) for id in ids] == [None] * len(ids)
    assert not any([call(id) for id in ids for call in (queue.cancel, queue.requeue)])
    assert sum(queue.purge(state, 0) for state in ("done", "failed", "corrupt")) == 0
    assert queue.join(0)


def test_foreign_entries(directory: Path) -> None:
    """What is not named like a task is left alone and never delivered, wherever it lies."""
    FemtoQueue(directory, "a")
    for state in STATE_DIRS:
        for name in FOREIGN:
            with open(os.path.join(os.fsencode(directory / state), name), "wb") as file:
                file.write(b"foreign")
        (directory / state / "some directory").mkdir()
        put(directory / state / "other directory" / OLD_ID)
    before = snapshot(directory)
    queue = FemtoQueue(directory, "a")
    try_everything(queue, OLD_ID, OLD_ID + "~1~", "../notes.txt", "notes.txt", "")
    assert snapshot(directory) == before
    queue.push(b"ours")
    assert drained(queue) == [b"ours"]


HOSTILE: dict[str, Callable[[Path], None]] = {
    "link": lambda path: path.symlink_to("/etc/hostname"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to a directory": lambda path: path.symlink_to(put(path.parent / "aside" / OLD_ID).parent),
    "FIFO": os.mkfifo,
    "directory": lambda path: put(path / "inside") and None,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5)),  # /dev/zero
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs_root if kind == "device" else ()) for kind in HOSTILE]
)
def test_hostile_entries(directory: Path, kind: str, no_hang: None) -> None:
    """Links, FIFOs, directories, devices with a task's name: never delivered, blocking, or touched."""
    places = [
        f"creating/{DEAD_OWNER}~{OLD_ID}",
        f"pending/{OLD_ID}",
        f"pending/1700000000000000/{OLD_ID}~1",
        f"scheduled/{OLD_ID}~0~1700000000000000",
        f"scheduled/1700000000000000/{OLD_ID}~0~1700000000000000",
        f"in_progress/{OLD_ID}~1~1700000000000000",
        f"in_progress/{DEAD_OWNER}/{OLD_ID}~1~1700000000000000",
        *(f"{state}/{OLD_ID}" for state in ("done", "failed", "corrupt")),
    ]
    if kind != "directory":  # that would be a bucket, and an owner
        places += ["pending/1700000000000001", "scheduled/1700000000000001"]
        places += [f"in_progress/{DEAD_OWNER}2"]
    queue = FemtoQueue(directory, "host")
    for place in places:
        (directory / place).parent.mkdir(exist_ok=True)
        HOSTILE[kind](directory / place)
    before = snapshot(directory)
    try_everything(queue, OLD_ID)
    try_everything(FemtoQueue(directory, "other"), OLD_ID)
    assert snapshot(directory) == before
    queue.push(b"ours")
    assert drained(queue) == [b"ours"]


@pytest.mark.parametrize("kind", ["link", "FIFO", "socket", "directory"])
def test_replaced_after_the_listing(directory: Path, kind: str, no_hang: None) -> None:
    """What becomes a link, a FIFO or a directory after it was listed is not delivered either."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"1")
    queue.push(b"2")
    assert drained_one(queue) == b"1"  # the other one has been listed
    [path] = [directory / "pending" / name for name in files(directory / "pending")]
    path.rename(directory / "aside")
    if kind == "link":
        path.symlink_to(directory / "aside")
    else:
        HOSTILE[kind](path)
    try:
        assert queue.pop() is None
    except OSError as error:
        assert error.filename
    queue.push(b"3")
    assert drained(queue) == [b"3"]


NAMES = (
    "{time}_node_0123456789ab{n:06x}.01234567",
    "{time}_node_0123456789ab{n:06x}.01234567~{n}",
    "{time}_node_0123456789ab{n:06x}.01234567~1~{time}",
    "{time}_shell-{n}",
    "{time}_shell-{n}~1",
    "{time}_shell-{n}~1~{time}",
    "{time}",
    "node~999999999~{n}~place~token",
    "node~999999999~{n}~place~token~{time}",
    "node~{n}~1~elsewhere~token~{time}",
    "clock-{n}",
    "clock-0123456789ab.{n}",
    ".DS_Store-{n}",
    ".nfs{time}{n}",
)
ALPHABET = [*"~._/0 a\n\t\x7f", "\N{ARABIC-INDIC DIGIT THREE}", "\udcff", "\u2028", "~1", "x" * 200]
KINDS = (
    "file",
    "file",
    "file",
    "directory",
    "full directory",
    "link",
    "directory link",
    "dangling",
    "fifo",
)
PLACES = (
    *("", "creating", "pending", "pending/{bucket}", "scheduled", "scheduled/{bucket}"),
    *("in_progress", "in_progress/node~999999999~1~place~token", *("done", "failed", "corrupt")),
)


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


objects = st.lists(
    st.tuples(st.sampled_from(PLACES), near_names(), st.sampled_from(KINDS)), min_size=8, max_size=40
)


def is_ours(place: str, name: str, kind: str) -> bool:
    """May the queue move or delete this? Written apart from femtoqueue's own parser."""
    folder = place.split("/")[0]
    owner = r"[^~/]+~[0-9]+~[^~/]+~[^~/]+~[^~/]+"
    if kind in ("directory", "full directory"):  # what is in there is a task, once it has such a name
        pattern = {"pending": "[0-9]{16}", "scheduled": "[0-9]{16}", "in_progress": owner}.get(place)
        return pattern is not None and re.fullmatch(pattern, name, re.ASCII) is not None
    if kind != "file" or place in ("", "in_progress"):
        clock = re.fullmatch(r"clock-[0-9a-f]+\.[0-9]+", name, re.ASCII)  # of an earlier boot
        return kind == "file" and place == "" and clock is not None
    if folder == "creating":
        return re.match(owner + "~[0-9]{16}", name, re.ASCII) is not None
    id = re.fullmatch(r"([0-9]{16}_[^~]*)(~[0-9]{1,9}(~[0-9]{16})?)?", name, re.ASCII | re.DOTALL)
    return id is not None and name.isprintable() and len(os.fsencode(id[1])) <= 220


def make_object(path: Path, kind: str, outside: Path) -> None:
    if kind == "file":
        path.write_bytes(b"hostile")
    elif kind.endswith("directory"):
        path.mkdir()
        if kind == "full directory":
            (path / "0000000000000001_inside").write_bytes(b"hostile")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / {"link": "file", "directory link": "", "dangling": "none"}[kind])


everything = [
    (place, name.format(time=f"{(1, 1_799_000_000_000_000, 9 * 10**15)[n % 3] + n:016d}", n=n), kind)
    for n, (place, name, kind) in enumerate(itertools.product(PLACES, NAMES, dict.fromkeys(KINDS)))
]


@example(objects=everything, reboot=False)
@example(objects=everything, reboot=True)
@given(objects=objects, reboot=st.booleans())
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_hostile_directories(objects: list[tuple[str, str, str]], reboot: bool) -> None:
    """Whatever lies about: nothing raises, blocks, is followed, is lost, or is deleted."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=SHM) as scratch:
        clock = Time()
        patch.setattr(time, "time", lambda: clock.wall)
        patch.setattr(time, "monotonic", lambda: clock.boot)
        check_among_hostile_objects(Path(scratch), clock, objects, reboot)


def check_among_hostile_objects(
    scratch: Path, clock: Time, objects: list[tuple[str, str, str]], reboot: bool
) -> None:
    directory, outside = scratch / "queue", scratch / "outside"
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
            make_object(folder / name, kind, outside)
            made[folder / name] = (place, name, kind)
    theirs = {path: seen(path, times=False) for path, what in made.items() if not is_ours(*what)}
    if reboot:
        del queue
        clock_file.unlink()
        queue = FemtoQueue(directory, "a", LONG_MS)

    signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("it blocks"))
    signal.alarm(20)
    counts = queue.counts()
    assert counts == {state: len(list(queue.ids(state))) for state in STATES}
    for path in list(made)[:100]:
        assert queue.status(os.path.basename(path)) in (None, *STATES)
    for id in real:
        assert queue.status(id)
    got = []
    for _ in range(len(made) + 9):
        clock.advance(1.5)
        if task := queue.pop():
            if task.id in real:
                assert task.data == real[task.id]
                got.append(task.id)
            else:
                assert task.data == b"hostile"
                assert made, "invented"
            queue.done(task)
    assert sorted(got) == sorted({*real} - {done, failed})
    assert queue.status(done) == "done"
    assert queue.status(failed) == "failed"
    clock.advance(3_000)
    assert queue.pop() is None
    for path in list(made)[:100]:
        assert queue.cancel(os.path.basename(path)) in (False, True)
    for state in ("done", "failed", "corrupt"):
        queue.purge(state, 0)
    queue.close()
    signal.alarm(0)
    for path, before in theirs.items():
        assert os.path.lexists(path), f"{made[path]} is gone"
        assert seen(path, times=False) == before, f"{made[path]} was changed"
    assert inside.read_bytes() == (outside / "file").read_bytes() == b"followed"
    assert len(os.listdir(outside)) == 2
    figure("hostile directories", directories=1, objects=len(made), foreign=len(theirs))


# ====================================================================================================
# The queue clock
# ====================================================================================================


@pytest.mark.parametrize("step_s", [-86_400, -0.01, 86_400])
def test_wall_clock_steps_reorder_nothing(directory: Path, clock: Time, step_s: float) -> None:
    """Stepping the wall clock reorders nothing, in whichever object or process."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"1")
    clock.step_wall(step_s)
    queue.push(b"2")
    FemtoQueue(directory, "b").push(b"3")
    clock.step_wall(step_s)
    queue.push(b"4")
    assert drained(queue) == [b"1", b"2", b"3", b"4"]


def test_wall_clock_steps_expire_nothing(directory: Path, clock: Time) -> None:
    """Stepping the wall clock expires no lease."""
    queue, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    queue.push(b"1")
    task = queue.pop()
    assert task
    clock.step_wall(86_400)
    assert other.pop() is None
    clock.step_wall(-2 * 86_400)
    assert other.pop() is None
    queue.done(task)


PUSH = "FemtoQueue(sys.argv[1], 'node-1').push(sys.argv[2].encode())"


def test_the_clock_is_shared(directory: Path) -> None:
    """Processes of one boot push in one order, however wrong one's wall clock is."""
    queue = FemtoQueue(directory, "a")
    wrong = "time.time = lambda: 978_307_200.0\n"
    for number in range(0, 6, 2):
        queue.push(b"%d" % number)
        run(wrong + PUSH, directory, number + 1)
    assert drained(queue) == [b"0", b"1", b"2", b"3", b"4", b"5"]


@needs_faketime
def test_the_clock_is_shared_under_faketime(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose wall clock is in 2001 pushes behind what is pending, and is not due too soon."""
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    monkeypatch.setenv("DONT_FAKE_MONOTONIC", "1")
    queue = FemtoQueue(directory, "a")
    queue.push(b"1")
    run("assert time.time() < 1e9\n" + PUSH, directory, 2, under=["faketime", "2001-01-01"])
    queue.push(b"3")
    assert drained(queue) == [b"1", b"2", b"3"]


def test_the_clock_is_chosen_once(directory: Path) -> None:
    """Processes that open a new directory at the same time agree on one clock."""
    code = """
print("ready", flush=True)
sys.stdin.readline()
print(FemtoQueue(sys.argv[1], "a")._clock.offset_us)
"""
    processes = [start(code, directory) for _ in range(6)]
    for process in processes:
        assert process.stdout and process.stdout.readline()
    offsets = {process.communicate("go\n", timeout=60)[0] for process in processes}
    assert len(offsets) == 1 and len(list(directory.glob("clock-*"))) == 1


@needs_time_namespace
def test_time_namespaces(directory: Path) -> None:
    """A process in a time namespace, where the monotonic clock is another, pushes in order."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"1")
    far = f"assert time.monotonic() > {time.monotonic() + 50_000}\n"
    run(far + PUSH, directory, 2, under=NEW_TIME)
    queue.push(b"3")
    assert drained(queue) == [b"1", b"2", b"3"]


def test_order_while_time_is_frozen(directory: Path, clock: Time) -> None:
    """With time frozen, as testing tools do, order is kept all the same, among objects too."""
    queues = [FemtoQueue(directory, "a"), FemtoQueue(directory, "b")]
    payloads = [b"%d" % number for number in range(500)]
    for number, payload in enumerate(payloads):
        queues[number % 2].push(payload)
    assert drained(queues[0]) == payloads


# --- after a boot -------------------------------------------------------------------------------------


@needs_mounts
@pytest.mark.parametrize("newest", ["pending", "in_progress"])
def test_order_survives_a_reboot(directory: Path, tmp_path: Path, newest: str) -> None:
    """After a reboot order continues, though the wall clock restarts in the past."""
    queue = FemtoQueue(directory, "node-1")
    queue.push(b"1")
    if newest == "in_progress":
        assert run(CLAIM, directory, "node-1")
    run(IN_2001 + PUSH, directory, 2, under=rebooted(tmp_path))
    again = rebooted(tmp_path)
    run(IN_2001 + PUSH, directory, 3, under=again)
    code = 'queue = FemtoQueue(sys.argv[1], "node-1")\nwhile t := queue.pop(): print(t.data.decode())'
    assert run(IN_2001 + code, directory, under=again).split() == ["1", "2", "3"]


BOOTED_AGAIN = "1~1~11111111-2222.0.0~x"  # what the name of an owner says of PID, boot and object


def boot_again(directory: Path, clock: Time, wall_step_s: float) -> None:
    """Have the clocks, and what the directory knows of them, as after a boot."""
    for path in directory.glob("clock-*"):
        path.rename(directory / "clock-0123456789ab.0")
    for path in (directory / "in_progress").iterdir():
        path.rename(path.with_name(f"{path.name.partition('~')[0]}~{BOOTED_AGAIN}"))
    clock.step_wall(wall_step_s)
    clock.boot = 10.0


@pytest.mark.parametrize("lease_s", [30, 3_600])
@pytest.mark.parametrize("behind_days", [0, 3, 3_000])
def test_leases_survive_a_reboot(
    directory: Path, now: Time, behind_days: float, lease_s: float
) -> None:
    """After a reboot, with the wall clock behind, another node's claim comes back one lease later."""
    queue = FemtoQueue(directory, "node-2", lease_s * 1_000)
    put(directory / "pending" / OLD_ID.replace(".00000000", ""))
    assert queue.pop()
    del queue
    boot_again(directory, now, -behind_days * 86_400)
    queue = FemtoQueue(directory, "node-1")  # whose own lease is 30 s
    for advance_s in (0, 15, lease_s - 17):
        now.advance(advance_s)
        assert queue.pop() is None
    now.advance(5)
    task = queue.pop()
    assert task and task.attempt == 2


@needs_mounts
def test_leases_survive_a_real_reboot(directory: Path, tmp_path: Path) -> None:
    """The same with a real process of an earlier boot, and a wall clock that restarts in 2001."""
    FemtoQueue(directory, "node-3")
    name = OLD_ID.replace(".00000000", "")
    put(directory / "pending" / name)
    with claimed_by(directory, "node-2", rebooted(tmp_path)):
        pass
    code = """
queue = FemtoQueue(sys.argv[1], "node-1", timeout_stale_ms=30_000)
assert queue.pop() is None
time.monotonic = lambda real=time.monotonic: real() + 31
print(queue.pop().id)
"""
    assert run(IN_2001 + code, directory, under=rebooted(tmp_path)) == f"{name}\n"


@pytest.mark.parametrize("hidden", ["in_progress", "pending"])
def test_opening_after_a_boot_among_what_others_hide(
    directory: Path, clock: Time, refuse: Refusal, hidden: str
) -> None:
    """A directory that another user keeps to himself does not stop who opens the queue after a boot."""
    queue = FemtoQueue(directory, "a", LONG_MS)
    queue.push(b"claimed")
    assert queue.pop()
    clock.advance(2_000)
    queue.push(b"pending")
    boot_again(directory, clock, 0)
    part = max(os.listdir(directory / hidden))
    refuse("list", part, errno.EIO)
    with pytest.raises(OSError, match=re.escape(part)):  # which is no reason to do without
        FemtoQueue(directory, "b")
    refuse.rules.clear()
    refuse("list", part, errno.EACCES)
    queue = FemtoQueue(directory, "b")
    clock.advance(2_000)
    queue.push(b"later")
    assert drained_one(queue) == (b"pending" if hidden == "in_progress" else b"later")


@needs_root
def test_opening_after_a_boot_as_another_user(open_to_all: Path) -> None:
    """The same with a real process of another user; and it may push where there is a `maxsize`."""
    queue = FemtoQueue(open_to_all, "node-1")
    queue.push(b"claimed")
    assert queue.pop()
    queue.push(b"pending")
    [clock_file] = open_to_all.glob("clock-*")
    clock_file.unlink()
    for path in [open_to_all, *open_to_all.rglob("*")]:
        path.chmod(0o777)
    hidden = open_to_all / "pending" / "1700000000000000"
    hidden.mkdir()
    [claims] = (open_to_all / "in_progress").iterdir()
    for path in (hidden, claims):
        path.chmod(0o700)
    code = """
queue = FemtoQueue(sys.argv[1], "node-2", maxsize=5)
print(queue.pop().data, queue.status(queue.push(b"x")))
"""
    assert run("import logging" + AS_NOBODY + code, open_to_all) == "b'pending' pending\n"


# --- a clock file that is no clock file ---------------------------------------------------------------


def break_clock(directory: Path, text: bytes | None) -> None:
    """Overwrite the clock's file, or put a FIFO in its place."""
    [path] = directory.glob("clock-*")
    path.unlink()
    if text is None:
        os.mkfifo(path)
    else:
        path.write_bytes(text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"17999",
        b"-\n",
        b"x\n",
        b"\xff\n",
        b"9" * 16 + b"\n",
        b"-" + b"9" * 16 + b"\n",
        None,
    ],
)
def test_broken_clock_file(directory: Path, clock: Time, text: bytes | None, no_hang: None) -> None:
    """An empty, half-written or replaced clock file is made anew, above all that is in the queue."""
    FemtoQueue(directory, "a").push(b"1")
    break_clock(directory, text)
    clock.step_wall(-86_400)
    queue = FemtoQueue(directory, "b")
    queue.push(b"2")
    FemtoQueue(directory, "c").push(b"3")
    assert drained(queue) == [b"1", b"2", b"3"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "socket"])
def test_hostile_clock_file(directory: Path, clock: Time, kind: str) -> None:
    """A link or a socket in place of the clock file is not followed, and makes nobody fail."""
    FemtoQueue(directory, "a").push(b"1")
    [path] = directory.glob("clock-*")
    path.unlink()
    HOSTILE[kind](path)
    queue = FemtoQueue(directory, "b")
    queue.push(b"2")
    assert drained(queue) == [b"1", b"2"]


def test_stray_names_do_not_drag_the_clock(directory: Path, clock: Time) -> None:
    """A stray name in the far future does not become the time of all that follows."""
    FemtoQueue(directory, "a")
    put(directory / "pending" / "9999999999999999_x", b"stray")
    (directory / "pending" / "9999999999999998").mkdir()
    break_clock(directory, b"")
    queue = FemtoQueue(directory, "a")
    assert int(queue.push(b"1")[:16]) < NOW_US + 10
    assert drained(queue) == [b"1", b"stray"]


# --- due times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_s", [0, 3_600, -3_600, 0.004, -0.004])
def test_scheduled_tasks_come_after_what_was_pending(
    directory: Path, clock: Time, step_s: float
) -> None:
    """A scheduled task comes after all that was pending when it fell due, wall clock set or not."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"1")
    clock.step_wall(step_s)
    queue.schedule(b"scheduled", int(clock.wall * 1e6) + 10_000_000)
    clock.advance(9.999)
    queue.push(b"2")
    clock.advance(0.1)
    queue.push(b"after it")
    found = drained(queue)
    assert found.index(b"scheduled") == 2, found


def test_the_earliest_due_comes_first(directory: Path, clock: Time) -> None:
    """Scheduled tasks come in the order of their due times."""
    queue = FemtoQueue(directory, "a")
    for second in (5, 3, 40_000, 4, 400):
        queue.schedule(b"%d" % second, NOW_US + second * 1_000_000)
    clock.advance(50_000)
    assert drained(queue) == [b"3", b"4", b"5", b"400", b"40000"]


# ====================================================================================================
# Who is alive
# ====================================================================================================

# --- in this process ----------------------------------------------------------------------------------


def test_another_threads_object(directory: Path, queue: FemtoQueue) -> None:
    """An object in this process is alive while it exists, also when its thread has ended."""
    other = FemtoQueue(directory, "node-1")
    claims: list[FemtoTask | None] = []
    thread = threading.Thread(target=lambda: claims.append(other.pop()))
    thread.start()
    thread.join()
    assert drained(queue) == [b"b"]
    assert drained(FemtoQueue(directory, "node-1")) == []
    [claim] = claims
    assert claim and claim.data == b"a"
    other.done(claim)


def test_dropped_object(directory: Path, queue: FemtoQueue) -> None:
    """Dropping the last reference is enough: the tasks come back at the next pop."""
    gc.disable()
    try:
        other = FemtoQueue(directory, "node-1")
        assert other.pop(0.001)
        assert drained(queue) == [b"b"]
        del other
        assert drained(queue) == [b"a"]
    finally:
        gc.enable()


@pytest.mark.parametrize("end", ["close", "drop"])
def test_gone_while_others_have_work(directory: Path, queue: FemtoQueue, end: str) -> None:
    """The tasks of an object that is gone come back at the next pop, before what is younger."""
    other = FemtoQueue(directory, "node-2")
    assert other.pop()
    queue.push(b"c")
    assert drained_one(queue) == b"b"
    if end == "close":
        other.close()
    del other
    assert drained(queue) == [b"a", b"c"]


def test_closed_object(directory: Path, queue: FemtoQueue) -> None:
    """close gives back what was popped and not finished; every later call raises."""
    with FemtoQueue(directory, "node-2") as other:
        claim = other.pop()
    assert claim and drained(queue) == [b"a", b"b"]
    calls = [other.pop, other.counts, lambda: other.push(b""), lambda: other.schedule(b"", NOW_US)]
    calls += [
        lambda call=call: call(claim) for call in (other.done, other.fail, other.touch, other.retry)
    ]
    for call in calls:
        with pytest.raises(FemtoQueueError, match="closed"):
            call()
    other.close()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("call", ["done", "fail", "retry", "touch"])
@pytest.mark.parametrize("end", ["close", "drop"])
def test_claims_of_an_object_that_is_gone(directory: Path, end: str, call: str, keep: bool) -> None:
    """Whoever finishes a claim that was given back gets NotInProgress, and the task is not lost."""
    queue = FemtoQueue(directory, "node-1", keep_done=keep, keep_failed=keep)
    id = queue.push(b"a")
    other = FemtoQueue(directory, "node-2")
    claim = other.pop()
    assert claim
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
    """Objects of two copies of the module in one process are alive to each other, until they are gone."""
    code = """
import importlib.util
def another_copy():
    if sys.argv[2] == "reload":
        return importlib.reload(femtoqueue)
    spec = importlib.util.spec_from_file_location("vendored", femtoqueue.__file__)
    sys.modules["vendored"] = vendored = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vendored)
    return vendored
one = femtoqueue
for _ in range(2):
    mine, third = one.FemtoQueue(sys.argv[1], "node"), one.FemtoQueue(sys.argv[1], "node")
    mine.push_many([b"a", b"b"])
    task = mine.pop()
    two = another_copy()
    theirs = two.FemtoQueue(sys.argv[1], "node")
    other = theirs.pop()
    print(task.data, other.data, mine.pop(), theirs.pop(), third.pop())
    theirs.close()
    task = third.pop()
    print(task.data, third.pop(), mine.pop())
    third.done(task)
    theirs = two.FemtoQueue(sys.argv[1], "node")
    print(theirs.pop())
    del mine
    task = theirs.pop()
    print(task.data, theirs.pop(), third.pop())
    theirs.done(task)
    one = two
"""
    expected = "b'a' b'b' None None None\nb'b' None None\nNone\nb'a' None None\n"
    assert run(code, directory, how) == expected * 2


def interpreters() -> types.ModuleType:
    """What makes another interpreter in this process; no Python until 3.14 has a public name for it."""
    for name in ("_interpreters", "_xxsubinterpreters"):
        if importlib.util.find_spec(name):
            return importlib.import_module(name)
    pytest.skip("this Python has one interpreter")


def test_two_interpreters_in_one_process(directory: Path) -> None:
    """Objects in two interpreters of one process are alive to each other: neither takes what is held."""
    code = """
import importlib
interpreters = importlib.import_module(sys.argv[2])
other = interpreters.create()
def there(code):
    interpreters.run_string(other, code)
queue = FemtoQueue(sys.argv[1], "node")
queue.push_many([b"1", b"2", b"3"])
tasks = [queue.pop()]
there(f"import sys; sys.path[:0] = {sys.path!r}; from femtoqueue import FemtoQueue")
there(f"queue = FemtoQueue({sys.argv[1]!r}, 'node')")
there("tasks = [queue.pop(), queue.pop()]; print([task.data for task in tasks], queue.pop(), flush=True)")
print([task.data for task in tasks], queue.pop(), flush=True)
there("queue.done(tasks[0]); queue.retry(tasks[1])")
tasks.append(queue.pop())
there("print(queue.pop(), flush=True)")
for task in tasks:
    queue.done(task)
print(queue.counts()["done"], queue.pop())
"""
    assert run(code, directory, interpreters().__name__).splitlines() == [
        *("[b'2', b'3'] None", "[b'1'] None", "None", "3 None"),
    ]


# --- same boot and PID namespace ----------------------------------------------------------------------


@pytest.mark.parametrize("node_id", ["node-1", "node-2"])
def test_killed(directory: Path, queue: FemtoQueue, node_id: str) -> None:
    """A killed worker's task is there at the first pop of a new object, at its old place."""
    with claimed_by(directory, node_id) as worker:
        assert drained(FemtoQueue(directory, "node-3")) == [b"b"]
        queue.push(b"c")
        killed(worker)
        again = FemtoQueue(directory, "node-3")
        task = again.pop()
        assert task and (task.data, task.attempt) == (b"a", 2)
        assert drained(again) == [b"c"]
        assert len(os.listdir(directory / "in_progress")) == 1, "nothing is left of the dead"


def test_killed_while_others_work(now: Time, directory: Path, queue: FemtoQueue) -> None:
    """A killed worker's task comes back within 1 s, to a worker that never found the queue empty."""
    with claimed_by(directory, "node-2") as worker:
        set_to_real_time(now)
        assert drained_one(queue) == b"b"
        killed(worker)
        found = []
        while b"a" not in found and len(found) < 11:
            queue.push(b"more")
            found.append(drained_one(queue))
            now.advance(0.1)
        assert found[-1] == b"a"


def test_killed_while_others_wait(now: Time, directory: Path, queue: FemtoQueue) -> None:
    """A killed worker's task comes back within 1 s, to a worker that waits in pop."""
    with claimed_by(directory, "node-2") as worker:
        set_to_real_time(now)
        assert drained(queue) == [b"b"]
        killed(worker)
        assert drained_one(queue, 1.01) == b"a"


def test_zombie(directory: Path, queue: FemtoQueue) -> None:
    """A worker that was killed and not yet waited for is dead."""
    with claimed_by(directory, "node-2") as worker:
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie, and stays one
        os.kill(worker.pid, 0)
        assert drained(FemtoQueue(directory, "node-3")) == [b"a", b"b"]


SYS_EXIT = {"x86_64": 60, "aarch64": 93}.get(platform.machine())


@pytest.mark.skipif(SYS_EXIT is None, reason="the number of the exit system call is not known here")
def test_zombie_leader(directory: Path, queue: FemtoQueue) -> None:
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
    worker = start(code, directory)
    assert worker.stdout
    id = worker.stdout.readline().strip()
    end_s = time.monotonic() + 10
    while Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end_s
    assert drained(FemtoQueue(directory, "node-3")) == [b"b"]
    worker.communicate("go\n", timeout=20)
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


def not_of_proc(real: Callable[..., Any], path: Any, *rest: Any, **options: Any) -> Any:
    """`open`, where the files of processes cannot be read."""
    if re.match(r"/proc/\d", str(path)):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    return real(path, *rest, **options)


def test_unreadable_proc(directory: Path, queue: FemtoQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A /proc that cannot be read proves nothing: unknown is alive, only ESRCH is dead."""
    with claimed_by(directory, "node-2") as worker:
        for module in (builtins, os):
            monkeypatch.setattr(module, "open", functools.partial(not_of_proc, module.open))
        assert drained(FemtoQueue(directory, "node-3")) == [b"b"]
        killed(worker)
        assert drained(FemtoQueue(directory, "node-3")) == [b"a"]


HIDEPID = ["unshare", "-m", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec "$0" "$@"']


@needs(*HIDEPID, "true")
def test_hidepid(open_to_all: Path) -> None:
    """Another user's worker, hidden by hidepid, is not robbed while it lives."""
    queue = FemtoQueue(open_to_all, "node-1")
    queue.push(b"a")
    queue.push(b"b")
    judge = """
assert not os.path.exists("/proc/" + sys.argv[2])
queue = FemtoQueue(sys.argv[1], "node-3")
print(*[task.data for task in iter(queue.pop, None)])
"""
    with claimed_by(open_to_all, "node-2") as worker:
        for path in [open_to_all, *open_to_all.rglob("*")]:
            path.chmod(0o777)
        as_nobody = functools.partial(run, AS_NOBODY + judge, open_to_all, worker.pid, under=HIDEPID)
        assert as_nobody() == "b'b'\n"
        killed(worker)
        assert as_nobody() == "b'a' b'b'\n"


IDENTITY_FAULTS = """
import builtins, errno
broken = ""
def fault(real):
    def call(path, *rest, **options):
        if broken and path == broken:
            raise OSError(getattr(errno, sys.argv[2]), "broken", path)
        return real(path, *rest, **options)
    return call
builtins.open, os.readlink = fault(builtins.open), fault(os.readlink)
def try_in_vain(call):
    global broken
    for broken in PATHS:
        try:
            print("no error:", call(), flush=True)
        except OSError as error:
            print(error.errno == getattr(errno, sys.argv[2]), error.filename == broken, flush=True)
    broken = ""
PATHS = [f"/proc/{path}" for path in ("self/stat", "sys/kernel/random/boot_id", "self")]
PATHS += [f"/proc/self/ns/{kind}" for kind in ("time", "pid")]
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")
@pytest.mark.parametrize("error", ["EMFILE", "EIO"])
@pytest.mark.parametrize("call", ["constructor", "first call in a forked child"])
def test_no_false_identity(
    directory: Path, queue: FemtoQueue, spawn: Spawn, call: str, error: str
) -> None:
    """A process that cannot find out who it is gets OSError; when it can, it is who it is."""
    code = IDENTITY_FAULTS
    if call == "constructor":
        code += 'try_in_vain(lambda: FemtoQueue(sys.argv[1], "node-1"))\n'
    else:
        code += """
queue = FemtoQueue(sys.argv[1], "node-1")
broken = PATHS[0]
if pid := os.fork():
    sys.exit(os.waitpid(pid, 0)[1])
try_in_vain(queue.pop)
"""
    mine = queue.pop()
    assert mine
    [(_, _, start_time, place, _)] = [
        path.name.split("~") for path in (directory / "in_progress").iterdir()
    ]
    process = spawn(code + CLAIM, directory, error)  # whose node_id is `error` for the claim
    for _ in range(5):
        expect(process, "True True")
    assert process.stdout and process.stdout.readline()
    found = {path.name.split("~")[0]: path.name.split("~") for path in directory.glob("in_progress/*")}
    assert found[error][3] == place
    assert int(found[error][2]) >= int(start_time) > 0
    assert len([*directory.glob("clock-*")]) == 1
    assert queue.pop() is None and FemtoQueue(directory, error).pop() is None, "it is alive"
    assert tell(process, "queue.done(task)") == "None"
    queue.done(mine)


# --- elsewhere ----------------------------------------------------------------------------------------


@needs_pid_namespace
@pytest.mark.parametrize("prefix", [NEW_PIDS, NEW_PIDS_OLD_PROC])
def test_another_pid_namespace(
    directory: Path, queue: FemtoQueue, prefix: list[str], now: Time
) -> None:
    """Of another container's worker of another node_id nothing is known; its lease decides."""
    with claimed_by(directory, "node-2", prefix) as worker:
        assert drained(queue) == [b"b"]
        set_to_real_time(now)
        now.advance(20)
        assert FemtoQueue(directory, "node-3").pop() is None
        killed(worker)
        assert FemtoQueue(directory, "node-3").pop() is None
        now.advance(11)
        assert drained(queue) == [b"a"]


@needs_pid_namespace
def test_my_node_id_in_another_pid_namespace(directory: Path, queue: FemtoQueue) -> None:
    """My own node_id in another container is dead: its tasks come back at the first pop."""
    with claimed_by(directory, "node-1", NEW_PIDS):
        assert drained(FemtoQueue(directory, "node-1")) == [b"a", b"b"]


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
print(queue.pop().data)
"""
    assert run(code, directory, under=NEW_PIDS_OLD_PROC) == "b'b' None\nb'a'\n"


NO_BOOT_ID = """
import builtins
def hidden(path, *rest, real=open, **options):
    if str(path).startswith("/proc/sys/"):
        raise FileNotFoundError(2, "it is hidden", path)
    return real(path, *rest, **options)
builtins.open = hidden
"""


def test_my_node_id_where_the_boot_cannot_be_told(
    directory: Path, queue: FemtoQueue, now: Time, spawn: Spawn
) -> None:
    """My node_id is not judged dead by who sees no boot id, nor when it sees none; its lease decides."""
    worker = spawn(NO_BOOT_ID + CLAIM, directory, "node-1")
    assert worker.stdout and worker.stdout.readline(), "it did not get the task"
    assert drained_one(queue) == b"b"
    assert queue.pop() is None
    assert tell(worker, "queue.done(task)") == "None"
    queue.push(b"c")
    mine = queue.pop()
    assert mine
    assert tell(worker, "queue.pop()") == "None"
    queue.retry(mine)
    assert tell(worker, "queue.pop().data") == "b'c'"
    set_to_real_time(now)
    now.advance(20)
    assert queue.pop() is None
    now.advance(11)
    assert drained(queue) == [b"c"]


@needs_mounts
def test_earlier_boot(directory: Path, queue: FemtoQueue, tmp_path: Path, now: Time) -> None:
    """From an earlier boot, my node_id's tasks come back at the first pop, others' after the lease."""
    before = rebooted(tmp_path)
    with claimed_by(directory, "node-1", before), claimed_by(directory, "node-2", before):
        set_to_real_time(now)
        assert drained(FemtoQueue(directory, "node-1")) == [b"a"]
        now.advance(20)
        assert queue.pop() is None
        now.advance(11)
        assert drained(queue) == [b"b"]


def test_empty_directories_of_owners_elsewhere(directory: Path, clock: Time) -> None:
    """An owner that cannot be judged leaves an empty directory: it goes when it is older than a day."""
    FemtoQueue(directory, "a")
    claim = f"{OLD_ID}~1~{NOW_US + 10**12}"
    kept = [DEAD_OWNER.replace("~0", f"~{number}") for number in range(1, 4)]
    for owner, age_s in zip((DEAD_OWNER, *kept), (86_500, 80_000, -(10**6), 10**6), strict=True):
        (directory / "in_progress" / owner).mkdir()
        if owner == kept[2]:
            put(directory / "in_progress" / owner / claim)
        os.utime(directory / "in_progress" / owner, (clock.wall - age_s, clock.wall - age_s))
    queue = FemtoQueue(directory, "a")
    assert queue.pop() is None
    assert {*os.listdir(directory / "in_progress")} == {*kept}
    clock.advance(10_000)
    assert queue.pop() is None
    assert {*os.listdir(directory / "in_progress")} == {*kept[1:]}
    assert os.listdir(directory / "in_progress" / kept[2]) == [claim]


def test_hostile_owners(directory: Path, clock: Time) -> None:
    """Directories that are named almost like an owner, or like one with strange numbers, do no harm."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"x")
    task = queue.pop()
    place = os.listdir(directory / "in_progress")[0].split("~")[3]
    for pid in ("0", "1", str(os.getppid()), "9" * 30):
        put(directory / "in_progress" / "~".join(["a", pid, "1", place, "x"]) / "not a task")
    for name in ("a", "a~1~2~3", "a~x~1~p~t", "a~~1~p~t", "a~1~1~p~t~", "~1~1~p~t"):
        put(directory / "in_progress" / name / f"{OLD_ID}~1~1700000000000000")
    queue.done(task)
    before = snapshot(directory)
    assert queue.pop() is None
    assert queue.counts()["in_progress"] == 0
    assert snapshot(directory) == before


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


def test_live_owner_within_its_lease(directory: Path, clock: Time) -> None:
    """A task is never taken from a live owner within its lease, however long ago it was pushed."""
    queue, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    queue.push(b"old")
    clock.advance(86_400)
    assert queue.pop()
    for _ in range(29):
        assert other.pop() is None
        clock.advance(1)
    clock.advance(1.001)
    assert drained(other) == [b"old"]


def test_the_deadline_is_set_by_who_claims(directory: Path, clock: Time) -> None:
    """The deadline is set by who claims, not by who looks."""
    patient, hasty = FemtoQueue(directory, "a", 60_000), FemtoQueue(directory, "b", 1_000)
    patient.push(b"x")
    assert patient.pop()
    clock.advance(59)
    assert hasty.pop() is None
    clock.advance(1.001)
    assert hasty.pop()
    assert patient.pop() is None
    clock.advance(1.001)
    assert drained(patient) == [b"x"]


def test_expired_while_others_have_work(directory: Path, clock: Time) -> None:
    """A task whose lease ran out comes back within 1 s, also where there is other work."""
    queue, other = FemtoQueue(directory, "a", 10_000), FemtoQueue(directory, "b")
    for number in range(100):
        queue.push(b"%d" % number)
    assert queue.pop()
    clock.advance(9.5)
    found = []
    while b"0" not in found:
        found.append(drained_one(other))
        clock.advance(0.1)
    assert len(found) <= 16


# ====================================================================================================
# The API, in the order of its table
# ====================================================================================================


def test_a_lease_begins_with_the_claim(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the look before a claim takes, the claim has a full lease."""
    q = FemtoQueue(directory, "node", timeout_stale_ms=1_000)
    for _ in range(5):
        q.schedule(b"x", int(clock.wall * 1e6) + 1_000_000)
    clock.advance(2)
    rename = os.rename

    def slow(source: str, target: str) -> None:
        clock.advance(0.9)
        rename(source, target)

    monkeypatch.setattr(os, "rename", slow)
    task = q.pop()
    monkeypatch.undo()
    assert task
    [claim] = (directory / "in_progress").glob("*/*")
    assert int(claim.name.rpartition("~")[2]) >= int((clock.wall - 0.81) * 1e6)  # two slow renames


# --- the constructor ----------------------------------------------------------------------------------


def test_signature() -> None:
    """The constructor takes what the original's takes, in its order, and more by keyword only."""
    assert str(inspect.signature(FemtoQueue)).replace("'", "").replace(" -> None", "") == (
        "(data_dir: str | os.PathLike[str], node_id: str, timeout_stale_ms: float = 30000, "
        "sync_after_write: bool = False, *, max_attempts: int | None = None, keep_done: bool = True, "
        "keep_failed: bool = True, maxsize: int = 0)"
    )


@pytest.mark.parametrize("kind", [str, Path])
def test_data_dir_is_made(directory: Path, kind: type) -> None:
    """data_dir is a str or a path, of a directory that is made if need be."""
    FemtoQueue(kind(directory / "deep" / "er"), "a").push(b"x")
    assert drained(FemtoQueue(directory / "deep" / "er", "b")) == [b"x"]


NAN = float("nan")


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        *(("data_dir", value, TypeError) for value in (5, None, b"bytes")),
        *(("data_dir", value, ValueError) for value in ("", "a\0b")),
        *(("node_id", value, TypeError) for value in (5, None, b"bytes")),
        *(
            ("node_id", value, ValueError)
            for value in ("", "a/b", "a~b", "a\n", "a\0", "\udc80", "é" * 33)
        ),
        *(("timeout_stale_ms", value, TypeError) for value in ("5", None, True, b"")),
        *(("timeout_stale_ms", value, ValueError) for value in (0, -1, 0.0, NAN, float("inf"))),
        *(("max_attempts", value, TypeError) for value in ("5", 1.5, True)),
        *(("max_attempts", value, ValueError) for value in (0, -1)),
        *(("maxsize", value, TypeError) for value in ("5", 1.5, None, True)),
        ("maxsize", -1, ValueError),
        *(("sync_after_write", value, TypeError) for value in ("no", "", None, 1.0, [])),
        *(("keep_done", value, TypeError) for value in ("false", None, b"")),
        *(("keep_failed", value, TypeError) for value in ("0", None, ())),
    ],
)
def test_bad_constructor_arguments(
    directory: Path, argument: str, value: object, error: type[Exception]
) -> None:
    """A bad argument gets its error at the call, which names it, before anything is written."""
    arguments = {"data_dir": directory, "node_id": "a", argument: value}
    with pytest.raises(error, match=argument):
        FemtoQueue(**arguments)
    assert not directory.exists()


def test_a_directory_that_cannot_be_is_an_os_error(tmp_path: Path) -> None:
    """Where no directory can be made, although the one above it is there, the error says so."""
    with pytest.raises(OSError, match="/proc/femtoqueue"):
        FemtoQueue("/proc/femtoqueue", "node")


@pytest.mark.parametrize("below", [False, True], ids=["itself", "below"])
@pytest.mark.parametrize("kind", ["file", "dangling link", "link loop"])
def test_a_data_dir_that_is_no_directory(tmp_path: Path, kind: str, below: bool) -> None:
    """Where a file, or a link that leads nowhere, is in the way, the OSError names it; nothing is made."""
    path = tmp_path / "queue"
    if kind == "file":
        put(path)
    else:
        path.symlink_to("nowhere" if kind == "dangling link" else "queue")
    before = snapshot(tmp_path, times=True)
    with pytest.raises(OSError) as caught:
        FemtoQueue(path / "deep" / "er" if below else path, "node")
    if below:
        assert caught.value.filename.startswith(str(path))
        assert not isinstance(caught.value, FileExistsError)
    else:
        assert (type(caught.value), caught.value.filename) == (NotADirectoryError, str(path))
    assert snapshot(tmp_path, times=True) == before


# --- push, push_many ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"x", bytearray(b"x"), memoryview(b"x"), memoryview(b"-x-")[1:2]],
    ids=lambda data: type(data).__name__,
)
def test_bytes_like(directory: Path, clock: Time, data: bytes) -> None:
    """Payloads are bytes-like, of any kind."""
    queue = FemtoQueue(directory, "a")
    queue.push(data)
    queue.push_many([data])
    queue.schedule(data, NOW_US)
    assert drained(queue) == [b"x"] * 3


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
@pytest.mark.parametrize("items", [b"bytes", "text", memoryview(b"x"), bytearray(b"x")])
def test_push_many_refuses_one_payload(directory: Path, durable: bool, items: object) -> None:
    """A payload in place of several is a mistake, not so many tasks of one byte."""
    with pytest.raises(TypeError, match="push"):
        FemtoQueue(directory, "node", sync_after_write=durable).push_many(items)


@durable_or_not
@pytest.mark.parametrize("bad", ["text", None, 5])
def test_bad_item_in_a_batch(directory: Path, bad: object, durable: bool) -> None:
    """If push_many raises, what was pushed is a prefix of the items."""
    queue = FemtoQueue(directory, "a", sync_after_write=durable)
    with pytest.raises(TypeError, match="data"):
        queue.push_many([b"0", b"1", bad, b"3"])  # type: ignore[list-item]
    found = drained(queue)
    assert found == [b"0", b"1"][: len(found)]
    assert not files(directory / "creating")


@durable_or_not
def test_push_many_that_fails_has_pushed_a_prefix(directory: Path, durable: bool) -> None:
    """When an item is bad, or the iterable raises, those pushed are the first ones."""
    q = FemtoQueue(directory, "node", sync_after_write=durable)

    def items() -> Iterator[bytes]:
        yield b"1"
        yield b"2"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        q.push_many(items())
    assert drained(q) in ([], [b"1"], [b"1", b"2"])
    with pytest.raises(TypeError, match="encode"):
        q.push_many([b"1", "text", b"3"])
    assert drained(q) in ([], [b"1"])
    assert names(directory, "creating") == []


def test_push_many_takes_back_the_last_ones_first(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a failed batch is withdrawn, what can be seen of it is a prefix at every moment."""
    q = FemtoQueue(directory, "node", sync_after_write=True)
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
def test_push_many_returns_only_what_was_pushed(directory: Path, durable: bool) -> None:
    """Files that somebody deletes from creating/ are an error, never ids of tasks that do not exist."""
    q = FemtoQueue(directory, "node", sync_after_write=durable)

    def items() -> Iterator[bytes]:
        yield b"1"
        for name in names(directory, "creating"):
            (directory / "creating" / name).unlink()
        yield b"2"

    try:
        ids = q.push_many(items())
    except FileNotFoundError:
        assert drained(q) in ([], [b"1"])
    else:
        assert ids == list(q.ids("pending"))


@durable_or_not
def test_maxsize_is_exact_for_one_producer(directory: Path, durable: bool) -> None:
    """push raises queues.Full when maxsize tasks are pending, not before; a pop makes room."""
    q = FemtoQueue(directory, "node", maxsize=5, sync_after_write=durable)
    for _ in range(5):
        q.push(b"x")
    for push in (q.push, lambda data: q.push_many([data])):
        with pytest.raises(queues.Full, match="5 tasks are pending"):
            push(b"x")
    (directory / "file").write_bytes(b"x")
    for move in (False, True):
        with pytest.raises(queues.Full):
            q.push_file(directory / "file", move=move)
    assert (directory / "file").exists()
    assert names(directory, "creating") == []
    q.pop()
    q.push(b"y")
    with pytest.raises(queues.Full):
        q.push(b"z")
    assert q.counts()["pending"] == 5


@durable_or_not
def test_maxsize_holds_for_push_many(directory: Path, durable: bool) -> None:
    """A batch larger than the room raises queues.Full, and what was pushed fits and is a prefix."""
    q = FemtoQueue(directory, "node", maxsize=5, sync_after_write=durable)
    with pytest.raises(queues.Full):
        q.push_many(b"%d" % n for n in range(20))
    pushed = drained(q)
    assert len(pushed) <= 5
    assert pushed == [b"%d" % n for n in range(len(pushed))]
    assert len(q.push_many([b"x"] * 5)) == 5


def test_maxsize_among_what_others_hide(directory: Path, refuse: Refusal) -> None:
    """A bucket that another user keeps to himself does not stop a push; what is seen is counted."""
    q = FemtoQueue(directory, "node", maxsize=2)
    hidden = put(directory / "pending" / "1700000000000000" / "1700000000000000_x").parent
    refuse("list", hidden.name, errno.EACCES)
    for _ in range(2):
        q.push(b"x")
    with pytest.raises(queues.Full):
        q.push(b"x")
    refuse.rules.clear()
    refuse("list", hidden.name, errno.EIO)
    with pytest.raises(OSError, match=hidden.name):  # which is no reason to go beyond the limit
        q.push(b"x")


@pytest.mark.parametrize("how", ["due", "retried", "retried through another", "requeued", "abandoned"])
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
    for claim in claims if how.startswith("retried") else ():
        (q if how == "retried" else other).retry(claim)
    for id in list(q.ids("failed")):
        q.requeue(id)
    clock.advance(1.1)
    assert q.pop()
    for pending in (12, 10):
        with pytest.raises(queues.Full):
            while True:
                q.push(b"y")
        assert q.counts()["pending"] == pending
        for _ in range(3):
            assert q.pop()


# --- push_file ----------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[Path]]:
    """A directory on the queue's filesystem, and one on another, if there is one."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        yield [tmp_path]
    else:
        with tempfile.TemporaryDirectory(dir=memory) as other:
            yield [tmp_path, Path(other)]


@durable_or_not
@pytest.mark.parametrize("move", [False, True], ids=["copy", "move"])
def test_push_file_copies_or_moves(
    directory: Path, places: list[Path], durable: bool, move: bool
) -> None:
    """push_file makes a file's content a task, from any filesystem; moved, the file is gone."""
    q = FemtoQueue(directory, "node", sync_after_write=durable)
    for place in places:
        for content in (b"", b"x" * 3_000_000):
            source = place / "file"
            source.write_bytes(content)
            inode = source.stat().st_ino
            id = q.push_file(str(source) if move else source, move=move)
            assert source.exists() is not move
            task = q.pop()
            assert (task.id, task.data) == (id, content)
            if move and place == places[0]:
                assert os.stat(task.path).st_ino == inode
            q.done(task)
    assert names(directory, "creating") == []


@pytest.mark.parametrize("move", [False, True], ids=["copy", "move"])
def test_push_file_refuses_what_is_no_file(directory: Path, tmp_path: Path, move: bool) -> None:
    """A directory, a FIFO (without waiting for a writer), a device: ValueError; nothing is changed."""
    q = FemtoQueue(directory, "node")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link to fifo").symlink_to("fifo")
    for name in ("fifo", "dir", "link to fifo", "/dev/null"):
        with pytest.raises(ValueError, match=re.escape(name)):
            q.push_file(tmp_path / name, move=move)
    for name in ("dangling", "missing"):
        with pytest.raises((FileNotFoundError, ValueError), match=name):
            q.push_file(tmp_path / name, move=move)
    assert q.counts()["pending"] == 0
    assert names(directory, "creating") == []
    assert stat.S_ISFIFO(os.lstat(tmp_path / "fifo").st_mode) and (tmp_path / "dir").is_dir()


def test_push_file_moves_no_symbolic_link(directory: Path, tmp_path: Path) -> None:
    """Moved, a link would be a task that nobody follows: ValueError, and link and file stay."""
    q = FemtoQueue(directory, "node")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(ValueError, match="symbolic link"):
        q.push_file(tmp_path / "link", move=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"x"
    assert q.counts()["pending"] == 0


# --- schedule -----------------------------------------------------------------------------------------


def test_schedule_takes_any_time_zone(directory: Path, clock: Time) -> None:
    """schedule takes an aware datetime of any time zone."""
    queue = FemtoQueue(directory, "a")
    zone = datetime.timezone(datetime.timedelta(hours=9))
    queue.schedule(b"x", datetime.datetime.fromtimestamp(1_800_000_010, zone))
    clock.advance(9.9)
    assert queue.pop() is None
    clock.advance(0.2)
    assert drained(queue) == [b"x"]


def test_schedule_takes_an_aware_datetime(directory: Path, clock: Time) -> None:
    """A datetime is due at its instant, whatever its time zone; a naive one is refused."""
    q = FemtoQueue(directory, "node")
    zone = datetime.timezone(datetime.timedelta(hours=5, minutes=30))
    id = q.schedule(b"x", datetime.datetime.fromtimestamp(clock.wall + 60, zone))
    assert names(directory, "scheduled") == [f"{id}~0~{int((clock.wall + 60) * 1e6)}"]
    clock.advance(59.9)
    assert q.pop() is None
    clock.advance(0.1)
    assert q.pop().id == id
    with pytest.raises(ValueError, match="time zone"):
        q.schedule(b"x", datetime.datetime(2030, 1, 1))  # noqa: DTZ001
    with pytest.raises(TypeError, match="time_us"):
        q.schedule(b"x", datetime.date(2030, 1, 1))


# --- pop ----------------------------------------------------------------------------------------------


def test_timeout_is_never_early(directory: Path) -> None:
    """pop(timeout) never returns early."""
    queue = FemtoQueue(directory, "a")
    for timeout_s in (0, 0.001, 0.1):
        begun_s = time.monotonic()
        assert queue.pop(timeout_s) is None
        assert time.monotonic() - begun_s >= timeout_s


def test_timeout_to_the_point(directory: Path, clock: Time) -> None:
    """pop(timeout) ends when the time is over, not a poll later, and sleeps meanwhile."""
    queue = FemtoQueue(directory, "a")
    sleeps = []
    time.sleep = lambda seconds: (sleeps.append(seconds), clock.advance(seconds))  # type: ignore
    begun_s = clock.boot
    assert queue.pop(timeout=5.0001) is None
    assert 0 <= clock.boot - begun_s - 5.0001 < 1e-6
    assert 10 < len(sleeps) < 1_500
    assert queue.pop() is None and queue.pop(0.0) is None
    assert clock.boot - begun_s < 5.001, "without a timeout nobody sleeps"


def test_wakes_on_a_push(directory: Path) -> None:
    """A worker that waits gets a task at once, without being told."""
    code = """
queue = FemtoQueue(sys.argv[1], "worker")
for timeout in (60, None):
    print("ready", flush=True)
    task = queue.pop(timeout)
    print(task.data.decode(), time.monotonic(), flush=True)
    queue.done(task)
"""
    queue = FemtoQueue(directory, "a")
    worker = start(code, directory)
    assert worker.stdout
    for payload in (b"1", b"2"):
        assert worker.stdout.readline() == "ready\n"
        time.sleep(0.05)  # it may be waiting by now, or not: both must work
        pushed_s = time.monotonic()
        queue.push(payload)
        found, at_s = worker.stdout.readline().split()
        assert found.encode() == payload
        assert float(at_s) - pushed_s < 2
    assert worker.communicate(timeout=20)[0] == "" and worker.returncode == 0


def test_due_while_waiting(directory: Path, clock: Time) -> None:
    """pop(timeout) returns a scheduled task when it falls due, not before."""
    queue = FemtoQueue(directory, "a")
    queue.schedule(b"x", NOW_US + 3_000_000)
    assert queue.pop(2.9) is None
    task = queue.pop(timeout=60)
    assert task and task.data == b"x"
    assert 1_800_000_003 <= clock.wall < 1_800_000_003.02


@pytest.mark.parametrize("work_s", [0, 0.5, 1.5, 3, 10, 29])
def test_never_none_after_slow_work(directory: Path, clock: Time, work_s: float) -> None:
    """pop never returns None while a task is pending, however long the work between two pops takes."""
    queue = FemtoQueue(directory, "a")
    for number in range(20):
        queue.push(b"%d" % number)
    for number in range(20):
        task = queue.pop()
        assert task and task.data == b"%d" % number
        clock.advance(work_s)
        queue.done(task)
        clock.advance(work_s)
    assert queue.pop() is None


def test_never_none_though_the_own_directory_was_removed(directory: Path, queue: FemtoQueue) -> None:
    """pop never returns None while a task is pending, though the owner's directory was removed."""
    assert drained_one(queue) == b"a"
    [own] = (directory / "in_progress").iterdir()
    own.rmdir()
    assert drained(queue) == [b"b"]


def test_never_none_while_due(directory: Path, clock: Time) -> None:
    """pop never returns None while a task is due or abandoned, however recently it looked."""
    queue = FemtoQueue(directory, "a")
    queue.schedule(b"due", NOW_US + 500_000)
    queue.push(b"leased")
    other = FemtoQueue(directory, "b", 300)
    assert other.pop()
    assert queue.pop() is None
    clock.advance(0.31)
    assert drained(queue) == [b"leased"]
    assert queue.pop() is None
    clock.advance(0.2)
    assert drained(queue) == [b"due"]


def test_never_none_for_a_stamp_in_the_future(directory: Path, clock: Time) -> None:
    """pop never returns None while a task is pending, though its stamp is in the future."""
    queue = FemtoQueue(directory, "a")
    put(directory / "pending" / f"{NOW_US + 3_600_000_000}_ahead", b"ahead")
    queue.push(b"1")
    assert drained(queue) == [b"1", b"ahead"]


def test_never_none_while_others_skip(
    directory: Path, queue: FemtoQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pop never returns None for what another thread of the object skipped after a lost race."""
    rival = FemtoQueue(directory, "node-2")
    loser = threading.Thread(target=lambda: drained(queue))
    skipped, over = threading.Event(), threading.Event()
    next_name, rename = femtoqueue._Listing.next, os.rename
    lost: list[FemtoTask | None] = []

    def next_in_turn(listing: object) -> tuple[str, str] | None:
        if not loser.ident:  # our listing has begun: the other thread shares it from here on
            loser.start()
            assert skipped.wait(10)
        elif lost and not skipped.is_set():
            skipped.set()
            assert over.wait(10)
        return next_name(listing)

    def rename_too_late(source: str, target: str) -> None:
        if threading.current_thread() is loser and not lost and "/in_progress/node-1~" in target:
            lost.append(rival.pop())
        rename(source, target)

    queue.push(b"c")
    with claimed_by(directory, "node-3"):  # of "a"; objects of one process do not skip
        monkeypatch.setattr(os, "urandom", lambda size: b"\xff" * size)
        monkeypatch.setattr(os, "rename", rename_too_late)
        monkeypatch.setattr(femtoqueue._Listing, "next", next_in_turn)
        task = queue.pop()
        over.set()
        loser.join()
    assert lost[0] and lost[0].data == b"b"
    assert task and task.data == b"c"


def test_never_none_while_threads_empty_what_was_listed(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pop never returns None for another thread that took all the names just found in a bucket."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"1")
    clock.advance(2_000)
    queue.push(b"2")  # in another bucket
    found: list[FemtoTask | None] = []
    thread = threading.Thread(target=lambda: found.append(queue.pop()))

    class Final:
        """The attribute of that name; when it gets a name at last, another thread is quicker."""

        def __get__(self, listing: Any, owner: type) -> list[tuple[str, str]]:
            return listing.__dict__["_final"]

        def __set__(self, listing: Any, final: list[tuple[str, str]]) -> None:
            listing.__dict__["_final"] = final
            if final and not thread.ident:
                thread.start()
                thread.join()

    monkeypatch.setattr(femtoqueue._Listing, "_final", Final(), raising=False)
    found.append(queue.pop())
    assert [task and task.data for task in found] == [b"1", b"2"]


def test_never_none_while_threads_make_their_directory(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread that makes the owner's directory first takes no task away, and none is passed."""
    queue = FemtoQueue(directory, "node-1")
    queue.push(b"0")
    assert drained(queue) == [b"0"]
    clock.advance(3)
    assert queue.pop() is None  # which removes the directory
    queue.push(b"a")
    queue.push(b"b")
    real = os.rename
    found: list[FemtoTask | None] = []

    def rename_too_early(source: str, target: str) -> None:
        try:
            real(source, target)
        except FileNotFoundError:  # there is no such directory
            monkeypatch.setattr(os, "rename", real)
            thread = threading.Thread(target=lambda: found.append(queue.pop()))
            thread.start()
            thread.join()
            raise

    monkeypatch.setattr(os, "rename", rename_too_early)
    found.append(queue.pop())
    assert [task and task.data for task in found] == [b"b", b"a"]


def test_what_was_claimed_at_the_second_try_is_not_taken_back(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that failed and then worked, within one pop, is kept like any other."""
    queue, producer = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    queue.push(b"1")
    real_open, real_scandir = os.open, os.scandir
    failures = iter([errno.EMFILE, errno.EMFILE])
    pushes = iter([lambda: None, lambda: producer.push(b"2")])

    def open_in_vain(path: str, *rest: int) -> int:
        if "/in_progress/" in path and (code := next(failures, None)):
            raise OSError(code, os.strerror(code), path)
        return real_open(path, *rest)

    def scandir_late(path: str) -> object:
        if "/pending/" in path:  # what comes between the top and a bucket is left to the next listing
            next(pushes, lambda: None)()
        return real_scandir(path)

    monkeypatch.setattr(os, "open", open_in_vain)
    monkeypatch.setattr(os, "scandir", scandir_late)
    tasks = [queue.pop()]
    clock.advance(1.1)
    tasks.append(queue.pop())
    clock.advance(1.1)
    assert queue.pop() is None and next(failures, None) is next(pushes, None) is None
    for task in tasks:
        assert task
        queue.done(task)
    assert {task.data for task in tasks if task} == {b"1", b"2"}


def test_put_back_unread_by_another_worker(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never None while pending, also if another worker claimed it meanwhile and put it back."""
    q = FemtoQueue(directory, "node")
    q.push(b"0")
    q.done(q.pop())
    q.push(b"x")
    [path] = map(str, (directory / "pending").glob("*/*"))
    hidden = str(directory / "elsewhere")
    rename, scandir = os.rename, os.scandir
    moves = iter((path, hidden))

    def take(source: str, target: str) -> None:
        if source == path and next(moves, None) == path:
            rename(path, hidden)
        rename(source, target)

    def put_back(place: str) -> Any:
        if os.path.exists(hidden):
            rename(hidden, path)
        return scandir(place)

    monkeypatch.setattr(os, "rename", take)
    monkeypatch.setattr(os, "scandir", put_back)
    task = q.pop()
    assert task and task.data == b"x"


# --- done, fail ---------------------------------------------------------------------------------------

VERDICTS = {
    "done": lambda q, task: q.done(task),
    "fail": lambda q, task: q.fail(task),
    "retry": lambda q, task: q.retry(task),
    "retry-later": lambda q, task: q.retry(task, 1_000),
}


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "delete"])
@pytest.mark.parametrize("second", VERDICTS)
@pytest.mark.parametrize("first", VERDICTS)
def test_a_task_is_finished_once(directory: Path, first: str, second: str, keep: bool) -> None:
    """After one verdict every other, and the same one again, raises NotInProgress, each time."""
    q = FemtoQueue(directory, "node", keep_done=keep, keep_failed=keep)
    q.push(b"x")
    task = q.pop()
    VERDICTS[first](q, task)
    before = files(directory)
    for _ in range(2):
        with pytest.raises(NotInProgress):
            VERDICTS[second](q, task)
        assert files(directory) == before


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "delete"])
@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_lost_claim_has_no_verdict(directory: Path, clock: Time, verdict: str, keep: bool) -> None:
    """Whose lease ran out gets NotInProgress, however often he tries, and whatever the next one did."""
    q = FemtoQueue(directory, "node", keep_done=keep, keep_failed=keep)
    other = FemtoQueue(directory, "other", keep_done=keep, keep_failed=keep)
    q.push(b"x")
    lost = q.pop()
    clock.advance(31)
    task = other.pop()
    for finish in (lambda: None, lambda: other.done(task)):
        finish()
        before = files(directory)
        for _ in range(2):
            with pytest.raises(NotInProgress):
                VERDICTS[verdict](q, lost)
            assert files(directory) == before


def test_not_in_progress_once_finished_or_lost(directory: Path, clock: Time) -> None:
    """Whoever finishes a task twice, or after its lease was lost, gets NotInProgress."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"x")
    first = queue.pop()
    clock.advance(31)
    second = queue.pop()
    assert first and second and (first.attempt, second.attempt) == (1, 2)
    calls = (queue.done, queue.fail, queue.touch, queue.retry)
    for call in calls:  # not even through the very object that has it again
        with pytest.raises(NotInProgress, match=re.escape(first.id)):
            call(first)
    queue.done(second)
    for call in calls:
        with pytest.raises(NotInProgress):
            call(second)
    assert queue.counts() == {**dict.fromkeys(femtoqueue.STATES, 0), "done": 1}


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "delete"])
@pytest.mark.parametrize("call", [*VERDICTS, "touch"])
def test_a_task_of_another_queue(directory: Path, clock: Time, call: str, keep: bool) -> None:
    """Finishing or touching what was popped from another directory is a ValueError, and changes none."""
    mine = FemtoQueue(directory, "node", keep_done=keep, keep_failed=keep)
    theirs = FemtoQueue(directory.with_name("other"), "node")
    for queue in (mine, theirs):
        queue.push(b"x")
    held, task = mine.pop(), theirs.pop()
    before = snapshot(directory.parent, times=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"task: {re.escape(task.id)} is of another queue"):
            VERDICTS.get(call, FemtoQueue.touch)(mine, task)
        assert snapshot(directory.parent, times=True) == before
    mine.done(held)
    theirs.done(task)


@pytest.mark.parametrize("how", ["popped by way of a link", "finished by way of a link", "moved"])
@pytest.mark.parametrize("call", [*VERDICTS, "touch"])
def test_a_task_of_the_same_queue_under_another_path(directory: Path, call: str, how: str) -> None:
    """A directory that has another name, or two, is one queue: what was popped from it is finished."""
    directory.mkdir()
    link = directory.with_name("link")
    link.symlink_to(directory)
    queue = FemtoQueue(link if how.startswith("popped") else directory, "node")
    id = queue.push(b"x")
    task = queue.pop()
    assert task
    if how == "moved":
        link.unlink()
        directory.rename(link)
    place = directory if how.startswith("popped") else link
    other = FemtoQueue(place, "other")
    VERDICTS.get(call, FemtoQueue.touch)(other, task)
    kept = ["done", "failed", "pending", "scheduled", "in_progress"]
    assert other.status(id) == dict(zip([*VERDICTS, "touch"], kept, strict=True))[call]
    if call == "touch":
        other.done(task)
    with pytest.raises(NotInProgress):
        other.done(task)


@durable_or_not
def test_finished_tasks_need_not_be_kept(directory: Path, durable: bool) -> None:
    """keep_done=False and keep_failed=False delete at done and fail."""
    q = FemtoQueue(directory, "node", sync_after_write=durable, keep_done=False, keep_failed=False)
    for finish in (q.done, q.fail):
        q.push(b"x")
        task = q.pop()
        finish(task)
        assert q.status(task.id) is None
    assert sum(q.counts().values()) == 0


@pytest.mark.parametrize("how", ["pickled", "after a fork", "after its lease"])
def test_done_that_raised_can_be_made_again(directory: Path, clock: Time, how: str) -> None:
    """A done whose fsync failed returns when made again, whatever came between; the third one raises."""
    for keep in (False, True):
        q = FemtoQueue(directory / str(keep), "node", sync_after_write=True, keep_done=keep)
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


# --- retry --------------------------------------------------------------------------------------------


def test_retry_puts_a_task_back_at_its_old_place(directory: Path, clock: Time) -> None:
    """retry(task) makes it pending again, before all that is younger, as the same task."""
    q = FemtoQueue(directory, "node")
    first, second = q.push_many([b"first", b"second"])
    task = q.pop()
    q.retry(task)
    assert list(q.ids("pending")) == [first, second]
    again = q.pop()
    assert (again.id, again.data, again.attempt) == (first, b"first", 2)
    with pytest.raises(NotInProgress):
        q.done(task)
    with pytest.raises(NotInProgress):
        q.retry(task, 1_000)
    q.done(again)


def test_retry_keeps_its_delay_in_scheduled(directory: Path, clock: Time) -> None:
    """retry(task, delay_ms) is delivered when the delay is over, never before, to whoever asks then."""
    q = FemtoQueue(directory, "node")
    id = q.push(b"x")
    q.retry(q.pop(), 60_000)
    assert q.status(id) == "scheduled"
    (name,) = names(directory, "scheduled")
    assert name == f"{id}~1~{int((clock.wall + 60) * 1e6):016d}"
    clock.advance(59.9)
    assert q.pop() is None
    clock.advance(0.1)
    assert FemtoQueue(directory, "other").pop().attempt == 2


def test_retry_delay_survives_a_restart(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A delay is on disk: the process that set it may end, another keeps it."""
    id = run(
        "q = FemtoQueue(sys.argv[1], 'node'); q.push(b'x'); task = q.pop()\n"
        "q.retry(task, 3_600_000); print(task.id)",
        directory,
    ).strip()
    q = FemtoQueue(directory, "node")
    assert q.pop() is None
    assert list(q.ids("scheduled")) == [id]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3_601)
    assert q.pop().attempt == 2


@pytest.mark.parametrize("delay_ms", [-1, float("nan"), True, "1", None])
def test_retry_refuses_a_bad_delay(directory: Path, delay_ms: object) -> None:
    """A bad delay_ms raises at the call, and the task stays claimed."""
    q = FemtoQueue(directory, "node")
    q.push(b"x")
    task = q.pop()
    with pytest.raises((TypeError, ValueError), match="delay_ms"):
        q.retry(task, delay_ms)
    q.done(task)


@pytest.mark.parametrize("keep_failed", [True, False])
def test_max_attempts_end_in_failed(directory: Path, clock: Time, keep_failed: bool) -> None:
    """After max_attempts deliveries retry, with or without a delay, is fail."""
    q = FemtoQueue(directory, "node", max_attempts=2, keep_failed=keep_failed)
    for delay_ms in (0, 1_000):
        id = q.push(b"x")
        q.retry(q.pop(), delay_ms)
        clock.advance(1)
        q.retry(q.pop(), delay_ms)
        assert q.status(id) == ("failed" if keep_failed else None)
        assert q.pop() is None
    assert len(names(directory, "failed")) == (2 if keep_failed else 0)


def test_a_lease_that_ran_out_every_time_ends_in_failed(directory: Path, clock: Time) -> None:
    """Hung workers use up max_attempts as well; the tasks behind get their turn."""
    q = FemtoQueue(directory, "node", timeout_stale_ms=1_000, max_attempts=2)
    hanging, behind = q.push_many([b"hanging", b"behind"])
    for attempt in (1, 2):
        assert q.pop().attempt == attempt
        clock.advance(1.1)
    assert q.pop().id == behind
    assert q.status(hanging) == "failed"


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
    assert q.status(poison) == "failed"
    assert q.counts() == dict.fromkeys(femtoqueue.STATES, 0) | {"done": 1, "failed": 1}


def test_retry_with_another_delay_after_one_that_raised(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry that raised and moved nothing does not decide when the next one delivers."""
    q = FemtoQueue(directory, "node")
    q.push(b"x")
    task = q.pop()

    def refuse(*args: object) -> None:
        raise OSError(errno.EIO, "broken", str(args[0]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="broken"):
            q.retry(task, 3_600_000)
    q.retry(task)
    assert q.status(task.id) == "pending"


# --- touch --------------------------------------------------------------------------------------------


def test_touch_begins_a_new_lease(directory: Path, clock: Time) -> None:
    """touch begins a new full lease."""
    queue, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    id = queue.push(b"x")
    task = queue.pop()
    assert task
    for _ in range(5):
        clock.advance(29)
        queue.touch(task)
        assert other.pop() is None
    assert Path(task.path).read_bytes() == task.data == b"x"
    clock.advance(29.9)
    assert other.pop() is None
    clock.advance(0.2)
    assert other.pop()
    with pytest.raises(NotInProgress, match=re.escape(id)):
        queue.touch(task)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_touch_of_a_finished_task(directory: Path, clock: Time, verdict: str) -> None:
    """Who touches a task that he finished is told just that, and not that its lease may have run out."""
    q = FemtoQueue(directory, "node")
    q.push(b"x")
    task = q.pop()
    VERDICTS[verdict](q, task)
    before = snapshot(directory, times=True)
    with pytest.raises(NotInProgress, match=f"^{re.escape(task.id)} was finished already$"):
        q.touch(task)
    assert snapshot(directory, times=True) == before


# --- run ----------------------------------------------------------------------------------------------


def test_run_finishes_what_the_handler_returns_from(directory: Path) -> None:
    """A handler that returns, whatever it returns, has done the task; run says how many there were."""
    q = FemtoQueue(directory, "node")
    ids = q.push_many([b"1", b"2", b"3"])
    handled: list[str] = []
    assert q.run(lambda task: handled.append(task.id) or False, until_empty=True) == 3
    assert handled == ids == list(q.ids("done"))
    assert q.run(print, until_empty=True) == 0


async def coroutine(task: FemtoTask) -> None:
    """Never runs, if nobody awaits it."""


def generator(task: FemtoTask) -> Iterator[FemtoTask]:
    yield task


async def async_generator(task: FemtoTask) -> Any:
    yield task


@pytest.mark.parametrize("handler", [coroutine, generator, async_generator])
def test_a_handler_that_has_not_run(directory: Path, handler: Callable[[FemtoTask], Any]) -> None:
    """A handler that only returns what somebody else must run is a TypeError, and the task comes back."""
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


@pytest.mark.parametrize(
    "result",
    [False, 0, "failed", [1], iter([1]), map(str, [1]), Exception("no"), coroutine, type],
    ids=lambda result: type(result).__name__,
)
def test_what_a_handler_returns_is_ignored(directory: Path, result: object) -> None:
    """Whatever else a handler returns, even if that is false or an exception, the task is done."""
    q = FemtoQueue(directory, "node")
    id = q.push(b"x")
    assert q.run(lambda task: result, until_empty=True) == 1
    assert q.status(id) == "done"


def test_run_logs_and_retries_what_the_handler_raises_from(
    directory: Path, clock: Time, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception is logged with its traceback; delays double, with jitter, until max_attempts."""
    q = FemtoQueue(directory, "node", max_attempts=4)
    id = q.push(b"x")

    def misfit(task: FemtoTask) -> None:
        raise RuntimeError(f"try {task.attempt}")

    for attempt in (1, 2, 3, 4):
        caplog.clear()
        assert q.run(misfit, until_empty=True) == 0
        (record,) = caplog.records
        assert record.name == "femtoqueue" and id in record.getMessage()
        assert "in misfit" in caplog.text and f"RuntimeError: try {attempt}" in caplog.text
        if attempt == 4:
            break
        (name,) = names(directory, "scheduled")
        delay_s = int(name[-16:]) / 1e6 - clock.wall
        assert 0.5 <= delay_s / 2 ** (attempt - 1) <= 1.5
        assert q.pop() is None
        clock.advance(delay_s + 1e-3)
    assert q.status(id) == "failed"
    clock.advance(1e6)
    assert q.pop() is None


def test_backoff_has_jitter(directory: Path, clock: Time) -> None:
    """Tasks that failed together do not come back together."""
    q = FemtoQueue(directory, "node")
    q.push_many([b"x"] * 20)
    assert q.run(lambda task: 1 / 0, until_empty=True) == 0
    assert len({name[-16:] for name in names(directory, "scheduled")}) > 10


def test_backoff_has_a_limit(directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a task failed, it is tried again within 90 minutes."""
    q = FemtoQueue(directory, "node")
    (directory / "pending" / "1790000000000000_x~60").write_bytes(b"x")
    monkeypatch.setattr(
        os, "urandom", lambda size: b"\xff" * size
    )  # the longest that jitter can make it
    assert q.run(lambda task: 1 / 0, until_empty=True) == 0
    (name,) = names(directory, "scheduled")
    assert 3_600 <= int(name[-16:]) / 1e6 - clock.wall <= 5_400


def test_an_exit_in_the_handler_gives_the_task_back(directory: Path) -> None:
    """What is not an Exception ends run; the task is pending again, with a delivery used up."""
    q = FemtoQueue(directory, "node")
    id = q.push(b"x")
    with pytest.raises(SystemExit):
        q.run(lambda task: sys.exit(3))
    assert q.status(id) == "pending"
    assert q.pop().attempt == 2


def test_a_handler_may_finish_its_task_itself(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that its handler finished or retried stays so, counts as handled, and warns of nothing."""
    q = FemtoQueue(directory, "node")
    calls: dict[str, tuple[Callable[[FemtoTask], object], str]] = {
        "done": (q.done, "done"),
        "fail": (q.fail, "failed"),
        "retry": (lambda task: q.retry(task, 1e6), "scheduled"),
        "nothing": (lambda task: None, "done"),
    }
    ids = q.push_many(name.encode() for name in calls)

    def handle(task: FemtoTask) -> None:
        calls[task.data.decode()][0](task)

    assert q.run(handle, until_empty=True) == len(calls)
    assert [q.status(id) for id in ids] == [state for _, state in calls.values()]
    assert caplog.messages == []


def test_a_handler_may_retry_its_task_at_once(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that calls retry gets the task again, each time a delivery that counts as handled."""
    q = FemtoQueue(directory, "node")
    id = q.push(b"x")
    attempts = []

    def handle(task: FemtoTask) -> None:
        attempts.append(task.attempt)
        if task.attempt < 3:
            q.retry(task)

    assert q.run(handle, until_empty=True) == 3
    assert attempts == [1, 2, 3] and q.status(id) == "done"
    assert caplog.messages == []


@pytest.mark.parametrize("call", ["done", "fail", "retry"])
def test_a_handler_that_raises_behind_its_own_verdict(
    directory: Path, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    """The exception is logged; the verdict stays, and no lease is said to be lost."""
    q = FemtoQueue(directory, "node")
    id = q.push(b"x")

    def handle(task: FemtoTask) -> None:
        q.retry(task, 1e6) if call == "retry" else getattr(q, call)(task)
        raise ZeroDivisionError("behind it")

    q.run(handle, until_empty=True)
    assert q.status(id) == {"done": "done", "fail": "failed", "retry": "scheduled"}[call]
    assert "behind it" in caplog.text and "lease" not in caplog.text


def test_until_empty_does_all_that_is_due_and_waits_for_nothing(directory: Path, clock: Time) -> None:
    """until_empty handles pending and due tasks, also those that come meanwhile, then returns."""
    q = FemtoQueue(directory, "node")
    q.push(b"pending")
    q.schedule(b"due", int(clock.wall * 1e6) + 1_000_000)
    q.schedule(b"later", int(clock.wall * 1e6) + 10**10)
    clock.advance(2)
    handled = []

    def handle(task: FemtoTask) -> None:
        if not handled:
            q.push(b"pushed meanwhile")
        handled.append(task.data)

    assert q.run(handle, until_empty=True) == 3
    assert handled == [b"pending", b"due", b"pushed meanwhile"]
    assert q.counts()["scheduled"] == 1


def test_the_lease_is_kept_alive_while_the_handler_runs(directory: Path, spawn: Spawn) -> None:
    """A handler may take longer than timeout_stale_ms: nobody else gets its task."""
    worker = """
q = FemtoQueue(sys.argv[1], "worker", timeout_stale_ms=600)
def handle(task):
    print("begun", flush=True)
    input()
    print(task.lost, task.data)
print(q.run(handle, until_empty=True))
"""
    q = FemtoQueue(directory, "other")
    id = q.push(b"x")
    process = spawn(worker, directory)
    expect(process, "begun")
    assert q.pop(timeout=1.5) is None
    assert q.status(id) == "in_progress"
    say(process)
    assert ending(process) == ("False b'x'\n1\n", 0)
    assert q.status(id) == "done"


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


def test_the_handler_is_told_that_its_queue_was_closed(directory: Path) -> None:
    """close gives the task in hand back: task.lost, then run raises; the heartbeat lives on."""
    q = FemtoQueue(directory, "node", timeout_stale_ms=90)
    id = q.push(b"x")
    seen = []

    def handle(task: FemtoTask) -> None:
        q.close()
        deadline = time.monotonic() + 10
        while not task.lost and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(task.lost)

    with pytest.raises(FemtoQueueError, match="closed"):
        q.run(handle)
    assert seen == [True]
    assert FemtoQueue(directory, "other").pop().id == id


SIGNALLED = """
import select, signal
q = FemtoQueue(sys.argv[1], "worker")
def told_of(number):
    # The signal handler that run has set is let speak.
    inner = signal.getsignal(number)
    def outer(*arguments):
        inner(*arguments)
        print("caught", flush=True)
    signal.signal(number, outer)
def handle(task):
    told_of(signal.SIGTERM)
    told_of(signal.SIGINT)
    print("begun", flush=True)
    while task.data != b"short":
        if select.select([sys.stdin], [], [], 0.01)[0]:
            break
try:
    print("returned", q.run(handle))
except BaseException as error:
    print(type(error).__name__, *error.args)
    print(*map(q.status, sys.argv[2:]))
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_task_in_hand_be_finished(
    directory: Path, spawn: Spawn, number: signal.Signals
) -> None:
    """SIGTERM and SIGINT: the handler goes on to its end, its task is done, run returns."""
    q = FemtoQueue(directory, "producer")
    ids = q.push_many([b"long", b"next"])
    process = spawn(SIGNALLED, directory)
    expect(process, "begun")
    process.send_signal(number)
    expect(process, "caught")
    assert q.status(ids[0]) == "in_progress"
    say(process)
    assert ending(process) == ("returned 1\n", 0)
    assert [q.status(id) for id in ids] == ["done", "pending"]
    assert q.pop().attempt == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_worker(directory: Path, spawn: Spawn, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end run while it waits for a task."""
    q = FemtoQueue(directory, "producer")
    q.push(b"short")
    process = spawn(SIGNALLED, directory)
    expect(process, "begun")
    assert q.join(timeout=10)
    process.send_signal(number)
    expect(process, "caught")
    assert ending(process) == ("returned 1\n", 0)


@pytest.mark.parametrize(
    "first, second, error",
    [
        (signal.SIGTERM, signal.SIGTERM, "SystemExit 143"),
        (signal.SIGINT, signal.SIGINT, "KeyboardInterrupt"),
        (signal.SIGTERM, signal.SIGINT, "KeyboardInterrupt"),
    ],
)
def test_a_second_signal_gives_the_task_back_at_once(
    directory: Path, spawn: Spawn, first: signal.Signals, second: signal.Signals, error: str
) -> None:
    """The handler is interrupted, its task is pending again when the exception leaves run."""
    q = FemtoQueue(directory, "producer")
    id = q.push(b"long")
    process = spawn(SIGNALLED, directory, id)
    expect(process, "begun")
    process.send_signal(first)
    expect(process, "caught")
    process.send_signal(second)
    assert ending(process) == (f"{error}\npending\n", 0)
    assert q.pop().attempt == 2


def test_a_process_that_a_handler_forked_leaves_the_task_alone(directory: Path, spawn: Spawn) -> None:
    """A handler may fork, however the child ends: the task stays its parent's."""
    run(
        """
q = FemtoQueue(sys.argv[1], "node")
other = FemtoQueue(sys.argv[1], "other")
for end in ("raise SystemExit(3)", "raise ValueError", "pass"):
    q.push(b"x")

    def handle(task):
        pid = os.fork()
        if not pid:
            logging.disable()
            exec(end)
            return
        os.waitpid(pid, 0)
        assert q.status(task.id) == "in_progress", (end, q.status(task.id))
        assert other.pop() is None

    import logging
    pid = os.getpid()
    try:
        assert q.run(handle, until_empty=True) == 1
    finally:
        if os.getpid() != pid:
            os._exit(0)
assert q.counts()["done"] == 3
""",
        directory,
    )


# --- status, counts, ids ------------------------------------------------------------------------------

IDS = [f"{n:016d}_node_{n:018x}.00000000" for n in range(1_790_000_000_000_000, 1_790_000_000_000_003)]


def test_status_and_counts_follow_a_task(directory: Path, clock: Time) -> None:
    """status names the state at each step of a task's life, and counts counts it there."""
    q = FemtoQueue(directory, "node")
    id = q.schedule(b"x", int(clock.wall * 1e6) + 5_000_000)

    def expect_only(state: str) -> None:
        assert q.status(id) == state
        assert q.counts() == dict.fromkeys(femtoqueue.STATES, 0) | {state: 1}

    expect_only("scheduled")
    clock.advance(5)
    q.retry(q.pop())
    expect_only("pending")
    task = q.pop()
    expect_only("in_progress")
    q.fail(task)
    expect_only("failed")
    q.requeue(id)
    q.done(q.pop())
    expect_only("done")
    q.requeue(id)
    next((directory / "pending").rglob(id)).write_bytes(b"broken")
    assert q.pop() is None
    expect_only("corrupt")
    q.purge("corrupt", 0)
    assert q.status(id) is None


def test_ids_are_oldest_first(directory: Path, clock: Time) -> None:
    """ids lists each state in the order in which tasks are due, whatever order they came in."""
    q = FemtoQueue(directory, "node")
    now_us = int(clock.wall * 1e6)
    due = [q.schedule(b"x", now_us + s * 1_000_000) for s in (5000, 9, 70, 600)]
    assert list(q.ids("scheduled")) == [due[1], due[2], due[3], due[0]]
    ids = [q.push(b"%d" % n) for n in range(6)]
    assert list(q.ids("pending")) == ids
    tasks = [q.pop() for _ in ids]
    assert list(q.ids("in_progress")) == ids
    for task in reversed(tasks):
        (q.done if int(task.data) < 3 else q.fail)(task)
    assert list(q.ids("done")) == ids[:3]
    assert list(q.ids("failed")) == ids[3:]
    assert list(q.ids("corrupt")) == []
    for state in ("creating", "", "Done", None):
        with pytest.raises(ValueError, match="state"):
            q.ids(state)


HOSTILE_IDS = [
    "",
    ".",
    "..",
    "../../secret",
    "/etc/passwd",
    f"{IDS[0]}/../../../secret",
    f"../done/{IDS[0]}",
    f"{IDS[0]}\0",
    f"{IDS[0][:20]}\0{IDS[0][21:]}",
    f"{IDS[0]}\n",
    f"{IDS[0]}\udcff",
    f"{IDS[0]}~1",
    f"{IDS[0][:17]}{'x' * 300}",
    "٣" * 16 + "_x",
    "*",
]


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The arguments of all calls to the filesystem from here on."""
    seen: list[object] = []

    def watch(module: object, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **o: (seen.append((name, a)), real(*a, **o))[1])

    for name in ("open", "stat", "lstat", "rename", "replace", "unlink", "remove", "link", "scandir"):
        watch(os, name)
    for name in ("listdir", "mkdir", "rmdir", "access", "readlink", "utime", "truncate"):
        watch(os, name)
    for name in ("exists", "lexists", "isfile", "isdir", "islink"):
        watch(os.path, name)
    return seen


def test_the_watch_on_the_filesystem_works(directory: Path, touched: list[object]) -> None:
    """An id by the grammar does become a path: the next test sees something."""
    q = FemtoQueue(directory, "node")
    touched.clear()
    q.status(IDS[0])
    assert any(IDS[0] in str(call) for call in touched)


@pytest.mark.parametrize("id", HOSTILE_IDS, ids=ascii)
def test_a_hostile_id_never_reaches_the_filesystem(
    directory: Path, tmp_path: Path, touched: list[object], id: str
) -> None:
    """An id that is no task's name is no task: no system call ever sees it."""
    q = FemtoQueue(directory, "node")
    (tmp_path / "secret").write_bytes(b"x")
    touched.clear()
    assert q.status(id) is None
    assert q.cancel(id) is False
    assert q.requeue(id) is False
    assert touched == []


@pytest.mark.parametrize(
    "id", [None, 5, IDS[0].encode(), Path("x"), [], FemtoTask(IDS[0], b"")], ids=repr
)
def test_an_id_that_is_no_str_is_a_type_error(
    directory: Path, touched: list[object], id: object
) -> None:
    """Anything but a str is a TypeError that says so, before the filesystem is asked."""
    q = FemtoQueue(directory, "node")
    touched.clear()
    for call in (q.status, q.cancel, q.requeue):
        with pytest.raises(TypeError, match="id: expected str"):
            call(id)
    assert touched == []


# --- cancel, requeue, purge ---------------------------------------------------------------------------


@durable_or_not
def test_cancel_drops_a_waiting_task(directory: Path, clock: Time, durable: bool) -> None:
    """A pending or scheduled task is gone for good; claimed and finished ones are not cancelled."""
    q = FemtoQueue(directory, "node", sync_after_write=durable)
    pending, kept = q.push_many([b"pending", b"kept"])
    scheduled = q.schedule(b"scheduled", int(clock.wall * 1e6) + 1_000_000)
    for id in (pending, scheduled):
        assert q.cancel(id) is True
        assert q.cancel(id) is False
        assert q.status(id) is None
    clock.advance(2)
    task = q.pop()
    assert task.id == kept
    assert q.cancel(kept) is False
    q.done(task)
    assert q.cancel(kept) is False
    assert q.pop() is None
    assert q.status(kept) == "done"


def test_a_bucket_removed_meanwhile_is_no_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A durable cancel that emptied a bucket returns True, also when a worker removes the bucket."""
    q = FemtoQueue(directory, "node", sync_after_write=True)
    id = q.push(b"x")
    bucket = next((directory / "pending").iterdir())
    real = os.unlink

    def unlink(path: str) -> None:
        real(path)
        bucket.rmdir()

    monkeypatch.setattr(os, "unlink", unlink)
    assert q.cancel(id) is True


@durable_or_not
def test_requeue_gives_a_fresh_start(directory: Path, durable: bool) -> None:
    """A failed, corrupt or done task is pending again, at its old place, with no delivery used up."""
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


@pytest.mark.parametrize("state", ["done", "failed", "corrupt"])
def test_purge_goes_by_the_time_of_finishing(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """purge deletes what was finished so long ago, however old task or file are; it says how many."""
    q = FemtoQueue(directory, "node")
    now = time.time()
    for age_s in (10**6, -(10**6)):  # files of long ago, and from a machine whose clock is ahead
        (tmp_path / "file").write_bytes(b"x")
        os.utime(tmp_path / "file", (now - age_s, now - age_s))
        id = q.push_file(tmp_path / "file", move=True)
        if state == "corrupt":
            next((directory / "pending").rglob(id)).rename(directory / "corrupt" / id)
        else:
            (q.done if state == "done" else q.fail)(q.pop())
    (directory / state / ".DS_Store").write_bytes(b"")
    assert q.purge(state, 60) == 0
    monkeypatch.setattr(time, "time", lambda: now + 59)
    assert q.purge(state, 60) == 0
    monkeypatch.setattr(time, "time", lambda: now + 120)
    assert q.purge(state, 60) == 2
    assert names(directory, state) == [".DS_Store"]


def test_purge_refuses_what_was_not_finished(directory: Path) -> None:
    """Only finished tasks can be purged, and only by an age."""
    q = FemtoQueue(directory, "node")
    q.push(b"x")
    for state in ("pending", "scheduled", "in_progress", "creating", "../x", None):
        with pytest.raises(ValueError, match="state"):
            q.purge(state, 0)
    for age in (-1, "1", None, True, float("nan")):
        with pytest.raises((TypeError, ValueError), match="older_than_s"):
            q.purge("done", age)
    assert q.counts()["pending"] == 1


# --- join, close --------------------------------------------------------------------------------------


def test_join_watches_until_all_is_finished(directory: Path, clock: Time) -> None:
    """True when nothing is pending, in progress or scheduled; False after timeout, never early."""
    q = FemtoQueue(directory, "node")
    assert q.join() is True and q.join(0) is True

    def unfinished() -> None:
        before = clock.boot
        assert q.join(0) is False
        assert q.join(timeout=2.5) is False
        assert 2.5 <= clock.boot - before < 2.6

    q.push(b"x")
    unfinished()
    task = q.pop()
    unfinished()
    q.retry(task, 60_000)
    unfinished()
    clock.advance(60)
    q.done(q.pop())
    assert q.join() is True
    for timeout in (-1, "1", True, float("nan")):
        with pytest.raises((TypeError, ValueError), match="timeout"):
            q.join(timeout)


def test_join_waits_for_another_process(directory: Path, spawn: Spawn) -> None:
    """join returns once the last task is finished elsewhere, in failed/ or done/."""
    q = FemtoQueue(directory, "producer")
    q.push_many([b"1", b"2"])
    process = spawn(
        "q = FemtoQueue(sys.argv[1], 'node'); print('begun', flush=True); input()\n"
        "q.done(q.pop()); q.fail(q.pop())",
        directory,
    )
    expect(process, "begun")
    assert q.join(0) is False
    say(process)
    assert q.join(timeout=20) is True
    assert ending(process) == ("", 0)


def test_close_gives_back_what_was_not_finished(directory: Path) -> None:
    """After close, others get the tasks at once, at their old places; so does with, on errors too."""
    other = FemtoQueue(directory, "other")
    ids = other.push_many([b"1", b"2", b"3"])
    with pytest.raises(ZeroDivisionError), FemtoQueue(directory, "node") as q:
        q.done(q.pop())
        task = q.pop()
        q.pop()
        raise ZeroDivisionError
    q.close()
    assert [other.status(id) for id in ids] == ["done", "pending", "pending"]
    assert os.listdir(directory / "in_progress") == []
    assert other.pop().id == ids[1]
    with pytest.raises(FemtoQueueError):
        q.done(task)


@pytest.mark.parametrize(
    "call",
    [
        lambda q, task: q.push(b"x"),
        lambda q, task: q.push_many([b"x"]),
        lambda q, task: q.push_file(__file__),
        lambda q, task: q.schedule(b"x", 1_790_000_000_000_000),
        lambda q, task: q.pop(),
        lambda q, task: q.pop(timeout=None),
        lambda q, task: q.done(task),
        lambda q, task: q.fail(task),
        lambda q, task: q.retry(task),
        lambda q, task: q.retry(task, 1_000),
        lambda q, task: q.touch(task),
        lambda q, task: q.run(print, until_empty=True),
        lambda q, task: q.status(task.id),
        lambda q, task: q.counts(),
        lambda q, task: list(q.ids("pending")),
        lambda q, task: q.cancel(task.id),
        lambda q, task: q.requeue(task.id),
        lambda q, task: q.purge("done", 0),
        lambda q, task: q.join(0),
        lambda q, task: q.__enter__(),
    ],
    ids=(
        "push push_many push_file schedule pop pop-for-ever done fail retry retry-later touch run "
        "status counts ids cancel requeue purge join with"
    ).split(),
)
def test_a_closed_queue_refuses_every_call(directory: Path, call: Callable) -> None:
    """Every later call raises FemtoQueueError and changes nothing; close may be repeated."""
    q = FemtoQueue(directory, "node", max_attempts=1)
    q.push(b"x")
    task = q.pop()
    q.close()
    q.close()
    before = files(directory)
    with pytest.raises(FemtoQueueError, match="closed"):
        call(q, task)
    assert files(directory) == before


@pytest.mark.parametrize("call", ["scandir", "rename", "fsync"])
def test_close_that_raised_can_be_made_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch, unlogged: None, call: str
) -> None:
    """A close that raised has closed, but given nothing back: the next one does, for all to have."""
    q = FemtoQueue(directory, "node", sync_after_write=call == "fsync")
    id = q.push(b"x")
    task = q.pop()
    with monkeypatch.context() as patch:
        break_call(patch, call, 0)
        with pytest.raises(OSError):
            q.close()
    with pytest.raises(FemtoQueueError, match="closed"):
        q.done(task)
    q.close()
    assert names(directory, "pending") == [f"{id}~1"]
    assert run("print(FemtoQueue(sys.argv[1], 'other').pop().id)", directory) == f"{id}\n"
    q.close()


def test_close_that_raised_keeps_nothing_alive(
    directory: Path, monkeypatch: pytest.MonkeyPatch, unlogged: None
) -> None:
    """The last reference dropped, the object is gone at once, though its close raised."""
    q = FemtoQueue(directory, "node")
    q.push(b"x")
    assert q.pop()
    gone = weakref.ref(q)
    gc.disable()
    try:
        with monkeypatch.context() as patch:
            break_call(patch, "rename", 0)
            try:
                q.close()
                raise AssertionError("it did not raise")
            except OSError:
                pass
        del q
        assert gone() is None
    finally:
        gc.enable()


def test_close_ends_those_who_wait(directory: Path) -> None:
    """A pop or run that waits in another thread raises when the queue is closed, and claims nothing."""
    q = FemtoQueue(directory, "node")
    q.push(b"x")
    held = q.pop()
    ended = []

    def wait(call: Callable[[], object]) -> None:
        with pytest.raises(FemtoQueueError, match="closed"):
            call()
        ended.append(call)

    calls = (lambda: q.pop(timeout=None), lambda: q.pop(timeout=60), lambda: q.run(print))
    threads = [threading.Thread(target=wait, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    q.close()
    other = FemtoQueue(directory, "other")
    task = other.pop(timeout=10)
    assert task.id == held.id
    other.retry(task)
    for thread in threads:
        thread.join(10)
    assert set(ended) == set(calls)
    assert other.status(held.id) == "pending"


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


# --- a task, and a queue, in another process ----------------------------------------------------------


@pytest.mark.parametrize("size", [1, (1 << 20) + 1])
@pytest.mark.parametrize("call", ["done", "fail", "retry", "touch"])
def test_finished_in_another_process(directory: Path, clock: Time, call: str, size: int) -> None:
    """A task can be pickled and finished from another process, though it was touched meanwhile."""
    payload = b"x" * size
    queue = FemtoQueue(directory, "a")
    id = queue.push(payload)
    task = queue.pop()
    assert task
    copy = pickle.dumps(task)
    clock.advance(10)
    queue.touch(task)
    code = """
import pickle
task = pickle.loads(bytes.fromhex(sys.argv[3]))
assert task.data == b"x" * int(sys.argv[4])
getattr(FemtoQueue(sys.argv[1], "b"), sys.argv[2])(task)
"""
    run(code, directory, call, copy.hex() if size == 1 else pickle.dumps(task).hex(), size)
    after = {"done": "done", "fail": "failed", "retry": "pending", "touch": "in_progress"}
    assert queue.status(id) == after[call]
    if call == "touch":
        assert task.data == payload
        queue.done(task)
    else:
        with pytest.raises(NotInProgress):
            queue.done(task)


@pytest.mark.parametrize("through", ["itself", "a copy"])
def test_data_while_the_lease_is_renewed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    """A large payload is read all the same when its lease is renewed at that moment, even twice."""
    queue = FemtoQueue(directory, "a")
    payload = random.Random(0).randbytes((1 << 20) + 1)
    queue.push(payload)
    task = queue.pop()
    other = task if through == "itself" else pickle.loads(pickle.dumps(task))
    touches = iter([queue.touch, queue.touch])
    real = builtins.open

    def open_too_late(path: Any, *rest: Any, **options: Any) -> object:
        if path == task.path:
            next(touches, lambda task: None)(other)
        return real(path, *rest, **options)

    monkeypatch.setattr(builtins, "open", open_too_late)
    assert task.data == payload
    assert next(touches, None) is None
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

Call = Callable[[FemtoQueue, FemtoTask], object]
BAD_CALLS: list[tuple[str, type[Exception], Call]] = [
    (r"data.*\.encode\(\)", TypeError, lambda q, t: q.push("text")),
    ("data", TypeError, lambda q, t: q.push(5)),
    ("data", TypeError, lambda q, t: q.push(None)),
    ("data", TypeError, lambda q, t: q.push([1])),
    ("items", TypeError, lambda q, t: q.push_many(b"one")),
    ("items", TypeError, lambda q, t: q.push_many("one")),
    ("items", TypeError, lambda q, t: q.push_many(5)),
    (r"\.encode\(\)", TypeError, lambda q, t: q.push_many(["text"])),
    ("path", TypeError, lambda q, t: q.push_file(5.0)),
    ("path", ValueError, lambda q, t: q.push_file(q.data_dir)),
    ("nowhere", FileNotFoundError, lambda q, t: q.push_file("/nowhere")),
    (r"data.*\.encode\(\)", TypeError, lambda q, t: q.schedule("text", NOW_US)),
    ("time_us", TypeError, lambda q, t: q.schedule(b"", 1.8e15)),
    ("time_us", TypeError, lambda q, t: q.schedule(b"", "tomorrow")),
    ("time_us", TypeError, lambda q, t: q.schedule(b"", None)),
    ("time_us", TypeError, lambda q, t: q.schedule(b"", datetime.date(2027, 1, 1))),
    ("time_us", TypeError, lambda q, t: q.schedule(b"", datetime.time(tzinfo=datetime.timezone.utc))),
    ("time_us", ValueError, lambda q, t: q.schedule(b"", datetime.datetime(2027, 1, 1))),
    ("time_us", ValueError, lambda q, t: q.schedule(b"", NOW_US // 1_000_000)),
    ("time_us", ValueError, lambda q, t: q.schedule(b"", NOW_US // 1_000)),
    ("time_us", ValueError, lambda q, t: q.schedule(b"", NOW_US * 1_000)),
    ("time_us", ValueError, lambda q, t: q.schedule(b"", -NOW_US)),
    ("timeout", ValueError, lambda q, t: q.pop(-1)),
    ("timeout", ValueError, lambda q, t: q.pop(-0.001)),
    ("timeout", ValueError, lambda q, t: q.pop(NAN)),
    ("timeout", ValueError, lambda q, t: q.pop(10**400)),
    ("timeout", TypeError, lambda q, t: q.pop("5")),
    ("timeout", TypeError, lambda q, t: q.pop("")),
    ("timeout", TypeError, lambda q, t: q.pop(True)),
    ("task", TypeError, lambda q, t: q.done(t.id)),
    ("task", TypeError, lambda q, t: q.done(None)),
    ("task", TypeError, lambda q, t: q.fail(t.id)),
    ("task", TypeError, lambda q, t: q.retry(t.id)),
    ("task", TypeError, lambda q, t: q.touch(None)),
    ("delay_ms", ValueError, lambda q, t: q.retry(t, -1)),
    ("delay_ms", ValueError, lambda q, t: q.retry(t, NAN)),
    ("delay_ms", TypeError, lambda q, t: q.retry(t, "5")),
    ("handler", TypeError, lambda q, t: q.run(None, until_empty=True)),
    ("id", TypeError, lambda q, t: q.status(5)),
    ("id", TypeError, lambda q, t: q.status(t)),
    ("id", TypeError, lambda q, t: q.cancel(None)),
    ("id", TypeError, lambda q, t: q.requeue(b"x")),
    ("state", ValueError, lambda q, t: q.ids("creating")),
    ("state", ValueError, lambda q, t: q.ids("../..")),
    ("state", ValueError, lambda q, t: q.purge("pending", 0)),
    ("state", ValueError, lambda q, t: q.purge("in_progress", 0)),
    ("older_than_s", ValueError, lambda q, t: q.purge("done", -1)),
    ("older_than_s", ValueError, lambda q, t: q.purge("done", NAN)),
    ("older_than_s", ValueError, lambda q, t: q.purge("done", 10**400)),
    ("older_than_s", TypeError, lambda q, t: q.purge("done", "1d")),
    ("timeout", ValueError, lambda q, t: q.join(-1)),
    ("timeout", ValueError, lambda q, t: q.join(NAN)),
    ("timeout", ValueError, lambda q, t: q.join(10**400)),
    ("timeout", TypeError, lambda q, t: q.join("5")),
]


@pytest.mark.parametrize(("message", "error", "call"), BAD_CALLS)
def test_bad_arguments(
    directory: Path, queue: FemtoQueue, message: str, error: type[Exception], call: Call
) -> None:
    """A bad argument gets its error at the call, which names it, and nothing has changed."""
    task = queue.pop()
    assert task
    before = snapshot(directory)
    with pytest.raises(error, match=message):
        call(queue, task)
    assert snapshot(directory) == before


# ====================================================================================================
# The promises
# ====================================================================================================

# --- the calls that are killed and failed at every step -----------------------------------------------


def kill_now(name: str, *args: object, **kwargs: object) -> None:
    """Die as by `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


EMPTIED = "old-node"  # once its tasks are taken over, an empty directory is anybody's


def without_header(content: bytes) -> bytes:
    """The payload in a file that may be one of the original's."""
    return content[24:] if content == Original.content(content[24:]) else content


def look(directory: Path) -> dict[bytes, list[str]]:
    """What lies where, read without femtoqueue: payload -> "delivered n", "later n", "done" ...

    n is the attempt that the next delivery will be.
    """
    found: dict[bytes, list[str]] = {}
    for state in STATES:
        for folder, _, names in os.walk(directory / state):
            for name in names:
                if name.endswith("~reason"):
                    continue
                used = int([*name.split("~"), "0"][1])
                word = {"pending": "delivered", "in_progress": "delivered", "scheduled": "later"}.get(
                    state
                )
                payload = Path(folder, name).read_bytes()
                found.setdefault(payload, []).append(f"{word} {used + 1}" if word else state)
    return found


def audit(directory: Path, clock: Time, allowed: dict[bytes, set[str]]) -> None:
    """Open the queue anew, empty it, and compare each payload's fate with what is `allowed`."""
    clock.advance(10 * 86_400)  # all that is scheduled is due, no lease runs out
    queue = FemtoQueue(directory, "a", LONG_MS, keep_done=False)
    there = look(directory)
    fates = {payload: states[0] for payload, states in there.items()}
    assert all(len(states) == 1 for states in there.values()), f"visible twice: {there}"
    order, ids = [], {}
    while task := queue.pop():
        order.append(task.id)
        ids[task.data] = task.id
        word = fates.get(task.data, "nothing").split()[0]
        assert word in ("delivered", "later"), f"{task.data!r} was {word}, and delivered"
        fates[task.data] = f"{word} {task.attempt}"
        queue.done(task)
    later = {id for payload, id in ids.items() if fates[payload].startswith("later")}
    assert order == sorted(order, key=lambda id: (id in later, id)), "what falls due comes last"
    fates.update((payload, states[0]) for payload, states in look(directory).items())
    for payload in {*fates, *allowed}:
        fate = fates.get(payload, "gone")
        if payload in (b"broken", TORN):
            assert fate == "corrupt", f"{payload!r} was delivered"
            continue
        assert fate in allowed.get(payload, {"gone"}), f"{payload!r} is {fate}: {allowed.get(payload)}"
    live = [state for state in fates.values() if state.split()[0] in ("delivered", "later")]
    assert len(order) == len(live), "some could not be delivered"
    clock.advance(2_000)
    assert queue.pop() is None
    queue.close()
    for state in ("creating", "pending", "scheduled", "in_progress"):
        assert os.listdir(directory / state) == [], f"left over in {state}/"
    other = {name for name in os.listdir(directory) if not name.startswith("clock-")}
    assert other - {EMPTIED} == {*STATES, "creating", "layout"}, f"left over: {other}"


# Payload -> what becomes of it in a world in which nothing more happens.
WORLD = {
    b"claimed": "delivered 2",
    b"finished": "done",
    b"failed": "failed",
    b"first": "delivered 1",
    b"second": "delivered 1",
    b"later": "later 1",
}


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
            self.queue.fail(self.tasks[b"failed"])
        self.act = case.prepare(self)

    def drop(self) -> None:
        """Let go of all queue objects: from here on their owners are dead."""
        self.kept.clear()
        self.queue = None  # type: ignore[assignment]

    def open(self, lease_ms: float = LONG_MS, **options: Any) -> FemtoQueue:
        return FemtoQueue(self.directory, "a", lease_ms, self.durable, **options)

    def in_us(self, us: int) -> int:
        return int(self.clock.wall * 1e6) + us

    def pop(self) -> FemtoTask:
        task = self.queue.pop()
        assert task is not None, "pop said None while tasks are pending"
        return task

    def pop_first(self) -> None:
        """The call of all cases about pop."""
        task = self.pop()
        self.results.append((task.data, task.attempt))


@dataclasses.dataclass
class Case:
    prepare: Callable[[Stage], Callable[[], object]]
    changes: dict[bytes, tuple[str, str]]
    world: bool
    undone: bool  # after an error, everything is as it was before the call
    options: dict[str, Any]

    def before(self) -> dict[bytes, str]:
        return (WORLD if self.world else {}) | {name: was for name, (was, _) in self.changes.items()}

    def after(self) -> dict[bytes, str]:
        return (WORLD if self.world else {}) | {name: now for name, (_, now) in self.changes.items()}

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
                fates[payload].add(before[payload])
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


CASES: dict[str, Case] = {}


def case(
    changes: dict[bytes, tuple[str, str]], world: bool = True, undone: bool = False, **options: Any
) -> Callable[[Callable[[Stage], Callable[[], object]]], None]:
    """Add a case: a function that prepares it and returns the call to be killed or failed."""

    def add(prepare: Callable[[Stage], Callable[[], object]]) -> None:
        CASES[prepare.__name__.removeprefix("case_")] = Case(prepare, changes, world, undone, options)

    return add


PUSHED = {b"new": ("gone", "delivered 1")}
FIRST_POPPED = {b"first": ("delivered 1", "delivered 2")}


@case({}, world=False)
def case_construction(stage: Stage) -> Callable[[], object]:
    return lambda: stage.open() and None


@case(PUSHED, undone=True)
def case_push(stage: Stage) -> Callable[[], object]:
    return lambda: stage.queue.push(b"new")


@case(PUSHED, undone=True)
def case_push_into_a_new_bucket(stage: Stage) -> Callable[[], object]:
    stage.clock.advance(5_000)
    return lambda: stage.queue.push(b"new")


NEW = [b"new 0", b"new 1", b"new 2"]


@case(dict.fromkeys(NEW, ("gone", "delivered 1")))
def case_push_many(stage: Stage) -> Callable[[], object]:
    return lambda: stage.queue.push_many(NEW[stage.pushed :])


@case(PUSHED, undone=True)
def case_push_file(stage: Stage) -> Callable[[], object]:
    stage.source.write_bytes(b"new")
    return lambda: stage.queue.push_file(stage.source)


@case(PUSHED, undone=True)
def case_push_file_move(stage: Stage) -> Callable[[], object]:
    stage.source.write_bytes(b"new")
    return lambda: stage.queue.push_file(stage.source, move=True)


@case(PUSHED)
def case_push_file_move_from_elsewhere(stage: Stage) -> Callable[[], object]:
    stage.source = source_of(stage.directory, elsewhere=True)
    stage.source.write_bytes(b"new")
    return lambda: stage.queue.push_file(stage.source, move=True)


@case({b"new": ("gone", "later 1")}, undone=True)
def case_schedule(stage: Stage) -> Callable[[], object]:
    due_us = stage.in_us(2 * HOUR_US)
    return lambda: stage.queue.schedule(b"new", due_us)


@case(FIRST_POPPED, undone=True)
def case_pop(stage: Stage) -> Callable[[], object]:
    return stage.pop_first


@case(FIRST_POPPED, undone=True)
def case_pop_of_a_new_object(stage: Stage) -> Callable[[], object]:
    stage.kept.append(stage.queue)
    stage.queue = stage.open()
    return stage.pop_first


@case({b"claimed": ("delivered 2", "delivered 3")})
def case_pop_from_the_dead(stage: Stage) -> Callable[[], object]:
    stage.queue = stage.open()  # nothing else holds the object that claimed
    return stage.pop_first


@case({b"first": ("delivered 2", "delivered 3")})
def case_pop_from_the_hung(stage: Stage) -> Callable[[], object]:
    stage.kept.append(stage.open(lease_ms=1))
    stage.kept[0].pop()
    stage.clock.advance(2)
    return stage.pop_first


@case({b"first": ("delivered 1", "delivered 2"), b"later": ("later 1", "delivered 1")})
def case_pop_when_one_fell_due(stage: Stage) -> Callable[[], object]:
    stage.clock.advance(3_700)
    return stage.pop_first


@case(FIRST_POPPED | {b"far": ("later 1", "later 1")})
def case_pop_moves_closer(stage: Stage) -> Callable[[], object]:
    begin_s = stage.clock.wall // 100 * 100 + 3_000  # of a bucket that is 100 s long
    stage.queue.schedule(b"far", int((begin_s + 80) * 1e6))
    stage.clock.advance(begin_s + 20 - stage.clock.wall)
    return stage.pop_first


BROKEN = {b"first": ("gone", "gone"), b"broken": ("delivered 1", "corrupt")}
TORN = Original.content(b"original")[:-3]


@case(BROKEN | {b"second": ("delivered 1", "delivered 2")})
def case_pop_meets_a_broken_one(stage: Stage) -> Callable[[], object]:
    next(stage.directory.glob(f"pending/*/{stage.ids[b'first']}")).write_bytes(b"broken")
    return stage.pop_first


@case({b"first": ("delivered 2", "failed"), b"second": ("delivered 1", "delivered 2")})
def case_pop_buries(stage: Stage) -> Callable[[], object]:
    stage.queue.retry(stage.pop())
    stage.kept.append(stage.queue)
    stage.queue = stage.open(max_attempts=1)
    return stage.pop_first


@case({b"claimed": ("delivered 2", "done")})
def case_done_through_another_object(stage: Stage) -> Callable[[], object]:
    stage.kept.append(stage.queue)
    stage.queue = stage.open()
    task = pickle.loads(pickle.dumps(stage.tasks[b"claimed"]))
    return lambda: stage.queue.done(task)


@case({b"claimed": ("delivered 2", "done")})
def case_done(stage: Stage) -> Callable[[], object]:
    return lambda: stage.queue.done(stage.tasks[b"claimed"])


@case({b"claimed": ("delivered 2", "gone"), b"finished": ("gone", "gone")}, keep_done=False)
def case_done_and_not_kept(stage: Stage) -> Callable[[], object]:
    return lambda: stage.queue.done(stage.tasks[b"claimed"])


@case({b"claimed": ("delivered 2", "failed")})
def case_fail(stage: Stage) -> Callable[[], object]:
    return lambda: stage.queue.fail(stage.tasks[b"claimed"])


@case({})
def case_retry(stage: Stage) -> Callable[[], object]:
    return lambda: stage.queue.retry(stage.tasks[b"claimed"])


@case({b"first": ("done", "done"), b"second": ("done", "done")})
def case_retry_into_a_removed_bucket(stage: Stage) -> Callable[[], object]:
    for _ in range(2):
        stage.queue.done(stage.pop())
    stage.clock.advance(10)
    assert stage.queue.pop() is None
    return lambda: stage.queue.retry(stage.tasks[b"claimed"])


@case({b"claimed": ("delivered 2", "later 2")})
def case_retry_later(stage: Stage) -> Callable[[], object]:
    return lambda: stage.queue.retry(stage.tasks[b"claimed"], 3_600_000)


@case({b"claimed": ("delivered 2", "failed")}, max_attempts=1)
def case_retry_for_the_last_time(stage: Stage) -> Callable[[], object]:
    return lambda: stage.queue.retry(stage.tasks[b"claimed"])


@case({})
def case_touch(stage: Stage) -> Callable[[], object]:
    return lambda: stage.queue.touch(stage.tasks[b"claimed"])


@case({b"failed": ("failed", "delivered 1")})
def case_requeue(stage: Stage) -> Callable[[], object]:
    return lambda: stage.results.append(stage.queue.requeue(stage.ids[b"failed"]))


@case({b"first": ("delivered 1", "gone")})
def case_cancel(stage: Stage) -> Callable[[], object]:
    return lambda: stage.results.append(stage.queue.cancel(stage.ids[b"first"]))


@case({b"later": ("later 1", "gone")})
def case_cancel_scheduled(stage: Stage) -> Callable[[], object]:
    return lambda: stage.results.append(stage.queue.cancel(stage.ids[b"later"]))


@case({b"finished": ("done", "gone")})
def case_purge(stage: Stage) -> Callable[[], object]:
    stage.clock.wall = max(5e9, stage.clock.wall)  # file times are not ours to patch
    return lambda: stage.queue.purge("done", 0)


@case({})
def case_close(stage: Stage) -> Callable[[], object]:
    return stage.queue.close


each_case = pytest.mark.parametrize("name", list(CASES))


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


class Journal:
    """What a process says about itself before it is killed: one line in one write."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, *words: object) -> None:
        os.write(self.descriptor, (" ".join(map(str, words)) + "\n").encode())


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

    def produce(self, number: int) -> None:
        queue = FemtoQueue(self.directory, f"producer-{number}", maxsize=200)
        say = Journal(self.journal)
        for i in itertools.count():
            if self.no_more.exists():
                return
            say("try", f"{number}.{i}")
            while True:
                try:
                    queue.push(f"{number}.{i}".encode())
                    break
                except Full:
                    time.sleep(0.002)
            say("acknowledged", f"{number}.{i}")

    def consume(self, number: int) -> None:
        queue = FemtoQueue(self.directory, "worker", self.LEASE_MS)
        say = Journal(self.journal)
        while (task := queue.pop(timeout=0.2)) or not self.no_more.exists():
            if task:
                say("got", task.data.decode(), task.attempt, os.getpid())
                time.sleep(0.0005)
                try:
                    queue.done(task)
                    say("done", task.data.decode(), task.attempt)
                except NotInProgress:
                    say("robbed", task.data.decode(), task.attempt, os.getpid())

    def start(self, role: Callable[[int], None]) -> None:
        self.started += 1
        self.roles[forked(functools.partial(role, self.started))] = role

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        role = self.roles.pop(pid)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, "it had ended by itself"
        self.disturbed.add(pid)
        self.kills += 1
        self.start(role)

    def run(self, seconds: float) -> None:
        for role, count in ((self.produce, self.PRODUCERS), (self.consume, self.WORKERS)):
            for _ in range(count):
                self.start(role)
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end or "robbed" not in self.journal.read_text():
            assert now < end + 30, "nobody was stopped for longer than the lease with a task in hand"
            for pid in [pid for pid, until in self.stopped.items() if until <= now]:
                os.kill(pid, signal.SIGCONT)
                del self.stopped[pid]
            pid = self.chance.choice(sorted(self.roles.keys() - self.stopped.keys()))
            if self.chance.random() < 0.5:
                self.kill(pid)
            elif len(self.stopped) < 3:
                os.kill(pid, signal.SIGSTOP)
                self.disturbed.add(pid)
                self.stopped[pid] = now + self.chance.uniform(1, 6) * self.LEASE_MS / 1_000
                self.stops += 1
            time.sleep(self.chance.uniform(0.02, 0.12))
        for pid in self.stopped:
            os.kill(pid, signal.SIGCONT)
        self.no_more.touch()
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
    say = Journal(crowd.journal)
    while task := queue.pop():
        say("got", task.data.decode(), task.attempt, os.getpid())
        queue.done(task)
        say("done", task.data.decode(), task.attempt)
    assert not any(queue.counts()[state] for state in STATES if state != "done")

    lines = [line.split() for line in crowd.journal.read_text().splitlines()]
    words = {kind: [line[1:] for line in lines if line[0] == kind] for kind in ("try", "acknowledged")}
    tried = {name for (name,) in words["try"]}
    acknowledged = {name for (name,) in words["acknowledged"]}
    got: dict[str, dict[int, int]] = {}  # name -> attempt -> PID
    finished: dict[str, int] = {}
    for kind, name, *rest in lines:
        if kind == "got":
            attempt, pid = map(int, rest)
            assert attempt not in got.setdefault(name, {}), "one attempt was delivered twice"
            got[name][attempt] = pid
        elif kind == "done":
            assert name not in finished, "done twice"
            finished[name] = int(rest[0])
    robbed = sum(line[0] == "robbed" for line in lines)
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
        robbed_while_stopped=robbed,
    )
    assert acknowledged <= {*got}, "lost"
    assert {*got} <= tried, "unexpected"
    assert queue.counts()["done"] == len(got)
    for name, attempts in got.items():
        last = finished.get(name, max(attempts))
        assert last == max(attempts), f"{name} was delivered after it was done"
        for attempt in sorted(attempts)[:-1]:
            assert attempts[attempt] in crowd.disturbed, f"{name} was taken from an undisturbed worker"
    assert len(acknowledged) > 1_000
    assert duplicated
    assert crowd.kills > 10
    assert crowd.stops > 10


@dataclasses.dataclass
class Expected:
    """What the model knows of a task."""

    payload: bytes
    state: str
    used: int = 0  # deliveries
    due_s: float = 0
    owner: int | None = None  # which queue object's claim it is; None: an owner that is gone
    deadline_s: float = 0


class Model(RuleBasedStateMachine):
    """Three queue objects on one directory do as a plain list of tasks says, whatever happens."""

    LEASE_S = 30
    COUNT = 3

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.clock = Time()
        self.patch.setattr(time, "time", lambda: self.clock.wall)
        self.patch.setattr(time, "monotonic", lambda: self.clock.boot)
        self.patch.setattr(time, "sleep", self.clock.advance)
        self.directory = Path(
            tempfile.mkdtemp(prefix="femtoqueue-test-", dir=SHM if SHM.is_dir() else None)
        )
        self.queues: list[FemtoQueue | None] = [self.new_queue() for _ in range(self.COUNT)]
        self.tasks: dict[str, Expected] = {}
        self.claims: dict[str, list[FemtoTask]] = {}  # every delivery there ever was
        self.pushes: list[str] = []
        self.company = False  # may it look as if other processes were at work?
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

    def in_state(self, *states: str) -> list[str]:
        return sorted(id for id, task in self.tasks.items() if task.state in states)

    def comes_back(self, task: Expected) -> bool:
        """Does a pop that looks make this one pending?"""
        if task.state == "scheduled":
            return task.due_s <= self.clock.wall
        gone = task.owner is None or task.deadline_s < self.clock.boot
        return task.state == "in_progress" and gone

    def come_back(self) -> None:
        for task in self.tasks.values():
            if self.comes_back(task):
                task.state = "pending"

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
            self.tasks[id] = Expected(payload, "pending")

    @rule(number=numbers, delay_s=st.sampled_from([-5, 0, 0.5, 20, 20, 900, 90_000]))
    def schedule(self, number: int, delay_s: float) -> None:
        payload = b"%d" % len(self.tasks)
        due_us = int((self.clock.wall + delay_s) * 1e6)
        id = self.queue(number).schedule(payload, due_us)
        assert id not in self.tasks
        self.tasks[id] = Expected(payload, "scheduled", due_s=due_us / 1e6)

    @rule(numbers=st.lists(numbers, min_size=1, max_size=4), at_once=st.booleans())
    def pop(self, numbers: list[int], at_once: bool) -> None:
        for number in numbers:
            self.pop_one(number, at_once)

    def pop_one(self, number: int, at_once: bool) -> None:
        # In company, what is in hand from an earlier look is not taken in exact order.
        if not at_once or self.company or any(map(self.comes_back, self.tasks.values())):
            self.clock.advance(1.1)  # from then on a pop looks for what is to come back
        self.come_back()
        task = self.queue(number).pop()
        pending = self.in_state("pending")
        assert (task and task.id) == (pending[0] if pending else None), "not the oldest"
        if task:
            expected = self.tasks[task.id]
            expected.state = "in_progress"
            expected.used += 1
            expected.owner = number
            expected.deadline_s = self.clock.boot + self.LEASE_S
            assert (task.data, task.attempt) == (expected.payload, expected.used)
            self.claims.setdefault(task.id, []).append(task)
            figure("model", deliveries=1)

    @staticmethod
    def mostly(choice: random.Random, wanted: list[str], others: Iterable[str]) -> str:
        return choice.choice(wanted if wanted and choice.random() < 0.7 else sorted(others))

    def finish(self, choice: random.Random, call: str, *arguments: object) -> Expected | None:
        """Call a queue with some delivery; return the task if that claim was still valid."""
        if not self.claims:
            return None
        held = [id for id in self.in_state("in_progress") if id in self.claims]
        id = self.mostly(choice, held, self.claims)
        task = choice.choice(self.claims[id][-2:])
        expected = self.tasks[id]
        valid = expected.state == "in_progress" and task.attempt == expected.used
        queue = self.queue(choice.randrange(self.COUNT))
        if valid:
            getattr(queue, call)(task, *arguments)
            return expected
        with pytest.raises(NotInProgress):
            getattr(queue, call)(task, *arguments)
        return None

    @rule(choice=choice)
    def done(self, choice: random.Random) -> None:
        if expected := self.finish(choice, "done"):
            expected.state = "done"

    @rule(choice=choice)
    def fail(self, choice: random.Random) -> None:
        if expected := self.finish(choice, "fail"):
            expected.state = "failed"

    @rule(choice=choice)
    def retry(self, choice: random.Random) -> None:
        if expected := self.finish(choice, "retry"):
            expected.state = "pending"

    @rule(choice=choice, delay_s=st.sampled_from([0.001, 5, 4_000]))
    def retry_later(self, choice: random.Random, delay_s: float) -> None:
        if expected := self.finish(choice, "retry", delay_s * 1_000):
            expected.state = "scheduled"
            expected.due_s = self.clock.wall + delay_s

    @rule(choice=choice)
    def touch(self, choice: random.Random) -> None:
        if expected := self.finish(choice, "touch"):
            expected.deadline_s = self.clock.boot + self.LEASE_S

    @precondition(lambda self: self.tasks)
    @rule(choice=choice, number=numbers)
    def cancel(self, choice: random.Random, number: int) -> None:
        id = self.mostly(choice, self.in_state("pending", "scheduled"), self.tasks)
        waiting = self.tasks[id].state in ("pending", "scheduled")
        assert self.queue(number).cancel(id) == waiting
        if waiting:
            self.tasks[id].state = "cancelled"

    @precondition(lambda self: self.tasks)
    @rule(choice=choice, number=numbers)
    def requeue(self, choice: random.Random, number: int) -> None:
        id = self.mostly(choice, self.in_state("done", "failed"), self.tasks)
        finished = self.tasks[id].state in ("done", "failed")
        assert self.queue(number).requeue(id) == finished
        if finished:
            self.tasks[id].state = "pending"
            self.tasks[id].used = 0
            self.claims.pop(id, None)  # its attempts are counted anew

    @rule(number=numbers, how=st.sampled_from(["dropped", "dropped", "killed", "closed", "elsewhere"]))
    def crash(self, number: int, how: str) -> None:
        holders = [task.owner for task in self.tasks.values() if task.state == "in_progress"]
        number = next((n for n in holders if n in range(self.COUNT)), number)  # one that holds a claim
        queue = self.queue(number)
        if how in ("killed", "elsewhere") and not self.company:
            how = "dropped"
        if how == "closed":
            queue.close()
        # As if it had been a process that is gone, or one on another machine.
        held = [id for id in self.in_state("in_progress") if self.tasks[id].owner == number]
        for was in {
            Path(self.claims[id][-1].path).parent for id in held if how in ("killed", "elsewhere")
        }:
            node, pid, start, place, token = was.name.split("~")
            other = f"{node}~{2**22 + 1}~{start}~{place}~{token}"
            if how == "elsewhere":
                other = f"b~{pid}~{start}~elsewhere~{token}"
            was.rename(was.with_name(other))
        for id, task in self.tasks.items():
            if task.state == "in_progress" and task.owner == number:
                task.state = "pending" if how == "closed" else task.state
                task.owner = self.COUNT if how == "elsewhere" else None
                if how in ("killed", "elsewhere"):
                    self.claims.pop(id)  # nobody is there who could finish it
        del queue
        self.queues[number] = None
        self.queues[number] = self.new_queue()

    @rule(seconds=st.sampled_from([0.3, 8, 31, 3_000, 100_000]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(seconds=st.sampled_from([-3_000, -1, 0.001, 50, 100_000]))
    def set_wall_clock(self, seconds: float) -> None:
        self.clock.step_wall(seconds)

    @invariant()
    def states_are_as_expected(self) -> None:
        queue = self.queue(len(self.tasks) % self.COUNT)
        counts = collections.Counter(task.state for task in self.tasks.values())
        assert queue.counts() == {state: counts[state] for state in STATES}
        for id, task in self.tasks.items():
            assert queue.status(id) == (None if task.state == "cancelled" else task.state)
        for state in ("pending", "in_progress", "done", "failed"):
            assert list(queue.ids(state)) == self.in_state(state)
        figure("model", steps=1)

    def drain(self) -> None:
        """At the end everything that was not finished is delivered once more, in order."""
        self.clock.advance(10**6)
        for task in self.tasks.values():
            task.due_s, task.deadline_s = 0, 0
        self.come_back()
        queue = self.queue(0)
        left = []
        while task := queue.pop():
            left.append(task.id)
            queue.done(task)
        assert left == self.in_state("pending")


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


# --- 3: first in, first out ---------------------------------------------------------------------------


def test_what_comes_back_has_its_old_place(directory: Path, clock: Time) -> None:
    """A task that is retried through one object is the next one of every other in this process."""
    one, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "a")
    for payload in (b"0", b"1", b"2", b"3"):
        one.push(payload)
    first = one.pop()
    second = other.pop()  # from here on, what is left is in the hand of both
    assert first
    assert second
    one.retry(first)
    again = other.pop()
    assert again
    assert (again.id, again.attempt) == (first.id, 2)


def test_a_pop_that_raised_does_not_change_the_order(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of descriptors for one pop, and then not any more: first in, first out."""
    q = FemtoQueue(directory, "node")
    q.push_many([b"0", b"1", b"2"])
    real = {"open": os.open, "scandir": os.scandir}
    out = []

    def short(name: str, path: str, *args: Any) -> Any:
        if name == "open" and "in_progress" in path:
            out.append(path)  # from the first claim on
        if out:
            raise OSError(errno.EMFILE, "too many open files", path)
        return real[name](path, *args)

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, functools.partial(short, name))
        with pytest.raises(OSError, match="too many"):
            q.pop()
    assert [q.pop().data for _ in range(3)] == [b"0", b"1", b"2"]


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
        audit(directory, clock, case.allowed(returned))
        clear(directory)
        if returned:
            break
    assert at > 1
    figure("killed at every step", calls=1, kill_points=at - 1)


def test_leftovers_of_dead_writers_are_swept_and_those_of_live_ones_are_not(
    directory: Path, spawn: Spawn
) -> None:
    """A half-written file goes when its writer is dead, and only then."""
    writer = """
q = FemtoQueue(sys.argv[1], "writer")
real = os.rename
def pause(*arguments):
    os.rename = real
    print("written", flush=True)
    input()
    real(*arguments)
os.rename = pause
print(q.push(b"x"))
"""
    dead, live = spawn(writer, directory), spawn(writer, directory)
    for process in (dead, live):
        expect(process, "written")
    killed(dead)
    (directory / "creating" / "of somebody else").write_bytes(b"")
    assert len(names(directory, "creating")) == 3
    q = FemtoQueue(directory, "other")
    assert q.pop() is None
    left = names(directory, "creating")
    assert len(left) == 2 and f"~{live.pid}~" in left[1]
    say(live)
    assert q.pop(timeout=10).id == ending(live)[0].strip()


# --- 5: a power cut -----------------------------------------------------------------------------------


class Node:
    """A file or directory on the simulated disk."""

    def __init__(self, is_directory: bool = False) -> None:
        self.is_directory = is_directory
        self.content = b""
        self.durable = -1  # the operation that synced it last, when a log is replayed
        self.entries: dict[
            str, tuple[Node, int]
        ] = {}  # name -> node, and the operation that put it there
        self.emptied_by: list[int] = []


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
        existed = name == "open" and os.path.lexists(args[0])
        result = REAL[name](*args, **kwargs)
        record = getattr(self, f"_{name}", None)
        if record and name == "open":
            record(result, existed, *args)
        elif record:
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
        if descriptor in self.open:  # or it is above
            self.log.append(Operation(synced=self.open[descriptor]))

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

        `torn`: what was written but not synced is not there either. `half`: as on btrfs, a rename whose
        new directory alone was synced leaves the old name too.
        """
        missing = set(missing)
        for i in range(end):  # what builds on something that is missing is missing as well
            if missing.intersection(self.log[i].needs):
                missing.add(i)
        tree: dict[Node, dict[str, Node]] = collections.defaultdict(dict)
        synced_at: dict[Node, int] = {}
        synced: dict[Node, bytes] = {}
        written: dict[Node, bytes] = {}
        renames = []
        for i, operation in enumerate(self.log[:end]):
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
                renames.append((i, operation.removed, operation.added))
        for i, (old, old_name), (new, new_name, node) in renames if half else ():
            if synced_at.get(old, -1) < i < synced_at.get(new, -1) and tree[new].get(new_name) is node:
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

    def push(self, count: int = 1) -> None:
        for _ in range(count):
            payload = b"task %d" % next(self.numbers)
            call = functools.partial(self.queue.push, payload)
            self.ids[payload] = self.promise(payload, "gone", "live", call)

    def push_many(self, count: int) -> None:
        payloads = [b"task %d" % next(self.numbers) for _ in range(count)]
        for payload in payloads:
            self.disk.fate(payload, "gone", "live")
        self.ids.update(zip(payloads, self.queue.push_many(payloads), strict=True))
        for payload in payloads:
            self.disk.fate(payload, "live")

    def schedule(self, after_s: float) -> bytes:
        payload = b"task %d" % next(self.numbers)
        due_us = int((self.clock.wall + after_s) * 1e6)
        call = functools.partial(self.queue.schedule, payload, due_us)
        self.ids[payload] = self.promise(payload, "gone", "live", call)
        return payload

    def write_source(self, payload: bytes, content: bytes) -> str:
        """Make a file that is certain to be on disk."""
        self.disk.fate(payload, "gone", "source")
        source = self.disk.base + "/source"
        descriptor = os.open(source, os.O_WRONLY | os.O_CREAT, 0o666)
        os.write(descriptor, content)
        os.fsync(descriptor)
        os.close(descriptor)
        self.sync(self.disk.base)
        return source

    def sync(self, directory: str) -> None:
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def put_by_hand(self) -> None:
        """Somebody moves a file into pending/."""
        payload = b"task %d" % next(self.numbers)
        source = self.write_source(payload, payload)
        self.disk.fate(payload, "source", "live")
        self.ids[payload] = "%016d_%d" % (self.clock.wall * 1e6, next(self.numbers))
        os.rename(source, f"{self.directory}/pending/{self.ids[payload]}")
        self.sync(f"{self.directory}/pending")
        self.sync(self.disk.base)
        self.disk.fate(payload, "live")

    def move(self) -> None:
        payload = b"task %d" % next(self.numbers)
        source = self.write_source(payload, payload)
        call = functools.partial(self.queue.push_file, source, move=True)
        self.ids[payload] = self.promise(payload, "source", "live", call)

    def pop(self) -> FemtoTask:
        task = self.queue.pop()
        assert task is not None
        return task

    def done(self, task: FemtoTask) -> None:
        self.promise(task.data, "live", "done", lambda: self.queue.done(task))

    def work(self, count: int) -> None:
        for _ in range(count):
            self.done(self.pop())

    def run(self) -> None:
        self.push()
        self.disk.fate(b"clock", "clock")  # chosen at the first stamp
        self.push(10)
        self.work(2)
        later = self.schedule(60), self.schedule(60), self.schedule(3_600)
        self.push_many(7)
        self.move()
        self.move()
        self.put_by_hand()
        failed = self.pop()
        self.promise(failed.data, "live", "failed", lambda: self.queue.fail(failed))
        self.queue.retry(self.pop())
        self.queue.retry(self.pop(), 30_000)
        held, other = self.pop(), self.pop()
        self.queue.touch(held)
        self.work(1)
        self.done(other)
        self.clock.advance(31)
        self.work(1)
        self.clock.advance(31)  # two fell due
        self.work(3)
        self.promise(failed.data, "failed", "live", lambda: self.queue.requeue(failed.id))
        self.promise(later[2], "live", "gone", lambda: self.queue.cancel(self.ids[later[2]]))
        victim = next(self.queue.ids("pending"))
        payload = next(data for data, id in self.ids.items() if id == victim)
        self.promise(payload, "live", "gone", lambda: self.queue.cancel(victim))
        self.push(3)
        self.done(held)
        held = self.pop()
        self.queue = self.open()  # what the first one held is taken back
        self.work(4)
        self.clock.advance(2_000)
        while task := self.queue.pop():
            self.done(task)
        self.clock.advance(10)
        assert self.queue.pop() is None  # buckets are removed
        self.push(2)
        self.promise(held.data, "done", "live", lambda: self.queue.requeue(held.id))
        held = self.pop()
        self.promise(held.data, "live, perhaps twice", "live", self.queue.close)


def place_of(path: str, queue: str) -> str:
    """What a file in an image of the disk is: "live", "done", "source" ..."""
    if not path.startswith(queue):
        return path
    state = path[len(queue) :].split("/")[0]
    return {"pending": "live", "scheduled": "live", "in_progress": "live"}.get(
        state, state.split("-")[0]
    )


def check_image(
    image: dict[str, bytes], fates: dict[bytes, frozenset[str]], queue: str, half: bool
) -> None:
    """Each task is whole, and where it may be; if a call did not return, perhaps at both places."""
    found: dict[bytes, list[str]] = {}
    for path, content in image.items():
        place = place_of(path, queue)
        if place == "clock":
            assert b"clock" not in fates or content.endswith(b"\n"), "the clock file is broken"
            found[b"clock"] = ["clock"]
        elif place not in ("creating", "layout") and (place != "source" or content):
            payload = content
            assert payload in fates, f"{path} holds {content!r}"
            found.setdefault(payload, []).append(place)
    for payload, possible in fates.items():
        places = found.get(payload, ["gone"])
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
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(content)
    clock.advance(10**6)
    reopened = FemtoQueue(place / queue, "a", LONG_MS, keep_done=False)
    delivered = []
    while task := reopened.pop():
        delivered.append(task.data)
        reopened.done(task)
    for payload, possible in fates.items():
        if possible == {"live"}:
            assert delivered.count(payload) == 1, (
                f"{payload!r} is delivered {delivered.count(payload)} times"
            )
        assert "live" in possible or payload not in delivered, f"{payload!r} is delivered again"
    shutil.rmtree(place)


@pytest.mark.parametrize("half", [False, True], ids=["whole renames", "half renames"])
def test_power_cut_after_every_operation(
    half: bool, scratch: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sync_after_write, what returned survives a power cut at any point, `done` included."""
    monkeypatch.setattr(femtoqueue, "_BUCKET_TASKS", 5)
    disk = Disk(scratch)
    directory = scratch / "nested" / "twice"
    queue = "nested/twice/"
    with Steps(1, disk.note, once=False):
        PowerCutWorkload(disk, directory, clock)
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


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """What happens meanwhile: ("fsync" or "mkdir" or "rename", the path that it is about)."""
    log: list[tuple[str, str]] = []

    def note(name: str, *arguments: Any, **options: Any) -> Any:
        result = REAL[name](*arguments, **options)
        if name in ("fsync", "mkdir", "rename"):
            log.append((name, synced_path(arguments[0]) if name == "fsync" else arguments[-1]))
        return result

    with Steps(1, note, once=False):
        yield log


def test_opening_again_after_an_error_syncs_all_that_was_made(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A durable queue in a new directory of a new directory, whose first opening failed on the way."""
    directory = scratch / "a" / "b" / "queue"
    synced: list[int] = []
    real_fsync, real_open = os.fsync, os.open

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def open_in_vain(path: str, *rest: int) -> int:
        if "/creating/" in path:
            monkeypatch.setattr(os, "open", real_open)
            raise OSError(errno.ENOSPC, "full", path)
        return real_open(path, *rest)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "open", open_in_vain)
    with pytest.raises(OSError, match="full"):
        FemtoQueue(directory, "a", sync_after_write=True)
    FemtoQueue(directory, "a", sync_after_write=True)
    above = [directory, *directory.parents[:3]]
    assert {path.stat().st_ino for path in above} <= {*synced}


def test_a_directory_made_again_is_synced_again(directory: Path, clock: Time) -> None:
    """A durable worker that was idle makes its directory anew, and syncs that before a claim lies in it."""
    queue = FemtoQueue(directory, "a", sync_after_write=True)
    for _ in range(2):
        queue.push(b"x")
        with watched() as log:
            task = queue.pop()
        assert task
        own = os.path.dirname(task.path)
        assert [call for call in log if "in_progress" in call[1]] == [
            *(("mkdir", own), ("fsync", str(directory / "in_progress")), ("rename", task.path)),
        ]
        queue.done(task)
        clock.advance(10)
        assert queue.pop() is None
        assert not os.path.exists(own), "the sweep removes it"


def test_a_directory_made_again_is_synced_before_other_threads_claim(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread of a durable worker claims into its directory while another one is yet to sync it."""
    queue = FemtoQueue(directory, "a", sync_after_write=True)
    queue.push(b"0")
    queue.done(queue.pop())
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
    lost = other.pop()
    held = queue.pop()
    assert lost and held
    clock.advance(1.1)
    abandoned = os.path.dirname(lost.path)
    real = os.fsync

    def sync(descriptor: int) -> None:
        if synced_path(descriptor) == abandoned:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        with pytest.raises(OSError, match=re.escape(abandoned)):
            queue.pop()
    assert queue.status(lost.id) == "pending"
    with watched() as log:
        if call == "pop":
            clock.advance(1.1)
            assert queue.pop()
        else:
            queue.done(held)
    assert ("fsync", abandoned) in log
    [bucket] = [path.parent for path in directory.glob(f"pending/*/{lost.id}*")] or [None]
    assert bucket is None or ("fsync", str(bucket)) in log


# --- 6: a payload that does not match its checksum ----------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 20) + 1])
def test_broken_payload(directory: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    """A payload that does not match its checksum goes to corrupt/ and the log; the queue goes on."""
    queue = FemtoQueue(directory, "a")
    id = queue.push(b"x" * size)
    [name] = files(directory / "pending")
    put(directory / "pending" / name, b"y" + b"x" * (size - 1))
    queue.push(b"next")
    with caplog.at_level(logging.WARNING, "femtoqueue"):
        assert drained(queue) == [b"next"]
    assert id in caplog.text
    assert queue.status(id) == "corrupt" and (directory / "corrupt" / id).exists()


# --- 7: a call that raises ----------------------------------------------------------------------------

ERRORS = ("ENOSPC", "EIO", "EMFILE", "EACCES", "EROFS", "ESTALE", "EINTR")
# What each call can answer; the rest answers all of ERRORS.
ERRORS_OF = {
    "read": ("EIO", "ESTALE"),
    "write": ("ENOSPC", "EIO", "ESTALE"),
    "close": ("EIO", "ENOSPC"),
    "fsync": ("EIO", "ENOSPC", "EROFS", "ESTALE"),
    "fstat": ("EIO", "ESTALE"),
    "lseek": ("EIO",),
    "posix_fadvise": ("EIO",),
    "stat": ("EIO", "EACCES", "ESTALE"),
    "lstat": ("EIO", "EACCES", "ESTALE"),
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
    # In no variable: with its traceback, that would be a cycle that keeps the queue object alive.
    raise OSError(code, os.strerror(code), str(args[0]))


def steps_of(case: Case, directory: Path, durable: bool, clock: Time) -> list[str]:
    """The names of the filesystem calls that a case makes when all goes well."""
    names: list[str] = []

    def note(name: str, *args: Any, **kwargs: Any) -> Any:
        names.append(name)
        return REAL[name](*args, **kwargs)

    stage = Stage(case, directory, durable, clock)
    with Steps(1, note, once=False):
        stage.act()
    clear(directory)
    return names


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
    error = False
    with steps:
        try:
            stage.act()
        except OSError:
            error = True
    assert steps.met == step, f"it took other steps, {steps.met}"
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


@durable_or_not
@each_case
@pytest.mark.usefixtures("unlogged")
def test_failing_at_every_filesystem_call(name: str, durable: bool, scratch: Path, clock: Time) -> None:
    """A call raises OSError or succeeds, never in between; made again, it works, without a restart."""
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


def test_errors_of_the_filesystem(directory: Path) -> None:
    """An OSError comes with its path."""
    put(directory.parent / "file")
    with pytest.raises(OSError) as caught:
        FemtoQueue(directory.parent / "file", "a")
    assert str(directory.parent / "file") in str(caught.value)
    queue = FemtoQueue(directory, "a")
    shutil.rmtree(directory)
    for call in (queue.pop, lambda: queue.push(b"x")):
        with pytest.raises(FileNotFoundError, match=re.escape(str(directory))):
            call()


@pytest.mark.parametrize(
    "construction",
    [False, True],
    ids=["calls", "constructor"],
)
def test_an_error_tells_its_path(
    scratch: Path, clock: Time, unlogged: None, construction: bool
) -> None:
    """Whatever fails in reading, writing or syncing, in whatever call: the OSError names a path."""

    def break_descriptor(name: str, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    pathless = []
    count = 0
    for name, case in CASES.items():
        if name.startswith("construction") is not construction:
            continue
        for at, step in enumerate(steps_of(case, scratch / "plain", True, clock), 1):
            if step not in ("read", "write", "fsync", "fstat", "lseek"):
                continue
            stage = Stage(case, scratch / str(at), True, clock)
            steps = Steps(at, break_descriptor)
            try:
                with steps:
                    stage.act()
            except OSError as error:
                if steps.met == step and not (error.filename and os.path.isabs(error.filename)):
                    pathless.append(f"{name}: call {at}, {step}")
            stage.drop()
            clear(stage.directory)
            count += 1
    assert count and not pathless, "\n".join(pathless)


@durable_or_not
@pytest.mark.parametrize("keep", [True, False], ids=["keep", "delete"])
@pytest.mark.parametrize("call", [*VERDICTS, "touch"])
def test_while_the_directory_is_away(directory: Path, call: str, keep: bool, durable: bool) -> None:
    """While the queue is unmounted a verdict is neither given nor refused; later the same call works."""
    q = FemtoQueue(directory, "node", 30_000, durable, keep_done=keep, keep_failed=keep)
    id = q.push(b"x")
    task = q.pop()
    finish = VERDICTS.get(call, FemtoQueue.touch)
    elsewhere = directory.rename(directory.with_name("elsewhere"))
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            finish(q, task)
        assert caught.value.filename.startswith(str(directory))
    shutil.rmtree(directory, ignore_errors=True)
    elsewhere.rename(directory)
    assert q.status(id) == "in_progress"
    finish(q, task)
    kept = ("done", "failed") if keep else (None, None)
    after = dict(zip([*VERDICTS, "touch"], [*kept, "pending", "scheduled", "in_progress"], strict=True))
    assert q.status(id) == after[call]
    if call == "touch":
        q.done(task)
    else:
        with pytest.raises(NotInProgress):
            q.done(task)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename", "close", "posix_fadvise"])
def test_push_many_on_a_bad_disk_has_pushed_a_prefix(
    directory: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whichever system call fails: a prefix is pushed, nothing is left in creating/, no open file."""
    items = [b"%d" % n for n in range(5)]
    for at in range(14):
        q = FemtoQueue(directory / str(at), "node", sync_after_write=True)
        open_files = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            break_call(patch, call, at)
            try:
                q.push_many(items)
                assert q.counts()["pending"] == 5
            except OSError:
                pass
        assert len(os.listdir("/proc/self/fd")) <= open_files + (call == "close")
        pushed = drained(q)
        assert pushed == items[: len(pushed)]
        assert names(directory / str(at), "creating") == []
        assert drained(q) == []


@durable_or_not
@pytest.mark.parametrize("call", ["open", "read", "write", "rename", "fsync", "close", "unlink"])
def test_push_file_that_fails_leaves_the_file_where_it_was(
    directory: Path, places: list[Path], monkeypatch: pytest.MonkeyPatch, durable: bool, call: str
) -> None:
    """A failed system call: the file is where it was and no task, so the call can be made again."""
    for at, place in itertools.product(range(4), places):
        q = FemtoQueue(directory / f"{at}{place.name}", "node", sync_after_write=durable)
        source = place / "file"
        source.write_bytes(b"x")
        with monkeypatch.context() as patch:
            break_call(patch, call, at)
            with contextlib.suppress(OSError):
                q.push_file(source, move=True)
                source.write_bytes(b"it is a task, so the place is free")
        if source.read_bytes() == b"x":
            assert drained(q) == []
            q.push_file(source, move=True)
        assert drained(q) == [b"x"]


@pytest.mark.parametrize("call", ["push", "schedule", "push_file"])
def test_a_push_whose_file_was_deleted(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Somebody empties creating/ during a push: it raises FileNotFoundError, and there is no task."""
    queue = FemtoQueue(directory, "a")
    real = os.rename

    def too_late(source: str, target: str) -> None:
        Path(source).unlink(missing_ok=True)
        real(source, target)

    monkeypatch.setattr(os, "rename", too_late)
    with pytest.raises(FileNotFoundError) as caught:
        if call == "push":
            queue.push(b"x")
        elif call == "schedule":
            queue.schedule(b"x", 1_790_000_000_000_000)
        else:
            queue.push_file(put(tmp_path / "file"))
    assert caught.value.filename.startswith(f"{directory}/creating/")
    assert not any(queue.counts().values())
    monkeypatch.setattr(os, "rename", real)
    queue.push(b"again")
    assert drained(queue) == [b"again"]


@pytest.mark.parametrize("call", ["cancel", "cancel scheduled", "requeue failed", "requeue done"])
def test_cancel_and_requeue_can_be_made_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """One whose fsync failed raises OSError; made again it returns True, and is on disk then."""
    call, _, state = call.partition(" ")
    for at in itertools.count():
        q = FemtoQueue(directory / str(at), "node", sync_after_write=True)
        if state == "scheduled":
            id = q.schedule(b"x", time.time_ns() // 1000 + 10**10)
        else:
            id = q.push(b"x")
        if call == "requeue":
            (q.fail if state == "failed" else q.done)(q.pop())
        where = {path.parent for path in (directory / str(at)).rglob(f"{id}*")}
        with pytest.MonkeyPatch.context() as patch:
            log: list[Path | None] = []  # what was synced, and None for a change
            count = itertools.count()

            def change(real: Callable[..., None], *paths: str, log: list[Path | None] = log) -> None:
                real(*paths)
                log.append(None)

            def sync(descriptor: int, log: list = log, count: Iterator = count, at: int = at) -> None:
                if next(count) == at:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

            for name in ("rename", "unlink"):
                patch.setattr(os, name, functools.partial(change, getattr(os, name)))
            patch.setattr(os, "fsync", sync)
            try:
                assert getattr(q, call)(id) is True
                break  # there were fewer calls than that
            except OSError as error:
                assert error.errno == errno.EIO and error.filename
            assert getattr(q, call)(id) is True
        if call == "requeue":
            assert q.status(id) == "pending"
            where |= {path.parent for path in (directory / str(at)).rglob(f"{id}*")}
        else:
            assert q.status(id) is None
        assert where <= {*log[len(log) - log[::-1].index(None) :]}, "not synced after the change"
        assert getattr(q, call)(id) is False, "once was enough"
    assert at > 0


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
        ("pending", "move", errno.EACCES),
        ("pending", "move", errno.EPERM),
        ("pending", "open", errno.EACCES),
        ("pending", "open", errno.EIO),
        ("bucket", "list", errno.EACCES),
        ("due", "move", errno.EACCES),
        ("claim", "move", errno.EACCES),
        ("owner", "list", errno.EACCES),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value,
)
def test_a_task_that_cannot_be_had_holds_up_no_other(
    directory: Path,
    clock: Time,
    refuse: Refusal,
    caplog: pytest.LogCaptureFixture,
    place: str,
    what: str,
    code: int,
) -> None:
    """What may not be read or moved is logged and stays; pop goes on, and at the end raises OSError."""
    queue = FemtoQueue(directory, "a")
    part = put_stuck(queue, place, clock)
    [path] = [path for path in directory.rglob("*_*") if path.is_file()]
    queue.push_many([b"1", b"2"])
    refuse(what, part, code)
    for worker in (queue, FemtoQueue(directory, "b")):
        assert drained_one(worker) in (b"1", b"2")
    assert part in caplog.text
    assert {record.name for record in caplog.records} == {"femtoqueue"}
    for worker in (queue, queue, FemtoQueue(directory, "b")):
        with pytest.raises(OSError) as caught:
            worker.pop()
        assert (caught.value.errno, part in caught.value.filename) == (code, True)
        assert path.read_bytes() == b"stuck"
    queue.push(b"3")
    assert drained_one(queue) == b"3"
    refuse.rules.clear()
    task = queue.pop()
    assert task and task.data == b"stuck"
    assert task.attempt == (2 if place in ("claim", "owner") else 1)


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str, part: str) -> list[str]:
    """Let the next os.<name> of a path with `part` in it raise EIO; the list tells when it did."""
    real = getattr(os, name)
    failed: list[str] = []

    def call(path: str, *rest: Any) -> Any:
        if part in path and not failed:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path, *rest)

    monkeypatch.setattr(os, name, call)
    return failed


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("name", ["open", "rename", "scandir"])
def test_a_passing_fault_changes_nothing(
    directory: Path,
    clock: Time,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    at: int,
) -> None:
    """What fails once is had at the second try, within the same pop: in order, and no word is said."""
    queue = FemtoQueue(directory, "a")
    ids = []
    for payload in (b"1", b"2", b"3"):
        ids.append(queue.push(payload))
        clock.advance(2_000)  # each in a bucket of its own
    tasks = [queue.pop() for _ in range(at)]
    part = f"/pending/{ids[at][:7]}" if name == "scandir" else ids[at]
    failed = fail_once(monkeypatch, name, part)
    tasks += [queue.pop() for _ in range(3 - at)]
    assert failed and caplog.messages == []
    assert [task and (task.id, task.attempt) for task in tasks] == [(id, 1) for id in ids]
    assert queue.pop() is None


@pytest.mark.parametrize("busy", [True, False], ids=["other work", "nothing else"])
def test_what_fails_once_beside_what_always_does(
    directory: Path, clock: Time, refuse: Refusal, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    """A task that fails once while another one always does is passed over, but no more than a minute."""
    queue = FemtoQueue(directory, "a")
    stuck, once, first = queue.push_many([b"stuck", b"once", b"first"])
    refuse("open", stuck, errno.EIO)
    failed = fail_once(monkeypatch, "open", once)
    task = queue.pop()
    assert task and task.id == first and failed
    queue.done(task)
    delivered = []
    for _ in range(130 if busy else 1):
        if busy:
            queue.push(b"other")
        task = queue.pop()
        assert task
        delivered.append((task.data, task.attempt))
        queue.done(task)
        clock.advance(0.5)
    assert delivered.count((b"once", 1)) == 1
    at_s = delivered.index((b"once", 1)) * 0.5
    assert 55 <= at_s <= 61 if busy else at_s == 0
    if not busy:
        with pytest.raises(OSError, match=stuck):
            queue.pop()


@pytest.mark.parametrize("how", ["waiting", "waiting shortly", "polling", "started again"])
@pytest.mark.parametrize("state", ["in_progress", "scheduled"])
def test_very_many_that_cannot_be_moved_hold_up_no_other(
    directory: Path,
    clock: Time,
    refuse: Refusal,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    how: str,
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
        try:
            task = queue.pop({"waiting": 1.2, "waiting shortly": 0.3}.get(how, 0))
            break
        except PermissionError:  # and made again, it gets further
            clock.advance(0.1 if how in ("polling", "waiting shortly") else 1.2)
        if how == "started again":
            queue = FemtoQueue(directory, "a")
    assert task and task.data == b"17"


def test_what_cannot_be_had_is_logged_once_a_minute(
    directory: Path, clock: Time, refuse: Refusal, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be had costs a line a minute, not one at each pop, and no memory that grows."""
    queue = FemtoQueue(directory, "a")
    put_stuck(queue, "owner", clock)
    [hidden] = os.listdir(directory / "in_progress")
    bucket = put_stuck(queue, "bucket", clock)
    stuck = queue.push(b"stuck")
    refuse("list", hidden, errno.EACCES)
    refuse("list", bucket, errno.EACCES)
    refuse("open", stuck, errno.EACCES)
    for minute in range(1, 4):
        begun_s = clock.boot
        while clock.boot < begun_s + 60.5:
            queue.push(b"other")
            assert drained_one(queue) == b"other"
            clock.advance(0.6)
        for name in (hidden, bucket, stuck):
            assert sum(name in record.getMessage() for record in caplog.records) in (minute, minute + 1)
    assert len(caplog.records) <= 12
    assert len(queue._unsure) < 10


@pytest.mark.parametrize("place", ["pending", "due", "claim"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_fault_of_the_whole_filesystem_is_no_tasks_fault(
    directory: Path, clock: Time, refuse: Refusal, place: str, code: int
) -> None:
    """A full or read-only disk costs each pop a few calls, however many tasks; and then, order is exact."""
    queue = FemtoQueue(directory, "a")
    folder = {
        "pending": "pending/1700000000000000",
        "due": "scheduled/1700000000000000",
        "claim": f"in_progress/{DEAD_OWNER}",
    }[place]
    ids = [f"17000000000000{number:02d}_x" for number in range(50)]
    for id in ids:
        put(directory / folder / (id if place == "pending" else f"{id}~0~{id[:16]}"), id.encode())
    refuse("move", folder, code)
    for _ in range(3):
        before = refuse.count
        with pytest.raises(OSError) as caught:
            queue.pop()
        assert caught.value.errno == code
        assert refuse.count - before < (10 if place == "pending" else 2 * len(ids) + 10)
    refuse.rules.clear()
    assert drained(queue) == [id.encode() for id in ids]


def test_a_worker_that_stays_outlives_what_cannot_be_had(
    directory: Path,
    clock: Time,
    refuse: Refusal,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`run` goes on beside a task that it may not read, which it logs once a minute; `until_empty` raises."""
    queue, producer = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    stuck = queue.push(b"stuck")
    refuse("open", stuck, errno.EACCES)
    naps = itertools.count()
    real = time.sleep

    def sleep(seconds: float) -> None:
        real(seconds)
        if next(naps) == 100:
            producer.push(b"good")

    monkeypatch.setattr(time, "sleep", sleep)
    handled: list[bytes] = []

    def handle(task: FemtoTask) -> None:
        handled.append(task.data)
        signal.raise_signal(signal.SIGTERM)

    assert queue.run(handle) == 1 and handled == [b"good"]
    told = [message for message in caplog.messages if "the worker stays:" in message]
    assert len(told) == 2 and all(stuck in message for message in told)
    with pytest.raises(PermissionError):
        queue.run(handle, until_empty=True)


def test_an_alarm_ends_the_loop(directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TimeoutError that a signal handler raises is not one of the filesystem: `run` does not stay."""

    alarms: list[Exception] = [AssertionError("it stayed"), TimeoutError()]

    def sleep(seconds: float) -> None:
        raise alarms.pop()

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(TimeoutError):
        FemtoQueue(directory, "a").run(print)


def test_without_descriptors_for_the_log(directory: Path) -> None:
    """A worker that can open no file, not even to import what logs, stays, and goes on when it can."""
    code = """
import resource, signal
q = FemtoQueue(sys.argv[1], "node")
q.push(b"x")
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
real, naps = time.sleep, []
def sleep(seconds):
    naps.append(seconds)
    if seconds == 1:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    real(seconds / 10)
time.sleep = sleep
def handle(task):
    signal.raise_signal(signal.SIGTERM)
import threading
assert "logging" not in sys.modules
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
print(q.run(handle), 1 in naps)
"""
    assert run(code, directory) == "1 True\n"


@pytest.mark.parametrize("place", ["due", "claim", "later", "broken"])
def test_a_full_disk_stops_no_task_that_needs_no_room(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """When no directory can be made any more, tasks that need none are delivered all the same."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"0")
    assert drained_one(queue) == b"0"
    stuck = f"{NOW_US - 3_600_000_000}_stuck"
    if place == "due":
        put(directory / "scheduled" / f"{stuck}~0~{NOW_US - 1}")
    elif place == "claim":
        put(directory / "in_progress" / DEAD_OWNER / f"{stuck}~1~{NOW_US - 1}")
    elif place == "later":
        put(directory / "scheduled" / f"{NOW_US - 10**9:016d}" / f"{stuck}~0~{NOW_US + 10**8}")
    else:
        put(directory / "pending" / OLD_ID, b"not its payload")
        (directory / "corrupt").rmdir()
    queue.push_many([b"1", b"2", b"3", b"4"])
    clock.advance(1.5)
    real = os.mkdir
    refused: list[str] = []

    def mkdir(path: str, *mode: int) -> None:
        if os.path.isdir(path):
            raise FileExistsError(errno.EEXIST, "there", path)
        refused.append(path)
        raise OSError(errno.ENOSPC, "full", path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert [drained_one(queue) for _ in range(2)] == [b"1", b"2"]
    before = len(refused)
    assert [drained_one(queue) for _ in range(2)] == [b"3", b"4"]
    assert len(refused) == before, "what cannot be had is tried again at each pop"
    if place == "later":
        assert queue.pop() is None
    else:
        with pytest.raises(OSError, match="full"):
            queue.pop()
    monkeypatch.setattr(os, "mkdir", real)
    clock.advance(200)
    if place == "broken":
        assert queue.pop() is None and names(directory, "corrupt") == [OLD_ID]
    else:
        assert drained(queue) == [b"x"]


def test_what_was_retried_meanwhile_comes_first(
    directory: Path, queue: FemtoQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that another thread's `retry` gave back while pop was at work is the next one."""
    queue.push(b"c")
    first = queue.pop()
    assert first and first.data == b"a"
    queue._forget_listings()  # so that pop makes one
    real = os.open

    def retried_meanwhile(path: str, *rest: int) -> int:
        monkeypatch.setattr(os, "open", real)
        thread = threading.Thread(target=queue.retry, args=(first,))
        thread.start()
        thread.join()
        return real(path, *rest)

    monkeypatch.setattr(os, "open", retried_meanwhile)
    assert drained(queue) == [b"b", b"a", b"c"]


def test_without_room_for_the_own_directory(
    directory: Path, queue: FemtoQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that polls while it cannot make its directory takes up no memory, and keeps the order."""
    real = os.mkdir

    def mkdir(path: str, *mode: int) -> None:
        if "in_progress" in path:
            raise PermissionError(errno.EACCES, "not here", path)
        real(path, *mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    for _ in range(20):
        with pytest.raises(PermissionError):
            queue.pop()
    assert len(queue._unsure) < 5
    monkeypatch.setattr(os, "mkdir", real)
    assert drained(queue) == [b"a", b"b"]


def test_never_none_for_what_was_passed_over_before(
    directory: Path, queue: FemtoQueue, refuse: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was passed over and is repaired is found even by a pop that meets a passing fault."""
    stuck = next(queue.ids("pending"))
    refuse("open", stuck, errno.EACCES)
    assert drained_one(queue) == b"b"
    refuse.rules.clear()
    failed = fail_once(monkeypatch, "scandir", "pending")
    assert drained_one(queue) == b"a" and failed


@pytest.mark.parametrize("stale", [0, 2])
def test_never_none_while_another_thread_fails(
    directory: Path, queue: FemtoQueue, refuse: Refusal, monkeypatch: pytest.MonkeyPatch, stale: int
) -> None:
    """What a thread took from a listing and could not read, another one finds, or it raises as well."""
    queue.push_many([b"taken by another worker"] * stale)
    assert drained_one(queue) == b"a"
    other = FemtoQueue(directory, "node-2")  # kept: when it goes, the other's listing is forgotten
    drained(other)
    refuse("open", queue.push(b"stuck"), errno.EACCES)
    raised: list[OSError] = []

    def fail() -> None:
        with pytest.raises(PermissionError) as caught:
            queue.pop()
        raised.append(caught.value)

    thread = threading.Thread(target=fail)
    real = femtoqueue._Listing.next

    def wait_for_the_other(listing: Any) -> Any:
        if threading.current_thread() is not thread and listing._buckets and not raised:
            thread.start()
            thread.join()
        return real(listing)

    monkeypatch.setattr(femtoqueue._Listing, "next", wait_for_the_other)
    with pytest.raises(PermissionError):
        queue.pop()
    assert raised


def test_never_none_while_another_thread_cannot_list(
    directory: Path, queue: FemtoQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that another thread could not read, of a listing that this one began, is read again."""
    found: list[FemtoTask | None] = []
    thread = threading.Thread(target=lambda: found.append(queue.pop()))
    real = femtoqueue._Listing.next

    def wait_for_the_other(listing: Any) -> Any:
        if threading.current_thread() is not thread and listing._buckets and not thread.ident:
            thread.start()
            thread.join()
        return real(listing)

    monkeypatch.setattr(femtoqueue._Listing, "next", wait_for_the_other)
    failed = fail_once(monkeypatch, "scandir", "/pending/1")
    found.append(queue.pop())
    assert failed and [task and task.data for task in found] == [b"a", b"b"]


def test_an_interrupted_pop_keeps_the_order(
    directory: Path, queue: FemtoQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task whose claim was interrupted, as by Ctrl-C, is the next one to be delivered."""
    queue.push(b"c")
    assert drained_one(queue) == b"a"
    real = os.open

    def interrupted(path: str, *rest: int) -> int:
        monkeypatch.setattr(os, "open", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        queue.pop()
    assert drained(queue) == [b"b", b"c"]


def test_another_verdict_after_one_that_raised(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that a call moved and could not sync is not another call's to finish, kept or deleted."""
    queue = FemtoQueue(directory, "a", sync_after_write=True, keep_done=False, keep_failed=False)
    keeping = FemtoQueue(directory, "a", sync_after_write=True)
    for first, second, state in (
        (queue.retry, queue.done, "pending"),
        (queue.retry, queue.fail, "pending"),
        (keeping.done, queue.fail, "done"),
        (keeping.fail, queue.done, "failed"),
    ):
        owner = first.__self__  # type: ignore[attr-defined]
        queue.push(b"x")
        task = owner.pop()
        real = os.fsync

        def fsync(descriptor: int, task: FemtoTask = task, real: Any = real) -> None:
            if task._moved:
                raise OSError(errno.EIO, "not synced")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="not synced"):
            first(task)
        monkeypatch.setattr(os, "fsync", real)
        with pytest.raises(NotInProgress):
            (owner.done if second == queue.done else owner.fail)(task) if owner is queue else second(
                task
            )
        assert queue.status(task.id) == state
        first(task)
        assert queue.status(task.id) == state
        drained(queue)


def test_a_batch_that_cannot_be_synced_or_closed_leaves_no_file_open(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """push_many on a full network filesystem raises the first error, and leaves nothing behind."""
    queue = FemtoQueue(directory, "a", sync_after_write=True)
    real_close = os.close

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    def close(descriptor: int) -> None:
        real_close(descriptor)
        raise OSError(errno.EIO, "lost")

    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "close", close)
        queue.push_many([b"x"] * 150)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert files(directory / "pending") == files(directory / "creating") == []


def test_a_retried_task_makes_no_bucket_again(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket of retried tasks that somebody removed, being empty, is not made again under its name."""
    worker, other = FemtoQueue(directory, "a"), FemtoQueue(directory, "b")
    made: list[str] = []
    real = os.mkdir

    def mkdir(path: str, *mode: int) -> None:
        real(path, *mode)
        made.append(path)

    put(directory / "pending" / "1600000000000123_x")
    monkeypatch.setattr(os, "mkdir", mkdir)
    for _ in range(4):
        task = worker.pop()
        assert task
        clock.advance(5)
        for path in (directory / "pending").iterdir():
            os.utime(path, (clock.wall - 5, clock.wall - 5))
        assert other.pop() is None  # which removes the empty bucket
        worker.retry(task)
    buckets = [path for path in made if "/pending/" in path]
    assert len(buckets) == len(set(buckets)) == 4


@needs_root
@pytest.mark.parametrize("hidden", ["file", "bucket", "owner"])
def test_what_another_user_hides_holds_up_no_other(open_to_all: Path, hidden: str) -> None:
    """The same with a real process of another user, who may not read a file or a directory."""
    queue = FemtoQueue(open_to_all, "node-1")
    id = OLD_ID.partition(".")[0]
    put(open_to_all / "pending" / "1700000000000000" / id)
    if hidden == "owner":
        assert queue.pop()
        [own] = (open_to_all / "in_progress").iterdir()
        own.rename(own.with_name(DEAD_OWNER.replace("host", "node-2")))
    queue.push(b"2")
    for path in [open_to_all, *open_to_all.rglob("*")]:
        path.chmod(0o777)
    [stuck] = open_to_all.rglob(f"{id}*")
    obstacle = stuck if hidden == "file" else stuck.parent
    obstacle.chmod(0o700)
    code = """
queue = FemtoQueue(sys.argv[1], "node-2")
task = queue.pop()
queue.done(task)
try:
    print(task.data, queue.pop())
except PermissionError as error:
    print(task.data, sys.argv[2] in error.filename)
"""
    assert run("import logging" + AS_NOBODY + code, open_to_all, obstacle.name) == "b'2' True\n"
    assert stuck.read_bytes() == b"x"


@pytest.mark.parametrize("place", ["pending", "bucket", "owner"])
def test_run_does_not_end_by_a_task_that_cannot_be_had(
    directory: Path, clock: Time, refuse: Refusal, place: str
) -> None:
    """run goes on as long as there is other work, and never says that a queue is empty that is not."""
    queue = FemtoQueue(directory, "a")
    part = put_stuck(queue, place, clock)
    queue.push(b"3")
    refuse("move" if place == "pending" else "list", part, errno.EACCES)
    handled = []

    def handle(task: FemtoTask) -> None:
        handled.append(task.data)
        if task.data != b"0":
            queue.push(b"%d" % (int(task.data) - 1))

    with pytest.raises(PermissionError, match=re.escape(part)):
        queue.run(handle, until_empty=True)
    assert handled == [b"3", b"2", b"1", b"0"]


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
    if clock_file == "without":
        [path] = open_to_all.glob("clock-*")
        path.unlink()
    before = snapshot(open_to_all, times=True)
    # The standard library may lie where nobody else can read it.
    imports = "import argparse, datetime, json, locale, logging, shutil"
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
    assert lines[-2:] == ["True", "True"]
    listed = [ids[states.index(state)] for state in STATES]
    assert lines[-8:-2] == listed
    assert all(state in "".join(lines) for state in STATES)
    assert snapshot(open_to_all, times=True) == before


# --- 8: many threads, and fork ------------------------------------------------------------------------


def test_threads(directory: Path) -> None:
    """One object may be used by many threads: nothing is delivered twice, nothing is lost."""
    queue = FemtoQueue(directory, "a")
    found: list[tuple[str, bytes]] = []
    pushed: list[str] = []
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for count in range(150):
                pushed.append(queue.push(b"%d" % (number * 1_000 + count)))
                if count % 3:
                    take()
            while take():
                pass
        except BaseException as error:
            errors.append(error)

    def take() -> bool:
        task = queue.pop()
        if task:
            found.append((task.id, task.data))
            queue.done(task)
        return task is not None

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors
    assert sorted(id for id, _ in found) == sorted(pushed) and len(set(pushed)) == 1_200
    assert {data for _, data in found} == {
        b"%d" % (n * 1_000 + c) for n in range(8) for c in range(150)
    }
    assert queue.counts()["done"] == 1_200


def test_an_object_is_made_while_all_are_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry tells all objects of this process, also while another thread makes one more."""
    queue = FemtoQueue(directory, "a")
    queue.push(b"1")
    made = []

    class Meanwhile:
        def __call__(self) -> None:
            made.append(FemtoQueue(directory, "b"))

    monkeypatch.setitem(femtoqueue._owners.data, "meanwhile", Meanwhile())
    task = queue.pop()
    assert task
    queue.retry(task)
    assert made and (again := queue.pop()) and again.attempt == 2


@durable_or_not
@pytest.mark.parametrize("moment", ["before", "after"])
def test_two_threads_make_one_bucket(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch, moment: str, durable: bool
) -> None:
    """Two threads that push while there is no bucket yet, one in the midst of making it, share it."""
    queue = FemtoQueue(directory, "a", sync_after_write=durable)
    if durable:
        queue.push(b"0")  # a durable producer has a bucket to himself from his second task on
    begun, over = threading.Event(), threading.Event()
    pushed: list[str] = []
    real = os.mkdir

    def make_slowly(path: str, *mode: int) -> None:
        if threading.current_thread() is not slow:
            return real(path, *mode)
        if moment == "after":
            real(path, *mode)
        begun.set()
        assert over.wait(10)
        return real(path, *mode) if moment == "before" else None

    slow = threading.Thread(target=lambda: pushed.append(queue.push(b"1")))
    monkeypatch.setattr(os, "mkdir", make_slowly)
    slow.start()
    assert begun.wait(10)
    try:
        pushed.append(queue.push(b"2"))
    finally:
        over.set()
        slow.join()
    assert len(pushed) == 2, "none raised"
    assert len({path.parent for id in pushed for path in directory.glob(f"pending/*/{id}")}) == 1
    assert drained(queue) == [b"0", b"1", b"2"][not durable :]


def test_done_in_a_thread_is_durable_by_itself(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A durable done has synced both sides of its claim, though another thread is about to do that."""
    queue = FemtoQueue(directory, "a", sync_after_write=True)
    queue.push_many([b"1", b"2"])
    first, second = queue.pop(), queue.pop()
    assert first and second
    buckets = {str(path) for path in (directory / "pending").iterdir()}
    begun, returned = threading.Event(), threading.Event()
    synced: list[str] = []
    real = os.fsync

    def sync_slowly(descriptor: int) -> None:
        if threading.current_thread() is slow:
            begun.set()
            assert returned.wait(10)
        real(descriptor)
        synced.append(synced_path(descriptor))

    slow = threading.Thread(target=queue.done, args=(first,))
    monkeypatch.setattr(os, "fsync", sync_slowly)
    slow.start()
    assert begun.wait(10)
    try:
        queue.done(second)
        there = {*synced}
    finally:
        returned.set()
        slow.join()
    assert {str(directory / "done"), os.path.dirname(second.path)} <= there
    assert buckets & there


def test_done_waits_for_what_another_thread_syncs(
    directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A durable done does not return before a task's way back, which another thread syncs, is on disk."""
    queue = FemtoQueue(directory, "a", sync_after_write=True)
    abandoned = put(directory / "in_progress" / DEAD_OWNER / "1700000000000000_x~1~1700000000000000")
    with synced_slowly(queue, str(abandoned.parent), monkeypatch) as events:
        task = queue.pop()
        assert task and task.attempt == 2
        queue.done(task)
    assert events == ["synced", "returned"]


@pytest.mark.parametrize(
    ("outer", "inner", "moment"),
    [
        ("push", "push", "clock"),
        ("push", "pop", "clock"),
        ("pop", "push", "clock"),
        ("pop", "pop", "clock"),
        ("pop", "pop", "listing"),
    ],
)
def test_a_signal_handler_may_use_the_object_that_it_interrupts(
    directory: Path,
    clock: Time,
    monkeypatch: pytest.MonkeyPatch,
    no_hang: None,
    outer: str,
    inner: str,
    moment: str,
) -> None:
    """A push or pop in the midst of another one is made, and neither waits for the other."""
    queue = FemtoQueue(directory, "a")
    pushed, found = [queue.push(b"1"), queue.push(b"2")], []
    calls = {"push": lambda: pushed.append(queue.push(b"3")), "pop": lambda: found.append(queue.pop())}
    interrupted: list[object] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: calls[inner]())
    module, name = (time, "monotonic") if moment == "clock" else (os, "scandir")
    real = getattr(module, name)

    def interrupt(*arguments: object) -> object:
        if not interrupted and (moment == "clock" or "/pending/" in str(arguments[0])):
            interrupted.append(arguments)
            signal.raise_signal(signal.SIGUSR1)
        return real(*arguments)

    try:
        monkeypatch.setattr(module, name, interrupt)
        calls[outer]()
        monkeypatch.setattr(module, name, real)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert interrupted and len(pushed) - 2 + len(found) == 2, "both were made"
    ids = {task.id for task in found if task}
    assert len(ids) == len(found)
    assert drained(queue) == [b"1233"[n : n + 1] for n, id in enumerate(pushed) if id not in ids]


def owners(directory: Path) -> set[int]:
    """The PIDs of all who hold claims."""
    claims = (directory / "in_progress").glob("*/*")
    return {int(path.parent.name.split("~")[1]) for path in claims}


def test_fork(directory: Path, queue: FemtoQueue) -> None:
    """An object may be carried through fork: the child claims as itself, the parent keeps its own."""
    mine = queue.pop()
    assert mine
    reader, writer = os.pipe()

    def claim_and_wait() -> None:
        assert queue.pop()
        queue.push(b"c")
        os.write(writer, b"claimed")
        signal.pause()

    child = forked(claim_and_wait)
    os.close(writer)  # so that its death ends the read
    try:
        assert os.read(reader, 7) == b"claimed"
        assert owners(directory) == {os.getpid(), child}
        assert drained(queue) == [b"c"]
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert drained(FemtoQueue(directory, "node-2")) == [b"b"]
    queue.done(mine)


def test_the_child_ends(directory: Path, queue: FemtoQueue) -> None:
    """What a forked child does with its copy, and its end, leave the parent's claims alone."""
    mine = queue.pop()
    assert mine

    def work() -> None:
        queue.push(b"c")
        assert drained(queue) == [b"b", b"c"]
        queue.close()

    assert os.waitpid(forked(work), 0)[1] == 0
    assert drained(FemtoQueue(directory, "node-1")) == []
    queue.push(b"d")
    assert drained(queue) == [b"d"]
    queue.done(mine)


def test_fork_makes_other_ids(directory: Path, queue: FemtoQueue) -> None:
    """Parent and child never make the same id, not even in the same microsecond."""
    time_us = int(time.time() * 1e6) + 60_000_000

    def schedule() -> None:
        for _ in range(100):
            queue.schedule(b"same", time_us)

    child = forked(schedule)
    schedule()
    assert os.waitpid(child, 0)[1] == 0
    assert queue.counts()["scheduled"] == 200


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("call", ["done", "retry"])
def test_a_forked_child_finishes(directory: Path, call: str, keep: bool) -> None:
    """A task popped before the fork may be finished by the child; the parent gets NotInProgress."""
    queue = FemtoQueue(directory, "node-1", keep_done=keep)
    queue.push(b"a")
    mine = queue.pop()
    assert mine
    assert os.waitpid(forked(lambda: getattr(queue, call)(mine)), 0)[1] == 0
    with pytest.raises(NotInProgress):
        queue.done(mine)
    assert drained(queue) == ([b"a"] if call == "retry" else [])


def claim_for_the_parent(queue: FemtoQueue, mine: FemtoTask, pipe: object) -> None:
    """What the child of `test_multiprocessing` does."""
    claim = queue.pop()
    queue.done(mine)
    pipe.send((os.getpid(), claim))  # type: ignore[attr-defined]
    pipe.recv()  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(directory: Path, queue: FemtoQueue, method: str) -> None:
    """Queue and task may be passed to a child of multiprocessing; it claims as itself."""
    mine = queue.pop()
    assert mine
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    child = context.Process(target=claim_for_the_parent, args=(queue, mine, there))
    child.start()
    there.close()  # so that its death ends the recv
    try:
        pid, claim = here.recv()
        assert owners(directory) == {pid} == {child.pid}
        assert queue.status(mine.id) == "done"
        assert queue.pop() is None, "the child is alive"
        queue.done(claim)
        here.send("end")
        child.join()
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()
    assert queue.status(claim.id) == "done" and claim.data == b"b"


def test_a_forked_child_is_one_owner_for_all_its_threads(directory: Path) -> None:
    """Threads of a forked child that use an object at the same time are one owner of its claims."""
    run(
        """
import threading
sys.setswitchinterval(1e-6)
q = FemtoQueue(sys.argv[1], "node")
q.push_many([b"x"] * 4)
pid = os.fork()
if not pid:
    begin, real = threading.Barrier(4), q._become_new_owner

    def slowly():
        time.sleep(0.05)
        real()

    q._become_new_owner = slowly
    threads = [threading.Thread(target=lambda: (begin.wait(), q.pop())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owners = os.listdir(f"{sys.argv[1]}/in_progress")
    os._exit(len([name for name in owners if f"~{os.getpid()}~" in name]))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
""",
        directory,
    )


# --- 9: no thread, no signal handler, no open file ----------------------------------------------------


@durable_or_not
def test_no_thread_no_signal_handler_no_open_file(
    directory: Path, tmp_path: Path, durable: bool
) -> None:
    """No call but run leaves a thread, a signal handler or an open file, nor has one meanwhile."""

    def held() -> tuple[object, ...]:
        handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
        return threading.enumerate(), handlers, os.listdir("/proc/self/fd")

    before = held()
    with FemtoQueue(directory, "node", sync_after_write=durable) as q:
        ids = [q.push(b"1"), *q.push_many([b"2", bytes(2 << 20), b"4"])]
        ids += [q.push_file(put(tmp_path / "file"), move=True), q.schedule(b"6", 10**15)]
        assert held() == before
        for finish in (q.done, q.fail, q.retry, q.touch):
            task = q.pop(timeout=1)
            assert task and held() == before
            assert task.data
            finish(task)
        assert q.pop() and q.pop() and q.pop()
        assert q.pop(timeout=0.02) is None and not q.join(timeout=0.02)
        assert q.requeue(ids[0]) and q.cancel(ids[0]) and q.purge("failed", 0) == 1
        assert sum(q.counts().values()) == sum(bool(q.status(id)) for id in ids) == 4
        assert next(q.ids("in_progress"))
        assert held() == before
    assert held() == before


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
    ("call", "place", "error"),
    [
        ("push", "nothing", queues.Full),
        ("push", "hidden bucket", queues.Full),
        ("push", "bad bucket", OSError),
        ("pop", "task", OSError),
        ("pop", "bad bucket", OSError),
        ("pop", "bad buckets", OSError),
        ("pop", "owner", OSError),
        ("close", "task", OSError),
        ("close", "full disk", OSError),
    ],
)
def test_a_call_that_raised_keeps_nothing_alive(
    directory: Path, refuse: Refusal, unlogged: None, call: str, place: str, error: type[Exception]
) -> None:
    """The last reference dropped, the object is gone at once, though one of its calls raised."""
    q = FemtoQueue(directory, "node", maxsize=1)
    stuck = put(directory / "pending" / "1700000000000000" / OLD_ID.partition(".")[0])
    put(directory / "in_progress" / DEAD_OWNER / "1700000000000000_x~1~1700000000000000")
    what, part, code = {
        "nothing": ("list", "no such name", 0),
        "hidden bucket": ("list", stuck.parent.name, errno.EACCES),
        "bad bucket": ("list", f"pending/{stuck.parent.name}", errno.EIO),
        "bad buckets": ("list", "pending/1", errno.EIO),
        "task": ("open", "/in_progress/", errno.EIO),
        "owner": ("list", "/in_progress/", errno.EACCES),
        "full disk": ("", "", 0),
    }[place]
    if place == "owner":
        stuck.unlink()
    if place == "bad buckets":
        put(directory / "pending" / "1700000000000001" / "1700000000000001_x")
    if call == "close":
        held = [q.pop() for _ in range(2)]
        what, part, code = "move", held[0].id, errno.EIO
        if place == "full disk":
            refuse("move", held[1].id, errno.ENOSPC)
    refuse(what, part, code)
    gone = weakref.ref(q)
    gc.collect()
    gc.disable()
    try:
        try:
            if call == "close":
                q.close()
            while q.push(b"x") if call == "push" else q.pop():
                pass
            raise AssertionError("it did not raise")
        except error:
            pass
        del q
        assert gone() is None
    finally:
        gc.enable()


def test_run_restores_the_signal_handlers_before_it(directory: Path) -> None:
    """run sets its handlers while it runs, and leaves those that it found, however it ends."""
    q = FemtoQueue(directory, "node")
    q.push_many([b"1", b"2"])
    numbers = (signal.SIGTERM, signal.SIGINT)
    found = [lambda *_: None, signal.SIG_IGN]
    before = [signal.signal(number, handler) for number, handler in zip(numbers, found, strict=True)]
    try:
        during = []

        def handle(task: FemtoTask) -> None:
            during.extend(map(signal.getsignal, numbers))
            if task.data == b"2":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            q.run(handle, until_empty=True)
        assert list(map(signal.getsignal, numbers)) == found
        assert len(during) == 4 and not set(during) & set(found)
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


def test_run_in_another_thread_sets_no_signal_handlers(directory: Path) -> None:
    """run works in a thread that is not the main one, and leaves signals alone there."""
    q = FemtoQueue(directory, "node")
    q.push(b"x")
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = list(map(signal.getsignal, numbers))
    seen: list[object] = []

    def handle(task: FemtoTask) -> None:
        seen.append(list(map(signal.getsignal, numbers)))

    thread = threading.Thread(target=lambda: seen.append(q.run(handle, until_empty=True)))
    thread.start()
    thread.join(30)
    assert seen == [before, 1]


# --- 10: what does not grow ---------------------------------------------------------------------------


def test_what_a_task_costs_does_not_grow(scratch: Path, clock: Time) -> None:
    """A task's system calls, and the entries listed for it, do not grow with what the queue holds."""

    def cost(directory: Path) -> tuple[int, int]:
        """The filesystem calls, and the directory entries read, of 300 tasks that come and go."""
        listed = 0

        def count(name: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal listed
            if name == "scandir":
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
    queue = FemtoQueue(scratch / "large", "node")
    now_us = int(clock.wall * 1e6)
    for number in range(3_000):  # done, pending, and scheduled for later
        queue.push(b"x")
        if number % 3 == 0:
            queue.done(queue.pop())  # type: ignore[arg-type]
        queue.schedule(b"later", now_us + 3_600_000_000 * (2 + number))
    more_calls, more_listed = cost(scratch / "large")
    figure("costs", calls=calls, among_thousands=more_calls, entries=listed, of_thousands=more_listed)
    assert more_calls < 1.1 * calls
    assert more_listed < listed + 2 * 3_000  # each look lists the buckets, and one of them is opened


def calls_of(work: Callable[[], object]) -> list[str]:
    """The names of the filesystem calls that `work` makes, in order."""
    names: list[str] = []

    def note(name: str, *args: Any, **kwargs: Any) -> Any:
        names.append(name)
        return REAL[name](*args, **kwargs)

    with Steps(1, note, once=False):
        work()
    return names


def test_system_calls_of_a_task_are_those_of_the_floor(directory: Path, clock: Time) -> None:
    """Create, write, close, rename; rename, open, read, close; rename: nothing else, from push to done."""
    q = FemtoQueue(directory, "node")
    q.push_many([b"1", b"2"])
    q.done(q.pop())
    assert calls_of(lambda: q.push(b"x" * 100)) == ["open", "write", "close", "rename"]
    tasks: list[FemtoTask] = []
    assert calls_of(lambda: tasks.append(q.pop())) == ["rename", "open", "read", "close"]
    assert calls_of(lambda: q.done(tasks[0])) == ["rename"]


def test_system_calls_of_a_durable_task(directory: Path, clock: Time) -> None:
    """A durable push is write, fsync, rename, fsync; many together sync their directory once."""
    q = FemtoQueue(directory, "node", sync_after_write=True)
    for _ in range(3):  # beyond the bucket that all share
        q.push(b"x")
    assert calls_of(lambda: q.push(b"x")) == [
        *("open", "write", "fsync", "close", "rename"),
        *("open", "fsync", "close"),
    ]
    q.push_many([b"x"] * 10)
    calls = calls_of(lambda: q.push_many([b"x"] * 100))
    assert calls.count("rename") == 100
    assert calls.count("fsync") == 101


@pytest.mark.parametrize("backlog", [2_000, 20_000])
def test_a_backlog_costs_nothing(directory: Path, clock: Time, backlog: int) -> None:
    """However many wait, the first pop reads one bucket in little memory, and a later one reads none."""
    FemtoQueue(directory, "node").push_many([b"x"] * backlog)
    clock.advance(1)
    q = FemtoQueue(directory, "node")
    tracemalloc.start()
    try:
        first = calls_of(q.pop)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert first.count("scandir") <= 8, "creating, in_progress, scheduled, pending, and a bucket or two"
    assert peak < 2_000_000
    later = calls_of(lambda: [q.pop() for _ in range(500)])
    assert later.count("scandir") == 0 and len(later) == 4 * 500


def test_a_drained_queue_costs_what_a_new_one_does(directory: Path, clock: Time) -> None:
    """Once the emptied buckets are gone, a look at the empty queue makes the calls of the first one."""
    q = FemtoQueue(directory, "node", keep_done=False)
    q.push(b"")
    q.done(q.pop())
    clock.advance(3)
    assert q.pop() is None
    new = calls_of(q.pop)
    q.push_many([b""] * 5_000)
    while task := q.pop():
        q.done(task)
    clock.advance(3)
    assert q.pop() is None
    assert calls_of(q.pop) == new
    assert len(new) <= 16


def test_what_is_scheduled_for_later_costs_nothing(directory: Path, clock: Time) -> None:
    """Tasks for later are not listed: only their buckets are, by name."""
    q = FemtoQueue(directory, "node", keep_done=False)

    def cycle() -> list[str]:
        clock.advance(2)
        return calls_of(lambda: (q.push(b""), q.done(q.pop()), q.pop()))

    cycle()
    before = cycle()
    due_us = int((clock.wall + 86_400) * 1e6)
    for n in range(3_000):
        q.schedule(b"", due_us + n * 1_000)
    cycle()
    assert cycle() == before


def test_what_is_done_costs_nothing(directory: Path, clock: Time) -> None:
    """Neither push nor pop nor done ever lists what was finished."""
    q = FemtoQueue(directory, "node")
    q.push_many([b""] * 2_000)
    while task := q.pop():
        q.done(task)
    listed: list[str] = []

    def note(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "scandir":
            listed.append(os.path.basename(args[0]))
        return REAL[name](*args, **kwargs)

    with Steps(1, note, once=False):
        clock.advance(2)
        q.push(b"")
        q.done(q.pop())
        assert q.pop() is None
    assert listed and not {"done", "failed", "corrupt"} & set(listed)


def test_due_tasks_are_moved_a_thousand_at_a_time(directory: Path, clock: Time) -> None:
    """When very many fall due at once, one pop moves a thousand: none stalls."""
    q = FemtoQueue(directory, "node")
    due_us = int((clock.wall + 60) * 1e6)
    for n in range(2_500):
        q.schedule(b"", due_us + n)
    clock.advance(120)
    calls = calls_of(q.pop)
    assert (
        calls.count("rename") <= 1_000 + 1_000 + 1
    )  # moved, or sorted into a closer bucket; and claimed


def test_many_idle_owners_cost_nothing(directory: Path, clock: Time) -> None:
    """A hundred idle workers leave no directory behind for the others to list."""
    idle = [FemtoQueue(directory, f"node-{n}") for n in range(100)]
    for q in idle:
        q.push(b"")
        q.done(q.pop())
    clock.advance(3)
    for q in idle:
        assert q.pop() is None
    assert os.listdir(directory / "in_progress") == []
    assert len(calls_of(idle[0].pop)) <= 16


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


def test_ids_of_pending_are_lazy(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ids of a long queue cost one directory, not all of them."""
    q = FemtoQueue(directory, "node")
    for n in range(50):
        bucket = directory / "pending" / f"{1_790_000_000_000_000 + n * 10**9}"
        bucket.mkdir()
        (bucket / f"{bucket.name}_x").write_bytes(b"")
    opened = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (opened.append(path), real(path))[1])
    ids = q.ids("pending")
    assert next(ids).startswith("1790000000000000_")
    assert len(opened) <= 3
    assert len(list(ids)) == 49


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


def test_waiting_burns_no_core(directory: Path) -> None:
    """A worker that waits hardly uses the processor."""
    code = """
import resource
queue = FemtoQueue(sys.argv[1], "worker")
queue.pop()
def used_s():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
before_s = used_s()
queue.pop(timeout=1)
print(used_s() - before_s)
"""
    assert float(run(code, directory)) < 0.1


def test_the_module_imports_little() -> None:
    """import femtoqueue costs 15 ms: what only the command line or a warning needs is left out."""
    path = f"sys.path.insert(0, {str(MODULE.parent)!r})"
    code = f"import sys; {path}; import femtoqueue; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, check=True)
    costly = {"argparse", "logging", "typing", "dataclasses", "re", "datetime", "json", "hashlib"}
    costly |= {"subprocess", "signal", "queue", "inspect", "tempfile", "enum", "random", "uuid"}
    assert not costly & set(done.stdout.decode().split())


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
            check=False,
        )
        complaint = done.stderr.decode()
        assert done.returncode == status, complaint
        assert "Traceback" not in complaint
        if status:
            return [*done.stdout.decode().splitlines(), complaint]
        assert not complaint
        return done.stdout.decode().splitlines()

    def start(self, *arguments: object) -> Process:
        """Start a command in a process group of its own, as a shell does."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [*self.command, *map(str, arguments)]
        return self.guard(subprocess.Popen(command, text=True, start_new_session=True, **pipes))

    def piped(self, *arguments: str, behind: str) -> subprocess.CompletedProcess[bytes]:
        """Run a command in a real shell, with a pipe or redirection behind it."""
        line = f"{shlex.join([*self.command, *arguments])} {behind}"
        return subprocess.run(["sh", "-c", line], check=False, capture_output=True, timeout=30)


@pytest.fixture
def shell(directory: Path, guard: Callable[[Process], Process]) -> Shell:
    return Shell(directory, guard)


def test_cli_push_and_list(directory: Path, tmp_path: Path, shell: Shell) -> None:
    """push takes standard input, or files; it prints ids in order, and list prints them again."""
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "-b").write_bytes(b"\xff\0")
    ids = shell("push", stdin=b"from standard input\n")
    ids += shell("push", "--", tmp_path / "a", tmp_path / "-b")
    assert shell("list", "pending") == ids
    q = FemtoQueue(directory, "node")
    assert drained(q) == [b"from standard input\n", b"a", b"\xff\0"]
    assert shell("list", "done") == ids
    assert shell("list", "pending", status=1) == [""]


def test_cli_push_streams_standard_input(directory: Path) -> None:
    """push holds no more of its input in memory than a megabyte or two, and takes it from a pipe."""
    peak_kb = run(
        """
import subprocess, threading
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
""",
        directory,
    ).split()[1]
    assert int(peak_kb) < 40_000
    task = FemtoQueue(directory, "node").pop()
    assert os.path.getsize(task.path) == 100 << 20


def test_cli_push_of_a_missing_file(tmp_path: Path, shell: Shell) -> None:
    """A file that cannot be pushed is exit status 1; those before it were pushed, and say so."""
    (tmp_path / "a").write_bytes(b"a")
    id, complaint = shell("push", tmp_path / "a", tmp_path / "missing", status=1)
    assert str(tmp_path / "missing") in complaint
    assert shell("list", "pending") == [id]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("list",),
        ("list", "creating"),
        ("cancel",),
        ("requeue",),
        ("run",),
        ("run", "--max-attempts", "0", "--", "true"),
        ("run", "--max-attempts", "many", "--", "true"),
        ("purge", "pending", "1d"),
        ("purge", "done"),
        ("purge", "done", "yesterday"),
        ("purge", "done", "-1d"),
        ("schedule",),
        ("status", "--nonsense"),
    ],
    ids=" ".join,
)
def test_cli_usage_errors(shell: Shell, arguments: tuple[str, ...]) -> None:
    """Wrong usage is exit status 2, with a hint and no traceback."""
    shell("push", stdin=b"x")
    *out, complaint = shell(*arguments, status=2)
    assert out == [] and complaint.startswith("usage: ")


@pytest.mark.parametrize("command", ["status", "list done", "cancel x", "requeue x", "purge done 1d"])
def test_cli_looking_at_a_missing_directory(directory: Path, shell: Shell, command: str) -> None:
    """Where there is no queue, looking says so, exits with 1, and makes nothing."""
    *out, complaint = shell(*command.split(), status=1)
    assert out == [] and str(directory) in complaint
    assert not directory.exists()


def test_cli_a_directory_that_cannot_be(tmp_path: Path) -> None:
    """An error from the filesystem is exit status 1 and one line that names the path."""
    (tmp_path / "file").write_bytes(b"x")
    complaint = Shell(tmp_path / "file")("push", stdin=b"x", status=1)[-1]
    assert str(tmp_path / "file") in complaint and complaint.count("\n") == 1


def test_cli_status_leaves_a_directory_of_the_original_alone(directory: Path) -> None:
    """Before a queue of the original femtoqueue is taken over, looking at it changes nothing in it."""
    for state in ("creating", "pending", "scheduled", "done", "failed", "node-1"):
        (directory / state).mkdir(parents=True)
    for state in ("pending", "node-1"):
        header = b"\x01" + bytes(7) + bytes(16)
        (directory / state / f"1790000000000000_node-1_{state}").write_bytes(header + b"x")
    before = snapshot(directory, times=True)
    for command in ("status", "list pending", "purge done 0s"):
        Shell(directory)(*command.split(), status=1)
    assert snapshot(directory, times=True) == before


def test_cli_status_table(directory: Path, shell: Shell) -> None:
    """status shows each state with its count and oldest task, and each owner of tasks in progress."""
    q = FemtoQueue(directory, "node-7")
    q.push_many([b"1", b"2", b"3"])
    q.pop()
    lines = shell("status")
    assert lines[0].split() == ["state", "count", "oldest"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:7]}
    assert list(rows) == list(femtoqueue.STATES)
    assert rows["pending"] == ["2", "0s"] and rows["in_progress"] == ["1", "0s"]
    assert rows["done"] == ["0", "-"]
    assert lines[7] == ""
    assert lines[8].split() == ["node_id", "pid", "alive", "tasks", "lease_left"]
    node_id, pid, alive, tasks, lease = lines[9].split()
    assert (node_id, pid, alive, tasks) == ("node-7", str(os.getpid()), "yes", "1")
    assert 25 <= int(lease.removesuffix("s")) <= 30
    for block in (lines[:7], lines[8:]):
        starts = {line.index(line.split()[1], len(line.split()[0])) for line in block}
        assert len(starts) == 1, "columns are aligned"


def test_cli_status_json(directory: Path, shell: Shell) -> None:
    """status --json is for programs: numbers are numbers, and what is unknown is null."""
    run("q = FemtoQueue(sys.argv[1], 'gone'); q.push(b'x'); q.pop()", directory)
    FemtoQueue(directory, "node").schedule(b"later", time.time_ns() // 1_000 + 10**9)
    (line,) = shell("status", "--json")
    report = json.loads(line)
    states = {row["state"]: row for row in report["states"]}
    assert list(states) == list(femtoqueue.STATES)
    assert states["in_progress"]["count"] == states["scheduled"]["count"] == 1
    assert states["in_progress"]["oldest_s"] >= 0 > states["scheduled"]["oldest_s"]
    assert states["done"]["oldest_s"] is None
    (owner,) = report["owners"]
    assert (owner["node_id"], owner["alive"], owner["tasks"]) == ("gone", "no", 1)
    assert 20 < owner["lease_left_s"] <= 30


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
    FemtoQueue(directory, "node")
    for n in range(3_000):
        (directory / "done" / f"{n:016d}_{'x' * 100}").touch()
    done = shell.piped("list", "done", behind="| head -1")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"0000000000000000_" + b"x" * 100 + b"\n"


def test_cli_list_where_an_id_cannot_be_printed(directory: Path, shell: Shell) -> None:
    """An id that the terminal's encoding lacks is exit status 1 and one line, and no wrong usage."""
    put(directory / "pending" / "1700000000000000_é")
    FemtoQueue(directory, "node")
    complaint = shell("list", "pending", status=1, PYTHONIOENCODING="ascii")[-1]
    assert complaint.startswith("femtoqueue: ") and complaint.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_cli_a_full_disk_behind_standard_output_is_an_error(shell: Shell) -> None:
    """What could not be printed is exit status 1, not silence."""
    shell("push", stdin=b"x")
    done = shell.piped("list", "pending", behind="> /dev/full")
    assert done.returncode == 1
    assert b"No space left" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["push", "schedule +1m"])
def test_cli_closed_standard_input(directory: Path, shell: Shell, command: str) -> None:
    """Without a standard input, push and schedule fail with one line, and push no task."""
    done = shell.piped(*command.split(), behind="<&-")
    assert done.returncode == 1
    assert done.stderr.startswith(b"femtoqueue: ") and done.stderr.count(b"\n") == 1
    assert FemtoQueue(directory, "node").join(0)


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


NONSENSE = """tomorrow + +m +10 +10x +-1m +nans +infd +1e300d +1e15d 1 1790000000
    2030-13-01 2030-01-01T25:00 Z +inf +999999d"""


@pytest.mark.parametrize(
    "when, zone",
    [
        *((when, "UTC") for when in ("", *NONSENSE.split())),
        *itertools.product(["0001-01-01", "9999-12-31T23:59:59+00:00"], ["JST-9", "EST5"]),
        ("9999-12-31T23:59:59", "EST5"),
    ],
)
def test_cli_schedule_nonsense(directory: Path, shell: Shell, when: str, zone: str) -> None:
    """A WHEN that is none is exit status 2 and one line, in every time zone, and no task."""
    usage, *lines = shell("schedule", when, stdin=b"x", status=2, TZ=zone)[-1].splitlines()
    assert usage.startswith("usage: ")
    assert len(lines) == 1 and lines[0].startswith("femtoqueue: error: ")
    assert not when.startswith("+") or f"{when[1:]!r} is no length of time" in lines[0]
    assert files(directory) == []


def test_cli_cancel_and_requeue(directory: Path, shell: Shell) -> None:
    """Each id is tried; exit status 1 says that of one or more nothing could be done, and of which."""
    q = FemtoQueue(directory, "node")
    ids = q.push_many([b"1", b"2", b"3"])
    assert shell("cancel", ids[0]) == []
    complaint = shell("cancel", ids[0], ids[1], "../x", status=1)[-1]
    assert complaint == "".join(f"femtoqueue: there is no task {id}\n" for id in (ids[0], "../x"))
    q.fail(q.pop())
    assert shell("requeue", ids[2]) == []
    assert q.status(ids[2]) == "pending"
    assert ids[2] in shell("requeue", ids[2], status=1)[-1]
    assert list(q.ids("pending")) == [ids[2]]


@pytest.mark.parametrize("command", ["cancel", "requeue"])
def test_cli_says_why_a_task_cannot_be_had(directory: Path, shell: Shell, command: str) -> None:
    """cancel and requeue tell in which state a task is that they leave alone, or that there is none."""
    q = FemtoQueue(directory, "node")
    id = q.push(b"x")
    task = q.pop()
    wanted = {"cancel": "pending or scheduled", "requeue": "failed, corrupt or done"}[command]
    assert shell(command, id, "nope", status=1)[-1].splitlines() == [
        f"femtoqueue: {id} is in_progress, not {wanted}",
        "femtoqueue: there is no task nope",
    ]
    q.done(task)


def test_cli_purge(directory: Path, shell: Shell) -> None:
    """purge prints how many it deleted; none is exit status 1."""
    q = FemtoQueue(directory, "node")
    q.push_many([b"1", b"2"])
    drained(q)
    assert shell("purge", "done", "1h", status=1)[0] == "0"
    assert shell("purge", "done", "0s") == ["2"]
    assert shell("purge", "done", "0s", status=1)[0] == "0"


def test_cli_run_hands_each_payload_to_a_command(directory: Path, shell: Shell) -> None:
    """run gives the payload on standard input, and id, attempt and path in the environment."""
    payload = bytes(range(256)) * 10_000
    (id,) = shell("push", stdin=payload)
    script = 'echo "$1 $FEMTOQUEUE_ID $FEMTOQUEUE_ATTEMPT"; cat >in; cat "$FEMTOQUEUE_PATH" >path'
    script = f"cd {shlex.quote(str(directory.parent))}; {script}"
    assert shell("run", "--until-empty", "--", "sh", "-c", script, "--", "-- x") == [f"-- x {id} 1"]
    assert (directory.parent / "in").read_bytes() == payload
    assert (directory.parent / "path").read_bytes() == payload
    assert shell("list", "done") == [id]
    assert shell("run", "--until-empty", "--", "true", status=1) == [""]


def test_cli_run_keeps_the_double_dash_of_the_command(shell: Shell) -> None:
    """Only the first -- is ours: what follows is the command's own, options and all."""
    shell("push", stdin=b"-x\n")
    assert shell("run", "--until-empty", "--", "grep", "--", "-x") == ["-x"]


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--until-empty", "cat", "-n"], "     1\tx"),
        (["--until-empty", "--max-attempts", "2", "sh", "-c", "cat; exit 0"], "x"),
        (["--until-empty", "echo", "--until-empty", "-h", "--"], "--until-empty -h --"),
        (["cat", "-n"], "     1\tx"),
        (["--", "sh", "-c", 'cat; echo "$@"', "-", "--", "-y"], "x"),
    ],
    ids=["until empty", "more options", "options like ours", "for ever", "two dashes"],
)
def test_cli_run_takes_options_of_the_command(shell: Shell, arguments: list[str], printed: str) -> None:
    """What follows the command is the command's own, also without --, and even if we have the like."""
    (id,) = shell("push", stdin=b"x\n")
    process = shell.start("run", *arguments)
    expect(process, printed)
    if "--until-empty" not in arguments:
        process.terminate()
    assert process.wait() == 0
    assert shell("list", "done") == [id]


def test_cli_run_takes_the_exit_status_as_the_verdict(directory: Path, shell: Shell) -> None:
    """0 is done; anything else, a signal and a missing command too, is retried, after a delay."""
    verdicts = {b"true": "done", b"exit 3": "scheduled", b"kill -9 $$": "scheduled"}
    ids = [shell("push", stdin=script)[0] for script in verdicts]
    out, status = ending(shell.start("run", "--until-empty", "--", "sh"))
    q = FemtoQueue(directory, "node")
    assert [q.status(id) for id in ids] == list(verdicts.values())
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == 2 and all(line.startswith("femtoqueue: ") for line in lines)
    assert ids[1] in lines[0] and "exit status 3" in lines[0]


def test_cli_run_of_a_missing_command_is_wrong_usage(directory: Path, shell: Shell) -> None:
    """A typo in the command is told at once: no task loses an attempt by it."""
    shell("push", stdin=b"x")
    assert "no-such-command" in shell("run", "--", "no-such-command", status=2)[-1]
    assert FemtoQueue(directory, "node").pop().attempt == 1


def test_cli_run_max_attempts(directory: Path, shell: Shell) -> None:
    """--max-attempts N: the Nth failure is the last."""
    (id,) = shell("push", stdin=b"x")
    complaint = shell("run", "--until-empty", "--max-attempts", "1", "--", "false", status=1)[-1]
    assert id in complaint
    assert shell("list", "failed") == [id]


def test_cli_run_path_outlives_a_renewed_lease(directory: Path, tmp_path: Path, shell: Shell) -> None:
    """FEMTOQUEUE_PATH opens the payload even after the claim was renamed by a touch."""
    (id,) = shell("push", stdin=b"payload")
    os.mkfifo(tmp_path / "go")
    script = 'echo begun; cat "$1" "$FEMTOQUEUE_PATH"'
    process = shell.start("run", "--until-empty", "--", "sh", "-c", script, "-", tmp_path / "go")
    expect(process, "begun")
    (claim,) = (directory / "in_progress").rglob(f"{id}*")
    FemtoQueue(directory, "node").touch(FemtoTask(id, b"", 1, str(claim)))
    assert not claim.exists()
    (tmp_path / "go").write_text("renewed ")
    assert ending(process) == ("renewed payload", 0)
    assert shell("list", "done") == [id]


def test_cli_run_of_a_task_of_the_original(directory: Path, shell: Shell) -> None:
    """Its payload alone is on standard input: no header."""
    FemtoQueue(directory, "node")
    path = Original.put(directory / "pending", 1_700_000_000_000_000, b"payload")
    assert shell("run", "--until-empty", "--", "cat") == ["payload"]
    assert shell("list", "done") == [path.name]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_cli_ctrl_c_lets_the_command_finish(tmp_path: Path, shell: Shell, name: str) -> None:
    """Ctrl-C, SIGTERM and a terminal that is closed end run after the command in hand."""
    ids = [shell("push", stdin=b"x")[0], shell("push", stdin=b"y")[0]]
    os.mkfifo(tmp_path / "go")
    process = shell.start("run", "--", "sh", "-c", 'echo begun; cat "$1"', "-", tmp_path / "go")
    expect(process, "begun")
    os.killpg(process.pid, getattr(signal, name))
    (tmp_path / "go").write_text("finished")
    assert ending(process) == ("finished", 0)
    assert shell("list", "done") == ids[:1]
    assert shell("list", "pending") == ids[1:]


def test_cli_run_under_nohup_outlives_the_terminal(tmp_path: Path, shell: Shell) -> None:
    """Where SIGHUP is ignored, as nohup arranges it, it is not heeded."""
    ids = [shell("push", stdin=b"x")[0], shell("push", stdin=b"y")[0]]
    os.mkfifo(tmp_path / "go")
    shell.command[:0] = ["env", "--ignore-signal=HUP"]
    command = ("run", "--until-empty", "--", "sh", "-c", 'echo begun; cat "$1"', "-", tmp_path / "go")
    process = shell.start(*command)
    for answer in ("begun", "finished begun"):
        expect(process, answer)
        os.killpg(process.pid, signal.SIGHUP)
        (tmp_path / "go").write_text("finished ")
    assert ending(process) == ("finished ", 0)
    assert shell("list", "done") == ids


def test_cli_a_second_ctrl_c_ends_the_command(shell: Shell) -> None:
    """A second Ctrl-C kills the command and its children, gives the task back, ends by the signal."""
    (id,) = shell("push", stdin=b"x")
    # Both children hold standard output: its end is theirs.
    process = shell.start("run", "--", "sh", "-c", "sleep 60 & echo begun; sleep 60")
    expect(process, "begun")
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)  # one that comes too soon after another is the same
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    assert ending(process) == ("", -signal.SIGINT)
    assert shell("list", "pending") == [id]


def test_cli_a_command_that_may_not_be_killed(directory: Path, spawn: Spawn) -> None:
    """A second SIGTERM ends by the signal, and gives the task back, though the command runs as root."""
    id = FemtoQueue(directory, "node").push(b"x")
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
    assert ending(spawn(code, directory)) == ("", 128 + signal.SIGTERM)
    assert names(directory, "pending") == [f"{id}~1"]


# ====================================================================================================
# README
# ====================================================================================================


def blocks(path: Path) -> Iterator[tuple[str, str, str]]:
    """Heading, language and text of each fenced block of a Markdown file."""
    heading = ""
    lines = iter(path.read_text().splitlines(keepends=True))
    for line in lines:
        if line.startswith("#"):
            heading = line.strip("# \n")
        if fence := re.match(r"( *)```(\w+)", line):
            indent = len(fence[1])
            text = [line[indent:] for line in iter(lambda: next(lines), fence[1] + "```\n")]
            yield heading, fence[2], "".join(text)


BLOCKS = [
    pytest.param(lang, text, id=f"{heading}-{lang}")
    for heading, lang, text in blocks(README)
    if lang != "mermaid"
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project as the recipes assume it: femtoqueue.py copied there, the script installed."""
    shutil.copy(MODULE, tmp_path)
    (tmp_path / "bin").mkdir()
    for name, command in {
        "python3": f'exec {sys.executable} "$@"',
        "femtoqueue": f'exec {sys.executable} {tmp_path}/femtoqueue.py "$@"',
        "../handle": "cat >> handled",
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("language, text", BLOCKS)
def test_recipe(project: Path, language: str, text: str) -> None:
    """Every recipe runs as it stands, and has nothing to complain about."""
    if language == "python":
        (project / "recipe.py").write_text(text)
        command = [sys.executable, "recipe.py"]
    elif language == "sh":
        command = ["sh", "-eu", "-c", text]
    elif language == "crontab":
        FemtoQueue("queue", "node").push(b"payload\n")
        job = text.split(maxsplit=5)[5].replace("/srv/myapp", str(project))
        command = ["sh", "-c", job]
    elif language == "ini":
        return run_unit(project, text)
    else:
        pytest.fail(f"nothing here runs {language}")
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    if language == "crontab":
        assert (project / "handled").read_text() == "payload\n"
    return None


def test_a_worker_killed_in_readme(project: Path) -> None:
    """README's first minute: the worker that replaces one killed by SIGKILL has its task at once."""
    (demo,) = [text for _, _, text in blocks(README) if "kill -9" in text]
    out = subprocess.run(["sh", "-c", demo], capture_output=True, text=True, timeout=60).stdout
    assert out.splitlines()[1:] == ["hello", "attempt 1", "hello", "attempt 2"]


def run_unit(project: Path, unit: str) -> None:
    """Do what systemd does with a service: start it, and stop it by SIGTERM to the main process."""
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
    assert settings["WorkingDirectory"] == "/srv/myapp" and settings["KillMode"] == "mixed"
    q = FemtoQueue("queue", "node")
    q.push(b"payload\n")
    program, *arguments = shlex.split(settings["ExecStart"])
    with subprocess.Popen([os.path.basename(program), *arguments]) as process:
        assert q.join(timeout=20)
        process.terminate()
        assert process.wait(20) == 0
    assert (project / "handled").read_text() == "payload\n"


def test_the_tables_name_calls_that_exist() -> None:
    """Whatever the recipes call on q, or give to FemtoQueue by name, is there."""
    text = README.read_text()
    called = set(re.findall(r"\bq\.(\w+)", text))
    assert len(called) > 10
    assert not [name for name in called if not hasattr(FemtoQueue, name)]
    states = set(re.findall(r"(?:ids|purge|counts\(\))[(\[]\"(\w+)\"", text))
    assert states and states <= set(femtoqueue.STATES)


def test_the_tables_name_tests_that_exist() -> None:
    """Each test that README and the table above name is here, and each promise has one."""
    table = str(__doc__).partition("tests that hold it")[2]
    for text in (README.read_text(), table):
        named = set(re.findall(r"\b(?:test_[a-z_]+|Test[A-Z]\w+)", text)) - {"test_femtoqueue"}
        assert len(named) > 10
        assert not [name for name in named if name not in globals()]
    promises = re.findall(r"^ ?(\d+) .* (?:test_|Test)\w+", table, re.MULTILINE)
    assert promises == [str(number) for number in range(1, 11)]


# ====================================================================================================
# Several machines
# ====================================================================================================

TOOLS = Path(os.environ.get("FEMTOQUEUE_GLUSTER", "nowhere"))
OTHER_BOOT = "11111111-2222-3333-4444-555555555555\n"
# sys.argv: role, data_dir, node_id, log, options of FemtoQueue; each role's own arguments behind them.
# Events go to a log on a local disk, one write each, so that a kill cannot tear them.
ACTOR = r"""
role, root, node_id, log, options, *rest = sys.argv[1:]
descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def note(*fields):
    os.write(descriptor, (" ".join(map(str, (time.monotonic(), *fields))) + "\n").encode())

ahead_s = float(rest[2])
real_time = time.time
time.time = lambda: real_time() + ahead_s
queue = FemtoQueue(root, node_id, **eval(options))
print("ready", flush=True)
sys.stdin.readline()
if role == "produce":
    for number in range(int(rest[0])):
        payload = f"{node_id}-{os.getpid()}-{number:05d}"
        note("try", payload)
        try:
            queue.push(payload.encode())
            note("ack", payload)
        except OSError as error:
            note("error", node_id, repr(error))
        time.sleep(float(rest[1]))
while role == "work":
    try:
        task = queue.pop(timeout=0.2)
        if task is None:
            if os.path.exists(rest[0]):
                break
            continue
        payload = task.data.decode()
        note("got", payload, node_id)
        time.sleep(float(rest[1]))
        queue.done(task)
        note("done", payload, node_id)
    except NotInProgress:
        note("lease-lost", payload)
    except OSError as error:
        note("error", node_id, repr(error))
        time.sleep(0.1)
"""


def cluster_tool(name: str, base: Path, *arguments: str) -> str:
    """Run one of the cluster's scripts; what it printed."""
    command = [str(TOOLS / f"{name}-gluster.sh" if name != "fault" else TOOLS / "gluster-fault.sh")]
    done = subprocess.run(
        [*command, str(base), *arguments], check=False, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_host(base: Path, host: int, code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python process on a host; all but the first have another boot id than this machine."""
    under = []
    if host > 1:
        boot = base / "boot"
        boot.write_text(OTHER_BOOT)
        mount = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
        under = ["unshare", "-m", "sh", "-c", mount, str(boot)]  # "$0" is the boot id
    return start(code, *arguments, under=under)


@pytest.fixture(scope="session")
def gluster() -> Iterator[Path]:
    """A GlusterFS of three servers, three copies and two hosts, mounted at host1 and host2 of this."""
    if not (TOOLS / "start-gluster.sh").exists():
        pytest.skip("several machines: FEMTOQUEUE_GLUSTER names no folder with start-gluster.sh")
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("several machines: mounting GlusterFS needs root")
    for program in ("glusterd", "glusterfs", "ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"several machines: {program} is not installed (glusterfs-server, iproute2)")
    base = Path(tempfile.mkdtemp(prefix="gq", dir="/tmp"))  # sockets need a short path
    try:
        cluster_tool("start", base)
        yield base
    finally:
        cluster_tool("stop", base)
        shutil.rmtree(base, ignore_errors=True)


class Cluster:
    """Producers and workers on two hosts of one queue, and the book that they keep."""

    def __init__(self, base: Path, tmp_path: Path, lease_s: float = 30) -> None:
        self.base = base
        self.name = f"queue-{os.urandom(4).hex()}"
        self.log = tmp_path / "log"
        self.stop = tmp_path / "stop"
        self.options = {"timeout_stale_ms": lease_s * 1_000}
        self.actors: dict[subprocess.Popen[str], tuple[int, str]] = {}

    def root(self, host: int) -> Path:
        return self.base / f"host{host}" / self.name

    def add(self, host: int, role: str, first: object, pause_s: float, ahead_s: float = 0) -> None:
        node_id = f"h{host}"
        arguments = (
            role,
            self.root(host),
            node_id,
            self.log,
            self.options,
            first,
            pause_s,
            ahead_s,
        )
        process = on_host(self.base, host, ACTOR, *arguments)
        self.actors[process] = host, role
        assert process.stdout and process.stdout.readline() == "ready\n"

    def produce(self, host: int, count: int, pause_s: float = 0, ahead_s: float = 0) -> None:
        self.add(host, "produce", count, pause_s, ahead_s)

    def work(self, host: int, pause_s: float = 0, ahead_s: float = 0) -> None:
        self.add(host, "work", self.stop, pause_s, ahead_s)

    def go(self) -> None:
        for process in self.actors:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()

    def fault(self, *arguments: str) -> None:
        """Break a part of the cluster, until the next test."""
        (self.base / "broken").touch()
        cluster_tool("fault", self.base, *arguments)

    def kill(self, host: int) -> None:
        """Kill a host: its client, and everything that runs there."""
        self.fault("kill", f"h{host}")
        for process in [p for p, (where, _) in self.actors.items() if where == host]:
            process.kill()
            process.wait()
            del self.actors[process]

    def events(self, kind: str) -> list[list[str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [fields for fields in (line.split(" ", 3) for line in lines) if fields[1] == kind]

    def wait_for(self, kind: str, count: int, timeout_s: float = 60) -> None:
        """Wait until that many payloads have had this event."""
        end_s = time.monotonic() + timeout_s
        while len({fields[2] for fields in self.events(kind)}) < count:
            if time.monotonic() > end_s:
                errors = collections.Counter(" ".join(fields[2:]) for fields in self.events("error"))
                pytest.fail(f"{len(self.events(kind))} of {count} {kind}; errors: {errors}")
            time.sleep(0.05)

    def finish(self) -> types.SimpleNamespace:
        """Let the producers end, the queue run dry and the workers stop; count."""
        for process, (_, role) in self.actors.items():
            if role == "produce":
                assert process.wait(60) == 0
        self.wait_for("done", len(self.events("ack")))
        self.stop.touch()
        for process in self.actors:
            assert process.wait(60) == 0
        tried, acknowledged, delivered, done = (
            [fields[2] for fields in self.events(kind)] for kind in ("try", "ack", "got", "done")
        )
        times = {
            kind: [float(fields[0]) for fields in self.events(kind)] for kind in ("try", "ack", "done")
        }
        return types.SimpleNamespace(
            acknowledged=len(acknowledged),
            delivered=len(delivered),
            lost=len(set(acknowledged) - set(delivered)),
            unexpected=len(set(delivered) - set(tried)),
            duplicated=len(delivered) - len(set(delivered)),
            after_done=sum(count > 1 for count in collections.Counter(done).values()),
            errors=[" ".join(fields[2:]) for fields in self.events("error")],
            pushed_per_s=len(acknowledged) / (max(times["ack"]) - min(times["try"])),
            finished_per_s=len(done) / (max(times["done"]) - min(times["try"])),
        )

    def close(self) -> None:
        for process in self.actors:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(gluster: Path, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes queues on the GlusterFS, repaired if it was broken; ends what was started on them."""
    made: list[Cluster] = []

    def make(lease_s: float = 30) -> Cluster:
        if (gluster / "broken").exists():
            cluster_tool("start", gluster)
            (gluster / "broken").unlink()
        made.append(Cluster(gluster, tmp_path, lease_s))
        return made[-1]

    yield make
    for queue in made:
        queue.close()


def report(title: str, count: types.SimpleNamespace) -> None:
    shown = {key: value for key, value in vars(count).items() if key != "errors"}
    text = ", ".join(f"{key} {value:.0f}" for key, value in shown.items())
    print(f"{title}: {text}, errors {len(count.errors)}")


class TestGlusterFS:
    def test_undisturbed(self, cluster: Callable[..., Cluster]) -> None:
        """Two producers and four workers on two hosts: each task delivered, and exactly once."""
        queue = cluster()
        for host in (1, 2):
            queue.produce(host, 150)
            queue.work(host)
            queue.work(host)
        queue.go()
        count = queue.finish()
        report("GlusterFS, 2 hosts, 3 copies", count)
        assert count.errors == []
        assert count.acknowledged == count.delivered == 300
        assert count.lost == count.unexpected == count.duplicated == 0
        assert {fields[3] for fields in queue.events("got")} == {"h1", "h2"}

    def test_a_slow_stream_keeps_the_copies_together(
        self, cluster: Callable[..., Cluster], gluster: Path
    ) -> None:
        """Buckets that are always empty are not removed and remade by two hosts at a time.

        Each push then races with a removal: some fail, and `pending/` itself ends in a split brain.
        """
        queue = cluster()
        for host in (1, 2):
            queue.produce(host, 250, 0.03)
            queue.work(host)
        queue.go()
        count = queue.finish()
        report("GlusterFS, slow stream", count)
        assert count.errors == []
        assert count.acknowledged == count.delivered == 500
        assert "split-brain" not in cluster_tool("fault", gluster, "heal", "s1")
        assert os.listdir(queue.root(1) / "pending") == os.listdir(queue.root(2) / "pending")

    def test_a_node_comes_back_elsewhere(self, cluster: Callable[..., Cluster]) -> None:
        """What my node_id claimed on a host that is gone is mine at the first pop; others wait."""
        queue = cluster()
        code = "queue = FemtoQueue(sys.argv[1], 'mover', 3_600_000)\n"
        code += "queue.push(b'x'); print(queue.pop().id, flush=True); time.sleep(600)"
        process = on_host(queue.base, 2, code, queue.root(2))
        assert process.stdout
        id = process.stdout.readline().strip()
        process.kill()
        process.wait()
        with FemtoQueue(queue.root(1), "another", 3_600_000) as other:
            assert other.pop(timeout=1.5) is None
            begun_s = time.monotonic()
            with FemtoQueue(queue.root(1), "mover", 3_600_000) as mover:
                task = mover.pop()
                print(f"GlusterFS, own task back after {time.monotonic() - begun_s:.2f} s")
                assert task and task.id == id and task.attempt == 2
                mover.done(task)

    def test_a_clock_is_ahead(self, cluster: Callable[..., Cluster]) -> None:
        """One host's wall clock is an hour ahead: all is delivered once, each host's in its order."""
        queue = cluster()
        queue.produce(1, 40, 0.01)
        queue.produce(2, 40, 0.01, ahead_s=3600)
        queue.work(1)
        queue.go()
        count = queue.finish()
        report("GlusterFS, a clock 1 h ahead", count)
        assert count.errors == []
        assert count.acknowledged == count.delivered == 80
        for host in ("h1-", "h2-"):
            payloads = [fields[2] for fields in queue.events("got") if fields[2].startswith(host)]
            assert payloads == sorted(payloads)

    def test_a_task_is_finished_on_another_host(self, cluster: Callable[..., Cluster]) -> None:
        """A pickled task is read and finished where the directory is mounted under another path."""
        queue = cluster()
        first = FemtoQueue(queue.root(1), "h1")
        second = FemtoQueue(queue.root(2), "h2")
        for data in (b"x" * 2_000_000, b"y"):
            first.push(data)
            task = pickle.loads(pickle.dumps(first.pop()))
            # Host 1's path would be there, as both hosts are this machine.
            task.path = f"/mnt{task.path}"
            assert len(data) > 1 or task.data == data  # a large one is read when it is asked for
            second.done(task)
            with pytest.raises(NotInProgress):
                first.done(task)
        assert second.counts()["done"] == 2

    def test_a_host_dies(self, cluster: Callable[..., Cluster]) -> None:
        """A host's client and its workers killed in mid-work: the other host finishes everything.

        What the dead host had claimed comes back when its lease runs out, and is all that may be
        delivered twice.
        """
        lease_s = 3
        queue = cluster(lease_s)
        for host in (1, 2):
            queue.produce(host, 100)
            queue.work(host, 0.05)
            queue.work(host, 0.05)
        queue.go()
        queue.wait_for("done", 30)
        queue.kill(1)
        killed_s = time.monotonic()
        count = queue.finish()
        report("GlusterFS, a host killed", count)
        in_hand = {f[2] for f in queue.events("got") if f[3] == "h1"}
        in_hand -= {f[2] for f in queue.events("done") if f[3] == "h1"}
        back_s = [
            float(f[0]) - killed_s for f in queue.events("got") if f[3] == "h2" and f[2] in in_hand
        ]
        print(f"{len(in_hand)} in hand at the kill, back after {max(back_s, default=0):.1f} s")
        assert [error for error in count.errors if not error.startswith("h1")] == []
        assert count.lost == count.unexpected == 0
        assert count.duplicated <= len(in_hand)
        assert max(back_s, default=0) < lease_s + 5

    def test_a_server_dies(self, cluster: Callable[..., Cluster]) -> None:
        """One brick of three killed in mid-work: no call raises, no task is lost or comes twice."""
        queue = cluster()
        for host in (1, 2):
            queue.produce(host, 80, 0.01)
            queue.work(host)
        queue.go()
        queue.wait_for("done", 30)
        queue.fault("kill", "s2")
        count = queue.finish()
        report("GlusterFS, a brick killed", count)
        assert count.errors == []
        assert count.acknowledged == count.delivered == 160
        assert count.lost == count.unexpected == count.duplicated == 0


# --- what a distributed filesystem does, done by one machine ------------------------------------------


class Lying:
    """Stands in for a system call: done, and then answered with an error, as a lost answer is."""

    def __init__(self, number: int, only: str) -> None:
        self.real = os.rename
        self.number = number
        self.only = only
        self.left = 1

    def __call__(self, source: str, target: str) -> None:
        self.real(source, target)
        if self.left and self.only in target:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number), source, None, target)


class TestAnswersThatAreLost:
    @pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
    @pytest.mark.parametrize("call", ["push", "pop", "touch", "done", "fail", "retry"])
    def test_done_but_answered_gone(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
    ) -> None:
        """A rename that was done and answered ENOENT or ESTALE is recognised, in every call.

        So it is when a request was sent twice: rename(2), BUGS. A claim is known by its unique name.
        """
        queue = FemtoQueue(directory, "a")
        queue.push(b"warm")
        queue.done(queue.pop())  # type: ignore[arg-type]
        where = {
            "push": "/pending/",
            "pop": "/in_progress/",
            "touch": "/in_progress/",
            "retry": "/pending/",
        }
        lying = Lying(number, where.get(call, f"/{call}"))
        if call == "push":
            monkeypatch.setattr(os, "rename", lying)
            id = queue.push(b"x")
            task = queue.pop()
        else:
            id = queue.push(b"x")
            if call == "pop":
                monkeypatch.setattr(os, "rename", lying)
            task = queue.pop()
            monkeypatch.setattr(os, "rename", lying)
        assert task and task.id == id and task.attempt == 1
        if call not in ("push", "pop"):
            getattr(queue, call)(task)
        if call == "retry":
            task = queue.pop()
            assert task and task.id == id and task.attempt == 2
        if call != "fail":
            if call != "done":
                queue.done(task)
            assert queue.status(id) == "done"
        else:
            assert queue.status(id) == "failed"
        assert lying.left == 0
        assert queue.pop() is None
        with pytest.raises(NotInProgress):
            queue.done(task)

    def test_a_claim_that_was_taken_while_we_slept(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A worker stopped between claim and read for longer than its lease gets the next task."""
        queue = FemtoQueue(directory, "a")
        queue.push(b"taken")
        queue.push(b"next")
        real = os.open
        away = directory / "elsewhere"

        def late(path: str, *arguments: int, **options: int) -> int:
            if "/in_progress/" in str(path) and not away.exists():
                os.rename(path, away)
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, "open", late)
        task = queue.pop()
        assert task and task.data == b"next"


class TestDirectoriesThatAllHostsShare:
    def test_no_bucket_is_made_twice(
        self, directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A bucket that producers may still use is not removed, and none is made again under its name.

        Hosts that remove and make one directory at a time split the copies of a replicated filesystem.
        """
        made: list[str] = []
        real = os.mkdir

        def mkdir(path: str, *arguments: int) -> None:
            real(path, *arguments)
            made.append(path)

        monkeypatch.setattr(os, "mkdir", mkdir)
        hosts = [FemtoQueue(directory, name) for name in ("a", "b")]
        for _ in range(300):  # through two periods of 1,000 s
            clock.advance(7)
            for queue in hosts:
                queue.push(b"x")
                task = queue.pop()
                assert task
                queue.done(task)
                assert queue.pop() is None
        buckets = [path for path in made if "/pending/" in path]
        print(f"{len(buckets)} buckets made for 600 tasks of 2 hosts, {len(set(buckets))} names")
        assert len(buckets) == len(set(buckets)) <= 4


class TestWhatListingsShow:
    def test_a_name_listed_twice(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A directory that lists names twice changes no order, no count and no delivery."""
        real = os.scandir

        @contextlib.contextmanager
        def twice(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
            with real(path) as entries:
                found = list(entries)
            yield iter(found + found[::-1])

        monkeypatch.setattr(os, "scandir", twice)
        queue = FemtoQueue(directory, "a")
        ids = [queue.push(b"%d" % number) for number in range(50)]
        assert list(queue.ids("pending")) == ids
        assert queue.counts()["pending"] == 50
        tasks = [queue.pop() for _ in ids]
        assert [task and task.id for task in tasks] == ids
        assert queue.counts()["in_progress"] == 50
        assert queue.pop() is None
        for task in tasks:
            queue.done(task)  # type: ignore[arg-type]
        assert queue.counts() == {**dict.fromkeys(femtoqueue.STATES, 0), "done": 50}

    @pytest.mark.parametrize("state", ["done", "failed"])
    def test_a_finished_task_under_two_names(self, directory: Path, clock: Time, state: str) -> None:
        """A finished task that healing gave its claim's name back does not come round for ever.

        A rename onto another name of the same file does nothing, and says that all went well.
        """
        queue = FemtoQueue(directory, "a", timeout_stale_ms=1_000)
        id = queue.push(b"x")
        task = queue.pop()
        assert task
        os.link(task.path, directory / state / id)
        for _ in range(5):
            clock.advance(2)
            assert queue.pop() is None
        assert queue.status(id) == state
        assert queue.counts() == {**dict.fromkeys(femtoqueue.STATES, 0), state: 1}

    def test_a_slow_filesystem_is_left_alone(
        self, directory: Path, clock: Time, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A waiting worker looks for a tenth of the time at most, however slow a look is."""
        queue = FemtoQueue(directory, "a")
        real = os.scandir
        spent_s = 0.0

        def slow(path: str) -> object:
            nonlocal spent_s
            clock.advance(0.002)
            spent_s += 0.002
            return real(path)

        monkeypatch.setattr(os, "scandir", slow)
        assert queue.pop(timeout=10) is None
        print(f"looking: {spent_s:.2f} of 10 s")
        assert spent_s < 1.2


# ====================================================================================================
# Windows
# ====================================================================================================


def become_windows(hard_links: bool) -> None:
    """Take from this process what Windows lacks, and forbid what means another thing there.

    Runs in a child process, before femtoqueue is imported. Paths stay POSIX paths: only what the
    system calls do is told apart here.
    """
    import argparse  # noqa: F401  the standard library must not see what follows
    import builtins
    import datetime  # noqa: F401
    import errno
    import fcntl
    import hashlib  # noqa: F401
    import json  # noqa: F401
    import logging
    import os
    import queue  # noqa: F401
    import shutil  # noqa: F401
    import signal
    import stat
    import subprocess  # noqa: F401
    import sys
    import threading  # noqa: F401
    import time

    real: Any = type("Real", (), dict(vars(os)))
    real_open, real_time, real_monotonic = builtins.open, time.time, time.monotonic
    binary = 0x8000_0000  # O_BINARY, as a flag that Linux does not have
    sharing_violation = 32

    def error(number: int, path: object, winerror: int = 0) -> OSError:
        problem = OSError(number, real.strerror(number), path)
        problem.winerror = winerror  # type: ignore[attr-defined]
        return problem

    def check_name(path: object) -> None:
        name = real.path.basename(real.fspath(path))
        if set(name) & set('<>:"|?*\\') or not name.isprintable() or name[-1:] in (".", " "):
            raise error(errno.EINVAL, path, 123)

    def check_not_open(path: object) -> None:
        """Here a file that somebody has open can be neither renamed nor deleted."""
        try:
            wanted = real.stat(path)
        except OSError:
            return
        for number in real.listdir("/proc/self/fd"):
            try:
                found = real.fstat(int(number))
            except OSError:
                continue
            if stat.S_ISREG(found.st_mode) and real.path.samestat(found, wanted):
                raise error(errno.EACCES, path, sharing_violation)

    def check_not_proc(path: object) -> None:
        if str(path).startswith("/proc"):
            raise error(errno.ENOENT, path, 3)

    def os_open(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        check_not_proc(path)
        if flags & os.O_CREAT:
            check_name(path)
        assert flags & binary, f"{path} is opened as text: every newline would change"
        if real.path.isdir(path):
            raise error(errno.EACCES, path, 5)
        descriptor: int = real.open(path, flags & ~binary, mode, **options)
        return descriptor

    def open_(file: Any, *arguments: Any, **options: Any) -> Any:
        check_not_proc(file)
        return real_open(file, *arguments, **options)

    def fsync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & real.O_ACCMODE == real.O_RDONLY:
            raise error(errno.EBADF, None)
        real.fsync(descriptor)

    def rename(source: Any, target: Any) -> None:
        check_name(target)
        check_not_open(source)
        if real.path.lexists(source) and real.path.lexists(target):
            raise error(errno.EEXIST, target, 183)
        real.rename(source, target)

    def replace(source: Any, target: Any) -> None:
        check_name(target)
        check_not_open(source)
        check_not_open(target)
        real.replace(source, target)

    def unlink(path: Any) -> None:
        check_not_open(path)
        if real.path.isdir(path):
            raise error(errno.EACCES, path, 5)
        real.unlink(path)

    def mkdir(path: Any, mode: int = 0o777) -> None:
        check_name(path)
        real.mkdir(path, mode)

    def link(source: Any, target: Any) -> None:
        if not hard_links:  # FAT, exFAT
            raise error(errno.EINVAL, target, 1)
        real.link(source, target)

    def readlink(path: Any) -> str:
        check_not_proc(path)
        text: str = real.readlink(path)
        return text

    def kill(pid: int, number: int) -> None:
        raise AssertionError("os.kill(pid, 0) ends a process there")

    for name in (
        *("O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "O_CLOEXEC", "O_SYNC", "O_DSYNC", "O_NOATIME"),
        *("O_PATH", "O_TMPFILE", "O_ASYNC", "O_DIRECT", "O_NOCTTY", "register_at_fork", "uname"),
        *("posix_fadvise", "posix_fallocate", "POSIX_FADV_DONTNEED", "POSIX_FADV_WILLNEED"),
        *("fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "getpgid", "getpgrp", "setsid"),
        *("killpg", "chown", "fchown", "lchown", "mkfifo", "mknod", "pread", "pwrite", "sync"),
        *("fdatasync", "statvfs", "fstatvfs", "sysconf", "sendfile", "copy_file_range", "splice"),
        *("sched_yield", "sched_getaffinity", "nice", "pidfd_open", "eventfd", "memfd_create"),
    ):
        if hasattr(os, name):
            delattr(os, name)
    for name in ("SIGPIPE", "SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGCHLD", "setitimer", "alarm"):
        delattr(signal, name)
    for name in ("fcntl", "pwd", "grp", "resource", "termios", "posix"):
        sys.modules[name] = None  # type: ignore[assignment]
    for module, name, value in (
        (os, "name", "nt"),
        (sys, "platform", "win32"),
        (os, "O_BINARY", binary),
        (os, "open", os_open),
        (os, "fsync", fsync),
        (os, "rename", rename),
        (os, "replace", replace),
        (os, "unlink", unlink),
        (os, "remove", unlink),
        (os, "mkdir", mkdir),
        (os, "link", link),
        (os, "readlink", readlink),
        (os, "kill", kill),
        (builtins, "open", open_),
        # Before Python 3.13, both clocks tick 64 times a second.
        (time, "time", lambda: int(real_time() * 64) / 64),
        (time, "monotonic", lambda: int(real_monotonic() * 64) / 64),
    ):
        setattr(module, name, value)
    logging.captureWarnings(False)


def windows(code: str, *arguments: object, hard_links: bool = True, **options: Any) -> str:
    """`run`, in a process that finds what Windows offers; what it logs is printed as well."""
    lines = [
        "from __future__ import annotations\nfrom typing import Any",
        inspect.getsource(become_windows),
        f"become_windows({hard_links})",
        PRELUDE.rstrip(),
        code,
    ]
    return execute(sys.executable, "-c", "\n".join(lines), *arguments, **options)


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="Windows is played on Linux only")


@needs_linux
def test_windows_is_played_well(tmp_path: Path) -> None:
    """What the tests below rely on: as on Windows, calls are missing, and calls fail."""
    (tmp_path / "a").touch()
    out = windows(
        """
def outcome(call, *arguments):
    try:
        return call(*arguments)
    except (OSError, AttributeError, AssertionError, ImportError) as error:
        return type(error).__name__

os.chdir(sys.argv[1])
with open("a") as file:
    print(outcome(os.rename, "a", "b"), outcome(os.unlink, "a"), outcome(os.fsync, file.fileno()))
os.rename("a", "b")
open("a", "w").close()
print(outcome(os.rename, "a", "b"), outcome(os.rename, "a", "a:b"), outcome(os.rename, "c", "b"))
print(outcome(os.open, ".", os.O_RDONLY | os.O_BINARY), outcome(os.open, "a", os.O_RDONLY))
print(outcome(os.kill, 1, 0), outcome(lambda: os.uname()), outcome(__import__, "fcntl"), os.name)
""",
        tmp_path,
    )
    assert out.split() == [
        *("PermissionError", "PermissionError", "OSError"),
        *("FileExistsError", "OSError", "FileNotFoundError"),
        *("PermissionError", "AssertionError"),
        *("AssertionError", "AttributeError", "ModuleNotFoundError", "nt"),
    ]


@needs_linux
@durable_or_not
@pytest.mark.parametrize("hard_links", [True, False])
def test_on_windows_tasks_go_in_and_out_in_order(
    directory: Path, durable: bool, hard_links: bool
) -> None:
    """On Windows the module imports and works: push, pop, done, fail, and first in, first out."""
    out = windows(
        r"""
q = FemtoQueue(sys.argv[1], "node-1", sync_after_write=sys.argv[2] == "True")
ids = [q.push(b"%d\r\n" % n) for n in range(50)] + q.push_many(b"%d\r\n" % n for n in range(50, 99))
other = FemtoQueue(sys.argv[1], "node-2")
ids.append(other.push(b"99\r\n"))
got = []
while task := q.pop():
    got.append((task.id, task.data))
    (q.fail if len(got) == 100 else q.done)(task)
assert got == [(id, b"%d\r\n" % n) for n, id in enumerate(ids)], got
assert [*q.ids("done")] == ids[:99]
assert q.status(ids[99]) == "failed" and q.requeue(ids[99]) and q.cancel(ids[99])
for id in ids[:99]:  # the clock there moves in steps, and may be behind the files
    os.utime(f"{sys.argv[1]}/done/{id}", (0, 0))
assert q.purge("done", 0) == 99
print(sorted({*q.counts().values()}))
""",
        directory,
        durable,
        hard_links=hard_links,
    )
    assert out == "[0]\n"


@needs_linux
@durable_or_not
def test_on_windows_a_task_is_scheduled_retried_touched_and_given_back(
    directory: Path, durable: bool
) -> None:
    """On Windows: schedule, retry now and later, touch, max_attempts, close and pickling work."""
    out = windows(
        """
import pickle
q = FemtoQueue(sys.argv[1], "node-1", sync_after_write=sys.argv[2] == "True", max_attempts=3)
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
with FemtoQueue(sys.argv[1], "node-2") as other:
    task = other.pop()
    assert (task.data, task.attempt) == (b"given back", 2), task
    other.done(task)
    assert other.join(1)
print("done")
""",
        directory,
        durable,
    )
    assert out == "done\n"


@needs_linux
@durable_or_not
@pytest.mark.parametrize("move", [True, False])
def test_on_windows_a_file_is_pushed(
    directory: Path, tmp_path: Path, durable: bool, move: bool
) -> None:
    """On Windows, push_file works, moving or not: no file is renamed, or synced, while it is open."""
    source = tmp_path / "payload"
    source.write_bytes(b"\r\n\x1a" * 500_000)
    out = windows(
        r"""
q = FemtoQueue(sys.argv[1], "node-1", sync_after_write=sys.argv[3] == "True")
id = q.push_file(sys.argv[2], move=sys.argv[4] == "True")
task = q.pop()
assert task.id == id and task.data == b"\r\n\x1a" * 500_000
q.done(task)
print(os.path.exists(sys.argv[2]))
""",
        directory,
        source,
        durable,
        move,
    )
    assert out == f"{not move}\n"


@needs_linux
def test_on_windows_a_task_comes_back_by_its_lease(directory: Path) -> None:
    """On Windows no process is judged: a dead worker's task comes back by its lease, and not before."""
    windows(
        """
q = FemtoQueue(sys.argv[1], "node-1", timeout_stale_ms=3_000)
q.push(b"x")
assert q.pop()
os._exit(0)
""",
        directory,
    )
    out = windows(
        """
q = FemtoQueue(sys.argv[1], "node-1")
assert q.pop() is None
task = q.pop(10)
assert (task.data, task.attempt) == (b"x", 2)
q.done(task)
print(q.counts()["done"])
""",
        directory,
    )
    assert out == "1\n"


@needs_linux
def test_on_windows_a_dropped_object_gives_its_task_back(directory: Path) -> None:
    """On Windows too, an object of this process is known to be gone at once."""
    out = windows(
        """
q = FemtoQueue(sys.argv[1], "node-1")
q.push(b"x")
other = FemtoQueue(sys.argv[1], "node-1")
task = other.pop()
assert q.pop() is None
del other
print(q.pop(3).attempt)
""",
        directory,
    )
    assert out == "2\n"


@needs_linux
def test_on_windows_a_payload_that_is_open_disturbs_nobody(directory: Path) -> None:
    """On Windows, while a handler reads task.path after its lease, other workers go on with the rest."""
    out = windows(
        """
slow = FemtoQueue(sys.argv[1], "node-1", timeout_stale_ms=100)
quick = FemtoQueue(sys.argv[1], "node-2")
slow.push(b"read slowly")
slow.push(b"next")
task = slow.pop()
with open(task.path, "rb") as payload:
    time.sleep(0.3)
    assert quick.pop().data == b"next"
    assert payload.read() == b"read slowly"
print(quick.pop(2).data)
""",
        directory,
    )
    assert out == "b'read slowly'\n"


@needs_linux
def test_on_windows_the_loop_runs(directory: Path) -> None:
    """On Windows, `run` handles tasks, keeps leases alive, and stops at SIGINT."""
    out = windows(
        """
import signal
q = FemtoQueue(sys.argv[1], "node-1", timeout_stale_ms=300)
ids = [q.push(b"short"), q.push(b"long"), q.push(b"stop")]
def handle(task):
    if task.data == b"long":
        time.sleep(0.8)
    if task.data == b"stop":
        signal.raise_signal(signal.SIGINT)
    assert not task.lost
print(q.run(handle), [q.status(id) for id in ids])
""",
        directory,
    )
    assert out == "3 ['done', 'done', 'done']\n"


@needs_linux
def test_on_windows_the_command_line_works(directory: Path, tmp_path: Path) -> None:
    """On Windows, so do push, status, list, run, requeue, cancel and purge from a shell."""
    (tmp_path / "payload").write_bytes(b"from a file")
    out = windows(
        r"""
def cli(*words):
    status = femtoqueue.main([sys.argv[1], *words])
    sys.stdout.flush()
    return status

assert cli("status") == 1
assert cli("push", sys.argv[2]) == 0
assert cli("status") == cli("status", "--json") == cli("list", "pending") == 0
copy = "import sys; sys.stdout.write(sys.stdin.read() + '\\n')"
assert cli("run", "--until-empty", "--", sys.executable, "-c", copy) == 0
q = FemtoQueue(sys.argv[1], "node-1")
(id,) = q.ids("done")
assert cli("requeue", id) == cli("cancel", id) == 0
assert cli("cancel", id) == cli("purge", "failed", "0s") == 1
""",
        directory,
        tmp_path / "payload",
    )
    assert "from a file\n" in out
    assert "pending" in out


@needs_linux
@pytest.mark.parametrize("id", ["..\\..\\file", "x\\file"], ids=["parent", "directory"])
def test_on_windows_no_id_leads_out_of_the_queue(directory: Path, id: str) -> None:
    """An id from outside never becomes a path: what separates names on Windows is in no id there."""
    out = windows(
        """
import ntpath
q = FemtoQueue(sys.argv[1], "node-1")
os.path.basename, seen = ntpath.basename, []
os.lstat, os.path.lexists = seen.append, seen.append
print(q.status(sys.argv[2]), q.cancel(sys.argv[2]), q.requeue(sys.argv[2]), seen)
""",
        directory,
        f"1700000000000000_{id}",
    )
    assert out == "None False False []\n"


@needs_linux
@pytest.mark.parametrize("node_id", ["host:8080", "a\\b", 'a"b', "a?", "a*", "a|b", "<a>"])
def test_on_windows_a_node_id_that_no_file_can_have_is_refused(directory: Path, node_id: str) -> None:
    """On Windows, a node_id that cannot be in a file's name gets a ValueError, and nothing is written."""
    out = windows(
        """
try:
    FemtoQueue(sys.argv[1], sys.argv[2])
except ValueError as error:
    print("node_id" in str(error), os.path.exists(sys.argv[1]))
""",
        directory,
        node_id,
    )
    assert out == "True False\n"


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
            except NotInProgress as lost:
                error: FemtoQueueError = lost
                print(error)
        state: str | None = q.status(id)
        print(state, ids, due, [*q.ids("pending")], STATES, q.cancel(id), q.purge("done", 3600.0))
        count: int = q.run(handle, until_empty=True)
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


def install(archive: Path, home: Path) -> Installation:
    """Install an archive, and nothing else, into a new virtual environment."""
    needs_package("pip")
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


@pytest.fixture(scope="session")
def installed_wheel(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """A new environment with the wheel in it."""
    return install(packages.wheel, tmp_path_factory.mktemp("wheel") / "venv")


@pytest.fixture(scope="session")
def installed_sdist(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """A new environment with the sdist in it, built there by pip."""
    return install(packages.sdist, tmp_path_factory.mktemp("sdist") / "venv")


@pytest.fixture(params=["installed_wheel", "installed_sdist"])
def installed(request: pytest.FixtureRequest) -> Installation:
    """A new environment with femtoqueue in it, in each way there is."""
    installation: Installation = request.getfixturevalue(request.param)
    return installation


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


def test_the_wheel_holds_the_module_its_types_and_nothing_else(packages: Packages) -> None:
    """The wheel: the module byte for byte, two more files that a package needs, and its metadata."""
    info = f"femtoqueue-{femtoqueue.__version__}.dist-info/"
    with zipfile.ZipFile(packages.wheel) as archive:
        assert set(archive.namelist()) == IN_WHEEL | {info + name for name in INFO_IN_WHEEL}
        assert archive.read("femtoqueue/__init__.py") == MODULE.read_bytes()
        assert archive.read("femtoqueue/py.typed") == b""
        metadata = archive.read(f"{info}METADATA").decode()
    assert "\nLicense-Expression: MIT\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    assert all("extra ==" in line for line in metadata.splitlines() if line.startswith("Requires-Dist"))


def test_the_sdist_holds_what_the_wheel_and_the_tests_need(packages: Packages) -> None:
    """The sdist: the repository's own files, the generated metadata, and nothing else."""
    top = f"femtoqueue-{femtoqueue.__version__}/"
    wanted = {*SOURCES, "PKG-INFO", "setup.cfg"} | {f"femtoqueue.egg-info/{name}" for name in EGG_INFO}
    with tarfile.open(packages.sdist) as archive:
        names = {member.name for member in archive.getmembers() if not member.isdir()}
        module = archive.extractfile(f"{top}femtoqueue.py")
        assert module
        assert module.read() == MODULE.read_bytes()
    assert names == {top + name for name in wanted}


def test_a_checkout_makes_the_same_wheel_as_the_sdist(packages: Packages, tmp_path: Path) -> None:
    """Built straight from the repository, the wheel holds the very same files."""
    execute(
        *(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path),
        packages.tree,
        env=environment(),
    )
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(packages.wheel) as one, zipfile.ZipFile(again) as two:
        assert {name: one.read(name) for name in one.namelist()} == {
            name: two.read(name) for name in two.namelist()
        }


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


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_an_installed_femtoqueue_is_typed(
    installed_wheel: Installation, tmp_path: Path, checker: str
) -> None:
    """A user's program is checked against the installed annotations, and its mistakes are found."""
    program = tmp_path / "program"
    program.mkdir()
    (program / "good.py").write_text(GOOD_USER, encoding="utf-8")
    (program / "bad.py").write_text(BAD_USER, encoding="utf-8")
    assert complaints(checker, program, installed_wheel.python) == {"bad": MISTAKES}


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_copied_file_is_typed(tmp_path: Path, checker: str, system: str) -> None:
    """The same with the file copied beside the program, and it passes itself: on macOS and Windows too."""
    program = tmp_path / "program"
    program.mkdir()
    shutil.copyfile(MODULE, program / "femtoqueue.py")
    (program / "good.py").write_text(GOOD_USER, encoding="utf-8")
    (program / "bad.py").write_text(BAD_USER, encoding="utf-8")
    mypys_name = {"Linux": "linux", "Darwin": "darwin", "Windows": "win32"}[system]
    options = {
        "mypy": ["--python-version=3.10", "--platform", mypys_name],
        "pyright": ["--pythonversion=3.10", "--pythonplatform", system],
    }[checker]
    found = complaints(checker, program, Path(sys.executable), *options)
    assert found == {"bad": MISTAKES}


def test_the_public_names_are_typed_completely(installed_wheel: Installation, tmp_path: Path) -> None:
    """`pyright --verifytypes`: no public name of the installed package lacks a type."""
    needs_package("pyright")
    path = f"{installed_wheel.python.parent}{os.pathsep}{os.environ['PATH']}"
    command = (sys.executable, "-m", "pyright", "--verifytypes", "femtoqueue", "--ignoreexternal")
    process = executed(*command, cwd=tmp_path, env=environment(PATH=path))
    if "completeness" not in process.stdout:
        pytest.skip(f"pyright does not run here: {process.stdout.strip()[-200:]}")
    assert process.returncode == 0, process.stdout
