# SPDX-License-Identifier: MIT
"""How fast femtoqueue is on this machine: beside bare system calls, and beside other queues.

    python3 benchmark_mini.py                          under ten seconds, nothing to install
    python3 benchmark_mini.py --dir /srv/queues        on another filesystem
    python3 benchmark_mini.py --workers 8 --durable --wait
    python3 benchmark_mini.py --scale 1000000          takes minutes, and 5 GB on ext4
    python3 benchmark_mini.py --peers --plot peers.png    after pip install '.[bench]'

The *floor* is a bare Python loop of the system calls that a queue of files cannot do without: create,
write, close, rename; rename, open, read, close; rename. It keeps no order, checks nothing, and survives
nothing; nothing that is made of these calls can be faster.

Whatever is compared takes turns in small batches, after a warm-up, under the same garbage collector, so
that a busy machine is busy for all. Figures are medians over rounds; a ratio is the median of the
rounds' own ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import femtoqueue
from femtoqueue import FemtoQueue

PAYLOAD = bytes(range(100))
BATCH = 50
ROUND = 1_000
BACKLOG = 1_000  # what is pending all the time, so that nobody works on an empty queue
BAR = 30
NODE = "bench"
OURS, FLOOR = "femtoqueue", "the floor"
NAME = "%016d_bench_0123456789abcdef01.01234567"  # as long as ours: ext4 is slower with short names
STEPS = [["push"], ["pop", "done"]]
ALL = ["push", "pop", "done"]
LATER = 100_000


@dataclasses.dataclass
class Row:
    """One figure. `base` is the same figure of what it is compared with."""

    what: str
    value: float
    unit: str
    base: float | None = None
    ratio: float | None = None
    against: str = ""


@dataclasses.dataclass
class Section:
    title: str
    rows: list[Row]


# --- the contestants ----------------------------------------------------------------------------------


class Floor:
    """The same system calls with nothing around them."""

    name = FLOOR

    def __init__(self, directory: Path, durable: bool = False) -> None:
        self.durable = durable
        states = ("creating", "scheduled", "pending", "in_progress", "done")
        self.creating, self.scheduled, self.pending, self.claimed, self.finished = (
            f"{directory}/{state}/" for state in states
        )
        for state in states:
            os.makedirs(f"{directory}/{state}")
        self.count = dict.fromkeys(("pushed", "scheduled", "due", "popped", "done"), 0)

    def _next(self, what: str, count: int) -> Iterable[str]:
        first = self.count[what]
        self.count[what] += count
        return map(NAME.__mod__, range(first, first + count))

    def push(self, count: int) -> None:
        for name in self._next("pushed", count):
            path = self.creating + name
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(descriptor, PAYLOAD)
            if self.durable:
                os.fsync(descriptor)
            os.close(descriptor)
            os.rename(path, self.pending + name)
            if self.durable:
                sync_directory(self.pending)

    def pop(self, count: int) -> None:
        for name in self._next("popped", count):
            path = self.claimed + name
            os.rename(self.pending + name, path)
            descriptor = os.open(path, os.O_RDONLY)
            os.read(descriptor, 200)
            os.close(descriptor)

    def done(self, count: int) -> None:
        for name in self._next("done", count):
            os.rename(self.claimed + name, self.finished + name)
            if self.durable:
                sync_directory(self.claimed)
                sync_directory(self.finished)

    def schedule(self, count: int) -> None:
        for name in self._next("scheduled", count):
            path = self.creating + name
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(descriptor, PAYLOAD)
            os.close(descriptor)
            os.rename(path, self.scheduled + name)

    def pop_due(self, count: int) -> None:
        """What fell due goes through pending/ like everything else."""
        for name in self._next("due", count):
            path = self.claimed + name
            os.rename(self.scheduled + name, self.pending + name)
            os.rename(self.pending + name, path)
            descriptor = os.open(path, os.O_RDONLY)
            os.read(descriptor, 200)
            os.close(descriptor)
            os.rename(path, self.finished + name)


class Queue:
    """A real queue, ours or another: three functions, called for one task at a time."""

    def __init__(
        self,
        name: str,
        push: Callable[[bytes], Any],
        pop: Callable[[], Any],
        done: Callable[[Any], Any] | None,
        schedule: Callable[[bytes, int], Any] | None = None,
    ) -> None:
        self.name = name
        self._push, self._pop, self._done, self._schedule = push, pop, done, schedule
        self._tasks: list[Any] = []
        self.acknowledges = done is not None

    def push(self, count: int) -> None:
        for _ in range(count):
            self._push(PAYLOAD)

    def pop(self, count: int) -> None:
        self._tasks = [self._pop() for _ in range(count)]
        if None in self._tasks:
            raise SystemExit(f"{self.name} gave back fewer tasks than it was given")

    def done(self, count: int) -> None:
        if self._done:  # some forget a task as soon as they hand it out
            for task in self._tasks:
                self._done(task)

    def schedule(self, count: int) -> None:
        assert self._schedule
        for _ in range(count):
            self._schedule(PAYLOAD, time.time_ns() // 1_000)

    def pop_due(self, count: int) -> None:
        self.pop(count)
        self.done(count)


def ours(directory: Path, durable: bool = False) -> Queue:
    queue = FemtoQueue(directory, NODE, sync_after_write=durable)
    return Queue(OURS, queue.push, queue.pop, queue.done, queue.schedule)


def sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# --- measuring ----------------------------------------------------------------------------------------


def interleave(
    contestants: Sequence[Floor | Queue],
    progress: Progress,
    seconds: float,
    steps: Sequence[Sequence[str]] = STEPS,
    size: int = ROUND,
    batch: int = BATCH,
) -> list[dict[tuple[str, str], float]]:
    """Seconds per task for each contestant and step, of each round. The first round is warm-up."""
    rounds: list[dict[tuple[str, str], float]] = []
    gc.collect()
    gc.freeze()  # what the benchmark itself has loaded is nobody's burden
    began = time.perf_counter()
    while len(rounds) < 4 or time.perf_counter() - began < seconds:
        spent = {(c.name, step): 0.0 for c in contestants for phase in steps for step in phase}
        for phase in steps:
            for turn in range(size // batch):
                for contestant in contestants if turn % 2 else reversed(contestants):
                    for step in phase:
                        work = getattr(contestant, step)
                        start = time.perf_counter()
                        work(batch)
                        spent[contestant.name, step] += time.perf_counter() - start
        rounds.append({key: value / size for key, value in spent.items()})
        progress(min(1.0, (time.perf_counter() - began) / seconds))
    gc.unfreeze()
    return rounds[1:]


def compare(
    rounds: list[dict[tuple[str, str], float]], name: str, base: str, what: str, steps: Sequence[str]
) -> Row:
    """Tasks per second of contestant `name` in `steps`, and how many times the time of `base`."""
    own = [sum(one[name, step] for step in steps) for one in rounds]
    other = [sum(one[base, step] for step in steps) for one in rounds]
    ratio = statistics.median(a / b for a, b in zip(own, other, strict=True))
    speeds = 1 / statistics.median(own), 1 / statistics.median(other)
    return Row(what, speeds[0], "tasks/s", speeds[1], ratio, f"x the time of {base}")


def fresh(parent: Path, name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))


def filesystem(path: Path) -> str:
    """What kind of filesystem `path` is on, with a warning where figures will not be steady."""
    best, kind, device = "", "an unknown filesystem", ""
    try:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            source, mount, this_kind = line.split()[:3]
            if len(mount) >= len(best) and path.resolve().is_relative_to(mount):
                best, kind, device = mount, this_kind, os.path.basename(source)
    except OSError:
        pass
    if kind == "ext4" and not list(Path("/proc/fs/jbd2").glob(f"{device}-*")):
        return (
            "ext4 without a journal (creating files is slow there for minutes after many were deleted)"
        )
    return kind


def together(jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call each (function, *arguments) in a new process; what they return, in no particular order.

    Each function gets a `wait` as its first argument, which returns when all of them have called it.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(jobs))
    results = context.SimpleQueue()
    children = [
        context.Process(target=_child, args=(barrier, results, *job), daemon=True) for job in jobs
    ]
    for child in children:
        child.start()
    outcomes = [results.get() for _ in children]
    for child in children:
        child.join()
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def _child(barrier: Any, results: Any, function: Callable[..., Any], *rest: Any) -> None:
    try:
        outcome = function(barrier.wait, *rest)
    except BaseException as error:
        barrier.abort()
        outcome = error
    results.put(outcome)


# --- sections of the report ---------------------------------------------------------------------------


def one_process(options: argparse.Namespace, progress: Progress) -> Iterator[Section]:
    """What a task costs beside the floor."""
    directory = fresh(options.dir, "one")
    pair = Floor(directory / "floor"), ours(directory / "ours")
    for contestant in pair:
        contestant.push(BACKLOG)
    rounds = interleave(pair, progress, options.seconds)
    rows = [compare(rounds, OURS, FLOOR, step, [step]) for step in ALL]
    rows.append(compare(rounds, OURS, FLOOR, "push + pop + done", ALL))
    pair = Floor(directory / "floor-due"), ours(directory / "ours-due")
    due_rounds = interleave(pair, progress, options.seconds / 3, [["schedule"], ["pop_due"]])
    rows.append(compare(due_rounds, OURS, FLOOR, "schedule", ["schedule"]))
    rows.append(compare(due_rounds, OURS, FLOOR, "pop + done when due", ["pop_due"]))
    yield Section(f"one process, {len(rounds)} rounds of {ROUND:,} tasks", rows)


def workers(options: argparse.Namespace, progress: Progress) -> Iterator[Section]:
    """N processes draining one queue, and N processes that never want the same file."""
    total = 10_000
    speeds: list[list[float]] = [[], []]
    for number in range(6):
        directory = fresh(options.dir, "workers")
        floor = Floor(directory / "floor")
        for step in range(0, total, ROUND):  # in directories like those that femtoqueue makes
            floor.pending = f"{directory}/floor/pending/{step:016d}/"
            os.makedirs(floor.pending)
            floor.push(ROUND)
        ours(directory / "ours").push(total)
        path = str(directory)
        floor_jobs: list[tuple[Any, ...]] = [
            (drain_floor, f"{path}/floor", n, options.workers, total) for n in range(options.workers)
        ]
        our_jobs: list[tuple[Any, ...]] = [(drain_ours, f"{path}/ours")] * options.workers
        for kind, jobs in enumerate((floor_jobs, our_jobs)):
            outcomes = together(jobs)
            if sum(count for count, _, _ in outcomes) != total:
                raise SystemExit("the workers lost or doubled tasks")
            took = max(end for _, _, end in outcomes) - min(start for _, start, _ in outcomes)
            speeds[kind].append(total / took)
        progress((number + 1) / 6)
        shutil.rmtree(directory)
    ratio = statistics.median(b / a for a, b in zip(*speeds, strict=True))
    row = Row(
        "pop + done, together",
        statistics.median(speeds[1]),
        "tasks/s",
        statistics.median(speeds[0]),
        ratio,
        "of the speed of the floor on disjoint files",
    )
    yield Section(f"{options.workers} processes on one queue, 6 rounds of {total:,} tasks", [row])


def drain_ours(wait: Callable[[], object], directory: str) -> tuple[int, float, float]:
    queue = FemtoQueue(directory, NODE)
    count = 0
    wait()
    start = end = time.perf_counter()
    while task := queue.pop():
        queue.done(task)
        count += 1
        end = time.perf_counter()
    return count, start, end


def drain_floor(
    wait: Callable[[], object], directory: str, worker: int, workers: int, total: int
) -> tuple[int, float, float]:
    """Every so-many-th file, claimed into a directory of its own."""
    claimed = f"{directory}/in_progress/{worker}"
    os.makedirs(claimed)
    names = [(f"{n // ROUND * ROUND:016d}", NAME % n) for n in range(worker, total, workers)]
    wait()
    start = time.perf_counter()
    for bucket, name in names:
        path = f"{claimed}/{name}"
        os.rename(f"{directory}/pending/{bucket}/{name}", path)
        descriptor = os.open(path, os.O_RDONLY)
        os.read(descriptor, 200)
        os.close(descriptor)
        os.rename(path, f"{directory}/done/{name}")
    return len(names), start, time.perf_counter()


def durable(options: argparse.Namespace, progress: Progress) -> Iterator[Section]:
    """With sync_after_write, beside write + fsync + rename + fsync of the directory."""
    directory = fresh(options.dir, "durable")
    pair = Floor(directory / "floor", durable=True), ours(directory / "ours", durable=True)
    rounds = interleave(pair, progress, options.seconds, size=100, batch=5)
    rows = [compare(rounds, OURS, FLOOR, step, [step]) for step in ALL]
    queue = FemtoQueue(directory / "many", NODE, sync_after_write=True)
    single = Queue("push", lambda data: [queue.push(data) for _ in range(1_000)], queue.pop, None)
    many = Queue("push_many", lambda data: queue.push_many([data] * 1_000), queue.pop, None)
    thousands = interleave([single, many], progress, options.seconds, [["push"]], 1, 1)
    per_task = [{key: value / 1_000 for key, value in one.items()} for one in thousands]
    row = compare(per_task, many.name, single.name, "push_many(1000)", ["push"])
    yield Section(f"durable, {len(rounds)} rounds of 100 tasks", [*rows, row])


def waiting(options: argparse.Namespace, progress: Progress) -> Iterator[Section]:
    """What idle consumers cost, how soon they wake, and what starting up costs."""
    directory = fresh(options.dir, "wait")
    FemtoQueue(directory, NODE)
    rows = []
    for count in (1, 50):
        own, bare = zip(*together([(idle, str(directory), options.seconds)] * count), strict=True)
        against = "x as much as bare loops of time.sleep(0.01)"
        share = 100 * sum(own)
        rows.append(
            Row(f"{count} idle pop(timeout)", share, "% of a core", None, sum(own) / sum(bare), against)
        )
        progress(count / 100)
    jobs = [(wake_up, str(directory), 200), (keep_pushing, str(directory), 200)]
    samples = next(filter(None, together(jobs)))
    progress(0.8)
    home = str(Path(femtoqueue.__file__).parent)
    code = f"import sys; sys.path.insert(0, {home!r})"
    starts: list[list[float]] = [[], []]
    for _ in range(20):
        for times, program in zip(starts, (code, code + "; import femtoqueue"), strict=True):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-I", "-c", program], check=True)
            times.append(1_000 * (time.perf_counter() - start))
    extra = statistics.median(b - a for a, b in zip(*starts, strict=True))
    yield Section(
        "waiting and starting",
        [
            *rows,
            Row("wake-up, median", statistics.median(samples) * 1_000, "ms"),
            Row("wake-up, 99th percentile", statistics.quantiles(samples, n=100)[98] * 1_000, "ms"),
            Row("import, over an empty interpreter", extra, "ms"),
        ],
    )


def idle(wait: Callable[[], object], directory: str, seconds: float) -> tuple[float, float]:
    """Share of a core while waiting in `pop`, and in a bare loop that only sleeps."""
    queue = FemtoQueue(directory, NODE)
    wait()
    queue.pop()
    start = time.process_time()
    if queue.pop(timeout=seconds):
        raise SystemExit("an idle waiter was given a task")
    own = time.process_time() - start
    for _ in range(int(seconds * 100)):
        time.sleep(0.01)
    return own / seconds, (time.process_time() - start - own) / seconds


def wake_up(wait: Callable[[], object], directory: str, count: int) -> list[float]:
    queue = FemtoQueue(directory, NODE)
    wait()
    samples = []
    for _ in range(count):
        task = queue.pop(timeout=60)
        assert task
        samples.append(time.perf_counter() - float(task.data))
        queue.done(task)
    return samples


def keep_pushing(wait: Callable[[], object], directory: str, count: int) -> None:
    queue = FemtoQueue(directory, NODE)
    wait()
    for number in range(count):
        time.sleep(0.02 + number % 17 / 1_000)  # out of step with whoever polls
        queue.push(str(time.perf_counter()).encode())


def scale(options: argparse.Namespace, progress: Progress) -> Iterator[Section]:
    """The same work on top of ever larger backlogs, and with 100,000 tasks scheduled for later."""
    for backlog in [10**n for n in range(3, 7) if 10**n <= options.scale]:
        directory = fresh(options.dir, "scale")
        pair = Floor(directory / "floor"), ours(directory / "ours")
        pair[0].push(BACKLOG)
        for number in range(0, backlog, ROUND):
            pair[1].push(ROUND)
            progress(number / backlog)
        getattr(os, "sync", lambda: None)()  # or the disk is still busy with writing the backlog
        opened, first, memory, _ = together([(first_pop, str(directory / "ours"))])[0]
        rounds = interleave(pair, progress, options.seconds)
        queue = FemtoQueue(directory / "ours", NODE, keep_done=False)
        while task := queue.pop():
            queue.done(task)
        time.sleep(2.1)  # directories that were just in use are not removed yet
        *_, empty = together([(first_pop, str(directory / "ours"))])[0]
        yield Section(
            f"backlog of {backlog:,}",
            [
                Row("open", opened * 1_000, "ms"),
                Row("first pop in a new process", first * 1_000, "ms"),
                Row("memory for it", memory / 1e6, "MB"),
                *(compare(rounds, OURS, FLOOR, step, [step]) for step in ALL),
                Row("pop of the empty queue, after draining", empty * 1e6, "us"),
            ],
        )
        shutil.rmtree(directory)
    for what, spread_s in (("at one time", 0), ("over 1,000 s", 1_000), ("over 10 days", 864_000)):
        yield scheduled(options, progress, what, spread_s)


def first_pop(wait: Callable[[], object], directory: str) -> tuple[float, float, float, float]:
    """Seconds to open and to pop, bytes at the peak of a first pop, seconds of a later empty one."""
    start = time.perf_counter()
    queue = FemtoQueue(directory, NODE)
    opened = time.perf_counter()
    task = queue.pop()
    popped = time.perf_counter()
    empty = []
    for _ in range(2_000 if task is None else 0):
        begun = time.perf_counter()
        queue.pop()
        empty.append(time.perf_counter() - begun)
    queue.close()
    queue = FemtoQueue(directory, NODE)
    tracemalloc.start()
    queue.pop()
    memory = tracemalloc.get_traced_memory()[1]
    queue.close()
    return opened - start, popped - opened, memory, statistics.median(empty or [0.0])


def scheduled(options: argparse.Namespace, progress: Progress, what: str, spread_s: int) -> Section:
    directory = fresh(options.dir, "scheduled")
    with_none, with_many = ours(directory / "none"), ours(directory / "many")
    with_none.name, with_many.name = "none scheduled", "many scheduled"
    queue = FemtoQueue(directory / "many", NODE)
    due_us = time.time_ns() // 1_000 + 3_600_000_000
    for number in range(LATER):
        queue.schedule(PAYLOAD, due_us + spread_s * 1_000_000 * number // LATER)
        if number % ROUND == 0:
            progress(number / LATER)
    for contestant in (with_none, with_many):
        contestant.push(BACKLOG)
    rounds = interleave([with_none, with_many], progress, options.seconds)
    rows = [compare(rounds, with_many.name, with_none.name, step, [step]) for step in ALL]
    # Now the hour is over: for those who look, the time is what the time module says.
    pops = together([(pop_all_due, str(directory / "many"), 3_600 + spread_s)])[0]
    if len(pops) != LATER + BACKLOG:
        raise SystemExit(f"{len(pops):,} tasks came back of {LATER + BACKLOG:,}")
    rows.append(Row("longest pop when all are due", max(pops) * 1_000, "ms"))
    rows.append(Row("99th percentile", statistics.quantiles(pops, n=100)[98] * 1_000, "ms"))
    shutil.rmtree(directory)
    return Section(f"{LATER:,} tasks scheduled for later, {what}", rows)


def pop_all_due(wait: Callable[[], object], directory: str, ahead_s: float) -> list[float]:
    wall, monotonic = time.time, time.monotonic
    queue = FemtoQueue(directory, NODE, keep_done=False)
    time.time = lambda: wall() + ahead_s
    time.monotonic = lambda: monotonic() + ahead_s
    pops: list[float] = []
    while True:
        start = time.perf_counter()
        task = queue.pop()
        if task is None:
            return pops
        pops.append(time.perf_counter() - start)
        queue.done(task)


def peers(options: argparse.Namespace, progress: Progress) -> Iterator[Section]:
    """Other queues that are installed, each doing the same work at the same durability."""
    for durable in (False, True):
        directory = fresh(options.dir, "peers")
        contestants = [ours(directory / "femtoqueue", durable)]
        for name, make in PEERS.items():
            try:
                (directory / name).mkdir()
                contestants.append(make(name, directory / name, durable, options))
            except (ImportError, NotImplementedError) as error:
                print(f"{name}: left out ({error})", file=sys.stderr)
        size, batch = (100, 5) if durable else (ROUND, BATCH)
        for contestant in contestants:
            contestant.push(size)
        rounds = interleave(contestants, progress, options.seconds * 3, size=size, batch=batch)
        rows = [compare(rounds, one.name, OURS, one.name, ALL) for one in contestants]
        for one, row in zip(contestants, rows, strict=True):
            row.against += "" if one.acknowledges else "; forgets a task on handing it out"
        rows[0].ratio = rows[0].base = None
        survives = "a power cut" if durable else "a killed process, not a power cut"
        yield Section(f"peers, push + pop + done, what survives {survives}", rows)
        shutil.rmtree(directory)


def original(name: str, directory: Path, durable: bool, options: argparse.Namespace) -> Queue:
    if options.original is None:
        raise ImportError("name its folder with --original")
    if durable:
        raise NotImplementedError("its fsync comes before the data is written")
    spec = importlib.util.spec_from_file_location("original", options.original / "femtoqueue.py")
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["original"] = module
    spec.loader.exec_module(module)
    queue = module.FemtoQueue(str(directory), NODE)
    return Queue(name, queue.push, queue.pop, queue.done)


def persist_queue(name: str, directory: Path, durable: bool, options: argparse.Namespace) -> Queue:
    queue = importlib.import_module("persistqueue").SQLiteAckQueue(str(directory))
    queue._putter.execute(f"PRAGMA synchronous = {SYNCHRONOUS[durable]}")
    return Queue(name, queue.put, lambda: queue.get(block=False, raw=True), queue.ack)


def litequeue(name: str, directory: Path, durable: bool, options: argparse.Namespace) -> Queue:
    queue = importlib.import_module("litequeue").LiteQueue(str(directory / "queue.db"))
    queue.conn.execute(f"PRAGMA synchronous = {SYNCHRONOUS[durable]}")
    return Queue(name, queue.put, queue.pop, lambda task: queue.done(task.message_id))


def dirq(name: str, directory: Path, durable: bool, options: argparse.Namespace) -> Queue:
    if durable:
        raise NotImplementedError("it never calls fsync")
    queue = importlib.import_module("dirq.QueueSimple").QueueSimple(str(directory))

    def pop() -> str | None:
        while element := queue.next() or queue.first():
            if queue.lock(element):
                queue.get(element)
                return str(element)
        return None

    return Queue(name, queue.add, pop, queue.remove)


def pqueue(name: str, directory: Path, durable: bool, options: argparse.Namespace) -> Queue:
    if durable:
        raise NotImplementedError("it never calls fsync")
    queue = importlib.import_module("pqueue").Queue(str(directory), tempdir=str(directory))
    return Queue(name, queue.put, queue.get_nowait, lambda task: queue.task_done())


def diskcache(name: str, directory: Path, durable: bool, options: argparse.Namespace) -> Queue:
    module = importlib.import_module("diskcache")
    level = 2 if durable else 1
    cache = module.Cache(str(directory), eviction_policy="none", sqlite_synchronous=level)
    queue = module.Deque.fromcache(cache)
    return Queue(name, queue.append, queue.popleft, None)


def huey(name: str, directory: Path, durable: bool, options: argparse.Namespace) -> Queue:
    module = importlib.import_module("huey.storage")
    queue = module.SqliteStorage(filename=str(directory / "huey.db"), strict_fifo=True)
    queue.conn.execute(f"PRAGMA synchronous = {SYNCHRONOUS[durable]}")
    return Queue(name, queue.enqueue, queue.dequeue, None)


# All SQLite queues at the same level: what loses the last seconds in a power cut, and what does not.
SYNCHRONOUS = {False: "NORMAL", True: "FULL"}
PEERS: dict[str, Callable[[str, Path, bool, argparse.Namespace], Queue]] = {
    "original 0.4.2": original,
    "persist-queue": persist_queue,
    "litequeue": litequeue,
    "dirq": dirq,
    "pqueue": pqueue,
    "diskcache": diskcache,
    "huey": huey,
}


# --- the report ---------------------------------------------------------------------------------------


class Progress:
    """A line on standard error during long runs, if that is a terminal."""

    def __init__(self) -> None:
        self.what = ""
        self.shown = sys.stderr.isatty()
        self.rich: Any = None
        try:
            console = importlib.import_module("rich.console").Console(stderr=True)
            self.rich = importlib.import_module("rich.progress").Progress(
                console=console, transient=True
            )
        except ImportError:
            pass

    def __call__(self, share: float) -> None:
        if self.shown and self.rich:
            if not self.rich.tasks:
                self.rich.start()
                self.rich.add_task("", total=1.0)
            self.rich.update(self.rich.tasks[0].id, description=self.what, completed=share)
        elif self.shown:
            print(f"\r{self.what} {share:4.0%}\033[K", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.shown and self.rich:
            self.rich.stop()
        elif self.shown:
            print("\r\033[K", end="", file=sys.stderr)


def show(section: Section) -> None:
    """A section as text: bars are tasks per second, and where the base would end is shaded."""
    print(f"\n{section.title}")
    width = max(len(row.what) for row in section.rows)
    units = max(len(row.unit) for row in section.rows)
    speeds = [max(row.value, row.base or 0) for row in section.rows if row.unit == "tasks/s"]
    for row in section.rows:
        digits = 0 if row.value >= 1_000 else 1 if row.value >= 10 else 2
        bar = ""
        if row.unit == "tasks/s":
            length, base = (round(x / max(speeds) * BAR) for x in (row.value, row.base or 0))
            bar = ("█" * length).ljust(base, "░")
        ratio = f"{row.ratio:.2f} {row.against}" if row.ratio else ""
        line = f"  {row.what:{width}} {row.value:9,.{digits}f} {row.unit:{units}}"
        print(f"{line} {bar:{BAR if speeds else 0}} {ratio}".rstrip())


def plot(sections: Sequence[Section], about: str, path: Path) -> None:
    """The same bars as a picture; a line marks what each is compared with."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    shown = [(s, [r for r in s.rows if r.unit == "tasks/s"]) for s in sections]
    shown = [(section, rows) for section, rows in shown if rows]
    heights = [len(rows) + 1 for _, rows in shown]
    figure, axes = pyplot.subplots(
        len(shown), figsize=(9, 0.42 * sum(heights) + 1), squeeze=False, height_ratios=heights
    )
    for axis, (section, rows) in zip(axes[:, 0], shown, strict=True):
        names = [row.what for row in rows]
        ours = [
            "#2a6f97" if "peers" not in section.title or i == 0 else "#a9b4bd" for i in range(len(rows))
        ]
        axis.barh(names, [row.value for row in rows], color=ours, height=0.6)
        top = max(max(row.value, row.base or 0) for row in rows)
        for place, row in enumerate(rows):
            if row.base and "peers" not in section.title:
                axis.vlines(row.base, place - 0.4, place + 0.4, color="#d1495b")
            text = f"{row.value:,.0f}" + (f"  ({row.ratio:.2f})" if row.ratio else "")
            end = row.value if "peers" in section.title else max(row.value, row.base or 0)
            axis.text(end + top / 80, place, text, va="center", fontsize=8)
        axis.set_xlim(0, top * 1.18)
        axis.invert_yaxis()
        axis.set_title(section.title, loc="left", fontsize=10)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(f"tasks per second; {about}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    about, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--dir",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where to measure (default: %(default)s)",
    )
    add("--workers", type=int, metavar="N", help="N processes draining one queue")
    add("--durable", action="store_true", help="with sync_after_write")
    add("--wait", action="store_true", help="idle consumers, wake-up, import")
    add(
        "--scale",
        type=int,
        nargs="?",
        const=1_000_000,
        metavar="MAX",
        help="backlogs of 1,000 up to MAX (default: 1,000,000), and 100,000 scheduled tasks",
    )
    add("--peers", action="store_true", help="other queues that are installed: pip install '.[bench]'")
    add("--original", type=Path, metavar="DIR", help="with --peers: where femtoqueue.py 0.4.2 is")
    add("--seconds", type=float, default=4.0, metavar="S", help="for each comparison (default: 4)")
    add("--json", action="store_true", help="print the figures for programs")
    add("--plot", type=Path, metavar="FILE", help="draw the bars, such as plot.png; needs matplotlib")
    options = parser.parse_args()
    if not options.dir.is_dir():
        parser.error(f"--dir: {options.dir} is not a directory; make it first")
    if options.workers is not None and options.workers < 1:
        parser.error("--workers: name at least 1")
    if options.scale is not None and options.scale < 1_000:
        parser.error("--scale: name at least 1000")
    if options.original and not (options.original / "femtoqueue.py").is_file():
        parser.error(
            f"--original: no femtoqueue.py in {options.original}; "
            "pip install --target DIR femtoqueue==0.4.2 puts one there"
        )
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: matplotlib is not installed; pip install '.[bench]'")
    return options


def main() -> None:
    options = arguments()
    chosen = {
        one_process: not (
            options.workers or options.durable or options.wait or options.scale or options.peers
        ),
        workers: options.workers,
        durable: options.durable,
        waiting: options.wait,
        scale: options.scale,
        peers: options.peers,
    }
    about = (
        f"{len(PAYLOAD)}-byte payloads, {filesystem(options.dir)}, Python {platform.python_version()}"
    )
    if not options.json:
        print(f"femtoqueue {femtoqueue.__version__}, {about}, {os.cpu_count()} cores, in {options.dir}")
    options.dir = fresh(options.dir, "femtoqueue-benchmark")
    progress = Progress()
    sections = []
    try:
        for run in [run for run, wanted in chosen.items() if wanted]:
            progress.what = run.__name__.replace("_", " ")
            for section in run(options, progress):
                sections.append(section)
                if not options.json:
                    progress.close()
                    show(section)
    except OSError as error:
        raise SystemExit(f"{error}; --dir names another place") from error
    finally:
        progress.close()
        shutil.rmtree(options.dir, ignore_errors=True)
    if options.json:
        print(
            json.dumps({"about": about, "sections": list(map(dataclasses.asdict, sections))}, indent=1)
        )
    if options.plot:
        plot(sections, about, options.plot)


if __name__ == "__main__":
    main()
