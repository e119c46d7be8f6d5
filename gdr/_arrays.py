"""Array libraries: what a call has to know of NumPy, CuPy, torch and JAX arrays.

Nothing here imports a library that the caller has not imported: an array's own type says which one it belongs to.
Kernels run on *native* arrays: NumPy on the host, CuPy or torch on a CUDA device.  Everything else (torch on the host,
JAX) is adopted as a zero-copy view of one of those, and results are handed back in the caller's kind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

FLOATS = ("float32", "float16", "bfloat16", "float64")
INTEGERS = ("int32", "int64")


class Meta(NamedTuple):
    """What is known of an array without reading it; strides count elements, ``device`` is "cpu" or a CUDA ordinal."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str | int


@cache
def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype called `name`; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@lru_cache(maxsize=1024)
def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense array, in elements."""
    steps = [1] * len(shape)
    for i in reversed(range(len(shape) - 1)):
        steps[i] = steps[i + 1] * max(shape[i + 1], 1)
    return tuple(steps)


_signature = attrgetter("shape", "strides", "dtype")
_shape, _dtype, _requires_grad = map(attrgetter, ("shape", "dtype", "requires_grad"))


class _Arrays:
    """What a library does unless it says otherwise."""

    def recognizer(self, arrays: Sequence[Any]) -> Callable[..., bool] | None:
        """What says of arrays whether they are like these in all that a signature tells, or None."""
        return None


class NumpyArrays(_Arrays):
    """NumPy arrays: the host's native kind."""

    name = "numpy"

    def signature(self, arrays: Sequence[Any]) -> tuple:
        return tuple(map(_signature, arrays))

    def meta(self, x: Any) -> Meta:
        size = x.itemsize or 1
        dtype = x.dtype.name if x.dtype.isnative else f"{x.dtype.name} of another byte order"
        return Meta(x.shape, tuple(s // size for s in x.strides), dtype, "cpu")

    def adopt(self, x: Any) -> Any:
        return x

    def release(self, x: Any) -> Any:
        return x

    def pointer(self, x: Any) -> int:
        return x.ctypes.data

    def empty(self, shape: tuple[int, ...], dtype: str, device: str | int) -> Any:
        return np.empty(shape, numpy_dtype(dtype))

    def writable(self, x: Any) -> bool:
        return bool(x.flags.writeable)


# Numbers of dtypes are hashed faster than dtypes; CuPy has but one byte order.
_device_signature = attrgetter("shape", "strides", "dtype.num", "data.device_id")


class CupyArrays(_Arrays):
    """CuPy arrays: a CUDA device's native kind."""

    name = "cupy"
    pointer = staticmethod(attrgetter("data.ptr"))

    def __init__(self) -> None:
        self._cupy = sys.modules["cupy"]
        # The first takes half a microsecond less for a call's arrays.
        quick = hasattr(self._cupy.ndarray, "_c_contiguous")
        self._contiguous = "_c_contiguous" if quick else "flags.c_contiguous"

    def recognizer(self, arrays: Sequence[Any]) -> Callable[..., bool] | None:
        # The strides of contiguous arrays follow from their shapes.
        contiguous = all(map(attrgetter(self._contiguous), arrays))
        known = attrgetter("shape", "dtype", "data.device_id", self._contiguous if contiguous else "strides")
        expected = [*map(known, arrays)]
        return lambda *others: [*map(known, others)] == expected

    def signature(self, arrays: Sequence[Any]) -> tuple:
        return tuple(map(_device_signature, arrays))

    def meta(self, x: Any) -> Meta:
        size = x.itemsize or 1
        return Meta(x.shape, tuple(s // size for s in x.strides), x.dtype.name, x.data.device_id)

    def adopt(self, x: Any) -> Any:
        return x

    def release(self, x: Any) -> Any:
        return x

    def empty(self, shape: tuple[int, ...], dtype: str, device: str | int) -> Any:
        if self._cupy.cuda.runtime.getDevice() == device:  # 0.1 us against 1.5 us for a context
            return self._cupy.ndarray(shape, numpy_dtype(dtype))
        with self._cupy.cuda.Device(device):
            return self._cupy.ndarray(shape, numpy_dtype(dtype))

    def empty_like(self, x: Any) -> Any:
        return self.empty(x.shape, x.dtype.name, x.data.device_id)

    def writable(self, x: Any) -> bool:
        return True

    def stream(self, device: int) -> int:
        # CuPy keeps a current stream per thread *and* device.
        return self._cupy.cuda.get_current_stream(device).ptr

    def to_host(self, x: Any) -> np.ndarray:
        return self._cupy.asnumpy(x)


def _tensor_guards(torch: Any) -> Any:
    """The class of guards by which torch.compile recognises tensors; None where it does not do what is expected."""
    try:
        guards = torch._C._dynamo.guards.TensorGuards
        with torch.inference_mode(False), torch.enable_grad():
            like = torch.empty(2, 3)
            recognizes = _guard(guards, like)
            others = [
                torch.empty(3, 2).t(),
                torch.empty(2, 4),
                like[None],
                like.double(),
                like.clone().requires_grad_(),
            ]
            others += [torch.nn.Parameter(like, requires_grad=False), torch.empty(2, 3, device="meta")]
            expected = recognizes(torch.ones(2, 3)) and not any(map(recognizes, others))
        return guards if expected else None
    except Exception:  # not a public class: it may be gone, or be made in another way
        return None


def _guard(guards: Any, *tensors: Any) -> Callable[..., bool]:
    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


class TorchArrays(_Arrays):
    """torch tensors: native on CUDA, adopted as NumPy views on the host."""

    name = "torch"

    def __init__(self) -> None:
        torch = sys.modules["torch"]
        self._torch = torch
        self._dtypes = {name: getattr(torch, name) for name in (*FLOATS, *INTEGERS, "uint8")}
        self._dtype_names = {dtype: name for name, dtype in self._dtypes.items()}
        self._device, self._empty = cache(partial(torch.device, "cuda")), torch.empty_strided
        tensor = torch.Tensor
        self.pointer: Callable[[Any], int] = tensor.data_ptr
        self._is_contiguous, self._strides, self._ordinal = tensor.is_contiguous, tensor.stride, tensor.get_device
        # 0.1 us against 5 us for torch.cuda.current_stream
        self.stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", self._stream)
        self._guards = _tensor_guards(torch)
        self.empty_like: Callable[[Any], Any] = partial(torch.empty_like, memory_format=torch.contiguous_format)

    def recognizer(self, arrays: Sequence[Any]) -> Callable[..., bool] | None:
        if self._guards is None:
            return None
        recognizes = _guard(self._guards, *arrays)
        return recognizes if recognizes(*arrays) else None  # not where one tensor comes twice

    def signature(self, arrays: Sequence[Any]) -> tuple:
        if self._torch.is_grad_enabled() and any(map(_requires_grad, arrays)):
            raise TypeError(
                "gdr has no autograd: an argument is a torch tensor that requires grad; "
                "call under torch.no_grad() or detach it"
            )
        # The strides of contiguous tensors follow from their shapes.
        strides = () if all(map(self._is_contiguous, arrays)) else map(self._strides, arrays)
        return (*map(_shape, arrays), *map(_dtype, arrays), *map(self._ordinal, arrays), *strides)

    def meta(self, x: Any) -> Meta:
        if x.layout is not self._torch.strided:
            raise TypeError(f"expected a dense (strided) torch tensor, got layout {x.layout}")
        if x.device.type not in ("cpu", "cuda"):
            raise TypeError(f"expected a torch tensor on the CPU or a CUDA device, got device {x.device}")
        dtype = self._dtype_names.get(x.dtype, str(x.dtype).removeprefix("torch."))
        return Meta(tuple(x.shape), x.stride(), dtype, "cpu" if x.get_device() < 0 else x.get_device())

    def adopt(self, x: Any) -> Any:
        if x.get_device() >= 0:
            return x
        x = x.detach()
        if x.dtype is self._torch.bfloat16:
            return x.view(self._torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return x.numpy()

    def release(self, x: Any) -> Any:
        if isinstance(x, self._torch.Tensor):
            return x
        if x.dtype.name == "bfloat16":
            return self._torch.from_numpy(x.view(np.int16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(x)

    def empty(self, shape: tuple[int, ...], dtype: str, device: str | int) -> Any:
        if device == "cpu":
            return np.empty(shape, numpy_dtype(dtype))
        # Sooner than torch.empty, 2.3 us against 3.4.
        return self._empty(shape, _dense(shape), dtype=self._dtypes[dtype], device=self._device(device))

    def writable(self, x: Any) -> bool:
        return True

    def _stream(self, device: int) -> int:
        return self._torch.cuda.current_stream(device).cuda_stream

    def to_host(self, x: Any) -> np.ndarray:
        return x.cpu().numpy()


class JaxArrays(_Arrays):
    """JAX arrays: immutable, adopted as NumPy views on the host and through DLPack as CuPy arrays on CUDA."""

    name = "jax"

    def __init__(self) -> None:
        self._tracer = sys.modules["jax"].core.Tracer

    def signature(self, arrays: Sequence[Any]) -> tuple:
        if any(isinstance(x, self._tracer) for x in arrays):
            raise TypeError(
                "gdr needs arrays with values: an argument is a JAX tracer; "
                "call outside jax.jit, jax.grad and jax.vmap, or through jax.pure_callback"
            )
        return tuple((x.shape, x.dtype, x.sharding) for x in arrays)

    def meta(self, x: Any) -> Meta:
        devices = x.devices()
        if len(devices) != 1:
            raise TypeError(f"expected a JAX array on one device, got one over {len(devices)} devices")
        (device,) = devices
        if device.platform not in ("cpu", "gpu", "cuda"):
            raise TypeError(f"expected a JAX array on the CPU or a CUDA device, got platform {device.platform!r}")
        on_cpu = device.platform == "cpu"
        return Meta(
            tuple(x.shape),
            _dense(tuple(x.shape)),
            x.dtype.name,
            "cpu" if on_cpu else device.local_hardware_id,
        )

    def adopt(self, x: Any) -> Any:
        if next(iter(x.devices())).platform == "cpu":
            return np.asarray(x)
        import cupy

        return cupy.from_dlpack(x)  # DLPack orders JAX's stream before the current one

    def release(self, x: Any) -> Any:
        import jax

        if not isinstance(x, np.ndarray):
            return jax.dlpack.from_dlpack(x)
        if x.dtype.name == "bfloat16":
            # NumPy's DLPack export knows no bfloat16: the same bytes pass as uint16.
            bits = jax.dlpack.from_dlpack(x.view(np.uint16))
            return jax.lax.bitcast_convert_type(bits, "bfloat16")
        return jax.dlpack.from_dlpack(x)

    def pointer(self, x: Any) -> int:
        return x.unsafe_buffer_pointer()

    def empty(self, shape: tuple[int, ...], dtype: str, device: str | int) -> Any:
        if device == "cpu":
            return np.empty(shape, numpy_dtype(dtype))
        return _library("cupy").empty(shape, dtype, device)

    def writable(self, x: Any) -> bool:
        return False

    def stream(self, device: int) -> int:
        return _library("cupy").stream(device)

    def to_host(self, x: Any) -> np.ndarray:
        return np.asarray(x)


_KINDS = {
    "numpy": NumpyArrays,
    "cupy": CupyArrays,
    "torch": TorchArrays,
    "jax": JaxArrays,
    "jaxlib": JaxArrays,
}
_made: dict[str, Any] = {}
_by_type: dict[type, Any] = {}


def _library(name: str) -> Any:
    if name not in _made:
        __import__(name)
        _made[name] = _KINDS[name]()
    return _made[name]


def library_of(x: Any) -> Any:
    """The array library `x` belongs to, or None when it is no array that gdr takes."""
    kind = type(x)
    found = _by_type.get(kind)
    if found is None:
        if isinstance(x, (np.ma.MaskedArray, np.matrix)):
            return None  # a mask would be ignored, and a matrix has no third axis
        root = "numpy" if isinstance(x, np.ndarray) else kind.__module__.partition(".")[0]
        if root not in _KINDS or not hasattr(x, "shape") or isinstance(x, np.generic):
            return None
        name = "jax" if root == "jaxlib" else root
        if name not in _made:
            _made[name] = _KINDS[name]()
        found = _by_type[kind] = _made[name]
    return found


def as_cupy(x: Any) -> Any:
    """`x`, which lies on a CUDA device, as an array of CuPy."""
    import cupy

    library = library_of(x)
    if library.name == "torch" and library.meta(x).dtype == "bfloat16":
        # The interface that CuPy asks for takes torch's bfloat16 for bytes without a meaning; as integers they pass.
        return cupy.asarray(x.view(sys.modules["torch"].int16)).view(numpy_dtype("bfloat16"))
    return cupy.asarray(x)


def of_whole_elements(x: Any) -> bool:
    """Whether no stride ends within an element, as those of fields of packed records may; torch and JAX have none."""
    return not any(step % x.itemsize for step, extent in zip(getattr(x, "strides", ()), x.shape) if extent > 1)


def pointer(x: Any) -> int:
    """Address of the first element of a native array."""
    try:
        library = _by_type[type(x)]
    except KeyError:  # the first of its type, as what JAX arrays on a GPU are adopted as
        library = library_of(x)
    return library.pointer(x)
