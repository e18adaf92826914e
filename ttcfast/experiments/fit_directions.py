"""The logic of ``ttcfast fit_directions``: learns directions of structured candidates from the surrogate's errors in a triplet file."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ttcfast.checks import at_least, one_of, whole
from ttcfast.rewards.prm.triplets.file import FRAMES, TripletFile
from ttcfast.runtime import provenance
from ttcfast.runtime.errors import ArgumentError, DataError
from ttcfast.runtime.files import output_folder
from ttcfast.runtime.progress import bar
from ttcfast.spec import StateSpec
from ttcfast.stochastic_sampling.directions import KINDS, Directions, HeadFields, LocalFields, save_directions

logger = logging.getLogger(__name__)

_NORMAL_MEDIAN = 1.4826  # standard deviation of a normal variable over the median of its absolute value
_STILL, _TRUTH = FRAMES.index("deterministic"), FRAMES.index("truth")


@dataclass(frozen=True)
class FitDirectionsConfig:
    """Configuration of a fit of directions.

    Args:
        data: A triplet file or its folder. Only state, deterministic step and truth of each sample are used, so K = 3 suffices.
        kind: ``"local"``, slopes, Laplacians and lengths of state and step, or ``"heads"``, fields of a network.
        out: The file to write, ``*.safetensors``.
        rank: Rank of the Gaussian over coefficients. A choice among few candidates can exploit only a few numbers.
        valid: Share of the trajectories held out for validation.
        heads, width, blocks: Size of the network.
        steps, batch, lr: Training of the network.
        max_seconds: Limit on the processor time of the training.
        explore: Share of the loss that all heads receive; the nearest head receives the rest.
        seed: Random seed of the network and of the order of samples.
    """

    data: str
    kind: Literal["local", "heads"] = "local"
    out: str = "runs/directions/directions.safetensors"
    rank: int = 4
    valid: float = 0.1
    heads: int = 4
    width: int = 32
    blocks: int = 2
    steps: int = 2000
    batch: int = 16
    lr: float = 2e-3
    max_seconds: float | None = None
    explore: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("kind", self.kind, tuple(KINDS))
        for name, least in (("rank", 1), ("heads", 1), ("width", 1), ("blocks", 1), ("steps", 1), ("batch", 1), ("seed", 0)):
            whole(name, getattr(self, name), least)
        at_least("lr", self.lr, 0)
        for name in ("valid", "explore"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a share between 0 and 1")
        if Path(self.out).suffix != ".safetensors":
            raise ValueError(f"out is {self.out!r}; give the name of a .safetensors file")


@dataclass(frozen=True)
class DirectionsFit:
    """Result of a fit, with the squared error left on held-out trajectories as a share of the deterministic step's.

    Args:
        path: The file.
        mean: Error with the mean coefficients.
        spread: Error with the best coefficients of every state within the spread, which no choice can beat.
        span: Error with the best coefficients in the span of all fields.
        steps: Training steps; 0 for fields without a network.
    """

    path: Path
    mean: float
    spread: float
    span: float
    steps: int


def fit_directions(config: FitDirectionsConfig) -> DirectionsFit:
    """Fit directions and write them with their provenance.

    Errors are in units of ``delta_std``; in conserved channels their mean over the domain, which projection removes anyway, is subtracted.
    Coefficients of every state are fitted by least squares. Their mean is fitted to all states together; their spread follows the leading
    principal components in the metric of the fields, so that poorly determined coefficients carry no weight.

    Raises:
        DataError: The triplets are missing, damaged or of fewer than two trajectories.
        ArgumentError: ``kind`` is ``"heads"`` and the data are not 2-D.
        OutputError: The file cannot be written.
    """
    output_folder(Path(config.out).parent)
    file = TripletFile(config.data)
    train, valid = _parted(file, config.valid)
    directions, steps = _made(config, file.spec), 0
    if isinstance(directions, HeadFields):
        steps = _train(directions, file, train, config)
    directions.eval()
    _fit_coefficients(directions, _fitted(directions, file, train, config.batch))
    mean, spread, span = _left(directions, _fitted(directions, file, valid, config.batch))
    validation = {"mean": mean, "spread": spread, "span": span, "samples": len(valid)}
    cell = file.spec.cell_volume
    made_for = {"time_step": file.config.get("time_step"), "cell_volume": None if torch.is_tensor(cell) else cell}
    made = {"surrogate": file.surrogate, "fit": asdict(config), "steps": steps, "validation": validation, **made_for}
    save_directions(config.out, directions, made)
    provenance.write(Path(config.out).parent, config, f"{Path(config.out).stem}.provenance.json")
    return DirectionsFit(Path(config.out), mean, spread, span, steps)


def _made(config: FitDirectionsConfig, spec: StateSpec) -> Directions:
    channels, axes, conserved = spec.num_channels, spec.periodic_axes, spec.conserved_channels
    if torch.is_tensor(spec.cell_volume) and spec.cell_volume.ndim:
        conserved = ()  # their mean over cells is not their total
    if config.kind == "local":
        return LocalFields(channels, axes, conserved, config.rank)
    torch.manual_seed(config.seed)
    sizes = {"heads": config.heads, "width": config.width, "blocks": config.blocks}
    try:
        return HeadFields(channels, axes, conserved, min(config.rank, config.heads), **sizes)
    except ValueError as error:
        raise ArgumentError(str(error)) from error


def _parted(file: TripletFile, share: float) -> tuple[list[int], list[int]]:
    """Split the samples by trajectory into those to learn from and those held out."""
    numbers = sorted(set(file.trajectory.tolist()))
    if len(numbers) < 2:
        raise DataError(
            f"triplet file {file.path} holds {len(numbers)} trajectory; directions need two or more, one of them to check them on"
        )
    # spread over the file, whose trajectories may be sorted by preset
    kept = set(numbers[:: max(2, round(1 / share))])
    samples = range(len(file))
    return [i for i in samples if file.trajectory[i] not in kept], [i for i in samples if file.trajectory[i] in kept]


def _batch(file: TripletFile, picks: list[int], conserved: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalised state, step and error of samples, ``[m, C, *S]`` each."""
    frames, normal = file.frames(picks), file.normalizer
    state, still, truth = frames[:, 0], frames[:, _STILL], frames[:, _TRUTH]
    error = (truth - still) / normal.unit_of_delta(truth)
    return normal.encode(state), normal.encode_delta(still - state), _without_mean(error, conserved)


def _without_mean(fields: Tensor, conserved: tuple[int, ...], axis: int = 1) -> Tensor:
    out = fields.clone()
    for channel in conserved:
        part = out.select(axis, channel)
        part -= part.flatten(axis).mean(axis).reshape(*part.shape[:axis], *[1] * (part.ndim - axis))
    return out


def _train(directions: HeadFields, file: TripletFile, train: list[int], config: FitDirectionsConfig) -> int:
    """Train the heads on the mean absolute error of the nearest head plus a share of all, and average the weights towards the end."""
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(directions.parameters(), lr=config.lr, weight_decay=1e-4)
    averaged = {name: p.detach().clone() for name, p in directions.named_parameters()}
    began, step = time.process_time(), 0
    with bar(config.steps, "fit_directions") as progress:
        while step < config.steps:
            spent = 0.0 if config.max_seconds is None else (time.process_time() - began) / config.max_seconds
            done = max(step / config.steps, spent)
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
            picks = torch.randint(len(train), (config.batch,), generator=generator).tolist()
            state, change, error = _batch(file, [train[i] for i in picks], directions.conserved)
            fields = _without_mean(directions.fields(state, change), directions.conserved, 2)
            each = (fields - error.unsqueeze(1)).abs().flatten(2).mean(2)  # [batch, heads]
            loss = ((1 - config.explore) * each.amin(1) + config.explore * each.mean(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(directions.parameters(), 1.0)
            optimizer.step()
            step += 1
            keep = min(0.99, step / (step + 9))
            with torch.no_grad():
                for name, p in directions.named_parameters():
                    averaged[name].lerp_(p, 1 - keep)
            progress.advance(note=f"loss {loss.item():.4g}")
    directions.load_state_dict(averaged, strict=False)
    logger.info("heads: %d steps in %.0f s", step, time.process_time() - began)
    return step


@dataclass(frozen=True)
class _Fitted:
    """Gram matrices of the fields ``[M, J, J]``, their products with the error ``[M, J]`` and the squared error ``[M]`` of M samples."""

    gram: Tensor
    product: Tensor
    square: Tensor


@torch.no_grad()
def _fitted(directions: Directions, file: TripletFile, samples: list[int], batch: int) -> _Fitted:
    grams, products, squares = [], [], []
    for start in range(0, len(samples), batch):
        state, change, error = _batch(file, samples[start : start + batch], directions.conserved)
        fields = _without_mean(directions.fields(state, change), directions.conserved, 2).flatten(2)
        cells = fields.shape[2]
        grams.append((fields @ fields.mT).double() / cells)
        products.append((fields @ error.flatten(1).unsqueeze(2)).squeeze(2).double() / cells)
        squares.append(error.flatten(1).square().mean(1).double())
    return _Fitted(torch.cat(grams), torch.cat(products), torch.cat(squares))


def _fit_coefficients(directions: Directions, fit: _Fitted) -> None:
    """Fit mean and spread of the coefficients.

    States are weighted by the inverse size of their error, and the spread along a mode is that of the median state, because errors and
    coefficients have heavy tails: coefficients that suit the few largest errors overshoot everywhere else.
    """
    weight = fit.square.clamp_min(1e-12).rsqrt()
    weight = weight / weight.mean()
    gram, tiny = (fit.gram * weight[:, None, None]).mean(0), 1e-9
    ridge = 1e-3 * gram.diagonal().clamp_min(tiny).diag()
    mean = torch.linalg.solve(gram + ridge, (fit.product * weight[:, None]).mean(0))
    # of each state by itself, held back relative to its own fields
    own = 1e-3 * fit.gram.diagonal(dim1=1, dim2=2).diag_embed() + 1e-3 * ridge
    rest = torch.linalg.solve(fit.gram + own, fit.product.unsqueeze(2)).squeeze(2) - mean  # [M, J]
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(tiny * float(values.max()))
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    by_mode = rest @ root
    variances, modes = torch.linalg.eigh((by_mode * weight[:, None]).T @ by_mode / len(rest))
    fields = inverse @ modes[:, variances.argsort(descending=True)[: directions.rank]]  # [J, r]
    energy = torch.einsum("jr,mjk,kr->mr", fields, fit.gram, fields).clamp_min(tiny)
    best = ((fit.product - fit.gram @ mean) @ fields) / energy  # of each mode alone, state by state
    directions.mean.copy_(mean)
    directions.spread.copy_(fields * (_NORMAL_MEDIAN * best.abs().median(0).values))


def _left(directions: Directions, fit: _Fitted) -> tuple[float, float, float]:
    """Return the shares of the squared error left by the mean, by the best within the spread, and by the best in the span."""
    mean, spread, total = directions.mean.double(), directions.spread.double(), fit.square.sum()
    by_mean = fit.square - 2 * fit.product @ mean + torch.einsum("mij,i,j->m", fit.gram, mean, mean)
    rest = fit.product - fit.gram @ mean

    def best(gram: Tensor, product: Tensor) -> Tensor:
        ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(0).clamp_min(1e-12).diag()
        return torch.einsum("mj,mj->m", product, torch.linalg.solve(gram + ridge, product.unsqueeze(2)).squeeze(2))

    by_spread = by_mean - best(spread.T @ fit.gram @ spread, rest @ spread)
    by_span = fit.square - best(fit.gram, fit.product)
    return tuple(float((left.clamp_min(0)).sum() / total) for left in (by_mean, by_spread, by_span))  # type: ignore[return-value]
