"""A CUDA device without a GPU: its tensors have a device, a dtype and a shape, but no values.

PyTorch's `FakeTensorMode` computes what an operation would return on CUDA: two devices, two
dtypes or two shapes that do not belong together raise, as they would on a GPU. Tensors of the CPU
stay real. Three things are added:

- Host syncs are recorded: reads of device memory, and copies to the device that wait. Sizes
  that depend on values, as those of `nonzero`, raise.
- `FakeCard` answers `torch.cuda`, with the numbers of a GPU that exists.
- The autograd engine needs streams, so `backward` runs the graph node by node instead.
- A launch of a Triton kernel checks what it is given instead.

Values, the alignment of pointers and speed need a GPU; `test_fused_gpu` runs the kernels.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM
from transformers.initialization import no_init_weights

import tinyllama_lab
from benchmarks.tinyllama import architecture
from tests.llamas import Words
from tinyllama_lab.core.engines.packed import fused_gpu
from tinyllama_lab.core.engines.packed.segments import ModuleColumns, Segments
from tinyllama_lab.core.models.loading import Base, count_parameters

aten: Any = torch.ops.aten
PACKAGE = str(Path(tinyllama_lab.__file__).parent)
GIB = 2**30
CUDA_TYPE, META_TYPE, TYPES = 1, 14, 22  # of c10::DeviceType
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry


@dataclass(frozen=True)
class FakeCard:
    """What `torch.cuda` says about a GPU."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


H100 = FakeCard("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 78 * GIB)
A100 = FakeCard("NVIDIA A100-SXM4-40GB", (8, 0), 40 * GIB, 39 * GIB)
T4 = FakeCard("Tesla T4", (7, 5), 15 * GIB, 14 * GIB)


@dataclass
class Syncs:
    """Where the host waited for the device: the functions of the package, in order."""

    reads: list[str] = field(default_factory=list)
    waiting_copies: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.reads.clear()
        self.waiting_copies.clear()


class _FakeCuda(TorchDispatchMode):
    """Runs operations on the CPU as they are, and all others on fake tensors."""

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or _is_cuda(x) for x in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._fused_sdp_choice.default:
            return 0  # plain matmuls: which kernel a card takes is asked of CUDA itself
        if func is aten._local_scalar_dense.default:
            return self._read(args[0], lambda values: values.item())
        if func is aten._to_copy.default:
            source, target = args[0].device, kwargs.get("device") or args[0].device
            if (source.type, target.type) == ("cuda", "cpu"):
                dtype = kwargs.get("dtype") or args[0].dtype
                return self._read(args[0], lambda values: values.to(dtype))
            if (source.type, target.type) == ("cpu", "cuda") and not kwargs.get("non_blocking"):
                self._syncs.waiting_copies.append(_caller())
        if func is aten.copy_.default and args[0].device != args[1].device:
            if args[0].device.type == "cpu":
                return self._read(args[1], args[0].copy_)
            if not any(args[2:]) and not kwargs.get("non_blocking"):
                self._syncs.waiting_copies.append(_caller())
        return func(*args, **kwargs)

    def _read(self, tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]) -> Any:
        """Read 0, 1, 0, 1, …: with the end token 1, every other completion is finished."""
        self._syncs.reads.append(_caller())
        with unset_fake_temporarily():
            values = torch.arange(tensor.numel()).remainder(2)
            return read(values.to(tensor.dtype).view(tensor.shape))


def _is_cuda(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


def _caller() -> str:
    """Return the innermost function of the package on the stack, such as `loop.train_round`."""
    frame: Any = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "tests"
    function = frame.f_code.co_qualname.split(".<locals>")[0]
    return f"{Path(frame.f_code.co_filename).stem}.{function}"


@contextmanager
def _device_guard() -> Iterator[None]:
    """Give CUDA the device guard of meta tensors, which does nothing.

    PyTorch builds for the CPU have none for CUDA, and autograd asks for one.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * TYPES).in_dll(library, _GUARDS)
    before = guards[CUDA_TYPE]
    if not torch.cuda.is_available():
        guards[CUDA_TYPE] = guards[META_TYPE]
    try:
        yield
    finally:
        guards[CUDA_TYPE] = before


def backward(loss: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
    """Run backward node by node, and check every gradient of a hand-written node.

    The engine would cast a gradient to the dtype that is expected; here a wrong one raises.
    """
    first = torch.ones_like(loss) if gradient is None else gradient
    gradients: dict[Any, list[Any]] = {loss.grad_fn: [first]}
    with torch.no_grad():
        for node in _in_order(loss.grad_fn):
            if any(grad is not None for grad in gradients.get(node, [])):
                for (following, at), grad in _gradients_of(node, gradients.pop(node)):
                    sums = gradients.setdefault(following, [None] * len(following._input_metadata))
                    sums[at] = grad if sums[at] is None else sums[at] + grad


def grad(
    result: torch.Tensor, inputs: list[torch.Tensor], gradient: torch.Tensor
) -> list[torch.Tensor]:
    """Return the gradients of leaves, as `torch.autograd.grad` does."""
    backward(result, gradient)
    found = [leaf.grad for leaf in inputs]
    for leaf in inputs:
        leaf.grad = None
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


def _in_order(last: Any) -> list[Any]:
    """Return the nodes of a graph; one follows all nodes that it gets gradients from."""
    nodes, waiting = {last}, [last]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting.append(node)
    # later operations have higher numbers, and leaves the highest of all
    leaves = [node for node in nodes if hasattr(node, "variable")]
    inner = [node for node in nodes if not hasattr(node, "variable")]
    return sorted(inner, key=lambda node: -node._sequence_nr()) + leaves


def _gradients_of(node: Any, received: list[Any]) -> list[tuple[tuple[Any, int], torch.Tensor]]:
    """Return the edges of a node that get a gradient, with the gradient."""
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    is_written_by_hand = hasattr(node, "needs_input_grad")
    if is_written_by_hand:
        returned = node.apply(*received)
        returned = returned if isinstance(returned, tuple) else (returned,)
        outputs = [g for g, needed in zip(returned, node.needs_input_grad, strict=False) if needed]
    else:
        returned = node(*received)
        returned = returned if isinstance(returned, tuple) else (returned,)
        edged = zip(returned, node.next_functions, strict=False)
        outputs = [grad for grad, edge in edged if edge[0] is not None]
    found = []
    for edge, grad in zip(edges, outputs, strict=False):
        if grad is None:
            continue
        expected = edge[0]._input_metadata[edge[1]]
        if not is_written_by_hand:
            grad = grad.to(expected.dtype)
        got = (tuple(grad.shape), grad.dtype, grad.device)
        wanted = (tuple(expected.shape), expected.dtype, expected.device)
        assert got == wanted, f"{node.name()} returned {got} as the gradient of {wanted}"
        found.append((edge, grad))
    return found


@contextmanager
def fake_cuda(card: FakeCard) -> Iterator[Syncs]:
    """Make `cuda` a device of fake tensors; yield the syncs of the host."""
    syncs = Syncs()
    with pytest.MonkeyPatch.context() as patch, _device_guard():
        _answer_as(card, patch)
        # without a device, the scaler of fp16 would turn itself off
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch.setattr(FakeTensor, "tolist", lambda self: self.to("cpu").tolist())
        patch.setattr(torch.UntypedStorage, "data_ptr", lambda self: self._cdata)
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setattr(torch.autograd, "grad", grad)
        patch.setattr(nn.Module, "to", _to)
        _check_launches(patch)
        with FakeTensorMode(allow_non_fake_inputs=True), _FakeCuda(syncs):
            yield syncs


def _check_launches(patch: pytest.MonkeyPatch) -> None:
    """Let every card have the kernels, and check the tensors that they are launched with."""
    patch.setattr(fused_gpu, "works_on", lambda device, dtype: True)
    patch.setattr(FakeTensor, "data_ptr", lambda self: self.untyped_storage()._cdata)

    def launch(kernel: str, grid: tuple[int, ...], *arguments: Any, **_: Any) -> None:
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        assert all(x.is_cuda and x.is_contiguous() for x in tensors), kernel
        halves = {x.dtype for x in tensors if x.dtype not in (torch.float32, torch.int32)}
        assert len(halves) == 1 and min(grid) > 0, (kernel, halves, grid)

    def launch_lora(
        self: Segments, name: str, grid: tuple[int, ...], columns: ModuleColumns, *rest: Any
    ) -> None:
        outside = [x for x in rest[0] if isinstance(x, torch.Tensor) and x.dim() == 2]
        inner = [x for x in rest[0] if isinstance(x, torch.Tensor) and x.dim() == 3]
        # where the columns of every module begin and end, and the inputs
        assert len(columns.starts) == len(columns.numbers) + 2 and min(grid) > 0
        assert all(x.is_cuda and x.stride(1) == 1 for x in outside), name
        for x in inner:
            assert x.is_cuda and x.shape[1] == len(columns.numbers), name
            assert x.dtype == outside[0].dtype, f"{name} of dtypes {x.dtype}, {outside[0].dtype}"
            assert len(x) == len(outside[0]), name

    patch.setattr(fused_gpu, "_launch", launch)
    patch.setattr(Segments, "_launch", launch_lora)


def _to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Move a module; PyTorch's own method swaps fake parameters, which others may refer to."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            moved = parameter if parameter is None else parameter.to(*args, **kwargs)
            if moved is not parameter:
                part._parameters[name] = nn.Parameter(moved, requires_grad=moved.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else buffer.to(*args, **kwargs)
    return module


def tinyllama(
    dtype: torch.dtype, layers: int | None = None, tokenizer: Any = None, **changes: Any
) -> Base:
    """Return TinyLlama-1.1B as a base on the fake device, perhaps with fewer layers."""
    config = architecture()
    config.update(changes | ({"num_hidden_layers": layers} if layers else {}))
    with no_init_weights(), torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.requires_grad_(False).eval()
    words: Any = tokenizer or Words()
    return Base(model, words, torch.device("cuda", 0), dtype, count_parameters(model))


def make_4_bit(model: nn.Module, double: bool) -> None:
    """Replace the weights of every block by those that bitsandbytes would make of them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            module.weight = _quantized(module.weight, double)


def _quantized(weight: torch.Tensor, double: bool) -> nn.Parameter:
    from bitsandbytes.functional import QuantState

    def zeros(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device="cuda")

    blocks, float32 = weight.numel() // 64, torch.float32
    state: Any = QuantState(
        absmax=zeros(blocks, torch.uint8 if double else float32),
        shape=weight.shape,
        code=zeros(16, float32),
        blocksize=64,
        quant_type="nf4",
        dtype=weight.dtype,
    )
    if double:
        scales, code = zeros(-(-blocks // 256), float32), zeros(256, float32)
        state.state2 = QuantState(absmax=scales, blocksize=256, code=code, dtype=float32)
        state.offset, state.nested = zeros(1, float32)[0], True
    stored: Any = nn.Parameter(zeros(weight.numel() // 2, torch.uint8)[:, None], False)
    stored.quant_state = state
    return stored


def _answer_as(card: FakeCard, patch: pytest.MonkeyPatch) -> None:
    answers: dict[str, Any] = {
        "get_device_capability": card.capability,
        "mem_get_info": (card.free_bytes, card.total_bytes),
        "get_device_properties": SimpleNamespace(name=card.name, total_memory=card.total_bytes),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
