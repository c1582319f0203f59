# SPDX-License-Identifier: MIT
"""How fast femtoqueue is on this machine, beside bare system calls and beside other queues.

    python3 benchmark_mini.py                      ten seconds, nothing to install
    python3 benchmark_mini.py --dir /srv/queues    on another filesystem
    python3 benchmark_mini.py --full               what must not grow: minutes, and 6 GB on ext4
    python3 benchmark_mini.py --full 0.01          the same with a hundredth of the tasks and bytes

    pip install femtoqueue==0.4.2 persist-queue litequeue localqueue \\
        huey diskcache dirq pqueue matplotlib
    python3 benchmark_mini.py --peers --picture speed.png

The *floor* is a bare loop of the system calls that a queue of files needs: open, write, close, rename;
rename, open, read, close; rename. It keeps no order, checks nothing and survives nothing. *Plain files*
are the same steps, written as one writes Python.

Each figure stands beside others of the same run. They take turns, so a busy machine is busy for all.
Figures are medians, and a ratio is the median of the ratios of the turns.
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
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module, metadata
from itertools import chain, count, islice, repeat
from operator import sub, truediv
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
PEERS = ("original", "persist-queue", "litequeue", "localqueue", "huey", "diskcache", "dirq", "pqueue")

Row = tuple[str, dict[str, Sequence[float]]]  # "what -> what is to be reached"; samples, ours first
Rows = Iterator[Row]


# --- what is compared: each goes on when all tasks are pushed, all popped, all done -------------------


def queue(place: Path, filled: int = 0, **options: Any) -> FemtoQueue:
    q = FemtoQueue(place, "bench", HOUR_US // 1_000, **options)
    for _ in range(filled):
        q.push(PAYLOAD)
    return q


def through(number: int, q: Any) -> Iterator[None]:
    """A queue, or its push, pop and done."""
    push, pop, done = q if isinstance(q, tuple) else (q.push, q.pop, q.done)
    for _ in range(number):
        push(PAYLOAD)
    yield
    popped = [pop() for _ in range(number)]
    if None in popped:
        raise SystemExit("a queue gave back fewer tasks than it was given")
    yield
    for task in popped:
        done(task)
    yield


def files(number: int, place: Path, how: str = FLOOR) -> Iterator[None]:
    """The floor is the system calls with nothing around them; a durable one syncs."""
    paths = [f"{place}/{state}/" for state in ("creating", "pending", "in_progress", "done")]
    creating, pending, claimed, finished = paths
    for path in paths:
        os.makedirs(path, exist_ok=True)
    to_sync = [os.open(path, os.O_RDONLY) for path in paths[1:] if how == DURABLE]
    names = [next(NAMES) for _ in range(number)]
    for name in names:
        if how == PLAIN:
            Path(creating, name).write_bytes(PAYLOAD)
        else:
            file = os.open(creating + name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(file, PAYLOAD)
            if to_sync:
                os.fsync(file)
            os.close(file)
        os.rename(creating + name, pending + name)
        if to_sync:
            os.fsync(to_sync[0])
    yield
    for name in names:
        os.rename(pending + name, claimed + name)
        if how == PLAIN:
            Path(claimed, name).read_bytes()
        else:
            file = os.open(claimed + name, os.O_RDONLY)
            os.read(file, 200)
            os.close(file)
    yield
    for name in names:
        os.rename(claimed + name, finished + name)
        for directory in to_sync[1:]:
            os.fsync(directory)
    yield
    for directory in to_sync:
        os.close(directory)


def peer(name: str, place: str, durable: bool = False) -> Any:
    """Another queue, used as its README says. ImportError tells why it is left out."""
    if durable and name in ("original", "dirq", "pqueue"):  # the original syncs before it writes
        raise ImportError("a power cut takes what it wrote")
    level = "FULL" if durable else "NORMAL"  # of SQLite: a power cut takes nothing, or the last seconds
    os.makedirs(place)
    match name:
        case "original":
            found = [d for d in metadata.distributions(name="femtoqueue") if d.version == "0.4.2"]
            if not found:
                raise ImportError("pip install femtoqueue==0.4.2")
            path = str(found[0].locate_file("femtoqueue.py"))
            return runpy.run_path(path, run_name=name)["FemtoQueue"](place, "bench")
        case "persist-queue":
            q = import_module("persistqueue").SQLiteAckQueue(place)
            q._putter.execute(f"PRAGMA synchronous = {level}")  # there is no option
            return q.put, partial(q.get, block=False, raw=True), q.ack
        case "litequeue":
            q = import_module(name).LiteQueue(f"{place}/queue.db")
            q.conn.execute(f"PRAGMA synchronous = {level}")
            return lambda data: q.put(data.decode()), q.pop, lambda task: q.done(task.message_id)
        case "localqueue":
            mode = import_module(name).DurabilityMode("durable" if durable else "relaxed")
            q = import_module(name).SimpleQueue(place, durability=mode)
            return lambda data: q.put(data.decode()), partial(q.get, block=False), q.ack
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


def timed(call: Callable[..., object], *arguments: object) -> list[float]:
    start = time.perf_counter()
    call(*arguments)
    return [time.perf_counter() - start]


def memory(call: Callable[..., object], *arguments: object) -> list[float]:
    """Bytes that Python held at most."""
    tracemalloc.start()
    call(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return [peak]


def load(number: int, steps: Callable[..., Iterator[None]], *arguments: Any) -> list[float]:
    """Seconds per task of push, pop, done, and of all three."""
    turn = steps(number, *arguments)
    times = [timed(next, turn)[0] / number for _ in range(3)]
    return [*times, sum(times)]


def by_turns(
    call: Callable[..., Any], who: dict[str, Any], seconds: float, *whats: str, least: int = 4
) -> Rows:
    """A row for each figure that the call returns. All take turns; the first is a warm-up."""
    turns: dict[str, list[list[float]]] = {name: [] for name in who}
    order, end = [*who], time.perf_counter() + seconds
    gc.freeze()  # what the benchmark itself has loaded is nobody's burden
    while len(turns[order[0]]) < least or time.perf_counter() < end:
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


def drain(tasks: Iterator[Any]) -> list[float]:
    """When it began, and when each came to an end."""
    return [time.perf_counter(), *(time.perf_counter() for _ in tasks)]


def wait(q: Any, polls: bool, number: int = 0) -> list[float]:
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


# --- the ten seconds ----------------------------------------------------------------------------------


def one(place: Path, share: float) -> Rows:
    """One process"""
    who: dict[str, Any] = {OURS: (through, queue(place / OURS, 1_000))}
    who |= {how: (files, place / how, how) for how in (FLOOR, PLAIN)}
    return by_turns(
        partial(load, 1_000), who, 1.5, *STEPS[:3], f"{STEPS[3]} -> 1.10 x, on tmpfs 1.20 x"
    )


def workers(place: Path, share: float) -> Rows:
    """Many workers; those of the floor share no files"""

    def drained(steps: Callable[..., Iterator[None]], of: Any, works: list[Any]) -> list[float]:
        shares = [steps(500, of) for _ in range(8)]
        for share in shares:
            next(share)
        times = together(*(partial(drain, each) for each in works or shares))
        return [(max(map(max, times)) - min(map(min, times))) / 4_000]

    q = queue(place / OURS)
    who = {OURS: (through, q, [map(q.done, iter(q.pop, None))] * 8), FLOOR: (files, place / FLOOR, [])}
    return by_turns(drained, who, 2, "pop + done by 8 processes -> 1.18 x, on tmpfs 1.54 x")


def durable(place: Path, share: float) -> Rows:
    """Durable; the floor is write + fsync + rename + fsync"""
    q, many = (queue(place / name, 20, sync_after_write=True) for name in (OURS, "many"))
    who: dict[str, Any] = {OURS: (through, q), DURABLE: (files, place / DURABLE, DURABLE)}
    yield from by_turns(partial(load, 20), who, 1, "push -> 1.10 x", *STEPS[1:])
    fifty = partial(queue, place / "fifty", 50, sync_after_write=True)
    who = {OURS: (1_000, many.push_many, [PAYLOAD] * 1_000), "push": (50, fifty)}
    each = "push_many(1000), each -> 0.25 x"
    yield from by_turns(lambda number, *call: [timed(*call)[0] / number], who, 0, each)


def waiting(place: Path, share: float) -> Rows:
    """Waiting, beside a loop that looks every 10 ms"""
    who = [(queue(place / name), name == LOOP) for name in (OURS, LOOP)]

    def push_often(q: FemtoQueue, later: bool) -> None:
        time.sleep(2.5 + 0.006 * later)
        for number in range(40):
            time.sleep(0.012 + number % 17 / 2_000)  # out of step with who polls
            q.push(b"%r" % time.perf_counter())

    waits = [partial(wait, *each, 40) for each in who]
    own, loop, *_ = together(*waits, *(partial(push_often, *each) for each in who))
    yield "idle worker -> 0.05 %", {OURS: own[:1], LOOP: loop[:1]}
    yield "wake-up, from push to end of pop -> 0.5 ms", {OURS: own[1:], LOOP: loop[1:]}


def peers(place: Path, share: float) -> Rows:
    """Push + pop + done, with other queues (* a task is lost if its worker is killed)"""
    for survives, number, floors in (
        ("killed processes", 200, (FLOOR, PLAIN)),
        ("power cuts", 20, (DURABLE,)),
    ):
        at, synced = place / survives, DURABLE in floors
        who: dict[str, Any] = {OURS: (through, queue(at / OURS, number, sync_after_write=synced))}
        who |= {how: (files, at / how, how) for how in floors}
        for name in PEERS:
            try:
                version = "0.4.2" if name == "original" else metadata.version(name)
                other = peer(name, f"{at}/{name}", synced)
            except ImportError as error:
                print(f"  without {name}: {error}")
                continue
            next(through(number, other))
            label = f"{name} {version}{' *' if name in ('huey', 'diskcache') else ''}"
            who[label] = through, other
        *_, row = by_turns(partial(load, number), who, 15, *STEPS[:3], f"surviving {survives}")
        yield row


# --- what must not grow: --full -----------------------------------------------------------------------


def grown(place: Path, share: float) -> Rows:
    """Up to 1,000,000 pending, 100,000 scheduled, 200,000 done, and a thousandth of it"""
    due_us, parts = time.time_ns() // 1_000 + HOUR_US, {OURS: share, "a thousandth": 0.001}
    who = {name: queue(place / name) for name in parts}

    def grow(pending: int, scheduled: int, done: int) -> None:
        for name, q in who.items():
            load(max(1, int(done * parts[name])), through, q)
            next(through(int(pending * parts[name]), q))
            for _ in range(max(50, int(scheduled * parts[name]))):
                q.schedule(PAYLOAD, due_us)
        os.sync()  # or the disk is still busy with it

    def first_pop(place: Path) -> list[float]:
        with queue(place) as first, queue(place) as second:
            return timed(first.pop) + memory(second.pop)

    grow(100_000, 16_000, 200_000)
    for state, size in (("pending", "100,000"), ("scheduled", "16,000")):
        for call in ("status", "cancel"):
            ids = {name: [*islice(q.ids(state), 40)] for name, q in who.items()}
            calls = {name: (next, map(getattr(q, call), ids[name])) for name, q in who.items()}
            yield from by_turns(timed, calls, 0, f"{call}(id), {size} {state} -> 1 ms", least=40)
    counts = {name: (q.counts,) for name, q in who.items()}
    yield from by_turns(memory, counts, 0, "memory of counts(), 200,000 done -> 1 MB")
    grow(900_000, 84_000, 0)
    whats = "first pop -> 5 ms", "memory of first pop -> 2 MB"
    yield from by_turns(first_pop, {name: (place / name,) for name in who}, 0, *whats)
    loads, whats = {name: (through, q) for name, q in who.items()}, ("push -> 1.05 x", "pop -> 1.05 x")
    yield from by_turns(partial(load, 1_000), loads, 5, *whats, *STEPS[2:])
    q, new = queue(place / OURS, keep_done=False), queue(place / "new")
    drain(map(q.done, iter(q.pop, None)))
    time.sleep(2.1)  # directories that were just in use are not removed yet
    yield from by_turns(timed, {OURS: (q.pop,), "new": (new.pop,)}, 1, "pop once drained -> 40 us")

    def drain_later() -> list[float]:
        now = time.time
        time.time = lambda: now() + HOUR_US / 1e6
        return drain(map(q.done, iter(q.pop, None)))

    [times] = together(drain_later)
    pops = sorted(map(sub, times[1:], times))
    yield "longest pop + done when all are due -> 100 ms", {OURS: pops[-1:], "median": [median(pops)]}


def crowd(place: Path, share: float) -> Rows:
    """Many processes"""
    q, alone = queue(place / "busy", 40), queue(place / "alone")

    def look() -> list[Row]:
        time.sleep(1)
        pops = {OURS: (q.pop,), "alone": (alone.pop,)}
        return [*by_turns(timed, pops, 1, "empty pop beside 40 busy -> 100 us")]

    def hold() -> bool:
        task = q.pop()
        time.sleep(4)
        return task is not None

    rows, *held = together(look, *[hold] * 40)
    if not all(held):
        raise SystemExit("not everybody got a task")
    yield from rows
    waits = [together(*[partial(wait, alone, polls)] * 50) for polls in (False, True)]
    own, loop = ([sum(share for share, _ in each)] for each in waits)
    yield "idle: 50 processes -> 2.5 %", {OURS: own, LOOP: loop}


def rest(place: Path, share: float) -> Rows:
    """A full queue, a large payload, starting"""
    size, source = int(20_000 * share), place / "source"
    full, free = (queue(place / str(most), size - 1, maxsize=most) for most in (size, 0))
    who: dict[str, Any] = {OURS: (through, full), "no limit": (through, free)}
    yield next(by_turns(partial(load, 1), who, 1, "push, 1 place free of 20,000 -> 3 x"))
    q = queue(place / "large", keep_done=False)
    source.touch()
    os.truncate(source, int(2**30 * share))

    def large() -> None:
        q.push_file(source)
        if task := q.pop():
            shutil.copyfile(task.path, os.devnull)
            q.done(task)

    who = {OURS: (large,), "copy": (shutil.copyfile, source, place / "copy")}
    yield from by_turns(memory, who, 0, "memory of 1 GiB by push_file, path -> 32 MB", least=2)
    code = f"import sys; sys.path.insert(0, {os.path.dirname(femtoqueue.__file__)!r})"
    start, without = ([sys.executable, "-Ic", code + more] for more in ("; import femtoqueue", ""))
    who = {OURS: (subprocess.run, start), "without": (subprocess.run, without)}
    yield from by_turns(timed, who, 2, "Python with import femtoqueue -> 5 ms more")


def text(what: str, samples: Sequence[float]) -> str:
    value, units = median(samples), [(1.0, "s"), (1e-3, "ms"), (1e-6, "us")]
    if what.startswith(("memory", "idle")):
        units = [(1e6, "MB"), (1e3, "kB")] if what.startswith("memory") else [(0.01, "% of a core")]
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
    for axis, (what, samples) in zip(axes, rows, strict=True):
        bars = {
            name: median(samples[name]) for name in sorted(samples, key=lambda n: -median(samples[n]))
        }
        labels = [text(what, [value]) for value in bars.values()]
        title = f"Waiting: {what.partition(' -> ')[0]} (less is better)"
        if what.startswith("surviving"):
            title, bars = f"Tasks a second, {what}", {name: 1 / bars[name] for name in bars}
            labels = [f"{value:,.0f}" for value in bars.values()]
        colors = {OURS: "#2f81f7", FLOOR: "#d4a72c", DURABLE: "#d4a72c", PLAIN: "#d4a72c"}
        drawn = axis.barh(
            [*bars], [*bars.values()], color=[colors.get(name, "#a5adb6") for name in bars]
        )
        axis.bar_label(drawn, labels, padding=5)
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
    parts += [grown, crowd, rest] if options.full else []
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
