"""What MLflow gets of a scoring job."""

import json
from collections import Counter

from serve.scoring_run import MAX_TAG_CHARACTERS, tags_of
from serve.summary import JobSummary


def test_a_tag_of_many_classes_is_json_of_the_most_frequent() -> None:
    counts = {f"a breed of dogs, number {number}": 2000 - number for number in range(1000)}
    text = tags_of(JobSummary(predicted=Counter(counts)))["purebred.predicted"]
    assert MAX_TAG_CHARACTERS / 2 < len(text) <= MAX_TAG_CHARACTERS
    found = json.loads(text)
    assert list(found.items()) == list(counts.items())[: len(found)]
