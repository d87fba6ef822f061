"""Pictures and sounds in one turn, in the chat and on the command line, with a model that takes both."""

import io
import json
import sys

import pytest

from mmtool.args import InferArgs
from mmtool.groups.infer import InputArgs
from mmtool.groups.model import ModelArgs
from mmtool.infer.chat import RULE, media_parts, run_chat
from mmtool.infer.main import load
from mmtool.infer.single import read_question
from mmtool.infer.terminal import Terminal
from mmtool.loader import get_template, load_processor, open_folder
from mmtool.messages import Audio, Image


@pytest.fixture(scope="module")
def omni(golden):
    return golden("megrez-3b-omni")


@pytest.fixture(scope="module")
def hearing_model(omni):
    args = InferArgs(model=ModelArgs(model_id_or_path=str(omni / "checkpoint")))
    args.generation.max_new_tokens = 16
    spec, folder = open_folder(None, omni / "checkpoint")
    return load(args, spec, folder, get_template(spec, load_processor(spec, folder)))


def case(omni, name):
    return json.loads((omni / "cases" / name / "expected.json").read_text("utf-8"))


def test_the_folder_alone_says_what_it_is(hearing_model):
    assert hearing_model.spec.model_type == "megrez-3b-omni"


def test_the_chat_takes_a_picture_and_a_sound_in_one_turn(omni, hearing_model, monkeypatch, capsys):
    picture, sound = omni / "media" / "square_448.png", omni / "media" / "speech_16k_mono.wav"
    assert picture.stat().st_size and sound.stat().st_size
    lines = ("Please answer.", f"{sound} '{picture}'", "clear", "Convert speech to text.", str(sound), "--help")
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    run_chat(hearing_model, Terminal())
    out, err = capsys.readouterr()
    first, second, rest = out.split(f"\n{RULE}\n")
    assert first == case(omni, "image_audio_text")["generated_text"], "pictures first, whatever was typed first"
    assert second == case(omni, "audio_and_text")["generated_text"]
    assert "pictures and sounds" in rest
    assert "error" not in err


def test_a_single_question_takes_both(omni, hearing_model):
    given = InputArgs(
        query="Please answer.",
        images=[str(omni / "media" / "square_448.png")],
        audios=[str(omni / "media" / "speech_16k_mono.wav")],
    )
    request = hearing_model.request(read_question(given, hearing_model.spec))
    expected = case(omni, "image_audio_text")
    assert request.input_ids == expected["input_ids"]
    assert list(hearing_model.engine.answer(request).token_ids) == expected["generated_ids"]


def test_a_sound_that_comes_later_changes_the_earlier_one_and_is_counted(omni, hearing_model):
    short, long = (str(omni / "media" / name) for name in ("short_50ms_16k.wav", "speech_16k_mono.wav"))
    messages = [{"role": "user", "content": [{"type": "audio", "audio": short}]}]
    hearing_model.engine.answer(hearing_model.request(messages))
    messages += [
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "audio", "audio": long}, {"type": "text", "text": "And now?"}]},
    ]
    answer = hearing_model.engine.answer(hearing_model.request(messages))
    assert list(answer.token_ids) == case(omni, "multi_turn_audio")["generated_ids"]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("a.png", (Image("a.png"),)),
        ("a.wav", (Audio("a.wav"),)),
        ("A.FLAC b.jpg 'c d.mp3'", (Audio("A.FLAC"), Image("b.jpg"), Audio("c d.mp3"))),
        ("https://x.org/a.ogg?v=1#t", (Audio("https://x.org/a.ogg?v=1#t"),)),
        ("<audio>noise.bin</audio> <img>a.png</img>", (Audio("noise.bin"), Image("a.png"))),
        ("data:audio/wav;base64,AA==", (Audio("data:audio/wav;base64,AA=="),)),
        ('"a b.png"', (Image("a b.png"),)),
    ],
)
def test_what_a_line_names(line, parts):
    assert media_parts(line) == parts


def test_a_file_with_blanks_in_its_name_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my own sound.wav").touch()
    assert media_parts("my own sound.wav") == (Audio("my own sound.wav"),)
    assert media_parts("another sound.wav") == (Image("another"), Audio("sound.wav"))
