"""The masked language model: the same trunk, looking both ways, under the same tied head.

BERT's objective (arXiv 1810.04805, section 3.1) on a pre-norm trunk with rotary positions; the
masking is in :mod:`samara.data.masked_lm`.

Shapes: b batch, t positions, v vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from samara.errors import ConfigError
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraModel, SamaraPreTrainedModel, mean_loss


class SamaraForMaskedLM(SamaraPreTrainedModel):  # type: ignore[no-untyped-call]
    """:class:`SamaraModel` with bidirectional attention, and the matrix to the vocabulary.

    Rows may be packed: without ``attention_mask``, ``position_ids`` that restart at 0 mark
    documents. There is no cache and no generation.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 # HF's form

    def __init__(self, config: SamaraConfig) -> None:
        super().__init__(config)
        if config.attention != "bidirectional":
            raise ConfigError(
                f"attention: a masked language model cannot be {config.attention}; set it to "
                "bidirectional, or load this model with AutoModelForCausalLM"
            )
        self.model = SamaraModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **unused: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Return logits (b, t, v), and the loss if labels are given.

        ``labels`` (b, t) hold what stood where tokens were masked, -100 elsewhere; nothing is
        shifted. The summed loss is divided by ``num_items_in_batch``, left out: by the labels
        counted. ``return_dict=False`` gives a tuple. The rest is as in :meth:`SamaraModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            **unused,
        )
        logits_btv: Any = self.lm_head(outputs.last_hidden_state)
        loss: Any = None if labels is None else mean_loss(logits_btv, labels, num_items_in_batch)
        result = MaskedLMOutput(loss=loss, logits=logits_btv, hidden_states=outputs.hidden_states)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return result if wants_dict else result.to_tuple()
