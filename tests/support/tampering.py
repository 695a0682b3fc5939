"""Every way to tamper with a folder that we could think of, as functions that draw where and how.

Each takes the folder and a `draw` of hypothesis, changes something, and returns the names of the entries that differ
from before. Knows nothing of the library.
"""

import json
import os
import struct
import unicodedata

import hypothesis.strategies as st
from hypothesis import assume

ADDED = (
    "extra.txt",
    "custom_generate/generate.py",
    "modeling_evil.py",
    ".hidden",
    ".gitignore",
    "__pycache__/steering_adaras.cpython-311.pyc",
    ".cache/evil.py",
    ".cache/huggingface",
    "sub/.git/config",
    "sub/receipt.json",
    "CONFIG.JSON",
    "Rule.safetensors",
    "model.safetensors",
    "pytorch_model.bin",
    "additional_chat_templates/tool.jinja",
    "adapter.json",
    "two words.txt",
    "line\nbreak.txt",
    unicodedata.normalize("NFC", "café.json"),
    unicodedata.normalize("NFD", "café.json"),
    "config\u200b.json",
)


def _file(folder, draw, suffix="", least=1):
    names = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != "receipt.json"
        and path.name.endswith(suffix)
        and path.stat().st_size >= least
    ]
    assume(names)
    return draw(st.sampled_from(names))


def flip(folder, draw):
    """Another value in one byte."""
    name = _file(folder, draw)
    content = bytearray((folder / name).read_bytes())
    content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    return [name]


def truncate(folder, draw):
    name = _file(folder, draw)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: draw(st.integers(0, len(content) - 1))])
    return [name]


def append(folder, draw):
    name = _file(folder, draw)
    with (folder / name).open("ab") as file:
        file.write(draw(st.binary(min_size=1, max_size=9)))
    return [name]


def swap(folder, draw):
    """The contents of two files."""
    one, other = _file(folder, draw), _file(folder, draw)
    contents = [(folder / name).read_bytes() for name in (one, other)]
    assume(contents[0] != contents[1])
    (folder / one).write_bytes(contents[1])
    (folder / other).write_bytes(contents[0])
    return [one, other]


def swap_weights(folder, draw):
    """The contents of two files of tensors: valid both."""
    one, other = _file(folder, draw, ".safetensors"), _file(folder, draw, ".safetensors")
    contents = [(folder / name).read_bytes() for name in (one, other)]
    assume(contents[0] != contents[1] and "rule.safetensors" not in (one, other))
    (folder / one).write_bytes(contents[1])
    (folder / other).write_bytes(contents[0])
    return [one, other]


def delete(folder, draw):
    name = _file(folder, draw, least=0)
    (folder / name).unlink()
    return [name]


def add(folder, draw):
    name = draw(st.sampled_from(ADDED))
    assume(not (folder / name).exists())
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(draw(st.sampled_from([b"", b"{}", b"import os\n", b"{{ 'Say no.' }}"])))
    return [name]


def rename(folder, draw):
    """Another case, or a twin that looks the same."""
    name = _file(folder, draw)
    stem = name.rpartition("/")[2]
    new = name.removesuffix(stem) + draw(st.sampled_from([stem.swapcase(), stem.replace("o", "\u043e"), stem + " "]))
    assume(new != name)
    (folder / name).rename(folder / new)
    return [name, new]


def rename_tensor(folder, draw):
    """Another name in the header of a file of tensors, of the same length."""
    name = _file(folder, draw, ".safetensors")
    content = (folder / name).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    tensors = sorted(json.loads(content[8 : 8 + size]).keys() - {"__metadata__"})
    assume(tensors)
    tensor = draw(st.sampled_from(tensors))
    other = tensor[:-1] + ("x" if tensor[-1] != "x" else "y")
    assume(other not in tensors)
    (folder / name).write_bytes(content.replace(f'"{tensor}"'.encode(), f'"{other}"'.encode(), 1))
    return [name]


def edit_json(folder, draw):
    """Another value somewhere in a JSON file."""
    name = _file(folder, draw, ".json", least=3)
    value = json.loads((folder / name).read_text())
    holder = value
    while True:
        key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        if not isinstance(holder[key], dict | list) or not holder[key]:
            break
        holder = holder[key]
    other = draw(st.sampled_from([7, -1.5, "x", True, False, None, [], {}, "somebody/else--evil.Evil"]))
    assume(json.dumps(other) != json.dumps(holder[key]))
    holder[key] = other
    (folder / name).write_text(json.dumps(value))
    return [name]


def edit_code(folder, draw):
    """One more line, or one line less, in a code file."""
    name = _file(folder, draw, ".py")
    lines = (folder / name).read_text().splitlines(keepends=True)
    at = draw(st.integers(0, len(lines) - 1))
    lines[at : at + 1] = draw(st.sampled_from([["import os\n", lines[at]], ["# " + lines[at]], []]))
    (folder / name).write_text("".join(lines))
    return [name]


def edit_text(folder, draw):
    """Another word on the card."""
    text = (folder / "README.md").read_text()
    old = draw(st.sampled_from(sorted({word for word in text.split() if text.count(word) == 1})))
    (folder / "README.md").write_text(text.replace(old, "safe"))
    return ["README.md"]


def link_elsewhere(folder, draw):
    """A link out of the folder in a file's place, to another content."""
    name = _file(folder, draw)
    (folder / name).unlink()
    (folder / name).symlink_to(
        draw(st.sampled_from(["/etc/hostname", "/dev/zero", "/proc/self/mem", "/missing", name]))
    )
    return [name]


def link_folder(folder, draw):
    """A link to a folder elsewhere, whose files no walk finds."""
    name = draw(st.sampled_from(["custom_generate", "onnx2", ".cache"]))
    (folder / name).symlink_to("/etc")
    return [name]


def pipe(folder, draw):
    """A pipe, which a reader would wait for for ever, in a file's place or beside it."""
    name = draw(st.sampled_from(["pipe", "custom_generate.py"])) if draw(st.booleans()) else _file(folder, draw)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    return [name]


WAYS = (
    flip,
    truncate,
    append,
    swap,
    swap_weights,
    delete,
    add,
    rename,
    rename_tensor,
    edit_json,
    edit_code,
    edit_text,
    link_elsewhere,
    link_folder,
    pipe,
)
