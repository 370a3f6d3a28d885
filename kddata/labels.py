"""Soft labels: what a teacher said about a batch of views, kept sparse. Pure values; nothing here reads or writes.

Trade-off: the k most probable classes and the exact mass of all others at every declared temperature are kept,
instead of all classes. With k = C nothing is lost. Or k classes are drawn at random, which keeps less of each view
and nothing but noise of the tail, and is unbiased over many views.

Shapes: B rows, C classes, K kept classes (K <= C), T declared temperatures. Logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kddata.errors import LabelError

MAX_DRAWS = 2048  # of sampled labels: so many counts are told apart by a float16 of log(count / k)

DenseTail = Literal["renorm", "uniform"]


@dataclass(frozen=True, kw_only=True)
class SoftLabels:
    """Top-k soft labels of B views, or sampled ones.

    Sampled labels hold w = count / k of k draws from the teacher's probabilities in place of these: E[w] = p. Classes
    that were not drawn fill the row up, at -inf; the tail is empty, and temperature 1 is the only one.

    Attributes:
        ids_BK: class ids, distinct in a row, by falling probability, ties by lower id. Any integer dtype.
        log_p_BK: their log-probabilities at temperature 1 over all C classes.
        log_tail_BT: for each declared temperature t, the log of the softmax mass at t outside `ids_BK`, over all C
            classes; -inf where K == C.
        temperatures: the declared temperatures, rising; 1.0 is always one of them.
        num_classes: C.
        sampled: whether the classes were drawn; see `from_draws`.
    """

    ids_BK: Tensor
    log_p_BK: Tensor
    log_tail_BT: Tensor
    temperatures: tuple[float, ...]
    num_classes: int
    sampled: bool = False

    def __len__(self) -> int:
        return self.ids_BK.shape[0]

    @property
    def k(self) -> int:
        """How many classes are kept in each row."""
        return self.ids_BK.shape[1]

    @classmethod
    def from_logits(cls, logits_BC: Tensor, *, k: int, temperatures: tuple[float, ...] = (1.0,)) -> SoftLabels:
        """The labels of a batch of logits, in float32 (float64 for float64 logits), on their device.

        `log_p = log_softmax(logits)[ids]` and `log_tail[t] = log(sum of softmax(logits / t) outside ids)`, summed
        directly: one minus the kept probabilities is noise when the tail is small.

        Raises LabelError for k outside 1..C, a temperature that is not positive, or logits that hold NaN or +inf.
        """
        logits = _checked(logits_BC, k)
        num_classes = logits.shape[1]
        temperatures = declare(temperatures)
        ids = top_k_ids(logits, k)
        log_p = torch.log_softmax(logits, dim=1).gather(1, ids)
        tails = []
        for t in temperatures:
            scaled = logits / t
            total = torch.logsumexp(scaled, dim=1)
            tails.append(torch.logsumexp(scaled.scatter_(1, ids, -math.inf), dim=1) - total)
        return cls(
            ids_BK=ids.to(torch.int32),
            log_p_BK=log_p,
            log_tail_BT=torch.stack(tails, dim=1),
            temperatures=temperatures,
            num_classes=num_classes,
        )

    @classmethod
    def from_draws(cls, logits_BC: Tensor, *, k: int, start_B: Tensor) -> SoftLabels:
        """Sampled labels: `log_p = log(count / k)` of k draws from each row's softmax, at temperature 1.

        Draw i of a row is the class in whose stretch of the row's cumulative probabilities `(start + i) / k` lies. With
        start even in [0, 1) each point is as likely anywhere, so that E[count / k] = p in every class; and as the
        points are evenly spaced, each count is k p rounded up or down: no counts of k draws with these means vary less.
        Sources: Anshumann et al., arXiv 2503.16870 (sampled labels, drawn independently there); Kitagawa, "Monte Carlo
        filter and smoother" (1996), for systematic resampling.

        Args:
            start_B: in [0, 1), float64, one a row.

        Raises like `from_logits`.
        """
        logits = _checked(logits_BC, k)
        if k > MAX_DRAWS:
            raise LabelError(f"at most {MAX_DRAWS} classes are drawn", actual=f"k = {k}")
        edges_BC = torch.softmax(logits.double(), dim=1).cumsum(1)
        total_B1 = edges_BC[:, -1:]
        steps_K = torch.arange(k, dtype=torch.float64, device=logits.device)
        points_BK = (start_B.to(steps_K)[:, None] + steps_K) / k * total_B1
        points_BK = torch.minimum(points_BK, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
        drawn_BK = torch.searchsorted(edges_BC, points_BK, right=True)  # never a class of probability 0
        count_BC = torch.zeros_like(logits).scatter_add_(1, drawn_BK, torch.ones_like(points_BK, dtype=logits.dtype))
        ids = top_k_ids(count_BC, k)
        return cls(
            ids_BK=ids.to(torch.int32),
            log_p_BK=log_share(count_BC.gather(1, ids), k).to(logits.dtype),
            log_tail_BT=logits.new_full((len(logits), 1), -math.inf),
            temperatures=(1.0,),
            num_classes=logits.shape[1],
            sampled=True,
        )

    def at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """(log_p_BK, log_tail_B) at a temperature: `log_p / t`, shifted so that it and the tail sum to 1.

        Any temperature when K == C (the tail is then -inf), else a declared one.

        Raises LabelError for another temperature, naming the declared ones.
        """
        if not (math.isfinite(temperature) and temperature > 0):
            raise LabelError("a temperature is a positive number", actual=temperature)
        if self.sampled and temperature != 1:
            raise LabelError(
                "sampled labels are used at temperature 1: importance weights cannot be tempered afterwards",
                actual=f"temperature {temperature:g}",
                fix="set the temperature to 1, or label again with labels.keep=top",
            )
        log_p = self.log_p_BK.to(torch.promote_types(self.log_p_BK.dtype, torch.float32))
        scaled = log_p / temperature
        if self.k == self.num_classes:
            return torch.log_softmax(scaled, dim=1), scaled.new_full((len(self),), -math.inf)
        if temperature not in self.temperatures:
            raise LabelError(
                f"the tail mass of truncated labels is known at {list(self.temperatures)} alone",
                actual=f"temperature {temperature:g}",
                fix="use one of these, or label again with labels.temperatures naming it (or with k = all classes)",
            )
        log_tail = self.log_tail_BT[:, self.temperatures.index(temperature)].to(log_p.dtype)
        log_kept = _log1mexp(log_tail)
        return scaled - torch.logsumexp(scaled, dim=1, keepdim=True) + log_kept[:, None], log_tail

    def dense(self, tail: DenseTail, *, temperature: float = 1.0) -> Tensor:
        """Probabilities [B, C] whose rows sum to 1: the slow clear form, for oracles and small work.

        renorm: kept probabilities divided by their sum, 0 elsewhere. uniform: the tail mass is spread evenly over
        the other classes. The bucket and support tails say nothing about single classes, so they have no dense form.
        """
        log_p, log_tail = self.at(temperature)
        if tail not in ("renorm", "uniform"):
            raise LabelError("a dense tail is renorm or uniform", actual=repr(tail))
        ids = self.ids_BK.long()
        if self.k == self.num_classes or tail == "renorm":
            return log_p.new_zeros(len(self), self.num_classes).scatter_(1, ids, torch.softmax(log_p, dim=1))
        spread = (log_tail.exp() / (self.num_classes - self.k))[:, None].expand(-1, self.num_classes)
        return spread.scatter(1, ids, log_p.exp())

    def validate(self) -> None:
        """Raises LabelError, naming the row, unless all that the class docstring states holds."""
        shape, tails = tuple(self.ids_BK.shape), tuple(self.log_tail_BT.shape)
        if len(shape) != 2 or tuple(self.log_p_BK.shape) != shape or tails != (shape[0], len(self.temperatures)):
            raise LabelError(
                "ids and log_p are [B, K] and log_tail is [B, T]",
                actual=f"{shape}, {tuple(self.log_p_BK.shape)} and {tails} with T = {len(self.temperatures)}",
            )
        if declare(self.temperatures) != self.temperatures:
            raise LabelError("temperatures rise and hold 1.0", actual=self.temperatures)
        if not 1 <= self.k <= self.num_classes:
            raise LabelError("k is between 1 and the number of classes", actual=f"{self.k} of {self.num_classes}")
        ids, log_p, log_tail = self.ids_BK.long(), self.log_p_BK, self.log_tail_BT
        slack = 1e-2 if log_p.dtype == torch.float16 else 1e-4  # rounding may lift a probability over 1 by this much
        sorted_ids = ids.sort(dim=1).values
        rules = {
            "class ids are between 0 and C - 1": ((ids < 0) | (ids >= self.num_classes)).any(1),
            "class ids are distinct in a row": (sorted_ids[:, 1:] == sorted_ids[:, :-1]).any(1),
            "log-probabilities fall in a row": (log_p[:, 1:] > log_p[:, :-1]).any(1),
            "log-probabilities are at most 0": (torch.isnan(log_p) | (log_p > slack)).any(1),
            "log tail masses are at most 0": (torch.isnan(log_tail) | (log_tail > slack)).any(1),
        }
        if self.k == self.num_classes:
            rules["the tail is empty when k = C"] = (log_tail != -math.inf).any(1)
        if self.sampled:
            count = log_p.double().exp() * self.k
            whole = (count - count.round()).abs() <= slack * count  # 0 draws are 0, whatever the slack
            rules["sampled labels are shares of k draws"] = ~whole.all(1) | (count.round().sum(1) != self.k)
            rules["sampled labels have no tail, and one temperature"] = (log_tail != -math.inf).any(1)
        for rule, broken in rules.items():
            if bool(broken.any()):
                raise LabelError(rule, actual=f"otherwise in rows {broken.nonzero()[:8, 0].tolist()}")

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SoftLabels:
        """The same labels on a device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SoftLabels:
        """The same labels in page-locked memory, for DataLoader(pin_memory=True)."""
        return self._map(lambda x: x.pin_memory())

    def rows(self, index: slice | Tensor) -> SoftLabels:
        """Some of the rows: a slice, or a tensor of row numbers."""
        return self._map(lambda x: x[index])

    @staticmethod
    def cat(parts: list[SoftLabels]) -> SoftLabels:
        """All rows of labels of one form (classes, k, temperatures), one after the other."""
        first = parts[0]
        forms = {(part.num_classes, part.k, part.temperatures, part.sampled) for part in parts}
        if len(forms) != 1:
            raise LabelError("labels that are joined share classes, k and temperatures, and are all sampled or none")
        return SoftLabels(
            ids_BK=torch.cat([p.ids_BK for p in parts]),
            log_p_BK=torch.cat([p.log_p_BK for p in parts]),
            log_tail_BT=torch.cat([p.log_tail_BT for p in parts]),
            temperatures=first.temperatures,
            num_classes=first.num_classes,
            sampled=first.sampled,
        )

    @staticmethod
    def mixture(parts: Sequence[SoftLabels], weights: Sequence[float]) -> SoftLabels:
        """Labels of the mixture `sum of w_i p_i` of several teachers at temperature 1, of weights that sum to 1.

        At another temperature this is the tempered mixture, not the mixture of tempered answers.
        Source: Stanton et al., arXiv 2106.05945, for the ensembles of its teachers.

        Raises LabelError unless all classes are kept (k = C), as the mixture's top classes need not be anyone's, and
        for sampled labels.
        """
        if any(part.sampled for part in parts):
            raise LabelError(
                "teachers are mixed where all keep all of the same classes",
                actual="sampled labels",
                fix="weigh the losses instead (combine: losses), which of sampled labels has the mixture's gradient",
            )
        classes = {(part.k, part.num_classes) for part in parts}
        if len(classes) != 1 or parts[0].k != parts[0].num_classes:
            raise LabelError(
                "teachers are mixed where all keep all of the same classes",
                actual=", ".join(f"k = {k} of {num_classes}" for k, num_classes in sorted(classes)),
                fix="label with labels.k = all classes, or weigh the losses instead (combine: losses)",
            )
        dense = [torch.empty_like(x.log_p_BK).scatter_(1, x.ids_BK.long(), x.log_p_BK) for x in parts]
        most = max(weights)
        log_total = math.log(most) + math.log(sum(w / most for w in weights))  # the sum itself may be past all floats
        log_w = torch.tensor([math.log(w) - log_total if w else -math.inf for w in weights], device=dense[0].device)
        log_p = torch.logsumexp(torch.stack(dense) + log_w[:, None, None].to(dense[0].dtype), dim=0)
        return SoftLabels.from_logits(log_p, k=parts[0].k, temperatures=parts[0].temperatures)

    def _map(self, fn) -> SoftLabels:  # type: ignore[no-untyped-def]
        return SoftLabels(
            ids_BK=fn(self.ids_BK),
            log_p_BK=fn(self.log_p_BK),
            log_tail_BT=fn(self.log_tail_BT),
            temperatures=self.temperatures,
            num_classes=self.num_classes,
            sampled=self.sampled,
        )


def declare(temperatures: tuple[float, ...]) -> tuple[float, ...]:
    """The declared temperatures as labels hold them: positive, distinct, rising, 1.0 among them."""
    for t in temperatures:
        if not (math.isfinite(t) and t > 0):
            raise LabelError("a temperature is a positive number", actual=t)
    return tuple(sorted({1.0, *(float(t) for t in temperatures)}))


def log_share(count_BK: Tensor, k: int) -> Tensor:
    """log(count / k) in float64: of k draws, what their counts say; -inf for 0."""
    return (count_BK.double() / k).log()


def top_k_ids(logits_BC: Tensor, k: int) -> Tensor:
    """int64 [B, k]: the ids of the k largest logits by falling value, ties by lower id, on every device.

    `torch.topk` leaves the order of ties open. Here each float32 logit and its id become one distinct int64 key:
    the float's bits, remapped so that integers sort as the floats do, above the bits of the id, inverted.
    """
    if logits_BC.dtype == torch.float64:  # no room for 64 bits and an id in one key
        return logits_BC.sort(dim=1, descending=True, stable=True).indices[:, :k]
    bits = (logits_BC.float() + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0
    rank = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    ids = torch.arange(logits_BC.shape[1], device=logits_BC.device)
    return ids.shape[0] - 1 - (rank * 2**31 + (ids.shape[0] - 1 - ids)).topk(k, dim=1).values.remainder(2**31)


def _checked(logits_BC: Tensor, k: int) -> Tensor:
    """Logits in float32 at least. Raises LabelError as `from_logits` says."""
    if logits_BC.ndim != 2:
        raise LabelError("logits are [B, C]", actual=tuple(logits_BC.shape))
    num_classes = logits_BC.shape[1]
    if not 1 <= k <= num_classes:
        raise LabelError(f"k is between 1 and the number of classes, {num_classes}", actual=f"k = {k}")
    logits = logits_BC.detach().to(torch.promote_types(logits_BC.dtype, torch.float32))
    bad = ~torch.isfinite(logits.amax(1))  # amax passes NaN on
    if bool(bad.any()):
        rows = bad.nonzero()[:8, 0].tolist()
        raise LabelError("logits are finite, or -inf in some classes", actual=f"otherwise in rows {rows}")
    return logits


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0 without cancellation (Maechler, "Accurately computing log(1 - exp(-|a|))", 2012)."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
