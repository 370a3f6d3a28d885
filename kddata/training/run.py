"""Runs: the folder of one training run, and what may lie in it.

    job.json              what is trained, written first; a run of this name with another job is refused
    checkpoints/N.pt      all that training needs to go on after N steps, until the run has finished; see `checkpoints`
    progress.json         how far it is, while it trains on Ray
    lock-N.json           whose it is, while it trains; see `driving`
    model.safetensors     the student's weights, alone
    peer-N.safetensors    the weights of the other students of a cohort
    model.pt2             the student as a torch.export program, where that was asked for and could be; see `program`
    metrics.json          the loss of every step, and a record of every epoch
    nonfinite-RANK.json   of a run that stopped at a loss or a weight that is no number: the step, images and views
    card.json             who learned what from whom, and how well; written last, so a run that has it has finished

Files are published whole by `store.storage`, so that a torn one is never loaded. Trade-off: a run is one folder on
one storage; a result is not copied elsewhere by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import save
from torch import Tensor

from kddata.cards import canonical_json, differences
from kddata.errors import ConfigError
from kddata.store.storage import open_storage
from kddata.training.checkpoints import FOLDER, Checkpoints
from kddata.training.steps import Step

PROGRESS_FILE = "progress.json"
_LEFT = re.compile(rf"^(first/)?(\.tmp-[0-9a-f]+|{FOLDER}/[^/]+|progress\.json|lock-\d{{6}}\.json)$")


class Run:
    """The folder of a run, at a path or URL. Nothing is read or made before the first call."""

    def __init__(self, url: str) -> None:
        self._files = open_storage(url)
        self.checkpoints = Checkpoints(self._files)

    def check(self, job: Mapping[str, Any]) -> None:
        """Raises ConfigError naming the fields in which a run of this name was begun with another job."""
        try:
            begun = json.loads(self._files.read("job.json"))
        except FileNotFoundError:
            return
        found = differences(begun, json.loads(canonical_json(job)))
        if found:
            raise ConfigError(
                "a run keeps the job that it was begun with",
                actual="; ".join(f"{key}: begun with {old!r}, now {new!r}" for key, old, new in found),
                where=self._files.url,
                fix="name another run, or go back to these values (nothing was changed)",
            )

    def begin(self, job: Mapping[str, Any]) -> None:
        """Claims the folder for a job, or joins an equal one. Raises like `check`."""
        self._files.create("job.json", canonical_json(job).encode())
        self.check(job)

    def note_not_finite(self, rank: int, step: Step, what: str) -> str:
        """Publishes which rows of a step a rank had when something was not finite; the name of the file."""
        name = f"nonfinite-{rank}.json"
        found = {"what": what, "step": step.number, "lr": step.lr, "rank": rank}
        rows = [{"image_id": i, "view": v} for i, v in zip(step.image_ids, step.view_indices, strict=True)]
        with self._files.replacing(name) as file:
            file.write(json.dumps({**found, "rows": rows}, indent=1).encode())
        return name

    def finish(
        self,
        weights: Mapping[str, Tensor],
        *,
        card: Mapping[str, Any],
        metrics: Mapping[str, Any],
        program: bytes | None = None,
        peers: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        """Publishes the result, the card last, and removes the checkpoints."""
        for name, data in (
            ("model.safetensors", _safetensors(weights)),
            *((f"peer-{i}.safetensors", _safetensors(peer)) for i, peer in enumerate(peers, 1)),
            *((("model.pt2", program),) if program is not None else ()),
            ("metrics.json", json.dumps(metrics).encode()),
            ("card.json", json.dumps(card, indent=2).encode()),
        ):
            with self._files.replacing(name) as file:
                file.write(data)
        self.checkpoints.remove()

    def leftovers(self) -> list[str]:
        """Files that no finished run has: a process that was killed left them, here or in the run's first stage."""
        return [name for name in self._files.sizes() if _LEFT.match(name)]

    def tidy(self) -> None:
        """Removes them, but for locks, which are their driver's."""
        for name in self.leftovers():
            if "lock-" not in name:
                self._files.remove(name)
        for folder in (FOLDER, f"first/{FOLDER}"):
            self._files.remove_folder(folder)

    def result(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(card, metrics) of a finished run, else None."""
        try:
            card = json.loads(self._files.read("card.json"))
        except FileNotFoundError:
            return None
        return card, json.loads(self._files.read("metrics.json"))


def _safetensors(weights: Mapping[str, Tensor]) -> bytes:
    return save({name: value.detach().cpu().contiguous().clone() for name, value in weights.items()})
