"""Other families behind the same server: what they answer there is what the engine answers alone."""

import base64
from pathlib import Path

import pytest

from mmtool.engine.base import Sampling, request_from
from mmtool.engine.create import create_engine
from mmtool.groups.prompt import PromptArgs
from mmtool.infer.main import open_template
from mmtool.loader import load_model, open_folder

LENGTH = 8


@pytest.fixture(scope="module")
def open_family(golden, run_module_server, tiny):
    """``with open_family("fm9g/gqa") as (server, answer)``: a server, and what answers without one."""

    def make(family):
        spec, folder = open_folder(None, golden(family) / "checkpoint")
        template = open_template(PromptArgs(), spec, folder)
        network, _ = load_model(spec, folder, processor=template.processor, dtype="fp32")

        def answer(messages):
            engine = create_engine(network, template.tokenizer)
            return engine.answer(request_from(template, messages, Sampling(max_new_tokens=LENGTH)))

        return run_module_server(model=type(tiny)(network, lambda **settings: template)), answer

    return make


def media_of(folder: Path, ending: str) -> bytes:
    return sorted(folder.glob(f"*{ending}"))[0].read_bytes()


def create(server, messages):
    fields = {"max_tokens": LENGTH, "temperature": 0}
    return server.client().chat.completions.create(model="tiny", messages=messages, **fields)


@pytest.mark.parametrize("family", ["fm9g/gqa", "megrez-3b-instruct", "fm9g/mha"])
def test_texts(open_family, family):
    running, answer = open_family(family)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "山东最高的山是？"},
        {"role": "assistant", "content": "泰山"},
        {"role": "user", "content": "Are you sure?"},
    ]
    with running as server:
        for turns in (messages[:2], messages):
            got = create(server, turns)
            expected = answer(turns)
            assert got.choices[0].message.content == expected.text
            assert got.usage.completion_tokens == len(expected.token_ids)
        template = server.service.template.template_type
        if template == "fm9g":
            with pytest.raises(Exception, match="takes text, not image"):
                create(server, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}])


def test_pictures_and_sounds(open_family, golden):
    media = golden("megrez-3b-omni") / "media"
    picture, sound = media_of(media, ".png"), media_of(media, ".wav")
    running, answer = open_family("megrez-3b-omni")
    encoded = base64.b64encode(sound).decode()
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    parts = {
        "picture": {"type": "image_url", "image_url": {"url": url}},
        "sound": {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
        "sound by URL": {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{encoded}"}},
    }
    text = {"type": "text", "text": "What is it?"}
    own = {"picture": {"type": "image", "image": picture}, "sound": {"type": "audio", "audio": sound}}
    own["sound by URL"] = own["sound"]
    with running as server:
        texts = {}
        for name, part in parts.items():
            got = create(server, [{"role": "user", "content": [part, text]}])
            expected = answer([{"role": "user", "content": [own[name], text]}])
            texts[name] = got.choices[0].message.content
            assert texts[name] == expected.text
            assert got.usage.prompt_tokens == expected.usage.prompt_tokens
        assert texts["sound"] == texts["sound by URL"] != texts["picture"]
        broken = {"type": "input_audio", "input_audio": {"data": encoded[:400], "format": "wav"}}
        response = server.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": [broken, text]}], "max_tokens": 2}
        )
        assert response.status_code in (200, 400)
        nonsense = {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"x" * 99).decode()}}
        response = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [nonsense, text]}]})
        assert response.json()["error"]["code"] == "invalid_media"
        assert response.json()["error"]["param"] == "messages[0].content[0].input_audio"
