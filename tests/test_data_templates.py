"""Templates: the text they render, by hand, and that they reach nothing but the row."""

import pytest

from influence.data import Template, TextFormat, load, templates, tokenize
from tests import tokenizers_zoo as zoo

QUESTION = {"question": " 1 + 1? ", "choices": ["1", "2", "3"], "answer": 1}


@pytest.mark.parametrize("answer", [1, "B", "1"])
def test_the_shipped_multiple_choice(answer: int | str) -> None:
    text, target = templates.read("multiple_choice").render(QUESTION | {"answer": answer})
    assert text == "1 + 1?\nA. 1\nB. 2\nC. 3\nAnswer:"
    assert target == "B"


@pytest.mark.parametrize("answer", [3, -1, "D"])
def test_an_answer_beyond_the_choices_is_refused(answer: int | str) -> None:
    # a hidden label of -1 must not become the last choice
    with pytest.raises(ValueError, match=r"neither one of the 3 choices \['A', 'B', 'C'\] nor its number, 0 to 2"):
        templates.read("multiple_choice").render(QUESTION | {"answer": answer})


def test_choices_of_a_column() -> None:
    template = templates.parse("{doc_to_text: '{{ question }}', doc_to_target: answer, doc_to_choice: choices}")
    assert template.render(QUESTION) == (" 1 + 1? ", "2")


def test_a_target_that_is_true_or_false_is_a_choice() -> None:
    assert Template("q", "answer", ("no", "yes")).render({"answer": True}) == ("q", "yes")


def test_nothing_is_no_word() -> None:
    # not the word None, as Jinja has it
    assert Template("{{ a }}:", "b").render({"a": None, "b": None}) == (":", "")
    assert Template("q", "{{ b }}").render({"b": None}) == ("q", "")


def test_a_target_may_be_jinja() -> None:
    template = templates.parse("doc_to_text: 'q'\ndoc_to_target: ' {{ choices[answer] }}'")
    assert template.render(QUESTION) == ("q", " 2")


def test_a_template_is_compiled_once() -> None:
    # 6 ms a row otherwise, a hundred times the tokenizer's
    assert templates.compiled("{{ a }}") is templates.compiled("{{ a }}")


def test_a_file_of_the_user(tmp_path: object) -> None:
    path = f"{tmp_path}/mine.yaml"
    with open(path, "w") as file:
        file.write('doc_to_text: "{{ a }} {{ b }}"\n')
    got = tokenize(load([{"a": "hi", "b": "ok"}]), zoo.bpe(), TextFormat(template=path))
    assert got.ids.tolist() == [40, 43]


def test_prompt_and_target_are_two_turns() -> None:
    form = TextFormat(template=Template("{{ a }}", "b"))
    got = tokenize(load([{"a": "ok", "b": " yes"}]), zoo.bpe(chat=zoo.CHAT), form)
    assert got.ids.tolist() == [0, 3, 42, 5, 4, 46, 5]
    assert got.labels is not None
    assert got.labels.tolist() == [-100] * 5 + [46, 5]


def test_whitespace_at_the_end_is_text_too() -> None:
    assert Template("{{ a }}\n").render({"a": "hi"}) == ("hi\n", None)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ choices.append('x') }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(attack: str) -> None:
    with pytest.raises(ValueError, match="doc_to_text"):
        Template(attack).render(QUESTION)
    assert QUESTION["choices"] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("doc_to_text: '{{ a'", ("t: doc_to_text, line 1: unexpected end of template",)),
        ("doc_to_text: '{% if %}'", ("t: doc_to_text, line 1: Expected an expression",)),
        ("doc_to_text: a\ndoc_to_target: '{{ }'", ("t: doc_to_target, line 1",)),
        ("doc_to_text: a\ndoc_to_target: b\ndoc_to_choice: ['{{ x']", ("t: doc_to_choice, line 1",)),
        ("doc_to_text: [", ("t is no YAML: while parsing",)),
        ("- a", ("t must be a mapping with doc_to_text",)),
        ("doc_to_target: a", ("t must be a mapping with doc_to_text",)),
        ("doc_to_text: a\ndoc_to_answer: b", ("unknown fields doc_to_answer", "doc_to_target, doc_to_choice")),
        ("doc_to_text: a\ndoc_to_choice: [A]", ("doc_to_choice but no doc_to_target",)),
        ("doc_to_text: a\ndoc_to_target: b\ndoc_to_choice: 3", ("must be a list, Jinja or a column; got 3",)),
        ("doc_to_text: !!python/object/apply:os.system ['true']", ("t is no YAML",)),
    ],
)
def test_a_malformed_template_is_refused_before_any_row(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        templates.parse(text, "t")
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_a_name_that_the_row_lacks_is_named_with_the_row() -> None:
    with pytest.raises(ValueError, match=r"row 0: template: doc_to_text: 'b' is undefined; the row has a$"):
        tokenize(load([{"a": "hi"}]), zoo.bpe(), TextFormat(template=Template("{{ b }}")))
    with pytest.raises(ValueError, match="doc_to_target names the column 'b'; the row has a"):
        Template("{{ a }}", "b").render({"a": "hi"})


def test_no_such_template() -> None:
    with pytest.raises(FileNotFoundError, match=r"no template file mine; templates of the package: multiple_choice"):
        templates.read("mine")
