"""How the weights of a loaded model lie in memory, for decoding on CPU. Values do not change.

One new token multiplies a vector by each matrix, and the time is that of reading it. Along which
side the numbers lie one after the other decides how well the library's kernel reads. Measured on an
AMD EPYC with AVX-512, one thread, weights not in the cache, torch 2.13:

    float32   2048 to 512   0.27 ms along the inputs, 0.40 along the outputs
    float32   512 to 2048   0.44 and 0.25
    float32   2048 to 5472  2.99 and 2.25
    bfloat16  2048 to 512   0.22 and 0.31
    bfloat16  2048 to 5472  2.21 and 3.26

So float32 wants the longer side in one piece, bfloat16 the inputs. A dense weight is stored along
its inputs, CoLA's factors along their outputs: both gain, each at another place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from samara.model.cola import LowRankLinear


@torch.no_grad()
def lay_out_for_decoding(model: nn.Module) -> None:
    """Rearrange the projections of a model on CPU, in place; their shapes and values stay.

    The output head stays as it is: it is often the embedding, whose rows are looked up. A model on
    another device, and quantised layers, are left alone.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.cola_a.data = _laid_out(module.cola_a.data)
            module.cola_b.data = _laid_out(module.cola_b.data)
        elif type(module) is nn.Linear and module is not head:
            module.weight.data = _laid_out(module.weight.data.T).T


def _laid_out(weight: Tensor) -> Tensor:
    """A weight (in, out), one side of it in one piece."""
    if weight.device.type != "cpu":
        return weight
    num_inputs, num_outputs = weight.shape
    along_outputs = weight.dtype == torch.float32 and num_outputs >= num_inputs
    return weight.contiguous() if along_outputs else weight.T.contiguous().T
