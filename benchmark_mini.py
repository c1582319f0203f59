# SPDX-License-Identifier: MIT
"""How fast femtoqueue is on this machine, beside bare system calls and beside other queues.

    python3 benchmark_mini.py                      ten seconds, nothing to install
    python3 benchmark_mini.py --dir /srv/queues    on another filesystem
    python3 benchmark_mini.py --full               a million tasks: minutes, and 6 GB on ext4
    python3 benchmark_mini.py --full 0.01          the same with a hundredth of them

    pip install femtoqueue==0.4.2 persist-queue litequeue localqueue huey dirq matplotlib
    python3 benchmark_mini.py --peers --picture speed.png

The *floor* is a bare loop of the system calls that a queue of files needs: open, write, close, rename;
rename, open, read, close; rename. It keeps no order, checks nothing and survives nothing. *Plain files*
are the same steps, written as one writes Python. Each figure stands beside others of the same run,
which take turns: a busy machine is busy for all. A ratio is the median of the ratios of the turns.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module, metadata
from itertools import chain, count, pairwise, repeat
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import femtoqueue
from femtoqueue import FemtoQueue

PAYLOAD, HOUR_US = b"0123456789" * 10, 3_600_000_000
NAMES = map("%016d_bench_0123456789abcdef01.01234567".__mod__, count())  # as long as femtoqueue's
STEPS = ("push", "pop", "done", "push + pop + done")
OURS, FLOOR, DURABLE, PLAIN = "femtoqueue", "floor", "durable floor", "plain files"
LOOP = "pop, sleep 10 ms"
PEERS = ("original", "persist-queue", "litequeue", "localqueue", "huey", "dirq")

Row = tuple[str, dict[str, Sequence[float]]]  # "what -> what is to be reached"; samples, ours first
Rows = Iterator[Row]
Steps = tuple[Any, Any, Any]  # push, pop and done


# --- what is compared ---------------------------------------------------------------------------------


def queue(place: Path, filled: int = 0, **options: Any) -> FemtoQueue:
    q = FemtoQueue(place, "bench", HOUR_US // 1_000, **options)
    for _ in range(filled):
        q.push(PAYLOAD)
    return q


def steps(q: FemtoQueue) -> Steps:
    return q.push, q.pop, q.done


def files(place: Path, how: str) -> Steps:
    """The floor is the system calls with nothing around them; a durable one syncs."""
    paths = [f"{place}/{state}/" for state in ("creating", "pending", "in_progress", "done")]
    creating, pending, claimed, finished = paths
    for path in paths:
        os.makedirs(path, exist_ok=True)
    to_sync = [os.open(path, os.O_RDONLY) for path in paths[1:] if how == DURABLE]
    names: deque[str] = deque()

    def push(data: bytes) -> None:
        name = next(NAMES)
        if how == PLAIN:
            Path(creating, name).write_bytes(data)
        else:
            file = os.open(creating + name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(file, data)
            if to_sync:
                os.fsync(file)
            os.close(file)
        os.rename(creating + name, pending + name)
        if to_sync:
            os.fsync(to_sync[0])
        names.append(name)

    def pop() -> str | None:
        if not names:
            return None
        name = names.popleft()
        os.rename(pending + name, claimed + name)
        if how == PLAIN:
            Path(claimed, name).read_bytes()
        else:
            file = os.open(claimed + name, os.O_RDONLY)
            os.read(file, 200)
            os.close(file)
        return name

    def done(name: str) -> None:
        os.rename(claimed + name, finished + name)
        for directory in to_sync[1:]:
            os.fsync(directory)

    return push, pop, done


def peer(name: str, place: str, durable: bool) -> Steps:
    """Another queue, used as its README says. ImportError tells why it is left out."""
    if durable and name in ("original", "dirq"):  # the original syncs before it writes
        raise ImportError("a power cut takes what it wrote")
    level = "FULL" if durable else "NORMAL"  # of SQLite: a power cut takes nothing, or the last seconds
    os.makedirs(place)
    if name == "original":
        for found in metadata.distributions(name="femtoqueue"):
            if found.version == "0.4.2":
                path = str(found.locate_file("femtoqueue.py"))
                return steps(runpy.run_path(path, run_name=name)["FemtoQueue"](place, "bench"))
        raise ImportError("pip install femtoqueue==0.4.2")
    if name == "persist-queue":
        q = import_module("persistqueue").SQLiteAckQueue(place)
        q._putter.execute(f"PRAGMA synchronous = {level}")  # there is no option
        return q.put, partial(q.get, block=False, raw=True), q.ack
    if name == "dirq":
        q = import_module("dirq.QueueSimple").QueueSimple(place)
        locked = filter(q.lock, chain.from_iterable(repeat(q)))
        return q.add, lambda: [path := next(locked), q.get(path)], lambda task: q.remove(task[0])
    module = import_module(name)
    if name == "litequeue":
        q = module.LiteQueue(f"{place}/queue.db")
        q.conn.execute(f"PRAGMA synchronous = {level}")
        return lambda data: q.put(data.decode()), q.pop, lambda task: q.done(task.message_id)
    if name == "localqueue":
        mode = module.DurabilityMode("durable" if durable else "relaxed")
        q = module.SimpleQueue(place, durability=mode)
        return lambda data: q.put(data.decode()), partial(q.get, block=False), q.ack
    q = module.SqliteHuey(filename=f"{place}/huey.db", fsync=durable)
    return q.task(name="handler")(lambda data: None), q.dequeue, q.execute


# --- how it is measured -------------------------------------------------------------------------------


def timed(call: Callable[..., object], *arguments: object) -> list[float]:
    start = time.perf_counter()
    call(*arguments)
    return [time.perf_counter() - start]


def load(number: int, push: Any, pop: Any, done: Any) -> list[float]:
    """Seconds per task of push, pop, done, and of all three."""
    times = [time.perf_counter()]
    for _ in range(number):
        push(PAYLOAD)
    times.append(time.perf_counter())
    tasks = [pop() for _ in range(number)]
    times.append(time.perf_counter())
    for task in tasks:
        done(task)
    times.append(time.perf_counter())
    if None in tasks:
        raise SystemExit("a queue gave back fewer tasks than it was given")
    return [(end - start) / number for start, end in [*pairwise(times), (times[0], times[3])]]


def by_turns(call: Callable[..., Any], who: dict[str, Any], seconds: float, *whats: str) -> Rows:
    """A row for each figure that the call returns. All take turns; the first is a warm-up."""
    turns: dict[str, list[list[float]]] = {name: [] for name in who}
    order, end = [*who], time.perf_counter() + seconds
    gc.freeze()  # what the benchmark itself has loaded is nobody's burden
    while len(turns[order[0]]) < 4 or time.perf_counter() < end:
        for name in order:
            turns[name].append(call(*who[name]))
        order.reverse()
    figures = {name: [*zip(*turns[name][1:], strict=True)] for name in who}
    for number, what in enumerate(whats):
        yield what, {name: figures[name][number] for name in who}


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """What the jobs return, each done by a process of its own, at the same time."""
    fork = multiprocessing.get_context("fork")
    results, barrier = fork.Queue(), fork.Barrier(len(jobs))

    def do(number: int) -> None:
        barrier.wait()
        results.put((number, jobs[number]()))

    for number in range(len(jobs)):
        fork.Process(target=do, args=(number,), daemon=True).start()
    return [result for _, result in sorted(results.get(timeout=300) for _ in jobs)]


def drain(pop: Any, done: Any) -> list[float]:
    """When it began, and when each task was done."""
    return [time.perf_counter(), *(time.perf_counter() for _ in map(done, iter(pop, None)))]


def wait(q: Any, polls: bool, number: int) -> list[float]:
    """The share of a core that waiting in vain takes, and how late so many tasks were popped."""

    def pop(timeout: float) -> Any:
        end = time.monotonic() + timeout
        while not (task := q.pop() if polls else q.pop(timeout)) and time.monotonic() < end:
            time.sleep(0.01)
        return task

    pop(0.1)  # what the first wait imports is not part of it
    start, late = time.process_time(), [0.0]
    pop(2)
    share = (time.process_time() - start) / 2
    while len(late) <= number and (task := pop(60)):
        late.append(time.perf_counter() - float(task.data))
        q.done(task)
    return [share, median(late)]


# --- what is measured ---------------------------------------------------------------------------------


def one(place: Path, share: float) -> Rows:
    """One process"""
    who = {OURS: steps(queue(place / OURS, 1_000))} | {n: files(place / n, n) for n in (FLOOR, PLAIN)}
    return by_turns(
        partial(load, 1_000), who, 1.5, *STEPS[:3], STEPS[3] + " -> 1.10 x, on tmpfs 1.20 x"
    )


def workers(place: Path, share: float) -> Rows:
    """Many workers; those of the floor share no files"""

    def drained(make: Callable[[], Steps]) -> list[float]:
        works = [make() for _ in range(8)]
        for push, _, _ in works:
            for _ in range(500):
                push(PAYLOAD)
        times = together(*(partial(drain, pop, done) for _, pop, done in works))
        return [(max(map(max, times)) - min(map(min, times))) / 4_000]

    q = queue(place / OURS)
    who = {OURS: (lambda: steps(q),), FLOOR: (lambda: files(place / FLOOR, FLOOR),)}
    return by_turns(drained, who, 2, "pop + done by 8 processes -> 1.18 x, on tmpfs 1.54 x")


def durable(place: Path, share: float) -> Rows:
    """Durable; the floor is write + fsync + rename + fsync"""
    q, many, single = (
        queue(place / name, 20, sync_after_write=True) for name in (OURS, "many", "push")
    )
    who: dict[str, Any] = {OURS: steps(q), DURABLE: files(place / DURABLE, DURABLE)}
    yield from by_turns(partial(load, 20), who, 1, "push -> 1.10 x", *STEPS[1:])
    who = {OURS: (1_000, many.push_many), "push": (50, lambda items: [*map(single.push, items)])}
    each = "push_many(1000), each -> 0.25 x"
    yield from by_turns(lambda n, push: [timed(push, [PAYLOAD] * n)[0] / n], who, 0, each)


def waiting(place: Path, share: float) -> Rows:
    """Waiting, beside a loop that looks every 10 ms"""
    who = [(queue(place / f"{polls}"), polls) for polls in (False, True)]

    def push_often(q: FemtoQueue, later: bool) -> None:
        time.sleep(2.5 + 0.006 * later)
        for number in range(40):
            time.sleep(0.012 + number % 17 / 2_000)  # out of step with who polls
            q.push(b"%r" % time.perf_counter())

    waits = [partial(wait, *each, 40) for each in who]
    own, loop, *_ = together(*waits, *(partial(push_often, *each) for each in who))
    for number, what in enumerate(("idle worker -> 0.05 %", "wake-up, push to end of pop -> 0.5 ms")):
        yield what, {OURS: [own[number]], LOOP: [loop[number]]}


def peers(place: Path, share: float) -> Rows:
    """Push + pop + done, with other queues (* a task is lost if its worker is killed)"""
    for survives, number, floors in (
        ("killed processes", 200, (FLOOR, PLAIN)),
        ("power cuts", 20, (DURABLE,)),
    ):
        at, synced = place / survives, DURABLE in floors
        who: dict[str, Steps] = {OURS: steps(queue(at / OURS, number, sync_after_write=synced))}
        who |= {how: files(at / how, how) for how in floors}
        for name in PEERS:
            try:
                version = "0.4.2" if name == "original" else metadata.version(name)
                other = peer(name, f"{at}/{name}", synced)
            except ImportError as error:
                print(f"  without {name}: {error}")
                continue
            for _ in range(number):
                other[0](PAYLOAD)
            who[f"{name} {version}{' *' * (name == 'huey')}"] = other
        *_, row = by_turns(partial(load, number), who, 15, *STEPS[:3], f"surviving {survives}")
        yield row


def grown(place: Path, share: float) -> Rows:
    """1,000,000 pending, 100,000 scheduled, 200,000 done, beside a thousandth of it"""
    due_us, parts = time.time_ns() // 1_000 + HOUR_US, {OURS: share, "a thousandth": 0.001}
    who = {name: steps(queue(place / name)) for name in parts}
    for name, part in parts.items():
        load(int(200_000 * part), *who[name])
        q = queue(place / name, int(1_000_000 * part))
        for _ in range(int(100_000 * part)):
            q.schedule(PAYLOAD, due_us)
    os.sync()  # or the disk is still busy with it

    def first_pop(place: Path) -> list[float]:
        with queue(place) as q:
            return timed(q.pop)

    yield from by_turns(first_pop, {name: (place / name,) for name in who}, 0, "first pop -> 5 ms")
    yield from by_turns(partial(load, 1_000), who, 5, "push -> 1.05 x", "pop -> 1.05 x", *STEPS[2:])
    q, new = queue(place / OURS, keep_done=False), queue(place / "new")
    drain(q.pop, q.done)
    time.sleep(2.1)  # directories that were just in use are not removed yet
    yield from by_turns(timed, {OURS: (q.pop,), "new": (new.pop,)}, 1, "pop once drained -> 40 us")


# --- how it is shown ----------------------------------------------------------------------------------


def text(what: str, samples: Sequence[float]) -> str:
    value, units = median(samples), [(1.0, "s"), (1e-3, "ms"), (1e-6, "us")]
    if what.startswith("idle"):
        units = [(0.01, "% of a core")]
    scale, unit = next((each for each in units if value >= each[0]), units[-1])
    return f"{value / scale:,.{0 if value >= 100 * scale else 2}f} {unit}"


def show(row: Row) -> None:
    what, _, bound = row[0].partition(" -> ")
    (_, samples), *others = row[1].items()
    start, end = f"  {what:36}{text(what, samples):>16}", f"; to reach: {bound}" if bound else ""
    for name, base in others:
        ratio = median(map(truediv, samples, base))
        print(f"{start:54}{ratio:8.2f} x {name} ({text(what, base)}){end}", flush=True)
        start = end = ""


def draw(rows: list[Row], about: str, path: Path) -> None:
    """The best first, ours in blue, no queue in yellow. On white and on black one can read it."""
    pyplot = import_module("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    pyplot.rcParams.update(dict.fromkeys(("text.color", "ytick.color"), "#7d8590"))
    rows = [row for kind in ("surv", "idle w", "wake") for row in rows if row[0].startswith(kind)]
    sizes = [len(samples) for _, samples in rows]
    figure = pyplot.figure(figsize=(8, sum(sizes) / 4 + len(sizes) / 2), layout="constrained")
    axes = figure.subplots(len(rows), squeeze=False, height_ratios=sizes)[:, 0]
    colors = {OURS: "#2f81f7"} | dict.fromkeys((FLOOR, DURABLE, PLAIN), "#d4a72c")
    for axis, (what, samples) in zip(axes, rows, strict=True):
        bars = dict(
            sorted(((name, median(samples[name])) for name in samples), key=lambda bar: -bar[1])
        )
        labels = [text(what, [value]) for value in bars.values()]
        title = f"Waiting: {what.partition(' -> ')[0]} (less is better)"
        if what.startswith("surviving"):
            title, bars = f"Tasks a second, {what}", {name: 1 / bars[name] for name in bars}
            labels = [f"{value:,.0f}" for value in bars.values()]
        color = [colors.get(name, "#a5adb6") for name in bars]
        axis.bar_label(axis.barh([*bars], [*bars.values()], color=color), labels, padding=5)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axis.set(xticks=[], xlim=(0, 1.25 * max(bars.values())), ylim=(-0.5, len(bars) - 0.4))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.supxlabel(f"{about}\n* loses a task if its worker is killed", fontsize=8)
    figure.savefig(path, dpi=150, transparent=True, bbox_inches="tight", pad_inches=0.15)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--dir", default=tempfile.gettempdir(), help="where to measure (%(default)s)")
    add("--full", type=float, nargs="?", const=1.0, metavar="SHARE", help="what must not grow")
    add("--peers", action="store_true", help="other queues that are installed")
    add("--picture", type=Path, metavar="FILE", help="draw peers and waiting; needs matplotlib")
    options = parser.parse_args()
    parts = [one, workers, durable, waiting] if hasattr(os, "fork") else [one]
    parts += [grown] if options.full else []
    parts += [peers] if options.peers or options.picture else []
    kind = subprocess.getoutput(f"df --output=fstype '{options.dir}' 2>{os.devnull}").split()[-1:]
    if kind == ["ext4"] and not list(Path("/proc/fs/jbd2").glob("*")):
        kind += ["without a journal (slow for minutes after many files were deleted)"]
    about = f"{' '.join(kind)}, Python {sys.version.split()[0]}, {os.cpu_count()} cores"
    print(f"femtoqueue {femtoqueue.__version__}, {options.dir}: {about}, 100-byte payloads")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so remove everything
    rows = []
    with tempfile.TemporaryDirectory(prefix="femtoqueue-benchmark-", dir=options.dir) as directory:
        for part in parts:
            print(f"\n{part.__doc__}", flush=True)
            place = Path(directory, part.__name__)
            place.mkdir()
            for row in part(place, options.full or 1.0):
                rows.append(row)
                show(row)
            shutil.rmtree(place)
    if options.picture:
        draw(rows, about, options.picture)


if __name__ == "__main__":
    main()
