"""Tokens, environment and YAML to arguments, on the real argument classes; no command runs here."""

import itertools
import json
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtool import other_names
from mmtool.args import COMMANDS, ExportArgs, InferArgs, ListArgs, SftArgs
from mmtool.errors import MMToolError
from mmtool.options import markdown_table, opt, options_of, read_args


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in COMMANDS.values():
        for option in options_of(cls):
            monkeypatch.delenv(f"MMTOOL_{option.name.upper()}", raising=False)
    monkeypatch.delenv("MMTOOL_CONFIG", raising=False)


def read(*tokens: str) -> InferArgs:
    return read_args(InferArgs, tokens, "mmtool infer")


def failure(*tokens: str, cls: type = InferArgs) -> tuple[str, str]:
    with pytest.raises(MMToolError) as caught:
        read_args(cls, tokens, "mmtool infer")
    assert caught.value.hint, "every mistake has a hint"
    return caught.value.message, caught.value.hint


# Command line


@pytest.mark.parametrize(
    "tokens",
    [
        ["--model_type", "yi-vl-6b-chat"],
        ["--model-type", "yi-vl-6b-chat"],
        ["--model-type=yi-vl-6b-chat"],
        ["--model_type", "tiny", "--model-type", "yi-vl-6b-chat"],  # the last one wins
    ],
)
def test_both_spellings_and_the_equals_sign_set_an_option(tokens: list[str]) -> None:
    assert read(*tokens).model.model_type == "yi-vl-6b-chat"


@pytest.mark.parametrize(
    ("tokens", "verbose"),
    [
        (["--verbose", "true"], True),
        (["--verbose", "FALSE"], False),
        (["--verbose=false"], False),
        (["--verbose=true"], True),
        (["--verbose"], True),
        (["--verbose", "--stream", "false"], True),
        (["--stream", "--verbose"], True),
        (["--verbose", "1"], True),
        (["--verbose", "no"], False),
    ],
)
def test_a_flag_takes_a_value_or_none(tokens: list[str], verbose: bool) -> None:
    assert read(*tokens).log.verbose is verbose


@pytest.mark.parametrize(
    "tokens",
    [
        ["--images", "a b.png", "c.png", "--query", "x"],
        ["--query", "x", "--images", "a b.png", "c.png"],
        ["--query", "x", "--images", "a b.png", "--images", "c.png"],
        ["--query", "x", "--images=a b.png", "c.png"],
    ],
)
def test_a_list_takes_all_values_up_to_the_next_option(tokens: list[str]) -> None:
    args = read(*tokens)
    assert (args.input.images, args.input.query) == (["a b.png", "c.png"], "x")


@pytest.mark.parametrize("text", ["-", "-1", "-.5", "- a list", "--- rule", "", "a=b", "--what?", "你好", "a\nb"])
def test_a_value_may_look_odd(text: str) -> None:
    assert read("--query", text).input.query == text


@pytest.mark.parametrize("text", ["--stream", "-x", "--", "--help", "=", "a=b=c"])
def test_any_value_can_be_given_after_an_equals_sign(text: str) -> None:
    assert read(f"--query={text}").input.query == text


@given(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_values_arrive_unchanged(query: str, words: list[str]) -> None:
    args = read(f"--query={query}", *(f"--stop_words={word}" for word in words))
    assert (args.input.query, args.generation.stop_words) == (query, words)


def test_numbers_are_converted() -> None:
    args = read("--temperature", "1e-1", "--top_k", "5", "--val_dataset_sample", "-1", "--val_dataset", "x.jsonl")
    assert (args.generation.temperature, args.generation.top_k, args.data.val_dataset_sample) == (0.1, 5, None)


def test_choices_do_not_mind_case() -> None:
    assert read("--dtype", "Auto", "--infer_backend", "PT").model.dtype == "AUTO"
    assert read("--dtype", "BF16").model.dtype == "bf16"


def test_json_options_become_dicts() -> None:
    args = read("--model_kwargs", '{"a": [1, null]}', "--device_map", '{"": 0}')
    assert (args.model.model_kwargs, args.model.device_map) == ({"a": [1, None]}, {"": 0})
    assert read("--device_map", "cuda:0").model.device_map == "cuda:0"


@pytest.mark.parametrize("dtype", ["fp16", "float16", "Float16"])
def test_names_of_other_tools_are_accepted(dtype: str) -> None:
    args = read("--torch_dtype", dtype, "--model", "some/folder")
    assert (args.model.dtype, args.model.model_id_or_path) == ("fp16", "some/folder")
    assert {"dtype", "model_id_or_path"} == args.explicit


@pytest.mark.parametrize("token", ["--no-stream", "--no_stream"])
def test_a_flag_is_turned_off_by_no(token: str) -> None:
    args = read(token, "--query", "x")
    assert (args.generation.stream, args.input.query) == (False, "x")
    assert failure("--no-query")[0] == "unknown option --no-query"
    assert failure("--no-stream=true")[0] == "unknown option --no-stream"


def test_what_other_tools_mean_by_minus_one_is_understood() -> None:
    args = read_args(SftArgs, ["--max_length", "-1", "--save_total_limit", "-1"], "mmtool sft")
    assert (args.template.max_length, args.run.save_total_limit) == (None, 0)


def test_options_of_other_tools_say_what_to_do_instead() -> None:
    tokens = ["--tuner_backend", "peft", "--use_flash_attn", "true", "--query", "x", "--hqq_axis=1", "--learning_rate"]
    with pytest.raises(MMToolError) as caught:
        read_args(InferArgs, tokens, "mmtool infer", {"sft": SftArgs, "export": ExportArgs})
    assert caught.value.message == "unknown options --tuner_backend, --use_flash_attn, --hqq_axis, --learning_rate"
    assert "--use_flash_attn: Use --attn_impl flash_attention_2; " in caught.value.hint
    assert caught.value.hint.endswith("--learning_rate: It is an option of mmtool sft")


def test_a_hint_about_another_tool_is_about_no_option_of_ours_and_names_only_ours() -> None:
    named = {
        command: {name for o in options_of(cls) for name in (o.name, *o.aliases)} for command, cls in COMMANDS.items()
    }
    everywhere = set().union(*named.values())
    for name, hint in other_names.OPTIONS.items():
        # these are hints of the commands that do not have them
        assert name not in everywhere or name in ("dataset_seed", "dataset_test_ratio", "max_pixels"), name
        assert set(re.findall(r"--(\w+)", hint)) <= everywhere, hint
    for command, hint in other_names.COMMANDS.items():
        (ours,) = re.findall(r"mmtool (\w+)", hint)
        assert command not in COMMANDS and ours in COMMANDS
        assert set(re.findall(r"--(\w+)", hint)) <= named[ours], hint


@pytest.mark.parametrize(
    ("tokens", "message", "hint"),
    [
        (["--modle_type", "x"], "unknown option --modle_type", "Did you mean --model_type?"),
        (["--maxnewtokens", "3"], "unknown option --maxnewtokens", "Did you mean --max_new_tokens?"),
        (["-verbose"], "unknown option -verbose", "Did you mean --verbose?"),
        (["--zzz=1"], "unknown option --zzz", "`mmtool infer --help` lists the options."),
        (["--stop_words", "-END"], "--stop_words needs a value", "--stop_words=-END"),
        (["--stop_words", "a", "-END"], "unknown option -END", "--stop_words=-END"),
        (["--dtype", "bf61"], "--dtype must be one of AUTO, fp32, bf16, fp16, not 'bf61'", "Did you mean bf16?"),
        (["--dtype", "zzz"], "not 'zzz'", "Choose from AUTO, fp32, bf16, fp16."),
        (["--query"], "--query needs a value: TEXT", "Ask this"),
        (["--images", "--query", "x"], "--images needs a value", "--images=--query"),
        (["--query", "--stream"], "--query needs a value", "--query=--stream"),
        (["query", "hello"], "unexpected argument 'query'", "Did you mean --query VALUE?"),
        (["hello"], "unexpected argument 'hello'", "`mmtool infer --help`"),
        (["--query", "a", "b"], "unexpected argument 'b'", "--help"),
        (["--", "--query", "x"], "unexpected argument '--query'", "--help"),
        (["--verbose", "maybe"], "--verbose must be true or false, not 'maybe'", "Also show"),
        (["--top_k", "1.5"], "--top_k must be a whole number, not '1.5'", "Draw"),
        (["--temperature", "hot"], "--temperature must be a number, not 'hot'", "sampling"),
        (["--model_kwargs", "{a: 1}"], "--model_kwargs is not valid JSON", "{"),
        (["--model_kwargs", "[1]"], "--model_kwargs must be a JSON object", "{"),
        (["--device_map", "{"], "--device_map is not valid JSON", "{"),
    ],
)
def test_mistakes_name_the_option_and_what_to_do(tokens: list[str], message: str, hint: str) -> None:
    told, advised = failure(*tokens)
    assert message in told
    assert hint in advised


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--temperature", "-1"], "--temperature -1 is out of range"),
        (["--temperature", "nan"], "--temperature nan is out of range"),
        (["--top_p", "0"], "--top_p 0 is out of range"),
        (["--top_p", "1.1"], "--top_p 1.1 is out of range"),
        (["--top_k", "-1"], "--top_k -1 is out of range"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0 is out of range"),
        (["--max_length", "0"], "--max_length 0 is out of range"),
        (["--repetition_penalty", "0"], "--repetition_penalty 0 is out of range"),
        (["--seed", "-1"], "--seed -1 is out of range"),
        (["--num_beams", "0"], "--num_beams 0 is out of range"),
        (["--num_beams", "2"], "--num_beams 2 is not supported: beam search"),
        (["--max_batch_size", "0"], "--max_batch_size 0 is out of range"),
        (["--val_dataset_sample", "0"], "--val_dataset_sample 0 is out of range"),
        (["--images", "a.png"], "--images needs --query"),
        (["--audios", "a.wav"], "--audios needs --query"),
        (["--json"], "--json needs --query"),
        (["--query", "x", "--val_dataset", "a.jsonl"], "--query and --val_dataset exclude each other"),
        (["--resume"], "--resume needs --val_dataset"),
        (["--result_path", "out.jsonl"], "--result_path needs --val_dataset"),
        (["--val_dataset", "a", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_anything_loads(tokens: list[str], message: str) -> None:
    assert message in failure(*tokens)[0]


@pytest.mark.parametrize(
    ("tokens", "do_sample"),
    [
        ([], None),
        (["--temperature", "0"], False),
        (["--temperature", "0", "--do_sample", "true"], False),
        (["--temperature", "0.5"], True),
        (["--top_p", "0.5"], True),
        (["--top_k", "5", "--do_sample", "false"], False),
        (["--repetition_penalty", "1.1"], None),
    ],
)
def test_sampling_options_turn_sampling_on_and_temperature_0_off(tokens: list[str], do_sample: bool | None) -> None:
    assert read(*tokens).generation.do_sample is do_sample


def test_the_type_is_tiny_unless_a_folder_tells() -> None:
    assert read().model.model_type == "tiny"
    assert read("--model_id_or_path", "folder").model.model_type is None
    assert read("--model_id_or_path", "folder", "--model_type", "yi-vl-6b-chat").model.model_type == "yi-vl-6b-chat"


def test_a_positional_argument_may_stand_anywhere() -> None:
    for tokens in (
        ["templates", "--json"],
        ["--json", "templates"],
        ["--json", "true", "templates"],
        ["--json", "--", "templates"],
    ):
        args = read_args(ListArgs, tokens, "mmtool list")
        assert (args.table, args.json) == ("templates", True)
    assert read_args(ListArgs, [], "mmtool list").table == "models"


def test_a_mistyped_positional_argument_is_explained() -> None:
    assert failure("modls", cls=ListArgs) == (
        "TABLE must be one of models, templates, datasets, not 'modls'",
        "Did you mean models?",
    )
    assert "unexpected argument 'b'" in failure("models", "b", cls=ListArgs)[0]


# Environment


def test_the_environment_sets_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"QUERY": "x y", "IMAGES": "a.png 'b c.png' http://h:1/d", "STREAM": "off", "TOP_K": "3"}.items():
        monkeypatch.setenv(f"MMTOOL_{name}", text)
    args = read()
    assert args.input.images == ["a.png", "b c.png", "http://h:1/d"]
    assert (args.input.query, args.generation.stream, args.generation.top_k) == ("x y", False, 3)
    assert args.explicit == {"query", "images", "stream", "top_k"}


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("MMTOOL_DTYPE", "bf61", "MMTOOL_DTYPE must be one of"),
        ("MMTOOL_TOP_K", "many", "MMTOOL_TOP_K must be a whole number, not 'many'"),
        ("MMTOOL_IMAGES", "it's.png", "MMTOOL_IMAGES="),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, message: str
) -> None:
    monkeypatch.setenv(variable, text)
    assert message in failure()[0]


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMTOOL_TOP_K", "")
    assert "top_k" not in read().explicit


# YAML


@pytest.fixture
def config(tmp_path: Any) -> Any:
    def write(text: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_yaml_sets_options_of_every_type(config: Any) -> None:
    text = """
        # a comment
        model-type: yi-vl-6b-chat
        query: "你好: yes"
        images: [a.png, b c.png]
        stop_words: one
        stream: false
        temperature: 1e-1   # YAML 1.1 reads this as text
        top_p: 1
        model_kwargs: {low: 1, deep: [a]}
        device_map: {"": cpu}
        seed:
    """
    args = read("--config", config(text.replace("\n        ", "\n")))
    assert (args.model.model_type, args.input.query) == ("yi-vl-6b-chat", "你好: yes")
    assert (args.input.images, args.generation.stop_words) == (["a.png", "b c.png"], ["one"])
    assert (args.generation.stream, args.generation.temperature, args.generation.top_p) == (False, 0.1, 1.0)
    assert (args.model.model_kwargs, args.model.device_map) == ({"low": 1, "deep": ["a"]}, {"": "cpu"})
    assert "seed" not in args.explicit


def test_a_json_file_is_yaml_too(config: Any) -> None:
    assert read("--config", config(json.dumps({"query": "x", "images": ["a"]}))).input.images == ["a"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "\ufeffquery: x\n"])
def test_empty_files_and_byte_order_marks_are_fine(config: Any, text: str) -> None:
    read("--config", config(text))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("modle_type: x", "unknown key 'modle_type' in ", "Did you mean model_type?"),
        ("generation: {top_k: 1}", "unknown key 'generation' in ", "top level"),
        ("on: 1", "unknown key 'True' in ", "option names"),
        ("config: other.yaml", "unknown key 'config' in ", ""),
        ("max_new_tokens: many", "key 'max_new_tokens' in ", "answer"),
        ("max_new_tokens: 1.5", "must be a whole number, not 1.5", ""),
        ("max_new_tokens: true", "must be a whole number, not true", ""),
        ("max_new_tokens: [1]", "must be a whole number, not [1]", ""),
        ("stream: 3", "key 'stream' in ", ""),
        ("stream: maybe", "must be true or false, not 'maybe'", ""),
        ("stream:", "key 'stream' in ", ""),
        ("query: 12", "must be text, not 12", "quotes"),
        ("query: yes", "must be text, not true", "quotes"),
        ("query: [a]", 'must be text, not ["a"]', ""),
        ("query: 2024-01-01", "must be text", ""),
        ("images: [1]", "key 'images' in ", ""),
        ("images: {a: b}", "must be text", ""),
        ("dtype: bf61", "must be one of AUTO, fp32, bf16, fp16, not 'bf61'", "Did you mean bf16?"),
        ("dtype: 16", "must be one of AUTO", ""),
        ("model_kwargs: 3", "must be a JSON object, not 3", ""),
        ("device_map: 3", "must be text or a JSON object, not 3", ""),
        ("- a\n- b", "holds no keys", "option: value"),
        ("just text", "holds no keys", "option: value"),
        ("a: [", "is not valid YAML", "line"),
        ("a: b: c", "is not valid YAML", "line"),
        (b"query: \xff\xfe", "not UTF-8", "YAML"),
    ],
)
def test_mistakes_in_yaml_name_file_and_key(config: Any, text: str | bytes, message: str, hint: str) -> None:
    told, advised = failure("--config", config(text))
    assert message in told
    assert "run.yaml" in told
    assert hint in advised


def test_a_missing_config_file_is_named(tmp_path: Any) -> None:
    assert f"cannot read --config {tmp_path}/no.yaml: No such file" in failure("--config", f"{tmp_path}/no.yaml")[0]
    assert "Is a directory" in failure("--config", str(tmp_path))[0]


# All three


def test_the_command_line_beats_the_environment_beats_yaml(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    path = config("stream: true\ntop_k: 1\ntop_p: 0.1\nimages: [yaml]\nquery: q\n")
    monkeypatch.setenv("MMTOOL_TOP_K", "2")
    monkeypatch.setenv("MMTOOL_STREAM", "true")
    monkeypatch.setenv("MMTOOL_CONFIG", path)
    args = read("--stream", "false", "--images", "line")
    assert (args.generation.stream, args.generation.top_k, args.generation.top_p) == (False, 2, 0.1)
    assert args.input.images == ["line"]
    assert args.explicit == {"stream", "top_k", "top_p", "images", "query"}


def test_explicit_tells_a_given_default_from_no_value() -> None:
    assert read("--stream", "true", "--dtype", "AUTO").explicit == {"stream", "dtype"}
    assert read().explicit == frozenset()


# The classes themselves


@pytest.mark.parametrize("cls", COMMANDS.values(), ids=COMMANDS)
def test_option_names_and_aliases_are_unique(cls: type) -> None:
    names = [name for option in options_of(cls) for name in (option.name, *option.aliases)]
    assert len(names) == len(set(names))
    assert not {"config", "help", "debug", "golden"} & set(names), "taken by --config, --help and other variables"


@pytest.mark.parametrize("cls", COMMANDS.values(), ids=COMMANDS)
def test_every_option_has_a_sentence_and_every_group_stays_small(cls: type) -> None:
    options = options_of(cls)
    for option in options:
        assert option.help.endswith("."), option.name
        assert option.metavar, option.name
    for _, group in itertools.groupby(sorted(options, key=lambda o: str(o.group)), key=lambda o: o.group):
        assert len(list(group)) < 20


@pytest.mark.parametrize("cls", COMMANDS.values(), ids=COMMANDS)
def test_defaults_pass_their_own_checks(cls: type) -> None:
    args = cls()
    for option in options_of(cls):
        owner = getattr(args, option.group) if option.group else args
        if option.default is not None:
            assert option.convert(getattr(owner, option.name), "default") == option.default


def test_arguments_can_be_made_in_python() -> None:
    assert InferArgs().explicit == frozenset()
    assert InferArgs().input.images is not InferArgs().input.images


@dataclass(kw_only=True)
class _Group:
    """A group"""

    size: float = opt(2, "A size.")


@dataclass(kw_only=True)
class _Args:
    """A command"""

    group: _Group = field(default_factory=_Group)
    kind: Literal["a", "b"] | None = opt(None, "A | kind.", aliases=("sort",))
    explicit: frozenset[str] = frozenset()


def test_the_docs_table_has_a_row_per_option() -> None:
    assert [f.name for f in fields(_Args)] == ["group", "kind", "explicit"]
    assert markdown_table(_Args) == (
        "**A group**\n\n| option | value | default | |\n|---|---|---|---|\n| `--size` | `NUMBER` | `2` | A size. |\n\n"
        "**A command**\n\n| option | value | default | |\n|---|---|---|---|\n| `--kind` | `a\\|b` |  | A \\| kind. |"
    )
