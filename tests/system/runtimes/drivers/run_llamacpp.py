"""Driver of llama.cpp's library, from the wheel xllamacpp: its C interface, called by ctypes.

A job has "model" (a file) instead of a folder, and may have "vector" (a file of directions) and "scale". Directions are
handed over as llama.cpp's own command line does it: one buffer, layer 1 first, times the scale.
"""

import ctypes
from functools import partial

import gguf
import numpy as np
import xllamacpp.xllamacpp as wheel
from greedy import each, serve

FLOAT32 = int(gguf.GGMLQuantizationType.F32)
FLOAT16 = int(gguf.GGMLQuantizationType.F16)


class Opaque(ctypes.Structure):
    """Settings of the library that are passed on as they come; larger than they are, so that they fit."""

    _fields_ = (("bytes", ctypes.c_uint64 * 64),)


class ContextSettings(ctypes.Structure):
    """The head of llama_context_params, as far as it is set here; `defaults` sees whether it still is so."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        ("unused", ctypes.c_uint32 * 3),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch")),
        ("types", ctypes.c_int32 * 4),
        ("flash_attn_type", ctypes.c_int32),
        ("rope", ctypes.c_float * 8),
        ("callback", ctypes.c_void_p * 2),
        *((name, ctypes.c_int32) for name in ("type_k", "type_v")),
        ("rest", ctypes.c_uint64 * 32),
    )


library = ctypes.CDLL(wheel.__file__)
Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
silent = Log(lambda _level, _text, _data: None)  # its log would end up on standard output


def function(name, result, *arguments):
    """A function of the library, with its types."""
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found


pointer, number, floats = ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_float)
tokens = ctypes.POINTER(ctypes.c_int32)
load = function("llama_model_load_from_file", pointer, ctypes.c_char_p, Opaque)
model_defaults = function("llama_model_default_params", Opaque)
context_defaults = function("llama_context_default_params", ContextSettings)
start = function("llama_init_from_model", pointer, pointer, ContextSettings)
set_vector = function("llama_set_adapter_cvec", number, pointer, floats, ctypes.c_size_t, number, number, number)
batch_of = function("llama_batch_get_one", Opaque, tokens, number)
decode = function("llama_decode", number, pointer, Opaque)
logits_of = function("llama_get_logits_ith", floats, pointer, number)
free_context = function("llama_free", None, pointer)
free_model = function("llama_model_free", None, pointer)
layer_count = function("llama_model_n_layer", number, pointer)
width = function("llama_model_n_embd", number, pointer)
vocabulary_of = function("llama_model_get_vocab", pointer, pointer)
token_count = function("llama_vocab_n_tokens", number, pointer)


def generate(job, rows):
    """Greedy tokens of one row."""
    model = load(job["model"].encode(), model_defaults())
    assert model, f"{job['model']}: llama.cpp does not load it"
    context = start(model, defaults())
    if job.get("vector") is not None:
        steer(context, model, job["vector"], job["scale"])
    size, ids, chosen, logits = token_count(vocabulary_of(model)), list(rows[0]), [], []
    while len(chosen) < job["steps"] and job["end"] not in chosen:
        row = (number * len(ids))(*ids)  # the batch only points to it
        assert decode(context, batch_of(row, len(ids))) == 0
        logits.append([np.ctypeslib.as_array(logits_of(context, -1), (size,)).tolist()])
        ids = [int(np.argmax(logits[-1][0]))]
        chosen += ids
    free_context(context)
    free_model(model)
    return {"sequences": [chosen], "logits": logits, "decisions": []}


def defaults():
    """The library's settings, but exact in float32: its cache has 16 bits otherwise."""
    settings = context_defaults()
    known = (settings.n_batch, settings.n_seq_max, settings.flash_attn_type, settings.type_k, settings.type_v)
    assert known == (2048, 1, -1, FLOAT16, FLOAT16), "llama_context_params has other fields than this driver knows"
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 256, 1, 1
    settings.type_k = settings.type_v = FLOAT32
    settings.flash_attn_type = 0
    return settings


def steer(context, model, path, scale):
    """Set a control vector for all layers."""
    buffer = np.zeros((layer_count(model) - 1, width(model)), np.float32)
    for tensor in gguf.GGUFReader(path).tensors:
        buffer[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data * np.float32(scale)
    data = buffer.ctypes.data_as(floats)
    assert set_vector(context, data, buffer.size, width(model), 1, layer_count(model)) == 0


if __name__ == "__main__":
    function("llama_log_set", None, Log, pointer)(silent, None)
    function("llama_backend_init", None)()
    serve({"single": partial(each, generate)})
