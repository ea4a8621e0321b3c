"""What instruction tuning changed: loss on the answers, and how many answers end.

    python benchmarks/answers.py runs/quickstart/dense runs/instruct --data valid.jsonl.gz

Each model answers the last question of every conversation, greedily, in its chat template (the base
model gets Samara's). Prints JSON: per model the mean loss on the answers, the share of its own
answers that reach the end mark within ``--max-new-tokens``, and the first few of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import Record, add_json_option
from transformers import PreTrainedTokenizerFast

from samara.data.chat import ChatEncoder, ChatRows
from samara.data.chat_records import Conversation, read_conversations
from samara.data.chat_template import save_with_chat_template
from samara.measure.loss import evaluate_loss
from samara.model.loading import load_model
from samara.model.modeling import SamaraForCausalLM
from samara.runs import hash_file, hash_weights, model_folder

BATCH_SIZE = 16
SHOWN = 3


def answers(
    model: SamaraForCausalLM,
    tokenizer_folder: Path,
    conversations: list[Conversation],
    *,
    max_new_tokens: int,
    longest_prompt: int,
) -> dict[str, Any]:
    """Generate an answer to each prompt that is short enough; count those that end."""
    encoder = ChatEncoder(tokenizer_folder)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [encoder.render(c.messages[:-1], add_generation_prompt=True) for c in conversations]
    sizes = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    kept = [p for p, size in zip(prompts, sizes, strict=True) if size <= longest_prompt]
    ended, said = 0, []
    for start in range(0, len(kept), BATCH_SIZE):
        inputs = tokenizer(
            kept[start : start + BATCH_SIZE],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(model.device)
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :].cpu()
        ended += int((new == tokenizer.eos_token_id).any(dim=1).sum())
        said += tokenizer.batch_decode(new, skip_special_tokens=True)
    shown = [{"prompt": p, "answer": a} for p, a in zip(kept[:SHOWN], said[:SHOWN], strict=True)]
    return {
        "answers": len(kept),
        "prompts_left_out": len(prompts) - len(kept),
        "ended_share": ended / len(kept) if kept else None,
        "shown": shown,
    }


def measure(folder: Path, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Loss and answers of one model."""
    device = torch.device(arguments.device)
    model = load_model(folder, dtype=torch.float32, device=device).eval()
    conversations = list(read_conversations([data]))[: arguments.max_conversations]
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer_folder = save_with_chat_template(folder, Path(scratch) / "tokenizer").folder
        rows = ChatRows(
            conversations,
            ChatEncoder(tokenizer_folder),
            sequence_length=arguments.sequence_length,
        )
        loss = evaluate_loss(model, rows, batch_size=8, device=device, precision="float32").loss
        return {
            "weights_hash": hash_weights(folder),
            "loss_on_answers": loss,
            **answers(
                model,
                tokenizer_folder,
                conversations,
                max_new_tokens=arguments.max_new_tokens,
                longest_prompt=arguments.sequence_length,
            ),
        }


def main() -> None:
    """Measure the models on one file and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="model or run folders")
    parser.add_argument("--data", type=Path, required=True, help="conversations (.jsonl, .gz)")
    parser.add_argument("--max-conversations", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    add_json_option(parser)
    arguments = parser.parse_args()
    data_hash = hash_file(arguments.data)
    record = Record(
        arguments.json,
        script=__file__,
        arguments=sys.argv[1:],
        device=arguments.device,
        settings={**{key: str(value) for key, value in vars(arguments).items()}, "hash": data_hash},
    )
    for path in arguments.models:
        record.add({"model": str(path), **measure(model_folder(path), arguments.data, arguments)})
    record.finish()
    models = {row.pop("model"): row for row in record.rows}
    result = {"data_hash": data_hash, "models": models}
    print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
