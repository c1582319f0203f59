# SPDX-License-Identifier: MIT
"""How fast femtoqueue is on this machine: beside bare system calls, and beside other queues.

    python3 benchmark_mini.py                      under ten seconds, nothing to install
    python3 benchmark_mini.py --dir /srv/queues    on another filesystem
    python3 benchmark_mini.py --scale 1000000      takes minutes, and 5 GB on ext4
    python3 benchmark_mini.py --workers 8 --durable --wait --peers --original DIR --plot speed.png
                                                   README's table, after pip install '.[bench]'

The *floor* is the bare system calls that a queue of files cannot do without, made from Python: create,
write, close, rename; rename, open, read, close; rename. It keeps no order, checks nothing, and survives
nothing; nothing that is made of these calls can be faster. *The layout* is the floor on femtoqueue's
paths; the rest of femtoqueue's time is nearly all Python. *Plain files* are the floor's steps written
as one writes Python: `with open(path, "wb") as file: file.write(data)`.

Whatever is compared takes turns in small batches, after a warm-up, under the same garbage collector, so
that a busy machine is busy for all. Figures are medians over rounds; a ratio is the median of the
rounds' own ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import femtoqueue
from femtoqueue import FemtoQueue

PAYLOAD = bytes(range(100))
BATCH = 50
ROUND = 1_000
BACKLOG = 1_000  # what is pending all the time, so that nobody works on an empty queue
LATER = 100_000
BAR = 20
ALL = range(sys.maxsize)
NODE = "bench"
OURS, FLOOR, LAYOUT, PLAIN = "femtoqueue", "the floor", "the layout", "plain files"
# As long as femtoqueue's: ext4 is slower with short names.
NAME = "%016d_bench_0123456789abcdef01.01234567"
OWNER = "bench~12345~1234567~0123456789ab.1234567890.1234567890~0123456789ab"
LEASE = "~1~1234567890123456"
MARKS = {FLOOR: "#d1495b", PLAIN: "#e9b44c"}  # colors in the picture
STATES = ("creating", "scheduled", "pending", "in_progress", "done")
STEPS = ("push", "pop", "done")
ALL_STEPS = " + ".join(STEPS)

# What a contestant can do: push a payload, pop a task, and be done with it (some forget it in pop).
Steps = tuple[Callable[[bytes], Any], Callable[[], Any], Callable[[Any], Any] | None]
Round = dict[tuple[str, str], float]  # seconds per task, by contestant and step


@dataclasses.dataclass
class Row:
    """One figure, and how it compares: the same figure of others, and ratios by what they are."""

    what: str
    value: float
    unit: str
    others: dict[str, float] = dataclasses.field(default_factory=dict)
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Section:
    title: str
    rows: list[Row]


# --- the contestants ----------------------------------------------------------------------------------


def ours(directory: Path, durable: bool = False, due: bool = False) -> Steps:
    queue = FemtoQueue(directory, NODE, sync_after_write=durable)

    def schedule(data: bytes) -> None:
        queue.schedule(data, time.time_ns() // 1_000)

    return schedule if due else queue.push, queue.pop, queue.done


def floor(
    directory: Path, durable: bool = False, due: bool = False, share: range = ALL, layout: bool = False
) -> Steps:
    """The system calls with nothing around them. `share` is which tasks a worker pops."""
    creating, scheduled, pending, claimed, finished = (f"{directory}/{state}/" for state in STATES)
    claimed += f"{OWNER}/" if layout else f"{share.start}/" if share is not ALL else ""
    for path in (creating, scheduled, pending, claimed, finished):
        os.makedirs(path, exist_ok=True)
    draft, lease = (f"{creating}{OWNER}~", LEASE) if layout else (creating, "")
    new_names, names = (map(NAME.__mod__, numbers) for numbers in (ALL, share))
    targets, sources = (buckets(pending) if layout else repeat(pending) for _ in range(2))

    def push(data: bytes) -> None:
        name = next(new_names)
        path = draft + name
        target = scheduled if due else next(targets)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.write(descriptor, data)
        if durable:
            os.fsync(descriptor)
        os.close(descriptor)
        os.rename(path, target + name)
        if durable:
            sync_directory(target)

    def pop() -> str | None:
        name = next(names, None)
        if name is None:
            return None
        if due:
            os.rename(scheduled + name, pending + name)
        path = claimed + name + lease
        os.rename(next(sources) + name, path)
        descriptor = os.open(path, os.O_RDONLY)
        os.read(descriptor, 200)
        os.close(descriptor)
        return name

    def done(name: str) -> None:
        os.rename(claimed + name + lease, finished + name)
        if durable:
            sync_directory(claimed)
            sync_directory(finished)

    return push, pop, done


def buckets(pending: str) -> Iterator[str]:
    """Where femtoqueue puts each task: a thousand go into one directory."""
    for number in ALL:
        path = f"{pending}{number:016d}/"
        os.makedirs(path, exist_ok=True)
        yield from repeat(path, 1_000)


def sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def plain(directory: Path, due: bool = False) -> Steps:
    """The floor's steps as one writes them in Python without counting microseconds."""
    creating, scheduled, pending, claimed, finished = (os.path.join(directory, s) for s in STATES)
    for path in (creating, scheduled, pending, claimed, finished):
        os.makedirs(path)
    new_names, names = (map(NAME.__mod__, ALL) for _ in range(2))

    def push(data: bytes) -> None:
        name = next(new_names)
        path = os.path.join(creating, name)
        with open(path, "wb") as file:
            file.write(data)
        os.rename(path, os.path.join(scheduled if due else pending, name))

    def pop() -> tuple[str, bytes]:
        name = next(names)
        if due:
            os.rename(os.path.join(scheduled, name), os.path.join(pending, name))
        path = os.path.join(claimed, name)
        os.rename(os.path.join(pending, name), path)
        with open(path, "rb") as file:
            return name, file.read()

    def done(task: tuple[str, bytes]) -> None:
        os.rename(os.path.join(claimed, task[0]), os.path.join(finished, task[0]))

    return push, pop, done


def fill(contestant: Steps, count: int, what: str) -> None:
    for number in range(count):
        contestant[0](PAYLOAD)
        if number % ROUND == 0:
            progress(what, number / count)


# --- measuring ----------------------------------------------------------------------------------------


def interleave(
    what: str, contestants: Mapping[str, Steps], seconds: float, size: int = ROUND, batch: int = BATCH
) -> list[Round]:
    """Rounds of `size` tasks each, for `seconds`. The first round is warm-up."""
    rounds: list[Round] = []
    gc.collect()
    gc.freeze()  # what the benchmark itself has loaded is nobody's burden
    began = time.perf_counter()
    while len(rounds) < 4 or time.perf_counter() - began < seconds:
        rounds.append(one_round(contestants, size, batch))
        progress(what, (time.perf_counter() - began) / seconds)
    gc.unfreeze()
    return rounds[1:]


def one_round(contestants: Mapping[str, Steps], size: int, batch: int) -> Round:
    spent = {(name, step): 0.0 for name in contestants for step in STEPS}
    there = list(contestants.items())
    turns = (there + there[::-1]) * (size // batch // 2)
    for name, (push, _, _) in turns:
        start = time.perf_counter()
        for _ in range(batch):
            push(PAYLOAD)
        spent[name, "push"] += time.perf_counter() - start
    for name, (_, pop, done) in turns:
        start = time.perf_counter()
        tasks = [pop() for _ in range(batch)]
        popped = time.perf_counter()
        if done:
            for task in tasks:
                done(task)
        spent[name, "pop"] += popped - start
        spent[name, "done"] += time.perf_counter() - popped
        if None in tasks:
            raise SystemExit(f"{name} gave back fewer tasks than it was given")
    return {key: seconds / size for key, seconds in spent.items()}


def compare(
    rounds: list[Round], steps: str, name: str = OURS, bases: Sequence[str] = (FLOOR,), what: str = ""
) -> Row:
    """Tasks per second of `name` in `steps`, such as "pop + done", and its time over each base's."""

    def cost(of: str) -> list[float]:
        return [sum(one[of, step] for step in steps.split(" + ")) for one in rounds]

    def speed(of: str) -> float:
        return 1 / statistics.median(cost(of))

    def ratio(to: str) -> float:
        return statistics.median(a / b for a, b in zip(cost(name), cost(to), strict=True))

    ratios = {f"x {base}'{'' if base.endswith('s') else 's'} time": ratio(base) for base in bases}
    return Row(what or steps, speed(name), "tasks/s", {base: speed(base) for base in bases}, ratios)


def seconds_of(work: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def together(jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call each (function, *arguments) in a new process, and return what they return.

    Each calls `wait_for_all` when it is ready, and goes on when all have.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(jobs), timeout=60)
    with ProcessPoolExecutor(len(jobs), context, set_barrier, (barrier,)) as pool:
        return [future.result() for future in [pool.submit(*job) for job in jobs]]


def set_barrier(barrier: Any) -> None:
    global wait_for_all
    wait_for_all = barrier.wait


wait_for_all: Callable[[], object]


# --- sections of the report ---------------------------------------------------------------------------


def one_process(options: argparse.Namespace) -> Iterator[Section]:
    """What a task costs beside the floor and plain files."""
    kinds: dict[str, Callable[..., Steps]] = {FLOOR: floor, PLAIN: plain, OURS: ours}
    contestants = {name: open_(options.dir / name) for name, open_ in kinds.items()}
    contestants[LAYOUT] = floor(options.dir / LAYOUT, layout=True)
    for contestant in contestants.values():
        fill(contestant, BACKLOG, "backlog")
    rounds = interleave("one process", contestants, options.seconds)
    contestants = {name: open_(options.dir / f"{name}-due", due=True) for name, open_ in kinds.items()}
    due = interleave("schedule", contestants, options.seconds / 3)
    bases = FLOOR, PLAIN
    rows = [
        *(compare(rounds, steps, OURS, bases) for steps in (*STEPS, ALL_STEPS)),
        compare(rounds, ALL_STEPS, LAYOUT, (FLOOR, OURS), "the layout alone"),
        compare(due, "push", OURS, bases, "schedule"),
        compare(due, "pop + done", OURS, bases, "pop + done when due"),
    ]
    yield Section(f"one process, {len(rounds)} rounds of {ROUND:,} tasks", rows)


def workers(options: argparse.Namespace) -> Iterator[Section]:
    """N processes draining one queue, and N processes that never want the same file."""
    total, rounds = 10_000, 6
    speeds: list[list[float]] = [[], []]
    shares = [range(n, total, options.workers) for n in range(options.workers)]
    for number in range(rounds):
        for kind, open_ in enumerate((floor, ours)):
            directory = options.dir / f"workers-{number}-{kind}"
            fill(open_(directory), total, "workers")
            jobs = [(drain, directory, share if open_ is floor else None) for share in shares]
            counts, starts, ends = zip(*together(jobs), strict=True)
            if sum(counts) != total:
                raise SystemExit("the workers lost or doubled tasks")
            speeds[kind].append(total / (max(ends) - min(starts)))
            shutil.rmtree(directory)
    base, own = map(statistics.median, speeds)
    ratio = statistics.median(b / a for a, b in zip(*speeds, strict=True))
    row = Row("pop + done", own, "tasks/s", {FLOOR: base}, {"of the floor's speed": ratio})
    yield Section(f"{options.workers} processes on one queue; the floor's share no files", [row])


def drain(directory: Path, share: range | None) -> tuple[int, float, float]:
    """How many tasks this process got, and when it began and ended."""
    _, pop, done = floor(directory, share=share) if share else ours(directory)
    assert done
    tasks = 0
    wait_for_all()
    start = end = time.perf_counter()
    while task := pop():
        done(task)
        tasks += 1
        end = time.perf_counter()
    return tasks, start, end


def durable(options: argparse.Namespace) -> Iterator[Section]:
    """With sync_after_write, beside write + fsync + rename + fsync of the directory."""
    directory = options.dir / "durable"
    pair = {name: open_(directory / name, True) for name, open_ in ((FLOOR, floor), (OURS, ours))}
    rounds = interleave("durable", pair, options.seconds, size=100, batch=5)
    queue = FemtoQueue(directory / "many", NODE, sync_after_write=True)
    thousands: dict[str, Steps] = {
        "push": (lambda data: [queue.push(data) for _ in range(1_000)], queue.pop, None),
        "push_many": (lambda data: queue.push_many([data] * 1_000), queue.pop, None),
    }
    many = interleave("push_many", thousands, options.seconds, size=2, batch=1)
    per_task = [{key: seconds / 1_000 for key, seconds in one.items()} for one in many]
    row = compare(per_task, "push", "push_many", ["push"], "push_many(1000)")
    rows = [compare(rounds, step) for step in STEPS]
    yield Section(f"durable, {len(rounds)} rounds of 100 tasks", [*rows, row])


def wait(options: argparse.Namespace) -> Iterator[Section]:
    """What idle consumers cost, how soon they wake, and what starting up costs."""
    directory = options.dir / "wait"
    FemtoQueue(directory, NODE)
    rows = []
    for number in (1, 50):
        progress("waiting", number / 100)
        own, bare = map(sum, zip(*together([(idle, directory, options.seconds)] * number), strict=True))
        ratios = {"x as much as bare loops of time.sleep(0.01)": own / bare}
        rows.append(Row(f"{number} idle pop(timeout)", 100 * own, "% of a core", ratios=ratios))
    progress("waiting", 0.8)
    wakes, _ = together([(wake_up, directory, 200), (keep_pushing, directory, 200)])
    rows.append(Row("wake-up, median", 1_000 * statistics.median(wakes), "ms"))
    rows.append(Row("wake-up, 99th percentile", 1_000 * statistics.quantiles(wakes, n=100)[98], "ms"))
    rows.append(Row("import, over an empty interpreter", 1_000 * import_time(), "ms"))
    yield Section("waiting and starting", rows)


def idle(directory: Path, seconds: float) -> tuple[float, float]:
    """Share of a core while waiting in `pop`, and in a bare loop that only sleeps."""
    queue = FemtoQueue(directory, NODE)
    wait_for_all()
    queue.pop()
    start = time.process_time()
    if queue.pop(timeout=seconds):
        raise SystemExit("an idle waiter was given a task")
    own = time.process_time() - start
    for _ in range(int(seconds * 100)):
        time.sleep(0.01)
    return own / seconds, (time.process_time() - start - own) / seconds


def wake_up(directory: Path, tasks: int) -> list[float]:
    """Seconds from just before each push to the end of the pop that waited for it."""
    queue = FemtoQueue(directory, NODE)
    wait_for_all()
    samples = []
    for _ in range(tasks):
        task = queue.pop(timeout=60)
        assert task
        samples.append(time.perf_counter() - float(task.data))
        queue.done(task)
    return samples


def keep_pushing(directory: Path, tasks: int) -> None:
    queue = FemtoQueue(directory, NODE)
    wait_for_all()
    for number in range(tasks):
        time.sleep(0.02 + number % 17 / 1_000)  # out of step with whoever polls
        queue.push(str(time.perf_counter()).encode())


def import_time() -> float:
    """Seconds that `import femtoqueue` adds to the start of an interpreter."""
    empty = f"import sys; sys.path.insert(0, {str(Path(femtoqueue.__file__).parent)!r})"
    commands = [[sys.executable, "-I", "-c", c] for c in (empty, f"{empty}; import femtoqueue")]
    pairs = [[seconds_of(subprocess.check_call, command) for command in commands] for _ in range(20)]
    return statistics.median(after - before for before, after in pairs)


def scale(options: argparse.Namespace) -> Iterator[Section]:
    """The same work on top of ever larger backlogs, and with 100,000 tasks scheduled for later."""
    for backlog in (1_000, 10_000, 100_000, 1_000_000):
        if backlog <= options.scale:
            yield on_backlog(options.dir / "scale", options.seconds, backlog)
    for what, spread_s in (("at one time", 0), ("over 1,000 s", 1_000), ("over 10 days", 864_000)):
        yield scheduled(options.dir / "scheduled", options.seconds, what, spread_s)


def on_backlog(directory: Path, seconds: float, backlog: int) -> Section:
    title = f"backlog of {backlog:,}"
    pair = {FLOOR: floor(directory / "floor"), OURS: ours(directory / "ours")}
    fill(pair[FLOOR], BACKLOG, title)
    fill(pair[OURS], backlog, title)
    if hasattr(os, "sync"):
        os.sync()  # or the disk is still busy with writing the backlog
    [(opened, first, memory)] = together([(first_pop, directory / "ours")])
    rounds = interleave(title, pair, seconds)
    queue = FemtoQueue(directory / "ours", NODE, keep_done=False)
    while task := queue.pop():
        queue.done(task)
    time.sleep(2.1)  # directories that were just in use are not removed yet
    queue = FemtoQueue(directory / "ours", NODE)
    queue.pop()
    empty = statistics.median(seconds_of(queue.pop) for _ in range(2_000))
    shutil.rmtree(directory)
    rows = [
        Row("open", 1_000 * opened, "ms"),
        Row("first pop in a new process", 1_000 * first, "ms"),
        Row("memory for it", memory / 1e6, "MB"),
        *(compare(rounds, step) for step in STEPS),
        Row("pop of the empty queue, after draining", 1e6 * empty, "us"),
    ]
    return Section(title, rows)


def first_pop(directory: Path) -> tuple[float, float, int]:
    """Seconds to open and to pop, and bytes at the peak of another first pop."""
    start = time.perf_counter()
    queue = FemtoQueue(directory, NODE)
    opened = time.perf_counter()
    queue.pop()
    popped = time.perf_counter()
    queue.close()
    queue = FemtoQueue(directory, NODE)
    tracemalloc.start()
    queue.pop()
    memory = tracemalloc.get_traced_memory()[1]
    queue.close()
    return opened - start, popped - opened, memory


def scheduled(directory: Path, seconds: float, what: str, spread_s: int) -> Section:
    """Work beside tasks that fall due an hour from now or later, then all of them falling due."""
    title = f"{LATER:,} tasks scheduled for later, {what}"
    base, name = "a new queue", "many scheduled"
    pair = {base: ours(directory / "none"), name: ours(directory / "many")}
    queue = FemtoQueue(directory / "many", NODE)
    due_us = time.time_ns() // 1_000 + 3_600_000_000
    times_us = (due_us + spread_s * 1_000_000 * number // LATER for number in range(LATER))
    fill((lambda data: queue.schedule(data, next(times_us)), queue.pop, None), LATER, title)
    for contestant in pair.values():
        fill(contestant, BACKLOG, title)
    rounds = interleave(title, pair, seconds)
    [pops] = together([(pop_all_due, directory / "many", 3_600 + spread_s)])
    if len(pops) != LATER + BACKLOG:
        raise SystemExit(f"{len(pops):,} tasks came back of {LATER + BACKLOG:,}")
    shutil.rmtree(directory)
    longest = Row("longest pop when all are due", 1_000 * max(pops), "ms")
    rest = Row("99th percentile", 1_000 * statistics.quantiles(pops, n=100)[98], "ms")
    rows = [compare(rounds, step, name, [base]) for step in STEPS]
    return Section(title, [*rows, longest, rest])


def pop_all_due(directory: Path, ahead_s: float) -> list[float]:
    """Seconds of each pop, in a process whose clocks are `ahead_s` ahead."""
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


# --- other queues -------------------------------------------------------------------------------------


def original(folder: Path, directory: Path) -> Steps:
    queue = runpy.run_path(str(folder / "femtoqueue.py"))["FemtoQueue"](directory, NODE)
    return queue.push, queue.pop, queue.done


def persist_queue(directory: str, synchronous: int) -> Steps:
    queue = importlib.import_module("persistqueue").SQLiteAckQueue(directory)
    queue._putter.execute(f"PRAGMA synchronous = {synchronous}")
    return queue.put, lambda: queue.get(block=False, raw=True), queue.ack


def litequeue(directory: str, synchronous: int) -> Steps:
    queue = importlib.import_module("litequeue").LiteQueue(f"{directory}/queue.db")
    queue.conn.execute(f"PRAGMA synchronous = {synchronous}")

    def done(task: Any) -> None:
        claim = {"claim_id": task.claim_id} if hasattr(task, "claim_id") else {}  # none in version 0.9
        queue.done(task.message_id, **claim)

    return lambda data: queue.put(data.decode()), queue.pop, done


def dirq(directory: str, synchronous: int) -> Steps:
    queue = importlib.import_module("dirq.QueueSimple").QueueSimple(directory)

    def pop() -> str | None:
        while element := queue.next() or queue.first():
            if queue.lock(element):
                queue.get(element)
                return str(element)
        return None

    return queue.add, pop, queue.remove


def pqueue(directory: str, synchronous: int) -> Steps:
    queue = importlib.import_module("pqueue").Queue(directory, tempdir=directory)
    return queue.put, queue.get_nowait, lambda task: queue.task_done()


def diskcache(directory: str, synchronous: int) -> Steps:
    module = importlib.import_module("diskcache")
    cache = module.Cache(directory, eviction_policy="none", sqlite_synchronous=synchronous)
    queue = module.Deque.fromcache(cache)
    return queue.append, queue.popleft, None


def huey(directory: str, synchronous: int) -> Steps:
    module = importlib.import_module("huey.storage")
    queue = module.SqliteStorage(filename=f"{directory}/huey.db", strict_fifo=True)
    queue.conn.execute(f"PRAGMA synchronous = {synchronous}")
    return queue.enqueue, queue.dequeue, None


# How each is called, and why it cannot be told to survive a power cut.
PEERS: dict[str, tuple[Callable[..., Steps], str]] = {
    "persist-queue": (persist_queue, ""),
    "litequeue": (litequeue, ""),
    "dirq": (dirq, "it never calls fsync"),
    "pqueue": (pqueue, "it never calls fsync"),
    "diskcache": (diskcache, ""),
    "huey": (huey, ""),
}
NORMAL, FULL = 1, 2  # of SQLite's synchronous: a power cut takes the last seconds, or nothing


def peers(options: argparse.Namespace) -> Iterator[Section]:
    """Other queues that are installed, each doing the same work at the same durability."""
    for durable, survives in ((False, "killed processes"), (True, "power cuts")):
        directory = options.dir / f"peers-{durable}"
        contestants = {OURS: ours(directory / OURS, durable)} | installed(directory, durable)
        if options.original and not durable:  # its fsync comes before the data is written
            contestants["original 0.4.2"] = original(options.original, directory / "original")
        size, batch = (100, 5) if durable else (ROUND, BATCH)
        for contestant in contestants.values():
            fill(contestant, size, "peers")
        rounds = interleave("peers", contestants, options.seconds * 3, size, batch)
        first = compare(rounds, ALL_STEPS, bases=(), what=f"{OURS} {femtoqueue.__version__}")
        others = [compare(rounds, ALL_STEPS, n, [OURS], n) for n in contestants if n != OURS]
        yield Section(f"beside peers, surviving {survives}: {ALL_STEPS}", [first, *others])
        shutil.rmtree(directory)


def installed(directory: Path, durable: bool) -> dict[str, Steps]:
    found = {}
    for name, (open_, why_not_durable) in PEERS.items():
        path = directory / name
        path.mkdir()
        try:
            if durable and why_not_durable:
                raise ImportError(why_not_durable)
            steps = open_(str(path), FULL if durable else NORMAL)
            forgets = "" if steps[2] else ", forgets in pop"
            found[f"{name} {importlib.metadata.version(name)}{forgets}"] = steps
        except ImportError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
    return found


# --- the report ---------------------------------------------------------------------------------------


def progress(what: str, share: float) -> None:
    """A bar on standard error, if that is a terminal; without `what`, no bar again."""
    if sys.stderr.isatty():
        bar = "█" * round(min(share, 1) * BAR)
        text = f"{what} {bar:░<{BAR}}" if what else ""
        print(f"\033[K{text}\r", end="", file=sys.stderr, flush=True)


def filesystem(path: Path) -> str:
    """What kind of filesystem `path` is on, with a warning where figures will not be steady."""
    table = Path("/proc/self/mounts")
    if not table.exists():
        return "an unknown filesystem"
    mounts = [line.split()[:3] for line in table.read_text().splitlines()]
    above = [mount for mount in mounts if path.resolve().is_relative_to(mount[1])]
    device, _, kind = max(reversed(above), key=lambda mount: len(mount[1]))
    if kind == "ext4" and not list(Path("/proc/fs/jbd2").glob(f"{os.path.basename(device)}-*")):
        kind += " without a journal (creating files is slow there for minutes after many were deleted)"
    return kind


def show(section: Section) -> None:
    """A section as text: bars are tasks per second, shaded up to where the floor's ends."""
    print(f"\n{section.title}")
    width = max(len(row.what) for row in section.rows)
    units = max(len(row.unit) for row in section.rows)
    top = max(max(row.value, *row.others.values(), 0) for row in section.rows)
    speeds = any(row.unit == "tasks/s" for row in section.rows)
    for row in section.rows:
        digits = 0 if row.value >= 1_000 else 1 if row.value >= 10 else 2
        bar = ""
        if row.unit == "tasks/s":
            length, base = (round(x / top * BAR) for x in (row.value, row.others.get(FLOOR, 0)))
            bar = ("█" * length).ljust(base, "░")
        ratios = [f"{ratio:.2f} {what}" for what, ratio in row.ratios.items()]
        line = f"  {row.what:{width}} {row.value:9,.{digits}f} {row.unit:{units}}"
        print(f"{line} {bar:{BAR if speeds else 0}} {', '.join(ratios)}".rstrip())


def plot(sections: Sequence[Section], about: str, path: Path) -> None:
    """The same bars as a picture, with a mark where each of those compared with would end."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    shown = [(s.title, [row for row in s.rows if row.unit == "tasks/s"]) for s in sections]
    shown = [(title, rows) for title, rows in shown if rows]
    heights = [len(rows) for _, rows in shown]
    size = 8, 0.26 * sum(heights) + 0.4 * len(shown) + 0.6
    figure = pyplot.figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)
    axes = figure.subplots(len(shown), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, rows) in zip(axes, shown, strict=True):
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        plot_rows(axis, rows)
    lines = [pyplot.Line2D([], [], color=color, label=name, lw=3) for name, color in MARKS.items()]
    figure.legend(handles=lines, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    figure.supxlabel(f"tasks per second; {about}", fontsize=9)
    figure.savefig(path, dpi=150)


def plot_rows(axis: Any, rows: Sequence[Row]) -> None:
    style = {"va": "center", "fontsize": 9, "transform": axis.get_yaxis_transform()}
    for place, row in enumerate(rows):
        color = "#b4bec6" if OURS in row.others else "#2a6f97"
        axis.barh(place, row.value, height=0.66, color=color)
        for name in [name for name in MARKS if name in row.others]:
            axis.vlines(row.others[name], place - 0.42, place + 0.42, color=MARKS[name], linewidth=2.5)
        axis.text(1.1, place, f"{row.value:,.0f}", ha="right", **style)
        for what, ratio in list(row.ratios.items())[:1]:
            axis.text(1.13, place, f"{ratio:.2f} {what}", **style)
    axis.set_yticks(range(len(rows)), [row.what for row in rows], fontsize=9)
    axis.set(xticks=[], ylim=(len(rows) - 0.5, -0.5))
    axis.tick_params(length=0)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def arguments() -> argparse.Namespace:
    about, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    temporary = tempfile.gettempdir()
    add("--dir", type=Path, default=temporary, help="where to measure (default: %(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="N processes draining one queue")
    add("--durable", action="store_true", help="with sync_after_write")
    add("--wait", action="store_true", help="idle consumers, wake-up, import")
    backlogs = "backlogs of 1,000 up to MAX (default: 1,000,000), and 100,000 scheduled tasks"
    add("--scale", type=int, nargs="?", const=10**6, default=0, metavar="MAX", help=backlogs)
    add("--peers", action="store_true", help="other queues that are installed: pip install '.[bench]'")
    add("--original", type=Path, metavar="DIR", help="with --peers: where femtoqueue.py 0.4.2 is")
    add("--seconds", type=float, default=4.0, metavar="S", help="for each comparison (default: 4)")
    add("--json", action="store_true", help="print the figures for programs")
    add("--plot", type=Path, metavar="FILE", help="draw the bars, such as plot.png; needs matplotlib")
    options = parser.parse_args()
    if options.workers < 0 or 0 < options.scale < 1_000:
        parser.error("--workers takes at least 1, --scale at least 1000")
    if options.original and not (options.original / "femtoqueue.py").is_file():
        hint = "pip install --target DIR femtoqueue==0.4.2 puts one there"
        parser.error(f"--original: no femtoqueue.py in {options.original}; {hint}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: matplotlib is not installed; pip install '.[bench]'")
    return options


def main() -> None:
    options = arguments()
    optional = workers, durable, wait, scale, peers  # each has the name of its option
    runs = [one_process, *(run for run in optional if getattr(options, run.__name__))]
    python = platform.python_version()
    about = f"{len(PAYLOAD)}-byte payloads, {filesystem(options.dir)}, Python {python}"
    if not options.json:
        print(f"femtoqueue {femtoqueue.__version__}, {about}, {os.cpu_count()} cores, in {options.dir}")
    sections = []
    try:
        with tempfile.TemporaryDirectory(prefix="femtoqueue-benchmark-", dir=options.dir) as directory:
            options.dir = Path(directory)
            for section in chain.from_iterable(run(options) for run in runs):
                sections.append(section)
                progress("", 0)
                if not options.json:
                    show(section)
    except OSError as error:
        raise SystemExit(f"{error}; --dir names another place") from error
    if options.json:
        print(json.dumps({"about": about, "sections": sections}, indent=1, default=vars))
    if options.plot:
        plot(sections, about, options.plot)


if __name__ == "__main__":
    main()
