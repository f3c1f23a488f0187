"""Local files of task documents: what is read, and what is refused with the line that is wrong."""

import ast
import json
from pathlib import Path

import pytest

from fp4jax.evaluation.task_data import TASKS, check_files, check_tasks, read_documents

RACE = Path(__file__).parent / "files" / "race.jsonl"


def write(path, *documents):
    path.write_text("".join(f"{json.dumps(document, ensure_ascii=False)}\n" for document in documents))
    return path


def test_documents_are_read_as_they_are(tmp_path):
    documents = [{"text": "one\u2028two words"}, {"text": "three", "more": 1}]  # U+2028 ends no line of JSON lines
    assert read_documents("lambada_openai", write(tmp_path / "lambada_openai.jsonl", *documents)) == documents


def test_questions_of_race_are_put_together_by_article():
    rows = [json.loads(line) for line in RACE.read_text().splitlines()]
    articles = read_documents("race", RACE)
    assert len(rows) == 8 and len(articles) == 4
    problems = [problem for article in articles for problem in ast.literal_eval(article["problems"])]
    assert problems == [{key: row[key] for key in ("question", "options", "answer")} for row in rows]
    assert [article["article"] for article in articles] == [row["article"] for row in rows[::2]]


def test_race_may_have_lm_evals_own_schema(tmp_path):
    articles = read_documents("race", RACE)
    assert read_documents("race", write(tmp_path / "race.jsonl", *articles)) == articles


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"goal": "", "sol1": "", "sol2": "", "label": 0}\n{"goal": ""}', "line 2 has goal; a document of piqa has"),
        ('{"goal": \n', "line 1 is not JSON"),
        ("[1]\n", "line 1 has a list"),
        ("\n", "holds no document"),
    ],
)
def test_a_wrong_file_is_refused(text, message, tmp_path):
    path = tmp_path / "piqa.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_documents("piqa", path)
    assert "\n" not in str(raised.value)


def test_missing_files_and_unknown_tasks_are_listed(tmp_path):
    (tmp_path / "piqa.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"has no arc_easy.jsonl, race.jsonl: `make eval-data` writes all but race"):
        check_files(["piqa", "arc_easy", "race"], tmp_path)
    with pytest.raises(ValueError, match=f"unknown task 'mmlu'; accepted: {','.join(TASKS)}"):
        check_tasks(["piqa", "mmlu"])
    with pytest.raises(ValueError, match="piqa.jsonl cannot be read: No such file"):
        read_documents("piqa", tmp_path / "none" / "piqa.jsonl")
