"""Attacks on files of text: by reader, what is attacked, the bytes, and what the refusal says."""

import json

from fuzz.readers import ADAPTIVE, CONFIG, READERS

MIB = 1 << 20
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DEEPISH = b'{"a":' + b"[" * 80 + b"]" * 80 + b"}"

JSON_ATTACKS = {
    "empty": (b"", "is not JSON"),
    "only a byte order mark": (b"\xef\xbb\xbf", "is not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', r"is not UTF-8 \(byte 7\)"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
    "NUL bytes": (b"\x00" * 64, "is not JSON"),
    "cut off": (b'{"a": [1, 2', "is not JSON"),
    "two values": (b"{} {}", "is not JSON .Extra data"),
    "NaN": (b'{"a": NaN}', "holds NaN, which is not JSON"),
    "infinity": (b'{"a": [-Infinity]}', "holds -Infinity, which is not JSON"),
    "a number beyond floats": (b'{"a": 1e999}', "holds 1e999, which is not a finite number"),
    "a number of thousands of digits": (b'{"a": ' + b"9" * 5000 + b"}", "a whole number of 5000 digits"),
    "a key twice": (b'{"a": 1, "a": 2}', "has the key 'a' twice in one object"),
    "a key twice further down": (b'{"a": [{"b": 1, "c": 2, "b": 3}]}', "has the key 'b' twice"),
    "deep nesting": (DEEP, "nested"),
    "nesting that parses and cannot be compared": (DEEPISH, "is nested more than 64 deep"),
    "half a character": (b'{"a": "\\ud800"}', "half of a character"),
    "half a character in a key": (b'{"\\udfff": 1}', "half of a character"),
    "five MiB": (b'{"a": "' + b"x" * 5 * MIB + b'"}', "at most 4194304 are read"),
}
NO_OBJECT = {kind: (text, "holds a .*; expected a JSON object") for kind, text in {"a list": b"[]", "7": b"7"}.items()}

HEAD = b"overall_neuron_index,layer,neuron_index_in_layer,weight\n"
CSV_ATTACKS = {
    "empty": (b"", "columns .* are missing; expected overall_neuron_index"),
    "no rows": (HEAD, "has no rows; expected one neuron a row"),
    "columns of something else": (b"a,b\n1,2\n", "columns .* are missing"),
    "a column twice": (HEAD.strip() + b",layer\n6,1,0,1.5,1\n", "columns .'layer'. are given more than once"),
    "a row that is too short": (HEAD + b"6,1\n", "top.csv:2: .*; expected numbers"),
    "layers as fractions": (HEAD + b"6,1.0,0,1.5\n", "top.csv:2: .*; expected numbers"),
    "a weight that is NaN": (HEAD + b"6,1,0,nan\n", "top.csv:2: holds NaN, infinity"),
    "a weight beyond float32": (HEAD + b"6,1,0,1e300\n", "delta exceeds the range of float32"),
    "numbers of 400 digits": (HEAD + b"9" * 400 + b",1,0,1.5\n", "a number of more than 53 bits"),
    "numbers of 5000 digits": (HEAD + b"9" * 5000 + b",1,0,1.5\n", "top.csv:2: .*; expected numbers"),
    "a negative layer": (HEAD + b"-6,-1,0,1.5\n", r"layer \[-1\] outside 0 or more"),
    "rows that contradict each other": (
        HEAD + b"6,1,0,1.5\n9,2,0,1\n",
        "top.csv:3: overall_neuron_index 9 contradicts",
    ),
    "a quote that nobody closes": (HEAD + b'"' + b"6,1,0,1.5\n" * 20_000, "field larger than field limit"),
    "a huge field": (HEAD + b"6,1,0," + b"1" * 200_000, "field larger than field limit"),
    "NUL bytes": (HEAD + b"6,1,0,\x00\n", "expected"),
    "not UTF-8": (HEAD + b"6,1,0,\xff\n", "is not UTF-8"),
    "five MiB": (HEAD + b"6,1,0,1.5\n" * MIB, "at most 4194304 are read"),
}
TRACE = {"id": "q#0", "question_id": "q", "prompt": "1+1=", "completion": "2", "correct": True}


def line(**changes):
    return json.dumps({**TRACE, **changes}).encode()


LINE_ATTACKS = {
    "empty": (b"", "is empty; expected one JSON object per line"),
    "blank lines": (b"\n \r\n\t\n", "is empty"),
    "an id twice": (line() + b"\n" + line(), "lines.jsonl:2: trace q#0 was already on line 1; expected unique ids"),
    "a key twice": (line()[:-1] + b',"id":"b"}', "lines.jsonl:1: has the key 'id' twice"),
    "NaN": (line()[:-1] + b',"score":NaN}', "lines.jsonl:1: holds NaN"),
    "an exponent beyond all": (line()[:-1] + b',"x":1e99999999999999999999}', "which is not a finite number"),
    "a label that is 1": (line(correct=1), "correct is 1; expected true or false"),
    "a label that is text": (line(correct="true"), "correct is 'true'; expected true or false"),
    "an id with escapes": (line(id="\x1b[2J", correct=0), r"trace \\x1b\[2J: correct is 0"),
    "an id that is a fraction": (line(id=1.5), "id is Decimal.*; expected text or a whole number"),
    "a prompt that is a number": (line(prompt=7), "prompt is 7; expected text or a list of messages"),
    "a prompt of odd messages": (line(prompt=[{"role": "user"}]), "expected an object of role and content"),
    "a prompt nested in itself": (line(prompt=[[[["x"]]]]), "message is .*; expected an object of role and content"),
    "no completion": (line(completion=" "), "completion is ' '; expected non-empty text"),
    "half a character": (line(completion="\ud800"), "lines.jsonl:1: holds half of a character"),
    "deep nesting": (DEEP, "lines.jsonl:1: is nested"),
    "a list": (b"[1]", "lines.jsonl:1: is .1.; expected a JSON object"),
    "not UTF-8": (b"{\xff", "lines.jsonl:1: is not UTF-8"),
    "UTF-16": (line().decode().encode("utf-16"), "lines.jsonl:1: is not UTF-8"),
    "a line of five MiB": (line(completion="x" * 5 * MIB), "lines.jsonl:1: is longer than 4194304 bytes"),
}
INDEX = READERS["index"].seeds()[0]


def index_of(file):
    return INDEX.replace(b'"a.safetensors"', json.dumps(file).encode())


OUTSIDE = "names files that are not in the folder: .*; expected plain names of safetensors files beside it"
INDEX_ATTACKS = {
    "no map": (b"{}", "has no weight_map; expected tensor names and their files"),
    "a map that is a list": (b'{"weight_map": ["a.safetensors"]}', "has no weight_map"),
    "an empty map": (b'{"weight_map": {}}', "has no weight_map"),
    "a tensor twice": (b'{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "has the key 'x' twice"),
    "a tensor that its file lacks": (b'{"weight_map": {"x": "a.safetensors"}}', "tensor x is missing; the index"),
    **{
        f"a file called {file!r}": (index_of(file), OUTSIDE)
        for file in (
            "/etc/passwd", "../a.safetensors", "x/../a.safetensors", "..\\a.safetensors", "C:a.safetensors", "..", ".",
            "", "./a.safetensors", ".a.safetensors", "sub/a.safetensors", "a.safetensors\n", "\x1b[2J.safetensors",
            "\x00.safetensors", "x" * 5000, "é" * 250 + ".safetensors", "config.json", "gone.safetensors", 7, None,
            ["x"],
        )
    },
}  # fmt: skip


def config_of(**changes):
    return json.dumps({**CONFIG, **changes}).encode()


CONFIG_ATTACKS = {
    "no sizes": (b'{"model_type": "llama"}', "config.json: has no num_hidden_layers.*; expected the sizes of a model"),
    "no family": (config_of(model_type=None), "model_type None is not supported; expected one of: llama"),
    "a family that is a list": (config_of(model_type=["llama"]), "is not supported"),
    "a mixture of experts": (config_of(num_experts=10**30), "is a mixture of experts"),
    "2**31 layers": (config_of(num_hidden_layers=2**31), "layers is 2147483648; expected a positive integer"),
    "10**9 layers": (config_of(num_hidden_layers=10**9), "has weights of 2 layers; expected 1000000000, as its config"),
    "10**9 neurons": (config_of(intermediate_size=10**9), r"has shape \[4, 6\]; expected \[4, 1000000000\]"),
    "10**9 axes": (config_of(hidden_size=10**9), r"has shape \[4, 6\]; expected \[1000000000, 6\]"),
    "a size of 90 digits": (config_of(hidden_size=10**89), "expected a positive integer"),
    "sizes as text": (config_of(hidden_size="4"), "hidden_size is '4'; expected a positive integer"),
    "sizes as fractions": (config_of(hidden_size=4.0), "hidden_size is 4.0; expected a positive integer"),
    "a size that is true": (config_of(num_hidden_layers=True), "layers is True; expected a positive integer"),
    "a size that is a list": (config_of(hidden_size=[4]), r"hidden_size is \[4\]; expected a positive integer"),
    "no sizes where they follow from others": (
        b'{"model_type": "gpt2", "n_layer": 2, "n_inner": null, "n_embd": null}', "is None; expected a positive",
    ),
    "a text where sizes follow from it": (
        b'{"model_type": "gpt2", "n_layer": 2, "n_inner": null, "n_embd": "44"}', "expected a positive integer",
    ),
}  # fmt: skip
SETTINGS_ATTACKS = {
    "a template that is a number": (
        b'{"chat_template": 7}',
        "chat_template is 7; expected text, or a list of named ones",
    ),
    "templates of another form": (b'{"chat_template": ["x"]}', "expected text, or a list of named ones"),
    "a named template that is none": (b'{"chat_template": [{"name": "default", "template": 7}]}', "chat_template is 7"),
}
END_ATTACKS = {
    "an end that is text": (b'{"eos_token_id": "2"}', "eos_token_id is '2'; expected whole numbers: export again"),
    "an end that is a list": (b'{"eos_token_id": [[1]]}', r"eos_token_id is \[\[1\]\]; expected whole numbers"),
    "an end that is true": (b'{"eos_token_id": true}', "eos_token_id is True; expected whole numbers"),
}


def adaptive_of(**changes):
    return json.dumps({**ADAPTIVE, **changes}).encode()


DOWN = "model.layers.0.mlp.down_proj"
ADAPTIVE_ATTACKS = {
    "a gate of terabytes": (adaptive_of(gate_size=2**50), "a gate of 2 features and .*; expected a small classifier"),
    "vectors of gigabytes": (adaptive_of(hidden_size=2**40), "hidden_size is 1099511627776; expected 4, as"),
    "neurons that are not there": (adaptive_of(features={DOWN: [6]}), "has no neuron 6; expected 0 to 5"),
    "negative neurons": (adaptive_of(features={DOWN: [-1]}), "features is .*; expected neurons by name of a module"),
    "features of another form": (adaptive_of(features=[1]), r"features is \[1\]; expected neurons by name of a module"),
    "modules in one text": (adaptive_of(steered=DOWN), "steered is .*; expected names of modules"),
    "a gate in no module": (adaptive_of(gate_module=7), "gate_module is 7; expected a module's name"),
    "a negative size": (adaptive_of(gate_size=-1), "gate_size is -1; expected a count"),
    "strength as text": (adaptive_of(strength="2"), "strength is '2'; expected a finite number"),
    "a start of nobody's": (adaptive_of(start="x"), "start is 'x'; expected one of: last_prompt_token"),
}


def receipt_of(**changes):
    record = json.loads(READERS["receipt"].seeds()[0])
    return json.dumps({**record, **changes}).encode()


RECEIPT_ATTACKS = {
    "a later version": (receipt_of(version=99), "receipt of version 99; expected"),
    "a target of nobody's": (receipt_of(target="\x1b[2J"), r"receipt.json: \\x1b\[2J: no such target"),
    "options of another target": (receipt_of(options={"page": True}), "receipt.json: hf: has no option page"),
    "options that are a list": (receipt_of(options=[1]), "damaged receipt"),
    "a source that is a number": (receipt_of(source=7), "damaged receipt .source is a int.; export again"),
    "files that are numbers": (receipt_of(files={"a": 1}), "damaged receipt"),
    "files that are a list": (receipt_of(files=["a"]), "damaged receipt"),
    "checks that are numbers": (receipt_of(parity=[1]), "damaged receipt"),
    "a figure that is text": (
        receipt_of(parity=[{"check": "x", "figure": "1", "limit": 0, "ok": True, "detail": ""}]), "damaged receipt",
    ),
    "a base of terabytes": (receipt_of(base={"id": "x", "family": "llama"}), "damaged receipt"),
    "more than there is": (receipt_of(more=1), "damaged receipt"),
}  # fmt: skip
_OF_ANOTHER_RULE = {**json.loads(READERS["evaluation"].seeds()[0]), "rule": "\x1b[2J"}
EVALUATION_ATTACKS = {
    "another rule": (json.dumps(_OF_ANOTHER_RULE).encode(), r"evaluates rule \\x1b\[2J; expected"),
    "five MiB": (b'{"a": "' + b"x" * 5 * MIB + b'"}', "has version None; expected a file of adaras-export eval"),
    "a list": (b"[]", "holds a list; expected a file of adaras-export eval"),
}


TABLE = {
    "csv": CSV_ATTACKS,
    "traces": LINE_ATTACKS,
    "index": {**JSON_ATTACKS, **NO_OBJECT, **INDEX_ATTACKS},
    "config": {**JSON_ATTACKS, **NO_OBJECT, **CONFIG_ATTACKS},
    "tokenizer config": {**JSON_ATTACKS, **NO_OBJECT, **SETTINGS_ATTACKS},
    "generation config": {**JSON_ATTACKS, **NO_OBJECT, **END_ATTACKS},
    "adapter config": {**JSON_ATTACKS, **NO_OBJECT},
    "adaptive config": {**JSON_ATTACKS, **NO_OBJECT, **ADAPTIVE_ATTACKS},
    "receipt": {**JSON_ATTACKS, **NO_OBJECT, **RECEIPT_ATTACKS},
    "evaluation": {**JSON_ATTACKS, **EVALUATION_ATTACKS},
}
