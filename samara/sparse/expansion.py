"""Staged expansion: select more weights when the validation loss stalls.

The support only grows: a delta file then has one support, and its density is what it says. Entries
that join start from the base model's numbers with fresh moments; the others keep theirs
(:meth:`samara.sparse.update.Selected.grown`). The new ones are chosen by the same score, taken anew
from the weights as they are.

If the training loss falls on while the validation loss does not, more data is the remedy, not more
entries.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from samara.sparse.attach import Attachment
from samara.sparse.calibration import Calibration
from samara.sparse.config import ExpansionConfig, SelectionConfig
from samara.sparse.selection import Selection, select


def stalls(losses: Sequence[float], *, patience: int, min_gain: float) -> list[int]:
    """The evaluations at which the loss had stalled, by their place in ``losses``.

    A gain is a fall below the best loss so far by a share of ``min_gain``; ``patience`` evaluations
    in a row without one are a stall, after which counting begins again.
    """
    found: list[int] = []
    best, waited = float("inf"), 0
    for place, loss in enumerate(losses):
        if loss < best * (1.0 - min_gain):
            best, waited = loss, 0
            continue
        waited += 1
        if waited == patience:
            found.append(place)
            waited = 0
    return found


class Expansion:
    """Watches the validation loss and grows a support, a stage at a time.

    What it does follows from the losses alone, so a run that is resumed gives them back
    (``losses``) and goes on as if it had never stopped.

    Attributes:
        losses: Of all evaluations so far.
        selections: Of the stages that this process has grown to.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attachment: Attachment,
        config: ExpansionConfig,
        *,
        selection: SelectionConfig,
        calibration: Calibration,
        seed: int,
        losses: Sequence[float] = (),
    ) -> None:
        self._model, self._attachment, self._config = model, attachment, config
        self._selection, self._calibration, self._seed = selection, calibration, seed
        self.losses = list(losses)
        self.selections: list[Selection] = []

    @property
    def stage(self) -> int:
        """Stages grown to, by the losses seen; 0: the first support."""
        found = stalls(self.losses, patience=self._config.patience, min_gain=self._config.min_gain)
        return min(len(found), len(self._config.densities))

    def observe(self, loss: float) -> Selection | None:
        """Take note of an evaluation; grow if that was a stall and a stage is left."""
        before = self.stage
        self.losses.append(loss)
        return self._grow() if self.stage > before else None

    def _grow(self) -> Selection:
        density = self._config.densities[self.stage - 1]
        wanted = self._selection.model_copy(update={"density": density, "num_entries": None})
        with self._attachment.paused():
            selection = select(
                self._model,
                wanted,
                self._calibration,
                seed=self._seed,
                include=self._attachment.support,
            )
        self._attachment.grow(selection.support)
        self.selections.append(selection)
        return selection
