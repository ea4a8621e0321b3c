"""The model: a stack of blocks, and the causal language model on it, as Hugging Face classes.

Module names are those of Llama, so that tools find what they look for. Packed rows: with neither
``attention_mask`` nor cache, ``position_ids`` that restart at 0 mark documents, and no position
attends to another document. The other heads: :mod:`samara.model.masked_lm`,
:mod:`samara.model.classification`.

Shapes: b batch, t positions, d hidden, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from samara.errors import ConfigError
from samara.model.activation_checkpointing import (
    checkpoint_keeping_pre_activations,
    checkpoint_layer,
)
from samara.model.attention import AttentionMask, cached_mask, packed_mask
from samara.model.autocast import compute_dtype
from samara.model.cola import LowRankLinear
from samara.model.configuration import SamaraConfig
from samara.model.layers import Attention, FeedForward, LayerContext, RMSNorm, rotary_tables

ActivationCheckpointing = Literal["none", "layer", "cola_m"]


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: SamaraConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config, layer)
        self.activation_checkpointing: ActivationCheckpointing = "none"

    def forward(self, x_btd: Tensor, context: LayerContext) -> Tensor:
        """Run the block, keeping for backward what ``activation_checkpointing`` says."""

        def attention_half(x_btd: Tensor) -> Tensor:
            mixed: Tensor = self.self_attn(self.input_layernorm(x_btd), context)
            return x_btd + mixed

        def ffn_half(x_btd: Tensor) -> Tensor:
            fed: Tensor = self.mlp(self.post_attention_layernorm(x_btd))
            return x_btd + fed

        if context.cache is not None or not torch.is_grad_enabled():
            return ffn_half(attention_half(x_btd))
        match self.activation_checkpointing:
            case "none":
                return ffn_half(attention_half(x_btd))
            case "layer":
                return checkpoint_layer(lambda x_btd: ffn_half(attention_half(x_btd)), x_btd)
            case "cola_m":
                x_btd = checkpoint_keeping_pre_activations(attention_half, x_btd)
                return checkpoint_keeping_pre_activations(ffn_half, x_btd)


class SamaraPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What Hugging Face needs to know about the models."""

    config: SamaraConfig
    config_class = SamaraConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 # declared by the base class
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights of one module; transformers calls it children first.

        OpenELM: linears N(0, 1 / sqrt(fan_in)), embedding N(0, 1 / sqrt(d)), o_proj and down_proj
        N(0, 1 / sqrt(2 N d)). Low-rank factors: CoLA's, whatever the kind.
        """
        match module:
            case RMSNorm():
                init.ones_(module.weight)
            case LowRankLinear():
                init.normal_(module.cola_a, std=module.init_std)
                init.normal_(module.cola_b, std=module.init_std)
            case nn.Linear() | nn.Embedding():
                init.normal_(module.weight, std=self._init_std(module))

    def _init_std(self, module: nn.Linear | nn.Embedding) -> float:
        if self.config.initializer == "normal":
            return self.config.initializer_range
        d = self.config.hidden_size
        if isinstance(module, nn.Embedding):
            return float(d**-0.5)
        layers = (layer for layer in self.modules() if isinstance(layer, DecoderLayer))
        if any(module in (layer.self_attn.o_proj, layer.mlp.down_proj) for layer in layers):
            return float((2 * self.config.num_hidden_layers * d) ** -0.5)
        return float(module.in_features**-0.5)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] | None = None,
        every_n_layers: int = 1,
    ) -> None:
        """Hugging Face's switch: whole-layer checkpointing of every n-th layer, or none."""
        del gradient_checkpointing_func  # layers call torch's, non-reentrant
        set_activation_checkpointing(self, "layer" if enable else "none")
        layers = [module for module in self.modules() if isinstance(module, DecoderLayer)]
        for index, layer in enumerate(layers):
            if index % every_n_layers:
                layer.activation_checkpointing = "none"


class SamaraModel(SamaraPreTrainedModel):  # type: ignore[no-untyped-call]
    """Embedding, blocks, final norm."""

    def __init__(self, config: SamaraConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        prefix_length: Tensor | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
        """Return the normed hidden states of each position.

        Args:
            input_ids: Tokens (b, t), int64; or give ``inputs_embeds``.
            attention_mask: 1 for tokens, 0 for padding, (b, past + t); or a ready mask of booleans
                or of numbers to add, (b, 1, t, s).
            position_ids: Positions (b, t). Left out: counted from the mask and the cache. Without
                mask and cache, positions that restart at 0 mark packed documents.
            past_key_values: Cache of the positions before these.
            inputs_embeds: Embedded tokens (b, t, d) in place of ``input_ids``.
            use_cache: Return a cache. Left out: only if one is given.
            output_hidden_states: Also return the residual stream before each layer, and the result.
            prefix_length: Prefix LM: how many positions of each row (b,), padding included, all
                positions of their document see, also those before them. Left out: none.
            **unused: Options of other models that generic tools pass.

        Raises:
            ConfigError: If the arguments exclude each other, or the model's kind of attention.
        """
        del unused
        self._check_arguments(attention_mask, past_key_values, use_cache, prefix_length)
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("input_ids: give exactly one of input_ids and inputs_embeds")
        x_btd = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        context = self._context(x_btd, attention_mask, position_ids, past_key_values, prefix_length)
        wants_states = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        states: list[Any] = []
        for layer in self.layers:
            if wants_states:
                states.append(x_btd)
            x_btd = layer(x_btd, context)
        last: Any = self.norm(x_btd)
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=(*states, last) if wants_states else None,
        )

    def _context(
        self,
        x_btd: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        prefix_length: Tensor | None = None,
    ) -> LayerContext:
        """Positions, rotary tables and mask: computed once, shared by all layers."""
        batch, length, _ = x_btd.shape
        device, head_dim = x_btd.device, self.config.head_dim
        causal = self.config.attention == "causal"
        # A static cache hands out its own counter, which the layers will move: copy it.
        num_past = cache.get_seq_length() + 0 if cache is not None else 0
        mask: AttentionMask
        if attention_mask is not None and attention_mask.dim() == 4:
            is_bool = attention_mask.dtype == torch.bool
            mask = attention_mask if is_bool else attention_mask.to(compute_dtype(x_btd))
        elif attention_mask is None and cache is None:
            if position_ids is None and prefix_length is not None:
                position_ids = torch.arange(length, device=device)[None]
            mask = (
                None
                if position_ids is None
                else packed_mask(
                    position_ids,
                    head_dim=head_dim,
                    dtype=compute_dtype(x_btd),
                    causal=causal,
                    prefix_length=prefix_length,
                )
            )
        else:
            mask = cached_mask(
                batch_shape=(batch, length),
                num_past=num_past,
                num_keys=length if cache is None else cache.get_mask_sizes(length, 0)[0],
                attention_mask=attention_mask,
                device=device,
                causal=causal,
                prefix_length=prefix_length,
            )
        if position_ids is None:
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            else:
                position_ids = (torch.arange(length, device=device) + num_past)[None]
        rotary = rotary_tables(
            position_ids,
            head_dim=head_dim,
            theta=self.config.rope_theta,
            dtype=torch.float64 if x_btd.dtype == torch.float64 else torch.float32,
        )
        return LayerContext(rotary=rotary, mask=mask, cache=cache, causal=causal)

    def _check_arguments(
        self,
        attention_mask: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        prefix_length: Tensor | None,
    ) -> None:
        if prefix_length is not None and attention_mask is not None and attention_mask.dim() == 4:
            raise ConfigError(
                "prefix_length: a ready attention_mask already holds it; leave it out"
            )
        if self.config.attention == "causal":
            return
        if use_cache or cache is not None:
            raise ConfigError(
                "use_cache: a bidirectional model has no cache, since later positions change "
                "earlier ones; leave it out"
            )
        if prefix_length is not None:
            raise ConfigError("prefix_length: needs causal attention, this model is bidirectional")


class SamaraForCausalLM(SamaraPreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Samara's language model: :class:`SamaraModel` and the matrix to the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 # HF's form

    def __init__(self, config: SamaraConfig) -> None:
        super().__init__(config)
        if config.attention != "causal":
            raise ConfigError(
                f"attention: a causal language model cannot be {config.attention}; load this one "
                "with AutoModelForMaskedLM"
            )
        self.model = SamaraModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prefix_length: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits, and the loss if labels are given.

        ``labels`` are tokens (b, t), not shifted (Hugging Face's convention), -100 not counted; the
        summed loss is divided by ``num_items_in_batch``, left out: by the labels counted.
        ``logits_to_keep`` asks for the logits of the last N positions, or of these; 0: of all.
        ``return_dict=False`` gives a tuple. The rest is as in :meth:`SamaraModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            prefix_length=prefix_length,
            **unused,
        )
        x_btd: Tensor = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_btv: Any = self.lm_head(x_btd[:, kept])
        loss: Any = None
        if labels is not None:
            loss = mean_loss(logits_btv[:, :-1], labels[:, 1:], num_items_in_batch)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_btv,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return result if wants_dict else result.to_tuple()


def set_activation_checkpointing(
    model: SamaraPreTrainedModel, mode: ActivationCheckpointing
) -> None:
    """Choose what each layer keeps for backward; loss and gradients stay the same bit for bit.

    Args:
        model: A model of this module.
        mode: ``none``: everything. ``layer``: the layer's input; recompute all. ``cola_m``: the two
            residual streams and the low-rank pre-activations; recompute no x A.

    Raises:
        ConfigError: If ``cola_m`` is asked of a model without low-rank projections.
    """
    if mode == "cola_m" and not model.config.has_low_rank:
        raise ConfigError(
            "activation_checkpointing: cola_m needs a model with low-rank projections; use layer"
        )
    for module in model.modules():
        match module:
            case DecoderLayer():
                module.activation_checkpointing = mode
            case LowRankLinear():
                module.keep_pre_activation = mode == "cola_m"
            case SamaraModel():
                module.gradient_checkpointing = mode != "none"


def mean_loss(
    logits_btv: Tensor, targets_bt: Tensor, num_items_in_batch: int | Tensor | None
) -> Tensor:
    """Cross-entropy in float32 or better, over the targets that are not -100.

    Args:
        logits_btv: Logits.
        targets_bt: What each position should say.
        num_items_in_batch: What the sum is divided by. None: the targets counted.
    """
    logits, targets = logits_btv.flatten(0, 1), targets_bt.flatten().to(logits_btv.device)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    total = functional.cross_entropy(logits, targets, reduction="sum")
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count
