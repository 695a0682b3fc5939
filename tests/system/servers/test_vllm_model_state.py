"""What our model state gives vLLM's Model Runner V2 for each token of a batch made by hand; the runner wants a GPU."""

import drive
import pytest

# A piece in the middle of a prompt, a prompt's last piece, a generated token, an answer computed anew after a
# preemption, an answer that is continued, and one that is off: slot, prompt tokens, computed, scheduled, dials.
REQUESTS = [
    (5, 9, 2, 3, {}),
    (2, 4, 1, 3, {}),
    (7, 3, 5, 1, {"steering_strength": 0.5}),
    (0, 2, 0, 5, {}),
    (1, 6, 0, 6, {"steering_start": 4}),
    (3, 3, 1, 3, {"steering_strength": 0.0}),
]
FIELDS = ("slot", "prompt", "computed", "scheduled", "dials")


def told(start):
    """Prompt and amount of every token, from the requests' own words, and the columns of last prompt tokens."""
    prompt, scale, columns = [], [], {}
    for slot, length, computed, scheduled, dials in REQUESTS:
        end = dials.get("steering_start", length)
        for position in range(computed, computed + scheduled):
            if position == length - 1:
                columns[str(slot)] = len(prompt)
            prompt.append(float(position < end))
            first = end - 1 if start == "last_prompt_token" else end
            scale.append(dials.get("steering_strength", 2.0) if position >= first else 0.0)
    return {"prompt": [*prompt, 0.0, 0.0], "scale": [*scale, 0.0, 0.0], "columns": columns}


@pytest.mark.parametrize("start", ["last_prompt_token", "first_generated_token"])
def test_each_token_of_a_mixed_batch_is_told_apart_by_its_position(start, tmp_path, pytestconfig):
    drive.require_built("vllm-model-state", required=pytestconfig.option.require_runtimes)
    requests = [dict(zip(FIELDS, one, strict=True)) for one in REQUESTS]
    job = {"requests": requests, "start": start, "padding": 2}
    found = drive.run_driver("vllm-model-state", {"job": job}, tmp_path)["job"]
    assert found == told(start)
