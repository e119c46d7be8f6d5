from __future__ import annotations

import time
import types


class FakeCupy(types.SimpleNamespace):
    """As much of CuPy as the loader uses, with a driver that writes down what it is told."""

    class CompileException(Exception):
        pass

    def __init__(self) -> None:
        self.capability = "90"
        self.driver_version = 12080
        self.compiled: list[tuple[str, tuple[str, ...]]] = []
        self.launches: list[tuple[int, tuple]] = []
        self.context = 11
        self.log: str | None = None
        driver = types.SimpleNamespace(
            launchKernel=lambda *args: self.launches.append((self.context, args)),
            ctxGetCurrent=lambda: self.context,
            ctxSetCurrent=lambda context: setattr(self, "context", context),
            check_status=self.check_status,
        )
        super().__init__(
            cuda=types.SimpleNamespace(
                runtime=types.SimpleNamespace(getDeviceCount=lambda: 1, driverGetVersion=lambda: self.driver_version),
                driver=driver,
                compiler=types.SimpleNamespace(CompileException=self.CompileException),
                Device=lambda ordinal: FakeDevice(self.capability),
            ),
            RawModule=self.raw_module,
        )

    @staticmethod
    def check_status(status: int) -> None:
        raise RuntimeError(f"driver error {status}")

    def raw_module(self, *, code: str, options: tuple[str, ...], backend: str) -> types.SimpleNamespace:
        def get_function(name: str) -> types.SimpleNamespace:
            time.sleep(0.05)
            if self.log is not None:
                raise self.CompileException(self.log)
            self.compiled.append((code, options))
            return types.SimpleNamespace(
                kernel=types.SimpleNamespace(ptr=7),
                num_regs=32,
                local_size_bytes=0,
                shared_size_bytes=1024,
                max_threads_per_block=1024,
                max_dynamic_shared_size_bytes=47 * 1024,
            )

        return types.SimpleNamespace(get_function=get_function)


class FakeDevice:
    attributes = types.MappingProxyType({"MaxSharedMemoryPerBlockOptin": 100 * 1024, "MultiProcessorCount": 132})

    def __init__(self, capability: str) -> None:
        self.compute_capability = capability

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass
