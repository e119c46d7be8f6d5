"""`DeltaRuleState`: a pool of recurrent states, one slot a sequence."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gdr import _arrays, _backends, _inputs, _spec, _state_file
from gdr._ring import MAX_DRAFTS

_STATE_NAMES = {
    "initial_state": "the pool",
    "final_state": "the pool",
    "initial_slots": "slots",
    "final_slots": "slots",
    "A_log": "the state's A_log",
    "dt_bias": "the state's dt_bias",
}
_FORMS = {op: _spec.Form(op, (*_spec.TOKENS, *_spec.RAW_GATES), _STATE_NAMES) for op in ("fused_recurrent", "chunk")}

_anywhere = nullcontext()

# Tokens a slot that steps leave pending, by backend: what was fastest.  Numba's kernel has a state in the cache anyway.
RING = {"numpy": 16, "numba": 0, "cuda": 0}
MAX_RING = 256


class DeltaRuleState:
    """Recurrent states of the gated delta rule in a pool of slots.

    Parameters
    ----------
    num_slots : int
        Slots in the pool; each holds one sequence's state ``[HV, K, V]``.
    num_v_heads, head_k_dim, head_v_dim : int
        HV, K and V.
    num_k_heads : int, optional
        H, a divisor of HV; HV by default.
    A_log, dt_bias : array, shape [HV], optional
        Gate parameters, copied as float32.  Without `A_log` the state can be read and written but not stepped;
        `dt_bias` is 0 by default.
    scale : float, optional
        Factor of the queries; ``K ** -0.5`` by default.
    use_qk_l2norm : bool, default True
        Divide q and k by ``sqrt(sum(x ** 2) + 1e-6)`` first.
    softplus_beta, softplus_threshold : float
        The softplus of the gate.
    dtype : {"float32", "float16", "bfloat16"}, default "float32"
        What the states are kept in ("float64" as well on the host).
    layout : {"kv", "vk"}, default "kv"
        Order of the last two axes of the pool.
    device : str, default "cpu"
        "cpu", "cuda" or "cuda:1".
    ring : int, optional
        Tokens of a slot that `step` may leave pending before it writes them into the state in one go; 0: every step
        writes the state.  By default what is fastest: 16 with NumPy and, for states of 16 bits, with
        Numba; else 0.
    stagger : bool, default False
        Let the first tokens of slot s be written after ``1 + s % ring`` of them, so that sequences that started
        together do not have all their states written in the same step.  The last bits of a result then depend on the
        slot.

    Raises
    ------
    TypeError, ValueError
        An argument of a wrong type or out of range, by name.

    Notes
    -----
    Pending tokens, and the drafts of `verify`, are kept in float32 on the host (float64 for a float64 state), and in
    the pool's dtype on a GPU, where `ring` is at most 32.  Everything that reads a state sees its pending tokens.

    The drafts of a slot are dropped by `commit` and `rollback`, by another `verify`, and by whatever writes the slot:
    `step`, `prefill`, `write`, `reset`, `free`, `flush` and `pool`.  `read`, `fork`, `save` and `to` see the state
    without drafts and leave them as they are; a fork has none.

    Slot bookkeeping lives on the host and is thread-safe: `alloc` and `fork` return NumPy int32.  Every method takes
    slots as an integer, a sequence or a NumPy array and checks them; on a GPU `step`, `prefill`, `read`, `write` and
    `reset` take a device array as well, which is neither copied nor checked (a slot outside the pool is padding), so
    that they can be captured in a graph.

    On a GPU, work goes to torch's current stream where tensors of torch are given, else to CuPy's.

    Examples
    --------
    >>> import numpy as np, gdr
    >>> state = gdr.DeltaRuleState(8, 4, 16, 16, num_k_heads=2, A_log=np.zeros(4))
    >>> slots = state.alloc(3)
    >>> x = gdr.testing.make_inputs(B=3, T=1, H=2, HV=4, K=16, V=16)
    >>> state.step(x.q, x.k, x.v, x.a, x.b, slots).shape
    (3, 1, 4, 16)
    >>> state.free(slots)
    >>> state.num_free
    8
    """

    def __init__(
        self,
        num_slots: int,
        num_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        *,
        num_k_heads: int | None = None,
        A_log: Any | None = None,
        dt_bias: Any | None = None,
        scale: float | None = None,
        use_qk_l2norm: bool = True,
        softplus_beta: float = 1.0,
        softplus_threshold: float = 20.0,
        dtype: str = "float32",
        layout: str = "kv",
        device: str = "cpu",
        ring: int | None = None,
        stagger: bool = False,
    ) -> None:
        num_k_heads = num_v_heads if num_k_heads is None else num_k_heads
        for name, value, most in (
            ("num_slots", num_slots, 2**31 - 1),
            ("num_v_heads", num_v_heads, 2**15),
            ("head_k_dim", head_k_dim, _spec.MAX_HEAD_DIM),
            ("head_v_dim", head_v_dim, _spec.MAX_HEAD_DIM),
            ("num_k_heads", num_k_heads, 2**15),
        ):
            _inputs.check_whole_number(name, value, most)
        if num_v_heads % num_k_heads:
            raise ValueError(f"num_k_heads: expected a divisor of num_v_heads = {num_v_heads}, got {num_k_heads}")
        if layout not in _spec.LAYOUTS:
            raise ValueError(f"layout: expected 'kv' or 'vk', got {layout!r}")
        _inputs.check_flag("use_qk_l2norm", use_qk_l2norm)
        _inputs.check_flag("stagger", stagger)
        if ring is not None:
            _inputs.check_whole_number("ring", ring, MAX_RING, least=0)
        self.num_slots, self.num_v_heads, self.num_k_heads = (
            int(num_slots),
            int(num_v_heads),
            int(num_k_heads),
        )
        self.head_k_dim, self.head_v_dim = int(head_k_dim), int(head_v_dim)
        self.scale = self.head_k_dim**-0.5 if scale is None else _inputs.number("scale", scale)
        self.use_qk_l2norm = bool(use_qk_l2norm)
        self.softplus_beta = _inputs.positive("softplus_beta", softplus_beta)
        self.softplus_threshold = _inputs.number("softplus_threshold", softplus_threshold)
        self.layout = layout
        self._xp, self.device, self._here = _placement(device)
        self.dtype = _state_dtype(dtype, device)
        self.A_log = self._head_parameter("A_log", A_log)
        self.dt_bias = self._head_parameter("dt_bias", dt_bias)
        if self.A_log is not None and self.dt_bias is None:
            self.dt_bias = self._place(np.zeros(self.num_v_heads, np.float32))
        if self.A_log is None and self.dt_bias is not None:
            raise ValueError("dt_bias: given without A_log")
        with self._here():
            self._pool = self._xp.zeros((self.num_slots, *self._slot_shape), _arrays.numpy_dtype(self.dtype))
        self._lock = threading.Lock()
        self._allocated = np.zeros(self.num_slots, bool)
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._dirty = np.zeros(self.num_slots, bool)
        self._asked_ring = None if ring is None else int(ring)
        self.ring = self._default_ring() if ring is None else int(ring)
        self.stagger = bool(stagger)
        # The tokens that are not in the pool yet.  A pool without a ring has one for drafts from the first of them on.
        self._ring: Any = None
        if self.ring and self.A_log is not None:
            self._make_ring()

    @property
    def _slot_shape(self) -> tuple[int, int, int]:
        last = (self.head_k_dim, self.head_v_dim)
        return (self.num_v_heads, *(last if self.layout == "kv" else last[::-1]))

    @property
    def pool(self) -> Any:
        """The states, ``[num_slots, HV, K, V]`` (``[num_slots, HV, V, K]`` with layout "vk"); writable in place.

        Ask for it anew after a `step`: tokens may be pending then that only this property, like `flush`, writes into
        the states.
        """
        self.flush()
        return self._pool

    @property
    def num_free(self) -> int:
        """Slots that `alloc` can still hand out."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the pool takes, with what is kept of tokens that are not written into it yet."""
        return self._pool.nbytes + (self._ring.nbytes if self._ring is not None else 0)

    def __repr__(self) -> str:
        return (
            f"DeltaRuleState({self.num_slots} slots, {self.num_free} free, HV={self.num_v_heads}, "
            f"H={self.num_k_heads}, K={self.head_k_dim}, V={self.head_v_dim}, dtype={self.dtype!r}, "
            f"layout={self.layout!r}, device={self.device!r}, ring={self.ring}"
            f"{', stagger=True' if self.stagger else ''}, {self.nbytes / 2**20:.1f} MiB)"
        )

    def alloc(self, n: int = 1) -> np.ndarray:
        """Take `n` slots, whose states are zero.

        Returns
        -------
        slots : ndarray of int32, shape [n]

        Raises
        ------
        ValueError
            Fewer than `n` slots are free; none is taken.
        """
        _inputs.check_whole_number("n", n, least=0)
        with self._lock:
            if n > len(self._free):
                raise ValueError(f"n: asked for {n} slots, but {len(self._free)} of {self.num_slots} are free")
            slots = np.array([self._free[-1 - i] for i in range(n)], np.int32)
            stale = slots[self._dirty[slots]]
            if stale.size:
                self._set(self._place(stale), np.float32(0))
                self._dirty[stale] = False
            del self._free[len(self._free) - n :]
            self._allocated[slots] = True
        return slots

    def free(self, slots: Any) -> None:
        """Give slots back.

        Raises
        ------
        ValueError
            A slot is not allocated, or named twice; nothing is freed.
        """
        host = self._host_slots(slots, padding=False)
        with self._lock:
            self._check_allocated(host)
            self._allocated[host] = False
            self._dirty[host] = True
            self._free.extend(host[::-1].tolist())

    def reset(self, slots: Any) -> None:
        """Set the states of slots to zero."""
        with self._in_order_with(slots):
            self._set(self._index(slots), np.float32(0))

    def fork(self, slots: Any) -> np.ndarray:
        """Copy the states of slots to as many new slots.

        Returns
        -------
        new_slots : ndarray of int32, shape [n]

        Raises
        ------
        ValueError
            A slot is not allocated, or fewer than n slots are free; nothing changes.
        """
        host = self._host_slots(slots, padding=False, unique=False)
        self._check_allocated(host)
        new = self.alloc(host.size)
        self._dirty[new] = True
        try:
            self._copy(self._place(host), self._place(new))
        except BaseException:
            self.free(new)
            raise
        return new

    def read(self, slots: Any) -> Any:
        """Copy of the states of slots, ``[n, HV, K, V]`` in the pool's layout and dtype."""
        with self._in_order_with(slots):
            return self._get(self._index(slots, unique=False))

    def write(self, slots: Any, h: Any) -> None:
        """Set the states of slots to `h` ``[n, HV, K, V]``, in the pool's layout; cast to its dtype.

        Raises
        ------
        TypeError, ValueError
            `h` is no floating array on the pool's device, or its shape does not fit; nothing is written.
        """
        with self._in_order_with(h, slots):
            self._write(slots, h)

    def _write(self, slots: Any, h: Any) -> None:
        index = self._index(slots)
        library = _arrays.library_of(h)
        if library is None:
            raise TypeError(f"h: expected a NumPy, CuPy, torch or JAX array, got {type(h).__name__}")
        meta = library.meta(h)
        if (meta.device == "cpu") != (self.device == "cpu"):
            raise TypeError(f"h: expected an array on {self.device}, got one on {meta.device}")
        if meta.dtype not in _arrays.FLOATS:
            raise TypeError(f"h: expected a floating dtype, got {meta.dtype}")
        if meta.shape != (len(index), *self._slot_shape):
            raise ValueError(f"h: expected shape {[len(index), *self._slot_shape]}, got {list(meta.shape)}")
        h = library.adopt(h)
        if self.device != "cpu":
            with self._here():
                h = _arrays.as_cupy(h)
        self._set(index, h)

    def step(self, q: Any, k: Any, v: Any, a: Any, b: Any, slots: Any, *, out: Any | None = None) -> Any:
        """Run one token of each sequence and update the states.

        Parameters
        ----------
        q, k : array, shape [N, H, K] or [N, 1, H, K]
        v : array, shape [N, HV, V] or [N, 1, HV, V]
        a, b : array, shape [N, HV] or [N, 1, HV]
            Raw logits of the decay and of the write strength.
        slots : int array, shape [N]
            Each sequence's slot; a negative one is padding.
        out : array, v's shape and dtype, optional
            Where the output goes.

        Returns
        -------
        o : array, v's shape, dtype and library

        Raises
        ------
        TypeError, ValueError, IndexError
            By the argument's name; see `fused_sigmoid_gating_delta_rule_update`.  A slot that is not allocated, or
            twice in `slots`, is refused.  Nothing is changed.
        """
        flat = getattr(v, "ndim", 0) == 3
        if flat:
            q, k, v = (x[:, None] if getattr(x, "ndim", 0) == 3 else x for x in (q, k, v))
            out = out[:, None] if out is not None and out.ndim == 3 else out
        if getattr(q, "ndim", 0) == 4 and q.shape[1] != 1:
            raise ValueError(f"q: step takes one token a sequence, shape [N, H, K] or [N, 1, H, K]; got {q.shape}")
        o = self._run("fused_recurrent", q, k, v, a, b, slots, None, out)
        return o[:, 0] if flat else o

    def prefill(
        self,
        q: Any,
        k: Any,
        v: Any,
        a: Any,
        b: Any,
        slots: Any,
        cu_seqlens: Any | None = None,
        *,
        out: Any | None = None,
        batch_invariant: bool = False,
        wide_range: bool = False,
        workspace: Any | None = None,
    ) -> Any:
        """Run many tokens of each sequence and update the states: chunkwise for long sequences, else token by token.

        Parameters
        ----------
        q, k : array, shape [B, T, H, K]
        v : array, shape [B, T, HV, V]
        a, b : array, shape [B, T, HV]
            Raw logits of the decay and of the write strength.
        slots : int array, shape [N]
            Each sequence's slot; a negative one is padding.
        cu_seqlens : array of int32 or int64, shape [N + 1], optional
            Offsets of packed sequences along T; B is then 1.
        out : array, v's shape and dtype, optional
            Where the output goes.
        batch_invariant : bool, default False
            Make the bits of a sequence's result independent of the rest of the batch.
        wide_range : bool, default False
            For keys that are not normalised, huge or tiny values on CUDA, as of `chunk_gated_delta_rule`.
        workspace : array of uint8 on the pool's device, shape [bytes], optional
            Scratch memory, as of `chunk_gated_delta_rule`; not needed where tokens run one by one.

        Returns
        -------
        o : array, shape [B, T, HV, V]

        Raises
        ------
        TypeError, ValueError, IndexError
            As `step`.
        """
        tokens = q.shape[1] if getattr(q, "ndim", 0) == 4 else 0
        if cu_seqlens is not None and getattr(cu_seqlens, "ndim", 0) == 1:
            tokens /= max(1, len(cu_seqlens) - 1)
        # On CUDA the launcher of chunks runs short sequences token by token.
        by_chunks = tokens >= _backends.CHUNK_FROM["cpu"] if self.device == "cpu" else tokens > 1
        return self._run(
            "chunk" if by_chunks or batch_invariant else "fused_recurrent",
            *(q, k, v, a, b, slots, cu_seqlens, out),
            workspace=workspace,
            batch_invariant=batch_invariant,
            wide_range=wide_range,
        )

    def verify(
        self,
        q: Any,
        k: Any,
        v: Any,
        a: Any,
        b: Any,
        slots: Any,
        parents: Any | None = None,
        *,
        out: Any | None = None,
    ) -> Any:
        """Run draft tokens of each sequence without committing them: `commit` keeps some, `rollback` none.

        Parameters
        ----------
        q, k : array, shape [N, T, H, K]
            T from 1 to 16.
        v : array, shape [N, T, HV, V]
        a, b : array, shape [N, T, HV]
            Raw logits of the decay and of the write strength.
        slots : int array, shape [N]
            Each sequence's slot; a negative one is padding.
        parents : int array, shape [N, T], optional
            The draft that each draft follows, an earlier one, or -1 where it follows the state itself.  None: a chain,
            in which every draft follows the one before it.
        out : array, v's shape and dtype, optional
            Where the output goes.

        Returns
        -------
        o : array, shape [N, T, HV, V]
            The output of each draft after those that it follows.

        Raises
        ------
        TypeError, ValueError, IndexError
            As `step`; a parent that is no earlier draft (on a device such a draft follows the state).  Nothing is
            changed, but drafts of these slots from before may be dropped.
        """
        shape = tuple(getattr(q, "shape", ()))
        if len(shape) == 4 and not 1 <= shape[1] <= MAX_DRAFTS:
            raise ValueError(f"q: expected from 1 to {MAX_DRAFTS} draft tokens a sequence, got shape {list(shape)}")
        if parents is not None:
            parents = self._whole_numbers("parents", parents, 2)
            if len(shape) == 4 and tuple(parents.shape) != shape[:2]:
                raise ValueError(f"parents: expected shape [N, T] = {list(shape[:2])}, got {list(parents.shape)}")
            if isinstance(parents, np.ndarray):
                _check_parents(parents)
        return self._run("fused_recurrent", q, k, v, a, b, slots, None, out, draft=True, parents=parents)

    def commit(self, slots: Any, accepted: Any) -> None:
        """Keep some of the drafts of slots as if they had been stepped through, and drop the others.

        Parameters
        ----------
        slots : int array, shape [N]
            A negative one is padding.
        accepted : int array, shape [N] or [N, L]
            ``[N]``: n for the drafts up to the n-th, which are the first n of a chain, and in a tree the n-th and those
            that it follows; 0 for none.  ``[N, L]``: the drafts themselves, each the parent of the next, then -1.

        Raises
        ------
        TypeError, ValueError, IndexError
            A wrong type or shape; more drafts than there are, or no path of the tree (on a device a number is cut, and
            of a path the last draft says what is kept); a slot that is not allocated, or named twice.  Nothing is
            changed.
        """
        with self._in_order_with(accepted, slots):
            self._commit(slots, accepted)

    def _commit(self, slots: Any, accepted: Any) -> None:
        slots = self._kernel_slots(slots)
        accepted = self._whole_numbers("accepted", accepted, 1, 2)
        if accepted.shape[0] != slots.shape[0]:
            raise ValueError(
                f"accepted: expected one row for each of {slots.shape[0]} slots, got shape {list(accepted.shape)}"
            )
        if self.device == "cpu":
            self._make_ring().check_accepted(slots, accepted)
        elif isinstance(accepted, np.ndarray):
            accepted = self._place(accepted)
        if accepted.ndim == 2:
            # A draft comes after those that it follows; CuPy's max has no `initial`.
            accepted = self._xp.asarray(accepted)
            accepted = 1 + accepted.max(axis=1) if accepted.shape[1] else accepted.sum(axis=1)
        if self._ring is not None:
            self._on_ring("commit", slots, accepted)

    def rollback(self, slots: Any) -> None:
        """Drop the drafts of slots, of which negative ones are padding.

        Raises
        ------
        TypeError, ValueError, IndexError
            By the argument's name; a slot that is not allocated, or named twice.
        """
        with self._in_order_with(slots):
            slots = self._kernel_slots(slots)
            if self._ring is not None:
                self._on_ring("rollback", slots)

    def flush(self, slots: Any | None = None) -> None:
        """Write the pending tokens of slots, of all without, into their states.

        Every reader sees the pending tokens anyway; this is for choosing the time.

        Raises
        ------
        TypeError, ValueError, IndexError
            By the argument's name; a slot that is not allocated, or named twice.
        """
        with self._in_order_with(slots):
            if slots is not None:
                slots = self._kernel_slots(slots)
            if self._ring is not None:
                self._on_ring("fold", slots)

    def save(self, path: str | Path) -> None:
        """Write the pool to a file, whole or not at all.

        The file carries the format's version, every parameter, the slot map and the states of the allocated slots.

        Raises
        ------
        OSError
            The file cannot be written; one that was there before is as it was.
        """
        with self._lock:
            allocated = np.flatnonzero(self._allocated)
            parameters = self._parameters()
            arrays = {"slots": allocated.astype(np.int32), "states": self._to_host(self.read(allocated))}
            for name in ("A_log", "dt_bias"):
                if getattr(self, name) is not None:
                    arrays[name] = self._to_host(getattr(self, name))
        _state_file.save(Path(path), parameters, arrays)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> DeltaRuleState:
        """Read a pool that `save` wrote; the slots keep their numbers.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file is no state file, of another version, truncated or damaged; it is named.
        """
        parameters, arrays = _state_file.load(Path(path))
        try:
            state = cls(**parameters, A_log=arrays.get("A_log"), dt_bias=arrays.get("dt_bias"), device=device)
            state._take(arrays["slots"], arrays["states"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: a state file whose contents do not fit together ({error})") from None
        return state

    def to(self, device: str) -> DeltaRuleState:
        """Return the pool on `device`: itself if it is there already, else a copy with the same slots."""
        if _placement(device)[1] == self.device:
            return self
        parameters = self._parameters()
        if self.A_log is not None:
            parameters |= {"A_log": self._to_host(self.A_log), "dt_bias": self._to_host(self.dt_bias)}
        other = DeltaRuleState(**parameters, device=device)
        with self._lock:
            allocated = np.flatnonzero(self._allocated)
            other._take(allocated, self._to_host(self.read(allocated)))
        return other

    def _parameters(self) -> dict[str, Any]:
        """What a copy of the pool is made with, but for arrays and the device."""
        return {name: getattr(self, name) for name in _PARAMETERS} | {"ring": self._asked_ring}

    def _take(self, slots: np.ndarray, states: np.ndarray) -> None:
        """Fill a new pool with allocated slots and their states."""
        if slots.size and (slots.min() < 0 or slots.max() >= self.num_slots or np.unique(slots).size != slots.size):
            raise ValueError("the slot map does not fit the pool")
        self._set(self._place(slots), self._place(states))
        self._allocated[slots] = True
        self._dirty[slots] = True
        self._free = [slot for slot in self._free if not self._allocated[slot]]

    def _run(
        self,
        op: str,
        q: Any,
        k: Any,
        v: Any,
        a: Any,
        b: Any,
        slots: Any,
        cu_seqlens: Any | None,
        out: Any | None,
        draft: bool = False,
        parents: Any | None = None,
        workspace: Any | None = None,
        **options: bool,
    ) -> Any:
        if self.A_log is None:
            raise ValueError("A_log: this state was made without it, so it can be read and written but not run")
        for name, x, want in (
            ("q", q, (self.num_k_heads, self.head_k_dim)),
            ("v", v, (self.num_v_heads, self.head_v_dim)),
        ):
            if tuple(getattr(x, "shape", want))[-2:] != want:
                raise ValueError(f"{name}: expected heads and head dimension {list(want)}, got {list(x.shape)[-2:]}")
        with self._in_order_with(v):
            slots = self._kernel_slots(slots)
            call = _inputs.prepare(
                _FORMS[op],
                (
                    *(q, k, v, out, self.A_log, self.dt_bias, a, b, None, None),
                    *(self._pool, slots, self._pool, slots, cu_seqlens),
                ),
                scale=self.scale,
                l2norm=self.use_qk_l2norm,
                layout=self.layout,
                softplus_beta=self.softplus_beta,
                softplus_threshold=self.softplus_threshold,
                **options,
            )
            if workspace is not None:
                _inputs.check_workspace(call, workspace)
            call.whole = self.device == "cpu"
            call.draft, call.parents = draft, self._place(parents) if isinstance(parents, np.ndarray) else parents
            if draft or (self.ring and _is_step(call.spec)):
                call.ring = self._make_ring()
            elif self._ring is not None:
                call.folds = self._ring
                if not _backends.is_planning():
                    self._on_ring("fold", call.initial_slots)
            _backends.run(call)
        return call.library.release(call.out) if out is None else out

    def _default_ring(self) -> int:
        if self.device != "cpu":
            return RING["cuda"]
        backend = _backends.cpu_backend()
        # To round and store 16 bits at every step costs Numba more than the ring does.
        return RING["numpy" if self.dtype in ("float16", "bfloat16") else backend]

    def _make_ring(self) -> Any:
        """The pool's ring, made the first time."""
        with self._lock:
            if self._ring is None:
                with self._here():
                    self._ring = _backends.ring_module(self.device).Ring(
                        self._pool, self.layout, self.num_k_heads, self.ring, self.stagger
                    )
        return self._ring

    def _on_ring(self, function: str, *args: Any) -> Any:
        """Call a function of the ring's backend on the ring."""
        with self._here():
            return getattr(_backends.ring_module(self.device), function)(self._ring, *args)

    def _head_parameter(self, name: str, value: Any) -> Any | None:
        if value is None:
            return None
        if isinstance(value, (list, tuple)):
            value = np.asarray(value)
        library = _arrays.library_of(value)
        if library is None:
            raise TypeError(f"{name}: expected an array of shape [HV], got {type(value).__name__}")
        meta = library.meta(value)
        if meta.dtype not in _arrays.FLOATS:
            raise TypeError(f"{name}: expected a floating dtype, got {meta.dtype}")
        if meta.shape != (self.num_v_heads,):
            raise ValueError(f"{name}: expected shape [HV] = [{self.num_v_heads}], got {list(meta.shape)}")
        value = library.adopt(value)
        if self.device == "cpu" and meta.device != "cpu":
            raise TypeError(f"{name}: expected an array on the host, got one on CUDA device {meta.device}")
        dtype = np.float64 if self.dtype == "float64" else np.float32
        with self._here():
            value = value if meta.device == "cpu" else _arrays.as_cupy(value)
            return self._xp.array(self._xp.asarray(value), dtype, copy=True)

    def _get(self, index: Any) -> Any:
        """Copy of the states at `index`, an array on the pool's device."""
        if self._ring is not None:
            return self._on_ring("read", index)
        if self.device == "cpu":
            return self._pool[index]
        with self._here():
            return _cuda_state().gather(self._pool, index)

    def _set(self, index: Any, states: Any) -> None:
        """Overwrite the states at `index`, an array on the pool's device."""
        if self._ring is not None:
            self._on_ring("forget", index)
        if self.device == "cpu":
            self._pool[index] = states
            return
        with self._here():
            _cuda_state().scatter(self._pool, index, states)

    def _copy(self, sources: Any, targets: Any) -> None:
        """Copy states, with what is pending, between slots that are arrays on the pool's device."""
        if self._ring is not None:
            self._on_ring("copy", sources, targets)
        else:
            self._set(targets, self._get(sources))

    def _in_order_with(self, *arrays: Any) -> AbstractContextManager[Any]:
        """Context in which CuPy's work goes to torch's current stream, where an array is a tensor on a GPU."""
        if self.device == "cpu":
            return _anywhere
        for x in arrays:
            library = _arrays.library_of(x)
            if library is not None and library.name == "torch" and x.get_device() >= 0:
                ordinal = int(self.device.partition(":")[2])
                stream = library.stream(ordinal)
                if stream != self._xp.cuda.get_current_stream(ordinal).ptr:
                    return self._on_stream(ordinal, stream)
                break
        return _anywhere

    @contextmanager
    def _on_stream(self, ordinal: int, stream: int) -> Iterator[None]:
        with self._here(), _external_stream(self._xp, ordinal, stream):
            yield

    def _to_host(self, x: Any) -> np.ndarray:
        return x if self.device == "cpu" else self._xp.asnumpy(x)

    def _place(self, x: np.ndarray) -> Any:
        """`x` on the pool's device."""
        if self.device == "cpu":
            return x
        with self._here():
            return self._xp.asarray(x)

    def _on_device(self, slots: Any) -> bool:
        if type(slots) is np.ndarray:
            return False
        library = _arrays.library_of(slots)
        return self.device != "cpu" and library is not None and library.meta(slots).device != "cpu"

    def _index(self, slots: Any, unique: bool = True) -> Any:
        """`slots` as an index of the pool."""
        if self._on_device(slots):
            return self._xp.asarray(slots)
        host = self._host_slots(slots, padding=False, unique=unique)
        self._check_allocated(host)
        return self._place(host)

    def _kernel_slots(self, slots: Any) -> Any:
        """`slots` as an operand of a call; those on the host are checked and may hold padding."""
        if self._on_device(slots):
            return slots
        host = self._host_slots(slots, padding=True)
        self._check_allocated(host)
        return self._place(host)

    def _host_slots(self, slots: Any, *, padding: bool, unique: bool = True) -> np.ndarray:
        if type(slots) is not np.ndarray:
            library = _arrays.library_of(slots)
            if library is not None and library.meta(slots).device != "cpu":
                if self.device == "cpu":
                    raise TypeError("slots: expected an array on the host, got one on a CUDA device")
                slots = library.to_host(slots)
            elif library is not None:
                slots = library.adopt(slots)
        host = np.atleast_1d(np.asarray(slots))
        if host.size == 0:
            return host.astype(np.int32).reshape(0)
        if host.dtype.kind not in "iu":
            raise TypeError(f"slots: expected integers, got dtype {host.dtype}")
        if host.ndim != 1:
            raise ValueError(f"slots: expected one axis, got shape {list(host.shape)}")
        # Plain integers: for the few slots of most calls NumPy's own overhead would be larger than the work.
        numbers = host.tolist()
        least = min(numbers)
        if max(numbers) >= self.num_slots or (not padding and least < 0):
            wrong = next(n for n in numbers if n >= self.num_slots or n < 0)
            raise IndexError(f"slots: expected slots from 0 to {self.num_slots - 1}, got {wrong}")
        if unique:
            live = [n for n in numbers if n >= 0] if least < 0 else numbers
            if len(set(live)) != len(live):
                twice = min(n for n in set(live) if live.count(n) > 1)
                raise ValueError(f"slots: expected every slot once, got slot {twice} more than once")
        if least < 0:
            host = np.where(host < 0, -1, host)
        return host.astype(np.int32)

    def _whole_numbers(self, name: str, x: Any, *axes: int) -> Any:
        """`x` as an array of int64 on the host, or as it is on the pool's device; of one of the numbers of `axes`."""
        if self._on_device(x):
            library = _arrays.library_of(x)
            meta = library.meta(x)
            kind = "i" if meta.dtype in _arrays.INTEGERS else ""
            shape = meta.shape
            x = library.adopt(x)
        else:
            library = _arrays.library_of(x)
            if library is not None and library.meta(x).device != "cpu":
                raise TypeError(f"{name}: expected an array on the host, got one on a CUDA device")
            x = np.asarray(x if library is None else library.adopt(x))
            kind, shape = x.dtype.kind, x.shape
        if kind not in ("i", "u") and 0 not in shape:
            raise TypeError(f"{name}: expected integers, got dtype {x.dtype}")
        if len(shape) not in axes:
            raise ValueError(f"{name}: expected {' or '.join(map(str, axes))} axes, got shape {list(shape)}")
        return x.astype(np.int64) if isinstance(x, np.ndarray) else x

    def _check_allocated(self, host: np.ndarray) -> None:
        allocated = self._allocated[host]
        if allocated.all():
            return
        loose = host[~allocated & (host >= 0)]
        if loose.size:
            raise ValueError(
                f"slots: slot {loose[0]} is not allocated ({self.num_free} of {self.num_slots} slots are free)"
            )


_PARAMETERS = (
    "num_slots",
    "num_v_heads",
    "head_k_dim",
    "head_v_dim",
    "num_k_heads",
    "scale",
    "use_qk_l2norm",
    "softplus_beta",
    "softplus_threshold",
    "dtype",
    "layout",
    "stagger",
)


def _check_parents(parents: np.ndarray) -> None:
    late = (parents >= np.arange(parents.shape[1])) | (parents < -1)
    if late.any():
        n, t = np.argwhere(late)[0]
        raise ValueError(f"parents: expected -1 or an earlier draft than {t}, got {parents[n, t]} in row {n}")


def _is_step(spec: _spec.Spec) -> bool:
    return spec.op == "fused_recurrent" and spec.T == 1 and not spec.varlen


def _placement(device: Any) -> tuple[Any, str, Callable[[], AbstractContextManager[Any]]]:
    """Array namespace, full name and context of a device."""
    if device == "cpu":
        return np, "cpu", nullcontext
    kind, _, ordinal = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind != "cuda" or (ordinal and not ordinal.isdigit()):
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:<ordinal>', got {device!r}")
    from gdr._cuda_loader import require_device

    cupy = require_device(int(ordinal or 0))
    return cupy, f"cuda:{int(ordinal or 0)}", partial(cupy.cuda.Device, int(ordinal or 0))


class _Handle(NamedTuple):
    """A stream of another library."""

    stream: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream


@cache  # kept: CuPy may destroy a stream that is not its own together with the object
def _external_stream(cupy: Any, device: int, stream: int) -> Any:
    """CuPy's object for a stream of the device, which is the current one, that belongs to another library."""
    return cupy.cuda.Stream.from_external(_Handle(stream))


def _cuda_state() -> Any:
    from gdr import _cuda_state

    return _cuda_state


def _state_dtype(dtype: Any, device: str) -> str:
    if not isinstance(dtype, (str, type, np.dtype)):
        raise TypeError(f"dtype: expected a dtype or its name, got {type(dtype).__name__}")
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    allowed = _arrays.FLOATS if device == "cpu" else _spec.DEVICE_FLOATS
    if name not in allowed:
        raise ValueError(f"dtype: expected one of {', '.join(allowed)} on {device}, got {name!r}")
    return name
