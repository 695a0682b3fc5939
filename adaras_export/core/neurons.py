"""The chosen neurons, and the amount by which each is steered.

K chosen neurons. Layers and neuron indices are 0-based everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from adaras_export.core import published_sets
from adaras_export.core.base_model import BaseModel
from adaras_export.core.value import (
    Value,
    check_choice,
    check_places,
    check_version,
    restore_base,
    same_length,
    set_questions,
    set_vectors,
)
from adaras_export.errors import RuleError
from adaras_export.files.safetensors_record import Array

Ranking = Literal["given", "paper", "absolute", "cohen_d", "t", "attribution"]


@dataclass(frozen=True, eq=False)
class NeuronSet(Value):
    """Chosen neurons, best first, and the delta of each.

    Attributes:
        layer: (K,) decoder layers.
        index: (K,) neurons, counted within their layer.
        delta: (K,) added to the neuron's activation at strength 1, in activation units.
        mean_correct: (K,) mean activation over correct traces; None where it is unknown.
        mean_incorrect: (K,) the same over incorrect traces.
        score: (K,) the score that the ranking sorted by.
        ranking: how the neurons were chosen; "given" for neurons from another source.
        base: the model that they belong to; None where it is unknown.
        questions: identities of the questions that they were found with, see `question_identity`.
    """

    layer: Array
    index: Array
    delta: Array
    mean_correct: Array | None = None
    mean_incorrect: Array | None = None
    score: Array | None = None
    ranking: Ranking = "given"
    base: BaseModel | None = None
    questions: tuple[str, ...] = ()

    kind: ClassVar[str] = "neurons"
    _optional: ClassVar[tuple[str, ...]] = ("mean_correct", "mean_incorrect", "score")

    def __post_init__(self) -> None:
        set_vectors(self, "neurons", {"layer": np.int64, "index": np.int64, "delta": np.float32})
        set_vectors(
            self,
            "neurons",
            {name: np.float32 for name in self._optional if getattr(self, name) is not None},
        )
        same_length(self, "neurons", ("layer", "index", "delta", *self._optional))
        check_choice("neurons", "ranking", self.ranking, get_args(Ranking))
        check_places("neurons", self.layer, self.index, self.base)
        set_questions(self, "neurons")

    def __len__(self) -> int:
        return len(self.layer)

    def top(self, count: int) -> "NeuronSet":
        """The first ``count`` neurons.

        Raises:
            RuleError: the set has fewer neurons.
        """
        if not 0 <= count <= len(self):
            raise RuleError(f"neurons: {count} requested; the set has {len(self)}")
        return self._take(np.arange(count))

    def in_order(self) -> "NeuronSet":
        """The same neurons sorted by (layer, index)."""
        return self._take(np.lexsort((self.index, self.layer)))

    def _take(self, rows: Array) -> "NeuronSet":
        names = ("layer", "index", "delta", *self._optional)
        present = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: values[rows] for name, values in present.items()})

    @classmethod
    def from_reference_csv(
        cls, path: str | Path, *, top: int | None = None, base: BaseModel | None = None
    ) -> "NeuronSet":
        """Neurons that the reference code published (`top_200.csv`), in the order of the file.

        Columns: overall_neuron_index (= layer * M + index), layer, neuron_index_in_layer, weight (= delta);
        others are ignored. The questions of some published sets are known (`published_sets.questions_of`).

        Raises:
            RuleError: a column is missing, a row is malformed or contradicts the others (path:line), or the file has
                fewer than ``top`` rows.
        """
        rows = published_sets.neuron_rows(Path(path))
        layer, index, delta = (np.array(column) for column in zip(*rows, strict=True))
        try:
            neurons = cls(layer, index, delta, base=base, questions=published_sets.questions_of(rows))
        except RuleError as error:
            raise RuleError(f"{path}: {error}") from error
        return neurons if top is None else neurons.top(top)

    @classmethod
    def from_csv(cls, path: str | Path, *, base: BaseModel | None = None) -> "NeuronSet":
        """Neurons of a CSV file, in its order: columns layer, index and delta, under a header or without one.

        Layer and index (within the layer) count from 0; delta is in activation units. A file with the header of the
        reference code is read by `from_reference_csv`.

        Raises:
            RuleError: a row is not of that form (path:line), or a neuron is given twice or outside the model.
        """
        if published_sets.is_of_reference(Path(path)):
            return cls.from_reference_csv(path, base=base)
        rows = published_sets.plain_rows(Path(path))
        layer, index, delta = (np.array(column) for column in zip(*rows, strict=True))
        try:
            return cls(layer, index, delta, base=base)
        except RuleError as error:
            raise RuleError(f"{path}: {error}") from error

    def _arrays(self) -> dict[str, Array]:
        optional = {name: getattr(self, name) for name in self._optional if getattr(self, name) is not None}
        return {"layer": self.layer, "index": self.index, "delta": self.delta, **optional}

    def _record(self) -> dict[str, Any]:
        base = None if self.base is None else self.base.as_record()
        return {
            "version": 1,
            "ranking": self.ranking,
            "base": base,
            "questions": list(self.questions),
        }

    @classmethod
    def _restore(cls, arrays: Mapping[str, Array], record: Mapping[str, Any], subject: str) -> "NeuronSet":
        check_version(record, subject)
        return cls(
            **arrays,
            ranking=record["ranking"],
            base=restore_base(record, subject),
            questions=record["questions"],
        )
