"""The rules of the tree, checked on the source: who imports whom, what may be heavy, what may be late."""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import mmtool

PACKAGE = Path(mmtool.__file__).parent

# Imports only go up this list; files of one folder may import each other.
LAYERS = [
    *(
        "errors",
        "log",
        "utils",
        "threads",
        "spec",
        "other_names",
        "options",
        "groups",
        "args",
        "messages",
        "web",
        "download",
        "media",
    ),
    "template",
    *("models", "registry", "hub", "loader", "auto", "finetuned", "data", "vllm_plugin", "engine", "infer", "serve"),
    *("sft", "export", "llm", "listing", "cli"),
]

HEAVY = {"torch", "transformers", "numpy", "PIL", "peft", "accelerate", "safetensors", "sentencepiece"}

# transformers cannot be there without these.
WITH_TRANSFORMERS = {"huggingface_hub", "tokenizers", "jinja2"}

# Loaded for `--help`, or to read the registry: nothing heavy, directly or through what they import.
LIGHT = ["", "errors", "log", "utils", "spec", "options", "args", "messages", "registry", "hub", "listing", "cli"]
LIGHT += ["data.registry", "__main__", "finetuned", "sft.launch", "sft.places", "serve.launch"]

# Imports inside functions, by module: package -> why it is late. Command bodies in `cli` may import mmtool late.
LATE_IMPORTS: dict[str, dict[str, str]] = {
    "utils": {"torch": "light module", "numpy": "light module"},
    "media": {"soundfile": "optional: sounds only"},
    "options": {"yaml": "only with --config"},
    "data.dataset": {"pyarrow": "optional: parquet files only"},
    "data.fetch": {
        "datasets": "comes with modelscope[datasets]",
        "huggingface_hub": "only for a download",
        "modelscope": "optional package",
    },
    "template.show": {"rich": "only for those who look"},
    "infer.answer": {"rich": "only with --show_prompt"},
    "infer.progress": {"rich": "only for a dataset on a terminal"},
    "models.common.bnb": {"bitsandbytes": "optional package"},
    "models.common.quantised": {"torchao": "optional package"},
    "models.common.folders": {"huggingface_hub": "only for an id"},
    "engine.vllm": {"vllm": "optional package"},
    "vllm_plugin": {"vllm": "its own call"},
    "finetuned": {"peft": "only for an adapter", "safetensors": "only for an adapter"},
    "sft.launch": {
        "mmtool": "a process that only starts others needs no torch",
        "torch": "only where processes are started",
        "yaml": "only where processes are started",
    },
    "sft.main": {"rich": "only with --show_prompt"},
    "sft.network": {"liger_kernel": "optional package"},
    "sft.progress": {"rich": "only on a terminal"},
    "sft.settings": {"deepspeed": "optional package"},
    "export.gguf": {"gguf": "optional package"},
    "export.gguf_check": {"llama_cpp": "optional package", "xllamacpp": "optional package"},
    "export.gguf_tokenizer": {"gguf": "optional package"},
    "export.libraries": {
        "compressed_tensors": "part of llmcompressor",
        "llmcompressor": "optional package",
    },
    "export.awq": {"llmcompressor": "optional package"},
    "export.progress": {"rich": "only on a terminal"},
    "export.push": {
        "huggingface_hub": "only for an upload",
        "modelscope": "optional package",
        "modelscope_hub": "part of modelscope",
    },
    "hub": {
        "huggingface_hub": "only for a download",
        "modelscope": "optional package",
        "modelscope_hub": "part of modelscope",
    },
    "serve.launch": {"mmtool": "a missing package is said before anything heavy is loaded"},
    "serve.ui": {"gradio": "optional package"},
    "web": {
        "certifi": "only where Python has no certificates of its own",
        "truststore": "only where Python has no certificates of its own",
    },
}


# Modules that are loaded by an optional package, or where it is there: they may import it at their top.
SERVER = {"fastapi", "starlette", "pydantic", "uvicorn", "httptools", "llguidance"}  # of the extra `serve`
PLUGINS: dict[str, set[str]] = {"engine.vllm_models": {"vllm"}, "engine.vllm_logits": {"vllm"}}


@dataclass(frozen=True)
class Import:
    """One imported module; ``late`` inside a function, ``typing`` under TYPE_CHECKING."""

    target: str
    line: int
    late: bool
    typing: bool

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> list[Import]:
    found = []

    def visit(node: ast.AST, late: bool, typing: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, late, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                inside = full.startswith("mmtool.") and full.removeprefix("mmtool.") in MODULES
                found.append(Import(full if inside else node.module, node.lineno, late, typing))
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = typing or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for child in ast.iter_child_nodes(node):
            visit(child, late, typing)

    visit(ast.parse(path.read_text(encoding="utf-8")), False, False)
    return found


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def inner(name: str) -> list[tuple[Import, str]]:
    """Imports of this package, with the name of the module below it."""
    pairs = [(imported, imported.target.removeprefix("mmtool").removeprefix(".")) for imported in IMPORTS[name]]
    return [(imported, target) for imported, target in pairs if imported.package == "mmtool"]


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("", "__main__")])
def test_imports_go_up_the_list_of_layers(name: str) -> None:
    assert top(name) in LAYERS, f"give {top(name)} its place in LAYERS"
    for imported, target in inner(name):
        if not target or top(target) == top(name) or (name == "listing" and target == "data.registry"):
            continue
        assert LAYERS.index(top(target)) < LAYERS.index(top(name)), f"{name}:{imported.line} imports {target}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("models.")])
def test_families_do_not_import_each_other(name: str) -> None:
    family = name.split(".")[1]
    for imported, target in inner(name):
        if target.startswith("models."):
            assert target.split(".")[1] in (family, "common"), f"{name}:{imported.line} imports {target}"


@pytest.mark.parametrize("name", [*LIGHT, *(n for n in MODULES if n.startswith("models.") and n.endswith(".spec"))])
def test_light_modules_import_nothing_heavy(name: str) -> None:
    seen, queue = set(), [(name, name or "mmtool")]
    while queue:
        module, chain = queue.pop()
        if module in seen:
            continue
        seen.add(module)
        for imported in IMPORTS[module]:
            if not imported.late and not imported.typing:
                assert imported.package not in HEAVY, f"{chain} imports {imported.target}"
        nearby = [(t, f"{chain} -> {t}") for i, t in inner(module) if t and not i.late and not i.typing]
        parents = [(".".join(t.split(".")[:n]), chain) for t, chain in nearby for n in range(1, t.count(".") + 1)]
        queue += nearby + parents


@pytest.mark.parametrize("name", MODULES)
def test_late_imports_are_command_bodies_or_have_a_reason(name: str) -> None:
    allowed = LATE_IMPORTS.get(name, {})
    for imported in IMPORTS[name]:
        if imported.late and not (name == "cli" and imported.package == "mmtool"):
            assert imported.package in allowed, f"{name}:{imported.line} imports {imported.target} late"


def test_every_listed_late_import_is_still_there() -> None:
    for name, packages in LATE_IMPORTS.items():
        late = {imported.package for imported in IMPORTS[name] if imported.late}
        assert set(packages) <= late, f"{name}: {set(packages) - late} need no entry in LATE_IMPORTS"


@pytest.mark.parametrize("name", MODULES)
def test_typer_is_used_through_its_public_modules(name: str) -> None:
    for imported in IMPORTS[name]:
        assert imported.package != "click", f"{name}:{imported.line}"
        assert imported.package != "typer" or imported.target in ("typer", "typer.core"), f"{name}:{imported.line}"


@pytest.mark.parametrize("name", [n for n, path in MODULES.items() if n and path.name == "__init__.py"])
def test_inner_packages_hold_a_docstring_only(name: str) -> None:
    body = ast.parse(MODULES[name].read_text(encoding="utf-8")).body
    assert len(body) == 1, "an __init__.py inside the package holds its docstring"
    assert isinstance(body[0], ast.Expr)


@pytest.mark.parametrize("name", MODULES)
def test_third_party_packages_are_declared(name: str) -> None:
    declared = {"yaml", "typer", "rich", "mmtool"} | HEAVY | WITH_TRANSFORMERS
    optional = {
        "modelscope",
        "modelscope_hub",
        "torchao",
        "llmcompressor",
        "loguru",
        "compressed_tensors",
        "gguf",
        "llama_cpp",
        "xllamacpp",
        "vllm",
        "deepspeed",
        "bitsandbytes",
        "liger_kernel",
        "pyarrow",
        "datasets",
        "certifi",
        "truststore",
        "soundfile",
        "gradio",
    }
    for imported in IMPORTS[name]:
        known = declared | PLUGINS.get(name, set()) | (SERVER if name.startswith("serve.") else set())
        known |= optional if imported.late or imported.typing else set()
        assert imported.package in known | sys.stdlib_module_names, f"{name}:{imported.line} imports {imported.target}"
