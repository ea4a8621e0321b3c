"""Classification and regression of whole texts, on the trunk of either kind of language model.

A causal model has read the text at its last token, so that is where it is judged (as Hugging Face's
decoders do). A bidirectional one has read it everywhere, and no token of its pretraining stands for
the whole (there is no next-sentence prediction): the mean over all tokens is judged.

Shapes: b rows, t positions, d hidden, n labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraModel, SamaraPreTrainedModel


class SamaraForSequenceClassification(SamaraPreTrainedModel):  # type: ignore[no-untyped-call]
    """:class:`SamaraModel`, one vector a row, and a matrix to ``config.num_labels`` scores."""

    _keys_to_ignore_on_load_unexpected = ["lm_head.weight"]  # noqa: RUF012 # HF's form

    def __init__(self, config: SamaraConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.model = SamaraModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
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
        **unused: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Return logits (b, n), and the loss if labels are given.

        Args:
            input_ids: Tokens (b, t), one text a row, padded on either side.
            attention_mask: 1 for tokens, 0 for padding, (b, t). Left out: ``pad_token_id`` at
                either end of a row is padding, if the configuration names one.
            position_ids: As in :meth:`SamaraModel.forward`.
            inputs_embeds: Embedded tokens (b, t, d) in place of ``input_ids``.
            labels: Classes (b,), or numbers (b,) or (b, n) for regression, or 0.0 and 1.0 (b, n)
                for several labels at once; the mean loss over them is returned.
                ``config.problem_type`` says which; left out, as Hugging Face does: one label is a
                regression, whole numbers are classes, others are several labels.
            output_hidden_states: As in :meth:`SamaraModel.forward`.
            return_dict: False gives a tuple.
            **unused: Options of other models that generic tools pass.
        """
        if attention_mask is None and input_ids is not None:
            attention_mask = _without_padding(input_ids, self.config.pad_token_id)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            **unused,
        )
        pooled_bd = self._pool(outputs.last_hidden_state, attention_mask)
        logits_bn: Any = self.score(pooled_bd)
        loss: Any = None if labels is None else self._loss(logits_bn, labels)
        result = SequenceClassifierOutput(
            loss=loss, logits=logits_bn, hidden_states=outputs.hidden_states
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return result if wants_dict else result.to_tuple()

    def _pool(self, x_btd: Tensor, attention_mask: Tensor | None) -> Tensor:
        """One vector a row: of the last token, or the mean of all."""
        is_token_bt = torch.ones_like(x_btd[..., 0]) if attention_mask is None else attention_mask
        if self.config.attention == "causal":
            place_t = torch.arange(x_btd.shape[1], device=x_btd.device)
            last_b = (place_t * is_token_bt.bool()).argmax(dim=1)
            return x_btd[torch.arange(x_btd.shape[0], device=x_btd.device), last_b]
        weight_bt1 = is_token_bt[:, :, None].to(x_btd.dtype)
        return (x_btd * weight_bt1).sum(dim=1) / weight_bt1.sum(dim=1).clamp(min=1)

    def _loss(self, logits_bn: Tensor, labels: Tensor) -> Tensor:
        labels = labels.to(logits_bn.device)
        if logits_bn.dtype in (torch.float16, torch.bfloat16):
            logits_bn = logits_bn.float()
        match self._problem_type(labels):
            case "regression":
                return functional.mse_loss(logits_bn, labels.view_as(logits_bn).to(logits_bn))
            case "single_label_classification":
                return functional.cross_entropy(logits_bn, labels.flatten())
            case _:
                return functional.binary_cross_entropy_with_logits(logits_bn, labels.to(logits_bn))

    def _problem_type(self, labels: Tensor) -> str:
        if self.config.problem_type is not None:
            return str(self.config.problem_type)
        if self.num_labels == 1:
            return "regression"
        if labels.is_floating_point():
            return "multi_label_classification"
        return "single_label_classification"


def _without_padding(input_ids: Tensor, pad_token_id: int | None) -> Tensor | None:
    """1 from the first to the last token that is no padding; None without a padding token.

    A padding token between others is text: some models pad with their end mark.
    """
    if pad_token_id is None:
        return None
    text_bt = (input_ids != pad_token_id).long()
    begun_bt = text_bt.cumsum(dim=1) > 0
    unfinished_bt = text_bt.flip(1).cumsum(dim=1).flip(1) > 0
    return (begun_bt & unfinished_bt).long()
