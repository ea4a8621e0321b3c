"""Weight-only int8 for decoding on CPUs: the projections of a loaded model, in memory alone.

One new token reads every weight once, so its time is that of reading them: a byte per weight in
place of four. Each row of a weight W (out, in) becomes integers Q and one scale s, W ≈ s Q, with
s = max |W| / 127.5 (torchao's symmetric quantisation); no weight moves by more than s / 2. Inputs
stay as they are.

torchao makes Q and s. The product is PyTorch's own kernel for bfloat16 inputs: torchao's tensor
widens Q in memory at each call outside torch.compile, which is slower than no quantisation (at
2048 by 5472, one row: 4.3 ms; 0.8 ms by the kernel; 3.2 ms in float32). For float32 inputs there is
no fast kernel: memory falls, speed does not rise.

Quantised are the dense and the low-rank projections of the blocks, CoLA's two factors each; not the
embedding, the output head (often the same tensor) and the norms.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from samara.errors import ConfigError, ResourceError
from samara.model.cola import LowRankLinear

Quantization = Literal["none", "int8"]

MAX_KERNEL_ROWS = 8
"""Up to here the kernel for few rows is the faster one (at 16 both are equal, at 32 it takes half
as long again); a prompt takes an ordinary product."""

KERNEL_WIDTH = 16
"""The kernel takes the inputs in whole vectors and does not check it: at another width it reads
past the end (torch 2.13: wrong numbers or a crash at widths of 8, 24 and 100)."""


class Int8Linear(nn.Module):
    """y = (x Q^T) s, with integers Q (out, in) and a scale s per output (out,)."""

    def __init__(self, integers: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.integers: Tensor
        self.scales: Tensor
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales)
        self.has_kernel = integers.shape[1] % KERNEL_WIDTH == 0

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        flat = x.reshape(-1, x.shape[-1])
        if self.has_kernel and x.dtype == torch.bfloat16 and flat.shape[0] <= MAX_KERNEL_ROWS:
            y: Tensor = torch.ops.aten._weight_int8pack_mm(flat, self.integers, self.scales)
            return y.view(*x.shape[:-1], -1)
        return functional.linear(x, self.integers.to(x.dtype)) * self.scales

    def dequantized(self) -> Tensor:
        """The weight s Q (out, in) that this layer stands for."""
        return self.integers.to(self.scales.dtype) * self.scales[:, None]

    def extra_repr(self) -> str:
        """Widths, for ``print(model)``."""
        return f"in_features={self.integers.shape[1]}, out_features={self.integers.shape[0]}"


class Int8LowRankLinear(nn.Module):
    """CoLA's y = silu(x A) B with both factors in int8."""

    def __init__(self, down: Int8Linear, up: Int8Linear) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        y: Tensor = self.up(functional.silu(self.down(x)))
        return y


@torch.no_grad()
def quantize_int8(model: nn.Module) -> None:
    """Replace the projections of a model's blocks by int8 ones, in place, for inference.

    Args:
        model: Of any kind, on CPU. Its output head stays as it is.

    Raises:
        ResourceError: If torchao is not installed.
        ConfigError: If the model is not on CPU, or has no projection that can be quantised.
    """
    require_torchao()
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ConfigError(
            f"quantize: int8 decodes on CPUs, the model is on {device.type}; add --device cpu, or "
            "leave quantize out"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, LowRankLinear) and module is not head
    ]
    if not found:
        raise ConfigError(
            "quantize: the model has no linear layer that int8 is for; leave quantize out"
        )
    for name, module in found:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _quantized(module))


def _quantized(module: nn.Module) -> nn.Module:
    if isinstance(module, LowRankLinear):
        return Int8LowRankLinear(_int8(module.cola_a.T), _int8(module.cola_b.T))
    assert isinstance(module, nn.Linear)
    if module.bias is not None:
        return _Biased(_int8(module.weight), module.bias)
    return _int8(module.weight)


class _Biased(nn.Module):
    """An int8 product with the bias of the linear layer that it stands for."""

    def __init__(self, product: Int8Linear, bias: nn.Parameter) -> None:
        super().__init__()
        self.product, self.bias = product, bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.product(x) + self.bias
        return y


def _int8(weight: Tensor) -> Int8Linear:
    """Let torchao quantise one weight (out, in), a scale per row."""
    api: Any = importlib.import_module("torchao.quantization")
    carrier = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    carrier.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    # Its advice on the compiler's settings is for the whole process, which is not ours to set.
    api.quantize_(carrier, api.Int8WeightOnlyConfig(set_inductor_config=False))
    found: Any = carrier.weight
    return Int8Linear(found.qdata, found.scale.reshape(-1).to(weight.dtype))


def require_torchao() -> None:
    """Refuse int8 where its package is missing.

    Raises:
        ResourceError: If torchao is not installed.
    """
    try:
        importlib.import_module("torchao")
    except ImportError:
        raise ResourceError(
            "quantize: int8 needs the package torchao; install it with: pip install "
            "'samara[quantize]', or leave quantize out"
        ) from None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, integers and scales in memory; tied ones once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
