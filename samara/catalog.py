"""What Samara is made of: each technique with its paper, its home, and where it is shown to hold.

Plain data. ``samara check --list`` prints it and ``docs/papers.md`` is generated from it
(``python -m samara.catalog``). A test checks that every module, recipe and test named here exists.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Technique:
    """One technique.

    Attributes:
        name: What the field calls it.
        does: What it does here, in one line.
        paper: Title, or the usual reference where there is no arXiv number.
        arxiv: arXiv number, or None.
        module: The module it lives in.
        recipe: A recipe that uses it.
        test: The test file that holds it to its definition.
    """

    name: str
    does: str
    paper: str
    arxiv: str | None
    module: str
    recipe: str
    test: str


TECHNIQUES: tuple[Technique, ...] = (
    Technique(
        name="Layer-wise scaling (OpenELM)",
        does="heads and FFN width grow with depth",
        paper="OpenELM",
        arxiv="2404.14619",
        module="samara.model.layerwise_scaling",
        recipe="recipes/openelm-1_1b.yaml",
        test="tests/unit/model/test_layerwise_scaling.py",
    ),
    Technique(
        name="CoLA",
        does="every linear becomes B·σ(A·x)",
        paper="CoLA",
        arxiv="2502.10940",
        module="samara.model.cola",
        recipe="recipes/cola-1b.yaml",
        test="tests/parity/test_cola.py",
    ),
    Technique(
        name="CoLA-M",
        does="checkpointing that keeps the low-rank pre-activations and recomputes no A·x",
        paper="CoLA",
        arxiv="2502.10940",
        module="samara.model.cola",
        recipe="recipes/cola-7b.yaml",
        test="tests/parity/test_cola.py",
    ),
    Technique(
        name="RMSNorm, QK-norm",
        does="norms with float32 statistics, on the stream and on queries and keys",
        paper="RMSNorm",
        arxiv="1910.07467",
        module="samara.model.layers",
        recipe="recipes/openelm-270m.yaml",
        test="tests/parity/test_block.py",
    ),
    Technique(
        name="Rotary positions",
        does="positions as rotations, computed from numbers at forward time",
        paper="RoFormer",
        arxiv="2104.09864",
        module="samara.model.layers",
        recipe="recipes/openelm-270m.yaml",
        test="tests/parity/test_block.py",
    ),
    Technique(
        name="Grouped-query attention",
        does="several query heads share one key-value head",
        paper="GQA",
        arxiv="2305.13245",
        module="samara.model.attention",
        recipe="recipes/openelm-270m.yaml",
        test="tests/parity/test_block.py",
    ),
    Technique(
        name="SwiGLU",
        does="gated feed-forward layer",
        paper="GLU variants",
        arxiv="2002.05202",
        module="samara.model.layers",
        recipe="recipes/llama-1b.yaml",
        test="tests/parity/test_block.py",
    ),
    Technique(
        name="z-loss",
        does="keeps the log-partition small",
        paper="PaLM",
        arxiv="2204.02311",
        module="samara.model.cross_entropy",
        recipe="recipes/openelm-270m.yaml",
        test="tests/unit/model/test_cross_entropy.py",
    ),
    Technique(
        name="Byte-level BPE",
        does="tokenizer trained on the training split",
        paper="BPE",
        arxiv="1508.07909",
        module="samara.data.tokenizer",
        recipe="recipes/quickstart.yaml",
        test="tests/properties/test_data_tokenizer.py",
    ),
    Technique(
        name="MinHash near-duplicates",
        does="drops documents that are nearly the same",
        paper="Deduplicating training data",
        arxiv="2107.06499",
        module="samara.data.near_duplicates",
        recipe="recipes/quickstart.yaml",
        test="tests/unit/data/test_near_duplicates.py",
    ),
    Technique(
        name="Packing with document boundaries",
        does="no padding, and no attention across documents",
        paper="Sequence composition",
        arxiv="2402.13991",
        module="samara.data.tokens",
        recipe="recipes/quickstart.yaml",
        test="tests/properties/test_data_packing.py",
    ),
    Technique(
        name="Masked language modelling (BERT)",
        does="predicts masked tokens from both sides, on the same trunk",
        paper="BERT",
        arxiv="1810.04805",
        module="samara.data.masked_lm",
        recipe="recipes/masked-lm.yaml",
        test="tests/unit/data/test_masked_lm.py",
    ),
    Technique(
        name="Mixture of denoisers (UL2)",
        does="seven ways to take spans out, on a prefix-LM decoder",
        paper="UL2",
        arxiv="2205.05131",
        module="samara.data.ul2",
        recipe="recipes/ul2.yaml",
        test="tests/unit/data/test_ul2.py",
    ),
    Technique(
        name="AdamW",
        does="decoupled weight decay",
        paper="AdamW",
        arxiv="1711.05101",
        module="samara.train.optim",
        recipe="recipes/quickstart.yaml",
        test="tests/unit/train/test_optim.py",
    ),
    Technique(
        name="Muon",
        does="orthogonalised momentum for hidden matrices, low-rank factors one by one",
        paper="Muon is scalable",
        arxiv="2502.16982",
        module="samara.train.optim",
        recipe="recipes/own-text.yaml",
        test="tests/unit/train/test_optim.py",
    ),
    Technique(
        name="Warmup-stable-decay",
        does="a constant rate with a short decay",
        paper="MiniCPM",
        arxiv="2404.06395",
        module="samara.train.schedule",
        recipe="recipes/own-text.yaml",
        test="tests/unit/train/test_schedule.py",
    ),
    Technique(
        name="Checkpoint averaging",
        does="the mean of the weights at the last checkpoints",
        paper="SWA",
        arxiv="1803.05407",
        module="samara.train.averaging",
        recipe="recipes/openelm-270m.yaml",
        test="tests/unit/train/test_averaging.py",
    ),
    Technique(
        name="Compute-optimal size",
        does="`samara design --fit`: the best design under a budget, by Chinchilla's law refitted",
        paper="Chinchilla scaling: a replication attempt",
        arxiv="2404.10102",
        module="samara.measure.fit",
        recipe="recipes/openelm-270m.yaml",
        test="tests/unit/measure/test_fit.py",
    ),
    Technique(
        name="Instruction tuning",
        does="loss on the answers only; the chat template travels with the tokenizer",
        paper="FLAN",
        arxiv="2109.01652",
        module="samara.train.instruct",
        recipe="recipes/instruct.yaml",
        test="tests/integration/test_instruct.py",
    ),
    Technique(
        name="LAG: growth chosen after a short lag",
        does="grows by several operators, trains on with the one that is best some steps later",
        paper="Landscape-aware growing",
        arxiv="2406.02469",
        module="samara.growth.grow",
        recipe="recipes/grow.yaml",
        test="tests/integration/test_grow.py",
    ),
    Technique(
        name="Depth growth by layer maps",
        does="stack, interpose, middle, last, overlap, identity inserts: one list of sources each",
        paper="G_stack; MIDAS (2409.19044); SOLAR (2312.15166); LLaMA-Pro (2401.02415)",
        arxiv="2405.15319",
        module="samara.growth.layer_map",
        recipe="recipes/grow.yaml",
        test="tests/unit/growth/test_layer_map.py",
    ),
    Technique(
        name="Width growth by axis maps",
        does="duplicates units and shares out what they send on: width, heads, FFN, CoLA rank",
        paper="Net2Net; bert2BERT (2110.07143); HyperCloning (2409.12903)",
        arxiv="1511.05641",
        module="samara.growth.axes",
        recipe="recipes/grow.yaml",
        test="tests/unit/growth/test_axes.py",
    ),
    Technique(
        name="Optimizer state under growth",
        does="moments by the rule of their gradients; no first update larger than the rate",
        paper="Staged training for transformer language models",
        arxiv="2203.06211",
        module="samara.growth.moments",
        recipe="recipes/grow.yaml",
        test="tests/unit/growth/test_moments.py",
    ),
    Technique(
        name="Gradual stacking",
        does="successive growth with a race at every stage, lengths by PROP-alpha",
        paper="On the inductive bias of stacking (MIDAS)",
        arxiv="2409.19044",
        module="samara.growth.stages",
        recipe="recipes/grow.yaml",
        test="tests/unit/growth/test_config.py",
    ),
    Technique(
        name="Speculative decoding",
        does="a smaller model, or the text itself, guesses tokens ahead and the model checks them",
        paper="Fast inference from transformers via speculative decoding",
        arxiv="2211.17192",
        module="samara.measure.generation",
        recipe="recipes/quickstart.yaml",
        test="tests/unit/measure/test_generation.py",
    ),
    Technique(
        name="Sparse updates in place",
        does="trains selected weights alone: gradients, masters and moments of those",
        paper="SIFT; SHiRA (2406.13175); PaCA (2503.01905)",
        arxiv="2312.11875",
        module="samara.sparse.gradients",
        recipe="recipes/finetune.yaml",
        test="tests/unit/sparse/test_gradients.py",
    ),
    Technique(
        name="Scores of weights",
        does="gradient x information x magnitude, every known rule a preset",
        paper="FISH mask; SPEFT (2412.13488); GaLLoP (2510.19778); LIFT (2506.00772)",
        arxiv="2111.09839",
        module="samara.sparse.scores",
        recipe="recipes/finetune.yaml",
        test="tests/unit/sparse/test_selection.py",
    ),
    Technique(
        name="Automatic choice of the score",
        does="short trials of several masks by successive halving, undone exactly",
        paper="Non-stochastic best arm identification and hyperparameter optimization",
        arxiv="1502.07943",
        module="samara.sparse.auto",
        recipe="recipes/finetune.yaml",
        test="tests/unit/sparse/test_growth.py",
    ),
    Technique(
        name="Sparse delta files",
        does="small, lossless changes of a model, put on and taken off bit for bit",
        paper="Samara's own format",
        arxiv=None,
        module="samara.sparse.delta",
        recipe="recipes/finetune.yaml",
        test="tests/properties/test_delta.py",
    ),
    Technique(
        name="LoRA, DoRA, rsLoRA, SHiRA",
        does="adapters of peft as baselines in the same loop",
        paper="LoRA; DoRA (2402.09353); rsLoRA (2312.03732); SHiRA (2406.13175)",
        arxiv="2106.09685",
        module="samara.adapt.peft_methods",
        recipe="recipes/finetune.yaml",
        test="tests/integration/test_finetune.py",
    ),
    Technique(
        name="Gated promotion",
        does="a version moves up if its scores' intervals, sample sizes and audits allow",
        paper="Newcombe, Interval estimation for the difference of proportions (1998)",
        arxiv=None,
        module="samara.registry.gates",
        recipe="recipes/finetune.yaml",
        test="tests/unit/registry/test_gates.py",
    ),
    Technique(
        name="Stochastic layer dropout (STLD)",
        does="leaves layers out of a training pass; a budget of active layers bounds the peak",
        paper="DropPEFT (shapes, budget and scaling are ours)",
        arxiv="2503.10217",
        module="samara.train.layer_dropout",
        recipe="recipes/layer-dropout.yaml",
        test="tests/properties/test_layer_dropout.py",
    ),
    Technique(
        name="Bias, stability and forgetting audits",
        does="compares a model before and after a change, with paired intervals and a verdict",
        paper="CrowS-Pairs",
        arxiv="2010.00133",
        module="samara.adapt.audits.bias",
        recipe="recipes/finetune.yaml",
        test="tests/unit/adapt/test_audits.py",
    ),
    Technique(
        name="Layer-dropout configurator",
        does="arms of rate and shape chosen online per device class, behind guard rails",
        paper="DropPEFT (arms and reward are ours)",
        arxiv="2503.10217",
        module="samara.federated.configurator",
        recipe="recipes/federate.yaml",
        test="tests/unit/federated/test_configurator.py",
    ),
    Technique(
        name="Personal transformer layer sharing (PTLS)",
        does="each client keeps some layers; the others are averaged over who sent them",
        paper="DropPEFT (importance and aggregation are ours)",
        arxiv="2503.10217",
        module="samara.federated.sharing",
        recipe="recipes/federate.yaml",
        test="tests/unit/federated/test_sharing.py",
    ),
    Technique(
        name="Federated fine-tuning",
        does="rounds of server and clients: one process, Flower's simulation, or devices over TLS",
        paper="DropPEFT",
        arxiv="2503.10217",
        module="samara.federated.federate",
        recipe="recipes/federate.yaml",
        test="tests/integration/federated/test_federate.py",
    ),
    Technique(
        name="Effective rank of activations",
        does="r(alpha) before and after every linear, streamed in float64, over training",
        paper="CoLA",
        arxiv="2502.10940",
        module="samara.measure.spectrum",
        recipe="recipes/quickstart.yaml",
        test="tests/unit/measure/test_spectrum.py",
    ),
    Technique(
        name="Rank allocation",
        does="ranks per layer and linear under a budget, by the energy they hold",
        paper="Eckart and Young, The approximation of one matrix by another of lower rank (1936)",
        arxiv=None,
        module="samara.measure.rank_allocation",
        recipe="recipes/quickstart.yaml",
        test="tests/unit/measure/test_rank_allocation.py",
    ),
    Technique(
        name="Server optimizers",
        does="FedAdam, FedYogi and FedAdagrad on the mean change of each layer that was sent",
        paper="Adaptive federated optimization",
        arxiv="2003.00295",
        module="samara.federated.server_optimizers",
        recipe="recipes/federate.yaml",
        test="tests/unit/federated/test_server_optimizers.py",
    ),
    Technique(
        name="FedProx",
        does="pulls a local training back to where it began",
        paper="FedProx",
        arxiv="1812.06127",
        module="samara.federated.proximal",
        recipe="recipes/federate.yaml",
        test="tests/unit/federated/test_server_optimizers.py",
    ),
    Technique(
        name="Mixed-rank federated LoRA",
        does="each kind of device trains adapters of its own rank",
        paper="HetLoRA (without rank pruning and norm weights)",
        arxiv="2401.06432",
        module="samara.federated.mixed_ranks",
        recipe="recipes/federate.yaml",
        test="tests/unit/federated/test_parts.py",
    ),
    Technique(
        name="Adapter depth and width by trials",
        does="trial groups of clients decide when adapters get deeper or wider",
        paper="FedAdapter (on LoRA, without its activation cache)",
        arxiv="2205.10162",
        module="samara.federated.depth_search",
        recipe="recipes/federate.yaml",
        test="tests/unit/federated/test_parts.py",
    ),
    Technique(
        name="Client-level differential privacy",
        does="Poisson-drawn clients, clipped changes, noisy sums, a budget that ends the run",
        paper="Learning differentially private recurrent language models",
        arxiv="1710.06963",
        module="samara.federated.protection",
        recipe="recipes/federate.yaml",
        test="tests/unit/federated/test_protection.py",
    ),
    Technique(
        name="DP-SGD on a client's rows",
        does="clipped gradients per row and noise, by Opacus; layers left out get neither",
        paper="Deep learning with differential privacy",
        arxiv="1607.00133",
        module="samara.federated.record_privacy",
        recipe="recipes/federate.yaml",
        test="tests/unit/federated/test_record_privacy.py",
    ),
    Technique(
        name="Renyi accounting",
        does="what a budget has spent, by Opacus's accountant, asked before anything is done",
        paper="Renyi differential privacy of the sampled Gaussian mechanism",
        arxiv="1908.10530",
        module="samara.federated.accounting",
        recipe="recipes/federate.yaml",
        test="tests/unit/federated/test_accounting.py",
    ),
    Technique(
        name="Secure aggregation",
        does="pairwise masks and shares: the server learns the sum, and not who shared which layer",
        paper="Practical secure aggregation for federated learning on user-held data",
        arxiv="1611.04482",
        module="samara.federated.secure_sum",
        recipe="recipes/federate.yaml",
        test="tests/unit/federated/test_secure_sum.py",
    ),
    Technique(
        name="Document bootstrap",
        does="intervals that resample documents, paired between models",
        paper="Bootstrap methods (Efron 1979)",
        arxiv=None,
        module="samara.measure.compare",
        recipe="recipes/quickstart.yaml",
        test="tests/properties/test_measure_compare.py",
    ),
)


def markdown() -> str:
    """The catalogue as the page ``docs/papers.md``."""
    lines = [
        "# Techniques and papers",
        "",
        "Generated by `python -m samara.catalog`; edit `samara/catalog.py` instead.",
        "",
        "| technique | what it does here | paper | module | recipe | test |",
        "|---|---|---|---|---|---|",
    ]
    for item in TECHNIQUES:
        paper = f"[{item.paper}](https://arxiv.org/abs/{item.arxiv})" if item.arxiv else item.paper
        lines.append(
            f"| {item.name} | {item.does} | {paper} | `{item.module}` | `{item.recipe}` "
            f"| `{item.test}` |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
