"""Contrastive representation distillation: two embeddings of one image among many of others.

The other images' embeddings come from a bank that holds the latest of each image. Trade-off: a bank of two times
`num_rows` x `width` floats in memory, one on each rank, for negatives that need no other image in the batch.

Shapes: B images, K negatives, D width of the contrast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kddata import rng
from kddata.errors import ConfigError

_EPS = 1e-7


def contrastive_loss(scores_BK1: Tensor, num_rows: int) -> Tensor:
    """- mean over images of log h_0 + sum over negatives of log(1 - h_k), h = x / (x + K / N + 1e-7).

    `scores_BK1` are x, the positive first. Source: Tian et al., arXiv 1910.10699, equations 17 to 19.
    """
    noise = (scores_BK1.shape[1] - 1) / num_rows
    positive, negative = scores_BK1[:, 0], scores_BK1[:, 1:]
    sure = (positive / (positive + noise + _EPS)).log()
    unsure = (noise / (negative + noise + _EPS)).log()
    return -(sure.sum() + unsure.sum()) / len(scores_BK1)


class ContrastiveBank(nn.Module):
    """Two linear embeddings, a bank for each, and the loss between them; both embeddings learn.

    `forward(student, teacher, rows_B, others_BK)` is the loss, and puts the new embeddings into the bank, mixed with
    the old ones by `momentum`. Buffers, part of the state: the banks, the scale of the scores (set by the first batch)
    and which image has which row.
    """

    normaliser_2: Tensor
    student_bank_ND: Tensor
    teacher_bank_ND: Tensor
    key_N: Tensor

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        num_rows: int,
        width: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        self.embed_student, self.embed_teacher = nn.Linear(student_width, width), nn.Linear(teacher_width, width)
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        bound = (3 / width) ** 0.5
        for name in ("student_bank_ND", "teacher_bank_ND"):
            self.register_buffer(name, torch.empty(num_rows, width).uniform_(-bound, bound))
        self.register_buffer("normaliser_2", torch.full((2,), -1.0))
        self.register_buffer("key_N", torch.zeros(num_rows, dtype=torch.int64))
        self._row_of: dict[int, int] = {}

    def rows_of(self, image_ids: list[str]) -> Tensor:
        """Bank rows [B] of images, given out as they are first seen. Raises ConfigError where the bank is full."""
        if not self._row_of:  # new, or its state was loaded
            self._row_of = {key: row for row, key in enumerate(self.key_N.tolist()) if key}
        rows = []
        for image_id in image_ids:
            key = int.from_bytes(rng.key_bytes(0, "bank", image_id)[:8], "little", signed=True)
            row = self._row_of.setdefault(key, len(self._row_of))
            if row >= len(self.key_N):
                raise ConfigError(
                    "CRD's bank has a row for each image",
                    actual=f"{len(self.key_N)} rows",
                    where=f"image {image_id}",
                    fix="set method.num_images to the number of images",
                )
            self.key_N[row] = key
            rows.append(row)
        return torch.tensor(rows, device=self.key_N.device)

    def others(self, rows_B: Tensor) -> Tensor:
        """Random bank rows [B, negatives], from torch's global random numbers, which training seeds by step."""
        return torch.randint(len(self.key_N), (len(rows_B), self.negatives), device=rows_B.device)

    def forward(self, student: Tensor, teacher: Tensor, rows_B: Tensor, others_BK: Tensor) -> Tensor:
        s, t = (F.normalize(x, dim=1) for x in (self.embed_student(student), self.embed_teacher(teacher)))
        picked = torch.cat([rows_B[:, None], others_BK], dim=1)
        scores = [
            ((bank[picked] @ x[:, :, None])[:, :, 0] / self.temperature).exp()
            for bank, x in ((self.teacher_bank_ND, s), (self.student_bank_ND, t))
        ]
        num_rows = len(self.key_N)
        if bool((self.normaliser_2 < 0).any()):
            self.normaliser_2.copy_(torch.stack([x.detach().mean() for x in scores]) * num_rows)
        if self.training:
            for bank, x in ((self.student_bank_ND, s), (self.teacher_bank_ND, t)):
                new = self.momentum * bank[rows_B] + (1 - self.momentum) * x.detach()
                bank.index_copy_(0, rows_B, F.normalize(new, dim=1))
        of_s, of_t = (contrastive_loss(x / z, num_rows) for x, z in zip(scores, self.normaliser_2, strict=True))
        return of_s + of_t
