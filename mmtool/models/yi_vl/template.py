"""The Yi-VL chat format: `### Human:` and `### Assistant:` in plain text, pictures in front of a question."""

from __future__ import annotations

from mmtool.template.base import Template
from mmtool.template.formats import ChatFormat


class YiVLTemplate(Template):
    """Prompts of the yi-vl models; every message ends with the ``###`` that opens the next one.

    Source: the VL folder of the authors' repository, 01-ai/Yi. Nothing is stripped, no BOS or EOS is written, and text
    runs whole between pictures, because the question's first word shares a token with the space before it.
    """

    template_type = "yi-vl"
    default_system = (
        "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. "
        "Read all the images carefully, and respond to the human's questions with informative, helpful, detailed "
        "and polite answers. "
        "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
        "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
    )
    stop_words = ("###",)
    chat_format = ChatFormat(
        system=("", "\n\n"),
        begin="###",
        user=(" Human: ", "\n###"),
        assistant=" Assistant:",
        answer=(" ", "\n###"),
        media_end="\n",
    )

    def text_ids(self, text: str) -> list[int]:
        """Tokenise text as the release does.

        A ``<|endoftext|>`` or ``<|im_end|>`` that somebody typed becomes that token, since the release does not tell
        them apart (golden case ``inject_special_tokens``). No text becomes the picture placeholder, which is a control
        piece of the SentencePiece model.
        """
        return self.tokenizer.encode(text, add_special_tokens=False)
