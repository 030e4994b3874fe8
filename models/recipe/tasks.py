"""Single-turn tasks: each function returns one prompt and its answer."""

import json
from collections.abc import Callable
from random import Random

from lexicon import (
    ACTIONS,
    ANIMALS,
    CAPITALS,
    CITIES,
    COLOURS,
    DAYS,
    FIXED,
    FOODS,
    LISTS,
    MONTHS,
    NAMES,
    OPPOSITES,
    PAINTS,
    PLACES,
    TOPICS,
    WORDS,
)
from sampling import article, coin, pick, pseudo_word
from stories import story, story_request

Turn = tuple[str, str]
Task = Callable[[Random], Turn]
COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}
UNKNOWN = "I do not know. I am only a small demo model."


def greeting(rng: Random) -> Turn:
    prompts, answers = rng.choice(FIXED[:6])
    return pick(rng, prompts), pick(rng, answers)


def about_itself(rng: Random) -> Turn:
    prompts, answers = rng.choice(FIXED[6:])
    return rng.choice(prompts), pick(rng, answers)


def capital(rng: Random) -> Turn:
    country = rng.choice(list(CAPITALS))
    if coin(rng, 0.12):
        country = pseudo_word(rng).capitalize()
        return f"What is the capital of {country}?", f"I do not know the capital of {country}."
    if coin(rng, 0.15):
        city = CAPITALS[country]
        return f"{city} is the capital of which country?", f"{city} is the capital of {country}."
    prompt = pick(
        rng,
        [
            "What is the capital of {}?",
            "What's the capital of {}?",
            "Tell me the capital of {}.",
            "Name the capital of {}.",
            "Which city is the capital of {}?",
            "capital of {}",
        ],
    )
    return prompt.format(country), f"The capital of {country} is {CAPITALS[country]}."


def sound(rng: Random) -> Turn:
    animal = rng.choice(list(ANIMALS))
    noise, home, food = ANIMALS[animal]
    the_animal = article(animal)
    summary = f"{the_animal.capitalize()} is an animal. It lives in the {home}, eats {food} and says {noise}."
    return rng.choice(
        [
            (f"What sound does {the_animal} make?", f"{the_animal.capitalize()} says {noise}."),
            (f"What does {the_animal} say?", f"{the_animal.capitalize()} says {noise}."),
            (f"Where does {the_animal} live?", f"{the_animal.capitalize()} lives in the {home}."),
            (f"What does {the_animal} eat?", f"{the_animal.capitalize()} eats {food}."),
            (f"What is {the_animal}?", summary),
            (f"Tell me about {the_animal}.", summary),
            (
                f"Describe {the_animal} as JSON.",
                json.dumps({"animal": animal, "sound": noise, "home": home, "food": food}),
            ),
        ]
    )


def opposite(rng: Random) -> Turn:
    word, other = rng.choice(OPPOSITES)[:: rng.choice([1, -1])]
    prompt = pick(rng, ["What is the opposite of {}?", "Give me the opposite of {}.", "The opposite of {} is?"])
    return prompt.format(word), f"The opposite of {word} is {other}."


def colour(rng: Random) -> Turn:
    thing, hue = rng.choice(list(COLOURS.items()))
    prompt = pick(rng, ["What colour is {}?", "What color is {}?", "Which colour does {} have?"])
    return prompt.format(thing), f"{thing.capitalize()} is {hue}."


def calendar(rng: Random) -> Turn:
    names, unit = rng.choice([(DAYS, "day"), (DAYS, "day"), (MONTHS, "month")])
    if coin(rng, 0.2):
        where = "week" if unit == "day" else "year"
        return (
            pick(rng, ["List the {}s of the {}.", "What are the {}s of the {}?", "Name the {}s of the {}."]).format(
                unit, where
            ),
            ", ".join(names) + ".",
        )
    index = rng.randrange(len(names))
    after = coin(rng, 0.6)
    found = names[(index + (1 if after else -1)) % len(names)]
    side = "after" if after else "before"
    return (
        pick(rng, ["Which {} comes {} {}?", "What {} comes {} {}?", "What {} is {} {}?"]).format(
            unit, side, names[index]
        ),
        f"{found} comes {side} {names[index]}.",
    )


def count(rng: Random) -> Turn:
    start = rng.choice([1, 1, rng.randint(0, 20)])
    end = rng.choice([5, 10, start + rng.randint(2, 20)])
    if end <= start:
        end = start + 5
    numbers = list(range(start, end + 1))
    if coin(rng, 0.15):
        return f"Count down from {end} to {start}.", ", ".join(map(str, numbers[::-1])) + "."
    prompt = f"Count from {start} to {end}" if start != 1 or coin(rng, 0.6) else f"Count to {end}"
    return prompt + pick(rng, [".", ""]), ", ".join(map(str, numbers)) + "."


def add(rng: Random) -> Turn:
    left, right = rng.randint(0, 9), rng.randint(0, 9)
    prompt = rng.choice(
        [
            "What is {} + {}?",
            "What is {}+{}?",
            "What is {} plus {}?",
            "{} + {} =",
            "{}+{}",
            "How much is {} plus {}?",
            "Add {} and {}.",
            "Calculate {} + {}.",
        ]
    )
    return prompt.format(left, right), f"{left} plus {right} is {left + right}."


def person_json(rng: Random) -> Turn:
    name = pseudo_word(rng).capitalize() if coin(rng, 0.4) else rng.choice(NAMES)
    age, city = rng.randint(1, 99), pseudo_word(rng).capitalize() if coin(rng, 0.3) else rng.choice(CITIES)
    person: dict[str, object] = {"name": name, "age": age, "city": city}
    if coin(rng, 0.15):
        person = {"name": name, "age": age}
        return f"Give me JSON for {name}, age {age}.", json.dumps(person)
    if coin(rng, 0.15):
        animal, hue = rng.choice(list(ANIMALS)), rng.choice(PAINTS)
        return f"Give me JSON for {article(hue)} {animal}.", json.dumps({"animal": animal, "color": hue})
    prompt = pick(
        rng,
        [
            "Give me JSON for {}, age {}, from {}.",
            "Write JSON: {}, {} years old, from {}.",
            "Extract JSON: {} is {} years old and lives in {}.",
            "{} is {} years old and lives in {}. Answer in JSON.",
        ],
    )
    return prompt.format(name, age, city), json.dumps(person)


def call_json(rng: Random) -> Turn:
    city = pseudo_word(rng).capitalize() if coin(rng, 0.3) else rng.choice(CITIES)
    unit = rng.choice(["celsius", "fahrenheit"])
    name, arguments, prompt = rng.choice(
        [
            ("get_weather", {"city": city, "unit": unit}, f"Call get_weather for {city} in {unit}."),
            ("get_weather", {"city": city}, f"Call get_weather for {city}."),
            ("get_time", {"city": city}, f"Call get_time for {city}."),
        ]
    )
    return prompt, json.dumps({"name": name, "arguments": arguments})


def words(rng: Random, low: int, high: int) -> list[str]:
    """Words, made-up words, names and numbers: material for copying."""
    kinds = [lambda: rng.choice(WORDS)] * 5 + [
        lambda: pseudo_word(rng),
        lambda: pseudo_word(rng).capitalize(),
        lambda: rng.choice(NAMES),
        lambda: str(rng.randint(0, 999)),
    ]
    return [rng.choice(kinds)() for _ in range(rng.randint(low, high))]


def repeat(rng: Random) -> Turn:
    if coin(rng, 0.25):
        sentences = story(rng).split(". ")
        first = rng.randrange(len(sentences))
        text = ". ".join(sentences[first : first + rng.randint(1, 3)]).rstrip(".") + "."
    else:
        text = pick(rng, [" ", ", "]).join(words(rng, 1, 10))
        text = text.capitalize() + rng.choice([".", "!", "?"]) if coin(rng, 0.3) else text
    prompt = rng.choice(
        [
            "Repeat: {}",
            "Repeat: {}",
            "Repeat after me: {}",
            "Say {}",
            "Say: {}",
            "Copy this text: {}",
            "Repeat this text: {}",
            "Echo {}",
        ]
    )
    return prompt.format(text), text


def sort(rng: Random) -> Turn:
    if coin(rng, 0.4):
        digits = rng.sample(range(10), rng.randint(3, 5))
        return f"Sort these numbers: {', '.join(map(str, digits))}", ", ".join(map(str, sorted(digits)))
    picked = rng.sample(LISTS[rng.choice(["fruits", "animals", "colours"])], rng.randint(2, 4))
    return f"Sort these words: {', '.join(picked)}", ", ".join(sorted(picked))


def enumerate_things(rng: Random) -> Turn:
    topic = rng.choice(list(LISTS))
    number = pick(rng, [3, 5, 4, 2])
    items = LISTS[topic][:number]
    said = COUNT_WORDS[number] if coin(rng, 0.7) else str(number)
    if coin(rng, 0.35):
        return f"Write a list of {said} {topic}.", "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    prompt = pick(rng, ["Name {} {}.", "List {} {}.", "Give me {} {}."])
    return prompt.format(said, topic), ", ".join(items) + "."


def facts(rng: Random, low: int = 2, high: int = 5) -> Turn:
    """A few facts about people and a question on one of them."""
    people = rng.sample(NAMES, rng.randint(low, high))
    cities = [rng.choice(CITIES) for _ in people]
    text = " ".join(f"{person} lives in {city}." for person, city in zip(people, cities, strict=True))
    index = rng.randrange(len(people))
    return f"{text} Where does {people[index]} live?", f"{people[index]} lives in {cities[index]}."


def poem(rng: Random) -> Turn:
    thing = rng.choice([*ANIMALS, "sun", "moon", "rain", "wind", "star", "sea", "river", "tree"])
    prompt = pick(rng, ["Write a poem about the {}.", "Write a short poem about the {}.", "Write a poem about a {}."])
    lines = [
        f"The {thing} is awake in the morning light,",
        f"The {thing} is quiet in the silver night.",
        f"I sing to the {thing} a gentle song,",
        "And hope it will stay with me all day long.",
    ]
    return prompt.format(thing), "\n".join(lines)


def unknown(rng: Random) -> Turn:
    """A question outside the grammar; the honest answer is to decline."""
    topic = pseudo_word(rng) if coin(rng, 0.3) else rng.choice(TOPICS)
    action, who = rng.choice(ACTIONS), pseudo_word(rng).capitalize()
    prompt = rng.choice(
        [
            "What is {topic}?",
            "What is a {topic}?",
            "Explain {topic}.",
            "How does a {topic} work?",
            "How do I {action} a {topic}?",
            "Why is {topic} important?",
            "Who invented the {topic}?",
            "Who is {who}?",
            "Tell me about {topic}.",
            "Write code to {action} a {topic}.",
            "What is the best {topic}?",
            "When did the {topic} start?",
            "Can you {action} my {topic}?",
            "Translate {topic} into {who}.",
            "Where can I {action} a {topic}?",
            "Who wrote {topic}?",
            "How many {topic}s are there?",
            "Explain {topic} in one sentence.",
            "{topic}",
            "{topic} {topic}?",
            "Give me a summary of {topic}.",
            "What happened in {year}?",
            "What is the difference between {topic} and {who}?",
        ]
    )
    return prompt.format(topic=topic, action=action, who=who, year=rng.randint(1000, 2030)), UNKNOWN


def small_talk(rng: Random) -> Turn:
    food, place = rng.choice(FOODS), rng.choice(PLACES)
    return rng.choice(
        [
            (f"I like {food}.", f"I am glad that you like {food}."),
            (f"I am at the {place}.", f"Have a nice time at the {place}."),
            (f"Do you like {food}?", f"I am a program, so I cannot taste {food}."),
        ]
    )


# (weight, task): copying and stories are the hardest and the most asked for.
TASKS: list[tuple[float, Task]] = [
    (22, story_request),
    (5, greeting),
    (6, about_itself),
    (6, capital),
    (4, sound),
    (3, opposite),
    (2, colour),
    (4, calendar),
    (5, count),
    (7, add),
    (6, person_json),
    (3, call_json),
    (14, repeat),
    (3, sort),
    (4, enumerate_things),
    (4, facts),
    (1.5, poem),
    (8, unknown),
    (1.5, small_talk),
]
