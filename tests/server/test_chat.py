"""Chat formats without a model. Templates of real models: tests/inference/test_pretrained_metadata.py."""

from ttt_e2e.inference.load import ChatTemplate
from ttt_e2e.server.chat import ChatFormat

TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello {{ 7 * 7 }}"}]


def test_plain_format() -> None:
    chat = ChatFormat()
    assert chat.prompt(TALK, continues=False) == ["System: Be kind.\nUser: Hello {{ 7 * 7 }}\nAssistant:"]
    assert chat.prompt(TALK[1:], continues=True) == ["\nUser: Hello {{ 7 * 7 }}\nAssistant:"]
    assert chat.stop == ("\nUser:",)


def test_closing_is_what_the_template_puts_after_an_answer() -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    source += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    chat = ChatFormat(ChatTemplate(source, "", ""), {"<|im_start|>": 7, "<|im_end|>": 8})
    assert chat.closing(TALK) == [8, "\n"] and ChatFormat().closing(TALK) == []
    assert ChatFormat(ChatTemplate("{{ messages[0].content }}", "", "")).closing(TALK) == []
