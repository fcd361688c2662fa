"""Compares every tensor of the file with the one that training left, each within its type's loss.

Goes in: the file, the plan, the reference weights. Comes out: one `Check`. Never does: trust logits to show a
dropped bias or a weaker adapter: those hide below the noise of a quantisation.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from advisor.export.architecture import ModelPlan, PlannedTensor, factor_tensors, row_order
from advisor.types import Check
from advisor.verify.bounds import TensorBounds
from advisor.verify.contents import Contents
from advisor.verify.reference import Reference


def check_tensors(plan: ModelPlan, file: Contents, reference: Reference, bounds: TensorBounds) -> Check:
    """Return whether the set is complete, finite, and each tensor close to what was trained."""
    planned = {tensor.name: tensor for tensor in plan.tensors}
    factors = factor_tensors(plan)
    expected = set(planned) | set(factors)
    wrong = [f"{name} is missing" for name in sorted(expected - set(file.tensors))]
    wrong += [f"{name} does not belong there" for name in sorted(set(file.tensors) - expected)]
    worst, worst_name, shares = 0.0, "", list[Share]()
    for name in sorted(expected & set(file.tensors)):
        tensor = planned.get(name)
        kind = file.tensors[name].tensor_type.name
        if tensor is not None and file.shape(name) != tensor.shape:
            wrong.append(f"{name} has the shape {file.shape(name)} instead of {tensor.shape}")
            continue
        if tensor is None:
            loss, share = _vector_loss(file, name, factors[name]), None
        else:
            loss, share = _compare(file, tensor, reference)
        bound = bounds.types.get(kind)
        if bound is None or not loss <= bound:
            limit = "this type is not known" if bound is None else f"{kind} may lose {bound:.2g}"
            wrong.append(f"{name} differs by {loss:.3g} of its size; {limit}")
        elif loss / bound >= worst:
            worst, worst_name = loss / bound, name
        if share is not None:
            shares.append(share)
    told = _judged(shares, bounds)
    wrong += [f"{share.name}: {share.value:.2f} times what the adapter adds" for share in told
              if not bounds.adapter_share_low <= share.value <= bounds.adapter_share_high]  # fmt: skip
    return _verdict(wrong, len(expected), worst, worst_name, told, bounds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """How many times the adapter's change a tensor holds, and how precisely that can be told."""

    name: str
    value: float
    noise: float
    """Standard deviation that the loss of the type gives to `value`."""


def _judged(shares: list[Share], bounds: TensorBounds) -> list[Share]:
    """Return the shares that can be told precisely: single tensors', and that of all together."""
    precise = [share for share in shares if share.noise <= bounds.adapter_share_noise]
    exact = [share for share in shares if share.noise == 0]
    if len(shares) > 1 and not exact:
        weights = [1 / share.noise**2 for share in shares]
        value = sum(w * share.value for w, share in zip(weights, shares, strict=True)) / sum(weights)
        together = Share(name="all adapted tensors", value=value, noise=1 / math.sqrt(sum(weights)))
        if together.noise <= bounds.adapter_share_noise:
            return [together, *precise]
    return precise


def _verdict(
    wrong: list[str], count: int, worst: float, worst_name: str, told: list[Share], bounds: TensorBounds
) -> Check:
    shares = [share.value for share in told]
    evidence = f"{count} tensors; the worst, {worst_name}, lost {100 * worst:.0f} % of what its type may"
    if shares:
        evidence += f"; the adapter is there {min(shares):.3f} to {max(shares):.3f} times"
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return Check(
        name="tensors",
        passed=not wrong,
        evidence=("; ".join(wrong[:3]) + more) if wrong else evidence,
        measured={
            "tensors": count,
            "wrong": len(wrong),
            "worst_share_of_bound": round(worst, 4),
            "adapter_share_low": min(shares) if shares else None,
            "adapter_share_high": max(shares) if shares else None,
        },
        bound={
            "wrong": 0,
            "worst_share_of_bound": 1.0,
            "adapter_share_low": bounds.adapter_share_low if shares else None,
            "adapter_share_high": bounds.adapter_share_high if shares else None,
        },
    )


def _compare(file: Contents, tensor: PlannedTensor, reference: Reference) -> tuple[float, Share | None]:
    """Return the relative loss, and how much of the adapter's change is there.

    The share is one plus the projection of the difference on the change: noise of the type averages out over
    the entries, so that even in four bits a mis-scaled adapter shows.
    """
    want = reference.weight(tensor.origin)
    want = (want.T if tensor.transposed else want) + np.float32(tensor.offset)
    delta = reference.deltas.get(tensor.origin)
    change = None if delta is None else delta().numpy()
    if change is not None and tensor.transposed:
        change = change.T
    order = row_order(tensor.shape[0], tensor.heads) if tensor.heads else np.arange(tensor.shape[0])
    lost = size = along = length = 0.0
    for rows, have in file.parts(tensor.name):
        wanted: npt.NDArray[np.float32] = want[order[rows]]
        difference = have.reshape(wanted.shape).astype(np.float64) - wanted
        lost += float((difference**2).sum())
        size += float((wanted.astype(np.float64) ** 2).sum())
        if change is not None:
            part = change[order[rows]].astype(np.float64)
            along += float((difference * part).sum())
            length += float((part**2).sum())
    loss = math.sqrt(lost / size) if size else (0.0 if lost == 0 else math.inf)
    if not length:
        return loss, None
    noise = math.sqrt(lost / math.prod(tensor.shape) / length)
    return loss, Share(name=tensor.name, value=1 + along / length, noise=noise)


def _vector_loss(file: Contents, name: str, want: npt.NDArray[np.float32]) -> float:
    have = np.concatenate([part for _, part in file.parts(name)])
    if have.shape != want.shape:
        return math.inf
    return float(np.linalg.norm(have - want) / np.linalg.norm(want))


def check_sizes(file: Contents, reference: Reference, bounds: TensorBounds) -> Check:
    """Compare the tensors of an architecture whose layout is not known here, by their root mean squares.

    Turned, reordered and joined tensors keep the sum of their squares: a zeroed, dropped or scaled one shows.
    """
    ours = {name: _squares(file, name) for name in file.tensors}
    wrong = [
        f"{name} holds infinite or undefined values"
        for name, value in ours.items()
        if not math.isfinite(value)
    ]
    loss = max(
        (bounds.types.get(tensor.tensor_type.name, 0.0) for tensor in file.tensors.values()), default=0.0
    )
    seen: dict[int, float] = {}
    for tensor in reference.weights.values():
        seen.setdefault(tensor.data_ptr(), float(tensor.double().square().sum()))
    empty = [name for name, value in ours.items() if value == 0]
    if len(empty) > sum(value == 0 for value in seen.values()):
        wrong.append(f"more tensors than were trained so hold nothing but zeros: {', '.join(empty[:3])}")
    matched, share = _matched(ours, seen, loss)
    total = abs(sum(ours.values()) / sum(seen.values()) - 1)
    if not total <= 2 * loss:
        wrong.append(f"the weights together are {100 * total:.2g} % off in size")
    told = (
        f"{len(ours)} tensors; {matched} have the size of a trained one, together {100 * share:.1f} % of all"
    )
    return Check(
        name="tensors", passed=not wrong,
        evidence="; ".join([*wrong[:3], f"{told} (by size alone: this architecture is not known here)"]),
        measured={"tensors": len(ours), "wrong": len(wrong), "matched_share": round(share, 4)},
        bound={"wrong": 0, "matched_share": None},
    )  # fmt: skip


def _squares(file: Contents, name: str) -> float:
    return sum(float((part.astype(np.float64) ** 2).sum()) for _, part in file.parts(name))


def _matched(ours: dict[str, float], seen: dict[int, float], loss: float) -> tuple[int, float]:
    """Return how many tensors have the size of a trained one, and their share of the squares."""
    trained = np.sort(np.array(list(seen.values())))
    found = 0
    squares = 0.0
    for value in ours.values():
        place = int(np.searchsorted(trained, value))
        near = trained[max(0, place - 1) : place + 1]
        if near.size and np.abs(near - value).min() <= 2 * loss * value:
            found += 1
            squares += value
    return found, squares / max(sum(ours.values()), 1e-30)
