"""Driver of the llama-server that is in the wheel xllamacpp, a server a job: what it would say next.

A job is {"model", "loras": [[file, scale], ...], "settings": fields of llama.cpp's common_params, "clients",
"requests": [[token ids, fields of the request], ...], "vocabulary"}. So many clients ask at once. Log-probabilities of
all tokens behind each prompt are printed as JSON on the last line, in the order of the requests.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import xllamacpp
from run_llama_server import ask


def serve(job):
    """The answers of one server."""
    server = xllamacpp.Server(settings_of(job))
    url = f"{server.listening_address}/completion"

    def answer(request):
        prompt, more = request
        return ask(url, prompt, job["vocabulary"], **more)

    with ThreadPoolExecutor(job["clients"]) as clients:
        return list(clients.map(answer, job["requests"]))


def settings_of(job):
    """Exact in float32: by default the cache has 16 bits. One processor."""
    settings = xllamacpp.CommonParams()
    settings.model.path = job["model"]
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in job["loras"]]
    settings.n_ctx, settings.warmup, settings.port, settings.fit_params = 512, False, 0, False
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    for name, value in job["settings"].items():
        setattr(settings, name, value)
    return settings


if __name__ == "__main__":
    out = os.dup(1)
    os.dup2(2, 1)  # its log goes to standard output
    results = [serve(job) for job in json.load(sys.stdin)]
    with os.fdopen(out, "w") as file:
        file.write(f"{json.dumps(results)}\n")
