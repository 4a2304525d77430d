"""Published CSV layouts: what can be read is read as text, what cannot is refused by file, line and column."""

from __future__ import annotations

import pytest

from llmkit.errors import InputError
from llmkit.evaluation.csv_forms import read_split

CEVAL = "id,question,A,B,C,D,answer\n"
CMMLU = ",Question,A,B,C,D,Answer\n"
QUESTION = {"question": "q", "A": "1", "B": "2", "C": "3", "D": "4"}
CMMLU_DOC = {"Question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "B"}
CEVAL_DOC = {"id": "0", **QUESTION, "answer": "B", "explanation": ""}


def read(tmp_path, form, data):
    path = tmp_path / "odd.csv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_split(path, form, "anatomy")


def mmlu_doc(question="q", choices=("1", "2", "3", "4"), answer=0):
    return {"question": question, "subject": "anatomy", "choices": list(choices), "answer": answer}


READ = {
    "cells are text": (
        "mmlu",
        '"What, exactly?",0.50,None,1e3,"a ""b""",C\n',
        mmlu_doc("What, exactly?", ("0.50", "None", "1e3", 'a "b"'), 2),
    ),
    "a line break in a cell": ("mmlu", '"two\nlines",1,2,3,4,A\n', mmlu_doc("two\nlines")),
    "Windows line ends": ("mmlu", "q,1,2,3,4,A\r\n\r\n", mmlu_doc()),
    "old Macintosh line ends": ("mmlu", "q,1,2,3,4,A\r", mmlu_doc()),
    "a byte order mark": ("mmlu", "\ufeffq,1,2,3,4,A\n", mmlu_doc()),
    "a quoted byte order mark": ("mmlu", '\ufeff"q",1,2,3,4,A\n', mmlu_doc()),
    "quotes inside a bare cell": ("mmlu", 'a 5" pipe,1,2,3,4,A\n', mmlu_doc('a 5" pipe')),
    "no end of the last line": ("mmlu", "q,1,2,3,4,A", mmlu_doc()),
    "a small letter": ("mmlu", "q,1,2,3,4, d \n", mmlu_doc(answer=3)),
    "a wide letter": ("cmmlu", CMMLU + "0,q,1,2,3,4,Ｂ\n", CMMLU_DOC),
    "C-Eval": ("ceval", CEVAL + "0,q,1,2,3,4,B\n", CEVAL_DOC),
    "columns in another order": ("ceval", "answer,D,C,B,A,question,id\nB,4,3,2,1,q,0\n", CEVAL_DOC),
    "names in another case": ("ceval", "ID,Question,a,b,c,d,Answer\n0,q,1,2,3,4,B\n", CEVAL_DOC),
    "further columns": ("ceval", "id,question,A,B,C,D,answer,source\n0,q,1,2,3,4,B,x\n", CEVAL_DOC),
    "an explanation": ("ceval", CEVAL[:-1] + ",explanation\n0,q,1,2,3,4,B,e\n", CEVAL_DOC | {"explanation": "e"}),
    "CMMLU without its index": ("cmmlu", CMMLU[1:] + "q,1,2,3,4,B\n", CMMLU_DOC),
}


@pytest.mark.parametrize("name", READ)
def test_what_can_be_read_is_read_rightly(tmp_path, name):
    form, data, doc = READ[name]
    split = read(tmp_path, form, data)
    assert (split.docs, split.is_labelled, split.repeated, split.empty) == ([doc], True, [], [])


ICONV = "iconv -f {} -t UTF-8"
REFUSED = {
    "too few cells": (
        "mmlu",
        'q,1,2,3,4,A\n"a\nb",1,2,3,B\n',
        "line 2: 5 cells, expected 6 (question, A, B, C, D, answer)",
        "quoted",
    ),
    "semicolons": ("mmlu", "q;1;2;3;4;A\n", "line 1: 1 cell, expected 6", "its cells stand between semicolons"),
    "five choices": ("mmlu", "q,1,2,3,4,5,A\n", "line 1: 7 cells, expected 6", "four choices"),
    "five choices under a header": (
        "ceval",
        "id,question,A,B,C,D,E,answer\n",
        "line 1, column 7: a fifth choice, E",
        None,
    ),
    "a wrong letter": (
        "mmlu",
        '"a\nb",1,2,3,4,A\nq,1,2,3,4,E\n',
        "line 3, column 6 (answer): the answer is 'E', expected A, B, C or D",
        None,
    ),
    "a number for a letter": ("cmmlu", CMMLU + "0,q,1,2,3,4,2\n", "line 2, column 7 (Answer): the answer is '2'", None),
    "an empty question": ("cmmlu", CMMLU + "0, ,1,2,3,4,B\n", "line 2, column 2 (Question): the cell is empty", None),
    "one empty answer": (
        "ceval",
        CEVAL + "0,q,1,2,3,4,A\n1,r,1,2,3,4,\n",
        "line 3, column 7 (answer): the answer is ''",
        None,
    ),
    "an id twice": (
        "ceval",
        CEVAL + "0,q,1,2,3,4,A\n0,r,1,2,3,4,B\n",
        "line 3, column 1 (id): the id 0 is also that of line 2",
        "number",
    ),
    "a header where none belongs": (
        "mmlu",
        "question,A,B,C,D,answer\n",
        "line 1: a header (question, A, B, C, D, answer)",
        "delete the line",
    ),
    "no header": ("ceval", "0,q,1,2,3,4,A\n", "line 1: no header; found 0, q, 1", "id,question,A,B,C,D,answer"),
    "a column missing": ("ceval", "id,question,A,B,C,answer\n", "line 1: the header lacks D", "begin with the line"),
    "a column twice": (
        "ceval",
        "id,question,A,B,C,D,A,answer\n",
        "line 1: the header names A twice",
        "begin with the line",
    ),
    "an empty file": ("cmmlu", "", "odd.csv: empty", ",Question,A,B,C,D,Answer"),
    "an open quote": (
        "mmlu",
        'q,1,2,3,4,A\n"r,1,2,3,4,B\ns,1,2,3,4,C\n',
        "line 2: a quote that is opened in this row is never closed",
        None,
    ),
    "GB18030": (
        "ceval",
        (CEVAL + "0,下列关于税法基本原则的表述,一,二,三,四,B\n").encode("gb18030"),
        "the file is in GB18030",
        ICONV.format("GB18030"),
    ),
    "UTF-16": (
        "ceval",
        (CEVAL + "0,税法,一,二,三,四,B\n").encode("utf-16"),
        "the file is in UTF-16, expected UTF-8",
        ICONV.format("UTF-16"),
    ),
    "UTF-16 without a mark": (
        "ceval",
        (CEVAL + "0,税法,一,二,三,四,B\n").encode("utf-16-be"),
        "the file is in UTF-16BE",
        ICONV.format("UTF-16BE"),
    ),
    "Latin-1": (
        "mmlu",
        "q,1,2,3,4,A\ncafé é,1,2,3,4,A\n".encode("latin-1"),
        "line 2, byte 4: not UTF-8 (0xe9)",
        "UTF-8",
    ),
    "a NUL byte": ("mmlu", "q,1,2,3,4,A\nq\0,1,2,3,4,A\n", "line 2, byte 2: a NUL byte", "damaged"),
    "a zip archive": ("mmlu", b"PK\x03\x04rest", "a zip archive, not a CSV file", "unpack"),
    "a Parquet file": ("mmlu", b"PAR1rest", "a Parquet file, not a CSV file", None),
    "a Git LFS pointer": (
        "mmlu",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a Git LFS pointer",
        "lfs pull",
    ),
    "an HTML page": ("mmlu", "\n<!DOCTYPE html>\n<html><body>404</body></html>\n", "an HTML page saved as .csv", "raw"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, name):
    form, data, message, hint = REFUSED[name]
    with pytest.raises(InputError) as caught:
        read(tmp_path, form, data)
    assert message in caught.value.message
    assert str(tmp_path / "odd.csv") in caught.value.message
    assert "\n" not in caught.value.message + (caught.value.hint or "")
    assert hint is None or hint in caught.value.hint


def test_a_question_may_be_longer_than_pythons_reader_takes_at_first(tmp_path):
    assert len(read(tmp_path, "mmlu", f"{'q' * 200_000},1,2,3,4,A\n").docs[0]["question"]) == 200_000
    with pytest.raises(InputError, match="line 2: a quote that is opened in this row is never closed"):
        read(tmp_path, "mmlu", f'q,1,2,3,4,A\n"{"r,1,2,3,4,A" * 20_000}\n')


def test_the_conversion_that_a_refusal_names_makes_the_file_readable(tmp_path):
    import subprocess

    for encoding in ("gb18030", "utf-16"):
        with pytest.raises(InputError) as caught:
            read(tmp_path, "ceval", (CEVAL + "0,税法的基本原则,一,二,三,四,B\n").encode(encoding))
        subprocess.run(caught.value.hint, shell=True, check=True, cwd=tmp_path)
        assert read_split(tmp_path / "odd.csv", "ceval", "law").docs[0]["question"] == "税法的基本原则"


def test_odd_questions_that_can_be_scored_are_named(tmp_path):
    split = read(tmp_path, "mmlu", "q,1,2,3,4,A\nr,1,,3,4,A\nq,1,2,3,4,B\nq,1,2,3,5,B\n")
    assert (split.repeated, split.empty, len(split.docs)) == (["line 3"], ["line 2"], 4)


def test_a_split_without_answers_is_known(tmp_path):
    for data in (CEVAL + "0,q,1,2,3,4,\n1,r,1,2,3,4,\n", "id,question,A,B,C,D\n0,q,1,2,3,4\n"):
        split = read(tmp_path, "ceval", data)
        assert not split.is_labelled
        assert {doc["answer"] for doc in split.docs} == {""}


def test_a_file_that_is_absent(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_split(tmp_path / "none.csv", "mmlu", "s")
    with pytest.raises(InputError, match="no regular file"):
        read_split(tmp_path, "mmlu", "s")
