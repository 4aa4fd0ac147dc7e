"""The world of the demo keeps what it promises, whatever the seed."""

from collections import Counter

import pytest

from notebooks.facts import FUNCTION_WORDS, RELATIONS, SYLLABLES, World, content, make_world

SEEDS = (0, 1, 2, 3, 4, 100, 101)


@pytest.fixture(scope="module", params=SEEDS)
def world(request: pytest.FixtureRequest) -> World:
    return make_world(request.param)


def test_a_few_thousand_different_documents_and_two_questions_about_each_of_half_of_the_people(world: World) -> None:
    texts = [document.text for document in world.documents]
    assert len(texts) == len(set(texts)) == 120 * 6 * 4 + 60 * 6
    assert len(world.questions) == 120
    assert set(Counter(question.name for question in world.questions).values()) == {2}
    assert len({(question.name, question.relation) for question in world.questions}) == 120


def test_gold_is_the_paraphrases_of_the_fact_and_no_other_document_states_it(world: World) -> None:
    for question in world.questions:
        values = {told for told, asked in RELATIONS[question.relation].values if asked == question.answer}
        (value,) = values
        tellings = {
            telling.format(name=question.name, value=value) for telling in RELATIONS[question.relation].tellings
        }
        assert {world.documents[number].text for number in question.gold} == tellings
        stating = {n for n, d in enumerate(world.documents) if {question.name, value} <= content(d.text)}
        assert stating == set(question.gold)


def test_a_question_shares_its_persons_name_and_no_other_content_word_with_its_gold(world: World) -> None:
    for question in world.questions:
        asked = content(f"{question.prompt} {question.answer}")
        for number in question.gold:
            assert asked & content(world.documents[number].text) == {question.name}
            assert not set(question.prompt.split()) & set(world.documents[number].text.split()) - {question.name}


def test_at_least_five_distractors_have_the_name(world: World) -> None:
    for question in world.questions:
        named = {n for n, document in enumerate(world.documents) if question.name in document.text.split()}
        assert len(named - set(question.gold)) == 20


def test_no_document_asks_about_a_person_whom_the_questions_are_about(world: World) -> None:
    asked = {question.name for question in world.questions}
    assert not asked & {document.name for document in world.documents if document.asks}
    assert len({document.name for document in world.documents if document.asks}) == 60


def test_sixty_documents_ask_the_very_same_of_somebody_else(world: World) -> None:
    for question in world.questions:
        wording = content(question.prompt) - {question.name}
        alike = [n for n, document in enumerate(world.documents) if wording <= content(document.text)]
        assert wording
        assert len(alike) == 60
        assert not set(alike) & set(question.gold)


def test_no_word_means_two_things() -> None:
    values = [word for relation in RELATIONS.values() for pair in relation.values for word in pair]
    assert len(values) == len(set(values)) == 120
    told = [
        content(telling.format(name="", value="")) for relation in RELATIONS.values() for telling in relation.tellings
    ]
    asked = [content(relation.question.format(name="", answer="")) for relation in RELATIONS.values()]
    for relation, words in zip(RELATIONS, asked, strict=True):
        assert words, relation
        assert not words & set().union(*told, *(other for other in asked if other is not words), values)
    names = {f"{a}{b}" for a in SYLLABLES for b in SYLLABLES if a != b}
    assert not names & (set(values) | set().union(*told, *asked) | FUNCTION_WORDS)


def test_a_seed_draws_one_world_and_another_seed_another() -> None:
    assert make_world(7) == make_world(7)
    assert make_world(7).documents != make_world(8).documents
