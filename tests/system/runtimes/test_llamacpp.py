"""Control vectors and steered models in llama.cpp's library, logit by logit. Its programs: tests/system/servers."""

import drive
import llamacpp
import pytest
import tiny
import tiny_gguf
from elsewhere import as_output
from tiny import EOS, PROMPTS, require_answers


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return llamacpp.cases(tmp_path_factory)


@pytest.fixture(scope="module")
def found(cases, tmp_path_factory, pytestconfig):
    """What the library made of everything: by base and by what was asked of it, in one process."""
    drive.require_built("llamacpp", required=pytestconfig.option.require_runtimes)
    jobs = {(name, what): job for name in llamacpp.NAMES for what, job in wanted(cases[name]).items()}
    return drive.run_driver("llamacpp", jobs, tmp_path_factory.mktemp("llamacpp"))


def wanted(case):
    """The jobs of a base: what is right, and what must be told from it."""
    strength = case.rule.strength
    shifted = tiny_gguf.shifted(case.vector, case.folder / "shifted.gguf")
    jobs = {
        "base": job(case.gguf),
        "vector": job(case.gguf, case.vector, strength),
        "vector at 0": job(case.gguf, case.vector, 0.0),
        "vector dialled": job(case.gguf, case.vector, -0.5 * strength),
        "one layer off": job(case.gguf, shifted, strength),
        "negated": job(case.gguf, case.vector, -strength),
        "strength left out": job(case.gguf, case.vector, 1.0),
    }
    return jobs | ({"model": job(case.steered)} if case.name in llamacpp.CARRIERS else {})


def job(model, vector=None, scale=1.0):
    place = None if vector is None else str(vector)
    asked = {"model": str(model), "vector": place, "scale": scale}
    return {**asked, "rows": PROMPTS, "end": EOS, "steps": 6, "modes": ["single"]}


def require_told(result, expected, name):
    for one, answer in zip(result["single"], expected, strict=True):
        require_answers(as_output(one), [answer], llamacpp.SLACK[name])


@pytest.mark.parametrize("name", llamacpp.NAMES)
def test_a_control_vector_gives_what_the_oracle_gives(name, found, cases):
    case = cases[name]
    require_told(found[(name, "base")], case.told(case.rule.with_strength(0.0)), name)
    require_told(found[(name, "vector")], case.told(case.rule), name)
    require_told(found[(name, "vector dialled")], case.told(case.rule.with_strength(-0.5 * case.rule.strength)), name)


@pytest.mark.parametrize("name", llamacpp.NAMES)
def test_a_scale_of_0_is_the_base_model_bit_for_bit(name, found):
    assert found[(name, "vector at 0")] == found[(name, "base")]


@pytest.mark.parametrize("what", ["base", "one layer off", "negated", "strength left out"])
@pytest.mark.parametrize("name", llamacpp.NAMES)
def test_what_steers_otherwise_is_told_from_it(name, what, found, cases):
    with pytest.raises(AssertionError):
        require_told(found[(name, what)], cases[name].told(cases[name].rule), name)


@pytest.mark.parametrize("name", llamacpp.CARRIERS)
def test_a_steered_model_gives_what_the_oracle_gives_in_layer_0_too(name, found, cases):
    require_told(found[(name, "model")], cases[name].told(cases[name].low_rule), name)


def test_the_slack_is_far_below_the_effect_of_steering(cases):
    for name in llamacpp.SLACK:
        steered, base = (cases[name].told(rule) for rule in (cases[name].rule, cases[name].rule.with_strength(0.0)))
        for one, other in zip(steered, base, strict=True):
            effect = float((one["logits"][0] - other["logits"][0]).abs().max())
            assert effect > 10 * llamacpp.SLACK[name] * tiny.logit_limit(one["logits"])
