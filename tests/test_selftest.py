from __future__ import annotations

import re

import numpy as np
import pytest

from gdr import _backends, cli, selftest


def test_everything_passes_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftest", "--device", "cpu", "--quick"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\d+ cases, all passed", out)
    for operation in selftest._TITLES.values():
        assert re.search(rf"numpy +{operation} .* ok$", out, re.MULTILINE)
    assert "FAILED" not in out


@pytest.mark.gpu
def test_everything_passes_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["selftest", "--device", "cuda", "--quick"])
    out = capsys.readouterr().out
    print(out)
    assert status == 0, out
    assert re.search(r"\d+ CUDA kernels", out)


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases of the drop-in and one of the gate, on NumPy."""
    inputs = {"B": 3, "T": 2, "H": 1, "HV": 1, "dtype": "float32", "layout": "kv"}
    cases = [selftest.Case("numpy", op, "plain", inputs) for op in ("update", "update", "gate")]
    monkeypatch.setenv("GDR_CPU", "numpy")
    monkeypatch.setattr(selftest, "_cases", lambda *args: iter(cases))


def break_backend(monkeypatch: pytest.MonkeyPatch, damage) -> None:
    real = _backends.run

    def run(call) -> None:
        real(call)
        if call.spec.op == "fused_recurrent":
            damage(call)

    monkeypatch.setattr(_backends, "run", run)


def wrong_output(call) -> None:
    call.out *= 1.001


def unwritten_output(call) -> None:
    call.out[0, 1] = np.nan


def wrong_state(call) -> None:
    call.final_state[call.final_slots[0], 0, 0, 0] += 1


def touched_slot(call) -> None:
    (others,) = np.nonzero(~np.isin(np.arange(len(call.final_state)), call.final_slots))
    call.final_state[others[0], 0, 0, 0] += 1


def other_bits_each_time(call) -> None:
    other_bits_each_time.calls += 1
    call.out[0, 0, 0, 0] += 1e-7 * other_bits_each_time.calls


other_bits_each_time.calls = 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (wrong_output, "output: relative RMS error 1.00e-03, limit 1e-06"),
        (unwritten_output, "output: relative RMS error nan"),
        (wrong_state, "state: relative RMS error"),
        (touched_slot, "a slot that no sequence writes has changed"),
        (other_bits_each_time, "the output's bits differ from one run to the next"),
    ],
)
def test_a_broken_kernel_is_found(
    few_cases: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage,
    message: str,
) -> None:
    break_backend(monkeypatch, damage)
    assert selftest.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert message in out
    assert "3 cases, 2 FAILED" in out
    assert re.search(r"update .* FAILED$", out, re.MULTILINE)
    assert re.search(r"gate .* ok$", out, re.MULTILINE)


def test_an_exception_is_a_failure(
    few_cases: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(call) -> None:
        raise RuntimeError("the launch failed")

    monkeypatch.setattr(_backends, "run", run)
    assert selftest.main(["--device", "cpu"]) == 1
    assert "RuntimeError: the launch failed" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_an_error(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--device", device]) == 1
    assert capsys.readouterr().err.startswith("gdr selftest: ")


def test_nan_is_the_worst_error() -> None:
    inputs = {"dtype": "float32", "layout": "kv"}
    results = [
        selftest.Result(selftest.Case("numpy", "update", name, inputs), output, 1e-6, 0.0, 1e-6, failures)
        for name, output, failures in (("good", 1e-7, []), ("bad", float("nan"), ["nan"]), ("large", 1.0, ["1"]))
    ]
    row = selftest.table(results).splitlines()[1].split()
    assert row[-6:] == ["3", "nan", "1e-06", "0.0e+00", "1e-06", "FAILED"]
