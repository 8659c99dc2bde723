"""Searching a notebook: by words, held against a plain loop; inside scripts without spaces; and by meaning."""

import itertools
import math
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_helpers import ANIMALS, SIZE, TEXT, contents, make_notebook

from ttt_e2e.errors import UserError
from ttt_e2e.retrieval.notebook import Notebook
from ttt_e2e.retrieval.search_index import load_embed, with_parts


def test_search_finds_passages_by_their_words(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n", size=SIZE) as notebook:
        assert notebook.search("heron") == []
        notebook.add(TEXT)
        for query in ("the OTTER on day 33?", "day 33"):
            best = notebook.search(query)[0]
            assert "On day 33 the otter" in best.text
            assert TEXT[best.start : best.stop] == best.text
            assert TEXT.encode()[best.start_byte : best.stop_byte].decode() == best.text
        found = notebook.search("heron curlew", 5)
        assert len(found) == 5 and [p.score for p in found] == sorted((p.score for p in found), reverse=True)
        assert all("heron" in p.text or "curlew" in p.text for p in notebook.search("heron curlew", 1000))
        assert notebook.search("unheard-of") == notebook.search("?!") == notebook.search("") == []
        with pytest.raises(UserError, match="at least one"):
            notebook.search("heron", 0)


def test_search_finds_text_added_later_and_the_last_passage(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n") as notebook:
        notebook.add("...")  # no word at all
        assert notebook.search("zebra") == []
        notebook.add(TEXT)
        assert notebook.search("zebra") == []
        notebook.add("Last came a zebra.")
        (found,) = notebook.search("zebra")
        assert found.stop == notebook.characters
        notebook.add("\n\n")
        assert [p.text for p in notebook.search("zebra")] == [found.text + "\n\n"]
        notebook.cut(found.stop - 6)
        assert notebook.search("zebra") == []


@pytest.mark.parametrize(
    ("text", "queries", "others"),
    [
        ("吾輩は猫である。東京都に住む。", "猫 東京 東京都 輩は猫で", "京東 犬 東京大学 は犬"),
        ("白鲸在海里。", "鲸 白鲸 在海里 白鲸在海里", "鲸白 黑鲸 白鲸在山里"),
        ("ライオンとｶﾞﾗｽ、か\u3099く。", "ライオン ガラス ｵﾝ がく", "イラ カラス かく"),
        ("แมวอยู่ในบ้านของฉัน", "แมว บ้าน ฉัน ของฉัน อ", "หมา บ้านแมว"),
        ("ແມວຢູ່ໃນເຮືອນ", "ແມວ ເຮືອນ", "ໝາ"),
        ("ឆ្មានៅក្នុងផ្ទះ", "ឆ្មា ផ្ទះ", "ឆ្កែ"),
        ("ကြောင်ကအိမ်ထဲမှာ", "ကြောင် အိမ်", "ခွေး"),
        ("서울에서 만나요.", "서울 에서 만나", "부산 울서"),
        (
            "Ünïcödé ﬁsh: CAFÉ, Łódź, Straße, ΟΔΟΣ, ｗｉｄｅ, e\u0301te\u0301",
            "unicode fish cafe LODZ STRASSE οδός wide été ete",
            "uni caf",
        ),
        ("हिन्दी में किताब। தமிழ் நூல்", "हिन्दी किताब தமிழ்", "हिन ह त"),
        ("שָׁלוֹם العَرَبِيَّة", "שלום العربية", "של"),
        ("Viet\u00adnam, day\u200bbreak, don't x_y", "Vietnam daybreak don x", "viet x1"),
    ],
)
def test_words_of_many_scripts_are_found(tmp_path: Path, text: str, queries: str, others: str) -> None:
    with Notebook(tmp_path / "n") as notebook:
        notebook.add(f"Before it. {text} After it.")
        for query in queries.split():
            assert notebook.search(query), query
        for query in others.split():
            assert not notebook.search(query), query


# -- against a plain loop ----------------------------------------------------------------------------------------------

# Characters, and what they are compared as: of words, of scripts without spaces, and of neither.
ACCENTED = dict(zip("AÁÉéßŁﬁ", ["a", "a", "e", "e", "ss", "l", "fi"], strict=True))
KEYWORDS = ["NEAR", "AND", "OR", "NOT", "entries"]
LETTERS = {c: c.lower() for c in "ab1٣क" + "".join(KEYWORDS)} | ACCENTED
NO_SPACES = dict(zip("猫東京ガ가ม", "猫東京ガ가ม", strict=True)) | {"ｶ\uff9e": "ガ"}
OTHERS = list(" .,'\"*^:()-+{}_、。\n\0")
PIECES = [*"ab1٣क", *ACCENTED, *NO_SPACES, *OTHERS]


def plain_words(text: str) -> list[str]:
    """Words, each a string of letters or a run of the other script, by the tables above."""
    words, last = [], ""
    for character in text.replace("ｶ\uff9e", "ガ"):
        kind = "letters" if character in LETTERS else "run" if character in NO_SPACES else ""
        folded = LETTERS.get(character) or NO_SPACES.get(character, "")
        if kind and kind == last:
            words[-1] += folded
        elif kind:
            words.append(folded)
        last = kind
    return words


def is_run(word: str) -> bool:
    return word[0] in NO_SPACES


def occurrences(word: str, words: list[str]) -> int:
    if not is_run(word):
        return words.count(word)
    return sum(other.startswith(word, i) for other in words for i in range(len(other)))


def plain_scores(query: str, texts: list[str]) -> list[float]:
    """BM25 as the documentation of FTS5 defines it, with k1 = 1.2 and b = 0.75."""
    documents = [plain_words(text) for text in texts]
    lengths = [sum(len(word) if is_run(word) else 1 for word in words) for words in documents]
    scores = [0.0] * len(texts)
    for word in dict.fromkeys(plain_words(query)):
        counts = [occurrences(word, words) for words in documents]
        with_word = sum(count > 0 for count in counts)
        idf = math.log((len(texts) - with_word + 0.5) / (with_word + 0.5))
        for i, count in enumerate(counts):
            norm = 1.2 * (0.25 + 0.75 * lengths[i] * len(texts) / max(1, sum(lengths)))
            scores[i] += max(idf, 1e-6) * count * 2.2 / (count + norm)
    return scores


@given(
    text=st.lists(st.sampled_from(PIECES), max_size=400).map("".join),
    queries=st.lists(st.lists(st.sampled_from([*PIECES, *KEYWORDS]), max_size=9).map("".join), min_size=1, max_size=8),
    count=st.integers(1, 30),
)
@settings(max_examples=40, deadline=None)
def test_search_finds_what_a_plain_loop_does(
    tmp_path_factory: pytest.TempPathFactory, text: str, queries: list[str], count: int
) -> None:
    folder = tmp_path_factory.mktemp("n")
    with Notebook(folder, size=20) as notebook:
        notebook.add(text)
        found = [notebook.search(query, count) for query in queries]
    with sqlite3.connect(folder / "notebook.db") as database:
        rows = database.execute("SELECT number, text FROM passages WHERE is_searched ORDER BY number").fetchall()
    database.close()
    for query, passages in zip(queries, found, strict=True):
        scores = plain_scores(query, [passage for _, passage in rows])
        expected = sorted((-score, number) for (number, _), score in zip(rows, scores, strict=True) if score > 0)
        assert [p.score for p in passages] == pytest.approx([-score for score, _ in expected[:count]], rel=1e-9)
        assert len({p.number for p in passages}) == len(passages)
        assert {p.number for p in passages} <= {number for _, number in expected}
        for one, following in itertools.pairwise(passages):
            assert (-one.score, one.number) < (-following.score, following.number)


@given(query=st.text(max_size=40) | st.text("\"*^:()-+{} ANDORETHelowrds'", max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_query_is_syntax(kept: Notebook, query: str) -> None:
    found = kept.search(query)
    if query.isascii():
        words = ["".join(c.lower() if c.isalnum() else " " for c in text).split() for text in (query, TEXT[:300])]
        assert bool(found) == bool(set(words[0]) & set(words[1]))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Notebook:
    return Notebook(make_notebook(tmp_path_factory.mktemp("kept") / "n", TEXT[:300]))


def test_searching_adds_to_the_index_and_does_not_make_it_anew(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n", size=SIZE) as notebook:
        statements: list[str] = []
        notebook._database.connection.set_trace_callback(statements.append)
        indexed = []
        for text in (TEXT, "", "One more sentence. ", ""):
            notebook.add(text)
            statements.clear()
            notebook.search("heron")
            indexed.append(sum(statement.startswith("INSERT INTO words") for statement in statements))
    assert indexed[1:] == [0, 1, 0] and indexed[0] < 64


def test_a_long_run_without_spaces_is_found_in_parts_for_a_prompt() -> None:
    assert with_parts("Who? 白鲸在哪里 ไป") == "Who? 白鲸在哪里 ไป 白鲸 鲸在 在哪 哪里 ไป"
    assert with_parts("no such script") == "no such script"


# -- by meaning --------------------------------------------------------------------------------------------------------


class Synonyms:
    """An embedding that knows that a polecat is what `polecat` says; it counts the texts."""

    def __init__(self, polecat: str = "weasel") -> None:
        self.polecat = polecat
        self.texts = 0

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.texts += len(texts)
        texts = [text.replace("polecat", self.polecat).replace("embedding", self.polecat) for text in texts]
        return np.array([[text.count(animal) for animal in ANIMALS] for text in texts])


def test_an_embedding_finds_passages_that_share_no_word(tmp_path: Path) -> None:
    folder, embed = make_notebook(tmp_path / "n"), Synonyms()
    with Notebook(folder) as notebook:
        assert notebook.search("polecat") == []
    with Notebook(folder, embed=embed) as notebook:
        found = notebook.search("polecat", 50)
        assert found and all("weasel" in p.text for p in found)
        assert found[0].score == pytest.approx(1 / 61)
        assert "day 36 the weasel" in notebook.search("polecat day 36", 1)[0].text  # words and meaning together
    with (
        Notebook(folder, embed=lambda texts: np.zeros(3)) as notebook,
        pytest.raises(UserError, match="one row per text"),
    ):
        notebook.search("polecat")
    with Notebook(tmp_path / "empty", embed=embed) as notebook:
        assert notebook.search("polecat") == []


def test_ranks_by_words_and_by_meaning_are_fused(tmp_path: Path) -> None:
    folder, embed = make_notebook(tmp_path / "n"), Synonyms()
    query = "polecat minutes 14 lake"
    with Notebook(folder) as notebook:
        by_words = [p.number for p in notebook.search(query, 1000)]
    with sqlite3.connect(folder / "notebook.db") as database:
        texts = dict(database.execute("SELECT number, text FROM passages WHERE is_searched"))
    database.close()
    wanted = embed([query])[0]
    cosines = {
        n: v @ wanted / max(1e-12, math.hypot(*v) * math.hypot(*wanted))
        for n, v in zip(texts, embed(list(texts.values())), strict=True)
    }
    by_meaning = [n for n in sorted(texts, key=lambda n: (-round(cosines[n], 5), n)) if cosines[n] > 0]
    scores: dict[int, float] = {}
    for ranking in (by_words, by_meaning):
        for rank, number in enumerate(ranking, 1):
            scores[number] = scores.get(number, 0.0) + 1 / (60 + rank)
    with Notebook(folder, embed=embed) as notebook:
        found = notebook.search(query, 1000)
    assert {p.number: p.score for p in found} == pytest.approx(scores)


def test_vectors_are_kept(tmp_path: Path) -> None:
    folder, embed, other = make_notebook(tmp_path / "n"), Synonyms(), Synonyms("otter")

    def embedded(embed: Synonyms, more: str = "") -> int:
        embed.texts = 0
        with Notebook(folder, embed=embed) as notebook:
            notebook.add(more)
            notebook.search("polecat")
        return embed.texts

    probe_and_query = 2
    every = embedded(embed) - probe_and_query
    assert every == len(contents(folder)[0])
    assert embedded(embed) == probe_and_query
    assert embedded(embed, "A weasel again, and again. " * 10) < probe_and_query + 8
    assert embedded(other) > every  # a different embedding
    assert embedded(other) == probe_and_query
    with sqlite3.connect(folder / "notebook.db") as database:
        database.execute("UPDATE passages SET vector = zeroblob(length(vector)) WHERE number = 3")
    database.close()
    with pytest.raises(UserError, match="altered"):
        embedded(other)


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model2vec", None)
    with pytest.raises(UserError, match="need model2vec: pip install"):
        load_embed(tmp_path)
