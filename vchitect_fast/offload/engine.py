"""Moves tensors out of device memory and back, over the C++ engine: a storage once, however many views of it are saved.

    entry = engine.offload(tensor, label)    the copy out starts; the engine holds the tensor until it is done
    handle = entry.handle(tensor)            this view of it: shape, strides, offset
    engine.fetch(entry)                      the copy back starts (ahead of use, or not at all: restore does it)
    engine.restore(handle)                   the view, whole; UserError when the tensor was changed after it was saved

A handle that dies gives its slot back, and `abandon` takes it from one that a failed graph keeps alive. The caller's stream is asked for at every
call. On a CPU the "device" is ordinary memory, copied by memcpy. Refused, never passed over: subclasses of Tensor (DTensor
among them), sparse, quantized and meta tensors, another device. What is worth moving is decided above.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import nullcontext
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from vchitect_fast.errors import UserError
from vchitect_fast.machine import available_memory_bytes
from vchitect_fast.offload.policy import SLOT_BYTES
from vchitect_fast.profiling.span import span

SPARSE_VIEW = 2  # a view is packed by rows when its storage is at least this many times larger


class Entry:
    """Bytes in the pool: a whole storage, or the rows of one view of a much larger storage."""

    def __init__(self, engine: Engine, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        self.label, self.engine = label, engine
        self.storage = StorageWeakRef(storage)  # holds the identity, not the bytes
        self.rows = _rows(tensor)
        self.num_bytes = self.rows[0] * self.rows[1] if self.rows else storage.nbytes()
        self.packed_stride = torch.empty(tensor.shape, device="meta").stride() if self.rows else None
        self.source: Tensor | None = alias_of(tensor)  # until the copy out is done, or longer when it is wanted by then
        self.wanted = False
        self.in_flight_bytes = self.num_bytes
        self.version, self.witness = tensor._version, _witness(tensor)
        self.ticket: int | None = None
        self.fetched: Tensor | None = None  # the bytes back on the device, until every handle had them once
        self.arrived: StorageWeakRef | None = None  # the same for as long as anybody uses them
        self.num_handles = self.num_restored = 0
        self.key: tuple[Any, ...] | None = None

    def handle(self, tensor: Tensor) -> Handle:
        """A view of these bytes as `tensor` sees them."""
        self.num_handles += 1
        return Handle(self, tensor)

    def __del__(self) -> None:
        if self.ticket is not None:  # no lock here: this may run in the middle of anything
            self.engine._dead.append((self.ticket, self.in_flight_bytes, self.source, self.fetched))


class Handle:
    """One saved view: keeps its Entry alive and says how to see the bytes."""

    def __init__(self, entry: Entry, tensor: Tensor) -> None:
        self.entry = entry
        self.dtype, self.size = tensor.dtype, tensor.size()
        self.stride = entry.packed_stride or tensor.stride()
        self.offset = 0 if entry.rows else tensor.storage_offset()


class Engine:
    """The tensors of one device and their pool.

    budget_bytes         of the pool, rounded up to whole slots
    device               whose tensors are moved: a CUDA device needs a build with the CUDA copier
    max_in_flight_bytes  sources that may wait for their copy out; beyond it the oldest is waited for
    debug                for tests: delay_us_max, seed, without (csrc/copier_faulty.h)

    Raises UserError when the module is missing, the build has no copier for the device, or the budget exceeds free memory.
    """

    def __init__(
        self, budget_bytes: int, device: torch.device | str = "cpu", *, max_in_flight_bytes: int = 2**30,
        numa_node: int = -1, **debug: Any,
    ) -> None:  # fmt: skip
        try:
            from vchitect_fast import _C
        except ImportError as error:
            raise UserError(
                f"offload needs the C++ module and it is not there ({error}); install without VCHITECT_FAST_EXT=0, or plan without offload."
            ) from None
        self.device = torch.device(device)
        cuda = self.device.type == "cuda"
        if cuda and not _C.build_info()["cuda"]:
            raise UserError(
                "offload from a GPU needs the CUDA copier and this build has none; build with VCHITECT_FAST_CUDA=1, or plan without offload."
            )
        budget = max(1, -(-budget_bytes // SLOT_BYTES)) * SLOT_BYTES
        if budget > (free := available_memory_bytes()):
            raise UserError(
                f"the offload pool needs {budget} bytes ({budget / 2**30:.2f} GiB), of main memory {free} are free "
                "(limits of the container included); offload less, or raise the limit."
            )
        self.budget_error: type[Exception] = _C.BudgetError
        with torch.cuda.device(self.device) if cuda else nullcontext():  # the copier's is the one that is current
            self.mover = _C.Engine(budget, SLOT_BYTES, cuda=cuda, numa_node=numa_node, **debug)
        self.max_in_flight_bytes = max_in_flight_bytes
        self.lock = RLock()
        self._known: dict[tuple[Any, ...], weakref.ref[Entry]] = {}
        self._in_flight: deque[weakref.ref[Entry]] = deque()
        self._in_flight_bytes = 0
        self._dead: deque[tuple[int, int, Tensor | None, Tensor | None]] = deque()

    def offload(self, tensor: Tensor, label: str) -> Entry:
        """Start to move what `tensor` is a view of, unless it is in the pool already. `label` names it in errors."""
        self._check(tensor, label)
        with self.lock:
            self._collect()
            key = _key(tensor)
            known = self._known.get(key)
            entry = known() if known else None
            if entry is not None and entry.ticket is not None:
                return entry
            entry = Entry(self, tensor, label)
            address, row_bytes, num_rows, pitch = _source(tensor, entry.rows)
            stream = current_stream(self.device)
            try:
                with span("copy_out/start"):
                    entry.ticket = self.mover.offload(address, row_bytes, num_rows, pitch, stream)
            except self.budget_error as error:
                raise UserError(f"no room to offload {label}: {error}") from None
            entry.key = key
            self._known[key] = weakref.ref(entry, partial(_forget, self._known, key))
            self._in_flight.append(weakref.ref(entry))
            self._in_flight_bytes += entry.num_bytes
            self._drop_sources()
            return entry

    def fetch(self, entry: Entry) -> None:
        """Start to bring an entry back unless it is on the device or on its way."""
        with self.lock:
            self._drop_sources()
            if entry.source is not None:
                entry.wanted = True  # it has not left yet: it stays
            elif entry.fetched is None and self._arrived(entry) is None:
                assert entry.ticket is not None
                with span("copy_in/start"):
                    entry.fetched = _buffer(entry.num_bytes, self.device)
                    self.mover.prefetch(entry.ticket, entry.fetched.data_ptr(), 0, current_stream(self.device))

    def restore(self, handle: Handle) -> Tensor:
        """The saved view. What has not left yet is not fetched: the source itself is handed back."""
        entry = handle.entry
        with self.lock:
            if entry.ticket is None:
                raise RuntimeError(f"{entry.label} was given up with its step; run forward again.")
            if entry.witness._version != entry.version:
                raise UserError(
                    f"{entry.label} was changed in place after it was saved for backward (version {entry.version}, now "
                    f"{entry.witness._version}); change a clone of it, or keep this group."
                )
            entry.num_restored += 1
            self.fetch(entry)
            if entry.source is not None:
                return entry.source.detach() if entry.rows else _view(entry.source.untyped_storage(), handle)
            storage = self._arrived(entry)
            if storage is None:
                assert entry.fetched is not None and entry.ticket is not None
                with span("copy_in/wait"):  # on a CUDA device a stream waits, not this thread
                    self.mover.wait(entry.ticket, current_stream(self.device))
                storage = entry.fetched.untyped_storage()
                entry.arrived = StorageWeakRef(storage)
            if entry.num_restored >= entry.num_handles:
                entry.fetched = None  # from here on it lives as long as its users
            return _view(storage, handle)

    @staticmethod
    def _arrived(entry: Entry) -> torch.UntypedStorage | None:
        if entry.arrived is None:
            return None
        return torch.UntypedStorage._new_with_weak_ptr(entry.arrived.cdata)

    def abandon(self, entry: Entry) -> None:
        """Give an entry's memory back although handles live: its step failed, and torch may hold a failed graph for good."""
        with self.lock:
            if entry.ticket is not None:
                self._dead.append((entry.ticket, entry.in_flight_bytes, entry.source, entry.fetched))
                entry.ticket = entry.source = entry.fetched = entry.arrived = None
                entry.in_flight_bytes = 0
                self._known.pop(entry.key or (), None)
                self._collect()

    def settle(self) -> None:
        """Wait for every copy and give back every slot that no handle needs."""
        with self.lock:
            self._drop_sources(everything=True)
            self._collect()
            self.mover.settle()

    def stats(self) -> dict[str, int | float]:
        """Of the pool and of the copies in each direction (csrc/bindings.cpp), dead handles collected first."""
        with self.lock:
            self._collect()
            return {**self.mover.stats(), "in_flight_bytes": self._in_flight_bytes}

    def _check(self, tensor: Tensor, label: str) -> None:
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            raise UserError(
                f"cannot offload {label}: expected a plain strided tensor, got {type(tensor).__name__} of layout {tensor.layout}; keep this group."
            )
        if tensor.device.type != self.device.type or self.device.index not in (None, tensor.device.index):
            raise UserError(
                f"cannot offload {label}: expected a tensor on {self.device}, got one on {tensor.device}; keep this group."
            )
        if tensor.untyped_storage().nbytes() == 0:
            raise UserError(f"cannot offload {label}: the tensor has no bytes; keep this group.")

    def _drop_sources(self, *, everything: bool = False) -> None:
        """Let go of sources whose copy out is done; wait for the oldest while too many bytes are in flight."""
        while self._in_flight:
            entry = self._in_flight[0]()
            if entry is not None and entry.source is not None:
                assert entry.ticket is not None
                if not self.mover.done(entry.ticket):
                    if not everything and self._in_flight_bytes <= self.max_in_flight_bytes:
                        return
                    with span("copy_out/wait"):
                        self.mover.wait(entry.ticket, current_stream(self.device))
                self._drop(entry)
            self._in_flight.popleft()

    def _drop(self, entry: Entry) -> None:
        self._in_flight_bytes -= entry.in_flight_bytes
        entry.in_flight_bytes = 0
        if not entry.wanted:
            entry.source = None

    def _collect(self) -> None:
        """Release the tickets of dead entries; their memory must outlive the copies in flight."""
        while self._dead:
            ticket, in_flight_bytes, source, fetched = self._dead.popleft()
            self._in_flight_bytes -= in_flight_bytes
            if source is not None or fetched is not None:
                self.mover.wait(ticket, current_stream(self.device))
            self.mover.release(ticket)


def current_stream(device: torch.device) -> int:
    """The handle of the stream that work is put into now; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _buffer(num_bytes: int, device: torch.device) -> Tensor:
    """Device memory for what comes back; the copy into it starts after what the caller's stream holds now."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _forget(known: dict[tuple[Any, ...], weakref.ref[Entry]], key: tuple[Any, ...], reference: object) -> None:
    """Called when an Entry dies."""
    if known.get(key) is reference:  # a later entry may have taken the place
        del known[key]


def alias_of(tensor: Tensor) -> Tensor:
    """The same bytes and version counter in a tensor of its own: the original may get a grad_fn and would close a cycle.

    The guard matters inside a dispatch mode, where a plain detach would start a version counter of its own.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _witness(tensor: Tensor) -> Tensor:
    """Shares the version counter of `tensor` and none of its bytes."""
    alias = alias_of(tensor)
    alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias


def _view(storage: torch.UntypedStorage, handle: Handle) -> Tensor:
    return torch.empty(0, dtype=handle.dtype, device=storage.device).set_(
        storage, handle.offset, handle.size, handle.stride
    )


def _key(tensor: Tensor) -> tuple[Any, ...]:
    """The same for tensors whose bytes need to be moved once: storage (an identity, not an address), version, and rows."""
    part = None
    if _rows(tensor) is not None:
        part = (tensor.storage_offset(), tuple(tensor.size()), tensor.stride(), tensor.dtype)
    return (tensor.untyped_storage()._cdata, tensor._version, part)


def _rows(tensor: Tensor) -> tuple[int, int, int] | None:
    """(row_bytes, num_rows, pitch_bytes) when the tensor is a small part of its storage that one 2-D copy can pack."""
    size = tensor.element_size()
    if tensor.numel() == 0 or SPARSE_VIEW * tensor.numel() * size > tensor.untyped_storage().nbytes():
        return None
    row, rows, pitch = 1, 1, 0  # in elements; dims from the innermost out, first those that make a row
    for length, stride in reversed([(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]):
        if rows == 1 and stride == row:
            row *= length
        elif rows == 1 and stride > row:
            rows, pitch = length, stride
        elif rows > 1 and stride == rows * pitch:
            rows *= length
        else:
            return None
    return row * size, rows, pitch * size


def _source(tensor: Tensor, rows: tuple[int, int, int] | None) -> tuple[int, int, int, int]:
    """(address, row_bytes, num_rows, pitch) of what is moved."""
    if rows is None:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes(), 1, 0
    return tensor.data_ptr(), *rows
