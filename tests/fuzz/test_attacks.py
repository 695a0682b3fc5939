"""Concrete attacks on every reader, each refused in a line that names the file, what is wrong and what was expected."""

import pytest
from fuzz import attacks_on_tensors, attacks_on_text
from fuzz.readers import READERS, prepared, verdict

TABLE = {**attacks_on_tensors.TABLE, **attacks_on_text.TABLE}
ATTACKS = [(name, attack) for name, attacks in TABLE.items() for attack in attacks]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attack"), ATTACKS, ids=[f"{name}: {attack}" for name, attack in ATTACKS])
def test_an_attack_is_refused_in_a_line_that_says_what_is_wrong(name, attack, tmp_path):
    content, said = TABLE[name][attack]
    error = verdict(READERS[name], prepared(READERS[name], tmp_path), content)
    assert error is not None
    with pytest.raises(type(error), match=said):
        raise error
