"""Train the small SentencePiece tokenizer of the tiny model on generated questions, answers and ordinary sentences."""

from __future__ import annotations

import json
import random
from pathlib import Path

import sentencepiece as spm
from pictures import WORDS, make_picture
from questions import SYSTEM_PROMPTS, next_turn

PAD, END, SYSTEM, USER, ASSISTANT, IMAGE = 1, 2, 3, 4, 5, 6
CONTROL = ["<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|audio|>"]
CONTROL += [f"<|reserved{i}|>" for i in range(8)]

ENGLISH = """
The quick brown fox jumps over the lazy dog. I would like to know more about this.
Could you please help me with something? This is a test of the model, and it should work well.
We are going to the park in the morning. She said that they were happy. He has been working on it for a long time.
There is nothing to worry about. Do you know where the house is? I think so too.
It was a very good day, because the sun was shining. Let me show you how to use it. What do you want to do next?
Not now, thanks. Please write a short story about a cat and a dog. Can you explain why this happens?
The answer is not what I expected. When will the train arrive? My friend lives in a big city.
People often ask the same question. Open the window and close the door. You should try again later.
The weather is nice today, but it may rain tomorrow. How long does it take? I don't understand it.
Which one is the best? Give me an example. Is this correct? I have two brothers and one sister.
They have been here before. The picture has a large object next to a small one.
Look at this photo and tell me what you think. Who made it and when?
Write some code in Python that prints hello world. Translate the following sentence. Summarise the text above.
Continue, please.
"""
CHINESE = """
今天天气很好，我们去公园玩吧。请帮我写一个简单的故事。你觉得这个问题的答案是什么？我不知道应该怎么做。他们已经来过这里了。
这是一个测试，模型应该能正常工作。我想了解更多的信息。能不能告诉我为什么会这样？谢谢你的帮助，再见。我的朋友住在一个大城市里。
时间过得真快，现在已经是晚上了。请把下面的句子翻译成英文。你喜欢什么样的音乐？她说她很高兴。我们明天早上一起去学校。
这两个有什么不同？哪一个更好？请再说一遍。没有关系，不用担心。中国有很多美丽的地方。他在家里看书，我在外面工作。
上面的图片和下面的图片一样吗？大的在左边，小的在右边。前面有一个人，后面有一只猫。请继续写下去。可以用简单的话说明吗？
一二三四五六七八九十百千万，年月日时分秒。东南西北，春夏秋冬。爸爸妈妈，老师学生。吃饭喝水，走路开车，学习生活。
"""


def corpus(seed: int, turns: int = 30000) -> list[str]:
    """Return the sentences to train on: generated turns, prompts, words and ordinary text."""
    rng = random.Random(seed)
    lines: list[str] = []
    for _ in range(turns // 10):
        kind = rng.choice(("shapes", "shapes", "shapes", "digits", "word", "sum", "blank"))
        scene = make_picture(rng, kind)[1] if rng.random() < 0.9 else None
        for _ in range(10):
            turn = next_turn(rng, scene, rng.choice(("en", "zh")), None)
            lines += [turn.question, turn.answer.replace(turn.spell, "") if turn.spell else turn.answer]
    ordinary = [s for s in (ENGLISH + CHINESE).replace("。", "。\n").replace(". ", ".\n").splitlines() if s]
    return lines + 60 * ordinary + 20 * list(WORDS) + 40 * list(SYSTEM_PROMPTS)


def train_tokenizer(folder: Path, vocab_size: int = 1200, seed: int = 20) -> None:
    """Write tokenizer.model and the files that describe it."""
    folder.mkdir(parents=True, exist_ok=True)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(seed)),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        unk_id=0,
        unk_piece="<unk>",
        bos_id=-1,
        eos_id=2,
        eos_piece="<|end|>",
        pad_id=1,
        pad_piece="<|pad|>",
        control_symbols=CONTROL,
        user_defined_symbols=["\n"],
        required_chars="".join(chr(c) for c in range(33, 127)),
        num_threads=1,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    added = [(0, "<unk>"), (1, "<|pad|>"), (2, "<|end|>"), *((i + 3, piece) for i, piece in enumerate(CONTROL))]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {str(i): {"content": piece, **flags} for i, piece in added},
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|end|>",
            "legacy": True,
            "model_max_length": 2048,
            "pad_token": "<|pad|>",
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )
    write_json(
        folder / "special_tokens_map.json", {"eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": "<unk>"}
    )
    write_json(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": END,
            "max_new_tokens": 128,
            "pad_token_id": PAD,
        },
    )


def write_json(path: Path, value: object) -> None:
    """Write a JSON file with sorted-as-given keys, two spaces of indent and a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> spm.SentencePieceProcessor:
    """Open the tokenizer of a checkpoint folder."""
    return spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def encode_answer(sp: spm.SentencePieceProcessor, answer: str, spell: str = "") -> list[int]:
    """Tokenise an answer; `spell`, a word read from a picture, is written letter by letter."""
    if not spell or spell not in answer:
        return sp.encode(answer)
    before, after = answer.split(spell, 1)
    return sp.encode(before) + [i for letter in spell for i in sp.encode(letter)] + (sp.encode(after) if after else [])


if __name__ == "__main__":
    train_tokenizer(Path(__file__).parent / "runs" / "tokenizer")
