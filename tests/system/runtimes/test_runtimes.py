"""Every runtime, in an environment of its own, gives the oracle's tokens, logits, p(correct) and decisions."""

import drive
import pytest
import tiny
from drive import require_result

CAUSAL, LATER = ("causal", "last_prompt_token"), ("later", "first_generated_token")
NONE, GENERATED = (None, "last_prompt_token"), ("causal", "first_generated_token")
BOTH = {"modes": ["batch", "single"]}
WRONG = {"modes": ["batch"]}
# Without the one it computes in bfloat16 where the CPU can; without the other, weights of fewer bits make it round
# activations to 8 bits.
F32 = {"settings": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}}
FEWER_BITS = ("int8", "int4")
SHARED = {"modes": ["batch", "single", "batch-shared", "single-shared"]}

# Runtime -> export -> what its driver is given. An export is a family of tests/support/tiny.py, a gate, a start and a
# flavour; "negated" steers the other way and must give other results.
RUNS = {
    "onnxruntime": {
        **{(name, *CAUSAL, ""): BOTH for name in ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3")},
        **{("llama", *rule, ""): BOTH for rule in (NONE, GENERATED, LATER)},
        ("mistral-window", *CAUSAL, ""): BOTH,
        ("qwen3", *CAUSAL, "inline"): BOTH,
        **{("qwen3", *CAUSAL, precision): BOTH for precision in FEWER_BITS},
        ("llama", *CAUSAL, "negated"): WRONG,
    },
    # Asked for CUDA, it runs on the CPU where there is none. TF32 would round to 10 bits.
    "onnxruntime-gpu": {
        key: {**how, "providers": [["CUDAExecutionProvider", {"use_tf32": "0"}], "CPUExecutionProvider"]}
        for key, how in {
            ("llama", *CAUSAL, ""): BOTH,
            ("qwen3", *CAUSAL, ""): BOTH,
            ("llama", *NONE, ""): BOTH,
            ("llama", *CAUSAL, "negated"): WRONG,
        }.items()
    },
    "genai": {
        ("llama", *CAUSAL, ""): BOTH,
        ("llama", *NONE, ""): BOTH,
        ("llama", *GENERATED, ""): BOTH,
        ("qwen3", *CAUSAL, "genai"): SHARED,
        ("qwen3", *NONE, "genai"): SHARED,
        **{("qwen3", *CAUSAL, precision): BOTH for precision in FEWER_BITS},
        ("llama", *CAUSAL, "negated"): WRONG,
        ("qwen3", *CAUSAL, "genai negated"): {"modes": ["batch-shared"]},
    },
    "optimum": {
        ("llama", *CAUSAL, ""): BOTH,
        ("llama", *NONE, ""): BOTH,
        ("mistral", *CAUSAL, ""): BOTH,
        ("qwen3", *CAUSAL, ""): {**BOTH, "head_size": 16},
        **{("qwen3", *CAUSAL, precision): {**BOTH, "head_size": 16} for precision in FEWER_BITS},
        ("llama", *CAUSAL, "negated"): WRONG,
    },
    "transformers.js": {
        ("llama", *CAUSAL, ""): BOTH,
        ("llama", *NONE, ""): BOTH,
        ("qwen3", *CAUSAL, ""): BOTH,
        ("gemma3_text", *CAUSAL, ""): BOTH,
        **{("qwen3", *CAUSAL, precision): BOTH for precision in FEWER_BITS},
        ("llama", *CAUSAL, "negated"): WRONG,
    },
    "web": {
        ("llama", *CAUSAL, ""): BOTH,
        ("llama", *NONE, ""): BOTH,
        ("qwen3", *CAUSAL, ""): BOTH,
        ("qwen3", *CAUSAL, "genai"): {"modes": ["single"]},
        **{("qwen3", *CAUSAL, precision): BOTH for precision in FEWER_BITS},
        ("llama", *CAUSAL, "negated"): WRONG,
    },
    "openvino": {
        ("qwen3", *CAUSAL, "inline"): {**BOTH, **F32},
        **{("llama", *rule, "inline"): {**BOTH, **F32} for rule in (CAUSAL, NONE, LATER)},
        ("gemma3_text", *CAUSAL, "inline"): {**BOTH, **F32},
        **{("qwen3", *CAUSAL, f"{precision} inline"): {**BOTH, **F32} for precision in FEWER_BITS},
        ("qwen3", *CAUSAL, "inline negated"): {**WRONG, **F32},
    },
}
RIGHT = [(runtime, key, mode) for runtime, keys in RUNS.items() for key, how in keys.items() for mode in how["modes"]
         if "negated" not in key[-1]]  # fmt: skip
WRONGED = [(runtime, key, mode) for runtime, keys in RUNS.items() for key, how in keys.items() for mode in how["modes"]
           if "negated" in key[-1]]  # fmt: skip


def named(case):
    return "-".join(str(part) for part in (case if isinstance(case, tuple) else (case,)) if part != "")


@pytest.fixture(scope="module")
def found(driven):
    """Everything that a runtime was asked for, by runtime; in one process each."""
    return tiny.Lazy(lambda runtime: driven(runtime, RUNS[runtime]))


@pytest.mark.parametrize(("runtime", "key", "mode"), RIGHT, ids=named)
def test_a_runtime_gives_what_the_oracle_gives(runtime, key, mode, found, told):
    """With fewer bits, ONNX Runtime, which tests/exporters compare with PyTorch, stands for the oracle."""
    precision = next((word for word in key[-1].split() if word in FEWER_BITS), None)
    if precision is None:
        expected = told[key[:3]]
    else:
        expected = drive.as_answers(found["onnxruntime"][(*key[:3], precision)]["single"])
    require_result(found[runtime][key][mode], expected)


@pytest.mark.parametrize(("runtime", "key", "mode"), WRONGED, ids=named)
def test_an_export_that_steers_the_other_way_is_told_from_the_right_one(runtime, key, mode, found, told):
    result = found[runtime][key][mode]
    with pytest.raises(AssertionError):
        require_result(result, told[key[:3]])
