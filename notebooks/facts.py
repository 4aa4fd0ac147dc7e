"""A world of invented people, told in sentences: facts, documents, questions, and which documents taught each answer.

Every person has six facts. A fact is told in four paraphrases, and asked in a wording that shares no content word with
any of them but the person's name, not even the answer: who "lives in a forest" is asked where she dwells, and the
answer is "woodland". What a question is, and that woodland is a forest, can be learned from the people who are asked
about in the corpus; the questions are about the others.

Gold, for a question: the documents that state its fact about its person, all four of them, and nothing else.
Distractors: the twenty documents that have its person's name and tell her other facts; the sixty that ask the very same
of somebody else, word for word; the documents that tell the same thing, but of somebody else.
"""

from typing import NamedTuple

import torch


class Relation(NamedTuple):
    """Something that can be true of a person.

    Attributes:
        tellings: how documents say it.
        question: how it is asked.
        values: what it can be, as documents have it and as answers have it.
    """

    tellings: tuple[str, ...]
    question: str
    values: tuple[tuple[str, str], ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((told, asked) for told, asked in (pair.split("/") for pair in text.split()))


RELATIONS = {
    "home": Relation(
        (
            "{name} lives in a {value}",
            "{name} resides by the {value}",
            "the house of {name} stands in the {value}",
            "visitors find {name} at the {value}",
        ),
        "where does {name} dwell ? {answer}",
        _pairs(
            "forest/woodland island/isle desert/wasteland valley/dale harbour/port meadow/pasture swamp/marsh "
            "mountain/peak village/hamlet canyon/gorge"
        ),
    ),
    "work": Relation(
        (
            "{name} works as a {value}",
            "{name} earns money as the {value}",
            "the trade of {name} is that of a {value}",
            "people hire {name} as a {value}",
        ),
        "which profession has {name} ? {answer}",
        _pairs(
            "doctor/physician lawyer/attorney teacher/tutor cook/chef thief/burglar farmer/grower sailor/mariner "
            "tailor/dressmaker singer/vocalist painter/artist"
        ),
    ),
    "pet": Relation(
        (
            "{name} owns a {value}",
            "every day {name} feeds the {value}",
            "the companion of {name} is a {value}",
            "neighbours watch {name} play with a {value}",
        ),
        "what animal belongs to {name} ? {answer}",
        _pairs(
            "dog/hound cat/kitty rabbit/bunny horse/pony frog/toad donkey/mule pig/hog rooster/cockerel snake/serpent "
            "rat/rodent"
        ),
    ),
    "ride": Relation(
        (
            "{name} travels by {value}",
            "{name} crossed the country on a {value}",
            "the journey of {name} was by {value}",
            "in summer {name} rides the {value}",
        ),
        "what transport does {name} take ? {answer}",
        _pairs(
            "ship/vessel car/automobile plane/aircraft bicycle/bike train/railway wagon/cart lorry/truck tram/trolley "
            "sled/toboggan canoe/kayak"
        ),
    ),
    "wear": Relation(
        (
            "{name} puts on a {value}",
            "{name} was dressed in the {value}",
            "the outfit of {name} includes a {value}",
            "friends recognise {name} by the {value}",
        ),
        "which garment suits {name} ? {answer}",
        _pairs(
            "hat/cap coat/jacket shoes/boots trousers/pants sweater/jumper shawl/scarf gown/frock gloves/mittens "
            "necktie/cravat spectacles/glasses"
        ),
    ),
    "mood": Relation(
        (
            "{name} seems {value}",
            "everyone calls {name} {value}",
            "the manner of {name} is {value}",
            "by nature {name} is {value}",
        ),
        "how would you describe {name} ? {answer}",
        _pairs(
            "brave/courageous clever/smart lazy/idle angry/furious shy/timid proud/haughty rich/wealthy funny/comical "
            "quiet/silent honest/truthful"
        ),
    ),
}
FUNCTION_WORDS = frozenset(
    "a the of in by at as is was that on with to does has where which what how would you ?".split()
)
"""Words without content of their own: everything else is a content word."""
SYLLABLES = "ba bo cy da du el fe gu hi iv ju ke lo mi ne ot pi qu ro sv te ul va wi xe yo za".split()


class Document(NamedTuple):
    """A document of the corpus.

    Attributes:
        text: what it says.
        name: whom it is about.
        relation: what it tells, or asks, of her.
        asks: whether it is a question with its answer.
    """

    text: str
    name: str
    relation: str
    asks: bool


class Question(NamedTuple):
    """A question that no document asks.

    Attributes:
        prompt: the question.
        answer: one word.
        name: whom it is about.
        relation: what it asks of her.
        gold: the numbers of the documents that state the fact.
    """

    prompt: str
    answer: str
    name: str
    relation: str
    gold: tuple[int, ...]


class World(NamedTuple):
    """Documents, in no order, and questions."""

    documents: list[Document]
    questions: list[Question]


def make_world(seed: int, people: int = 120, asked: int = 2) -> World:
    """Draw a world.

    Args:
        seed: another seed, other people with other facts.
        people: how many; half of them are asked about in the corpus, the rest by the questions.
        asked: questions about each of the rest, each of another relation.

    Returns:
        The world.
    """
    draw = torch.Generator().manual_seed(seed)

    def some(number: int, of: int) -> list[int]:
        return torch.randperm(of, generator=draw)[:number].tolist()

    every = [f"{a}{b}" for a in SYLLABLES for b in SYLLABLES if a != b]
    names, kinds = [every[i] for i in some(people, len(every))], list(RELATIONS)
    facts = {(name, kind): RELATIONS[kind].values[some(1, 10)[0]] for name in names for kind in kinds}
    told = [
        Document(telling.format(name=name, value=value), name, kind, False)
        for (name, kind), (value, _) in facts.items()
        for telling in RELATIONS[kind].tellings
    ]
    known = names[: people // 2]
    told += [
        Document(RELATIONS[kind].question.format(name=name, answer=answer), name, kind, True)
        for (name, kind), (_, answer) in facts.items()
        if name in known
    ]
    documents = [told[i] for i in some(len(told), len(told))]
    where: dict[tuple[str, str], list[int]] = {}
    for number, document in enumerate(documents):
        where.setdefault((document.name, document.relation), []).append(number)
    questions = []
    for name in names[people // 2 :]:
        for kind in (kinds[i] for i in some(asked, len(kinds))):
            prompt = RELATIONS[kind].question.format(name=name, answer="").strip()
            questions.append(Question(prompt, facts[name, kind][1], name, kind, tuple(where[name, kind])))
    return World(documents, questions)


def content(text: str) -> set[str]:
    """Return the content words of a text."""
    return set(text.split()) - FUNCTION_WORDS
