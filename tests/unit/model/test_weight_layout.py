"""The order of the weights in memory changes no value and no result."""

from __future__ import annotations

import pytest
import torch

from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.loading import load_model, save_model
from samara.model.modeling import SamaraForCausalLM
from samara.model.weight_layout import lay_out_for_decoding


def make_model(rank: int | list[int], dtype: torch.dtype) -> SamaraForCausalLM:
    torch.manual_seed(1)
    design = ModelConfig.model_validate(
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "ffn_dim": [48, 64],
            "cola": {"rank": rank},
            "vocab_size": 60,
        }
    )
    return SamaraForCausalLM(SamaraConfig.from_design(design)).to(dtype).train(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, [8, 0]], ids=["cola", "some layers"])
def test_values_and_logits_stay(dtype, rank, tmp_path):
    model = make_model(rank, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        lay_out_for_decoding(model)
        found = model(input_ids=ids).logits
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.std()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_model(model, tmp_path)
    for name, tensor in load_model(tmp_path).state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("dtype", "piece"), [(torch.float32, "the longer side"), (torch.bfloat16, "the inputs")]
)
def test_which_side_is_in_one_piece(dtype, piece):
    model = make_model([8, 0], dtype)
    lay_out_for_decoding(model)
    low_rank, dense = (layer.mlp.up_proj for layer in model.model.layers)
    weights = [low_rank.cola_a, low_rank.cola_b, dense.weight.T]  # (in, out)
    assert [w.shape for w in weights] == [(32, 8), (8, 48), (32, 64)]
    along_outputs = [w.stride() == (w.shape[1], 1) for w in weights]
    along_inputs = [w.stride() == (1, w.shape[0]) for w in weights]
    if piece == "the inputs":
        assert all(along_inputs)
    else:
        assert along_outputs == [False, True, True]
        assert along_inputs == [True, False, False]
