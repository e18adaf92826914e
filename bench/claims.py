"""What the pages show of the measured rows (``bench.report``): which cases, in which words, beside which peers.

A claim names a case, so its numbers follow the rows. ``tests/bench/test_report.py`` fails where a case or a peer is not in its group.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """An operation on one problem.

    Args:
        name: Its name, as code.
        group, case: The case of ``bench/bench_<group>.py``.
        plain: The peer that a user of PyTorch would write.
        words: What its shape does not tell.
    """

    name: str
    group: str
    case: str
    plain: str
    words: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two peers of a case: how many times faster one is, or which share of the other's time it takes.

    Args:
        what: The two, in words.
        group, case: The case.
        fast, slow: Two peers.
        share: Whether the time of ``fast`` is told as a percentage of that of ``slow``.
    """

    what: str
    group: str
    case: str
    fast: str
    slow: str
    share: bool = False


_SEED = "seed, eager"
_PAIR = "foreach pair"
_HEUN, _FLOW, _LAYER = "`heun_{}`", "`mlp_flow`, {}", "`norm_mish`, {}"

CPU = (
    Operation("`arm`", "arm", "N1 B256 128^2", _SEED, "mask and finite check"),
    Operation("`arm`", "arm", "N1 B256 128^2 all violating", _SEED, "all pressures negative"),
    Operation("`arm`", "arm", "N8 B8 128^2", _SEED),
    Operation("`arm`", "arm", "N1 B64 64^2", _SEED),
    Operation("`arm` of declared fields", "arm_fields", "shallow water, N1 B256 128^2", "eager"),
    Operation("`add_noise`", "noise", "add_noise N8 B32 64^2", "randn_like, eager"),
    Operation("`add_noise`", "noise", "add_noise N1 B8 32^2", "randn_like, eager"),
    Operation("`normal`", "noise", "normal N8 B32 64^2", "torch.randn, eager"),
    Operation("`keyed_dropout`", "dropout", "M256 T64 D256", "F.dropout, eager"),
    Operation("`keyed_dropout`", "dropout", "M16 T64 D128", "F.dropout, eager"),
    Operation("`topk`", "topk", "n1e6 k1 random", "torch.topk"),
    Operation("`topk`", "topk", "n1e6 k256 random", "torch.topk"),
    Operation("`topk`", "topk", "n1e6 k256 tied", "torch.topk", "tied"),
    Operation("`topk`", "topk", "n1e6 k1024 random", "torch.topk"),
    Operation("`topk`", "topk", "n1e6 k1024 ascending", "torch.topk", "ascending"),
    Operation("`topk`", "topk", "256x4096 k64 random", "torch.topk"),
    Operation("`topk`", "topk", "256x4096 k1024 random", "torch.topk"),
    Operation(_FLOW.format("forward"), "mlp_flow", "small forward", "eager"),
    Operation(_FLOW.format("frozen"), "mlp_flow", "small frozen", "eager"),
    Operation(_FLOW.format("trained"), "mlp_flow", "small trained", "eager"),
    Operation(_FLOW.format("forward"), "mlp_flow", "5M forward", "eager"),
    Operation(_FLOW.format("frozen"), "mlp_flow", "5M frozen", "eager"),
    Operation(_FLOW.format("trained"), "mlp_flow", "5M trained", "eager"),
    Operation(_HEUN.format("predict"), "heun", "256x64 predict plain", "eager"),
    Operation(_HEUN.format("correct"), "heun", "256x512 correct grouped", "eager", "groups of 8"),
    Operation(_HEUN.format("correct"), "heun", "4096x512 correct plain", "eager"),
    Operation(_LAYER.format("forward"), "norm_mish", "256x512 forward", "eager"),
    Operation(_LAYER.format("backward"), "norm_mish", "256x512 backward", "eager"),
    Operation("`accumulate_moments`", "moments", "24M in 223 tensors", _PAIR),
    Operation("`accumulate_moments`", "moments", "24M in 223 tensors, bfloat16", _PAIR, "bfloat16 gradients"),
)

CUDA = (
    Operation("`arm`", "arm", "N1 B1024 256^2", _SEED, "mask and finite check"),
    Operation("`arm`", "arm", "N1 B64 64^2", _SEED),
    Operation("`arm` of declared fields", "arm_fields", "shallow water, N1 B1024 256^2", "eager"),
    Operation("`add_noise`", "noise", "add_noise N1 B1024 256^2", "randn_like, eager"),
    Operation("`normal`", "noise", "normal N1 B1024 256^2", "torch.randn, eager"),
    Operation("`keyed_dropout`", "dropout", "M1024 T256 D512", "F.dropout, eager"),
    Operation("`topk`", "topk", "n1e6 k256 random", "torch.topk"),
    Operation("`topk`", "topk", "256x262144 k256 random", "torch.topk"),
    Operation(_FLOW.format("forward"), "mlp_flow", "5M forward", "eager"),
    Operation(_FLOW.format("trained"), "mlp_flow", "48M trained", "eager"),
    Operation(_HEUN.format("correct"), "heun", "4096x1024 correct grouped", "eager", "groups of 8"),
    Operation(_LAYER.format("forward"), "norm_mish", "16384x1792 forward", "eager"),
    Operation(_LAYER.format("backward"), "norm_mish", "16384x1792 backward", "eager"),
    Operation("`accumulate_moments`", "moments", "24M in 223 tensors", _PAIR),
)

README = ("N1 B256 128^2", "add_noise N8 B32 64^2", "M256 T64 D256", "n1e6 k256 random", "small frozen", "256x512 forward")  # six of CPU

_SIZES = ("prm", "sizes")
_AGENTS = (("mlp", "an MLP"), ("residual", "a residual MLP"), ("heun", "a flow, Heun K = 2"))
_LOOP = ("TTCGreedy", "the plan's loop, plain layers"), ("TTCGreedy", "the plan's loop")
COMPARISONS = (
    Comparison("`TTCGreedy` on the ViT, 5 candidates, against the plan's loop on plain layers", "step", "loop ViT B5", *_LOOP[0]),
    Comparison("the same, against its loop on the ViT as it is", "step", "loop ViT B5", *_LOOP[1]),
    Comparison("64 candidates, against the plan's loop on plain layers", "step", "loop ViT B64", *_LOOP[0]),
    Comparison("the same, against its loop on the ViT as it is", "step", "loop ViT B64", *_LOOP[1]),
    Comparison("1,024 candidates, against the plan's loop on plain layers", "step", "loop ViT B1024", *_LOOP[0]),
    Comparison("compiled, 5 candidates, against the eager loop on plain layers", "step", "loop compiled ViT B5", *_LOOP[0]),
    Comparison("compiled, 64 candidates, against the eager loop on plain layers", "step", "loop compiled ViT B64", *_LOOP[0]),
    Comparison("an FNO, 5 candidates, against the plan's loop", "step", "loop FNO B5", *_LOOP[1]),
    Comparison("an FNO, 64 candidates, against the plan's loop", "step", "loop FNO B64", *_LOOP[1]),
    Comparison("a U-Net, 5 candidates, against the plan's loop", "step", "loop U-Net B5", *_LOOP[1]),
    Comparison("a U-Net, 64 candidates, against the plan's loop", "step", "loop U-Net B64", *_LOOP[1]),
    Comparison("forward of the ViT in a surrogate, 16 rows, against plain layers", "step", "forward ViT B16", "surrogate", "plain layers"),
    Comparison(
        "a step of 16 candidates: scores and selection, of the whole", "step", "shares N1 B16", "score and select", "whole step", True
    ),
    Comparison("keyed dropout in the shipped surrogate, against `nn.Dropout`", "step", "dropout N1 B16", "keyed dropout", "nn.Dropout"),
    Comparison("`Surrogate(compile=True)`, 8 candidates, against eager", "step", "arithmetic N1 B8", "float32, compiled", "float32"),
    Comparison("bfloat16 against float32, 8 candidates", "step", "arithmetic N1 B8", "bfloat16", "float32"),
    Comparison("`Surrogate(dtype=torch.bfloat16)`, 5 candidates, against float32", "step", "loop bfloat16 ViT B5", "bfloat16", "TTCGreedy"),
    Comparison("the same, 64 candidates", "step", "loop bfloat16 ViT B64", "bfloat16", "TTCGreedy"),
    Comparison("the same, against the plan's loop in float32 on plain layers", "step", "loop bfloat16 ViT B64", "bfloat16", _LOOP[0][1]),
    Comparison("4,097 candidates in chunks of 1024, against one pass", "search", "chunks B4097", "chunks of 1024", "one pass"),
    Comparison("selection of the 8 best of them, of the whole step", "search", "selection B4097", "selection", "chunks of 1024", True),
    Comparison("`PRMScorer`, the plan's PRM, zero padding, against the plain forward", "prm", "B256 64^2 zeros", "ttcfast", "seed, plain"),
    Comparison("the same, against torch.compile", "prm", "B256 64^2 zeros", "ttcfast", "seed, torch.compile"),
    Comparison("the same, periodic, against torch.compile", "prm", "B256 64^2 periodic", "ttcfast", "seed, torch.compile"),
    Comparison(
        "`examples/prm` in bfloat16, channels last, against float32", "prm", "shipped, 8 groups of 16", "bfloat16, channels last", "float32"
    ),
    Comparison("a candidate scored by `examples/prm`, of a forward of the surrogate", *_SIZES, "shipped DensePRM", "surrogate", True),
    Comparison("the same, by the small `PRM`", *_SIZES, "PRM small", "surrogate", True),
    Comparison("the same, by the small `DensePRM`", *_SIZES, "DensePRM small", "surrogate", True),
    Comparison(
        "`TripletFile.frames`, 64 samples, against h5py by chunk",
        "triplets",
        "64 samples 64^2",
        "ttcfast, TripletFile.frames",
        "h5py, chunk per sample",
    ),
    Comparison("the same, against `.pt` files", "triplets", "64 samples 64^2", "ttcfast, TripletFile.frames", ".pt per sample"),
    Comparison(
        "ESNR of every sample by ghost norms, of a plain step", "esnr", "MLP 3x512 per sample", "ttcfast, ghost", "plain step", True
    ),
    Comparison("ESNR of 16 parts by ghost norms, against the loop", "esnr", "MLP 3x512 M16", "ttcfast, ghost", "loop"),
    Comparison("planning by MPPI, 512 samples, against plain torch", "planning", "samples 512", "ttcfast", "plain torch"),
    *(
        Comparison(f"an agent's {name} update, {dynamics}, against plain PyTorch", "agent", f"{name} {kind}", "ttcfast", "plain torch")
        for kind, dynamics in _AGENTS
        for name in ("world model", "policy")
    ),
    Comparison("the two, a residual MLP, against torch.compile", "agent", "both residual", "ttcfast", "torch.compile"),
    *(
        Comparison(f"three random seeds of {dynamics} at once, against one by one", "agent", f"3 seeds {kind}", "ttcfast", "one by one")
        for kind, dynamics in _AGENTS
    ),
)
