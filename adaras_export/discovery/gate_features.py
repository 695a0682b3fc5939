"""Gate features: the mean of h over a prompt's tokens, and some neurons of h at every token.

Knows nothing of labels. N prompts, T tokens, L layers, M MLP neurons, F features. What is read goes into files, so that
memory does not grow with prompts, and a run that was killed reads what it lacks.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from adaras_export.core.base_model import BaseModel
from adaras_export.errors import TraceError
from adaras_export.files.atomic import sha256
from adaras_export.files.memory_mapped import KeptRows, keep_rows
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.activations import Reading, batches_of, token_means
from adaras_export.modeling.gate import features_of


@dataclass(frozen=True)
class PromptReader:
    """Encoded prompts, the model that reads them, and the file that keeps what was read."""

    model: PreTrainedModel
    base: BaseModel
    rows: Sequence[Sequence[int]]
    reading: Reading
    partial: Path

    def means(self, layers: int) -> KeptRows:
        """The mean of h over each prompt's tokens in the lowest layers, N rows in the order of `BaseModel.places`.

        Raises:
            TraceError: an activation is not finite, or the file cannot be used.
        """
        places = self.base.places(0, layers)

        def read_batch(indices: Sequence[int]) -> list[Array]:
            rows = [self.rows[row] for row in indices]
            means_BLM = token_means(self.model, rows, range(layers), None, self.reading.chunk_tokens).numpy()
            if bad := sorted({int(layer) for layer in np.argwhere(~np.isfinite(means_BLM))[:, 1]}):
                raise TraceError(
                    f"prompts: activations of layers {bad[:5]} are NaN or infinite; load the model in float32"
                )
            return [means_LM[places] for means_LM in means_BLM]

        widths = [len(places[0])] * len(self.rows)
        key = self._key({"what": "means", "layers": layers})
        groups = list(batches_of(self.rows, self.reading))
        return keep_rows(means_file(self.partial), key, widths, groups, read_batch, self.reading.progress)

    def tokens(self, layer: Array, index: Array) -> KeptRows:
        """The features, sorted by layer, at every token of each prompt: N rows of T * F numbers.

        Raises:
            TraceError: the file cannot be used.
        """

        def read_batch(indices: Sequence[int]) -> list[Array]:
            rows = [self.rows[row] for row in indices]
            return [features_TF.ravel() for features_TF in features_of(self.model, rows, layer, index, self.reading)]

        widths = [len(row) * len(layer) for row in self.rows]
        key = self._key({"what": "tokens", "features": _digest([layer.tolist(), index.tolist()])})
        groups = list(batches_of(self.rows, self.reading))
        return keep_rows(tokens_file(self.partial), key, widths, groups, read_batch, self.reading.progress)

    def _key(self, own: dict[str, Any]) -> dict[str, Any]:
        return {
            "version": 1,
            "model": self.base.fingerprint or self.base.id,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "prompts": _digest([list(row) for row in self.rows]),
            "token_budget": self.reading.token_budget,
            "chunk_tokens": self.reading.chunk_tokens,
            **own,
        }


def means_file(partial: Path) -> Path:
    """Where the means are kept."""
    return partial


def tokens_file(partial: Path) -> Path:
    """Where the features at every token are kept."""
    return partial.with_name(f"{partial.name}-tokens")


def _digest(value: Any) -> str:  # noqa: ANN401 - a JSON value
    return sha256(json.dumps(value).encode())
