"""What an engine that does not open says, in one line. Needs no vLLM."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel, model_validator

from adaras_export.errors import ArtifactError
from adaras_export.modeling.vllm_engine import open_engine


class Config(BaseModel):
    """A configuration, checked as vLLM's are."""

    max_num_seqs: int = 1
    dtype: str = ""

    @model_validator(mode="after")
    def check(self):
        if self.dtype:
            raise ValueError("no such dtype: " + self.dtype + "\nand a second line")
        return self


def refused(engine, settings):
    with pytest.raises(ArtifactError) as caught:
        open_engine(SimpleNamespace(LLM=engine), Path("folder"), "qwen@main", settings)
    return str(caught.value)


def config(model, disable_log_stats, seed, **settings):
    return Config(**settings)


def test_a_configuration_that_is_refused_gives_the_first_line_of_each_problem():
    tail = "; expected a model that it serves"
    assert refused(config, {"dtype": "int3"}) == f"qwen@main: vLLM cannot load it (no such dtype: int3){tail}"
    assert "(max_num_seqs: Input should be a valid integer, unable" in refused(config, {"max_num_seqs": "many"})


def test_an_engine_that_fails_gives_the_first_line_of_its_message():
    def engine(**settings):
        raise RuntimeError(f"no memory for {settings['model']}\nand a second line")

    assert "vLLM cannot load it (no memory for folder)" in refused(engine, {})
