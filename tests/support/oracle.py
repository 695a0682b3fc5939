"""What a rule means, restated from the paper's equations with plain loops.

Imports nothing of the library that it judges, and takes plain numbers only. Every step is one full forward pass over
one unpadded row, without a KV cache, so nothing here can depend on how tokens are spread over calls.

A rule is {"neurons": [(layer, index, delta)], "strength": s, "start": name, "gate": None or a gate}; a gate is
{"features": [(layer, index)], "threshold": t} and its six weights as (nested) lists. Start "everywhere" steers the
whole prompt too, as formats do that know no start.
"""

import math

import torch


def respond(model, prompt, rule, steps, follow=None, pick=None, ends=()):  # noqa: PLR0913
    """Let a stock model answer one prompt under a rule.

    Returns {"ids": generated tokens, "logits": (steps, V), "probability": p(correct) or None, "steered": bool}.
    ``follow`` feeds given tokens in place of the chosen ones; ``pick`` chooses from logits in place of the argmax;
    generation stops behind a token of ``ends``.
    """
    probability = None if rule["gate"] is None else p_correct(model, prompt, rule["gate"])
    steered = probability is None or probability < rule["gate"]["threshold"]
    first = {"everywhere": 0, "last_prompt_token": len(prompt) - 1, "first_generated_token": len(prompt)}[rule["start"]]
    row, chosen, logits = list(prompt), [], []
    for step in range(steps):
        found = logits_of(model, row, rule, range(first, len(row)) if steered else ())[-1]
        logits.append(found)
        chosen.append(int(found.argmax()) if pick is None else pick(found))
        if chosen[-1] in ends:
            break
        row.append(chosen[-1] if follow is None else follow[step])
    return {"ids": chosen, "logits": torch.stack(logits), "probability": probability, "steered": steered}


def converse(model, turns, rule, steps, ends=()):
    """Answer one turn after another, each token keeping what it was when it was first read, as in a KV cache.

    The gate judges anew in each turn, by what has been prompt so far; the last token of an answer is first read with
    the next turn. Returns what `respond` returns, for each turn.
    """
    row, prompt, on, answers, unread = [], [], [], [], 0
    for turn in turns:
        prompt += range(len(row) - unread, len(row) + len(turn))
        row += turn
        probability = (
            None if rule["gate"] is None else _judge(activations_of(model, row, rule, on), prompt, rule["gate"])
        )
        steered = probability is None or probability < rule["gate"]["threshold"]
        first = {"last_prompt_token": len(row) - 1, "first_generated_token": len(row)}[rule["start"]]
        chosen, logits = [], []
        for _ in range(steps):
            where = [*on, *(range(first, len(row)) if steered else ())]
            logits.append(logits_of(model, row, rule, where)[-1])
            chosen.append(int(logits[-1].argmax()))
            row.append(chosen[-1])
            if chosen[-1] in ends:
                break
        on, unread = [*on, *(range(first, len(row) - 1) if steered else ())], 1
        answers.append({"ids": chosen, "logits": torch.stack(logits), "probability": probability, "steered": steered})
    return answers


def p_correct(model, prompt, gate):
    """What the gate makes of the unsteered prompt, in float64."""
    return _judge(activations_of(model, prompt), range(len(prompt)), gate)


def _judge(activations, tokens, gate):
    features = [[activations[layer][t][index] for layer, index in gate["features"]] for t in tokens]
    weights = []
    for x in features:
        score = math.tanh(sum(w * v for w, v in zip(gate["attention_weight"], x, strict=True)) + gate["attention_bias"])
        weights.append(math.exp(score))
    pooled = [
        sum(weight * x[f] for weight, x in zip(weights, features, strict=True)) / sum(weights)
        for f in range(len(gate["features"]))
    ]
    z = gate["output_bias"]
    for row, bias, out in zip(gate["hidden_weight"], gate["hidden_bias"], gate["output_weight"], strict=True):
        z += out * max(0.0, sum(w * v for w, v in zip(row, pooled, strict=True)) + bias)
    return 1 / (1 + math.exp(-z))


def activations_of(model, row, rule=None, where=()):
    """h of every layer and token as nested lists [layer][token][neuron]: what enters the down projections."""
    seen = {}

    def look(layer, h):
        h = _added(layer, h, rule, where)
        seen[layer] = h[0].tolist()
        return h

    _run(model, row, look)
    return [seen[layer] for layer in range(len(seen))]


def logits_of(model, row, rule, where):
    """Logits (T, V) of one row whose tokens at the positions ``where`` are steered, whatever a gate says."""
    return _run(model, row, lambda layer, h: _added(layer, h, rule, where))


def _added(layer, h, rule, where):
    h = h.clone()
    for t in where:
        for at, index, delta in rule["neurons"]:
            if at == layer:
                h[0, t, index] += rule["strength"] * delta
    return h


def _run(model, row, change):
    """One forward pass in which ``change(layer, h)`` gives what enters the down projection."""
    handles = []
    try:
        for layer, down in enumerate(down_projections(model)):
            assert not down._forward_pre_hooks, "the oracle wants a stock model: ask it before steering"

            def hook(module, args, layer=layer):
                return (change(layer, args[0]),)

            handles.append(down.register_forward_pre_hook(hook))
        with torch.no_grad():
            return model(torch.tensor([list(row)]), use_cache=False).logits[0].float()
    finally:
        for handle in handles:
            handle.remove()


def down_projections(model):
    """The last linear map of every MLP, as the architectures' papers and model code have it."""
    kind, body = model.config.model_type, getattr(model, "model", None)
    body = getattr(body, "language_model", body)  # of a model that reads images
    if kind == "gpt2":
        return [block.mlp.c_proj for block in model.transformer.h]
    if kind == "gpt_neox":
        return [block.mlp.dense_4h_to_h for block in model.gpt_neox.layers]
    if kind == "starcoder2":
        return [block.mlp.c_proj for block in body.layers]
    if kind == "phi":
        return [block.mlp.fc2 for block in body.layers]
    if kind in ("lfm2", "lfm3"):
        return [block.feed_forward.w2 for block in body.layers]
    if kind == "falcon_h1":
        return [block.feed_forward.down_proj for block in body.layers]
    if kind == "granitemoehybrid":
        return [block.shared_mlp.output_linear for block in body.layers]
    return [block.mlp.down_proj for block in body.layers]
