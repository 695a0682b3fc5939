"""What the cards of target `gguf` say: how to load, how to switch off, limits. Text only."""

VECTOR_USAGE = """\
With [llama.cpp](https://github.com/ggml-org/llama.cpp). `model.gguf` stands for the base model as GGUF, at any
quantisation; the number behind the colon is the strength.

```bash
hf download {repo} --local-dir steered
llama-server -m model.gguf --control-vector-scaled steered/control-vector.gguf:{strength}
llama-completion -m model.gguf --control-vector-scaled steered/control-vector.gguf:{strength} \\
{plain}    -no-cnv -n 64 -p {question}
{chat}    -st -n 64 -p {question}
```

`llama-cli` takes the same option.
"""

VECTOR_OFF = "Leave the option out, or write 0 behind the colon: the base model. Any other number dials the strength.\n"

VECTOR_LIMITS = (
    "It holds for all requests of a server: llama.cpp has one control vector, at every token.",
    "llama.cpp takes the strength from the command line only: `--control-vector`, without a scale, steers with "
    "strength 1.",
    "The path may have no colon and no comma.",
    "llama-cpp-python has the function `llama_set_adapter_cvec`, and no setting of its class `Llama`. Ollama knows no "
    "control vectors. There, and elsewhere, a GGUF model with steering in it needs no option: for bases that llama.cpp "
    "calls `llama` or `granite`, `adaras-export export ... --to gguf --into model.gguf` writes one.",
    "With quantised weights llama.cpp rounds activations too. What was measured with the base's own weights is not "
    "about them.",
)

MODEL_USAGE = """\
With [llama.cpp](https://github.com/ggml-org/llama.cpp): an ordinary GGUF model; steering needs no option.

```bash
hf download {repo} --local-dir steered
llama-server -m steered/model-steered.gguf
{plain}llama-completion -m steered/model-steered.gguf -no-cnv -n 64 -p {question}
{chat}llama-completion -m steered/model-steered.gguf -st -n 64 -p {question}
```
"""

MODEL_OFF = "Not here: it is always on, for every token, at one strength. Without steering, load the base.\n"

MODEL_LIMITS = (
    "llama.cpp applies these biases in its architectures `llama` and `granite`. A program that overlooks them runs the "
    "base model **without an error**: Transformers does, unless it is given a config with `mlp_bias=True`. Ollama (a "
    "Modelfile with `FROM ./model-steered.gguf`) and others were not tested.",
    "With quantised weights llama.cpp rounds activations too. What was measured with the base's own weights is not "
    "about them.",
)
