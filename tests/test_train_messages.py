"""Bad input to what is about training: each mistake is refused in the words that say what came and what to do."""

import pytest

from tests import messages, messages_training


@pytest.mark.parametrize("case", messages_training.CASES, ids=lambda case: case.name)
def test_the_message_names_what_came_and_the_way_out(case: messages.Bad) -> None:
    said = messages.message_of(case)
    missing = [word for word in case.words if word not in said]
    assert not missing, said
