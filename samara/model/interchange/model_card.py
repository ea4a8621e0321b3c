"""The model card: a README.md on what a folder holds, how it was made, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from samara.config import dump_yaml
from samara.model.configuration import SamaraConfig
from samara.model.heads import head_of
from samara.model.interchange.provenance import Making, Step
from samara.model.interchange.stored_model import StoredModel, per_layer
from samara.model.interchange.stored_tensors import dtype_name
from samara.progress import duration

FILE = "README.md"
SOURCE_CARD = "README.source.md"
"""What a foreign card is kept as."""

LOADING = {
    "samara": """\
```python
import samara  # teaches transformers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```""",
    "llama": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```""",
    "openelm": """\
```python
from mlx_lm import generate, load

model, tokenizer = load("PATH")
generate(model, tokenizer, prompt="Once upon a time")
```

With PyTorch: `samara convert PATH OTHER --to samara`. For llama.cpp: `--to gguf`, as its own
converter takes every OpenELM for one with the tokenizer of Llama 2.""",
    "gguf": """\
```python
from llama_cpp import Llama

model = Llama("PATH/model.gguf")
model("Once upon a time", max_tokens=64)
```""",
}
LIBRARIES = {"samara": "transformers", "llama": "transformers", "openelm": "mlx", "gguf": "gguf"}


def model_card(model: StoredModel, *, target: str, making: Making) -> str:
    """Write the card of a folder.

    Args:
        model: The model as it is written.
        target: The format it is written in.
        making: What is known about the making of its weights.
    """
    sections = [
        _head(target, making),
        f"# {model.name}",
        _summary(model, target),
        "## Load it",
        LOADING[target]
        .replace("PATH", "path/to/this/folder")
        .replace("AutoModelForCausalLM", head_of(model.config).auto_class),
        "## Design",
        _design(model),
        "## How it was made",
        _made(making),
        "## Scores",
        _scores(making),
        "## License",
        f"`{making.license}`" if making.license else "Not stated by the source of the weights.",
    ]
    return "\n\n".join(sections) + "\n"


def _head(target: str, making: Making) -> str:
    lines = ["---", *([f"license: {making.license}"] if making.license else [])]
    lines += [f"library_name: {LIBRARIES[target]}", "pipeline_tag: text-generation"]
    lines += ["tags:", "- samara", f"- {target}", "---"]
    return "\n".join(lines)


def _summary(model: StoredModel, target: str) -> str:
    dtypes = sorted({dtype_name(tensor.dtype) for tensor in model.tensors.values()})
    names = {"samara": "Samara's", "llama": "Llama's", "openelm": "OpenELM's", "gguf": "the GGUF"}
    return (
        f"A {head_of(model.config).description} of {model.num_parameters:,} parameters "
        f"({', '.join(dtypes)}), in {names[target]} format."
    )


def _design(model: StoredModel) -> str:
    config = model.config
    rows = [
        ("layers", str(config.num_hidden_layers)),
        ("hidden size", str(config.hidden_size)),
        ("head width", str(config.head_dim)),
        ("query heads", _widths(per_layer(config.num_query_heads))),
        ("key-value heads", _widths(per_layer(config.num_kv_heads))),
        ("FFN width", _widths(per_layer(config.ffn_dims))),
        ("low rank (CoLA)", _ranks(config)),
        ("QK-norm", "yes" if config.qk_norm else "no"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("output matrix", "the embedding" if config.tie_word_embeddings else "its own"),
        ("context", f"{config.max_position_embeddings:,}"),
        ("rotary base", f"{config.rope_theta:g}"),
    ]
    return _table(("", ""), rows)


def _widths(widths: Sequence[int]) -> str:
    if len(set(widths)) == 1:
        return f"{widths[0]} in every layer"
    return ", ".join(map(str, widths))


def _ranks(config: SamaraConfig) -> str:
    if not config.has_low_rank:
        return "no"
    return f"{config.ranks}, activation {config.cola_activation}"


def _made(making: Making) -> str:
    parts = []
    if making.data_hash:
        parts.append(f"Trained on the corpus with SHA-256 `{making.data_hash}`.")
    if making.compute:
        parts.append(_compute(making.compute))
    if making.recipe:
        parts.append(f"The recipe, complete:\n\n```yaml\n{dump_yaml(dict(making.recipe))}```")
    if not parts:
        parts.append("How the weights were trained is not recorded with them.")
    return "\n\n".join([*parts, *map(_step, making.steps)])


def _step(step: Step) -> str:
    action = "Converted from" if step.verb == "convert" else f"The mean of {len(step.made_from)}:"
    sources = [
        f"- `{origin.name}` ({origin.format}), SHA-256 of the weights `{origin.weights_hash}`"
        for origin in step.made_from
    ]
    return "\n".join([action, "", *sources])


def _compute(spent: Mapping[str, float]) -> str:
    parts = [f"{spent['tokens']:,.0f} tokens", f"{spent['flops']:.3g} FLOPs"]
    parts.append(duration(spent["seconds"]))
    if spent.get("joules"):
        parts.append(f"{spent['joules'] / 3.6e6:.3g} kWh (estimated)")
    return f"Compute, ancestors included: {', '.join(parts)}."


def _scores(making: Making) -> str:
    if not making.scores:
        return "None recorded."
    rows = []
    for measure in ("loss", "perplexity", "bits_per_byte"):
        score = making.scores.get(measure)
        if score is not None:
            low, high = score.get("low"), score.get("high")
            interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
            rows.append((measure.replace("_", " "), f"{score['value']:.4g}", interval))
    count, split, corpus = (
        making.scores.get(key, "?") for key in ("num_documents", "split", "corpus_hash")
    )
    about = f"On {count} documents of the split `{split}` of the corpus `{corpus}`."
    return f"{about}\n\n{_table(('measure', 'value', 'interval'), rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
