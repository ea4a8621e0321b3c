"""The loss of a fixed set of tokens: against naive sums, and whatever the batches are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from samara.data.tokenizer import train_tokenizer
from samara.data.tokens import PackedSequences, TokenShards, write_token_shards
from samara.measure.loss import evaluate_loss, perplexity, rows_within
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM

CPU = torch.device("cpu")
WORDS = ("elm", "seed", "wing", "wind", "river", "hill", "naïve", "café", "and", "the", "over")
VOCAB = 280


def make_texts(number: int) -> list[str]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 40, size=number)
    return [" ".join(generator.choice(WORDS, size=length)) for length in lengths]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(24)
    tokenizer = train_tokenizer(texts, folder / "tokenizer", vocab_size=VOCAB)
    write_token_shards(texts, tokenizer, folder / "tokens" / "validation")
    return TokenShards.open(folder / "tokens", "validation")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    design = ModelConfig(hidden_size=32, num_hidden_layers=2, head_dim=8, vocab_size=VOCAB)
    return SamaraForCausalLM(SamaraConfig.from_design(design)).double()


def score(model, dataset, **options):
    settings = {"batch_size": 4, "device": CPU, "precision": "float32", **options}
    return evaluate_loss(model, dataset, **settings)


def naive(model, shards, sequence_length):
    """Summed NLL and targets of each document, one piece of one document at a time."""
    nll, targets = np.zeros(shards.num_documents), np.zeros(shards.num_documents, dtype=int)
    offsets = shards.document_offsets
    for document in range(shards.num_documents):
        first, last = int(offsets[document]), int(offsets[document + 1]) - 1
        start = first
        while start < last:
            stop = min(last, (start // sequence_length + 1) * sequence_length)
            tokens = torch.from_numpy(shards.read(start, stop + 1).astype(np.int64))
            with torch.no_grad():
                logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
            log_p = torch.log_softmax(logits.double(), dim=-1)
            nll[document] -= log_p.gather(1, tokens[1:, None]).sum().item()
            targets[document] += stop - start
            start = stop
    return nll, targets


@pytest.mark.parametrize("sequence_length", [7, 32, 4096])
def test_each_document_has_the_sum_of_its_own_tokens(model, shards, sequence_length):
    dataset = PackedSequences(shards, sequence_length=sequence_length)
    result = score(model, dataset)
    nll, targets = naive(model, shards, sequence_length)
    np.testing.assert_allclose(result.nll_sum, nll, rtol=1e-9)
    np.testing.assert_array_equal(result.num_targets, targets)
    assert result.loss == pytest.approx(nll.sum() / targets.sum(), rel=1e-9)
    assert result.num_targets.sum() == dataset.num_targets


def test_any_causal_model_of_transformers(shards):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    llama = LlamaForCausalLM(config).double().eval()
    result = score(llama, PackedSequences(shards, sequence_length=32))
    nll, _ = naive(llama, shards, 32)
    np.testing.assert_allclose(result.nll_sum, nll, rtol=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_the_batch_size_does_not_matter(model, shards, batch_size):
    dataset = PackedSequences(shards, sequence_length=32)
    reference, result = score(model, dataset), score(model, dataset, batch_size=batch_size)
    np.testing.assert_allclose(result.nll_sum, reference.nll_sum, rtol=1e-12)
    np.testing.assert_array_equal(result.num_targets, reference.num_targets)


def test_it_is_no_mean_of_batch_means(model, shards):
    """With a last batch of one short row, a mean of means is something else (the family's trap)."""
    dataset = PackedSequences(shards, sequence_length=32)
    result = score(model, dataset)
    rows = []
    for row in range(len(dataset)):
        one = PackedSequences(shards, sequence_length=32).batch([row])
        with torch.no_grad():
            logits = model(
                input_ids=one["input_ids"], position_ids=one["position_ids"], use_cache=False
            ).logits
        rows.append(torch.nn.functional.cross_entropy(logits[0], one["targets"][0]).item())
    assert abs(np.mean(rows) - result.loss) > 1e-5


@pytest.mark.parametrize("sequence_length", [5, 16, 33])
@pytest.mark.parametrize("max_tokens", [1, 40, 100, 150, 10**6])
def test_a_part_is_the_first_rows(model, shards, sequence_length, max_tokens):
    dataset = PackedSequences(shards, sequence_length=sequence_length)
    whole = score(model, dataset)
    part = score(model, dataset, max_tokens=max_tokens)
    rows = rows_within(dataset, max_tokens)
    assert rows == max(1, min(len(dataset), max_tokens // sequence_length))
    batch = dataset.batch(range(rows))
    counted = batch["targets"] != -100
    assert part.num_targets.sum() == counted.sum()
    reached = int(batch["document_ids"].max()) + 1
    assert len(part.num_targets) in (reached, reached + 1)  # the last target may be a new document
    complete = part.num_targets == whole.num_targets[: len(part.num_targets)]
    np.testing.assert_allclose(part.nll_sum[complete], whole.nll_sum[: len(complete)][complete])
    sizes = shards.document_bytes[: len(complete)]
    np.testing.assert_array_equal(part.num_bytes, np.where(complete, sizes, 0))


def test_bits_per_byte_by_hand(model, shards):
    result = score(model, PackedSequences(shards, sequence_length=32))
    texts = make_texts(24)
    sizes = [len(text.encode("utf-8")) for text in texts]
    assert result.num_bytes.tolist() == sizes
    assert result.bits_per_byte == pytest.approx(result.nll_sum.sum() / math.log(2) / sum(sizes))
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_bits_per_byte_are_those_of_whole_documents(model, shards):
    dataset = PackedSequences(shards, sequence_length=32)
    part, whole = score(model, dataset, max_tokens=320), score(model, dataset)
    full = part.num_bytes > 0
    assert 0 < full.sum() < len(full)
    number = int(full.sum())
    bits = whole.nll_sum[:number].sum() / math.log(2)
    assert part.bits_per_byte == pytest.approx(bits / whole.num_bytes[:number].sum())


def test_nothing_whole_has_no_bits_per_byte(model, shards):
    part = score(model, PackedSequences(shards, sequence_length=5), max_tokens=5)
    assert math.isnan(part.bits_per_byte)
    assert part.loss > 0


def test_without_boundaries_every_token_but_the_first_is_a_target(model, shards):
    dataset = PackedSequences(shards, sequence_length=32, document_boundaries=False)
    assert score(model, dataset).num_targets.sum() == shards.num_tokens - 1


def test_precisions_agree(shards):
    torch.manual_seed(0)
    design = ModelConfig(hidden_size=32, num_hidden_layers=2, head_dim=8, vocab_size=VOCAB)
    single = SamaraForCausalLM(SamaraConfig.from_design(design))
    dataset = PackedSequences(shards, sequence_length=32)
    exact = score(single, dataset)
    rounded = score(single, dataset, precision="bfloat16")
    assert rounded.loss == pytest.approx(exact.loss, rel=5e-3)
    assert rounded.loss != exact.loss


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model, shards, training):
    model.train(training)
    score(model, PackedSequences(shards, sequence_length=64), max_tokens=64)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_reaches_the_end(model, shards):
    seen = []
    dataset = PackedSequences(shards, sequence_length=64)
    score(model, dataset, on_progress=seen.append)
    assert seen[-1] == len(dataset)


def test_perplexity_of_a_hopeless_loss_is_infinite():
    assert perplexity(1e4) == math.inf
