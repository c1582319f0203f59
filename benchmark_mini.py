# SPDX-License-Identifier: MIT
"""How fast femtoqueue is on this machine, beside bare system calls and beside other queues.

    python3 benchmark_mini.py                      ten seconds, nothing to install
    python3 benchmark_mini.py --dir /srv/queues    on another filesystem
    python3 benchmark_mini.py --only one workers   some parts; the name of each is in brackets
    python3 benchmark_mini.py --full               what must not grow: minutes, and 6 GB on ext4
    python3 benchmark_mini.py --full 0.01          the same with a hundredth of the tasks

    pip install femtoqueue==0.4.2 persist-queue litequeue localqueue \\
        huey diskcache dirq pqueue matplotlib
    python3 benchmark_mini.py --peers --picture speed.png

The *floor* is a bare loop of the system calls that a queue of files needs: open, write, close, rename;
rename, open, read, close; rename. It keeps no order, checks nothing and survives nothing. *Plain files*
are the same steps, written as one writes Python.

Each figure stands beside another one of the same run. The two take turns, so a busy machine is busy for
both. Figures are medians, and a ratio is the median of the ratios of the turns.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module, metadata
from itertools import chain, repeat
from operator import sub
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import femtoqueue
from femtoqueue import FemtoQueue

PAYLOAD = b"0123456789" * 10
NAME = "%016d_bench_0123456789abcdef01.01234567"  # as long as femtoqueue's, for ext4's sake
HOUR_US = 3_600_000_000
OURS, FLOOR, PLAIN = "femtoqueue", "floor", "plain files"
STEPS = ("push", "pop", "done", "push + pop + done")
PEERS = ("original", "persist-queue", "litequeue", "localqueue", "huey", "diskcache", "dirq", "pqueue")
FORGETFUL = ("huey", "diskcache")  # a worker that dies takes its task along
UNITS = {"s": [(1, "s"), (1e-3, "ms"), (1e-6, "us")], "B": [(1e6, "MB"), (1e3, "kB")]}  # from where on

Steps = tuple[Callable[[bytes], Any], Callable[..., Any], Callable[[Any], Any]]  # push, pop, done


class Row(NamedTuple):
    """A figure and what it stands beside: samples that were taken by turns."""

    what: str
    samples: Sequence[float]
    than: str
    base: Sequence[float]
    unit: str = "s"


# --- what is compared ---------------------------------------------------------------------------------


def queue(place: Path, **options: Any) -> FemtoQueue:
    return FemtoQueue(place, "bench", HOUR_US // 1_000, **options)


def ours(place: Path, **options: Any) -> Steps:
    made = queue(place, **options)
    return made.push, made.pop, made.done


def folders(place: Path) -> list[str]:
    paths = [f"{place}/{state}/" for state in ("creating", "pending", "in_progress", "done")]
    for path in paths:
        os.makedirs(path, exist_ok=True)
    return paths


def floor(place: Path, durable: bool = False, numbers: range = range(10**9)) -> Steps:
    """The system calls with nothing around them. `numbers` is which tasks this process pops."""
    creating, pending, claimed, finished = folders(place)
    to_sync = [os.open(path, os.O_RDONLY) for path in (pending, claimed, finished) if durable]
    new, old = map(NAME.__mod__, range(10**9)), map(NAME.__mod__, numbers)

    def push(data: bytes) -> None:
        name = next(new)
        file = os.open(creating + name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.write(file, data)
        if durable:
            os.fsync(file)
        os.close(file)
        os.rename(creating + name, pending + name)
        if durable:
            os.fsync(to_sync[0])

    def pop() -> str | None:
        if name := next(old, None):
            os.rename(pending + name, claimed + name)
            file = os.open(claimed + name, os.O_RDONLY)
            os.read(file, 200)
            os.close(file)
        return name

    def done(name: str) -> None:
        os.rename(claimed + name, finished + name)
        if durable:
            os.fsync(to_sync[1])
            os.fsync(to_sync[2])

    return push, pop, done


def plain(place: Path) -> Steps:
    """What one writes without a queue. With a timeout, pop looks every 10 ms."""
    creating, pending, claimed, finished = map(Path, folders(place))
    new, old = (map(NAME.__mod__, range(10**9)) for _ in range(2))

    def push(data: bytes) -> None:
        name = next(new)
        (creating / name).write_bytes(data)
        os.rename(creating / name, pending / name)

    def pop(timeout: float = 0) -> str | None:
        end = time.monotonic() + timeout
        while timeout and not os.listdir(pending):
            if time.monotonic() > end:
                return None
            time.sleep(0.01)
        name = next(old)
        os.rename(pending / name, claimed / name)
        (claimed / name).read_bytes()
        return name

    return push, pop, lambda name: os.rename(claimed / name, finished / name)


def peer(name: str, place: str, durable: bool) -> Steps:
    """Another queue, used as its README says. ImportError tells why it is left out."""
    if durable and name in (
        "original",
        "dirq",
        "pqueue",
    ):  # the original's fsync comes before the write
        raise ImportError("power cuts take what it wrote")
    level = "FULL" if durable else "NORMAL"  # of SQLite: a power cut takes nothing, or the last seconds
    match name:
        case "original":
            found = [d for d in metadata.distributions(name="femtoqueue") if d.version == "0.4.2"]
            if not found:
                raise ImportError("pip install femtoqueue==0.4.2")
            path = str(found[0].locate_file("femtoqueue.py"))
            q = runpy.run_path(path, run_name="original")["FemtoQueue"](place, "bench")
            return q.push, q.pop, q.done
        case "persist-queue":
            q = import_module("persistqueue").SQLiteAckQueue(place)
            q._putter.execute(f"PRAGMA synchronous = {level}")  # there is no option
            return q.put, lambda: q.get(block=False, raw=True), q.ack
        case "litequeue":
            q = import_module(name).LiteQueue(f"{place}/queue.db")
            q.conn.execute(f"PRAGMA synchronous = {level}")
            return lambda data: q.put(data.decode()), q.pop, lambda task: q.done(task.message_id)
        case "localqueue":
            mode = import_module(name).DurabilityMode("durable" if durable else "relaxed")
            q = import_module(name).SimpleQueue(place, durability=mode)
            return lambda data: q.put(data.decode()), lambda: q.get(block=False), q.ack
        case "huey":
            q = import_module(name).SqliteHuey(filename=f"{place}/huey.db", fsync=durable)
            return q.task(name="handler")(lambda data: None), q.dequeue, q.execute
        case "diskcache":
            q = import_module(name).Deque(directory=place)
            q.cache.reset("sqlite_synchronous", 2 if durable else 1)
            return q.append, q.popleft, lambda task: None
        case "dirq":
            q = import_module("dirq.QueueSimple").QueueSimple(place)
            locked = filter(q.lock, chain.from_iterable(repeat(q)))
            return q.add, lambda: [path := next(locked), q.get(path)], lambda task: q.remove(task[0])
        case _:
            q = import_module(name).Queue(place, tempdir=place)
            return q.put, q.get_nowait, lambda task: q.task_done()


# --- how it is measured -------------------------------------------------------------------------------


def timed(call: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def memory(call: Callable[[], object]) -> float:
    """Bytes that Python held at most during the call."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return float(peak)


def fill(push: Callable[[bytes], object], count: int) -> None:
    for _ in range(count):
        push(PAYLOAD)


def tasks(steps: Steps, count: int) -> list[float]:
    """Seconds per task of push, pop, done, and of all three."""
    (push, pop, done), popped = steps, []
    times = [timed(fill, push, count)]
    times.append(timed(lambda: popped.extend([pop() for _ in range(count)])))
    times.append(timed(lambda: [done(task) for task in popped]))
    if any(task is None for task in popped):
        raise SystemExit("a queue gave back fewer tasks than it was given")
    return [time / count for time in (*times, sum(times))]


def compare(who: dict[str, Steps], seconds: float, count: int = 1_000, *what: str) -> Iterator[Row]:
    """Each beside the last: turns of `count` tasks, after one as a warm-up."""
    (*names, base), what = who, what or STEPS
    turns: dict[str, list[list[float]]] = {name: [] for name in who}
    for push, _, _ in who.values():
        fill(push, count)  # nobody works on an empty queue
    gc.collect()
    gc.freeze()  # what the benchmark itself has loaded is nobody's burden
    end = time.perf_counter() + seconds
    while len(turns[base]) < 4 or time.perf_counter() < end:
        for name in list(who)[:: 1 if len(turns[base]) % 2 else -1]:
            turns[name].append(tasks(who[name], count))
    gc.unfreeze()
    costs = {name: [*zip(*turns[name][1:], strict=True)][-len(what) :] for name in who}
    for name in names:
        for step, samples, others in zip(what, costs[name], costs[base], strict=True):
            yield Row(f"{name}: {step}" if step else name, samples, base, others)


def beside(what: str, call: Callable[[], Any], than: str, other: Callable[[], Any], times: int) -> Row:
    """A call by turns with another one."""
    pairs = [(timed(call), timed(other)) for _ in range(times + 1)][1:]
    samples, base = zip(*pairs, strict=True)
    return Row(what, samples, than, base)


jobs: Sequence[Callable[[], Any]] = ()


def do(number: int) -> Any:
    signal.alarm(300)  # it ends even if the benchmark was killed
    for end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(end, signal.SIG_DFL)
    return jobs[number]()


def together(*new_jobs: Callable[[], Any]) -> list[Any]:
    """What the jobs return, each done by a process of its own, at the same time."""
    global jobs
    jobs, fork = new_jobs, multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(jobs), fork, fork.Barrier(len(jobs)).wait) as pool:
        return list(pool.map(do, range(len(jobs))))


# --- the ten seconds ----------------------------------------------------------------------------------


def one(place: Path, seconds: float, share: float) -> Iterator[Row]:
    """One process. To reach in all: 1.10 x the floor, on tmpfs 1.20"""
    who = {OURS: ours(place / "ours"), PLAIN: plain(place / "plain"), FLOOR: floor(place / "floor")}
    return compare(who, seconds)


def workers(place: Path, seconds: float, share: float) -> Iterator[Row]:
    """8 processes drain a queue; those of the floor share no files. To reach: 1.18 x, on tmpfs 1.54"""
    total, openers = 10_000 if seconds > 2 else 4_000, (floor, ours)
    shares: tuple[list[dict[str, Any]], ...]
    shares = [{"numbers": range(number, total, 8)} for number in range(8)], [{}] * 8
    spent: list[list[float]] = [[], []]
    for turn in range(2 * round(seconds) + 4):
        path, open_ = place / str(turn), openers[turn % 2]
        fill(open_(path)[0], total)
        times = together(*(partial(drain, open_, path, share) for share in shares[turn % 2]))
        if sum(map(len, times)) != total + 8:
            raise SystemExit("the workers lost or doubled tasks")
        spent[turn % 2].append((max(map(max, times)) - min(map(min, times))) / total)
    yield Row("pop + done", spent[1], FLOOR, spent[0])


def drain(open_: Callable[..., Steps], place: Path, options: dict[str, Any]) -> list[float]:
    """When it began, and when each task was done."""
    _, pop, done = open_(place, **options)
    times = [time.perf_counter()]
    for task in iter(pop, None):
        done(task)
        times.append(time.perf_counter())
    return times


def durable(place: Path, seconds: float, share: float) -> Iterator[Row]:
    """Durable, beside write + fsync + rename + fsync. To reach: push 1.10 x, push_many 0.25 x"""
    who = {OURS: ours(place / "ours", sync_after_write=True), FLOOR: floor(place / "floor", True)}
    yield from compare(who, seconds / 2, count=20)
    many = queue(place / "many", sync_after_write=True)
    row = beside("", lambda: many.push_many([PAYLOAD] * 1_000), "", lambda: fill(many.push, 50), 3)
    yield Row("push_many(1000)", [s / 1_000 for s in row.samples], "push", [s / 50 for s in row.base])


def waiting(place: Path, seconds: float, share: float) -> Iterator[Row]:
    """Waiting, beside looking into a directory every 10 ms. To reach: 0.05 % of a core, 0.5 ms"""
    both, count = (ours(place / "ours"), plain(place / "plain")), round(40 * seconds)

    def push_often() -> list[list[float]]:
        times: list[list[float]] = [[], []]
        time.sleep(seconds + 0.5)
        for number in range(2 * count):
            time.sleep(0.012 + number % 17 / 2_000)  # out of step with whoever polls
            times[number % 2].append(time.perf_counter())
            both[number % 2][0](PAYLOAD)
        return times

    *waits, pushed = together(*(partial(wait, steps, seconds, count) for steps in both), push_often)
    (own, woken), (loop, loop_woken) = waits
    yield Row("idle: pop(timeout)", [own], "a loop", [loop], "core")
    late, loop_late = (list(map(sub, *each)) for each in ((woken, pushed[0]), (loop_woken, pushed[1])))
    yield Row("wake-up: push to end of pop", late, "a loop", loop_late)


def wait(steps: Steps, seconds: float, count: int) -> tuple[float, list[float]]:
    """The share of a core that waiting in vain takes, and when it was woken by `count` pushes."""
    _, pop, done = steps
    pop(timeout=0.1)  # what the first wait imports is not part of it
    start, times = time.process_time(), []
    pop(timeout=seconds)
    spent = (time.process_time() - start) / seconds
    for _ in range(count):
        task = pop(timeout=60)
        times.append(time.perf_counter())
        done(task)
    return spent, times


# --- what must not grow: --full -----------------------------------------------------------------------


def backlog(place: Path, seconds: float, share: float) -> Iterator[Row]:
    """A backlog of 1,000,000. To reach: first pop 5 ms, 2 MB; later ones 1.10 x; when empty 40 us"""

    def first_pop(name: str) -> tuple[float, float]:
        with queue(place / name) as first, queue(place / name) as second:
            return timed(first.pop), memory(second.pop)

    who = {"many": ours(place / "many"), "few": ours(place / "few")}
    fill(who["many"][0], int(1_000_000 * share))
    fill(who["few"][0], 1_000)
    os.sync()  # or the disk is still busy with it
    pops = [together(partial(first_pop, "many"), partial(first_pop, "few")) for _ in range(5)]
    for what, kind, unit in (("first pop of a process", 0, "s"), ("memory of it", 1, "B")):
        yield Row(what, [many[kind] for many, _ in pops], "few", [few[kind] for _, few in pops], unit)
    yield from compare(who, seconds)
    with queue(place / "many", keep_done=False) as drained:
        while task := drained.pop():
            drained.done(task)
    time.sleep(2.1)  # directories that were just in use are not removed yet
    fresh, nothing = queue(place / "new").pop, place / "new" / "done"
    yield beside("pop of a new queue", fresh, "os.listdir", lambda: os.listdir(nothing), 2_000)
    yield beside("pop of the drained queue", queue(place / "many").pop, "new", fresh, 2_000)


def scheduled(place: Path, seconds: float, share: float) -> Iterator[Row]:
    """100,000 scheduled for one time. To reach: 1.05 x; no pop takes 100 ms when all fall due"""

    def drain_later() -> list[float]:
        now, ahead = time.time, HOUR_US / 1e6
        time.time = lambda: now() + ahead
        return drain(ours, place / "many", {"keep_done": False})

    count, due_us = int(100_000 * share), time.time_ns() // 1_000 + HOUR_US
    later = queue(place / "many")
    fill(lambda data: later.schedule(data, due_us), count)
    yield from compare({"scheduled": ours(place / "many"), "none": ours(place / "none")}, seconds)
    [times] = together(drain_later)
    if len(times) != count + 1_000 + 1:
        raise SystemExit(f"{len(times) - 1:,} tasks came back of {count + 1_000:,}")
    pops = list(map(sub, times[1:], times))
    yield Row("longest pop + done when all are due", [max(pops)], "their median", [median(pops)])


def processes(place: Path, seconds: float, share: float) -> Iterator[Row]:
    """Many processes. To reach: 100 us beside 40 busy ones; 50 idle ones 2.5 % of a core"""

    def hold() -> bool:
        mine = queue(place / "ours")
        task = mine.pop()
        time.sleep(5)
        return task is not None

    def look() -> Row:
        time.sleep(1)
        pop, alone = queue(place / "ours").pop, queue(place / "alone").pop
        return beside("pop beside 40 that hold a task", pop, "alone", alone, 300)

    fill(queue(place / "ours").push, 40)
    row, *held = together(look, *[hold] * 40)
    if not all(held):
        raise SystemExit("not everybody got a task")
    yield row
    waiters = ours(place / "idle"), plain(place / "plain")
    own, loop = (
        [sum(spent for spent, _ in together(*[partial(wait, steps, seconds, 0)] * 50))]
        for steps in waiters
    )
    yield Row("50 idle: pop(timeout)", own, "50 loops", loop, "core")


def looking(place: Path, seconds: float, share: float) -> Iterator[Row]:
    """One of many. To reach: push at maxsize=20,000 3 x; status and cancel 1 ms; counts 1 MB"""
    size, due_us = int(20_000 * share), time.time_ns() // 1_000 + HOUR_US
    who = {"one place free": ours(place / "full", maxsize=size), "no limit": ours(place / "free")}
    for push, _, _ in who.values():
        fill(push, size - 2)
    yield next(compare(who, seconds, count=1))
    both = queue(place / "many"), queue(place / "few")
    for state, size in (("scheduled", 16_000), ("pending", 100_000)):
        calls = []
        for q, count in zip(both, (max(210, int(size * share)), 210), strict=True):
            add: Any = {"scheduled": partial(q.schedule, time_us=due_us), "pending": q.push}[state]
            ids = [add(PAYLOAD) for _ in range(count)]
            some = iter(ids[:: count // 210])
            calls.append([partial(next, map(call, some)) for call in (q.status, q.cancel)])
        for name, many, few in zip(("status", "cancel"), *calls, strict=True):
            yield beside(f"{name}(id), {state}", many, "few", few, 100)
    tasks(ours(place / "done"), int(200_000 * share))
    counts, scan = queue(place / "done").counts, lambda: sum(1 for _ in os.scandir(place / "done/done"))
    yield beside("counts(), 200,000 done", counts, "os.scandir", scan, 5)
    yield Row("memory of it", [memory(counts)], "os.scandir", [memory(scan)], "B")


def rest(place: Path, seconds: float, share: float) -> Iterator[Row]:
    """1 GiB through push_file and task.path, and starting. To reach: 32 MB; 5 ms more"""
    source, mine = place / "source", queue(place / "ours", keep_done=False)
    source.touch()
    os.truncate(source, int(2**30 * share))

    def through() -> None:
        mine.push_file(source)
        if task := mine.pop():
            shutil.copyfile(task.path, os.devnull)
            mine.done(task)

    def copy() -> None:
        shutil.copyfile(source, place / "copy")
        shutil.copyfile(place / "copy", os.devnull)

    yield beside("push_file, pop, read, done", through, "copyfile, read", copy, 3)
    yield Row("memory of it", [memory(through)], "copyfile, read", [memory(copy)], "B")
    empty = f"import sys; sys.path.insert(0, {os.path.dirname(femtoqueue.__file__)!r})"
    run = [
        partial(subprocess.run, [sys.executable, "-Ic", empty + s]) for s in ("; import femtoqueue", "")
    ]
    yield beside("Python that imports femtoqueue", run[0], "an empty one", run[1], 20)


def peers(place: Path, seconds: float, share: float, durable: bool = False) -> Iterator[Row]:
    """Push + pop + done, surviving killed processes"""
    who = {FLOOR: floor(place / "floor", durable)}
    if not durable:
        who[PLAIN] = plain(place / "plain")
    for name in PEERS:
        (place / name).mkdir()
        try:
            version = "0.4.2" if name == "original" else metadata.version(name)
            label = f"{name} {version}{', forgets in pop' if name in FORGETFUL else ''}"
            who[label] = peer(name, str(place / name), durable)
        except ImportError as error:
            print(f"  {name}: left out ({error})")
    who[OURS] = ours(place / "ours", sync_after_write=durable)
    return compare(who, 3 * seconds, 20 if durable else 200, "")


def durable_peers(place: Path, seconds: float, share: float) -> Iterator[Row]:
    """Push + pop + done, surviving power cuts"""
    return peers(place, seconds, share, durable=True)


MAIN, FULL = (one, workers, durable, waiting), (backlog, scheduled, processes, looking, rest)
BESIDE = peers, durable_peers


def filesystem(place: Path) -> str:
    df = ["df", "--output=source,fstype", str(place)]
    words = subprocess.run(df, check=False, capture_output=True, text=True).stdout.split()
    device, kind = words[-2:] or ("", "unknown filesystem")
    if kind == "ext4" and not list(Path("/proc/fs/jbd2").glob(f"{os.path.basename(device)}-*")):
        kind += " without a journal (slow at creating files for minutes after many were deleted)"
    return kind


def show(row: Row) -> None:
    ratio = median(a / b for a, b in zip(row.samples, row.base, strict=True))
    texts = []
    for value in (median(row.samples), median(row.base)):
        scales = UNITS.get(row.unit, [(0.01, "% of a core")])
        scale, unit = next((each for each in scales if value >= each[0]), scales[-1])
        texts.append(f"{value / scale:,.{0 if value >= 100 * scale else 2}f} {unit}")
    print(f"  {row.what:35} {texts[0]:>16} {ratio:9.2f} x {row.than} ({texts[1]})", flush=True)


def draw(report: dict[str, list[Row]], about: str, path: Path) -> None:
    """Tasks per second beside the peers, and what waiting costs."""
    panels = []  # title, unit, bars
    for title, rows in sorted(report.items()):
        if title.startswith("Push"):
            times = {row.what: median(row.samples) for row in rows} | {OURS: median(rows[0].base)}
            panels.append((title, "tasks/s", {name: 1 / time for name, time in times.items()}))
        elif title.startswith("Waiting"):
            for row, unit, scale in zip(rows, ("% of a core", "ms"), (100, 1_000), strict=True):
                bars = {row.than: median(row.base) * scale, OURS: median(row.samples) * scale}
                panels.append((f"Waiting, {row.what}", unit, bars))
    pyplot = import_module("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    heights = [len(bars) + 1.5 for _, _, bars in panels]
    figure = pyplot.figure(figsize=(8, 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, unit, bars) in zip(axes, panels, strict=True):
        colors = ["#2a6f97" if name == OURS else "#b4bec6" for name in bars]
        drawn = axis.barh(list(bars), list(bars.values()), color=colors)
        axis.bar_label(drawn, [f" {bar:,.{0 if bar >= 100 else 2}f} {unit}" for bar in bars.values()])
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axis.set(xticks=[], xlim=(0, 1.3 * max(bars.values())))
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.supxlabel(about, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    about, _, usage = (__doc__ or "").partition("\n\n")
    every = {part.__name__: part for part in (*MAIN, *FULL, *BESIDE)}
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=usage, formatter_class=style)
    add = parser.add_argument
    add("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where to measure (%(default)s)")
    add("--full", type=float, nargs="?", const=1.0, metavar="SHARE", help="what must not grow")
    add("--peers", action="store_true", help="other queues that are installed")
    add("--picture", type=Path, metavar="FILE", help="draw peers and waiting; needs matplotlib")
    add("--only", nargs="+", choices=every, metavar="NAME", help="some parts only")
    options = parser.parse_args()
    parts = [*MAIN, *FULL[: None if options.full else 0]]
    parts += BESIDE if options.peers or options.picture else ()
    if options.only:
        parts = [every[name] for name in options.only]
    seconds, report = 1.5 if parts == [*MAIN] else 5.0, dict[str, list[Row]]()
    about = f"{filesystem(options.dir)} at {options.dir}, Python {platform.python_version()}"
    print(f"femtoqueue {femtoqueue.__version__}, {about}, {os.cpu_count()} cores, 100-byte payloads")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so remove everything
    try:
        with tempfile.TemporaryDirectory(prefix="femtoqueue-benchmark-", dir=options.dir) as directory:
            for part in parts:
                title, place = str(part.__doc__), Path(directory, part.__name__)
                print(f"\n{title} [{part.__name__}]", flush=True)
                place.mkdir()
                rows = report[title] = []
                try:
                    for row in part(place, seconds, options.full or 1.0):
                        rows.append(row)
                        show(row)
                except (AttributeError, TypeError) as error:
                    print(f"  not with this femtoqueue: {error}")
                shutil.rmtree(place)
    except OSError as error:
        raise SystemExit(f"{error}; --dir names another place") from error
    if options.picture:
        draw(report, about, options.picture)


if __name__ == "__main__":
    main()
