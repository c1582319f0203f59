# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the femtoqueue authors
"""A durable task queue in one file and one directory, for many threads, processes and crashes.

    from femtoqueue import FemtoQueue

    q = FemtoQueue("my_queue", node_id="worker-1")
    q.push(b"hello")
    while task := q.pop():
        print(task.data)
        q.done(task)

A task is one file that holds exactly its payload. Its state is the directory it lies in. Every change
of state is one atomic rename, so a crash leaves a task either here or there, never in between:

                 schedule                  push
                    |                       |
                    v          due          v      pop                        done
                scheduled -------------> pending -------> in_progress -------------> done
                    ^                       ^                | | | |         fail
                    |   retry with a delay  |  retry, crash, | | | +---------------> failed
                    +-----------------------|----------------+ | |    bad checksum
                                            |  lease expired   | +-----------------> corrupt
                                            +------------------+
    data_dir/
      layout                                         the version of this layout, in plain text
      clock-<boot>                                   the queue clock of one boot of one machine
      creating/<owner>~<id>                          being written, not seen by others
      pending/<bucket>/<id>[~n[~<place_us>]]         waiting; n deliveries are used up
      scheduled/<bucket>/<id>~n~<due_us>             waiting for the wall clock
      in_progress/<owner>/<id>~n~<deadline_us>[~<since_us>]   claimed, until the deadline at least
      done/<id>   failed/<id>   corrupt/<id>         failed/<id>~reason says why

    id      <time_us>_<node_id>_<nonce>.<crc32>      16 digits, producer, 18 and 8 hex digits
    bucket  <time_us>[.<token>]                      nothing in that directory is older
    owner   <node_id>~<pid>~<start>~<place>~<token>  one FemtoQueue object in one process

An id never changes. `pending/` is in the order of the tasks' places: a place is the time in the id,
unless the name carries another one. A regular file that is renamed into pending/ under a name of 16
digits, "_" and more is a task as well: so a shell script pushes. All else is left alone.

The queue clock gives places and leases. It never goes backwards on one machine, and all processes of
one boot share it. Due times are wall-clock times.

What is promised: a task is delivered at least once, until `done`, `fail`, `cancel` or `purge` returned,
and never after that. It has one claimant at a time. A worker that dies has its tasks given to another:
within a second if its process is seen to be gone, and when the lease of `timeout_stale_ms` runs out in
any case. A live worker within its lease is never robbed. Order is first in, first out. With
`sync_after_write`, what returned survives a power cut.

What is not: exactly-once effects (a worker can die between its work and its `done`), and, between
machines, an order that is better than their clocks.

`FemtoQueue.run(handler)` is a worker's loop; `python femtoqueue.py DIR COMMAND` serves a shell. What is
done unasked is logged to the logger "femtoqueue".

To read on: FemtoQueue is the face. Behind it, _Producer writes tasks, _Buckets says into which
directory; _Consumer claims the oldest of a _Listing; _Claims gives the verdict; _Keeper brings back
what is due or abandoned; _Worker is the loop; _Looking finds, counts and deletes; _Waiting
sleeps until something changes. All stand on _Place, the directory, with its _Clock, its _Owner, and
_Changes, which makes durable. Below is what knows nothing of queues: who is alive, names,
payloads, the filesystem, arguments. The command line is last.
"""

from __future__ import annotations

import _thread
import errno
import itertools
import os
import stat
import sys
import time
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing costs more to import than all the rest
    import argparse
    import datetime
    import threading
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from typing import Any, BinaryIO, TypeVar

    Handler = Callable[["FemtoTask"], object]
    Reader = Callable[[str], Collection[str]]  # the names in a directory
    _OwnerName = tuple[str, int, str, str, str]  # node_id, PID, start time, place and token
    T = TypeVar("T")

__all__ = ["FemtoQueue", "FemtoQueueError", "FemtoTask", "NotInProgress", "STATES"]
__version__ = "1.0.0"

STATES = ("scheduled", "pending", "in_progress", "done", "failed", "corrupt")
_UNFINISHED = ("scheduled", "pending", "in_progress")
_FINISHED = ("done", "failed", "corrupt")
_LAYOUT = 1  # the version of what the docstring above draws

_MAX_US = 10**16  # times have 16 digits
_CLOCK_END_US = 7_258_118_400_000_000  # the year 2200: a stray name must not drag the clock along
_MAX_ATTEMPT = 10**9 - 1  # attempts have 9 digits at most
_MAX_ID = 199  # bytes: a claim, "~n~deadline~since" behind the id, must fit into NAME_MAX, 255
_HEX = "0123456789abcdef"
_FORBIDDEN = set('/~<>:"\\|?*' if os.name == "nt" else "/~")  # in ids and node_ids
_BUCKET_US = 10**9  # the period for which all producers share a bucket of pending/
_CLOSE_US = 10**7  # the shortest such period in scheduled/
_BUCKET_TASKS = 1_000
_BATCH = 1_000  # due, or abandoned, tasks that one look moves
_LOOK_US = 1_000_000  # between looks at all owners, and the longest sleep of a call that waits
_SWEEP_US = 60_000_000  # between sweeps
_AHEAD_US = 1_000_000  # a stamp that is further in the future is not just another machine's clock
_LINGER_S = 2  # how long an empty directory is kept that somebody may be about to use
_ORPHAN_S = 86_400  # how long the remains of an owner are kept who cannot be judged
_POLL_S = 0.009  # where nothing tells of changes: how long a call that waits sleeps at a time
_ROUNDS = 4  # how often a call tries again; each needs another worker to have come in between
_CHUNK = 1 << 20  # a larger payload is not kept in memory
_SMALL = 4_096  # read at once; a larger buffer costs a page fault, asking for the size a system call
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # not about the file that is named
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
# A FIFO or a link that carries a task's name must neither block the reader nor lead it elsewhere.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_READ_FLAGS = os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class FemtoQueueError(Exception):
    """Base class of the errors that are femtoqueue's own."""


class NotInProgress(FemtoQueueError):
    """The task is not this claim's any more: finished already, or its lease ran out and was taken."""


class FemtoTask:
    """One delivery of a task, as `pop` returns it. It can be pickled, and finished elsewhere.

    id         str: what `push` or `schedule` returned.
    attempt    int: which delivery this is; 1 is the first.
    path       str: the claimed file, for streaming. Valid until the task is finished or touched.
    queue      FemtoQueue: the one that `run` took it from; else None.
    """

    queue: FemtoQueue | None = None
    _bucket = ""  # the directory that it was claimed from
    _verdict = ""  # the state that the claim was moved to
    _finished = False  # and that is on disk, if it was asked for
    _since_us = 0  # when it was claimed, and when its lease ends, by the queue clock
    _deadline_us = _MAX_US
    _clock: _Clock | None = None

    def __init__(self, id: str, data: bytes | None, attempt: int = 1, path: str = "") -> None:
        self.id: str = id
        self.attempt: int = attempt
        self.path: str = path
        self._data = data

    @property
    def data(self) -> bytes:
        """The payload. One over 1 MiB is read each time: once finished, FileNotFoundError is raised."""
        if self._data is not None:
            return self._data
        for _ in range(_ROUNDS):
            try:
                with open(self.path, "rb") as file:
                    return file.read()
            except FileNotFoundError:  # its lease was renewed, and so its name
                entries = _scan(os.path.dirname(self.path))
                self.path = _find_claim(entries, self.id, self.attempt) or self.path
        raise _not_found(self.path)

    @property
    def lost(self) -> bool:
        """True once the lease is over, by the clock: another worker may have the task by now.

        In another process, which got the task pickled, this is known once `touch` was called there.
        """
        return not self._verdict and self._clock is not None and self._clock.now() > self._deadline_us

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in ("queue", "_clock")}

    def __repr__(self) -> str:
        return f"FemtoTask(id={self.id!r}, attempt={self.attempt})"


class FemtoQueue:
    """A queue in a directory. All objects on one directory, in whatever process, are one queue.

    data_dir           On one filesystem; made if it does not exist.
    node_id            Stable name of this worker's place, such as the host name; several processes of
                       one machine may share it. Give each machine or container its own: what it
                       claimed before is taken back when its name is opened elsewhere. Printable ASCII,
                       64 characters at most, no "/", no "~".
    timeout_stale_ms   The lease: a claimed task that was neither finished nor touched for so long is
                       given to another worker. Until then it is safe as long as its process lives.
    sync_after_write   Survive power cuts: what returned is on disk, with every directory entry to it.
    max_attempts       After so many deliveries a task that comes back goes to failed/. None: no limit.
    keep_done, keep_failed   Keep finished tasks in done/ and failed/, or delete them.
    maxsize            `push` raises `queue.Full` when so many tasks are pending. 0: no limit. Exact for
                       one producer that is alone. Of several each may exceed it by half of its room.

    Bad arguments raise TypeError or ValueError, before anything is written. A directory of a later
    layout, or of the original femtoqueue 0.3 or 0.4, raises FemtoQueueError. Any call may raise
    OSError: then it can be made again.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        node_id: str,
        timeout_stale_ms: float = 30_000,
        sync_after_write: bool = False,
        *,
        max_attempts: int | None = None,
        keep_done: bool = True,
        keep_failed: bool = True,
        maxsize: int = 0,
    ) -> None:
        root = _as_path("data_dir", data_dir)
        if not root or "\0" in root:
            raise ValueError(f"data_dir: {root!r} is no path; name a directory")
        _check_node_id(node_id)
        _check("timeout_stale_ms", timeout_stale_ms, "a number of milliseconds", 1e-3, 1e12)
        attempts = _MAX_ATTEMPT if max_attempts is None else max_attempts
        _check("max_attempts", attempts, "an int, or None", 1, _MAX_ATTEMPT)
        _check("maxsize", maxsize, "an int", 0)
        for name, flag in (("sync_after_write", sync_after_write), ("keep_done", keep_done)):
            _check(name, flag, "True or False")
        _check("keep_failed", keep_failed, "True or False")
        self.data_dir: str | os.PathLike[str] = data_dir
        self.node_id: str = node_id
        self.timeout_stale_ms: float = timeout_stale_ms
        self.sync_after_write: bool = bool(sync_after_write)
        self.max_attempts: int | None = max_attempts
        self.keep_done: bool = bool(keep_done)
        self.keep_failed: bool = bool(keep_failed)
        self.maxsize: int = maxsize
        self._root = os.path.abspath(root)  # the program may change its directory
        self._parts: dict[int, _Parts] = {}
        # What a forked child keeps: what my node_id had claimed elsewhere; "stopped", "closed".
        self._forfeited: set[str] = set()
        self._ends: set[str] = set()
        self._here().place.open()
        self._here().keeper.note_own_elsewhere()

    def _here(self) -> _Parts:
        """This process's parts, unless closed. A forked child has its own: it claims as itself."""
        parts = self._parts.get(os.getpid()) or self._own_parts()
        if self._ends:
            parts.owner.check_open()
        return parts

    def _own_parts(self) -> _Parts:
        pid = os.getpid()
        if pid not in self._parts:  # setdefault: the same for all threads
            self._parts.setdefault(pid, _Parts(self, self._root, self._ends, self._forfeited))
            for other in set(self._parts) - {pid}:
                self._parts.pop(other, None)
        return self._parts[pid]

    def __del__(self) -> None:
        for parts in getattr(self, "_parts", {}).values():
            parts.owner.depart()

    def __repr__(self) -> str:
        return f"FemtoQueue({self._root!r}, node_id={self.node_id!r})"

    def __getstate__(self) -> dict[str, object]:
        # In another process it is another owner: only what it was made with goes along.
        arguments = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**arguments, "data_dir": self._root}

    def __setstate__(self, arguments: dict[str, object]) -> None:
        self.__init__(**arguments)  # type: ignore[misc]

    # --- in ---------------------------------------------------------------------------------------

    def push(self, data: bytes | bytearray | memoryview) -> str:
        """Add a task at the end of the queue; return its id, which stays whatever becomes of the task.

        Raises TypeError if `data` is not bytes-like (encode a str yourself), and `queue.Full` if
        `maxsize` tasks are pending.
        """
        return self._here().producer.add((_as_bytes(data),))

    def push_many(self, items: Iterable[bytes | bytearray | memoryview]) -> list[str]:
        """Push all `items`, in order, and return their ids.

        With `sync_after_write` the whole batch becomes durable together, at a fraction of the price.
        If this raises, those that were pushed are the first ones of `items`, perhaps none.
        """
        if isinstance(items, (bytes, bytearray, memoryview, str)) or not hasattr(items, "__iter__"):
            raise TypeError(f"items: expected several payloads, got {type(items).__name__}; use push()")
        producer = self._here().producer
        if self.sync_after_write:
            return producer.add_together(map(_as_bytes, items))
        return [producer.add((_as_bytes(item),)) for item in items]

    def push_file(self, path: str | os.PathLike[str] | BinaryIO, *, move: bool = False) -> str:
        """Push the content, of any size, of a regular file that nobody writes to any more.

        An open binary file is read to its end. `move` takes the file itself: it is renamed where it
        lies on the same filesystem as the queue, copied and then deleted elsewhere. Until this returns,
        it is where it was, or it is a task. Raises ValueError if `path` is not a regular file, and
        `queue.Full` like `push`.
        """
        return self._here().producer.add_file(path, move)

    def schedule(self, data: bytes | bytearray | memoryview, time_us: int | datetime.datetime) -> str:
        """Add a task that becomes pending at a wall-clock time, behind all that is pending then.

        `time_us` is in microseconds since the epoch, such as `time.time_ns() // 1000 + 60_000_000`, or
        an aware datetime. A time in the past is due at once. Raises ValueError for a naive datetime,
        and for a number that can only be seconds, milliseconds or nanoseconds.
        """
        due_us = _as_due_us(time_us)
        return self._here().producer.add((_as_bytes(data),), due_us)

    # --- through ----------------------------------------------------------------------------------

    def pop(self, timeout: float | None = 0.0) -> FemtoTask | None:
        """Claim the oldest pending task, for the lease of `timeout_stale_ms`.

        Finish it with `done`, `fail` or `retry`. Due tasks become pending first. So do those of dead or
        hung workers: at the first `pop` of an object, and then within a second. Returns None only after
        `timeout` seconds, where None waits for ever, and never while a task is pending or due; but
        `stop` ends the wait.
        """
        parts = self._here()
        if timeout == 0:
            return parts.consumer.look()
        with _Waiting(parts.place.waiting) as waiting:
            found = _wait_for_task([parts], _end_us(timeout), parts.place.is_stopped, waiting)
            if found:
                waiting.close(in_place=False)
            return found[1] if found else None

    def done(self, task: FemtoTask) -> None:
        """Finish `task`: to done/, or deleted if `keep_done` is off. It is never delivered again.

        Raises NotInProgress if the claim was lost, and ValueError for a task of another queue.
        """
        self._here().claims.finish(task, "done")

    def fail(self, task: FemtoTask, reason: str | None = None) -> None:
        """Give `task` up: to failed/, or deleted if `keep_failed` is off. Raises like `done`.

        The reason is kept as text beside it, until it is requeued or purged: see `reason`.
        """
        _check("reason", "" if reason is None else reason, "str, or None")
        self._here().claims.finish(task, "failed", reason)

    def retry(self, task: FemtoTask, delay_ms: float = 0) -> None:
        """Have `task` delivered again, now at its old place or after a delay, which survives restarts.

        Once `max_attempts` deliveries are used up it fails instead. Raises like `done`.
        """
        _check("delay_ms", delay_ms, "a number of milliseconds", 0, 1e12)
        self._here().claims.retry(task, int(delay_ms * 1_000))

    def touch(self, task: FemtoTask) -> None:
        """Begin a new full lease for `task`. Raises like `done`."""
        self._here().claims.touch(task)

    def run(
        self, handler: Handler, *, until_empty: bool = False, also: Iterable[FemtoQueue] = ()
    ) -> int:
        """Hand task after task to `handler`: what a worker's main program usually is.

        When it returns, the task is done; it may also finish the task itself. When it raises or exits,
        that is logged and the task comes back after about 1, 2, 4, ... seconds, about an
        hour at most, until `max_attempts` are used up. Then it fails; the traceback is its reason.
        While the handler runs, the lease is renewed; `task.lost` tells if it was lost all the same.
        What it returns is ignored, but a coroutine or generator raises TypeError: it would never run.

        `also` names queues to look into, in this order, when this one has no task. `until_empty` ends
        the loop when nothing is pending or due, instead of waiting for more.

        In the main thread, SIGTERM, SIGINT, SIGHUP and SIGQUIT wait for the task in hand. Then the loop
        ends and the signal does what it would have done without `run`: it calls the program's own
        handler, or ends the program. A second signal gives the task back at once. What was ignored
        before stays ignored. `stop` ends the loop from anywhere.

        Returns how many tasks were handled without an exception and without losing the lease. An
        OSError is raised when `until_empty` is set or a task cannot be finished; else it is logged,
        and the worker tries again.
        """
        if not callable(handler):
            raise TypeError(f"handler: expected a callable, got {type(handler).__name__}")
        queues = [self, *(also if hasattr(also, "__iter__") else [also])]
        for queue in queues:
            if not isinstance(queue, FemtoQueue):
                raise TypeError(f"also: expected FemtoQueue objects, got {type(queue).__name__}")
        return _Worker(handler, {queue._here(): queue for queue in queues}).run(until_empty)

    def stop(self) -> None:
        """End every `run` and every waiting call of this object, after the task in hand.

        Those begun later end at once; all else still works. For any thread, and for signal handlers.
        """
        self._here().place.stop()

    # --- looking ----------------------------------------------------------------------------------

    def status(self, id: str) -> str | None:
        """The state of a task, one of `STATES`, or None: true at some moment during the call."""
        return next((state for state, _ in self._here().looking.find(id, STATES)), None)

    def counts(self, *states: str) -> dict[str, int]:
        """How many tasks each state holds, or each of the given `states`, as far as this user may read.

        Not one moment's picture: a task that moves meanwhile is counted twice, or not at all; so is one
        on a distributed filesystem that lists a name twice.
        """
        looking = self._here().looking
        names = [_check_state(state, STATES) for state in states] or STATES
        return {state: sum(1 for _ in looking.walk(state)) for state in names}

    def ids(self, state: str) -> Iterator[str]:
        """The ids of all tasks in `state`, oldest first, or in the order in which they are due.

        None is left out that is in this state all the while. Lazy where it matters: of pending/, one
        bucket at a time is in memory.
        """
        return self._here().looking.ids(_check_state(state, STATES))

    def claims(self) -> list[dict[str, Any]]:
        """Who works on what: for each claim `id`, `attempt`, the owner's `node_id` and `pid`, if that
        process is `alive` ("yes", "no" or "unknown" from here), how long ago it was claimed, `since_s`,
        and `lease_left_s`, both in seconds.
        """
        return self._here().looking.claims()

    def reason(self, id: str) -> str | None:
        """Why a task failed, as `fail` or `run` noted it; None if that is not known."""
        return self._here().looking.reason(id)

    # --- housekeeping -----------------------------------------------------------------------------

    def cancel(self, id: str) -> bool:
        """Drop a pending or scheduled task; False if there is none of this id to drop."""
        return self._here().looking.cancel(id)

    def requeue(self, id: str) -> bool:
        """Make a failed, corrupt or done task pending again, at its old place, with no attempt used.

        A scheduled one is made pending now, its attempts kept. False if there is none of this id. A
        corrupt one must have been repaired, or is corrupt again.
        """
        return self._here().keeper.requeue(id)

    def purge(self, state: str, older_than_s: float) -> int:
        """Delete the tasks that have been in `state` for so many seconds; return how many.

        Not those in progress. By the file's change time, which a rename sets, but `chown` sets it too.
        """
        looking = self._here().looking
        _check_state(state, [state for state in STATES if state != "in_progress"])
        _check("older_than_s", older_than_s, "a number of seconds", 0)
        return looking.purge(state, older_than_s)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until nothing is pending, in progress or scheduled; False upon `timeout` or `stop`.

        True only if there was such a moment. It only watches: others must be working.
        """
        return self._here().looking.wait_until_empty(_end_us(timeout))

    def close(self) -> None:
        """Give back what was claimed and not finished. Other calls raise FemtoQueueError then.

        Ends this object's `run` first, and waits for it; called by its handler, it raises
        FemtoQueueError (use `stop`).
        """
        parts = self._own_parts()
        parts.place.stop_and_wait()
        parts.owner.close()
        parts.keeper.give_back_own()  # or somebody else will, should this raise

    def __enter__(self) -> FemtoQueue:
        self._here()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Parts:
    """The parts behind one FemtoQueue object in one process. A forked child makes its own."""

    def __init__(self, queue: FemtoQueue, root: str, ends: set[str], forfeited: set[str]) -> None:
        self.place = place = _Place(queue, root, ends)
        self.owner = place.owner
        buckets = _Buckets(place, "pending"), _Buckets(place, "scheduled")
        self.looking = _Looking(place)
        self.keeper = _Keeper(place, self.looking, buckets, forfeited)
        self.producer = _Producer(place, self.looking, buckets)
        self.consumer = _Consumer(place, self.keeper, buckets[0])
        self.claims = _Claims(place, self.looking, buckets)


# --- in: how does a payload become a task? ------------------------------------------------------------


class _Producer:
    """How does a payload become a task? Written where nobody reads, then renamed when it is whole."""

    def __init__(self, place: _Place, looking: _Looking, buckets: tuple[_Buckets, _Buckets]) -> None:
        self._place = place
        self._looking = looking
        self._pending, self._scheduled = buckets
        self._room = _Room(place, looking)
        # Unique, and it orders what is scheduled for one microsecond: stamps differ anyway.
        self._nonce = itertools.count(int.from_bytes(os.urandom(9), "big") >> 1)

    def add(self, chunks: Iterable[bytes], due_us: int | None = None) -> str:
        """Write a task and publish it: as pending, or as scheduled if it has a due time."""
        if due_us is None and self._place.maxsize:
            with self._room:
                return self._add(chunks, None)
        return self._add(chunks, due_us)

    def _add(self, chunks: Iterable[bytes], due_us: int | None) -> str:
        place = self._place
        time_us = place.clock.stamp()
        if due_us is not None:
            time_us = max(time_us, due_us)  # the id of a scheduled task has its due time
        stem = self._new_stem(time_us)
        draft = place.owner.draft + stem
        try:
            id = "%s.%08x" % (stem, place.write(draft, chunks))
            if due_us is None:
                moved = self._pending.publish(draft, time_us, id)
            else:
                moved = self._scheduled.publish(draft, due_us, _format(id, 0, due_us))
            if not moved:
                self._check_published(draft, id)
        except BaseException:
            _try(_unlink, draft)
            raise
        return id

    def _new_stem(self, time_us: int) -> str:
        """An id but for its checksum."""
        return "%016d_%s_%018x" % (time_us, self._place.owner.node_id, next(self._nonce))

    def _check_published(self, draft: str, id: str) -> None:
        """A draft that is gone was published: it can go nowhere else, but for somebody who deletes it.

        The answer to the rename was lost on a network, and another machine has the task, or has even
        finished it. Where no other machine takes part, a task that is nowhere was deleted.
        """
        self._place.look_for_owners()
        if next(self._looking.find(id, STATES), None) is None and not self._place.has_hosts:
            raise _not_found(draft)

    def add_together(self, items: Iterable[bytes]) -> list[str]:
        """Write all, sync all, publish all in order, sync again. Or withdraw what no worker has."""
        place = self._place
        drafts: list[tuple[str, int, str]] = []  # path, time, id
        added: list[str] = []
        open_files: list[int] = []
        taken = 0
        try:
            for data in items:
                self._room.take()
                taken += 1
                time_us = place.clock.stamp()
                stem = self._new_stem(time_us)
                path = place.owner.draft + stem
                drafts.append((path, time_us, f"{stem}.{zlib.crc32(data):08x}"))
                open_files.append(place.create(path))
                _write_all(open_files[-1], data)
                if len(open_files) == 100:  # before descriptors run out; this empties the list
                    _sync_and_close(open_files)
            _sync_and_close(open_files)
            for path, time_us, id in drafts:
                bucket = self._pending.put(path, time_us, id)
                if bucket is None:
                    self._check_published(path, id)
                else:
                    added.append(f"{bucket}/{id}")
            place.sync()
        except BaseException as error:
            # The last one first: what a worker has already is a prefix.
            for path in (*reversed(added), *(path for path, _, _ in drafts)):
                _try(_unlink, path)
            _add_path(error, place.path["creating"])
            raise
        finally:
            for descriptor in open_files:
                _try(os.close, descriptor)
            self._room.arrived(taken)
        return [id for _, _, id in drafts]

    def add_file(self, file: object, move: bool) -> str:
        """Push a file that a caller named: its content, or itself; or what an open one has to say."""
        read: Callable[[int], bytes] | None = getattr(file, "read", None)
        if read:
            return self.add(iter(lambda: _as_bytes(read(_CHUNK)), b""))
        source = _as_path("path", file)
        try:
            if move:
                with self._room:
                    moved = self._add_by_rename(source)
                if moved:
                    return moved
            descriptor = _open_regular(source, _READ_FLAGS & ~_NO_FOLLOW)
            try:
                id = self.add(_chunks(descriptor))
            finally:
                _try(os.close, descriptor)
            if move:
                self._remove_source(source, id)
        except OSError as error:
            _add_path(error, source)
            raise
        return id

    def _add_by_rename(self, source: str) -> str | None:
        """Make the file itself a task; None if it lies on another filesystem."""
        if os.path.islink(source):
            raise ValueError(f"path: {source!r} is a symbolic link; move the file that it points to")
        # Windows only syncs what is open for writing, and renames nothing that is open.
        descriptor = _open_regular(source, _READ_FLAGS | (os.O_RDWR if os.name == "nt" else 0))
        try:
            crc = 0
            for chunk in _chunks(descriptor):
                crc = zlib.crc32(chunk, crc)
            if self._place.durable:
                os.fsync(descriptor)
            self._place.hand_over(descriptor)
        finally:
            _try(os.close, descriptor)
        time_us = self._place.clock.stamp()
        id = f"{self._new_stem(time_us)}.{crc:08x}"
        try:
            if not self._pending.publish(os.path.abspath(source), time_us, id):
                self._check_published(source, id)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return None
        return id

    def _remove_source(self, source: str, id: str) -> None:
        """Delete what was copied, or there would be both the task and the file."""
        try:
            _unlink(source)
        except OSError:
            if os.path.lexists(source):
                for _, path in self._looking.find(id, ("pending",)):
                    _try(_unlink, path)
                raise
        self._place.sync(os.path.dirname(os.path.abspath(source)))


class _Room:
    """May one more be pushed? Counts what is pending against `maxsize`."""

    def __init__(self, place: _Place, looking: _Looking) -> None:
        self._place = place
        self._looking = looking
        self._lock = _thread.RLock()  # reentrant, for signal handlers
        self._free = 0  # so many may come before it is counted again, beside those that we claim
        self._under_way = 0  # taken, but not published yet: the count does not see them

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *exception: object) -> None:
        self.arrived()

    def take(self) -> None:
        """Raise queue.Full if there is no room."""
        if not self._place.maxsize:
            return
        with self._lock:
            claimed = self._place.owner.claims - self._place.returns
            if self._free + claimed <= 0:
                free = self._place.maxsize - self._under_way - self._looking.count_pending()
                if free <= 0:
                    import queue

                    raise queue.Full(f"{self._place.maxsize} tasks are pending in {self._place.root}")
                self._free = (free + 1) // 2 - claimed  # the other half is for other producers
            self._free -= 1
            self._under_way += 1

    def arrived(self, count: int = 1) -> None:
        """What was taken is pending now, or failed."""
        with self._lock:
            self._under_way -= count


class _Bucket:
    """One directory that this object puts tasks into."""

    def __init__(self, path: str, start_us: int, is_own: bool) -> None:
        self.path = path
        self.start_us = start_us  # nothing in it is older
        self.is_own = is_own  # nobody else puts anything there
        self.left = _BUCKET_TASKS  # how many more we put here


class _Buckets:
    """Which directory of pending/, or of scheduled/, does a task go into? None of them becomes large.

    Everybody begins with the bucket of the current period, and goes on to own ones of 1,000 tasks.
    In scheduled/ a period is a tenth of the wait or shorter, but 10 s at least: once it has begun, all
    of its bucket is due soon.
    """

    def __init__(self, place: _Place, state: str) -> None:
        self._place = place
        self._top = place.path[state]
        self._pending = state == "pending"
        self._now = place.clock.now if self._pending else _wall_us
        self._in_hand: dict[tuple[int, int], _Bucket] = {}  # by period: made, and durable if need be

    def publish(self, source: str, time_us: int, name: str) -> bool:
        """Put a file there for good; if that fails, it is where it was, unless a worker has it."""
        bucket = self.put(source, time_us, name)
        if bucket and self._place.durable:
            try:
                self._place.sync()
            except BaseException:
                _try(_rename, f"{bucket}/{name}", source)
                raise
        return bucket is not None

    def put(self, source: str, time_us: int, name: str) -> str | None:
        """Rename a file into a bucket, and return that; None if the file is gone, and not there."""
        for _ in range(_ROUNDS):
            bucket = self._bucket_for(time_us)
            target = f"{bucket.path}/{name}"
            try:
                if _rename(source, target):
                    if self._place.durable:
                        old = os.path.dirname(source)
                        is_draft = old == self._place.path["creating"]  # no task, if it comes back
                        self._place.note(bucket.path, *(() if is_draft else (old,)))
                    return bucket.path
            except BaseException as error:
                _try(_rename, target, source)  # a signal handler may raise after the rename
                if isinstance(error, PermissionError) and not bucket.is_own:
                    bucket.left = 0  # another user's, who keeps it to himself
                    continue
                if not isinstance(error, OSError) or _holds(source):
                    raise
            if not _holds(source):
                # The answer to a rename that was done can be lost on a network: rename(2), BUGS.
                return bucket.path if _holds(target) else None
            # It was empty, and removed. We do not make it again: where two hosts remove and make one
            # directory at a time, GlusterFS ends in a split brain.
            bucket.left = 0
        raise _not_found(self._top)

    def _bucket_for(self, time_us: int) -> _Bucket:
        width_us = self.width(time_us)
        start_us = time_us - time_us % width_us
        bucket = self._in_hand.get((start_us, width_us))
        if bucket is None or bucket.start_us > time_us or bucket.left <= 0:
            # Nobody comes to the shared bucket of a past period, nor follows a link in its place.
            is_own = bucket is not None or self._now() >= start_us + width_us
            is_own = is_own or os.path.islink(f"{self._top}/{start_us:016d}")
            name = "%016d.%s" % (time_us, os.urandom(4).hex()) if is_own else "%016d" % start_us
            bucket = _Bucket(f"{self._top}/{name}", time_us if is_own else start_us, is_own)
            if len(self._in_hand) > 30:
                self._in_hand.clear()
            try:
                # First of all, or a power cut would take the directory away with what is in it.
                self._place.make(bucket.path)
            except (PermissionError, NotADirectoryError):
                if is_own:  # else `put` finds that it cannot be used
                    raise
            self._in_hand[start_us, width_us] = bucket
        bucket.left -= 1
        return bucket

    def width(self, time_us: int) -> int:
        """The length of the period for which all producers share a bucket."""
        if self._pending:
            return _BUCKET_US
        return int(max(_CLOSE_US, 10 ** (len(str(max(0, time_us - _wall_us()))) - 2)))

    def remove_empty(self, paths: Iterable[str]) -> None:
        """Remove buckets that no producer may be about to use."""
        shared_us = _BUCKET_US if self._pending else _CLOSE_US
        for path in paths:
            start_us, own = _time_of(os.path.basename(path)), len(path) > len(self._top) + 17
            if own or start_us % shared_us or self._now() >= start_us + shared_us:
                used_s = _modified(path)
                if used_s and abs(time.time() - used_s) > _LINGER_S:
                    _try(os.rmdir, path)


# --- through: which task is next, and is it mine? -----------------------------------------------------


# What a call claims, or tries to: the claim's path, and where the task was.
_Mine = dict[str, str]


class _Consumer:
    """Which task is next, and is it mine? Claims the oldest one that can be had."""

    def __init__(self, place: _Place, keeper: _Keeper, pending: _Buckets) -> None:
        self._place = place
        self._keeper = keeper
        self._pending = pending
        self._listing: _Listing | None = None
        self._undelivered: dict[str, str] = {}  # claims that may exist though `pop` did not return them
        self._misses = 0  # rises when another worker was quicker, falls with each claim

    def look(self) -> FemtoTask | None:
        """Claim the oldest task, or None. What was set aside is tried again at last, or raised."""
        place, listing = self._place, self._listing
        mine: _Mine = {}
        try:
            if listing and listing.returns == place.returns and not self._keeper.is_time():
                task = self._first_of(listing, {}, mine)
                if task is not None:
                    return task  # the usual case
            task = self._look_everywhere(mine)
            if task is None and place.troubles:
                place.troubles.clear()
                self._keeper.hurry()
                task = self._look_everywhere(mine)
                if task is None:
                    place.raise_trouble()
            return task
        except BaseException:  # out of a signal handler, it can come anywhere
            self._listing = None
            self._put_back(mine)
            raise

    def _look_everywhere(self, mine: _Mine) -> FemtoTask | None:
        """Claim the oldest task of a new listing, and of others until one has nothing new."""
        place = self._place
        place.owner.check_open()
        self._put_back({})
        place.clock.stamp()  # the first one chooses the clock, by which leases are judged
        if self._listing and self._listing.ahead:
            self._keeper.settle(self._listing.ahead)
        tried: dict[str, int] = {}
        known: Collection[str] = ()
        # Tasks move from scheduled/ to pending/: look for them in this order, or one is missed.
        self._keeper.bring_back()
        while True:
            self._listing = None  # should the next one fail, this one is not gone on with
            before = sum(tried.values())
            listing = _Listing(place, place.names, place.clock.stamp(), known)
            if task := self._first_of(listing, tried, mine):
                self._listing = listing  # only now: other threads must not empty it before
                return task
            self._pending.remove_empty(listing.empty)
            if listing.hidden or sum(tried.values()) > before:
                known = listing.hidden
            elif self._keeper.is_time() and self._keeper.bring_back():
                continue
            elif not self._put_back(mine):
                return None

    def _first_of(self, listing: _Listing, tried: dict[str, int], mine: _Mine) -> FemtoTask | None:
        """Claim the first task of a listing that can be had; None if there is none."""
        place = self._place
        while found := listing.next():
            name, directory = found
            # Network filesystems list what is gone. But what another worker could not read, and put
            # back, is worth a second try.
            if tried and tried.get(name, 0) > 1:
                continue
            if place.troubles and place.passes_over(f"{directory}/{name}"):
                continue
            try:
                if task := self._claim(name, directory, listing, mine):
                    return task
            except OSError as error:
                if self._is_everywhere(error):
                    raise
                place.set_aside(f"{directory}/{name}", error)
            tried[name] = tried.get(name, 0) + 1
        return None

    def _is_everywhere(self, error: OSError) -> bool:
        """Is it so with every task? No descriptors, or no room for a claim; not in corrupt/."""
        target = str(error.filename2 or error.filename)
        claiming = target.startswith(self._place.path["in_progress"])
        return error.errno in _SCARCE or (claiming and error.errno in _FULL)

    def _claim(self, name: str, directory: str, listing: _Listing, mine: _Mine) -> FemtoTask | None:
        """Make one pending task this object's; None if another was quicker, or it cannot be run."""
        place, source, parsed = self._place, f"{directory}/{name}", _parse(name)
        if parsed is None:
            return None
        id, used, _, _ = parsed
        if used >= place.max_attempts:
            _log("%s has used up its %s attempts", id, place.max_attempts)
            place.finish(source, "failed", id, f"used up {used} attempts")
            return None
        now_us = place.clock.stamp()  # unlike any other: the name of a claim tells whose it is
        deadline_us = now_us + place.lease_us
        path = f"{place.owner.directory}/{_format(id, used + 1, deadline_us)}"
        mine[path] = source
        try:
            if not place.owner.claim(source, path):
                self._note_miss(path, listing)
                return None
            # Before anybody syncs our own directory: the old side first, see _Changes.
            if place.durable:
                place.note_old(directory)
            if self._misses:
                self._misses -= 1
            task = FemtoTask(id, None, used + 1, path)
            task._bucket, task._clock = directory, place.clock
            task._since_us, task._deadline_us = now_us, deadline_us
            return task if self._read(task, mine) else None
        except BaseException as error:
            self._put_back(mine)
            # We were stopped for longer than the lease. Or, on Windows, another is just taking it.
            taken = (FileNotFoundError, PermissionError) if os.name == "nt" else FileNotFoundError
            if isinstance(error, taken) and not os.path.lexists(path):
                return None
            _add_path(error, path)
            raise

    def _put_back(self, mine: _Mine) -> bool:
        """Put back what was claimed and is not returned; tell if anything was.

        It could not be read; or the claim was done, and its answer was lost on a network. What cannot
        be put back now is tried again at the next look.
        """
        self._undelivered.update(mine)
        mine.clear()
        done = 0
        try:
            if self._undelivered:
                there = {entry.path for entry in self._place.entries(self._place.owner.directory)}
                for path, source in list(self._undelivered.items()):
                    if path in there:
                        if not _rename(path, source):  # its bucket was empty, and removed
                            name = os.path.basename(source)
                            self._pending.put(path, _time_of(_order(name)), name)
                        done += 1
                        self._place.returns += 1
                    self._undelivered.pop(path, None)
        except OSError:
            pass
        return done > 0

    def _note_miss(self, path: str, listing: _Listing) -> None:
        """Another worker was quicker: skip names if that may well happen again, for all try the same
        oldest one."""
        place, self._misses = self._place, min(self._misses + 1, 4)
        if self._misses > 1:  # one stale name is no contention yet
            if not place.has_company:
                place.look_for_owners()
            if place.has_company:
                listing.skip(1 + zlib.crc32(path.encode()) % 4 ** (self._misses - 1))

    def _has_finished_twin(self, descriptor: int, id: str) -> bool:
        """Does a claimed file lie in done/ or failed/ as well?

        Healing a distributed filesystem can leave a renamed file under both names. To rename it onto
        its other name then succeeds and does nothing: POSIX.
        """
        info = os.fstat(descriptor)
        others = (_lstat(f"{self._place.path[state]}/{id}") for state in ("done", "failed"))
        return info.st_nlink > 1 and any(other and os.path.samestat(other, info) for other in others)

    def _read(self, task: FemtoTask, mine: _Mine) -> bool:
        """Read and check a claimed file; False if it was broken or finished, and is out of the way."""
        place, id = self._place, task.id
        descriptor = os.open(task.path, _READ_FLAGS)
        try:
            if (task.attempt > 1 or place.has_hosts) and self._has_finished_twin(descriptor, id):
                _unlink(task.path)
                return False
            data = task._data = os.read(descriptor, _SMALL)
            is_right = id.endswith(".%08x" % zlib.crc32(data))
            if not is_right:  # there is more of it, or the name tells nothing
                task._data = _read_more(descriptor, data)
                chunks = _chunks(descriptor) if task._data is None else (task._data,)
                crc = 0
                for chunk in chunks:
                    crc = zlib.crc32(chunk, crc)
                    self._renew_if_half_over(task, mine)
                # A name that a shell script made has no checksum, and is taken as it is.
                is_right = id.endswith(".%08x" % crc) or not _is_own(id)
        finally:
            os.close(descriptor)
        if not is_right:
            _log("%s does not match its checksum; it is in corrupt/", id)
            place.finish(task.path, "corrupt", id)
            return False
        self._renew_if_half_over(task, mine)
        return True

    def _renew_if_half_over(self, task: FemtoTask, mine: _Mine) -> None:
        """Renew the lease then: the file is huge, or the machine slept."""
        if self._place.clock.now() > task._deadline_us - self._place.lease_us // 2:
            source = mine.pop(task.path, "")
            if not _renew(self._place, task, task.path):
                raise _not_found(task.path)  # it is another worker's by now
            mine[task.path] = source

    def directories(self) -> Iterator[str]:
        """Where a change may bring a task: what to watch while waiting for one."""
        for state in ("pending", "scheduled"):
            top = self._place.path[state]
            soon = "%016d~" % (self._place.clock.now() if state == "pending" else _wall_us() + _LOOK_US)
            yield top
            for directory in self._place.inner(state):
                if directory[len(top) + 1 :] < soon:
                    yield directory


def _wait_for_task(
    queues: Collection[_Parts], end_us: float, is_over: Callable[[], bool], waiting: _Waiting
) -> tuple[_Parts, FemtoTask] | None:
    """Parts of the first queue that has a task, and the task; None when time, or all, is over."""
    while True:
        last = _since_boot_us() >= end_us
        errors: list[OSError] = []
        for parts in queues:
            try:
                if task := parts.consumer.look():
                    return parts, task
            except OSError as error:
                errors.append(error.with_traceback(None))  # another queue may have a task
        if errors:
            raise errors.pop()
        if last:
            return None
        # Watch, look, wait: in this order no change is missed.
        if not waiting.watch(path for parts in queues for path in parts.consumer.directories()):
            left_us = min([end_us - _since_boot_us(), *(parts.keeper.sleep_us() for parts in queues)])
            waiting.wait(left_us / 1e6)
        if is_over():
            return None  # it may be closed by now


class _Listing:
    """The names in pending/ by place, smallest first, opening each bucket only when its turn comes.

    A listing is no snapshot: readdir may miss a name and still show a later one that was added
    meanwhile. So it hides what has a place after the horizon, when it began. The next listing shows
    what this one saw: all that was pushed before that is there by then.
    """

    def __init__(
        self, place: _Place, read: Reader, horizon_us: int | None = None, known: Collection[str] = ()
    ) -> None:
        self.hidden: set[str] = set()
        self.empty: list[str] = []  # buckets
        self.returns = place.returns
        self._read = read
        self._end = "~" if horizon_us is None else "%016d~" % horizon_us
        self._known = known
        self._lock = _thread.RLock()  # held by who opens buckets
        top = place.path["pending"]
        self._cut = len(top) + 1
        entries = _twice(lambda: list(place.entries(top)))
        # Both in descending order, so that the next one is the last.
        self._buckets = sorted((entry.path for entry in entries if _is_bucket(entry)), reverse=True)
        self._hand: list[tuple[str, str]] = []  # name and directory
        self._ready: list[tuple[str, str]] = []  # of these, and nothing older is in a bucket
        self._far = "~" if horizon_us is None else "%016d" % (horizon_us + _AHEAD_US)
        # Buckets and tasks with a time from the future, for _Keeper.settle.
        self.ahead = [bucket for bucket in self._buckets if os.path.basename(bucket) > self._far]
        self._take_up([entry.name for entry in entries if entry.is_file(follow_symlinks=False)], top)

    def next(self) -> tuple[str, str] | None:
        """Name and directory of the next one; None behind the last. Any thread may ask."""
        while True:
            try:
                if not self._ready:
                    with self._lock:
                        if not (self._ready or self._open_more()):
                            return None
                return self._ready.pop()
            except IndexError:
                pass  # another thread, or a signal handler that pops, came in between

    def _open_more(self) -> bool:
        """Open buckets until the oldest names in hand are ready; False if nothing is left."""
        while self._buckets and not (
            self._hand and _order(self._hand[-1][0]) < self._buckets[-1][self._cut :]
        ):
            bucket = self._buckets.pop()
            names = self._read(bucket)
            if not names:
                self.empty.append(bucket)
            self._take_up(names, bucket)
        end = self._buckets[-1][self._cut :] if self._buckets else "~"  # nothing in there is older
        cut = 0 if self._hand and _order(self._hand[0][0]) < end else len(self._hand)
        while cut and _order(self._hand[cut - 1][0]) < end:
            cut -= 1
        self._hand, ready = self._hand[:cut], self._hand[cut:]
        self._ready += ready
        return bool(self._ready)

    def _take_up(self, names: Iterable[str], directory: str) -> None:
        """Add the tasks of a directory to those in hand."""
        tasks = [name for name in names if name[16:17] == "_"]
        tasks.sort(key=_order, reverse=True)
        late = list(itertools.takewhile(lambda name: _order(name) > self._end, tasks))
        if hidden := {name for name in late if name not in self._known}:
            self.hidden |= hidden
            self.ahead += [f"{directory}/{name}" for name in hidden if _order(name) > self._far]
            tasks = [name for name in tasks if name not in hidden]
        self._hand, was = [(name, directory) for name in tasks], self._hand
        if was:
            self._hand = sorted(self._hand + was, key=lambda task: _order(task[0]), reverse=True)

    def skip(self, count: int) -> None:
        """Leave so many names to the next listing."""
        del self._ready[-count:]


# --- verdicts: what becomes of a claimed task? --------------------------------------------------------


class _Claims:
    """What becomes of a claimed task? Verdicts, and the lease. Its only memory is the task."""

    def __init__(self, place: _Place, looking: _Looking, buckets: tuple[_Buckets, _Buckets]) -> None:
        self._place = place
        self._looking = looking
        self._pending, self._scheduled = buckets

    def finish(self, task: FemtoTask, state: str, reason: str | None = None) -> None:
        """Move a task to done/ or failed/, or delete it."""
        self._leave(task, state, lambda path: self._place.finish(path, state, task.id, reason))

    def retry(self, task: FemtoTask, delay_us: int, reason: str | None = None) -> None:
        """Put a task back, or give it up if its attempts are used up."""
        self._check(task)  # before its attempt is looked at
        if task.attempt >= self._place.max_attempts:
            self.finish(task, "failed", reason or f"used up {task.attempt} attempts")
        else:
            self.put_back(task, delay_us)

    def put_back(self, task: FemtoTask, delay_us: int = 0) -> None:
        """Make a task pending at its old place, or scheduled."""
        if delay_us:
            state, buckets, time_us = "scheduled", self._scheduled, _wall_us() + delay_us
            name = _format(task.id, task.attempt, time_us)
        else:
            state, buckets = "pending", self._pending
            time_us, name = _place_for(task.id, task.attempt, self._place.clock)
        self._leave(task, state, lambda path: buckets.put(path, time_us, name) is not None)
        self._place.returns += state == "pending"

    def touch(self, task: FemtoTask) -> None:
        """Begin a new lease."""
        self._check(task)
        self._move(task, lambda path: _renew(self._place, task, path))

    def _leave(self, task: FemtoTask, verdict: str, move: Callable[[str], bool]) -> None:
        """Take a task out of in_progress/, for good. Made again after an error, it only syncs."""
        self._check(task)
        if task._verdict != verdict:
            if task._verdict:
                raise NotInProgress(f"{task.id} was finished already")
            # The old side first, see _Changes: where it was claimed from, too, as no claim is synced.
            if self._place.durable:
                self._place.note_old(task._bucket or os.path.dirname(task.path))
            self._move(task, move, verdict)
            task._verdict = verdict
        self._place.sync()
        task._finished = True

    def _check(self, task: FemtoTask) -> None:
        """Raise what is wrong with a task that a caller hands in."""
        if not isinstance(task, FemtoTask):
            raise TypeError(f"task: expected what pop() returned, got {type(task).__name__}")
        if task._finished:
            raise NotInProgress(f"{task.id} was finished already")
        if not task.path.startswith(self._place.path["in_progress"] + "/"):
            # Pickled where data_dir has another path; or the task is another queue's.
            if path := self._locate(task):
                task.path = path
            elif os.path.lexists(task.path):
                raise ValueError(f"task: {task.id} is of another queue")

    def _move(self, task: FemtoTask, move: Callable[[str], bool], verdict: str = "") -> None:
        """Have `move` take the claim, whatever it is called by now."""
        for _ in range(_ROUNDS):
            try:
                if move(task.path):
                    return
            except OSError:
                if self._locate(task) or not self._was_moved_by_us(task, verdict, failed=True):
                    raise
                return
            path = self._locate(task)
            if path is None:
                if self._was_moved_by_us(task, verdict, failed=False):
                    return
                task._deadline_us, task._clock = 0, self._place.clock  # lost
                raise NotInProgress(
                    f"{task.id}: attempt {task.attempt} is not in progress; it was finished already, "
                    "or its lease ran out (a longer timeout_stale_ms, or touch(), prevents that)"
                )
            task.path = path
        raise _not_found(task.path)

    def _locate(self, task: FemtoTask) -> str | None:
        """The claim's file: a `touch` elsewhere renames it, another host mounts it elsewhere."""
        owner = os.path.basename(os.path.dirname(task.path))
        entries = self._place.entries(f"{self._place.path['in_progress']}/{owner}")
        return _find_claim(entries, task.id, task.attempt)

    def _was_moved_by_us(self, task: FemtoTask, verdict: str, failed: bool) -> bool:
        """Was our rename done, and its answer lost? On a network it may be ENOENT (rename(2), BUGS).

        It was if the claim was our own, or our rename `failed` just now, if the lease runs, and if the
        task is nowhere but where we moved it.
        """
        place, claim = self._place, _parse(os.path.basename(task.path))
        ours = failed or os.path.dirname(task.path) == place.owner.directory
        if not (verdict and ours and claim and claim[2] > place.clock.now()):
            return False
        found = next((state for state, _ in self._looking.find(task.id, STATES)), None)
        return found == (verdict if place.keeps.get(verdict, True) else None)


def _renew(place: _Place, task: FemtoTask, path: str) -> bool:
    """Give a claim a new full lease; False if it is not there any more."""
    now_us = place.clock.stamp()
    deadline_us, since_us = now_us + place.lease_us, task._since_us or now_us
    target = f"{os.path.dirname(path)}/{_format(task.id, task.attempt, deadline_us, since_us)}"
    if not _rename(path, target):
        return False
    task.path, task._deadline_us, task._clock = target, deadline_us, place.clock
    return True


# --- the way back -------------------------------------------------------------------------------------


# What is to be made pending: by which time it is sorted, id, deliveries used up, path.
_Return = tuple[int, str, int, str]


class _Keeper:
    """What comes back? What is due, or claimed by who is gone or hangs. Sweeps what the dead left."""

    def __init__(
        self, place: _Place, looking: _Looking, buckets: tuple[_Buckets, _Buckets], forfeited: set[str]
    ) -> None:
        self._place = place
        self._looking = looking
        self._pending, self._scheduled = buckets
        self._next_look_us = 0  # by the clock since boot, as is the next one
        self._next_sweep_us = 0
        self._departures_seen = 0
        self._forfeited = forfeited
        self._warned: set[str] = set()

    def is_time(self) -> bool:
        """Is it time to look at all owners, or is something due, even if there is other work?"""
        departures = _departures.get(self._place.root, 0)
        return _since_boot_us() >= self._next_look_us or self._departures_seen != departures

    def hurry(self) -> None:
        """Look at all owners at once."""
        self._next_look_us = 0

    def sleep_us(self) -> int:
        """How long it is until then, unless something changes."""
        return self._next_look_us - _since_boot_us()

    def bring_back(self) -> bool:
        """Make pending what is due, and if it is time what is abandoned; tell if anything was.

        An error is set aside, to be raised when nothing is pending: what is can be had all the same.
        """
        place, now_us, found = self._place, _since_boot_us(), False
        try:
            if self.is_time():
                self._departures_seen = _departures.get(place.root, 0)
                self._next_look_us = now_us + _LOOK_US
                if now_us >= self._next_sweep_us:
                    self._next_sweep_us = now_us + _SWEEP_US
                    self._sweep()
                found = self._move(self._find_abandoned(), is_new=False)
                self._warn_of_clocks()
            found |= self._move(self._find_due(), is_new=True)
        except OSError as error:
            place.set_aside(place.root, error)
        place.sync()
        return found

    def _tasks(self, directory: str, names: Iterable[str]) -> Iterator[_Return]:
        """Those of these names that can be had, each by the time that its name carries."""
        for name in names:
            path = f"{directory}/{name}"
            if (task := _parse(name)) and not self._place.passes_over(path):
                yield task[2], task[0], task[1], path

    def _move(self, tasks: list[_Return], is_new: bool, whole: bool = False) -> bool:
        """Make the first _BATCH tasks, or the `whole` list, pending, at new places or old ones; tell if
        any was, or others may be."""
        place, moved, more = self._place, 0, len(tasks) > _BATCH and not whole
        for _, id, used, path in sorted(tasks)[: None if whole else _BATCH]:
            place_us, name = _place_for(id, used, place.clock, is_new)
            try:
                moved += _twice(self._pending.put, path, place_us, name) is not None
            except OSError as error:
                if error.errno in (*_FULL, *_SCARCE):
                    place.set_aside(place.root, error)  # so it is with all of them
                    more = False
                    break
                # On Windows, whoever works on the file keeps it from being renamed.
                if os.name != "nt" or not isinstance(error, PermissionError):
                    place.set_aside(path, error)
        place.returns += moved
        if more:
            self._next_look_us = 0  # the rest at the next look, which comes at once
        return moved > 0 or more  # what is set aside makes room in a batch for others

    def _find_abandoned(self) -> list[_Return]:
        """The claims of owners that are gone, and those whose lease ran out."""
        place, now_us = self._place, self._place.clock.now()
        found: list[_Return] = []
        for directory, owner in place.look_for_owners():
            other_place = owner[3] != _identity().place
            names = place.names(directory)
            alive = _is_alive(owner)
            for deadline_us, id, used, path in self._tasks(directory, names):
                if deadline_us < now_us or alive is False or path in self._forfeited:
                    found.append((_time_of(id), id, used, path))
                elif owner[0] == place.owner.node_id and other_place:
                    there = os.path.basename(directory)
                    self._warn(
                        there,
                        f"node_id {owner[0]!r} is in use at two places, {there} and "
                        f"{place.owner.name}; give each machine or container its own, "
                        "or each takes over at its start what the other works on",
                    )
            if not names and directory == place.owner.directory:
                place.owner.rest()
            elif not names and (alive is False or directory in self._forfeited):
                _try(os.rmdir, directory)
        return found

    def note_own_elsewhere(self) -> None:
        """Note what was claimed under my node_id elsewhere: on an earlier boot, in another container.

        It is forfeited: a node_id is in one place at a time. Whoever claims under it later is alive.
        """
        for path, owner in self._place.owners():
            if owner[0] == self._place.owner.node_id and _is_elsewhere(owner[3]):
                self._forfeited.add(path)
                self._forfeited.update(f"{path}/{name}" for name in self._place.names(path))

    def _find_due(self) -> list[_Return]:
        """What is due, at least the earliest of it. What is not is sorted into closer buckets."""
        place, now_us = self._place, _wall_us()
        next_due_us = now_us + _LOOK_US
        found: list[_Return] = []
        for bucket in place.inner("scheduled"):
            start_us = _time_of(os.path.basename(bucket))
            if start_us > now_us:
                next_due_us = min(next_due_us, start_us)
                break
            if len(found) > _BATCH:
                found.sort()
                if found[_BATCH][0] <= start_us:
                    break  # all that is in there is later
            names = place.names(bucket)
            if not names:
                self._scheduled.remove_empty([bucket])
            for due_us, id, used, path in self._tasks(bucket, names):
                if due_us <= now_us:
                    found.append((due_us, id, used, path))
                    continue
                next_due_us = min(next_due_us, due_us)
                if start_us < due_us - due_us % self._scheduled.width(due_us):
                    # Or it is read at each look.
                    _try(self._scheduled.put, path, due_us, os.path.basename(path))
        self._next_look_us = min(self._next_look_us, _since_boot_us() + max(0, next_due_us - now_us))
        return found

    def settle(self, paths: Iterable[str]) -> None:
        """Give a place to what has a stamp from the future, or newer tasks pass it by without end."""
        found: list[_Return] = []
        for path in paths:
            is_bucket = os.path.isdir(path)
            directory, name = (path, "") if is_bucket else os.path.split(path)
            found += self._tasks(directory, self._place.names(path) if is_bucket else [name])
        self._move(found, is_new=True, whole=True)

    def requeue(self, id: str) -> bool:
        """Give a finished task a fresh start, or make a scheduled one pending now."""
        place = self._place
        for state, path in self._looking.find(id, (*_FINISHED, "scheduled")):
            used = (_parse(os.path.basename(path)) or (id, 0))[1] if state == "scheduled" else 0
            place_us, name = _place_for(id, used, place.clock, state == "scheduled")
            if self._pending.publish(path, place_us, name):
                place.returns += 1
                if state == "failed":
                    _try(_unlink, path + _REASON)
                return True
        return False

    def give_back_own(self) -> None:
        """Make pending what this object claimed and did not finish."""
        place = self._place
        place.forget_troubles()
        tasks = self._tasks(place.owner.directory, place.files(place.owner.directory))
        # In the order of their ids.
        self._move([(0, *task[1:]) for task in tasks], is_new=False, whole=True)
        place.sync()
        place.raise_trouble()
        _try(os.rmdir, place.owner.directory)

    def _warn_of_clocks(self) -> None:
        """Between machines, order and leases are as good as their clocks agree."""
        ahead_s = (self._place.clock.now() - _wall_us()) / 1e6
        if self._place.has_hosts and abs(ahead_s) > 1:
            self._warn(
                "clocks",
                f"other machines take part, and the queue clock here is {ahead_s:.1f} s ahead of the "
                "wall clock; synchronize the clocks (NTP), and while no worker runs remove "
                f"{self._place.clock.path}",
            )

    def _warn(self, about: str, text: str) -> None:
        """Tell this once."""
        if about not in self._warned:
            self._warned.add(about)
            _log("%s", text)

    def _sweep(self) -> None:
        """Delete what dead writers left half-written, and empty directories of forgotten owners."""
        self._place.forget_troubles()
        for state, remove in (("creating", _unlink), ("in_progress", os.rmdir)):
            for entry in self._place.entries(self._place.path[state]):
                name = entry.name.rpartition("~")[0] if state == "creating" else entry.name
                owner, info = _parse_owner(name), _lstat(entry.path)
                if owner and info and stat.S_ISREG(info.st_mode) is (state == "creating"):
                    alive = _is_alive(owner)
                    # Over NFSv3, the first mtime of a new file is no time.
                    age_s = time.time() - max(info.st_mtime, info.st_ctime)
                    if alive is False or (alive is None and age_s > _ORPHAN_S):
                        _try(remove, entry.path)


# --- the loop: how is a handler run? ------------------------------------------------------------------


class _SecondSignal(BaseException):
    """Ends a handler at once. No handler catches it by name, and none by Exception."""


class _Worker:
    """How is a handler run? The loop, its heartbeat, and the signals that wait for the task in hand."""

    def __init__(self, handler: Handler, queues: dict[_Parts, FemtoQueue]) -> None:
        self._handler = handler
        self._queues = queues
        self._current: list[tuple[_Claims, FemtoTask]] = []
        self._caught: list[int] = []  # signals
        self._outer: _Worker | None = None  # whose handler runs this one
        self._before: dict[int, Any] = {}  # the handlers of signals
        self._count = 0
        self._complain_us = 0
        self._waiting = _Waiting(*(parts.place.waiting for parts in queues))
        self._pid = os.getpid()

    def run(self, until_empty: bool) -> int:
        """Defer the signals, and let `close` wait for this thread, while tasks are handled."""
        places = [parts.place for parts in self._queues]
        run = _thread.get_ident(), _thread.allocate_lock()
        self._defer_signals()
        run[1].acquire()
        for place in places:
            place.runs.append(run)
        try:
            with self._waiting:
                return self._loop(until_empty)
        except _SecondSignal:
            return self._count  # the task is given back, and the signal follows
        finally:
            for place in places:
                place.runs.remove(run)
            run[1].release()
            self._release_signals()

    def _loop(self, until_empty: bool) -> int:
        import threading

        ended = threading.Event()
        # As much a daemon as the thread that it serves: so it keeps no process from ending.
        heart = threading.Thread(target=self._keep_alive, args=(ended,))
        heart.start()
        try:
            while found := self._next(until_empty):
                self._count += self._handle(*found)
        finally:
            ended.set()
            heart.join()
        return self._count

    def _is_over(self) -> bool:
        return self._is_signalled() or any(parts.place.is_stopped() for parts in self._queues)

    def _is_signalled(self) -> bool:
        """Was a signal caught, here or by the run that this one is nested in?"""
        return bool(self._caught) or (self._outer is not None and self._outer._is_signalled())

    def _next(self, until_empty: bool) -> tuple[_Parts, FemtoTask] | None:
        """The next task. A worker that stays outlives errors, and logs one a minute."""
        end_us = 0 if until_empty else float("inf")
        while not self._is_over():
            try:
                found = _wait_for_task(self._queues, end_us, self._is_over, self._waiting)
                if found:
                    found[1].queue = self._queues[found[0]]
                return found
            except OSError as error:
                if until_empty or error.errno is None:  # such as the TimeoutError of an alarm
                    raise
                if _since_boot_us() >= self._complain_us:
                    self._complain_us = _since_boot_us() + 60_000_000
                    _log("no task can be had, but the worker stays: %s", str(error))
            for _ in range(10):
                if not self._is_over():
                    time.sleep(0.1)
        return None

    def _handle(self, parts: _Parts, task: FemtoTask) -> bool:
        """Run the handler for one task and finish it; tell if both went well."""
        claims = parts.claims
        self._current[:] = [(claims, task)]
        try:
            try:
                result = self._handler(task)
            except (Exception, SystemExit) as error:
                if os.getpid() != self._pid:
                    raise
                self._retry(parts, task, error)
                return False
            if os.getpid() != self._pid:
                raise SystemExit  # the handler forked, and here is the child: the task is not its own
            _check_has_run(result)
            if not task._finished:
                claims.finish(task, "done")
            return True
        except NotInProgress:
            _log("%s: its lease was lost while it was handled", task.id)
            return False
        except BaseException:
            if not task._finished and os.getpid() == self._pid:
                try:
                    claims.put_back(task)
                except NotInProgress:
                    pass  # it was finished before the exception came
            raise
        finally:
            self._current.clear()

    def _retry(self, parts: _Parts, task: FemtoTask, error: BaseException) -> None:
        """Log what the handler raised, and have the task come back later."""
        import traceback

        most = parts.place.max_attempts
        delay_us = 1_000_000 * min(2 ** min(task.attempt - 1, 12), 3_600)
        # More or less by up to half: what failed together must not come back together.
        delay_us = int(delay_us * (0.5 + os.urandom(1)[0] / 255))
        then = "the last one" if task.attempt >= most else f"again in {delay_us / 1e6:.1f} s"
        what = f"attempt {task.attempt} failed{'' if task._finished else f', {then}'}"
        _log("%s: %s: %s: %s", task.id, what, type(error).__name__, error, error=error)
        if not task._finished:
            parts.claims.retry(task, delay_us, "".join(traceback.format_exception(error)))

    def _keep_alive(self, ended: threading.Event) -> None:
        lease_s = min(parts.place.lease_us for parts in self._queues) / 1e6
        while not ended.wait(lease_s / 3):
            for claims, task in tuple(self._current):
                try:
                    claims.touch(task)
                except FemtoQueueError:
                    pass  # then task.lost says so
                except OSError as error:
                    _log("%s: its lease could not be renewed", task.id, error=error)

    def _defer_signals(self) -> None:
        """Collect signals to end, and interrupt the handler at the second one."""
        import signal

        # What C code installed cannot be restored: Python takes it for the default.
        caught = _read_proc("/proc/self/status").partition("SigCgt:")[2].split()[:1]

        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"):
            number = int(getattr(signal, name, 0))  # Windows has not all of them
            was = signal.getsignal(number) if number else signal.SIG_IGN
            foreign = was is None or (
                was == signal.SIG_DFL and int("".join(caught) or "0", 16) >> (number - 1) & 1
            )
            if was != signal.SIG_IGN and not foreign:  # ignored: under nohup
                try:
                    self._before[number] = signal.signal(number, self._catch)
                except ValueError:
                    break  # not the main thread of the main interpreter
                if isinstance(outer := getattr(was, "__self__", None), _Worker):
                    self._outer = outer

    def _release_signals(self) -> None:
        """Let the signals do what they would have done without `run`."""
        import signal

        for number, handler in self._before.items():
            signal.signal(number, handler)
        for number in self._caught if os.getpid() == self._pid else ():
            signal.raise_signal(number)

    def _catch(self, number: int, frame: object) -> None:
        """The handler of the signals that wait."""
        import signal

        if os.getpid() != self._pid:  # a process that the handler forked
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
            return
        self._caught.append(number)
        for parts in self._queues:
            parts.place.wake()
        if len(self._caught) == 2 and self._current:
            raise _SecondSignal


# --- looking: what is where? --------------------------------------------------------------------------


class _Looking:
    """What is where? One walk for counting, listing, finding and deleting. It changes nothing else."""

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._counted: dict[str, tuple[int, int]] = {}  # by bucket: its change time, how many tasks

    def walk(self, state: str, strict: bool = False) -> Iterator[tuple[str, int, int, str]]:
        """Id, attempts, due time or deadline, and path of the tasks of `state` that this user may read.

        The oldest directory first: a scheduled task that is moved closer goes to a younger one, where
        it is seen again rather than missed.
        """
        self._place.check_there()
        top = self._place.path[state]
        seen: set[str] = set()
        while found := [path for path in self._holders(state) if path not in seen]:  # or made meanwhile
            for directory in found:
                seen.add(directory)
                try:
                    for entry in self._place.entries(directory):
                        if (parsed := _parse(entry.name)) and entry.is_file(follow_symlinks=False):
                            yield (*parsed[:3], entry.path)
                except PermissionError:
                    if strict or directory == top:
                        raise

    def ids(self, state: str) -> Iterator[str]:
        """The ids of a state in their order, each once: some filesystems list a name twice."""
        if state == "pending":
            self._place.check_there()
            names = (name for name, _ in iter(_Listing(self._place, self._readable).next, None))
            ids = (parsed[0] for name in names if (parsed := _parse(name)))
            return (id for id, _ in itertools.groupby(ids))
        if state == "in_progress":
            return iter(sorted(self._claimed()))
        tasks = {(task[2] if state == "scheduled" else 0, task[0]) for task in self.walk(state)}
        return (id for _, id in sorted(tasks))

    def _claimed(self) -> set[str]:
        """The ids of all claims. Readdir may miss the new name of a renewed one: a watch does not."""
        with _Waiting() as waiting:
            waiting.watch(self._directories(("in_progress",)), departures=True)
            found = {id for id, _, _, _ in self.walk("in_progress")}
            return found | {task[0] for name in waiting.changes() if (task := _parse(name))}

    def _readable(self, directory: str) -> Collection[str]:
        """The names in it, as far as this user may read."""
        try:
            return self._place.files(directory)
        except PermissionError:
            return ()

    def count_pending(self) -> int:
        """How many tasks are pending. A bucket that did not change since still holds what it held.

        A change within the same tick of the filesystem's clock would not show: so what was changed
        just now is not trusted, and nothing is where other machines take part.
        """
        self._place.look_for_owners()
        total, counted = 0, {}
        for directory in self._holders("pending"):
            now_ns, info = time.time_ns(), _lstat(directory)
            changed_ns = info.st_mtime_ns if info else 0
            known = self._counted.get(directory)
            if known is None or known[0] != changed_ns or self._place.has_hosts:
                known = changed_ns, len({name for name in self._readable(directory) if _parse(name)})
            total += known[1]
            # On vfat and exfat, times move in steps of up to 2 s, and end in zeros.
            if abs(now_ns - changed_ns) > (50_000_000 if changed_ns % 1_000_000_000 else 2_050_000_000):
                counted[directory] = known
        self._counted = counted
        return total

    def find(self, id: str, states: Collection[str]) -> Iterator[tuple[str, str]]:
        """State and path of a task, perhaps more than once: it may move while we search."""
        if not self._is_harmless(id):
            return
        yield from self._find_quickly(id, states)
        with _Waiting() as waiting:
            for _ in range(_ROUNDS * 3):
                waiting.watch(self._directories(states), departures=True)
                waiting.changes()
                for state in states:
                    paths = [path for found, _, _, path in self.walk(state) if found == id]
                    yield from ((state, path) for path in paths)
                # If nothing of this id moved meanwhile, nor a directory, it was nowhere.
                if not any(name.startswith(id) or not _parse(name) for name in waiting.changes()):
                    return

    def _is_harmless(self, id: str) -> bool:
        """May this become part of a path? It comes from outside: an id by our grammar is harmless."""
        _check("id", id, "str such as task.id")
        return not _FORBIDDEN & set(id) and _is_id(id)

    def _find_quickly(self, id: str, states: Collection[str]) -> Iterator[tuple[str, str]]:
        """Ask for the likely names first: that lists no bucket."""
        for state in states:
            if state == "in_progress":
                paths = [path for found, _, _, path in self.walk(state) if found == id]
            else:
                name = _format(id, 0, _time_of(id)) if state == "scheduled" else id
                # A bucket holds nothing older than its name says.
                end = f"{self._place.path[state]}/{id}"
                paths = [f"{path}/{name}" for path in self._holders(state) if path <= end]
            for path in paths:
                if (info := _lstat(path)) and stat.S_ISREG(info.st_mode):
                    yield state, path

    def _holders(self, state: str) -> list[str]:
        """The directories in which the tasks of a state lie."""
        top = [] if state in ("scheduled", "in_progress") else [self._place.path[state]]
        return top if state in _FINISHED else top + self._place.inner(state)

    def _directories(self, states: Iterable[str]) -> Iterator[str]:
        """Where a change of these states shows: what to watch."""
        for state in states:
            yield self._place.path[state]
            if state not in _FINISHED:
                yield from self._place.inner(state)

    def claims(self) -> list[dict[str, Any]]:
        """Who works on what."""
        now_us = self._place.clock.now()
        names = ("id", "attempt", "node_id", "pid", "alive", "since_s", "lease_left_s")
        found = []
        for id, attempt, deadline_us, path in self.walk("in_progress"):
            directory, name = os.path.split(path)
            owner, claim, info = _parse_owner(os.path.basename(directory)), _parse(name), _lstat(path)
            if owner and claim and info:
                alive = {True: "yes", False: "no", None: "unknown"}[_is_alive(owner)]
                since_s = (now_us - claim[3]) / 1e6 if claim[3] else time.time() - info.st_ctime
                left_s = (deadline_us - now_us) / 1e6
                found.append((id, attempt, owner[0], owner[1], alive, since_s, left_s))
        return [dict(zip(names, row, strict=True)) for row in found]

    def reason(self, id: str) -> str | None:
        """Why a task failed."""
        path = f"{self._place.path['failed']}/{id}{_REASON}"
        return _read_text(path) if self._is_harmless(id) else None

    def cancel(self, id: str) -> bool:
        """Delete a waiting task."""
        dropped = False
        for _, path in self.find(id, ("scheduled", "pending")):
            if dropped := _unlink(path):
                self._place.note(os.path.dirname(path))
                break
        self._place.sync()  # and what an earlier call could not sync
        return dropped

    def purge(self, state: str, older_than_s: float) -> int:
        """Delete what was in a state for so long."""
        until_s = time.time() - older_than_s
        count = 0
        for _, _, _, path in self.walk(state):
            info = _lstat(path)
            # On Windows, ctime is the time of creation.
            changed_s = info and (info.st_mtime if os.name == "nt" else info.st_ctime)
            if changed_s is not None and changed_s <= until_s and _unlink(path):
                count += 1
                self._place.note(os.path.dirname(path))
        if state == "failed":
            for entry in self._place.entries(self._place.path[state]):
                task, reason, _ = entry.path.rpartition(_REASON)
                if reason and not os.path.lexists(task):
                    _try(_unlink, entry.path)
        self._place.sync(self._place.path[state])
        return count

    def wait_until_empty(self, end_us: float) -> bool:
        """Wait for a moment at which nothing is unfinished."""
        with _Waiting(self._place.waiting) as waiting:
            while True:
                # What is busy ends in in_progress/: watch that, then look, then wait.
                waiting.watch(self._directories(("in_progress",)), departures=True)
                begun_us = _since_boot_us()
                if self._is_empty():
                    # It seems so. A look during which nothing moved is a moment's picture.
                    waiting.watch(self._directories(_UNFINISHED), departures=True)
                    waiting.changes()
                    if self._is_empty() and not waiting.changes():
                        return True
                if self._place.is_stopped() or _since_boot_us() >= end_us:
                    return False
                waiting.wait(min(_LOOK_US, end_us - _since_boot_us()) / 1e6)
                # A busy queue changes at every task: not more than a hundred looks a second.
                time.sleep(max(0.0, min(0.01, (begun_us + 10_000 - _since_boot_us()) / 1e6)))

    def _is_empty(self) -> bool:
        return not any(True for state in _UNFINISHED for _ in self.walk(state, strict=True))


# For inotify(7): IN_ONLYDIR, IN_CREATE, IN_MOVED_TO; IN_DELETE, IN_MOVED_FROM; IN_ONESHOT.
_ARRIVALS, _DEPARTURES, _ONESHOT = 0x1000180, 0x240, 0x80000000


class _Waiting:
    """Has anything changed? Directories, watched through inotify(7) for as long as a call waits.

    Where that cannot be had, their change times are looked at every 9 ms.
    """

    def __init__(self, *among: set[_Waiting]) -> None:
        self._among = among  # those that `stop` wakes, of each place
        self._lock = _thread.RLock()  # a signal handler may wake what it interrupts
        self._rung = False
        self._inotify = self._bell = -1
        self._is_tried = False
        self._libc: Any = None
        self._poll: Any = None
        self._watched: dict[str, float] = {}  # with the change time, where that must do

    def __enter__(self) -> _Waiting:
        for waits in self._among:
            waits.add(self)
        return self

    def __exit__(self, *exception: object) -> None:
        for waits in self._among:
            waits.discard(self)
        self.close()

    def _open(self) -> None:
        self._is_tried = True
        if sys.platform == "linux":
            try:
                import ctypes
                import select

                self._libc = ctypes.CDLL(None)
                self._inotify = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
                if self._inotify >= 0:
                    # By which another thread ends a wait.
                    self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                    self._poll = select.poll()
                    for descriptor in (self._inotify, self._bell):
                        self._poll.register(descriptor, select.POLLIN)
            except (ImportError, OSError, AttributeError):
                self.close()

    def watch(self, directories: Iterable[str], departures: bool = False) -> bool:
        """Watch these, too, for what comes, and for what goes if `departures`; tell if any is new."""
        if not self._is_tried:
            self._open()
        # A worker that is busy again must cost those nothing who push: so its watches end at once.
        mask = _ARRIVALS | (_DEPARTURES if departures else _ONESHOT)
        paths = list(directories)
        new = [path for path in paths if path not in self._watched]
        for path in new if self._inotify >= 0 else ():
            self._watched[path] = 0.0
            added = self._libc.inotify_add_watch(self._inotify, os.fsencode(path), mask)
            if added < 0 and os.path.isdir(path):
                self.close()  # no more watches are to be had
        if self._inotify < 0:
            was = self._watched
            self._watched = {path: was.get(path) or _settled(path) for path in paths}
        return bool(new)

    def wait(self, seconds: float) -> None:
        """Sleep until something changes, somebody wakes it, or so much time is over."""
        if self._inotify >= 0:
            if not self._rung and self._poll.poll(max(0, seconds * 1_000)):
                self.changes()
        else:
            # That nothing changed proves nothing: a filesystem's time moves in steps. So not for long.
            end_us = _since_boot_us() + min(seconds, 0.1) * 1e6
            while not self._rung and (left_s := (end_us - _since_boot_us()) / 1e6) > 0:
                time.sleep(min(left_s, _POLL_S))
                if self.changes():
                    break
        with self._lock:  # forget what woke this: who waits asks then if all is over
            rung, self._rung = self._rung, False
            if sys.platform == "linux" and rung and self._bell >= 0:
                _try(os.eventfd_read, self._bell)

    def changes(self) -> set[str]:
        """The names that came or went since this was asked before; "" for one that cannot be told."""
        if self._inotify < 0:
            before = self._watched
            self._watched = {path: _settled(path) for path in before}
            return {"" for path, changed_s in self._watched.items() if changed_s != before[path]}
        names: set[str] = set()
        try:
            while events := os.read(self._inotify, _SMALL):
                self._watched.clear()  # a watch ends at its first event, or with its directory
                at = 0
                while at < len(events):  # struct inotify_event: wd, mask, cookie, len, name
                    end = at + 16 + int.from_bytes(events[at + 12 : at + 16], sys.byteorder)
                    names.add(os.fsdecode(events[at + 16 : end].rstrip(b"\0")))
                    at = end
        except BlockingIOError:
            pass
        return names

    def wake(self) -> None:
        """End a wait. For any thread, and for signal handlers."""
        with self._lock:
            self._rung = True
            if sys.platform == "linux" and self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def close(self, in_place: bool = True) -> None:
        """Close the descriptors, under the lock: nobody must write to the next owner of a number.

        To close an inotify descriptor takes 8 ms: the kernel waits until nobody reads its watches any
        more (synchronize_srcu). If not `in_place`, a thread does that, and ends: whoever waited for a
        task has it at once.
        """
        with self._lock:
            inotify, bell, self._inotify, self._bell = self._inotify, self._bell, -1, -1
            self._watched.clear()
        if bell >= 0:
            os.close(bell)
        if inotify >= 0 and (in_place or not _closing.acquire(False)):
            os.close(inotify)
        elif inotify >= 0:
            import threading

            def close() -> None:
                """Close it, and let the next one have a thread."""
                try:
                    os.close(inotify)
                finally:
                    _closing.release()

            try:
                threading.Thread(target=close).start()
            except RuntimeError:  # no more threads are to be had
                close()


_closing = _thread.allocate_lock()  # held while a thread does it: one at a time is enough


# --- the directory ------------------------------------------------------------------------------------


class _Place:
    """Where is the queue, and how durable is a change? What the parts of one object share."""

    def __init__(self, queue: FemtoQueue, root: str, ends: set[str]) -> None:
        self.root = root
        self.durable = queue.sync_after_write
        self.lease_us = int(queue.timeout_stale_ms * 1_000)
        self.max_attempts = queue.max_attempts or _MAX_ATTEMPT
        self.keeps = {"done": queue.keep_done, "failed": queue.keep_failed, "corrupt": True}
        self.maxsize = queue.maxsize
        self.ends = ends
        self.path = {state: f"{root}/{state}" for state in (*STATES, "creating")}
        self.layout = f"{root}/layout"
        self.owner = _Owner(self, queue.node_id)
        self.clock = _Clock(self)
        # By path: what cannot be had is set aside for a minute, with its error as OSError takes it.
        self.troubles: dict[str, tuple[int | None, str | None, object]] = {}
        self.has_company = False  # other processes claim tasks, as far as the last look told
        self.has_hosts = False  # other machines or containers do
        self.returns = 0  # how many tasks it made pending, perhaps before what is listed already
        self._told: set[str] = set()
        self._gift: tuple[int, int] | None = None  # owner and group of the directory, once root asked
        changes = _Changes(self.durable)
        self.note, self.note_old, self.sync = changes.note, changes.note_old, changes.sync
        self.waiting: set[_Waiting] = set()
        self.runs: list[tuple[int, Any]] = []  # a thread, and the lock that it holds while it runs

    # Opening, and what heals.

    def open(self) -> None:
        """Check the layout, or make the directory. What exists already is only looked at."""
        layout = self._read_layout()
        if layout is None:
            if os.path.isdir(self.root) and _is_original(self.root):
                raise FemtoQueueError(
                    f"{self.root} is of the original femtoqueue 0.3 or 0.4; it is left as it "
                    'is. README says under "From the original femtoqueue" how to move its tasks over'
                )
            self._make_all()
        elif layout > _LAYOUT:
            raise FemtoQueueError(
                f"{self.root} has layout {layout}, and this copy of femtoqueue.py knows {_LAYOUT}; "
                "replace the copy by a later version"
            )
        # Even if it was there: whoever made it need not have been durable.
        for directory in (os.path.dirname(self.root), self.root) if self.durable else ():
            try:
                _sync_directory(directory)
            except PermissionError:
                pass  # it may only be passed through

    def _read_layout(self) -> int | None:
        """The version that the directory says it has; None if it says nothing."""
        text = _read_text(self.layout)
        if text is None:
            return None
        words = text.partition("\n")[0].split()
        if len(words) != 3 or words[:2] != ["femtoqueue", "layout"] or not _is_digits(words[2]):
            raise FemtoQueueError(f"{self.layout} should begin with a line like: femtoqueue layout 1")
        return int(words[2])

    def _make_all(self) -> None:
        """Make the directory; last of all its version file: without it, the next opening does the same.

        Who may only look, or delete, needs neither: so errors of rights and room are no obstacle.
        """
        found = os.path.isdir(self.root)
        draft = self.owner.draft + "%016d" % _wall_us()
        text = (
            f"femtoqueue layout {_LAYOUT}\n"
            "This directory is a task queue. Each file below a state's directory is one task.\n"
            "A copy of femtoqueue.py opens it only if it knows this layout.\n"
        )
        try:
            for path in (self.root, *self.path.values()):
                for made in _make_directories(path):
                    self.note(os.path.dirname(made))
                _try(self._share, path)
            above = os.path.dirname(self.root)
            while self.durable and above != os.path.dirname(above):
                above = os.path.dirname(above)  # an earlier opening may have made it, and failed
                _try(_sync_directory, above)
            self.sync()
            self.write(draft, (text.encode(),), shared=True)
            _name_once(draft, self.layout)
        except OSError as error:
            if not found or error.errno not in (*_FULL, errno.EACCES, errno.EPERM, errno.EEXIST):
                raise
            if not os.path.lexists(self.layout):
                self.layout = self.root  # whose presence must do
        finally:
            _try(_unlink, draft)

    def check_there(self) -> None:
        """Raise FileNotFoundError if data_dir was renamed or unmounted: then nothing of it is known."""
        os.stat(self.layout)

    def make(self, path: str) -> None:
        """Make a directory inside data_dir, for good, and what somebody removed above it."""
        self.check_there()
        for made in _make_directories(path):
            _try(self._share, made)  # unless somebody removed it meanwhile
            self.note(os.path.dirname(made))
        self.sync(os.path.dirname(path))  # even if it was there: whoever made it need not be durable

    # Whoever comes first owns nothing that others need.

    def _share(self, target: str | int, mask: int = 0o7777) -> None:
        """Give a path or descriptor the permission bits of data_dir; made by root, also its owner."""
        mode = stat.S_IMODE(os.stat(self.root).st_mode) & mask
        if os.name != "nt" and stat.S_IMODE(os.stat(target).st_mode) != mode:
            _try(os.chmod, target, mode)
        self.hand_over(target)

    def hand_over(self, target: str | int) -> None:
        """What root makes in somebody else's queue is his: one `sudo` must not stop a service."""
        if sys.platform != "win32" and os.geteuid() == 0:
            try:
                if self._gift is None:
                    info = os.stat(self.root)
                    self._gift = info.st_uid, info.st_gid
                if self._gift != (0, 0):
                    os.chown(target, *self._gift)
            except OSError:
                pass  # it is root's, then

    def create(self, path: str) -> int:
        """Create a file, in creating/ or a reason; return its descriptor."""
        try:
            descriptor = os.open(path, _WRITE_FLAGS, 0o666)
        except FileNotFoundError:  # somebody removed the directory
            self.make(os.path.dirname(path))
            descriptor = os.open(path, _WRITE_FLAGS, 0o666)
        self.hand_over(descriptor)
        return descriptor

    def write(self, path: str, chunks: Iterable[bytes], shared: bool = False) -> int:
        """Write a new file, for good if that was asked for; return its CRC-32."""
        descriptor = self.create(path)
        try:
            crc = 0
            for chunk in chunks:
                crc = zlib.crc32(chunk, crc)
                _write_all(descriptor, chunk)
            if shared:
                self._share(descriptor, 0o666)
            if self.durable:
                os.fsync(descriptor)
            os.close(descriptor)  # where a network filesystem reports a failed write
        except BaseException as error:
            _try(os.close, descriptor)
            _add_path(error, path)
            raise
        return crc

    # Changes of state, and how they become durable.

    def move(self, source: str, target: str) -> bool:
        """Rename a task's file into done/, failed/ or corrupt/; False if it is gone."""
        if not _rename(source, target):
            if os.path.isdir(os.path.dirname(target)):
                return False
            self.make(os.path.dirname(target))  # somebody had removed it
            if not _rename(source, target):
                return False
        if self.durable:
            self.note(os.path.dirname(target), os.path.dirname(source))
        return True

    def finish(self, path: str, state: str, id: str, reason: str | None = None) -> bool:
        """Move a task to done/, failed/ or corrupt/, or delete it; False if it is not there now."""
        if not self.keeps[state]:
            if gone := _unlink(path):
                self.note(os.path.dirname(path))
            return gone
        target = f"{self.path[state]}/{id}"
        if not self.move(path, target):
            return False
        if reason:
            self._write_reason(target + _REASON, reason)
        elif state == "failed":
            _try(_unlink, target + _REASON)  # of an earlier time
        return True

    def _write_reason(self, path: str, reason: str) -> None:
        """Say why a task failed. No room for that is no obstacle: the task has failed all the same."""
        try:
            _try(_unlink, path)
            self.write(path, (reason.encode("utf-8", "replace"),))
            self.note(os.path.dirname(path))  # another thread may have synced it since the move
        except OSError as error:
            _log("%s: the reason could not be noted: %s", path, error)

    # Listing. What cannot be read or moved holds up no other task.

    def entries(self, directory: str) -> Iterator[os.DirEntry[str]]:
        """What is in a directory, in no order; nothing if somebody removed it."""
        try:
            yield from _scan(directory)
        except OSError as error:
            if not _is_gone(error, directory):
                raise
            self.check_there()

    def inner(self, state: str) -> list[str]:
        """The paths of the buckets, or owners' directories, of a state, in order."""
        if state == "in_progress":
            return sorted({path for path, _ in self.owners()})
        return sorted({entry.path for entry in self.entries(self.path[state]) if _is_bucket(entry)})

    def names(self, directory: str) -> Collection[str]:
        """The names of the regular files in it; none if it is gone, or must be passed over."""
        if not self.passes_over(directory):
            try:
                return _twice(self.files, directory)
            except OSError as error:
                self.set_aside(directory, error)
        return ()

    def files(self, directory: str) -> list[str]:
        """The names of the regular files in it. Some filesystems list a name twice."""
        return [entry.name for entry in self.entries(directory) if entry.is_file(follow_symlinks=False)]

    def owners(self) -> list[tuple[str, _OwnerName]]:
        """The directories of all owners, and what their names tell."""
        named = ((entry, _parse_owner(entry.name)) for entry in self.entries(self.path["in_progress"]))
        return [
            (entry.path, owner)
            for entry, owner in named
            if owner and entry.is_dir(follow_symlinks=False)
        ]

    def look_for_owners(self) -> list[tuple[str, _OwnerName]]:
        """The owners; note if there are other processes among them, and other machines."""
        me, owners = _identity(), self.owners()
        others = [owner for _, owner in owners if owner[1:4] != (me.pid, me.start, me.place)]
        self.has_hosts = any(owner[3] != me.place for owner in others)
        self.has_company = self.has_hosts or any(_is_alive(owner) is not False for owner in others)
        return owners

    def set_aside(self, path: str, error: OSError) -> None:
        """Note what cannot be had, for a minute, and log it once in that time."""
        # Not the error itself: its traceback's frames would keep the queue alive.
        self.troubles[path] = error.errno, error.strerror, error.filename or path
        if path not in self._told:
            self._told.add(path)
            _log("%s; it is passed over", str(error))

    def passes_over(self, path: str) -> bool:
        """Is this set aside?"""
        return path in self.troubles

    def raise_trouble(self) -> None:
        """Raise one of what is set aside, if anything is."""
        for trouble in list(self.troubles.values()):
            raise OSError(*trouble)

    def forget_troubles(self) -> None:
        """Try all of it again, and log it again: a minute is over."""
        self.troubles.clear()
        self._told.clear()

    # Those who wait, and those who run.

    def is_stopped(self) -> bool:
        """Then what begins to wait or to run ends at once."""
        return "stopped" in self.ends

    def wake(self) -> None:
        """End all waits of this object."""
        for waiting in list(self.waiting):
            waiting.wake()

    def stop(self) -> None:
        """End all waits and runs of this object, and those that begin later."""
        self.ends.add("stopped")
        self.wake()

    def stop_and_wait(self) -> None:
        """Stop, and wait until nothing runs any more."""
        if any(thread == _thread.get_ident() for thread, _ in list(self.runs)):
            raise FemtoQueueError("close() was called by the handler that run() runs; use stop()")
        self.stop()  # before it is asked what runs: what begins later ends at once
        for _, lock in list(self.runs):
            with lock:
                pass


class _Changes:
    """Which directories changed, that are to survive a power cut? The old side of each rename first.

    On btrfs, a file whose new name alone is certain comes back under the old one as well.
    """

    def __init__(self, durable: bool) -> None:
        self._durable = durable
        self._touched: dict[str, None] = {}  # in the order in which they are to be synced
        self._lock = _thread.RLock()  # reentrant: a signal handler may push in the midst of a push
        self._sync_lock = _thread.RLock()

    def note(self, new: str, *old: str) -> None:
        """Have them synced by the next `sync`, an old side that is not noted yet before all the rest.

        To be called after the rename: another thread may sync at once.
        """
        if self._durable:
            with self._lock:
                first = {directory: None for directory in old if directory not in self._touched}
                if new in self._touched:
                    self._touched = {**first, **self._touched}
                else:
                    self._touched.update({**first, new: None})

    def note_old(self, directory: str) -> None:
        """Have an old side synced before all that is noted by now."""
        if self._durable:
            with self._lock:
                self._touched = {directory: None, **self._touched}

    def sync(self, *directories: str) -> None:
        """Make what was renamed in these, and those noted, survive a power cut.

        Threads that finish at the same time share a sync: what one took up is on disk once another has
        the lock. What could not be synced stays noted.
        """
        if not self._durable:
            return
        for directory in directories:
            self.note(directory)
        with self._sync_lock:
            while directory := self._take():
                try:
                    _sync_directory(directory)
                except BaseException:
                    self.note_old(directory)
                    raise

    def _take(self) -> str:
        with self._lock:
            # A list, for a signal handler may come in between. Before the sync: what is renamed
            # meanwhile notes it again.
            directory = next(iter([*self._touched]), "")
            self._touched.pop(directory, None)
            return directory


# --- time ---------------------------------------------------------------------------------------------


class _Clock:
    """What time is it in the queue? Microseconds that never go backwards, shared by all of one boot.

    The clock since boot, asleep or not, plus an offset that the first process of a boot chooses, above
    all that is queued. Where the boot cannot be told, it is the wall clock, shared by nobody.
    """

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._offset_us: int | None = None  # read, or chosen, at the first stamp
        self._last_us = _last_us.setdefault(place.root, [0])  # stamped in this process
        self._lock = _thread.RLock()  # reentrant: a signal handler may push in the midst of a push
        boot = _identity().boot
        self.path = f"{place.root}/clock-{boot}" if boot else ""

    def now(self) -> int:
        """The time. Looking at it writes nothing."""
        if self._offset_us is None and self.path:
            self._offset_us = _read_offset(self.path)
        now_us = _wall_us() if self._offset_us is None else _since_boot_us() + self._offset_us
        return max(now_us, self._last_us[0])

    def stamp(self) -> int:
        """A time above all that this process has stamped: should the clock be frozen, order is not."""
        if self._offset_us is None and self.path:
            self._offset_us = _read_offset(self.path) or self._choose_offset()
        with self._lock:
            now_us = self._last_us[0] = max(self.now(), self._last_us[0] + 1)
        return now_us

    def _choose_offset(self) -> int:
        """Choose it above all that is queued; or take that of another process that is quicker."""
        place = self._place
        offset_us = max(_wall_us(), self._newest_us() + 1) - _since_boot_us()
        draft = place.owner.draft + "%016d" % _wall_us()
        try:
            place.write(draft, (f"{offset_us}\n".encode(),), shared=True)
            _name_once(draft, self.path)
            if _read_offset(self.path) is None:
                _rename(draft, self.path)  # over a broken one
            offset_us = _read_offset(self.path) or offset_us
            place.sync(place.root)
        finally:
            _try(_unlink, draft)
        return offset_us

    def _newest_us(self) -> int:
        """The newest time in pending/ and in_progress/, above which the clock must start."""
        place, wall_us = self._place, _wall_us()
        times_us = [0, *(_time_of(entry.name) for entry in place.entries(place.path["pending"]))]
        for bucket in place.inner("pending"):
            start_us = _time_of(os.path.basename(bucket))
            # A bucket's tasks are of one period: an older one cannot be ahead of the wall clock.
            if start_us + _BUCKET_US > wall_us:
                times_us += [_time_of(_order(name)) for name in place.names(bucket)]
        for owner in place.inner("in_progress"):
            for name in place.names(owner):
                times_us.append(_time_of(name))
                # A deadline set when the wall clock was ahead would come too late. The clock need not
                # start above that, only above when the lease began, which is the file's change time.
                if (claim := _parse(name)) and (info := _lstat(f"{owner}/{name}")):
                    times_us.append(min(info.st_ctime_ns // 1_000, claim[2]))
        return max(time_us for time_us in times_us if time_us < _CLOCK_END_US)


_last_us: dict[str, list[int]] = {}  # by directory, in a list that all of its objects share


def _wall_us() -> int:
    return int(time.time() * 1_000_000)


if sys.platform == "win32":

    def _since_boot_us() -> int:
        return int(time.monotonic() * 1_000_000)

else:
    # Not time.monotonic: it stands still while the machine sleeps, and tools that freeze time patch it.
    _BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def _since_boot_us() -> int:
        """Since the machine was booted, asleep or not, as far as the system tells."""
        return int(time.clock_gettime(_BOOT_CLOCK) * 1_000_000)


def _end_us(timeout_s: float | None) -> float:
    """When a call that waits is over, by the clock since boot."""
    if timeout_s is None:
        return float("inf")
    _check("timeout", timeout_s, "a number of seconds, or None to wait for ever", 0)
    return _since_boot_us() + timeout_s * 1e6


def _read_offset(path: str) -> int | None:
    """The clock's offset; None if there is no such file, or it is broken."""
    text = _read_text(path) or ""
    # The line's end is what a half-written number lacks.
    if not (text.endswith("\n") and _is_digits(text[:-1].removeprefix("-"))):
        return None
    return int(text) if 0 <= _since_boot_us() + int(text) < _CLOCK_END_US else None


# --- owners -------------------------------------------------------------------------------------------


class _Owner:
    """Who claims here? One object in one process: its name, and the directory of its claims."""

    def __init__(self, place: _Place, node_id: str) -> None:
        me = _identity()
        self.node_id = node_id
        self.name = f"{node_id}~{me.pid}~{me.start}~{me.place}~{_copy}{os.urandom(4).hex()}"
        self.draft = f"{place.path['creating']}/{self.name}~"
        self.directory = f"{place.path['in_progress']}/{self.name}"
        self._place = place
        self._is_ready = False  # the directory was made, and if that was asked for, for good
        self.claims = 0
        self._claims_seen = 0  # when `rest` was called last
        _living.add(self.name)

    def claim(self, source: str, path: str) -> bool:
        """Rename a task into our own directory, made if it has to be; False if the task is gone."""
        if not (self._is_ready and _rename(source, path)):
            if self._is_ready and os.path.isdir(self.directory):
                return False
            self._is_ready = False
            self._place.make(self.directory)
            self._is_ready = True
            if not _rename(source, path):
                return False
        self.claims += 1
        if self._place.ends:  # close() gives back what it sees, and this may have come after it
            self.check_open()
        return True

    def rest(self) -> None:
        """Remove the empty directory if nothing was claimed since the last call: all look into it."""
        if self.claims == self._claims_seen:
            self._is_ready = False
            _try(os.rmdir, self.directory)
        self._claims_seen = self.claims

    def check_open(self) -> None:
        """Raise FemtoQueueError once this is closed."""
        if "closed" in self._place.ends:
            raise FemtoQueueError("this queue object is closed; make a new one")

    def close(self) -> None:
        """From now on it is judged dead."""
        self._place.ends.add("closed")
        self.depart()

    def depart(self) -> None:
        """Nobody can finish its claims any more, as far as this process knows."""
        _living.discard(self.name)
        if self._is_ready:
            _departures[self._place.root] = _departures.get(self._place.root, 0) + 1


_copy = os.urandom(4).hex()  # tells this copy of the file from others in one process
_living: set[str] = set()  # the owners of this copy that are neither closed nor dropped
# By data_dir: how many owners that made a directory were closed or dropped. If it rises, `pop` looks.
_departures: dict[str, int] = {}
_me: _Identity | None = None


class _Identity:
    """What tells this process from every other one, here and elsewhere, now and later."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        itself = _read_process("self")
        self.start = itself[2] if itself else "0"
        boot = _read_proc("/proc/sys/kernel/random/boot_id").replace("-", "")[:12]
        # A time namespace has a clock of its own. None where the boot cannot be told.
        self.boot = f"{boot}.{_namespace('time')}" if boot else None
        # With a dot in it, it can be compared.
        self.place = (
            f"{self.boot}.{_namespace('pid')}" if boot else f"{zlib.crc32(_host_name().encode()):08x}"
        )
        # Mounted from another PID namespace, /proc shows other processes under our numbers.
        self.sees_processes = _read_link("/proc/self") == str(self.pid)


def _identity() -> _Identity:
    global _me
    if _me is None or _me.pid != os.getpid():
        _me = _Identity()
    return _me


def _is_elsewhere(place: str) -> bool:
    """Is this another machine, boot or container, as far as /proc told both of us where we are?"""
    return place != _identity().place and "." in place and "." in _identity().place


def _is_alive(owner: _OwnerName) -> bool | None:
    """Is this owner alive? None if that cannot be known from here, and its lease must decide.

    Only proof counts: a process that is there, but whose start time /proc does not tell (hidepid,
    another user's container), is alive.
    """
    _, pid, start, place, token = owner
    me = _identity()
    if place != me.place:
        return None  # on another machine, boot or container
    if pid == me.pid and token.startswith(_copy):
        return "~".join(map(str, owner)) in _living
    if me.boot is None:
        return None  # not Linux
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # not permitted: it is there
    try:
        seen = _read_process(pid) if me.sees_processes else None
    except OSError:
        return True  # unknown
    if seen is None:
        return True
    state, threads, started = seen
    # Else the number was given to another process. A zombie's other threads may still be at work.
    return started == start and not (state in "ZX" and threads < 2)


def _host_name() -> str:
    if sys.platform == "win32":
        return os.environ.get("COMPUTERNAME", "")
    return os.uname().nodename


def _read_proc(path: str) -> str:
    """A file of /proc; empty if there is none for us.

    Other errors are raised: a process short of descriptors must not take itself for another one.
    """
    try:
        with open(path, "rb") as file:
            return file.read().decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError, PermissionError, ProcessLookupError):
        return ""


def _read_link(path: str) -> str:
    """What a link of /proc says, or nothing; other errors are raised here, too."""
    try:
        return os.readlink(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError, AttributeError):
        return ""


def _namespace(kind: str) -> str:
    # "0": a kernel without this kind
    return "".join(filter(str.isdigit, _read_link(f"/proc/self/ns/{kind}"))) or "0"


def _read_process(pid: int | str) -> tuple[str, int, str] | None:
    """State, number of threads and start time of a process; None if /proc does not tell: proc(5)."""
    fields = _read_proc(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0], int(fields[17]), fields[19]) if len(fields) > 19 else None


# --- names --------------------------------------------------------------------------------------------

_REASON = "~reason"  # behind the id, in failed/


def _format(id: str, used: int, time_us: int | None = None, since_us: int | None = None) -> str:
    """The file name of a task: see the module's docstring."""
    if time_us is None:
        return f"{id}~{used}" if used else id
    name = "%s~%d~%016d" % (id, used, time_us)
    return name if since_us is None else "%s~%016d" % (name, since_us)


def _parse(name: str) -> tuple[str, int, int, int] | None:
    """Id, deliveries used up, time (or that of its id) and since (or 0); None if it names no task."""
    id, tilde, rest = name.partition("~")
    if not _is_id(id):
        return None
    if not tilde:
        return id, 0, int(id[:16]), 0
    used, *times = rest.split("~")
    are_times = len(times) <= 2 and all(_is_digits(time_text, 16) for time_text in times)
    if not (are_times and _is_digits(used) and len(used) <= 9):
        return None
    return id, int(used), int(times[0] if times else id[:16]), int(times[1]) if len(times) > 1 else 0


def _is_id(text: str) -> bool:
    """Is this a task's id: one of ours, or what a shell script may call a task?

    16 digits, "_" and more in printable ASCII. What begins like one of ours and goes on otherwise was
    made of one by an editor or a synchronizer: `<id>.bak`, `<nonce> (conflicted copy).<crc32>`.
    """
    if not (text[16:17] == "_" and text[:16].isdigit() and text.isascii() and text.isprintable()):
        return False
    if not 17 < len(text) <= _MAX_ID:
        return False
    return _is_own(text) or not any(_is_hex(part[:18], 18) for part in text[17:].split("_")[1:])


def _is_own(id: str) -> bool:
    """Did femtoqueue make this id? Then it ends with the nonce and the checksum of the payload."""
    return id[-28:-27] == "_" and id[-9:-8] == "." and not (id[-27:-9] + id[-8:]).strip(_HEX)


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and not text.strip(_HEX)


def _order(name: str) -> str:
    """What the name of a waiting task is sorted by: its id's time and more, or its place instead."""
    return name.rpartition("~")[2] + name[16:] if name.count("~") > 1 else name


def _place_for(id: str, used: int, clock: _Clock, is_new: bool = False) -> tuple[int, str]:
    """Place and name of a task that becomes pending: that of its id, or a new one behind all others.

    A place in the future of the queue clock would let all that is pushed from now on pass by.
    """
    if not is_new and _time_of(id) <= clock.now():
        return _time_of(id), _format(id, used)
    place_us = clock.stamp()
    return place_us, _format(id, used, place_us)


def _parse_owner(name: str) -> _OwnerName | None:
    """node_id, PID, start time, place and token; None if this is not the name of an owner."""
    fields = name.split("~")
    if len(fields) != 5 or not (all(fields) and _is_digits(fields[1]) and _is_digits(fields[2])):
        return None
    node_id, pid, start, place, token = fields
    return node_id, int(pid), start, place, token


def _time_of(name: str) -> int:
    """The time that the name of a task or a bucket begins with; 0 for other names."""
    return int(name[:16]) if _is_digits(name[:16], 16) else 0


def _is_digits(text: str, length: int | None = None) -> bool:
    return text.isdigit() and text.isascii() and length in (None, len(text))


def _is_bucket(entry: os.DirEntry[str]) -> bool:
    digits, dot, token = entry.name.partition(".")
    named = _is_digits(digits, 16) and (not dot or _is_hex(token, 8))
    return named and entry.is_dir(follow_symlinks=False)


def _read_text(path: str) -> str | None:
    """A text that lies beside the tasks; None if there is none, or a link or FIFO has its name."""
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return None
        raise
    try:
        return os.read(descriptor, _CHUNK).decode("utf-8", "replace")
    except OSError as error:
        _add_path(error, path)
        raise
    finally:
        os.close(descriptor)


def _find_claim(entries: Iterable[os.DirEntry[str]], id: str, attempt: int) -> str | None:
    """The path of a claim, whatever its deadline is by now."""
    return next((e.path for e in entries if (_parse(e.name) or ())[:2] == (id, attempt)), None)


def _is_original(root: str) -> bool:
    """Does a task here begin with what the original femtoqueue wrote before each payload?"""
    directories = [entry for entry in _scan(root) if entry.is_dir(follow_symlinks=False)]
    for entry in itertools.chain.from_iterable(map(_scan, directories)):
        if entry.name.lstrip("-")[:1].isdigit() and entry.is_file(follow_symlinks=False):
            try:
                with open(entry.path, "rb") as file:
                    if file.read(8) == b"\x01" + bytes(7):
                        return True
            except (PermissionError, FileNotFoundError):
                continue
    return False


# --- payloads -----------------------------------------------------------------------------------------


def _write_all(descriptor: int, data: bytes) -> None:
    written = os.write(descriptor, data)
    while written < len(data):
        written += os.write(descriptor, memoryview(data)[written:])


def _chunks(descriptor: int) -> Iterator[bytes]:
    while chunk := os.read(descriptor, _CHUNK):
        yield chunk


def _read_more(descriptor: int, data: bytes) -> bytes | None:
    """`data` and what follows it in the file; None if that is too much to be kept in memory."""
    if os.fstat(descriptor).st_size > _CHUNK:
        os.lseek(descriptor, 0, os.SEEK_SET)  # for who computes the CRC-32
        return None
    return data + b"".join(_chunks(descriptor))


def _open_regular(path: str, flags: int) -> int:
    """Open a file that a caller named, and nothing that would block."""
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"path: {path!r} is not a regular file")
    except BaseException:
        _try(os.close, descriptor)
        raise
    return descriptor


# --- the filesystem: all renames are here, and what deletes, lists and syncs --------------------------


def _rename(source: str, target: str, patience: int = 20 if os.name == "nt" else 0) -> bool:
    """Rename; False if there is no `source`, or no directory for `target`."""
    try:
        os.rename(source, target)
        return True
    except PermissionError:
        if not patience:
            raise
    except OSError as error:
        # Over NFS, ESTALE comes when it was done, and when another was quicker.
        if error.errno == errno.ESTALE and _holds(target):
            return True
        if not _is_gone(error, source):
            raise
        return False
    time.sleep(0.01)  # on Windows, a virus scanner has it open for a moment
    return _rename(source, target, patience - 1)


def _name_once(draft: str, path: str) -> None:
    """Give a file its name, whole at once like a rename; but the first one wins, and is not replaced.

    Another host may be reading it, and would get ESTALE. Without hard links, the last one wins.
    """
    try:
        os.link(draft, path)
    except OSError:
        if not os.path.lexists(path):
            _rename(draft, path)


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError as error:
        if not _is_gone(error, path):
            raise
        return False
    return True


def _is_gone(error: OSError, path: str) -> bool:
    """Does this error say that somebody else moved `path`? ESTALE, over NFS, may mean just that."""
    if error.errno == errno.ESTALE:
        return not _holds(path)
    return error.errno in (errno.ENOENT, errno.ENOTDIR)


def _holds(path: str) -> bool:
    """Is this name in its directory? Listed, for NFS says for long what a name once was."""
    try:
        return any(entry.path == path for entry in _scan(os.path.dirname(path)))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _try(call: Callable[..., object], *arguments: object) -> None:
    """For clean-up that may fail."""
    try:
        call(*arguments)
    except OSError:
        pass


def _twice(call: Callable[..., T], *arguments: object) -> T:
    """Call again upon an OSError: when one of several servers dies, one call fails, not the next."""
    try:
        return call(*arguments)
    except OSError:
        return call(*arguments)


def _scan(directory: str | os.DirEntry[str]) -> Iterator[os.DirEntry[str]]:
    """The entries of a directory, in no order."""
    with os.scandir(directory) as entries:
        yield from entries


def _modified(directory: str) -> float:
    """When it was changed, by the filesystem's clock; 0 if unknown: whoever lists it will see."""
    try:
        return os.stat(directory).st_mtime
    except OSError:
        return 0.0


def _settled(directory: str) -> float:
    """When it was changed; if just now, what equals nothing: within a tick, it may change again."""
    changed_s = _modified(directory)
    return changed_s if abs(time.time() - changed_s) > 0.02 else float("nan")


def _make_directories(path: str) -> list[str]:
    """Make a directory and what is missing above it; return those that were made."""
    try:
        os.mkdir(path)
        return [path]
    except FileNotFoundError:
        if os.path.isdir(os.path.dirname(path)):  # in /proc
            raise
        return _make_directories(os.path.dirname(path)) + _make_directories(path)
    except FileExistsError:
        # A file, or a link that leads nowhere. In this order: a directory may be removed meanwhile.
        if not os.path.isdir(path) and os.path.lexists(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        return []


def _sync_directory(directory: str) -> None:
    """Make what was created in, renamed into or out of it survive a power cut."""
    if sys.platform == "win32" or os.name == "nt":
        return  # a directory cannot be opened there
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # emptied and removed meanwhile
        _sync_directory(os.path.dirname(directory))
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        _add_path(error, directory)
        raise
    finally:
        os.close(descriptor)


def _sync_and_close(descriptors: list[int]) -> None:
    """Sync and close files; begin to write all of them before waiting for the first."""
    if sys.platform == "linux":
        for descriptor in descriptors:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    while descriptors:
        os.fsync(descriptors[-1])
        os.close(descriptors.pop())


def _not_found(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _add_path(error: BaseException, path: str) -> None:
    """An error about a descriptor lacks it."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = path


def _log(message: str, *arguments: object, error: BaseException | None = None) -> None:
    try:
        import logging  # costs more to import than this module
    except OSError:
        return  # out of descriptors: no reason to stop what goes on

    logging.getLogger("femtoqueue").warning(message, *arguments, exc_info=error)


# --- arguments ----------------------------------------------------------------------------------------


def _check(
    name: str, value: object, wanted: str, least: float | None = None, most: float = float("inf")
) -> None:
    """Raise TypeError if `value` is not of the kind that `wanted` names, ValueError if out of range."""
    kinds: tuple[type, ...] = (int,)  # flags may be 0 and 1
    if "str" in wanted:
        kinds = (str,)
    elif "number" in wanted:
        kinds = (int, float)
    if not isinstance(value, kinds) or (isinstance(value, bool) and "True" not in wanted):
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")
    if least is None or not isinstance(value, (int, float)):
        return
    # No float holds an int above 1e308.
    if not least <= value <= most or (isinstance(value, int) and value > 1e300):
        raise ValueError(f"{name}: {value} is not between {least:g} and {most:g} ({wanted})")


def _check_state(state: str, states: Sequence[str]) -> str:
    if state not in states:
        raise ValueError(f"state: {state!r} is none of {', '.join(states)}")
    return state


def _check_node_id(node_id: str) -> None:
    _check("node_id", node_id, "str such as socket.gethostname()")
    if not (node_id and node_id.isascii() and node_id.isprintable()) or _FORBIDDEN & set(node_id):
        no = " ".join(sorted(_FORBIDDEN))
        raise ValueError(f"node_id: {node_id!r} must be printable ASCII, not empty, and without {no}")
    if len(node_id) > 64:
        raise ValueError(f"node_id: {node_id!r} is longer than 64 characters; use a shorter name")


def _as_bytes(data: object) -> bytes:
    if isinstance(data, bytes):
        return data
    if isinstance(data, str):
        raise TypeError("data: expected bytes, got str; push text.encode()")
    try:
        return bytes(memoryview(data))  # type: ignore[arg-type]
    except TypeError:
        got = f"got {type(data).__name__}; push json.dumps(it).encode()"
        raise TypeError(f"data: expected a bytes-like object, {got}") from None


def _as_path(name: str, path: Any) -> str:
    text: object = os.fspath(path) if hasattr(path, "__fspath__") else path
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected str or os.PathLike[str], got {type(text).__name__}")
    return text


def _as_due_us(time_us: int | datetime.datetime) -> int:
    import datetime

    if isinstance(time_us, datetime.datetime):
        if time_us.utcoffset() is None:
            raise ValueError("time_us: a datetime without a time zone is ambiguous; .astimezone() it")
        time_us = round(time_us.timestamp() * 1_000_000)
    if not isinstance(time_us, int):
        raise TypeError(
            "time_us: expected int microseconds, such as int(time.time() * 1_000_000), or an aware "
            f"datetime, such as datetime.now(timezone.utc) + delay; got {type(time_us).__name__}"
        )
    if not 10**14 <= time_us < _MAX_US:
        raise ValueError(
            f"time_us: {time_us} is not a time in microseconds since the epoch; "
            "int(time.time() * 1_000_000) is the present"
        )
    return time_us


def _check_has_run(result: object) -> None:
    kind = type(result).__name__
    if hasattr(result, "__await__") or kind in ("generator", "async_generator"):
        remedy = "hand over lambda task: asyncio.run(handler(task))"
        if "generator" in kind:
            remedy = "a handler has no yield"
        raise TypeError(f"handler: returned a {kind}, which has not run; {remedy}")


# --- the command line ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, as `python femtoqueue.py DIR COMMAND` does; return its exit status.

    0: done; 1: nothing was done, or it failed; 2: wrong usage.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.call(options)  # type: ignore[no-any-return]
    except (OSError, FemtoQueueError, UnicodeError) as error:
        return _complain(error)
    except (ValueError, TypeError, OverflowError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser("femtoqueue", description="A task queue in a directory.")
    parser.add_argument("--version", action="version", version=f"femtoqueue {__version__}")
    parser.add_argument("dir", metavar="DIR", help="the queue's directory")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(call: Callable[[argparse.Namespace], int], help: str) -> Callable[..., object]:
        """Add a command that is named as its function; return what adds its arguments."""
        name = call.__name__.removeprefix("_command_")
        parser = commands.add_parser(name, help=help, description=help)
        parser.set_defaults(call=call)
        return parser.add_argument

    add = command(_command_status, "how many tasks each state holds, and who works on what since when")
    add("--json", action="store_true", help="for programs")
    add("--watch", action="store_true", help="again every two seconds, until Ctrl-C")
    add = command(_command_list, "the ids in one state, oldest first")
    add("state", choices=STATES)
    add("--reasons", action="store_true", help="behind each id, why it failed")
    add = command(_command_push, "add files, or standard input, as tasks; print their ids")
    add("files", nargs="*", metavar="FILE", help="none: standard input")
    add = command(_command_schedule, "add standard input as a task for later; print its id")
    add("when", help="ISO time (local unless it has an offset), or +30s, +10m, +2h, +1d")
    add = command(_command_run, "run a command for each task, with the payload as its standard input")
    add("--until-empty", action="store_true", help="stop when nothing is pending or due")
    add("--max-attempts", type=int, metavar="N", help="then the task fails (default: no limit)")
    add("--lease", default="30s", help="after which another machine takes a task over (default: 30s)")
    add("--node-id", help="a stable name of this machine or container (default: one for each boot)")
    add("cmd", metavar="-- CMD", help="exit status 0 is done, 100 failed for good, others are retried")
    add("arguments", nargs=argparse.REMAINDER, help="of the command")
    add = command(_command_requeue, "make failed, corrupt, done or scheduled tasks pending now")
    add("ids", nargs="+", metavar="ID")
    add = command(_command_cancel, "drop pending or scheduled tasks")
    add("ids", nargs="+", metavar="ID")
    add = command(_command_purge, "delete tasks that have been in a state for some time")
    add("state", choices=[state for state in STATES if state != "in_progress"])
    add("age", help="how long ago: 30s, 10m, 2h, 7d")
    return parser


def _complain(message: object) -> int:
    try:
        if sys.stderr is not None:  # `2>&-`
            print(f"femtoqueue: {message}", file=sys.stderr)
    except OSError:
        pass  # nobody reads that any more
    return 1


def _open(options: argparse.Namespace, make: bool = False, **more: Any) -> FemtoQueue:
    if not make and not any(os.path.isdir(f"{options.dir}/{state}") for state in STATES):
        raise FemtoQueueError(f"there is no queue at {options.dir}; push makes one")
    # Hosts and containers are often named alike, and each must have a node_id of its own.
    place = _host_name() + _identity().place
    node_id = getattr(options, "node_id", None) or f"cli-{zlib.crc32(place.encode()):08x}"
    return FemtoQueue(options.dir, node_id, **more)


def _input() -> BinaryIO:
    if sys.stdin is None:  # `<&-`
        raise FemtoQueueError("standard input is closed")
    return sys.stdin.buffer


def _seconds(text: str) -> float:
    """Seconds in "30s", "10m", "2h" or "7d"."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
    try:
        if unit and 0 <= (seconds := float(text[:-1]) * unit) < 1e10:
            return seconds
    except ValueError:
        pass
    raise ValueError(f"{text!r} is no length of time; write 30s, 10m, 2h or 7d")


def _command_status(options: argparse.Namespace) -> int:
    import json

    queue = _open(options)
    while True:
        report = _report(queue)
        print(json.dumps(report) if options.json else _as_table(report), flush=True)
        if not options.watch:
            return 0
        time.sleep(2)


def _report(queue: FemtoQueue) -> dict[str, list[dict[str, Any]]]:
    """What the `status` command shows: each state, and each claim."""
    states: list[dict[str, Any]] = []
    for state, count in queue.counts().items():
        first = None if state in _FINISHED else next(queue.ids(state), None)
        oldest_s = time.time() - _time_of(first) / 1e6 if first else None
        states.append({"state": state, "count": count, "oldest_s": oldest_s})
    return {"states": states, "claims": queue.claims()}


def _as_table(report: dict[str, list[dict[str, Any]]]) -> str:
    lines = []
    for rows in report.values():
        if rows:
            table = [[name.removesuffix("_s") for name in rows[0]]]
            table += [[_cell(*item) for item in row.items()] for row in rows]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table] + [""]
    return "\n".join(lines[:-1])


def _cell(column: str, value: object) -> str:
    if isinstance(value, float) and column.endswith("_s"):
        for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
            if abs(value) >= 2 * length:
                return f"{value / length:.0f}{unit}"
        return f"{value:.0f}s"
    return "-" if value is None else str(value)


def _command_list(options: argparse.Namespace) -> int:
    queue, id = _open(options), None
    for id in queue.ids(options.state):
        reason = (queue.reason(id) or "").strip().splitlines() if options.reasons else []
        print(f"{id}  {reason[-1]}" if reason else id)
    return 1 if id is None else 0


def _command_push(options: argparse.Namespace) -> int:
    queue = _open(options, make=True)
    for path in options.files:
        if not os.path.exists(path):
            text = f"there is no file {path!r}; to push text: echo ... | femtoqueue DIR push"
            raise FemtoQueueError(text)
        print(queue.push_file(path), flush=True)
    if not options.files:
        print(queue.push_file(_input()))
    return 0


def _command_schedule(options: argparse.Namespace) -> int:
    import datetime

    due: int | datetime.datetime
    if options.when.startswith("+"):
        due = _wall_us() + int(_seconds(options.when[1:]) * 1_000_000)
    else:
        try:
            due = datetime.datetime.fromisoformat(options.when.removesuffix("Z"))
        except ValueError:
            raise ValueError(f"{options.when!r} is no time; write 2030-01-31T08:00 or +10m") from None
        in_utc = options.when.endswith("Z")  # which Python 3.10 does not read
        due = due.replace(tzinfo=datetime.timezone.utc) if in_utc else due.astimezone()
    _as_due_us(due)  # before a queue is made, and standard input is read
    print(_open(options, make=True).schedule(_input().read(), due))
    return 0


def _command_run(options: argparse.Namespace) -> int:
    import logging
    import shutil

    if shutil.which(options.cmd) is None:  # not worth an attempt of each task
        if os.path.exists(options.cmd):
            raise ValueError(f"{options.cmd!r} is not executable; chmod +x it")
        raise ValueError(f"there is no command {options.cmd!r}; for a pipeline: sh -c '...'")
    _reset_signals()

    formatter = logging.Formatter("femtoqueue: %(message)s")
    formatter.formatException = lambda ei: ""  # type: ignore[method-assign]  # one line an error
    console = logging.StreamHandler()
    console.setFormatter(formatter)
    logging.getLogger("femtoqueue").addHandler(console)

    def handle(task: FemtoTask) -> None:
        """Run the command for a task; its exit status is the verdict."""
        status = _run_command([options.cmd, *options.arguments], task)
        if status == 100:  # as for qmail-local
            _log("%s: failed for good: %s: exit status 100", task.id, options.cmd)
            queue.fail(task, f"{options.cmd}: exit status 100")
        elif status:
            raise FemtoQueueError(f"{options.cmd}: exit status {status}")

    if not os.path.isdir(options.dir):
        _complain(f"{options.dir}: a new queue")  # or a mistyped one would go unnoticed
    more = {"max_attempts": options.max_attempts, "timeout_stale_ms": _seconds(options.lease) * 1_000}
    with _open(options, make=True, **more) as queue:
        count = queue.run(handle, until_empty=options.until_empty)
    return 0 if count or not options.until_empty else 1


def _reset_signals() -> None:
    """Undo what a parent left: its mask and what it ignored are inherited, over exec too."""
    import signal

    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it hides each exit status
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a closed log must not end a worker
        # Ctrl-Z would stop the renewal of the lease and not the command. (SIG_IGN is inherited.)
        signal.signal(signal.SIGTSTP, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _run_command(command: list[str], task: FemtoTask) -> int:
    import signal
    import subprocess

    with open(task.path, "rb", buffering=0) as payload:
        # The claim is renamed when its lease is renewed; the open file has a name that stays.
        path = f"/proc/{os.getpid()}/fd/{payload.fileno()}"
        about = {
            "FEMTOQUEUE_ID": task.id,
            "FEMTOQUEUE_ATTEMPT": str(task.attempt),
            "FEMTOQUEUE_PATH": path if os.path.exists(path) else task.path,
        }
        # In a session of its own: Ctrl-C is for us, who let it finish.
        own_session = sys.platform != "win32"
        child = subprocess.Popen(
            command, stdin=payload, env=os.environ | about, start_new_session=own_session
        )
        try:
            return child.wait()
        except BaseException:
            if sys.platform == "win32":
                child.kill()
            else:
                _try(os.killpg, child.pid, signal.SIGKILL)  # unless it runs as somebody else now
            child.wait()
            raise


def _command_requeue(options: argparse.Namespace) -> int:
    return _for_each(options, FemtoQueue.requeue, "failed, corrupt, done or scheduled")


def _command_cancel(options: argparse.Namespace) -> int:
    return _for_each(options, FemtoQueue.cancel, "pending or scheduled")


def _for_each(options: argparse.Namespace, call: Callable[[FemtoQueue, str], bool], wanted: str) -> int:
    queue, status = _open(options), 0
    for id in options.ids:
        if not call(queue, id):
            state = queue.status(id)
            status = _complain(f"{id} is {state}, not {wanted}" if state else f"there is no task {id}")
    return status


def _command_purge(options: argparse.Namespace) -> int:
    print(count := _open(options).purge(options.state, _seconds(options.age)))
    return 0 if count else 1


def _script() -> None:
    import signal

    if sys.platform != "win32":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... list done | head` ends quietly
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # To the shell, which ends its script too, an interrupt must look like one.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    _script()
