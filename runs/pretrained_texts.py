"""The texts of `reproduce pretrained`: books, and the sources of Python packages.

    python runs/pretrained_texts.py BOOKS OUT [--code-chars N] [--books N] [--skip-code N] [--skip-books N] ...

BOOKS holds train-00.parquet and val.parquet (docs/tutorials/train.md says what they are). The packages are downloaded
with pip, pinned, without what they depend on. OUT/train and OUT/val get a folder `books` and a folder `code`: a file
for every book and every package. A package is its modules one after the other, by path, each below a comment with its
path; tests, vendored modules and tables of data are left out.
"""

import argparse
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq

TRAIN = (
    *("requests==2.32.3", "flask==3.0.3", "jinja2==3.1.4", "click==8.1.7", "httpx==0.27.2", "pydantic==2.9.2"),
    *("sqlalchemy==2.0.35", "sympy==1.13.3", "pygments==2.18.0", "docutils==0.21.2", "fastapi==0.115.0"),
    *("starlette==0.38.6", "mypy==1.11.2", "django==5.1.2", "werkzeug==3.0.4", "tornado==6.4.1", "matplotlib==3.9.2"),
    *("scipy==1.14.1", "pandas==2.2.3", "sphinx==8.0.2"),
)
VAL = (
    *("black==24.10.0", "networkx==3.4.1", "rich==13.9.4", "pytest==8.3.3", "hypothesis==6.115.0", "aiohttp==3.10.8"),
    *("xarray==2024.9.0", "dask==2024.9.1", "celery==5.4.0", "nltk==3.9.1", "trio==0.26.2", "twisted==24.7.0"),
    *("seaborn==0.13.2", "peewee==3.17.6", "ipython==8.28.0", "setuptools==75.1.0"),
)
SKIP = 5000  # characters at the beginning of a book: titles, contents, prefaces


def modules(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The Python files of a wheel or a source archive, by path."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(".py"):
                    yield name, wheel.read(name)
    else:
        with tarfile.open(archive) as sources:
            for member in sorted(sources.getmembers(), key=lambda member: member.name):
                file = sources.extractfile(member) if member.name.endswith(".py") else None
                if file is not None:
                    yield member.name, file.read()


def package_text(pinned: str) -> str:
    """The source of a package as one text."""
    parts = []
    with TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, pinned]
        subprocess.run(pip, check=True)
        [archive] = Path(folder).iterdir()
        for name, content in modules(archive):
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            is_data = len(text) > 80 * (text.count("\n") + 1)
            if len(content) >= 500 and "/tests/" not in name and "/_vendor/" not in name and not is_data:
                parts.append(f"# {name}\n{text}\n")
    return "".join(parts)


def main() -> None:
    """Write the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parquet", type=Path, metavar="BOOKS")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--code-chars", type=int, default=450_000, help="of a package to train on (default: 450,000)")
    parser.add_argument("--book-chars", type=int, default=134_000, help="of a book to train on (default: 134,000)")
    parser.add_argument("--books", type=int, default=80, help="to train on (default: 80)")
    parser.add_argument("--skip-code", type=int, default=0, help="characters of a package to leave out (default: 0)")
    parser.add_argument("--skip-books", type=int, default=0, help="books to leave out (default: 0)")
    args = parser.parse_args()
    for split, pins, skip_code, code_chars, skip_books, books, book_chars in (
        ("train", TRAIN, args.skip_code, args.code_chars, args.skip_books, args.books, args.book_chars),
        ("val", VAL, 0, 140_000, 0, 16, 160_000),
    ):
        code, prose = args.out / split / "code", args.out / split / "books"
        for folder in (code, prose):
            folder.mkdir(parents=True, exist_ok=True)
        for pinned in pins:
            (code / f"{pinned.partition('==')[0]}.py").write_text(package_text(pinned)[skip_code:][:code_chars])
            print(pinned, flush=True)
        file = args.parquet / ("train-00.parquet" if split == "train" else "val.parquet")
        texts = pq.read_table(file, columns=["text"]).column("text").to_pylist()
        for i, text in enumerate(texts[skip_books:][:books], skip_books):
            (prose / f"{i:03}.txt").write_text(text[SKIP : SKIP + book_chars])


if __name__ == "__main__":
    main()
