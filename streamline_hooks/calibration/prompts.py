"""What a model is asked to write about when it makes its own calibration text."""

from __future__ import annotations

import random
from collections.abc import Iterator

FORMS = (
    "Explain {topic} to somebody who has never heard of it.",
    "Write a short story in which {topic} plays a part.",
    "List ten facts about {topic}, with a sentence on each.",
    "Write a dialogue between two friends who disagree about {topic}.",
    "Write a small, commented Python program that has to do with {topic}, and say how it works.",
    "Write a letter to a colleague who has asked for advice on {topic}.",
    "Write a step-by-step guide for a beginner on {topic}.",
    "Describe the history of {topic} in a few paragraphs.",
    "Write a newspaper article about a recent event that concerns {topic}.",
    "Make up five questions about {topic} and answer each one in detail.",
    "Compare two views of {topic}, and say which one you find more convincing and why.",
    "Write a page of a diary by somebody whose life is all about {topic}.",
    "Pose a calculation problem about {topic}, then solve it step by step.",
    "Write a speech that opens a conference on {topic}.",
    "Describe common mistakes with {topic} and how to avoid them.",
    "Write a poem about {topic}, then explain its images.",
)

TOPICS = (
    "sourdough bread",
    "the tides of the sea",
    "learning a second language",
    "bicycle repair",
    "the human heart",
    "medieval castles",
    "keeping bees",
    "sorting algorithms",
    "the weather in the mountains",
    "a family budget",
    "black holes",
    "jazz music",
    "volcanoes",
    "teaching children to read",
    "the stock market",
    "chess openings",
    "coral reefs",
    "the printing press",
    "gardening in a small space",
    "railway journeys",
    "vaccines",
    "board games",
    "ancient Rome",
    "electric cars",
    "sleep and dreams",
    "football tactics",
    "the life of a star",
    "job interviews",
    "databases",
    "migrating birds",
    "pottery",
    "courts and trials",
    "the immune system",
    "moving to a new city",
    "the Silk Road",
    "photography at night",
    "probability and dice",
    "a village school",
    "water supply in big cities",
    "film music",
    "elections",
    "soil and farming",
    "ocean exploration",
    "old maps",
    "spreadsheets",
    "friendship",
    "bridges",
    "winter sports",
)


def prompts(seed: int | str) -> Iterator[str]:
    """Yield every form with every topic in an order that the seed decides, then all again in another, for ever.

    Examples
    --------
    >>> from itertools import islice
    >>> len(set(islice(prompts(0), len(FORMS) * len(TOPICS))))
    768
    """
    every = [form.format(topic=topic) for form in FORMS for topic in TOPICS]
    shuffle = random.Random(seed).shuffle
    while True:
        shuffle(every)
        yield from every
