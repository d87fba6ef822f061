"""Opening sounds: formats, rates, channels, broken files, limits, and how the rate is changed."""

from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from mmtool.errors import MediaError, MMToolError
from mmtool.media import MediaLimits, load_audio, looks_like_sound, resample

RATE = 16_000


def tone(seconds: float = 0.5, rate: int = RATE, pitch: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray | None = None, rate: int = RATE, kind: str = "WAV", **options: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone() if samples is None else samples, rate, format=kind, **options)
    return buffer.getvalue()


def failure(source: object, limits: MediaLimits | None = None) -> MediaError:
    with pytest.raises(MediaError) as caught:
        load_audio(source, *([limits] if limits else []))
    assert caught.value.message.startswith("cannot open audio ")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    assert caught.value.hint
    return caught.value


def test_every_kind_of_source_gives_the_same_samples(tmp_path: Path) -> None:
    data = encoded()
    path = tmp_path / "a b#c.wav"
    path.write_bytes(data)
    uri = "data:audio/wav;base64," + base64.b64encode(data).decode()
    wanted = load_audio(data)
    assert (wanted.dtype, wanted.shape) == (np.float32, (8000,))
    for source in (
        path,
        str(path),
        f"file://{str(path).replace('#', '%23').replace(' ', '%20')}",
        bytearray(data),
        uri,
    ):
        assert np.array_equal(load_audio(source), wanted)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("WAV", {}, 1 / 32768),
        ("WAV", {"subtype": "PCM_24"}, 1e-6),
        ("WAV", {"subtype": "FLOAT"}, 0),
        ("WAV", {"subtype": "PCM_U8"}, 1 / 64),
        ("WAVEX", {}, 1 / 32768),
        ("RF64", {}, 1 / 32768),
        ("FLAC", {}, 1 / 32768),
        ("AIFF", {}, 1 / 32768),
        ("OGG", {}, 0.02),
        ("OGG", {"subtype": "OPUS"}, 0.05),
        ("MP3", {}, 0.02),
    ],
)
def test_formats(kind: str, options: dict[str, str], tolerance: float) -> None:
    samples = load_audio(encoded(kind=kind, **options))
    assert abs(len(samples) - 8000) <= 2400, "coders of blocks may add some"
    middle = slice(1000, 7000)
    assert np.abs(samples[middle] - tone()[middle]).max() <= tolerance


def test_samples_of_sixteen_bits_at_the_wanted_rate_stay_as_they_are() -> None:
    values = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    assert np.array_equal(load_audio(encoded(values)) * 32768, values)


def test_channels_are_averaged() -> None:
    channels = np.stack([tone(), np.zeros(8000, np.float32), -tone()], axis=1)
    assert np.abs(load_audio(encoded(channels[:, :2], subtype="FLOAT")) - tone() / 2).max() < 1e-7
    assert np.abs(load_audio(encoded(channels, subtype="FLOAT"))).max() < 1e-7


# -- rates


def test_another_rate_gives_the_samples_of_the_original(golden: Callable[[str], Path]) -> None:
    folder = golden("megrez-3b-omni")
    wanted = load_file(folder / "cases" / "audio_44k_stereo" / "tensors.safetensors")["waveform_int16_0"].astype(int)
    found = np.rint(load_audio(folder / "media" / "speech_44k1_stereo.wav") * 32768).astype(int)
    # Measured: one step of 16 bits in 21 of 40000 samples, where a half is rounded to the other side.
    assert np.abs(found - wanted).max() <= 1
    assert (found != wanted).mean() < 1e-3


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 44101, 48000, 96000])
def test_a_tone_keeps_its_pitch_and_its_strength(rate: int) -> None:
    found = resample(tone(1.0, rate), rate, RATE)
    assert len(found) == RATE
    middle = slice(300, -300)
    assert np.abs(found - tone(1.0))[middle].max() < 2e-5
    assert load_audio(encoded(tone(1.0, rate), rate)).shape == (RATE,)


def test_what_the_new_rate_cannot_hold_is_filtered_out() -> None:
    for pitch in (9000, 11000, 15000, 20000):
        assert np.abs(resample(tone(1.0, 48000, pitch), 48000, RATE)[300:-300]).max() < 1e-3, "no alias"


@pytest.mark.parametrize("samples", [0, 1, 2, 3, 50, 4095, 4097])
def test_short_sounds_change_their_rate_too(samples: int) -> None:
    found = resample(np.full(samples, 0.25, np.float32), 44100, RATE)
    assert len(found) == -(-samples * 160 // 441)
    assert np.allclose(found, 0.25), "a constant stays one up to its ends"
    assert load_audio(encoded(np.full(samples, 0.25), 44100)).shape == found.shape


# -- what cannot be opened


def test_files_that_are_no_sounds(tmp_path: Path) -> None:
    assert "directory" in failure(tmp_path).message
    assert "no such file" in failure(tmp_path / "missing.wav").message
    for data, reason in (
        (b"", "it is empty"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "not a sound"),
        (b"text", "not a sound"),
    ):
        assert reason in failure(data).message
    assert "broken sound" in failure(b"RIFF\x24\0\0\0WAVE" + b"\0" * 40).message
    assert "broken base64" in failure("data:audio/wav;base64,a").message
    assert "unknown scheme" in failure("ftp://x.org/a.wav").message


def test_damaged_files_are_sounds_or_media_errors() -> None:
    noise = np.random.default_rng(1)
    for kind in ("WAV", "FLAC", "OGG", "MP3", "AIFF"):
        data = encoded(tone(0.1), kind=kind)
        for _ in range(25):
            damaged = bytearray(data[: noise.integers(1, len(data) + 1)])
            for place in noise.integers(0, len(damaged), 4):
                damaged[place] = noise.integers(0, 256)
            try:
                samples = load_audio(bytes(damaged))
            except MediaError as error:
                assert error.hint
            else:
                assert np.isfinite(samples).all()


def test_limits_hold(tmp_path: Path) -> None:
    data = encoded()
    assert "longer than the limit of 0.4 seconds" in failure(data, MediaLimits(max_seconds=0.4)).message
    assert "larger than the limit" in failure(data, MediaLimits(max_bytes=1000)).message
    (tmp_path / "a.wav").write_bytes(data)
    assert "local files are not allowed" in failure(tmp_path / "a.wav", MediaLimits(allow_local=False)).message
    assert len(load_audio(data, MediaLimits(max_seconds=0.5))) == 8000
    compressed = encoded(np.zeros(40 * RATE), kind="FLAC")
    assert len(compressed) < 30_000
    assert "longer than the limit" in failure(compressed, MediaLimits(max_seconds=30)).message


def test_samples_are_limited_over_all_channels_whatever_the_rate() -> None:
    data = encoded(np.zeros((5000, 4)), 192_000, "FLAC")
    assert "more than the limit of 0.019 million samples" in failure(data, MediaLimits(max_samples=19_000)).message
    assert len(load_audio(data, MediaLimits(max_samples=20_000))) == 417


def test_the_memory_for_another_rate_does_not_grow_with_the_sound() -> None:
    long = np.ones(1_000_000, np.float32)
    resample(long[:20_000], 44_100, RATE)  # makes the filter
    tracemalloc.start()
    try:
        result = resample(long, 44_100, RATE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - result.nbytes < 12e6, "copies of the whole as float64 would take 22 MB"


@pytest.mark.parametrize("rate", [192_001, 767_999])
def test_a_rate_whose_filter_would_be_huge_is_refused(rate: int) -> None:
    assert "too unusual a rate" in failure(encoded(np.zeros(10), rate)).message


@pytest.mark.parametrize("rate", [1, 999, 800_000])
def test_rates_that_nobody_records_are_refused(rate: int) -> None:
    assert f"{rate} samples per second" in failure(encoded(np.zeros(10), rate)).message


def test_a_length_that_the_header_only_claims_costs_nothing() -> None:
    data = bytearray(encoded(np.zeros(10)))
    data[40:44] = struct.pack("<I", 2**31)
    assert len(load_audio(bytes(data))) == 10


def test_a_file_of_floats_that_are_no_numbers_gives_numbers() -> None:
    found = load_audio(encoded(np.array([0.5, np.nan, np.inf, -np.inf], np.float32), subtype="FLOAT"))
    assert found.tolist() == [0.5, 0.0, 1.0, -1.0]


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded()
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MMToolError, match="sounds need the package soundfile") as caught:
        load_audio(data)
    assert caught.value.hint == "pip install 'mmtool[audio]'"


def test_pictures_need_no_sound_library() -> None:
    script = "import sys, mmtool.media; print('soundfile' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("source", "sound"),
    [
        ("a.wav", True),
        (Path("b.Flac"), True),
        ("https://x.org/a.mp3?size=2", True),
        ("https://x.org/a.png?b=a.mp3", False),
        ("data:audio/ogg;base64,AA==", True),
        ("data:image/png;base64,AA==", False),
        ("wav", False),
        ("a.png", False),
        (b"fLaC....", True),
        (b"\x89PNG\r\n", False),
    ],
)
def test_what_looks_like_a_sound(source: object, sound: bool) -> None:
    assert looks_like_sound(source) is sound
