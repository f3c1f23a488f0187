"""experiments/corpus.py without its downloads."""

import gzip
import json

from experiments import corpus
from fp4jax.data.documents import BadLines, read_documents
from fp4jax.data.shards import find_shards


def paragraphs(text):
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]


def test_blocks_of_a_page_are_paragraphs():
    page = """<html><head><title>no</title><script>var no;</script></head><body><nav>no</nav><h1>A &amp; B</h1>
        <p>One <b>bold</b>
        line.</p><pre>x = 1
  y = 2</pre><footer>no</footer></body></html>"""
    assert paragraphs(corpus.text_of_html(page)) == ["A & B", "One bold line.", "x = 1\n  y = 2"]


def test_a_paragraph_stands_once_in_all_texts():
    deduplicated = corpus.Deduplicated()
    assert deduplicated("One.\n\nTwo.\n \nOne.") == "One.\n\nTwo."
    assert deduplicated("Three\nlines.\n\n Two. \n\n") == "Three\nlines."
    assert deduplicated("Three lines.") == "", "spaces make no other paragraph"


def test_interfaces_are_one_document_each(tmp_path):
    services = {
        "s3/2006/service-2.json.gz": "old",
        "s3/2010/service-2.json.gz": "<p>new</p>",
        "sqs/2012/other.json": "x",
    }
    for name, text in services.items():
        file = tmp_path / "botocore" / "data" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(gzip.compress(json.dumps({"operations": [{"documentation": text}]}).encode()))
    assert [(name, text.strip()) for name, text in corpus.aws_interfaces(tmp_path)] == [("s3", "new")]

    folder = tmp_path / "googleapiclient" / "discovery_cache" / "documents"
    folder.mkdir(parents=True)
    for name in ("drive.v2", "drive.v3", "gmail.v1"):
        nested = {"description": name, "methods": {"get": {"description": "Gets.", "parameters": [{"description": 3}]}}}
        (folder / f"{name}.json").write_text(json.dumps(nested))
    expected = {"drive": "drive.v2\n\nGets.\n\ndrive.v3\n\nGets.", "gmail": "gmail.v1\n\nGets."}
    assert dict(corpus.google_interfaces(tmp_path)) == expected


def test_pages_without_indexes_and_second_names(tmp_path):
    for name in ("a.html", "genindex.html", "sub/b.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"<p>{name}</p>")
    (tmp_path / "c.html").symlink_to("a.html")
    assert [name for name, _ in corpus.pages(tmp_path)] == ["a.html", "sub/b.html"]


def test_what_is_written_is_read_and_does_not_depend_on_the_order(
    tmp_path,
):
    records = [{"text": f"text {i}", "url": f"package:p/{i}", "metadata": {}} for i in range(40)]
    packages = [{"package": "p", "documents": 40, "characters": 270}]
    for folder, given in (("one", records), ("two", records[::-1])):
        (tmp_path / folder).mkdir()
        corpus.write(given, packages, tmp_path / folder)
    read = list(read_documents(find_shards(tmp_path / "one"), "text", BadLines(0.0)))
    assert sorted(document.text for document in read) == sorted(record["text"] for record in records)
    about = json.loads((tmp_path / "one" / "corpus.json").read_text())
    assert about["packages"] == packages and len(about["sha256"]) == corpus.SHARDS
    assert about == json.loads((tmp_path / "two" / "corpus.json").read_text())
