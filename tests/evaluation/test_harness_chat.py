"""Under `lm-eval` as people start it: chat templates as its own models apply them, and arguments of other models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import small_model

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import save_model

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; it is in the extra `harness`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from ttt_e2e.evaluation.harness import HarnessModel  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

BOS = "<|bos|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] | trim }}{{ bos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
TASK: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "test",
    "num_fewshot": 1,
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
}


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    tokenizer = Tokenizer.train(["red green blue fish bird tree"] * 3, 280)
    model = small_model(vocab_size=tokenizer.vocab_size, inner_loop__lr=0.3)

    def make(template: str | None) -> Path:
        folder = tmp_path_factory.mktemp("chat") / "model"
        save_model(model, folder, None)
        tokenizer.save(folder / "tokenizer.json")
        settings = {"bos_token": BOS, "eos_token": BOS} | ({} if template is None else {"chat_template": template})
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.fixture(scope="module")
def folder(make_folder: Callable[[str | None], Path]) -> Path:
    return make_folder(TEMPLATE)


def original(folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=BOS, eos_token=BOS, chat_template=TEMPLATE
    )


def say(*texts: str) -> list[dict[str, str]]:
    roles = ["system", *["user", "assistant"] * len(texts)]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@pytest.mark.parametrize("texts", [("be brief", "red?"), ("", "red", "fish ", "blue")])
def test_a_conversation_is_rendered_and_encoded_as_by_transformers(folder: Path, texts: tuple[str, ...]) -> None:
    lm, theirs = HarnessModel(str(folder)), original(folder)
    text = lm.apply_chat_template(say(*texts))
    assert text == theirs.apply_chat_template(say(*texts), tokenize=False, add_generation_prompt=True)
    assert lm.tok_encode(text) == theirs.encode(text, add_special_tokens=False)
    assert lm.tok_encode(text)[0] == lm.eot_token_id
    begun = [*say(*texts), {"role": "assistant", "content": " the answer is "}]
    expected = theirs.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == expected


def test_a_prompt_that_begins_with_bos_is_generated_from_as_without(folder: Path) -> None:
    lm = HarnessModel(str(folder))
    options = {"until": [], "max_gen_toks": 5}
    one, other = lm.generate_until(
        [Instance("generate_until", {}, (t, options), 0) for t in (BOS + "red", "red")], True
    )
    assert one == other


def test_a_template_without_system_messages_is_tried_without_them(make_folder: Callable[[str | None], Path]) -> None:
    lm = HarnessModel(str(make_folder(NO_SYSTEM)))
    assert lm.apply_chat_template(say("be brief", "red?")) == lm.apply_chat_template(say("be brief", "red?")[1:])
    with pytest.raises(UserError, match="no such role"):
        lm.apply_chat_template([{"role": "tool", "content": "x"}])


def test_a_model_without_template_is_refused(make_folder: Callable[[str | None], Path]) -> None:
    lm = HarnessModel(str(make_folder(None)))
    assert lm.chat_template(False) is None
    for call in (lambda: lm.chat_template(True), lambda: lm.apply_chat_template(say("", "red"))):
        with pytest.raises(UserError, match="has no chat template; leave --apply_chat_template out"):
            call()
    with pytest.raises(UserError, match="one chat template, not 'rag'"):
        lm.chat_template("rag")


def test_names_for_the_cache_of_requests_are_parts_of_file_names(folder: Path) -> None:
    assert "/" not in HarnessModel(str(folder)).tokenizer_name


@pytest.mark.parametrize("multiturn", [True, False])
def test_the_harness_itself_applies_the_template(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multiturn: bool
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"question": f"{word} or fish?", "answer": word} for word in ("red", "blue", "green")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    written = {"output_type": "generate_until", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3}}
    chosen = {"output_type": "multiple_choice", "doc_to_choice": ["red", "blue", "green"], "gen_prefix": "It is"}
    report = lm_eval.simple_evaluate(
        model="ttt-e2e",
        model_args=f"pretrained={folder},trust_remote_code=True,dtype=auto,batch_size=auto",
        device="cpu",
        tasks=[{"task": "written", **TASK, **files, **written}, {"task": "chosen", **TASK, **files, **chosen}],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        fewshot_as_multiturn=multiturn,
        system_instruction="be brief",
        bootstrap_iters=0,
        verbosity="ERROR",
        log_samples=True,
    )
    for task, end in (("written", "[assistant]"), ("chosen", "It is")):
        for sample in report["samples"][task]:
            prompt = sample["arguments"][0][0]
            assert prompt.startswith(f"{BOS}[system] be brief{BOS}\n[user]") and prompt.rstrip().endswith(end)
            assert prompt.count("[user]") == 1 + multiturn


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tokenizer": "gpt2"}, "takes no tokenizer=: its tokenizer is that in the folder"),
        ({"max_length": 2048}, "takes no max_length=: it reads texts of any length"),
        ({"peft": "x"}, "takes no peft=: it has pretrained, learn"),
        ({"add_bos_token": False}, "begins every text with BOS"),
        ({"dtype": "float16"}, "There is no dtype 'float16'"),
        ({"device": "mps"}, "mps"),
        ({"device": 7}, "'7'"),
        ({"batch_size": "auto:x"}, "batch_size must be a whole number"),
        ({"max_gen_toks": 0}, "max_gen_toks must be a whole number"),
        ({"max_gen_toks": "many"}, "max_gen_toks must be a whole number"),
    ],
)
def test_arguments_of_other_models_are_refused_in_words(folder: Path, options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        HarnessModel(**{"pretrained": str(folder), **options})


@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": True, "max_length": None, "tokenizer": None, "add_bos_token": True},
        {"batch_size": "auto:4", "max_batch_size": 64, "device": "cpu", "dtype": "auto", "max_gen_toks": "7"},
        {"batch_size": None, "dtype": "bfloat16", "device": "cuda:0"},
    ],
)
def test_arguments_that_the_harness_passes_are_accepted(folder: Path, options: dict) -> None:
    lm = HarnessModel(**{"pretrained": str(folder), **options})
    assert lm.batch_size == 16 and lm.max_gen_toks == int(options.get("max_gen_toks", 256))
