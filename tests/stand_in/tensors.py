"""A CUDA device where there is none: its tensors say cuda, lie on the CPU and are computed there.

For the paths that only a GPU takes. Tensors of both devices in one operation fail as on the real one, and so does
reading one from numpy; is_cuda is true; what makes the host wait is counted. Not shown: kernels, speed, memory, streams
that run beside each other. The compiler is left out, FlexAttention is its formula, NCCL is gloo, FSDP2 keeps what
it would free, and torch's profiler hangs.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # before what it looks at is replaced
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from megalith.layers import accumulate

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten

# What ranks send each other; but isend and irecv, of which torch's pipelines ask whether they are torch's own.
COLLECTIVES = (
    "all_reduce broadcast reduce all_gather gather scatter send recv all_to_all_single barrier "
    "all_gather_into_tensor all_gather_single reduce_scatter_tensor reduce_scatter_single"
).split()
# Operations that take tensors of both devices on a real one too.
_CROSSING = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._foreach_copy_.default,
}
# Times that the host has waited for the device: to read a value, or to have one copied there.
waits = 0


class OnDevice(torch.Tensor):
    """A tensor that says cuda; `beneath` lies on the CPU."""

    beneath: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, real: Tensor) -> "OnDevice":
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
        )
        made.beneath = real
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.beneath.data_ptr()

    def tolist(self) -> Any:
        _wait()
        return self.beneath.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.beneath!r})"


class _Making(TorchDispatchMode):
    """While entered, operations that are asked for a tensor on the device give one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, DTensor) for leaf in leaves):
            return NotImplemented
        if _is_cuda(kwargs.get("device")) or any(isinstance(leaf, OnDevice) for leaf in leaves):
            return compute(func, args, kwargs)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU, with what comes out of it on the device that the real one would give it.

    Raises RuntimeError for tensors of both devices, unless the CPU's are numbers.
    """
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    _refuse_mixtures(func, here, [leaf for leaf in leaves if not isinstance(leaf, OnDevice)])
    if func is aten.is_pinned.default:
        return False
    if func is aten._pin_memory.default:
        return args[0].clone()
    wanted = kwargs.get("device")
    comes_here = _is_cuda(wanted) if wanted is not None else bool(here)
    if func is aten.copy_.default:
        comes_here = isinstance(args[0], OnDevice)
    comes_across = func in (aten._to_copy.default, aten.copy_.default) and comes_here
    if func is aten._local_scalar_dense.default or (here and not comes_here):
        _wait()
    if comes_across and not _is_on_its_way(func, args, kwargs):
        _wait()
    if func in (aten._softmax.default, aten._log_softmax.default) and args[2]:
        # From 16 bits to fp32 at once: a GPU's operation that the CPU lacks.
        return OnDevice(func(args[0].beneath.float(), args[1], False))
    if func is aten.mm.dtype:
        # 16-bit factors whose product leaves in fp32: another one.
        return OnDevice(args[0].beneath.to(args[2]) @ args[1].beneath.to(args[2]))
    if func is aten.addmm.dtype_out:
        total, left, right = (tensor.beneath.to(args[3]) for tensor in args[:3])
        torch.addmm(total, left, right, beta=kwargs.get("beta", 1), out=kwargs["out"].beneath)
        return kwargs["out"]
    if func is torch.ops.megalith.gradient_by_weight.default:
        # It looks at a weight's mark, and changes a gradient that is not among its arguments.
        return accumulate.multiply(*args)
    given = {name: _beneath(value) for name, value in kwargs.items()}
    if _is_cuda(wanted):
        given["device"] = torch.device("cpu")
    if given.get("pin_memory"):
        given["pin_memory"] = False
    result = func(*tree_map(_beneath, args), **given)
    if not comes_here:
        return result
    # What was changed in place is given back as it came.
    came = {id(leaf.beneath): leaf for leaf in here}
    result = tree_map(lambda leaf: came.get(id(leaf), leaf), result)
    result = tree_map(lambda leaf: OnDevice(leaf) if type(leaf) is Tensor else leaf, result)
    if not hasattr(func, "_schema") or func.namespace == "c10d":
        return result
    return return_and_correct_aliasing(func, args, kwargs, result)


def _refuse_mixtures(func: Any, here: list[OnDevice], elsewhere: list[Tensor]) -> None:
    if not here or not elsewhere or func in _CROSSING or func.namespace == "c10d":
        return
    if any(tensor.dim() > 0 for tensor in elsewhere) or "_fused_adam" in str(func):
        shapes = [tuple(tensor.shape) for tensor in elsewhere]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got cuda:0 and cpu {shapes}")


def _beneath(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.beneath if isinstance(leaf, OnDevice) else leaf, value)


def _is_on_its_way(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host goes on while numbers are copied: from one place of the device to another, or if it is told."""
    source = args[1] if func is aten.copy_.default else args[0]
    asked = args[2:] if func is aten.copy_.default else ()
    return isinstance(source, OnDevice) or bool(kwargs.get("non_blocking", *asked[:1] or (False,)))


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _wait() -> None:
    global waits
    waits += 1


class _Event:
    """A point in the device's work, which is done as soon as it is asked for."""

    def __init__(self, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: "_Event") -> float:
        return 1000 * (later._seconds - self._seconds)

    def synchronize(self) -> None:
        pass

    wait = synchronize


class _Stream:
    device = DEVICE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def synchronize(self, *others: Any) -> None:
        pass

    wait_stream = wait_event = synchronize


def _of_devices_only(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective, which as NCCL's takes nothing that lies on the host; in groups that are gloo's, anything."""

    def called(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, dist.ProcessGroup)]
        if not all(isinstance(tensor, OnDevice) for tensor in tensors) and dist.get_backend(*given) != "gloo":
            raise RuntimeError(f"No backend type associated with device type cpu: {collective.__name__}")
        return collective(*args, **kwargs)

    return called


def _on_cpu_first(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor and its like put a list's numbers on a device without an operation that could be caught."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if not _is_cuda(device):
            return make(data, *args, device=device, **kwargs)
        return make(data, *args, device="cpu", **kwargs).to(DEVICE)

    return made


def _flex_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: float, enable_gqa: bool = False
) -> Tensor:
    b, t, s = (torch.arange(size, device=DEVICE) for size in (len(q), q.shape[2], k.shape[2]))
    h = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    visible = block_mask.mask_mod(b.view(-1, 1, 1, 1), h, t.view(1, 1, -1, 1), s)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=enable_gqa)


def _uncompiled(function: Any = None, **options: Any) -> Any:
    return function if function is not None else lambda wrapped: wrapped


@contextmanager
def stand_in() -> Iterator[None]:
    """While entered, there is a CUDA device; for the rest of the process torch's own functions are replaced."""
    cuda: Any = torch.cuda
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "get_device_capability": (9, 0),
        "get_device_properties": SimpleNamespace(total_memory=80 << 30),
        "current_stream": _Stream(),
        "memory_stats": {"allocation.all.current": 1},
        "mem_get_info": (80 << 30, 80 << 30),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "cudart": SimpleNamespace(cudaHostRegister=lambda *args: 0, cudaHostUnregister=lambda *args: 0),
        **dict.fromkeys(["set_device", "synchronize", "reset_peak_memory_stats", "empty_cache", "_lazy_init"]),
        **dict.fromkeys(
            ["memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"], 1 << 20
        ),
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, answer=answer, **kwargs: answer)
    cuda.Event, cuda.Stream = _Event, _Stream
    cuda.stream = cuda.device = lambda chosen: nullcontext()
    cuda.memory._record_memory_history = lambda *args, **kwargs: None
    cuda.memory._dump_snapshot = lambda path: Path(path).write_bytes(b"")
    changed: Any = torch
    changed.compile = _uncompiled
    changed.tensor, changed.as_tensor = _on_cpu_first(torch.tensor), _on_cpu_first(torch.as_tensor)
    compatible = torch._has_compatible_shallow_copy_type
    changed._has_compatible_shallow_copy_type = lambda one, other: (
        isinstance(one, OnDevice) == isinstance(other, OnDevice) and compatible(one, other)
    )
    flex.flex_attention = _flex_attention  # type: ignore[assignment]
    fsdp_param.alloc_storage = fsdp_param.free_storage = lambda tensor: None
    communication: Any = dist
    join = dist.init_process_group

    def join_by_gloo(backend: str, *, device_id: Any = None, **kwargs: Any) -> None:
        join("cpu:gloo,cuda:gloo", **kwargs)

    communication.init_process_group = join_by_gloo
    for name in COLLECTIVES:
        if hasattr(dist, name):  # two have other names from torch 2.12 on
            setattr(communication, name, _of_devices_only(getattr(dist, name)))
    with _Making():
        yield
