"""What the source of the payload may contain: lists of what is allowed. Whatever is not in them is a violation.

The payload runs in the processes of people who said `trust_remote_code=True`. So its imports, and what it takes from
the modules that it imports, are closed lists; `builtins` that run code or open files are out, and so is every way
around that by names that are put together at run time.
"""

import ast
import builtins
import io
import re
import tokenize
from typing import NamedTuple


class Allowed(NamedTuple):
    """What one kind of payload file may use."""

    imports: dict[str, set[str]]  # `from MODULE import NAME`
    modules: dict[str, set[str]]  # `import MODULE`, or a module that was imported by name, and MODULE.NAME
    dynamic: set[str]  # calls of getattr and setattr with a name that is no constant, word by word


SHARED = Allowed(
    imports={
        "collections.abc": {"Callable", "Iterator", "Mapping"},
        "contextlib": {"AbstractContextManager", "contextmanager"},
        "functools": {"cache", "partial", "wraps"},
        "inspect": {"Parameter", "signature"},
        "typing": {"Any"},
        "torch": {"Tensor", "nn"},
        "torch.utils.checkpoint": {"checkpoint"},
        "transformers": {
            *("GenerationMixin", "PreTrainedModel", "PretrainedConfig", "conversion_mapping", "modeling_utils"),
        },
        "transformers.cache_utils": {"Cache"},
        ".steering_adaras": {
            *(
                "THREAD",
                "Scope",
                "SteeredProjection",
                "Steering",
                "SteeringGate",
                "begin_step",
                "finish_step",
                "frozen",
            ),
            *("here", "parameter_names", "place_of", "preview", "prompt_width", "require_generation", "scope_of"),
            *("tokens_of", "valid_tokens"),
        },
    },
    modules={
        "threading": {"local"},
        "torch": {
            *("arange", "autocast", "bool", "cat", "compiler.is_compiling", "exp", "float32", "int64", "no_grad"),
            *("ones", "relu", "sigmoid", "tanh", "where", "zeros"),
        },
        "nn": {"Module", "Parameter", "functional.pad"},
        "transformers": set(),
        "modeling_utils": set(),
        "conversion_mapping": {"get_checkpoint_conversion_mapping", "register_checkpoint_conversion_mapping"},
    },
    dynamic={
        *("getattr(THREAD, name)", "setattr(THREAD, name, value)"),
        # A class of Transformers, which must be a model or a config.
        "getattr(transformers, name.removeprefix('AdaRAS'), None)",
        *("setattr(cache, name, partial(_changed, cache, name))", "getattr(type(cache), name)"),  # of crop and _ROWS
    },
)

# The loader of hf-thin reads, by the functions of Transformers and safetensors, the repository and the base.
THIN = Allowed(
    imports=SHARED.imports
    | {
        "contextlib": {"ExitStack"},
        "typing": {"Any", "ClassVar"},
        "safetensors": {"safe_open"},
        "transformers": {"GenerationConfig", "PretrainedConfig"},
        "transformers.dynamic_module_utils": {"get_class_from_dynamic_module"},
        "transformers.models.auto.auto_factory": {"add_generation_mixin_to_remote_model"},
        "transformers.utils.hub": {"cached_file", "get_checkpoint_shard_files"},
    },
    modules={
        "copy": {"deepcopy"},
        "hashlib": {"sha256"},
        "json": {"dumps"},
        "sys": {"modules"},
        "torch": {"uint8"},
        "nn": {"Module", "Parameter"},
    },
    dynamic={
        "getattr(sys.modules[type(config).__module__], record['auto_map'][cls.auto_class].rpartition('.')[2])",
        "setattr(decoder.get_submodule(owner), key, value)",
    },
)

# The classes of a family, from its two modules.
_FAMILY = re.compile(r"transformers\.models\.(\w+)\.(?:configuration|modeling)_\1")

_BUILTINS = {
    *("AttributeError", "BaseException", "ImportError", "KeyError", "NotImplementedError", "OSError"),
    *("RuntimeError", "ValueError"),
    *("bool", "classmethod", "dict", "divmod", "filter", "float", "getattr", "id", "int", "isinstance", "len", "list"),
    *("max", "min", "next", "property", "range", "set", "setattr", "sorted", "str", "sum", "super", "tuple", "type"),
    *("zip", "any", "issubclass", "all", "enumerate", "map", "reversed", "round", "abs", "hasattr", "staticmethod"),
}
_DUNDERS = {"__init__", "__init_subclass__", "__class__", "__module__", "__mro__", "__name__"}
_DUNDER = re.compile(r"__\w+__")
# Modules that Transformers and torch have imported: `modeling_utils.os` is `os`.
_FOREIGN = {
    *("builtins", "ctypes", "http", "httpx", "huggingface_hub", "importlib", "inspect", "io", "marshal", "mmap", "os"),
    *("pathlib", "pickle", "pty", "requests", "shutil", "socket", "subprocess", "sys", "tempfile", "urllib"),
    *("cpp_extension", "hub", "load", "load_library", "save", "system", "popen"),
}


def violations(source: str, allowed: Allowed = SHARED) -> list[str]:
    """What is not allowed in a payload file, each as "line N: code"."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    checks = (_import, _name, _attribute, _text, _dynamic)
    found = [node for node in ast.walk(tree) if any(check(node, parents, allowed) for check in checks)]
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in found]


def _import(node, parents, allowed):
    if isinstance(node, ast.Import):
        return any(alias.name not in allowed.modules or alias.asname for alias in node.names)
    if not isinstance(node, ast.ImportFrom):
        return False
    if isinstance(parents[node], ast.FunctionDef):  # all are seen when the module is imported
        return True
    module, names = "." * node.level + (node.module or ""), {alias.name for alias in node.names}
    if any(alias.asname for alias in node.names):
        return True
    if _FAMILY.fullmatch(module):
        return not all(name[0].isupper() for name in names)
    return not names <= allowed.imports.get(module, set())


def _name(node, parents, allowed):
    """Builtins that are not in the list, names like __builtins__, and modules that are handed around."""
    if not isinstance(node, ast.Name):
        return False
    if node.id in allowed.modules:
        parent = parents[node]
        tested = isinstance(parent, ast.If | ast.IfExp) and parent.test is node
        read = isinstance(parent, ast.Call) and ast.unparse(parent.func) == "getattr"
        annotated = isinstance(node.ctx, ast.Store) and ast.unparse(parent).endswith("= None")
        return not (isinstance(parent, ast.Attribute) or tested or read or annotated)
    return bool(_DUNDER.fullmatch(node.id)) or (hasattr(builtins, node.id) and node.id not in _BUILTINS)


def _attribute(node, parents, allowed):
    if not isinstance(node, ast.Attribute):
        return False
    if ast.unparse(node) == "self.__dict__":  # what a module is copied and pickled with
        return False
    if node.attr in _FOREIGN or (_DUNDER.fullmatch(node.attr) and node.attr not in _DUNDERS):
        return True
    root, _, rest = ast.unparse(node).partition(".")
    if root not in allowed.modules or isinstance(parents[node], ast.Attribute) or not re.fullmatch(r"[\w.]+", rest):
        return False  # no module, or a part of a longer chain, or of what a call gave
    return rest not in allowed.modules[root]


def _text(node, parents, allowed):
    """Names like __globals__ in strings, which could be looked up."""
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_text and bool(_DUNDER.search(node.value)) and node.value != "__module__"


def _dynamic(node, parents, allowed):
    """Calls of getattr, or setattr, with a name that is put together; a bare one could be called under another name."""
    if isinstance(node, ast.Name) and node.id in {"getattr", "setattr"}:
        return not (isinstance(parents[node], ast.Call) and parents[node].func is node)
    if not isinstance(node, ast.Call) or ast.unparse(node.func) not in {"getattr", "setattr"}:
        return False
    constant = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
    foreign = constant and node.args[1].value in _FOREIGN
    return foreign or not (constant or ast.unparse(node) in allowed.dynamic)


def code_lines(source: str) -> int:
    """Lines of code: without those that are blank, or have a comment or a part of a docstring only."""
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= {*range(node.lineno, node.end_lineno + 1)}
    return len(lines)
