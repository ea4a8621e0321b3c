"""The chat template: how turns become text, saved with the tokenizer for every tool that reads it.

A turn is a role tag, a line break, the content, the end mark, a line break; a prompt to answer
ends with the assistant's tag and a line break. That is the text of OpenELM's recipe (the Zephyr
template of alignment-handbook), with the begin mark in front where the tokenizer has one:

    <|bos|><|user|>
    Name a colour.<|eos|>
    <|assistant|>
    Blue.<|eos|>

The tags are plain text, as in OpenELM: no embedding is added, so a model stays what it was. White
space around a content is left out, so the answer's first token does not melt into the tag.
"""

from __future__ import annotations

from pathlib import Path

from samara.data.tokenizer import TextTokenizer
from samara.errors import DataError
from samara.runs import write_text

TEMPLATE_FILE = "chat_template.jinja"

TAGS = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("no role '" + message['role'] + "'; use system, user, assistant") }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>\n' + (message['content'] | trim) + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
""".strip()


def save_with_chat_template(source: Path, folder: Path) -> TextTokenizer:
    """Copy a tokenizer folder; give the copy our template unless it has one of its own.

    Args:
        source: A tokenizer folder.
        folder: Where the copy goes; must not exist.

    Raises:
        DataError: If the tokenizer has no end mark, by which an answer ends.
    """
    tokenizer = TextTokenizer.load(source)
    if tokenizer.special_tokens["eos_token_id"] is None:
        raise DataError(
            f"{source}: the tokenizer has no eos_token, so an answer cannot end; name one in "
            "tokenizer_config.json"
        )
    copy = tokenizer.copy_to(folder)
    if not (folder / TEMPLATE_FILE).exists():
        write_text(folder / TEMPLATE_FILE, CHAT_TEMPLATE)
    return copy
