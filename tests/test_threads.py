"""Threads of the CPU backends: jobs, BLAS thread counts, interrupts, forks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import gdr
from gdr import _threads, reference
from gdr.testing import assert_close, make_inputs


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_job_is_done_once(threads):
    done = []
    _threads.for_each(lambda jobs: done.extend(jobs), list(range(100)), threads)
    assert sorted(done) == list(range(100))


def test_no_jobs_are_no_work():
    _threads.for_each(lambda jobs: list(jobs), [], 4)


@pytest.mark.parametrize("bad", [0, 7])
def test_an_exception_comes_out_when_all_threads_are_done(bad):
    running = []

    def work(jobs):
        for job in jobs:
            running.append(job)
            if job == bad:
                raise ZeroDivisionError
            time.sleep(1e-3)
            running.remove(job)

    with pytest.raises(ZeroDivisionError):
        _threads.for_each(work, list(range(8)), 3)
    assert running == [bad]


def test_blas_is_held_and_restored_from_any_thread():
    before = blas_threads()
    seen = []

    def hold():
        with _threads.one_blas_thread:
            seen.append(blas_threads())

    hold()
    for _ in range(3):
        thread = threading.Thread(target=hold)
        thread.start()
        thread.join()
    assert seen == [[1] * len(before)] * 4
    assert blas_threads() == before


def test_blas_is_restored_after_an_exception_and_overlapping_holds():
    before = blas_threads()
    with pytest.raises(KeyError), _threads.one_blas_thread:
        raise KeyError
    assert blas_threads() == before
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with _threads.one_blas_thread:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    with _threads.one_blas_thread:
        pass
    assert blas_threads() == [1] * len(before)
    leave.set()
    thread.join()
    assert blas_threads() == before


def test_a_chunkwise_call_restores_blas(monkeypatch):
    monkeypatch.setenv("GDR_CPU", "numpy")
    x = make_inputs(B=1, T=200, H=2, HV=4, K=128, V=128)
    before = blas_threads()
    gdr.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)
    assert blas_threads() == before
    from gdr import _numpy_chunk

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(_numpy_chunk, "_prepare", fail)
    with pytest.raises(MemoryError):
        gdr.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)
    assert blas_threads() == before


@pytest.mark.parametrize("cpu", ["numpy", "numba"])
def test_calls_from_many_threads_agree(cpu, monkeypatch):
    if cpu == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv("GDR_CPU", cpu)
    x = make_inputs(B=2, T=70, H=4, HV=8, K=64, V=64)

    def call(_):
        return gdr.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)[0]

    want = call(0)
    with ThreadPoolExecutor(6) as pool:
        for o in pool.map(call, range(24)):
            assert np.array_equal(o, want)


@pytest.mark.parametrize("threads", ["1", "2", "3"])
@pytest.mark.parametrize("cpu", ["numpy", "numba"])
def test_bits_do_not_depend_on_the_number_of_threads(cpu, threads, monkeypatch):
    if cpu == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv("GDR_CPU", cpu)
    x = make_inputs(B=1, H=2, HV=4, K=64, V=64, lengths=[100, 3, 64, 1, 40])
    kwargs = {"cu_seqlens": x.cu_seqlens, "output_final_state": True}
    monkeypatch.setenv("GDR_NUM_THREADS", "2")
    want = gdr.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, **kwargs)
    monkeypatch.setenv("GDR_NUM_THREADS", threads)
    got = gdr.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, **kwargs)
    assert np.array_equal(got[0], want[0])
    assert np.array_equal(got[1], want[1])


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_threads_is_refused(asked, monkeypatch):
    monkeypatch.setenv("GDR_NUM_THREADS", asked)
    with pytest.raises(ValueError, match="GDR_NUM_THREADS"):
        _threads.thread_count()


def test_uninterrupted_returns_raises_and_nests():
    done = []
    _threads.uninterrupted(lambda: _threads.uninterrupted(lambda: done.append(1)))
    assert done == [1]

    def fail():
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        _threads.uninterrupted(fail)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_an_interrupt_waits_for_the_work():
    class Interrupted(Exception):
        pass

    def interrupt(signum, frame):
        raise Interrupted

    done = []
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(Interrupted):
            _threads.uninterrupted(lambda: (time.sleep(0.05), done.append(1)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert done == [1]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_interrupts_at_any_moment_leave_no_lock_behind():
    # In a process of its own, which a lock that is never given back would keep for ever.
    script = """
import random, signal
from gdr import _threads

class Interrupted(Exception):
    pass

armed = False

def interrupt(signum, frame):
    if armed:
        raise Interrupted

signal.signal(signal.SIGALRM, interrupt)
interrupts, random = 0, random.Random(0)
for n in range(4000):
    done = []
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-4))
    try:
        armed = True
        if n % 2:
            _threads.uninterrupted(lambda: done.append(1))
        else:
            _threads.for_each(lambda jobs: done.extend(jobs), [1, 1, 1], 3)
        armed = False
    except Interrupted:
        interrupts += 1
    armed = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(done) in (0, 1 if n % 2 else 3)
print(interrupts)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert int(done.stdout) > 100, done.stderr


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("sizes", [{"K": 20, "V": 24}, {"K": 128, "V": 128}], ids=str)
def test_whatever_products_blas_is_fast_at(thin, layout, sizes, monkeypatch):
    monkeypatch.setenv("GDR_CPU", "numpy")
    monkeypatch.setattr(_threads, "thin_products", lambda: thin)
    x = make_inputs(B=3, T=75, H=2, HV=4, layout=layout, **sizes)
    gates = gdr.gated_delta_rule_gate(x.A_log, x.a, x.dt_bias, x.b)
    arguments, options = (x.q, x.k, x.v, *gates), {"output_final_state": True, "state_layout": layout}
    want_o, want_h = reference.fused_recurrent_gated_delta_rule(*arguments, **options)
    for run in (gdr.fused_recurrent_gated_delta_rule, gdr.chunk_gated_delta_rule):
        o, h = run(*arguments, **options)
        assert_close(o, want_o, rtol=1e-6, name="o")
        assert_close(h, want_h, rtol=1e-6, name="h")
    state = gdr.DeltaRuleState(
        3, 4, **{f"head_{n.lower()}_dim": size for n, size in sizes.items()}, num_k_heads=2, A_log=x.A_log,
        dt_bias=x.dt_bias, use_qk_l2norm=False, layout=layout,
    )  # fmt: skip
    slots = state.alloc(3)
    for t in range(x.v.shape[1]):
        o = state.step(*(y[:, t : t + 1] for y in (x.q, x.k, x.v, x.a, x.b)), slots)
        assert_close(o, want_o[:, t : t + 1], rtol=1e-6, name="o")
    assert_close(state.read(slots), want_h, rtol=1e-6, name="h")


@pytest.mark.parametrize("cpu", ["numpy", "numba"])
def test_scratch_does_not_grow_with_the_sequence(cpu, monkeypatch):
    if cpu == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv("GDR_CPU", cpu)

    def peak(T: int) -> int:
        x = make_inputs(B=1, T=T, H=4, HV=8, K=128, V=128)
        gates = gdr.gated_delta_rule_gate(x.A_log, x.a, x.dt_bias, x.b)
        out = np.empty_like(x.v)
        gdr.chunk_gated_delta_rule(x.q, x.k, x.v, *gates, out=out)
        tracemalloc.start()
        try:
            gdr.chunk_gated_delta_rule(x.q, x.k, x.v, *gates, out=out)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(1024) < peak(256) + (1 << 20)
    assert peak(1024) < 32 << 20


def _child(cpu, end):
    os.environ["GDR_CPU"] = cpu
    x = make_inputs(B=2, T=100, H=2, HV=4, K=64, V=64)
    end.send(gdr.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("cpu", ["numpy", "numba"])
def test_a_forked_child_works(cpu, monkeypatch):
    if cpu == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv("GDR_CPU", cpu)
    x = make_inputs(B=2, T=100, H=2, HV=4, K=64, V=64)
    want = gdr.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)[0]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(cpu, theirs))
    child.start()
    assert ours.poll(60)
    assert np.array_equal(ours.recv(), want)
    child.join(60)
    assert child.exitcode == 0
